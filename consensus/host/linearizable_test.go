package host_test

import (
	"context"
	"fmt"
	"math/rand"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"
	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/consensus/internal/storetest"
)

// op is an operation on one register.
type op struct {
	kind     string // "get", "put", "cas"
	key      string
	old, new string
}

// result of an operation. unknown: it failed in a way that leaves open whether it
// was applied.
type result struct {
	value   string // of a get
	swapped bool   // of a cas
	unknown bool
}

var registers = porcupine.Model{
	Partition: func(history []porcupine.Operation) [][]porcupine.Operation {
		byKey := map[string][]porcupine.Operation{}
		for _, h := range history {
			k := h.Input.(op).key
			byKey[k] = append(byKey[k], h)
		}
		var out [][]porcupine.Operation
		for _, h := range byKey {
			out = append(out, h)
		}
		return out
	},
	Init: func() any { return "" },
	Step: func(state, in, out any) (bool, any) {
		s, q, r := state.(string), in.(op), out.(result)
		switch q.kind {
		case "get":
			return r.unknown || r.value == s, s
		case "put":
			return true, q.new
		default:
			if r.unknown { // it may have happened, if it could
				if s == q.old {
					return true, q.new
				}
				return true, s
			}
			if r.swapped != (s == q.old) {
				return false, s
			}
			if r.swapped {
				return true, q.new
			}
			return true, s
		}
	},
	DescribeOperation: func(in, out any) string { return fmt.Sprintf("%+v -> %+v", in, out) },
}

// history records what clients see.
type history struct {
	start time.Time
	mu    sync.Mutex // guards ops
	ops   []porcupine.Operation
}

// worker runs random operations on a node until stop.
func (h *history) worker(c *storetest.Cluster, id, node int, r *rand.Rand, stale *atomic.Bool, stop <-chan struct{}) (acknowledged int) {
	const endless = int64(1) << 60
	for n := 0; ; n++ {
		select {
		case <-stop:
			return acknowledged
		default:
		}
		host := c.Nodes[node].Host()
		if host == nil {
			time.Sleep(10 * time.Millisecond) // the node is down; not a synchronisation
			continue
		}
		cl, ok := host.Client(storetest.Shard)
		if !ok {
			continue
		}
		q := op{kind: []string{"get", "get", "put", "cas"}[r.Intn(4)], key: fmt.Sprintf("/r/%d", r.Intn(3)), new: fmt.Sprintf("%d.%d", id, n)}
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		var res result
		var err error
		if q.kind == "cas" { // from what was there a moment ago
			g, gerr := cl.KV.Get(ctx, q.key, clientv3.WithSerializable())
			if gerr == nil && len(g.Kvs) == 1 {
				q.old = string(g.Kvs[0].Value)
			}
		}
		call := int64(time.Since(h.start))
		switch q.kind {
		case "get":
			var opts []clientv3.OpOption
			if stale != nil && stale.Load() {
				opts = append(opts, clientv3.WithSerializable())
			}
			var g *clientv3.GetResponse
			if g, err = cl.KV.Get(ctx, q.key, opts...); err == nil && len(g.Kvs) == 1 {
				res.value = string(g.Kvs[0].Value)
			}
		case "put":
			_, err = cl.Put(ctx, q.key, q.new)
		case "cas":
			cmp := clientv3.Compare(clientv3.Value(q.key), "=", q.old)
			if q.old == "" {
				cmp = clientv3.Compare(clientv3.CreateRevision(q.key), "=", 0)
			}
			var tr *clientv3.TxnResponse
			if tr, err = cl.Txn(ctx).If(cmp).Then(clientv3.OpPut(q.key, q.new)).Commit(); err == nil {
				res.swapped = tr.Succeeded
			}
		}
		cancel()
		end := int64(time.Since(h.start))
		if err != nil {
			res.unknown = true
			if q.kind == "get" {
				continue // says nothing
			}
			end = endless
		} else {
			acknowledged++
		}
		h.mu.Lock()
		h.ops = append(h.ops, porcupine.Operation{ClientId: id, Input: q, Call: call, Output: res, Return: end})
		h.mu.Unlock()
		if err != nil { // an unanswered operation ends its client's history
			id += 1000
		}
	}
}

