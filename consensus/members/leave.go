package members

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/shard"
)

// leavingMark is the value of a mark; its version is 1.
type leavingMark struct {
	Version int    `json:"version"`
	Node    string `json:"node"`
}

func (m *Manager) client() (*kubernetes.Client, error) {
	c, ok := m.cfg.Store.Client(m.system())
	if !ok {
		return nil, fmt.Errorf("%w: %s", host.ErrNoReplica, m.system())
	}
	return c, nil
}

func (m *Manager) leaving(ctx context.Context) (map[string]bool, error) {
	c, err := m.client()
	if err != nil {
		return nil, err
	}
	resp, err := c.KV.Get(ctx, leavingPrefix, clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithSerializable())
	if err != nil {
		return nil, fmt.Errorf("read the marks of leaving nodes: %w", err)
	}
	out := map[string]bool{}
	for _, kv := range resp.Kvs {
		out[strings.TrimPrefix(string(kv.Key), leavingPrefix)] = true
	}
	return out, nil
}

// ErrCannotLeave is returned by Leave when it would be unsafe.
var ErrCannotLeave = errors.New("the node cannot leave now")

// Leave moves everything that a node holds to others and returns when it holds
// no replica any more; the node may then leave the gossip and stop. It works on
// any node with a replica, also on the one that leaves, while some leader runs a
// Manager. If leaving is or becomes unsafe, it gives up and says why
// (ErrCannotLeave). After a return without error the node gets no replica until
// Joined is called for it. A Leave that was interrupted may be called again.
func (m *Manager) Leave(ctx context.Context, nodeHostID string) error {
	if _, err := m.client(); err == nil { // else an earlier call has come that far
		if err := m.mayLeave(ctx, nodeHostID); err != nil {
			return fmt.Errorf("%w: %w", ErrCannotLeave, err)
		}
		if err := m.mark(ctx, nodeHostID); err != nil {
			return err
		}
	}
	err := m.waitGone(ctx, nodeHostID)
	if err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), orderTimeout)
		defer cancel()
		err = errors.Join(err, m.Joined(ctx, nodeHostID))
	}
	return err
}

func (m *Manager) waitGone(ctx context.Context, nodeHostID string) error {
	tick := time.NewTicker(m.cfg.Interval / 2)
	defer tick.Stop()
	for {
		held, err := m.holds(ctx, nodeHostID)
		if err == nil && len(held) == 0 {
			return nil
		}
		if err == nil && slices.Contains(held, m.system()) {
			if err := m.mayLeave(ctx, nodeHostID); errors.Is(err, errRefused) {
				return fmt.Errorf("%w: %w", ErrCannotLeave, err)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("node %s did not leave in time; it still holds replicas of %s: %w", m.name(nodeHostID), strings.Join(held, ", "), ctx.Err())
		case <-tick.C:
		}
	}
}

// holds returns the shards of which the node has a replica. Where this node has
// none itself it is the node that leaves, and its replica is gone.
func (m *Manager) holds(ctx context.Context, nodeHostID string) (held []string, err error) {
	for _, s := range m.cfg.Store.Shards().Shards() {
		ms, err := m.cfg.Store.Membership(ctx, s.Name)
		if errors.Is(err, host.ErrNoReplica) {
			continue
		}
		if err != nil {
			return held, err
		}
		for _, set := range []map[uint64]string{ms.Voters, ms.NonVoters} {
			for _, node := range set {
				if node == nodeHostID {
					held = append(held, s.Name)
				}
			}
		}
	}
	return held, nil
}

// errRefused: the rules are against it.
var errRefused = errors.New("members: refused")

// refused has no prefix of its own.
type refused struct{ reason string }

func (r refused) Error() string        { return r.reason }
func (r refused) Is(target error) bool { return target == errRefused }

// mayLeave asks Plan, without changing anything.
func (m *Manager) mayLeave(ctx context.Context, nodeHostID string) error {
	return m.would(ctx, nodeHostID, func(n *Node) { n.Leaving = true })
}

// ErrUnsafeLabel is returned by MayLabel.
var ErrUnsafeLabel = errors.New("the label would be unsafe")

// MayLabel tells whether a node may get that preference: ErrUnsafeLabel with the
// reason if nobody could take over what it holds. It works on any node with a
// replica of the system shard.
func (m *Manager) MayLabel(ctx context.Context, nodeHostID string, p Preference) error {
	if p != Never {
		return nil
	}
	if err := m.would(ctx, nodeHostID, func(n *Node) { n.Voter = p }); err != nil {
		return fmt.Errorf("%w: %w", ErrUnsafeLabel, err)
	}
	return nil
}

// would asks Plan for every shard what it thinks of a change of a node.
func (m *Manager) would(ctx context.Context, nodeHostID string, change func(*Node)) error {
	all := m.gatherAll(ctx)
	var system *Decision
	for _, f := range all {
		if f.err != nil {
			return f.err
		}
		known := false
		for i := range f.in.Nodes {
			if f.in.Nodes[i].ID == nodeHostID {
				change(&f.in.Nodes[i])
				known = true
			}
		}
		if !known {
			return refused{"no node has the ID " + nodeHostID}
		}
		d := Plan(f.input(all, system))
		if reason, ok := d.Refused[nodeHostID]; ok {
			return refused{reason}
		}
		if f.shard.ID == shard.System {
			system = &d
		}
	}
	return nil
}

// sweep forgets the marks of nodes that nobody knows any more.
func (m *Manager) sweep(ctx context.Context, all []*facts) {
	held := map[string]bool{}
	for _, f := range all {
		if f.err != nil {
			return
		}
		for _, r := range f.in.Replicas {
			held[r.Node] = true
		}
		for _, n := range f.in.Nodes {
			held[n.ID] = held[n.ID] || n.State != Left
		}
	}
	for id := range all[0].leaving {
		if !held[id] {
			if err := m.Joined(ctx, id); err != nil {
				m.log.Debug("the mark of a node that left stays for now", "node", id, "error", err)
			}
		}
	}
}

func (m *Manager) system() string {
	s, _ := m.cfg.Store.Shards().ByID(shard.System)
	return s.Name
}

func (m *Manager) mark(ctx context.Context, nodeHostID string) error {
	c, err := m.client()
	if err != nil {
		return err
	}
	b, err := json.Marshal(leavingMark{Version: 1, Node: m.name(nodeHostID)})
	if err != nil {
		return err
	}
	if _, err := c.KV.Put(ctx, leavingPrefix+nodeHostID, string(b)); err != nil {
		return fmt.Errorf("mark node %s as leaving: %w", m.name(nodeHostID), err)
	}
	return nil
}

// Joined forgets that a node left, so that it may hold replicas again. Call it
// when a node joins.
func (m *Manager) Joined(ctx context.Context, nodeHostID string) error {
	c, err := m.client()
	if err != nil {
		return err
	}
	if _, err := c.KV.Delete(ctx, leavingPrefix+nodeHostID); err != nil {
		return fmt.Errorf("clear the mark of node %s: %w", m.name(nodeHostID), err)
	}
	return nil
}
