package mvcc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
	"go.etcd.io/etcd/server/v3/storage/backend"
	"golang.org/x/sys/unix"
)

const (
	// copyChunk is how much is copied and made durable at a time. Small: a large
	// fsync would hold up those of the log on the same disk. Bytes.
	copyChunk = 4 << 20
	// copyPause bounds the rest between two chunks, which lasts as long as the
	// chunk took: copying gets half of the disk.
	copyPause = 100 * time.Millisecond
	// finalKeys is how many keys may be left for the moment in which nobody writes.
	finalKeys = 512
	// rounds bounds the attempts to bring a copy up to date, gateTries those to
	// find a moment without a long reader.
	rounds    = 50
	gateTries = 500
	gatePause = 10 * time.Millisecond
	// roomToSpare must be left on the file system by a copy: the node takes no more
	// data when there is less than 24 MiB. Bytes.
	roomToSpare = 32 << 20
)

var (
	// ErrDefragRunning is returned when the database is being rewritten already, or
	// replaced by a snapshot.
	ErrDefragRunning = errors.New("mvcc: the database is being rewritten already")
	// ErrDefragAbandoned is returned when a rewrite cannot come to its end; the
	// database is as before.
	ErrDefragAbandoned = errors.New("mvcc: defragmentation abandoned")
)

// Defrag tells of a defragmentation.
type Defrag struct {
	End time.Time
	// Took is the time of all of it, Pause the longest that writers were held up.
	// Readers are never.
	Took, Pause time.Duration
	// Before and After are the sizes of the file, in bytes.
	Before, After int64
}

// Defragment rewrites the database into a new file without its free pages, while
// it is read and written. The writers wait for the switch alone: a commit of the
// last few keys and a rename. After a crash the database is either file, whole.
// ctx ends it early. Errors are ErrDefragRunning, ErrDefragAbandoned, ErrClosed
// and those of the file system; after each the old file goes on.
func (m *Machine) Defragment(ctx context.Context) (st Defrag, err error) {
	err = m.use(func() error {
		ctx, done, err := m.beginDefrag(ctx)
		if err != nil {
			return err
		}
		defer done()
		st, err = m.rewrite(ctx)
		return err
	})
	if err == nil {
		m.lastDefrag.Store(&st)
		m.log.Info("defragmented", "before", st.Before, "after", st.After, "took", st.Took, "pause", st.Pause)
	}
	return st, err
}

// LastDefrag tells of the last defragmentation since Open.
func (m *Machine) LastDefrag() Defrag {
	if st := m.lastDefrag.Load(); st != nil {
		return *st
	}
	return Defrag{}
}

// Defragmenting tells whether one is under way.
func (m *Machine) Defragmenting() bool {
	m.beMu.RLock()
	defer m.beMu.RUnlock()
	return m.stopDefrag != nil
}

// beginDefrag claims the right to replace the file. Close and the installation
// of a snapshot end the context.
func (m *Machine) beginDefrag(ctx context.Context) (context.Context, func(), error) {
	if !m.replacing.TryLock() {
		return nil, nil, ErrDefragRunning
	}
	if m.installing.Load() {
		m.replacing.Unlock()
		return nil, nil, ErrDefragRunning
	}
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(m.life, cancel)
	m.beMu.Lock()
	m.stopDefrag = cancel
	m.beMu.Unlock()
	return ctx, func() {
		stop()
		cancel()
		m.beMu.Lock()
		m.stopDefrag = nil
		m.beMu.Unlock()
		m.replacing.Unlock()
	}, nil
}

// endDefrag ends a defragmentation, and keeps others from beginning until the
// returned function is called.
func (m *Machine) endDefrag() func() {
	m.installing.Store(true)
	m.beMu.RLock()
	if m.stopDefrag != nil {
		m.stopDefrag()
	}
	m.beMu.RUnlock()
	m.replacing.Lock()
	return func() {
		m.installing.Store(false)
		m.replacing.Unlock()
	}
}

