package etcdapi

import (
	"context"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/consensus/shard"
)

// everywhere are keys of clients about the store itself, which every endpoint
// therefore keeps for itself: the record of k8s.io/apiserver's compaction, and
// the keys that it and etcdctl read to see whether an endpoint works.
var everywhere = map[string]bool{"compact_rev_key": true, "/registry/health": true, "health": true}

// keyGuard refuses what is another shard's: a key written there would be lost to
// everybody who reads it where it belongs, and a read would find nothing. A range
// over the keys of several shards covers those of this one.
type keyGuard struct {
	table shard.Table
	here  shard.Shard
}

func (g *keyGuard) check(key, end []byte) error {
	s, err := g.table.ForRange(string(key), string(end))
	if err != nil || s.ID == g.here.ID || len(key) == 0 { // spans shards; ours; left to the other checks
		return nil
	}
	if len(end) == 0 && (everywhere[string(key)] || slices.Contains(g.here.Prefixes, string(key)+"/")) {
		return nil // also the name of a directory, which k8s.io/apiserver reads to learn the revision
	}
	what := "key"
	if len(end) > 0 {
		what = "range from"
	}
	return status.Errorf(codes.InvalidArgument, "skein: this is the endpoint of shard %s, %s %q is kept by shard %s: use the endpoint of that one", g.here.Name, what, key, s.Name)
}

func (g *keyGuard) checkTxn(q *pb.TxnRequest) error {
	for _, c := range q.Compare {
		if err := g.check(c.Key, c.RangeEnd); err != nil {
			return err
		}
	}
	for _, branch := range [][]*pb.RequestOp{q.Success, q.Failure} {
		for _, op := range branch {
			var err error
			switch v := op.Request.(type) {
			case *pb.RequestOp_RequestRange:
				err = g.check(v.RequestRange.Key, v.RequestRange.RangeEnd)
			case *pb.RequestOp_RequestPut:
				err = g.check(v.RequestPut.Key, nil)
			case *pb.RequestOp_RequestDeleteRange:
				err = g.check(v.RequestDeleteRange.Key, v.RequestDeleteRange.RangeEnd)
			case *pb.RequestOp_RequestTxn:
				err = g.checkTxn(v.RequestTxn)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// guardedKV is the KV service for clients of the network.
type guardedKV struct {
	pb.KVServer
	keys *keyGuard
}

func (s guardedKV) Range(ctx context.Context, q *pb.RangeRequest) (*pb.RangeResponse, error) {
	if err := s.keys.check(q.Key, q.RangeEnd); err != nil {
		return nil, err
	}
	return s.KVServer.Range(ctx, q)
}

func (s guardedKV) Put(ctx context.Context, q *pb.PutRequest) (*pb.PutResponse, error) {
	if err := s.keys.check(q.Key, nil); err != nil {
		return nil, err
	}
	return s.KVServer.Put(ctx, q)
}

func (s guardedKV) DeleteRange(ctx context.Context, q *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	if err := s.keys.check(q.Key, q.RangeEnd); err != nil {
		return nil, err
	}
	return s.KVServer.DeleteRange(ctx, q)
}

func (s guardedKV) Txn(ctx context.Context, q *pb.TxnRequest) (*pb.TxnResponse, error) {
	if err := mvcc.CheckTxnOps(q, maxTxnOps); err != nil {
		return nil, err
	}
	if err := s.keys.checkTxn(q); err != nil {
		return nil, err
	}
	return s.KVServer.Txn(ctx, q)
}
