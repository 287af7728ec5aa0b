package members

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/logbridge"
	"skein.io/skein/consensus/shard"
)

// Store is what the Manager needs of host.Host.
type Store interface {
	Shards() shard.Table
	Status() []host.ShardStatus
	Subscribe() (<-chan struct{}, func())
	Client(shardName string) (*kubernetes.Client, bool)
	Membership(ctx context.Context, shardName string) (host.Membership, error)
	ChangeMembership(ctx context.Context, shardName string, c host.Change, replicaID uint64, nodeHostID string, decidedOn uint64) error
	Progress(ctx context.Context, nodeHostID, shardName string) (host.Progress, error)
	TransferLeadership(ctx context.Context, shardName string, to uint64) error
}

// Nodes carries orders to other nodes, and to this one. Orders carry the term of
// the leader that gives them; a node refuses a lower one than it has obeyed (see
// host.Admit). Both must be idempotent.
type Nodes interface {
	// StartReplica makes the node with that NodeHostID call Host.StartReplica.
	StartReplica(ctx context.Context, nodeHostID, shardName string, replicaID, term uint64) error
	// StopReplica makes it call Host.StopReplica with removeData. It is only a
	// hurry: a replica finds out by itself that it has been removed.
	StopReplica(ctx context.Context, nodeHostID, shardName string, replicaID, term uint64) error
}

// Config of a Manager.
type Config struct {
	Store Store
	Nodes Nodes
	// Members of the cluster as the failure detector sees them. Leaving is added
	// by the Manager.
	Members func() []Node
	// Policy; the zero value means the defaults.
	Policy Policy
	// Interval between two looks while something is to be done; default 1 s. When
	// all is as it should be, a look is due after ten of them, or when a node or
	// the store changes.
	Interval time.Duration
	Logger   *slog.Logger
}

const (
	// behind is how many log entries a replica may lag and still count as caught up.
	behind = 256
	// orderTimeout bounds an order to a node.
	orderTimeout = 5 * time.Second
	// leavingPrefix and a NodeHostID is the key of the mark of a node that leaves.
	leavingPrefix = "/skein/members/leaving/"
	// idleTicks is how many intervals pass without a look when all is well: a look
	// asks every replica over the network.
	idleTicks = 10
	// maxSteps bounds the steps of one look; more follow in the next.
	maxSteps = 16
)

// Manager keeps the replicas of all shards as Plan wants them.
type Manager struct {
	cfg Config
	log *slog.Logger

	mu       sync.Mutex           // guards below
	down     map[string]time.Time // since when a replica (shard/ID) does not run
	lagging  map[string]time.Time // since when it runs without having caught up
	decision map[string]Decision  // by shard
	logged   map[string]string    // what was last logged as blocked, by shard
}

