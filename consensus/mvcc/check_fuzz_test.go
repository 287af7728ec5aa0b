package mvcc

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// FuzzCheckRequest: whatever a client or the log holds, the checks answer.
func FuzzCheckRequest(f *testing.F) {
	put := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("a")}}}
	del := &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("a"), RangeEnd: []byte{0}}}}
	inner := &pb.TxnRequest{Success: []*pb.RequestOp{put}, Failure: []*pb.RequestOp{put, del}}
	for _, r := range []*pb.InternalRaftRequest{
		{Put: &pb.PutRequest{}}, {DeleteRange: &pb.DeleteRangeRequest{Key: []byte("x")}}, {Alarm: &pb.AlarmRequest{Alarm: 9}}, {LeaseCheckpoint: &pb.LeaseCheckpointRequest{}},
		{Txn: inner}, {Txn: &pb.TxnRequest{Compare: []*pb.Compare{{}}, Success: []*pb.RequestOp{{}, {Request: &pb.RequestOp_RequestTxn{RequestTxn: inner}}, del}}},
		{Txn: &pb.TxnRequest{Success: []*pb.RequestOp{put, {Request: &pb.RequestOp_RequestTxn{}}}}},
	} {
		b, err := r.Marshal()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var r pb.InternalRaftRequest
		if r.Unmarshal(b) != nil {
			return
		}
		first := checkRequest(&r)
		if second := checkRequest(&r); (first == nil) != (second == nil) {
			t.Fatalf("%v, then %v", first, second)
		}
		if r.Txn != nil && CheckTxnOps(r.Txn, 0) == nil && len(r.Txn.Success)+len(r.Txn.Failure)+len(r.Txn.Compare) > 0 {
			t.Fatal("operations without a budget")
		}
	})
}
