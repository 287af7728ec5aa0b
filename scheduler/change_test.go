package scheduler

import (
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/record"
	volumehelpers "k8s.io/component-helpers/storage/volume"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

var podsGVR = schema.GroupVersionResource{Version: "v1", Resource: "pods"}

// atCommit calls something before the first binding of each named pod reaches the API, and lets the API refuse what no
// longer has the version that the binding is for.
type atCommit struct {
	*testing.T
	client *fake.Clientset
	mu     sync.Mutex // guards do
	do     map[string]func()
	sent   map[string]int
}

func (h *atCommit) refuse(name, version string) error {
	h.mu.Lock()
	h.sent[name]++
	do := h.do[name]
	delete(h.do, name)
	h.mu.Unlock()
	if do != nil {
		do()
	}
	obj, err := h.client.Tracker().Get(podsGVR, "default", name)
	if err != nil {
		return err
	}
	pod := obj.(*v1.Pod)
	switch {
	case version != "" && version != pod.ResourceVersion:
		return apierrors.NewConflict(podsGVR.GroupResource(), name, errVersion)
	case pod.DeletionTimestamp != nil:
		return apierrors.NewConflict(podsGVR.GroupResource(), name, errGoing)
	case len(pod.Spec.SchedulingGates) > 0:
		return apierrors.NewConflict(podsGVR.GroupResource(), name, errGated)
	}
	return nil
}

type text string

func (t text) Error() string { return string(t) }

const (
	errVersion = text("the ResourceVersion in the precondition does not match")
	errGoing   = text("the pod is being deleted, cannot be assigned to a host")
	errGated   = text("the pod has non-empty .spec.schedulingGates")
)

// change edits a pod in the store: the client is busy with the binding.
func (h *atCommit) change(name string, edit func(*v1.Pod)) {
	obj, err := h.client.Tracker().Get(podsGVR, "default", name)
	if err != nil {
		h.Error(err)
		return
	}
	p := obj.(*v1.Pod).DeepCopy()
	edit(p)
	p.ResourceVersion += "0"
	if err := h.client.Tracker().Update(podsGVR, p, "default"); err != nil {
		h.Error(err)
	}
}

// What changes between a decision and its commit voids that decision and no other; the pod is planned anew on what is so now.
func TestAPodThatChangesUnderTheDecision(t *testing.T) {
	big := func(n *v1.Node) { n.Labels["size"] = "big" }
	const anyNode = "a or b"
	cases := map[string]struct {
		others []*v1.Pod // on nodes
		change func(h *atCommit)
		want   string // where it is a minute later; "" nowhere, "gone" for no pod
		sent   int    // bindings of it, at least
		says   string // in an event
	}{
		"deleted": {change: func(h *atCommit) {
			if err := h.client.Tracker().Delete(podsGVR, "default", "p"); err != nil {
				h.Error(err)
			}
		}, want: "gone"},
		"being deleted": {change: func(h *atCommit) {
			h.change("p", func(p *v1.Pod) { p.DeletionTimestamp, p.Finalizers = &metav1.Time{Time: time.Now()}, []string{"x/y"} })
		}, want: ""},
		"made anew under its name, for another node": {change: func(h *atCommit) {
			if err := h.client.Tracker().Delete(podsGVR, "default", "p"); err != nil {
				h.Error(err)
			}
			create(h.T, h.client, testPod("p", "1", func(p *v1.Pod) {
				p.UID, p.ResourceVersion, p.Spec.NodeSelector = "another", "777", map[string]string{"size": "big"}
			}))
		}, want: "b"},
		"gated": {change: func(h *atCommit) {
			h.change("p", func(p *v1.Pod) { p.Spec.SchedulingGates = []v1.PodSchedulingGate{{Name: "x/g"}} })
		}, want: ""},
		"its node selector changed": {change: func(h *atCommit) {
			h.change("p", func(p *v1.Pod) { p.Spec.NodeSelector = map[string]string{"size": "big"} })
		}, want: "b", says: "ResourceVersion"},
		"labels that another pod keeps away from": {change: func(h *atCommit) {
			h.change("p", func(p *v1.Pod) { p.Labels = map[string]string{"loud": "yes"} })
		}, others: []*v1.Pod{testPod("quiet", "100m", func(p *v1.Pod) {
			p.Spec.NodeName = "a"
			p.Spec.Affinity = &v1.Affinity{PodAntiAffinity: &v1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []v1.PodAffinityTerm{{
				TopologyKey: v1.LabelHostname, LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"loud": "yes"}}}}}}
		})}, want: "b", says: "ResourceVersion"},
		"a toleration and its priority": {change: func(h *atCommit) {
			h.change("p", func(p *v1.Pod) {
				p.Spec.Priority, p.Spec.Tolerations = new(int32), []v1.Toleration{{Operator: v1.TolerationOpExists}}
			})
		}, want: anyNode, sent: 2},
		"only annotations and status": {change: func(h *atCommit) {
			h.change("p", func(p *v1.Pod) { p.Annotations = map[string]string{"note": "x"} })
		}, want: "a", sent: 2},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				h := &atCommit{T: t, do: map[string]func(){}, sent: map[string]int{}}
				// Node a is the better one for small pods; b is taken for half.
				h.client = newVersionedClient(h.refuse, testNode("a", "16"), testNode("b", "16", big), testPod("half", "8", func(p *v1.Pod) { p.Spec.NodeName = "b" }))
				h.do["p"] = func() { c.change(h) }
				for _, p := range c.others {
					create(t, h.client, p)
				}
				rec := placing(t, h.client, newHealth())
				settle(time.Second)
				p := testPod("p", "1")
				p.ResourceVersion = "100"
				create(t, h.client, p, testPod("bystander", "1"))
				settle(time.Second)
				if got := get(t, h.client, "bystander").Spec.NodeName; got == "" || h.sent["bystander"] != 1 {
					t.Errorf("the pod beside it is on %q after %d bindings", got, h.sent["bystander"])
				}
				settle(time.Minute)
				got, err := h.client.CoreV1().Pods("default").Get(t.Context(), "p", metav1.GetOptions{})
				switch {
				case apierrors.IsNotFound(err):
					if c.want != "gone" {
						t.Error(err)
					}
				case err != nil:
					t.Error(err)
				case c.want == anyNode && got.Spec.NodeName == "", c.want != anyNode && got.Spec.NodeName != c.want:
					t.Errorf("it is on %q, want %q: %+v", got.Spec.NodeName, c.want, got.Status.Conditions)
				}
				if h.sent["p"] < c.sent {
					t.Errorf("%d bindings, want at least %d", h.sent["p"], c.sent)
				}
				events := controllertest.Events(rec)
				if c.says != "" && !strings.Contains(strings.Join(events, "\n"), "FailedScheduling binding rejected: ") {
					t.Errorf("no event says why: %q", events)
				}
				// Nothing goes on about it.
				h.client.ClearActions()
				settle(time.Hour)
				if a := h.client.Actions(); len(a) > 0 {
					t.Errorf("requests while nothing changes: %v", a)
				}
			})
		})
	}
}