// rewrite replaces the file of the database; replacing is held.
func (m *Machine) rewrite(ctx context.Context) (st Defrag, err error) {
	d := m.backend()
	old := d.cur.Load()
	begin := time.Now()
	st.Before = old.Size()
	if err := roomFor(m.cfg.Dir, old.SizeInUse()); err != nil {
		return st, err
	}
	path := m.path(m.gen.Add(1))
	tmp := path + ".tmp"
	// What is written from before the copy's transaction on is remembered; what is
	// both in the copy and remembered is written twice.
	d.tx.remember()
	defer d.tx.forget()
	next, err := m.copyFile(ctx, old, tmp)
	if err != nil {
		return st, errors.Join(fmt.Errorf("%w: %w", ErrDefragAbandoned, err), ignoreMissing(os.Remove(tmp)))
	}
	if st.Pause, err = d.switchTo(ctx, next, path); err != nil {
		return st, errors.Join(fmt.Errorf("%w: %w", ErrDefragAbandoned, err), next.Close(), os.Remove(tmp))
	}
	m.retire(old)
	st.End = time.Now()
	st.Took, st.After = st.End.Sub(begin), next.Size()
	return st, nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// roomFor refuses to copy what would fill the disk.
func roomFor(dir string, size int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("mvcc: free space of %s: %w", dir, err)
	}
	free, need := int64(fs.Bavail)*fs.Bsize, size+size/8+roomToSpare
	if free < need {
		return fmt.Errorf("%w: the copy needs %d MiB, the file system of %s has %d MiB free", ErrDefragAbandoned, need>>20, dir, free>>20)
	}
	return nil
}

// retire closes a file that has been replaced, when its last reader has ended,
// and deletes it.
func (m *Machine) retire(f *dbFile) {
	m.retired.Add(1)
	go func() {
		defer m.retired.Done()
		f.users.Wait()
		if err := errors.Join(f.Close(), os.Remove(f.path)); err != nil {
			m.log.Warn("cannot delete a replaced database", "path", f.path, "error", err)
		}
	}()
}

// copyFile writes what old holds into a new file, and opens it.
func (m *Machine) copyFile(ctx context.Context, old *dbFile, path string) (f *dbFile, err error) {
	snap := old.Snapshot()
	err = copyBuckets(ctx, snap.(boltTx).ForEach, path, int(old.SizeInUse()))
	if err = errors.Join(err, snap.Close()); err != nil {
		return nil, err
	}
	defer func() {
		if p := recover(); p != nil { // etcd's answer to a file that it cannot open
			err = fmt.Errorf("open %s: %v", path, p)
		}
	}()
	return m.openFile(path), nil
}

// copier fills a new file, chunk by chunk.
type copier struct {
	ctx   context.Context
	db    *bolt.DB
	tx    *bolt.Tx
	size  int
	begun time.Time
}

func copyBuckets(ctx context.Context, each func(func([]byte, *bolt.Bucket) error) error, path string, size int) (err error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{NoFreelistSync: true, FreelistType: bolt.FreelistMapType, InitialMmapSize: size + size/4})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	c := &copier{ctx: ctx, db: db, begun: time.Now()}
	if c.tx, err = db.Begin(true); err != nil {
		return err
	}
	if err := each(c.bucket); err != nil {
		if c.tx != nil {
			_ = c.tx.Rollback()
		}
		return err
	}
	return c.tx.Commit()
}

func (c *copier) bucket(name []byte, b *bolt.Bucket) error {
	dst, err := c.tx.CreateBucketIfNotExists(name)
	if err != nil {
		return err
	}
	dst.FillPercent = 0.9 // the keys come in order; etcd's number
	return b.ForEach(func(k, v []byte) error {
		if v == nil {
			return fmt.Errorf("bucket %q holds a bucket %q", name, k)
		}
		if err := dst.Put(k, v); err != nil {
			return err
		}
		if c.size += len(k) + len(v); c.size < copyChunk {
			return nil
		}
		if err := c.next(); err != nil {
			return err
		}
		dst = c.tx.Bucket(name)
		dst.FillPercent = 0.9
		return nil
	})
}

