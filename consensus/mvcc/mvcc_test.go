package mvcc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	dsm "github.com/lni/dragonboat/v4/statemachine"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

func open(t testing.TB, dir string) (*Machine, uint64) {
	t.Helper()
	m := New(Config{Dir: dir})
	index, err := m.Open(nil)
	if err != nil {
		t.Fatal(err)
	}
	return m, index
}

// log feeds a machine like dragonboat does.
type log struct {
	t     testing.TB
	index uint64
	cmds  [][]byte // by index-1
}

func (l *log) add(c Command) []byte {
	l.t.Helper()
	b, err := c.Encode()
	if err != nil {
		l.t.Fatal(err)
	}
	l.cmds = append(l.cmds, b)
	return b
}

// replay applies everything after index `from`, in batches.
func (l *log) replay(m *Machine, from uint64) {
	l.t.Helper()
	for i := from; i < uint64(len(l.cmds)); {
		var batch []dsm.Entry
		for n := 1 + rand.Intn(5); n > 0 && i < uint64(len(l.cmds)); n-- {
			batch = append(batch, dsm.Entry{Index: i + 1, Cmd: l.cmds[i]})
			i++
		}
		if _, err := m.Update(batch); err != nil {
			l.t.Fatal(err)
		}
	}
}

var nextID uint64

// do applies one command and returns its result.
func (l *log) do(m *Machine, c Command) Result {
	l.t.Helper()
	var res <-chan Result
	if c.Request != nil {
		nextID++
		c.Request.Header = &pb.RequestHeader{ID: nextID}
		res = m.Waiters().Register(nextID, c.Epoch)
	}
	from := uint64(len(l.cmds))
	l.add(c)
	l.replay(m, from)
	if res == nil {
		return Result{}
	}
	select {
	case r := <-res:
		return r
	default:
		l.t.Fatal("no result")
		return Result{}
	}
}

