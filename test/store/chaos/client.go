package chaos

import (
	"context"
	"fmt"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"

	"skein.io/skein/test/store/chaos/history"
)

// opTimeout is how long a client waits for an answer.
const opTimeout = 3 * time.Second

func shardIndex(shard string) int {
	for i, s := range shardNames {
		if s == shard {
			return i
		}
	}
	panic("no shard " + shard)
}

func (n *node) conn(shard string) *grpc.ClientConn { return n.conns[shardIndex(shard)] }

// linearize makes the node do a linearizable read.
func (n *node) linearize(ctx context.Context, shard string) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	_, err := pb.NewKVClient(n.conn(shard)).Range(ctx, &pb.RangeRequest{Key: []byte(prefixes[shard])})
	return err
}

// do sends a request and records what came of it.
func (n *node) do(ctx context.Context, op *history.Op) *history.Op {
	op.Node = n.name
	life := int(n.life.Load())
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	op.Call = n.w.hist.Now()
	err := n.send(ctx, pb.NewKVClient(n.conn(op.Shard)), op)
	op.Return = n.w.hist.Now()
	op.Life = life
	if now := int(n.life.Load()); now != life {
		op.Life = -int(op.Call) // which process answered is not known
	}
	if err != nil {
		op.Err = err.Error()
		op.Outcome = outcome(err)
		if op.Outcome == history.Unknown {
			op.Return = history.Never
		}
	} else {
		op.Outcome = history.Done
	}
	n.w.hist.AddOp(op)
	return op
}

// outcome of an error: what is not known to have been refused may have happened.
func outcome(err error) history.Outcome {
	is := func(e error) bool { return status.Convert(err).Message() == status.Convert(e).Message() }
	switch {
	case is(rpctypes.ErrGRPCCompacted):
		return history.Compacted
	case is(rpctypes.ErrGRPCLeaseNotFound), is(rpctypes.ErrGRPCNoSpace), is(rpctypes.ErrGRPCDuplicateKey), is(rpctypes.ErrGRPCFutureRev):
		return history.Refused
	}
	return history.Unknown
}

func (n *node) send(ctx context.Context, kv pb.KVClient, op *history.Op) error {
	if op.Form == history.Txn {
		q := &pb.TxnRequest{}
		for _, c := range op.If {
			q.Compare = append(q.Compare, compare(c))
		}
		for _, s := range op.Then {
			q.Success = append(q.Success, requestOp(s))
		}
		for _, s := range op.Else {
			q.Failure = append(q.Failure, requestOp(s))
		}
		r, err := kv.Txn(ctx, q)
		if err != nil {
			return err
		}
		op.Rev, op.Succeeded = r.Header.Revision, r.Succeeded
		for _, x := range r.Responses {
			op.Results = append(op.Results, result(x))
		}
		return nil
	}
	op.Succeeded = true
	switch s := op.Then[0]; s.Kind {
	case history.Put:
		r, err := kv.Put(ctx, putRequest(s))
		if err != nil {
			return err
		}
		op.Rev, op.Results = r.Header.Revision, []history.StepResult{putResult(r)}
	case history.Delete:
		r, err := kv.DeleteRange(ctx, deleteRequest(s))
		if err != nil {
			return err
		}
		op.Rev, op.Results = r.Header.Revision, []history.StepResult{deleteResult(r)}
	default:
		q := rangeRequest(s)
		q.Serializable = op.Serializable
		r, err := kv.Range(ctx, q)
		if err != nil {
			return err
		}
		op.Rev, op.Results = r.Header.Revision, []history.StepResult{{KVs: kvs(r.Kvs)}}
	}
	return nil
}

func ends(s string) []byte {
	if s == "" {
		return nil
	}
	return []byte(s)
}

func putRequest(s history.Step) *pb.PutRequest {
	return &pb.PutRequest{Key: []byte(s.Key), Value: []byte(s.Value), Lease: s.Lease, PrevKv: s.PrevKV}
}

