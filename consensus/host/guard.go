package host

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"skein.io/skein/consensus/shard"
)

// A certificate of the cluster lets a node talk to another, but only members of a
// shard are heard on its matters: a stolen node without a replica must not be
// able to write to the log. What this replica has applied says who they are. It
// may be behind (or new, and know nobody): then those that it knows are asked
// whether the stranger is a member, and only if none of them is left all nodes.

const (
	// inquiryEvery is how often the same stranger is asked about, inquiries how many
	// of them at the same time.
	inquiryEvery = 500 * time.Millisecond
	inquiries    = 4
	// maxStrangers bounds what is remembered of them.
	maxStrangers = 256
)

type stranger struct {
	shard, replica uint64
	node           string // NodeHostID that its certificate proves
}

type guard struct {
	slots chan struct{}

	mu    sync.Mutex // guards asked
	asked map[stranger]time.Time
}

func newGuard() *guard {
	return &guard{slots: make(chan struct{}, inquiries), asked: map[stranger]time.Time{}}
}

// due tells whether to ask about a stranger now.
func (g *guard) due(s stranger, now time.Time) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if t, ok := g.asked[s]; ok && now.Sub(t) < inquiryEvery {
		return false
	}
	if len(g.asked) >= maxStrangers {
		clear(g.asked)
	}
	g.asked[s] = now
	return true
}

// hears decides whether a message from a replica on a node is for a shard's ears.
func (h *Host) hears(shardID, replicaID uint64, nodeHostID string) bool {
	if known, ok := h.reg.lookup(shardID, replicaID); ok {
		return known == nodeHostID
	}
	s := stranger{shardID, replicaID, nodeHostID}
	if replicaID == 0 || h.replica(shard.ID(shardID)) == nil || !h.guard.due(s, time.Now()) {
		return false
	}
	select {
	case h.guard.slots <- struct{}{}:
	default:
		return false
	}
	h.mu.RLock()
	defer h.mu.RUnlock()
	if h.closed { // nobody waits for it any more
		<-h.guard.slots
		return false
	}
	h.wg.Go(func() {
		defer func() { <-h.guard.slots }()
		if h.vouched(s) {
			h.reg.Add(s.shard, s.replica, s.node)
			return
		}
		h.log.Warn("messages of a node that is no member of the shard are not heard",
			"peer", h.cfg.Name(s.node), "shard", s.shard, "replica", s.replica)
	})
	return false // Raft sends again
}

// vouched asks about a stranger.
func (h *Host) vouched(s stranger) bool {
	ctx, cancel := context.WithTimeout(h.ctx, callTimeout)
	defer cancel()
	q := callRequest{Method: methodMember, Shard: s.shard, Replica: s.replica, Target: s.node}
	known := h.others(h.reg.members(s.shard), s.node)
	yes, no := h.poll(ctx, known, q)
	if yes > 0 || no > 0 {
		return yes > 0
	}
	yes, no = h.poll(ctx, h.others(h.cfg.Peers(), s.node), q)
	if len(known) == 0 && yes+no == 0 {
		// A new replica of a shard that has one other: it holds nothing to lose.
		return true
	}
	return yes > no
}

// others are those nodes without this one and another, each once.
func (h *Host) others(nodes []string, not string) []string {
	out := slices.DeleteFunc(slices.Clone(nodes), func(n string) bool { return n == not || n == h.NodeHostID() })
	slices.Sort(out)
	return slices.Compact(out)
}

// poll asks nodes a question with yes or no; who has no replica or does not
// answer has no vote.
func (h *Host) poll(ctx context.Context, nodes []string, q callRequest) (yes, no int) {
	var mu sync.Mutex // guards yes and no
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() {
			resp, err := h.call(ctx, n, q)
			if err != nil {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			if resp.Yes || resp.Removed {
				yes++
			} else {
				no++
			}
		})
	}
	wg.Wait()
	return yes, no
}

// Heeds tells whether orders of a node are to be obeyed: only a member of the
// system shard can lead the cluster. A certificate alone is not enough: who has
// stolen a node without a replica could else make this one refuse its leader, by
// an order of a far term. The error says who it was.
func (h *Host) Heeds(nodeHostID string) error {
	if h.mayAsk(uint64(shard.System), nodeHostID) == nil || h.vouched(stranger{uint64(shard.System), 0, nodeHostID}) {
		return nil
	}
	return fmt.Errorf("order refused: %w: %s", errNotAMember, h.cfg.Name(nodeHostID))
}

// isMember answers what vouched asks; replica 0 stands for any.
func (r *replica) isMember(ctx context.Context, replicaID uint64, nodeHostID string) (bool, error) {
	if known, ok := r.h.reg.lookup(uint64(r.shard.ID), replicaID); ok {
		return known == nodeHostID, nil
	}
	if replicaID == 0 && slices.Contains(r.h.reg.members(uint64(r.shard.ID)), nodeHostID) {
		return true, nil
	}
	m, err := r.readMembership(ctx)
	if err != nil {
		return false, err
	}
	if replicaID == 0 {
		return slices.Contains(slices.Collect(maps.Values(m.Nodes)), nodeHostID) || slices.Contains(slices.Collect(maps.Values(m.NonVotings)), nodeHostID), nil
	}
	return m.Nodes[replicaID] == nodeHostID || m.NonVotings[replicaID] == nodeHostID, nil
}

var errNotAMember = errors.New("host: the caller is no member of the shard")

// mayAsk: what changes something is for members of the shard only.
func (h *Host) mayAsk(shardID uint64, nodeHostID string) error {
	if nodeHostID != h.NodeHostID() && !slices.Contains(h.reg.members(shardID), nodeHostID) {
		return fmt.Errorf("%w: %s", errNotAMember, h.cfg.Name(nodeHostID))
	}
	return nil
}

// ErrNotRemoved is returned when a replica was to be deleted but nobody confirms
// that it has been removed from the shard.
var ErrNotRemoved = errors.New("host: the replica has not been removed from the shard, as far as can be told")

// DropRemoved deletes this node's replica (StopReplica with removeData) after
// making sure that it has been removed from the membership: an order alone is not
// enough to destroy data. Idempotent.
func (h *Host) DropRemoved(ctx context.Context, shardName string, replicaID uint64) error {
	s, ok := h.cfg.Shards.ByName(shardName)
	if !ok {
		return fmt.Errorf("%w: %q", ErrUnknownShard, shardName)
	}
	for _, id := range h.onDisk(s.ID) {
		if id <= replicaID && !h.removed(ctx, s.ID, id) {
			return fmt.Errorf("%w: replica %d of shard %s", ErrNotRemoved, id, s.Name)
		}
	}
	return h.StopReplica(ctx, shardName, replicaID, true)
}

// removed: this node's own log says that the replica has been removed, or more of
// the others than deny it.
func (h *Host) removed(ctx context.Context, id shard.ID, replicaID uint64) bool {
	peers := h.cfg.Peers()
	if r := h.replica(id); r != nil {
		if m := r.membership.Load(); m != nil {
			if _, ok := m.Removed[replicaID]; ok {
				return true
			}
			for _, p := range m.Nodes {
				peers = append(slices.Clone(peers), p)
			}
		}
	}
	yes, no := h.poll(ctx, h.others(peers, ""), callRequest{Method: methodRemoved, Shard: uint64(id), Replica: replicaID})
	return yes > no
}
