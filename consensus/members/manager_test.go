package members_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
	"skein.io/skein/consensus/members"
	"skein.io/skein/consensus/shard"
)

// fleet runs a Manager under Lead on every node, with a failure detector that
// knows the truth.
type fleet struct {
	t *testing.T
	c *storetest.Cluster

	mu    sync.Mutex // guards below
	known int        // nodes 0..known-1 are in the cluster
	state map[string]members.State
	since map[string]time.Time
	mgr   []*members.Manager
	stops []func()
	zones []string                      // by node; may be short
	disk  map[int]time.Duration         // what a node's disk takes; 1 ms
	voter map[string]members.Preference // by NodeHostID
}

func newFleet(t *testing.T, n int, zones ...string) *fleet { return newFleetOf(t, n, nil, zones...) }

// newFleetOf nodes with another configuration.
func newFleetOf(t *testing.T, n int, tune func(*host.Config), zones ...string) *fleet {
	f := &fleet{t: t, known: 1, state: map[string]members.State{}, since: map[string]time.Time{}, zones: zones, disk: map[int]time.Duration{}, voter: map[string]members.Preference{}, stops: make([]func(), n), mgr: make([]*members.Manager, n)}
	f.c = storetest.New(t, n, func(i int, cfg *host.Config) {
		cfg.Disk = host.DiskRules{Interval: 100 * time.Millisecond, SlowFor: 300 * time.Millisecond}
		cfg.MeasureDisk = func() (time.Duration, error) {
			f.mu.Lock()
			defer f.mu.Unlock()
			return cmp.Or(f.disk[i], time.Millisecond), nil
		}
		cfg.OnRemoved = func(r host.Removed) {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			if err := r.Clear(ctx); err != nil && !errors.Is(err, host.ErrClosed) {
				t.Errorf("node %d: %v", i, err)
			}
		}
		if tune != nil {
			tune(cfg)
		}
	})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := f.c.Nodes[0].Host().Bootstrap(ctx); err != nil {
		t.Fatal(err)
	}
	for i := range n {
		f.run(i)
	}
	t.Cleanup(func() {
		for i := range n {
			f.stops[i]()
		}
	})
	return f
}

func (f *fleet) run(i int) {
	h := f.c.Nodes[i].Host()
	m, err := members.New(members.Config{Store: h, Nodes: f, Members: f.view, Interval: 200 * time.Millisecond,
		Policy: members.Policy{ReplaceAfter: 1500 * time.Millisecond, JoinAfter: 100 * time.Millisecond}})
	if err != nil {
		f.t.Fatal(err)
	}
	f.mu.Lock()
	f.mgr[i] = m
	f.mu.Unlock()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := h.Lead(ctx, storetest.Shard, m.Run); err != nil && !errors.Is(err, host.ErrClosed) {
			f.t.Errorf("lead on node %d: %v", i, err)
		}
	})
	f.stops[i] = func() { cancel(); wg.Wait() }
}

func (f *fleet) view() (out []members.Node) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, n := range f.c.Nodes[:f.known] {
		x := members.Node{ID: n.ID, Name: n.Name, State: f.state[n.ID], For: time.Since(f.since[n.ID]), Voter: f.voter[n.ID]}
		if i < len(f.zones) {
			x.Zone = f.zones[i]
		}
		out = append(out, x)
	}
	return out
}

func (f *fleet) set(i int, s members.State) {
	f.mu.Lock()
	defer f.mu.Unlock()
	id := f.c.Nodes[i].ID
	f.state[id], f.since[id] = s, time.Now()
}

func (f *fleet) grow(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.known = n
}

func (f *fleet) nodeHost(id string) (*host.Host, error) {
	i := slices.IndexFunc(f.c.Nodes, func(n *storetest.Node) bool { return n.ID == id })
	if h := f.c.Nodes[i].Host(); h != nil {
		return h, nil
	}
	return nil, errors.New("connection refused")
}

func (f *fleet) StartReplica(ctx context.Context, id, shardName string, replica, term uint64) error {
	h, err := f.nodeHost(id)
	if err == nil {
		err = h.Admit(term)
	}
	if err != nil {
		return err
	}
	return h.StartReplica(ctx, shardName, replica)
}

func (f *fleet) StopReplica(ctx context.Context, id, shardName string, replica, term uint64) error {
	h, err := f.nodeHost(id)
	if err == nil {
		err = h.Admit(term)
	}
	if err != nil {
		return err
	}
	return h.DropRemoved(ctx, shardName, replica)
}

// shape is voters/spares by node number, as node via sees them, the same for all
// shards.
func (f *fleet) shape(via int) (string, host.Membership, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	h := f.c.Nodes[via].Host()
	if h == nil {
		return "", host.Membership{}, errors.New("down")
	}
	text := func(set map[uint64]string) string {
		var out []string
		for _, id := range set {
			out = append(out, fmt.Sprint(slices.IndexFunc(f.c.Nodes, func(n *storetest.Node) bool { return n.ID == id })))
		}
		slices.Sort(out)
		return strings.Join(out, "")
	}
	var shapes []string
	var system host.Membership
	for _, s := range shard.Default().Shards() {
		m, err := h.Membership(ctx, s.Name)
		if err != nil {
			return "", m, err
		}
		if s.ID == shard.System {
			system = m
		}
		shapes = append(shapes, text(m.Voters)+"/"+text(m.NonVoters))
	}
	if c := slices.Compact(slices.Clone(shapes)); len(c) == 1 {
		return c[0], system, nil
	}
	return strings.Join(shapes, " "), system, nil // they differ, which no test wants
}

