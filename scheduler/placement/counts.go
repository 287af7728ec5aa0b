package placement

import (
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
)

// maxCounters bounds the selectors whose pods are counted continuously. The
// pods of one workload share a selector, so this is the number of workloads
// that can be placed in turns without counting anew.
const maxCounters = 512

// counter holds how many of the pods that it is for are on each node: those
// that a selector matches in one namespace, pods that are being deleted left
// out (kubernetes issue 87621: else a rolling update spreads badly), or those
// that all of some affinity terms speak of.
type counter struct {
	key       string
	namespace string
	selector  labels.Selector
	terms     []affinityTerm // if set, instead of namespace and selector
	perSlot   []int32
	used      uint64 // tick of the last use
}

func (c *counter) at(slot int) int64 {
	if slot < len(c.perSlot) {
		return int64(c.perSlot[slot])
	}
	return 0
}

// counts reports whether the counter is for the pod.
func (c *counter) counts(pod *presence, namespaces map[string]labels.Set) bool {
	if c.terms != nil {
		return matchesAll(c.terms, pod.who, namespaces[pod.namespace])
	}
	return !pod.ending && pod.namespace == c.namespace && c.selector.Matches(pod.labels)
}

func addTo(perSlot []int32, slot int, delta int32) []int32 {
	for slot >= len(perSlot) {
		perSlot = append(perSlot, make([]int32, slot+1-len(perSlot))...)
	}
	perSlot[slot] += delta
	return perSlot
}

// anchor is something that every pod of interest must have: its namespace
// ("": any) and, if key is not empty, a label.
type anchor struct{ namespace, key, value string }

// anchors finds what is for a pod without asking everything.
type anchors[T comparable] map[anchor]map[T]bool

func anchorsOf(namespaces []string, selector labels.Selector) []anchor {
	var key, value string
	if requirements, selectable := selector.Requirements(); selectable {
		for i := range requirements {
			r := &requirements[i]
			if op := r.Operator(); r.ValuesUnsorted() != nil && len(r.ValuesUnsorted()) == 1 &&
				(op == selection.Equals || op == selection.DoubleEquals || op == selection.In) {
				key, value = r.Key(), r.ValuesUnsorted()[0]
				break
			}
		}
	}
	out := make([]anchor, 0, len(namespaces))
	for _, namespace := range namespaces {
		out = append(out, anchor{namespace, key, value})
	}
	return out
}

// anchors of an affinity term: pods of any namespace if it selects namespaces.
func (t *affinityTerm) anchors() []anchor {
	if t.selectsNamespaces() {
		return anchorsOf([]string{""}, t.selector)
	}
	return anchorsOf(t.namespaces, t.selector)
}

func (c *counter) anchors() []anchor {
	if c.terms != nil {
		return c.terms[0].anchors() // a pod must match all of them
	}
	return anchorsOf([]string{c.namespace}, c.selector)
}

func (a anchors[T]) add(at []anchor, item T) {
	for _, k := range at {
		if a[k] == nil {
			a[k] = map[T]bool{}
		}
		a[k][item] = true
	}
}

func (a anchors[T]) remove(at []anchor, item T) {
	for _, k := range at {
		delete(a[k], item)
		if len(a[k]) == 0 {
			delete(a, k)
		}
	}
}

// each calls do for all that may be for the pod, in no order.
func (a anchors[T]) each(pod who, do func(T)) {
	if len(a) == 0 {
		return
	}
	visit := func(k anchor) {
		for item := range a[k] {
			do(item)
		}
	}
	for _, namespace := range [2]string{pod.namespace, ""} {
		visit(anchor{namespace: namespace})
		for key, value := range pod.labels {
			visit(anchor{namespace, key, value})
		}
	}
}

// counterCache keeps the counters in use up to date, so that spreading and
// affinity cost one look per node instead of one per pod.
type counterCache struct {
	byKey   map[string]*counter
	anchors anchors[*counter]
	tick    uint64
}

func newCounterCache() counterCache {
	return counterCache{byKey: map[string]*counter{}, anchors: anchors[*counter]{}}
}

// countPod adds delta to the counters that the pod, on the node with that
// slot, belongs to.
func (s *Snapshot) countPod(pod *presence, slot int, delta int32) {
	s.counts.anchors.each(pod.who, func(c *counter) {
		if c.counts(pod, s.namespaces) {
			c.perSlot = addTo(c.perSlot, slot, delta)
		}
	})
}

