package raftlog

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"

	"github.com/lni/dragonboat/v4/raftio"
	"github.com/lni/dragonboat/v4/raftpb"
)

// saved is what a record holds of one update, for the index.
type saved struct {
	node      raftio.NodeInfo
	update    *raftpb.Update
	state     bool
	installed bool
	lo, hi    int // of the spans
}

// SaveRaftState implements raftio.ILogDB.
func (d *DB) SaveRaftState(updates []raftpb.Update, _ uint64) error {
	d.write.Lock()
	defer d.write.Unlock()
	if d.broken != nil {
		return d.broken
	}
	d.w.reset()
	d.saved, d.spans = d.saved[:0], d.spans[:0]
	for i := range updates {
		d.build(&updates[i])
	}
	if d.w.empty() {
		return nil
	}
	at, off, err := d.commit()
	if err != nil {
		return err
	}
	d.mu.Lock()
	for i := range d.saved {
		d.index(&d.saved[i], at, off)
	}
	d.mu.Unlock()
	clear(d.saved)
	d.tidy()
	return nil
}

// tidy frees segments; what fails now is tried again with the next segment.
func (d *DB) tidy() {
	if !d.rotated {
		return
	}
	if err := d.collect(); err != nil {
		d.log.Warn("cannot free segments of the log", "error", err)
	}
}

// build appends to the record what has to be durable of an update.
func (d *DB) build(u *raftpb.Update) {
	n := raftio.GetNodeInfo(u.ShardID, u.ReplicaID)
	x := d.nodes[n]
	if x == nil {
		x = newNode()
		d.mu.Lock()
		d.nodes[n] = x
		d.mu.Unlock()
	}
	s := saved{node: n, update: u}
	if !raftpb.IsEmptyState(u.State) && u.State != x.state {
		if x.hasState && u.Term == x.state.Term && u.Vote == x.state.Vote {
			d.mu.Lock()
			x.state.Commit = u.Commit
			d.mu.Unlock()
			d.pending[n] = true
		} else {
			d.w.state(n, u.State)
			delete(d.pending, n) // it would undo this one
			s.state = true
		}
	}
	if u.Snapshot.Index > x.snapshot.Index {
		d.w.message(kindInstalled, n, &u.Snapshot)
		s.installed = true
	}
	if len(u.EntriesToSave) > 0 {
		s.lo = len(d.spans)
		d.spans = append(d.spans, d.w.entries(kindEntries, n, u.EntriesToSave)...)
		s.hi = len(d.spans)
	}
	if s.state || s.installed || s.hi > s.lo {
		d.saved = append(d.saved, s)
	}
}

// index notes what has been made durable. write and mu are held.
func (d *DB) index(s *saved, at *segment, off int64) {
	x := d.nodes[s.node]
	if s.state {
		x.state, x.hasState = s.update.State, true
	}
	if s.installed {
		x.install(s.update.Snapshot)
	}
	if s.hi > s.lo {
		ents := s.update.EntriesToSave
		d.places = d.places[:0]
		for _, p := range d.spans[s.lo:s.hi] {
			d.places = append(d.places, place{at, span{uint32(off) + p.off, p.len}})
		}
		x.put(ents[0].Index, d.places)
		x.remember(ents)
	}
}

// SaveSnapshots implements raftio.ILogDB.
func (d *DB) SaveSnapshots(updates []raftpb.Update) error {
	d.write.Lock()
	defer d.write.Unlock()
	if d.broken != nil {
		return d.broken
	}
	d.w.reset()
	newer := map[*node]raftpb.Snapshot{}
	for _, u := range updates {
		n := raftio.GetNodeInfo(u.ShardID, u.ReplicaID)
		x := d.nodes[n]
		if x == nil || u.Snapshot.Index <= max(x.snapshot.Index, newer[x].Index) {
			continue
		}
		d.w.message(kindSnapshot, n, &u.Snapshot)
		newer[x] = u.Snapshot
	}
	if d.w.empty() {
		return nil
	}
	if _, _, err := d.commit(); err != nil {
		return err
	}
	d.mu.Lock()
	for x, s := range newer {
		x.snapshot = s
	}
	d.mu.Unlock()
	d.tidy()
	return nil
}

