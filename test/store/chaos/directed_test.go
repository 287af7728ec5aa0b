package chaos

import (
	"context"
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"skein.io/skein/test/store/chaos/history"
)

// must do a request that a healthy cluster answers.
func (n *node) must(t *testing.T, op *history.Op) *history.Op {
	t.Helper()
	op.Shard = "system"
	if n.do(t.Context(), op); op.Outcome != history.Done {
		t.Fatalf("%v", op)
	}
	return op
}

func (n *node) put(t *testing.T, key, value string) int64 {
	t.Helper()
	return n.must(t, &history.Op{Then: []history.Step{{Kind: history.Put, Key: key, Value: value}}}).Rev
}

// What compaction has got wrong in etcd (18089, 18667, 19179): a watch from the
// compacted revision on still gets a deletion at that revision; a transaction
// that reads what is compacted fails as a whole, on all replicas alike. Also
// after the processes were killed in between, before the past was removed.
func TestCompaction(t *testing.T) {
	w := newWorld(t, storeBinary(t), 1, 0)
	n := w.nodes[0]
	main := &mainWatch{n: n, shard: "system", next: 1}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); main.run(ctx) }()
	defer func() { cancel(); <-done }()
	value := 0
	next := func() string { value++; return fmt.Sprint("v", value) }
	for round := range 6 {
		key := fmt.Sprintf("/chaos/%d/a", round)
		n.put(t, key, next())
		put := n.put(t, key, next())
		gone := n.must(t, &history.Op{Then: []history.Step{{Kind: history.Delete, Key: key}}}).Rev
		after := n.put(t, key+"b", next())
		at := gone + int64(round%3) - 1 // before, at and behind the deletion
		if err := until(ctx, "the main watch", func(context.Context) error {
			if main.seen.Load() < after {
				return fmt.Errorf("at %d", main.seen.Load())
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		c := &history.Compaction{Shard: "system", Rev: at, Call: w.hist.Now()}
		w.hist.AddCompaction(c)
		if _, err := pb.NewKVClient(n.conn("system")).Compact(t.Context(), &pb.CompactionRequest{Revision: at, Physical: round%2 == 0}); err != nil {
			t.Fatal(err)
		}
		if round >= 3 {
			if err := n.powerCut(int64(round)); err != nil {
				t.Fatal(err)
			}
			if err := n.start(); err != nil {
				t.Fatal(err)
			}
			rctx, rcancel := context.WithTimeout(t.Context(), patience)
			if err := until(rctx, "readiness", n.ready); err != nil {
				t.Fatal(err)
			}
			rcancel()
		}
		watchUntil(t, n, &history.Watch{Shard: "system", Key: key, End: key + "z", Start: at, PrevKV: true}, after)
		// The revision before: refused as a whole, with nothing written.
		write := history.Step{Kind: history.Put, Key: key, Value: next()}
		op := n.do(t.Context(), &history.Op{Shard: "system", Form: history.Txn,
			Then: []history.Step{write, {Key: key, Rev: put - 1}}})
		if op.Outcome != history.Compacted {
			t.Errorf("round %d: %v", round, op)
		}
		n.must(t, &history.Op{Then: []history.Step{{Key: key, End: key + "z", Rev: at}}})
		n.must(t, &history.Op{Then: []history.Step{{Key: key, End: key + "z"}}})
	}
	cancel()
	<-done
	if v := history.Check(w.hist, history.Options{}); len(v) > 0 {
		t.Error(v)
	}
}

// watchUntil runs a watch until it has shown a revision.
func watchUntil(t *testing.T, n *node, w *history.Watch, rev int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s, err := n.openStream(ctx, w.Shard, false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if err := s.watch(1, w); err != nil {
		t.Fatal(err)
	}
	for {
		_, m, err := s.receive()
		if err != nil {
			t.Fatalf("%v: %v", w, err)
		}
		if m.Canceled || len(m.Events) > 0 && m.Events[len(m.Events)-1].KV.Mod >= rev {
			return
		}
	}
}

// Wall clocks that jump change nothing: the leader stays, watches that require a
// leader stay open, leases end neither early nor late.
func TestClock(t *testing.T) {
	w := newWorld(t, storeBinary(t), 3, 0)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	leader := w.leader(ctx, "system")
	before, err := leader.status(ctx, "system")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan string, len(w.nodes))
	watching, stop := context.WithCancel(ctx)
	defer stop()
	for _, n := range w.nodes {
		s, err := n.openStream(watching, "system", true)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.watch(1, &history.Watch{Shard: "system", Key: "/chaos/"}); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.receive(); err != nil {
			t.Fatal(err)
		}
		go func() {
			_, _, err := s.receive() // nothing is written that it asks for
			ended <- fmt.Sprintf("%s: %v", n.name, err)
		}()
	}
	lc := pb.NewLeaseClient(leader.conn("system"))
	lease, err := lc.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 4})
	if err != nil {
		t.Fatal(err)
	}
	granted := time.Now()
	for i, off := range []time.Duration{time.Hour, -time.Hour, 365 * 24 * time.Hour, -2 * time.Second, 0, 30 * time.Second} {
		for j, n := range w.nodes {
			if i%2 == 0 || j > 0 { // sometimes all together
				if err := n.jump(off); err != nil {
					t.Skip(err)
				}
			}
		}
		for end := time.Now().Add(500 * time.Millisecond); time.Now().Before(end); {
			for _, n := range w.nodes {
				st, err := n.status(ctx, "system")
				if err != nil {
					t.Fatal(err)
				}
				if st.SinceContact < 0 || st.SinceContact > 20*time.Second || st.Term != before.Term {
					t.Fatalf("after a jump by %v: %s heard the leader %v ago, term %d was %d", off, n.name, st.SinceContact, st.Term, before.Term)
				}
			}
		}
		r, err := lc.LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: lease.ID})
		if err != nil {
			t.Fatal(err)
		}
		if left := 4*time.Second - time.Since(granted); left > 1500*time.Millisecond && r.TTL <= 0 { // whole seconds, as in etcd
			t.Errorf("after a jump by %v the lease has ended, %v early", off, left)
		}
	}
	select {
	case why := <-ended:
		t.Errorf("a watch ended: %s", why)
	default:
	}
	err = until(ctx, "end of the lease", func(ctx context.Context) error {
		r, err := lc.LeaseTimeToLive(ctx, &pb.LeaseTimeToLiveRequest{ID: lease.ID})
		if err == nil && r.TTL >= 0 {
			return fmt.Errorf("%d s left", r.TTL)
		}
		return err
	})
	if took := time.Since(granted); err != nil || took > 20*time.Second {
		t.Errorf("the lease ended after %v (%v)", took, err)
	}
}
