package host_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/consensus/shard"
)

// twoShards: keys below /b/ are in another shard than those below /a/.
func twoShards(t testing.TB) shard.Table {
	table, err := shard.New(shard.Shard{ID: shard.System, Name: storetest.Shard}, shard.Shard{ID: 2, Name: "other", Prefixes: []string{"/b/"}})
	if err != nil {
		t.Fatal(err)
	}
	return table
}

// spread makes nodes 1.. voters of every shard of the table.
func spread(t testing.TB, c *storetest.Cluster, table shard.Table) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	via := c.Nodes[0].Host()
	noErr(t, via.Bootstrap(ctx))
	for _, n := range c.Nodes[1:] {
		for _, s := range table.Shards() {
			m, err := via.Membership(ctx, s.Name)
			noErr(t, err)
			id := m.ConfigChangeID + 1
			noErr(t, via.ChangeMembership(ctx, s.Name, host.AddNonVoter, id, n.ID, m.ConfigChangeID))
			noErr(t, n.Host().StartReplica(ctx, s.Name, id))
			c.Until("caught up", func() error {
				if !n.Host().Ready(s.Name) {
					return errors.New("not ready")
				}
				return nil
			})
			m, err = via.Membership(ctx, s.Name)
			noErr(t, err)
			noErr(t, via.ChangeMembership(ctx, s.Name, host.Promote, id, n.ID, m.ConfigChangeID))
		}
	}
}

func noErr(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// pairs writes x then y, once x is acknowledged, over and over: in /a/ then /b/,
// or the other way round. The number of the last pair is the value.
type pairs struct {
	c     *storetest.Cluster
	n     int
	pause atomic.Int64 // the longest that one write took, ns
	done  atomic.Int64
}

func (p *pairs) run(ctx context.Context, first, second string) {
	put := func(key, value string) error {
		start := time.Now()
		defer func() { p.pause.Store(max(p.pause.Load(), int64(time.Since(start)))) }()
		for i := p.n; ctx.Err() == nil; i++ { // a node that is being killed cannot answer: ask another
			node := p.c.Nodes[i%len(p.c.Nodes)]
			h := node.Host()
			if h == nil {
				continue
			}
			name := storetest.Shard
			if key[1] == 'b' {
				name = "other"
			}
			client, ok := h.Client(name)
			if !ok {
				time.Sleep(time.Millisecond)
				continue
			}
			wctx, cancel := context.WithTimeout(ctx, 3*time.Second)
			_, err := client.KV.Put(wctx, key, value)
			cancel()
			if err == nil {
				p.done.Add(1)
				return nil
			}
		}
		return ctx.Err()
	}
	for i := 1; put(first, strconv.Itoa(i)) == nil && put(second, strconv.Itoa(i)) == nil; i++ {
	}
}

// values reads a cut through the databases that a restore would make of it.
func values(t testing.TB, c *host.Cut) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, i := range c.Images {
		var b bytes.Buffer
		if n, err := i.WriteTo(&b); err != nil || n != i.Size() {
			t.Fatalf("%d of %d bytes: %v", n, i.Size(), err)
		}
		dir := filepath.Join(t.TempDir(), "db")
		noErr(t, mvcc.PlaceImage(dir, &b))
		m := mvcc.New(mvcc.Config{Dir: dir})
		index, err := m.Open(nil)
		noErr(t, err)
		if index != i.Index || m.Rev() != i.Revision {
			t.Errorf("the database says index %d, revision %d; the image %d, %d", index, m.Rev(), i.Index, i.Revision)
		}
		r, err := m.Range(context.Background(), &pb.RangeRequest{Key: []byte("/"), RangeEnd: []byte("0")})
		noErr(t, err)
		for _, kv := range r.Kvs {
			n, err := strconv.Atoi(string(kv.Value))
			noErr(t, err)
			out[string(kv.Key)] = n
		}
		noErr(t, m.Close())
	}
	return out
}

