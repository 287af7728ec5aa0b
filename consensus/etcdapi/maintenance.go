package etcdapi

import (
	"bytes"
	"context"
	"crypto/sha256"
	"hash"
	"io"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/api/v3/version"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"skein.io/skein/consensus/mvcc"
)

// storageVersion is etcd's schema version of the database.
const storageVersion = "3.6.0"

// snapshotBlob is the size of a part of a snapshot stream; etcd's.
const snapshotBlob = 32 << 10

type maintenanceServer struct {
	pb.UnimplementedMaintenanceServer
	r Replica
}

// downgradeRefusal: etcd's protocol prepares its members for an older etcd.
var downgradeRefusal = status.Error(codes.FailedPrecondition,
	"skein: there is nothing to prepare for a downgrade: a cluster acts at the level of its oldest node, so start the older skein on one node after the other")

// NewMaintenance returns the Maintenance service of a replica.
func NewMaintenance(r Replica) pb.MaintenanceServer { return &maintenanceServer{r: r} }

func (s *maintenanceServer) Status(ctx context.Context, _ *pb.StatusRequest) (*pb.StatusResponse, error) {
	m := s.r.Machine()
	leader, term := s.r.Leader()
	total, used := m.Size()
	resp := &pb.StatusResponse{
		Header: header(s.r, m.Rev()), Version: version.Version, StorageVersion: storageVersion,
		Leader: leader, RaftTerm: term, RaftIndex: m.Applied(), RaftAppliedIndex: m.Applied(),
		DbSize: total, DbSizeInUse: used, DowngradeInfo: &pb.DowngradeInfo{}, DbSizeQuota: max(0, s.r.Quota()),
	}
	for _, a := range m.Alarms(pb.AlarmType_NONE) {
		resp.Errors = append(resp.Errors, a.String())
	}
	if leader == 0 {
		resp.Errors = append(resp.Errors, rpctypes.ErrNoLeader.Error())
		return resp, nil
	}
	members, err := s.r.Members(ctx, false)
	if err != nil {
		resp.Errors = append(resp.Errors, err.Error())
	}
	for _, x := range members {
		if x.ID == s.r.ID() {
			resp.IsLearner = x.IsLearner
		}
	}
	return resp, nil
}

func (s *maintenanceServer) Alarm(ctx context.Context, q *pb.AlarmRequest) (*pb.AlarmResponse, error) {
	if err := mvcc.CheckAlarm(q); err != nil {
		return nil, Error(err)
	}
	if q.Action == pb.AlarmRequest_GET { // not through the log, as in etcd: a read
		if err := s.r.ReadIndex(ctx); err != nil {
			return nil, Error(err)
		}
		m := s.r.Machine()
		return &pb.AlarmResponse{Header: header(s.r, m.Rev()), Alarms: m.Alarms(q.Alarm)}, nil
	}
	res, err := s.r.Propose(ctx, &pb.InternalRaftRequest{Alarm: q})
	if err != nil {
		return nil, Error(err)
	}
	resp := res.Resp.(*pb.AlarmResponse)
	fill(s.r, resp.Header)
	return resp, nil
}

func (s *maintenanceServer) Defragment(ctx context.Context, _ *pb.DefragmentRequest) (*pb.DefragmentResponse, error) {
	if _, err := s.r.Machine().Defragment(ctx); err != nil {
		return nil, Error(err)
	}
	return &pb.DefragmentResponse{}, nil
}

func (s *maintenanceServer) Hash(context.Context, *pb.HashRequest) (*pb.HashResponse, error) {
	h, rev, err := s.r.Machine().Hash()
	if err != nil {
		return nil, Error(err)
	}
	return &pb.HashResponse{Header: header(s.r, rev), Hash: h}, nil
}

func (s *maintenanceServer) HashKV(_ context.Context, q *pb.HashKVRequest) (*pb.HashKVResponse, error) {
	h, rev, err := s.r.Machine().HashKV(q.Revision)
	if err != nil {
		return nil, Error(err)
	}
	return &pb.HashKVResponse{Header: header(s.r, rev), Hash: h.Hash, CompactRevision: h.CompactRevision, HashRevision: h.Revision}, nil
}

func (s *maintenanceServer) MoveLeader(ctx context.Context, q *pb.MoveLeaderRequest) (*pb.MoveLeaderResponse, error) {
	if leader, _ := s.r.Leader(); leader != s.r.ID() {
		return nil, rpctypes.ErrGRPCNotLeader
	}
	members, err := s.r.Members(ctx, true)
	if err != nil {
		return nil, Error(err)
	}
	if !slices.ContainsFunc(members, func(m *pb.Member) bool { return m.ID == q.TargetID && !m.IsLearner }) {
		return nil, rpctypes.ErrGRPCBadLeaderTransferee
	}
	if q.TargetID != s.r.ID() {
		if err := s.r.TransferLeader(ctx, q.TargetID); err != nil {
			return nil, Error(err)
		}
	}
	return &pb.MoveLeaderResponse{}, nil
}

func (s *maintenanceServer) Downgrade(context.Context, *pb.DowngradeRequest) (*pb.DowngradeResponse, error) {
	return nil, downgradeRefusal
}

// Snapshot streams the database and then its SHA-256, as etcd does.
func (s *maintenanceServer) Snapshot(_ *pb.SnapshotRequest, stream pb.Maintenance_SnapshotServer) error {
	w := &snapshotWriter{stream: stream, sum: sha256.New()}
	if err := s.r.Machine().Dump(w, func(n int64) { w.left = n }); err != nil {
		return Error(err)
	}
	if w.left != 0 {
		return Error(io.ErrUnexpectedEOF)
	}
	return stream.Send(&pb.SnapshotResponse{Blob: w.sum.Sum(nil), Version: storageVersion})
}

type snapshotWriter struct {
	stream pb.Maintenance_SnapshotServer
	sum    hash.Hash
	left   int64
}

func (w *snapshotWriter) Write(p []byte) (int, error) {
	for n := 0; n < len(p); {
		blob := bytes.Clone(p[n:min(len(p), n+snapshotBlob)]) // Send may keep it
		n += len(blob)
		w.left -= int64(len(blob))
		w.sum.Write(blob)
		if err := w.stream.Send(&pb.SnapshotResponse{RemainingBytes: uint64(w.left), Blob: blob, Version: storageVersion}); err != nil {
			return n, err
		}
	}
	return len(p), nil
}