func putCmd(epoch, term uint64, key, value string) Command {
	return Command{Kind: KindRequest, Epoch: epoch, Term: term, Request: &pb.InternalRaftRequest{Put: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}
}

func value(t testing.TB, m *Machine, key string) string {
	t.Helper()
	r, err := m.Range(context.Background(), &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

func TestFences(t *testing.T) {
	m, _ := open(t, t.TempDir())
	defer m.Close()
	l := &log{t: t}
	if r := l.do(m, putCmd(0, 0, "a", "1")); r.Err != nil {
		t.Fatal(r.Err)
	}
	l.do(m, Command{Kind: KindLeader, Term: 5, Replica: 1})
	for _, c := range []struct {
		epoch, term uint64
		want        error
	}{
		{0, 0, ErrSuperseded}, {4, 0, ErrSuperseded}, {5, 0, nil}, {5, 3, nil}, {6, 0, nil},
	} {
		if r := l.do(m, putCmd(c.epoch, c.term, "a", "2")); !errors.Is(r.Err, c.want) {
			t.Errorf("epoch %d term %d: %v, want %v", c.epoch, c.term, r.Err, c.want)
		}
	}
	l.do(m, Command{Kind: KindFence, Term: 7})
	rev := m.Rev()
	if r := l.do(m, putCmd(5, 6, "a", "3")); !errors.Is(r.Err, ErrFenced) {
		t.Errorf("the deposed leader's write: %v", r.Err)
	}
	if m.Rev() != rev || value(t, m, "a") != "2" {
		t.Error("a fenced write changed something")
	}
	for _, term := range []uint64{0, 7, 8} {
		if r := l.do(m, putCmd(5, term, "a", "4")); r.Err != nil {
			t.Errorf("term %d: %v", term, r.Err)
		}
	}
	l.do(m, Command{Kind: KindFence, Term: 6})
	l.do(m, Command{Kind: KindLeader, Term: 4, Replica: 2})
	if m.FenceTerm() != 7 || m.LeaderTerm() != 5 {
		t.Errorf("terms went back to %d and %d", m.FenceTerm(), m.LeaderTerm())
	}
}

func holdCmd(kind Kind, epoch, id uint64) Command {
	return Command{Kind: kind, Epoch: epoch, Hold: id, Request: &pb.InternalRaftRequest{}}
}

// While a shard is held nothing changes it, also after a restart; a release tells
// whether that was so all the time.
func TestHold(t *testing.T) {
	dir := t.TempDir()
	m, _ := open(t, dir)
	l := &log{t: t}
	l.do(m, Command{Kind: KindLeader, Term: 5, Replica: 1})
	check := func(what string, c Command, want error) {
		t.Helper()
		if r := l.do(m, c); !errors.Is(r.Err, want) || want == nil && r.Err != nil {
			t.Errorf("%s: %v, want %v", what, r.Err, want)
		}
	}
	check("a write before", putCmd(5, 0, "a", "1"), nil)
	check("a hold of an old epoch", holdCmd(KindHold, 4, 1), ErrSuperseded)
	check("a hold", holdCmd(KindHold, 5, 1), nil)
	rev := m.Rev()
	check("a write in the hold", putCmd(5, 0, "a", "2"), ErrHeld)
	check("a second hold", holdCmd(KindHold, 5, 2), ErrHeld)
	check("the release of another", holdCmd(KindRelease, 5, 2), ErrNotHeld)
	image, err := m.Pin()
	if err != nil || image.Revision != rev {
		t.Fatalf("image %+v, %v; want revision %d", image, err, rev)
	}
	if err := image.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m, index := open(t, dir)
	defer func() { _ = m.Close() }()
	l.replay(m, index)
	if m.Hold() != 1 {
		t.Fatalf("after a restart the hold is %d", m.Hold())
	}
	check("a write after the restart", putCmd(5, 0, "a", "3"), ErrHeld)
	check("the release", holdCmd(KindRelease, 5, 1), nil)
	check("a second release", holdCmd(KindRelease, 5, 1), ErrNotHeld)
	check("a write after it", putCmd(5, 0, "a", "4"), nil)
	check("another hold", holdCmd(KindHold, 5, 3), nil)
	l.do(m, Command{Kind: KindLeader, Term: 6, Replica: 2})
	check("the release after a change of leader", holdCmd(KindRelease, 6, 3), ErrNotHeld)
	check("a write in the new epoch", putCmd(6, 0, "a", "5"), nil)
	if value(t, m, "a") != "5" || m.Hold() != 0 {
		t.Errorf("the value is %q, the hold %d", value(t, m, "a"), m.Hold())
	}
}

// A new leader's epoch answers what was proposed before it and was not applied:
// such a request can never be applied any more, whenever its entry turns up.
func TestNewEpochAnswersWaiters(t *testing.T) {
	m, _ := open(t, t.TempDir())
	defer m.Close()
	l := &log{t: t}
	lost := m.Waiters().Register(1<<40, 0)
	newer := m.Waiters().Register(1<<40+1, 9)
	l.do(m, Command{Kind: KindLeader, Term: 9, Replica: 1})
	select {
	case r := <-lost:
		if !errors.Is(r.Err, ErrSuperseded) {
			t.Error(r.Err)
		}
	default:
		t.Error("the waiter of the old epoch got nothing")
	}
	select {
	case r := <-newer:
		t.Errorf("the waiter of the new epoch got %v", r)
	default:
	}
	late := putCmd(0, 0, "late", "x")
	late.Request.Header = &pb.RequestHeader{ID: 1 << 40}
	from := uint64(len(l.cmds))
	l.add(late)
	l.replay(m, from)
	if value(t, m, "late") != "" {
		t.Error("the old entry was applied after its proposer was told that it was not")
	}
}

// randomCommand makes commands of all kinds, many of them nonsense.
func randomCommand(r *rand.Rand, epoch *uint64) Command {
	key := func() []byte { return fmt.Appendf(nil, "/k/%d", r.Intn(12)) }
	put := func() *pb.PutRequest {
		p := &pb.PutRequest{Key: key(), Value: fmt.Append(nil, r.Int()), PrevKv: r.Intn(3) == 0}
		switch r.Intn(8) {
		case 0:
			p.Lease = int64(1 + r.Intn(4))
		case 1:
			p.IgnoreValue, p.Value = true, nil
		case 2:
			p.IgnoreValue = true // with a value: refused
		case 3:
			p.IgnoreLease = true
		case 4:
			p.Key = nil
		}
		return p
	}
	op := func() *pb.RequestOp {
		switch r.Intn(5) {
		case 0:
			return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: key(), Revision: int64(r.Intn(40)), SortTarget: pb.RangeRequest_SortTarget(r.Intn(7))}}}
		case 1:
			return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: key(), RangeEnd: key()}}}
		case 2:
			return &pb.RequestOp{}
		}
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put()}}
	}
	q := &pb.InternalRaftRequest{}
	switch r.Intn(15) {
	case 12:
		return Command{Kind: KindHold, Epoch: *epoch, Hold: uint64(1 + r.Intn(2)), Request: q}
	case 13, 14:
		return Command{Kind: KindRelease, Epoch: *epoch, Hold: uint64(1 + r.Intn(2)), Request: q}
	case 0:
		*epoch += uint64(r.Intn(2))
		return Command{Kind: KindLeader, Term: *epoch, Replica: uint64(r.Intn(3))}
	case 1:
		return Command{Kind: KindFence, Term: uint64(r.Intn(6))}
	case 2:
		q.DeleteRange = &pb.DeleteRangeRequest{Key: key(), RangeEnd: []byte("/k/9")}
	case 3, 4, 5:
		q.Txn = &pb.TxnRequest{Compare: []*pb.Compare{{Result: pb.Compare_GREATER, Target: pb.Compare_VERSION, Key: key(), TargetUnion: &pb.Compare_Version{Version: 1}}}}
		for range r.Intn(4) {
			q.Txn.Success = append(q.Txn.Success, op())
			q.Txn.Failure = append(q.Txn.Failure, op())
		}
	case 6:
		q.LeaseGrant = &pb.LeaseGrantRequest{ID: int64(r.Intn(5)), TTL: int64(r.Intn(100))}
	case 7:
		q.LeaseRevoke = &pb.LeaseRevokeRequest{ID: int64(1 + r.Intn(4))}
	case 8:
		q.Compaction = &pb.CompactionRequest{Revision: int64(r.Intn(60))}
	case 9:
		if r.Intn(2) == 0 {
			q.LeaseCheckpoint = &pb.LeaseCheckpointRequest{Checkpoints: []*pb.LeaseCheckpoint{{ID: 1, Remaining_TTL: 3}}}
		}
	default:
		q.Put = put()
	}
	return Command{Kind: KindRequest, Epoch: *epoch, Term: uint64(r.Intn(8)), Request: q}
}

