package daemon

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Under load the collector leaves as much room as the heap may grow by; without, and while the node starts, memory counts.
func TestPace(t *testing.T) {
	start := time.Unix(1e9, 0)
	for name, c := range map[string]struct {
		now             int
		since           time.Duration // the start
		live, allocated uint64        // MiB; the latter in a second
		want            int
	}{
		"idle":              {gcPercent, time.Minute, 40, 1, gcPercent},
		"starting":          {startPercent, 10 * time.Second, 40, 500, startPercent},
		"has started":       {startPercent, time.Minute, 40, 1, gcPercent},
		"busy":              {gcPercent, time.Minute, 48, 50, 200},
		"much to mark":      {gcPercent, time.Minute, 64, 50, 125},
		"too much":          {gcPercent, time.Minute, 160, 50, gcPercent}, // least room is less than that
		"hardly anything":   {gcPercent, time.Minute, 16, 50, 600},
		"no more":           {200, time.Minute, 48, 1, gcPercent},
		"about the same":    {200, time.Minute, 50, 50, 200},
		"no longer so":      {200, time.Minute, 72, 50, 100},
		"nothing in use":    {gcPercent, time.Minute, 0, 50, 100 * mostRoom},
		"over the bound":    {gcPercent, time.Minute, 128, 50, gcPercent},
		"least room counts": {gcPercent, time.Minute, 112, 50, 28},
	} {
		p := &pacer{now: c.now, start: startPercent, started: start, at: start.Add(c.since)}
		if got := p.next(start.Add(c.since+time.Second), c.live<<20, c.allocated<<20); got != c.want {
			t.Errorf("%s: %d %%, want %d", name, got, c.want)
		}
	}
}

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
