package chaos

import (
	"context"
	"fmt"
	"math/rand"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"skein.io/skein/test/store/chaos/history"
)

// keysPerGroup is small, so that requests meet.
const keysPerGroup = 4

// traffic says who does what while faults happen.
type traffic struct {
	clients   int           // that read and write, per shard
	groups    int           // of keys, per shard
	pause     time.Duration // mean, between two requests of a client
	leases    int           // clients that grant and renew leases, per shard
	roamers   int           // clients that open and close watches, per shard
	slow      int           // of them, those that read slowly
	compact   time.Duration // mean time between two compactions; 0: none
	defrag    time.Duration // mean time between two defragmentations; 0: none
	padding   int           // bytes, at most, that are added to some values
	padAll    bool          // to all values
	snapshots bool          // clients stream snapshots of the database
}

// load is the traffic on a world.
type load struct {
	w    *world
	t    traffic
	stop chan struct{}
	wg   sync.WaitGroup // of the watches that last until ctx ends
	// users end at stop.
	users sync.WaitGroup
	ctx   context.Context
	end   context.CancelFunc

	mains    []*mainWatch
	answered atomic.Int64
	unknown  atomic.Int64
}

// startLoad begins the traffic; watches of everything run on every node from the
// beginning to the end.
func startLoad(w *world, t traffic, seed int64) *load {
	l := &load{w: w, t: t, stop: make(chan struct{})}
	l.ctx, l.end = context.WithCancel(context.Background())
	r := rand.New(rand.NewSource(seed))
	fork := func() *rand.Rand { return rand.New(rand.NewSource(r.Int63())) }
	for _, s := range shardNames {
		for _, n := range w.nodes {
			m := &mainWatch{n: n, shard: s, next: 1}
			l.mains = append(l.mains, m)
			l.wg.Go(func() { m.run(l.ctx) })
		}
		for i := range t.clients {
			rr := fork()
			l.users.Go(func() { l.client(s, i, rr) })
		}
		for i := range t.leases {
			rr := fork()
			l.users.Go(func() { l.lessee(s, i, rr) })
		}
		for i := range t.roamers {
			rr := fork()
			l.users.Go(func() { l.roam(s, i < t.slow, rr) })
		}
		if t.compact > 0 {
			rr := fork()
			l.users.Go(func() { l.compactor(s, rr) })
		}
		if t.defrag > 0 {
			rr := fork()
			l.users.Go(func() { l.maintainer(s, rr) })
		}
	}
	return l
}

// pause sleeps a random time around d; false when the load is to stop.
func (l *load) pause(r *rand.Rand, d time.Duration) bool {
	select {
	case <-l.stop:
		return false
	case <-time.After(time.Duration(r.Int63n(int64(2*d) + 1))):
		return true
	}
}

func (l *load) anyNode(r *rand.Rand) *node { return l.w.nodes[r.Intn(len(l.w.nodes))] }

// client reads and writes the keys of one group after the other.
func (l *load) client(shard string, id int, r *rand.Rand) {
	home := l.w.nodes[id%len(l.w.nodes)]
	g := &generator{shard: shard, client: id, name: fmt.Sprintf("%s%d", shard[:1], id), r: r, t: l.t, known: map[string]history.KV{}}
	bad := map[*node]time.Time{} // nodes that did not answer, until when they are spared
	for l.pause(r, l.t.pause) {
		n := home
		if r.Intn(4) == 0 {
			n = l.anyNode(r)
		}
		for try := 0; time.Now().Before(bad[n]) && try < len(l.w.nodes) && r.Intn(5) > 0; try++ {
			n = l.anyNode(r)
		}
		op := n.do(l.ctx, g.op())
		g.learn(op)
		if op.Outcome == history.Unknown {
			l.unknown.Add(1)
			bad[n] = time.Now().Add(time.Second)
		} else {
			l.answered.Add(1)
		}
	}
}

// generator makes requests, from what it has seen.
type generator struct {
	shard, name string
	client, n   int
	r           *rand.Rand
	t           traffic
	known       map[string]history.KV
	rev         int64
}

