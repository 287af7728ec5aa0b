package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lni/dragonboat/v4"
	"github.com/lni/dragonboat/v4/config"
	"github.com/lni/dragonboat/v4/raftio"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/pkg/v3/idutil"

	"skein.io/skein/consensus/etcdapi"
	"skein.io/skein/consensus/internal/logbridge"
	"skein.io/skein/consensus/internal/raftlog"
	"skein.io/skein/consensus/shard"
)

const (
	// deploymentID keeps the Raft traffic of other programs apart.
	deploymentID = 0x5ce1
	// founder is the replica ID of a shard's first replica. Every other one joins
	// as non-voting (see replicaConfig).
	founder uint64 = 1
)

// Host is this node's part in the store.
type Host struct {
	cfg    Config
	log    *slog.Logger
	nh     *dragonboat.NodeHost
	reg    *registry
	trans  *transport
	ids    *idutil.Generator
	terms  *termFile
	meters *meters
	gen    atomic.Pointer[generation]
	disk   *prober
	guard  *guard
	late   *lateness

	ctx    context.Context // ends when Close begins
	cancel context.CancelFunc
	wg     sync.WaitGroup
	opened chan struct{} // closed at the end of New
	// beforePin lets a test slow a shard's part of a cut down; set before use.
	beforePin func(shardName string)

	defragging atomic.Bool // a database of this node is being rewritten by order

	// op serialises starting and stopping replicas. It is never taken by a
	// callback of dragonboat.
	op sync.Mutex

	mu       sync.RWMutex // guards all below
	replicas map[shard.ID]*replica
	subs     map[chan struct{}]bool
	closed   bool
	// endpoints are the addresses of etcd's API by shard.
	endpoints map[shard.ID][]string
}

// New opens the store's directory, starts the transport and every replica that
// the directory holds. It fails if the address is in use, the directory is
// locked by another process, or belongs to another node.
func New(cfg Config) (*Host, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	log := logbridge.OrDiscard(cfg.Logger).With("component", "store")
	logbridge.Dragonboat(log)
	raftDir := filepath.Join(cfg.Dir, "log")
	if err := os.MkdirAll(raftDir, 0o700); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	if err := adoptHostname(raftDir); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	h := &Host{cfg: cfg, log: log, opened: make(chan struct{}), replicas: map[shard.ID]*replica{}, subs: map[chan struct{}]bool{}}
	h.ctx, h.cancel = context.WithCancel(context.Background())
	h.meters, h.late = newMeters(cfg.Shards), newLateness(h.cfg.RequestTimeout)
	var err error
	if h.terms, err = openTerms(filepath.Join(cfg.Dir, "term")); err != nil {
		return nil, err
	}
	gen, err := loadGeneration(&h.cfg)
	if err != nil {
		return nil, err
	}
	h.gen.Store(gen)
	h.disk = &prober{measure: cfg.MeasureDisk, judge: diskJudge{rules: cfg.Disk}}
	h.reg, h.guard = newRegistry(cfg.Resolve), newGuard()
	h.trans = newTransport(&h.cfg, log)
	h.trans.onCall, h.trans.onRaft, h.trans.hears, h.trans.member = h.answer, h.heard, h.hears, h.reg.lookup
	h.trans.stamp = func() uint64 { return h.gen.Load().stamp }
	if h.nh, err = newNodeHost(h, raftDir); err != nil {
		return nil, fmt.Errorf("store in %s: %w", cfg.Dir, err)
	}
	h.ids = idutil.NewGenerator(uint16(fnv(h.nh.ID())), time.Now())
	if err := h.restart(); err != nil {
		err = errors.Join(err, h.shutDown())
		h.wg.Wait()
		return nil, err
	}
	close(h.opened)
	h.wg.Go(h.defragLoop)
	h.wg.Go(h.probeDisk)
	if len(h.cfg.Etcd.Addresses) > 0 {
		h.wg.Go(h.serveLoop)
	}
	return h, nil
}

