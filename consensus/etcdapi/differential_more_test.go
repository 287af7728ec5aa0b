package etcdapi_test

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

func TestLikeEtcdLease(t *testing.T) {
	d := newDiffer(t)
	grant := func(name string, q *pb.LeaseGrantRequest) {
		t.Helper()
		same(d, name, func(ctx context.Context, p *peer) (*pb.LeaseGrantResponse, error) { return p.lease.LeaseGrant(ctx, q) })
	}
	ttl := func(name string, q *pb.LeaseTimeToLiveRequest) {
		t.Helper()
		same(d, name, func(ctx context.Context, p *peer) (*pb.LeaseTimeToLiveResponse, error) {
			r, err := p.lease.LeaseTimeToLive(ctx, q)
			if err == nil {
				slices.SortFunc(r.Keys, func(a, b []byte) int { return slices.Compare(a, b) })
				if r.TTL > 0 && r.TTL == r.GrantedTTL-1 {
					r.TTL++ // a second may have begun
				}
			}
			return r, err
		})
	}
	revoke := func(name string, id int64) {
		t.Helper()
		same(d, name, func(ctx context.Context, p *peer) (*pb.LeaseRevokeResponse, error) {
			return p.lease.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: id})
		})
	}
	leases := func(name string) {
		t.Helper()
		same(d, name, func(ctx context.Context, p *peer) (*pb.LeaseLeasesResponse, error) {
			r, err := p.lease.LeaseLeases(ctx, &pb.LeaseLeasesRequest{})
			if err == nil {
				slices.SortFunc(r.Leases, func(a, b *pb.LeaseStatus) int { return int(a.ID - b.ID) })
			}
			return r, err
		})
	}
	alive := func(name string, ids ...int64) {
		t.Helper()
		same(d, name, func(ctx context.Context, p *peer) (out []string, err error) {
			s, err := p.lease.LeaseKeepAlive(ctx)
			if err != nil {
				return nil, err
			}
			for _, id := range ids {
				if err := s.Send(&pb.LeaseKeepAliveRequest{ID: id}); err != nil {
					return nil, err
				}
				r, err := s.Recv()
				if err != nil {
					return nil, err
				}
				out = append(out, show(r))
			}
			if err := s.CloseSend(); err != nil {
				return nil, err
			}
			_, err = s.Recv()
			return append(out, fmt.Sprint(err)), nil
		})
	}
	leases("none")
	grant("a lease", &pb.LeaseGrantRequest{ID: 100, TTL: 60})
	grant("the same again", &pb.LeaseGrantRequest{ID: 100, TTL: 60})
	grant("negative id", &pb.LeaseGrantRequest{ID: -5, TTL: 60})
	grant("too long", &pb.LeaseGrantRequest{ID: 101, TTL: 9000000001})
	grant("as long as can be", &pb.LeaseGrantRequest{ID: 102, TTL: 9000000000})
	grant("far too long", &pb.LeaseGrantRequest{ID: 103, TTL: math.MaxInt64})
	grant("no time", &pb.LeaseGrantRequest{ID: 104})
	grant("negative time", &pb.LeaseGrantRequest{ID: 105, TTL: -1})
	grant("one second", &pb.LeaseGrantRequest{ID: 106, TTL: 1})
	grant("hold keys", &pb.LeaseGrantRequest{ID: 200, TTL: 300})
	d.put("attach", &pb.PutRequest{Key: []byte("k2"), Value: []byte("x"), Lease: 200})
	d.put("attach another", &pb.PutRequest{Key: []byte("k1"), Value: []byte("x"), Lease: 200})
	d.put("move it", &pb.PutRequest{Key: []byte("k1"), Value: []byte("y"), Lease: 100, PrevKv: true})
	d.put("keep its lease", &pb.PutRequest{Key: []byte("k1"), Value: []byte("z"), IgnoreLease: true, PrevKv: true})
	d.put("detach it", &pb.PutRequest{Key: []byte("k3"), Value: []byte("z"), Lease: 200})
	d.put("detach it", &pb.PutRequest{Key: []byte("k3"), Value: []byte("z")})
	d.rng("keys with leases", &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l")})
	d.txn("compare a lease", &pb.TxnRequest{Compare: []*pb.Compare{{Target: pb.Compare_LEASE, Key: []byte("k1"), TargetUnion: &pb.Compare_Lease{Lease: 100}}},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("k4"), Lease: 200}}}}})
	d.txn("a lease that is not, after a put", &pb.TxnRequest{Success: []*pb.RequestOp{opPut("k9", "x"), {Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("k8"), Lease: 4711}}}}})
	d.rng("nothing of it", &pb.RangeRequest{Key: []byte("k8"), RangeEnd: []byte("kz")})
	ttl("time to live", &pb.LeaseTimeToLiveRequest{ID: 200})
	ttl("with keys", &pb.LeaseTimeToLiveRequest{ID: 200, Keys: true})
	ttl("no keys", &pb.LeaseTimeToLiveRequest{ID: 102, Keys: true})
	ttl("of nothing", &pb.LeaseTimeToLiveRequest{ID: 999, Keys: true})
	ttl("of zero", &pb.LeaseTimeToLiveRequest{})
	alive("keep alive", 200, 100, 999, 0, 200)
	alive("keep nothing alive")
	leases("all")
	revoke("a lease with keys", 200)
	revoke("again", 200)
	revoke("zero", 0)
	d.rng("its keys are gone", &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l")})
	leases("without it")
	same(d, "an id is chosen", func(ctx context.Context, p *peer) (*pb.LeaseGrantResponse, error) {
		r, err := p.lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 60})
		if err == nil && r.ID <= 0 {
			t.Errorf("the id is %d", r.ID)
		}
		r.ID = 0
		return r, err
	})
	d.end()
}

