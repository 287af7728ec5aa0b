package placement

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// randomNode is one of few kinds, so that nodes are alike and ties happen.
func randomNode(r *rand.Rand, name string) *v1.Node {
	n := mkNode(name, fmt.Sprint(1+r.IntN(4)), "8Gi")
	if r.IntN(5) > 0 {
		zone(fmt.Sprint("z", r.IntN(3)))(n)
	}
	if r.IntN(6) == 0 {
		taint("x", []v1.TaintEffect{v1.TaintEffectNoSchedule, v1.TaintEffectPreferNoSchedule}[r.IntN(2)])(n)
	}
	n.Spec.Unschedulable = r.IntN(12) == 0
	for i := range r.IntN(3) {
		n.Status.Images = append(n.Status.Images, v1.ContainerImage{Names: []string{[]string{"web:latest", "db:latest"}[i]}, SizeBytes: 400 << 20})
	}
	return n
}

func randomTerm(r *rand.Rand) v1.PodAffinityTerm {
	t := v1.PodAffinityTerm{LabelSelector: selectorOf("app", fmt.Sprint("a", r.IntN(3))), TopologyKey: []string{v1.LabelHostname, v1.LabelTopologyZone}[r.IntN(2)]}
	switch r.IntN(5) {
	case 0:
		t.NamespaceSelector = selectorOf("team", "red")
	case 1:
		t.NamespaceSelector = &metav1.LabelSelector{}
	case 2:
		t.Namespaces = []string{"default", "other"}
	}
	return t
}

func randomPod(r *rand.Rand, name string) *v1.Pod {
	p := mkPod(name, []string{"", "100m", "500m", "1"}[r.IntN(4)], []string{"", "1Gi"}[r.IntN(2)], labelled("app", fmt.Sprint("a", r.IntN(3))), withPriority(int32(r.IntN(3))))
	p.Namespace = []string{"default", "other"}[r.IntN(2)]
	if r.IntN(4) == 0 {
		p.Spec.NodeSelector = map[string]string{v1.LabelTopologyZone: fmt.Sprint("z", r.IntN(3))}
	}
	if r.IntN(6) == 0 {
		hostPortOf(int32(80+r.IntN(2)), "", "TCP")(p)
	}
	if r.IntN(3) == 0 {
		p.Spec.Tolerations = []v1.Toleration{{Key: "x", Operator: v1.TolerationOpExists}}
	}
	weighted := func() []v1.WeightedPodAffinityTerm {
		return []v1.WeightedPodAffinityTerm{{Weight: int32(1 + r.IntN(50)), PodAffinityTerm: randomTerm(r)}}
	}
	switch r.IntN(10) {
	case 0:
		affinityOf(p).PodAntiAffinity = &v1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []v1.PodAffinityTerm{randomTerm(r)}}
	case 1:
		affinityOf(p).PodAffinity = &v1.PodAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []v1.PodAffinityTerm{randomTerm(r), randomTerm(r)}[:1+r.IntN(2)]}
	case 2:
		affinityOf(p).PodAntiAffinity = &v1.PodAntiAffinity{PreferredDuringSchedulingIgnoredDuringExecution: weighted()}
	case 3:
		affinityOf(p).PodAffinity = &v1.PodAffinity{PreferredDuringSchedulingIgnoredDuringExecution: weighted()}
	case 4, 5:
		spreadOver([]string{v1.LabelHostname, v1.LabelTopologyZone}[r.IntN(2)], int32(1+r.IntN(2)),
			[]v1.UnsatisfiableConstraintAction{v1.DoNotSchedule, v1.ScheduleAnyway}[r.IntN(2)], selectorOf("app", fmt.Sprint("a", r.IntN(3))))(p)
	case 6:
		affinityOf(p).NodeAffinity = &v1.NodeAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []v1.PreferredSchedulingTerm{{Weight: 7, Preference: v1.NodeSelectorTerm{
			MatchExpressions: []v1.NodeSelectorRequirement{{Key: v1.LabelTopologyZone, Operator: v1.NodeSelectorOpIn, Values: []string{"z1"}}}}}}}
	}
	return p
}

// world is what a snapshot was told, to tell it to another one.
type world struct {
	nodes      map[string]*v1.Node
	pods       map[string]*v1.Pod // with the node in the specification
	nominated  map[string]*v1.Pod // with the node in the status
	namespaces map[string]labels.Set
	lost       map[string]bool
}

func (w *world) fresh() *Snapshot {
	s := NewSnapshot()
	for name, set := range w.namespaces {
		s.SetNamespace(name, set)
	}
	for _, n := range w.nodes {
		s.SetNode(n)
	}
	s.SetLost(w.lost)
	for _, p := range w.pods {
		s.SetPod(p, p.Spec.NodeName)
	}
	for _, p := range w.nominated {
		s.Nominate(p, p.Status.NominatedNodeName)
	}
	return s
}

