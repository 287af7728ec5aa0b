package replicaset

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func set(replicas int32) *appsv1.ReplicaSet {
	l := map[string]string{"app": "web"}
	return &appsv1.ReplicaSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "rs-uid", Generation: 3, ResourceVersion: "5"},
		Spec: appsv1.ReplicaSetSpec{
			Replicas: &replicas,
			Selector: &metav1.LabelSelector{MatchLabels: l},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: l},
				Spec:       corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}},
			},
		},
	}
}

type opt func(*corev1.Pod)

func mk(name string, opts ...opt) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), ResourceVersion: "7",
			Labels: map[string]string{"app": "web"}, CreationTimestamp: metav1.NewTime(t0.Add(-time.Hour))},
		Spec:   corev1.PodSpec{NodeName: "n1"},
		Status: corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, o := range opts {
		o(p)
	}
	return p
}

func on(node string) opt           { return func(p *corev1.Pod) { p.Spec.NodeName = node } }
func phase(ph corev1.PodPhase) opt { return func(p *corev1.Pod) { p.Status.Phase = ph } }
func born(t time.Time) opt         { return func(p *corev1.Pod) { p.CreationTimestamp = metav1.NewTime(t) } }
func cost(s string) opt {
	return func(p *corev1.Pod) { p.Annotations = map[string]string{corev1.PodDeletionCost: s} }
}
func restarted(n int32) opt {
	return func(p *corev1.Pod) { p.Status.ContainerStatuses = []corev1.ContainerStatus{{RestartCount: n}} }
}
func ready(since time.Time) opt {
	return func(p *corev1.Pod) {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(since)}}
	}
}
func ownedBy(uid types.UID) opt {
	return func(p *corev1.Pod) {
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web", UID: uid, Controller: new(true)}}
	}
}
func deleting(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: t0} }

func names(ps []*corev1.Pod) string {
	var s []string
	for _, p := range ps {
		s = append(s, p.Name)
	}
	return strings.Join(s, " ")
}

