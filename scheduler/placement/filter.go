package placement

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// plan is one pod made ready to be tried on every node of one snapshot.
type plan struct {
	s         *Snapshot
	rules     *Profile
	pod       *v1.Pod
	peers     labels.Selector // of the request
	evicting  bool            // of the request
	info      *podInfo
	class     *class
	namespace labels.Set // labels of the pod's namespace
	spread    []hardConstraint
	inter     interPod
	volumes   *volumePlan // nil: the pod has no volume that a node must be asked for
	mark      int         // of the snapshot's buffers
	devices   *devicePlan // nil: the pod needs none
	whole     string      // set: refused by all nodes for this reason
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

// newPlan prepares everything that does not depend on the single node. There
// is one plan of a snapshot at a time; end ends it.
func (s *Snapshot) newPlan(req *Request) *plan {
	pod := req.Pod
	p := &plan{s: s, rules: req.Profile, pod: pod, peers: req.Peers, evicting: req.Evicting, namespace: s.namespaces[pod.Namespace], mark: s.buffers.mark()}
	if p.rules == nil {
		p.rules = defaultProfile
	}
	p.class = s.classOf(pod, p.rules)
	info := p.class.info
	info.pod, p.info = presenceOf(pod), &info
	if p.class.invalid != nil {
		p.whole, p.wholeBy = "parsing pod: "+p.class.invalid.Error(), InterPodAffinity
		return p
	}
	if p.class.onlyNodes != nil && len(p.class.onlyNodes) == 0 {
		p.whole, p.wholeBy = reasonAffinityConflict, NodeAffinity
		return p
	}
	var refusal *volumeRefusal
	if p.volumes, refusal = s.newVolumePlan(pod, p.rules); refusal != nil {
		p.whole, p.wholeBy = refusal.reason, refusal.by
		return p
	}
	if p.asks(PodTopologySpread) {
		var err error
		if p.spread, err = p.newHardConstraints(); err != nil {
			p.whole, p.wholeBy = "obtaining pod's hard topology spread constraints: "+err.Error(), PodTopologySpread
			return p
		}
	}
	if p.asks(InterPodAffinity) {
		p.inter = p.newInterPod()
	}
	if p.asks(DynamicResources) {
		p.withDevices(req.Now)
	}
	return p
}

// end gives back what the plan has borrowed.
func (p *plan) end() {
	p.s.buffers.release(p.mark)
	p.endDevices()
}

// asks reports whether the profile has the filter on.
func (p *plan) asks(f Filter) bool { return !p.rules.Off[f] }

func noNodeAffinity(pod *v1.Pod) bool {
	a := pod.Spec.Affinity
	return len(pod.Spec.NodeSelector) == 0 && (a == nil || a.NodeAffinity == nil || a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil)
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

// consider asks all filters about a node. Pods nominated to it that go before
// this one are first taken to be there already, as they soon will be; but as
// they may also end elsewhere, the node must do without them, too.
func (p *plan) consider(n *node) (answer, verdict) {
	if len(n.nominated) > 0 {
		if before := n.heldFor(p); len(before) > 0 {
			p.arrive(before, n, 1)
			v := p.try(n)
			p.arrive(before, n, -1)
			if !v.ok() {
				return answer{}, v
			}
		}
	}
	a := p.answer(n)
	if a.refusal != 0 {
		return a, p.verdict(n, a)
	}
	return a, p.tryTogether(n)
}

// try asks all filters in their order; the first refusal counts.
func (p *plan) try(n *node) verdict {
	if v := p.tryAlone(n); !v.ok() {
		return v
	}
	return p.tryTogether(n)
}

// tryAlone asks the first filters, which look at the node and the pods on it
// only. What they read of the pod must be in the key of its class, and every
// change of what they read of the node must touch it.
func (p *plan) tryAlone(n *node) verdict {
	if p.class.onlyNodes != nil && !p.class.onlyNodes[n.name] {
		return refused(NodeAffinity, reasonOtherNode)
	}
	if n.obj.Spec.Unschedulable && p.asks(NodeUnschedulable) && !tolerates(p.pod.Spec.Tolerations, &unschedulableTaint) {
		return refused(NodeUnschedulable, reasonUnschedulable)
	}
	if p.pod.Spec.NodeName != "" && p.pod.Spec.NodeName != n.name && p.asks(NodeName) {
		return refused(NodeName, reasonNodeName)
	}
	if !p.toleratesNode(n) {
		return refused(TaintToleration, reasonTaint)
	}
	if v := p.tryAffinity(n); !v.ok() {
		return v
	}
	if len(p.info.ports) > 0 && p.asks(NodePorts) && !p.portsFree(n) {
		return refusedForNow(NodePorts, reasonPorts)
	}
	return p.fits(n)
}

// asksTogether reports whether tryTogether has anything to ask.
func (p *plan) asksTogether() bool {
	ip := &p.inter
	return p.volumes != nil || len(p.spread) > 0 || len(ip.affinity)+len(ip.anti)+len(ip.existingAnti) > 0 || p.devices != nil || !p.class.features.IsEmpty()
}

// tryTogether asks the filters that come after those: they look beyond the
// node.
func (p *plan) tryTogether(n *node) verdict {
	if p.volumes != nil {
		if v := p.volumes.try(n); !v.ok() {
			return v
		}
	}
	if v := p.trySpread(n); !v.ok() {
		return v
	}
	if v := p.tryInterPod(n); !v.ok() {
		return v
	}
	if p.devices != nil {
		if v := p.tryDevices(n); !v.ok() {
			return v
		}
	}
	return p.tryFeatures(n)
}

// tryAffinity asks for what the profile demands of every node, then for what
// the pod does. A selector that cannot be parsed matches no node, as upstream.
func (p *plan) tryAffinity(n *node) verdict {
	if p.class.anyNode && p.rules.addedRequired == nil || !p.asks(NodeAffinity) {
		return verdict{}
	}
	if p.rules.addedRequired != nil && !p.rules.addedRequired.Match(n.obj) {
		return refused(NodeAffinity, reasonAddedAffinity)
	}
	if !p.affinityMatches(n) {
		return refused(NodeAffinity, reasonNodeAffinity)
	}
	return verdict{}
}

func (p *plan) affinityMatches(n *node) bool {
	if p.class.anyNode {
		return true
	}
	match, err := p.class.affinity.Match(n.obj)
	return err == nil && match
}

// The taint that a cordoned node stands for, and the one that a lost node is
// about to get.
var (
	unschedulableTaint = v1.Taint{Key: v1.TaintNodeUnschedulable, Effect: v1.TaintEffectNoSchedule}
	unreachableTaint   = v1.Taint{Key: v1.TaintNodeUnreachable, Effect: v1.TaintEffectNoSchedule}
)

// toleratesNode adds to the node's own taints the one that a lost node is about
// to get. That holds also where a profile does not ask for taints.
func (p *plan) toleratesNode(n *node) bool {
	if n.lost && !tolerates(p.pod.Spec.Tolerations, &unreachableTaint) {
		return false
	}
	return !p.asks(TaintToleration) || p.toleratesTaintsOf(n)
}

func (p *plan) toleratesTaintsOf(n *node) bool {
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
	}
	return true
}

// fits compares the request with what is left. Evicting pods can help only if
// the node, empty, were large enough.
func (p *plan) fits(n *node) verdict {
	r := &p.info.request
	tooMany := int64(len(n.pods))+1 > n.allocPods
	if !tooMany && r.MilliCPU <= max(n.alloc.MilliCPU-n.used.MilliCPU, 0) && r.Memory <= max(n.alloc.Memory-n.used.Memory, 0) &&
		r.EphemeralStorage <= max(n.alloc.EphemeralStorage-n.used.EphemeralStorage, 0) && len(p.class.scalars) == 0 || !p.asks(NodeResourcesFit) {
		return verdict{}
	}
	v := verdict{by: NodeResourcesFit, evictOK: true}
	short := func(reason string) {
		if v.reason == "" {
			v.reason = reason
		} else {
			v.more = append(v.more, reason)
		}
	}
	if tooMany {
		short(reasonTooManyPods)
	}
	check := func(want, used, alloc int64, reason string) {
		if want > 0 && want > alloc-used {
			short(reason)
			v.evictOK = v.evictOK && want <= alloc
		}
	}
	check(r.MilliCPU, n.used.MilliCPU, n.alloc.MilliCPU, reasonCPU)
	check(r.Memory, n.used.Memory, n.alloc.Memory, reasonMemory)
	check(r.EphemeralStorage, n.used.EphemeralStorage, n.alloc.EphemeralStorage, reasonStorage)
	for _, s := range p.class.scalars {
		if p.leftToDevices(n, s.name) {
			continue
		}
		check(s.want, n.used.Scalars[s.name], n.alloc.Scalars[s.name], s.reason)
	}
	return v
}
