package mvcc

import (
	"bytes"
	"context"
	"fmt"
	"math/rand"
	"reflect"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/etcdserver/txn"

	"skein.io/skein/consensus/loan"
)

// randomRange makes ranges like those of k8s.io/apiserver, and others.
func randomRange(r *rand.Rand, rev int64) *pb.RangeRequest {
	key := func() []byte { return fmt.Appendf(nil, "/k/%04d", r.Intn(4200)) }
	some := func(n int) bool { return r.Intn(n) == 0 }
	q := &pb.RangeRequest{Key: []byte("/k/"), RangeEnd: []byte("/k0"), Limit: int64([]int{0, 1, 2, 100, 300, 500, 1000, 5000}[r.Intn(8)])}
	if some(3) {
		q.Key = key()
	}
	if some(8) {
		q.RangeEnd = key()
	}
	if some(20) {
		q.RangeEnd = [][]byte{nil, {0}, []byte("/"), []byte("/x")}[r.Intn(4)]
	}
	switch r.Intn(6) {
	case 0:
		q.Revision = rev - int64(r.Intn(60))
	case 1:
		q.Revision = rev + int64(r.Intn(3)) - 1
	}
	if some(10) {
		q.SortOrder, q.SortTarget = pb.RangeRequest_SortOrder(r.Intn(3)), pb.RangeRequest_SortTarget(r.Intn(2))
	}
	if some(20) {
		q.CountOnly = true
	}
	if some(20) {
		q.KeysOnly = true
	}
	if some(20) {
		q.MinModRevision = rev - 20
	}
	return q
}

// Ranges have the same outcome as with etcd's code, whatever is remembered of earlier ones: while keys come and go, one by one and many at once, by
// deletions and with leases, over compactions and a snapshot, at old revisions, and page by page, in memory that is lent or not.
func TestRangeLikeEtcd(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewSource(seed))
	own, etcd, l, do := twins(t)
	put := func(i int, lease int64) {
		p := &pb.PutRequest{Key: fmt.Appendf(nil, "/k/%04d", i), Value: make([]byte, r.Intn(40)), Lease: lease}
		if lease == 0 && r.Intn(2) == 0 { // another way
			do(&pb.InternalRaftRequest{Txn: &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: p}}}}})
			return
		}
		do(&pb.InternalRaftRequest{Put: p})
	}
	for i := range 3000 {
		put(i, 0)
	}
	byItself, compacted := 0, int64(0)
	same := func(q *pb.RangeRequest) *pb.RangeResponse {
		t.Helper()
		ctx := context.Background()
		var lent loan.Loan
		if r.Intn(2) == 0 {
			ctx = loan.With(ctx, &lent)
			defer lent.Return()
		}
		if _, ok := own.page(ctx, q); ok {
			byItself++
		}
		a, errA := own.Range(ctx, q)
		b, errB := etcd.Range(ctx, q)
		if fmt.Sprint(errA) != fmt.Sprint(errB) {
			t.Fatalf("%v: error %v, with etcd's code %v", q, errA, errB)
		}
		if errA == nil && (a.Count != b.Count || a.More != b.More || !reflect.DeepEqual(a.Header, b.Header) || !equalKVs(a.Kvs, b.Kvs)) {
			t.Fatalf("%v: %d keys of %d, more: %v, %v\nwith etcd's code %d of %d, more: %v, %v", q, len(a.Kvs), a.Count, a.More, a.Header, len(b.Kvs), b.Count, b.More, b.Header)
		}
		return b
	}
	for i := range 1200 {
		switch {
		case i == 800:
			other, _ := open(t, t.TempDir())
			(&log{t: t, cmds: l.cmds}).replay(other, 0)
			snapshot(t, other, own)
			if err := other.Close(); err != nil {
				t.Fatal(err)
			}
		case i%200 == 199:
			compacted = own.Rev() - int64(r.Intn(30))
			do(&pb.InternalRaftRequest{Compaction: &pb.CompactionRequest{Revision: compacted}})
		case i%500 == 250: // many at once
			from := r.Intn(3000)
			do(&pb.InternalRaftRequest{DeleteRange: &pb.DeleteRangeRequest{Key: fmt.Appendf(nil, "/k/%04d", from), RangeEnd: fmt.Appendf(nil, "/k/%04d", from+1200)}})
		case i%500 == 300:
			for j := range 900 {
				put(3000+j, 0)
			}
		case i%100 == 50:
			do(&pb.InternalRaftRequest{LeaseGrant: &pb.LeaseGrantRequest{ID: int64(i), TTL: 1000}})
			for range 5 {
				put(r.Intn(4200), int64(i))
			}
		case i%100 == 60:
			do(&pb.InternalRaftRequest{LeaseRevoke: &pb.LeaseRevokeRequest{ID: int64(i - 10)}})
		}
		switch r.Intn(3) {
		case 0:
			put(r.Intn(4200), 0)
		case 1:
			do(&pb.InternalRaftRequest{DeleteRange: &pb.DeleteRangeRequest{Key: fmt.Appendf(nil, "/k/%04d", r.Intn(4200))}})
		}
		if i%50 != 0 {
			same(randomRange(r, own.Rev()))
			continue
		}
		q := &pb.RangeRequest{Key: []byte("/k/"), RangeEnd: []byte("/k0"), Limit: int64(100 + r.Intn(600))}
		for page := same(q); page.More; page = same(q) {
			if q.Revision == 0 {
				q.Revision = page.Header.Revision
			}
			q.Key = append(page.Kvs[len(page.Kvs)-1].Key, 0)
			put(r.Intn(4200), 0)
		}
	}
	if byItself < 800 {
		t.Errorf("only %d of some 1200 ranges were not left to etcd's code", byItself)
	}
	if len(own.counts.known) == 0 || len(own.counts.turns) == 0 || len(own.counts.fences) == 0 {
		t.Errorf("remembered are %d counts, %d keys that came or went, fences of %d ends", len(own.counts.known), len(own.counts.turns), len(own.counts.fences))
	}
}

