package node

import (
	"maps"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	coordv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

type fakeHealth struct {
	mu       sync.Mutex
	verdicts map[string]controller.NodeHealth
	subs     map[chan struct{}]bool
}

func (h *fakeHealth) set(state controller.HealthState, names ...string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, name := range names {
		h.verdicts[name] = controller.NodeHealth{State: state, Since: time.Now()}
	}
	for ch := range h.subs {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}

func (h *fakeHealth) Verdicts() map[string]controller.NodeHealth {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.verdicts)
}

func (h *fakeHealth) Subscribe() (<-chan struct{}, func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	ch := make(chan struct{}, 1)
	h.subs[ch] = true
	return ch, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.subs, ch)
	}
}

type world struct {
	t      *testing.T
	client *fake.Clientset
	health *fakeHealth
	events *record.FakeRecorder
}

func start(t *testing.T, objs ...runtime.Object) *world { return startWith(t, nil, objs...) }

// startWith starts a leadership that finds the given verdicts.
func startWith(t *testing.T, verdicts map[string]controller.NodeHealth, objs ...runtime.Object) *world {
	return startSet(t, Settings{}, verdicts, objs...)
}

func startSet(t *testing.T, set Settings, verdicts map[string]controller.NodeHealth, objs ...runtime.Object) *world {
	w := &world{t: t, client: controllertest.NewClient(objs...), health: &fakeHealth{verdicts: map[string]controller.NodeHealth{}, subs: map[chan struct{}]bool{}}}
	for _, o := range objs {
		if n, ok := o.(*corev1.Node); ok && n.Annotations["test/by-hand"] == "" {
			w.health.verdicts[n.Name] = controller.NodeHealth{State: controller.Alive}
		}
	}
	maps.Copy(w.health.verdicts, verdicts)
	w.events = controllertest.Start(t, w.client, func(d *controller.Deps) { d.Health = w.health }, func(d controller.Deps) controller.Controller {
		return New(d, netip.MustParsePrefix("10.244.0.0/20"), set) // 16 networks
	})
	settle(time.Second)
	return w
}

func settle(d time.Duration) {
	time.Sleep(d) // virtual
	synctest.Wait()
}

func (w *world) node(name string) *corev1.Node {
	n, err := w.client.CoreV1().Nodes().Get(w.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	return n
}

// pod returns nil if there is none.
func (w *world) pod(name string) *corev1.Pod {
	p, err := w.client.CoreV1().Pods("default").Get(w.t.Context(), name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return p
}

func (w *world) taints(name string) string {
	var out []string
	for _, t := range w.node(name).Spec.Taints {
		out = append(out, strings.TrimPrefix(t.Key, "node.kubernetes.io/")+":"+string(t.Effect))
	}
	return strings.Join(out, ",")
}

func newNode(name string, edit ...func(*corev1.Node)) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name), ResourceVersion: "1"},
		Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}}}
	for _, fn := range edit {
		fn(n)
	}
	return n
}

func newPod(name, node string, tolerationSeconds int64, edit ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(name)},
		Spec: corev1.PodSpec{NodeName: node, Tolerations: []corev1.Toleration{{
			Key: corev1.TaintNodeUnreachable, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: &tolerationSeconds,
		}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}}}
	for _, fn := range edit {
		fn(p)
	}
	return p
}

