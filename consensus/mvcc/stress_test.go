package mvcc

import (
	"context"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	etcdmvcc "go.etcd.io/etcd/server/v3/storage/mvcc"
)

// stress is a machine, whose log another one has applied further, and all that
// uses a machine at the same time.
type stress struct {
	t     *testing.T
	m     *Machine
	ahead *Machine
	ctx   context.Context
	wg    sync.WaitGroup
	seed  int64
	n     map[string]*atomic.Int64
}

// use calls f again and again, until the test ends, with a source of randomness of its own,
// and a short rest in between: who applies has to come to it. f may say that the machine
// is closed, which ends it.
func (s *stress) use(name string, f func(rnd *rand.Rand) error) {
	n := &atomic.Int64{}
	s.n[name] = n
	rnd := rand.New(rand.NewSource(s.seed + int64(len(s.n))))
	s.wg.Go(func() {
		for s.ctx.Err() == nil {
			switch err := f(rnd); {
			case errors.Is(err, ErrClosed):
				return
			case err != nil:
				s.t.Errorf("%s: %v", name, err)
				return
			}
			n.Add(1)
			time.Sleep(time.Duration(rnd.Int63n(int64(8 * time.Millisecond))))
		}
	})
}

// passed tells whether an error is one of a revision that is gone, or was not there yet.
func passed(err error) bool {
	return errors.Is(err, etcdmvcc.ErrCompacted) || errors.Is(err, etcdmvcc.ErrFutureRev) ||
		errors.Is(err, rpctypes.ErrCompacted) || errors.Is(err, rpctypes.ErrFutureRev)
}

func (s *stress) readers() {
	all := func(rev int64) *pb.RangeRequest {
		return &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, Revision: rev}
	}
	s.use("list", func(*rand.Rand) error { _, err := s.m.Range(context.Background(), all(0)); return err })
	s.use("list of the past", func(rnd *rand.Rand) error {
		if _, err := s.m.Range(context.Background(), all(max(1, s.m.Rev()-rnd.Int63n(60)))); err != nil && !passed(err) {
			return err
		}
		return nil
	})
	s.use("transaction", func(*rand.Rand) error {
		op := &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: all(0)}}
		_, err := s.m.ReadTxn(context.Background(), &pb.TxnRequest{Success: []*pb.RequestOp{op, op}})
		return err
	})
	s.use("hash", func(rnd *rand.Rand) error {
		if rnd.Intn(4) == 0 {
			_, _, err := s.m.Hash()
			return err
		}
		if _, _, err := s.m.HashKV(max(1, s.m.Rev()-rnd.Int63n(30))); err != nil && !passed(err) {
			return err
		}
		return nil
	})
	s.use("dump", func(*rand.Rand) error { return s.m.Dump(discard{}, func(int64) {}) })
	s.use("pin", func(rnd *rand.Rand) error {
		i, err := s.m.Pin()
		if err != nil {
			return err
		}
		defer i.Close()
		if rnd.Intn(2) == 0 {
			_, err = i.Write(discard{}, nil)
		}
		return err
	})
	s.use("numbers", func(*rand.Rand) error {
		s.m.Size()
		s.m.LastDefrag()
		for _, l := range s.m.Leases() {
			s.m.Lease(int64(l.ID))
		}
		return s.m.Commit()
	})
	s.use("lessor", func(*rand.Rand) error {
		s.m.PromoteLessor(time.Second)
		s.m.DemoteLessor()
		return nil
	})
	s.use("defragmentation", func(*rand.Rand) error {
		if _, err := s.m.Defragment(s.ctx); err != nil && !errors.Is(err, ErrDefragRunning) && !errors.Is(err, ErrDefragAbandoned) {
			return err
		}
		return nil
	})
}

// watch follows a prefix from the past, as the API's watches do: with what was there
// before each change, and with questions in between.
func (s *stress) watch(rnd *rand.Rand) error {
	ws, err := s.m.NewWatchStream()
	if err != nil {
		return err
	}
	var mu sync.Mutex // as in etcdapi: nothing is asked of a closed stream
	asking := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(asking)
		for {
			select {
			case <-stop:
				return
			case <-time.After(time.Millisecond):
				mu.Lock()
				ws.RequestProgressAll()
				ws.Rev()
				mu.Unlock()
			}
		}
	}()
	defer func() {
		close(stop)
		<-asking
		mu.Lock()
		ws.Close()
		mu.Unlock()
	}()
	for id := range 5 {
		if _, err := ws.Watch(etcdmvcc.WatchID(id+1), []byte("/registry/"), []byte("/registry0"), max(1, s.m.Rev()-rnd.Int63n(20))); err != nil {
			return err
		}
	}
	last := map[etcdmvcc.WatchID]int64{}
	for range 20 + rnd.Intn(50) {
		select {
		case r := <-ws.Chan():
			for _, e := range r.Events {
				if e.Kv.ModRevision < last[r.WatchID] {
					return fmt.Errorf("revision %d after %d", e.Kv.ModRevision, last[r.WatchID])
				}
				last[r.WatchID] = e.Kv.ModRevision
				if _, err := s.m.KeyAt(s.ctx, e.Kv.Key, e.Kv.ModRevision-1); err != nil && s.ctx.Err() == nil {
					return err
				}
			}
		case <-time.After(20 * time.Millisecond):
		case <-s.ctx.Done():
			return nil
		}
	}
	return nil
}

// Everything that may happen to a store at the same time does: applying, reading of now
// and of the past, watching, hashing, copies, compaction, defragmentation and snapshots
// from a replica that is ahead, at last its end. Nothing of it ends the process, and the
// store holds what one holds that was left in peace. SKEIN_STRESS is its length in seconds.
func TestEverythingAtOnce(t *testing.T) {
	seconds, _ := strconv.Atoi(os.Getenv("SKEIN_STRESS"))
	length := time.Duration(max(seconds, 3)) * time.Second
	s := &stress{t: t, seed: time.Now().UnixNano(), n: map[string]*atomic.Int64{}}
	t.Logf("seed %d", s.seed)
	var end context.CancelFunc
	s.ctx, end = context.WithCancel(context.Background())
	defer s.wg.Wait()
	defer end()
	s.m, _ = open(t, t.TempDir())
	s.ahead, _ = open(t, t.TempDir())
	defer s.ahead.Close()
	s.readers()
	s.use("watch", s.watch)
	s.use("watch 2", s.watch)
	one, two := &log{t: t}, &log{t: t}
	sc := &script{rnd: rand.New(rand.NewSource(s.seed))}
	steps, installed := 0, 0
	for begin := time.Now(); time.Since(begin) < length && !t.Failed(); steps++ {
		c := sc.next(3000)
		one.do(s.ahead, c)
		if sc.rnd.Intn(60) != 0 {
			two.do(s.m, c)
			continue
		}
		snapshot(t, s.ahead, s.m)
		two.cmds = append(two.cmds[:0:0], one.cmds...)
		installed++
	}
	settle(t, s.ahead, one, s.ahead.Rev()-10)
	settle(t, s.m, two, s.m.Rev()-10)
	if got, want := image(t, s.m), image(t, s.ahead); got != want {
		t.Errorf("it holds %s, the other %s", got, want)
	}
	if err := s.m.Close(); err != nil { // while all goes on
		t.Error(err)
	}
	end()
	s.wg.Wait()
	t.Logf("%d entries, %d snapshots", steps, installed)
	for name, n := range s.n {
		t.Logf("%s: %d", name, n.Load())
	}
}
