package desired

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	ktesting "k8s.io/client-go/testing"
)

func pod(name string, refs ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("uid-" + name), ResourceVersion: "1"},
		Spec: corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "c", Image: "x"}}}}
	for _, r := range refs {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: r, VolumeSource: corev1.VolumeSource{
			ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: r}}}})
	}
	return p
}

// await re-reads a condition after each notification.
func await(t *testing.T, s *Store, what string, cond func() bool) {
	t.Helper()
	c, cancel := s.Subscribe()
	defer cancel()
	deadline := time.After(20 * time.Second)
	for !cond() {
		select {
		case <-c:
		case <-deadline:
			t.Fatalf("timed out waiting for %s", what)
		}
	}
}

// testKey seals the files of all tests.
var testKey = bytes.Repeat([]byte{7}, KeySize)

// unreachable is an API that answers nothing.
func unreachable() *fake.Clientset {
	c := fake.NewClientset()
	c.PrependReactor("*", "*", func(ktesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("connection refused")
	})
	return c
}

func mustOpen(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(path, testKey, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// run starts Run and returns a function that stops it and waits.
func run(t *testing.T, s *Store, c *fake.Clientset) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx, c, "n1") }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

func TestRebootWithoutAPI(t *testing.T) {
	path := filepath.Join(t.TempDir(), "desired.db")
	c := fake.NewClientset(pod("a", "conf", "missing"), &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "svc", ResourceVersion: "1"}},
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", ResourceVersion: "1"}},
		&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "conf", ResourceVersion: "1"}, Data: map[string]string{"k": "v"}})
	s := mustOpen(t, path)
	if s.Synced() || s.Known(Services) {
		t.Error("synced before any list")
	}
	stop := run(t, s, c)
	// The fake serves a metadata.name selector by returning everything, so both references see "conf" in the list; the
	// absent one is told apart by its key.
	await(t, s, "the references", func() bool {
		_, e1 := s.ConfigMap("default", "conf")
		_, e2 := s.ConfigMap("default", "missing")
		return e1 == nil && apierrors.IsNotFound(e2) && s.Synced()
	})
	s.PutRecord(&Record{UID: "uid-a", Namespace: "default", Name: "a", Admitted: true,
		Containers: map[string]ContainerRecord{"c": {Restarts: 3, Backoff: 20 * time.Second, BackoffAt: time.Unix(100, 5).UTC()}}})
	s.PutToken("uid-a", "api/3600", &authv1.TokenRequest{Status: authv1.TokenRequestStatus{Token: "secret"}})
	stop()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	// The API is gone: every list and watch fails.
	down := unreachable()
	s = mustOpen(t, path)
	defer s.Close()
	attempts := func() int { return len(down.Actions()) }
	stop = run(t, s, down)
	for attempts() < 12 { // each of the reflectors failed at least twice
		time.Sleep(5 * time.Millisecond)
	}
	if s.Synced(Pods) {
		t.Error("synced although every list failed")
	}
	if !s.Known(Services, Nodes) || s.Known(EndpointSlices) {
		t.Error("what an earlier process heard, and only that, should be known")
	}
	if len(s.Pods()) != 1 || s.Pod("default", "a") == nil || len(s.Services()) != 1 || s.Node("n1") == nil {
		t.Errorf("lost content: %d pods, %d services", len(s.Pods()), len(s.Services()))
	}
	if m, err := s.ConfigMap("default", "conf"); err != nil || m.Data["k"] != "v" {
		t.Errorf("configmap: %v %v", m, err)
	}
	if _, err := s.ConfigMap("default", "missing"); !apierrors.IsNotFound(err) {
		t.Errorf("the absence of an object was forgotten: %v", err)
	}
	if _, err := s.ConfigMap("default", "never"); !errors.Is(err, ErrUnknown) {
		t.Errorf("want ErrUnknown, got %v", err)
	}
	r := s.Record("uid-a")
	if r == nil || !r.Admitted || r.Containers["c"].Restarts != 3 || !r.Containers["c"].BackoffAt.Equal(time.Unix(100, 5)) {
		t.Errorf("record: %+v", r)
	}
	if tok := s.Token("uid-a", "api/3600"); tok == nil || tok.Status.Token != "secret" {
		t.Errorf("token: %v", tok)
	}
	stop()

	// The API is back and no longer has the pod: now it goes, and what it referred to as well.
	stop = run(t, s, fake.NewClientset())
	await(t, s, "the removal", func() bool { return len(s.Pods()) == 0 })
	await(t, s, "the references' removal", func() bool { _, err := s.ConfigMap("default", "conf"); return errors.Is(err, ErrUnknown) })
	stop()
	s.DeleteTokens("uid-a")
	if s.Token("uid-a", "api/3600") != nil {
		t.Error("token not deleted")
	}
}