// What happens to the node, or to the pod's claim, while a decision waits for its turn: nothing is sent for it.
func TestWhatIsOvertakenIsNotSent(t *testing.T) {
	cases := map[string]struct {
		change func(t *testing.T, l *loop, pod *v1.Pod)
		says   string
	}{
		"the node is gone": {func(_ *testing.T, l *loop, _ *v1.Pod) { l.nodeChanged(testNode("a", "4"), nil) }, `node "a" is gone`},
		"the node is cordoned": {func(_ *testing.T, l *loop, _ *v1.Pod) {
			l.nodeChanged(testNode("a", "4"), testNode("a", "4", func(n *v1.Node) { n.Spec.Unschedulable = true }))
		}, "cordoned"},
		"the node is tainted": {func(_ *testing.T, l *loop, _ *v1.Pod) {
			l.nodeChanged(testNode("a", "4"), testNode("a", "4", func(n *v1.Node) { n.Spec.Taints = []v1.Taint{{Key: "k", Effect: v1.TaintEffectNoSchedule}} }))
		}, "tainted"},
		"the node offers less": {func(_ *testing.T, l *loop, _ *v1.Pod) { l.nodeChanged(testNode("a", "4"), testNode("a", "1")) }, "filled"},
		"the node is lost": {func(_ *testing.T, l *loop, _ *v1.Pod) {
			l.cfg.Health.(*fakeHealth).set("a", NodeHealth{State: Dead})
			l.applyHealth()
		}, "lost"},
		"the node was filled by somebody else": {func(_ *testing.T, l *loop, _ *v1.Pod) {
			l.podChanged(nil, testPod("other", "3", func(p *v1.Pod) { p.Spec.NodeName = "a" }))
		}, "filled"},
		"the claim is being deleted": {func(_ *testing.T, l *loop, _ *v1.Pod) {
			l.claimChanged(nil, boundClaim(func(c *v1.PersistentVolumeClaim) { c.DeletionTimestamp = &metav1.Time{} }))
		}, `persistentvolumeclaim "c" not found`}, // the lister of this test has none
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			client := newClient(func(pod, node string) error {
				t.Errorf("%s was to be bound to %s", pod, node)
				return nil
			})
			l, rec := loopOf(client)
			l.nodeChanged(nil, testNode("a", "4"))
			pod := testPod("p", "2")
			if strings.Contains(name, "claim") {
				l.claimChanged(nil, boundClaim())
				l.volumeChanged(nil, testVolume("pv1", "local", "a"))
				pod = testPod("p", "2", claiming("c"))
			}
			create(t, client, pod)
			l.podChanged(nil, pod)
			jobs, _, _ := l.plan()
			if len(jobs) != 1 {
				t.Fatalf("%d jobs", len(jobs))
			}
			if _, ok := jobs[0].(bindings); !ok {
				t.Fatalf("%+v", jobs[0])
			}
			c.change(t, l, pod)
			jobs[0].do(t.Context(), l)
			if events := strings.Join(controllertest.Events(rec), "\n"); !strings.Contains(events, "FailedScheduling binding rejected: ") || !strings.Contains(events, c.says) {
				t.Errorf("events: %s", events)
			}
			if got := podCondition(get(t, client, "p"), v1.PodScheduled); got == nil || got.Status != v1.ConditionFalse || !strings.Contains(got.Message, c.says) {
				t.Errorf("condition %+v", got)
			}
			if l.snapshot.PodNode(pod.UID) != "" || l.queue.Lengths().Backoff != 1 {
				t.Errorf("the decision holds its room on %q, queue %+v", l.snapshot.PodNode(pod.UID), l.queue.Lengths())
			}
		})
	}
	t.Run("what does not matter", func(t *testing.T) {
		client := newClient(nil)
		l, _ := loopOf(client)
		l.nodeChanged(nil, testNode("a", "4"))
		pod := testPod("p", "3")
		create(t, client, pod)
		l.podChanged(nil, pod)
		jobs, _, _ := l.plan()
		l.nodeChanged(testNode("a", "4"), testNode("a", "5"))
		l.nodeChanged(nil, testNode("b", "5"))
		jobs[0].do(t.Context(), l)
		if got := get(t, client, "p").Spec.NodeName; got != "a" {
			t.Errorf("on %q", got)
		}
	})
}

