// Package etcdapi serves etcd's v3 API from a replica: KV, Watch, Lease,
// Maintenance and Cluster as plain protobuf servers, and an in-process client on
// top of them that k8s.io/apiserver's etcd3 store runs on unmodified.
//
// Semantics and errors are etcd's. Linearizable reads and all writes go through
// the shard's leader; serializable reads, watches and progress notifications are
// answered from the local replica. One stream of watches belongs to one shard,
// so its progress revision is that shard's. A watch with clientv3.WithRequireLeader
// ends when the replica has not heard a leader for three election timeouts, and
// every watch ends with ErrNoLeader when the replica stops: the client has to
// begin anew elsewhere.
//
// Package host makes the servers. The servers may be used by any number of
// goroutines.
package etcdapi

import (
	"context"
	"errors"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	etcderrors "go.etcd.io/etcd/server/v3/etcdserver/errors"
	"go.etcd.io/etcd/server/v3/lease"
	etcdmvcc "go.etcd.io/etcd/server/v3/storage/mvcc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/consensus/shard"
)

// Replica is what the services need of a replica; package host implements it.
// Errors are those of Error, or gRPC's.
type Replica interface {
	Shard() shard.Shard
	ID() uint64
	Machine() *mvcc.Machine
	// Propose replicates a request and returns its result once it is applied here.
	Propose(context.Context, *pb.InternalRaftRequest) (mvcc.Result, error)
	// ReadIndex returns when the local state is linearizable as of the call.
	ReadIndex(context.Context) error
	// Leader as known here: replica ID (0: none) and Raft term.
	Leader() (replica, term uint64)
	// SinceContact is how long no leader has been heard.
	SinceContact() time.Duration
	ElectionTimeout() time.Duration
	// RenewLease and LeaseTTL are answered by the primary lessor, wherever it is.
	RenewLease(ctx context.Context, id int64) (ttl int64, err error)
	LeaseTTL(ctx context.Context, id int64, keys bool) (*pb.LeaseTimeToLiveResponse, error)
	// Members lists the members: as of now, or as this replica last read them.
	Members(ctx context.Context, linearizable bool) ([]*pb.Member, error)
	TransferLeader(ctx context.Context, to uint64) error
	// Quota bounds what the shard may have in use, in bytes; not positive for none.
	Quota() int64
	// NextID returns a number that no other call in the cluster returns.
	NextID() uint64
	// Done is closed when the replica stops.
	Done() <-chan struct{}
}

// cutOff is how many election timeouts without a leader end a watch that
// requires one; etcd's number.
const cutOff = 3

// clusterID plus the shard's ID is the cluster ID in response headers.
const clusterID = 0x5ce10000

func header(r Replica, rev int64) *pb.ResponseHeader {
	_, term := r.Leader()
	return &pb.ResponseHeader{ClusterId: clusterID + uint64(r.Shard().ID), MemberId: r.ID(), RaftTerm: term, Revision: rev}
}

func fill(r Replica, h *pb.ResponseHeader) {
	*h = *header(r, h.Revision)
	if h.Revision == 0 {
		h.Revision = r.Machine().Rev()
	}
}

var grpcErrors = map[error]error{
	etcdmvcc.ErrCompacted:         rpctypes.ErrGRPCCompacted,
	etcdmvcc.ErrFutureRev:         rpctypes.ErrGRPCFutureRev,
	etcderrors.ErrKeyNotFound:     rpctypes.ErrGRPCKeyNotFound,
	etcderrors.ErrNoSpace:         rpctypes.ErrGRPCNoSpace,
	etcderrors.ErrRequestTooLarge: rpctypes.ErrGRPCRequestTooLarge,
	lease.ErrLeaseNotFound:        rpctypes.ErrGRPCLeaseNotFound,
	lease.ErrLeaseExists:          rpctypes.ErrGRPCLeaseExist,
	lease.ErrLeaseTTLTooLarge:     rpctypes.ErrGRPCLeaseTTLTooLarge,
	lease.ErrNotPrimary:           rpctypes.ErrGRPCLeaderChanged,
	mvcc.ErrClosed:                rpctypes.ErrGRPCStopped,
	mvcc.ErrLost:                  rpctypes.ErrGRPCTimeoutDueToConnectionLost,
	mvcc.ErrSuperseded:            rpctypes.ErrGRPCLeaderChanged,
}

// carried is an error that keeps its identity (errors.Is) in process and has a
// status on the wire.
type carried struct {
	error
	code codes.Code
}

func (c carried) Unwrap() error              { return c.error }
func (c carried) GRPCStatus() *status.Status { return status.New(c.code, c.error.Error()) }

// Error turns an error of the store into the one that etcd's API returns. Errors
// that are already of the API stay, context errors too; mvcc.ErrFenced and
// mvcc.ErrBadCommand keep their identity.
func Error(err error) error {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	switch {
	case errors.Is(err, mvcc.ErrFenced):
		return carried{err, codes.FailedPrecondition}
	case errors.Is(err, mvcc.ErrBadCommand):
		return carried{err, codes.InvalidArgument}
	}
	for known, g := range grpcErrors {
		if errors.Is(err, known) {
			return g
		}
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	return carried{err, codes.Unknown}
}
