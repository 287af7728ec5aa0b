package mvcc

import (
	"errors"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	etcderrors "go.etcd.io/etcd/server/v3/etcdserver/errors"
)

func alarmCmd(action pb.AlarmRequest_AlarmAction, member uint64, kind pb.AlarmType) Command {
	return Command{Kind: KindRequest, Request: &pb.InternalRaftRequest{Alarm: &pb.AlarmRequest{Action: action, MemberID: member, Alarm: kind}}}
}

// What a shard refuses is decided by the alarms in its log: on every replica, after
// a restart, and after a snapshot.
func TestAlarms(t *testing.T) {
	dir := t.TempDir()
	m, _ := open(t, dir)
	l := &log{t: t}
	put := func(m *Machine, want error) {
		t.Helper()
		if r := l.do(m, putCmd(0, 0, "k", "v")); !errors.Is(r.Err, want) {
			t.Errorf("a put: %v, want %v", r.Err, want)
		}
	}
	put(m, nil)
	if r := l.do(m, alarmCmd(pb.AlarmRequest_ACTIVATE, 2, pb.AlarmType_NOSPACE)); r.Err != nil || len(r.Resp.(*pb.AlarmResponse).Alarms) != 1 {
		t.Fatalf("activate: %+v", r)
	}
	l.do(m, alarmCmd(pb.AlarmRequest_ACTIVATE, 1, pb.AlarmType_NOSPACE))
	l.do(m, alarmCmd(pb.AlarmRequest_ACTIVATE, 3, pb.AlarmType_CORRUPT))
	put(m, etcderrors.ErrNoSpace)
	rev := m.Rev()
	if r := l.do(m, Command{Kind: KindRequest, Request: &pb.InternalRaftRequest{DeleteRange: &pb.DeleteRangeRequest{Key: []byte("k")}}}); r.Err != nil || m.Rev() != rev+1 {
		t.Errorf("a deletion: %v", r.Err)
	}
	if r := l.do(m, Command{Kind: KindRequest, Request: &pb.InternalRaftRequest{Compaction: &pb.CompactionRequest{Revision: rev}}}); r.Err != nil {
		t.Errorf("a compaction: %v", r.Err)
	}
	for _, c := range []Command{
		alarmCmd(pb.AlarmRequest_ACTIVATE, 1, pb.AlarmType_NONE), alarmCmd(pb.AlarmRequest_ACTIVATE, 1, 77), alarmCmd(99, 1, pb.AlarmType_NOSPACE),
	} {
		if r := l.do(m, c); !errors.Is(r.Err, ErrBadCommand) {
			t.Errorf("%v: %v", c.Request, r.Err)
		}
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m, index := open(t, dir)
	defer m.Close()
	l.replay(m, index)
	put(m, etcderrors.ErrNoSpace)
	if a := m.Alarms(pb.AlarmType_NONE); len(a) != 3 || a[0].MemberID != 1 || a[2].Alarm != pb.AlarmType_CORRUPT {
		t.Errorf("after a restart: %v", a)
	}
	other, _ := open(t, t.TempDir())
	defer other.Close()
	snapshot(t, m, other)
	if !other.NoSpace() || len(other.Alarms(pb.AlarmType_NONE)) != 3 {
		t.Errorf("after a snapshot: %v", other.Alarms(pb.AlarmType_NONE))
	}
	l.do(m, alarmCmd(pb.AlarmRequest_DEACTIVATE, 1, pb.AlarmType_NOSPACE))
	put(m, etcderrors.ErrNoSpace)
	l.do(m, alarmCmd(pb.AlarmRequest_DEACTIVATE, 2, pb.AlarmType_NOSPACE))
	put(m, nil)
	snapshot(t, m, other)
	if other.NoSpace() || len(other.Alarms(pb.AlarmType_NONE)) != 1 {
		t.Errorf("after another: %v", other.Alarms(pb.AlarmType_NONE))
	}
}
