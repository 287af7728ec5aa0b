package placement

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// describe writes down all sums of a snapshot.
func describe(s *Snapshot) string {
	var b strings.Builder
	var all []string
	for name := range s.nodes {
		all = append(all, name)
	}
	slices.Sort(all)
	for _, name := range all {
		n := s.nodes[name]
		var pods, ports []string
		for _, p := range n.pods {
			pods = append(pods, p.pod.name)
		}
		for p, k := range n.ports {
			ports = append(ports, fmt.Sprint(p, k))
		}
		slices.Sort(pods)
		slices.Sort(ports)
		scalars := fmt.Sprint(n.used.Scalars)
		if len(n.used.Scalars) == 0 {
			scalars = ""
		}
		fmt.Fprintf(&b, "%s known=%v %d %d %d %s score %d %d pods %v ports %v\n", name, n.obj != nil,
			n.used.MilliCPU, n.used.Memory, n.used.EphemeralStorage, scalars, n.scoreCPU, n.scoreMemory, pods, ports)
	}
	var images []string
	for name, st := range s.images {
		images = append(images, fmt.Sprint(name, st.nodes))
	}
	slices.Sort(images)
	fmt.Fprintln(&b, images, len(s.order), s.priorities)
	var groups []string
	for key, g := range s.groups.byKey {
		for name, n := range s.nodes {
			if n.slot < len(g.perSlot) && g.perSlot[n.slot] != 0 {
				groups = append(groups, fmt.Sprintf("%q %s %d", key, name, g.perSlot[n.slot]))
			}
		}
	}
	slices.Sort(groups)
	fmt.Fprintln(&b, groups)
	return b.String()
}

// Whatever happens in whatever order, the incremental sums are those of a
// snapshot made anew from what is there at the end.
func TestIncrementalSumsEqualFreshOnes(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	s := NewSnapshot()
	nodes, pods := map[string]*v1.Node{}, map[string]*v1.Pod{}
	web := selectorOf("app", "web")
	sel, _ := metav1.LabelSelectorAsSelector(web)
	for step := range 4000 {
		name := fmt.Sprintf("n%d", r.IntN(8))
		pod := fmt.Sprintf("p%d", r.IntN(40))
		switch r.IntN(8) {
		case 0:
			n := mkNode(name, fmt.Sprint(1+r.IntN(8)), "8Gi", func(n *v1.Node) {
				for i := range r.IntN(3) {
					n.Status.Images = append(n.Status.Images, v1.ContainerImage{Names: []string{fmt.Sprintf("i%d", i)}, SizeBytes: 1 << 20})
				}
			})
			nodes[name] = n
			s.SetNode(n)
		case 1:
			delete(nodes, name)
			s.RemoveNode(name)
		case 2, 3:
			delete(pods, pod)
			s.RemovePod(mkPod(pod, "", "").UID)
		case 4:
			s.counter("default", sel) // counted from now on
		default:
			p := mkPod(pod, []string{"", "100m", "1"}[r.IntN(3)], []string{"", "1Gi"}[r.IntN(2)], func(p *v1.Pod) {
				p.Spec.NodeName = name
				if r.IntN(2) == 0 {
					p.Labels["app"] = "web"
				}
				if r.IntN(4) == 0 {
					antiAffinity(v1.LabelHostname, web)(p)
				}
				if r.IntN(4) == 0 {
					hostPortOf(int32(80+r.IntN(2)), "", "TCP")(p)
				}
				if r.IntN(5) == 0 {
					now := metav1.Unix(1, 0)
					p.DeletionTimestamp = &now
				}
			})
			pods[pod] = p
			s.SetPod(p, name)
		}
		if step%100 != 99 {
			continue
		}
		fresh := NewSnapshot()
		for _, n := range nodes {
			fresh.SetNode(n)
		}
		for _, p := range pods {
			fresh.SetPod(p, p.Spec.NodeName)
		}
		if got, want := describe(s), describe(fresh); got != want {
			t.Fatalf("step %d:\n%s\nfresh:\n%s", step, got, want)
		}
		got, want := s.counter("default", sel), fresh.counter("default", sel)
		for name, n := range s.nodes {
			if g, w := got.at(n.slot), want.at(fresh.nodes[name].slot); g != w {
				t.Fatalf("step %d: %d pods counted on %s, want %d", step, g, name, w)
			}
		}
	}
}

