package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/lni/dragonboat/v4"
	"github.com/lni/dragonboat/v4/client"
	"github.com/lni/dragonboat/v4/config"
	dsm "github.com/lni/dragonboat/v4/statemachine"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/v3/kubernetes"

	"skein.io/skein/consensus/etcdapi"
	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/consensus/shard"
)

const (
	// maxRequest is etcd's limit of a request with its header, in bytes.
	maxRequest = 1536 << 10
	// retryPause bounds how soon a request that found no leader is tried again; a
	// new leader wakes it earlier.
	retryPause = 20 * time.Millisecond
	// unloadTimeout is how long the start of a replica waits for the end of the one
	// before.
	unloadTimeout = 10 * time.Second
)

// began is the origin of moments in atomic integers. They are differences, hence of
// the monotonic clock: a jump of the wall clock must not look like lost contact.
var began = time.Now()

// replica is this node's replica of one shard. It implements etcdapi.Replica.
type replica struct {
	h       *Host
	shard   shard.Shard
	id      uint64
	log     *slog.Logger
	machine *mvcc.Machine
	meter   *meter
	session *client.Session
	client  *kubernetes.Client

	ctx    context.Context // ends when the replica is to stop
	cancel context.CancelFunc
	wg     sync.WaitGroup
	stops  sync.Once

	started    atomic.Bool   // the local state is open
	contact    atomic.Int64  // when a leader was last heard, or this start: nanoseconds since began
	heard      atomic.Bool   // a leader was, or this replica was it
	primary    atomic.Uint64 // epoch in which this replica is the primary lessor
	caughtUp   atomic.Bool   // a linearizable read has succeeded since the start
	membership atomic.Pointer[dragonboat.Membership]
	memberKick chan struct{}
	removal    chan string // the reason, once

	alarmKick   chan struct{} // the shard has reached its limit
	defragTried atomic.Pointer[time.Time]

	reads  reads
	gather gather
	// mayBatch is what Config.Batch said last.
	mayBatch atomic.Bool

	mu      sync.Mutex    // guards leader, term, changed
	leader  uint64        // replica ID, 0 when unknown
	term    uint64        // the Raft term in which it leads
	changed chan struct{} // closed and replaced when any of this or the epoch changes
}

var _ etcdapi.Replica = (*replica)(nil)

func newReplica(h *Host, s shard.Shard, id uint64) *replica {
	r := &replica{
		h: h, shard: s, id: id, meter: h.meters.of[s.ID], log: h.log.With("shard", s.Name, "replica", id),
		memberKick: make(chan struct{}, 1), removal: make(chan string, 1), alarmKick: make(chan struct{}, 1), changed: make(chan struct{}),
	}
	r.ctx, r.cancel = context.WithCancel(h.ctx)
	r.mayBatch.Store(h.cfg.Batch())
	r.contact.Store(int64(time.Since(began)))
	r.session = h.nh.GetNoOPSession(uint64(s.ID))
	r.machine = mvcc.New(mvcc.Config{
		Dir: h.machineDir(s.ID, id), Logger: r.log,
		OnLeader:   func(uint64, uint64) { r.wake() },
		OnHold:     func(uint64) { r.wake() },
		Checkpoint: r.checkpointLeases,
		OnApplied:  func(d time.Duration) { h.meters.of[s.ID].apply.Observe(d.Seconds()) },
	})
	r.client = etcdapi.NewClient(r, h.cfg.WatchProgress, r.log)
	return r
}

// start runs the replica; it returns when the local state is open.
func (r *replica) start(initial map[uint64]dragonboat.Target, join bool) (err error) {
	defer func() {
		if p := recover(); p != nil { // dragonboat's answer to a log that it cannot read
			err = fmt.Errorf("replica %d: %v", r.id, p)
		}
	}()
	c := r.h.cfg
	raft := config.Config{
		ShardID: uint64(r.shard.ID), ReplicaID: r.id,
		ElectionRTT: c.ElectionRTT, HeartbeatRTT: c.HeartbeatRTT, CheckQuorum: true, PreVote: true,
		SnapshotEntries: c.SnapshotEntries, CompactionOverhead: c.CompactionOverhead,
		OrderedConfigChange: true, WaitReady: true,
		// True for the whole life of every replica but the founder. Its log begins
		// with its being added as non-voting, and a replay of that entry panics
		// without the flag; a promotion that is in the log or in a snapshot makes
		// it a voter again.
		IsNonVoting: r.id != founder,
	}
	machine := func(uint64, uint64) dsm.IOnDiskStateMachine { return r.machine }
	// A replica that was stopped a moment ago is still being unloaded.
	for end := time.Now().Add(unloadTimeout); ; time.Sleep(commandPause) {
		err = r.h.nh.StartOnDiskReplica(initial, join, machine, raft)
		if !errors.Is(err, dragonboat.ErrShardAlreadyExist) || time.Now().After(end) {
			break
		}
	}
	if err != nil {
		return err
	}
	select {
	case <-r.machine.Opened():
	case <-r.ctx.Done():
		return ErrClosed
	}
	r.started.Store(true)
	r.wg.Go(r.leadershipLoop)
	r.wg.Go(r.expiryLoop)
	r.wg.Go(r.holdLoop)
	r.wg.Go(r.membershipLoop)
	r.wg.Go(r.contactLoop)
	r.wg.Go(r.logSizeLoop)
	r.wg.Go(r.spaceLoop)
	r.h.wg.Go(r.removalLoop)
	r.wake()
	return nil
}