// newNodeHost turns dragonboat's panics into errors: it panics on a directory
// that it cannot use.
func newNodeHost(h *Host, dir string) (nh *dragonboat.NodeHost, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("open the log: %v", p)
		}
	}()
	nhc := config.NodeHostConfig{
		DeploymentID:        deploymentID,
		NodeHostDir:         dir,
		WALDir:              dir,
		RTTMillisecond:      uint64(h.cfg.RTT.Milliseconds()),
		RaftAddress:         h.cfg.ListenAddr,
		NodeHostID:          h.cfg.NodeHostID,
		RaftEventListener:   h,
		SystemEventListener: h,
	}
	nhc.Expert.NodeRegistryFactory = h.reg
	nhc.Expert.TransportFactory = h.trans
	// One step worker for all shards, so that what they save at the same time is one
	// record of one log, with one fdatasync.
	nhc.Expert.LogDBFactory = raftlog.Factory{Logger: h.log, OnSync: func(d time.Duration) { h.meters.sync.Observe(d.Seconds()) }}
	nhc.Expert.LogDB = config.GetTinyMemLogDBConfig()
	nhc.Expert.LogDB.Shards = 1
	nhc.Expert.Engine = config.EngineConfig{ExecShards: 1, CommitShards: 1, ApplyShards: 2, SnapshotShards: 2, CloseShards: 1}
	return dragonboat.NewNodeHost(nhc)
}

// restart starts the newest replica of every shard on disk, and deletes older
// ones: those were replaced after they had been removed.
func (h *Host) restart() error {
	newest := map[shard.ID]uint64{}
	logs := h.nh.GetNodeHostInfo(dragonboat.NodeHostInfoOption{}).LogInfo
	for _, i := range logs {
		newest[shard.ID(i.ShardID)] = max(newest[shard.ID(i.ShardID)], i.ReplicaID)
	}
	ctx, cancel := context.WithTimeout(h.ctx, time.Minute)
	defer cancel()
	for _, i := range logs {
		if newest[shard.ID(i.ShardID)] != i.ReplicaID {
			if err := h.removeData(ctx, shard.ID(i.ShardID), i.ReplicaID); err != nil {
				return err
			}
		}
	}
	if err := h.removeOrphans(logs); err != nil {
		return err
	}
	for id, replicaID := range newest {
		s, ok := h.cfg.Shards.ByID(id)
		if !ok {
			return fmt.Errorf("store: the directory holds shard %d, which this version does not know", id)
		}
		if err := h.start(s, replicaID, nil, false); err != nil {
			return err
		}
	}
	return nil
}

// Bootstrap makes this node the only voter of every shard. It is for the first
// node of a new cluster; on a node that has been bootstrapped it does nothing.
// On a node that has joined a cluster it fails.
func (h *Host) Bootstrap(ctx context.Context) error {
	if err := h.found(); err != nil {
		return err
	}
	for _, s := range h.cfg.Shards.Shards() {
		r, err := h.byName(s.Name)
		if err == nil {
			err = r.ReadIndex(patient(ctx))
		}
		if err != nil {
			return fmt.Errorf("bootstrap shard %s: %w", s.Name, err)
		}
	}
	return nil
}

func (h *Host) found() error {
	h.op.Lock()
	defer h.op.Unlock()
	for _, s := range h.cfg.Shards.Shards() {
		if r := h.replica(s.ID); r != nil {
			if r.id != founder {
				return fmt.Errorf("bootstrap shard %s: this node holds replica %d of an existing cluster", s.Name, r.id)
			}
			continue
		}
		if err := h.start(s, founder, map[uint64]dragonboat.Target{founder: h.NodeHostID()}, false); err != nil {
			return err
		}
	}
	return nil
}

// StartReplica starts a replica that the leader has added to the membership. It
// joins as non-voting. Idempotent. A higher replica ID than the one here means
// that the older was removed, so it is deleted first (ErrNotRemoved if nobody
// confirms that); a lower one is refused.
func (h *Host) StartReplica(ctx context.Context, shardName string, replicaID uint64) error {
	s, ok := h.cfg.Shards.ByName(shardName)
	if !ok {
		return fmt.Errorf("%w: %q", ErrUnknownShard, shardName)
	}
	h.op.Lock()
	defer h.op.Unlock()
	if h.ctx.Err() != nil {
		return ErrClosed
	}
	if r := h.replica(s.ID); r != nil {
		switch {
		case r.id == replicaID && r.ctx.Err() == nil:
			return nil
		case r.id > replicaID:
			return fmt.Errorf("start replica %d of shard %s: this node holds the newer replica %d", replicaID, s.Name, r.id)
		case r.id == replicaID:
			h.stop(r) // it is ending anyway
		}
	}
	for _, old := range h.onDisk(s.ID) {
		if old < replicaID {
			if !h.removed(ctx, s.ID, old) {
				return fmt.Errorf("start replica %d of shard %s: %w: replica %d", replicaID, s.Name, ErrNotRemoved, old)
			}
			if r := h.replica(s.ID); r != nil {
				h.stop(r)
			}
			if err := h.removeData(ctx, s.ID, old); err != nil {
				return err
			}
		}
	}
	return h.start(s, replicaID, nil, !h.nh.HasNodeInfo(uint64(s.ID), replicaID))
}