func TestDeadNodeIsToldAndItsPodsMove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, newNode("a"), newNode("b"), newNode("c"),
			newPod("soon", "a", 10), newPod("later", "a", 60), newPod("elsewhere", "b", 10))
		if got := w.taints("a"); got != "" {
			t.Fatalf("a healthy node is tainted: %s", got)
		}
		w.health.set(controller.Dead, "a")
		settle(100 * time.Millisecond)
		cond := condition(w.node("a"), corev1.NodeReady)
		if cond.Status != corev1.ConditionUnknown || cond.Reason != "NodeStatusUnknown" || !strings.Contains(strings.ToLower(cond.Message), "gossip") {
			t.Errorf("100 ms after the verdict: %+v", cond)
		}
		if got := w.taints("a"); got != "unreachable:NoSchedule,unreachable:NoExecute" {
			t.Errorf("taints %q", got)
		}
		for name, want := range map[string]corev1.ConditionStatus{"soon": "False", "later": "False", "elsewhere": "True"} {
			if got := w.pod(name).Status.Conditions[0].Status; got != want {
				t.Errorf("pod %s Ready=%s, want %s", name, got, want)
			}
		}
		settle(9 * time.Second)
		if w.pod("soon") == nil {
			t.Error("evicted before its toleration was over")
		}
		settle(time.Second)
		if w.pod("soon") != nil || w.pod("later") == nil || w.pod("elsewhere") == nil {
			t.Error("after 10 s exactly the pod that tolerates 10 s must go")
		}
		settle(50 * time.Second)
		if w.pod("later") != nil {
			t.Error("the pod that tolerates 60 s is still there")
		}
		events := strings.Join(controllertest.Events(w.events), "\n")
		for _, want := range []string{"Node a status is now: NodeNotReady", "Marking for deletion Pod default/soon", "Warning NodeNotReady Node is not ready"} {
			if !strings.Contains(events, want) {
				t.Errorf("no event %q in:\n%s", want, events)
			}
		}
	})
}

func TestReturnWithinTheGraceEvictsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, newNode("a"), newNode("b"), newNode("c"), newPod("p", "a", 10))
		w.health.set(controller.Dead, "a")
		settle(8 * time.Second)
		w.health.set(controller.Alive, "a")
		settle(100 * time.Millisecond)
		if got := w.taints("a"); got != "unreachable:NoSchedule" {
			t.Errorf("before the agent speaks: %q", got)
		}
		n := w.node("a")
		n.Status.Conditions[0].Status = corev1.ConditionTrue
		if _, err := w.client.CoreV1().Nodes().UpdateStatus(t.Context(), n, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(100 * time.Millisecond)
		if got := w.taints("a"); got != "" {
			t.Errorf("taints of a node that is back: %q", got)
		}
		if said := strings.Join(controllertest.Events(w.events), "\n"); strings.Count(said, "TaintManagerEviction Cancelling deletion of Pod default/p") != 1 || strings.Contains(said, "Marking") {
			t.Errorf("events: %s", said)
		}
		// A second short loss must not inherit the patience spent on the first.
		w.health.set(controller.Dead, "a")
		settle(8 * time.Second)
		if w.pod("p") == nil {
			t.Error("evicted although the node was back in between")
		}
		settle(3 * time.Second)
		if w.pod("p") != nil {
			t.Error("not evicted although the node stayed away")
		}
		if said := strings.Join(controllertest.Events(w.events), "\n"); strings.Contains(said, "Cancelling") || strings.Count(said, "TaintManagerEviction Marking for deletion Pod default/p") != 1 {
			t.Errorf("events: %s", said)
		}
	})
}

// A new leader does not start the patience with a lost node anew.
func TestNewLeaderGoesOnWithTheGrace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tainted := newNode("a", func(n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeUnreachable, Effect: corev1.TaintEffectNoExecute}}
		})
		w := startWith(t, map[string]controller.NodeHealth{"a": {State: controller.Dead, Since: time.Now().Add(-7 * time.Second)}},
			tainted, newNode("b"), newNode("c"), newPod("p", "a", 10))
		if w.pod("p") == nil {
			t.Fatal("evicted 8 s after the loss")
		}
		settle(2500 * time.Millisecond)
		if w.pod("p") != nil {
			t.Error("still there 10.5 s after the loss: the new leader began to count anew")
		}
	})
}

