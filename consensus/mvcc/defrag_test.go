package mvcc

import (
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	dsm "github.com/lni/dragonboat/v4/statemachine"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/pkg/v3/traceutil"
)

// script makes the same commands for the same seed. Compactions stay behind the
// revision that the commands before them are sure to have reached.
type script struct {
	rnd    *rand.Rand
	writes int64 // commands that surely made a revision
	leases []int64
}

func (s *script) next(size int) Command {
	req := &pb.InternalRaftRequest{}
	key := func() []byte { return fmt.Appendf(nil, "/registry/things/%03d", s.rnd.Intn(300)) }
	put := func() *pb.PutRequest {
		v := make([]byte, s.rnd.Intn(size))
		s.rnd.Read(v)
		p := &pb.PutRequest{Key: key(), Value: v}
		if len(s.leases) > 0 && s.rnd.Intn(5) == 0 {
			p.Lease = s.leases[s.rnd.Intn(len(s.leases))]
		}
		return p
	}
	switch n := s.rnd.Intn(100); {
	case n < 60:
		req.Put = put()
		s.writes++
	case n < 75:
		req.DeleteRange = &pb.DeleteRangeRequest{Key: key()}
	case n < 78:
		k := key()
		req.DeleteRange = &pb.DeleteRangeRequest{Key: k, RangeEnd: append(slices.Clone(k), 0xff)}
	case n < 92:
		a, b := put(), put()
		b.Key = append(b.Key, 'x')
		req.Txn = &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: key(), Target: pb.Compare_VERSION, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_Version{Version: 0}}},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: a}}, {Request: &pb.RequestOp_RequestPut{RequestPut: b}}},
			Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: key()}}}},
		}
	case n < 94:
		id := int64(1000 + s.rnd.Intn(1<<30))
		s.leases = append(s.leases, id)
		req.LeaseGrant = &pb.LeaseGrantRequest{ID: id, TTL: 3600}
	case n < 95 && len(s.leases) > 3:
		i := s.rnd.Intn(len(s.leases))
		req.LeaseRevoke = &pb.LeaseRevokeRequest{ID: s.leases[i]}
		s.leases = slices.Delete(s.leases, i, i+1)
	case n < 96 && s.writes > 50:
		req.Compaction = &pb.CompactionRequest{Revision: s.writes/2 + s.rnd.Int63n(s.writes/4)}
	default:
		req.Put = put()
		s.writes++
	}
	return Command{Kind: KindRequest, Request: req}
}

