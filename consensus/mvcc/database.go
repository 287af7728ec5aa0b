package mvcc

import (
	"sync"
	"sync/atomic"

	bolt "go.etcd.io/bbolt"
	"go.etcd.io/etcd/server/v3/storage/backend"
)

// maxDirty bounds the keys that are remembered while a copy is made, some 100
// bytes each. A store that is written faster than it is copied gives the copy up.
const maxDirty = 1 << 20

// dbFile is one bbolt file, opened by etcd's backend.
type dbFile struct {
	backend.Backend
	path string
	bolt *bolt.DB // of Backend; for its statistics
	page int64    // size of a page in bytes
	// recording is set on the file in use: its commits save the applied index. The
	// others hold more or less than what has been applied.
	recording atomic.Bool
	// users counts calls that outlast the gate (see database); none begins once
	// the file has been replaced.
	users sync.WaitGroup
}

// database is a backend.Backend whose file can be replaced under the open store
// (see rewrite). Reads that have begun end on the file that they began on.
type database struct {
	cur atomic.Pointer[dbFile]
	// gate is held for reading while the shared read transaction is, and while a
	// file is being taken hold of; for writing at the moment of the switch. So its
	// order among the locks is that of the shared read transaction: behind tx.
	gate sync.RWMutex
	tx   writeTx
	rd   sharedRead
	hook func() // after the lock inside apply; guarded by tx.mu
}

var _ backend.Backend = (*database)(nil)

// boltTx is what etcd's snapshot is inside: a read transaction of bbolt.
type boltTx interface {
	DB() *bolt.DB
	ForEach(func(name []byte, b *bolt.Bucket) error) error
}

// take makes b the backend of the file.
func (f *dbFile) take(b backend.Backend) {
	f.Backend = b
	snap := b.Snapshot()
	f.bolt = snap.(boltTx).DB()
	f.page = int64(f.bolt.Info().PageSize)
	_ = snap.Close() // of a read transaction: it cannot fail
}

func newDatabase(f *dbFile) *database {
	d := &database{}
	d.tx.d, d.rd.d = d, d
	d.use(f)
	return d
}

// use makes f the file; tx.mu and gate are held, or nobody else knows d.
func (d *database) use(f *dbFile) {
	d.cur.Store(f)
	d.tx.BatchTx = f.BatchTx()
	f.recording.Store(true)
}

// hold returns the file in use, which stays open until the caller calls
// users.Done.
func (d *database) hold() *dbFile {
	d.gate.RLock()
	defer d.gate.RUnlock()
	f := d.cur.Load()
	f.users.Add(1)
	return f
}

// ReadTx implements backend.Backend.
func (d *database) ReadTx() backend.ReadTx { return &d.rd }

// BatchTx implements backend.Backend.
func (d *database) BatchTx() backend.BatchTx { return &d.tx }

// ConcurrentReadTx implements backend.Backend.
func (d *database) ConcurrentReadTx() backend.ReadTx {
	d.gate.RLock()
	defer d.gate.RUnlock()
	return d.cur.Load().ConcurrentReadTx()
}

// Snapshot implements backend.Backend. It commits, and the applied index must be
// in that commit, so the file must not be replaced meanwhile. It stays until the
// snapshot is closed: closing a bbolt database waits for its transactions.
func (d *database) Snapshot() backend.Snapshot {
	d.tx.mu.Lock()
	defer d.tx.mu.Unlock()
	return d.cur.Load().Snapshot()
}

// Hash implements backend.Backend.
func (d *database) Hash(ignores func(bucket, key []byte) bool) (uint32, error) {
	f := d.hold()
	defer f.users.Done()
	return f.Hash(ignores)
}

// Size implements backend.Backend.
func (d *database) Size() int64 { return d.cur.Load().Size() }

// SizeInUse implements backend.Backend. Unlike etcd's it counts a page as free as
// soon as the transaction that freed it is committed, and not with the next one:
// after a compaction there may be none for a long time.
func (d *database) SizeInUse() int64 {
	f := d.cur.Load()
	s := f.bolt.Stats()
	return max(0, f.Size()-int64(s.FreePageN+s.PendingPageN)*f.page)
}

// OpenReadTxN implements backend.Backend.
func (d *database) OpenReadTxN() int64 { return d.cur.Load().OpenReadTxN() }

// Defrag implements backend.Backend; it must not be used: see Machine.Defragment.
func (d *database) Defrag() error { panic("mvcc: the database's own defragmentation stops the store") }

// ForceCommit implements backend.Backend.
func (d *database) ForceCommit() { d.tx.Commit() }

