package raftlog

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/lni/dragonboat/v4/raftio"
	"github.com/lni/dragonboat/v4/raftpb"
)

// model is what a log has to hold, as plainly as possible.
type model map[raftio.NodeInfo]*modelNode

type modelNode struct {
	bootstrap *raftpb.Bootstrap
	state     raftpb.State
	snapshot  raftpb.Snapshot
	removed   uint64
	ents      []raftpb.Entry // contiguous
}

func (m *modelNode) last() uint64 {
	if len(m.ents) == 0 {
		return max(m.snapshot.Index, m.removed)
	}
	return m.ents[len(m.ents)-1].Index
}

func (m *modelNode) cut(from uint64) {
	for len(m.ents) > 0 && m.ents[len(m.ents)-1].Index >= from {
		m.ents = m.ents[:len(m.ents)-1]
	}
}

func (m *modelNode) remove(to uint64) {
	m.removed = max(m.removed, to)
	for len(m.ents) > 0 && m.ents[0].Index <= to {
		m.ents = m.ents[1:]
	}
}

// world drives a log and its model with the same random changes.
type world struct {
	t     *testing.T
	rng   *rand.Rand
	dir   string
	cfg   Factory
	db    *DB
	model model
	nodes []raftio.NodeInfo
}

func newWorld(t *testing.T, seed uint64) *world {
	w := &world{
		t: t, rng: rand.New(rand.NewPCG(seed, 1)), dir: filepath.Join(t.TempDir(), "log"), cfg: Factory{SegmentBytes: 16 << 10}, model: model{},
		nodes: []raftio.NodeInfo{{ShardID: 1, ReplicaID: 1}, {ShardID: 2, ReplicaID: 1}, {ShardID: 3, ReplicaID: 7}},
	}
	w.open()
	return w
}