func TestLikeEtcdMaintenance(t *testing.T) {
	d := newDiffer(t)
	for i := range 20 {
		d.put("put", &pb.PutRequest{Key: fmt.Append(nil, "k", i%7), Value: fmt.Append(nil, i)})
	}
	hash := func(rev int64) {
		t.Helper()
		same(d, fmt.Sprint("hash at ", rev), func(ctx context.Context, p *peer) (*pb.HashKVResponse, error) {
			return p.maint.HashKV(ctx, &pb.HashKVRequest{Revision: rev})
		})
	}
	for _, r := range []int64{0, 1, 2, 10, 21, 22, 100, -1} {
		hash(r)
	}
	d.compact("compact", &pb.CompactionRequest{Revision: 12, Physical: true})
	for _, r := range []int64{0, 5, 11, 12, 13, 21} {
		hash(r)
	}
	for _, q := range []*pb.AlarmRequest{{}, {Alarm: pb.AlarmType_NOSPACE}, {Alarm: 9}, {Action: pb.AlarmRequest_DEACTIVATE, Alarm: pb.AlarmType_NOSPACE},
		{Action: pb.AlarmRequest_DEACTIVATE, MemberID: 5, Alarm: pb.AlarmType_CORRUPT}, {Action: pb.AlarmRequest_ACTIVATE, MemberID: 5, Alarm: pb.AlarmType_CORRUPT}, {}, {Alarm: pb.AlarmType_CORRUPT},
		{Action: pb.AlarmRequest_DEACTIVATE, MemberID: 5, Alarm: pb.AlarmType_CORRUPT}, {}} {
		same(d, "alarm "+q.String(), func(ctx context.Context, p *peer) (*pb.AlarmResponse, error) { return p.maint.Alarm(ctx, q) })
	}
	same(d, "defragment", func(ctx context.Context, p *peer) (*pb.DefragmentResponse, error) {
		return p.maint.Defragment(ctx, &pb.DefragmentRequest{})
	})
	same(d, "move the leader to nobody", func(ctx context.Context, p *peer) (*pb.MoveLeaderResponse, error) {
		return p.maint.MoveLeader(ctx, &pb.MoveLeaderRequest{TargetID: 4711})
	})
	same(d, "status, the steady part", func(ctx context.Context, p *peer) (*pb.StatusResponse, error) {
		r, err := p.maint.Status(ctx, &pb.StatusRequest{})
		if err != nil {
			return r, err
		}
		if r.Leader != r.Header.MemberId || r.RaftTerm == 0 || r.RaftIndex < 20 || r.RaftAppliedIndex > r.RaftIndex || r.DbSize < 4096 || r.DbSizeInUse > r.DbSize {
			t.Errorf("status %v", r)
		}
		r.Leader, r.RaftTerm, r.RaftIndex, r.RaftAppliedIndex, r.DbSize, r.DbSizeInUse = 0, 0, 0, 0, 0, 0
		return r, nil
	})
	same(d, "snapshot, its form", func(ctx context.Context, p *peer) (out []string, err error) {
		s, err := p.maint.Snapshot(ctx, &pb.SnapshotRequest{})
		if err != nil {
			return nil, err
		}
		sum, size, last := sha256.New(), uint64(0), []byte(nil)
		left := uint64(math.MaxUint64)
		for {
			r, err := s.Recv()
			if err == io.EOF {
				break
			}
			if err != nil {
				return nil, err
			}
			sum.Write(last)
			size += uint64(len(last))
			if last = r.Blob; left != math.MaxUint64 && left > 0 && left != r.RemainingBytes+uint64(len(r.Blob)) {
				t.Errorf("%d bytes left, then %d and %d", left, len(r.Blob), r.RemainingBytes)
			}
			left = r.RemainingBytes
			out = []string{r.Version}
		}
		return append(out, fmt.Sprint(string(sum.Sum(nil)) == string(last), size%4096, left)), nil
	})
	for _, q := range []*healthpb.HealthCheckRequest{{}, {Service: "etcdserverpb.KV"}} {
		same(d, "health "+q.Service, func(ctx context.Context, p *peer) (*healthpb.HealthCheckResponse, error) {
			return healthpb.NewHealthClient(p.conn).Check(ctx, q)
		})
	}
	for _, q := range []*pb.DowngradeRequest{{}, {Action: pb.DowngradeRequest_ENABLE, Version: "nonsense"}, {Action: pb.DowngradeRequest_VALIDATE, Version: "3.5"}, {Action: pb.DowngradeRequest_CANCEL}} {
		differs(d, "downgrade "+q.String(), "there is no such protocol", "", "FailedPrecondition: skein: there is nothing to prepare", func(ctx context.Context, p *peer) (*pb.DowngradeResponse, error) {
			return p.maint.Downgrade(ctx, q)
		})
	}
	d.end()
}

