package raftlog

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/lni/dragonboat/v4/raftio"
	"github.com/lni/dragonboat/v4/raftpb"
)

// A process that dies soon after each start, also while it writes its first record, takes
// no more of the disk than one that lives; what comes next is kept.
func TestManyStarts(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	n := raftio.NodeInfo{ShardID: 1, ReplicaID: 1}
	save := func(d *DB, index uint64) {
		t.Helper()
		err := d.SaveRaftState([]raftpb.Update{{ShardID: 1, ReplicaID: 1, State: raftpb.State{Term: 1, Commit: index},
			EntriesToSave: []raftpb.Entry{{Index: index, Term: 1, Cmd: make([]byte, 100)}}}}, 1)
		if err != nil {
			t.Fatal(err)
		}
	}
	start := func() *DB {
		t.Helper()
		d, err := Open(dir, Factory{SegmentBytes: 16 << 10})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	d := start()
	save(d, 1)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		d := start()
		newest := d.newest().path
		end := d.end
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if i%2 == 0 { // torn
			f, err := os.OpenFile(newest, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt([]byte("nothing whole"), end); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(names) > 3 { // two segments and the next one's file
		t.Errorf("files: %v, %v", names, err)
	}
	d = start()
	save(d, 2)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = start()
	defer d.Close()
	ents, _, err := d.IterateEntries(nil, 0, 1, 1, 1, 3, 1<<20)
	if err != nil || len(ents) != 2 {
		t.Errorf("%d entries, %v", len(ents), err)
	}
	if st, err := d.ReadRaftState(n.ShardID, n.ReplicaID, 0); err != nil || st.State.Commit != 2 {
		t.Errorf("%+v, %v", st, err)
	}
}
