package mvcc

import (
	"bytes"
	"errors"
	"reflect"
	"testing"

	dsm "github.com/lni/dragonboat/v4/statemachine"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

func (l *log) encoded(cs ...Command) (out [][]byte) {
	for _, c := range cs {
		if c.Request == nil {
			c.Request = &pb.InternalRaftRequest{}
		}
		nextID++
		c.Request.Header = &pb.RequestHeader{ID: nextID}
		out = append(out, l.add(c))
	}
	return out
}

// TestCrashInABatch: the database is committed and copied, as a crash would leave it,
// at every command of a batch that lets a test look in. A replica that goes on from
// there applies the rest, and nothing twice.
func TestCrashInABatch(t *testing.T) {
	dir := t.TempDir()
	var m *Machine
	var copies []string
	take := func(uint64) {
		m.backend().ForceCommit()
		tx := m.backend().BatchTx()
		tx.LockOutsideApply()
		copies = append(copies, copyDatabase(t, dir))
		tx.Unlock()
	}
	m = New(Config{Dir: dir, OnHold: take})
	if _, err := m.Open(nil); err != nil {
		t.Fatal(err)
	}
	hold := func(k Kind, id uint64) Command { return Command{Kind: k, Hold: id} }
	l := &log{t: t}
	batch := l.encoded(putCmd(0, 0, "a", "1"), putCmd(0, 0, "a", "2"), hold(KindHold, 7), putCmd(0, 0, "refused", "x"), hold(KindRelease, 7),
		putCmd(0, 0, "b", "1"), putCmd(0, 0, "", "malformed"), hold(KindHold, 8), hold(KindRelease, 8), putCmd(0, 0, "a", "3"))
	var results []<-chan Result
	for i := range batch {
		c, err := Decode(batch[i])
		if err != nil {
			t.Fatal(err)
		}
		results = append(results, m.Waiters().Register(c.requestID(), 0))
	}
	before := dsm.Entry{Index: 3, Cmd: l.encoded(putCmd(0, 0, "a", "0"))[0]}
	entries := []dsm.Entry{{Index: 9, Cmd: Batch(batch)}, {Index: 10, Cmd: l.encoded(putCmd(0, 0, "c", "1"))[0]}}
	for _, e := range append([]dsm.Entry{before}, entries...) {
		if _, err := m.Update([]dsm.Entry{e}); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range results {
		select {
		case r := <-c:
			if want := i == 3 || i == 6; (r.Err != nil) != want || i == 3 && !errors.Is(r.Err, ErrHeld) {
				t.Errorf("command %d: %v", i, r.Err)
			}
		default:
			t.Errorf("no result of command %d", i)
		}
	}
	want := dump(t, m)
	if want.Rev != 7 || value(t, m, "a") != "3" || value(t, m, "refused") != "" {
		t.Fatalf("after the batch: %+v", want)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if len(copies) != 4 {
		t.Fatalf("%d copies", len(copies))
	}
	for i, dir := range copies {
		for _, again := range []bool{false, true} { // a crash while going on, too
			m, index := open(t, copyDatabase(t, dir))
			if index != 8 {
				t.Fatalf("copy %d is at %d", i, index)
			}
			if again {
				if err := m.Sync(); err != nil {
					t.Fatal(err)
				}
				if err := m.Close(); err != nil {
					t.Fatal(err)
				}
				if m, index = open(t, m.cfg.Dir); index != 8 {
					t.Fatalf("copy %d is at %d after another start", i, index)
				}
			}
			if _, err := m.Update(append([]dsm.Entry(nil), entries...)); err != nil {
				t.Fatal(err)
			}
			if got := dump(t, m); !reflect.DeepEqual(got, want) {
				t.Errorf("copy %d:\n%+v, want\n%+v", i, got, want)
			}
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// A database that becomes the beginning of a new log does not skip commands of it.
func TestRebaseForgetsABatch(t *testing.T) {
	dir := t.TempDir()
	m, _ := open(t, dir)
	l := &log{t: t}
	batch := Batch(l.encoded(putCmd(0, 0, "a", "1"), putCmd(0, 0, "b", "1")))
	m.cfg.OnHold = func(uint64) { m.backend().ForceCommit() }
	half := Batch(l.encoded(putCmd(0, 0, "a", "0"), Command{Kind: KindHold, Hold: 7}, Command{Kind: KindRelease, Hold: 7}, putCmd(0, 0, "x", "0")))
	if _, err := m.Update([]dsm.Entry{{Index: 5, Cmd: half}}); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Rebase(dir, 100, "test"); err != nil {
		t.Fatal(err)
	}
	m, index := open(t, dir)
	defer m.Close()
	if index != 0 || m.resume != (part{}) {
		t.Fatalf("at %d, %+v", index, m.resume)
	}
	if _, err := m.Update([]dsm.Entry{{Index: 5, Cmd: batch}}); err != nil {
		t.Fatal(err)
	}
	if a, b := value(t, m, "a"), value(t, m, "b"); a != "1" || b != "1" {
		t.Errorf("a is %q, b is %q", a, b)
	}
}

func TestSplit(t *testing.T) {
	l := &log{t: t}
	cmds := l.encoded(putCmd(0, 0, "a", "1"), putCmd(0, 0, "b", string(make([]byte, 300))))
	whole := Batch(cmds)
	got, err := split(whole, nil)
	if err != nil || !reflect.DeepEqual(got, cmds) {
		t.Fatalf("%v, %x", err, got)
	}
	if one, err := split(Batch(cmds[:1]), nil); err != nil || len(one) != 1 || !bytes.Equal(one[0], cmds[0]) {
		t.Errorf("one command: %v %x", err, one)
	}
	leader, err := Command{Kind: KindLeader, Term: 3, Replica: 1}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		"truncated": whole[:len(whole)-1], "a leader command": Batch([][]byte{cmds[0], leader}), "nested": Batch([][]byte{cmds[0], whole}),
	} {
		if _, err := split(b, nil); !errors.Is(err, ErrBadCommand) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