func boundClaim(edit ...func(*v1.PersistentVolumeClaim)) *v1.PersistentVolumeClaim {
	c := testClaim("c", "local")
	c.Spec.VolumeName = "pv1"
	metav1.SetMetaDataAnnotation(&c.ObjectMeta, volumehelpers.AnnBindCompleted, "yes")
	for _, fn := range edit {
		fn(c)
	}
	return c
}

// loopOf is a loop whose parts the test calls itself.
func loopOf(client *fake.Clientset) (*loop, *record.FakeRecorder) {
	rec := record.NewFakeRecorder(100)
	cfg := Config{Client: client, Health: newHealth(), Seed: 1, Recorder: func(string) record.EventRecorder { return rec }}
	cfg.setDefaults()
	return newLoop(cfg, controller.Deps{Client: client, Factory: cfg.Factory, Recorder: cfg.Recorder}), rec
}

// newVersionedClient is newClient whose bindings carry the version that they are for to refuse.
func newVersionedClient(refuse func(pod, version string) error, objs ...runtime.Object) *fake.Clientset {
	client := newClient(nil, objs...)
	client.PrependReactor("create", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if a.GetSubresource() != "binding" {
			return false, nil, nil
		}
		b := a.(clienttesting.CreateAction).GetObject().(*v1.Binding)
		err := refuse(b.Name, b.ResourceVersion)
		return err != nil, nil, err
	})
	return client
}