func TestLikeEtcdAuthAndCluster(t *testing.T) {
	d := newDiffer(t)
	same(d, "auth status", func(ctx context.Context, p *peer) (*pb.AuthStatusResponse, error) {
		return p.auth.AuthStatus(ctx, &pb.AuthStatusRequest{})
	})
	same(d, "auth disable", func(ctx context.Context, p *peer) (*pb.AuthDisableResponse, error) {
		return p.auth.AuthDisable(ctx, &pb.AuthDisableRequest{})
	})
	same(d, "authenticate", func(ctx context.Context, p *peer) (*pb.AuthenticateResponse, error) {
		return p.auth.Authenticate(ctx, &pb.AuthenticateRequest{Name: "root", Password: "x"})
	})
	same(d, "users", func(ctx context.Context, p *peer) (*pb.AuthUserListResponse, error) {
		return p.auth.UserList(ctx, &pb.AuthUserListRequest{})
	})
	same(d, "roles", func(ctx context.Context, p *peer) (*pb.AuthRoleListResponse, error) {
		return p.auth.RoleList(ctx, &pb.AuthRoleListRequest{})
	})
	same(d, "a user", func(ctx context.Context, p *peer) (*pb.AuthUserGetResponse, error) {
		return p.auth.UserGet(ctx, &pb.AuthUserGetRequest{Name: "x"})
	})
	same(d, "a role", func(ctx context.Context, p *peer) (*pb.AuthRoleGetResponse, error) {
		return p.auth.RoleGet(ctx, &pb.AuthRoleGetRequest{Role: "x"})
	})
	same(d, "delete a user", func(ctx context.Context, p *peer) (*pb.AuthUserDeleteResponse, error) {
		return p.auth.UserDelete(ctx, &pb.AuthUserDeleteRequest{Name: "x"})
	})
	same(d, "delete a role", func(ctx context.Context, p *peer) (*pb.AuthRoleDeleteResponse, error) {
		return p.auth.RoleDelete(ctx, &pb.AuthRoleDeleteRequest{Role: "x"})
	})
	const why = "the store has no users; certificates decide"
	differs(d, "enable auth", why, "root user does not exist", "FailedPrecondition: skein: the store has no users", func(ctx context.Context, p *peer) (*pb.AuthEnableResponse, error) {
		return p.auth.AuthEnable(ctx, &pb.AuthEnableRequest{})
	})
	differs(d, "add a role", why, "revision", "FailedPrecondition: skein: the store has no users", func(ctx context.Context, p *peer) (*pb.AuthRoleAddResponse, error) {
		return p.auth.RoleAdd(ctx, &pb.AuthRoleAddRequest{Name: "r"})
	})
	differs(d, "members", "names and URLs", "default", "n0", func(ctx context.Context, p *peer) (*pb.MemberListResponse, error) {
		return p.cluster.MemberList(ctx, &pb.MemberListRequest{Linearizable: true})
	})
	const who = "FailedPrecondition: skein: the cluster's leader chooses"
	differs(d, "add a member", "chosen by the cluster", "given member URLs are invalid", who, func(ctx context.Context, p *peer) (*pb.MemberAddResponse, error) {
		return p.cluster.MemberAdd(ctx, &pb.MemberAddRequest{})
	})
	differs(d, "remove a member", "chosen by the cluster", "member not found", who, func(ctx context.Context, p *peer) (*pb.MemberRemoveResponse, error) {
		return p.cluster.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: 4711})
	})
	differs(d, "update a member", "chosen by the cluster", "", who, func(ctx context.Context, p *peer) (*pb.MemberUpdateResponse, error) {
		return p.cluster.MemberUpdate(ctx, &pb.MemberUpdateRequest{ID: 4711})
	})
	differs(d, "promote a member", "chosen by the cluster", "member not found", who, func(ctx context.Context, p *peer) (*pb.MemberPromoteResponse, error) {
		return p.cluster.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: 4711})
	})
	d.end()
}

