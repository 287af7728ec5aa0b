package host

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	etcdmvcc "go.etcd.io/etcd/server/v3/storage/mvcc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/consensus/shard"
	"skein.io/skein/consensus/space"
)

const (
	// keyCost is what etcd counts for a request beside its own size, in bytes.
	keyCost = 256
	// defragPoll is how often the leader of the system shard looks for a database
	// that is worth rewriting.
	defragPoll = 30 * time.Second
)

// SpaceError refuses a request that would make a shard grow. errors.Is finds
// rpctypes.ErrNoSpace in it.
type SpaceError struct {
	Shard string
	// InUse and Quota in bytes.
	InUse, Quota int64
	// Cause is set when the node's disk is full, and not the shard.
	Cause error
}

func (e *SpaceError) Error() string {
	if e.Cause != nil {
		return fmt.Sprintf("shard %s of the store: %v", e.Shard, e.Cause)
	}
	const mib = 1 << 20
	return fmt.Sprintf("shard %s of the store has no space left: %.1f MiB are in use, the limit is %.1f MiB; nothing is created or changed in it until less than %.1f MiB are in use: "+
		"delete objects that are not needed (their space is free again when their history has been compacted), or raise the limit on all nodes",
		e.Shard, float64(e.InUse)/mib, float64(e.Quota)/mib, float64(e.Quota/10*9)/mib)
}

// Is implements errors.Is.
func (e *SpaceError) Is(target error) bool {
	return target == rpctypes.ErrNoSpace || target == rpctypes.ErrGRPCNoSpace || e.Cause != nil && errors.Is(e.Cause, target)
}

// GRPCStatus is the status of the error; etcd's code with our message.
func (e *SpaceError) GRPCStatus() *status.Status {
	return status.New(codes.ResourceExhausted, e.Error())
}

// checkSpace refuses a request that makes the store grow where there is no room.
// It spares the log what the state machine would refuse, and it is what raises
// the alarm.
func (r *replica) checkSpace(q *pb.InternalRaftRequest) error {
	c := &r.h.cfg
	if !mvcc.Grows(q) {
		return nil
	}
	if c.Full != nil {
		if err := c.Full(); err != nil {
			return &SpaceError{Shard: r.shard.Name, Cause: err}
		}
	}
	if r.machine.NoSpace() {
		return r.spaceError()
	}
	if _, used := r.machine.Size(); c.Space.Full(used, 0) || c.Space.Full(used, maxRequest+keyCost) && c.Space.Full(used, int64(q.Size())+keyCost) {
		select {
		case r.alarmKick <- struct{}{}:
		default:
		}
		return r.spaceError()
	}
	return nil
}

func (r *replica) spaceError() error {
	_, used := r.machine.Size()
	return &SpaceError{Shard: r.shard.Name, InUse: used, Quota: r.h.cfg.Space.Quota}
}

// Quota implements etcdapi.Replica.
func (r *replica) Quota() int64 { return r.h.cfg.Space.Quota }

// spaceLoop notes which revision was the newest when; while this replica leads,
// it compacts the shard, ends its alarm, and compares the replicas' data.
func (r *replica) spaceLoop() {
	c := r.h.cfg.Space
	born := time.Now()
	var history space.History
	var checked time.Duration
	tick := time.NewTicker(c.Tick())
	defer tick.Stop()
	for {
		select {
		case <-r.ctx.Done():
			return
		case <-r.alarmKick:
			r.raise(pb.AlarmType_NOSPACE, r.id, "the shard has reached its limit")
			continue
		case <-tick.C:
		}
		now := time.Since(born) // monotonic
		history.Note(c, now, r.machine.Rev())
		term, _ := r.reign()
		if term == 0 {
			continue
		}
		_, used := r.machine.Size()
		s := space.State{Rev: r.machine.Rev(), Compacted: r.machine.Compacted(), InUse: used, Since: time.Since(r.machine.LastCompaction().At)}
		if rev, why := history.Compact(c, now, s); rev != 0 {
			r.compact(term, rev, why)
		}
		if r.machine.NoSpace() && c.Roomy(used) {
			r.disarm(term, pb.AlarmType_NOSPACE, func(uint64) bool { return true }, "the shard has room again")
		}
		if now-checked >= c.CheckInterval {
			checked = now
			r.compareReplicas(term)
		}
	}
}

