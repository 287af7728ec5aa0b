// Package full tests what a disk without room does to the store: real processes,
// each with a small file system of its own that is filled by the store itself or
// by somebody else, at any moment of writing, compacting, defragmenting and
// taking snapshots. A process may end, if it says why. It has to start again once
// there is room, and every acknowledged write has to be there; as long as two of
// three have room, the cluster goes on.
package full

import (
	"context"
	"fmt"
	"maps"
	"math/rand"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// load writes and remembers what each key may hold: the acknowledged value, or
// one whose outcome is unknown.
type load struct {
	c     *cluster
	keys  int
	size  int
	mu    sync.Mutex // guards all below
	may   map[string][]string
	acked map[string]bool
	acks  int
	total int
}

func newLoad(c *cluster, keys, size int) *load {
	return &load{c: c, keys: keys, size: size, may: map[string][]string{}, acked: map[string]bool{}}
}

// run writes until ctx ends; each of the workers has its own keys.
func (l *load) run(ctx context.Context, seed int64) (wait func()) {
	var wg sync.WaitGroup
	for w := range 4 {
		rnd := rand.New(rand.NewSource(seed + int64(w)))
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				l.put(ctx, fmt.Sprintf("/%d/%04d", w, i%l.keys), fmt.Sprintf("%d.%d.", w, i), rnd)
			}
		})
	}
	return wg.Wait
}

// put tries a write through one node.
func (l *load) put(ctx context.Context, key, value string, rnd *rand.Rand) {
	value += strings.Repeat(string(rune('a'+rnd.Intn(26))), l.size/2+rnd.Intn(l.size))
	l.mu.Lock()
	l.may[key] = append(l.may[key], value)
	l.total++
	l.mu.Unlock()
	pctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	n := l.c.nodes[rnd.Intn(nodes)]
	for i := 0; i < nodes; i++ { // a client of a dead one would wait for it
		if dead, _ := n.dead(); !dead {
			break
		}
		n = l.c.nodes[rnd.Intn(nodes)]
	}
	_, err := n.etcd.Put(pctx, key, value)
	if err != nil {
		select { // a dead node refuses at once
		case <-ctx.Done():
		case <-time.After(20 * time.Millisecond):
		}
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.may[key], l.acked[key] = []string{value}, true
	l.acks++
}

func (l *load) acknowledged() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.acks
}

// check finds every acknowledged write in data.
func (l *load) check(data map[string]string) {
	l.c.t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.c.t.Logf("%d writes tried, %d acknowledged, %d keys", l.total, l.acks, len(data))
	for _, key := range slices.Sorted(maps.Keys(l.may)) {
		may := l.may[key]
		got, ok := data[key]
		if !ok && l.acked[key] || ok && !slices.Contains(may, got) {
			l.c.t.Errorf("%s is %.20q; it may be one of %d", key, got, len(may))
		}
	}
}

// housekeeping compacts and defragments all the time; snapshots come by
// themselves. Errors are what a full disk is for.
func (c *cluster) housekeeping(ctx context.Context) (wait func()) {
	var wg sync.WaitGroup
	for i, n := range c.nodes {
		wg.Go(func() {
			for ctx.Err() == nil {
				tctx, cancel := context.WithTimeout(ctx, 2*time.Second)
				if r, err := n.etcd.Get(tctx, "/none"); err == nil && i == 0 {
					_, _ = n.etcd.Compact(tctx, r.Header.Revision-100)
				}
				_, _ = n.etcd.Defragment(tctx, n.etcd.Endpoints()[0])
				cancel()
				select {
				case <-ctx.Done():
				case <-time.After(50 * time.Millisecond):
				}
			}
		})
	}
	return wg.Wait
}

func seed(t *testing.T) int64 {
	s := time.Now().UnixNano()
	t.Logf("seed %d", s)
	return s
}

// Somebody else fills the disk of one node, again and again, and leaves it a few
// bytes: it ends at one or another of its writes. The others go on.
func TestOneDiskFull(t *testing.T) {
	s := seed(t)
	rnd := rand.New(rand.NewSource(s))
	c := newCluster(t, 192, "--snapshot-entries", "300")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l := newLoad(c, 200, 4000)
	wait, tidy := l.run(ctx, s), c.housekeeping(ctx)
	rounds := 8
	if os.Getenv("SKEIN_LONG") != "" {
		rounds = 60
	}
	ended := 0
	for round := range rounds {
		victim := c.nodes[rnd.Intn(nodes)]
		victim.disk.occupy(rnd.Int63n(2 << 20))
		before := l.acknowledged()
		for end := time.Now().Add(15 * time.Second); l.acknowledged() < before+50; time.Sleep(20 * time.Millisecond) {
			if time.Now().After(end) {
				c.describe()
				t.Fatalf("round %d: %d writes in 15 s while the disk of %s was full", round, l.acknowledged()-before, victim.name)
			}
		}
		select { // long enough for the disk to be really full
		case <-victim.ended:
		case <-time.After(time.Duration(rnd.Int63n(int64(1500 * time.Millisecond)))):
		}
		victim.disk.free()
		ended += c.revive()
	}
	cancel()
	wait()
	tidy()
	l.check(c.whole())
	t.Logf("%d rounds ended a process", ended)
	if ended == 0 {
		t.Error("no disk was ever really full")
	}
}

// The store fills all disks by itself, until no node lives.
func TestAllDisksFull(t *testing.T) {
	s := seed(t)
	c := newCluster(t, 128, "--snapshot-entries", "300")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l := newLoad(c, 1<<30, 64<<10) // every key is new
	wait, tidy := l.run(ctx, s), c.housekeeping(ctx)
	ended := func() (n int) {
		for _, x := range c.nodes {
			if dead, _ := x.dead(); dead {
				n++
			}
		}
		return n
	}
	// With one dead, the other two go on until the second is; a third need not die:
	// nothing can be written any more.
	for end := time.Now().Add(2 * time.Minute); ended() < 2; time.Sleep(50 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d processes have ended, %d writes are acknowledged", ended(), l.acknowledged())
		}
	}
	cancel()
	wait()
	tidy()
	for _, n := range c.nodes {
		n.disk.resize(320)
	}
	l.check(c.whole())
}