// TestLikeEtcdRandom sends random requests, half of them odd or wrong. SKEIN_DIFF_SEED
// repeats a run, SKEIN_DIFF_N makes it longer.
func TestLikeEtcdRandom(t *testing.T) {
	d := newDiffer(t)
	seed, n := uint64(time.Now().UnixNano()), 3000
	if s, err := strconv.ParseUint(os.Getenv("SKEIN_DIFF_SEED"), 10, 64); err == nil {
		seed = s
	}
	if s, err := strconv.Atoi(os.Getenv("SKEIN_DIFF_N")); err == nil {
		n = s
	}
	t.Logf("SKEIN_DIFF_SEED=%d SKEIN_DIFF_N=%d", seed, n)
	g := generator{rand.New(rand.NewPCG(seed, 0)), 1}
	for range 5 {
		same(d, "lease", func(ctx context.Context, p *peer) (*pb.LeaseGrantResponse, error) {
			return p.lease.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: 1 + int64(d.seen%3), TTL: 1000})
		})
	}
	for i := range n {
		if t.Failed() {
			return // what follows would differ too
		}
		switch k := g.IntN(100); {
		case k < 30:
			d.rng(fmt.Sprint(i), g.rangeRequest())
		case k < 55:
			d.put(fmt.Sprint(i), g.putRequest())
		case k < 65:
			d.del(fmt.Sprint(i), g.deleteRequest())
		case k < 98:
			q := g.txnRequest(3)
			d.txn(fmt.Sprint(i, " ", q.String()), q)
		default:
			d.compact(fmt.Sprint(i), &pb.CompactionRequest{Revision: g.revision(), Physical: true})
		}
		if g.IntN(10) == 0 {
			r, err := d.etcd.kv.Range(d.ctx, &pb.RangeRequest{Key: []byte("a"), CountOnly: true})
			if err != nil {
				t.Fatal(err)
			}
			g.rev = r.Header.Revision
		}
	}
	d.end()
}

type generator struct {
	*rand.Rand
	rev int64
}

func pick[T any](g generator, from ...T) T { return from[g.IntN(len(from))] }

