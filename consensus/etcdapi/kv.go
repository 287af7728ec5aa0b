package etcdapi

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver/txn"

	"skein.io/skein/consensus/mvcc"
)

type kvServer struct{ r Replica }

type localReadsKey struct{}

// WithLocalReads makes reads under ctx serializable, whatever they ask for. It
// reaches a server in the same process only.
func WithLocalReads(ctx context.Context) context.Context {
	return context.WithValue(ctx, localReadsKey{}, true)
}

// readable confirms that the local state may be read: linearizably, or as it is.
func (s kvServer) readable(ctx context.Context, serializable bool) error {
	if !serializable && ctx.Value(localReadsKey{}) == nil {
		return s.r.ReadIndex(ctx)
	}
	select {
	case <-s.r.Done():
		return mvcc.ErrClosed
	default:
		return nil
	}
}

// NewKV returns the KV service of a replica.
func NewKV(r Replica) pb.KVServer { return kvServer{r} }

func (s kvServer) Range(ctx context.Context, q *pb.RangeRequest) (*pb.RangeResponse, error) {
	if err := mvcc.CheckRange(q); err != nil {
		return nil, err
	}
	if err := s.readable(ctx, q.Serializable); err != nil {
		return nil, Error(err)
	}
	resp, err := s.r.Machine().Range(ctx, q)
	if err != nil {
		return nil, Error(err)
	}
	fill(s.r, resp.Header)
	return resp, nil
}

func (s kvServer) Put(ctx context.Context, q *pb.PutRequest) (*pb.PutResponse, error) {
	if err := mvcc.CheckPut(q); err != nil {
		return nil, err
	}
	res, err := s.r.Propose(ctx, &pb.InternalRaftRequest{Put: q})
	if err != nil {
		return nil, Error(err)
	}
	resp := res.Resp.(*pb.PutResponse)
	fill(s.r, resp.Header)
	return resp, nil
}

func (s kvServer) DeleteRange(ctx context.Context, q *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	if err := mvcc.CheckDelete(q); err != nil {
		return nil, err
	}
	res, err := s.r.Propose(ctx, &pb.InternalRaftRequest{DeleteRange: q})
	if err != nil {
		return nil, Error(err)
	}
	resp := res.Resp.(*pb.DeleteRangeResponse)
	fill(s.r, resp.Header)
	return resp, nil
}

func (s kvServer) Txn(ctx context.Context, q *pb.TxnRequest) (*pb.TxnResponse, error) {
	if err := mvcc.CheckTxn(q); err != nil {
		return nil, err
	}
	var resp *pb.TxnResponse
	if txn.IsTxnReadonly(q) {
		err := s.readable(ctx, txn.IsTxnSerializable(q))
		if err != nil {
			return nil, Error(err)
		}
		if resp, err = s.r.Machine().ReadTxn(ctx, q); err != nil {
			return nil, Error(err)
		}
	} else {
		res, err := s.r.Propose(ctx, &pb.InternalRaftRequest{Txn: q})
		if err != nil {
			return nil, Error(err)
		}
		resp = res.Resp.(*pb.TxnResponse)
	}
	fill(s.r, resp.Header)
	return resp, nil
}

func (s kvServer) Compact(ctx context.Context, q *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	res, err := s.r.Propose(ctx, &pb.InternalRaftRequest{Compaction: q})
	if err != nil {
		return nil, Error(err)
	}
	if q.Physical && res.Compacted != nil {
		select {
		case <-res.Compacted:
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-s.r.Done():
			return nil, Error(mvcc.ErrClosed)
		}
		if err := s.r.Machine().Commit(); err != nil {
			return nil, Error(err)
		}
	}
	resp := res.Resp.(*pb.CompactionResponse)
	fill(s.r, resp.Header)
	return resp, nil
}
