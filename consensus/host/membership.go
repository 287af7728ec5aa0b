package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/lni/dragonboat/v4"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

const (
	// askAfter elections without a leader a replica asks whether it is still a
	// member, and again every askEvery.
	askAfter = 4
	askEvery = 3 * time.Second
	// logCheck is how often the log's size is looked at.
	logCheck = 2 * time.Second
	// bytesOverhead entries are kept when the log is cut because of its size.
	bytesOverhead = 500
)

// Removed tells of a replica that lost its membership.
type Removed struct {
	Shard   string
	Replica uint64
	// Reason says how it is known.
	Reason string

	h *Host
}

// Clear deletes what is left of the replica (Host.StopReplica with removeData).
func (r Removed) Clear(ctx context.Context) error {
	return r.h.StopReplica(ctx, r.Shard, r.Replica, true)
}

// Membership of a shard.
type Membership struct {
	// ConfigChangeID is the log index of the last change. It grows with every
	// change, and a change that was decided on an older one is refused.
	ConfigChangeID uint64
	// Voters and NonVoters: NodeHostID by replica ID.
	Voters, NonVoters map[uint64]string
	// Removed replica IDs; they never come back.
	Removed []uint64
}

func convertMembership(m *dragonboat.Membership) Membership {
	return Membership{
		ConfigChangeID: m.ConfigChangeID, Voters: maps.Clone(m.Nodes), NonVoters: maps.Clone(m.NonVotings),
		Removed: slices.Sorted(maps.Keys(m.Removed)),
	}
}

// Membership reads the membership of a shard, linearizably. The cluster's leader
// can also read that of a shard of which it holds no replica.
func (h *Host) Membership(ctx context.Context, shardName string) (Membership, error) {
	r, err := h.byName(shardName)
	if s, ok := h.cfg.Shards.ByName(shardName); ok && err != nil {
		resp, err := h.order(ctx, callRequest{Method: methodMembership, Shard: uint64(s.ID)})
		if err != nil || resp.Membership == nil {
			return Membership{}, fmt.Errorf("membership of shard %s: %w", s.Name, cmp.Or(err, error(ErrNoReplica)))
		}
		return *resp.Membership, nil
	}
	if err != nil {
		return Membership{}, err
	}
	m, err := r.readMembership(ctx)
	if err != nil {
		return Membership{}, err
	}
	return convertMembership(m), nil
}

func (r *replica) readMembership(ctx context.Context) (*dragonboat.Membership, error) {
	ctx, cancel := r.deadline(ctx)
	defer cancel()
	if err := r.ReadIndex(patient(ctx)); err != nil { // waits out an election
		return nil, fmt.Errorf("membership of shard %s: %w", r.shard.Name, err)
	}
	for {
		// It asks Raft again. What is lost with a leader, or with a voter (see standAlone), is
		// not repeated there.
		attempt, cancel := context.WithTimeout(ctx, r.ElectionTimeout())
		m, err := r.h.nh.SyncGetShardMembership(attempt, uint64(r.shard.ID))
		cancel()
		switch {
		case err == nil:
			r.membership.Store(m)
			return m, nil
		case ctx.Err() != nil || !dragonboat.IsTempError(err) && !errors.Is(err, dragonboat.ErrTimeout):
			return nil, fmt.Errorf("membership of shard %s: %w", r.shard.Name, err)
		}
		if err := r.pause(ctx, nil, r.wait()); err != nil {
			return nil, fmt.Errorf("membership of shard %s: %w", r.shard.Name, err)
		}
	}
}

// Members implements etcdapi.Replica.
func (r *replica) Members(ctx context.Context, linearizable bool) ([]*pb.Member, error) {
	m := r.membership.Load()
	if linearizable || m == nil {
		var err error
		if m, err = r.readMembership(ctx); err != nil {
			return nil, err
		}
	}
	var out []*pb.Member
	add := func(set map[uint64]string, learner bool) {
		for id, target := range set {
			x := &pb.Member{ID: id, Name: r.h.cfg.Name(target), IsLearner: learner}
			if addr, ok := r.h.cfg.Resolve(target); ok {
				x.PeerURLs = []string{"https://" + addr}
			}
			x.ClientURLs = r.h.clientURLs(target, r.shard.ID)
			out = append(out, x)
		}
	}
	add(m.Nodes, false)
	add(m.NonVotings, true)
	slices.SortFunc(out, func(a, b *pb.Member) int { return int(int64(a.ID) - int64(b.ID)) })
	return out, nil
}

// Change is one step of a membership.
type Change int

// The steps. A replica always begins as non-voting.
const (
	AddNonVoter Change = iota + 1
	Promote
	Remove
)

// ErrChangeRejected is returned when another change was applied since the
// membership was read, or when Raft refuses the change.
var ErrChangeRejected = errors.New("host: membership change rejected")