// counter returns the counts of a selector, made by one pass over all pods at
// first use. An empty selector counts nothing, as upstream.
func (s *Snapshot) counter(namespace string, selector labels.Selector) *counter {
	if selector.Empty() {
		return &counter{}
	}
	key := namespace + "\x00" + selector.String()
	if c := s.counts.find(key); c != nil {
		return c
	}
	return s.count(&counter{key: key, namespace: namespace, selector: selector})
}

// termCounter returns the counts of the pods that all terms, at least one,
// speak of.
func (s *Snapshot) termCounter(terms []affinityTerm) *counter {
	key := terms[0].key
	for i := range terms[1:] {
		key += "\x02" + terms[i+1].key
	}
	if c := s.counts.find(key); c != nil {
		return c
	}
	return s.count(&counter{key: key, terms: terms})
}

func (cc *counterCache) find(key string) *counter {
	cc.tick++
	c := cc.byKey[key]
	if c != nil {
		c.used = cc.tick
	}
	return c
}

func (s *Snapshot) count(c *counter) *counter {
	cc := &s.counts
	if len(cc.byKey) >= maxCounters {
		cc.evict()
	}
	c.used, c.perSlot = cc.tick, make([]int32, s.slots.next)
	for _, info := range s.pods {
		if c.counts(&info.pod, s.namespaces) {
			c.perSlot = addTo(c.perSlot, info.node.slot, 1)
		}
	}
	cc.byKey[c.key] = c
	cc.anchors.add(c.anchors(), c)
	return c
}

// evict drops the counter that has been idle longest.
func (cc *counterCache) evict() {
	var oldest *counter
	for _, c := range cc.byKey {
		if oldest == nil || c.used < oldest.used {
			oldest = c
		}
	}
	cc.drop(oldest)
}

func (cc *counterCache) drop(c *counter) {
	delete(cc.byKey, c.key)
	cc.anchors.remove(c.anchors(), c)
}

// namespaceChanged drops the counts that a namespace's labels decide.
func (cc *counterCache) namespaceChanged() {
	for _, c := range cc.byKey {
		for i := range c.terms {
			if c.terms[i].selectsNamespaces() {
				cc.drop(c)
				break
			}
		}
	}
}

// termKind says what an affinity term asks for.
type termKind int

const (
	needs termKind = iota
	repels
	likes
	dislikes
)

// termGroup is one affinity term that pods have, with how many of those pods
// are on each node: the pods of one workload have the same terms, so there are
// few.
type termGroup struct {
	key     string
	kind    termKind
	term    affinityTerm
	perSlot []int32
	pods    int
}

// groups are the terms of all pods that are there.
type groups struct {
	byKey   map[string]*termGroup
	anchors anchors[*termGroup]
}

func newGroups() groups {
	return groups{byKey: map[string]*termGroup{}, anchors: anchors[*termGroup]{}}
}

// join counts a pod's terms, sign 1, or ends that, sign -1.
func (g *groups) join(info *podInfo, slot int, sign int32) {
	info.terms.each(func(kind termKind, t *affinityTerm) {
		key := strconv.Itoa(int(kind)) + t.key + "\x00" + strconv.FormatInt(t.weight, 10)
		group := g.byKey[key]
		if group == nil {
			group = &termGroup{key: key, kind: kind, term: *t}
			g.byKey[key] = group
			g.anchors.add(t.anchors(), group)
		}
		group.perSlot = addTo(group.perSlot, slot, sign)
		if group.pods += int(sign); group.pods == 0 {
			delete(g.byKey, key)
			g.anchors.remove(t.anchors(), group)
		}
	})
}

// each calls do for the terms of pods that speak of this one, in no order.
func (g *groups) each(pod who, namespace labels.Set, do func(*termGroup)) {
	g.anchors.each(pod, func(group *termGroup) {
		if group.term.matches(pod, namespace) {
			do(group)
		}
	})
}

// termKey is the same for terms that speak of the same pods in the same
// topology.
func termKey(t *affinityTerm) string {
	return strings.Join(t.namespaces, ",") + "\x01" + t.namespaceSelector.String() + "\x01" + strconv.FormatBool(t.selectsNamespaces()) +
		"\x01" + t.selector.String() + "\x01" + strconv.FormatBool(matchesNothing(t.selector)) + "\x01" + t.topologyKey
}

// matchesNothing tells labels.Nothing from labels.Everything, which have the
// same text.
func matchesNothing(s labels.Selector) bool {
	_, selectable := s.Requirements()
	return !selectable
}