// SaveBootstrapInfo implements raftio.ILogDB.
func (d *DB) SaveBootstrapInfo(shardID, replicaID uint64, b raftpb.Bootstrap) error {
	return d.change(raftio.GetNodeInfo(shardID, replicaID), func(n raftio.NodeInfo) {
		d.w.message(kindBootstrap, n, &b)
	}, func(x *node) *node {
		if x == nil {
			x = newNode()
		}
		x.bootstrap = &b
		return x
	})
}

// RemoveNodeData implements raftio.ILogDB.
func (d *DB) RemoveNodeData(shardID, replicaID uint64) error {
	return d.change(raftio.GetNodeInfo(shardID, replicaID), func(n raftio.NodeInfo) {
		d.w.head(kindForget, n)
	}, func(*node) *node { return nil })
}

// ImportSnapshot implements raftio.ILogDB: the replica begins with the snapshot, and
// what it had before is gone.
func (d *DB) ImportSnapshot(s raftpb.Snapshot, replicaID uint64) error {
	b := raftpb.Bootstrap{Join: true, Type: s.Type}
	state := raftpb.State{Term: s.Term, Commit: s.Index}
	return d.change(raftio.GetNodeInfo(s.ShardID, replicaID), func(n raftio.NodeInfo) {
		d.w.head(kindForget, n)
		d.w.message(kindBootstrap, n, &b)
		d.w.state(n, state)
		d.w.message(kindInstalled, n, &s)
	}, func(*node) *node {
		x := newNode()
		x.bootstrap, x.state, x.hasState = &b, state, true
		x.install(s)
		return x
	})
}

// change writes one record about a replica and then notes it.
func (d *DB) change(n raftio.NodeInfo, build func(raftio.NodeInfo), note func(*node) *node) error {
	d.write.Lock()
	defer d.write.Unlock()
	if d.broken != nil {
		return d.broken
	}
	d.w.reset()
	delete(d.pending, n)
	if x := d.nodes[n]; x != nil && x.hasState {
		d.w.state(n, x.state) // the commit index that was pending
	}
	build(n)
	if _, _, err := d.commit(); err != nil {
		return err
	}
	d.mu.Lock()
	if x := note(d.nodes[n]); x != nil {
		d.nodes[n] = x
	} else {
		delete(d.nodes, n)
	}
	d.mu.Unlock()
	d.tidy()
	return nil
}

// RemoveEntriesTo implements raftio.ILogDB. It is durable with the next segment's
// checkpoint: until then the entries are there after a restart, and harmless.
func (d *DB) RemoveEntriesTo(shardID, replicaID, index uint64) error {
	d.write.Lock()
	defer d.write.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if x := d.nodes[raftio.GetNodeInfo(shardID, replicaID)]; x != nil {
		x.remove(index)
	}
	return nil
}

// CompactEntriesTo implements raftio.ILogDB; segments are freed as the log goes on.
func (d *DB) CompactEntriesTo(uint64, uint64, uint64) (<-chan struct{}, error) {
	done := make(chan struct{})
	close(done)
	return done, nil
}

// ListNodeInfo implements raftio.ILogDB.
func (d *DB) ListNodeInfo() (out []raftio.NodeInfo, err error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	for n, x := range d.nodes {
		if x.bootstrap != nil {
			out = append(out, n)
		}
	}
	slices.SortFunc(out, compareNodes)
	return out, nil
}

// GetBootstrapInfo implements raftio.ILogDB.
func (d *DB) GetBootstrapInfo(shardID, replicaID uint64) (raftpb.Bootstrap, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	x := d.nodes[raftio.GetNodeInfo(shardID, replicaID)]
	if x == nil || x.bootstrap == nil {
		return raftpb.Bootstrap{}, raftio.ErrNoBootstrapInfo
	}
	return *x.bootstrap, nil
}