func TestVictims(t *testing.T) {
	r := ready(t0.Add(-time.Hour))
	for _, tc := range []struct {
		what     string
		pods     []*corev1.Pod
		siblings []*corev1.Pod
		want     string
	}{
		{"unbound first", []*corev1.Pod{mk("a", phase(corev1.PodPending)), mk("b", on(""))}, nil, "b a"},
		{"pending, unknown, running", []*corev1.Pod{mk("run"), mk("unk", phase(corev1.PodUnknown)), mk("pend", phase(corev1.PodPending))}, nil, "pend unk run"},
		{"not ready first", []*corev1.Pod{mk("a", r), mk("b")}, nil, "b a"},
		{"lower cost first", []*corev1.Pod{mk("a", r, cost("10")), mk("b", r, cost("-5")), mk("c", r)}, nil, "b c a"},
		{"a bad cost is 0", []*corev1.Pod{mk("a", r, cost("1")), mk("b", r, cost("+5")), mk("c", r, cost("-1"))}, nil, "c b a"},
		{"doubled up first", []*corev1.Pod{mk("a", r, on("n1")), mk("b", r, on("n2"))}, []*corev1.Pod{mk("x", on("n2")), mk("y", on("n2")), mk("z", on("n1"))}, "b a"},
		{"a sibling that ends does not count", []*corev1.Pod{mk("b", r, on("n2")), mk("a", r, on("n1"))}, []*corev1.Pod{mk("x", on("n2"), deleting), mk("y", on("n2"), deleting), mk("z", on("n1"))}, "a b"},
		{"shorter ready first", []*corev1.Pod{mk("a", r), mk("b", ready(t0.Add(-time.Minute)))}, nil, "b a"},
		{"ready about as long: by uid", []*corev1.Pod{mk("b", r), mk("a", ready(t0.Add(-61*time.Minute)))}, nil, "a b"},
		{"more restarts first", []*corev1.Pod{mk("a", r), mk("b", r, restarted(3))}, nil, "b a"},
		{"younger first", []*corev1.Pod{mk("a", r), mk("b", r, born(t0.Add(-time.Minute)))}, nil, "b a"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			if got := names(victims(tc.pods, tc.siblings, t0)); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestPlanIsBounded(t *testing.T) {
	if got := plan(set(2000), nil, nil, t0).create; got != burst {
		t.Errorf("creates %d at once, want %d", got, burst)
	}
	var many []*corev1.Pod
	for i := range 700 {
		many = append(many, mk(fmt.Sprint(i)))
	}
	if got := len(plan(set(10), many, nil, t0).remove); got != burst {
		t.Errorf("removes %d at once, want %d", got, burst)
	}
	if got := plan(set(2), many[:2], nil, t0); got.create != 0 || len(got.remove) != 0 {
		t.Errorf("acts though nothing is to be done: %+v", got)
	}
}

// A set is given no more pods than it may have without a node, says so, and goes on saying so until it is clear of that.
func TestTooManyWaitingPodsHoldASetBack(t *testing.T) {
	rs := set(12000)
	var active []*corev1.Pod
	grow := func(n int, opts ...opt) {
		for range n {
			active = append(active, mk(fmt.Sprintf("p%d", len(active)), opts...))
		}
	}
	step := func(create int, says bool) {
		t.Helper()
		if got := plan(rs, active, nil, t0).create; got != create {
			t.Errorf("%d pods, %d may be made: %d are", len(active), create, got)
		}
		rs.Status = newStatus(rs, active, nil, held(rs, active), t0)
		got := ""
		for _, c := range rs.Status.Conditions {
			got += c.Reason + ": " + c.Message
		}
		if says != strings.Contains(got, "TooManyWaiting: 5000 pods wait for a node, which is the most at a time: the others of 12000") || !says && got != "" {
			t.Errorf("%d pods: the status says %q", len(active), got)
		}
	}
	step(burst, false)
	grow(controller.MaxWaiting-100, on(""))
	step(100, false)
	grow(100, on(""))
	step(0, true)
	for _, p := range active[:50] {
		p.Spec.NodeName = "n"
	}
	step(50, true)
	for _, p := range active {
		p.Spec.NodeName = "n"
	}
	step(burst, true) // it may happen again
	grow(12000-controller.MaxWaiting-len(active), on("n"))
	step(burst, false)
}

func TestNewStatus(t *testing.T) {
	rs := set(4)
	rs.Spec.MinReadySeconds = 60
	rs.Spec.Template.Labels = map[string]string{"app": "web", "v": "2"}
	full := func(p *corev1.Pod) { p.Labels = map[string]string{"app": "web", "v": "2", "more": "yes"} }
	active := []*corev1.Pod{mk("a", full, ready(t0.Add(-time.Hour))), mk("b", ready(t0.Add(-45*time.Second))), mk("c"), mk("d", ready(t0.Add(-50*time.Second)))}
	s := newStatus(rs, active, []*corev1.Pod{mk("e", deleting)}, nil, t0)
	if s.Replicas != 4 || s.FullyLabeledReplicas != 1 || s.ReadyReplicas != 3 || s.AvailableReplicas != 1 || *s.TerminatingReplicas != 1 || s.ObservedGeneration != 3 {
		t.Errorf("status %+v", s)
	}
	if got := nextAvailable(active, 60, t0); got != 10*time.Second {
		t.Errorf("next pod available in %v, want 10s", got)
	}
	rs.Status = newStatus(rs, active[:1], nil, errors.New("no quota"), t0)
	if c := rs.Status.Conditions; len(c) != 1 || c[0].Reason != "FailedCreate" || c[0].Message != "no quota" {
		t.Errorf("conditions after a failure %+v", c)
	}
	if c := newStatus(rs, active, nil, nil, t0).Conditions; len(c) != 0 {
		t.Errorf("conditions after success %+v", c)
	}
}

func pods(t *testing.T, client *fake.Clientset) []corev1.Pod {
	t.Helper()
	l, err := client.CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return l.Items
}

func settle() {
	time.Sleep(10 * time.Second)
	synctest.Wait()
}

func TestScaleUpDownAndReplace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(set(5))
		rec := controllertest.Start(t, client, nil, New)
		settle()
		if got := len(pods(t, client)); got != 5 {
			t.Fatalf("%d pods, want 5", got)
		}
		rs, _ := client.AppsV1().ReplicaSets("ns").Get(t.Context(), "web", metav1.GetOptions{})
		if rs.Status.Replicas != 5 || rs.Status.ObservedGeneration != 3 {
			t.Errorf("status %+v", rs.Status)
		}
		p := pods(t, client)[0]
		if ref := metav1.GetControllerOf(&p); ref == nil || ref.UID != "rs-uid" || p.GenerateName != "web-" || p.Labels["app"] != "web" {
			t.Errorf("pod made: %+v", p.ObjectMeta)
		}
		if ev := controllertest.Events(rec); len(ev) != 5 || !strings.HasPrefix(ev[0], "Normal SuccessfulCreate Created pod: web-") {
			t.Errorf("events %q", ev)
		}

		rs.Spec.Replicas = new(int32(2))
		if _, err := client.AppsV1().ReplicaSets("ns").Update(t.Context(), rs, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle()
		if got := len(pods(t, client)); got != 2 {
			t.Fatalf("%d pods after scaling down, want 2", got)
		}
		if err := client.CoreV1().Pods("ns").Delete(t.Context(), pods(t, client)[0].Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		settle()
		if got := len(pods(t, client)); got != 2 {
			t.Fatalf("%d pods after one was deleted, want 2", got)
		}
		if c, d := controllertest.Writes(client, "create", "pods"), controllertest.Writes(client, "delete", "pods"); c != 6 || d != 4 {
			t.Errorf("%d pods created and %d deleted (one by the test), want 6 and 4", c, d)
		}
		client.ClearActions()
		time.Sleep(time.Hour)
		synctest.Wait()
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
	})
}

func TestAdoptAndRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		foreign := mk("foreign", ownedBy("someone"))
		lost := mk("lost", ownedBy("rs-uid"))
		lost.Labels = map[string]string{"app": "debug"}
		client := controllertest.NewClient(set(2), mk("orphan"), foreign, lost)
		controllertest.Start(t, client, nil, New)
		settle()
		owner := map[string]types.UID{}
		made := 0
		for _, p := range pods(t, client) {
			if ref := metav1.GetControllerOf(&p); ref != nil {
				owner[p.Name] = ref.UID
			}
			if strings.HasPrefix(p.Name, "web-") {
				made++
			}
		}
		if owner["orphan"] != "rs-uid" || owner["foreign"] != "someone" || owner["lost"] != "" || made != 1 {
			t.Errorf("controllers %v, %d pods made; want the orphan adopted, lost released, foreign left, 1 made", owner, made)
		}
	})
}