// next makes a chunk durable, rests, and begins another.
func (c *copier) next() (err error) {
	tx := c.tx
	c.tx, c.size = nil, 0
	if err := tx.Commit(); err != nil {
		return err
	}
	select {
	case <-time.After(min(time.Since(c.begun), copyPause)):
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
	c.begun = time.Now()
	c.tx, err = c.db.Begin(true)
	return err
}

// remember makes the transaction keep what is written from now on.
func (t *writeTx) remember() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dirty = newDirtyKeys()
}

func (t *writeTx) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dirty = nil
}

// take returns what was written since the last time. All of it is visible to
// readers: the lock is held.
func (t *writeTx) take() (*dirtyKeys, error) {
	k := t.dirty
	t.dirty = newDirtyKeys()
	if k.lost {
		return nil, errors.New("the store is written faster than it can be copied")
	}
	return k, nil
}

// switchTo brings next up to date and puts it in the place of the file in use,
// under the name path. It returns how long writers were held up.
func (d *database) switchTo(ctx context.Context, next *dbFile, path string) (time.Duration, error) {
	d.tx.mu.Lock()
	next.SetTxPostLockInsideApplyHook(d.hook)
	d.tx.mu.Unlock()
	tries := 0
	for round := 0; ; {
		d.tx.mu.Lock()
		start := time.Now()
		keys, err := d.tx.take()
		if err == nil && keys.n <= finalKeys {
			if d.gate.TryLock() {
				// It is not needed yet; who reads now goes on. But nobody reads for long.
				d.gate.Unlock()
				err := d.finish(keys, next, path)
				pause := time.Since(start)
				d.tx.mu.Unlock()
				return pause, err
			}
			tries++
		} else {
			round++
		}
		d.tx.mu.Unlock()
		if err == nil {
			d.catchUp(keys, next)
		}
		switch {
		case err != nil:
			return 0, err
		case round > rounds:
			return 0, fmt.Errorf("the store is written faster than it can be copied: %d keys are left after %d rounds", keys.n, rounds)
		case tries > gateTries:
			return 0, fmt.Errorf("somebody has been reading the store for %v", gateTries*gatePause)
		case tries > 0:
			select {
			case <-time.After(gatePause):
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			return 0, ctx.Err()
		}
	}
}

// catchUp copies keys as they are now, or deletes them, durably.
func (d *database) catchUp(keys *dirtyKeys, next *dbFile) {
	src := d.cur.Load().ConcurrentReadTx()
	defer src.RUnlock()
	dst := next.BatchTx()
	for _, id := range slices.Sorted(maps.Keys(keys.buckets)) {
		b := keys.buckets[id]
		dst.LockOutsideApply()
		dst.UnsafeCreateBucket(b)
		for _, k := range slices.Sorted(maps.Keys(b.keys)) {
			copyKey(dst, src, b.Bucket, []byte(k))
		}
		dst.Unlock()
	}
	next.ForceCommit()
}

func copyKey(dst backend.BatchTx, src backend.ReadTx, b backend.Bucket, key []byte) {
	_, vs := src.UnsafeRange(b, key, nil, 1)
	switch {
	case len(vs) == 0:
		dst.UnsafeDelete(b, key)
	case b.IsSafeRangeBucket(): // keys that only grow
		dst.UnsafeSeqPut(b, key, bytes.Clone(vs[0]))
	default:
		dst.UnsafePut(b, key, bytes.Clone(vs[0]))
	}
}

// finish is the part that holds up writers; tx.mu is held.
func (d *database) finish(keys *dirtyKeys, next *dbFile, path string) error {
	old := d.cur.Load()
	next.recording.Store(true)
	d.catchUp(keys, next) // commits, with the index of what has been applied
	if err := os.Rename(next.path, path); err != nil {
		return err
	}
	next.path = path
	if err := syncDir(filepath.Dir(path)); err != nil {
		// Nobody knows which of the two files a restart would find. Now both hold
		// everything; with one more write only one would.
		panic(fmt.Sprintf("mvcc: the new database cannot be made durable: %v", err))
	}
	d.gate.Lock()
	d.use(next)
	d.gate.Unlock()
	old.recording.Store(false)
	return nil
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
