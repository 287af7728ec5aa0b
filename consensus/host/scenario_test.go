package host_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
)

// lead runs Lead on a node and reports what it is told.
type lead struct {
	started, ended chan uint64
	ctx            chan context.Context
	stop           func()
}

func leadOn(t *testing.T, n *storetest.Node) *lead {
	l := &lead{started: make(chan uint64, 10), ended: make(chan uint64, 10), ctx: make(chan context.Context, 10)}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	h := n.Host()
	wg.Go(func() {
		_ = h.Lead(ctx, storetest.Shard, func(ctx context.Context, term uint64) {
			l.ctx <- ctx
			l.started <- term
			<-ctx.Done()
			l.ended <- term
		})
	})
	l.stop = func() { cancel(); wg.Wait() }
	t.Cleanup(l.stop)
	return l
}

func recv[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(15 * time.Second):
		t.Fatalf("waiting for %s", what)
		panic("unreachable")
	}
}

// The leader is cut off. Its successor starts after its own fence is applied;
// what the deposed one still sends, through whichever node, is refused by the
// state machine, and its own function has ended by the time it hears of it.
func TestDeposedLeaderIsFenced(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(3)
	old := c.Leader()
	other := (old + 1) % 3
	leads := []*lead{leadOn(t, c.Nodes[0]), leadOn(t, c.Nodes[1]), leadOn(t, c.Nodes[2])}
	oldTerm := recv(t, leads[old].started, "the first leader")
	oldCtx := recv(t, leads[old].ctx, "its context")
	if host.Term(oldCtx) != oldTerm {
		t.Errorf("the context carries term %d, not %d", host.Term(oldCtx), oldTerm)
	}
	act := func(node int, term uint64) error {
		_, err := c.Nodes[node].Client().Put(host.WithTerm(ctx(t, 10*time.Second), term), "/skein/act", fmt.Sprint(term))
		return err
	}
	if err := act(old, oldTerm); err != nil {
		t.Fatal(err)
	}
	if err := act(other, oldTerm); err != nil {
		t.Fatalf("on behalf of the leader through another node: %v", err)
	}
	cut := time.Now()
	c.Isolate(old, true)
	recv(t, leads[old].ended, "the deposed leader to stop")
	t.Logf("the isolated leader stopped after %v", time.Since(cut).Round(time.Millisecond))
	var term uint64
	select {
	case term = <-leads[other].started:
	case term = <-leads[3-old-other].started:
	case <-time.After(15 * time.Second):
		t.Fatal("no new leader")
	}
	t.Logf("its successor acts after %v", time.Since(cut).Round(time.Millisecond))
	if term <= oldTerm {
		t.Errorf("term %d after %d", term, oldTerm)
	}
	if err := act(other, oldTerm); !errors.Is(err, host.ErrFenced) {
		t.Errorf("the deposed leader's write: %v", err)
	}
	if err := c.Nodes[other].Host().Admit(oldTerm); !errors.Is(err, host.ErrFenced) {
		t.Errorf("a node obeys the deposed leader: %v", err)
	}
	if err := act(other, term); err != nil {
		t.Error(err)
	}
	put(t, c, other, "/x", "no term")
	c.Isolate(old, false)
	c.Until("the old leader to hear of it", func() error {
		if err := act(old, oldTerm); !errors.Is(err, host.ErrFenced) {
			return fmt.Errorf("write: %w", err)
		}
		return nil
	})
	if get(t, c, old, "/skein/act") != fmt.Sprint(term) {
		t.Error("a fenced write was applied")
	}
}

// A node obeys a term and remembers it over a restart.
func TestAdmitRemembers(t *testing.T) {
	c := storetest.New(t, 1, nil)
	n := c.Nodes[0]
	for _, step := range []struct {
		term uint64
		ok   bool
	}{{5, true}, {5, true}, {4, false}, {9, true}} {
		if err := n.Host().Admit(step.term); (err == nil) != step.ok {
			t.Errorf("term %d: %v", step.term, err)
		}
	}
	n.Stop()
	n.Start()
	if err := n.Host().Admit(8); !errors.Is(err, host.ErrFenced) {
		t.Errorf("after a restart: %v", err)
	}
	if err := n.Host().Admit(9); err != nil {
		t.Error(err)
	}
}

