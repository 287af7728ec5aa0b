package placement

// maxTopologies bounds the node labels whose values are numbered.
const maxTopologies = 32

// topology numbers the values of one node label, the domains, so that sums
// over domains are arrays and a node's domain is one look.
type topology struct {
	key    string
	ids    map[string]int32
	bySlot []int32 // of each node; noDomain if it lacks the label or is not one to choose from
	used   uint64
}

const noDomain = -1

// of returns the domain of the node with that slot.
func (t *topology) of(slot int) int32 {
	if slot < len(t.bySlot) {
		return t.bySlot[slot]
	}
	return noDomain
}

func (t *topology) set(slot int, n *node) {
	for slot >= len(t.bySlot) {
		t.bySlot = append(t.bySlot, noDomain)
	}
	t.bySlot[slot] = noDomain
	if n.obj == nil {
		return
	}
	value, ok := n.obj.Labels[t.key]
	if !ok {
		return
	}
	id, known := t.ids[value]
	if !known {
		id = int32(len(t.ids))
		t.ids[value] = id
	}
	t.bySlot[slot] = id
}

// topologies keeps the numbering of the labels in use.
type topologies struct {
	byKey map[string]*topology
	tick  uint64
}

// node takes note of a new version of a node, or of its end (obj is nil).
func (ts *topologies) node(n *node, nodes int) {
	for key, t := range ts.byKey {
		t.set(n.slot, n)
		if len(t.ids) > 2*nodes+64 {
			delete(ts.byKey, key) // most values are gone: it is numbered anew at its next use
		}
	}
}

// topology returns the domains of a node label.
func (s *Snapshot) topology(key string) *topology {
	ts := &s.topologies
	ts.tick++
	t := ts.byKey[key]
	if t == nil {
		if len(ts.byKey) >= maxTopologies {
			ts.evict()
		}
		t = &topology{key: key, ids: map[string]int32{}}
		for _, n := range s.order {
			t.set(n.slot, n)
		}
		ts.byKey[key] = t
	}
	t.used = ts.tick
	return t
}

func (ts *topologies) evict() {
	var oldest *topology
	for _, t := range ts.byKey {
		if oldest == nil || t.used < oldest.used {
			oldest = t
		}
	}
	delete(ts.byKey, oldest.key)
}

// buffers hands out arrays that are given back all at once, so that a decision
// makes no garbage of the size of the cluster.
type buffers struct {
	all  [][]int64
	next int
}

// zeroed returns n zeroes.
func (b *buffers) zeroed(n int) []int64 {
	if b.next == len(b.all) {
		b.all = append(b.all, nil)
	}
	if cap(b.all[b.next]) < n {
		b.all[b.next] = make([]int64, n, n+n/4)
	}
	out := b.all[b.next][:n]
	b.next++
	clear(out)
	return out
}

// mark and release bracket the use of arrays: release gives back what was
// handed out since the mark.
func (b *buffers) mark() int        { return b.next }
func (b *buffers) release(mark int) { b.next = mark }

// sumDomains adds weight times what is counted on each node to its domain, and
// returns how much that is together.
func sumDomains(perSlot []int32, t *topology, weight int64, domains []int64) (all int64) {
	n := min(len(perSlot), len(t.bySlot))
	for slot, pods := range perSlot[:n] {
		if pods == 0 {
			continue
		}
		if d := t.bySlot[slot]; d != noDomain {
			domains[d] += weight * int64(pods)
			all += weight * int64(pods)
		}
	}
	return all
}