// StopReplica stops this node's replica of a shard, if its ID is replicaID or
// lower: an order that was overtaken by a newer StartReplica does nothing. With
// removeData everything of it is deleted: only for a replica that has been
// removed from the membership, since one that comes back without its log would
// break Raft's promises. Idempotent.
func (h *Host) StopReplica(ctx context.Context, shardName string, replicaID uint64, removeData bool) error {
	s, ok := h.cfg.Shards.ByName(shardName)
	if !ok {
		return fmt.Errorf("%w: %q", ErrUnknownShard, shardName)
	}
	h.op.Lock()
	defer h.op.Unlock()
	if h.ctx.Err() != nil {
		return ErrClosed
	}
	if r := h.replica(s.ID); r != nil && r.id <= replicaID {
		h.stop(r)
	}
	if !removeData {
		return nil
	}
	for _, id := range h.onDisk(s.ID) {
		if id > replicaID {
			continue
		}
		if err := h.removeData(ctx, s.ID, id); err != nil {
			return err
		}
	}
	return nil
}

// start runs a replica; op is held, or nobody else knows h yet.
func (h *Host) start(s shard.Shard, id uint64, initial map[uint64]dragonboat.Target, join bool) error {
	r := newReplica(h, s, id)
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return ErrClosed
	}
	h.replicas[s.ID] = r
	h.mu.Unlock()
	if err := r.start(initial, join); err != nil {
		r.stop()
		h.mu.Lock()
		delete(h.replicas, s.ID)
		h.mu.Unlock()
		return fmt.Errorf("start replica %d of shard %s: %w", id, s.Name, err)
	}
	h.log.Info("replica started", "shard", s.Name, "replica", id, "applied", r.machine.Applied())
	h.notify()
	return nil
}

// stop ends a replica and waits for it; op is held.
func (h *Host) stop(r *replica) {
	r.stop()
	h.mu.Lock()
	if h.replicas[r.shard.ID] == r {
		delete(h.replicas, r.shard.ID)
	}
	h.mu.Unlock()
	h.notify()
}

func (h *Host) onDisk(id shard.ID) (replicas []uint64) {
	info := h.nh.GetNodeHostInfo(dragonboat.NodeHostInfoOption{})
	if info == nil {
		return nil
	}
	for _, i := range info.LogInfo {
		if i.ShardID == uint64(id) {
			replicas = append(replicas, i.ReplicaID)
		}
	}
	return replicas
}

func (h *Host) removeData(ctx context.Context, id shard.ID, replicaID uint64) error {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Minute)
		defer cancel()
	}
	if err := h.nh.SyncRemoveData(ctx, uint64(id), replicaID); err != nil {
		return fmt.Errorf("delete the log of replica %d of shard %d: %w", replicaID, id, err)
	}
	if err := os.RemoveAll(h.machineDir(id, replicaID)); err != nil {
		return fmt.Errorf("delete the data of replica %d of shard %d: %w", replicaID, id, err)
	}
	h.log.Info("replica deleted", "shard", id, "replica", replicaID)
	return nil
}

func (h *Host) machineDir(id shard.ID, replicaID uint64) string {
	return replicaDir(h.cfg.Dir, id, replicaID)
}

func (h *Host) replica(id shard.ID) *replica {
	h.mu.RLock()
	defer h.mu.RUnlock()
	return h.replicas[id]
}