// batched puts some commands that follow each other into one entry.
func batched(r *rand.Rand, cmds [][]byte) (out [][]byte) {
	for len(cmds) > 0 {
		n := 0
		for n < len(cmds) && n < 8 && len(cmds[n]) > 1 && cmds[n][0] == commandVersion && Kind(cmds[n][1]) != KindLeader && Kind(cmds[n][1]) != KindFence && r.Intn(4) > 0 {
			n++
		}
		n = max(n, 1)
		out = append(out, Batch(cmds[:n]))
		cmds = cmds[n:]
	}
	return out
}

// Two replicas that apply the same log, in different batches, one of them
// restarted in between and one recovered from a snapshot, hold the same, and
// every applied entry is applied once.
func TestDeterministicAndCrashSafe(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewSource(seed))
	for round := range 6 {
		l := &log{t: t}
		var epoch uint64
		for i := range 200 {
			c := randomCommand(r, &epoch)
			if c.Request != nil {
				c.Request.Header = &pb.RequestHeader{ID: uint64(i + 1)}
			}
			l.add(c)
			if r.Intn(15) == 0 { // rubbish that no Encode makes
				b := make([]byte, 1+r.Intn(20))
				r.Read(b)
				b[0] = byte(r.Intn(2))
				if len(b) > 1 && b[0] == commandVersion {
					b[1] %= byte(KindRelease) + 1 // who meets a kind that it does not know stops
				}
				l.cmds = append(l.cmds, b)
			}
		}
		l.cmds = batched(r, l.cmds)
		a, _ := open(t, t.TempDir())
		l.replay(a, 0)

		// b is killed without a commit, somewhere, and goes on from its index.
		dir := t.TempDir()
		b, _ := open(t, dir)
		cut := &log{t: t, cmds: l.cmds[:1+r.Intn(len(l.cmds))]}
		cut.replay(b, 0)
		if r.Intn(2) == 0 {
			if err := b.Sync(); err != nil {
				t.Fatal(err)
			}
		}
		tx := b.backend().BatchTx()
		tx.LockOutsideApply() // no commit while the file is copied
		crashed := copyDatabase(t, dir)
		tx.Unlock()
		_ = b.Close()
		b, index := open(t, crashed)
		if index > uint64(len(cut.cmds)) {
			t.Fatalf("the database claims entry %d of %d", index, len(cut.cmds))
		}
		l.replay(b, index)

		// c gets a snapshot of b in its youth, then the rest.
		c, _ := open(t, t.TempDir())
		short := &log{t: t, cmds: l.cmds[:len(l.cmds)/3]}
		short.replay(c, 0)
		mid, _ := open(t, t.TempDir())
		(&log{t: t, cmds: l.cmds[:2*len(l.cmds)/3]}).replay(mid, 0)
		snapshot(t, mid, c)
		l.replay(c, uint64(2*len(l.cmds)/3))

		for name, m := range map[string]*Machine{"restarted": b, "recovered": c} {
			if x, y := dump(t, a), dump(t, m); !reflect.DeepEqual(x, y) {
				t.Errorf("round %d: the %s replica differs:\n%+v\n%+v", round, name, x, y)
			}
		}
		for _, m := range []*Machine{a, b, c, mid} {
			if err := m.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

type state struct {
	Rev           int64
	Applied       uint64
	Leader, Fence uint64
	Keys          []mvccpb.KeyValue
	Leases        map[int64]int64
}

func dump(t testing.TB, m *Machine) state {
	t.Helper()
	s := state{Rev: m.Rev(), Applied: m.Applied(), Leader: m.LeaderTerm(), Fence: m.FenceTerm(), Leases: map[int64]int64{}}
	r, err := m.Range(context.Background(), &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range r.Kvs {
		s.Keys = append(s.Keys, *kv)
	}
	for _, l := range m.Leases() {
		s.Leases[int64(l.ID)] = l.TTL()
	}
	return s
}

// copyDatabase is what a crash leaves: the file as it is now.
func copyDatabase(t testing.TB, dir string) string {
	t.Helper()
	out := t.TempDir()
	ents, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range ents {
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err == nil {
			err = os.WriteFile(filepath.Join(out, e.Name()), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func snapshot(t testing.TB, from, to *Machine) {
	t.Helper()
	p, err := from.PrepareSnapshot()
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	if err := from.SaveSnapshot(p, &buf, nil); err != nil {
		t.Fatal(err)
	}
	if err := to.RecoverFromSnapshot(&buf, nil); err != nil {
		t.Fatal(err)
	}
}

// Watches that are open when a snapshot is installed see every change once, in
// order, also those that the snapshot brought.
func TestWatchOverSnapshot(t *testing.T) {
	a, _ := open(t, t.TempDir())
	defer a.Close()
	dir := t.TempDir()
	b, _ := open(t, dir)
	defer b.Close()
	l := &log{t: t}
	for i := range 50 {
		l.add(putCmd(0, 0, fmt.Sprintf("/w/%d", i%7), fmt.Sprint(i)))
	}
	l.replay(a, 0)
	(&log{t: t, cmds: l.cmds[:10]}).replay(b, 0)
	ws, err := b.NewWatchStream()
	if err != nil {
		t.Fatal(err)
	}
	defer ws.Close()
	if _, err := ws.Watch(0, []byte("/w/"), []byte("/w0"), 2); err != nil {
		t.Fatal(err)
	}
	lost := b.Waiters().Register(77, 0)
	snapshot(t, a, b)
	if r := <-lost; !errors.Is(r.Err, ErrLost) {
		t.Errorf("a waiter over a snapshot got %v", r.Err)
	}
	next := int64(2)
	for deadline := time.After(10 * time.Second); next < 52; {
		select {
		case e := <-ws.Chan():
			for _, ev := range e.Events {
				if ev.Kv.ModRevision != next {
					t.Fatalf("revision %d, expected %d", ev.Kv.ModRevision, next)
				}
				next++
			}
		case <-deadline:
			t.Fatalf("only %d events", next-2)
		}
	}
	b.retired.Wait()
	if ents, _ := os.ReadDir(dir); len(ents) != 1 {
		t.Errorf("files after the snapshot: %v", ents)
	}
}

func TestBadSnapshot(t *testing.T) {
	m, _ := open(t, t.TempDir())
	defer m.Close()
	l := &log{t: t}
	l.do(m, putCmd(0, 0, "a", "1"))
	for _, b := range [][]byte{nil, []byte("SKEINSN\x02aaaaaaaa"), append([]byte("SKEINSN\x01"), 0, 0, 0, 0, 0, 0, 1, 0, 'x')} {
		if err := m.RecoverFromSnapshot(bytes.NewReader(b), nil); err == nil {
			t.Errorf("%q was taken for a snapshot", b)
		}
	}
	done := make(chan struct{})
	close(done)
	p, _ := m.PrepareSnapshot()
	if err := m.SaveSnapshot(p, &bytes.Buffer{}, done); !errors.Is(err, dsm.ErrSnapshotStopped) {
		t.Errorf("stopped save: %v", err)
	}
	if value(t, m, "a") != "1" {
		t.Error("the store is damaged")
	}
	if ents, _ := os.ReadDir(m.cfg.Dir); len(ents) != 1 {
		t.Errorf("left behind: %v", ents)
	}
}

func TestClosed(t *testing.T) {
	m, _ := open(t, t.TempDir())
	w := m.Waiters().Register(1, 0)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if r := <-w; !errors.Is(r.Err, ErrClosed) {
		t.Error(r.Err)
	}
	if _, err := m.Range(context.Background(), &pb.RangeRequest{Key: []byte("a")}); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	// Not the same as a key that did not exist: a watch would tell its client so.
	if kv, err := m.KeyAt(context.Background(), []byte("a"), 2); !errors.Is(err, ErrClosed) {
		t.Errorf("a key of a closed machine: %v, %v", kv, err)
	}
	if _, err := m.NewWatchStream(); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	if never := New(Config{Dir: t.TempDir()}); never.Close() != nil || never.Rev() != 0 {
		t.Error("a machine that was never opened")
	}
}

func TestNewerCommandStopsTheReplica(t *testing.T) {
	m, _ := open(t, t.TempDir())
	defer m.Close()
	for _, cmd := range [][]byte{{newestVersion + 1, 1, 2, 3}, {batchVersion, byte(kindBatch) + 1, 2, 3}, {commandVersion, byte(KindRelease) + 1, 2, 3}} {
		if _, err := m.Update([]dsm.Entry{{Index: 1, Cmd: cmd}}); !errors.Is(err, ErrNewerCommand) {
			t.Errorf("%x: %v", cmd, err)
		}
	}
	if _, err := m.Update([]dsm.Entry{{Index: 1, Cmd: []byte{commandVersion, 0, 1}}}); err != nil { // nobody ever wrote it
		t.Error(err)
	}
}

func TestCheckTxn(t *testing.T) {
	put := func(k string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(k)}}}
	}
	del := func(k, end string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(k), RangeEnd: []byte(end)}}}
	}
	nested := func(then, other []*pb.RequestOp) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: then, Failure: other}}}
	}
	many := make([]*pb.RequestOp, MaxTxnOps+1)
	for i := range many {
		many[i] = put(fmt.Sprint(i))
	}
	for i, c := range []struct {
		ops  []*pb.RequestOp
		want error
	}{
		{[]*pb.RequestOp{put("a"), put("b")}, nil},
		{[]*pb.RequestOp{put("a"), put("a")}, rpctypes.ErrGRPCDuplicateKey},
		{[]*pb.RequestOp{put("b"), del("a", "c")}, rpctypes.ErrGRPCDuplicateKey},
		{[]*pb.RequestOp{put("c"), del("a", "c")}, nil},
		{[]*pb.RequestOp{nested([]*pb.RequestOp{put("a")}, []*pb.RequestOp{put("a")})}, nil},
		{[]*pb.RequestOp{put("a"), nested([]*pb.RequestOp{put("a")}, nil)}, rpctypes.ErrGRPCDuplicateKey},
		{[]*pb.RequestOp{put("")}, rpctypes.ErrGRPCEmptyKey},
		{[]*pb.RequestOp{nil}, rpctypes.ErrGRPCKeyNotFound},
		{[]*pb.RequestOp{{}}, rpctypes.ErrGRPCKeyNotFound},
		{[]*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{}}}, rpctypes.ErrGRPCEmptyKey},
		{[]*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{}}}, rpctypes.ErrGRPCKeyNotFound},
		{many, rpctypes.ErrGRPCTooManyOps},
	} {
		if err := CheckTxn(&pb.TxnRequest{Success: c.ops}); !errors.Is(err, c.want) {
			t.Errorf("case %d: %v, want %v", i, err, c.want)
		}
	}
}

