package podgc

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

func pod(name, node string, edit ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), ResourceVersion: "1"},
		Spec: corev1.PodSpec{NodeName: node}, Status: corev1.PodStatus{Phase: corev1.PodRunning}}
	for _, f := range edit {
		f(p)
	}
	return p
}

func deleting(p *corev1.Pod)  { p.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)} }
func succeeded(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }
func isEvicted(p *corev1.Pod) { p.Status.Phase, p.Status.Reason = corev1.PodFailed, "Evicted" }
func born(min int) func(*corev1.Pod) {
	return func(p *corev1.Pod) { p.CreationTimestamp = metav1.NewTime(time.Unix(int64(min)*60, 0)) }
}

func node(name string, ready corev1.ConditionStatus, taints ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: "1"},
		Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: ready}}}}
	for _, t := range taints {
		n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: t, Effect: corev1.TaintEffectNoExecute})
	}
	return n
}

func names(pods []*corev1.Pod) string {
	var out []string
	for _, p := range pods {
		out = append(out, p.Name)
	}
	return strings.Join(out, " ")
}

func TestSurplus(t *testing.T) {
	ended := []*corev1.Pod{pod("young", "", succeeded, born(9)), pod("old", "", succeeded, born(1)), pod("evicted", "", isEvicted, born(5)), pod("b", "", succeeded, born(2)), pod("a", "", succeeded, born(2))}
	for keep, want := range map[int]string{5: "", 9: "", 4: "evicted", 2: "evicted old a", 0: "evicted old a b young"} {
		if got := names(surplus(ended, keep)); got != want {
			t.Errorf("to keep %d, %q go, want %q", keep, got, want)
		}
	}
}

func TestEndingOnNodesOutOfService(t *testing.T) {
	pods := []*corev1.Pod{pod("a", "n", deleting), pod("b", "n")}
	for _, tc := range []struct {
		node *corev1.Node
		want string
	}{
		{node("n", corev1.ConditionUnknown, corev1.TaintNodeOutOfService), "a"},
		{node("n", corev1.ConditionTrue, corev1.TaintNodeOutOfService), ""},
		{node("n", corev1.ConditionUnknown), ""},
	} {
		if got := names(ending(tc.node, pods)); got != tc.want {
			t.Errorf("%v: %q, want %q", tc.node.Spec.Taints, got, tc.want)
		}
	}
}

func left(t *testing.T, client *fake.Clientset) string {
	t.Helper()
	synctest.Wait()
	l, err := client.CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, p := range l.Items {
		out = append(out, p.Name)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func TestPodsWithoutANode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		objs := []runtime.Object{
			node("n", corev1.ConditionTrue), node("out", corev1.ConditionUnknown, corev1.TaintNodeOutOfService), node("far", corev1.ConditionUnknown),
			pod("fine", "n"), pod("ends", "n", deleting), pod("lost", "gone"), pod("unbound", ""),
			pod("unbound-ends", "", deleting), pod("out-ends", "out", deleting), pod("out", "out"), pod("far-ends", "far", deleting),
		}
		client := controllertest.NewClient(objs...)
		controllertest.Start(t, client, nil, New)
		time.Sleep(quarantine - time.Second)
		if got, want := left(t, client), "ends far-ends fine lost out unbound"; got != want {
			t.Errorf("in quarantine: %s, want %s", got, want)
		}
		time.Sleep(2 * time.Second)
		if got, want := left(t, client), "ends far-ends fine out unbound"; got != want {
			t.Errorf("after quarantine: %s, want %s", got, want)
		}
		var patch string
		for _, a := range client.Actions() {
			if a.GetVerb() == "patch" && strings.Contains(fmt.Sprint(a), "lost") {
				patch = fmt.Sprintf("%s", a.(interface{ GetPatch() []byte }).GetPatch())
			}
		}
		if !strings.Contains(patch, `"phase":"Failed"`) || !strings.Contains(patch, "DeletionByPodGC") || !strings.Contains(patch, `"uid":"lost"`) {
			t.Errorf("the lost pod was patched with %s", patch)
		}

		// A node that goes and comes back in time keeps its pods; the quarantine starts anew.
		nodes := client.CoreV1().Nodes()
		for range 3 {
			if err := nodes.Delete(t.Context(), "n", metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(quarantine - 5*time.Second)
			if _, err := nodes.Create(t.Context(), node("n", corev1.ConditionTrue), metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		if got, want := left(t, client), "ends far-ends fine out unbound"; got != want {
			t.Errorf("after the node came back: %s, want %s", got, want)
		}
		client.ClearActions()
		time.Sleep(time.Hour)
		synctest.Wait()
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
	})
}

func TestTooManyEndedPods(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var objs []runtime.Object
		for i := range 10 {
			objs = append(objs, pod(fmt.Sprintf("p%d", i), "n", succeeded, born(i)))
		}
		client := controllertest.NewClient(append(objs, pod("runs", "n"), node("n", corev1.ConditionTrue))...)
		controllertest.Start(t, client, nil, func(d controller.Deps) controller.Controller { return newCollector(d, 3) })
		time.Sleep(endedDelay + time.Second)
		if got, want := left(t, client), "p7 p8 p9 runs"; got != want {
			t.Errorf("left: %s, want %s", got, want)
		}
	})
}
