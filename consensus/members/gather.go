package members

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/shard"
)

// facts about one shard.
type facts struct {
	shard     shard.Shard
	in        Input // without what comes from other shards
	decidedOn uint64
	leaving   map[string]bool // marked, by NodeHostID
	states    *states
	err       error
}

// states are the nodes' answers of one round, each asked once.
type states struct {
	ask func(nodeHostID string) (host.NodeState, error)

	mu  sync.Mutex // guards got
	got map[string]func() (host.NodeState, error)
}

func (s *states) of(nodeHostID string) (host.NodeState, error) {
	s.mu.Lock()
	f, ok := s.got[nodeHostID]
	if !ok {
		f = sync.OnceValues(func() (host.NodeState, error) { return s.ask(nodeHostID) })
		s.got[nodeHostID] = f
	}
	s.mu.Unlock()
	return f()
}

// forget what a node said: it has been given something to do.
func (s *states) forget(nodeHostID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.got, nodeHostID)
}

// gatherAll looks at all shards at the same time; the system shard comes first.
func (m *Manager) gatherAll(ctx context.Context) []*facts {
	shards := m.cfg.Store.Shards().Shards()
	slices.SortStableFunc(shards, func(a, b shard.Shard) int { return first(a.ID == shard.System, b.ID == shard.System) })
	out := make([]*facts, len(shards))
	answers := m.newStates(ctx)
	var wg sync.WaitGroup
	for i, s := range shards {
		wg.Go(func() { out[i] = m.gather(ctx, s, answers) })
	}
	wg.Wait()
	return out
}

func (m *Manager) newStates(ctx context.Context) *states {
	return &states{got: map[string]func() (host.NodeState, error){}, ask: func(id string) (host.NodeState, error) {
		ctx, cancel := context.WithTimeout(ctx, lookTimeout)
		defer cancel()
		return m.cfg.Store.NodeState(ctx, id)
	}}
}

// gather makes the input of Plan. Answers of earlier in the round are used again.
func (m *Manager) gather(ctx context.Context, s shard.Shard, answers *states) *facts {
	f := &facts{shard: s, states: answers, in: Input{Shard: s.Name, Policy: m.cfg.Policy}}
	m.mu.Lock()
	limit := lookTimeout
	if _, bad := m.failing[s.Name]; bad {
		limit = patience
	}
	m.mu.Unlock()
	look, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	ms, err := m.cfg.Store.Membership(look, s.Name)
	if err != nil {
		f.err = err
		return f
	}
	leaving, err := m.leaving(ctx)
	if err != nil {
		f.err = err
		return f
	}
	f.decidedOn, f.leaving = ms.ConfigChangeID, leaving
	f.in.Nodes = slices.Clone(m.cfg.Members())
	for i := range f.in.Nodes {
		f.in.Nodes[i].Leaving = f.in.Nodes[i].Leaving || leaving[f.in.Nodes[i].ID]
	}
	var leader, newest uint64
	corrupt := map[uint64]bool{}
	for _, st := range m.cfg.Store.Status() {
		if st.Shard == s.Name {
			// As of the linearizable look at the membership, and before the answers, so
			// that load does not look like lag.
			leader, newest = st.Leader.Replica, st.Applied
			for _, a := range st.Alarms {
				corrupt[a.Replica] = corrupt[a.Replica] || a.Kind == host.Corrupt
			}
		}
	}
	for id, node := range ms.Voters {
		f.in.Replicas = append(f.in.Replicas, Replica{ID: id, Node: node, Voter: true, Leader: id == leader, Corrupt: corrupt[id]})
	}
	for id, node := range ms.NonVoters {
		f.in.Replicas = append(f.in.Replicas, Replica{ID: id, Node: node, Corrupt: corrupt[id]})
	}
	m.probe(f, newest)
	return f
}

