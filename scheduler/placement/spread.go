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
	domainCounts // uncounted where no node enters the sums
	// The two least filled domains when they were counted: enough to know the
	// least of all but one, since a trial changes one domain only.
	least [2]domainCount
	few   bool // fewer than minDomains: the least counts as empty
}

type domainCount struct {
	domain int32
	pods   int64
}

// uncounted marks a domain that is none to the constraint.
const uncounted = -1

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
	if p.class.onlyNodes != nil {
		return (!c.honorNodes || p.affinityMatches(n)) && (!c.honorTaints || p.toleratesTaintsOf(n))
	}
	a := p.answer(n)
	return (!c.honorNodes || a.affine) && (!c.honorTaints || a.tolerated)
}

// inAll reports whether the node is in a domain of each of the topologies.
func inAll(n *node, count int, topology func(i int) *topology) bool {
	for i := range count {
		if topology(i).of(n.slot) == noDomain {
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
		out[i] = hardConstraint{constraint: own[i], domainCounts: p.newDomainCounts(own[i].key)}
		counters[i] = p.s.counter(p.pod.Namespace, own[i].selector)
		for d := range out[i].counts {
			out[i].counts[d] = uncounted
		}
	}
	for _, n := range p.s.order {
		if !inAll(n, len(out), func(i int) *topology { return out[i].topology }) {
			continue
		}
		for i := range out {
			if p.countsIn(&out[i].constraint, n) {
				pods := &out[i].counts[out[i].topology.of(n.slot)]
				*pods = max(*pods, 0) + counters[i].at(n.slot)
			}
		}
	}
	for i := range out {
		out[i].rank()
	}
	return out, nil
}

func (c *hardConstraint) rank() {
	c.least = [2]domainCount{{noDomain, math.MaxInt32}, {noDomain, math.MaxInt32}}
	domains := 0
	for d, pods := range c.counts {
		if pods == uncounted {
			continue
		}
		domains++
		if pods < c.least[0].pods {
			c.least[1], c.least[0] = c.least[0], domainCount{int32(d), pods}
		} else if pods < c.least[1].pods {
			c.least[1] = domainCount{int32(d), pods}
		}
	}
	c.few = domains < c.minDomains
}

// leastFilled is the number of pods in the least filled domain, where the
// number of that domain may have changed since rank.
func (c *hardConstraint) leastFilled(domain int32) int64 {
	if c.few {
		return 0
	}
	others := c.least[0].pods
	if c.least[0].domain == domain {
		others = c.least[1].pods
	}
	if pods := c.counts[domain]; pods != uncounted && pods < others {
		return pods
	}
	return others
}

// spreadTrial counts a pod in, or out, on the node on trial.
func (p *plan) spreadTrial(pod *presence, n *node, delta int64) {
	if len(p.spread) == 0 || pod.namespace != p.pod.Namespace || pod.ending ||
		!inAll(n, len(p.spread), func(i int) *topology { return p.spread[i].topology }) {
		return
	}
	for i := range p.spread {
		c := &p.spread[i]
		if !c.selector.Empty() && c.selector.Matches(pod.labels) && p.countsIn(&c.constraint, n) {
			c.add(n, delta)
		}
	}
}

// trySpread refuses a node on which the pod would make its domain exceed the
// least filled one by more than maxSkew.
func (p *plan) trySpread(n *node) verdict {
	for i := range p.spread {
		c := &p.spread[i]
		pods, ok := c.at(n)
		if !ok {
			return refused(PodTopologySpread, reasonSpreadLabel)
		}
		pods = max(pods, 0) // of uncounted
		if c.matchesItself {
			pods++
		}
		if pods-c.leastFilled(c.topology.of(n.slot)) > c.maxSkew {
			return refusedForNow(PodTopologySpread, reasonSpread)
		}
	}
	return verdict{}
}

// softConstraint is a ScheduleAnyway constraint with what scoring needs.
type softConstraint struct {
	constraint
	domainCounts // pods per domain that a feasible node is in, else uncounted; none for the hostname
	counter      *counter
	weight       float64
	unlabelled   bool // a feasible node lacks the label: upstream counts that as a domain, too
}

// perNode reports whether each node is a domain of its own.
func (c *softConstraint) perNode() bool { return c.key == v1.LabelHostname }

// spreadScores fills in, for each feasible node, how much room its domains
// have: 100 for the best. It returns false if nothing asks for spreading.
func (p *plan) spreadScores(found []option, scores []int64) (bool, error) {
	soft, requireAll, err := p.softConstraints()
	if err != nil || len(soft) == 0 {
		return false, err
	}
	ignored := make([]bool, len(found))
	p.wantDomains(soft, requireAll, found, ignored)
	p.countDomains(soft, requireAll)
	for k := range found {
		scores[k] = 0
		if ignored[k] {
			continue
		}
		n := found[k].node
		var sum float64
		for i := range soft {
			c := &soft[i]
			d := c.topology.of(n.slot)
			if d == noDomain {
				continue
			}
			pods := c.counter.at(n.slot)
			if !c.perNode() {
				pods = c.counts[d]
			}
			sum += float64(pods)*c.weight + float64(c.maxSkew-1)
		}
		scores[k] = int64(math.Round(sum))
	}
	normalizeSpread(scores, ignored)
	return true, nil
}

// wantDomains finds the domains that the feasible nodes are in, and from their
// number the weights of the constraints. Nodes that are not scored are noted
// in ignored.
func (p *plan) wantDomains(soft []softConstraint, requireAll bool, found []option, ignored []bool) {
	sizes := make([]int, len(soft))
	scored := 0
	for k := range found {
		n := found[k].node
		if ignored[k] = requireAll && !inAll(n, len(soft), func(i int) *topology { return soft[i].topology }); ignored[k] {
			continue
		}
		scored++
		for i := range soft {
			if c := &soft[i]; c.perNode() {
				continue
			} else if d := c.topology.of(n.slot); d == noDomain {
				c.unlabelled = true
			} else if c.counts[d] == uncounted {
				c.counts[d] = 0
				sizes[i]++
			}
		}
	}
	for i := range soft {
		c, size := &soft[i], sizes[i]
		switch {
		case c.perNode():
			size = scored
		case c.unlabelled:
			size++
		}
		// Small topologies must not drown in the counts of large ones.
		c.weight = math.Log(float64(size + 2))
	}
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
		s := softConstraint{constraint: c, counter: p.s.counter(p.pod.Namespace, c.selector)}
		if s.perNode() {
			s.topology = p.s.topology(c.key)
		} else {
			s.domainCounts = p.newDomainCounts(c.key)
			for d := range s.counts {
				s.counts[d] = uncounted
			}
		}
		soft = append(soft, s)
	}
	return soft, own || !p.rules.systemSpread, nil
}

// countDomains adds up the pods of all nodes, feasible or not, in the domains
// that the feasible ones are in.
func (p *plan) countDomains(soft []softConstraint, requireAll bool) {
	for i := range soft {
		c := &soft[i]
		if c.perNode() {
			continue
		}
		for _, n := range p.s.order {
			pods := c.counter.at(n.slot)
			if pods == 0 || requireAll && !inAll(n, len(soft), func(j int) *topology { return soft[j].topology }) {
				continue
			}
			if d := c.topology.of(n.slot); d != noDomain && c.counts[d] != uncounted && p.countsIn(&c.constraint, n) {
				c.counts[d] += pods
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
