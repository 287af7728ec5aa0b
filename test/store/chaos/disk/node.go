package disk

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// node is a file or directory. What is not intercepted here goes straight to the
// backing directory.
type node struct {
	fs.LoopbackNode
	d *Disk
}

var (
	_ fs.NodeCreater        = (*node)(nil)
	_ fs.NodeOpener         = (*node)(nil)
	_ fs.NodeUnlinker       = (*node)(nil)
	_ fs.NodeRenamer        = (*node)(nil)
	_ fs.NodeMkdirer        = (*node)(nil)
	_ fs.NodeRmdirer        = (*node)(nil)
	_ fs.NodeSetattrer      = (*node)(nil)
	_ fs.NodeFsyncer        = (*node)(nil)
	_ fs.NodeLinker         = (*node)(nil)
	_ fs.NodeSymlinker      = (*node)(nil)
	_ fs.NodeMknoder        = (*node)(nil)
	_ fs.NodeCopyFileRanger = (*node)(nil)
)

func (n *node) path() string { return filepath.Join(n.d.data, n.Path(nil)) }

// dropped are flags that mean nothing below: the kernel gives absolute offsets,
// and truncation is recorded.
const dropped = unix.O_APPEND | unix.O_TRUNC | unix.O_DIRECT | unix.O_SYNC | unix.O_DSYNC

func (n *node) Create(ctx context.Context, name string, flags, mode uint32, out *fuse.EntryOut) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	if n.d.free == 0 {
		n.d.stats.Refused++
		return nil, nil, 0, syscall.ENOSPC
	}
	path := filepath.Join(n.path(), name)
	_, before := os.Lstat(path)
	in, fh, fl, errno := n.LoopbackNode.Create(ctx, name, flags&^dropped, mode, out)
	if errno != 0 {
		return in, fh, fl, errno
	}
	if before != nil {
		n.d.names = append(n.d.names, change{undo: func() error { return os.Remove(path) }, final: func() {}})
	}
	f, errno := n.d.file(path, fh)
	if errno == 0 && before == nil && flags&unix.O_TRUNC != 0 {
		errno = f.truncate(0)
	}
	return in, f, fl, errno
}

func (n *node) Open(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	// Also what is written only has to be read: to be able to take it back.
	if flags&unix.O_ACCMODE == unix.O_WRONLY {
		flags = flags&^unix.O_ACCMODE | unix.O_RDWR
	}
	fh, fl, errno := n.LoopbackNode.Open(ctx, flags&^dropped)
	if errno != 0 {
		return fh, fl, errno
	}
	f, errno := n.d.file(n.path(), fh)
	if errno == 0 && flags&unix.O_TRUNC != 0 {
		errno = f.truncate(0)
	}
	return f, fl, errno
}

func (n *node) Unlink(ctx context.Context, name string) syscall.Errno {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	return fs.ToErrno(n.d.discard(filepath.Join(n.path(), name)))
}

// discard moves a file to the trash until that is final.
func (d *Disk) discard(path string) error {
	d.next++
	trash := filepath.Join(d.trash, strconv.Itoa(d.next))
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	if err := os.Rename(path, trash); err != nil {
		return err
	}
	d.give(st.Size())
	d.names = append(d.names, change{
		undo: func() error { return os.Rename(trash, path) },
		final: func() {
			_ = os.Remove(trash) // goes with the directory at the latest
			delete(d.files, st.Sys().(*syscall.Stat_t).Ino)
		},
	})
	return nil
}

func (d *Disk) give(n int64) {
	if d.free != unlimited {
		d.free += n
	}
}

func (n *node) Rename(ctx context.Context, name string, to fs.InodeEmbedder, newName string, flags uint32) syscall.Errno {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	if flags != 0 {
		return syscall.EINVAL
	}
	from := filepath.Join(n.path(), name)
	dest := filepath.Join(n.d.data, to.EmbeddedInode().Path(nil), newName)
	if st, err := os.Lstat(dest); err == nil {
		if st.IsDir() {
			return syscall.ENOTSUP
		}
		if err := n.d.discard(dest); err != nil {
			return fs.ToErrno(err)
		}
		// One step: the old file is not gone before the new one has its name.
		gone := n.d.names[len(n.d.names)-1]
		n.d.names = n.d.names[:len(n.d.names)-1]
		if err := os.Rename(from, dest); err != nil {
			return fs.ToErrno(err)
		}
		n.d.names = append(n.d.names, change{
			undo: func() error {
				if err := os.Rename(dest, from); err != nil {
					return err
				}
				return gone.undo()
			},
			final: gone.final,
		})
		return 0
	}
	if err := os.Rename(from, dest); err != nil {
		return fs.ToErrno(err)
	}
	n.d.names = append(n.d.names, change{undo: func() error { return os.Rename(dest, from) }, final: func() {}})
	return 0
}

