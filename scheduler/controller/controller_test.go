package controller

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/cache"
)

func TestRunRetriesWithBackoffAndEndsCleanly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		q := NewQueue[string]("test", nil)
		var calls []time.Duration
		start := time.Now()
		done := make(chan error, 1)
		var background atomic.Bool
		go func() {
			done <- Run(ctx, Work[string]{Queue: q, Sync: func(_ context.Context, key string) error {
				calls = append(calls, time.Since(start))
				switch {
				case len(calls) == 2:
					panic("tripped")
				case len(calls) < 5:
					return errors.New("not yet")
				}
				return nil
			}, Background: []func(context.Context){func(ctx context.Context) { <-ctx.Done(); background.Store(true) }}})
		}()
		q.Add("a")
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(calls) != 5 {
			t.Fatalf("%d calls, want 5 (4 failures, one of them a panic)", len(calls))
		}
		for i := 2; i < len(calls); i++ {
			if got, want := calls[i]-calls[i-1], RetryFirst<<(i-1); got != want {
				t.Errorf("delay before call %d: %v, want %v", i+1, got, want)
			}
		}
		if q.Retries("a") != 0 {
			t.Error("failures are remembered after a success")
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		if !background.Load() {
			t.Error("Run returned before its background work ended")
		}
	})
}

func TestAStuckKeyCostsLessThanOneCallAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := NewQueue[string]("test", nil)
		var calls atomic.Int32
		go func() {
			_ = Run(t.Context(), Work[string]{Queue: q, Sync: func(context.Context, string) error {
				calls.Add(1)
				return errors.New("never")
			}})
		}()
		q.Add("a")
		time.Sleep(time.Hour)
		synctest.Wait()
		before := calls.Load()
		time.Sleep(time.Hour)
		synctest.Wait()
		if got := calls.Load() - before; got == 0 || got > 60 {
			t.Errorf("%d calls in an hour, want some, and at most 60", got)
		}
	})
}

func TestALaggingViewDoesNotWaitForTheBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := NewQueue[string]("test", nil)
		var calls atomic.Int32
		var lagging atomic.Bool
		go func() {
			_ = Run(t.Context(), Work[string]{Queue: q, Sync: func(context.Context, string) error {
				calls.Add(1)
				if lagging.Load() {
					return fmt.Errorf("wrapped: %w", ErrStaleView)
				}
				return errors.New("lasting fault")
			}})
		}()
		q.Add("a")
		time.Sleep(time.Hour)
		synctest.Wait()
		lagging.Store(true)
		before := calls.Load()
		q.Add("a")
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := calls.Load() - before; got < 60 || got > 75 {
			t.Errorf("%d calls in a minute of a lagging view, want about one a second", got)
		}
	})
}

func TestRunWaitsForTheView(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		client := fake.NewClientset(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: "x",
			ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "m"}}}})
		f := NewFactory(client)
		inf := f.Core().V1().Pods().Informer()
		q := NewQueue[string]("test", nil)
		var synced []string
		done := make(chan error, 1)
		var gate atomic.Bool
		go func() {
			done <- Run(ctx, Work[string]{
				Queue:   q,
				Watches: []Watch{On(inf, func(old, cur *corev1.Pod) { q.Add(Key(cur)) })},
				Ready:   []cache.InformerSynced{gate.Load},
				Sync:    func(_ context.Context, key string) error { synced = append(synced, key); return nil },
			})
		}()
		f.Start(ctx.Done())
		time.Sleep(time.Second)
		synctest.Wait()
		if len(synced) != 0 {
			t.Fatalf("worked on %v before it was ready", synced)
		}
		gate.Store(true)
		time.Sleep(time.Second)
		synctest.Wait()
		if len(synced) != 1 || synced[0] != "a/x" {
			t.Fatalf("worked on %v, want a/x once", synced)
		}
		obj, _, _ := inf.GetIndexer().GetByKey("a/x")
		if obj.(*corev1.Pod).ManagedFields != nil {
			t.Error("the view keeps managed fields")
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		f.Shutdown()
	})
}

type fakeStore struct {
	objs map[string]any
	rv   string
}

func (s fakeStore) GetByKey(key string) (any, bool, error) { o, ok := s.objs[key]; return o, ok, nil }
func (s fakeStore) LastStoreSyncResourceVersion() string   { return s.rv }

func pod(name, uid, rv string, deleting bool) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(uid), ResourceVersion: rv}}
	if deleting {
		p.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
	}
	return p
}

