package placement

import (
	"math"
	"slices"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// constraint is one parsed topology spread constraint.
type constraint struct {
	key           string
	maxSkew       int64
	minDomains    int
	selector      labels.Selector
	honorNodes    bool // count only nodes that the pod's node affinity lets it run on
	honorTaints   bool // count only nodes whose taints it tolerates
	matchesItself bool
}

// hardConstraint is a DoNotSchedule constraint with the pods per domain.
type hardConstraint struct {
	constraint
	domains map[string]int64
	// The two least filled domains when they were counted: enough to know the
	// least of all but one, since a trial changes one domain only.
	least [2]domainCount
	few   bool // fewer than minDomains: the least counts as empty
}

type domainCount struct {
	value string
	pods  int64
}

// The spreading of pods that say nothing themselves, and belong to a Service
// or a workload: softly over nodes and zones, as upstream's system defaults.
var defaultSpread = []constraint{
	{key: v1.LabelHostname, maxSkew: 3, minDomains: 1, honorNodes: true},
	{key: v1.LabelTopologyZone, maxSkew: 5, minDomains: 1, honorNodes: true},
}

// parseConstraint prepares one constraint of a pod with the given labels.
func parseConstraint(own map[string]string, c *v1.TopologySpreadConstraint) (constraint, error) {
	selector, err := metav1.LabelSelectorAsSelector(c.LabelSelector)
	if err != nil {
		return constraint{}, err
	}
	if requirements, selectable := selector.Requirements(); selectable && len(c.MatchLabelKeys) > 0 {
		same := labels.Set{}
		for _, key := range c.MatchLabelKeys {
			if value, ok := own[key]; ok {
				same[key] = value
			}
		}
		if len(same) > 0 {
			selector = labels.SelectorFromSet(same).Add(requirements...)
		}
	}
	parsed := constraint{
		key: c.TopologyKey, maxSkew: int64(c.MaxSkew), minDomains: 1, selector: selector,
		honorNodes:    c.NodeAffinityPolicy == nil || *c.NodeAffinityPolicy == v1.NodeInclusionPolicyHonor,
		honorTaints:   c.NodeTaintsPolicy != nil && *c.NodeTaintsPolicy == v1.NodeInclusionPolicyHonor,
		matchesItself: selector.Matches(labels.Set(own)),
	}
	if c.MinDomains != nil {
		parsed.minDomains = int(*c.MinDomains)
	}
	return parsed, nil
}

// countsIn reports whether the node's pods enter the sums of the constraint.
func (p *plan) countsIn(c *constraint, n *node) bool {
	if c.honorNodes && !p.affinityMatches(n) {
		return false
	}
	return !c.honorTaints || p.toleratesTaintsOf(n)
}

func hasAllKeys(n *node, keys func(i int) string, count int) bool {
	for i := range count {
		if _, ok := n.obj.Labels[keys(i)]; !ok {
			return false
		}
	}
	return true
}

// hardConstraints are the pod's own, or those of the profile for pods that
// have none and belong together with others.
func (p *plan) hardConstraints() ([]constraint, error) {
	if len(p.pod.Spec.TopologySpreadConstraints) > 0 {
		return constraintsOf(p.pod.Labels, p.pod.Spec.TopologySpreadConstraints, v1.DoNotSchedule)
	}
	if len(p.rules.hardDefaults) == 0 || p.peers == nil || p.peers.Empty() {
		return nil, nil
	}
	out := slices.Clone(p.rules.hardDefaults)
	for i := range out {
		out[i].selector, out[i].matchesItself = p.peers, p.peers.Matches(labels.Set(p.pod.Labels))
	}
	return out, nil
}

// newHardConstraints counts the pods per domain for what trySpread checks.
func (p *plan) newHardConstraints() ([]hardConstraint, error) {
	own, err := p.hardConstraints()
	if err != nil || len(own) == 0 {
		return nil, err
	}
	out := make([]hardConstraint, len(own))
	counters := make([]*counter, len(own))
	for i := range own {
		out[i] = hardConstraint{constraint: own[i], domains: map[string]int64{}}
		counters[i] = p.s.counter(p.pod.Namespace, own[i].selector)
	}
	for _, n := range p.s.order {
		if !hasAllKeys(n, func(i int) string { return out[i].key }, len(out)) {
			continue
		}
		for i := range out {
			if p.countsIn(&out[i].constraint, n) {
				out[i].domains[n.obj.Labels[out[i].key]] += counters[i].at(n.slot)
			}
		}
	}
	for i := range out {
		out[i].rank()
	}
	return out, nil
}

func (c *hardConstraint) rank() {
	c.least = [2]domainCount{{pods: math.MaxInt32}, {pods: math.MaxInt32}}
	for value, pods := range c.domains {
		if pods < c.least[0].pods {
			c.least[1], c.least[0] = c.least[0], domainCount{value, pods}
		} else if pods < c.least[1].pods {
			c.least[1] = domainCount{value, pods}
		}
	}
	c.few = len(c.domains) < c.minDomains
}

// leastFilled is the number of pods in the least filled domain, where the
// domain value may have changed since rank.
func (c *hardConstraint) leastFilled(value string) int64 {
	if c.few {
		return 0
	}
	others := c.least[0].pods
	if c.least[0].value == value {
		others = c.least[1].pods
	}
	if pods, ok := c.domains[value]; ok && pods < others {
		return pods
	}
	return others
}

// spreadTrial counts a pod in, or out, on the node on trial.
func (p *plan) spreadTrial(pod *v1.Pod, n *node, delta int64) {
	if len(p.spread) == 0 || pod.Namespace != p.pod.Namespace || pod.DeletionTimestamp != nil ||
		!hasAllKeys(n, func(i int) string { return p.spread[i].key }, len(p.spread)) {
		return
	}
	for i := range p.spread {
		c := &p.spread[i]
		if !c.selector.Empty() && c.selector.Matches(labels.Set(pod.Labels)) && p.countsIn(&c.constraint, n) {
			c.domains[n.obj.Labels[c.key]] += delta
		}
	}
}

// trySpread refuses a node on which the pod would make its domain exceed the
// least filled one by more than maxSkew.
func (p *plan) trySpread(n *node) verdict {
	for i := range p.spread {
		c := &p.spread[i]
		value, ok := n.obj.Labels[c.key]
		if !ok {
			return refused(PodTopologySpread, reasonSpreadLabel)
		}
		pods := c.domains[value]
		if c.matchesItself {
			pods++
		}
		if pods-c.leastFilled(value) > c.maxSkew {
			return refusedForNow(PodTopologySpread, reasonSpread)
		}
	}
	return verdict{}
}

// softConstraint is a ScheduleAnyway constraint with what scoring needs.
type softConstraint struct {
	constraint
	counter *counter
	domains map[string]int64 // pods per domain that a feasible node is in; not for the hostname
	weight  float64
}

// spreadScores fills in, for each feasible node, how much room its domains
// have: 100 for the best. It returns false if nothing asks for spreading.
func (p *plan) spreadScores(feasible []*node, scores []int64) (bool, error) {
	soft, requireAll, err := p.softConstraints()
	if err != nil || len(soft) == 0 {
		return false, err
	}
	keyOf := func(i int) string { return soft[i].key }
	ignored := make([]bool, len(feasible))
	scored := 0
	for k, n := range feasible {
		if ignored[k] = requireAll && !hasAllKeys(n, keyOf, len(soft)); ignored[k] {
			continue
		}
		scored++
		for i := range soft {
			if soft[i].key != v1.LabelHostname {
				soft[i].domains[n.obj.Labels[soft[i].key]] = 0
			}
		}
	}
	p.countDomains(soft, requireAll)
	for i := range soft {
		size := len(soft[i].domains)
		if soft[i].key == v1.LabelHostname {
			size = scored
		}
		// Small topologies must not drown in the counts of large ones.
		soft[i].weight = math.Log(float64(size + 2))
	}
	for k, n := range feasible {
		scores[k] = 0
		if ignored[k] {
			continue
		}
		var sum float64
		for i := range soft {
			c := &soft[i]
			value, ok := n.obj.Labels[c.key]
			if !ok {
				continue
			}
			pods := c.domains[value]
			if c.key == v1.LabelHostname {
				pods = c.counter.at(n.slot)
			}
			sum += float64(pods)*c.weight + float64(c.maxSkew-1)
		}
		scores[k] = int64(math.Round(sum))
	}
	normalizeSpread(scores, ignored)
	return true, nil
}

func (p *plan) softConstraints() (soft []softConstraint, requireAll bool, err error) {
	constraints, own := p.rules.softDefaults, len(p.pod.Spec.TopologySpreadConstraints) > 0
	if own {
		if constraints, err = constraintsOf(p.pod.Labels, p.pod.Spec.TopologySpreadConstraints, v1.ScheduleAnyway); err != nil {
			return nil, false, err
		}
	} else if p.peers == nil || p.peers.Empty() {
		return nil, false, nil
	}
	for _, c := range constraints {
		if !own {
			c.selector = p.peers
		}
		soft = append(soft, softConstraint{
			constraint: c,
			counter:    p.s.counter(p.pod.Namespace, c.selector),
			domains:    map[string]int64{},
		})
	}
	return soft, own || !p.rules.systemSpread, nil
}

// countDomains adds up the pods of all nodes, feasible or not, in the domains
// that the feasible ones are in.
func (p *plan) countDomains(soft []softConstraint, requireAll bool) {
	for i := range soft {
		c := &soft[i]
		if c.key == v1.LabelHostname {
			continue
		}
		for _, n := range p.s.order {
			pods := c.counter.at(n.slot)
			if pods == 0 || requireAll && !hasAllKeys(n, func(j int) string { return soft[j].key }, len(soft)) {
				continue
			}
			value := n.obj.Labels[c.key]
			if _, wanted := c.domains[value]; wanted && p.countsIn(&c.constraint, n) {
				c.domains[value] += pods
			}
		}
	}
}

func normalizeSpread(scores []int64, ignored []bool) {
	lowest, highest := int64(math.MaxInt64), int64(0)
	for k, score := range scores {
		if !ignored[k] {
			lowest, highest = min(lowest, score), max(highest, score)
		}
	}
	for k, score := range scores {
		switch {
		case ignored[k]:
			scores[k] = 0
		case highest == 0:
			scores[k] = maxScore
		default:
			scores[k] = maxScore * (highest + lowest - score) / highest
		}
	}
}
