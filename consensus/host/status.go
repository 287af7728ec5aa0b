package host

import (
	"maps"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"skein.io/skein/consensus/mvcc"
)

// Role of a replica.
type Role string

// The roles. RoleNone: this node holds no replica of the shard.
const (
	RoleNone     Role = "none"
	RoleLeader   Role = "leader"
	RoleVoter    Role = "voter"
	RoleNonVoter Role = "spare"
	RoleStarting Role = "starting" // the membership is not known yet
)

// Member of a shard.
type Member struct {
	Replica    uint64
	NodeHostID string
	Node       string // its name, as Config.Name says
}

// Corrupt is the kind of alarm of a replica whose data differs from that of the others.
const Corrupt = "CORRUPT"

// Alarm of a shard.
type Alarm struct {
	// Kind is NOSPACE: the shard refuses what makes it grow; or CORRUPT: the data of
	// the replica differs from that of the others.
	Kind    string
	Replica uint64
}

// ShardStatus is what this node knows about a shard, without asking others.
type ShardStatus struct {
	Shard   string
	Replica uint64 // this node's, 0 for none
	Role    Role
	Ready   bool
	// Leader is zero when unknown. Term is Raft's.
	Leader Member
	Term   uint64
	// SinceContact is how long no leader has been heard; 0 on the leader.
	SinceContact time.Duration
	Applied      uint64
	Revision     int64
	// Epoch is the newest applied leader term of the shard, Fence the newest of
	// the cluster.
	Epoch, Fence uint64
	// Size of the database on disk and of what is in use of it, in bytes.
	Size, SizeInUse int64
	// Quota bounds SizeInUse, in bytes; negative for none.
	Quota int64
	// Alarms that are active, as etcd names them; etcd's alarm list says of whom.
	Alarms []Alarm
	// LastCompaction and LastDefrag since this replica started; zero for none.
	LastCompaction mvcc.Compaction
	LastDefrag     mvcc.Defrag
	Defragmenting  bool
	// Voters and NonVoters by replica ID, as last read.
	Voters, NonVoters []Member
}

// Status of all shards, by ID.
func (h *Host) Status() []ShardStatus {
	var out []ShardStatus
	for _, s := range h.cfg.Shards.Shards() {
		if r := h.replica(s.ID); r != nil && r.started.Load() {
			out = append(out, r.status())
		} else {
			out = append(out, ShardStatus{Shard: s.Name, Role: RoleNone})
		}
	}
	return out
}

func (r *replica) status() ShardStatus {
	leader, term := r.Leader()
	s := ShardStatus{
		Shard: r.shard.Name, Replica: r.id, Role: RoleStarting, Ready: r.isReady(), Term: term,
		SinceContact: r.SinceContact(), Applied: r.machine.Applied(), Revision: r.machine.Rev(),
		Epoch: r.machine.LeaderTerm(), Fence: r.machine.FenceTerm(),
	}
	s.Size, s.SizeInUse = r.machine.Size()
	s.Quota = r.h.cfg.Space.Quota
	for _, a := range r.machine.Alarms(pb.AlarmType_NONE) {
		s.Alarms = append(s.Alarms, Alarm{Kind: a.Alarm.String(), Replica: a.MemberID})
	}
	s.LastCompaction, s.LastDefrag, s.Defragmenting = r.machine.LastCompaction(), r.machine.LastDefrag(), r.machine.Defragmenting()
	m := r.membership.Load()
	if m == nil {
		return s
	}
	members := func(set map[uint64]string) (out []Member) {
		for _, id := range slices.Sorted(maps.Keys(set)) {
			out = append(out, Member{Replica: id, NodeHostID: set[id], Node: r.h.cfg.Name(set[id])})
		}
		return out
	}
	s.Voters, s.NonVoters = members(m.Nodes), members(m.NonVotings)
	for _, v := range s.Voters {
		if v.Replica == leader {
			s.Leader = v
		}
	}
	switch {
	case leader == r.id:
		s.Role = RoleLeader
	case m.Nodes[r.id] != "":
		s.Role = RoleVoter
	case m.NonVotings[r.id] != "":
		s.Role = RoleNonVoter
	}
	return s
}

// SnapshotsInstalled counts the snapshots that this node's replica has received
// since it started.
func (h *Host) SnapshotsInstalled(shardName string) uint64 {
	r, err := h.byName(shardName)
	if err != nil {
		return 0
	}
	return r.machine.Recoveries()
}
