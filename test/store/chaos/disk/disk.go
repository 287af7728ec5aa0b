// Package disk is a disk that can lose its power, fill up and be slow, under an
// unmodified program: a FUSE file system over a directory, served by the calling
// process and mounted wherever the caller wants, also in another mount namespace.
//
// It remembers what has not been synchronised. PowerCut takes it back as a real
// machine would: data that no fsync or fdatasync of its file followed may
// survive in any combination of sectors as far as it overwrites, and up to any
// point (also within a write) as far as it makes a file longer; names that were
// made, changed or removed since the last fsync of anything survive up to any
// point in their order, as in a journal. What was synchronised always survives.
// SetUnordered leaves no more to names than POSIX promises.
// Chance decides, from a seed.
//
// It needs root and /dev/fuse.
package disk

import (
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// sector is what a disk writes whole or not at all.
const sector = 512

// unlimited room.
const unlimited = int64(-1)

// Disk over a directory. Methods may be called from any goroutine.
type Disk struct {
	data, trash string

	mu    sync.Mutex // guards all below; held while the backing files change
	srv   *fuse.Server
	files map[uint64]*pending // by inode of the backing file
	names []change            // since the last fsync, in order
	next  int                 // number of the next file in the trash
	free  int64               // bytes that files may still grow, or unlimited
	sync  time.Duration       // added to each fsync
	write time.Duration       // added to each write
	fail  int                 // fsyncs that fail
	deaf  func(string) bool   // paths whose fsyncs do nothing
	loose bool                // each change of a name survives by itself
	stats Stats
}

// Stats counts since New.
type Stats struct {
	Writes, Syncs, Refused, Failed int
	// LostWrites and LostNames were taken back by power cuts.
	LostWrites, LostNames int
}

// pending are the changes of a file's contents since its last fsync.
type pending struct {
	path    func() (string, bool) // where the file is now
	changes []extent
}

// extent that was written, or cut off (data is nil).
type extent struct {
	off     int64
	old     []byte // what was there, as far as the file reached
	data    []byte
	oldSize int64
	newSize int64
}

func (e extent) grows() bool { return e.newSize > e.oldSize }

// change of a directory, with what takes it back and what makes it final.
type change struct {
	undo  func() error
	final func()
}

// New disk whose contents are in dir, which is made.
func New(dir string) (*Disk, error) {
	d := &Disk{data: filepath.Join(dir, "data"), trash: filepath.Join(dir, "trash"), files: map[uint64]*pending{}, free: unlimited}
	for _, p := range []string{d.data, d.trash} {
		if err := os.MkdirAll(p, 0o700); err != nil {
			return nil, fmt.Errorf("disk: %w", err)
		}
	}
	return d, nil
}

// mountPoint of the thread that mounts: 0 is our own mount namespace.
type place struct {
	pid  int
	path string
}

// Mount it at path, in the mount namespace of process pid (0: our own). A mount
// ends with Unmount, with the namespace, or with this process.
func (d *Disk) Mount(pid int, path string) error {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("disk: open /dev/fuse: %w", err)
	}
	err = place{pid, path}.within(func() error {
		return unix.Mount("skein-chaos", path, "fuse.skein-chaos", unix.MS_NODEV|unix.MS_NOSUID,
			fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other", fd))
	})
	if err != nil {
		unix.Close(fd)
		return fmt.Errorf("disk: mount %s: %w", path, err)
	}
	root, err := d.root()
	if err != nil {
		unix.Close(fd)
		return err
	}
	srv, err := fuse.NewServer(fs.NewNodeFS(root, &fs.Options{}), "/dev/fd/"+strconv.Itoa(fd),
		&fuse.MountOptions{MaxWrite: 1 << 20, DisableXAttrs: true, Logger: log.New(io.Discard, "", 0)})
	if err != nil {
		unix.Close(fd)
		return fmt.Errorf("disk: serve %s: %w", path, err)
	}
	go srv.Serve() // ends when the file system is mounted no more
	if err := srv.WaitMount(); err != nil {
		return fmt.Errorf("disk: serve %s: %w", path, err)
	}
	d.mu.Lock()
	d.srv = srv
	d.mu.Unlock()
	return nil
}

// Unmount it at path, in the namespace of pid, once nobody uses it.
func (d *Disk) Unmount(pid int, path string) error {
	if err := (place{pid, path}.within(func() error { return unix.Unmount(path, unix.MNT_DETACH) })); err != nil {
		return fmt.Errorf("disk: unmount %s: %w", path, err)
	}
	d.mu.Lock()
	srv := d.srv
	d.srv = nil
	d.mu.Unlock()
	if srv != nil {
		srv.Wait()
	}
	return nil
}

// SetFree bounds how many bytes the files may still grow; negative: without bound.
func (d *Disk) SetFree(n int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.free = max(n, unlimited)
}

// SetDelays makes each fsync and each write take longer.
func (d *Disk) SetDelays(sync, write time.Duration) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sync, d.write = sync, write
}

