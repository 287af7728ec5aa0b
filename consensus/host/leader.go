package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/lni/dragonboat/v4"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/lease"

	"skein.io/skein/consensus/mvcc"
)

const (
	// commandTimeout bounds one attempt to put a leader or fence command into the
	// log; a failed attempt is repeated after commandPause.
	commandTimeout = time.Second
	commandPause   = 50 * time.Millisecond
	// revocations is how many expired leases are revoked at the same time.
	revocations = 16
	// nudgeAfter is how long an heir has to take over before it is told again.
	nudgeAfter = 30 * time.Millisecond
	// heirLag is how many entries an heir may be behind: the leader takes no
	// proposals until it has caught up.
	heirLag = 1000
)

// setLeader is called by dragonboat's event goroutine.
func (r *replica) setLeader(leader, term uint64) {
	r.mu.Lock()
	was := r.leader
	if was == r.id || leader == r.id {
		at := time.Since(began)
		if deposed(was, leader, r.id, r.term, term) {
			at -= r.ElectionTimeout()
		}
		r.contact.Store(int64(at))
		r.heard.Store(true)
	}
	r.leader, r.term = leader, term
	close(r.changed)
	r.changed = make(chan struct{})
	r.mu.Unlock()
	if leader != was {
		r.log.Info("leader changed", "leader", leader, "term", term)
	}
	r.h.notify()
}

// deposed tells whether a replica has just stepped down because for a whole election timeout no
// majority of voters answered it (CheckQuorum): it ends its own term, and knows no other leader. It
// has been cut off for that long, as its followers would say. A leader that is replaced learns a new term.
func deposed(was, leader, self, oldTerm, term uint64) bool {
	return was == self && leader == 0 && term == oldTerm
}

// reign returns the term in which this replica leads and its Leader command is
// applied, 0 if it does not, and a channel that is closed when that may change.
func (r *replica) reign() (uint64, <-chan struct{}) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.leader == r.id && r.started.Load() && r.ctx.Err() == nil && r.machine.LeaderTerm() == r.term {
		return r.term, r.changed
	}
	return 0, r.changed
}

// leadershipLoop opens the epoch of this replica's leaderships and makes it the
// primary lessor while they last. It alone promotes and demotes, so the two
// cannot overtake each other.
func (r *replica) leadershipLoop() {
	for {
		changed := r.wait()
		leader, term := r.Leader()
		switch epoch := r.machine.LeaderTerm(); {
		case leader != r.id || epoch > term:
			if r.primary.Swap(0) != 0 {
				r.machine.DemoteLessor()
			}
		case epoch < term:
			if err := r.command(r.ctx, mvcc.Command{Kind: mvcc.KindLeader, Term: term, Replica: r.id}); err != nil {
				r.log.Debug("the leader command was not accepted", "term", term, "error", err)
				select {
				case <-r.ctx.Done():
				case <-time.After(commandPause):
				}
				changed = nil // try again
			}
		case r.primary.Load() != term:
			r.machine.PromoteLessor(r.ElectionTimeout())
			r.primary.Store(term)
			r.h.notify()
		}
		if changed == nil && r.ctx.Err() == nil {
			continue
		}
		select {
		case <-changed:
		case <-r.ctx.Done():
			r.primary.Store(0)
			r.machine.DemoteLessor()
			return
		}
	}
}

// command puts a leader or fence command into the log and waits until it is
// applied here. It gives up when the leader changes, as the command may have been
// lost with the old one: a second one does no harm.
func (r *replica) command(ctx context.Context, c mvcc.Command) error {
	data, err := c.Encode()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	changed := r.wait()
	leader, term := r.Leader()
	rs, err := r.h.nh.Propose(r.session, data, r.ticks(ctx))
	if err != nil {
		return requestError(err)
	}
	for {
		select {
		case v := <-rs.AppliedC():
			defer rs.Release()
			if !v.Completed() {
				return errRetry
			}
			return nil
		case <-changed:
			changed = r.wait()
			if l, t := r.Leader(); l != leader || t != term {
				return errRetry
			}
		case <-ctx.Done():
			return ctxError(ctx)
		}
	}
}

// expiryLoop revokes what has expired while this replica is the primary lessor.
// The revocation is bound to its epoch: a deposed primary cannot expire a lease
// that its successor has renewed.
func (r *replica) expiryLoop() {
	var wg sync.WaitGroup
	defer wg.Wait()
	slots := make(chan struct{}, revocations)
	for {
		select {
		case <-r.ctx.Done():
			return
		case ls := <-r.machine.ExpiredLeases():
			epoch := r.primary.Load()
			if epoch == 0 {
				continue
			}
			for _, l := range ls {
				select {
				case slots <- struct{}{}:
				case <-r.ctx.Done():
					return
				}
				wg.Go(func() {
					defer func() { <-slots }()
					_, err := r.propose(r.ctx, &pb.InternalRaftRequest{LeaseRevoke: &pb.LeaseRevokeRequest{ID: int64(l.ID)}}, epoch)
					if err != nil && !errors.Is(err, lease.ErrLeaseNotFound) && r.ctx.Err() == nil {
						r.log.Debug("lease not revoked", "lease", l.ID, "error", err) // the lessor reports it again
					}
				})
			}
		}
	}
}

