package mvcc

import (
	"context"
	"fmt"
	"math/rand"
	"reflect"
	"testing"
	"time"

	dsm "github.com/lni/dragonboat/v4/statemachine"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/pkg/v3/traceutil"
	"go.etcd.io/etcd/server/v3/lease"
)

// randomTxn makes transactions like those of k8s.io/apiserver, and others.
func randomTxn(r *rand.Rand, rev int64) *pb.TxnRequest {
	key := func() []byte { return fmt.Appendf(nil, "/k/%d", r.Intn(8)) }
	some := func(n int) bool { return r.Intn(n) == 0 }
	q := &pb.TxnRequest{}
	for range r.Intn(3) {
		c := &pb.Compare{Key: key(), Result: pb.Compare_CompareResult(r.Intn(4)), Target: pb.Compare_CompareTarget(r.Intn(5))}
		switch n := rev - int64(r.Intn(8)); c.Target {
		case pb.Compare_VERSION:
			c.TargetUnion = &pb.Compare_Version{Version: int64(r.Intn(4))}
		case pb.Compare_CREATE:
			c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: n}
		case pb.Compare_MOD:
			c.TargetUnion = &pb.Compare_ModRevision{ModRevision: n}
		case pb.Compare_VALUE:
			c.TargetUnion = &pb.Compare_Value{Value: fmt.Append(nil, r.Intn(9))}
		case pb.Compare_LEASE:
			c.TargetUnion = &pb.Compare_Lease{Lease: int64(r.Intn(4))}
		}
		if some(8) {
			c.RangeEnd = key()
		}
		if some(8) { // of another target, or none
			c.TargetUnion = nil
		}
		if some(20) {
			c.Target, c.Result = 99, pb.Compare_CompareResult(r.Intn(6))
		}
		q.Compare = append(q.Compare, c)
	}
	op := func() *pb.RequestOp {
		switch r.Intn(6) {
		case 0:
			return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: key()}}}
		case 1, 2:
			d := &pb.DeleteRangeRequest{Key: key(), PrevKv: some(6)}
			if some(6) {
				d.RangeEnd = key()
			}
			return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: d}}
		}
		p := &pb.PutRequest{Key: key(), Value: fmt.Append(nil, r.Intn(9)), PrevKv: some(10)}
		if some(4) {
			p.Lease = int64(r.Intn(5)) // of which some exist
		}
		if some(12) {
			p.IgnoreLease, p.Lease = true, 0
		}
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: p}}
	}
	for range r.Intn(3) {
		q.Success = append(q.Success, op())
	}
	for range r.Intn(3) {
		q.Failure = append(q.Failure, op())
	}
	return q
}

// twins are two replicas that do the same: own executes all that it can by itself, etcd nothing. l is own's log.
func twins(t *testing.T) (own, etcd *Machine, l *log, do func(*pb.InternalRaftRequest) (a, b Result)) {
	t.Helper()
	own, _ = open(t, t.TempDir())
	etcd, _ = open(t, t.TempDir())
	t.Cleanup(func() { own.Close(); etcd.Close() })
	if own.keys == nil {
		t.Fatal("the index of the keys is not found: all is left to etcd's code")
	}
	etcd.keys = nil
	l, twin := &log{t: t}, &log{t: t}
	return own, etcd, l, func(q *pb.InternalRaftRequest) (a, b Result) {
		other := *q
		return l.do(own, Command{Kind: KindRequest, Request: q}), twin.do(etcd, Command{Kind: KindRequest, Request: &other})
	}
}

// Transactions have the same outcome as with etcd's own code: one replica executes
// all that it can by itself, the other one none. A snapshot is installed on the way,
// which replaces the index.
func TestTxnLikeEtcd(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewSource(seed))
	own, etcd, l, do := twins(t)
	for id := range int64(3) {
		do(&pb.InternalRaftRequest{LeaseGrant: &pb.LeaseGrantRequest{ID: id + 1, TTL: 1000}})
	}
	byItself := 0
	for i := range 3000 {
		if i == 1500 {
			other, _ := open(t, t.TempDir())
			(&log{t: t, cmds: l.cmds}).replay(other, 0)
			snapshot(t, other, own)
			if err := other.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if i%100 == 99 {
			do(&pb.InternalRaftRequest{Compaction: &pb.CompactionRequest{Revision: own.Rev() - 3}})
		}
		q := randomTxn(r, own.Rev())
		if CheckTxn(q) == nil {
			untraced(func(ctx context.Context) {
				if _, _, _, ok, _ := own.compare(traceutil.Get(ctx), q); ok {
					byItself++
				}
			})
		}
		a, b := do(&pb.InternalRaftRequest{Txn: q})
		if !reflect.DeepEqual(a.Resp, b.Resp) || fmt.Sprint(a.Err) != fmt.Sprint(b.Err) {
			t.Fatalf("transaction %d, %v:\n%v, %v\nwith etcd's code:\n%v, %v", i, q, a.Resp, a.Err, b.Resp, b.Err)
		}
	}
	if x, y := dump(t, own), dump(t, etcd); !reflect.DeepEqual(x, y) {
		t.Errorf("the keys differ:\n%+v\n%+v", x, y)
	}
	if byItself < 500 {
		t.Errorf("only %d of 3000 transactions were not left to etcd's code", byItself)
	}
	for _, id := range []lease.LeaseID{1, 2, 3} {
		if x, y := own.lessor.Lookup(id).Keys(), etcd.lessor.Lookup(id).Keys(); len(x) != len(y) {
			t.Errorf("lease %d has the keys %v, with etcd's code %v", id, x, y)
		}
	}
}

// A compare-and-swap as k8s.io/apiserver makes it, executed here and by etcd's code.
func BenchmarkCompareAndSwap(b *testing.B) {
	for _, by := range []string{"own", "etcd"} {
		b.Run(by, func(b *testing.B) {
			m, _ := open(b, b.TempDir())
			defer m.Close()
			if by == "etcd" {
				m.keys = nil
			}
			value, revs, index := make([]byte, 1024), map[string]int64{}, uint64(0)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				key := fmt.Sprintf("/registry/configmaps/bench/%d", i%5000)
				q := &pb.TxnRequest{
					Compare: []*pb.Compare{{Target: pb.Compare_MOD, Key: []byte(key), TargetUnion: &pb.Compare_ModRevision{ModRevision: revs[key]}}},
					Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: value}}}},
					Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key)}}}},
				}
				cmd, err := Command{Kind: KindRequest, Request: &pb.InternalRaftRequest{Header: &pb.RequestHeader{ID: 1}, Txn: q}}.Encode()
				if err != nil {
					b.Fatal(err)
				}
				done := m.Waiters().Register(1, 0)
				index++
				if _, err := m.Update([]dsm.Entry{{Index: index, Cmd: cmd}}); err != nil {
					b.Fatal(err)
				}
				r := <-done
				if r.Err != nil || !r.Resp.(*pb.TxnResponse).Succeeded {
					b.Fatalf("%v, %v", r.Resp, r.Err)
				}
				revs[key] = r.Resp.(*pb.TxnResponse).Header.Revision
			}
		})
	}
}
