package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/consensus/shard"
)

// The cluster's leader acts on all shards, whoever leads them. It needs a replica
// of each, and nearly always has one; without (it was elected while it was being
// given its replicas) it asks the other members of shard system, which obey it
// only if their own replica knows it as the leader of the term that it claims.

// errNotLeader: this node does not lead the shard that an order is about.
var errNotLeader = errors.New("host: this node does not lead the shard")

// lateAfter is how long a fence may take before it is worth a warning, and how
// often that is repeated.
const lateAfter = 3 * time.Second

// lateFence reports a fence that does not come about.
type lateFence struct {
	term  uint64
	since time.Time
}

func (l *lateFence) report(log *slog.Logger, shardName string, term uint64, err error) {
	if l.term != term {
		*l = lateFence{term, time.Now()}
	}
	if time.Since(l.since) < lateAfter {
		log.Debug("fence not raised", "shard", shardName, "term", term, "error", err)
		return
	}
	l.since = time.Now()
	log.Warn("this node leads, but may not act before every shard refuses its predecessors", "term", term, "error", err)
}

// raiseFence makes all shards refuse what acts for earlier leaders of the cluster,
// if r is of shard system. Of other shards there is nothing to do: their own
// leaders are fenced by their epochs, and their terms mean nothing elsewhere.
func (h *Host) raiseFence(ctx context.Context, r *replica, term uint64) error {
	if r.shard.ID != shard.System {
		return nil
	}
	shards := h.cfg.Shards.Shards()
	errs := make([]error, len(shards))
	var wg sync.WaitGroup
	for i, s := range shards {
		wg.Go(func() {
			seen, err := h.fence(ctx, s, term)
			switch {
			case err != nil:
				errs[i] = fmt.Errorf("fence shard %s: %w", s.Name, err)
			case seen != term:
				errs[i] = fmt.Errorf("%w: shard %s has seen term %d", ErrFenced, s.Name, seen)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// fence raises one shard's fence and returns the one that it has then.
func (h *Host) fence(ctx context.Context, s shard.Shard, term uint64) (seen uint64, err error) {
	r, err := h.byName(s.Name)
	if err != nil {
		resp, err := h.order(ctx, callRequest{Method: methodFence, Shard: uint64(s.ID), Term: term})
		return resp.Fence, err
	}
	return r.fence(ctx, term)
}

func (r *replica) fence(ctx context.Context, term uint64) (seen uint64, err error) {
	if r.machine.FenceTerm() < term {
		err = r.command(ctx, mvcc.Command{Kind: mvcc.KindFence, Term: term})
	}
	return r.machine.FenceTerm(), err
}

// order asks others in turn, until one of them can do it: the shard's leader if it
// is known here, then the other voters of shard system. The error of the last is
// returned.
func (h *Host) order(ctx context.Context, q callRequest) (resp callResponse, err error) {
	sys := h.replica(shard.System)
	if sys == nil {
		return resp, ErrNoReplica
	}
	leader, term := sys.Leader()
	m := sys.membership.Load()
	if leader != sys.id || m == nil {
		return resp, ErrNoReplica // only the cluster's leader gives orders
	}
	q.Term = term
	err = ErrNoReplica
	ask := slices.Sorted(maps.Values(m.Nodes))
	if r := h.replica(shard.ID(q.Shard)); r != nil {
		if target, ok := r.leaderTarget(); ok {
			ask = append([]string{target}, ask...)
		}
	}
	for i, node := range ask {
		if node == h.NodeHostID() || i > 0 && node == ask[0] {
			continue
		}
		if resp, err = h.call(ctx, node, q); err == nil || errors.Is(err, ErrChangeRejected) || ctx.Err() != nil {
			return resp, err
		}
	}
	return resp, err
}

// obey carries out what the cluster's leader asks.
func (r *replica) obey(ctx context.Context, q callRequest) (resp callResponse, err error) {
	if err := r.fromLeader(q); err != nil {
		return resp, err
	}
	switch q.Method {
	case methodFence:
		resp.Fence, err = r.fence(ctx, q.Term)
		return resp, err
	case methodMembership:
		m, err := r.h.Membership(ctx, r.shard.Name)
		resp.Membership = &m
		return resp, err
	}
	if err := r.h.Admit(q.Term); err != nil {
		return resp, err
	}
	if q.Method == methodTransfer {
		if !r.Leads() {
			return resp, errNotLeader
		}
		return resp, r.handOver(ctx, q.Replica)
	}
	return resp, r.change(ctx, q.Change, q.Replica, q.Target, q.On)
}

// fromLeader checks that the caller, whose identity the transport has proved,
// leads the cluster in the term that it says. A node that has lost its replica of
// shard system (it is leaving) cannot know, and takes the word of a voter of the
// shard in question: voters hold the cluster's keys, nobody is trusted more.
func (r *replica) fromLeader(q callRequest) error {
	sys, among := r.h.replica(shard.System), r.membership.Load()
	if sys == nil {
		if among != nil {
			for _, node := range among.Nodes {
				if node == q.From {
					return nil
				}
			}
		}
		return fmt.Errorf("%w: system, and the caller does not vote in shard %s", ErrNoReplica, r.shard.Name)
	}
	leader, term := sys.Leader()
	m := sys.membership.Load()
	switch {
	case q.Term < term:
		return fmt.Errorf("%w: term %d, the cluster is in term %d", ErrFenced, q.Term, term)
	case leader == 0 || q.Term != term || m == nil || m.Nodes[leader] != q.From:
		return fmt.Errorf("node %s does not know the caller as the leader of the cluster in term %d", r.h.cfg.NodeName, q.Term)
	}
	return nil
}
