package mvcc

import (
	"bytes"
	"context"
	"math"
	"time"

	bolt "go.etcd.io/bbolt"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/pkg/v3/traceutil"
	"go.etcd.io/etcd/server/v3/etcdserver/txn"
	"go.etcd.io/etcd/server/v3/storage/backend"
	etcdmvcc "go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"google.golang.org/protobuf/encoding/protowire"

	"skein.io/skein/consensus/loan"
)

// The ranges of k8s.io/apiserver, which are in the order of keys and of one revision, are read here, with the same outcome as by etcd's code
// (TestRangeLikeEtcd): without counting all keys each time (see counts), and into memory that the caller lends, if he does.

// breathe is after how many values it is looked whether the caller still waits.
const breathe = 64

// plain tells whether a range is one of those.
func plain(q *pb.RangeRequest) bool {
	return len(q.Key) > 0 && bytes.Compare(q.Key, q.RangeEnd) < 0 && !(len(q.RangeEnd) == 1 && q.RangeEnd[0] == 0) &&
		!q.CountOnly && !q.KeysOnly && q.Limit >= 0 && q.Limit < math.MaxInt32 && q.SortTarget == pb.RangeRequest_KEY && q.SortOrder != pb.RangeRequest_DESCEND &&
		q.MinModRevision == 0 && q.MaxModRevision == 0 && q.MinCreateRevision == 0 && q.MaxCreateRevision == 0
}

// page reads a range; false leaves it to etcd's code, errors too. The machine is in use.
func (m *Machine) page(ctx context.Context, q *pb.RangeRequest) (*pb.RangeResponse, bool) {
	if m.keys == nil || !plain(q) {
		return nil, false
	}
	began := time.Now()
	m.installed.RLock() // so that the store's database is this machine's
	defer m.installed.RUnlock()
	r := m.kv.Read(etcdmvcc.ConcurrentReadTxMode, traceutil.TODO())
	defer r.End()
	current, rev := r.Rev(), q.Revision
	if rev <= 0 {
		rev = current
	}
	if rev > current || rev < r.FirstRev() {
		return nil, false
	}
	index := m.keys()
	v := visited{}
	if q.Limit == 0 {
		v.revs, v.total = index.Revisions(q.Key, q.RangeEnd, rev, 0)
	} else {
		v = m.counts.visit(index, q.Key, q.RangeEnd, rev, int(q.Limit))
	}
	kvs, ok := m.values(ctx, v.revs)
	if !ok {
		return nil, false
	}
	if posts, ok := m.values(context.Background(), v.posts); ok {
		for _, kv := range posts {
			m.counts.putFence(index, kv.Key, q.RangeEnd)
		}
	}
	whole := span{string(q.Key), string(q.RangeEnd)}
	if v.total < 0 {
		if v.total, ok = m.counts.at(index, whole, rev); !ok {
			v.total = v.seen + index.CountRevisions(v.stop, q.RangeEnd, rev)
			m.counts.learn(index, whole, rev, current, v.total)
		}
	} else {
		m.counts.learn(index, whole, rev, current, v.total)
	}
	more := v.total > len(kvs)
	if more { // who asks for the next page begins there
		next := span{string(kvs[len(kvs)-1].Key) + "\x00", whole.end}
		m.counts.learn(index, next, rev, current, v.total-len(kvs))
	}
	txn.RangeSecObserve(true, time.Since(began))
	return &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: current}, Kvs: kvs, More: more, Count: int64(v.total)}, true
}

// reader reads what has been stored at revisions that are there as long as it is used.
type reader struct {
	be     *database
	keys   *bolt.Cursor // of what is committed; nil if nothing is
	shared backend.ReadTx
	key    []byte // where the cursor is
	value  []byte
	wanted []byte
}

// near is how many steps the cursor goes rather than look for a key from the root.
const near = 4

