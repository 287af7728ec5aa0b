package mvcc

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	dsm "github.com/lni/dragonboat/v4/statemachine"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/pkg/v3/traceutil"
	"go.etcd.io/etcd/server/v3/etcdserver/txn"
	"go.etcd.io/etcd/server/v3/lease"
	"go.etcd.io/etcd/server/v3/storage/schema"
)

// Update implements IOnDiskStateMachine. The only error is ErrNewerCommand,
// which stops the process: dragonboat treats every error as the end.
func (m *Machine) Update(ents []dsm.Entry) ([]dsm.Entry, error) {
	if m.cfg.OnApplied != nil {
		start := time.Now()
		defer func() { m.cfg.OnApplied(time.Since(start)) }()
	}
	for done := 0; done < len(ents); {
		next := ents[done:min(done+untracedEntries, len(ents))]
		var err error
		untraced(func(ctx context.Context) { err = m.applyEntries(ctx, next) })
		if err != nil {
			return nil, err
		}
		done += len(next)
	}
	if now := m.bytes.Load(); now-m.committed >= commitBytes {
		m.committed = now
		m.backend().ForceCommit()
	}
	return ents, nil
}

// untracedEntries share a trace, which bounds what it gathers.
const untracedEntries = 16

func (m *Machine) applyEntries(ctx context.Context, ents []dsm.Entry) error {
	for i := range ents {
		e := &ents[i]
		if err := m.applyEntry(ctx, e); err != nil {
			return fmt.Errorf("apply entry %d: %w", e.Index, err)
		}
		if m.index.ConsistentIndex() < e.Index { // the entry wrote nothing
			m.index.SetConsistentIndex(e.Index, m.leader.Load())
		}
		m.applied.Store(e.Index)
		m.bytes.Add(uint64(len(e.Cmd)))
		e.Result = dsm.Result{Value: 1}
	}
	return nil
}

func (m *Machine) apply(ctx context.Context, cmd []byte) error {
	if len(cmd) == 0 {
		return nil
	}
	c, err := Decode(cmd)
	if errors.Is(err, ErrNewerCommand) {
		return err
	}
	if err != nil {
		m.log.Error("refused a command of the log", "error", err)
		return nil
	}
	switch c.Kind {
	case KindLeader:
		if c.Term > m.leader.Load() {
			m.putTerm(leaderKey, c.Term)
			m.leader.Store(c.Term)
			m.waiters.failBelow(c.Term, ErrSuperseded)
			m.setHold(0) // who held the shard in an older epoch learns it from its release
			if m.cfg.OnLeader != nil {
				m.cfg.OnLeader(c.Term, c.Replica)
			}
		}
	case KindFence:
		if c.Term > m.fence.Load() {
			m.putTerm(fenceKey, c.Term)
			m.fence.Store(c.Term)
			if m.cfg.OnFence != nil {
				m.cfg.OnFence(c.Term)
			}
		}
	case KindRequest:
		m.waiters.complete(c.requestID(), m.request(ctx, c))
	case KindHold, KindRelease:
		m.waiters.complete(c.requestID(), m.holdOrRelease(c))
	}
	return nil
}

// holdOrRelease applies a hold, of which there is at most one, or ends it. A
// release that finds its hold proves that nothing was applied in between.
func (m *Machine) holdOrRelease(c Command) Result {
	held := m.hold.Load()
	switch {
	case c.Kind == KindRelease && held != c.Hold:
		return Result{Err: ErrNotHeld}
	case c.Kind == KindRelease:
		m.setHold(0)
	case c.Epoch < m.leader.Load():
		return Result{Err: ErrSuperseded}
	case held != 0:
		return Result{Err: ErrHeld}
	default:
		m.setHold(c.Hold)
	}
	return Result{}
}

// setHold is in the database too: a replica that restarts, or gets a snapshot,
// in the middle of a hold must refuse what the others refuse.
func (m *Machine) setHold(id uint64) {
	if m.hold.Load() == id {
		return
	}
	m.putTerm(holdKey, id)
	m.hold.Store(id)
	if m.cfg.OnHold != nil {
		m.cfg.OnHold(id)
	}
}

func (m *Machine) putTerm(key []byte, term uint64) {
	tx := m.backend().BatchTx()
	tx.LockInsideApply()
	tx.UnsafePut(schema.Meta, key, binary.BigEndian.AppendUint64(nil, term))
	tx.Unlock()
}

// request applies one request, or refuses it. Which of the two it does must
// depend on the log alone, so the read operations of a transaction are executed
// on every replica: one of them can fail it.
func (m *Machine) request(ctx context.Context, c Command) Result {
	if c.Epoch < m.leader.Load() {
		return Result{Err: ErrSuperseded}
	}
	if c.Term != 0 && c.Term < m.fence.Load() {
		return Result{Err: fmt.Errorf("%w: term %d, the shard has seen %d", ErrFenced, c.Term, m.fence.Load())}
	}
	if m.hold.Load() != 0 {
		return Result{Err: ErrHeld}
	}
	if err := checkRequest(c.Request); err != nil {
		return Result{Err: err}
	}
	if err := m.checkSpace(c.Request); err != nil {
		return Result{Err: err}
	}
	return m.dispatch(ctx, c.Request)
}

func (m *Machine) header() *pb.ResponseHeader { return &pb.ResponseHeader{Revision: m.kv.Rev()} }

func (m *Machine) dispatch(ctx context.Context, r *pb.InternalRaftRequest) (res Result) {
	switch {
	case r.Put != nil:
		var resp *pb.PutResponse
		resp, _, res.Err = txn.Put(ctx, m.zap, m.lessor, m.kv, r.Put)
		res.Resp = resp
	case r.DeleteRange != nil:
		var resp *pb.DeleteRangeResponse
		resp, _, res.Err = txn.DeleteRange(ctx, m.zap, m.kv, r.DeleteRange)
		res.Resp = resp
	case r.Txn != nil:
		var resp *pb.TxnResponse
		resp, res.Err = m.transact(ctx, r.Txn)
		res.Resp = resp
	case r.Compaction != nil:
		res.Compacted, res.Err = m.kv.Compact(traceutil.TODO(), r.Compaction.Revision)
		res.Resp = &pb.CompactionResponse{Header: m.header()}
		if res.Err == nil {
			m.lastCompaction.Store(&Compaction{Revision: r.Compaction.Revision, At: time.Now()})
		}
	case r.LeaseGrant != nil:
		var l *lease.Lease
		if l, res.Err = m.lessor.Grant(lease.LeaseID(r.LeaseGrant.ID), r.LeaseGrant.TTL); res.Err == nil {
			res.Resp = &pb.LeaseGrantResponse{ID: int64(l.ID), TTL: l.TTL(), Header: m.header()}
		}
	case r.LeaseRevoke != nil:
		res.Err = m.lessor.Revoke(lease.LeaseID(r.LeaseRevoke.ID))
		res.Resp = &pb.LeaseRevokeResponse{Header: m.header()}
	case r.LeaseCheckpoint != nil:
		for _, c := range r.LeaseCheckpoint.Checkpoints {
			if res.Err = m.lessor.Checkpoint(lease.LeaseID(c.ID), c.Remaining_TTL); res.Err != nil {
				break
			}
		}
		res.Resp = &pb.LeaseCheckpointResponse{Header: m.header()}
	case r.Alarm != nil:
		res.Resp = m.alarm(r.Alarm)
	default:
		res.Err = fmt.Errorf("%w: the request is empty or of an unknown kind", ErrBadCommand)
	}
	return res
}
