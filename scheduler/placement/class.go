package placement

import (
	"cmp"
	"slices"

	v1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// maxClasses bounds the classes of pods that are remembered. A class holds 24
// bytes for each node.
const maxClasses = 32

// class is what pods of one profile with the same specification (as far as the
// rules that look at one node alone read it) have in common: what was derived
// from the specification, and what every node said to it when it was last asked. A node
// is asked again only after it has changed, so that the next pod of a workload
// costs one look at each node.
type class struct {
	key       classKey
	info      podInfo // without the pod
	invalid   error   // of the pod's affinity terms
	affinity  nodeaffinity.RequiredNodeAffinity
	anyNode   bool // the affinity and the node selector are empty
	preferred *nodeaffinity.PreferredSchedulingTerms
	unparsed  error           // of the preferred terms
	onlyNodes map[string]bool // nil: any; from affinity to metadata.name
	scalars   []scalarWant
	features  featureSet // that the node must have declared
	fit       fitScorer
	balance   balancer

	answers   []answer  // by slot
	refusals  []verdict // what answer.refusal is an index of, less one
	imagesGen uint64
	used      uint64

	weighsScalars bool // see there
	devicesGen    uint64
}

type classKey struct {
	rules *Profile
	spec  string // see classCache.specOf
}

// answer is what one node alone said: all rules but those that look at where
// other pods are in the cluster.
type answer struct {
	version   uint64 // of the node
	total     int64  // weighted scores of the rules that are not relative to other nodes
	preferred int32  // matched weights of preferred node affinity
	taints    int16  // soft ones that the pod does not tolerate
	refusal   uint8  // 0: none
	affine    bool   // it matches the pod's required node affinity
	tolerated bool   // the pod tolerates its own taints
}

// maxRefusals is how many different ones a class tells apart; nodes that refuse
// with others are asked each time.
const maxRefusals = 200

type classCache struct {
	byKey map[classKey]*class
	tick  uint64
	buf   []byte
}

func newClassCache() classCache { return classCache{byKey: map[classKey]*class{}} }

// classOf returns the class of a pod that wants a node.
func (s *Snapshot) classOf(pod *v1.Pod, rules *Profile) *class {
	cc := &s.classes
	spec := cc.specOf(pod)
	cc.tick++
	c := cc.byKey[classKey{rules, string(spec)}]
	if c == nil {
		c = newClass(pod, rules)
		c.key = classKey{rules, string(spec)}
		if c.onlyNodes != nil {
			return c // pods of a DaemonSet have a class each, and few nodes to ask
		}
		if len(cc.byKey) >= maxClasses {
			cc.evict()
		}
		cc.byKey[c.key] = c
	}
	c.used = cc.tick
	if c.imagesGen != s.imagesGen {
		c.imagesGen = s.imagesGen
		clear(c.answers)
	}
	if c.weighsScalars && c.devicesGen != s.devices.gen {
		c.devicesGen = s.devices.gen
		clear(c.answers)
	}
	if n := len(s.versions); len(c.answers) < n {
		c.answers = append(c.answers, make([]answer, n-len(c.answers))...)
	}
	return c
}

// specOf encodes the namespace and the specification, without what is read for
// each pod anew (spreading, volumes that are no images) and what no rule reads
// and differs between pods of one workload. It is valid until the next call.
func (cc *classCache) specOf(pod *v1.Pod) []byte {
	spec := pod.Spec
	spec.TopologySpreadConstraints, spec.Hostname, spec.Subdomain, spec.Volumes = nil, "", "", nil
	for i := range pod.Spec.Volumes {
		if pod.Spec.Volumes[i].Image != nil {
			spec.Volumes = append(spec.Volumes, pod.Spec.Volumes[i])
		}
	}
	head, size := len(pod.Namespace)+1, spec.Size()
	if cap(cc.buf) < head+size {
		cc.buf = make([]byte, 2*(head+size))
	}
	buf := cc.buf[:head+size]
	copy(buf, pod.Namespace)
	buf[head-1] = 0
	if _, err := spec.MarshalToSizedBuffer(buf[head:]); err != nil {
		panic("placement: a pod's specification does not encode: " + err.Error())
	}
	return buf
}

func (cc *classCache) evict() {
	var oldest *class
	for _, c := range cc.byKey {
		if oldest == nil || c.used < oldest.used {
			oldest = c
		}
	}
	delete(cc.byKey, oldest.key)
}

func newClass(pod *v1.Pod, rules *Profile) *class {
	info, err := newPodInfo(pod, false)
	c := &class{info: *info, invalid: err, affinity: nodeaffinity.GetRequiredNodeAffinity(pod), anyNode: noNodeAffinity(pod)}
	c.info.pod, c.info.scoreOther = presence{}, info.scoreOther
	for name, n := range c.info.request.Scalars {
		if !rules.ignores(name) {
			c.scalars = append(c.scalars, scalarWant{name: name, want: n, reason: insufficient + string(name)})
		}
	}
	slices.SortFunc(c.scalars, func(a, b scalarWant) int { return cmp.Compare(a.name, b.name) })
	if !rules.Off[NodeAffinity] {
		c.onlyNodes = nodesByName(pod)
	}
	if !rules.Off[NodeDeclaredFeatures] {
		c.features = featuresOf(pod)
	}
	if a := pod.Spec.Affinity; a != nil && a.NodeAffinity != nil && len(a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution) > 0 {
		c.preferred, c.unparsed = nodeaffinity.NewPreferredSchedulingTerms(a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution)
	}
	c.fit, c.balance, c.weighsScalars = newFitScorer(rules, &c.info), newBalancer(rules), weighsScalars(rules, &c.info)
	return c
}

// answer returns what a node alone says to the pod, from memory if it has not
// changed since.
func (p *plan) answer(n *node) answer {
	if p.class.onlyNodes != nil {
		a, _ := p.ask(n)
		return a
	}
	known := &p.class.answers[n.slot]
	if known.version != p.s.versions[n.slot] {
		a, v := p.ask(n)
		if !v.ok() {
			a.refusal = p.class.remember(v)
		}
		a.version = p.s.versions[n.slot]
		*known = a
	}
	return *known
}

// unknownRefusal is one that a class does not remember.
const unknownRefusal = 255

func (c *class) remember(v verdict) uint8 {
	for i := range c.refusals {
		if r := &c.refusals[i]; r.by == v.by && r.reason == v.reason && r.evictOK == v.evictOK && slices.Equal(r.more, v.more) {
			return uint8(i + 1)
		}
	}
	if len(c.refusals) == maxRefusals {
		return unknownRefusal
	}
	c.refusals = append(c.refusals, v)
	return uint8(len(c.refusals))
}

// verdict is why the node refused with that answer.
func (p *plan) verdict(n *node, a answer) verdict {
	if a.refusal == unknownRefusal {
		return p.tryAlone(n)
	}
	return p.class.refusals[a.refusal-1]
}

// ask makes a node answer.
func (p *plan) ask(n *node) (answer, verdict) {
	v := p.tryAlone(n)
	if p.class.onlyNodes != nil && !v.ok() {
		return answer{refusal: unknownRefusal}, v
	}
	a := answer{tolerated: p.toleratesTaintsOf(n), affine: p.affinityMatches(n)}
	if !v.ok() {
		a.refusal = unknownRefusal
		return a, v
	}
	a.taints, a.preferred = p.softTaints(n), p.preferredWeight(n)
	fit, balanced, images := p.absoluteScores(n)
	a.total = fit + balanced + images
	return a, v
}