// compact is bound to the epoch: of a deposed leader it is refused.
func (r *replica) compact(term uint64, rev int64, why string) {
	begin := time.Now()
	_, err := r.propose(r.ctx, &pb.InternalRaftRequest{Compaction: &pb.CompactionRequest{Revision: rev}}, term)
	switch {
	case err == nil:
		r.log.Debug("compacted", "revision", rev, "because", why, "took", time.Since(begin))
	case r.ctx.Err() == nil && !errors.Is(err, rpctypes.ErrGRPCCompacted) && !errors.Is(err, etcdmvcc.ErrCompacted) && !errors.Is(err, mvcc.ErrSuperseded):
		r.log.Warn("old revisions stay in the store", "revision", rev, "error", err)
	}
}

func (r *replica) raise(kind pb.AlarmType, member uint64, why string) {
	for _, a := range r.machine.Alarms(kind) {
		if a.MemberID == member {
			return
		}
	}
	total, used := r.machine.Size()
	r.log.Warn("alarm", "alarm", kind, "member", member, "because", why, "size", total, "in use", used, "limit", r.h.cfg.Space.Quota)
	r.changeAlarm(pb.AlarmRequest_ACTIVATE, kind, member, 0)
}

// disarm ends the alarms of a kind.
func (r *replica) disarm(term uint64, kind pb.AlarmType, of func(member uint64) bool, why string) {
	for _, a := range r.machine.Alarms(kind) {
		if of(a.MemberID) {
			r.log.Info("alarm ended", "alarm", kind, "member", a.MemberID, "because", why)
			r.changeAlarm(pb.AlarmRequest_DEACTIVATE, kind, a.MemberID, term)
		}
	}
}

func (r *replica) changeAlarm(action pb.AlarmRequest_AlarmAction, kind pb.AlarmType, member, term uint64) {
	_, err := r.propose(r.ctx, &pb.InternalRaftRequest{Alarm: &pb.AlarmRequest{Action: action, MemberID: member, Alarm: kind}}, term)
	if err != nil && r.ctx.Err() == nil && !errors.Is(err, mvcc.ErrSuperseded) {
		r.log.Warn("alarm not changed", "alarm", kind, "member", member, "action", action, "error", err)
	}
	r.h.notify()
}

// corrupt tells whether this replica's data differs from that of the others.
func (r *replica) corrupt() bool {
	for _, a := range r.machine.Alarms(pb.AlarmType_CORRUPT) {
		if a.MemberID == r.id {
			return true
		}
	}
	return false
}

// compareReplicas asks all replicas for the hashes of their last compactions and
// raises an alarm for those whose differ. Such a replica is not Ready, and does
// not lead: nobody should read from it. Hashes are made by compactions, so the
// comparison costs nothing.
func (r *replica) compareReplicas(term uint64) {
	m := r.membership.Load()
	if m == nil {
		return
	}
	hashes := map[uint64][]space.Hash{}
	members := maps.Clone(m.Nodes)
	maps.Copy(members, m.NonVotings)
	for id, target := range members {
		if info, err := r.h.space(r.ctx, target, r.shard.ID); err == nil && info.Replica == id {
			hashes[id] = info.Hashes
		}
	}
	for _, id := range space.Corrupt(r.id, hashes) {
		r.raise(pb.AlarmType_CORRUPT, id, "its data differs from that of the other replicas")
	}
	r.disarm(term, pb.AlarmType_CORRUPT, func(id uint64) bool { return members[id] == "" }, "the replica has been removed")
	if r.corrupt() {
		if err := r.handOver(r.ctx, 0); err != nil {
			r.log.Warn("a corrupt replica leads", "error", err)
		}
	}
}

