package host_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
	"skein.io/skein/consensus/mvcc"
)

const bump = 1_000_000

// proofs of generations in these tests are their numbers.
func verify(proof []byte) (uint64, error) {
	n, err := strconv.ParseUint(string(proof), 10, 64)
	if err != nil {
		return 0, errors.New("forged")
	}
	return n, nil
}

// addTo makes a node a voter of every shard through another node.
func addTo(t testing.TB, c *storetest.Cluster, via, node int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	for _, s := range c.Nodes[via].Host().Shards().Shards() {
		m, err := c.Nodes[via].Host().Membership(ctx, s.Name)
		noErr(t, err)
		id := m.ConfigChangeID + 1
		noErr(t, c.Nodes[via].Host().ChangeMembership(ctx, s.Name, host.AddNonVoter, id, c.Nodes[node].ID, m.ConfigChangeID))
		noErr(t, c.Nodes[node].Host().StartReplica(ctx, s.Name, id))
		c.Until("caught up", func() error {
			if !c.Nodes[node].Host().Ready(s.Name) {
				return errors.New("not ready")
			}
			return nil
		})
		m, err = c.Nodes[via].Host().Membership(ctx, s.Name)
		noErr(t, err)
		noErr(t, c.Nodes[via].Host().ChangeMembership(ctx, s.Name, host.Promote, id, c.Nodes[node].ID, m.ConfigChangeID))
	}
}

func getFrom(t testing.TB, c *storetest.Cluster, node int, shardName, key string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	client, ok := c.Nodes[node].Host().Client(shardName)
	if !ok {
		t.Fatalf("node %d has no replica of %s", node, shardName)
	}
	r, err := client.KV.Get(ctx, key)
	noErr(t, err)
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

// A backup becomes a new cluster: others who join get all of it, revisions go on
// above, and watches from before are told to start anew.
func TestRebuildFromCut(t *testing.T) {
	table := twoShards(t)
	c := storetest.New(t, 3, func(n int, cfg *host.Config) { cfg.Shards, cfg.VerifyGeneration = table, verify })
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	h := c.Nodes[0].Host()
	noErr(t, h.Bootstrap(ctx))
	var revision int64
	for i := range 50 {
		for _, s := range []string{"a", "b"} {
			client, _ := h.Client(map[string]string{"a": storetest.Shard, "b": "other"}[s])
			r, err := client.KV.Put(ctx, fmt.Sprintf("/%s/%d", s, i%30), strconv.Itoa(i))
			noErr(t, err)
			revision = r.Header.Revision
		}
	}
	client, _ := h.Client(storetest.Shard)
	lease, err := client.Lease.Grant(ctx, 3600)
	noErr(t, err)
	_, err = client.KV.Put(ctx, "/a/leased", "x", clientv3.WithLease(lease.ID))
	noErr(t, err)
	cut, err := h.Cut(ctx)
	noErr(t, err)
	dir := filepath.Join(t.TempDir(), "new")
	for _, i := range cut.Images {
		var b bytes.Buffer
		_, err := i.WriteTo(&b)
		noErr(t, err)
		noErr(t, mvcc.PlaceImage(host.RebuildDir(dir, i.Shard.ID), &b))
		out, err := mvcc.Rebase(host.RebuildDir(dir, i.Shard.ID), bump, "test")
		noErr(t, err)
		if out.From != i.Revision || out.To != i.Revision+bump {
			t.Errorf("rebased %+v, the image had %d", out, i.Revision)
		}
	}
	noErr(t, cut.Close())
	_, err = client.KV.Put(ctx, "/a/0", "after the backup")
	noErr(t, err)
	c.Nodes[0].Stop()
	noErr(t, host.WriteGeneration(dir, []byte("1")))
	cfg := *c.Nodes[0].Config()
	cfg.Dir = dir
	start := time.Now()
	noErr(t, host.Rebuild(ctx, cfg))
	t.Logf("rebuilt in %s", time.Since(start))
	c.Nodes[0].Config().Dir = dir
	c.Nodes[0].Start()
	for n := 1; n < 3; n++ {
		_, err := c.Nodes[n].Host().Adopt(ctx, []byte("1"))
		noErr(t, err)
		addTo(t, c, 0, n)
	}
	for n := range 3 {
		for _, x := range []struct{ key, want string }{{"/a/0", "30"}, {"/a/29", "29"}, {"/a/leased", "x"}} {
			if got := getFrom(t, c, n, storetest.Shard, x.key); got != x.want {
				t.Errorf("node %d: %s is %q, want %q", n, x.key, got, x.want)
			}
		}
		if got := getFrom(t, c, n, "other", "/b/19"); got != "49" {
			t.Errorf("node %d: /b/19 is %q", n, got)
		}
	}
	client, _ = c.Nodes[2].Host().Client(storetest.Shard)
	r, err := client.KV.Put(ctx, "/a/0", "new")
	noErr(t, err)
	if r.Header.Revision <= revision+bump {
		t.Errorf("the first new revision is %d, before it was %d", r.Header.Revision, revision)
	}
	if ls, err := client.Lease.Leases(ctx); err != nil || len(ls.Leases) != 1 {
		t.Errorf("leases %v, %v", ls, err)
	}
	for _, from := range []int64{revision, revision + 500} { // also one that the old cluster may have reached after the backup
		w := <-client.Watcher.Watch(ctx, "/a/", clientv3.WithPrefix(), clientv3.WithRev(from))
		if !errors.Is(w.Err(), rpctypes.ErrCompacted) {
			t.Errorf("a watch from %d got %+v, %v", from, w, w.Err())
		}
	}
	sameHash(t, c)
}

// sameHash compares all nodes' replicas.
func sameHash(t testing.TB, c *storetest.Cluster) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, s := range c.Nodes[0].Host().Shards().Shards() {
		c.Until("equal hashes of "+s.Name, func() error {
			var want uint32
			for i, n := range c.Nodes {
				client, ok := n.Host().Client(s.Name)
				if !ok {
					return errors.New("no replica")
				}
				r, err := client.Maintenance.HashKV(ctx, "", 0)
				if err != nil {
					return err
				}
				if i == 0 {
					want = r.Hash
				}
				if r.Hash != want {
					return fmt.Errorf("node %d has %x, node 0 %x", i, r.Hash, want)
				}
			}
			return nil
		})
	}
}