func (w *world) open() {
	w.t.Helper()
	db, err := Open(w.dir, w.cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.db = db
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) node(n raftio.NodeInfo) *modelNode {
	m := w.model[n]
	if m == nil {
		m = &modelNode{}
		w.model[n] = m
	}
	return m
}

func (w *world) entries(first, term uint64, n int) (out []raftpb.Entry) {
	for i := range n {
		cmd := make([]byte, w.rng.IntN(600))
		for j := range cmd {
			cmd[j] = byte(w.rng.Uint32())
		}
		out = append(out, raftpb.Entry{Index: first + uint64(i), Term: term, Type: raftpb.EncodedEntry, Key: w.rng.Uint64(), ClientID: 5, Cmd: cmd})
	}
	return out
}

// update changes one node's model and returns what the engine would save for it.
func (w *world) update(n raftio.NodeInfo) raftpb.Update {
	m := w.node(n)
	u := raftpb.Update{ShardID: n.ShardID, ReplicaID: n.ReplicaID}
	if m.state.Term == 0 || w.rng.IntN(8) == 0 {
		m.state.Term++
		m.state.Vote = w.rng.Uint64N(4)
	}
	if m.last() > 0 && w.rng.IntN(30) == 0 { // installed by a leader that is far ahead
		u.Snapshot = raftpb.Snapshot{Index: m.last() + 1 + w.rng.Uint64N(50), Term: m.state.Term, ShardID: n.ShardID, Dummy: true}
		m.snapshot, m.ents = u.Snapshot, nil
		m.state.Commit = u.Snapshot.Index
	}
	if w.rng.IntN(4) > 0 {
		first := m.last() + 1
		if m.state.Commit < m.last() && w.rng.IntN(4) == 0 { // a conflict
			first = m.state.Commit + 1 + w.rng.Uint64N(m.last()-m.state.Commit)
		}
		u.EntriesToSave = w.entries(first, m.state.Term, 1+w.rng.IntN(5))
		m.cut(first)
		m.ents = append(m.ents, u.EntriesToSave...)
	}
	if m.last() > m.state.Commit {
		m.state.Commit += w.rng.Uint64N(m.last() - m.state.Commit + 1)
	}
	u.State = m.state
	return u
}

// step makes one random change. Node 3 is quiet: its entries have to survive the
// segments that they are in.
func (w *world) step() {
	n := w.nodes[w.rng.IntN(2)]
	if w.rng.IntN(200) == 0 {
		n = w.nodes[2]
	}
	m := w.node(n)
	switch p := w.rng.IntN(100); {
	case p < 80:
		us := []raftpb.Update{w.update(n)}
		if other := w.nodes[w.rng.IntN(2)]; other != n {
			us = append(us, w.update(other))
		}
		w.must(w.db.SaveRaftState(us, 1))
	case p < 88:
		if m.state.Commit > m.snapshot.Index {
			s := raftpb.Snapshot{Index: m.state.Commit, Term: m.state.Term, ShardID: n.ShardID, Dummy: true}
			m.snapshot = s
			w.must(w.db.SaveSnapshots([]raftpb.Update{{ShardID: n.ShardID, ReplicaID: n.ReplicaID, Snapshot: s}}))
		}
	case p < 96:
		if m.snapshot.Index > m.removed && len(m.ents) > 0 && n != w.nodes[2] {
			to := m.removed + w.rng.Uint64N(m.snapshot.Index-m.removed+1)
			m.remove(to)
			w.must(w.db.RemoveEntriesTo(n.ShardID, n.ReplicaID, to))
		}
	case p < 97:
		b := raftpb.Bootstrap{Addresses: map[uint64]string{1: "a", 2: "b"}, Type: raftpb.OnDiskStateMachine}
		m.bootstrap = &b
		w.must(w.db.SaveBootstrapInfo(n.ShardID, n.ReplicaID, b))
	case p < 98:
		if n != w.nodes[2] && w.rng.IntN(4) == 0 {
			delete(w.model, n)
			w.must(w.db.RemoveNodeData(n.ShardID, n.ReplicaID))
		}
	case p < 99:
		if n != w.nodes[2] && w.rng.IntN(4) == 0 {
			s := raftpb.Snapshot{Index: 1 + w.rng.Uint64N(1000), Term: 3, ShardID: n.ShardID, Type: raftpb.OnDiskStateMachine}
			w.model[n] = &modelNode{bootstrap: &raftpb.Bootstrap{Join: true, Type: s.Type}, state: raftpb.State{Term: 3, Commit: s.Index}, snapshot: s}
			w.must(w.db.ImportSnapshot(s, n.ReplicaID))
		}
	default:
		w.reopen(w.rng.IntN(2) == 0)
	}
}

// reopen closes the log, or leaves it as the death of the process would.
func (w *world) reopen(clean bool) {
	w.t.Helper()
	if clean {
		w.must(w.db.Close())
	} else {
		w.db.spare.wg.Wait()
		dead := w.db
		defer func() { w.must(dead.closeFiles()) }()
	}
	w.open()
	w.check(clean)
}

func (w *world) check(exact bool) {
	w.t.Helper()
	var bootstraps int
	for n, m := range w.model {
		if m.bootstrap != nil {
			bootstraps++
			b, err := w.db.GetBootstrapInfo(n.ShardID, n.ReplicaID)
			if err != nil || fmt.Sprint(b) != fmt.Sprint(*m.bootstrap) {
				w.t.Fatalf("%v: bootstrap %v %v, want %v", n, b, err, *m.bootstrap)
			}
		}
		w.checkNode(n, m, exact)
	}
	list, err := w.db.ListNodeInfo()
	if err != nil || len(list) != bootstraps {
		w.t.Fatalf("nodes %v %v, want %d", list, err, bootstraps)
	}
}

func (w *world) checkNode(n raftio.NodeInfo, m *modelNode, exact bool) {
	w.t.Helper()
	ss, err := w.db.GetSnapshot(n.ShardID, n.ReplicaID)
	if err != nil || ss.Index != m.snapshot.Index || ss.Term != m.snapshot.Term {
		w.t.Fatalf("%v: snapshot %d %v, want %d", n, ss.Index, err, m.snapshot.Index)
	}
	rs, err := w.db.ReadRaftState(n.ShardID, n.ReplicaID, m.snapshot.Index)
	if m.state == (raftpb.State{}) {
		if !errors.Is(err, raftio.ErrNoSavedLog) {
			w.t.Fatalf("%v: state %v %v, want none", n, rs, err)
		}
		return
	}
	if err != nil || rs.State.Term != m.state.Term || rs.State.Vote != m.state.Vote {
		w.t.Fatalf("%v: state %v %v, want %v", n, rs, err, m.state)
	}
	if rs.State.Commit > m.state.Commit || rs.State.Commit < m.snapshot.Index || (exact && rs.State.Commit != m.state.Commit) {
		w.t.Fatalf("%v: commit index %d, want %d (snapshot at %d)", n, rs.State.Commit, m.state.Commit, m.snapshot.Index)
	}
	if !exact { // the lost commit index would be found again
		u := raftpb.Update{ShardID: n.ShardID, ReplicaID: n.ReplicaID, State: m.state}
		w.must(w.db.SaveRaftState([]raftpb.Update{u}, 1))
	}
	if len(m.ents) == 0 {
		return
	}
	last := m.ents[len(m.ents)-1].Index
	if last > m.snapshot.Index && rs.FirstIndex+rs.EntryCount-1 != last {
		w.t.Fatalf("%v: entries %d+%d, want the last to be %d", n, rs.FirstIndex, rs.EntryCount, last)
	}
	got, size, err := w.db.IterateEntries(nil, 0, n.ShardID, n.ReplicaID, m.ents[0].Index, last+1, 1<<40)
	if err != nil || len(got) != len(m.ents) {
		w.t.Fatalf("%v: %d entries, %v, want %d", n, len(got), err, len(m.ents))
	}
	var want uint64
	for i, e := range m.ents {
		want += uint64(e.SizeUpperLimit())
		if g := got[i]; g.Index != e.Index || g.Term != e.Term || g.Key != e.Key || g.Type != e.Type || !bytes.Equal(g.Cmd, e.Cmd) {
			w.t.Fatalf("%v: entry %d differs", n, e.Index)
		}
	}
	if size != want {
		w.t.Fatalf("%v: size %d, want %d", n, size, want)
	}
	i := w.rng.IntN(len(m.ents))
	one, _, err := w.db.IterateEntries(nil, 0, n.ShardID, n.ReplicaID, m.ents[i].Index, last+1, 0)
	if err != nil || len(one) != 1 || one[0].Index != m.ents[i].Index || one[0].Term != m.ents[i].Term {
		w.t.Fatalf("%v: entry %d alone: %v %v", n, m.ents[i].Index, one, err)
	}
	none, size, err := w.db.IterateEntries(nil, 0, n.ShardID, n.ReplicaID, last+1, last+5, 1<<40)
	if err != nil || len(none) != 0 || size != 0 {
		w.t.Fatalf("%v: entries beyond the last: %v %v", n, none, err)
	}
}

// TestModel compares the log with a plain one over random changes, restarts and
// deaths of the process, with segments so small that they come and go.
func TestModel(t *testing.T) {
	for range 6 {
		seed := uint64(time.Now().UnixNano())
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			w := newWorld(t, seed)
			for i := range 1500 {
				w.step()
				if i%50 == 0 {
					w.check(true)
				}
			}
			w.check(true)
			w.reopen(false)
			w.reopen(true)
			var live, total int64
			for _, x := range w.db.nodes {
				live += x.bytes
			}
			for _, s := range w.db.segments {
				total += s.size
			}
			if limit := 2*live + (spareSegments+2)*w.cfg.SegmentBytes; total > limit {
				t.Errorf("%d bytes on disk for %d bytes of entries, at most %d expected", total, live, limit)
			}
			if w.db.newest().number < 50 {
				t.Errorf("only %d segments were used: the test tests nothing", w.db.newest().number)
			}
			w.must(w.db.Close())
		})
	}
}

