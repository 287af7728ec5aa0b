package etcdapi

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// membersRefusal: who holds a replica follows from the nodes that there are, and
// a change behind the back of the policy would be undone by it.
var membersRefusal = status.Error(codes.FailedPrecondition,
	"skein: the cluster's leader chooses the members of a shard itself: let a node join ('skein join'), leave ('skein leave'), or set its label skein.io/voter to prefer or never")

type clusterServer struct {
	pb.UnimplementedClusterServer
	r Replica
}

// NewCluster returns the Cluster service of a replica: it lists the members.
// They are changed by package members alone.
func NewCluster(r Replica) pb.ClusterServer { return &clusterServer{r: r} }

// MemberList of a request that is not linearizable is what this replica knows.
func (s *clusterServer) MemberList(ctx context.Context, q *pb.MemberListRequest) (*pb.MemberListResponse, error) {
	members, err := s.r.Members(ctx, q.Linearizable)
	if err != nil {
		return nil, Error(err)
	}
	return &pb.MemberListResponse{Header: header(s.r, 0), Members: members}, nil
}

func (s *clusterServer) MemberAdd(context.Context, *pb.MemberAddRequest) (*pb.MemberAddResponse, error) {
	return nil, membersRefusal
}

func (s *clusterServer) MemberRemove(context.Context, *pb.MemberRemoveRequest) (*pb.MemberRemoveResponse, error) {
	return nil, membersRefusal
}

func (s *clusterServer) MemberUpdate(context.Context, *pb.MemberUpdateRequest) (*pb.MemberUpdateResponse, error) {
	return nil, membersRefusal
}

func (s *clusterServer) MemberPromote(context.Context, *pb.MemberPromoteRequest) (*pb.MemberPromoteResponse, error) {
	return nil, membersRefusal
}