// In a cut there is no effect without its cause, whichever shard they are in, also
// while leaders die.
func TestCutIsCausal(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	table := twoShards(t)
	c := storetest.New(t, 3, func(_ int, cfg *host.Config) { cfg.Shards = table })
	spread(t, c, table)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	const writers = 8
	loads := make([]*pairs, writers)
	for i := range writers {
		loads[i] = &pairs{c: c, n: i}
		first, second := fmt.Sprintf("/a/%d", i), fmt.Sprintf("/b/%d", i)
		if i%2 == 1 {
			first, second = second, first
		}
		wg.Go(func() { loads[i].run(ctx, first, second) })
	}
	check := func(cut *host.Cut) {
		t.Helper()
		v := values(t, cut)
		for i := range writers {
			first, second := fmt.Sprintf("/a/%d", i), fmt.Sprintf("/b/%d", i)
			if i%2 == 1 {
				first, second = second, first
			}
			if v[first] < v[second] || v[first] > v[second]+1 {
				t.Errorf("%s is %d, %s, which was written after it, is %d", first, v[first], second, v[second])
			}
		}
		noErr(t, cut.Close())
	}
	longest := func() (d time.Duration) {
		for _, l := range loads {
			d = max(d, time.Duration(l.pause.Swap(0)))
		}
		return d
	}
	storetest.Until(t, "load", func() error {
		for _, l := range loads {
			if l.done.Load() < 4 {
				return errors.New("not yet")
			}
		}
		return nil
	})
	time.Sleep(300 * time.Millisecond) // how long a write takes without a backup
	longest()
	time.Sleep(500 * time.Millisecond)
	t.Logf("the slowest write without a backup took %s", longest())
	var held []time.Duration
	for i := range 30 {
		if i >= 20 { // one of the shards is late
			late := []string{storetest.Shard, "other"}[i%2]
			c.Nodes[i%3].Host().BeforePin(func(name string) {
				if name == late {
					time.Sleep(30 * time.Millisecond) // writers could do much in it
				}
			})
		}
		cut, err := c.Nodes[i%3].Host().Cut(ctx)
		noErr(t, err)
		if i < 20 {
			held = append(held, cut.Held)
		} else {
			c.Nodes[i%3].Host().BeforePin(nil)
		}
		check(cut)
	}
	slices.Sort(held)
	t.Logf("%d cuts: held %s at the median, %s at most; the slowest write took %s", len(held), held[len(held)/2], held[len(held)-1], longest())
	for round := range 4 {
		victim := c.Leader()
		from := (victim + 1) % 3
		c.Nodes[from].Host().BeforePin(func(string) { time.Sleep(rand.N(30 * time.Millisecond)) })
		killed := make(chan struct{})
		delay := time.Duration(rnd.Int64N(int64(30 * time.Millisecond)))
		go func() {
			defer close(killed)
			time.Sleep(delay)
			c.Nodes[victim].Kill()
		}()
		cut, err := c.Nodes[from].Host().Cut(ctx)
		<-killed
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		t.Logf("cut while the leader died: held %s, attempt %d", cut.Held, cut.Attempts)
		check(cut)
		c.Nodes[victim].Start()
		c.Until("the node is back", func() error {
			for _, s := range table.Shards() {
				if !c.Nodes[victim].Host().Ready(s.Name) {
					return errors.New(s.Name)
				}
			}
			return nil
		})
	}
	// Nobody is left waiting.
	before := loads[0].done.Load()
	c.Until("writers go on", func() error {
		if loads[0].done.Load() < before+10 {
			return errors.New("stuck")
		}
		return nil
	})
}

// A hold whose maker is gone is ended by the leader.
func TestHoldEnds(t *testing.T) {
	c := storetest.New(t, 1, nil)
	c.Voters(1)
	c.Leader()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	noErr(t, c.Nodes[0].Host().Hold(ctx, storetest.Shard))
	start := time.Now()
	_, err := c.Nodes[0].Client().KV.Put(ctx, "/k", "v")
	took := time.Since(start)
	noErr(t, err)
	if took < 1500*time.Millisecond || took > 6*time.Second {
		t.Errorf("the write waited %s for a hold of 2 s", took)
	}
	t.Logf("the write waited %s", took)
}
