package host_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
)

// On the wrong side of a cut a request ends within three election timeouts and a
// bit, at the old leader, a voter and a spare; from then on at once, with the
// reason. The side with the majority never refuses.
func TestCutOffRefusesEarly(t *testing.T) {
	c := storetest.New(t, 4, nil)
	c.Voters(3)
	c.Add(ctx(t, 20*time.Second), 0, 3, false)
	for _, node := range []int{c.Leader(), (c.Leader() + 1) % 3, 3} {
		put(t, c, node, "/x", "1")
		c.Isolate(node, true)
		cut := time.Now()
		for i := 0; ; i++ {
			start := time.Now()
			_, err := c.Nodes[node].Client().Put(ctx(t, 20*time.Second), "/x", "minority")
			took := time.Since(start)
			if err == nil || took > 3*time.Second {
				t.Errorf("node %d: a write while cut off: %v after %v", node, err, took)
				break
			}
			if errors.Is(err, rpctypes.ErrNoLeader) {
				t.Logf("node %d: refused %v after the cut, request %d: %v", node, time.Since(cut).Round(time.Millisecond), i, err)
				if !strings.Contains(err.Error(), "shard system has heard none for") {
					t.Errorf("the reason is missing: %v", err)
				}
				break
			}
		}
		start := time.Now()
		_, err := c.Nodes[node].Client().KV.Get(ctx(t, 20*time.Second), "/x")
		if !errors.Is(err, rpctypes.ErrNoLeader) || time.Since(start) > 100*time.Millisecond {
			t.Errorf("node %d: a read while cut off: %v after %v", node, err, time.Since(start))
		}
		if since, cut := c.Nodes[node].Host().Silence(storetest.Shard); !cut || since < time.Second {
			t.Errorf("node %d: cut off %v, since %v", node, cut, since)
		}
		local, err := c.Nodes[node].Client().KV.Get(host.WithLocalReads(ctx(t, 20*time.Second)), "/x")
		if err != nil || len(local.Kvs) != 1 || string(local.Kvs[0].Value) == "minority" {
			t.Errorf("node %d: a local read while cut off: %v, %v", node, local, err)
		}
		put(t, c, (node+1)%3, "/x", "majority")
		c.Isolate(node, false)
		c.Until("contact", func() error {
			if !c.Nodes[node].Host().Ready(storetest.Shard) {
				return errors.New("not ready")
			}
			return nil
		})
		if got := get(t, c, node, "/x"); got != "majority" {
			t.Errorf("node %d reads %q", node, got)
		}
	}
}

// How long a read waits on the wrong side of a cut until it is known to be one, at the old leader and at a voter.
func TestCutOffReads(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(3)
	put(t, c, 0, "/x", "1")
	for i, most := range []time.Duration{2600 * time.Millisecond, 2100 * time.Millisecond} { // three election timeouts since contact; a leader notices after one or two; half of one
		node := (c.Leader() + i) % 3
		c.Isolate(node, true)
		cut := time.Now()
		_, err := c.Nodes[node].Client().KV.Get(ctx(t, 20*time.Second), "/x")
		for err == nil { // a leader may read as long as its lease lasts
			_, err = c.Nodes[node].Client().KV.Get(ctx(t, 20*time.Second), "/x")
		}
		took := time.Since(cut)
		since, _ := c.Nodes[node].Host().Silence(storetest.Shard)
		t.Logf("node %d: refused %v after the cut, silence %v: %v", node, took.Round(time.Millisecond), since.Round(time.Millisecond), err)
		if !errors.Is(err, rpctypes.ErrNoLeader) || took > most+2*time.Second { // a busy machine
			t.Errorf("node %d: a read while cut off: %v after %v", node, err, took)
		}
		c.Isolate(node, false)
		c.Until("contact", func() error {
			if !c.Nodes[node].Host().Ready(storetest.Shard) {
				return errors.New("not ready")
			}
			return nil
		})
	}
}

// A leader that hands over is not cut off for an instant: nothing is refused.
func TestTransferRefusesNothing(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(3)
	time.Sleep(2 * time.Second) // longer than it takes to count as cut off
	stop := make(chan struct{})
	done := make(chan error, 1)
	old := c.Leader()
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
			}
			if _, err := c.Nodes[old].Client().Put(ctx(t, 10*time.Second), "/x", "1"); err != nil {
				done <- err
				return
			}
		}
	}()
	moveTo(t, c, storetest.Shard, (old+1)%3)
	time.Sleep(200 * time.Millisecond)
	close(stop)
	if err := <-done; err != nil {
		t.Error(err)
	}
}