// Two of three voters are lost for good, the leader among them, under load. The
// third goes on alone with everything that anybody was told is written - every
// answer needed its log. One of the lost comes back with its old data, and then
// the other: they disturb nobody, and become new replicas.
func TestSalvage(t *testing.T) {
	table := twoShards(t)
	c := storetest.New(t, 3, func(n int, cfg *host.Config) { cfg.Shards, cfg.VerifyGeneration = table, verify })
	spread(t, c, table)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	leader := c.Leader()
	survivor, dead := (leader+1)%3, (leader+2)%3
	c.Until("a healthy look", func() error { // the last promotion comes with the leader's next message
		wrecks, err := c.Nodes[survivor].Host().Inspect(ctx, 0)
		noErr(t, err)
		for _, w := range wrecks {
			if w.Lost() || len(w.Answering) != 3 {
				return fmt.Errorf("a healthy shard looks like %+v", w)
			}
		}
		return nil
	})
	c.Nodes[dead].Kill()
	var acked [8]atomic.Int64
	var wg sync.WaitGroup
	wctx, stop := context.WithCancel(ctx)
	for i := range acked {
		key, name := fmt.Sprintf("/a/%d", i), storetest.Shard
		if i%2 == 1 {
			key, name = fmt.Sprintf("/b/%d", i), "other"
		}
		client, ok := c.Nodes[leader].Host().Client(name)
		if !ok {
			t.Fatal("no client")
		}
		wg.Go(func() {
			for v := int64(1); wctx.Err() == nil; v++ {
				pctx, cancel := context.WithTimeout(wctx, time.Second)
				_, err := client.KV.Put(pctx, key, strconv.FormatInt(v, 10))
				cancel()
				if err == nil {
					acked[i].Store(v)
				}
			}
		})
	}
	c.Until("load", func() error {
		for i := range acked {
			if acked[i].Load() < 50 {
				return errors.New("not yet")
			}
		}
		return nil
	})
	c.Nodes[leader].Kill()
	stop()
	wg.Wait()
	h := c.Nodes[survivor].Host()
	noErr(t, h.SaveContacts())
	wrecks, err := h.Inspect(ctx, 1500*time.Millisecond)
	noErr(t, err)
	for _, w := range wrecks {
		t.Logf("shard %s: %d of %d voters answer, applied %d, committed %d, log to %d, revision %d, last contact %s", w.Shard, len(w.Answering), len(w.Voters), w.Applied, w.Committed, w.Last, w.Revision, w.Contact)
		if !w.Lost() || len(w.Answering) != 1 || w.Contact.IsZero() {
			t.Errorf("a lost shard looks like %+v", w)
		}
	}
	dir := filepath.Join(t.TempDir(), "new")
	start := time.Now()
	noErr(t, h.Salvage(ctx, dir, "test", bump))
	c.Nodes[survivor].Stop() // forgets the closed host
	noErr(t, host.WriteGeneration(dir, []byte("1")))
	cfg := *c.Nodes[survivor].Config()
	cfg.Dir = dir
	noErr(t, host.Rebuild(ctx, cfg))
	t.Logf("salvaged and rebuilt in %s", time.Since(start))
	c.Nodes[survivor].Config().Dir = dir
	c.Nodes[survivor].Start()
	check := func() {
		t.Helper()
		for i := range acked {
			key, name := fmt.Sprintf("/a/%d", i), storetest.Shard
			if i%2 == 1 {
				key, name = fmt.Sprintf("/b/%d", i), "other"
			}
			v, err := strconv.ParseInt(getFrom(t, c, survivor, name, key), 10, 64)
			if err != nil || v < acked[i].Load() {
				t.Errorf("%s is %d, acknowledged was %d: %v", key, v, acked[i].Load(), err)
			}
		}
	}
	check()
	_, err = c.Nodes[survivor].Client().KV.Put(ctx, "/a/new", "1")
	noErr(t, err)

	// Both come back with their old data: together they are the old majority.
	c.Nodes[leader].Start()
	c.Nodes[dead].Start()
	c.Until("the old members find each other", func() error {
		if !c.Nodes[dead].Host().Ready(storetest.Shard) {
			return errors.New("not ready")
		}
		return nil
	})
	for _, s := range c.Nodes[survivor].Host().Status() {
		if s.Role != host.RoleLeader || len(s.Voters) != 1 {
			t.Errorf("the old members disturbed %+v", s)
		}
	}
	if _, err := c.Nodes[survivor].Host().Progress(ctx, c.Nodes[dead].ID, storetest.Shard); !errors.Is(err, host.ErrOtherGeneration) {
		t.Errorf("an old member answered %v", err)
	}
	check()
	for _, n := range []int{leader, dead} {
		proof, err := c.Nodes[n].Host().FetchGeneration(ctx, c.Nodes[survivor].ID)
		noErr(t, err)
		if ok, err := c.Nodes[n].Host().Adopt(ctx, []byte("2 but not really")); ok || err == nil {
			t.Errorf("adopted a forged generation: %v", err)
		}
		ok, err := c.Nodes[n].Host().Adopt(ctx, proof)
		if err != nil || !ok {
			t.Fatalf("adopt: %v, %v", ok, err)
		}
		if _, ok := c.Nodes[n].Host().Client(storetest.Shard); ok {
			t.Error("an old replica is still there")
		}
		addTo(t, c, survivor, n)
	}
	check()
	sameHash(t, c)
	if got := getFrom(t, c, dead, storetest.Shard, "/a/new"); got != "1" {
		t.Errorf("/a/new is %q", got)
	}
	for _, s := range c.Nodes[survivor].Host().Status() {
		if s.Epoch != s.Term || host.RaftTerm(s.Term) == s.Term {
			t.Errorf("terms %+v: those of a new generation are above the old", s)
		}
	}
}
