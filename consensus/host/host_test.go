package host_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
)

func ctx(t testing.TB, d time.Duration) context.Context {
	c, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return c
}

func put(t testing.TB, c *storetest.Cluster, node int, key, value string) {
	t.Helper()
	if _, err := c.Nodes[node].Client().Put(ctx(t, 15*time.Second), key, value); err != nil {
		t.Fatalf("put %s on node %d: %v", key, node, err)
	}
}

func get(t testing.TB, c *storetest.Cluster, node int, key string) string {
	t.Helper()
	r, err := c.Nodes[node].Client().KV.Get(ctx(t, 15*time.Second), key)
	if err != nil {
		t.Fatalf("get %s on node %d: %v", key, node, err)
	}
	if len(r.Kvs) != 1 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

// A write through any node is read through every node; the death and the closing
// of the leader cost about an election; a restarted node comes back from disk.
func TestThreeNodes(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(3)
	for i := range c.Nodes {
		put(t, c, i, fmt.Sprintf("/registry/x/%d", i), "v")
		for j := range c.Nodes {
			if get(t, c, j, fmt.Sprintf("/registry/x/%d", i)) != "v" {
				t.Fatalf("node %d does not see what was written on node %d", j, i)
			}
		}
	}
	for round, stop := range []struct {
		name string
		how  func(*storetest.Node)
		max  time.Duration
	}{{"killed", (*storetest.Node).Kill, 4 * time.Second}, {"closed", (*storetest.Node).Stop, 3 * time.Second}} {
		leader := c.Leader()
		other := (leader + 1) % 3
		done := make(chan struct{})
		go func() { stop.how(c.Nodes[leader]); close(done) }()
		start := time.Now()
		longest := time.Duration(0)
		for last := start; time.Since(start) < 1500*time.Millisecond; {
			put(t, c, other, "/registry/x/after", fmt.Sprint(round))
			longest = max(longest, time.Since(last))
			last = time.Now()
		}
		t.Logf("leader %s: longest time without a write %v", stop.name, longest.Round(time.Millisecond))
		if longest > stop.max {
			t.Errorf("outage of %v", longest)
		}
		<-done
		c.Nodes[leader].Start()
		c.Until("the old leader to be back", func() error {
			if !c.Nodes[leader].Host().Ready(storetest.Shard) {
				return fmt.Errorf("%+v", c.Nodes[leader].Host().Status())
			}
			return nil
		})
		if got := get(t, c, leader, "/registry/x/after"); got != fmt.Sprint(round) {
			t.Errorf("the restarted node reads %q", got)
		}
	}
}

// A daemon that stops hands its leadership over: no election timeout.
func TestCloseHandsOver(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(3)
	for i := range c.Nodes {
		put(t, c, i, "/x", "warm")
	}
	leader := c.Leader()
	other := (leader + 1) % 3
	done := make(chan struct{})
	go func() { c.Nodes[leader].Stop(); close(done) }()
	longest, last := time.Duration(0), time.Now()
	for end := last.Add(800 * time.Millisecond); time.Now().Before(end); last = time.Now() {
		put(t, c, other, "/x", "v")
		longest = max(longest, time.Since(last))
	}
	<-done
	t.Logf("longest time without a write %v", longest.Round(time.Millisecond))
	if longest > 400*time.Millisecond {
		t.Errorf("an outage of %v looks like an election", longest)
	}
}

// The very first writes of a cluster race with its first leader's epoch; each is
// applied once.
func TestFirstWritesOnce(t *testing.T) {
	for range 4 {
		c := storetest.New(t, 1, func(_ int, cfg *host.Config) { cfg.RTT = 10 * time.Millisecond })
		c.Voters(1)
		for i := range 3 {
			put(t, c, 0, fmt.Sprintf("/first/%d", i), "x")
		}
		r, err := c.Nodes[0].Client().KV.Get(ctx(t, 10*time.Second), "/first/", clientv3.WithPrefix())
		if err != nil || len(r.Kvs) != 3 {
			t.Fatal(r, err)
		}
		for _, kv := range r.Kvs {
			if kv.Version != 1 {
				t.Errorf("%s was written %d times", kv.Key, kv.Version)
			}
		}
	}
}