// watchAll follows a prefix and fails on a gap, a duplicate or a wrong order.
func watchAll(t *testing.T, cl clientv3.Watcher, prefix string, until func(last string) bool) *sync.WaitGroup {
	t.Helper()
	w := cl.Watch(ctx(t, 60*time.Second), prefix, clientv3.WithPrefix(), clientv3.WithRev(1))
	var wg sync.WaitGroup
	wg.Go(func() {
		var last int64
		for r := range w {
			if err := r.Err(); err != nil {
				t.Errorf("watch: %v", err)
				return
			}
			for _, e := range r.Events {
				if last != 0 && e.Kv.ModRevision != last+1 {
					t.Errorf("revision %d after %d", e.Kv.ModRevision, last)
					return
				}
				last = e.Kv.ModRevision
				if until(string(e.Kv.Value)) {
					return
				}
			}
		}
		t.Errorf("watch ended at revision %d", last)
	})
	return &wg
}

// A replica that lags behind the log gets a snapshot while clients watch it; they
// miss nothing and see nothing twice.
func TestSnapshotUnderOpenWatches(t *testing.T) {
	c := storetest.New(t, 3, func(_ int, cfg *host.Config) { cfg.SnapshotEntries, cfg.CompactionOverhead = 60, 10 })
	c.Voters(3)
	leader := c.Leader()
	slow, other := (leader+1)%3, (leader+2)%3
	put(t, c, leader, "/w/first", "first")
	wg := watchAll(t, c.Nodes[slow].Client(), "/w/", func(v string) bool { return v == "last" })
	c.Isolate(slow, true)
	for i := range 400 {
		put(t, c, other, fmt.Sprintf("/w/%d", i%20), fmt.Sprint(i))
	}
	c.Isolate(slow, false)
	put(t, c, other, "/w/last", "last")
	wg.Wait()
	if got := get(t, c, slow, "/w/last"); got != "last" {
		t.Errorf("the replica reads %q", got)
	}
	if n := c.Nodes[slow].Host().SnapshotsInstalled(storetest.Shard); n == 0 {
		t.Error("no snapshot was installed: the test shows nothing")
	}
	// It restarts from the snapshot it got, too.
	c.Nodes[slow].Kill()
	c.Nodes[slow].Start()
	c.Until("the restart", func() error {
		if !c.Nodes[slow].Host().Ready(storetest.Shard) {
			return errors.New("not ready")
		}
		return nil
	})
	if got := get(t, c, slow, "/w/last"); got != "last" {
		t.Errorf("after the restart the replica reads %q", got)
	}
}

// The receiver of a snapshot goes away in the middle, again and again: that is
// the receiver's trouble alone.
func TestSnapshotReceiverDies(t *testing.T) {
	c := storetest.New(t, 4, func(_ int, cfg *host.Config) { cfg.SnapshotEntries, cfg.CompactionOverhead = 40, 5 })
	c.Voters(3)
	for i := range 60 {
		put(t, c, 0, fmt.Sprintf("/big/%d", i), strings.Repeat("x", 400<<10))
	}
	leader := c.Leader()
	bg := ctx(t, 40*time.Second)
	h := c.Nodes[leader].Host()
	m, err := h.Membership(bg, storetest.Shard)
	if err != nil {
		t.Fatal(err)
	}
	id := m.ConfigChangeID + 1
	if err := h.ChangeMembership(bg, storetest.Shard, host.AddNonVoter, id, c.Nodes[3].ID, m.ConfigChangeID); err != nil {
		t.Fatal(err)
	}
	if err := c.Nodes[3].Host().StartReplica(bg, storetest.Shard, id); err != nil {
		t.Fatal(err)
	}
	for i := range 2 { // in the middle of the 24 MB
		recv(t, c.Fuse(leader, 3, int64(3+5*i)<<20), "the transfer to break")
		put(t, c, leader, "/alive", "yes")
	}
	c.Until("the snapshot to arrive at last", func() error {
		p, err := h.Progress(bg, c.Nodes[3].ID, storetest.Shard)
		if err == nil && !p.Ready {
			err = errors.New("not ready")
		}
		return err
	})
	if get(t, c, 3, "/alive") != "yes" {
		t.Error("the new replica is not up to date")
	}
}

