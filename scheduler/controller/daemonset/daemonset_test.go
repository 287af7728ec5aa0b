package daemonset

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes/fake"

	"skein.io/skein/scheduler/controller/controllertest"
)

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newSet(surge, unavailable string, edit ...func(*appsv1.DaemonSet)) *appsv1.DaemonSet {
	l := map[string]string{"app": "log"}
	s, u := intstr.Parse(surge), intstr.Parse(unavailable)
	set := &appsv1.DaemonSet{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "log", UID: "set-uid", Generation: 1, ResourceVersion: "5"},
		Spec: appsv1.DaemonSetSpec{
			Selector: &metav1.LabelSelector{MatchLabels: l},
			UpdateStrategy: appsv1.DaemonSetUpdateStrategy{Type: appsv1.RollingUpdateDaemonSetStrategyType,
				RollingUpdate: &appsv1.RollingUpdateDaemonSet{MaxSurge: &s, MaxUnavailable: &u}},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: l},
				Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "one"}}}},
		},
	}
	for _, e := range edit {
		e(set)
	}
	return set
}

func node(name string, taints ...corev1.Taint) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"name": name}, ResourceVersion: "2"}, Spec: corev1.NodeSpec{Taints: taints}}
}

// podOf reads "a" (old, works), "a*" (up to date), "a!" (not ready), "a-" (being
// deleted), "ax" (failed); the letter is the node.
func podOf(i int, text string) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: fmt.Sprintf("%s-%d", text, i), UID: types.UID(fmt.Sprint(i)), CreationTimestamp: metav1.NewTime(t0.Add(time.Duration(i) * time.Second)),
			Labels: map[string]string{"app": "log", "controller-revision-hash": "old"}},
		Spec:   corev1.PodSpec{NodeName: text[:1]},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(t0.Add(-time.Minute))}}},
	}
	for _, mark := range text[1:] {
		switch mark {
		case '*':
			p.Labels["controller-revision-hash"] = "new"
		case '!':
			p.Status.Conditions[0].Status = corev1.ConditionFalse
		case '-':
			p.DeletionTimestamp = &metav1.Time{Time: t0}
		case 'x':
			p.Status = corev1.PodStatus{Phase: corev1.PodFailed}
		case '?':
			p.Status, p.Spec.NodeName, p.Spec.Affinity = corev1.PodStatus{Phase: corev1.PodPending}, "", pinTo(nil, text[:1])
		}
	}
	return p
}

