package placement

import (
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestPodRequest(t *testing.T) {
	always := v1.ContainerRestartPolicyAlways
	init := func(cpu, memory string, sidecar bool) v1.Container {
		c := v1.Container{Resources: v1.ResourceRequirements{Requests: list(cpu, memory)}}
		if sidecar {
			c.RestartPolicy = &always
		}
		return c
	}
	for _, tc := range []struct {
		name     string
		pod      v1.PodSpec
		cpu, mem int64
	}{
		// The example of upstream's fit plugin.
		{"largest init container against the sum", v1.PodSpec{
			InitContainers: []v1.Container{init("2", "3Gi", false), init("2", "1Gi", false)},
			Containers:     []v1.Container{init("2", "1Gi", false), init("1", "1Gi", false)},
		}, 3000, 3 << 30},
		{"a sidecar counts in both", v1.PodSpec{
			InitContainers: []v1.Container{init("1", "1Gi", true), init("2", "1Gi", false)},
			Containers:     []v1.Container{init("1", "1Gi", false)},
		}, 3000, 2 << 30},
		{"a sidecar after an init container does not run beside it", v1.PodSpec{
			InitContainers: []v1.Container{init("2", "1Gi", false), init("1", "1Gi", true)},
			Containers:     []v1.Container{init("500m", "1Gi", false)},
		}, 2000, 2 << 30},
		{"overhead is added", v1.PodSpec{
			Containers: []v1.Container{init("1", "1Gi", false)}, Overhead: list("250m", "64Mi"),
		}, 1250, 1<<30 + 64<<20},
		{"the pod's own request goes before its containers'", v1.PodSpec{
			Containers: []v1.Container{init("1", "1Gi", false)}, Resources: &v1.ResourceRequirements{Requests: list("4", "")},
		}, 4000, 1 << 30},
	} {
		got := PodRequest(&v1.Pod{Spec: tc.pod}, false)
		if got.MilliCPU != tc.cpu || got.Memory != tc.mem {
			t.Errorf("%s: %dm %d bytes, want %dm %d", tc.name, got.MilliCPU, got.Memory, tc.cpu, tc.mem)
		}
	}
}

// Each filter alone: which node is left, and the words of the refusal.
func TestFilters(t *testing.T) {
	gpu := v1.ResourceName("example.com/gpu")
	withGPU := func(n string) func(*v1.Node) {
		return func(o *v1.Node) { o.Status.Allocatable[gpu] = resource.MustParse(n) }
	}
	wantGPU := func(p *v1.Pod) { p.Spec.Containers[0].Resources.Requests[gpu] = resource.MustParse("2") }
	requireNode := func(field string, values ...string) func(*v1.Pod) {
		return func(p *v1.Pod) {
			term := v1.NodeSelectorTerm{MatchExpressions: []v1.NodeSelectorRequirement{{Key: field, Operator: v1.NodeSelectorOpIn, Values: values}}}
			if field == "metadata.name" {
				term = v1.NodeSelectorTerm{MatchFields: term.MatchExpressions}
			}
			affinityOf(p).NodeAffinity = &v1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{term}}}
		}
	}
	web := labelled("app", "web")
	for _, tc := range []struct {
		name   string
		s      *Snapshot
		pod    *v1.Pod
		node   string
		reason string // without the part on preemption
	}{
		{"cpu is short", cluster([]*v1.Node{mkNode("a", "1", "8Gi"), mkNode("b", "4", "8Gi")}), mkPod("p", "2", "1Gi"), "b", ""},
		{"exactly what is left", cluster([]*v1.Node{mkNode("a", "4", "8Gi")}, mkPod("q", "1", "1Gi"), "a"), mkPod("p", "3", "7Gi"), "a", ""},
		{"several resources short on one node", cluster([]*v1.Node{mkNode("a", "1", "1Gi"), mkNode("b", "1", "8Gi")}), mkPod("p", "2", "2Gi"), "",
			"0/2 nodes are available: 1 Insufficient memory, 2 Insufficient cpu."},
		{"extended resources", cluster([]*v1.Node{mkNode("a", "4", "8Gi", withGPU("1")), mkNode("b", "4", "8Gi", withGPU("2")), mkNode("c", "4", "8Gi")}), mkPod("p", "1", "", wantGPU), "b", ""},
		{"extended resources are short", cluster([]*v1.Node{mkNode("a", "4", "8Gi", withGPU("3")), mkNode("c", "4", "8Gi")}, mkPod("q", "", "", wantGPU), "a"), mkPod("p", "1", "", wantGPU), "",
			"0/2 nodes are available: 2 Insufficient example.com/gpu."},
		{"number of pods", cluster([]*v1.Node{mkNode("a", "4", "8Gi", func(n *v1.Node) { n.Status.Allocatable[v1.ResourcePods] = resource.MustParse("1") })}, mkPod("q", "", ""), "a"), mkPod("p", "", ""), "",
			"0/1 nodes are available: 1 Too many pods."},
		{"cordoned", cluster([]*v1.Node{mkNode("a", "4", "8Gi", func(n *v1.Node) { n.Spec.Unschedulable = true })}), mkPod("p", "1", ""), "",
			"0/1 nodes are available: 1 node(s) were unschedulable."},
		{"cordoned, tolerated", cluster([]*v1.Node{mkNode("a", "4", "8Gi", func(n *v1.Node) { n.Spec.Unschedulable = true })}), mkPod("p", "1", "", func(p *v1.Pod) {
			p.Spec.Tolerations = []v1.Toleration{{Key: v1.TaintNodeUnschedulable, Operator: v1.TolerationOpExists}}
		}), "a", ""},
		{"node name", cluster([]*v1.Node{mkNode("a", "4", "8Gi"), mkNode("b", "4", "8Gi")}), mkPod("p", "1", "", func(p *v1.Pod) { p.Spec.NodeName = "b" }), "b", ""},
		{"taints", cluster([]*v1.Node{mkNode("a", "4", "8Gi", taint("x", v1.TaintEffectNoSchedule)), mkNode("b", "4", "8Gi", taint("x", v1.TaintEffectNoExecute))}), mkPod("p", "1", ""), "",
			"0/2 nodes are available: 2 node(s) had untolerated taint(s)."},
		{"toleration of one effect", cluster([]*v1.Node{mkNode("a", "4", "8Gi", taint("x", v1.TaintEffectNoSchedule)), mkNode("b", "4", "8Gi", taint("x", v1.TaintEffectNoExecute))}), mkPod("p", "1", "", func(p *v1.Pod) {
			p.Spec.Tolerations = []v1.Toleration{{Key: "x", Operator: v1.TolerationOpExists, Effect: v1.TaintEffectNoExecute}}
		}), "b", ""},
		{"node selector", cluster([]*v1.Node{mkNode("a", "4", "8Gi"), mkNode("b", "4", "8Gi", func(n *v1.Node) { n.Labels["disk"] = "ssd" })}), mkPod("p", "1", "", func(p *v1.Pod) { p.Spec.NodeSelector = map[string]string{"disk": "ssd"} }), "b", ""},
		{"node selector nobody matches", cluster([]*v1.Node{mkNode("a", "4", "8Gi")}), mkPod("p", "1", "", func(p *v1.Pod) { p.Spec.NodeSelector = map[string]string{"disk": "ssd"} }), "",
			"0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."},
		{"required node affinity", cluster([]*v1.Node{mkNode("a", "4", "8Gi", zone("x")), mkNode("b", "4", "8Gi", zone("y"))}), mkPod("p", "1", "", requireNode(v1.LabelTopologyZone, "y", "z")), "b", ""},
		{"affinity to a node's name", cluster([]*v1.Node{mkNode("a", "1", "8Gi"), mkNode("b", "4", "8Gi")}), mkPod("p", "2", "", requireNode("metadata.name", "a")), "",
			"0/2 nodes are available: 1 Insufficient cpu, 1 node(s) didn't satisfy plugin(s) [NodeAffinity]."},
		{"host port taken on all addresses", cluster([]*v1.Node{mkNode("a", "4", "8Gi"), mkNode("b", "4", "8Gi")}, mkPod("q", "", "", hostPortOf(80, "", "TCP")), "a"), mkPod("p", "", "", hostPortOf(80, "10.0.0.1", "")), "b", ""},
		{"host port of another protocol", cluster([]*v1.Node{mkNode("a", "4", "8Gi")}, mkPod("q", "", "", hostPortOf(80, "", "TCP")), "a"), mkPod("p", "", "", hostPortOf(80, "", "UDP")), "a", ""},
		{"host port on two addresses", cluster([]*v1.Node{mkNode("a", "4", "8Gi")}, mkPod("q", "", "", hostPortOf(80, "10.0.0.1", "TCP")), "a"), mkPod("p", "", "", hostPortOf(80, "10.0.0.2", "TCP")), "a", ""},
		{"host port short", cluster([]*v1.Node{mkNode("a", "4", "8Gi")}, mkPod("q", "", "", hostPortOf(80, "10.0.0.1", "TCP")), "a"), mkPod("p", "", "", hostPortOf(80, "", "TCP")), "",
			"0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports."},
		{"anti-affinity of the pod", cluster([]*v1.Node{mkNode("a", "4", "8Gi"), mkNode("b", "4", "8Gi")}, mkPod("q", "", "", web), "a"), mkPod("p", "", "", antiAffinity(v1.LabelHostname, selectorOf("app", "web"))), "b", ""},
		{"anti-affinity of a pod that is there", cluster([]*v1.Node{mkNode("a", "4", "8Gi", zone("x")), mkNode("b", "4", "8Gi", zone("x"))}, mkPod("q", "", "", antiAffinity(v1.LabelTopologyZone, selectorOf("app", "web"))), "a"), mkPod("p", "", "", web), "",
			"0/2 nodes are available: 2 node(s) didn't satisfy existing pods anti-affinity rules."},
		{"anti-affinity in another namespace says nothing", cluster([]*v1.Node{mkNode("a", "4", "8Gi")}, mkPod("q", "", "", web, func(p *v1.Pod) { p.Namespace = "other" }), "a"), mkPod("p", "", "", antiAffinity(v1.LabelHostname, selectorOf("app", "web"))), "a", ""},
		{"affinity", cluster([]*v1.Node{mkNode("a", "4", "8Gi", zone("x")), mkNode("b", "4", "8Gi", zone("y")), mkNode("c", "1", "8Gi", zone("y"))}, mkPod("q", "1", "", web), "c"), mkPod("p", "2", "", podAffinity(v1.LabelTopologyZone, selectorOf("app", "web"))), "b", ""},
		{"affinity to nobody", cluster([]*v1.Node{mkNode("a", "4", "8Gi", zone("x"))}), mkPod("p", "", "", podAffinity(v1.LabelTopologyZone, selectorOf("app", "web"))), "",
			"0/1 nodes are available: 1 node(s) didn't match pod affinity rules."},
		{"the first of a group that wants to be together", cluster([]*v1.Node{mkNode("a", "4", "8Gi"), mkNode("b", "4", "8Gi", zone("x"))}), mkPod("p", "", "", web, podAffinity(v1.LabelTopologyZone, selectorOf("app", "web"))), "b", ""},
		{"spread, hard", cluster([]*v1.Node{mkNode("a", "8", "8Gi", zone("x")), mkNode("b", "1", "8Gi", zone("y"))}, mkPod("q", "", "", web), "a"), mkPod("p", "", "", web, spreadOver(v1.LabelTopologyZone, 1, v1.DoNotSchedule, selectorOf("app", "web"))), "b", ""},
		{"spread, hard, cannot be met", cluster([]*v1.Node{mkNode("a", "8", "8Gi", zone("x")), mkNode("b", "1", "8Gi", zone("y"), taint("x", v1.TaintEffectNoSchedule)), mkNode("c", "1", "1Gi")}, mkPod("q", "", "", web), "a"),
			mkPod("p", "", "", web, spreadOver(v1.LabelTopologyZone, 1, v1.DoNotSchedule, selectorOf("app", "web"))), "",
			"0/3 nodes are available: 1 node(s) didn't match pod topology spread constraints, 1 node(s) didn't match pod topology spread constraints (missing required label), 1 node(s) had untolerated taint(s)."},
		{"terminating pods are not spread from", cluster([]*v1.Node{mkNode("a", "8", "8Gi", zone("x")), mkNode("b", "1m", "8Gi", zone("y"))}, mkPod("q", "", "", web, func(p *v1.Pod) { now := metav1.Now(); p.DeletionTimestamp = &now }), "a"),
			mkPod("p", "2", "", web, spreadOver(v1.LabelTopologyZone, 1, v1.DoNotSchedule, selectorOf("app", "web"))), "a", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := place(t, tc.s, tc.pod)
			if d.Node != tc.node {
				t.Errorf("placed on %q (%v), want %q", d.Node, d.Refusal, tc.node)
			}
			if d.Refusal != nil {
				if got, _, _ := strings.Cut(d.Refusal.Error(), " no new claims"); got != tc.reason {
					t.Errorf("refused with\n %s\nwant\n %s", got, tc.reason)
				}
			}
		})
	}
}

