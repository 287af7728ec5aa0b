package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// The holes of a file do not count.
func TestStoreSize(t *testing.T) {
	dir := t.TempDir()
	if n := storeSize(dir); n != 0 {
		t.Errorf("nothing takes %d bytes", n)
	}
	shard := filepath.Join(dir, "raft", "shard-2-replica-1")
	if err := os.MkdirAll(shard, 0o700); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(shard, "db.00000001"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 1<<20)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(64<<20), f.Sync()); err != nil {
		t.Fatal(err)
	}
	if n := storeSize(dir); n < 1<<20 || n >= 2<<20 {
		t.Errorf("a file of 1 MB and a hole takes %d bytes", n)
	}
}

// The heap has its bound, so long as there is room.
func TestRoomUnderLoad(t *testing.T) {
	for live, want := range map[uint64]uint64{0: 128, 40: 128, 64: 104, 100: 68, 160: 48, 1000: 48} {
		if got := underLoad(live<<20) >> 20; got != want {
			t.Errorf("with %d MiB in use: %d MiB, want %d", live, got, want)
		}
	}
}