func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	path := filepath.Join(n.path(), name)
	in, errno := n.LoopbackNode.Mkdir(ctx, name, mode, out)
	if errno == 0 {
		n.d.names = append(n.d.names, change{undo: func() error { return os.Remove(path) }, final: func() {}})
	}
	return in, errno
}

func (n *node) Rmdir(ctx context.Context, name string) syscall.Errno {
	n.d.mu.Lock()
	defer n.d.mu.Unlock()
	path := filepath.Join(n.path(), name)
	errno := n.LoopbackNode.Rmdir(ctx, name)
	if errno == 0 {
		n.d.names = append(n.d.names, change{undo: func() error { return os.Mkdir(path, 0o700) }, final: func() {}})
	}
	return errno
}

// dir is an open directory. The library's own would synchronise the backing directory
// alone.
type dir struct {
	fs.FileHandle
	n *node
}

var (
	_ fs.NodeOpendirHandler = (*node)(nil)
	_ fs.FileReaddirenter   = dir{}
	_ fs.FileSeekdirer      = dir{}
	_ fs.FileReleasedirer   = dir{}
	_ fs.FileFsyncdirer     = dir{}
)

func (n *node) OpendirHandle(ctx context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	fh, fl, errno := n.LoopbackNode.OpendirHandle(ctx, flags)
	return dir{fh, n}, fl, errno
}

func (d dir) Readdirent(ctx context.Context) (*fuse.DirEntry, syscall.Errno) {
	return d.FileHandle.(fs.FileReaddirenter).Readdirent(ctx)
}

func (d dir) Seekdir(ctx context.Context, off uint64) syscall.Errno {
	return d.FileHandle.(fs.FileSeekdirer).Seekdir(ctx, off)
}

func (d dir) Releasedir(ctx context.Context, flags uint32) {
	d.FileHandle.(fs.FileReleasedirer).Releasedir(ctx, flags)
}

func (d dir) Fsyncdir(ctx context.Context, flags uint32) syscall.Errno {
	return d.n.Fsync(ctx, nil, flags)
}

// Fsync of a directory, or of a file without a handle.
func (n *node) Fsync(ctx context.Context, fh fs.FileHandle, flags uint32) syscall.Errno {
	if n.d.ignores(n.Path(nil)) {
		return 0
	}
	if f, ok := fh.(*file); ok {
		return f.Fsync(ctx, flags)
	}
	return n.d.flush(nil)
}

func (n *node) Setattr(ctx context.Context, fh fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if size, ok := in.GetSize(); ok {
		f, mine := fh.(*file)
		if !mine {
			o, _, errno := n.Open(ctx, unix.O_RDWR)
			if errno != 0 {
				return errno
			}
			f = o.(*file)
			defer f.Release(ctx)
		}
		n.d.mu.Lock()
		errno := f.truncate(int64(size))
		n.d.mu.Unlock()
		if errno != 0 {
			return errno
		}
		in.Valid &^= fuse.FATTR_SIZE
	}
	return n.LoopbackNode.Setattr(ctx, nil, in, out)
}

// What no store needs is refused rather than done behind the disk's back.

func (n *node) Link(context.Context, fs.InodeEmbedder, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EPERM
}

func (n *node) Symlink(context.Context, string, string, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EPERM
}

func (n *node) Mknod(context.Context, string, uint32, uint32, *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	return nil, syscall.EPERM
}

func (n *node) CopyFileRange(context.Context, fs.FileHandle, uint64, *fs.Inode, fs.FileHandle, uint64, uint64, uint64) (uint32, syscall.Errno) {
	return 0, syscall.ENOTSUP
}

// file is an open file.
type file struct {
	loop fs.FileHandle
	os   *os.File // of our own, for reading back
	d    *Disk
	ino  uint64
}

var (
	_ fs.FileReader    = (*file)(nil)
	_ fs.FileWriter    = (*file)(nil)
	_ fs.FileFsyncer   = (*file)(nil)
	_ fs.FileFlusher   = (*file)(nil)
	_ fs.FileReleaser  = (*file)(nil)
	_ fs.FileGetattrer = (*file)(nil)
	_ fs.FileAllocater = (*file)(nil)
	_ fs.FileLseeker   = (*file)(nil)
)

// file wraps a handle.
func (d *Disk) file(path string, loop fs.FileHandle) (*file, syscall.Errno) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fs.ToErrno(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		f.Close()
		return nil, fs.ToErrno(err)
	}
	return &file{loop: loop, os: f, d: d, ino: st.Ino}, 0
}

func (f *file) size() int64 {
	st, err := f.os.Stat()
	if err != nil {
		return 0
	}
	return st.Size()
}

// record remembers a change; the caller has the lock.
func (f *file) record(e extent) {
	p := f.d.files[f.ino]
	if p == nil {
		p = &pending{path: f.d.find(f.ino)}
		f.d.files[f.ino] = p
	}
	p.changes = append(p.changes, e)
}

