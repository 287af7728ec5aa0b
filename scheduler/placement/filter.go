package placement

import (
	"cmp"
	"slices"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// plan is one pod made ready to be tried on every node of one snapshot.
type plan struct {
	s         *Snapshot
	pod       *v1.Pod
	info      *podInfo
	namespace labels.Set      // labels of the pod's namespace
	onlyNodes map[string]bool // nil: any; from affinity to metadata.name
	affinity  nodeaffinity.RequiredNodeAffinity
	scalars   []scalarWant
	spread    []hardConstraint
	inter     interPod
	whole     string // set: refused by all nodes for this reason
	wholeBy   Filter
}

// scalarWant is a requested resource that is counted by name.
type scalarWant struct {
	name   v1.ResourceName
	want   int64
	reason string // if it is short
}

// verdict is what one node says to one pod; ok if no reason is given.
type verdict struct {
	by      Filter
	reason  string
	more    []string // further reasons (several resources may be short)
	evictOK bool     // evicting pods from the node could change its mind
}

func (v *verdict) ok() bool { return v.reason == "" }

func refused(by Filter, reason string) verdict { return verdict{by: by, reason: reason} }
func refusedForNow(by Filter, reason string) verdict {
	return verdict{by: by, reason: reason, evictOK: true}
}

// newPlan prepares everything that does not depend on the single node.
func (s *Snapshot) newPlan(pod *v1.Pod) *plan {
	p := &plan{s: s, pod: pod, namespace: s.namespaces[pod.Namespace], affinity: nodeaffinity.GetRequiredNodeAffinity(pod)}
	var err error
	if p.info, err = newPodInfo(pod, false); err != nil {
		p.whole, p.wholeBy = "parsing pod: "+err.Error(), InterPodAffinity
		return p
	}
	for name, n := range p.info.request.Scalars {
		p.scalars = append(p.scalars, scalarWant{name: name, want: n, reason: insufficient + string(name)})
	}
	slices.SortFunc(p.scalars, func(a, b scalarWant) int { return cmp.Compare(a.name, b.name) })
	if p.onlyNodes = nodesByName(pod); p.onlyNodes != nil && len(p.onlyNodes) == 0 {
		p.whole, p.wholeBy = reasonAffinityConflict, NodeAffinity
		return p
	}
	p.recount()
	return p
}

// recount derives what depends on where other pods are. It is repeated when
// pods are taken away on trial.
func (p *plan) recount() {
	var err error
	if p.spread, err = p.newHardConstraints(); err != nil {
		p.whole, p.wholeBy = "obtaining pod's hard topology spread constraints: "+err.Error(), PodTopologySpread
		return
	}
	p.inter = p.newInterPod()
}

// nodesByName returns the nodes that required affinity to metadata.name
// leaves, nil if some term leaves the name open. Daemon pods are placed so.
func nodesByName(pod *v1.Pod) map[string]bool {
	a := pod.Spec.Affinity
	if a == nil || a.NodeAffinity == nil || a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return nil
	}
	terms := a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	if len(terms) == 0 {
		return nil
	}
	all := map[string]bool{}
	for i := range terms {
		names := namesOfTerm(&terms[i])
		if names == nil {
			return nil
		}
		for name := range names {
			all[name] = true
		}
	}
	return all
}

func namesOfTerm(term *v1.NodeSelectorTerm) map[string]bool {
	var names map[string]bool
	for _, r := range term.MatchFields {
		if r.Key != "metadata.name" || r.Operator != v1.NodeSelectorOpIn {
			continue
		}
		next := map[string]bool{}
		for _, v := range r.Values {
			if names == nil || names[v] {
				next[v] = true
			}
		}
		names = next
	}
	return names
}

// try asks all filters in their order; the first refusal counts.
func (p *plan) try(n *node) verdict {
	if p.onlyNodes != nil && !p.onlyNodes[n.name] {
		return refused(NodeAffinity, "node(s) didn't satisfy plugin(s) [NodeAffinity]")
	}
	if n.obj.Spec.Unschedulable && !tolerates(p.pod.Spec.Tolerations, &unschedulableTaint) {
		return refused(NodeUnschedulable, reasonUnschedulable)
	}
	if p.pod.Spec.NodeName != "" && p.pod.Spec.NodeName != n.name {
		return refused(NodeName, reasonNodeName)
	}
	if !p.toleratesNode(n) {
		return refused(TaintToleration, reasonTaint)
	}
	// A selector that cannot be parsed matches no node, as upstream.
	if match, err := p.affinity.Match(n.obj); err != nil || !match {
		return refused(NodeAffinity, reasonNodeAffinity)
	}
	if !p.portsFree(n) {
		return refusedForNow(NodePorts, reasonPorts)
	}
	if v := p.fits(n); !v.ok() {
		return v
	}
	if v := p.trySpread(n); !v.ok() {
		return v
	}
	return p.tryInterPod(n)
}

// The taint that a cordoned node stands for, and the one that a lost node is
// about to get.
var (
	unschedulableTaint = v1.Taint{Key: v1.TaintNodeUnschedulable, Effect: v1.TaintEffectNoSchedule}
	unreachableTaint   = v1.Taint{Key: v1.TaintNodeUnreachable, Effect: v1.TaintEffectNoSchedule}
)

