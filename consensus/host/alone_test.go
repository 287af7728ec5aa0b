package host_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
)

// Of two voters one is removed, while both are read from as fast as possible: whoever is
// left answers reads at once, and a new replica learns of it.
func TestLastVoterOfMany(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(2)
	for round := range 3 {
		leader := c.Leader()
		other := 1 - leader
		stop := make(chan struct{})
		var readers sync.WaitGroup
		for i := range 8 {
			store := c.Nodes[i%2].Client()
			readers.Go(func() {
				for {
					select {
					case <-stop:
						return
					default:
						_, _ = store.KV.Get(ctx(t, time.Second), "/x")
					}
				}
			})
		}
		m, err := c.Nodes[leader].Host().Membership(ctx(t, 5*time.Second), storetest.Shard)
		if err != nil {
			t.Fatal(err)
		}
		var gone uint64
		for id, node := range m.Voters {
			if node == c.Nodes[other].ID {
				gone = id
			}
		}
		if err := c.Nodes[leader].Host().ChangeMembership(ctx(t, 5*time.Second), storetest.Shard, host.Remove, gone, "", m.ConfigChangeID); err != nil {
			t.Fatal(err)
		}
		close(stop)
		readers.Wait()
		start := time.Now()
		if _, err := c.Nodes[leader].Host().Membership(ctx(t, 5*time.Second), storetest.Shard); err != nil {
			t.Errorf("round %d: the membership after %v: %v", round, time.Since(start), err)
		}
		if _, err := c.Nodes[leader].Client().KV.Get(ctx(t, 5*time.Second), "/x", clientv3.WithLimit(1)); err != nil {
			t.Errorf("round %d: a read: %v", round, err)
		}
		if err := c.Nodes[other].Host().StopReplica(ctx(t, 5*time.Second), storetest.Shard, gone, true); err != nil {
			t.Logf("round %d: %v", round, err) // it may have found out by itself
		}
		c.AddTo(ctx(t, 20*time.Second), storetest.Shard, leader, other, true)
		c.Until("the new voter", func() error {
			if h := c.Nodes[other].Host(); !h.Ready(storetest.Shard) {
				return fmt.Errorf("round %d: %+v", round, h.Status())
			}
			return nil
		})
		t.Logf("round %d: a new voter after %v", round, time.Since(start).Round(time.Millisecond))
	}
}
