package raftlog

import (
	"fmt"

	"github.com/lni/dragonboat/v4/raftpb"
)

const (
	// tailBytes of a group's newest entries stay in memory: the engine asks for the
	// term of the entry before the ones that it sends, and for what a follower that
	// is a little behind has not got.
	tailBytes = 128 << 10
	// slack of the index: removed places are given back when there are so many.
	slack = 1024
)

// place of an entry on disk.
type place struct {
	seg *segment
	span
}

// node is what is known of one replica's log.
type node struct {
	bootstrap *raftpb.Bootstrap
	state     raftpb.State
	hasState  bool
	snapshot  raftpb.Snapshot
	removed   uint64 // entries up to here are not needed; at most the last's index

	// places of the entries from index first on. While a log is read they may have
	// holes (seg is nil), afterwards they have not.
	first  uint64
	places []place
	bytes  int64 // of the entries at places

	// tail are the newest entries.
	tail      []raftpb.Entry
	tailBytes int
}

func newNode() *node { return &node{first: 1} }

func (n *node) last() uint64 { return n.first + uint64(len(n.places)) - 1 }

// truncate drops the entries from index on.
func (n *node) truncate(index uint64) {
	if len(n.places) > 0 && index <= n.last() {
		keep := 0
		if index > n.first {
			keep = int(index - n.first)
		}
		for _, p := range n.places[keep:] {
			n.bytes -= int64(p.len)
		}
		clear(n.places[keep:])
		n.places = n.places[:keep]
	}
	keep := len(n.tail)
	for keep > 0 && n.tail[keep-1].Index >= index {
		keep--
		n.tailBytes -= len(n.tail[keep].Cmd)
	}
	clear(n.tail[keep:])
	n.tail = n.tail[:keep]
}

// put appends places from index on, in place of all that was there.
func (n *node) put(index uint64, at []place) {
	n.truncate(index)
	if len(n.places) == 0 {
		n.first = index
	}
	for uint64(len(n.places)) < index-n.first { // a hole, filled by a later item
		n.places = append(n.places, place{})
	}
	n.places = append(n.places, at...)
	for _, p := range at {
		n.bytes += int64(p.len)
	}
}

// move changes the places of entries. While a log is read, those between may be
// missing: they are found where they were moved to later.
func (n *node) move(index uint64, at []place) {
	if len(n.places) == 0 {
		n.first = index
	}
	if index < n.first {
		more := make([]place, n.first-index, n.first-index+uint64(len(n.places)))
		n.places, n.first = append(more, n.places...), index
	}
	from := int(index - n.first)
	for len(n.places) < from+len(at) {
		n.places = append(n.places, place{})
	}
	for i, p := range at {
		n.bytes += int64(p.len) - int64(n.places[from+i].len)
		n.places[from+i] = p
	}
}

// remove forgets the entries up to an index.
func (n *node) remove(index uint64) {
	n.removed = max(n.removed, min(index, max(n.last(), n.snapshot.Index)))
	if len(n.places) == 0 || index < n.first {
		return
	}
	gone := min(index-n.first+1, uint64(len(n.places)))
	for _, p := range n.places[:gone] {
		n.bytes -= int64(p.len)
	}
	clear(n.places[:gone])
	n.places, n.first = n.places[gone:], n.first+gone
	if cap(n.places) > 2*len(n.places)+slack {
		n.places = append(make([]place, 0, len(n.places)+slack/2), n.places...)
	}
	keep := 0
	for keep < len(n.tail) && n.tail[keep].Index <= index {
		n.tailBytes -= len(n.tail[keep].Cmd)
		keep++
	}
	clear(n.tail[:keep])
	n.tail = n.tail[keep:]
}

// install drops all entries: a snapshot has taken their place.
func (n *node) install(s raftpb.Snapshot) {
	n.truncate(0)
	n.snapshot = s
	n.first, n.places = s.Index+1, nil
}

// remember keeps the newest entries in memory.
func (n *node) remember(ents []raftpb.Entry) {
	n.tail = append(n.tail, ents...)
	for i := range ents {
		n.tailBytes += len(ents[i].Cmd)
	}
	if n.tailBytes <= 2*tailBytes && len(n.tail) <= 2*slack {
		return
	}
	drop := 0
	for ; drop < len(n.tail)-1 && (n.tailBytes > tailBytes || len(n.tail)-drop > slack); drop++ {
		n.tailBytes -= len(n.tail[drop].Cmd)
	}
	kept := copy(n.tail, n.tail[drop:])
	clear(n.tail[kept:])
	n.tail = n.tail[:kept]
}

// cached returns an entry of the tail.
func (n *node) cached(index uint64) (raftpb.Entry, bool) {
	if len(n.tail) == 0 || index < n.tail[0].Index || index > n.tail[len(n.tail)-1].Index {
		return raftpb.Entry{}, false
	}
	return n.tail[index-n.tail[0].Index], true
}

// check reports holes, once a log has been read.
func (n *node) check() error {
	n.remove(n.removed)
	if before := max(n.removed, n.snapshot.Index); len(n.places) > 0 && n.first > before+1 {
		return fmt.Errorf("%w: entries %d to %d are missing", ErrCorrupt, before+1, n.first-1)
	}
	for i, p := range n.places {
		if p.seg == nil {
			return fmt.Errorf("%w: entry %d is missing", ErrCorrupt, n.first+uint64(i))
		}
	}
	// Raft panics on a commit index that the log does not reach, or that is behind
	// the snapshot. The latter happens: a commit index is not synced by itself.
	n.state.Commit = max(n.state.Commit, n.snapshot.Index)
	if n.state.Commit > max(n.snapshot.Index, n.last()) {
		return fmt.Errorf("%w: entries up to %d are committed, the last is %d", ErrCorrupt, n.state.Commit, n.last())
	}
	return nil
}
