package etcdapi_test

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/metadata"
)

func TestLikeEtcdKV(t *testing.T) {
	d := newDiffer(t)
	d.rng("nothing there", &pb.RangeRequest{Key: []byte("a")})
	for i, k := range []string{"a", "b", "a", "dir/1", "dir/2", "dir/3", "c\x00d", "\x00", "\xff\xff"} {
		d.put("put "+k, &pb.PutRequest{Key: []byte(k), Value: fmt.Append(nil, "v", i), PrevKv: i%2 == 0})
	}
	d.put("no key", &pb.PutRequest{Value: []byte("x")})
	d.put("no value", &pb.PutRequest{Key: []byte("empty")})
	d.put("keep the value", &pb.PutRequest{Key: []byte("a"), IgnoreValue: true, PrevKv: true})
	d.put("keep a value that is given", &pb.PutRequest{Key: []byte("a"), Value: []byte("x"), IgnoreValue: true})
	d.put("keep the value of nothing", &pb.PutRequest{Key: []byte("none"), IgnoreValue: true})
	d.put("keep the lease", &pb.PutRequest{Key: []byte("a"), Value: []byte("x"), IgnoreLease: true})
	d.put("keep a lease that is given", &pb.PutRequest{Key: []byte("a"), Value: []byte("x"), IgnoreLease: true, Lease: 5})
	d.put("keep the lease of nothing", &pb.PutRequest{Key: []byte("none"), Value: []byte("x"), IgnoreLease: true})
	d.put("unknown lease", &pb.PutRequest{Key: []byte("a"), Value: []byte("x"), Lease: 77})
	d.put("negative lease", &pb.PutRequest{Key: []byte("a"), Value: []byte("x"), Lease: -1})
	d.put("a megabyte", &pb.PutRequest{Key: []byte("big"), Value: bytes.Repeat([]byte("x"), 1<<20)})
	d.put("as large as can be", &pb.PutRequest{Key: []byte("big"), Value: bytes.Repeat([]byte("x"), 1536<<10-40)})
	d.put("more than 1.5 MiB", &pb.PutRequest{Key: []byte("big"), Value: bytes.Repeat([]byte("x"), 1536<<10)})
	d.put("more than the transport takes", &pb.PutRequest{Key: []byte("big"), Value: bytes.Repeat([]byte("x"), 3<<20)})
	d.put("a long key", &pb.PutRequest{Key: bytes.Repeat([]byte("k"), 100<<10), Value: []byte("x")})
	d.del("the big one", &pb.DeleteRangeRequest{Key: []byte("big")})

	for _, end := range []string{"", "\x00", "c", "dir0", "a", "A", "\xff"} {
		for _, key := range []string{"a", "dir/", "\x00", "c", "zz", ""} {
			for i, q := range []*pb.RangeRequest{{}, {Limit: 1}, {Limit: 2, SortOrder: pb.RangeRequest_DESCEND}, {Limit: -1}, {CountOnly: true}, {KeysOnly: true}, {CountOnly: true, Limit: 1},
				{Serializable: true}, {Revision: 4}, {Revision: 3, CountOnly: true}, {Revision: -1}, {Revision: 1000}, {Revision: math.MaxInt64}, {Revision: 1},
				{SortTarget: pb.RangeRequest_MOD, SortOrder: pb.RangeRequest_DESCEND}, {SortTarget: pb.RangeRequest_CREATE, SortOrder: pb.RangeRequest_ASCEND},
				{SortTarget: pb.RangeRequest_VERSION, SortOrder: pb.RangeRequest_DESCEND, Limit: 2}, {SortTarget: pb.RangeRequest_VALUE}, {SortTarget: pb.RangeRequest_VALUE, SortOrder: pb.RangeRequest_ASCEND, KeysOnly: true},
				{SortTarget: 9}, {SortOrder: 9}, {SortOrder: -1}, {MinModRevision: 4}, {MaxModRevision: 4}, {MinCreateRevision: 5, MaxCreateRevision: 7}, {MinModRevision: 9, MaxModRevision: 2},
				{MinModRevision: 4, Limit: 1, CountOnly: true}, {MaxModRevision: -1},
			} {
				q.Key, q.RangeEnd = []byte(key), []byte(end)
				d.rng(fmt.Sprintf("range %q %q %d", key, end, i), q)
			}
		}
	}

	d.del("nothing", &pb.DeleteRangeRequest{Key: []byte("none"), PrevKv: true})
	d.del("no key", &pb.DeleteRangeRequest{})
	d.del("no key but an end", &pb.DeleteRangeRequest{RangeEnd: []byte("x")})
	d.del("with what was there", &pb.DeleteRangeRequest{Key: []byte("dir/"), RangeEnd: []byte("dir/3"), PrevKv: true})
	d.del("a backward range", &pb.DeleteRangeRequest{Key: []byte("z"), RangeEnd: []byte("a")})
	d.del("one, without saying what", &pb.DeleteRangeRequest{Key: []byte("b")})
	d.rng("a deleted one as it was", &pb.RangeRequest{Key: []byte("b"), Revision: 3})
	d.compact("far ahead", &pb.CompactionRequest{Revision: 1 << 40})
	d.compact("negative", &pb.CompactionRequest{Revision: -3})
	d.compact("zero", &pb.CompactionRequest{})
	d.compact("some", &pb.CompactionRequest{Revision: 5, Physical: true})
	d.compact("the same", &pb.CompactionRequest{Revision: 5})
	d.compact("older", &pb.CompactionRequest{Revision: 2, Physical: true})
	d.rng("compacted", &pb.RangeRequest{Key: []byte("a"), Revision: 4})
	d.rng("at the compaction", &pb.RangeRequest{Key: []byte("a"), Revision: 5})
	d.txn("read what is compacted", &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("a"), Revision: 2}}}}})
	d.txn("write, and read what is compacted", &pb.TxnRequest{Success: []*pb.RequestOp{opPut("half", "x"), {Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("a"), Revision: 2}}}}})
	d.txn("write, and read the future", &pb.TxnRequest{Success: []*pb.RequestOp{opPut("half", "x"), {Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("a"), Revision: 1 << 40}}}}})
	d.rng("no half transaction", &pb.RangeRequest{Key: []byte("half")})

	for _, md := range []metadata.MD{metadata.Pairs("hasleader", "true"), metadata.Pairs("client-api-version", "3.6"), metadata.Pairs("client-api-version", "\xff"), metadata.Pairs("token", "nonsense")} {
		same(d, fmt.Sprint("metadata ", md), func(ctx context.Context, p *peer) (*pb.RangeResponse, error) {
			return p.kv.Range(metadata.NewOutgoingContext(ctx, md), &pb.RangeRequest{Key: []byte("a")})
		})
	}
	d.end()
}

