package mvcc

import (
	"cmp"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3alarm"
	etcderrors "go.etcd.io/etcd/server/v3/etcdserver/errors"
	etcdmvcc "go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.etcd.io/etcd/server/v3/storage/schema"
)

// loadAlarms reads the alarms of a database that has just been opened.
func (m *Machine) loadAlarms(be *database) error {
	a, err := v3alarm.NewAlarmStore(m.zap, schema.NewAlarmBackend(m.zap, be))
	if err != nil {
		return err
	}
	m.alarms.Store(a)
	m.noSpace.Store(len(a.Get(pb.AlarmType_NOSPACE)) > 0)
	return nil
}

// alarm applies a request about alarms. They are part of the state: whether a
// shard refuses what makes it grow is decided by the log alone.
func (m *Machine) alarm(r *pb.AlarmRequest) *pb.AlarmResponse {
	a, resp := m.alarms.Load(), &pb.AlarmResponse{Header: m.header()}
	var changed *pb.AlarmMember
	switch r.Action {
	case pb.AlarmRequest_GET:
		resp.Alarms = a.Get(r.Alarm)
	case pb.AlarmRequest_ACTIVATE:
		changed = a.Activate(types.ID(r.MemberID), r.Alarm)
	case pb.AlarmRequest_DEACTIVATE:
		changed = a.Deactivate(types.ID(r.MemberID), r.Alarm)
	}
	if changed != nil {
		resp.Alarms = append(resp.Alarms, changed)
	}
	m.noSpace.Store(len(a.Get(pb.AlarmType_NOSPACE)) > 0)
	return resp
}

// Alarms returns the active alarms of a kind, with AlarmType_NONE all, in order.
func (m *Machine) Alarms(kind pb.AlarmType) (out []*pb.AlarmMember) {
	if a := m.alarms.Load(); a != nil {
		out = a.Get(kind)
	}
	slices.SortFunc(out, func(a, b *pb.AlarmMember) int {
		return cmp.Or(cmp.Compare(a.Alarm, b.Alarm), cmp.Compare(a.MemberID, b.MemberID))
	})
	return out
}

// CompactionHashes returns the hashes of the last compactions; they are made on
// the way, at no cost.
func (m *Machine) CompactionHashes() (out []etcdmvcc.KeyValueHash) {
	_ = m.use(func() error { out = m.kv.HashStorage().Hashes(); return nil })
	return out
}

// NoSpace tells whether requests that make the shard grow are refused, with
// etcd's ErrNoSpace.
func (m *Machine) NoSpace() bool { return m.noSpace.Load() }

// Grows tells whether a request writes a key or a lease.
func Grows(q *pb.InternalRaftRequest) bool {
	if q.Put != nil || q.LeaseGrant != nil {
		return true
	}
	if q.Txn == nil {
		return false
	}
	for _, ops := range [][]*pb.RequestOp{q.Txn.Success, q.Txn.Failure} {
		for _, op := range ops {
			if op.GetRequestPut() != nil || op.GetRequestTxn() != nil {
				return true
			}
		}
	}
	return false
}

// checkSpace refuses what makes a full shard grow.
func (m *Machine) checkSpace(r *pb.InternalRaftRequest) error {
	if m.noSpace.Load() && Grows(r) {
		return etcderrors.ErrNoSpace
	}
	return nil
}

// Compaction that was applied.
type Compaction struct {
	Revision int64
	At       time.Time
}

// Compacted is the revision up to which the shard is compacted; -1 for never.
func (m *Machine) Compacted() (rev int64) {
	rev = -1
	_ = m.use(func() error { rev = m.kv.FirstRev(); return nil })
	return rev
}

// LastCompaction is the last one that was applied since Open.
func (m *Machine) LastCompaction() Compaction {
	if c := m.lastCompaction.Load(); c != nil {
		return *c
	}
	return Compaction{}
}