// Clients on three nodes see one register each key, while leaders die and are cut
// off. And the checker is not blind: reads that are stale on purpose are caught.
func TestLinearizable(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	for _, broken := range []bool{false, true} {
		t.Run(fmt.Sprintf("stale=%v", broken), func(t *testing.T) {
			r := rand.New(rand.NewSource(seed))
			c := storetest.New(t, 3, nil)
			c.Voters(3)
			h := &history{start: time.Now()}
			var stale atomic.Bool
			stale.Store(broken)
			stop := make(chan struct{})
			var wg sync.WaitGroup
			var acknowledged atomic.Int64
			for id := range 6 {
				rr := rand.New(rand.NewSource(r.Int63()))
				wg.Go(func() { acknowledged.Add(int64(h.worker(c, id, id%3, rr, &stale, stop))) })
			}
			pause := func() { time.Sleep(time.Duration(400+r.Intn(300)) * time.Millisecond) } // load, not synchronisation
			pause()
			dead := c.Leader()
			c.Nodes[dead].Kill()
			pause()
			pause()
			c.Nodes[dead].Start()
			pause()
			cut := c.Leader()
			c.Isolate(cut, true)
			pause()
			pause()
			c.Isolate(cut, false)
			pause()
			close(stop)
			wg.Wait()
			got := porcupine.CheckOperationsTimeout(registers, h.ops, 20*time.Second)
			t.Logf("%d operations, %d acknowledged: %s", len(h.ops), acknowledged.Load(), got)
			if acknowledged.Load() < 200 {
				t.Error("too little happened to show anything")
			}
			want := porcupine.Ok
			if broken {
				want = porcupine.Illegal
			}
			if got != want {
				t.Errorf("the checker says %s, want %s", got, want)
			}
		})
	}
}

// Every acknowledged write is applied exactly once, and every other at most once,
// while the leadership moves again and again: requests that are caught by a
// change are proposed anew, which must not apply them twice.
func TestExactlyOnceOverLeaders(t *testing.T) {
	c := storetest.New(t, 3, nil)
	c.Voters(3)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var mu sync.Mutex // guards both
	acknowledged, failed := map[string]bool{}, 0
	for id := range 12 {
		wg.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				key := fmt.Sprintf("/once/%d/%d", id, n)
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				_, err := c.Nodes[id%3].Client().Put(ctx, key, "x")
				cancel()
				mu.Lock()
				if err == nil {
					acknowledged[key] = true
				} else {
					failed++
				}
				mu.Unlock()
			}
		})
	}
	moved := 0
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); {
		time.Sleep(100 * time.Millisecond) // load, not synchronisation
		leader := c.Leader()
		start := time.Now()
		if err := c.Nodes[leader].Host().TransferLeadership(ctx(t, 5*time.Second), storetest.Shard, 0); err != nil {
			t.Logf("transfer: %v", err)
			continue
		}
		moved++
		if moved <= 3 {
			t.Logf("leadership handed over in %v", time.Since(start).Round(time.Millisecond))
		}
	}
	close(stop)
	wg.Wait()
	r, err := c.Nodes[0].Client().KV.Get(ctx(t, 10*time.Second), "/once/", clientv3.WithPrefix(), clientv3.WithKeysOnly())
	if err != nil {
		t.Fatal(err)
	}
	for _, kv := range r.Kvs {
		if kv.Version != 1 {
			t.Errorf("%s was written %d times", kv.Key, kv.Version)
		}
		delete(acknowledged, string(kv.Key))
	}
	t.Logf("%d leaders, %d keys, %d requests failed", moved, len(r.Kvs), failed)
	if len(acknowledged) > 0 {
		t.Errorf("%d acknowledged writes are lost", len(acknowledged))
	}
	if moved < 3 || len(r.Kvs) < 100 {
		t.Error("too little happened to show anything")
	}
	if failed > 0 {
		t.Errorf("%d requests failed although there was a majority all the time", failed)
	}
}