func TestLedger(t *testing.T) {
	t0 := time.Unix(1000, 0)
	for _, tc := range []struct {
		what    string
		created bool
		view    fakeStore
		after   time.Duration
		want    int
	}{
		{"creation not shown", true, fakeStore{rv: "9"}, 0, 1},
		{"creation not shown, version unknown", true, fakeStore{}, 0, 1},
		{"creation shown", true, fakeStore{rv: "9", objs: map[string]any{"ns/a": pod("a", "u", "10", false)}}, 0, 0},
		{"creation passed: came and went", true, fakeStore{rv: "11"}, 0, 0},
		{"update not shown", true, fakeStore{rv: "9", objs: map[string]any{"ns/a": pod("a", "u", "8", false)}}, 0, 1},
		{"creation at the view's very version", true, fakeStore{rv: "10"}, 0, 0},
		{"another object has the name", true, fakeStore{rv: "9", objs: map[string]any{"ns/a": pod("a", "other", "5", false)}}, 0, 1},
		{"creation given up", true, fakeStore{rv: "9"}, LedgerTimeout, 0},
		{"deletion not shown", false, fakeStore{rv: "99", objs: map[string]any{"ns/a": pod("a", "u", "10", false)}}, 0, 1},
		{"deletion shown as terminating", false, fakeStore{objs: map[string]any{"ns/a": pod("a", "u", "10", true)}}, 0, 0},
		{"deletion shown as gone", false, fakeStore{}, 0, 0},
		{"deletion shown as replaced", false, fakeStore{objs: map[string]any{"ns/a": pod("a", "other", "10", false)}}, 0, 0},
	} {
		t.Run(tc.what, func(t *testing.T) {
			l := NewLedger(tc.view)
			if tc.created {
				l.Wrote("k", pod("a", "u", "10", false), t0)
			} else {
				l.Deleted("k", pod("a", "u", "10", false), t0)
			}
			if got := l.Pending("k", t0.Add(tc.after)); got != tc.want {
				t.Errorf("pending %d, want %d", got, tc.want)
			}
			if got := l.Pending("other", t0); got != 0 {
				t.Errorf("pending of another key: %d", got)
			}
			l.Forget("k")
			if got := l.Pending("k", t0); got != 0 {
				t.Errorf("pending after Forget: %d", got)
			}
			if len(l.writes) != 0 {
				t.Error("the ledger keeps what is settled")
			}
		})
	}
}

func TestClaims(t *testing.T) {
	owner := func(deleting bool) *corev1.Pod { return pod("owner", "o", "1", deleting) }
	mine := metav1.OwnerReference{UID: "o", Controller: new(true)}
	other := metav1.OwnerReference{UID: "p", Controller: new(true)}
	plain := metav1.OwnerReference{UID: "o"}
	obj := func(name, label string, refs ...metav1.OwnerReference) *corev1.Pod {
		p := pod(name, name, "1", strings.HasPrefix(name, "dying"))
		p.Labels = map[string]string{"l": label}
		p.OwnerReferences = refs
		return p
	}
	far := obj("far", "x")
	far.Namespace = "elsewhere"
	all := []*corev1.Pod{
		obj("owned", "x", mine), obj("dying-owned", "x", mine), obj("released", "y", mine), obj("others", "x", other),
		obj("orphan", "x"), obj("orphan-plain-ref", "x", plain), obj("dying-orphan", "x"), obj("stranger", "y"), far,
	}
	sel := labels.SelectorFromSet(labels.Set{"l": "x"})
	names := func(ps []*corev1.Pod) string {
		var s []string
		for _, p := range ps {
			s = append(s, p.Name)
		}
		return strings.Join(s, " ")
	}
	c := PlanClaims(owner(false), sel, all)
	if got, want := fmt.Sprint(names(c.Owned), "|", names(c.Adopt), "|", names(c.Release)), "owned dying-owned|orphan orphan-plain-ref|released"; got != want {
		t.Errorf("claims %q, want %q", got, want)
	}
	d := PlanClaims(owner(true), sel, all)
	if got, want := fmt.Sprint(names(d.Owned), "|", names(d.Adopt), "|", names(d.Release)), "owned dying-owned||"; got != want {
		t.Errorf("claims of an owner that is being deleted %q, want %q", got, want)
	}

	gr := schema.GroupResource{Resource: "pods"}
	patched := map[string]string{}
	m := Claimer{
		Kind:  schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "ReplicaSet"},
		Fresh: func(context.Context) (metav1.Object, error) { return owner(false), nil },
		Patch: func(_ context.Context, name string, p []byte) error {
			patched[name] = string(p)
			if name == "orphan" {
				return apierrors.NewNotFound(gr, name)
			}
			return nil
		},
	}
	got, err := Claim(t.Context(), owner(false), c, m)
	if err != nil || names(got) != "owned dying-owned orphan-plain-ref" {
		t.Errorf("owned now: %s, %v", names(got), err)
	}
	if want := `{"metadata":{"ownerReferences":[{"$patch":"delete","uid":"o"}],"uid":"released"}}`; patched["released"] != want {
		t.Errorf("release patch %s, want %s", patched["released"], want)
	}
	m.Fresh = func(context.Context) (metav1.Object, error) { return owner(true), nil }
	got, err = Claim(t.Context(), owner(false), c, m)
	if err == nil || names(got) != "owned dying-owned" {
		t.Errorf("an owner whose deletion the view does not show yet adopted: %s, %v", names(got), err)
	}
}