func TestOtherNodesFileIsEmptied(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.db")
	s := mustOpen(t, path)
	stop := run(t, s, fake.NewClientset(pod("a")))
	await(t, s, "the pod", func() bool { return len(s.Pods()) == 1 })
	s.PutRecord(&Record{UID: "uid-a"})
	stop()
	if err := s.claim("n2"); err != nil {
		t.Fatal(err)
	}
	if len(s.Pods())+len(s.Records()) != 0 {
		t.Error("content of another node kept")
	}
	_ = s.Close()
	s = mustOpen(t, path)
	defer s.Close()
	if len(s.Pods())+len(s.Records()) != 0 {
		t.Error("content of another node is still on the disk")
	}
}

func TestOpenDamaged(t *testing.T) {
	build := func(t *testing.T) string {
		path := filepath.Join(t.TempDir(), "d.db")
		s := mustOpen(t, path)
		s.PutRecord(&Record{UID: "u", Namespace: "default", Name: strings.Repeat("x", 3000)})
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		return path
	}
	edit := func(f func(b []byte) []byte) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, f(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	bolt := func(f func(tx *bbolt.Tx) error) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			db, err := bbolt.Open(path, 0o600, nil)
			if err == nil {
				err = db.Update(f)
			}
			if err == nil {
				err = db.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, damage := range map[string]func(*testing.T, string){
		"garbage":   edit(func(b []byte) []byte { return bytes.Repeat([]byte("no "), 20000) }),
		"short":     edit(func(b []byte) []byte { return b[:100] }),
		"empty":     edit(func(b []byte) []byte { return nil }),
		"truncated": edit(func(b []byte) []byte { return b[:12<<10] }),
		"zeroed":    edit(func(b []byte) []byte { clear(b[8<<10:]); return b }),
		"bit flip": edit(func(b []byte) []byte {
			b[bytes.Index(b, []byte("xxxxxxxx"))+5] = 'y'
			return b
		}),
		"value": bolt(func(tx *bbolt.Tx) error {
			return tx.Bucket([]byte(Pods)).Put([]byte("a/b"), seal(flagObject, []byte("\x0a\xff")))
		}),
		"key": bolt(func(tx *bbolt.Tx) error {
			r := Record{UID: "x"}
			b, _ := r.marshal()
			return tx.Bucket([]byte(Records)).Put([]byte("y"), seal(flagObject, b))
		}),
	} {
		t.Run(name, func(t *testing.T) {
			path := build(t)
			damage(t, path)
			var logged bytes.Buffer
			s, err := Open(path, testKey, slog.New(slog.NewTextHandler(&logged, nil)))
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if len(s.Records()) != 0 || s.Synced() {
				t.Error("a damaged file was used")
			}
			if !strings.Contains(logged.String(), "corrupt") {
				t.Errorf("nothing was said: %q", logged.String())
			}
			if _, err := os.Stat(path + ".corrupt"); err != nil {
				t.Errorf("not moved aside: %v", err)
			}
		})
	}
	t.Run("in use", func(t *testing.T) {
		path := build(t)
		s := mustOpen(t, path)
		defer s.Close()
		if _, err := Open(path, testKey, nil); !errors.Is(err, ErrInUse) {
			t.Errorf("want ErrInUse, got %v", err)
		}
	})
	t.Run("newer", func(t *testing.T) {
		path := build(t)
		bolt(func(tx *bbolt.Tx) error { return tx.Bucket(metaBucket).Put(versionKey, []byte{0, 0, 0, 9}) })(t, path)
		if _, err := Open(path, testKey, nil); !errors.Is(err, ErrNewer) {
			t.Errorf("want ErrNewer, got %v", err)
		}
		if _, err := os.Stat(path); err != nil {
			t.Error("a newer file was moved")
		}
	})
}

func TestRefs(t *testing.T) {
	p := pod("a", "vol")
	p.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "pull"}}
	p.Spec.InitContainers = []corev1.Container{{EnvFrom: []corev1.EnvFromSource{{SecretRef: &corev1.SecretEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "from"}}}}}}
	p.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "A", ValueFrom: &corev1.EnvVarSource{ConfigMapKeyRef: &corev1.ConfigMapKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "vol"}}}}}
	p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{VolumeSource: corev1.VolumeSource{Projected: &corev1.ProjectedVolumeSource{Sources: []corev1.VolumeProjection{
		{ConfigMap: &corev1.ConfigMapProjection{LocalObjectReference: corev1.LocalObjectReference{Name: "kube-root-ca.crt"}}}}}}})
	want := []Ref{{Secrets, "default", "pull"}, {Secrets, "default", "from"}, {ConfigMaps, "default", "vol"}, {ConfigMaps, "default", "kube-root-ca.crt"}}
	got := Refs(p)
	if len(got) != len(want) {
		t.Fatalf("got %v", got)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%d: got %v, want %v", i, got[i], want[i])
		}
	}
}