func TestCountersAreBounded(t *testing.T) {
	s := cluster([]*v1.Node{mkNode("a", "4", "8Gi")}, mkPod("q", "", "", labelled("k", "v1")), "a")
	for i := range 3 * maxCounters {
		sel, _ := metav1.LabelSelectorAsSelector(selectorOf("k", fmt.Sprintf("v%d", i)))
		s.counter("default", sel)
		one, _ := metav1.LabelSelectorAsSelector(selectorOf("k", "v1"))
		if got := s.counter("default", one).at(s.nodes["a"].slot); got != 1 {
			t.Fatalf("after %d selectors: %d pods, want 1", i, got)
		}
	}
	if n := len(s.counts.byKey); n > maxCounters {
		t.Errorf("%d counters, at most %d", n, maxCounters)
	}
}

func TestDefaultSelector(t *testing.T) {
	pod := mkPod("p", "", "", labelled("app", "web", "tier", "front", "hash", "1"))
	service := func(kv ...string) *v1.Service {
		return &v1.Service{Spec: v1.ServiceSpec{Selector: selectorOf(kv...).MatchLabels}}
	}
	for _, tc := range []struct {
		services []*v1.Service
		workload *metav1.LabelSelector
		want     string
	}{
		{nil, nil, "<nil>"},
		{[]*v1.Service{service("app", "other"), service()}, nil, "<nil>"},
		{[]*v1.Service{service("app", "web"), service("tier", "front")}, nil, "app=web,tier=front"},
		{[]*v1.Service{service("app", "web")}, selectorOf("hash", "1"), "app=web,hash=1"},
		{nil, selectorOf("hash", "1"), "hash=1"},
	} {
		got := "<nil>"
		if sel := DefaultSelector(pod, tc.services, tc.workload); sel != nil {
			got = sel.String()
		}
		if got != tc.want {
			t.Errorf("%v %v: %s, want %s", tc.services, tc.workload, got, tc.want)
		}
	}
}

func TestExplainNamesEveryNode(t *testing.T) {
	s := cluster([]*v1.Node{mkNode("a", "1", "1Gi"), mkNode("b", "4", "8Gi"), mkNode("c", "4", "8Gi", taint("x", v1.TaintEffectNoSchedule))})
	got, err := s.Explain(Request{Pod: mkPod("p", "2", "2Gi")})
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 3 || got[0].Filter != NodeResourcesFit || !reflect.DeepEqual(got[0].Reasons, []string{"Insufficient cpu", "Insufficient memory"}) ||
		got[1].Filter != "" || got[1].Scores.Total() == 0 || got[2].Filter != TaintToleration {
		t.Errorf("%+v", got)
	}
}

// A node with room that is kept for a pod welcomes that pod and more important ones only.
func TestWelcomesCountsWhatIsKept(t *testing.T) {
	s := NewSnapshot()
	s.SetNode(mkNode("a", "4", "8Gi"))
	of := func(name string, priority int32) *v1.Pod {
		return mkPod(name, "3", "1Gi", func(p *v1.Pod) { p.Spec.Priority = &priority })
	}
	kept := of("kept", 10)
	s.Nominate(kept, "a")
	for _, tc := range []struct {
		pod  *v1.Pod
		want bool
	}{{kept, true}, {of("equal", 10), false}, {of("low", 1), false}, {of("high", 20), true}} {
		if !s.Fits(tc.pod, "a", nil) {
			t.Errorf("%s does not fit beside nobody", tc.pod.Name)
		}
		for range 2 { // nothing stays of the trial
			if got := s.Welcomes(tc.pod, "a", nil); got != tc.want {
				t.Errorf("welcomes %s: %v", tc.pod.Name, got)
			}
		}
	}
	if to := s.NominatedTo(kept); to != "a" {
		t.Errorf("nominated to %q", to)
	}
	s.Unnominate(kept.UID)
	if !s.Welcomes(of("equal", 10), "a", nil) {
		t.Error("what is not kept any more counts")
	}
}