// A pod that comes to a tainted node later is tolerated from then on.
func TestLaterPodGetsItsWholeToleration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, newNode("a", func(n *corev1.Node) {
			n.Spec.Taints = []corev1.Taint{{Key: corev1.TaintNodeUnreachable + "-own", Effect: corev1.TaintEffectNoExecute}}
		}), newPod("first", "a", 0, func(p *corev1.Pod) { p.Spec.Tolerations = nil }))
		if w.pod("first") != nil {
			t.Fatal("a pod without toleration stays on a node with a NoExecute taint")
		}
		settle(time.Minute)
		ten := int64(10)
		late := newPod("late", "a", 0, func(p *corev1.Pod) {
			p.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists, TolerationSeconds: &ten, Effect: corev1.TaintEffectNoExecute, Key: corev1.TaintNodeUnreachable + "-own"}}
		})
		if err := w.client.Tracker().Add(late); err != nil {
			t.Fatal(err)
		}
		settle(9 * time.Second)
		if w.pod("late") == nil {
			t.Error("evicted before its 10 s")
		}
		settle(2 * time.Second)
		if w.pod("late") != nil {
			t.Error("not evicted after its 10 s")
		}
	})
}

// A node that is lost from here but still writes by another way is
// contradicted, but not in a hot loop.
func TestContradictionIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, newNode("a"), newNode("b"), newNode("c"))
		w.health.set(controller.Dead, "a")
		settle(time.Second)
		before := controllertest.Writes(w.client, "patch", "nodes/status")
		for range 60 { // 30 s
			n := w.node("a")
			n.Status.Conditions[0].Status = corev1.ConditionTrue
			if _, err := w.client.CoreV1().Nodes().UpdateStatus(t.Context(), n, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			settle(500 * time.Millisecond)
		}
		if n := controllertest.Writes(w.client, "patch", "nodes/status") - before; n < 4 || n > 8 {
			t.Errorf("%d contradictions in 30 s, want one every 5 s", n)
		}
	})
}

func TestPartitionEvictsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, newNode("a"), newNode("b"), newNode("c"), newNode("d"), newNode("e"),
			newPod("pa", "a", 10), newPod("pb", "b", 10), newPod("pc", "c", 10))
		// They vanish one after the other, as gossip sees a partition.
		for _, name := range []string{"a", "b", "c"} {
			w.health.set(controller.Dead, name)
			settle(500 * time.Millisecond)
		}
		for _, name := range []string{"a", "b", "c"} {
			if got := w.taints(name); got != "unreachable:NoSchedule" {
				t.Errorf("%s under the brake: %q", name, got)
			}
		}
		settle(10 * time.Minute)
		if w.pod("pa") == nil || w.pod("pb") == nil || w.pod("pc") == nil {
			t.Fatal("pods were evicted under a partition")
		}
		// One comes back: two of five are deaths again.
		w.health.set(controller.Alive, "c")
		n := w.node("c")
		n.Status.Conditions[0].Status = corev1.ConditionTrue
		if _, err := w.client.CoreV1().Nodes().UpdateStatus(t.Context(), n, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(11 * time.Second)
		if w.pod("pa") != nil || w.pod("pb") != nil || w.pod("pc") == nil {
			t.Error("the pods of the two that are still lost must go, the others stay")
		}
	})
}

