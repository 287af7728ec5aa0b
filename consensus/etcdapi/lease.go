package etcdapi

import (
	"context"
	"errors"
	"io"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/lease"
)

type leaseServer struct{ r Replica }

// NewLease returns the Lease service of a replica.
func NewLease(r Replica) pb.LeaseServer { return leaseServer{r} }

// minTTL is the shortest lease in seconds: one that an election cannot outlast,
// as etcd computes it (1.5 elections, at least 2 s).
func (s leaseServer) minTTL() int64 {
	return max(2, int64((s.r.ElectionTimeout()*3/2).Seconds()+0.999))
}

func (s leaseServer) LeaseGrant(ctx context.Context, q *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error) {
	grant := &pb.LeaseGrantRequest{ID: q.ID, TTL: max(q.TTL, s.minTTL())}
	for grant.ID == int64(lease.NoLease) {
		grant.ID = int64(s.r.NextID() & (1<<63 - 1))
	}
	res, err := s.r.Propose(ctx, &pb.InternalRaftRequest{LeaseGrant: grant})
	if err != nil {
		return nil, Error(err)
	}
	resp := res.Resp.(*pb.LeaseGrantResponse)
	fill(s.r, resp.Header)
	return resp, nil
}

func (s leaseServer) LeaseRevoke(ctx context.Context, q *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	res, err := s.r.Propose(ctx, &pb.InternalRaftRequest{LeaseRevoke: q})
	if err != nil {
		return nil, Error(err)
	}
	resp := res.Resp.(*pb.LeaseRevokeResponse)
	fill(s.r, resp.Header)
	return resp, nil
}

// LeaseKeepAlive answers every request with the renewed time to live, 0 when the
// lease is gone.
func (s leaseServer) LeaseKeepAlive(stream pb.Lease_LeaseKeepAliveServer) error {
	ended := make(chan error, 1)
	// Not waited for: Recv may block until this method has returned.
	go func() { ended <- s.keepAlive(stream) }()
	select {
	case err := <-ended:
		return err
	case <-s.r.Done():
		return rpctypes.ErrGRPCNoLeader
	case <-stream.Context().Done():
		return stream.Context().Err()
	}
}

func (s leaseServer) keepAlive(stream pb.Lease_LeaseKeepAliveServer) error {
	for {
		q, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		// The header is taken before: the client may rely on what it saw by then.
		resp := &pb.LeaseKeepAliveResponse{ID: q.ID, Header: header(s.r, s.r.Machine().Rev())}
		ttl, err := s.r.RenewLease(stream.Context(), q.ID)
		if err != nil && !errors.Is(err, lease.ErrLeaseNotFound) {
			return Error(err)
		}
		if err == nil {
			resp.TTL = ttl
		}
		if err := stream.Send(resp); err != nil {
			return err
		}
	}
}

func (s leaseServer) LeaseTimeToLive(ctx context.Context, q *pb.LeaseTimeToLiveRequest) (*pb.LeaseTimeToLiveResponse, error) {
	resp, err := s.r.LeaseTTL(ctx, q.ID, q.Keys)
	if err != nil {
		return nil, Error(err)
	}
	resp.Header = header(s.r, s.r.Machine().Rev())
	return resp, nil
}

func (s leaseServer) LeaseLeases(ctx context.Context, _ *pb.LeaseLeasesRequest) (*pb.LeaseLeasesResponse, error) {
	if err := s.r.ReadIndex(ctx); err != nil {
		return nil, Error(err)
	}
	resp := &pb.LeaseLeasesResponse{Header: header(s.r, s.r.Machine().Rev())}
	for _, l := range s.r.Machine().Leases() {
		resp.Leases = append(resp.Leases, &pb.LeaseStatus{ID: int64(l.ID)})
	}
	return resp, nil
}
