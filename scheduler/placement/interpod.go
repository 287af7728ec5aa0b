package placement

import (
	"math"

	"k8s.io/apimachinery/pkg/labels"
)

// domainCounts is a number for each domain of a topology.
type domainCounts struct {
	topology *topology
	counts   []int64
}

// at returns the number of the node's domain; false if it is in none.
func (d *domainCounts) at(n *node) (int64, bool) {
	if id := d.topology.of(n.slot); id != noDomain {
		return d.counts[id], true
	}
	return 0, false
}

// add changes the number of the domain that the node is in, and reports
// whether it is in one.
func (d *domainCounts) add(n *node, delta int64) bool {
	id := d.topology.of(n.slot)
	if id != noDomain {
		d.counts[id] += delta
	}
	return id != noDomain
}

// newDomainCounts makes zeroes; they are the plan's until it ends.
func (p *plan) newDomainCounts(key string) domainCounts {
	t := p.s.topology(key)
	return domainCounts{t, p.s.buffers.zeroed(len(t.ids))}
}

// domainSums are numbers for the domains of some topologies.
type domainSums []domainCounts

// of returns the numbers of the topology with that key, zeroes if there were
// none. They are valid until the next call.
func (p *plan) of(sums *domainSums, key string) *domainCounts {
	for i := range *sums {
		if (*sums)[i].topology.key == key {
			return &(*sums)[i]
		}
	}
	*sums = append(*sums, p.newDomainCounts(key))
	return &(*sums)[len(*sums)-1]
}

// any reports whether the node is in a domain with a number above zero.
func (d domainSums) any(n *node) bool {
	for i := range d {
		if pods, _ := d[i].at(n); pods > 0 {
			return true
		}
	}
	return false
}

// interPod says where pods are that attract or repel the planned one.
type interPod struct {
	existingAnti domainSums // pods there do not want it
	affinity     domainSums // pods that it needs (each matches all its terms); parallel to the terms
	anti         domainSums // pods that it does not want; parallel to the terms
	needed       int64      // sum of affinity
	selfMatch    bool       // it matches all its own affinity terms
	idle         bool       // neither it nor any pod that is there has a say
}

func (p *plan) newInterPod() interPod {
	var ip interPod
	var repelled int64
	p.s.groups.each(whoIs(p.pod), p.namespace, func(g *termGroup) {
		if g.kind == repels {
			d := p.of(&ip.existingAnti, g.term.topologyKey)
			repelled += sumDomains(g.perSlot, d.topology, 1, d.counts)
		}
	})
	terms := p.info.terms
	ip.idle = repelled == 0 && len(terms.required)+len(terms.requiredAnti) == 0
	if len(terms.required) > 0 {
		there := p.s.termCounter(terms.required)
		for i := range terms.required {
			d := p.newDomainCounts(terms.required[i].topologyKey)
			ip.needed += sumDomains(there.perSlot, d.topology, 1, d.counts)
			ip.affinity = append(ip.affinity, d)
		}
		ip.selfMatch = matchesAll(terms.required, whoIs(p.pod), p.namespace)
	}
	for i := range terms.requiredAnti {
		d := p.newDomainCounts(terms.requiredAnti[i].topologyKey)
		sumDomains(p.s.termCounter(terms.requiredAnti[i:i+1]).perSlot, d.topology, 1, d.counts)
		ip.anti = append(ip.anti, d)
	}
	return ip
}

// interTrial counts a pod in, or out, on the node on trial. As upstream, a
// nominated pod's anti-affinity alone does not wake the rule: its PreFilter
// has skipped it by then.
func (p *plan) interTrial(info *podInfo, n *node, delta int64) {
	if !p.asks(InterPodAffinity) || p.inter.idle {
		return
	}
	for i := range info.terms.requiredAnti {
		if t := &info.terms.requiredAnti[i]; t.matches(whoIs(p.pod), p.namespace) {
			p.of(&p.inter.existingAnti, t.topologyKey).add(n, delta)
		}
	}
	terms, ns := p.info.terms, p.s.namespaces[info.pod.namespace]
	if matchesAll(terms.required, info.pod.who, ns) {
		for i := range p.inter.affinity {
			if p.inter.affinity[i].add(n, delta) {
				p.inter.needed += delta
			}
		}
	}
	for i := range p.inter.anti {
		if terms.requiredAnti[i].matches(info.pod.who, ns) {
			p.inter.anti[i].add(n, delta)
		}
	}
}