func (g *generator) learn(op *history.Op) {
	if op.Outcome != history.Done {
		return
	}
	g.rev = max(g.rev, op.Rev)
	for _, res := range op.Results {
		for _, kv := range res.KVs {
			if kv.Mod >= g.known[kv.Key].Mod {
				g.known[kv.Key] = kv
			}
		}
	}
}

func (g *generator) value() string {
	g.n++
	v := fmt.Sprintf("%s.%d", g.name, g.n)
	if g.t.padding > 0 && (g.t.padAll || g.r.Intn(4) == 0) {
		v += ":" + strings.Repeat("x", g.r.Intn(g.t.padding))
	}
	return v
}

// op is the next request.
func (g *generator) op() *history.Op {
	r := g.r
	group := fmt.Sprintf("%s%d/", prefixes[g.shard], r.Intn(g.t.groups))
	key := func() string { return fmt.Sprintf("%s%c", group, 'a'+r.Intn(keysPerGroup)) }
	all := history.Step{Key: group, End: prefixEnd(group)}
	put := func(k string) history.Step {
		return history.Step{Kind: history.Put, Key: k, Value: g.value(), PrevKV: r.Intn(3) == 0}
	}
	op := &history.Op{Client: g.client, Shard: g.shard}
	txn := func(cs []history.Cmp, then, els []history.Step) {
		op.Form, op.If, op.Then, op.Else = history.Txn, cs, then, els
	}
	k := key()
	switch d := r.Intn(100); {
	case d < 22:
		op.Then = []history.Step{put(k)}
	case d < 34:
		op.Then = []history.Step{{Key: k}}
	case d < 44:
		op.Then = []history.Step{all}
	case d < 54:
		op.Then, op.Serializable = []history.Step{all}, true
	case d < 60:
		op.Then = []history.Step{{Kind: history.Delete, Key: k, PrevKV: r.Intn(2) == 0}}
	case d < 62:
		op.Then = []history.Step{{Kind: history.Delete, Key: all.Key, End: all.End, PrevKV: true}}
	case d < 80:
		txn([]history.Cmp{g.condition(k)}, []history.Step{put(k)}, []history.Step{{Key: k}})
	case d < 84: // a deletion that can be told from others
		marker := put(group + "deleted")
		txn([]history.Cmp{g.condition(k)}, []history.Step{{Kind: history.Delete, Key: k}, marker}, []history.Step{{Key: k}})
	case d < 92: // several keys at once, which must show at once
		other := string(group) + string(rune('a'+(int(k[len(k)-1]-'a')+1)%keysPerGroup))
		txn([]history.Cmp{g.condition(k)}, []history.Step{put(k), put(other), all}, []history.Step{all})
	case d < 95:
		txn(nil, []history.Step{all, {Key: k}}, nil)
	case d < 98 && g.rev > 10:
		s := all
		s.Rev = g.past()
		op.Then = []history.Step{s}
	case g.rev > 10: // a read of the past that decides whether a write happens
		txn([]history.Cmp{g.condition(k)}, []history.Step{{Key: all.Key, End: all.End, Rev: g.past()}, put(k)}, []history.Step{{Key: k}})
	default:
		op.Then = []history.Step{put(k)}
	}
	return op
}

func (g *generator) past() int64 { return max(1, g.rev-g.r.Int63n(300)) }

// condition that often holds: what was there when the key was seen last.
func (g *generator) condition(key string) history.Cmp {
	was, ok := g.known[key]
	if !ok || g.r.Intn(8) == 0 {
		return history.Cmp{Key: key, Target: history.CreateRevision}
	}
	switch g.r.Intn(4) {
	case 0:
		return history.Cmp{Key: key, Target: history.Value, Text: was.Value}
	case 1:
		return history.Cmp{Key: key, Target: history.CreateRevision, Number: was.Create}
	default:
		return history.Cmp{Key: key, Target: history.ModRevision, Number: was.Mod}
	}
}