// copyDir is what a loss of power leaves: all that was durable.
func copyDir(t *testing.T, from, to string) {
	t.Helper()
	ents, err := os.ReadDir(from)
	if err == nil {
		err = os.MkdirAll(to, 0o700)
	}
	for _, e := range ents {
		var b []byte
		if b, err = os.ReadFile(filepath.Join(from, e.Name())); err == nil {
			err = os.WriteFile(filepath.Join(to, e.Name()), b, 0o600)
		}
		if err != nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
}

var one = raftio.NodeInfo{ShardID: 1, ReplicaID: 1}

// save writes one entry with the given index.
func save(db *DB, index uint64) error {
	return db.SaveRaftState([]raftpb.Update{{ShardID: 1, ReplicaID: 1, State: raftpb.State{Term: 2, Vote: 1, Commit: index - 1},
		EntriesToSave: []raftpb.Entry{{Index: index, Term: 2, Cmd: bytes.Repeat([]byte{byte(index)}, 100)}}}}, 1)
}

func lastIndex(t *testing.T, db *DB) uint64 {
	t.Helper()
	rs, err := db.ReadRaftState(1, 1, 0)
	if err != nil {
		t.Fatal(err)
	}
	return rs.FirstIndex + rs.EntryCount - 1
}

// TestTornWrite cuts the last record at every byte, and overwrites it from every
// byte on with what a recycled file may hold: everything before is there, and the
// log can be written again.
func TestTornWrite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	db, err := Open(dir, Factory{SegmentBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	for i := uint64(1); i <= 5; i++ {
		if err := save(db, i); err != nil {
			t.Fatal(err)
		}
	}
	from := db.end
	if err := save(db, 6); err != nil {
		t.Fatal(err)
	}
	to, name := db.end, filepath.Base(db.newest().path)
	db.spare.wg.Wait()
	whole, err := os.ReadFile(db.newest().path)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	for cut := from; cut <= to; cut++ {
		for _, filler := range []byte{0, 0xa5} {
			torn := bytes.Clone(whole)
			for i := cut; i < to; i++ {
				torn[i] = filler
			}
			d := t.TempDir()
			if err := os.WriteFile(filepath.Join(d, name), torn, 0o600); err != nil {
				t.Fatal(err)
			}
			db, err := Open(d, Factory{SegmentBytes: 64 << 10})
			if err != nil {
				t.Fatalf("torn at %d of %d: %v", cut-from, to-from, err)
			}
			want := uint64(5)
			if bytes.Equal(torn, whole) {
				want = 6
			}
			if last := lastIndex(t, db); last != want {
				t.Fatalf("torn at %d of %d: the last entry is %d, want %d", cut-from, to-from, last, want)
			}
			if err := errors.Join(save(db, want+1), db.Close()); err != nil {
				t.Fatal(err)
			}
			if db, err = Open(d, Factory{SegmentBytes: 64 << 10}); err != nil {
				t.Fatal(err)
			}
			if last := lastIndex(t, db); last != want+1 {
				t.Fatalf("torn at %d: the entry after is lost", cut-from)
			}
			if err := db.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestDamage flips bytes of what was durable: it is never passed over.
func TestDamage(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	db, err := Open(dir, Factory{SegmentBytes: 4 << 10})
	if err != nil {
		t.Fatal(err)
	}
	for i := uint64(1); i <= 40; i++ {
		if err := save(db, i); err != nil {
			t.Fatal(err)
		}
	}
	db.spare.wg.Wait()
	newest, begin := db.newest().number, int64(headerSize)
	type region struct {
		seg      *segment
		from, to int64
	}
	var regions []region
	for _, s := range db.segments {
		if s.number != newest {
			regions = append(regions, region{s, 0, 200})
			continue
		}
		r, err := s.record(begin, nil) // the checkpoint; a record follows
		if err != nil || begin+int64(len(r)) >= db.end {
			t.Fatalf("the newest segment is too empty for this test: %v", err)
		}
		regions = append(regions, region{s, 0, begin + int64(len(r))})
	}
	if len(regions) < 2 {
		t.Fatal("only one segment")
	}
	for _, r := range regions {
		for at := r.from; at < r.to; at += 7 {
			d := filepath.Join(t.TempDir(), "copy")
			copyDir(t, dir, d)
			path := filepath.Join(d, filepath.Base(r.seg.path))
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			b[at] ^= 0x40
			if err := os.WriteFile(path, b, 0o600); err != nil {
				t.Fatal(err)
			}
			bad, err := Open(d, Factory{SegmentBytes: 4 << 10})
			if err == nil {
				t.Fatalf("segment %d with a flipped bit at %d was accepted; %v", r.seg.number, at, bad.Close())
			}
		}
	}
	gone := filepath.Join(t.TempDir(), "copy")
	copyDir(t, dir, gone)
	middle := regions[len(regions)-2].seg // not the newest, whose loss nobody can see
	if err := os.Remove(filepath.Join(gone, filepath.Base(middle.path))); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(gone, Factory{SegmentBytes: 4 << 10}); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a missing segment: %v", err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestBroken: after a failed write nothing is accepted, since nobody knows what is on
// disk.
func TestBroken(t *testing.T) {
	db, err := Open(filepath.Join(t.TempDir(), "log"), Factory{})
	if err != nil {
		t.Fatal(err)
	}
	if err := save(db, 1); err != nil {
		t.Fatal(err)
	}
	good := db.newest().f
	if db.newest().f, err = os.Open(db.newest().path); err != nil { // cannot be written to
		t.Fatal(err)
	}
	if err := save(db, 2); !errors.Is(err, ErrBroken) {
		t.Fatalf("a write that failed: %v", err)
	}
	bad := db.newest().f
	db.newest().f = good
	if err := save(db, 2); !errors.Is(err, ErrBroken) {
		t.Fatalf("a write after one that failed: %v", err)
	}
	if err := errors.Join(bad.Close(), db.Close()); err != nil {
		t.Fatal(err)
	}
}

// TestNewerFormat is refused with what to do about it.
func TestNewerFormat(t *testing.T) {
	dir := t.TempDir()
	h := segmentHeader(1)
	h[7]++
	if err := os.WriteFile(filepath.Join(dir, segmentName(1)), append(h, make([]byte, 100)...), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir, Factory{}); err == nil || errors.Is(err, ErrCorrupt) {
		t.Errorf("a newer format: %v", err)
	}
}

// FuzzDecode: no input may do worse than be refused.
func FuzzDecode(f *testing.F) {
	var w builder
	w.reset()
	w.entries(kindEntries, one, []raftpb.Entry{{Index: 3, Term: 2, Cmd: []byte("x")}, {Index: 4, Term: 2}})
	w.state(one, raftpb.State{Term: 1, Vote: 2, Commit: 3})
	w.message(kindInstalled, one, &raftpb.Snapshot{Index: 9, Term: 1})
	w.message(kindBootstrap, one, &raftpb.Bootstrap{Addresses: map[uint64]string{1: "a"}})
	w.removed(one, 7)
	w.head(kindEnd, one)
	f.Add(w.b[recordHead:])
	f.Fuzz(func(t *testing.T, b []byte) {
		err := decode(b, func(it *item) error {
			for _, s := range it.entries {
				if int(s.off)+int(s.len) > len(b) {
					t.Fatalf("entry at %d+%d of %d bytes", s.off, s.len, len(b))
				}
			}
			return nil
		})
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
	})
}
