package members

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

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
	NodeState(ctx context.Context, nodeHostID string) (host.NodeState, error)
	TransferLeadership(ctx context.Context, shardName string, to uint64) error
}

// Nodes carries orders to other nodes, and to this one. Orders carry the term of
// the leader that gives them; a node refuses a lower one than it has obeyed (see
// host.Admit). Both must be idempotent.
type Nodes interface {
	// StartReplica makes the node with that NodeHostID call Host.StartReplica.
	StartReplica(ctx context.Context, nodeHostID, shardName string, replicaID, term uint64) error
	// StopReplica makes it call Host.DropRemoved. It is only a hurry: a replica
	// finds out by itself that it has been removed.
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
	// lookTimeout bounds the look at one shard, patience that at one that could not
	// be looked at the last time: it must not hold up the others.
	lookTimeout = 3 * time.Second
	patience    = 300 * time.Millisecond
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
	failing  map[string]string    // why a shard cannot be looked at
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
		down: map[string]time.Time{}, lagging: map[string]time.Time{}, decision: map[string]Decision{}, logged: map[string]string{}, failing: map[string]string{}}, nil
}

// Run works until ctx ends. It is for the cluster's leader: start it in
// host.Lead's function with that term.
func (m *Manager) Run(ctx context.Context, term uint64) {
	// What another leader or an earlier term observed says nothing about now.
	m.mu.Lock()
	clear(m.down)
	clear(m.lagging)
	clear(m.failing)
	m.mu.Unlock()
	defer func() { // another node decides now
		m.mu.Lock()
		defer m.mu.Unlock()
		clear(m.decision)
		clear(m.failing)
	}()
	changes, unsubscribe := m.cfg.Store.Subscribe()
	defer unsubscribe()
	tick := time.NewTicker(m.cfg.Interval)
	defer tick.Stop()
	seen, idle, due := "", 0, true
	for {
		if now := m.signature(ctx); due || now != seen || idle >= idleTicks || !m.settled() {
			seen, idle = now, 0
			m.round(ctx, term)
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

// round looks at all shards and takes their steps, those of the system shard
// first: the others follow it.
func (m *Manager) round(ctx context.Context, term uint64) {
	facts := m.gatherAll(ctx)
	var system *Decision
	for _, f := range facts {
		if f.shard.ID != shard.System && system == nil {
			m.forget(f.shard.Name)
			continue // nothing to follow; it is looked at again soon
		}
		d := m.steps(ctx, term, f, facts, system)
		if f.shard.ID == shard.System {
			system = d
		}
	}
	m.sweep(ctx, facts)
}

// steps plans and executes until there is nothing to do at once in this shard. It
// returns the last decision, nil if there is none.
func (m *Manager) steps(ctx context.Context, term uint64, f *facts, all []*facts, system *Decision) (last *Decision) {
	name := f.shard.Name
	for range maxSteps {
		if f.err != nil {
			m.fail(ctx, name, f.err)
			return last
		}
		d := Plan(f.input(all, system))
		m.remember(name, d)
		last = &d
		if d.Step.Action == Nothing {
			return last
		}
		if err := m.execute(ctx, name, term, d.Step, f.decidedOn); err != nil {
			if ctx.Err() == nil {
				m.log.Info("membership step failed", "shard", name, "step", d.Step.Action, "node", m.name(d.Step.Node), "error", err)
			}
			return last
		}
		m.log.Info("membership step", "shard", name, "step", d.Step.Action, "node", m.name(d.Step.Node), "reason", d.Step.Reason)
		if d.Step.Action == Start || d.Step.Action == Transfer {
			return last // its effect needs a moment
		}
		f.states.forget(d.Step.Node)
		*f = *m.gather(ctx, f.shard, f.states)
	}
	return last
}

// fail notes that a shard cannot be looked at.
func (m *Manager) fail(ctx context.Context, shardName string, err error) {
	if ctx.Err() != nil {
		return
	}
	m.mu.Lock()
	delete(m.decision, shardName)
	_, before := m.failing[shardName]
	m.failing[shardName] = err.Error()
	m.mu.Unlock()
	if !before {
		m.log.Warn("the membership of a shard cannot be looked after", "shard", shardName, "error", err)
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
	delete(m.failing, shardName)
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
// empty on a node that does not lead. A shard that cannot be looked at has one
// that says why in Blocked.
func (m *Manager) Decisions() map[string]Decision {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := map[string]Decision{}
	for k, v := range m.decision {
		out[k] = v
	}
	for k, v := range m.failing {
		out[k] = Decision{Blocked: []string{v}}
	}
	return out
}