func (g generator) key() []byte {
	return []byte(pick(g, "a", "b", "c", "d", "a/1", "a/2", "b/1", "\x00", "\xff", "", "zz"))
}
func (g generator) end() []byte {
	return []byte(pick(g, "", "", "", "b", "c", "e", "a0", "\x00", "\xff\xff", "a"))
}
func (g generator) revision() int64 {
	return pick(g, 0, 0, g.rev, g.rev-1, g.rev-2, g.rev-5, g.Int64N(g.rev+1), g.rev+1, g.rev+100, -1)
}
func (g generator) bound() int64 { return pick(g, 0, 0, 0, 0, g.rev, g.rev-3, g.Int64N(g.rev+1), -2) }

func (g generator) rangeRequest() *pb.RangeRequest {
	return &pb.RangeRequest{Key: g.key(), RangeEnd: g.end(), Limit: pick(g, int64(0), 0, 1, 2, -1), Revision: g.revision(),
		SortOrder: pb.RangeRequest_SortOrder(g.IntN(3)), SortTarget: pb.RangeRequest_SortTarget(pick(g, 0, 1, 2, 3, 4, 4, 0, 5)),
		Serializable: g.IntN(3) == 0, KeysOnly: g.IntN(4) == 0, CountOnly: g.IntN(5) == 0,
		MinModRevision: g.bound(), MaxModRevision: g.bound(), MinCreateRevision: g.bound(), MaxCreateRevision: g.bound()}
}

func (g generator) putRequest() *pb.PutRequest {
	q := &pb.PutRequest{Key: g.key(), Value: []byte(pick(g, "", "1", "2", "3")), PrevKv: g.IntN(2) == 0, Lease: pick(g, int64(0), 0, 0, 1, 2, 3, 99), IgnoreLease: g.IntN(6) == 0}
	if g.IntN(6) == 0 {
		q.IgnoreValue = true
		if g.IntN(4) > 0 {
			q.Value = nil
		}
	}
	if q.IgnoreLease && g.IntN(3) > 0 {
		q.Lease = 0
	}
	return q
}

func (g generator) deleteRequest() *pb.DeleteRangeRequest {
	return &pb.DeleteRangeRequest{Key: g.key(), RangeEnd: g.end(), PrevKv: g.IntN(2) == 0}
}

func (g generator) compare() *pb.Compare {
	c := &pb.Compare{Key: g.key(), RangeEnd: g.end(), Result: pb.Compare_CompareResult(pick(g, 0, 1, 2, 3, 0, 1, 2, 3, 7)), Target: pb.Compare_CompareTarget(pick(g, 0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 8))}
	kind := int(c.Target)
	if g.IntN(8) == 0 {
		kind = g.IntN(6)
	}
	switch kind {
	case 0:
		c.TargetUnion = &pb.Compare_Version{Version: int64(g.IntN(3))}
	case 1:
		c.TargetUnion = &pb.Compare_CreateRevision{CreateRevision: g.revision()}
	case 2:
		c.TargetUnion = &pb.Compare_ModRevision{ModRevision: g.revision()}
	case 3:
		c.TargetUnion = &pb.Compare_Value{Value: []byte(pick(g, "", "1", "2"))}
	case 4:
		c.TargetUnion = &pb.Compare_Lease{Lease: int64(g.IntN(4))}
	}
	return c
}

func (g generator) txnRequest(depth int) *pb.TxnRequest {
	q := &pb.TxnRequest{}
	for range g.IntN(3) {
		q.Compare = append(q.Compare, g.compare())
	}
	for _, branch := range []*[]*pb.RequestOp{&q.Success, &q.Failure} {
		for range g.IntN(4) {
			op := &pb.RequestOp{}
			switch k := g.IntN(20); {
			case k < 7:
				op.Request = &pb.RequestOp_RequestPut{RequestPut: g.putRequest()}
			case k < 13:
				op.Request = &pb.RequestOp_RequestRange{RequestRange: g.rangeRequest()}
			case k < 16:
				op.Request = &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: g.deleteRequest()}
			case k < 19 && depth > 0:
				op.Request = &pb.RequestOp_RequestTxn{RequestTxn: g.txnRequest(depth - 1)}
			}
			*branch = append(*branch, op)
		}
	}
	return q
}