func TestSlowStartStopsAtRefusal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(set(300))
		var refuse atomic.Bool
		refuse.Store(true)
		client.PrependReactor("create", "pods", func(clienttesting.Action) (bool, runtime.Object, error) {
			return refuse.Load(), nil, errors.New("exceeded quota")
		})
		rec := controllertest.Start(t, client, nil, New)
		settle()
		if got := controllertest.Writes(client, "create", "pods"); got == 0 || got > 15 {
			t.Errorf("%d creations were tried in 10s, want one each back-off", got)
		}
		rs, _ := client.AppsV1().ReplicaSets("ns").Get(t.Context(), "web", metav1.GetOptions{})
		if c := rs.Status.Conditions; len(c) != 1 || c[0].Type != appsv1.ReplicaSetReplicaFailure || c[0].Message != "exceeded quota" {
			t.Errorf("conditions %+v", c)
		}
		if ev := controllertest.Events(rec); len(ev) == 0 || ev[0] != "Warning FailedCreate Error creating: exceeded quota" {
			t.Errorf("events %q", ev)
		}
		refuse.Store(false)
		time.Sleep(controller.RetryLongest)
		settle()
		rs, _ = client.AppsV1().ReplicaSets("ns").Get(t.Context(), "web", metav1.GetOptions{})
		if len(pods(t, client)) != 300 || len(rs.Status.Conditions) != 0 {
			t.Errorf("%d pods, conditions %v; want 300 and none", len(pods(t, client)), rs.Status.Conditions)
		}
	})
}

// A view that lags must not make the controller create twice.
func TestNothingIsDecidedFromAStaleView(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(set(3))
		c := New(controller.Deps{
			Client: client, Factory: controller.NewFactory(client),
			Recorder: noEvents,
		}).(*replicaSets)
		// The view holds the set and never hears of the pods.
		if err := c.rsInf.GetIndexer().Add(set(3)); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			if err := c.sync(t.Context(), "ns/web"); err != nil && !strings.Contains(err.Error(), "have") {
				t.Fatal(err)
			}
		}
		if got := len(pods(t, client)); got != 3 {
			t.Errorf("%d pods, want 3", got)
		}
		time.Sleep(controller.LedgerTimeout)
		_ = c.sync(t.Context(), "ns/web")
		if got := len(pods(t, client)); got != 6 {
			t.Errorf("%d pods after the ledger gave up, want 6", got)
		}
		c.queue.Stop()
	})
}

func TestAvailabilityFollowsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		rs := set(1)
		rs.Spec.MinReadySeconds = 30
		client := controllertest.NewClient(rs, mk("a", ownedBy("rs-uid"), ready(time.Now())))
		controllertest.Start(t, client, nil, New)
		for _, want := range []int32{0, 1} {
			time.Sleep(29 * time.Second)
			synctest.Wait()
			rs, _ := client.AppsV1().ReplicaSets("ns").Get(t.Context(), "web", metav1.GetOptions{})
			if rs.Status.AvailableReplicas != want || rs.Status.ReadyReplicas != 1 {
				t.Errorf("at %v: %d available, want %d", time.Now(), rs.Status.AvailableReplicas, want)
			}
		}
	})
}

func noEvents(string) record.EventRecorder { return &record.FakeRecorder{} }