func TestRefusalTexts(t *testing.T) {
	never := v1.PreemptNever
	for _, tc := range []struct {
		name string
		s    *Snapshot
		pod  *v1.Pod
		want string
	}{
		{"no node at all", cluster(nil), mkPod("p", "1", ""), "no nodes available to schedule pods"},
		{"preemption finds no victims", cluster([]*v1.Node{mkNode("a", "2", "8Gi"), mkNode("b", "1", "8Gi")}, mkPod("q", "1", ""), "a"), mkPod("p", "2", ""),
			"0/2 nodes are available: 2 Insufficient cpu. no new claims to deallocate, preemption: 0/2 nodes are available: 1 No preemption victims found for incoming pod, 1 Preemption is not helpful for scheduling."},
		{"preemption forbidden", cluster([]*v1.Node{mkNode("a", "2", "8Gi")}, mkPod("q", "1", ""), "a"), mkPod("p", "2", "", withPriority(5), func(p *v1.Pod) { p.Spec.PreemptionPolicy = &never }),
			"0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: not eligible due to preemptionPolicy=Never."},
		{"preemption does not free enough", cluster([]*v1.Node{mkNode("a", "2", "8Gi")}, mkPod("q", "1", "", withPriority(9)), "a", mkPod("r", "500m", ""), "a"), mkPod("p", "2", "", withPriority(5)),
			"0/1 nodes are available: 1 Insufficient cpu. no new claims to deallocate, preemption: 0/1 nodes are available: 1 Insufficient cpu."},
		{"conflicting affinity to names", cluster([]*v1.Node{mkNode("a", "2", "8Gi")}), mkPod("p", "1", "", func(p *v1.Pod) {
			fields := func(v string) v1.NodeSelectorRequirement {
				return v1.NodeSelectorRequirement{Key: "metadata.name", Operator: v1.NodeSelectorOpIn, Values: []string{v}}
			}
			affinityOf(p).NodeAffinity = &v1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{{MatchFields: []v1.NodeSelectorRequirement{fields("a"), fields("b")}}}}}
		}), "0/1 nodes are available: pod affinity terms conflict. no new claims to deallocate, preemption: 0/1 nodes are available: 1 Preemption is not helpful for scheduling."},
	} {
		if got := place(t, tc.s, tc.pod).Refusal.Error(); got != tc.want {
			t.Errorf("%s:\n got %s\nwant %s", tc.name, got, tc.want)
		}
	}
}