func (f *fleet) wait(via int, want string) host.Membership {
	f.t.Helper()
	start := time.Now()
	var m host.Membership
	f.c.Until("voters/spares "+want, func() error {
		got, ms, err := f.shape(via)
		if err == nil && got != want {
			err = fmt.Errorf("it is %s; %+v", got, f.mgr[via].Decisions())
		}
		m = ms
		return err
	})
	f.t.Logf("%s after %v", want, time.Since(start).Round(10*time.Millisecond))
	return m
}

func (f *fleet) ready(i int) {
	f.t.Helper()
	f.c.Until("the node to serve", func() error {
		if h := f.c.Nodes[i].Host(); !h.Ready(storetest.Shard) {
			return fmt.Errorf("%+v", h.Status())
		}
		return nil
	})
}

// One node, two, three, four: the cluster chooses its voters by itself; a dead
// leader is replaced by the spare, and comes back as the spare; nodes leave.
func TestLifeOfACluster(t *testing.T) {
	f := newFleet(t, 4)
	f.wait(0, "0/")
	f.grow(2)
	f.wait(0, "0/1")
	f.grow(3)
	f.wait(0, "012/")
	f.grow(4)
	m := f.wait(0, "012/3")
	write := func(via int, v string) {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if _, err := f.c.Nodes[via].Client().Put(ctx, "/skein/test", v); err != nil {
			t.Fatal(err)
		}
	}
	f.ready(3)
	write(3, "one")

	// The leader dies.
	dead := f.c.Leader()
	var old uint64
	for id, node := range m.Voters {
		if node == f.c.Nodes[dead].ID {
			old = id
		}
	}
	f.c.Nodes[dead].Kill()
	f.stops[dead]()
	f.set(dead, members.Dead)
	want := strings.Replace("0123", fmt.Sprint(dead), "", 1) + "/"
	f.wait(3, want)
	write(3, "two")

	// It returns: its replica has been removed while it was away.
	f.c.Nodes[dead].Start()
	f.run(dead)
	f.set(dead, members.Alive)
	m = f.wait(3, want+fmt.Sprint(dead))
	for id, node := range m.NonVoters {
		if node == f.c.Nodes[dead].ID && id <= old {
			t.Errorf("replica ID %d after %d", id, old)
		}
	}
	f.ready(dead)
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if r, err := f.c.Nodes[dead].Client().KV.Get(ctx, "/skein/test"); err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != "two" {
		t.Errorf("the returned node reads %v, %v", r, err)
	}

	// Nodes leave, the leader first each time, until one is left.
	for left := 4; left > 1; left-- {
		leader := f.c.Leader()
		start := time.Now()
		if err := f.mgr[leader].Leave(ctx, f.c.Nodes[leader].ID); err != nil {
			t.Fatalf("leave with %d nodes: %v", left, err)
		}
		t.Logf("node %d of %d left after %v", leader, left, time.Since(start).Round(10*time.Millisecond))
		f.set(leader, members.Left)
		f.stops[leader]()
		f.stops[leader] = func() {}
		f.c.Nodes[leader].Stop()
		write(f.c.Leader(), fmt.Sprint(left))
	}
	last := f.c.Leader()
	err := f.mgr[last].Leave(ctx, f.c.Nodes[last].ID)
	if !errors.Is(err, members.ErrCannotLeave) || !strings.Contains(err.Error(), "only node") {
		t.Errorf("the last node leaves: %v", err)
	}
	write(last, "end")
}

// With one voter of three dead and no spare nobody may leave, and the dead one is
// kept until it returns.
func TestLeaveRefused(t *testing.T) {
	f := newFleet(t, 3)
	f.grow(3)
	f.wait(0, "012/")
	leader := f.c.Leader()
	dead, other := (leader+1)%3, (leader+2)%3
	f.c.Nodes[dead].Kill()
	f.stops[dead]()
	f.set(dead, members.Dead)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	f.c.Until("the refusal", func() error {
		err := f.mgr[other].Leave(ctx, f.c.Nodes[other].ID)
		if !errors.Is(err, members.ErrCannotLeave) || !strings.Contains(err.Error(), "bring n") {
			return fmt.Errorf("leave: %w", err)
		}
		t.Log(err)
		return nil
	})
	f.c.Until("an explanation of what is blocked", func() error {
		d := f.mgr[leader].Decisions()[storetest.Shard]
		if !strings.Contains(strings.Join(d.Blocked, ";"), "no spare to replace it") {
			return fmt.Errorf("%+v", d)
		}
		return nil
	})
	f.wait(other, "012/")
	f.c.Nodes[dead].Start()
	f.run(dead)
	f.set(dead, members.Alive)
	f.ready(dead)
}