// GetSnapshot implements raftio.ILogDB; it is empty when there is none.
func (d *DB) GetSnapshot(shardID, replicaID uint64) (raftpb.Snapshot, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if x := d.nodes[raftio.GetNodeInfo(shardID, replicaID)]; x != nil {
		return x.snapshot, nil
	}
	return raftpb.Snapshot{}, nil
}

// ReadRaftState implements raftio.ILogDB.
func (d *DB) ReadRaftState(shardID, replicaID, snapshot uint64) (raftio.RaftState, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	x := d.nodes[raftio.GetNodeInfo(shardID, replicaID)]
	if x == nil || !x.hasState {
		return raftio.RaftState{}, raftio.ErrNoSavedLog
	}
	s := raftio.RaftState{State: x.state, FirstIndex: snapshot}
	if len(x.places) == 0 || x.last() <= snapshot {
		return s, nil
	}
	if x.first > snapshot+1 {
		return s, fmt.Errorf("%w: entries begin at %d, the snapshot is at %d", ErrCorrupt, x.first, snapshot)
	}
	s.FirstIndex, s.EntryCount = x.first, uint64(len(x.places))
	return s, nil
}

// IterateEntries implements raftio.ILogDB: it stops when the entries exceed maxSize,
// with the one that does.
func (d *DB) IterateEntries(ents []raftpb.Entry, size, shardID, replicaID, low, high, maxSize uint64) ([]raftpb.Entry, uint64, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	x := d.nodes[raftio.GetNodeInfo(shardID, replicaID)]
	if x == nil || len(x.places) == 0 || low < x.first {
		return ents, size, nil
	}
	high = min(high, x.last()+1)
	for i := low; i < high; {
		if e, ok := x.cached(i); ok {
			ents = append(ents, e)
			size += uint64(e.SizeUpperLimit())
			i++
		} else {
			from := int(i - x.first)
			to, bytes := from, uint64(0)
			for to < int(high-x.first) && x.places[to].seg == x.places[from].seg && (to == from || size+bytes <= maxSize) && bytes < moveBytes {
				bytes += uint64(x.places[to].len)
				to++
			}
			n := len(ents)
			var err error
			if ents, err = readEntries(ents, x.places[from:to]); err != nil {
				return nil, 0, err
			}
			for k := n; k < len(ents); k++ {
				if size > maxSize {
					ents = ents[:k]
					break
				}
				size += uint64(ents[k].SizeUpperLimit())
				i++
			}
		}
		if size > maxSize {
			break
		}
	}
	return ents, size, nil
}

// maxGap between two entries on disk that are still read at once.
const maxGap = 256

// readEntries reads entries of one segment, with as few reads as possible.
func readEntries(ents []raftpb.Entry, at []place) ([]raftpb.Entry, error) {
	for len(at) > 0 {
		n := 1
		for n < len(at) && at[n].off >= at[n-1].off+at[n-1].len && at[n].off-at[n-1].off-at[n-1].len <= maxGap {
			n++
		}
		s, from := at[0].seg, at[0].off-entryHead
		buf := make([]byte, at[n-1].off+at[n-1].len-from)
		if _, err := s.f.ReadAt(buf, int64(from)); err != nil {
			return nil, fmt.Errorf("read %s: %w", s.path, err)
		}
		for _, p := range at[:n] {
			head := buf[p.off-from-entryHead:]
			body := buf[p.off-from : p.off-from+p.len]
			if binary.LittleEndian.Uint32(head) != p.len || binary.LittleEndian.Uint32(head[4:]) != crc32.Checksum(body, castagnoli) {
				return nil, fmt.Errorf("%w: an entry in %s at offset %d", ErrCorrupt, s.path, p.off)
			}
			var e raftpb.Entry
			if err := message(&e, body); err != nil {
				return nil, fmt.Errorf("%w: an entry in %s at offset %d: %v", ErrCorrupt, s.path, p.off, err)
			}
			ents = append(ents, e)
		}
		at = at[n:]
	}
	return ents, nil
}