func TestPodNetworksAreGivenOnceAndReturned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, newNode("a"), newNode("b", func(n *corev1.Node) {
			n.Spec.PodCIDR, n.Spec.PodCIDRs = "10.244.0.0/24", []string{"10.244.0.0/24"}
		}), newNode("c"))
		a, b, c := w.node("a").Spec, w.node("b").Spec, w.node("c").Spec
		if b.PodCIDR != "10.244.0.0/24" || a.PodCIDR == "" || c.PodCIDR == "" || a.PodCIDR == c.PodCIDR || a.PodCIDR == b.PodCIDR || c.PodCIDR == b.PodCIDR {
			t.Errorf("a %q, b %q, c %q", a.PodCIDR, b.PodCIDR, c.PodCIDR)
		}
		if len(a.PodCIDRs) != 1 || a.PodCIDRs[0] != a.PodCIDR {
			t.Errorf("podCIDRs %v, podCIDR %q", a.PodCIDRs, a.PodCIDR)
		}
		if err := w.client.CoreV1().Nodes().Delete(t.Context(), "b", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(time.Second)
		for i := range 14 {
			n := newNode("x" + string(rune('a'+i)))
			w.health.set(controller.Alive, n.Name)
			if _, err := w.client.CoreV1().Nodes().Create(t.Context(), n, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		settle(10 * time.Second)
		list, err := w.client.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]string{}
		for _, n := range list.Items {
			if other, dup := seen[n.Spec.PodCIDR]; dup || n.Spec.PodCIDR == "" {
				t.Errorf("%s has %q, so has %s", n.Name, n.Spec.PodCIDR, other)
			}
			seen[n.Spec.PodCIDR] = n.Name
		}
		if len(seen) != 16 {
			t.Errorf("%d networks for 16 nodes: that of the deleted one was not given again", len(seen))
		}
		told := map[string]int{}
		for _, e := range controllertest.Events(w.events) {
			told[e]++
		}
		if told["Normal RegisteredNode Node xa event: Registered Node xa in Controller"] != 1 || told["Normal RemovingNode Node b event: Removing Node b from Controller"] != 1 || len(told) != 17 {
			t.Errorf("events %v", told)
		}
	})
}

func TestPodsOfANodeThatHasLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, newNode("a"), newNode("b"), newNode("c"), newPod("pa", "a", 10), newPod("pb", "b", 10), newPod("pc", "c", 10))
		w.health.set(controller.Left, "a")
		settle(time.Second)
		if w.pod("pa") != nil {
			t.Error("pods of a node that has left must go at once")
		}
		// The object may go before gossip says so, or after.
		if err := w.client.CoreV1().Nodes().Delete(t.Context(), "b", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(time.Second)
		if w.pod("pb") == nil {
			t.Error("nobody said that b has left")
		}
		w.health.set(controller.Left, "b")
		settle(6 * time.Second)
		if w.pod("pb") != nil {
			t.Error("the pod of a node that has left and has no object is still there")
		}
		if w.pod("pc") == nil {
			t.Error("a pod of a healthy node is gone")
		}
	})
}

func TestNodeByHandIsJudgedByItsLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stamp := metav1.NewMicroTime(time.Unix(1, 0)) // its clock may be anywhere
		lease := &coordv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: corev1.NamespaceNodeLease, Name: "hand"}, Spec: coordv1.LeaseSpec{RenewTime: &stamp}}
		w := start(t, newNode("a"), newNode("hand", func(n *corev1.Node) { n.Annotations = map[string]string{"test/by-hand": "1"} }), lease)
		for range 12 {
			settle(10 * time.Second)
			next := metav1.NewMicroTime(lease.Spec.RenewTime.Add(time.Second))
			lease = lease.DeepCopy()
			lease.Spec.RenewTime = &next
			if _, err := w.client.CoordinationV1().Leases(lease.Namespace).Update(t.Context(), lease, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if got := w.taints("hand"); got != "" {
			t.Fatalf("renews its lease, but %q", got)
		}
		settle(40 * time.Second)
		if got := w.taints("hand"); got != "" {
			t.Fatalf("lost after 40 s: %q", got)
		}
		settle(20 * time.Second)
		if got := w.taints("hand"); got != "unreachable:NoSchedule,unreachable:NoExecute" {
			t.Errorf("an hour of silence and still %q", got)
		}
	})
}

func TestIdleWritesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := start(t, newNode("a"), newNode("b"), newNode("c"), newPod("p", "a", 10), newPod("q", "b", 10))
		w.health.set(controller.Dead, "c")
		settle(time.Minute)
		before := len(w.client.Actions())
		settle(10 * time.Minute)
		if acts := w.client.Actions()[before:]; len(acts) != 0 {
			t.Errorf("%d requests in 10 idle minutes: %v", len(acts), acts)
		}
	})
}