// probe asks all replicas how they are. There are at most seven.
func (m *Manager) probe(f *facts, newest uint64) {
	replicas := f.in.Replicas
	progress := make([]host.Progress, len(replicas))
	disks := make([]host.Disk, len(replicas))
	var wg sync.WaitGroup
	for i, r := range replicas {
		wg.Go(func() {
			st, err := f.states.of(r.Node)
			if p := st.Shards[f.shard.Name]; err == nil && p.Replica == r.ID {
				progress[i] = p
			}
			disks[i] = st.Disk
		})
	}
	wg.Wait()
	now := time.Now()
	m.mu.Lock()
	defer m.mu.Unlock()
	since := func(set map[string]time.Time, key string, bad bool) time.Duration {
		if !bad {
			delete(set, key)
			return 0
		}
		if _, ok := set[key]; !ok {
			set[key] = now
		}
		return max(now.Sub(set[key]), 1)
	}
	present := map[string]bool{}
	defer func() {
		for _, set := range []map[string]time.Time{m.down, m.lagging} {
			maps.DeleteFunc(set, func(key string, _ time.Time) bool { return strings.HasPrefix(key, f.shard.Name+"/") && !present[key] })
		}
	}()
	for i := range replicas {
		r, p := &replicas[i], progress[i]
		key := fmt.Sprintf("%s/%d", f.shard.Name, r.ID)
		present[key] = true
		r.Running = p.Replica == r.ID
		r.CaughtUp = r.Running && p.Ready && p.Applied+behind >= newest
		r.NotRunningFor = since(m.down, key, !r.Running)
		r.BehindFor = since(m.lagging, key, r.Running && !r.CaughtUp)
		for j := range f.in.Nodes {
			if f.in.Nodes[j].ID == r.Node {
				f.in.Nodes[j].Disk = Disk{Sync: disks[i].Sync, Slow: disks[i].Slow}
			}
		}
	}
}

// input adds what the other shards have to say.
func (f *facts) input(all []*facts, system *Decision) Input {
	in := f.in
	if f.shard.ID != shard.System {
		in.Follow, in.Held = system, map[string]bool{}
		for _, o := range all {
			if o.shard.ID == shard.System {
				for _, r := range o.in.Replicas {
					in.Held[r.Node] = in.Held[r.Node] || r.Voter
				}
			}
		}
		return in
	}
	in.Unready = map[string]string{}
	for _, o := range all {
		// A shard that cannot be looked at must not hold up this one.
		if o.shard.ID == shard.System || o.err != nil {
			continue
		}
		for _, n := range in.Nodes {
			if !slices.ContainsFunc(o.in.Replicas, func(r Replica) bool { return r.Node == n.ID && r.CaughtUp }) {
				in.Unready[n.ID] = "copies shard " + o.shard.Name
			}
		}
	}
	return in
}

func (m *Manager) execute(ctx context.Context, shardName string, term uint64, s Step, decidedOn uint64) error {
	ctx, cancel := context.WithTimeout(ctx, 2*orderTimeout)
	defer cancel()
	order := func(f func(context.Context, string, string, uint64, uint64) error, replica uint64) error {
		ctx, cancel := context.WithTimeout(ctx, orderTimeout)
		defer cancel()
		return f(ctx, s.Node, shardName, replica, term)
	}
	st := m.cfg.Store
	switch s.Action {
	case Add:
		id := decidedOn + 1 // unique for ever, see the package comment
		if err := st.ChangeMembership(ctx, shardName, host.AddNonVoter, id, s.Node, decidedOn); err != nil {
			return err
		}
		return order(m.cfg.Nodes.StartReplica, id)
	case Start:
		return order(m.cfg.Nodes.StartReplica, s.Replica)
	case Promote:
		return st.ChangeMembership(ctx, shardName, host.Promote, s.Replica, s.Node, decidedOn)
	case Transfer:
		ctx, cancel := context.WithTimeout(ctx, orderTimeout)
		defer cancel()
		return st.TransferLeadership(ctx, shardName, s.Replica)
	case Remove:
		if err := st.ChangeMembership(ctx, shardName, host.Remove, s.Replica, s.Node, decidedOn); err != nil {
			return err
		}
		if m.unreachable(s.Node) {
			return nil // it finds out when it is back; waiting for it here would delay its heir
		}
		if err := order(m.cfg.Nodes.StopReplica, s.Replica); err != nil {
			m.log.Debug("the removed replica was not told", "node", m.name(s.Node), "error", err)
		}
		return nil
	}
	return fmt.Errorf("members: unknown action %v", s.Action)
}

// unreachable: the failure detector says so.
func (m *Manager) unreachable(nodeHostID string) bool {
	return !slices.ContainsFunc(m.cfg.Members(), func(n Node) bool { return n.ID == nodeHostID && n.State == Alive })
}