// checkpointLeases is called by the lessor's own goroutine.
func (r *replica) checkpointLeases(ctx context.Context, c *pb.LeaseCheckpointRequest) error {
	epoch := r.primary.Load()
	if epoch == 0 {
		return lease.ErrNotPrimary
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(r.ctx, cancel)()
	_, err := r.propose(ctx, &pb.InternalRaftRequest{LeaseCheckpoint: c}, epoch)
	return err
}

// Lead calls f whenever this node leads the shard, with the term that it leads
// in, one call at a time, until ctx ends; it returns after f has. When the shard is
// shard.System, the term's fence is applied to all shards before f starts. f's context carries the term (WithTerm) and ends at once when
// this node leads no more, so f has to return then. If f returns earlier, it is
// called again in the next term only.
func (h *Host) Lead(ctx context.Context, shardName string, f func(ctx context.Context, term uint64)) error {
	s, ok := h.cfg.Shards.ByName(shardName)
	if !ok {
		return fmt.Errorf("%w: %q", ErrUnknownShard, shardName)
	}
	changes, unsubscribe := h.Subscribe()
	defer unsubscribe()
	var served uint64
	var late lateFence
	for {
		var changed <-chan struct{}
		if r := h.replica(s.ID); r != nil {
			var term uint64
			if term, changed = r.reign(); term != 0 && term != served {
				if err := h.raiseFence(ctx, r, term); err == nil {
					served = term
					h.reignIn(ctx, r, term, f)
				} else {
					late.report(h.log, s.Name, term, err)
					changed = closedAfter(commandPause)
				}
				if ctx.Err() == nil && served == term {
					continue
				}
			}
		}
		select {
		case <-changed:
		case <-changes:
		case <-ctx.Done():
			return nil
		case <-h.ctx.Done():
			return ErrClosed
		}
	}
}

func closedAfter(d time.Duration) <-chan struct{} {
	c := make(chan struct{})
	time.AfterFunc(d, func() { close(c) })
	return c
}

// reignIn runs f until it returns, and ends its context with the term.
func (h *Host) reignIn(ctx context.Context, r *replica, term uint64, f func(context.Context, uint64)) {
	ctx, cancel := context.WithCancel(WithTerm(ctx, term))
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f(ctx, term)
	}()
	for {
		now, changed := r.reign()
		if now != term {
			cancel()
			<-done
			return
		}
		select {
		case <-changed:
		case <-r.ctx.Done():
		case <-done:
			return
		}
	}
}

var errNothingToHandOver = errors.New("host: not the leader, or no other voter")

// TransferLeadership hands the leadership of a shard to the replica `to`, or with 0
// to any other voter whose address is known. It returns when the shard's leader
// leads no more. That is this node, or any other if this one leads the cluster.
func (h *Host) TransferLeadership(ctx context.Context, shardName string, to uint64) error {
	s, ok := h.cfg.Shards.ByName(shardName)
	if !ok {
		return fmt.Errorf("%w: %q", ErrUnknownShard, shardName)
	}
	if r := h.replica(s.ID); r != nil && r.Leads() {
		return r.handOver(ctx, to)
	}
	_, err := h.order(ctx, callRequest{Method: methodTransfer, Shard: uint64(s.ID), Replica: to})
	if errors.Is(err, ErrNoReplica) {
		err = errNothingToHandOver
	}
	return err
}

// TransferLeader implements etcdapi.Replica.
func (r *replica) TransferLeader(ctx context.Context, to uint64) error { return r.handOver(ctx, to) }

func (r *replica) handOver(ctx context.Context, to uint64) error {
	if !r.Leads() {
		return errNothingToHandOver
	}
	m := r.membership.Load()
	if m == nil {
		return errNothingToHandOver
	}
	given := to
	if to == 0 {
		to = r.bestHeir(ctx, m)
	}
	heir, ok := m.Nodes[to]
	if !ok || to == r.id {
		return errNothingToHandOver
	}
	if given != 0 {
		p, err := r.h.Progress(ctx, heir, r.shard.Name)
		if own := r.machine.Applied(); err != nil || p.Replica != to || p.Applied+heirLag < own {
			return fmt.Errorf("transfer shard %s to replica %d: it is at %d of %d: %w", r.shard.Name, to, p.Applied, own, cmp.Or(err, errNothingToHandOver))
		}
	}
	// From here on the leader takes no proposals until the heir leads, or for an
	// election timeout.
	err := r.h.nh.RequestLeaderTransfer(uint64(r.shard.ID), to)
	if err != nil && !errors.Is(err, dragonboat.ErrSystemBusy) { // busy: one is under way
		return fmt.Errorf("transfer shard %s to replica %d: %w", r.shard.Name, to, err)
	}
	for requested := time.Now(); ; {
		changed := r.wait()
		if !r.Leads() {
			return nil
		}
		select {
		case <-changed:
		case <-time.After(nudgeAfter):
			// Dragonboat's heir lets the order to campaign pass if it has not
			// applied everything at that very moment.
			if _, err := r.h.call(ctx, heir, callRequest{Method: methodCampaign, Shard: uint64(r.shard.ID), Replica: r.id}); err != nil {
				r.log.Debug("the heir does not answer", "error", err)
			}
		case <-ctx.Done():
			return fmt.Errorf("transfer shard %s to replica %d: %w", r.shard.Name, to, ctx.Err())
		}
		if time.Since(requested) > 2*r.ElectionTimeout() {
			return fmt.Errorf("transfer shard %s to replica %d: it did not take over", r.shard.Name, to)
		}
	}
}

// bestHeir is the other voter that answers and has applied most.
func (r *replica) bestHeir(ctx context.Context, m *dragonboat.Membership) (best uint64) {
	var applied uint64
	for id, target := range m.Nodes {
		if id == r.id {
			continue
		}
		p, err := r.h.Progress(ctx, target, r.shard.Name)
		if err == nil && p.Replica == id && (best == 0 || p.Applied > applied) {
			best, applied = id, p.Applied
		}
	}
	return best
}
