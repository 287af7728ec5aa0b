package raftlog

import (
	"path/filepath"
	"testing"
)

// TestFreedFilesAreUsedAgain: a log that goes on and frees what is behind it makes no
// more files than it needs at once, however its segments are freed.
func TestFreedFilesAreUsedAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	db, err := Open(dir, Factory{SegmentBytes: 4 << 10})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := db.Close(); err != nil {
			t.Error(err)
		}
	}()
	made := func() int {
		db.spare.wg.Wait()
		db.spare.mu.Lock()
		defer db.spare.mu.Unlock()
		return db.spare.made
	}
	i := uint64(0)
	rounds := func(n int) {
		for range n {
			for first := db.newest().number; db.newest().number < first+4; {
				i++
				if err := save(db, i); err != nil {
					t.Fatal(err)
				}
			}
			if err := db.RemoveEntriesTo(1, 1, i-1); err != nil { // several segments at once
				t.Fatal(err)
			}
		}
	}
	rounds(3) // until there are enough
	before := made()
	rounds(20)
	if more := made() - before; more > 2 {
		t.Errorf("%d files were made for segments although as many were freed", more)
	}
	if n := len(db.spare.more); n > moreSpares {
		t.Errorf("%d spare files, at most %d are expected", n, moreSpares)
	}
}