// find looks a file up by its inode: it may have been renamed since.
func (d *Disk) find(ino uint64) func() (string, bool) {
	return func() (path string, ok bool) {
		for _, dir := range []string{d.data, d.trash} {
			_ = filepath.Walk(dir, func(p string, st os.FileInfo, err error) error {
				if err == nil && st.Sys().(*syscall.Stat_t).Ino == ino {
					path, ok = p, true
					return filepath.SkipAll
				}
				return nil
			})
			if ok {
				break
			}
		}
		return path, ok
	}
}

func (f *file) Write(ctx context.Context, data []byte, off int64) (uint32, syscall.Errno) {
	f.d.mu.Lock()
	delay := f.d.write
	f.d.mu.Unlock()
	if !pause(ctx, delay) {
		return 0, syscall.EINTR
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	size := f.size()
	if grow := off + int64(len(data)) - size; grow > 0 && f.d.free != unlimited && grow > f.d.free {
		data = data[:max(0, int64(len(data))-(grow-f.d.free))]
		if len(data) == 0 {
			f.d.stats.Refused++
			return 0, syscall.ENOSPC
		}
	}
	e := extent{off: off, data: append([]byte{}, data...), oldSize: size, newSize: max(size, off+int64(len(data)))}
	if off < size {
		e.old = make([]byte, min(int64(len(data)), size-off))
		if _, err := f.os.ReadAt(e.old, off); err != nil && err != io.EOF {
			return 0, fs.ToErrno(err)
		}
	}
	if _, err := f.os.WriteAt(data, off); err != nil {
		return 0, fs.ToErrno(err)
	}
	f.d.stats.Writes++
	f.d.give(e.oldSize - e.newSize)
	f.record(e)
	return uint32(len(data)), 0
}

// truncate has the lock.
func (f *file) truncate(to int64) syscall.Errno {
	size := f.size()
	if to > size && f.d.free != unlimited && to-size > f.d.free {
		f.d.stats.Refused++
		return syscall.ENOSPC
	}
	e := extent{off: to, oldSize: size, newSize: to}
	if to < size {
		e.old = make([]byte, size-to)
		if _, err := f.os.ReadAt(e.old, to); err != nil && err != io.EOF {
			return fs.ToErrno(err)
		}
	}
	if err := f.os.Truncate(to); err != nil {
		return fs.ToErrno(err)
	}
	f.d.give(e.oldSize - e.newSize)
	f.record(e)
	return 0
}

func (f *file) Fsync(ctx context.Context, _ uint32) syscall.Errno {
	f.d.mu.Lock()
	delay := f.d.sync
	f.d.mu.Unlock()
	if !pause(ctx, delay) {
		return syscall.EINTR
	}
	return f.d.flush(f)
}

// flush makes all names final, and the contents of a file, if it is one that is flushed.
func (d *Disk) flush(f *file) syscall.Errno {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stats.Syncs++
	if d.fail > 0 {
		d.fail--
		d.stats.Failed++
		return syscall.EIO
	}
	if f != nil {
		delete(d.files, f.ino)
	}
	if f != nil && d.loose {
		return 0
	}
	for _, c := range d.names {
		c.final()
	}
	d.names = nil
	return 0
}

// pause is false when the caller has been killed meanwhile.
func pause(ctx context.Context, d time.Duration) bool {
	if d == 0 {
		return true
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

func (f *file) Read(_ context.Context, buf []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := f.os.ReadAt(buf, off)
	if err != nil && err != io.EOF {
		return nil, fs.ToErrno(err)
	}
	return fuse.ReadResultData(buf[:n]), 0
}

func (f *file) Flush(context.Context) syscall.Errno { return 0 }

func (f *file) Release(ctx context.Context) syscall.Errno {
	f.d.mu.Lock()
	var st unix.Stat_t
	if unix.Fstat(int(f.os.Fd()), &st) == nil && st.Nlink == 0 {
		delete(f.d.files, f.ino) // the number may be given to another file
	}
	f.d.mu.Unlock()
	f.os.Close()
	return f.loop.(fs.FileReleaser).Release(ctx)
}

func (f *file) Getattr(ctx context.Context, out *fuse.AttrOut) syscall.Errno {
	return f.loop.(fs.FileGetattrer).Getattr(ctx, out)
}

func (f *file) Lseek(ctx context.Context, off uint64, whence uint32) (uint64, syscall.Errno) {
	return f.loop.(fs.FileLseeker).Lseek(ctx, off, whence)
}

// Allocate reserves nothing: writes take their room.
func (f *file) Allocate(_ context.Context, off, size uint64, mode uint32) syscall.Errno {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if f.d.free != unlimited && int64(off+size)-f.size() > f.d.free {
		f.d.stats.Refused++
		return syscall.ENOSPC
	}
	if end := int64(off + size); mode == 0 && end > f.size() {
		return f.truncate(end)
	}
	return 0
}