// ChangeMembership applies one step, decided on the membership with the given
// ConfigChangeID. nodeHostID is needed to add and to promote. A timeout leaves
// open whether it was applied: read the membership again. The cluster's leader can
// also change that of a shard of which it holds no replica.
func (h *Host) ChangeMembership(ctx context.Context, shardName string, c Change, replicaID uint64, nodeHostID string, decidedOn uint64) error {
	r, err := h.byName(shardName)
	if s, ok := h.cfg.Shards.ByName(shardName); ok && err != nil {
		_, err := h.order(ctx, callRequest{Method: methodChange, Shard: uint64(s.ID), Change: c, Replica: replicaID, Target: nodeHostID, On: decidedOn})
		return err
	}
	if err != nil {
		return err
	}
	return r.change(ctx, c, replicaID, nodeHostID, decidedOn)
}

func (r *replica) change(ctx context.Context, c Change, replicaID uint64, nodeHostID string, decidedOn uint64) (err error) {
	ctx, cancel := r.deadline(ctx)
	defer cancel()
	id, h := uint64(r.shard.ID), r.h
	switch c {
	case AddNonVoter:
		err = h.nh.SyncRequestAddNonVoting(ctx, id, replicaID, nodeHostID, decidedOn)
	case Promote:
		err = h.nh.SyncRequestAddReplica(ctx, id, replicaID, nodeHostID, decidedOn)
	case Remove:
		err = h.nh.SyncRequestDeleteReplica(ctx, id, replicaID, decidedOn)
	default:
		return fmt.Errorf("host: unknown membership change %d", c)
	}
	if errors.Is(err, dragonboat.ErrRejected) {
		err = ErrChangeRejected
	}
	if err != nil {
		return fmt.Errorf("shard %s, replica %d: %w", r.shard.Name, replicaID, err)
	}
	return nil
}

func (r *replica) kickMembership() {
	select {
	case r.memberKick <- struct{}{}:
	default:
	}
}

// membershipLoop keeps the local copy of the membership, and finds out when this
// replica has been removed while it could not see it: then nobody talks to it any
// more, and it would wait for a leader for ever.
func (r *replica) membershipLoop() {
	voters := 0 // the last time
	r.kickMembership()
	lost := time.NewTicker(askEvery)
	defer lost.Stop()
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-r.memberKick:
			ctx, cancel := context.WithTimeout(r.ctx, 2*r.ElectionTimeout())
			m, err := r.readMembership(ctx)
			cancel()
			if err == nil {
				if voters > 1 && len(m.Nodes) == 1 {
					r.standAlone()
				}
				voters = len(m.Nodes)
			}
			if err != nil && r.ctx.Err() == nil {
				r.log.Debug("cannot read the membership", "error", err)
				select {
				case <-r.ctx.Done():
				case <-time.After(commandPause):
					r.askIfRemoved()
					r.kickMembership()
				}
				continue
			}
			r.h.notify()
		case <-lost.C:
			r.askIfRemoved()
		}
	}
}

// standAlone has the only voter that is left elected anew. Reads that were waiting for
// another voter to confirm the leader when that was removed wait for ever otherwise, in
// dragonboat's leader; and while it has such reads it sends no heartbeats to replicas
// without a vote, so that no new one would ever learn of it. A message of a higher term ends
// its leadership, which forgets the reads (who waits for them asks again), and has it stand
// for election at once, which it wins at once.
func (r *replica) standAlone() {
	if leader, term := r.Leader(); leader == r.id {
		r.log.Info("the last other voter is gone: elected anew")
		r.timeoutNow(r.id, RaftTerm(term)+1)
	}
}

func (r *replica) askIfRemoved() {
	if r.SinceContact() < askAfter*r.ElectionTimeout() || r.ctx.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(r.ctx, callTimeout)
	defer cancel()
	if r.h.removed(ctx, r.shard.ID, r.id) {
		r.markRemoved("other nodes have its removal in their log")
	}
}

// markRemoved may be called on dragonboat's event goroutine.
func (r *replica) markRemoved(reason string) {
	select {
	case r.removal <- reason:
	default:
	}
}

// removalLoop stops the replica when it has been removed, and reports it.
func (r *replica) removalLoop() {
	select {
	case <-r.ctx.Done():
		return
	case reason := <-r.removal:
		r.log.Warn("this node's replica has been removed from the shard", "reason", reason)
		r.h.op.Lock()
		r.h.stop(r)
		r.h.op.Unlock()
		select {
		case <-r.h.opened:
			r.h.cfg.OnRemoved(Removed{Shard: r.shard.Name, Replica: r.id, Reason: reason, h: r.h})
		case <-r.h.ctx.Done():
		}
	}
}

// logSizeLoop cuts the log when it has grown by MaxLogBytes; the number of
// entries is bounded by dragonboat itself.
func (r *replica) logSizeLoop() {
	t := time.NewTicker(logCheck)
	defer t.Stop()
	var cut uint64
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-t.C:
		}
		now := r.machine.AppliedBytes()
		if now-cut < r.h.cfg.MaxLogBytes {
			continue
		}
		ctx, cancel := context.WithTimeout(r.ctx, time.Minute)
		_, err := r.h.nh.SyncRequestSnapshot(ctx, uint64(r.shard.ID), dragonboat.SnapshotOption{OverrideCompactionOverhead: true, CompactionOverhead: bytesOverhead})
		cancel()
		if err != nil && !errors.Is(err, dragonboat.ErrRejected) { // rejected: one has just been made
			r.log.Debug("cannot cut the log", "error", err)
			continue
		}
		cut = now
	}
}
