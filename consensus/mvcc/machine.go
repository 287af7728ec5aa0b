package mvcc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coreos/go-semver/semver"
	dsm "github.com/lni/dragonboat/v4/statemachine"
	bolt "go.etcd.io/bbolt"
	"go.etcd.io/etcd/pkg/v3/traceutil"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3alarm"
	"go.etcd.io/etcd/server/v3/etcdserver/cindex"
	"go.etcd.io/etcd/server/v3/lease"
	"go.etcd.io/etcd/server/v3/storage/backend"
	etcdmvcc "go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"go.uber.org/zap"

	"skein.io/skein/consensus/internal/logbridge"
)

// The keys of the fences in the backend's meta bucket, beside etcd's own.
var (
	leaderKey = []byte("skein_leader_term")
	fenceKey  = []byte("skein_fence_term")
	holdKey   = []byte("skein_hold")
)

const (
	// minLeaseTTL is a constant because it decides what is stored: a value that
	// differs between replicas would let them drift apart. Seconds.
	minLeaseTTL = 1
	// Lease bookkeeping of the primary; etcd's defaults.
	leaseCheckpointInterval = 5 * time.Minute
	leaseRetryInterval      = 3 * time.Second
	// compactionBatch is how many revisions a compaction looks at in one go, with
	// writers waiting. Etcd's 1000 hold them up twice as long (measured: p99 of a put
	// 27 ms, with 300 15 ms), 100 take twice the time again.
	compactionBatch = 300
)

// The Raft log is what makes a write durable: a crash applies again what the
// database has not committed. So it commits seldom, as every commit costs two syncs
// of the disk, and holds up the store meanwhile: after an interval, so many operations
// (reads copy what is not committed), or so many bytes of commands, which bounds
// memory; and before the log may forget an entry (Sync).
const (
	commitInterval   = time.Second
	commitOperations = 512
	commitBytes      = 4 << 20
)

// Config of a Machine.
type Config struct {
	// Dir holds this replica's database and nothing else. Created when missing.
	Dir string
	// Logger; nil discards.
	Logger *slog.Logger
	// OnLeader is called on the apply goroutine after a Leader command with a new
	// term has been applied: everything of older epochs is applied or refused. It
	// must not block. Optional.
	OnLeader func(term, replica uint64)
	// OnFence is called likewise after a Fence command raised the term. Optional.
	OnFence func(term uint64)
	// OnApplied is called likewise with the time that a batch of entries took.
	// Optional.
	OnApplied func(time.Duration)
	// OnHold is called likewise after a hold began, with its ID, or ended, with 0.
	// Optional.
	OnHold func(id uint64)
	// Checkpoint proposes the remaining lifetimes of leases while this replica is
	// the primary lessor. Optional.
	Checkpoint lease.Checkpointer
}

// Machine is one replica of one shard.
type Machine struct {
	cfg     Config
	log     *slog.Logger
	zap     *zap.Logger
	waiters *Waiters

	// mu is held for reading by every use of the store and for writing by Close
	// alone: etcd's backend ends the process when it is used after it was closed.
	mu     sync.RWMutex
	closed bool
	opened chan struct{}   // closed by Open
	life   context.Context // ends when Close begins
	end    context.CancelFunc

	kv     etcdmvcc.WatchableKV
	keys   func() keyIndex // of kv; nil if it cannot be found
	counts counts          // of ranges of kv
	lessor lease.Lessor
	index  cindex.ConsistentIndexer

	beMu       sync.RWMutex // guards be, which a snapshot replaces, and stopDefrag
	be         *database
	stopDefrag context.CancelFunc // nil while there is none
	// installed is held for reading by who uses the database itself, beside the log and
	// etcd's store, and for writing while a snapshot replaces it: etcd's backend ends the
	// process when it is used after it was closed. Such uses may take as long as a commit
	// or a hash; the apply goroutine, whose the replacing is, needs no lock.
	installed sync.RWMutex
	// replacing is held by who puts another file in the place of the database's:
	// a defragmentation or a snapshot.
	replacing  sync.Mutex
	installing atomic.Bool   // a snapshot is
	gen        atomic.Uint64 // newest generation of the file
	lastDefrag atomic.Pointer[Defrag]

	alarms         atomic.Pointer[v3alarm.AlarmStore]
	noSpace        atomic.Bool // a NOSPACE alarm is active
	lastCompaction atomic.Pointer[Compaction]

	retired sync.WaitGroup // replaced files that are being closed

	leader     atomic.Uint64
	fence      atomic.Uint64
	hold       atomic.Uint64
	applied    atomic.Uint64
	bytes      atomic.Uint64
	committed  uint64 // of bytes, by size; of the apply goroutine
	recoveries atomic.Uint64

	// Of the apply goroutine: the commands of the entry being applied, and where a restart
	// has to go on.
	parts  [][]byte
	resume part
	// The entry being applied, and how many of its commands are, with the present one.
	// Changed by the apply goroutine alone.
	entry, commands atomic.Uint64
	held            part // what the write transaction holds of an entry; guarded by its lock
}