// stop ends the replica; what waits on it gets an error. Idempotent.
func (r *replica) stop() {
	r.stops.Do(func() {
		r.cancel()
		r.wake()
		r.machine.Waiters().Abandon(mvcc.ErrClosed)
		_ = r.client.Close()
		err := r.h.nh.StopReplica(uint64(r.shard.ID), r.id)
		if err != nil && !errors.Is(err, dragonboat.ErrShardNotFound) && !errors.Is(err, dragonboat.ErrClosed) {
			r.log.Warn("cannot stop the replica", "error", err)
		}
	})
	r.wg.Wait()
}

// Shard implements etcdapi.Replica.
func (r *replica) Shard() shard.Shard { return r.shard }

// ID implements etcdapi.Replica.
func (r *replica) ID() uint64 { return r.id }

// Machine implements etcdapi.Replica.
func (r *replica) Machine() *mvcc.Machine { return r.machine }

// Done implements etcdapi.Replica.
func (r *replica) Done() <-chan struct{} { return r.ctx.Done() }

// NextID implements etcdapi.Replica.
func (r *replica) NextID() uint64 { return r.h.ids.Next() }

// ElectionTimeout implements etcdapi.Replica.
func (r *replica) ElectionTimeout() time.Duration { return r.h.cfg.electionTimeout() }

// Leader implements etcdapi.Replica.
func (r *replica) Leader() (replicaID, term uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.leader, r.term
}

// Leads implements etcdapi.Replica.
func (r *replica) Leads() bool {
	leader, _ := r.Leader()
	return leader == r.id
}

// SinceContact implements etcdapi.Replica.
func (r *replica) SinceContact() time.Duration {
	if r.Leads() { // CheckQuorum deposes a leader that is cut off
		return 0
	}
	return time.Since(began) - time.Duration(r.contact.Load())
}

func (r *replica) isReady() bool {
	leader, _ := r.Leader()
	return r.ctx.Err() == nil && r.caughtUp.Load() && leader != 0 && r.SinceContact() < cutOff*r.ElectionTimeout() && !r.corrupt()
}

// wait returns the channel that is closed at the next change of leader or epoch.
func (r *replica) wait() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.changed
}

func (r *replica) wake() {
	r.mu.Lock()
	close(r.changed)
	r.changed = make(chan struct{})
	r.mu.Unlock()
}

func (r *replica) deadline(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, r.h.cfg.RequestTimeout)
}

// ticks is a timeout that dragonboat accepts: at least one tick.
func (r *replica) ticks(ctx context.Context) time.Duration {
	d, _ := ctx.Deadline()
	return max(time.Until(d), r.h.cfg.RTT)
}

// Propose implements etcdapi.Replica.
func (r *replica) Propose(ctx context.Context, q *pb.InternalRaftRequest) (res mvcc.Result, err error) {
	m, start := r.meter, time.Now()
	m.pending.Add(1)
	defer func() { m.end(start, err) }()
	if err := r.unreachable(); err != nil {
		return mvcc.Result{}, err
	}
	if err := r.checkSpace(q); err != nil {
		return mvcc.Result{}, err
	}
	res, err = r.propose(ctx, q, 0)
	if errors.Is(err, rpctypes.ErrGRPCNoSpace) {
		err = r.spaceError()
	}
	return res, err
}

