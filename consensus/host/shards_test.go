package host_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
)

// keyIn is a key of each shard.
var keyIn = map[string]string{"system": "/registry/configmaps/a/x", "pods": "/registry/pods/a/x", "events": "/registry/events/a/x"}

func write(t *testing.T, n *storetest.Node, shard string, term uint64, value string) error {
	c, ok := n.Host().Client(shard)
	if !ok {
		return fmt.Errorf("%s has no replica of %s", n.Name, shard)
	}
	_, err := c.Put(host.WithTerm(ctx(t, 10*time.Second), term), keyIn[shard], value)
	return err
}

// moveTo makes a node the leader of a shard.
func moveTo(t *testing.T, c *storetest.Cluster, shard string, node int) {
	t.Helper()
	c.Until(fmt.Sprintf("%s to lead %s", c.Nodes[node].Name, shard), func() error {
		at := c.LeaderOf(shard)
		if at == node {
			return nil
		}
		h := c.Nodes[at].Host()
		m, err := h.Membership(ctx(t, 5*time.Second), shard)
		if err != nil {
			return err
		}
		for id, target := range m.Voters {
			if target == c.Nodes[node].ID {
				err = h.TransferLeadership(ctx(t, 5*time.Second), shard, id)
			}
		}
		return errors.Join(err, errors.New("not yet"))
	})
}

func fences(h *host.Host) (out []uint64) {
	for _, s := range h.Status() {
		out = append(out, s.Fence)
	}
	return out
}

// Each shard is led by another node. The cluster's leader is cut off, as good as
// paused, and comes back: on every shard its term is refused by then, although
// it never led two of them.
func TestDeposedLeaderIsFencedOnEveryShard(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(3)
	moveTo(t, c, "system", 0)
	moveTo(t, c, "pods", 1)
	moveTo(t, c, "events", 2)
	leads := []*lead{leadOn(t, c.Nodes[0]), leadOn(t, c.Nodes[1]), leadOn(t, c.Nodes[2])}
	oldTerm := recv(t, leads[0].started, "the first leader")
	for shard := range keyIn {
		if err := write(t, c.Nodes[0], shard, oldTerm, "old"); err != nil {
			t.Fatalf("%s: %v", shard, err)
		}
	}
	cut := time.Now()
	c.Isolate(0, true)
	recv(t, leads[0].ended, "the deposed leader to stop")
	var term uint64
	next := 1
	select {
	case term = <-leads[1].started:
	case term = <-leads[2].started:
		next = 2
	case <-time.After(15 * time.Second):
		t.Fatal("no new leader")
	}
	t.Logf("its successor acts after %v", time.Since(cut).Round(time.Millisecond))
	for shard := range keyIn {
		if err := write(t, c.Nodes[next], shard, oldTerm, "late"); !errors.Is(err, host.ErrFenced) {
			t.Errorf("%s: the deposed leader's write through another node: %v", shard, err)
		}
		if err := write(t, c.Nodes[next], shard, term, "new"); err != nil {
			t.Errorf("%s: %v", shard, err)
		}
	}
	c.Isolate(0, false)
	for shard := range keyIn {
		c.Until("the old leader to be refused by "+shard, func() error {
			if err := write(t, c.Nodes[0], shard, oldTerm, "late"); !errors.Is(err, host.ErrFenced) {
				return fmt.Errorf("write: %w", err)
			}
			return nil
		})
		cl, _ := c.Nodes[0].Host().Client(shard)
		if r, err := cl.KV.Get(ctx(t, 10*time.Second), keyIn[shard]); err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != "new" {
			t.Errorf("%s: %v, %v", shard, r, err)
		}
	}
	if err := c.Nodes[0].Host().Admit(oldTerm); !errors.Is(err, host.ErrFenced) {
		t.Errorf("a node obeys the deposed leader: %v", err)
	}
}

// A node leads the cluster before it has got replicas of the other shards, as
// when the founder dies at the wrong moment: it fences them and changes their
// memberships through others. A node that does not lead is not obeyed.
func TestLeadWithoutReplicasOfOtherShards(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(1)
	bg := ctx(t, time.Minute)
	c.AddTo(bg, storetest.Shard, 0, 1, true)
	c.AddTo(bg, storetest.Shard, 0, 2, true)
	moveTo(t, c, storetest.Shard, 1)
	l := leadOn(t, c.Nodes[1])
	term := recv(t, l.started, "the leader without replicas")
	if got := fences(c.Nodes[0].Host()); !slices.Equal(got[1:], []uint64{term, term}) {
		t.Errorf("fences %v, want %d on the shards that node 0 leads", got, term)
	}
	h := c.Nodes[1].Host()
	m, err := h.Membership(bg, "pods")
	if err != nil || len(m.Voters) != 1 {
		t.Fatalf("%+v, %v", m, err)
	}
	id := m.ConfigChangeID + 1
	if err := h.ChangeMembership(bg, "pods", host.AddNonVoter, id, c.Nodes[1].ID, m.ConfigChangeID); err != nil {
		t.Fatal(err)
	}
	if err := h.ChangeMembership(bg, "pods", host.AddNonVoter, id, c.Nodes[2].ID, m.ConfigChangeID); !errors.Is(err, host.ErrChangeRejected) {
		t.Errorf("a change that was decided on an old membership: %v", err)
	}
	if err := h.StartReplica(bg, "pods", id); err != nil {
		t.Fatal(err)
	}
	c.Until("the replica to catch up", func() error {
		if !h.Ready("pods") {
			return errors.New("not ready")
		}
		return nil
	})
	if err := write(t, c.Nodes[1], "pods", term, "x"); err != nil {
		t.Error(err)
	}
	// Node 2 votes in system but leads nothing.
	if _, err := c.Nodes[2].Host().Membership(bg, "events"); !errors.Is(err, host.ErrNoReplica) {
		t.Errorf("a node that does not lead reads a membership: %v", err)
	}
}

