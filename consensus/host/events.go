package host

import (
	"time"

	"github.com/lni/dragonboat/v4/raftio"
	"github.com/lni/dragonboat/v4/raftpb"

	"skein.io/skein/consensus/shard"
)

// The methods below are called by one goroutine of dragonboat, which must not be
// held up: starting and stopping replicas waits for it.

// LeaderUpdated implements raftio.IRaftEventListener.
func (h *Host) LeaderUpdated(i raftio.LeaderInfo) {
	if r := h.replica(shard.ID(i.ShardID)); r != nil && r.id == i.ReplicaID {
		r.setLeader(i.LeaderID, h.gen.Load().term(i.Term))
	}
}

// MembershipChanged implements raftio.ISystemEventListener.
func (h *Host) MembershipChanged(i raftio.NodeInfo) {
	if r := h.replica(shard.ID(i.ShardID)); r != nil && r.id == i.ReplicaID {
		r.kickMembership()
	}
}

// NodeDeleted implements raftio.ISystemEventListener: the replica has applied
// its own removal.
func (h *Host) NodeDeleted(i raftio.NodeInfo) {
	if r := h.replica(shard.ID(i.ShardID)); r != nil && r.id == i.ReplicaID {
		r.markRemoved("the removal is in this replica's log")
	}
}

// The events below are of no interest.

func (h *Host) NodeHostShuttingDown()                       {}
func (h *Host) NodeUnloaded(raftio.NodeInfo)                {}
func (h *Host) NodeReady(raftio.NodeInfo)                   {}
func (h *Host) ConnectionEstablished(raftio.ConnectionInfo) {}
func (h *Host) ConnectionFailed(raftio.ConnectionInfo)      {}
func (h *Host) SendSnapshotStarted(raftio.SnapshotInfo)     {}
func (h *Host) SendSnapshotCompleted(raftio.SnapshotInfo)   {}
func (h *Host) SendSnapshotAborted(raftio.SnapshotInfo)     {}
func (h *Host) SnapshotReceived(raftio.SnapshotInfo)        {}
func (h *Host) SnapshotRecovered(raftio.SnapshotInfo)       {}
func (h *Host) SnapshotCreated(raftio.SnapshotInfo)         {}
func (h *Host) SnapshotCompacted(raftio.SnapshotInfo)       {}
func (h *Host) LogCompacted(raftio.EntryInfo)               {}
func (h *Host) LogDBCompacted(raftio.EntryInfo)             {}

// heard is called by the transport for every message from another node. What
// only a leader sends tells that this replica is not cut off; a non-voting
// replica, which never stands for election, would not notice by itself.
func (h *Host) heard(m raftpb.Message) {
	switch m.Type {
	case raftpb.Heartbeat, raftpb.Replicate, raftpb.InstallSnapshot, raftpb.ReadIndexResp, raftpb.TimeoutNow:
		if r := h.replica(shard.ID(m.ShardID)); r != nil && r.id == m.To {
			r.contact.Store(int64(time.Since(began)))
			r.heard.Store(true)
		}
	}
}
