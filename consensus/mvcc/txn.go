package mvcc

import (
	"context"
	"reflect"
	"unsafe"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/pkg/v3/traceutil"
	"go.etcd.io/etcd/server/v3/etcdserver/txn"
	"go.etcd.io/etcd/server/v3/lease"
	etcdmvcc "go.etcd.io/etcd/server/v3/storage/mvcc"
)

// The transactions of k8s.io/apiserver compare the revision of one key and then put or
// delete it. etcd's own code reads the key with its value for that, a tenth of what such a
// write costs, though its index in memory knows the revisions; and it takes the time of
// every step. So these are executed here, with the same outcome (TestTxnLikeEtcd). What
// does anything else goes to etcd's code.

// keyIndex is the part of etcd's index of keys that compares and pages need.
type keyIndex interface {
	// Get returns the revision of a key's last change up to atRev, that of its creation
	// and how often it was changed since; an error when it did not exist.
	Get(key []byte, atRev int64) (modified, created etcdmvcc.Revision, version int64, err error)
	// Revisions returns those of the keys that a range has at a revision, at most limit of them if that is not 0, and how many there are in all.
	Revisions(key, end []byte, atRev int64, limit int) ([]etcdmvcc.Revision, int)
	// CountRevisions returns how many keys a range has at a revision.
	CountRevisions(key, end []byte, atRev int64) int
}

// indexOf returns what finds the index of a store, which is not exported, and which the
// store replaces when it is restored; nil if it is not where it was in the version that
// this was written for. What it finds may be used while a transaction of the store is open.
func indexOf(kv etcdmvcc.KV) func() keyIndex {
	v := reflect.ValueOf(kv)
	for _, name := range []string{"store", "kvindex"} {
		if v = reflect.Indirect(v); v.Kind() != reflect.Struct {
			return nil
		}
		v = v.FieldByName(name)
	}
	if v.Kind() != reflect.Interface || !v.CanAddr() {
		return nil
	}
	field := reflect.NewAt(v.Type(), unsafe.Pointer(v.UnsafeAddr())).Elem()
	find := func() keyIndex { i, _ := field.Interface().(keyIndex); return i }
	if find() == nil {
		return nil
	}
	return find
}

// transact executes a transaction of the log.
func (m *Machine) transact(ctx context.Context, q *pb.TxnRequest) (*pb.TxnResponse, error) {
	ops, rev, succeeded, ok, err := m.compare(traceutil.Get(ctx), q)
	if !ok {
		resp, _, err := txn.Txn(ctx, m.zap, q, true, m.kv, m.lessor)
		return resp, err
	}
	if err != nil {
		return nil, err
	}
	resp := &pb.TxnResponse{Succeeded: succeeded, Header: &pb.ResponseHeader{Revision: rev}, Responses: make([]*pb.ResponseOp, len(ops))}
	if len(ops) == 0 {
		return resp, nil
	}
	w := m.kv.Write(traceutil.Get(ctx))
	defer w.End()
	for i, op := range ops {
		switch v := op.Request.(type) {
		case *pb.RequestOp_RequestPut:
			p := v.RequestPut
			put := &pb.PutResponse{Header: &pb.ResponseHeader{Revision: w.Put(p.Key, p.Value, lease.LeaseID(p.Lease))}}
			resp.Responses[i] = &pb.ResponseOp{Response: &pb.ResponseOp_ResponsePut{ResponsePut: put}}
		case *pb.RequestOp_RequestDeleteRange:
			n, rev := w.DeleteRange(v.RequestDeleteRange.Key, nil)
			del := &pb.DeleteRangeResponse{Header: &pb.ResponseHeader{Revision: rev}, Deleted: n}
			resp.Responses[i] = &pb.ResponseOp{Response: &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: del}}
		}
	}
	if len(w.Changes()) > 0 {
		resp.Header.Revision = w.Rev() + 1
	}
	return resp, nil
}

// compare evaluates a transaction's compares, and returns the operations to execute then
// and the revision before them. It is not ok when it cannot do what the transaction asks
// for; nothing has happened then.
func (m *Machine) compare(trace *traceutil.Trace, q *pb.TxnRequest) (ops []*pb.RequestOp, rev int64, succeeded, ok bool, err error) {
	if m.keys == nil {
		return nil, 0, false, false, nil
	}
	r := m.kv.Read(etcdmvcc.SharedBufReadTxMode, trace)
	defer r.End()
	index, rev := m.keys(), r.Rev()
	ops, succeeded = q.Success, true
	for _, c := range q.Compare {
		holds, ok := compareOne(index, rev, c)
		if !ok {
			return nil, 0, false, false, nil
		}
		if !holds {
			ops, succeeded = q.Failure, false
			break
		}
	}
	for _, op := range ops {
		switch v := op.Request.(type) {
		case *pb.RequestOp_RequestPut:
			p := v.RequestPut
			if p.PrevKv || p.IgnoreValue || p.IgnoreLease {
				return nil, 0, false, false, nil
			}
			if p.Lease != 0 && err == nil && m.lessor.Lookup(lease.LeaseID(p.Lease)) == nil {
				err = lease.ErrLeaseNotFound
			}
		case *pb.RequestOp_RequestDeleteRange:
			if d := v.RequestDeleteRange; d.PrevKv || d.RangeEnd != nil {
				return nil, 0, false, false, nil
			}
		default:
			return nil, 0, false, false, nil
		}
	}
	return ops, rev, succeeded, true, err
}

// compareOne evaluates a compare of what the index knows of one key; a key that does not
// exist has zero of everything.
func compareOne(index keyIndex, rev int64, c *pb.Compare) (holds, ok bool) {
	if c.RangeEnd != nil {
		return false, false
	}
	var is, want int64
	modified, created, version, err := index.Get(c.Key, rev)
	switch c.Target {
	case pb.Compare_MOD:
		is, want = modified.Main, c.GetModRevision()
	case pb.Compare_CREATE:
		is, want = created.Main, c.GetCreateRevision()
	case pb.Compare_VERSION:
		is, want = version, c.GetVersion()
	default:
		return false, false
	}
	if err != nil {
		is = 0
	}
	switch c.Result {
	case pb.Compare_EQUAL:
		return is == want, true
	case pb.Compare_NOT_EQUAL:
		return is != want, true
	case pb.Compare_GREATER:
		return is > want, true
	case pb.Compare_LESS:
		return is < want, true
	}
	return false, false
}