func (h *Host) byName(name string) (*replica, error) {
	s, ok := h.cfg.Shards.ByName(name)
	if !ok {
		return nil, fmt.Errorf("%w: %q", ErrUnknownShard, name)
	}
	if r := h.replica(s.ID); r != nil && r.started.Load() {
		return r, nil
	}
	return nil, fmt.Errorf("%w: %s", ErrNoReplica, name)
}

// NodeHostID is this node's name in the memberships.
func (h *Host) NodeHostID() string { return h.nh.ID() }

// Addr is the address that the transport listens on.
func (h *Host) Addr() string { return h.trans.Addr() }

// Shards is the shard table in use.
func (h *Host) Shards() shard.Table { return h.cfg.Shards }

// Client returns an in-process client of a shard, false when this node holds no
// replica of it. All callers share one; it ends with its replica (its watches
// end with ErrNoLeader, its requests with ErrStopped), so after a change (see
// Subscribe) ask again. Do not close it.
func (h *Host) Client(shardName string) (*kubernetes.Client, bool) {
	r, err := h.byName(shardName)
	if err != nil || r.ctx.Err() != nil {
		return nil, false
	}
	return r.client, true
}

// Replica is what a server of etcd's API needs of this node's replica of a shard;
// false when it holds none. It ends with the replica, as a Client does.
func (h *Host) Replica(shardName string) (etcdapi.Replica, bool) {
	r, err := h.byName(shardName)
	if err != nil || r.ctx.Err() != nil {
		return nil, false
	}
	return r, true
}

// Ready reports whether this node's replica of the shard has caught up since it
// started and is in contact with a leader.
func (h *Host) Ready(shardName string) bool {
	r, err := h.byName(shardName)
	return err == nil && r.isReady()
}

// Subscribe returns a channel that gets a value after something in Status may
// have changed; several changes may come as one. cancel ends it.
func (h *Host) Subscribe() (changes <-chan struct{}, cancel func()) {
	c := make(chan struct{}, 1)
	h.mu.Lock()
	h.subs[c] = true
	h.mu.Unlock()
	return c, func() {
		h.mu.Lock()
		delete(h.subs, c)
		h.mu.Unlock()
	}
}

func (h *Host) notify() {
	h.mu.RLock()
	defer h.mu.RUnlock()
	for c := range h.subs {
		select {
		case c <- struct{}{}:
		default:
		}
	}
}

// Close hands over the leaderships that this node holds, as far as ctx allows,
// stops all replicas and waits for everything. Idempotent.
func (h *Host) Close(ctx context.Context) error {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return nil
	}
	h.closed = true
	h.mu.Unlock()
	h.handOver(ctx)
	err := h.shutDown()
	h.wg.Wait() // without op: OnRemoved may be waiting for it
	return err
}

func (h *Host) shutDown() error {
	h.op.Lock()
	defer h.op.Unlock()
	h.mu.Lock()
	h.closed = true
	h.mu.Unlock()
	h.cancel()
	h.mu.RLock()
	var rs []*replica
	for _, r := range h.replicas {
		rs = append(rs, r)
	}
	h.mu.RUnlock()
	for _, r := range rs {
		h.stop(r)
	}
	h.trans.cancel() // no dial may hold up what follows
	return closeNodeHost(h.nh)
}

func closeNodeHost(nh *dragonboat.NodeHost) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("close the log: %v", p)
		}
	}()
	nh.Close()
	return nil
}

// handOver transfers the leaderships held here to another voter: without, the
// others notice only after an election timeout.
func (h *Host) handOver(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 2*h.cfg.electionTimeout())
	defer cancel()
	var wg sync.WaitGroup
	h.mu.RLock()
	for _, r := range h.replicas {
		wg.Go(func() {
			if err := r.handOver(ctx, 0); err != nil && !errors.Is(err, errNothingToHandOver) {
				h.log.Info("leadership not handed over", "shard", r.shard.Name, "error", err)
			}
		})
	}
	h.mu.RUnlock()
	wg.Wait()
}

func fnv(s string) (v uint32) {
	v = 2166136261
	for i := range len(s) {
		v = (v ^ uint32(s[i])) * 16777619
	}
	return v
}

var (
	_ raftio.IRaftEventListener   = (*Host)(nil)
	_ raftio.ISystemEventListener = (*Host)(nil)
)