// FailSyncs makes the next n fsyncs fail with EIO. As in Linux, what they should
// have made durable is not, and no later fsync makes up for it.
func (d *Disk) FailSyncs(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = n
}

// IgnoreSyncs makes fsyncs of some files and directories, by their path on the disk, do
// nothing: to a program it is as if it had none in that place.
func (d *Disk) IgnoreSyncs(of func(path string) bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.deaf = of
}

// SetUnordered makes changes of names survive a power cut each by itself, and only an
// fsync of a directory keep them.
func (d *Disk) SetUnordered(on bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.loose = on
}

func (d *Disk) ignores(path string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.deaf != nil && d.deaf(path)
}

// Stats so far.
func (d *Disk) Stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stats
}

// PowerCut takes back a part of what was not synchronised. The disk must not be
// mounted. It returns how many writes and names were lost.
func (d *Disk) PowerCut(seed int64) (writes, names int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r := rand.New(rand.NewSource(seed))
	for _, ino := range sortedKeys(d.files) { // the same fate from the same seed
		p := d.files[ino]
		path, ok := p.path()
		if !ok {
			continue // removed for good
		}
		n, err := p.lose(path, r)
		if err != nil {
			return writes, names, fmt.Errorf("disk: power cut: %w", err)
		}
		writes += n
	}
	d.files = map[uint64]*pending{}
	keep := r.Intn(len(d.names) + 1)
	for i := len(d.names) - 1; i >= 0; i-- {
		if d.loose && r.Intn(2) == 0 || !d.loose && i < keep {
			continue
		}
		err := d.names[i].undo()
		if d.loose && (errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENOTEMPTY)) {
			continue // what came later and survives needs it
		}
		if err != nil {
			return writes, names, fmt.Errorf("disk: power cut: %w", err)
		}
		d.names[i].final = func() {}
		names++
	}
	for _, c := range d.names {
		c.final()
	}
	d.names = nil
	d.stats.LostWrites += writes
	d.stats.LostNames += names
	return writes, names, nil
}

// lose takes back a part of a file's changes.
func (p *pending) lose(path string, r *rand.Rand) (lost int, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for i := len(p.changes) - 1; i >= 0; i-- { // to what was synchronised
		e := p.changes[i]
		if len(e.old) > 0 {
			if _, err := f.WriteAt(e.old, e.off); err != nil {
				return 0, err
			}
		}
		if err := f.Truncate(e.oldSize); err != nil {
			return 0, err
		}
	}
	// All of it may be lost, or none; else sizes grow up to some point.
	until := r.Intn(len(p.changes) + 1)
	all := r.Intn(3) == 0
	for i, e := range p.changes {
		switch {
		case e.data == nil: // cut off
			if i >= until {
				return lost + len(p.changes) - i, nil
			}
			err = f.Truncate(e.newSize)
		case e.grows() && i > until:
			return lost + len(p.changes) - i, nil // a journal grows no file past what is missing
		case e.grows() && i == until:
			torn := int64(r.Intn(len(e.data)+1)) / sector * sector
			_, err = f.WriteAt(e.data[:torn], e.off)
			lost++
		case e.grows() || all || r.Intn(2) == 0:
			_, err = f.WriteAt(e.data, e.off)
		default:
			lost++
			if at := r.Intn(len(e.data) + 1); r.Intn(2) == 0 { // torn
				_, err = f.WriteAt(e.data[:at/sector*sector], e.off)
			}
		}
		if err != nil {
			return lost, err
		}
	}
	return lost, nil
}

func (d *Disk) root() (fs.InodeEmbedder, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(d.data, &st); err != nil {
		return nil, fmt.Errorf("disk: %w", err)
	}
	data := &fs.LoopbackRoot{Path: d.data, Dev: uint64(st.Dev)}
	data.NewNode = func(_ *fs.LoopbackRoot, _ *fs.Inode, _ string, _ *syscall.Stat_t) fs.InodeEmbedder {
		return &node{LoopbackNode: fs.LoopbackNode{RootData: data}, d: d}
	}
	root := &node{LoopbackNode: fs.LoopbackNode{RootData: data}, d: d}
	data.RootNode = root
	return root, nil
}