func text(s step) string {
	var out []string
	for _, n := range s.create {
		out = append(out, "+"+n)
	}
	for _, p := range s.remove {
		name, _, _ := strings.Cut(p.Name, "-")
		if p.Name[1] == '-' || strings.Contains(p.Name, "--") {
			name = p.Name[:1]
		}
		out = append(out, "-"+name)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func TestPlan(t *testing.T) {
	noSchedule := corev1.Taint{Key: "k", Effect: corev1.TaintEffectNoSchedule}
	noExecute := corev1.Taint{Key: "k", Effect: corev1.TaintEffectNoExecute}
	onlyA := func(s *appsv1.DaemonSet) { s.Spec.Template.Spec.NodeSelector = map[string]string{"name": "a"} }
	onDelete := func(s *appsv1.DaemonSet) {
		s.Spec.UpdateStrategy = appsv1.DaemonSetUpdateStrategy{Type: appsv1.OnDeleteDaemonSetStrategyType}
	}
	abc := []*corev1.Node{node("a"), node("b"), node("c")}
	for _, tc := range []struct {
		what  string
		set   *appsv1.DaemonSet
		nodes []*corev1.Node
		pods  string
		want  string
	}{
		{"one each", newSet("0", "1"), abc, "", "+a +b +c"},
		{"one is missing", newSet("0", "1"), abc, "a* c*?", "+b"},
		{"all are there", newSet("0", "1"), abc, "a* b* c*", ""},
		{"where it may", newSet("0", "1", onlyA), abc, "b*", "+a -b*"},
		{"a taint keeps new ones away", newSet("0", "1"), []*corev1.Node{node("a", noSchedule), node("b")}, "", "+b"},
		{"but lets the old stay", newSet("0", "1"), []*corev1.Node{node("a", noSchedule), node("b")}, "a* b*", ""},
		{"or drives them out", newSet("0", "1"), []*corev1.Node{node("a", noExecute), node("b")}, "a* b*", "-a*"},
		{"a node that is down keeps its own", newSet("0", "1"), []*corev1.Node{node("a", corev1.Taint{Key: corev1.TaintNodeUnreachable, Effect: corev1.TaintEffectNoExecute}, corev1.Taint{Key: corev1.TaintNodeUnschedulable, Effect: corev1.TaintEffectNoSchedule})}, "", "+a"},
		{"a node that is gone", newSet("0", "1"), abc[:1], "a* b* c*?", "-b* -c*?"},
		{"two on a node: the older stays", newSet("0", "1"), abc[:1], "a* a*", "-a*"},
		{"a failed one is replaced", newSet("0", "1"), abc[:1], "a*x", "-a*x"},
		{"not before the last has ended", newSet("0", "1"), abc[:1], "a*-", ""},
		{"one at a time", newSet("0", "1"), abc, "a b c", "-a"},
		{"while one is down none", newSet("0", "1"), abc, "a b c*!", ""},
		{"those that are down at once", newSet("0", "1"), abc, "a b! c!", "-b! -c!"},
		{"a share is rounded up", newSet("0", "34%"), abc, "a b c", "-a -b"},
		{"surge: the new one first", newSet("1", "0"), abc, "a b c", "+a"},
		{"surge: wait for it", newSet("1", "0"), abc, "a a*! b c", ""},
		{"surge: then the old one goes", newSet("1", "0"), abc, "a a* b c", "+b -a"},
		{"surge: the old one does not work", newSet("1", "0"), abc, "a! b c", "+a +b"},
		{"surge: neither works", newSet("1", "0"), abc[:1], "a! a*!", "-a!"},
		{"surge: a new node while the old pod ends", newSet("1", "0"), abc[:1], "a-", "+a"},
		{"on deletion only", newSet("0", "1", onDelete), abc, "a b c", ""},
		{"none at all means one", newSet("0", "0"), abc, "a b c", "-a"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			in := input{set: tc.set, hash: "new", nodes: tc.nodes, now: t0}
			for i, f := range strings.Fields(tc.pods) {
				in.pods = append(in.pods, podOf(i, f))
			}
			if got := text(plan(in)); got != tc.want {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
}

func TestStatus(t *testing.T) {
	in := input{set: newSet("0", "1"), hash: "new", now: t0, nodes: []*corev1.Node{node("a"), node("b"), node("c"), node("d", corev1.Taint{Key: "k", Effect: corev1.TaintEffectNoSchedule})}}
	for i, f := range strings.Fields("a* b! d") {
		in.pods = append(in.pods, podOf(i, f))
	}
	s := plan(in).status
	if s.DesiredNumberScheduled != 3 || s.CurrentNumberScheduled != 2 || s.NumberMisscheduled != 1 || s.NumberReady != 1 || s.NumberAvailable != 1 || s.NumberUnavailable != 2 || s.UpdatedNumberScheduled != 1 || s.ObservedGeneration != 1 {
		t.Errorf("%+v", s)
	}
}

// TestRandomHistories: nodes come and go, pods fail, templates change; at no
// time are more nodes without a working pod by our doing than allowed, and in
// the end every node has one of the newest template.
func TestRandomHistories(t *testing.T) {
	for seed := range uint64(300) {
		if err := play(seed); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

func play(seed uint64) error {
	rnd := rand.New(rand.NewPCG(seed, 2))
	limit, surge := 1+rnd.IntN(2), 0
	if rnd.IntN(2) == 0 {
		limit, surge = 0, 1+rnd.IntN(2)
	}
	set := newSet(fmt.Sprint(surge), fmt.Sprint(limit))
	nodes, pods, serial, rev := map[string]*corev1.Node{"a": node("a"), "b": node("b"), "c": node("c")}, map[string]*corev1.Pod{}, 0, 0
	works := func(p *corev1.Pod) bool {
		return p.DeletionTimestamp == nil && p.Status.Phase == corev1.PodRunning && p.Status.Conditions[0].Status == corev1.ConditionTrue
	}
	tick := func(quiet bool) error {
		in := input{set: set, hash: fmt.Sprint(rev), now: t0}
		for _, n := range nodes {
			in.nodes = append(in.nodes, n)
		}
		working := map[string]int{}
		for _, p := range pods {
			in.pods = append(in.pods, p)
			if works(p) {
				working[nodeOf(p)]++
			}
		}
		s := plan(in)
		down := 0
		for n := range nodes {
			if working[n] == 0 {
				down++
			}
		}
		for _, p := range s.remove {
			if n := nodeOf(p); works(p) && nodes[n] != nil {
				if working[n]--; working[n] == 0 {
					down++
					if down > limit {
						return fmt.Errorf("the working pod of %s is removed: %d nodes have none then, allowed are %d", n, down, limit)
					}
				}
			}
			p.DeletionTimestamp = &metav1.Time{Time: t0}
		}
		for _, n := range s.create {
			serial++
			p := podOf(serial, n+"?")
			p.Name = fmt.Sprint(n, serial)
			p.Labels["controller-revision-hash"] = fmt.Sprint(rev)
			pods[p.Name] = p
		}
		for n := range nodes {
			alive := 0
			for _, p := range pods {
				if nodeOf(p) == n && p.DeletionTimestamp == nil {
					alive++
				}
			}
			if alive > 1 && surge == 0 || alive > 2 {
				return fmt.Errorf("%d pods on node %s", alive, n)
			}
		}
		for name, p := range pods {
			switch {
			case p.DeletionTimestamp != nil && (quiet || rnd.IntN(2) == 0):
				delete(pods, name)
			case p.Status.Phase == corev1.PodPending && (quiet || rnd.IntN(2) == 0):
				p.Spec.NodeName, p.Status = nodeOf(p), podOf(0, "a").Status
			case p.Status.Phase == corev1.PodRunning && quiet:
				p.Status = podOf(0, "a").Status
			case !quiet && rnd.IntN(25) == 0:
				p.Status = podOf(0, "ax").Status
			case !quiet && p.Status.Phase == corev1.PodRunning && rnd.IntN(25) == 0:
				p.Status = podOf(0, "a!").Status
			}
		}
		return nil
	}
	for range 150 {
		switch n := string(rune('a' + rnd.IntN(6))); rnd.IntN(15) {
		case 0:
			nodes[n] = node(n)
		case 1:
			delete(nodes, n)
		case 2:
			rev++
		}
		if err := tick(false); err != nil {
			return err
		}
	}
	for range 60 {
		if err := tick(true); err != nil {
			return err
		}
	}
	if len(pods) != len(nodes) {
		return fmt.Errorf("%d pods on %d nodes in the end", len(pods), len(nodes))
	}
	for _, p := range pods {
		if p.Labels["controller-revision-hash"] != fmt.Sprint(rev) || nodes[nodeOf(p)] == nil {
			return fmt.Errorf("pod of revision %s on node %s in the end, want revision %d", p.Labels["controller-revision-hash"], nodeOf(p), rev)
		}
	}
	return nil
}

// run lets the controller work and acts as scheduler and agents.
func run(t *testing.T, client *fake.Clientset, rounds int, fail string) {
	t.Helper()
	for range rounds {
		time.Sleep(2 * time.Second)
		synctest.Wait()
		pods, err := client.CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range pods.Items {
			p := &pods.Items[i]
			if p.Status.Phase != "" {
				continue
			}
			n := nodeOf(p)
			p.Spec.NodeName = n
			if p, err = client.CoreV1().Pods("ns").Update(t.Context(), p, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			p.Status = podOf(0, "a").Status
			if n == fail {
				p.Status = podOf(0, "ax").Status
			}
			if _, err := client.CoreV1().Pods("ns").UpdateStatus(t.Context(), p, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
	}
}

func TestLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(newSet("0", "1"), node("a"), node("b"), node("c"))
		rec := controllertest.Start(t, client, nil, New)
		run(t, client, 3, "")
		api := client.AppsV1().DaemonSets("ns")
		got, err := api.Get(t.Context(), "log", metav1.GetOptions{})
		if err != nil || got.Status.NumberAvailable != 3 || got.Status.UpdatedNumberScheduled != 3 {
			t.Fatalf("status %+v, %v", got.Status, err)
		}
		before := len(client.Actions())
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(client.Actions()) - before; n != 0 {
			t.Errorf("%d requests in an idle hour", n)
		}
		got.Spec.Template.Spec.Containers[0].Image = "two"
		if _, err := api.Update(t.Context(), got, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		run(t, client, 10, "")
		pods, err := client.CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(pods.Items) != 3 {
			t.Fatalf("%d pods, %v", len(pods.Items), err)
		}
		on := map[string]bool{}
		for _, p := range pods.Items {
			on[p.Spec.NodeName] = true
			if p.Spec.Containers[0].Image != "two" || len(p.Spec.Tolerations) != 6 {
				t.Errorf("pod %+v", p.Spec)
			}
		}
		if len(on) != 3 {
			t.Errorf("pods on %v", on)
		}
		if got, err = api.Get(t.Context(), "log", metav1.GetOptions{}); err != nil || got.Status.UpdatedNumberScheduled != 3 || got.Status.ObservedGeneration != 2 {
			t.Errorf("status %+v, %v", got.Status, err)
		}
		if events := strings.Join(controllertest.Events(rec), "\n"); !strings.Contains(events, "SuccessfulCreate Created pod: log-") || !strings.Contains(events, "SuccessfulDelete Deleted pod: log-") {
			t.Errorf("events\n%s", events)
		}
	})
}

// A node that refuses the pod costs a bounded number of pods.
func TestFailingNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(newSet("0", "1"), node("a"))
		rec := controllertest.Start(t, client, nil, New)
		run(t, client, 1800, "a") // an hour
		if n := controllertest.Writes(client, "create", "pods"); n < 8 || n > 20 {
			t.Errorf("%d pods in an hour, want the doubling back-off up to 15 minutes", n)
		}
		if events := strings.Join(controllertest.Events(rec), "\n"); !strings.Contains(events, "FailedDaemonPod Found failed daemon pod ns/log-") {
			t.Errorf("events\n%s", events)
		}
	})
}

// What happens to a node wakes the sets that it concerns, and no other.
func TestNodesWakeWhomTheyConcern(t *testing.T) {
	onlySSD := func(s *appsv1.DaemonSet) {
		s.Name, s.UID, s.Spec.Template.Spec.NodeSelector = "ssd", "ssd-uid", map[string]string{"disk": "ssd"}
	}
	labelled := func(key, value string) *corev1.Node {
		n := node("a")
		n.Labels[key] = value
		return n
	}
	noSchedule, noExecute := corev1.Taint{Key: "k", Effect: corev1.TaintEffectNoSchedule}, corev1.Taint{Key: "k", Effect: corev1.TaintEffectNoExecute}
	known := corev1.Taint{Key: corev1.TaintNodeUnreachable, Effect: corev1.TaintEffectNoExecute}
	for _, tc := range []struct {
		what     string
		old, cur *corev1.Node
		want     string
	}{
		{"a node comes", nil, node("a"), "ns/log"},
		{"a node goes", labelled("disk", "ssd"), nil, "ns/log ns/ssd"},
		{"a label that nobody asks for", node("a"), labelled("team", "blue"), ""},
		{"a value that nobody asks for", labelled("disk", "hdd"), labelled("disk", "tape"), ""},
		{"a label that one asks for", node("a"), labelled("disk", "ssd"), "ns/ssd"},
		{"a taint for new pods", node("a"), node("a", noSchedule), "ns/log"},
		{"a taint for all, after that", node("a", noSchedule), node("a", noSchedule, noExecute), "ns/log"},
		{"a taint that all tolerate", node("a"), node("a", known), ""},
		{"a taint where one may not run anyway", labelled("disk", "hdd"), labelled("disk", "hdd"), ""},
	} {
		var got []string
		for _, set := range concerned([]*appsv1.DaemonSet{newSet("0", "1"), newSet("0", "1", onlySSD)}, tc.old, tc.cur) {
			got = append(got, set.Namespace+"/"+set.Name)
		}
		if got := strings.Join(got, " "); got != tc.want {
			t.Errorf("%s: wakes %q, want %q", tc.what, got, tc.want)
		}
	}
}