// A lease outlives a change of leader, is renewed through any node, and expires
// once: after the change, and with its keys.
func TestLeaseOverLeaders(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(3)
	leader := c.Leader()
	follower := (leader + 1) % 3
	cl := c.Nodes[follower].Client()
	g, err := cl.Grant(ctx(t, 10*time.Second), 2)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cl.Put(ctx(t, 10*time.Second), "/leased", "v", clientv3.WithLease(g.ID)); err != nil {
		t.Fatal(err)
	}
	for i := range 3 { // through every node, the primary and the others
		k, err := c.Nodes[i].Client().KeepAliveOnce(ctx(t, 10*time.Second), g.ID)
		if err != nil || k.TTL != g.TTL {
			t.Fatalf("keep alive through node %d: %v %v", i, k, err)
		}
		ttl, err := c.Nodes[i].Client().TimeToLive(ctx(t, 10*time.Second), g.ID, clientv3.WithAttachedKeys())
		if err != nil || len(ttl.Keys) != 1 || ttl.TTL < 0 {
			t.Fatalf("time to live through node %d: %+v %v", i, ttl, err)
		}
	}
	c.Nodes[leader].Kill()
	if _, err := cl.KeepAliveOnce(ctx(t, 10*time.Second), g.ID); err != nil {
		t.Fatalf("keep alive after the leader's death: %v", err)
	}
	if get(t, c, follower, "/leased") != "v" {
		t.Error("the lease did not survive the leader")
	}
	start := time.Now()
	c.Until("the lease to expire", func() error {
		if v := get(t, c, follower, "/leased"); v != "" {
			return fmt.Errorf("still %q", v)
		}
		return nil
	})
	if took := time.Since(start); took < time.Second {
		t.Errorf("it expired after %v, renewed for 2 s", took)
	}
	if _, err := cl.KeepAliveOnce(ctx(t, 10*time.Second), g.ID); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		t.Errorf("keep alive of an expired lease: %v", err)
	}
	if _, err := cl.Revoke(ctx(t, 10*time.Second), g.ID); !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		t.Errorf("revoke of an expired lease: %v", err)
	}
}

// Cut off, a voter and a replica without a vote both end the watches that require
// a leader, refuse linearizable reads, and serve stale ones. Connected again,
// everything goes on.
func TestCutOff(t *testing.T) {
	c := storetest.New(t, 4, nil)
	c.Voters(3)
	c.Add(ctx(t, 20*time.Second), 0, 3, false)
	put(t, c, 3, "/x", "1")
	leader := c.Leader()
	for _, node := range []int{(leader + 1) % 3, 3} {
		cl := c.Nodes[node].Client()
		if get(t, c, node, "/x") != "1" { // applied here: else it would be the watch's first event
			t.Fatal("wrong value")
		}
		needs := cl.Watch(clientv3.WithRequireLeader(ctx(t, 60*time.Second)), "/x")
		c.Isolate(node, true)
		start := time.Now()
		r, ok := <-needs
		if !ok || !errors.Is(r.Err(), rpctypes.ErrNoLeader) {
			t.Errorf("node %d: the watch ended with %v", node, r.Err())
		}
		t.Logf("node %d: watches ended %v after the cut", node, time.Since(start).Round(10*time.Millisecond))
		if _, err := cl.KV.Get(ctx(t, time.Second), "/x"); err == nil {
			t.Errorf("node %d: a linearizable read succeeded while cut off", node)
		}
		if r, err := cl.KV.Get(ctx(t, time.Second), "/x", clientv3.WithSerializable()); err != nil || len(r.Kvs) != 1 {
			t.Errorf("node %d: a stale read: %v %v", node, r, err)
		}
		if s := c.Nodes[node].Host().Status()[0]; s.Ready || s.SinceContact == 0 {
			t.Errorf("node %d: %+v", node, s)
		}
		c.Isolate(node, false)
		start = time.Now()
		c.Until("contact", func() error {
			if !c.Nodes[node].Host().Ready(storetest.Shard) {
				return errors.New("not ready")
			}
			return nil
		})
		t.Logf("node %d: ready %v after the cut was healed", node, time.Since(start).Round(10*time.Millisecond))
		if get(t, c, node, "/x") != "1" {
			t.Error("wrong value")
		}
	}
}

// A replica that was removed while its node was away finds out when it returns,
// although nobody tells it; and nothing of it is left when it is cleared.
func TestRemovedWhileAway(t *testing.T) {
	removed := make(chan host.Removed, 4)
	c := storetest.New(t, 4, func(i int, cfg *host.Config) {
		if i == 2 {
			cfg.OnRemoved = func(r host.Removed) { removed <- r }
		}
	})
	c.Voters(3)
	bg := ctx(t, 60*time.Second)
	c.Until("node 2 not to lead", func() error {
		if c.Leader() != 2 {
			return nil
		}
		return c.Nodes[2].Host().TransferLeadership(bg, storetest.Shard, 0)
	})
	id := c.Nodes[2].Host().Status()[0].Replica
	c.Nodes[2].Kill()
	h := c.Nodes[0].Host()
	m, err := h.Membership(bg, storetest.Shard)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.ChangeMembership(bg, storetest.Shard, host.Remove, id, "", m.ConfigChangeID); err != nil {
		t.Fatal(err)
	}
	if err := h.ChangeMembership(bg, storetest.Shard, host.Remove, id, "", m.ConfigChangeID); !errors.Is(err, host.ErrChangeRejected) {
		t.Errorf("a change that was decided on an old membership: %v", err)
	}
	c.Nodes[2].Start()
	start := time.Now()
	r := recv(t, removed, "the removal to be noticed")
	t.Logf("noticed after %v: %s", time.Since(start).Round(10*time.Millisecond), r.Reason)
	if r.Replica != id || r.Shard != storetest.Shard {
		t.Errorf("%+v", r)
	}
	h2 := c.Nodes[2].Host()
	if _, ok := h2.Client(storetest.Shard); ok || h2.Ready(storetest.Shard) {
		t.Error("the removed replica serves")
	}
	if err := r.Clear(bg); err != nil {
		t.Fatal(err)
	}
	c.Nodes[2].Stop()
	c.Nodes[2].Start()
	if s := c.Nodes[2].Host().Status()[0]; s.Role != host.RoleNone {
		t.Errorf("after clearing and a restart: %+v", s)
	}
	if again := c.AddTo(bg, storetest.Shard, 0, 2, true); again <= id {
		t.Errorf("replica ID %d after %d", again, id)
	}
	put(t, c, 2, "/x", "back")
}