// Close implements backend.Backend. Nothing may be used afterwards.
func (d *database) Close() error {
	f := d.cur.Load()
	f.users.Wait()
	return f.Close()
}

// SetTxPostLockInsideApplyHook implements backend.Backend.
func (d *database) SetTxPostLockInsideApplyHook(hook func()) {
	d.tx.mu.Lock()
	defer d.tx.mu.Unlock()
	d.hook = hook
	d.cur.Load().SetTxPostLockInsideApplyHook(hook)
}

// sharedRead is the read transaction that all share.
type sharedRead struct{ d *database }

func (r *sharedRead) RLock() {
	r.d.gate.RLock()
	r.d.cur.Load().ReadTx().RLock()
}

func (r *sharedRead) RUnlock() {
	r.d.cur.Load().ReadTx().RUnlock()
	r.d.gate.RUnlock()
}

// Callers hold RLock or the write transaction, so the file does not change.

func (r *sharedRead) UnsafeRange(b backend.Bucket, key, end []byte, limit int64) ([][]byte, [][]byte) {
	return r.d.cur.Load().ReadTx().UnsafeRange(b, key, end, limit)
}

func (r *sharedRead) UnsafeForEach(b backend.Bucket, visit func(k, v []byte) error) error {
	return r.d.cur.Load().ReadTx().UnsafeForEach(b, visit)
}

// writeTx is the write transaction. Its own lock, around the file's, is what
// keeps writers off a file that is being replaced.
type writeTx struct {
	d               *database
	mu              sync.Mutex // held from Lock... to Unlock; guards all below
	backend.BatchTx            // the file's
	dirty           *dirtyKeys // nil while no copy is being made
}

func (t *writeTx) Lock()             { t.mu.Lock(); t.BatchTx.Lock() }
func (t *writeTx) LockInsideApply()  { t.mu.Lock(); t.BatchTx.LockInsideApply() }
func (t *writeTx) LockOutsideApply() { t.mu.Lock(); t.BatchTx.LockOutsideApply() }
func (t *writeTx) Unlock()           { t.BatchTx.Unlock(); t.mu.Unlock() }

func (t *writeTx) Commit() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.BatchTx.Commit()
}

func (t *writeTx) CommitAndStop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.BatchTx.CommitAndStop()
}

func (t *writeTx) UnsafeCreateBucket(b backend.Bucket) {
	t.BatchTx.UnsafeCreateBucket(b)
	if t.dirty != nil {
		t.dirty.bucket(b)
	}
}

func (t *writeTx) UnsafeDeleteBucket(b backend.Bucket) {
	t.BatchTx.UnsafeDeleteBucket(b)
	if t.dirty != nil { // nobody does this to an open store
		t.dirty.lost = true
	}
}

func (t *writeTx) UnsafePut(b backend.Bucket, key, value []byte) {
	t.BatchTx.UnsafePut(b, key, value)
	if t.dirty != nil {
		t.dirty.add(b, key)
	}
}

func (t *writeTx) UnsafeSeqPut(b backend.Bucket, key, value []byte) {
	t.BatchTx.UnsafeSeqPut(b, key, value)
	if t.dirty != nil {
		t.dirty.add(b, key)
	}
}

func (t *writeTx) UnsafeDelete(b backend.Bucket, key []byte) {
	t.BatchTx.UnsafeDelete(b, key)
	if t.dirty != nil {
		t.dirty.add(b, key)
	}
}

// dirtyKeys is what has been written since a copy was begun, or since the last
// round of bringing it up to date.
type dirtyKeys struct {
	buckets map[backend.BucketID]*dirtyBucket
	n       int
	lost    bool // more than can be remembered
}

type dirtyBucket struct {
	backend.Bucket
	keys map[string]struct{}
}

func newDirtyKeys() *dirtyKeys {
	return &dirtyKeys{buckets: map[backend.BucketID]*dirtyBucket{}}
}

func (k *dirtyKeys) bucket(b backend.Bucket) *dirtyBucket {
	d := k.buckets[b.ID()]
	if d == nil {
		d = &dirtyBucket{b, map[string]struct{}{}}
		k.buckets[b.ID()] = d
	}
	return d
}

func (k *dirtyKeys) add(b backend.Bucket, key []byte) {
	if k.lost {
		return
	}
	d := k.bucket(b)
	if _, ok := d.keys[string(key)]; ok {
		return
	}
	if k.n == maxDirty {
		k.buckets, k.lost = map[backend.BucketID]*dirtyBucket{}, true
		return
	}
	d.keys[string(key)] = struct{}{}
	k.n++
}
