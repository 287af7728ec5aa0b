package node

import (
	"testing"
	"testing/synctest"
	"time"

	coordv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/scheduler/controller"
)

func (w *world) ready(name string) {
	w.t.Helper()
	n := w.node(name)
	condition(n, corev1.NodeReady).Status = corev1.ConditionTrue
	condition(n, corev1.NodeReady).LastHeartbeatTime = metav1.Now()
	if _, err := w.client.CoreV1().Nodes().UpdateStatus(w.t.Context(), n, metav1.UpdateOptions{}); err != nil {
		w.t.Fatal(err)
	}
}

func TestBoardShowsAndCountsTheBrake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		board := &Board{}
		if got := board.Zones(); got != nil {
			t.Fatalf("without a controller: %+v", got)
		}
		w := startSet(t, Settings{Board: board}, nil, newNode("a"), newNode("b"), newNode("c"), newNode("d"), newNode("e"), newPod("pa", "a", 10))
		check := func(when string, want ZoneState) {
			t.Helper()
			got := board.Zones()
			if len(got) != 1 {
				t.Fatalf("%s: %+v", when, got)
			}
			want.Zone, want.Since = "(none)", got[0].Since
			if got[0] != want {
				t.Errorf("%s: %+v, want %+v", when, got[0], want)
			}
		}
		check("all well", ZoneState{ZoneCount: ZoneCount{Ready: 5}})
		w.health.set(controller.Dead, "a", "b", "c")
		settle(time.Minute)
		check("most of the zone lost", ZoneState{ZoneCount: ZoneCount{Ready: 2, NotReady: 3}, Pace: Pace{Stop: true}, Held: 3, Brakes: 1})
		if since := time.Since(board.Zones()[0].Since); since < 59*time.Second || since > time.Minute {
			t.Errorf("braked for %v, want a minute", since)
		}
		w.health.set(controller.Alive, "b", "c")
		w.ready("b")
		w.ready("c")
		settle(time.Second)
		check("two are back, one is dead", ZoneState{ZoneCount: ZoneCount{Ready: 4, NotReady: 1}, Brakes: 1, Evictions: 1})
	})
}

// The first node of a cluster is all of its zone, and not ready yet: that is no brake.
func TestAYoungClusterIsNotBraked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		board := &Board{}
		w := startSet(t, Settings{Board: board}, nil, newNode("a", func(n *corev1.Node) { n.Status.Conditions[0].Status = corev1.ConditionFalse }))
		settle(time.Second)
		w.ready("a")
		settle(time.Second)
		if got := board.Zones(); len(got) != 1 || got[0].Brakes != 0 || got[0].Pace != (Pace{}) {
			t.Errorf("%+v", got)
		}
	})
}

// Whoever has no Lease and gives no sign of life is lost, as upstream; it is
// never deleted, its conditions say why, and a new leader does not begin to hope.
func TestSilentNodeByHand(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		byHand := func(n *corev1.Node) { n.Annotations = map[string]string{"test/by-hand": "1"} }
		w := start(t, newNode("a"), newNode("b"), newNode("hand", byHand),
			newNode("mute", byHand, func(n *corev1.Node) { n.Status.Conditions = nil }), newPod("p", "hand", 10))
		settle(48 * time.Second)
		if got := w.taints("hand"); got != "" {
			t.Fatalf("lost within the grace: %q", got)
		}
		settle(20 * time.Second) // 5 s until it is looked at, and a pod's 10 s
		for name, want := range map[string]string{"hand": "NodeStatusUnknown: Kubelet stopped posting node status.", "mute": "NodeStatusNeverUpdated: Kubelet never posted node status."} {
			if got := w.taints(name); got != "unreachable:NoSchedule,unreachable:NoExecute" {
				t.Errorf("%s: taints %q", name, got)
			}
			for _, kind := range agentConditions {
				c := condition(w.node(name), kind)
				if c == nil || c.Status != corev1.ConditionUnknown {
					t.Errorf("%s: %s is %+v", name, kind, c)
				} else if got := c.Reason + ": " + c.Message; kind == corev1.NodeReady && got != want {
					t.Errorf("%s: %q, want %q", name, got, want)
				}
			}
		}
		if w.pod("p") != nil {
			t.Error("its pod was not evicted")
		}
		before := len(w.client.Actions())
		settle(10 * time.Minute)
		if acts := w.client.Actions()[before:]; len(acts) != 0 {
			t.Errorf("%d requests while nothing happened, such as %v", len(acts), acts[0])
		}
		// The next leader: same objects, no memory.
		next := start(t, w.node("a"), w.node("b"), w.node("hand"), w.node("mute"))
		settle(10 * time.Minute)
		for _, a := range next.client.Actions() {
			if verb := a.GetVerb(); a.GetResource().Resource == "nodes" && verb != "list" && verb != "watch" && verb != "get" {
				t.Errorf("a new leader found nothing changed and did %v", a)
			}
		}
		next.ready("hand")
		settle(100 * time.Millisecond)
		if got := next.taints("hand"); got != "" {
			t.Errorf("100 ms after it is back: %q", got)
		}
	})
}

// Who renews its Lease and reports is taken back at once, with its pods.
func TestLeaseAloneBringsNodeBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stamp := metav1.NewMicroTime(time.Unix(1, 0))
		lease := &coordv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: corev1.NamespaceNodeLease, Name: "hand"}, Spec: coordv1.LeaseSpec{RenewTime: &stamp}}
		w := start(t, newNode("a"), newNode("b"), newNode("hand", func(n *corev1.Node) { n.Annotations = map[string]string{"test/by-hand": "1"} }),
			newPod("p", "hand", 60), lease)
		settle(80 * time.Second) // lost at 55 s
		if got := w.taints("hand"); got != "unreachable:NoSchedule,unreachable:NoExecute" {
			t.Fatalf("silent for 80 s: %q", got)
		}
		next := metav1.NewMicroTime(stamp.Add(time.Second))
		lease = lease.DeepCopy()
		lease.Spec.RenewTime = &next
		if _, err := w.client.CoordinationV1().Leases(lease.Namespace).Update(t.Context(), lease, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		w.ready("hand")
		settle(100 * time.Millisecond)
		if got := w.taints("hand"); got != "" {
			t.Errorf("it renews its lease and reports: %q", got)
		}
		settle(40 * time.Second)
		if w.pod("p") == nil {
			t.Error("evicted although it came back within the pod's toleration")
		}
	})
}
