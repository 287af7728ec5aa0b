package placement

import (
	"math"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// domainCounts holds a number for each domain: by the key of the node label
// that makes domains, then by its value. A domain whose number is zero is
// absent.
type domainCounts map[string]map[string]int64

// add changes the number of the domain that the node is in.
func (d domainCounts) add(n *node, key string, delta int64) {
	value, ok := n.obj.Labels[key]
	if !ok || delta == 0 {
		return
	}
	values := d[key]
	if values == nil {
		values = map[string]int64{}
		d[key] = values
	}
	if values[value] += delta; values[value] == 0 {
		if delete(values, value); len(values) == 0 {
			delete(d, key)
		}
	}
}

// any reports whether the node is in a domain with a number above zero.
func (d domainCounts) any(n *node) bool {
	for key, values := range d {
		if value, ok := n.obj.Labels[key]; ok && values[value] > 0 {
			return true
		}
	}
	return false
}

// interPod says where pods are that attract or repel the planned one.
type interPod struct {
	existingAnti domainCounts // pods there do not want it
	affinity     domainCounts // pods that it needs (each matches all its terms)
	anti         domainCounts // pods that it does not want
	selfMatch    bool         // it matches all its own affinity terms
}

func (p *plan) newInterPod() interPod {
	ip := interPod{existingAnti: domainCounts{}}
	for _, n := range p.s.order {
		for _, existing := range n.antiAffine {
			p.countAnti(ip.existingAnti, existing, n, 1)
		}
	}
	terms := &p.info.terms
	if len(terms.required) == 0 && len(terms.requiredAnti) == 0 {
		return ip
	}
	ip.affinity, ip.anti = domainCounts{}, domainCounts{}
	for _, n := range p.s.order {
		for _, existing := range n.pods {
			p.countOwn(&ip, existing.pod, n, 1)
		}
	}
	ip.selfMatch = matchesAll(terms.required, p.pod, p.namespace)
	return ip
}

// countAnti counts the required anti-affinity of a pod on node n against the
// planned one.
func (p *plan) countAnti(counts domainCounts, existing *podInfo, n *node, delta int64) {
	for i := range existing.terms.requiredAnti {
		t := &existing.terms.requiredAnti[i]
		if t.matches(p.pod, p.namespace) {
			counts.add(n, t.topologyKey, delta)
		}
	}
}

// countOwn counts a pod on node n for the planned one's required terms.
func (p *plan) countOwn(ip *interPod, existing *v1.Pod, n *node, delta int64) {
	terms, ns := &p.info.terms, p.s.namespaces[existing.Namespace]
	if matchesAll(terms.required, existing, ns) {
		for i := range terms.required {
			ip.affinity.add(n, terms.required[i].topologyKey, delta)
		}
	}
	for i := range terms.requiredAnti {
		if terms.requiredAnti[i].matches(existing, ns) {
			ip.anti.add(n, terms.requiredAnti[i].topologyKey, delta)
		}
	}
}

// interTrial counts a pod in, or out, on the node on trial.
func (p *plan) interTrial(info *podInfo, n *node, delta int64) {
	if !p.asks(InterPodAffinity) {
		return
	}
	p.countAnti(p.inter.existingAnti, info, n, delta)
	if p.inter.affinity != nil {
		p.countOwn(&p.inter, info.pod, n, delta)
	}
}

func matchesAll(terms []affinityTerm, pod *v1.Pod, namespace labels.Set) bool {
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
	if len(p.info.terms.required) > 0 && p.asks(InterPodAffinity) && !p.affinityMet(n) {
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
	for i := range p.info.terms.required {
		key := p.info.terms.required[i].topologyKey
		value, ok := n.obj.Labels[key]
		if !ok {
			return false
		}
		there = there && p.inter.affinity[key][value] > 0
	}
	return there || len(p.inter.affinity) == 0 && p.inter.selfMatch
}

// interPodScores adds up, per domain, the weights of the soft terms between
// the planned pod and those that are there, in both directions.
func (p *plan) interPodScores(feasible []*node, scores []int64) bool {
	own := &p.info.terms
	hasOwn := len(own.preferred)+len(own.preferredAnti) > 0
	if p.rules.IgnorePreferredTermsOfExistingPods && !hasOwn {
		return false
	}
	domains := domainCounts{}
	for _, n := range p.s.order {
		if hasOwn {
			for _, existing := range n.pods {
				p.ownWishes(domains, existing.pod, n)
			}
		}
		for _, existing := range n.affine {
			p.theirWishes(domains, &existing.terms, n)
		}
	}
	if len(domains) == 0 {
		return false
	}
	lowest, highest := int64(math.MaxInt64), int64(math.MinInt64)
	for i, n := range feasible {
		scores[i] = 0
		for key, values := range domains {
			if value, ok := n.obj.Labels[key]; ok {
				scores[i] += values[value]
			}
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

// ownWishes adds what the planned pod would like of a pod on node n.
func (p *plan) ownWishes(domains domainCounts, existing *v1.Pod, n *node) {
	own, ns := &p.info.terms, p.s.namespaces[existing.Namespace]
	for i := range own.preferred {
		if t := &own.preferred[i]; t.matches(existing, ns) {
			domains.add(n, t.topologyKey, t.weight)
		}
	}
	for i := range own.preferredAnti {
		if t := &own.preferredAnti[i]; t.matches(existing, ns) {
			domains.add(n, t.topologyKey, -t.weight)
		}
	}
}

// theirWishes adds what a pod on node n, with the given terms, would like of
// the planned one. Having required to be near one like it is a wish, too.
func (p *plan) theirWishes(domains domainCounts, theirs *podTerms, n *node) {
	for i := range theirs.required {
		if t := &theirs.required[i]; t.matches(p.pod, p.namespace) {
			domains.add(n, t.topologyKey, int64(p.rules.HardPodAffinityWeight))
		}
	}
	for i := range theirs.preferred {
		if t := &theirs.preferred[i]; t.matches(p.pod, p.namespace) {
			domains.add(n, t.topologyKey, t.weight)
		}
	}
	for i := range theirs.preferredAnti {
		if t := &theirs.preferredAnti[i]; t.matches(p.pod, p.namespace) {
			domains.add(n, t.topologyKey, -t.weight)
		}
	}
}