func TestLostNodeIsRefusedLikeATaintedOne(t *testing.T) {
	s := cluster([]*v1.Node{mkNode("a", "4", "8Gi")})
	s.SetLost(map[string]bool{"a": true, "unheard-of": true})
	pod := mkPod("p", "1", "")
	if d := place(t, s, pod); d.Node != "" || !d.Refusal.Filters[TaintToleration] {
		t.Fatalf("%+v", d)
	}
	s.SetNode(mkNode("a", "4", "8Gi")) // a new version does not make it live
	if d := place(t, s, pod); d.Node != "" {
		t.Fatal("an update of the node brought it back")
	}
	if back := s.SetLost(map[string]bool{"unheard-of": true}); !reflect.DeepEqual(back, []string{"a"}) {
		t.Errorf("returned %v", back)
	}
	if d := place(t, s, pod); d.Node != "a" {
		t.Error("not used although it is back")
	}
}

// Each score alone decides between otherwise equal nodes.
func TestScores(t *testing.T) {
	two := func(edit func(a, b *v1.Node)) []*v1.Node {
		a, b := mkNode("a", "4", "8Gi", zone("x")), mkNode("b", "4", "8Gi", zone("y"))
		if edit != nil {
			edit(a, b)
		}
		return []*v1.Node{a, b}
	}
	web := labelled("app", "web")
	prefer := func(value string) func(*v1.Pod) {
		return func(p *v1.Pod) {
			affinityOf(p).NodeAffinity = &v1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []v1.PreferredSchedulingTerm{{Weight: 1, Preference: v1.NodeSelectorTerm{
				MatchExpressions: []v1.NodeSelectorRequirement{{Key: v1.LabelTopologyZone, Operator: v1.NodeSelectorOpIn, Values: []string{value}}}}}}}
		}
	}
	for _, tc := range []struct {
		name  string
		s     *Snapshot
		pod   *v1.Pod
		peers *metav1.LabelSelector
		want  string
	}{
		{"least allocated", cluster(two(nil), mkPod("q", "2", "4Gi"), "a"), mkPod("p", "1", "2Gi"), nil, "b"},
		{"pods without requests count when scored", cluster(two(nil), mkPod("q", "", ""), "a"), mkPod("p", "", ""), nil, "b"},
		{"balance", cluster(two(nil), mkPod("q", "2", "1Gi"), "a", mkPod("r", "1", "3Gi"), "b"), mkPod("p", "100m", "3Gi"), nil, "a"},
		{"soft taint", cluster(two(func(a, b *v1.Node) { taint("x", v1.TaintEffectPreferNoSchedule)(a) })), mkPod("p", "1", ""), nil, "b"},
		{"preferred node affinity", cluster(two(nil)), mkPod("p", "1", "", prefer("y")), nil, "b"},
		{"default spread", cluster(two(nil), mkPod("q", "1m", "1Mi", web), "a", mkPod("r", "1m", "1Mi"), "b"), mkPod("p", "1m", "1Mi", web), selectorOf("app", "web"), "b"},
		{"soft spread of its own", cluster(two(nil), mkPod("q", "1m", "1Mi", web), "a", mkPod("r", "1m", "1Mi"), "b"), mkPod("p", "1m", "1Mi", web, spreadOver(v1.LabelTopologyZone, 1, v1.ScheduleAnyway, selectorOf("app", "web"))), nil, "b"},
		{"soft affinity of its own", cluster(two(nil), mkPod("q", "1", "1Gi", web), "b"), mkPod("p", "1m", "", func(p *v1.Pod) {
			affinityOf(p).PodAffinity = &v1.PodAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []v1.WeightedPodAffinityTerm{{Weight: 10, PodAffinityTerm: v1.PodAffinityTerm{LabelSelector: selectorOf("app", "web"), TopologyKey: v1.LabelTopologyZone}}}}
		}), nil, "b"},
		{"somebody's soft anti-affinity", cluster(two(nil), mkPod("q", "1m", "1Mi", func(p *v1.Pod) {
			affinityOf(p).PodAntiAffinity = &v1.PodAntiAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []v1.WeightedPodAffinityTerm{{Weight: 10, PodAffinityTerm: v1.PodAffinityTerm{LabelSelector: selectorOf("app", "web"), TopologyKey: v1.LabelHostname}}}}
		}), "a", mkPod("r", "1m", "1Mi"), "b"), mkPod("p", "1m", "1Mi", web), nil, "b"},
		{"somebody's required affinity draws", cluster(two(nil), mkPod("q", "1", "1Gi", web, podAffinity(v1.LabelHostname, selectorOf("app", "web"))), "b"), mkPod("p", "1m", "1Mi", web), nil, "b"},
		{"image locality", cluster(two(func(a, b *v1.Node) {
			b.Status.Images = []v1.ContainerImage{{Names: []string{"web:latest"}, SizeBytes: 800 << 20}}
		})), mkPod("p", "1", ""), nil, "b"},
	} {
		for seed := range uint64(20) { // never by luck
			req := Request{Pod: tc.pod}
			if tc.peers != nil {
				req.Peers, _ = metav1.LabelSelectorAsSelector(tc.peers)
			}
			d, err := tc.s.Place(req, rand.New(rand.NewPCG(seed, 0)))
			if err != nil || d.Node != tc.want {
				ex, _ := tc.s.Explain(req)
				t.Errorf("%s: %q (%v), want %q: %+v", tc.name, d.Node, err, tc.want, ex)
				break
			}
		}
	}
}

