package placement

import (
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	resourceapi "k8s.io/api/resource/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// Request is a pod that wants a node.
type Request struct {
	Pod *v1.Pod
	// Profile is how the pod's schedulerName is placed. Nil: [DefaultProfile].
	Profile *Profile
	// Peers selects the pods that this one is to be spread from by default:
	// those of its Services and its workload (see [DefaultSelector]). Nil or
	// empty: none. Constraints in the pod itself win.
	Peers labels.Selector
	// Budgets are the disruption budgets that preemption should not break if
	// it has a choice.
	Budgets []*policyv1.PodDisruptionBudget
	// Evicting says that pods are about to be evicted for this one on the node that it is nominated to, though they do not show that they end yet: as
	// long as that is so, no more are evicted.
	Evicting bool
	// Now is the time, for devices that must be ready within a limit. Zero:
	// there is no limit.
	Now time.Time
}

// Decision is the outcome for one pod: a node, or why there is none.
type Decision struct {
	Node     string   // "" if none took the pod
	Feasible int      // nodes that could have taken it
	Refusal  *Refusal // nil if Node is set
	// Preempt, if set, names pods whose eviction makes room on a node.
	Preempt *Preemption
	// Devices is what has to be written about the pod's claims before it is
	// bound to Node; nil: nothing.
	Devices *DeviceBinding
	// Release, if set, is a claim whose allocation nobody uses and that keeps
	// the pod from other nodes: it should be taken away, or the claim deleted if
	// [IsSpecialClaim].
	Release *resourceapi.ResourceClaim
}

// Place decides for one pod. Among equally good nodes rnd chooses, so the
// same snapshot, request and state of rnd give the same decision. The
// snapshot is not changed: a caller that acts on the decision calls SetPod.
//
// An error means that the pod's own preferences cannot be parsed, which the
// API server's validation excludes.
func (s *Snapshot) Place(req Request, rnd *rand.Rand) (Decision, error) {
	p := s.newPlan(&req)
	defer p.end()
	if p.whole != "" {
		refusal := &Refusal{Nodes: len(s.order), Whole: p.whole, Filters: map[Filter]bool{p.wholeBy: true}}
		if !p.rules.NoRelease {
			refusal.Release = reasonNothingToRelease
		}
		if !p.rules.NoPreemption {
			refusal.Preemption = p.preemptionText(nil)
		}
		return Decision{Refusal: refusal}, nil
	}
	// Room was made for the pod on its nominated node: that goes first.
	if n := s.nodes[s.NominatedTo(req.Pod)]; n != nil && n.obj != nil {
		if _, v := p.consider(n); v.ok() {
			return p.chosen(n, 1), nil
		}
	}
	found := p.feasible(rnd)
	defer p.keep(found)
	switch len(found) {
	case 0:
		if p.devices != nil && p.devices.timedOut != nil {
			return Decision{}, p.devices.timedOut
		}
		refusal, candidates := p.refusal()
		var claim *resourceapi.ResourceClaim
		if !p.rules.NoRelease {
			claim, refusal.Release = p.release(rnd)
		}
		preempt := p.preempt(candidates, req.Budgets, refusal, rnd)
		if preempt != nil {
			refusal.Release = "" // upstream tells of no other attempt once one has helped
		}
		return Decision{Refusal: refusal, Preempt: preempt, Release: claim}, nil
	case 1:
		return p.chosen(found[0].node, 1), nil
	}
	totals, err := p.score(found, nil)
	if err != nil {
		return Decision{}, err
	}
	return p.chosen(found[best(totals, rnd)].node, len(found)), nil
}

func (p *plan) chosen(n *node, feasible int) Decision {
	return Decision{Node: n.name, Feasible: feasible, Devices: p.devices.binding(n)}
}

// option is a node that can take the pod, with what it answered.
type option struct {
	node *node
	answer
}

// feasible returns the nodes that can take the pod, in the order of their
// names; of a pod that needs devices, enough of them from anywhere in it.
func (p *plan) feasible(rnd *rand.Rand) []option {
	found := p.s.options[:0]
	try := func(n *node) {
		if a, v := p.consider(n); v.ok() {
			found = append(found, option{n, a})
		}
	}
	switch {
	case p.class.onlyNodes != nil:
	case p.devices != nil && p.devices.allocator != nil && len(p.s.order) > enoughWithDevices:
		from := rnd.IntN(len(p.s.order))
		for i := 0; i < len(p.s.order) && len(found) < enoughWithDevices; i++ {
			try(p.s.order[(from+i)%len(p.s.order)])
		}
		return found
	default:
		// For most nodes the remembered answer is all that is looked at, which is in
		// an array: with thousands of nodes it is the memory that takes the time.
		s, known, together := p.s, p.class.answers, p.asksTogether()
		for i, slot := range s.slotOf {
			a := &known[slot]
			if a.version != s.versions[slot] || s.waited[slot] > 0 {
				try(s.order[i])
				continue
			}
			if a.refusal != 0 {
				continue
			}
			if together {
				if v := p.tryTogether(s.order[i]); !v.ok() {
					continue
				}
			}
			found = append(found, option{s.order[i], *a})
		}
		return found
	}
	for _, name := range slices.Sorted(maps.Keys(p.class.onlyNodes)) {
		if n := p.s.nodes[name]; n != nil && n.obj != nil {
			try(n)
		}
	}
	return found
}

// keep lets the next plan use the memory again.
func (p *plan) keep(found []option) { p.s.options = found[:0] }

// best returns the index of the highest total, drawn fairly among equals.
func best(totals []int64, rnd *rand.Rand) int {
	top, equals := int64(math.MinInt64), 0
	for _, total := range totals {
		switch {
		case total > top:
			top, equals = total, 1
		case total == top:
			equals++
		}
	}
	skip := 0
	if equals > 1 {
		skip = rnd.IntN(equals)
	}
	for i, total := range totals {
		if total != top {
			continue
		}
		if skip == 0 {
			return i
		}
		skip--
	}
	panic("placement: the best of no nodes")
}

// refusal asks all nodes once more, now for the reasons: the pass that finds
// feasible nodes need not collect them. It also returns the nodes that could
// change their mind if pods were evicted from them.
func (p *plan) refusal() (*Refusal, []*node) {
	r := &Refusal{Nodes: len(p.s.order), Reasons: map[string]int{}, Filters: map[Filter]bool{}}
	var candidates []*node
	same := make([]int, maxRefusals+1) // nodes with that answer
	for _, n := range p.s.order {
		a, v := p.consider(n)
		if v.evictOK {
			candidates = append(candidates, n)
		}
		if 0 < a.refusal && a.refusal <= maxRefusals {
			same[a.refusal]++
			continue
		}
		v.countIn(r.Reasons, 1)
		r.Filters[v.by] = true
	}
	for i, nodes := range same {
		if nodes > 0 {
			v := &p.class.refusals[i-1]
			v.countIn(r.Reasons, nodes)
			r.Filters[v.by] = true
		}
	}
	return r, candidates
}

// countIn counts the reasons of that many nodes.
func (v *verdict) countIn(reasons map[string]int, nodes int) {
	reasons[v.reason] += nodes
	for _, more := range v.more {
		reasons[more] += nodes
	}
}

// Explanation is what one node said to a pod.
type Explanation struct {
	Node    string
	Filter  Filter   // the rule that refused; "" if the node could take the pod
	Reasons []string // of that rule
	// EvictionMayHelp says that the rule could let the pod in if pods went from the node.
	EvictionMayHelp bool
	Scores          Scores // weighted, if the node could take the pod
}

// Explain tells node by node, in the order of their names, what refuses the
// pod or how the node scores for it.
func (s *Snapshot) Explain(req Request) ([]Explanation, error) {
	p := s.newPlan(&req)
	defer p.end()
	out := make([]Explanation, 0, len(s.order))
	var found []option
	var at []int
	for _, n := range s.order {
		e := Explanation{Node: n.name}
		if p.whole != "" {
			e.Filter, e.Reasons = p.wholeBy, []string{p.whole}
		} else if a, v := p.consider(n); v.ok() {
			found, at = append(found, option{n, a}), append(at, len(out))
		} else {
			e.Filter, e.Reasons, e.EvictionMayHelp = v.by, append([]string{v.reason}, v.more...), v.evictOK
		}
		out = append(out, e)
	}
	scores := make([]Scores, len(found))
	if _, err := p.score(found, scores); err != nil {
		return nil, err
	}
	for i := range found {
		out[at[i]].Scores = scores[i]
	}
	return out, nil
}

// DefaultSelector is the selector of the pods that pod should be spread from
// although it does not say so: it demands the selectors of all services (of
// the pod's namespace) that select the pod, and that of its workload (nil if
// it has none). Nil if there is neither.
func DefaultSelector(pod *v1.Pod, services []*v1.Service, workload *metav1.LabelSelector) labels.Selector {
	set := labels.Set{}
	for _, service := range services {
		if len(service.Spec.Selector) > 0 && labels.SelectorFromSet(service.Spec.Selector).Matches(labels.Set(pod.Labels)) {
			for key, value := range service.Spec.Selector {
				set[key] = value
			}
		}
	}
	selector := labels.SelectorFromSet(set)
	if workload != nil {
		if own, err := metav1.LabelSelectorAsSelector(workload); err == nil {
			if requirements, selectable := own.Requirements(); selectable {
				selector = selector.Add(requirements...)
			}
		}
	}
	if selector.Empty() {
		return nil
	}
	return selector
}
