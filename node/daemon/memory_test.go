package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
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

// Bindings are a burst when there are many a second, in whatever batches.
func TestBurstOfBindings(t *testing.T) {
	var h hurried
	now := time.Unix(1e9, 0)
	for i, c := range []struct {
		after time.Duration
		n     int
		want  bool
	}{{0, 31, false}, {time.Millisecond, 1, true}, {2 * time.Second, 1, false}, {2 * time.Second, 128, true}, {100 * time.Millisecond, 1, true}, {time.Hour, 5, false}} {
		now = now.Add(c.after)
		if got := h.many(now, c.n); got != c.want {
			t.Errorf("%d: %v", i, got)
		}
	}
	if r := burstRoom(); r < leastRoom || r > burstMost {
		t.Errorf("%d bytes of room", r)
	}
}