// propose replicates a request and returns its local result. A request that is
// caught by a change of leader is proposed again in the new epoch, which cannot
// apply it twice (see package mvcc), unless it is bound to an epoch: then it gets
// ErrSuperseded. One that meets a hold waits for its end.
func (r *replica) propose(ctx context.Context, q *pb.InternalRaftRequest, onlyIn uint64) (mvcc.Result, error) {
	late := r.h.late.begin(time.Now())
	cmd := mvcc.Command{Kind: mvcc.KindRequest, Term: Term(ctx), Request: q}
	for {
		changed := r.wait()
		if r.machine.Hold() != 0 { // it would be refused: wait, at most a moment
			if err := r.pause(ctx, late, changed); err != nil {
				return mvcc.Result{}, err
			}
			if r.machine.Hold() != 0 {
				continue
			}
			changed = r.wait()
		}
		// A new ID for every attempt: the entry of the one before may still come
		// and be refused, which must not be taken for this attempt's result.
		q.Header = &pb.RequestHeader{ID: r.h.ids.Next()}
		cmd.Epoch = r.machine.LeaderTerm()
		if onlyIn != 0 {
			cmd.Epoch = onlyIn
		}
		res, err := r.proposeOnce(ctx, late, cmd)
		switch {
		case err == nil && errors.Is(res.Err, mvcc.ErrHeld):
			if err := r.pause(ctx, late, changed); err != nil {
				return mvcc.Result{}, err
			}
		case err == nil && !errors.Is(res.Err, mvcc.ErrSuperseded):
			return res, etcdapi.Error(res.Err)
		case err == nil && onlyIn != 0:
			return res, res.Err
		case err == nil: // superseded: at once
		case !errors.Is(err, errRetry):
			return mvcc.Result{}, err
		default:
			if err := r.pause(ctx, late, changed); err != nil {
				return mvcc.Result{}, err
			}
		}
	}
}

// errRetry: the request has not left this node, it may be tried again.
var errRetry = errors.New("host: no leader")

// proposeOnce gives up when ctx ends or late is closed; nil for never.
func (r *replica) proposeOnce(ctx context.Context, late <-chan struct{}, cmd mvcc.Command) (mvcc.Result, error) {
	data, err := cmd.Encode()
	if err != nil {
		return mvcc.Result{}, etcdapi.Error(err)
	}
	if cmd.Request.Size() > maxRequest {
		return mvcc.Result{}, rpctypes.ErrGRPCRequestTooLarge
	}
	id := cmd.Request.Header.ID
	result := r.machine.Waiters().Register(id, cmd.Epoch)
	if r.ctx.Err() != nil { // else its end completes all that wait
		r.machine.Waiters().Forget(id)
		return mvcc.Result{}, rpctypes.ErrGRPCStopped
	}
	if r.machine.LeaderTerm() > cmd.Epoch {
		// The epoch ended before the registration, so nobody would tell if the
		// proposal were lost on its way to the old leader.
		r.machine.Waiters().Forget(id)
		return mvcc.Result{Err: mvcc.ErrSuperseded}, nil
	}
	p, err := r.submit(id, data)
	if err != nil {
		r.machine.Waiters().Forget(id)
		return mvcc.Result{}, err
	}
	select {
	case res := <-result:
		if errors.Is(res.Err, mvcc.ErrNotProposed) {
			return mvcc.Result{}, errRetry
		}
		return res, nil
	case v := <-p.done():
		err := p.ended(v)
		if err != nil {
			r.machine.Waiters().Forget(id)
			return mvcc.Result{}, err
		}
		select { // the state machine has answered before
		case res := <-result:
			return res, nil
		default:
			return mvcc.Result{Err: mvcc.ErrLost}, nil
		}
	case <-ctx.Done():
		err = ctxError(ctx)
	case <-late:
		err = rpctypes.ErrGRPCTimeout
	}
	r.machine.Waiters().Forget(id)
	p.leave(r.ctx)
	return mvcc.Result{}, err
}

// errUnknownResult is for a proposal that ended in a way that the library has not.
var errUnknownResult = errors.New("host: a proposal ended with an unknown result")

// pause waits for a change or a moment, unless ctx ends or late is closed.
func (r *replica) pause(ctx context.Context, late, changed <-chan struct{}) error {
	if err := r.unreachable(); err != nil && !isPatient(ctx) {
		return err
	}
	t := time.NewTimer(retryPause)
	defer t.Stop()
	select {
	case <-changed:
	case <-t.C:
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.Canceled) {
			return ctx.Err()
		}
		return rpctypes.ErrGRPCNoLeader
	case <-late:
		return rpctypes.ErrGRPCNoLeader
	case <-r.ctx.Done():
		return rpctypes.ErrGRPCStopped
	}
	return nil
}

func ctxError(ctx context.Context) error {
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	return rpctypes.ErrGRPCTimeout
}

func requestError(err error) error {
	switch {
	case errors.Is(err, dragonboat.ErrShardNotReady), errors.Is(err, dragonboat.ErrSystemBusy):
		return errRetry
	case errors.Is(err, dragonboat.ErrClosed), errors.Is(err, dragonboat.ErrShardClosed), errors.Is(err, dragonboat.ErrShardNotFound):
		return rpctypes.ErrGRPCStopped
	case errors.Is(err, dragonboat.ErrTimeout), errors.Is(err, dragonboat.ErrTimeoutTooSmall):
		return rpctypes.ErrGRPCTimeout
	case errors.Is(err, dragonboat.ErrPayloadTooBig):
		return rpctypes.ErrGRPCRequestTooLarge
	}
	return fmt.Errorf("host: %w", err)
}