// lessee grants leases, attaches keys, renews for a while, and lets them end.
func (l *load) lessee(shard string, id int, r *rand.Rand) {
	group := fmt.Sprintf("%slease%d/", prefixes[shard], id)
	for n := 0; l.pause(r, 300*time.Millisecond); n++ {
		call := l.w.hist.Now()
		ctx, cancel := context.WithTimeout(l.ctx, opTimeout)
		g, err := pb.NewLeaseClient(l.anyNode(r).conn(shard)).LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 2 + r.Int63n(3)})
		cancel()
		if err != nil {
			continue
		}
		lease := &history.Lease{Shard: shard, ID: g.ID, TTL: time.Duration(g.TTL) * time.Second, Renewed: []time.Duration{call}, Attempted: call}
		for i := range 1 + r.Intn(3) {
			s := history.Step{Kind: history.Put, Key: fmt.Sprintf("%s%d.%d", group, n, i), Value: fmt.Sprintf("%s.lease%d.%d.%d", shard, id, n, i), Lease: g.ID}
			l.anyNode(r).do(l.ctx, &history.Op{Client: 1000 + id, Shard: shard, Then: []history.Step{s}})
		}
		for range r.Intn(6) {
			if !l.pause(r, lease.TTL/3) {
				break
			}
			l.renew(lease, r)
		}
		if r.Intn(4) == 0 {
			lease.Revoked = l.w.hist.Now()
			ctx, cancel := context.WithTimeout(l.ctx, opTimeout)
			_, _ = pb.NewLeaseClient(l.anyNode(r).conn(shard)).LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: g.ID}) // or it ends by itself
			cancel()
		}
		l.w.hist.AddLease(lease)
	}
}

// renew a lease once; only an answer counts.
func (l *load) renew(lease *history.Lease, r *rand.Rand) {
	ctx, cancel := context.WithTimeout(l.ctx, opTimeout)
	defer cancel()
	call := l.w.hist.Now()
	lease.Attempted = call
	s, err := pb.NewLeaseClient(l.anyNode(r).conn(lease.Shard)).LeaseKeepAlive(ctx)
	if err != nil {
		return
	}
	if s.Send(&pb.LeaseKeepAliveRequest{ID: lease.ID}) != nil {
		return
	}
	if resp, err := s.Recv(); err == nil && resp.TTL > 0 {
		lease.Renewed = append(lease.Renewed, call)
	}
}

// compactor gives up the past, most often what every watch has seen, sometimes
// also what some have not.
func (l *load) compactor(shard string, r *rand.Rand) {
	var done int64
	for l.pause(r, l.t.compact) {
		lowest, highest := int64(1)<<60, int64(0)
		for _, m := range l.mains {
			if m.shard == shard {
				lowest, highest = min(lowest, m.seen.Load()), max(highest, m.seen.Load())
			}
		}
		rev := lowest - r.Int63n(100)
		if r.Intn(4) == 0 {
			rev = highest - r.Int63n(5)
		}
		if rev <= done {
			continue
		}
		c := &history.Compaction{Shard: shard, Rev: rev, Call: l.w.hist.Now()}
		l.w.hist.AddCompaction(c)
		ctx, cancel := context.WithTimeout(l.ctx, opTimeout)
		_, err := pb.NewKVClient(l.anyNode(r).conn(shard)).Compact(ctx, &pb.CompactionRequest{Revision: rev, Physical: r.Intn(3) == 0})
		cancel()
		if err == nil {
			done = rev
		}
	}
}

// maintainer defragments, and streams snapshots if asked to.
func (l *load) maintainer(shard string, r *rand.Rand) {
	for l.pause(r, l.t.defrag) {
		ctx, cancel := context.WithTimeout(l.ctx, 10*time.Second)
		m := pb.NewMaintenanceClient(l.anyNode(r).conn(shard))
		if l.t.snapshots && r.Intn(3) == 0 {
			if s, err := m.Snapshot(ctx, &pb.SnapshotRequest{}); err == nil {
				for err == nil {
					_, err = s.Recv()
				}
			}
		} else {
			_, _ = m.Defragment(ctx, &pb.DefragmentRequest{}) // a node may be down
		}
		cancel()
	}
}