func matchesAll(terms []affinityTerm, pod who, namespace labels.Set) bool {
	for i := range terms {
		if !terms[i].matches(pod, namespace) {
			return false
		}
	}
	return len(terms) > 0
}

// tryInterPod applies the required terms: the pod's own, then those of the
// pods that are there.
func (p *plan) tryInterPod(n *node) verdict {
	if len(p.inter.affinity) > 0 && !p.affinityMet(n) {
		return refused(InterPodAffinity, reasonPodAffinity)
	}
	if p.inter.anti.any(n) {
		return refusedForNow(InterPodAffinity, reasonPodAntiAffinity)
	}
	if p.inter.existingAnti.any(n) {
		return refusedForNow(InterPodAffinity, reasonExistingAnti)
	}
	return verdict{}
}

// affinityMet reports whether the pods that the planned one needs are in the
// node's domains. The first pod of a group that wants to be together matches
// only itself: it may go to any node that has the domains.
func (p *plan) affinityMet(n *node) bool {
	there := true
	for i := range p.inter.affinity {
		pods, ok := p.inter.affinity[i].at(n)
		if !ok {
			return false
		}
		there = there && pods > 0
	}
	return there || p.inter.needed == 0 && p.inter.selfMatch
}

// interPodScores adds up, per domain, the weights of the soft terms between
// the planned pod and those that are there, in both directions.
func (p *plan) interPodScores(found []option, scores []int64) bool {
	own := p.info.terms
	if p.rules.IgnorePreferredTermsOfExistingPods && len(own.preferred)+len(own.preferredAnti) == 0 {
		return false
	}
	sums := p.wishes()
	if len(sums) == 0 {
		return false
	}
	lowest, highest := int64(math.MaxInt64), int64(math.MinInt64)
	for i := range found {
		scores[i] = 0
		for k := range sums {
			weight, _ := sums[k].at(found[i].node)
			scores[i] += weight
		}
		lowest, highest = min(lowest, scores[i]), max(highest, scores[i])
	}
	for i := range scores {
		if highest > lowest {
			scores[i] = int64(maxScore * (float64(scores[i]-lowest) / float64(highest-lowest)))
		} else {
			scores[i] = 0
		}
	}
	return true
}

// wishes sums what the pods that are there would like of the planned one, and
// it of them. Having required to be near one like it is a wish, too.
func (p *plan) wishes() (sums domainSums) {
	add := func(perSlot []int32, key string, weight int64) {
		if weight != 0 {
			d := p.of(&sums, key)
			sumDomains(perSlot, d.topology, weight, d.counts)
		}
	}
	p.s.groups.each(whoIs(p.pod), p.namespace, func(g *termGroup) {
		switch g.kind {
		case needs:
			add(g.perSlot, g.term.topologyKey, int64(p.rules.HardPodAffinityWeight))
		case likes:
			add(g.perSlot, g.term.topologyKey, g.term.weight)
		case dislikes:
			add(g.perSlot, g.term.topologyKey, -g.term.weight)
		}
	})
	own := p.info.terms
	for i := range own.preferred {
		add(p.s.termCounter(own.preferred[i:i+1]).perSlot, own.preferred[i].topologyKey, own.preferred[i].weight)
	}
	for i := range own.preferredAnti {
		add(p.s.termCounter(own.preferredAnti[i:i+1]).perSlot, own.preferredAnti[i].topologyKey, -own.preferredAnti[i].weight)
	}
	return sums
}