// New returns a Manager; it does nothing by itself.
func New(cfg Config) (*Manager, error) {
	var errs []error
	if cfg.Store == nil || cfg.Nodes == nil || cfg.Members == nil {
		errs = append(errs, errors.New("members: Store, Nodes and Members have to be set"))
	}
	if v := cfg.Policy.MaxVoters; v != 0 && v != 1 && v != 3 && v != 5 {
		errs = append(errs, fmt.Errorf("members: MaxVoters %d: 1, 3 or 5 are possible", v))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	if cfg.Interval == 0 {
		cfg.Interval = time.Second
	}
	return &Manager{cfg: cfg, log: logbridge.OrDiscard(cfg.Logger).With("component", "members"),
		down: map[string]time.Time{}, lagging: map[string]time.Time{}, decision: map[string]Decision{}, logged: map[string]string{}}, nil
}

// Run works until ctx ends. It is for the cluster's leader: start it in
// host.Lead's function with that term.
func (m *Manager) Run(ctx context.Context, term uint64) {
	// What another leader or an earlier term observed says nothing about now.
	m.mu.Lock()
	clear(m.down)
	clear(m.lagging)
	m.mu.Unlock()
	changes, unsubscribe := m.cfg.Store.Subscribe()
	defer unsubscribe()
	tick := time.NewTicker(m.cfg.Interval)
	defer tick.Stop()
	seen, idle, due := "", 0, true
	for {
		if now := m.signature(ctx); due || now != seen || idle >= idleTicks || !m.settled() {
			seen, idle = now, 0
			for _, s := range m.cfg.Store.Shards().Shards() {
				m.look(ctx, s.Name, term)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			idle, due = idle+1, false
		case <-changes:
			due = true
			select { // a change comes with others: a short breath for all of them
			case <-time.After(m.cfg.Interval / 5):
			case <-ctx.Done():
				return
			}
		}
	}
}

// signature is equal while nothing about the nodes has changed that Plan looks at.
func (m *Manager) signature(ctx context.Context) string {
	policy := m.cfg.Policy.withDefaults()
	var b strings.Builder
	for _, n := range m.cfg.Members() {
		fmt.Fprintf(&b, "%q %q %q %v %v %v %v\n", n.ID, n.Zone, n.Voter, n.State, n.Leaving, n.For >= policy.JoinAfter, n.For >= policy.ReplaceAfter)
	}
	leaving, err := m.leaving(ctx)
	fmt.Fprintln(&b, slices.Sorted(maps.Keys(leaving)), err)
	return b.String()
}

// settled: the last look at every shard found nothing to do, nor to wait for.
func (m *Manager) settled() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.cfg.Store.Shards().Shards() {
		d, ok := m.decision[s.Name]
		if !ok || d.Step.Action != Nothing || len(d.Blocked) > 0 || len(m.down)+len(m.lagging) > 0 {
			return false
		}
	}
	return true
}

// look plans and executes steps until there is nothing to do at once.
func (m *Manager) look(ctx context.Context, shardName string, term uint64) {
	for range maxSteps {
		in, decidedOn, err := m.gather(ctx, shardName)
		if err != nil {
			m.forget(shardName)
			if ctx.Err() == nil {
				m.log.Debug("cannot look at the shard", "shard", shardName, "error", err)
			}
			return
		}
		d := Plan(in)
		m.remember(shardName, d)
		if d.Step.Action == Nothing {
			return
		}
		if err := m.execute(ctx, shardName, term, d.Step, decidedOn); err != nil {
			if ctx.Err() == nil {
				m.log.Info("membership step failed", "shard", shardName, "step", d.Step.Action, "node", m.name(d.Step.Node), "error", err)
			}
			return
		}
		m.log.Info("membership step", "shard", shardName, "step", d.Step.Action, "node", m.name(d.Step.Node), "reason", d.Step.Reason)
		if d.Step.Action == Start || d.Step.Action == Transfer {
			return // its effect needs a moment
		}
	}
}

// forget the decision of a shard, so that the next tick looks again.
func (m *Manager) forget(shardName string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.decision, shardName)
}

func (m *Manager) name(id string) string {
	for _, n := range m.cfg.Members() {
		if n.ID == id {
			return n.Name
		}
	}
	return id
}

func (m *Manager) remember(shardName string, d Decision) {
	blocked := strings.Join(d.Blocked, "; ")
	m.mu.Lock()
	m.decision[shardName] = d
	say := m.logged[shardName] != blockedKey(d)
	m.logged[shardName] = blockedKey(d)
	m.mu.Unlock()
	if say && blocked != "" {
		m.log.Info("membership change waits", "shard", shardName, "reason", blocked)
	}
}

// blockedKey leaves out the durations, which change with every look.
func blockedKey(d Decision) string {
	out := make([]string, len(d.Blocked))
	for i, b := range d.Blocked {
		out[i] = strings.Map(func(r rune) rune {
			if r >= '0' && r <= '9' || r == '.' {
				return -1
			}
			return r
		}, b)
	}
	return strings.Join(out, ";")
}

// Decisions returns the last decision of each shard, for status displays. It is
// empty on a node that does not lead.
func (m *Manager) Decisions() map[string]Decision {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := map[string]Decision{}
	for k, v := range m.decision {
		out[k] = v
	}
	return out
}

// gather makes the input of Plan.
func (m *Manager) gather(ctx context.Context, shardName string) (Input, uint64, error) {
	ms, err := m.cfg.Store.Membership(ctx, shardName)
	if err != nil {
		return Input{}, 0, err
	}
	leaving, err := m.leaving(ctx)
	if err != nil {
		return Input{}, 0, err
	}
	in := Input{Shard: shardName, Policy: m.cfg.Policy, Nodes: slices.Clone(m.cfg.Members())}
	for i := range in.Nodes {
		in.Nodes[i].Leaving = in.Nodes[i].Leaving || leaving[in.Nodes[i].ID]
	}
	var leader uint64
	for _, s := range m.cfg.Store.Status() {
		if s.Shard == shardName {
			leader = s.Leader.Replica
		}
	}
	for id, node := range ms.Voters {
		in.Replicas = append(in.Replicas, Replica{ID: id, Node: node, Voter: true, Leader: id == leader})
	}
	for id, node := range ms.NonVoters {
		in.Replicas = append(in.Replicas, Replica{ID: id, Node: node})
	}
	m.probe(ctx, shardName, in.Replicas)
	return in, ms.ConfigChangeID, nil
}