func FuzzCommand(f *testing.F) {
	r := rand.New(rand.NewSource(1))
	var epoch uint64
	for range 40 {
		c := randomCommand(r, &epoch)
		b, err := c.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte{1})
	f.Add([]byte{1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := Decode(b)
		if err != nil {
			if !errors.Is(err, ErrBadCommand) && !errors.Is(err, ErrNewerCommand) {
				t.Fatalf("unknown error %v", err)
			}
			return
		}
		if c.Request != nil {
			_ = checkRequest(c.Request) // must not panic
		}
		b2, err := c.Encode()
		if err != nil {
			t.Fatal(err)
		}
		c2, err := Decode(b2)
		if err != nil || !reflect.DeepEqual(c, c2) {
			t.Fatalf("%v\n%+v\n%+v", err, c, c2)
		}
	})
}

// FuzzApply feeds arbitrary bytes to a store: no input may panic or be an error.
func FuzzApply(f *testing.F) {
	r := rand.New(rand.NewSource(2))
	var epoch uint64
	for range 40 {
		c := randomCommand(r, &epoch)
		b, err := c.Encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add(Batch([][]byte{{1, 1, 0, 0}, {1, 1, 0, 0, 0x1a, 0}}))
	m, _ := open(f, f.TempDir())
	f.Cleanup(func() { _ = m.Close() })
	f.Fuzz(func(t *testing.T, b []byte) {
		if _, err := m.Update([]dsm.Entry{{Index: m.Applied() + 1, Cmd: b}}); err != nil && !errors.Is(err, ErrNewerCommand) {
			t.Fatal(err)
		}
	})
}
