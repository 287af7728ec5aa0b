package host

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"skein.io/skein/consensus/mvcc"
)

// On a full disk things can still be deleted.
func TestGrows(t *testing.T) {
	put := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("k")}}}
	del := &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("k")}}}
	get := &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("k")}}}
	for name, c := range map[string]struct {
		q    *pb.InternalRaftRequest
		want bool
	}{
		"put":         {&pb.InternalRaftRequest{Put: &pb.PutRequest{}}, true},
		"lease":       {&pb.InternalRaftRequest{LeaseGrant: &pb.LeaseGrantRequest{}}, true},
		"delete":      {&pb.InternalRaftRequest{DeleteRange: &pb.DeleteRangeRequest{}}, false},
		"compaction":  {&pb.InternalRaftRequest{Compaction: &pb.CompactionRequest{}}, false},
		"revoke":      {&pb.InternalRaftRequest{LeaseRevoke: &pb.LeaseRevokeRequest{}}, false},
		"txn delete":  {&pb.InternalRaftRequest{Txn: &pb.TxnRequest{Success: []*pb.RequestOp{del}, Failure: []*pb.RequestOp{get}}}, false},
		"txn put":     {&pb.InternalRaftRequest{Txn: &pb.TxnRequest{Success: []*pb.RequestOp{del, put}}}, true},
		"txn or else": {&pb.InternalRaftRequest{Txn: &pb.TxnRequest{Failure: []*pb.RequestOp{put}}}, true},
	} {
		if got := mvcc.Grows(c.q); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