// spaceInfo is what a node tells about the space of its replica of a shard.
type spaceInfo struct {
	Replica       uint64       `json:"replica"`
	Size          int64        `json:"size"`
	InUse         int64        `json:"inUse"`
	Defragmenting bool         `json:"defragmenting,omitempty"`
	SinceDefrag   int64        `json:"sinceDefrag"` // nanoseconds, since the start if there was none
	Hashes        []space.Hash `json:"hashes,omitempty"`
}

func (r *replica) spaceHere() *spaceInfo {
	i := &spaceInfo{Replica: r.id, Defragmenting: r.h.defragging.Load() || r.machine.Defragmenting(), SinceDefrag: int64(time.Since(r.lastDefragTry()))}
	i.Size, i.InUse = r.machine.Size()
	for _, h := range r.machine.CompactionHashes() {
		i.Hashes = append(i.Hashes, space.Hash{Revision: h.Revision, Compacted: h.CompactRevision, Hash: h.Hash})
	}
	return i
}

func (r *replica) lastDefragTry() time.Time {
	if t := r.defragTried.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

func (h *Host) space(ctx context.Context, target string, id shard.ID) (*spaceInfo, error) {
	return h.askSpace(ctx, target, callRequest{Method: methodSpace, Shard: uint64(id)})
}

func (h *Host) askSpace(ctx context.Context, target string, q callRequest) (*spaceInfo, error) {
	var resp callResponse
	var err error
	if target == h.NodeHostID() {
		resp, err = h.handleCall(ctx, q)
	} else {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		resp, err = h.call(ctx, target, q)
	}
	if err == nil && resp.Space == nil {
		err = errors.New("host: an answer without its content")
	}
	return resp.Space, err
}

// defragLoop has the databases rewritten that are worth it, one in the cluster at
// a time, while this node leads the cluster.
func (h *Host) defragLoop() {
	tick := time.NewTicker(min(defragPoll, max(h.cfg.Space.DefragInterval/2, 100*time.Millisecond)))
	defer tick.Stop()
	for {
		select {
		case <-h.ctx.Done():
			return
		case <-tick.C:
		}
		r := h.replica(shard.System)
		if r == nil {
			continue
		}
		if term, _ := r.reign(); term != 0 {
			h.orderDefrag()
		}
	}
}

// orderDefrag orders the rewriting of the database with the most to win, unless
// one is under way.
func (h *Host) orderDefrag() {
	var target string
	var id shard.ID
	var most int64
	for _, s := range h.cfg.Shards.Shards() {
		m, err := h.Membership(h.ctx, s.Name)
		if err != nil {
			continue // the next time
		}
		for _, t := range slices.Concat(slices.Collect(maps.Values(m.Voters)), slices.Collect(maps.Values(m.NonVoters))) {
			i, err := h.space(h.ctx, t, s.ID)
			switch {
			case err != nil:
				continue
			case i.Defragmenting:
				return
			case i.Size-i.InUse > most && h.cfg.Space.WorthDefrag(space.Pages{Size: i.Size, InUse: i.InUse}, time.Duration(i.SinceDefrag)):
				target, id, most = t, s.ID, i.Size-i.InUse
			}
		}
	}
	if target == "" {
		return
	}
	if _, err := h.askSpace(h.ctx, target, callRequest{Method: methodDefrag, Shard: uint64(id)}); err != nil {
		h.log.Debug("defragmentation not begun", "shard", id, "node", h.cfg.Name(target), "error", err)
	}
}

// beginDefrag rewrites this replica's database in the background, if no other of
// this node is being rewritten.
func (r *replica) beginDefrag() error {
	if !r.h.defragging.CompareAndSwap(false, true) {
		return mvcc.ErrDefragRunning
	}
	now := time.Now()
	r.defragTried.Store(&now)
	r.h.wg.Go(func() {
		defer r.h.defragging.Store(false)
		if _, err := r.machine.Defragment(r.ctx); err != nil && r.ctx.Err() == nil {
			r.log.Warn("cannot defragment", "error", err)
		}
		now := time.Now()
		r.defragTried.Store(&now)
		r.h.notify()
	})
	return nil
}
