package placement

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// maxCounters bounds the selectors whose pods are counted continuously. The
// pods of one workload share a selector, so this is the number of workloads
// that can be placed in turns without counting anew.
const maxCounters = 512

// counter holds, for one selector in one namespace, how many of the pods that
// it matches are on each node. Pods that are being deleted do not count
// (kubernetes issue 87621: else a rolling update spreads badly).
type counter struct {
	namespace string
	selector  labels.Selector
	perSlot   []int32
	used      uint64 // tick of the last use
}

func (c *counter) at(slot int) int64 {
	if slot < len(c.perSlot) {
		return int64(c.perSlot[slot])
	}
	return 0
}

// counterCache keeps the counters in use up to date, so that spreading costs
// one look per node instead of one per pod.
type counterCache struct {
	byKey       map[string]*counter
	byNamespace map[string]map[*counter]string // -> key
	tick        uint64
}

func newCounterCache() counterCache {
	return counterCache{byKey: map[string]*counter{}, byNamespace: map[string]map[*counter]string{}}
}

// pod adds delta to the counters that the pod, on the node with that slot,
// belongs to.
func (cc *counterCache) pod(pod *v1.Pod, slot int, delta int32) {
	if pod.DeletionTimestamp != nil {
		return
	}
	for c := range cc.byNamespace[pod.Namespace] {
		if c.selector.Matches(labels.Set(pod.Labels)) {
			c.add(slot, delta)
		}
	}
}

func (c *counter) add(slot int, delta int32) {
	for slot >= len(c.perSlot) {
		c.perSlot = append(c.perSlot, make([]int32, slot+1-len(c.perSlot))...)
	}
	c.perSlot[slot] += delta
}

// counter returns the counts of a selector, made by one pass over all pods at
// first use. An empty selector counts nothing, as upstream.
func (s *Snapshot) counter(namespace string, selector labels.Selector) *counter {
	if selector.Empty() {
		return &counter{}
	}
	cc := &s.counts
	cc.tick++
	key := namespace + "\x00" + selector.String()
	if c := cc.byKey[key]; c != nil {
		c.used = cc.tick
		return c
	}
	if len(cc.byKey) >= maxCounters {
		cc.evict()
	}
	c := &counter{namespace: namespace, selector: selector, used: cc.tick, perSlot: make([]int32, s.slots.next)}
	for _, info := range s.pods {
		if info.pod.Namespace == namespace && info.pod.DeletionTimestamp == nil && selector.Matches(labels.Set(info.pod.Labels)) {
			c.add(info.node.slot, 1)
		}
	}
	cc.byKey[key] = c
	if cc.byNamespace[namespace] == nil {
		cc.byNamespace[namespace] = map[*counter]string{}
	}
	cc.byNamespace[namespace][c] = key
	return c
}

// evict drops the counter that has been idle longest.
func (cc *counterCache) evict() {
	var oldestKey string
	var oldest *counter
	for key, c := range cc.byKey {
		if oldest == nil || c.used < oldest.used {
			oldestKey, oldest = key, c
		}
	}
	delete(cc.byKey, oldestKey)
	delete(cc.byNamespace[oldest.namespace], oldest)
	if len(cc.byNamespace[oldest.namespace]) == 0 {
		delete(cc.byNamespace, oldest.namespace)
	}
}