// read gives what is stored at a revision, nil if that is not there; after says that the one before it was read last, or one shortly before that.
func (r *reader) read(rev etcdmvcc.Revision, after bool) []byte {
	r.wanted = etcdmvcc.RevToBytes(rev, r.wanted)
	if r.keys != nil {
		for range near {
			if !after || r.key == nil || bytes.Compare(r.key, r.wanted) >= 0 {
				break
			}
			r.key, r.value = r.keys.Next()
		}
		if !bytes.Equal(r.key, r.wanted) {
			r.key, r.value = r.keys.Seek(r.wanted)
		}
		if bytes.Equal(r.key, r.wanted) {
			return r.value
		}
	}
	if r.shared == nil { // what is not committed yet
		r.shared = r.be.ConcurrentReadTx()
	}
	if _, vs := r.shared.UnsafeRange(schema.Key, r.wanted, nil, 0); len(vs) == 1 {
		return vs[0]
	}
	return nil
}

// values reads what has been stored at revisions, into what the context lends; false: not all are there, or nobody waits any more. m.installed is held.
func (m *Machine) values(ctx context.Context, revs []etcdmvcc.Revision) ([]*mvccpb.KeyValue, bool) {
	if len(revs) == 0 {
		return []*mvccpb.KeyValue{}, true
	}
	r := reader{be: m.backend(), wanted: etcdmvcc.NewRevBytes()}
	f := r.be.hold()
	defer f.users.Done()
	tx, err := f.bolt.Begin(false)
	if err != nil {
		return nil, false
	}
	defer func() { _ = tx.Rollback() }() // of a read transaction: it cannot fail
	if b := tx.Bucket(schema.Key.Name()); b != nil {
		r.keys = b.Cursor()
	}
	defer func() {
		if r.shared != nil {
			r.shared.RUnlock()
		}
	}()
	lent := loan.From(ctx)
	slab := &loan.Slab{}
	if lent != nil {
		slab = lent.Slab()
	}
	size := 0
	for i, rev := range revs {
		if i%breathe == 0 && ctx.Err() != nil {
			return nil, false
		}
		v := r.read(rev, i > 0 && rev.Main-revs[i-1].Main <= near)
		if v == nil {
			return nil, false
		}
		slab.Found = append(slab.Found, v)
		size += len(v)
	}
	if cap(slab.KVs) < len(revs) {
		slab.KVs, slab.Refs = make([]mvccpb.KeyValue, 0, len(revs)), make([]*mvccpb.KeyValue, 0, len(revs))
	}
	if lent != nil && cap(slab.Bytes) < size {
		slab.Bytes = make([]byte, 0, size+size/8)
	}
	slab.KVs = slab.KVs[:len(revs)]
	for i, b := range slab.Found {
		kv := &slab.KVs[i]
		if lent != nil {
			from := len(slab.Bytes)
			slab.Bytes = append(slab.Bytes, b...)
			if b = slab.Bytes[from:len(slab.Bytes):len(slab.Bytes)]; !decodeKV(kv, b) {
				return nil, false
			}
		} else if kv.Unmarshal(b) != nil {
			return nil, false
		}
		slab.Refs = append(slab.Refs, kv)
	}
	return slab.Refs, true
}

// Numbers of the fields of a KeyValue.
const (
	kvKey = iota + 1
	kvCreateRevision
	kvModRevision
	kvVersion
	kvValue
	kvLease
)

// decodeKV decodes what the store has written into kv, which is empty. Key and value are those of b.
func decodeKV(kv *mvccpb.KeyValue, b []byte) bool {
	for len(b) > 0 {
		n, t, l := protowire.ConsumeTag(b)
		if l < 0 {
			return false
		}
		b = b[l:]
		var number uint64
		var content []byte
		switch t {
		case protowire.VarintType:
			number, l = protowire.ConsumeVarint(b)
		case protowire.BytesType:
			content, l = protowire.ConsumeBytes(b)
		default:
			return false
		}
		if l < 0 || (t == protowire.BytesType) != (n == kvKey || n == kvValue) {
			return false
		}
		b = b[l:]
		switch n {
		case kvKey:
			kv.Key = content[:len(content):len(content)]
		case kvCreateRevision:
			kv.CreateRevision = int64(number)
		case kvModRevision:
			kv.ModRevision = int64(number)
		case kvVersion:
			kv.Version = int64(number)
		case kvValue:
			kv.Value = content[:len(content):len(content)]
		case kvLease:
			kv.Lease = int64(number)
		default:
			return false
		}
	}
	return true
}
