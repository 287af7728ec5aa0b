package host_test

import (
	"context"
	"fmt"
	"testing"
	"time"

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
		for last := start; time.Since(start) < 3*time.Second; {
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