func TestLikeEtcdTxn(t *testing.T) {
	d := newDiffer(t)
	d.put("a", &pb.PutRequest{Key: []byte("a"), Value: []byte("1")})
	d.put("b", &pb.PutRequest{Key: []byte("b"), Value: []byte("2")})
	d.txn("empty", &pb.TxnRequest{})
	both := func(name string, c ...*pb.Compare) {
		t.Helper()
		d.txn(name, &pb.TxnRequest{Compare: c, Success: []*pb.RequestOp{opPut("won", name), opRange("a", "c")}, Failure: []*pb.RequestOp{opPut("lost", name), opDelete("won", "")}})
	}
	both("value", valueIs("a", "1"))
	both("wrong value", valueIs("a", "2"))
	both("two", valueIs("a", "1"), valueIs("b", "2"))
	for _, r := range []pb.Compare_CompareResult{pb.Compare_EQUAL, pb.Compare_GREATER, pb.Compare_LESS, pb.Compare_NOT_EQUAL, 9} {
		for i, c := range []*pb.Compare{
			{Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Version{Version: 1}}, {Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{CreateRevision: 2}},
			{Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: 2}}, {Target: pb.Compare_LEASE, TargetUnion: &pb.Compare_Lease{Lease: 0}},
			{Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte("1")}}, {Target: pb.Compare_VALUE}, {Target: pb.Compare_VERSION}, {Target: pb.Compare_MOD},
			{Target: pb.Compare_VERSION, TargetUnion: &pb.Compare_Value{Value: []byte("1")}}, {Target: 9, TargetUnion: &pb.Compare_Version{Version: 1}},
		} {
			for _, k := range []string{"a", "none"} {
				for _, end := range []string{"", "z", "\x00"} {
					x := *c
					x.Result, x.Key, x.RangeEnd = r, []byte(k), []byte(end)
					both(fmt.Sprintf("compare %v %d %s %q", r, i, k, end), &x)
				}
			}
		}
	}
	both("no key", &pb.Compare{})
	for name, ops := range map[string][]*pb.RequestOp{
		"a put twice": {opPut("x", "1"), opPut("x", "2")}, "put and delete": {opPut("x", "1"), opDelete("x", "")}, "delete and put": {opDelete("w", "y"), opPut("x", "1")},
		"delete all and put": {opDelete("a", "\x00"), opPut("x", "1")}, "delete before and put": {opDelete("a", "w"), opPut("x", "1")}, "delete twice": {opDelete("x", ""), opDelete("a", "z")},
		"put and read": {opPut("x", "1"), opRange("x", ""), opRange("a", "z")}, "empty operation": {{}}, "put without key": {opPut("", "1")}, "range without key": {opRange("", "x")}, "delete without key": {opDelete("", "")},
		"put with a lease that is not": {{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("x"), Lease: 99}}}},
		"keep the value of nothing":    {{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("nn"), IgnoreValue: true}}}},
		"keep the lease of nothing":    {opPut("q", "1"), {Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("nn"), IgnoreLease: true}}}},
		"bad sort":                     {{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("x"), SortTarget: 9}}}},
		"128 puts":                     repeat(128, func(i int) *pb.RequestOp { return opPut(fmt.Sprint("n", i), "1") }),
		"129 puts":                     repeat(129, func(i int) *pb.RequestOp { return opPut(fmt.Sprint("n", i), "1") }),
		"129 ranges":                   repeat(129, func(i int) *pb.RequestOp { return opRange(fmt.Sprint("n", i), "") }),
		"nested": {opTxn(&pb.TxnRequest{Compare: []*pb.Compare{valueIs("a", "1")}, Success: []*pb.RequestOp{opPut("in", "1"), opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opRange("in", ""), opDelete("b", "")}})},
			Failure: []*pb.RequestOp{opPut("in", "2")}}), opRange("a", "z")},
		"nested, a put in both branches":    {opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("p", "1")}, Failure: []*pb.RequestOp{opPut("p", "2")}})},
		"nested, a put outside too":         {opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("p", "1")}}), opPut("p", "2")},
		"nested, a put in two":              {opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("p", "1")}}), opTxn(&pb.TxnRequest{Failure: []*pb.RequestOp{opPut("p", "1")}})},
		"nested, a delete outside too":      {opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opPut("p", "1")}}), opDelete("a", "z")},
		"nested, a delete inside, put here": {opTxn(&pb.TxnRequest{Failure: []*pb.RequestOp{opDelete("a", "z")}}), opPut("p", "2")},
		"nested, 100 in 100":                append(repeat(99, func(i int) *pb.RequestOp { return opRange(fmt.Sprint("n", i), "") }), opTxn(&pb.TxnRequest{Success: repeat(100, func(i int) *pb.RequestOp { return opRange("x", "") })})),
		"nested, 20 in 100":                 append(repeat(99, func(i int) *pb.RequestOp { return opRange(fmt.Sprint("n", i), "") }), opTxn(&pb.TxnRequest{Success: repeat(20, func(i int) *pb.RequestOp { return opRange("x", "") })})),
		"nested, nothing":                   {opTxn(&pb.TxnRequest{})},
	} {
		d.txn(name, &pb.TxnRequest{Success: ops})
		d.txn(name+", not taken", &pb.TxnRequest{Compare: []*pb.Compare{valueIs("a", "no")}, Success: ops})
		d.txn(name+", otherwise", &pb.TxnRequest{Compare: []*pb.Compare{valueIs("a", "no")}, Failure: ops})
	}
	deep := &pb.TxnRequest{Success: []*pb.RequestOp{opPut("deep", "1")}}
	for range 126 {
		deep = &pb.TxnRequest{Success: []*pb.RequestOp{opTxn(deep)}}
	}
	d.txn("127 deep", deep)
	d.txn("129 deep", &pb.TxnRequest{Success: []*pb.RequestOp{opTxn(&pb.TxnRequest{Success: []*pb.RequestOp{opTxn(deep)}})}})
	d.end()
}