// A voter that joined without a vote restarts as a voter, from its log alone and
// from a snapshot.
func TestPromotedRestarts(t *testing.T) {
	for _, entries := range []uint64{1000, 30} {
		t.Run(fmt.Sprint(entries), func(t *testing.T) {
			c := storetest.New(t, 3, func(_ int, cfg *host.Config) {
				cfg.SnapshotEntries, cfg.CompactionOverhead = entries, 5
			})
			c.Voters(3)
			for i := range 100 {
				put(t, c, i%3, "/x", fmt.Sprint(i))
			}
			for _, n := range c.Nodes { // all at once: only voters can elect a leader
				n.Kill()
			}
			for _, n := range c.Nodes {
				n.Start()
			}
			leader := c.Leader()
			for i, n := range c.Nodes {
				if got := get(t, c, i, "/x"); got != "99" {
					t.Errorf("%s reads %q", n.Name, got)
				}
			}
			c.Nodes[leader].Kill()
			put(t, c, (leader+1)%3, "/x", "two of three")
		})
	}
}

// A machine that is renamed keeps its log.
func TestHostnameChange(t *testing.T) {
	dir := t.TempDir()
	c := storetest.New(t, 1, func(_ int, cfg *host.Config) { cfg.Dir = dir })
	c.Voters(1)
	put(t, c, 0, "/x", "kept")
	c.Nodes[0].Stop()
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "log", name), filepath.Join(dir, "log", "old-name")); err != nil {
		t.Fatal(err)
	}
	c.Nodes[0].Start()
	c.Leader()
	if got := get(t, c, 0, "/x"); got != "kept" {
		t.Errorf("the renamed machine reads %q", got)
	}
}

// Bad configuration is reported whole, and orders that make no sense are refused.
func TestConfigAndStartErrors(t *testing.T) {
	err := host.Config{ListenAddr: "nonsense", ElectionRTT: 2, HeartbeatRTT: 2, RTT: time.Microsecond, NodeHostID: "x"}.Validate()
	if err == nil {
		t.Fatal("accepted")
	}
	for _, part := range []string{"NodeName", "Dir", "ListenAddr", "ElectionRTT", "RTT 1µs", "NodeHostID", "Resolve"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%s is not reported in: %v", part, err)
		}
	}
	c := storetest.New(t, 1, nil)
	_, err = host.New(host.Config{NodeName: "b", Dir: t.TempDir(), ListenAddr: c.Nodes[0].Host().Addr(), Resolve: func(string) (string, bool) { return "", false }})
	if err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("busy port: %v", err)
	}
	bg := ctx(t, 10*time.Second)
	h := c.Nodes[0].Host()
	if err := h.StartReplica(bg, "nonsense", 3); !errors.Is(err, host.ErrUnknownShard) {
		t.Errorf("unknown shard: %v", err)
	}
	if _, err := h.Membership(bg, storetest.Shard); !errors.Is(err, host.ErrNoReplica) {
		t.Errorf("no replica: %v", err)
	}
	if err := h.StopReplica(bg, storetest.Shard, 3, true); err != nil {
		t.Errorf("stop what is not there: %v", err)
	}
	for range 2 {
		if err := h.Bootstrap(bg); err != nil {
			t.Errorf("bootstrap: %v", err)
		}
	}
	if err := h.StartReplica(bg, storetest.Shard, 1); err != nil {
		t.Errorf("start what runs: %v", err)
	}
	if err := h.StopReplica(bg, storetest.Shard, 0, true); err != nil || !h.Ready(storetest.Shard) {
		t.Errorf("an outdated order stopped the replica: %v", err)
	}
}