// What a snapshot remembers of earlier decisions never changes a later one:
// one that has seen everything decides as one that is new.
func TestMemoryChangesNoDecision(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	placed, refused, preempting := 0, 0, 0
	for range 4 {
		w := world{nodes: map[string]*v1.Node{}, pods: map[string]*v1.Pod{}, nominated: map[string]*v1.Pod{}, namespaces: map[string]labels.Set{}, lost: map[string]bool{}}
		s := NewSnapshot()
		var kinds []*v1.Pod // pods come in several copies
		for step := range 400 {
			node := fmt.Sprintf("n%02d", r.IntN(12))
			switch r.IntN(16) {
			case 0:
				w.nodes[node] = randomNode(r, node)
				s.SetNode(w.nodes[node])
			case 1:
				if r.IntN(3) == 0 {
					delete(w.nodes, node)
					s.RemoveNode(node)
				}
			case 2:
				ns := []string{"default", "other"}[r.IntN(2)]
				w.namespaces[ns] = labels.Set{"team": []string{"red", "blue"}[r.IntN(2)]}
				s.SetNamespace(ns, w.namespaces[ns])
			case 3:
				w.lost = map[string]bool{}
				if r.IntN(3) == 0 {
					w.lost[node] = true
				}
				s.SetLost(w.lost)
			case 4, 5, 6:
				for name, p := range w.pods {
					delete(w.pods, name)
					s.RemovePod(p.UID)
					break
				}
			case 7:
				for name, p := range w.nominated {
					delete(w.nominated, name)
					s.Unnominate(p.UID)
					break
				}
			}
			if len(kinds) < 3 || r.IntN(10) == 0 {
				kinds = append(kinds, randomPod(r, ""))
			}
			pod := kinds[max(0, len(kinds)-1-r.IntN(5))].DeepCopy()
			pod.Name = fmt.Sprint("p", step)
			pod.UID = mkPod(pod.Name, "", "").UID
			if r.IntN(8) == 0 {
				for _, p := range w.nominated {
					pod = p
					break
				}
			}
			req := Request{Pod: pod}
			if r.IntN(2) == 0 {
				req.Peers, _ = metav1.LabelSelectorAsSelector(selectorOf("app", pod.Labels["app"]))
			}
			luck := r.Uint64()
			got, err := s.Place(req, rand.New(rand.NewPCG(luck, 1)))
			want, err2 := w.fresh().Place(req, rand.New(rand.NewPCG(luck, 1)))
			if err != nil || err2 != nil {
				t.Fatal(err, err2)
			}
			if g, w := text(got), text(want); g != w {
				t.Fatalf("step %d, pod %+v:\n%s\na new snapshot says:\n%s", step, pod.Spec, g, w)
			}
			explained(t, s, req, got)
			switch {
			case got.Node != "":
				placed++
				p := pod.DeepCopy()
				p.Spec.NodeName = got.Node
				w.pods[p.Name] = p
				delete(w.nominated, p.Name)
				s.Unnominate(p.UID)
				s.SetPod(p, got.Node)
			case got.Preempt != nil:
				preempting++
				p := pod.DeepCopy()
				p.Status.NominatedNodeName = got.Preempt.Node
				w.nominated[p.Name] = p
				s.Nominate(p, got.Preempt.Node)
				refused++
			default:
				refused++
			}
		}
	}
	t.Logf("%d placed, %d refused, of those %d by preempting", placed, refused, preempting)
	if placed < 200 || refused < 100 || preempting < 20 {
		t.Error("too few of some kind: the test says little")
	}
}

func text(d Decision) string {
	out := fmt.Sprintf("%q of %d", d.Node, d.Feasible)
	if d.Refusal != nil {
		out += " " + d.Refusal.Error() + fmt.Sprint(" ", d.Refusal.Filters, d.Refusal.EvictionUnderWay)
	}
	if d.Preempt != nil {
		out += fmt.Sprint(" evicts from ", d.Preempt.Node, d.Preempt.Violations)
		for _, v := range d.Preempt.Victims {
			out += " " + v.Name
		}
	}
	return out
}

// explained checks a decision against the explanation, which remembers nothing.
func explained(t *testing.T, s *Snapshot, req Request, d Decision) {
	t.Helper()
	if req.Pod.Status.NominatedNodeName != "" {
		return // its nominated node goes first
	}
	all, err := s.Explain(req)
	if err != nil {
		t.Fatal(err)
	}
	feasible, top, of := 0, int64(-1), int64(-2)
	for _, e := range all {
		if e.Filter != "" {
			continue
		}
		feasible++
		top = max(top, e.Scores.Total())
		if e.Node == d.Node {
			of = e.Scores.Total()
		}
	}
	if feasible != d.Feasible || feasible > 0 && of != top {
		t.Fatalf("%s has %d points, the best %d; %d feasible: %s", d.Node, of, top, feasible, text(d))
	}
}