func FuzzRecord(f *testing.F) {
	r := Record{UID: "u", Namespace: "n", Name: "x", Admitted: true, Status: &corev1.PodStatus{Phase: corev1.PodRunning}, Pod: pod("a"),
		Containers: map[string]ContainerRecord{"c": {Restarts: 1, Backoff: 1, BackoffAt: time.Unix(1, 0)}}}
	b, err := r.marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seal(flagObject, b))
	f.Add(seal(flagAbsent, nil))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		_, payload, err := open(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("unclassified error %v", err)
			}
			payload = b // past the checksum as well
		}
		var r, again Record
		if err := r.unmarshal(payload); err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("unclassified error %v", err)
			}
			return
		}
		out, err := r.marshal()
		if err != nil {
			t.Skip()
		}
		if err := again.unmarshal(out); err != nil {
			t.Fatalf("does not read what it writes: %v", err)
		}
	})
}

// Who follows a kind is told the names of what changed, once each, and nothing else.
func TestFollow(t *testing.T) {
	s := mustOpen(t, filepath.Join(t.TempDir(), "desired.db"))
	node := func(name, version string) *corev1.Node {
		return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name), ResourceVersion: version}}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(s.nodes.Replace([]any{node("a", "1"), node("b", "1")}, "1"))
	f := s.Follow(Nodes)
	defer f.End()
	taken := func(want ...string) {
		t.Helper()
		select {
		case <-f.C:
		default:
			t.Errorf("not told of %v", want)
		}
		if got := slices.Sorted(slices.Values(f.Take())); !slices.Equal(got, want) {
			t.Errorf("told of %v, want %v", got, want)
		}
	}
	taken("a", "b")
	must(s.nodes.Add(node("a", "2")))
	must(s.nodes.Add(node("a", "3")))
	must(s.nodes.Delete(node("b", "4")))
	must(s.pods.Add(pod("p")))
	taken("a", "b")
	must(s.nodes.Add(node("a", "3"))) // as it was
	select {
	case <-f.C:
		t.Errorf("told of %v though nothing changed", f.Take())
	default:
	}
	must(s.nodes.Replace([]any{node("c", "5")}, "5"))
	taken("a", "c")
}

// Of other nodes it holds what somebody here reads, whether they came with the first list or later: there may be thousands.
func TestOtherNodesAreSlim(t *testing.T) {
	s := mustOpen(t, filepath.Join(t.TempDir(), "desired.db"))
	s.self = "me"
	full := func(name string) *corev1.Node {
		room := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4")}
		return &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: "1", Annotations: map[string]string{"a": "b"}, Labels: map[string]string{"zone": "z"}, ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "m"}}},
			Spec:       corev1.NodeSpec{PodCIDR: "10.0.1.0/24", PodCIDRs: []string{"10.0.1.0/24"}},
			Status: corev1.NodeStatus{Capacity: room, Allocatable: room, Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady}},
				Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}}},
		}
	}
	if err := s.nodes.Replace([]any{full("first")}, "1"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"later", "me"} {
		if err := s.nodes.Add(full(name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range s.Nodes() {
		if n.ManagedFields != nil {
			t.Errorf("%s has managed fields", n.Name)
		}
		if n.Name == "me" {
			if n.Status.Allocatable == nil || n.Annotations == nil {
				t.Error("its own node lacks what the agent reads")
			}
			continue
		}
		want := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: n.Name, ResourceVersion: "1", Labels: map[string]string{"zone": "z"}},
			Spec: corev1.NodeSpec{PodCIDR: "10.0.1.0/24"}, Status: corev1.NodeStatus{Addresses: full("").Status.Addresses}}
		if !reflect.DeepEqual(n, want) {
			t.Errorf("%s is held as\n%+v, want\n%+v", n.Name, n, want)
		}
	}
}