// image of a store: all keys, leases, and the hash of the revisions that a
// compaction to the newest one leaves.
func image(t testing.TB, m *Machine) string {
	t.Helper()
	r, err := m.Range(context.Background(), &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil {
		t.Fatal(err)
	}
	h, rev, err := m.HashKV(0)
	if err != nil {
		t.Fatal(err)
	}
	var leases []int64
	for _, l := range m.Leases() {
		leases = append(leases, int64(l.ID))
	}
	slices.Sort(leases)
	return fmt.Sprintf("rev %d keys %d hash %x compacted %d leases %v", rev, len(r.Kvs), h.Hash, h.CompactRevision, leases)
}

func files(t testing.TB, m *Machine) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(m.cfg.Dir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// settle compacts and waits for the end of it: HashKV is of what is left so far.
func settle(t testing.TB, m *Machine, l *log, rev int64) {
	t.Helper()
	r := l.do(m, Command{Kind: KindRequest, Request: &pb.InternalRaftRequest{Compaction: &pb.CompactionRequest{Revision: rev}}})
	if r.Err != nil {
		t.Fatal(r.Err)
	}
	<-r.Compacted
}

// A store that is defragmented without a break ends as one that never is.
func TestDefragUnderWrites(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	plainDir, dir := t.TempDir(), t.TempDir()
	plain, _ := open(t, plainDir)
	m, _ := open(t, dir)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	var defrags, reads atomic.Int64
	wg.Go(func() {
		for ctx.Err() == nil {
			if _, err := m.Defragment(ctx); err == nil {
				defrags.Add(1)
			} else if ctx.Err() == nil {
				t.Errorf("defragment: %v", err)
				return
			}
		}
	})
	for i := range 2 {
		wg.Go(func() { // reads at any moment see whole states, and their own revision's
			for rev := int64(0); ctx.Err() == nil; reads.Add(1) {
				r, err := m.Range(context.Background(), &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
				if err != nil {
					t.Errorf("read: %v", err)
					return
				}
				if r.Header.Revision < rev {
					t.Errorf("revision %d after %d", r.Header.Revision, rev)
				}
				rev = r.Header.Revision
				for _, kv := range r.Kvs {
					if kv.ModRevision > rev || len(kv.Key) < 4 {
						t.Errorf("at %d: key %q of revision %d", rev, kv.Key, kv.ModRevision)
					}
				}
				if i == 1 {
					_ = m.Dump(discard{}, func(int64) {})
				}
			}
		})
	}
	s := &script{rnd: rand.New(rand.NewSource(seed))}
	one, two := &log{t: t}, &log{t: t}
	const steps = 4000
	for range steps {
		c := s.next(4000)
		a := one.do(plain, c)
		b := two.do(m, c)
		if fmt.Sprint(a.Err) != fmt.Sprint(b.Err) {
			t.Fatalf("results differ: %v and %v", a.Err, b.Err)
		}
	}
	for defrags.Load() < 3 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	wg.Wait()
	t.Logf("%d defragmentations, %d reads", defrags.Load(), reads.Load())
	settle(t, plain, one, plain.Rev()-10)
	settle(t, m, two, m.Rev()-10)
	want := image(t, plain)
	if got := image(t, m); got != want {
		t.Errorf("defragmented: %s\nplain:        %s", got, want)
	}
	for _, x := range []*Machine{plain, m} {
		if err := x.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if f := files(t, m); len(f) != 1 {
		t.Errorf("left over: %v", f)
	}
	// And from disk.
	m, index := open(t, dir)
	defer m.Close()
	two.replay(m, index)
	if got := image(t, m); got != want {
		t.Errorf("opened again: %s\nwant:         %s", got, want)
	}
}

type discard struct{}

func (discard) Write(p []byte) (int, error) { return len(p), nil }

// fill puts n keys of size bytes, beginning with key first.
func fill(t testing.TB, m *Machine, l *log, first, n, size int) {
	t.Helper()
	rnd := rand.New(rand.NewSource(int64(first)))
	for i := 0; i < n; i += 20 {
		batch := make([]dsm.Entry, 0, 20)
		for k := i; k < min(n, i+20); k++ {
			v := make([]byte, size)
			rnd.Read(v)
			l.index++
			b, err := putCmd(0, 0, fmt.Sprintf("/fill/%07d", first+k), string(v)).Encode()
			if err != nil {
				t.Fatal(err)
			}
			batch = append(batch, dsm.Entry{Index: l.index, Cmd: b})
		}
		if _, err := m.Update(batch); err != nil {
			t.Fatal(err)
		}
	}
}

// latencies of one kind of operation.
type latencies []time.Duration

func (l latencies) worst() time.Duration { return slices.Max(l) }

func (l latencies) p99() time.Duration {
	s := slices.Sorted(slices.Values(l))
	return s[len(s)*99/100]
}

func (l latencies) String() string {
	return fmt.Sprintf("%d, p99 %v, longest %v", len(l), l.p99().Round(10*time.Microsecond), l.worst().Round(10*time.Microsecond))
}

// measure runs, with one goroutine that puts and one that reads, until f returns.
func measure(t testing.TB, m *Machine, l *log, f func()) (puts, gets latencies) {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	loop := func(all *latencies, op func()) {
		wg.Go(func() {
			for {
				start := time.Now()
				op()
				*all = append(*all, time.Since(start))
				select {
				case <-stop:
					return
				case <-time.After(time.Millisecond / 2):
				}
			}
		})
	}
	b, err := putCmd(0, 0, "/probe", "x").Encode()
	if err != nil {
		t.Fatal(err)
	}
	loop(&puts, func() {
		l.index++
		if _, err := m.Update([]dsm.Entry{{Index: l.index, Cmd: b}}); err != nil {
			t.Error(err)
		}
	})
	loop(&gets, func() {
		if _, err := m.Range(context.Background(), &pb.RangeRequest{Key: fmt.Appendf(nil, "/fill/%07d", rand.Intn(100))}); err != nil {
			t.Error(err)
		}
	})
	f()
	close(stop)
	wg.Wait()
	return puts, gets
}

// quietly runs f up to three times, until it is content: what the store does is
// there every time, what a busy machine does is not.
func quietly(t *testing.T, f func() error) {
	t.Helper()
	var err error
	for range 3 {
		if err = f(); err == nil || t.Failed() {
			return
		}
		t.Log(err)
	}
	t.Error(err)
}

// long tells whether measurements may take their time.
func long() bool { return os.Getenv("SKEIN_LONG") != "" }

// Puts and reads while 100,000 revisions (a fifth of that in a hurry) are compacted.
func TestCompactionPause(t *testing.T) {
	m, _ := open(t, t.TempDir())
	defer m.Close()
	l := &log{t: t}
	keys, rounds := 2000, 10
	if long() {
		keys = 10_000
	}
	quietly(t, func() error {
		for range rounds {
			fill(t, m, l, 0, keys, 512)
		}
		idle, idleGets := measure(t, m, l, func() { time.Sleep(time.Second) })
		var took time.Duration
		puts, gets := measure(t, m, l, func() {
			start := time.Now()
			// Update is one goroutine's, which the probe is; so not through the log.
			done, err := m.kv.Compact(traceutil.TODO(), m.Rev())
			if err != nil {
				t.Error(err)
				return
			}
			<-done
			took = time.Since(start)
		})
		t.Logf("%d revisions in %v\nputs:  %v; without: %v\nreads: %v; without: %v", keys*rounds, took.Round(time.Millisecond), puts, idle, gets, idleGets)
		if bound := 50*time.Millisecond + idle.p99(); puts.p99() > bound || gets.p99() > bound {
			return fmt.Errorf("p99 above %v", bound)
		}
		return nil
	})
}

// The longest pause of a put and of a read while a store is defragmented. The
// bound is the project's promise: 100 ms on 100 MB.
func TestDefragPause(t *testing.T) {
	for _, mb := range []int{100, 500} {
		t.Run(fmt.Sprintf("%dMB", mb), func(t *testing.T) {
			if mb > 100 && !long() {
				t.Skip("SKEIN_LONG is not set")
			}
			quietly(t, func() error { return defragPause(t, mb) })
		})
	}
}

func defragPause(t *testing.T, mb int) error {
	m, _ := open(t, t.TempDir())
	defer m.Close()
	l := &log{t: t}
	const size = 16 << 10
	n := mb << 20 / size
	fill(t, m, l, 0, n, size)
	// Half as much again, deleted: that is what there is to win.
	fill(t, m, l, n, n/2, size)
	del := &pb.InternalRaftRequest{DeleteRange: &pb.DeleteRangeRequest{Key: fmt.Appendf(nil, "/fill/%07d", n), RangeEnd: []byte("/fill/99")}}
	b, err := Command{Kind: KindRequest, Request: del}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	l.index++
	if _, err := m.Update([]dsm.Entry{{Index: l.index, Cmd: b}}); err != nil {
		t.Fatal(err)
	}
	compacted, err := m.kv.Compact(traceutil.TODO(), m.Rev())
	if err != nil {
		t.Fatal(err)
	}
	<-compacted
	idle, idleGets := measure(t, m, l, func() { time.Sleep(time.Second) })
	var st Defrag
	puts, gets := measure(t, m, l, func() {
		if st, err = m.Defragment(context.Background()); err != nil {
			t.Error(err)
		}
		m.retired.Wait() // closing and deleting the old file may disturb, too
	})
	t.Logf("%d MiB -> %d MiB in %v, the switch held up writers for %v\nputs:  %v; without: %v\nreads: %v; without: %v",
		st.Before>>20, st.After>>20, st.Took.Round(time.Millisecond), st.Pause.Round(10*time.Microsecond), puts, idle, gets, idleGets)
	if st.After >= st.Before*3/4 {
		t.Errorf("%d bytes became %d", st.Before, st.After)
	}
	const bound = 100 * time.Millisecond
	if puts.worst() > bound || gets.worst() > bound || st.Pause > bound {
		return fmt.Errorf("a pause above %v", bound)
	}
	return nil
}

// A snapshot that is being installed ends a defragmentation; so does Close.
func TestDefragEnds(t *testing.T) {
	m, _ := open(t, t.TempDir())
	l := &log{t: t}
	fill(t, m, l, 0, 4000, 16<<10)
	other, _ := open(t, t.TempDir())
	defer other.Close()
	ol := &log{t: t}
	ol.do(other, putCmd(0, 0, "a", "1"))
	began := func() <-chan error {
		c := make(chan error, 1)
		go func() { _, err := m.Defragment(context.Background()); c <- err }()
		for !m.Defragmenting() {
			time.Sleep(time.Millisecond)
		}
		return c
	}
	end := began()
	if _, err := m.Defragment(context.Background()); !errors.Is(err, ErrDefragRunning) {
		t.Errorf("a second one: %v", err)
	}
	snapshot(t, other, m)
	if err := <-end; !errors.Is(err, ErrDefragAbandoned) || !errors.Is(err, context.Canceled) {
		t.Errorf("ended with %v", err)
	}
	if value(t, m, "a") != "1" {
		t.Error("the snapshot is not there")
	}
	l.index = m.Applied()
	fill(t, m, l, 0, 4000, 16<<10)
	if _, err := m.Defragment(context.Background()); err != nil {
		t.Errorf("after the snapshot: %v", err)
	}
	end = began()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-end; err == nil {
		t.Error("a defragmentation outlived the machine")
	}
	if f := files(t, m); len(f) != 1 {
		t.Errorf("left over: %v", f)
	}
}
