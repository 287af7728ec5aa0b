package placement

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// Fits reports whether a node and the pods on it alone would let the pod in:
// if not, what happened there cannot have helped it. rules may be nil for the
// default profile. Rules that look beyond the node, at volumes or at devices
// are not asked.
func (s *Snapshot) Fits(pod *v1.Pod, nodeName string, rules *Profile) bool {
	return s.fits(pod, nodeName, rules, false)
}

// Welcomes is like Fits, but that what is kept on the node for other pods that go before this one counts as taken.
func (s *Snapshot) Welcomes(pod *v1.Pod, nodeName string, rules *Profile) bool {
	return s.fits(pod, nodeName, rules, true)
}

func (s *Snapshot) fits(pod *v1.Pod, nodeName string, rules *Profile, keep bool) bool {
	n := s.nodes[nodeName]
	if n == nil || n.obj == nil {
		return false
	}
	if rules == nil {
		rules = defaultProfile
	}
	p := &plan{s: s, rules: rules, pod: pod, class: s.classOf(pod, rules)}
	info := p.class.info
	info.pod, p.info = presenceOf(pod), &info
	if p.class.invalid != nil || p.answer(n).refusal != 0 {
		return false
	}
	if !keep || len(n.nominated) == 0 {
		return true
	}
	before := n.heldFor(p)
	p.occupy(before, n, 1)
	defer p.occupy(before, n, -1)
	v := p.tryAlone(n)
	return v.ok()
}

// Concern returns a function that reports whether it can matter to a pod where
// the other one is, or that it is not there any more: one of them is kept from
// the other, needs it, is spread from it, or both want the same volume. rules
// are those of that pod, nil for the default profile.
func (s *Snapshot) Concern(other *v1.Pod) func(pod *v1.Pod, rules *Profile) bool {
	theirs, err := termsOf(other)
	if err != nil {
		theirs = noTerms
	}
	namespace := s.namespaces[other.Namespace]
	claims := VolumeClaims(other)
	return func(pod *v1.Pod, rules *Profile) bool {
		for i := range theirs.requiredAnti {
			if theirs.requiredAnti[i].matches(whoIs(pod), s.namespaces[pod.Namespace]) {
				return true
			}
		}
		for _, c := range claims {
			if UsesClaim(pod, other.Namespace, c.Name) {
				return true
			}
		}
		own, err := termsOf(pod)
		if err != nil {
			return true // it says why itself
		}
		concerned := false
		own.each(func(kind termKind, t *affinityTerm) {
			concerned = concerned || kind <= repels && t.matches(whoIs(other), namespace)
		})
		return concerned || pod.Namespace == other.Namespace && spreadFrom(pod, other, rules)
	}
}

// spreadFrom reports whether the other pod counts where this one is spread.
func spreadFrom(pod, other *v1.Pod, rules *Profile) bool {
	all := pod.Spec.TopologySpreadConstraints
	for i := range all {
		c, err := parseConstraint(pod.Labels, &all[i])
		if err != nil || c.selector.Matches(labels.Set(other.Labels)) {
			return true
		}
	}
	return len(all) == 0 && rules != nil && len(rules.hardDefaults) > 0 // whom those are for is not known here
}