var _ dsm.IOnDiskStateMachine = (*Machine)(nil)

// New returns a machine; nothing happens before dragonboat calls Open.
func New(cfg Config) *Machine {
	log := logbridge.OrDiscard(cfg.Logger)
	m := &Machine{cfg: cfg, log: log, zap: logbridge.Zap(log), waiters: NewWaiters(), opened: make(chan struct{})}
	m.life, m.end = context.WithCancel(context.Background())
	return m
}

// etcd36 makes the lessor persist checkpoints, as a 3.6 cluster does.
type etcd36 struct{}

func (etcd36) Version() *semver.Version { return &semver.Version{Major: 3, Minor: 6} }

// openFile opens a database; nothing records the applied index in it yet.
func (m *Machine) openFile(path string) *dbFile {
	f := &dbFile{path: path}
	bc := backend.DefaultBackendConfig(m.zap)
	bc.Path = path
	bc.BackendFreelistType = bolt.FreelistMapType
	bc.BatchInterval, bc.BatchLimit = commitInterval, commitOperations
	bc.Hooks = backend.NewHooks(func(tx backend.UnsafeReadWriter) {
		if f.recording.Load() {
			m.index.UnsafeSave(tx)
			m.savePart(tx)
		}
	})
	f.take(backend.New(bc))
	return f
}

// Open implements IOnDiskStateMachine: it returns the index of the last entry
// that the database holds.
func (m *Machine) Open(<-chan struct{}) (uint64, error) {
	if err := os.MkdirAll(m.cfg.Dir, 0o700); err != nil {
		return 0, fmt.Errorf("mvcc: %w", err)
	}
	gen, err := m.newestGeneration()
	if err != nil {
		return 0, err
	}
	m.index = cindex.NewConsistentIndex(nil)
	m.gen.Store(gen)
	_, missing := os.Stat(m.path(gen))
	be := newDatabase(m.openFile(m.path(gen)))
	if missing != nil {
		if err := errors.Join(syncDir(m.cfg.Dir), syncDir(filepath.Dir(m.cfg.Dir))); err != nil {
			return 0, fmt.Errorf("mvcc: %w", err)
		}
	}
	schema.CreateMetaBucket(be.BatchTx())
	m.index.SetBackend(be)
	index := m.index.ConsistentIndex()
	// The lessor before the store, which attaches the keys to their leases.
	m.lessor = lease.NewLessor(m.zap, be, etcd36{}, lease.LessorConfig{
		MinLeaseTTL:                minLeaseTTL,
		CheckpointInterval:         leaseCheckpointInterval,
		CheckpointPersist:          true,
		ExpiredLeasesRetryInterval: leaseRetryInterval,
	})
	m.kv = etcdmvcc.New(m.zap, be, m.lessor, etcdmvcc.StoreConfig{CompactionBatchLimit: compactionBatch})
	if m.keys = indexOf(m.kv); m.keys != nil {
		m.kv = counted{m.kv, &m.counts, m.keys}
		m.lessor.SetRangeDeleter(func() lease.TxnDelete { return m.kv.Write(traceutil.TODO()) })
	}
	if m.cfg.Checkpoint != nil {
		m.lessor.SetCheckpointer(m.cfg.Checkpoint)
	}
	m.loadFences(be)
	if err := m.loadPart(be, index); err != nil {
		return 0, err
	}
	if err := m.loadAlarms(be); err != nil {
		return 0, fmt.Errorf("mvcc: read the alarms: %w", err)
	}
	be.SetTxPostLockInsideApplyHook(m.postLock)
	m.beMu.Lock()
	m.be = be
	m.beMu.Unlock()
	m.applied.Store(index)
	close(m.opened)
	return index, nil
}