func (p *plan) toleratesNode(n *node) bool {
	if n.lost && !tolerates(p.pod.Spec.Tolerations, &unreachableTaint) {
		return false
	}
	for i := range n.hardTaints {
		if !tolerates(p.pod.Spec.Tolerations, &n.hardTaints[i]) {
			return false
		}
	}
	return true
}

// tolerates reports whether one of the tolerations covers the taint. The
// comparison operators of KEP-5471 are alpha in 1.36, off by default, and
// match nothing.
func tolerates(tolerations []v1.Toleration, taint *v1.Taint) bool {
	for i := range tolerations {
		t := &tolerations[i]
		if t.Effect != "" && t.Effect != taint.Effect || t.Key != "" && t.Key != taint.Key {
			continue
		}
		switch t.Operator {
		case "", v1.TolerationOpEqual:
			if t.Value == taint.Value {
				return true
			}
		case v1.TolerationOpExists:
			return true
		}
	}
	return false
}

func (p *plan) portsFree(n *node) bool {
	for _, want := range p.info.ports {
		for used := range n.ports {
			if want.clashes(used) {
				return false
			}
		}
		for _, info := range n.nominated {
			if n.holdsFor(info, p) && slices.ContainsFunc(info.ports, want.clashes) {
				return false
			}
		}
	}
	return true
}

// fits compares the request with what is left. Evicting pods can help only if
// the node, empty, were large enough.
func (p *plan) fits(n *node) verdict {
	v := verdict{by: NodeResourcesFit, evictOK: true}
	short := func(reason string) {
		if v.reason == "" {
			v.reason = reason
		} else {
			v.more = append(v.more, reason)
		}
	}
	held := n.held(p)
	if int64(len(n.pods)+held.pods)+1 > n.allocPods {
		short(reasonTooManyPods)
	}
	r := &p.info.request
	if r.isZero() {
		return v
	}
	check := func(want, used, alloc int64, reason string) {
		if want > 0 && want > alloc-used {
			short(reason)
			v.evictOK = v.evictOK && want <= alloc
		}
	}
	check(r.MilliCPU, n.used.MilliCPU+held.MilliCPU, n.alloc.MilliCPU, reasonCPU)
	check(r.Memory, n.used.Memory+held.Memory, n.alloc.Memory, reasonMemory)
	check(r.EphemeralStorage, n.used.EphemeralStorage+held.EphemeralStorage, n.alloc.EphemeralStorage, reasonStorage)
	for _, s := range p.scalars {
		check(s.want, n.used.Scalars[s.name]+held.Scalars[s.name], n.alloc.Scalars[s.name], s.reason)
	}
	return v
}

// topologyPair is a node label that makes a domain.
type topologyPair struct{ key, value string }

// interPod says where pods are that attract or repel the planned one.
type interPod struct {
	existingAnti map[topologyPair]int64 // pods there do not want it
	affinity     map[topologyPair]int64 // pods that it needs (each matches all its terms)
	anti         map[topologyPair]int64 // pods that it does not want
	selfMatch    bool                   // it matches all its own affinity terms
}

func (p *plan) newInterPod() interPod {
	ip := interPod{existingAnti: map[topologyPair]int64{}}
	for _, n := range p.s.order {
		for _, existing := range n.antiAffine {
			for i := range existing.terms.requiredAnti {
				t := &existing.terms.requiredAnti[i]
				if t.matches(p.pod, p.namespace) {
					count(ip.existingAnti, n, t.topologyKey)
				}
			}
		}
	}
	terms := &p.info.terms
	if len(terms.required) == 0 && len(terms.requiredAnti) == 0 {
		return ip
	}
	ip.affinity, ip.anti = map[topologyPair]int64{}, map[topologyPair]int64{}
	for _, n := range p.s.order {
		for _, existing := range n.pods {
			ns := p.s.namespaces[existing.pod.Namespace]
			if matchesAll(terms.required, existing.pod, ns) {
				for i := range terms.required {
					count(ip.affinity, n, terms.required[i].topologyKey)
				}
			}
			for i := range terms.requiredAnti {
				if terms.requiredAnti[i].matches(existing.pod, ns) {
					count(ip.anti, n, terms.requiredAnti[i].topologyKey)
				}
			}
		}
	}
	ip.selfMatch = matchesAll(terms.required, p.pod, p.namespace)
	return ip
}

func count(m map[topologyPair]int64, n *node, key string) {
	if value, ok := n.obj.Labels[key]; ok {
		m[topologyPair{key, value}]++
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
	if !p.affinityMet(n) {
		return refused(InterPodAffinity, reasonPodAffinity)
	}
	hit := func(m map[topologyPair]int64, key string) bool {
		value, ok := n.obj.Labels[key]
		return ok && m[topologyPair{key, value}] > 0
	}
	if len(p.inter.anti) > 0 && slices.ContainsFunc(p.info.terms.requiredAnti, func(t affinityTerm) bool { return hit(p.inter.anti, t.topologyKey) }) {
		return refusedForNow(InterPodAffinity, reasonPodAntiAffinity)
	}
	if len(p.inter.existingAnti) > 0 {
		for key := range n.obj.Labels {
			if hit(p.inter.existingAnti, key) {
				return refusedForNow(InterPodAffinity, reasonExistingAnti)
			}
		}
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
		there = there && p.inter.affinity[topologyPair{key, value}] > 0
	}
	return there || len(p.inter.affinity) == 0 && p.inter.selfMatch
}