func equalKVs(a, b []*mvccpb.KeyValue) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		x, y := a[i], b[i]
		if !bytes.Equal(x.Key, y.Key) || !bytes.Equal(x.Value, y.Value) || x.CreateRevision != y.CreateRevision || x.ModRevision != y.ModRevision || x.Version != y.Version || x.Lease != y.Lease {
			return false
		}
	}
	return true
}

// What the store has written is decoded as its generated code does it.
func FuzzDecodeKV(f *testing.F) {
	for _, kv := range []mvccpb.KeyValue{{}, {Key: []byte("k"), Value: []byte("v"), CreateRevision: 1, ModRevision: 300, Version: 2, Lease: -1}, {Key: []byte("gone")}} {
		b, err := kv.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var ours, theirs mvccpb.KeyValue
		if !decodeKV(&ours, b) {
			return // etcd's code reads it then
		}
		if err := theirs.Unmarshal(b); err != nil {
			t.Fatalf("%x: %v", b, err)
		}
		if ours.String() != theirs.String() {
			t.Fatalf("%x: %s, want %s", b, ours.String(), theirs.String())
		}
	})
}

// The first page of a list of 10,000 keys, as the API reads it.
func BenchmarkPage(b *testing.B) {
	for _, by := range []string{"own", "etcd"} {
		b.Run(by, func(b *testing.B) {
			m, _ := open(b, b.TempDir())
			defer m.Close()
			kv := m.kv
			if by == "etcd" {
				m.keys = nil
			}
			for i := range 10000 {
				kv.Put(fmt.Appendf(nil, "/registry/pods/bench/p-%05d", i*7919%10000), make([]byte, 1100), 0)
			}
			m.backend().ForceCommit() // as it is a second later
			var lent loan.Loan
			ctx := loan.With(context.Background(), &lent)
			b.ReportAllocs()
			for b.Loop() {
				r, err := m.Range(ctx, &pb.RangeRequest{Key: []byte("/registry/pods/"), RangeEnd: []byte("/registry/pods0"), Limit: 500})
				if err != nil || len(r.Kvs) != 500 || r.Count != 10000 {
					b.Fatalf("%d of %d keys, %v", len(r.Kvs), r.Count, err)
				}
				lent.Return()
			}
		})
	}
}

// The count of a page is right while keys come and go beside it.
func TestCountUnderWrites(t *testing.T) {
	m, _ := open(t, t.TempDir())
	defer m.Close()
	key := func(i int) []byte { return fmt.Appendf(nil, "/k/%04d", i) }
	for i := range 2000 {
		m.kv.Put(key(i), nil, 0)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		r := rand.New(rand.NewSource(1))
		for range 1500 {
			if k := key(r.Intn(3000)); r.Intn(2) == 0 {
				m.kv.Put(k, nil, 0)
			} else {
				m.kv.DeleteRange(k, nil)
			}
		}
	}()
	var wg sync.WaitGroup
	for i := range 3 {
		wg.Go(func() {
			for running := true; running; {
				select {
				case <-done:
					running = false // once more
				default:
				}
				q := &pb.RangeRequest{Key: []byte("/k/"), RangeEnd: []byte("/k0"), Limit: int64(1 + 200*i)}
				for {
					page, ok := m.page(t.Context(), q)
					if !ok {
						t.Error("a page was left to etcd's code")
						return
					}
					if q.Revision == 0 { // the others are of the same
						q.Revision = page.Header.Revision
					}
					want, _, err := txn.Range(t.Context(), m.zap, m.kv, &pb.RangeRequest{Key: q.Key, RangeEnd: q.RangeEnd, Revision: q.Revision, CountOnly: true})
					if err != nil || page.Count != want.Count {
						t.Errorf("%d keys from %s on at revision %d, want %d, %v", page.Count, q.Key, q.Revision, want.Count, err)
						return
					}
					if !page.More || i == 0 {
						break
					}
					q.Key = append(page.Kvs[len(page.Kvs)-1].Key, 0)
				}
			}
		})
	}
	wg.Wait()
}
