package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Free space of the file system that holds the state, in bytes. The store's log cannot be written any more when there is none, which
// is the end of the process, so the node stops before.
const (
	spaceToStart = 48 << 20 // less at start: the node does not start; a new store and containerd take some 10 MB
	spaceToWrite = 24 << 20 // less: the store takes nothing that makes it grow; what is deleted is
	spaceToRun   = 8 << 20  // less: the daemon ends; pods go on
	// diskLook is how often that is looked at: one system call.
	diskLook = time.Second
)

// errNoSpace says that a file system is too full for a node.
var errNoSpace = errors.New("the disk is full")

// freeSpace gives the bytes that root may still write in the file system of dir, which need not exist yet.
func freeSpace(dir string) (uint64, error) {
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if err == nil {
			return st.Bfree * uint64(st.Bsize), nil
		}
		if up := filepath.Dir(dir); errors.Is(err, fs.ErrNotExist) && up != dir {
			dir = up
			continue
		}
		return 0, fmt.Errorf("free space of %s: %w", dir, err)
	}
}

// checkSpace refuses a file system with less than need bytes free.
func checkSpace(dir string, free, need uint64, then string) error {
	if free >= need {
		return nil
	}
	return fmt.Errorf("%w: the file system of %s has %.1f MB free, %s with less than %d MB: free some space", errNoSpace, dir, float64(free)/(1<<20), then, need>>20)
}

// disk is what the node knows of the room for its state.
type disk struct{ full atomic.Pointer[error] }

// err tells why the store must not grow; nil when there is room.
func (d *disk) err() error {
	if e := d.full.Load(); e != nil {
		return *e
	}
	return nil
}

// look judges an amount of free space; the error ends the daemon.
func (d *disk) look(log *slog.Logger, dir string, free uint64) error {
	if err := checkSpace(dir, free, spaceToRun, "the node cannot keep its data safe"); err != nil {
		return fmt.Errorf("%w and start it again; its pods go on", err)
	}
	was := d.err()
	if err := checkSpace(dir, free, spaceToWrite, "the store accepts no new objects"); err != nil {
		d.full.Store(&err)
		if was == nil {
			log.Warn("the disk is nearly full", "err", err)
		}
	} else if was != nil {
		d.full.Store(nil)
		log.Info("the disk has room again", "free", free)
	}
	return nil
}

// watchDisk keeps an eye on the room for the state.
func (n *node) watchDisk(ctx context.Context) error {
	for {
		if free, err := freeSpace(n.cfg.StateDir); err != nil {
			n.parts.set("disk", err, "")
		} else if err := n.disk.look(n.log, n.cfg.StateDir, free); err != nil {
			return err
		} else {
			n.parts.set("disk", n.disk.err(), fmt.Sprintf("%d MB free", free>>20))
		}
		if !pause(ctx, diskLook) {
			return nil
		}
	}
}