func TestTiesAreBrokenFairlyAndReproducibly(t *testing.T) {
	var nodes []*v1.Node
	for _, name := range names("n", 4) {
		nodes = append(nodes, mkNode(name, "4", "8Gi"))
	}
	s := cluster(nodes)
	draw := func(seed uint64) (out []string) {
		r := rand.New(rand.NewPCG(seed, 0))
		for range 400 {
			d, err := s.Place(Request{Pod: mkPod("p", "1", "1Gi")}, r)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, d.Node)
		}
		return out
	}
	first := draw(7)
	if !reflect.DeepEqual(first, draw(7)) {
		t.Error("the same seed gives other decisions")
	}
	if reflect.DeepEqual(first, draw(8)) {
		t.Error("another seed gives the same decisions")
	}
	hits := map[string]int{}
	for _, n := range first {
		hits[n]++
	}
	for _, n := range names("n", 4) {
		if hits[n] < 60 || hits[n] > 140 {
			t.Errorf("%s was drawn %d times of 400 among 4 equals", n, hits[n])
		}
	}
}

func TestPreemption(t *testing.T) {
	budget := func(allowed int32) *policyv1.PodDisruptionBudget {
		return &policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Namespace: "default"}, Spec: policyv1.PodDisruptionBudgetSpec{Selector: selectorOf("app", "guarded")}, Status: policyv1.PodDisruptionBudgetStatus{DisruptionsAllowed: allowed}}
	}
	guarded := labelled("app", "guarded")
	for _, tc := range []struct {
		name    string
		s       *Snapshot
		pod     *v1.Pod
		budgets []*policyv1.PodDisruptionBudget
		node    string
		victims []string
	}{
		{"the least important pod that is enough goes", cluster([]*v1.Node{mkNode("a", "4", "8Gi")}, mkPod("x", "2", "", withPriority(3)), "a", mkPod("y", "2", "", withPriority(1)), "a"), mkPod("p", "2", "", withPriority(9)), nil, "a", []string{"y"}},
		{"the node with less important pods", cluster([]*v1.Node{mkNode("a", "2", "8Gi"), mkNode("b", "2", "8Gi")}, mkPod("x", "2", "", withPriority(3)), "a", mkPod("y", "2", "", withPriority(1)), "b"), mkPod("p", "2", "", withPriority(9)), nil, "b", []string{"y"}},
		{"the node with fewer victims", cluster([]*v1.Node{mkNode("a", "2", "8Gi"), mkNode("b", "2", "8Gi")}, mkPod("x", "1", ""), "a", mkPod("y", "1", ""), "a", mkPod("z", "2", ""), "b"), mkPod("p", "2", "", withPriority(9)), nil, "b", []string{"z"}},
		{"rather not against a budget", cluster([]*v1.Node{mkNode("a", "2", "8Gi"), mkNode("b", "2", "8Gi")}, mkPod("x", "2", "", guarded), "a", mkPod("y", "2", "", withPriority(5)), "b"), mkPod("p", "2", "", withPriority(9)), []*policyv1.PodDisruptionBudget{budget(0)}, "b", []string{"y"}},
		{"a host port", cluster([]*v1.Node{mkNode("a", "4", "8Gi")}, mkPod("x", "1", "", hostPortOf(80, "", "TCP")), "a", mkPod("y", "1", ""), "a"), mkPod("p", "1", "", hostPortOf(80, "", "TCP"), withPriority(9)), nil, "a", []string{"x"}},
		{"anti-affinity", cluster([]*v1.Node{mkNode("a", "4", "8Gi")}, mkPod("x", "1", "", labelled("app", "web")), "a", mkPod("y", "1", ""), "a"), mkPod("p", "1", "", antiAffinity(v1.LabelHostname, selectorOf("app", "web")), withPriority(9)), nil, "a", []string{"x"}},
		{"equals are left alone", cluster([]*v1.Node{mkNode("a", "2", "8Gi")}, mkPod("x", "2", "", withPriority(9)), "a"), mkPod("p", "2", "", withPriority(9)), nil, "", nil},
	} {
		before := describe(tc.s)
		d, err := tc.s.Place(Request{Pod: tc.pod, Budgets: tc.budgets}, rnd())
		if err != nil {
			t.Fatal(err)
		}
		node, victims := "", []string(nil)
		if d.Preempt != nil {
			node = d.Preempt.Node
			for _, v := range d.Preempt.Victims {
				victims = append(victims, v.Name)
			}
		}
		if node != tc.node || !reflect.DeepEqual(victims, tc.victims) {
			t.Errorf("%s: on %q evict %v (%v), want %q %v", tc.name, node, victims, d.Refusal, tc.node, tc.victims)
		}
		if after := describe(tc.s); after != before {
			t.Errorf("%s: the trial changed the snapshot:\n%s\n%s", tc.name, before, after)
		}
	}
}

func TestNominationKeepsRoomFromLowerPods(t *testing.T) {
	s := cluster([]*v1.Node{mkNode("a", "2", "8Gi")})
	s.Nominate(mkPod("high", "2", "", withPriority(9)), "a")
	if d := place(t, s, mkPod("low", "1", "")); d.Node != "" {
		t.Error("a lower pod took the room that was made")
	}
	if d := place(t, s, mkPod("higher", "1", "", withPriority(10))); d.Node != "a" {
		t.Error("a higher pod was held back by a lower one's nomination")
	}
	if d := place(t, s, mkPod("high", "2", "", withPriority(9))); d.Node != "a" {
		t.Error("a pod was held back by its own nomination")
	}
	s.Unnominate("high")
	if d := place(t, s, mkPod("low", "1", "")); d.Node != "a" {
		t.Error("the room is still held")
	}
}