// While another shard has no leader the cluster's may not act: nothing there
// could refuse its predecessor. It acts as soon as there is one again.
func TestLeadWaitsForAShardWithoutLeader(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(1)
	bg := ctx(t, time.Minute)
	c.Add(bg, 0, 1, true)
	c.AddTo(bg, storetest.Shard, 0, 2, true)
	moveTo(t, c, storetest.Shard, 0)
	c.Nodes[0].Kill() // pods and events keep one of two voters
	next := c.Leader()
	l := leadOn(t, c.Nodes[next])
	select {
	case term := <-l.started:
		t.Fatalf("leads in term %d without a fence: %v", term, fences(c.Nodes[1].Host()))
	case <-time.After(2 * time.Second):
	}
	c.Nodes[0].Start()
	start := time.Now()
	var term uint64
	select {
	case term = <-l.started:
	case <-time.After(15 * time.Second):
		if now := c.Leader(); now != next {
			t.Skipf("node %d took over", now) // a third election; not what this test is about
		}
		t.Fatal("does not lead although all shards have leaders")
	}
	t.Logf("acts %v after the voter is back", time.Since(start).Round(time.Millisecond))
	c.Until("the fences", func() error {
		if got := fences(c.Nodes[1].Host()); !slices.Equal(got, []uint64{term, term, term}) {
			return fmt.Errorf("%v, want %d", got, term)
		}
		return nil
	})
}

// The node that leads everything dies: every shard takes writes again, and the
// next leader of the cluster acts, within the time of an election.
func TestFailoverOfAllShards(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(3)
	for shard := range keyIn {
		moveTo(t, c, shard, 0)
	}
	leads := []*lead{leadOn(t, c.Nodes[1]), leadOn(t, c.Nodes[2])}
	c.Nodes[0].Kill()
	died := time.Now()
	type result struct {
		shard string
		took  time.Duration
		err   error
	}
	results := make(chan result, len(keyIn))
	for shard := range keyIn {
		go func() {
			err := write(t, c.Nodes[1], shard, 0, "next")
			results <- result{shard, time.Since(died), err}
		}()
	}
	for range keyIn {
		r := <-results
		t.Logf("%s: written after %v", r.shard, r.took.Round(time.Millisecond))
		if r.err != nil || r.took > 5*time.Second {
			t.Errorf("%s: %v after %v", r.shard, r.err, r.took)
		}
	}
	select {
	case <-leads[0].started:
	case <-leads[1].started:
	case <-time.After(10 * time.Second):
		t.Fatal("nobody leads")
	}
	t.Logf("the next leader acts after %v", time.Since(died).Round(time.Millisecond))
}

// The cluster's leader moves the leadership of a shard that another node leads.
// Others cannot, and an heir that does not answer is refused at once.
func TestTransferByTheClustersLeader(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(3)
	moveTo(t, c, "system", 0)
	moveTo(t, c, "pods", 1)
	m, err := c.Nodes[0].Host().Membership(ctx(t, 5*time.Second), "pods")
	if err != nil {
		t.Fatal(err)
	}
	var third uint64
	for id, node := range m.Voters {
		if node == c.Nodes[2].ID {
			third = id
		}
	}
	if err := c.Nodes[2].Host().TransferLeadership(ctx(t, 5*time.Second), "pods", third); err == nil {
		t.Error("a node that does not lead the cluster took a leadership")
	}
	if err := c.Nodes[0].Host().TransferLeadership(ctx(t, 5*time.Second), "pods", third); err != nil {
		t.Fatal(err)
	}
	c.Until("the transfer", func() error {
		if at := c.LeaderOf("pods"); at != 2 {
			return fmt.Errorf("node %d leads", at)
		}
		return nil
	})
	if c.Leader() != 0 {
		t.Error("the cluster has another leader too")
	}
	c.Nodes[1].Kill()
	start := time.Now()
	for id, node := range m.Voters {
		if node == c.Nodes[1].ID {
			if err := c.Nodes[0].Host().TransferLeadership(ctx(t, 5*time.Second), "pods", id); err == nil {
				t.Error("transferred to a dead node")
			}
		}
	}
	if err := write(t, c.Nodes[0], "pods", 0, "y"); err != nil || time.Since(start) > 3*time.Second {
		t.Errorf("a write after a refused transfer: %v after %v", err, time.Since(start))
	}
}

// Every shard tells the progress of its watches when it is asked, through every node: caches of lists rely on it.
func TestProgressOfEveryShard(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(3)
	for name, key := range keyIn {
		for _, n := range c.Nodes {
			store, ok := n.Host().Client(name)
			if !ok {
				t.Fatalf("%s has no replica of %s", n.Name, name)
			}
			wctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx(t, 15*time.Second)))
			events := store.Watch(wctx, key, clientv3.WithPrefix(), clientv3.WithCreatedNotify())
			<-events
			r, err := store.Put(wctx, key+"/elsewhere", "x") // known everywhere once it is told
			if err != nil {
				t.Fatal(err)
			}
			for told := false; !told; {
				if err := store.RequestProgress(wctx); err != nil {
					t.Fatal(err)
				}
				select {
				case w := <-events:
					if w.Err() != nil {
						t.Fatalf("%s on %s: %v", name, n.Name, w.Err())
					}
					told = w.IsProgressNotify() && w.Header.Revision >= r.Header.Revision
				case <-time.After(20 * time.Millisecond): // not all was delivered yet: nobody is told anything
				}
			}
			cancel()
		}
	}
}