func deleteRequest(s history.Step) *pb.DeleteRangeRequest {
	return &pb.DeleteRangeRequest{Key: []byte(s.Key), RangeEnd: ends(s.End), PrevKv: s.PrevKV}
}

func rangeRequest(s history.Step) *pb.RangeRequest {
	return &pb.RangeRequest{Key: []byte(s.Key), RangeEnd: ends(s.End), Revision: s.Rev}
}

func requestOp(s history.Step) *pb.RequestOp {
	switch s.Kind {
	case history.Put:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: putRequest(s)}}
	case history.Delete:
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: deleteRequest(s)}}
	}
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: rangeRequest(s)}}
}

func compare(c history.Cmp) *pb.Compare {
	out := &pb.Compare{Key: []byte(c.Key), Result: pb.Compare_EQUAL}
	switch c.Target {
	case history.ModRevision:
		out.Target, out.TargetUnion = pb.Compare_MOD, &pb.Compare_ModRevision{ModRevision: c.Number}
	case history.CreateRevision:
		out.Target, out.TargetUnion = pb.Compare_CREATE, &pb.Compare_CreateRevision{CreateRevision: c.Number}
	case history.Version:
		out.Target, out.TargetUnion = pb.Compare_VERSION, &pb.Compare_Version{Version: c.Number}
	default:
		out.Target, out.TargetUnion = pb.Compare_VALUE, &pb.Compare_Value{Value: []byte(c.Text)}
	}
	return out
}

func kv(k *mvccpb.KeyValue) history.KV {
	// Values are compared often and kept for long: the same string for the same value.
	return history.KV{Key: string(k.Key), Value: string(k.Value), Create: k.CreateRevision, Mod: k.ModRevision, Version: k.Version, Lease: k.Lease}
}

func kvs(in []*mvccpb.KeyValue) (out []history.KV) {
	for _, k := range in {
		out = append(out, kv(k))
	}
	return out
}

func putResult(r *pb.PutResponse) (out history.StepResult) {
	if r.PrevKv != nil {
		out.KVs = []history.KV{kv(r.PrevKv)}
	}
	return out
}

func deleteResult(r *pb.DeleteRangeResponse) history.StepResult {
	return history.StepResult{Deleted: r.Deleted, KVs: kvs(r.PrevKvs)}
}

func result(x *pb.ResponseOp) history.StepResult {
	switch v := x.Response.(type) {
	case *pb.ResponseOp_ResponsePut:
		return putResult(v.ResponsePut)
	case *pb.ResponseOp_ResponseDeleteRange:
		return deleteResult(v.ResponseDeleteRange)
	case *pb.ResponseOp_ResponseRange:
		return history.StepResult{KVs: kvs(v.ResponseRange.Kvs)}
	}
	return history.StepResult{}
}

func event(e *mvccpb.Event) history.Event {
	out := history.Event{Delete: e.Type == mvccpb.DELETE, KV: kv(e.Kv)}
	if e.PrevKv != nil {
		prev := kv(e.PrevKv)
		out.Prev = &prev
	}
	return out
}

// fenceTerms checks that the terms of the fence writers never go down.
func fenceTerms(h *history.History) (bad []history.Violation, writes int) {
	for _, w := range h.Watches {
		if !w.Whole {
			continue
		}
		var last int
		for _, m := range w.Messages {
			for _, e := range m.Events {
				if e.Delete || !strings.HasSuffix(e.KV.Key, "/fence/leader") {
					continue
				}
				var term int
				if _, err := fmt.Sscanf(e.KV.Value, "fence.%d.", &term); err != nil {
					continue
				}
				writes++
				if term < last {
					bad = append(bad, history.Violation{Class: history.Fence,
						Text: fmt.Sprintf("shard %s: %q at revision %d, after term %d", w.Shard, e.KV.Value, e.KV.Mod, last)})
				}
				last = term
			}
		}
	}
	return bad, writes
}