func (m *Machine) loadFences(be backend.Backend) {
	tx := be.ReadTx()
	tx.RLock()
	defer tx.RUnlock()
	for key, v := range map[*[]byte]*atomic.Uint64{&leaderKey: &m.leader, &fenceKey: &m.fence, &holdKey: &m.hold} {
		_, vs := tx.UnsafeRange(schema.Meta, *key, nil, 0)
		v.Store(0)
		if len(vs) == 1 && len(vs[0]) == 8 {
			v.Store(binary.BigEndian.Uint64(vs[0]))
		}
	}
}

// postLock runs when the entry being applied takes the lock of the write
// transaction. Only from there on the transaction may record the entry's index:
// a commit before it must not claim that the entry is in it.
func (m *Machine) postLock() {
	index, term := m.index.ConsistentApplyingIndex()
	if index > m.index.UnsafeConsistentIndex() {
		m.index.SetConsistentIndex(index, term)
	}
	m.held = part{m.entry.Load(), m.commands.Load()}
}

// Lookup implements IOnDiskStateMachine. Reads go straight to the store after
// dragonboat has confirmed the read index, so there is nothing to look up.
func (m *Machine) Lookup(any) (any, error) { return nil, nil }

// Sync implements IOnDiskStateMachine: what has been applied is durable when it
// returns.
func (m *Machine) Sync() error {
	return m.beside(func(be *database) error { be.ForceCommit(); return nil })
}

// beside runs f with the database, which no snapshot replaces meanwhile.
func (m *Machine) beside(f func(*database) error) error {
	m.installed.RLock()
	defer m.installed.RUnlock()
	return f(m.backend())
}

// Close implements IOnDiskStateMachine. It waits for readers.
func (m *Machine) Close() error {
	m.end()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.closed {
		return nil
	}
	m.closed = true
	m.waiters.failBelow(math.MaxUint64, ErrClosed)
	if m.backend() == nil { // never opened
		return nil
	}
	m.lessor.Stop()
	err := m.kv.Close()
	err = errors.Join(err, m.backend().Close())
	m.retired.Wait()
	if err != nil {
		return fmt.Errorf("mvcc: close %s: %w", m.cfg.Dir, err)
	}
	return nil
}

func (m *Machine) backend() *database {
	m.beMu.RLock()
	defer m.beMu.RUnlock()
	return m.be
}

// Opened is closed when the store can be read.
func (m *Machine) Opened() <-chan struct{} { return m.opened }

// Waiters is where the proposers of this replica wait.
func (m *Machine) Waiters() *Waiters { return m.waiters }

// Applied is the index of the last applied entry.
func (m *Machine) Applied() uint64 { return m.applied.Load() }

// AppliedBytes counts the bytes of the commands applied since Open.
func (m *Machine) AppliedBytes() uint64 { return m.bytes.Load() }

// LeaderTerm is the epoch: the newest applied Leader term, 0 before the first.
func (m *Machine) LeaderTerm() uint64 { return m.leader.Load() }

// FenceTerm is the newest applied Fence term, 0 before the first.
func (m *Machine) FenceTerm() uint64 { return m.fence.Load() }

// Hold is the ID of the hold in force, 0 for none.
func (m *Machine) Hold() uint64 { return m.hold.Load() }

// Recoveries counts the snapshots installed since Open.
func (m *Machine) Recoveries() uint64 { return m.recoveries.Load() }