// probe asks all replicas how they are. There are at most seven.
func (m *Manager) probe(ctx context.Context, shardName string, replicas []Replica) {
	progress := make([]host.Progress, len(replicas))
	var newest uint64
	var wg sync.WaitGroup
	for i, r := range replicas {
		wg.Go(func() {
			if p, err := m.cfg.Store.Progress(ctx, r.Node, shardName); err == nil && p.Replica == r.ID {
				progress[i] = p
			}
		})
	}
	for _, s := range m.cfg.Store.Status() { // before the answers, so that load does not look like lag
		if s.Shard == shardName {
			newest = s.Applied
		}
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
			maps.DeleteFunc(set, func(key string, _ time.Time) bool { return strings.HasPrefix(key, shardName+"/") && !present[key] })
		}
	}()
	for i := range replicas {
		r, p := &replicas[i], progress[i]
		key := fmt.Sprintf("%s/%d", shardName, r.ID)
		present[key] = true
		r.Running = p.Replica == r.ID
		r.CaughtUp = r.Running && p.Ready && p.Applied+behind >= newest
		r.NotRunningFor = since(m.down, key, !r.Running)
		r.BehindFor = since(m.lagging, key, r.Running && !r.CaughtUp)
	}
}

func (m *Manager) execute(ctx context.Context, shardName string, term uint64, s Step, decidedOn uint64) error {
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
		if err := order(m.cfg.Nodes.StopReplica, s.Replica); err != nil {
			m.log.Debug("the removed replica was not told", "node", m.name(s.Node), "error", err)
		}
		return nil
	}
	return fmt.Errorf("members: unknown action %v", s.Action)
}

// leavingMark is the value of a mark; its version is 1.
type leavingMark struct {
	Version int    `json:"version"`
	Node    string `json:"node"`
}

func (m *Manager) client() (*kubernetes.Client, error) {
	s, _ := m.cfg.Store.Shards().ByID(shard.System)
	c, ok := m.cfg.Store.Client(s.Name)
	if !ok {
		return nil, fmt.Errorf("%w: %s", host.ErrNoReplica, s.Name)
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
// Joined is called for it.
func (m *Manager) Leave(ctx context.Context, nodeHostID string) error {
	if err := m.mayLeave(ctx, nodeHostID); err != nil {
		return err
	}
	if err := m.mark(ctx, nodeHostID); err != nil {
		return err
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
		if err == nil && !held {
			return nil
		}
		if err == nil {
			if err := m.mayLeave(ctx, nodeHostID); errors.Is(err, ErrCannotLeave) {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("node %s did not leave in time: %w", m.name(nodeHostID), ctx.Err())
		case <-tick.C:
		}
	}
}

func (m *Manager) holds(ctx context.Context, nodeHostID string) (bool, error) {
	for _, s := range m.cfg.Store.Shards().Shards() {
		ms, err := m.cfg.Store.Membership(ctx, s.Name)
		if errors.Is(err, host.ErrNoReplica) {
			continue // this node leaves, and has lost this replica already
		}
		if err != nil {
			return false, err
		}
		for _, set := range []map[uint64]string{ms.Voters, ms.NonVoters} {
			for _, node := range set {
				if node == nodeHostID {
					return true, nil
				}
			}
		}
	}
	return false, nil
}

// mayLeave asks Plan, without changing anything.
func (m *Manager) mayLeave(ctx context.Context, nodeHostID string) error {
	known := false
	for _, s := range m.cfg.Store.Shards().Shards() {
		in, _, err := m.gather(ctx, s.Name)
		if err != nil {
			return err
		}
		for i := range in.Nodes {
			if in.Nodes[i].ID == nodeHostID {
				in.Nodes[i].Leaving, known = true, true
			}
		}
		if reason, ok := Plan(in).Refused[nodeHostID]; ok {
			return fmt.Errorf("%w: %s", ErrCannotLeave, reason)
		}
	}
	if !known {
		return fmt.Errorf("%w: no node has the ID %s", ErrCannotLeave, nodeHostID)
	}
	return nil
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
