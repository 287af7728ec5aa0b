package host

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/lni/dragonboat/v4/raftio"
	"github.com/lni/dragonboat/v4/raftpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/lease"

	"skein.io/skein/consensus/shard"
)

// callTimeout bounds a call between two nodes, dialling included.
const callTimeout = 2 * time.Second

// A call is a small question from host to host on the Raft port. Unknown fields
// are ignored, an unknown method is an error, so versions may differ by one.
type callRequest struct {
	Method  string `json:"method"`
	From    string `json:"from"` // NodeHostID of the caller
	Shard   uint64 `json:"shard"`
	Replica uint64 `json:"replica,omitempty"`
	Lease   int64  `json:"lease,omitempty"`
	Keys    bool   `json:"keys,omitempty"`
	// Of the cluster's leader (orders.go).
	Term   uint64 `json:"term,omitempty"`
	Change Change `json:"change,omitempty"`
	Target string `json:"target,omitempty"`
	On     uint64 `json:"on,omitempty"`
	Stamp  uint64 `json:"stamp,omitempty"` // of the generation, 0 in generation 0
}

type callResponse struct {
	Error   string   `json:"error,omitempty"`
	Code    callCode `json:"code,omitempty"`
	Removed bool     `json:"removed,omitempty"`
	Replica uint64   `json:"replica,omitempty"`
	Applied uint64   `json:"applied,omitempty"`
	Ready   bool     `json:"ready,omitempty"`
	TTL     int64    `json:"ttl,omitempty"`
	Granted int64    `json:"granted,omitempty"`
	Keys    [][]byte `json:"keys,omitempty"`
	Fence   uint64   `json:"fence,omitempty"`

	Membership *Membership `json:"membership,omitempty"`

	Space *spaceInfo `json:"space,omitempty"`
	Proof []byte     `json:"proof,omitempty"`
	Yes   bool       `json:"yes,omitempty"`

	Shards map[uint64]callProgress `json:"shards,omitempty"`
	Disk   callDisk                `json:"disk,omitzero"`
}

type callProgress struct {
	Replica uint64 `json:"replica"`
	Applied uint64 `json:"applied"`
	Ready   bool   `json:"ready,omitempty"`
}

type callDisk struct {
	SyncMicros int64 `json:"syncMicros,omitempty"`
	Slow       bool  `json:"slow,omitempty"`
	ForSeconds int64 `json:"forSeconds,omitempty"`
}

// callCode lets errors keep their identity over the wire.
type callCode string

const (
	codeNoReplica  callCode = "no-replica"
	codeNotPrimary callCode = "not-primary"
	codeNoLease    callCode = "no-lease"
	codeFenced     callCode = "fenced"
	codeRejected   callCode = "rejected"
	codeNotLeader  callCode = "not-leader"
	codeGeneration callCode = "generation"
	codeStranger   callCode = "not-a-member"
)

var callErrors = map[callCode]error{
	codeNoReplica: ErrNoReplica, codeNotPrimary: lease.ErrNotPrimary, codeNoLease: lease.ErrLeaseNotFound,
	codeFenced: ErrFenced, codeRejected: ErrChangeRejected, codeNotLeader: errNotLeader,
	codeGeneration: ErrOtherGeneration,
	codeStranger:   errNotAMember,
}

const (
	methodRemoved  = "removed"  // is that replica removed for ever?
	methodProgress = "progress" // which replica do you have, and how far is it?
	methodRenew    = "renew"    // renew a lease (primary lessor)
	methodTTL      = "ttl"      // time to live of a lease (primary lessor)
	methodCampaign = "campaign" // the leader, Replica, wants this one to take over
	methodSpace    = "space"    // how large is your database, which are its hashes?

	// Of the cluster's leader.
	methodFence      = "fence"      // raise the shard's fence to Term
	methodMembership = "membership" // read the shard's membership
	methodChange     = "change"     // change it
	methodTransfer   = "transfer"   // hand the shard's leadership to Replica
	methodDefrag     = "defrag"     // rewrite the database

	methodGeneration = "generation" // the proof of your generation; asked across generations
	methodMember     = "member"     // is Replica on Node a member?
	methodState      = "state"      // the progress of all shards, and the disk
)

// answer runs on the transport's goroutines; cert is the caller's, nil without
// TLS.
func (h *Host) answer(ctx context.Context, cert *x509.Certificate, b []byte) []byte {
	var q callRequest
	var resp callResponse
	err := json.Unmarshal(b, &q)
	if err == nil && h.cfg.Authorize != nil {
		err = h.cfg.Authorize(cert, q.From)
	}
	if err == nil {
		resp, err = h.handleCall(ctx, q)
	}
	if err != nil {
		resp = callResponse{Error: err.Error()}
		for code, e := range callErrors {
			if errors.Is(err, e) {
				resp.Code = code
			}
		}
	}
	out, err := json.Marshal(resp)
	if err != nil {
		panic(err) // plain types only
	}
	return out
}

func (h *Host) handleCall(ctx context.Context, q callRequest) (resp callResponse, err error) {
	g := h.gen.Load()
	if q.Method == methodGeneration {
		return callResponse{Proof: g.proof}, nil
	}
	if q.Stamp != g.callStamp() {
		return resp, ErrOtherGeneration
	}
	if q.Method == methodState {
		return h.state(), nil
	}
	r := h.replica(shard.ID(q.Shard))
	if r == nil || !r.started.Load() || r.ctx.Err() != nil {
		return resp, ErrNoReplica
	}
	switch q.Method {
	case methodRenew, methodTTL, methodCampaign:
		if err := h.mayAsk(q.Shard, q.From); err != nil {
			return resp, err
		}
	}
	switch q.Method {
	case methodMember:
		resp.Yes, err = r.isMember(ctx, q.Replica, q.Target)
	case methodRemoved:
		// A removal is for ever, so an old copy that has it is as good as a new one.
		m := r.membership.Load()
		if m != nil {
			_, resp.Removed = m.Removed[q.Replica]
		}
		if !resp.Removed {
			if m, err = r.readMembership(ctx); err == nil {
				_, resp.Removed = m.Removed[q.Replica]
			}
		}
	case methodProgress:
		resp.Replica, resp.Applied, resp.Ready = r.id, r.machine.Applied(), r.isReady()
	case methodRenew:
		resp.TTL, err = r.renewHere(ctx, q.Lease)
	case methodTTL:
		var t *pb.LeaseTimeToLiveResponse
		if t, err = r.ttlHere(ctx, q.Lease, q.Keys); err == nil {
			resp.TTL, resp.Granted, resp.Keys = t.TTL, t.GrantedTTL, t.Keys
		}
	case methodCampaign:
		r.campaign(q.Replica, q.From)
	case methodFence, methodMembership, methodChange, methodTransfer:
		return r.obey(ctx, q)
	case methodSpace:
		resp.Space = r.spaceHere()
	case methodDefrag:
		err, resp.Space = r.beginDefrag(), r.spaceHere()
	default:
		err = fmt.Errorf("unknown method %q", q.Method)
	}
	return resp, err
}

// campaign makes this replica stand for election at once, on behalf of the leader.
func (r *replica) campaign(onBehalfOf uint64, from string) {
	leader, term := r.Leader()
	m := r.membership.Load()
	if leader != onBehalfOf || leader == r.id || m == nil || m.Nodes[leader] != from {
		return
	}
	r.timeoutNow(leader, RaftTerm(term))
}

// timeoutNow tells Raft, as a leader does to its heir, to stand for election at once.
func (r *replica) timeoutNow(from, term uint64) {
	r.h.trans.onMsg(raftpb.MessageBatch{
		DeploymentId: deploymentID, BinVer: raftio.TransportBinVersion,
		Requests: []raftpb.Message{{Type: raftpb.TimeoutNow, ShardID: uint64(r.shard.ID), To: r.id, From: from, Term: term}},
	})
}

func (h *Host) call(ctx context.Context, nodeHostID string, q callRequest) (resp callResponse, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("ask node %s (%s): %w", h.cfg.Name(nodeHostID), q.Method, err)
		}
	}()
	q.From, q.Stamp = h.NodeHostID(), h.gen.Load().callStamp()
	req, err := json.Marshal(q)
	if err != nil {
		return resp, err
	}
	target, err := h.reg.target(nodeHostID)
	if err != nil {
		return resp, err
	}
	b, err := h.trans.call(ctx, target, req)
	if err != nil {
		return resp, err
	}
	if err := json.Unmarshal(b, &resp); err != nil {
		return resp, err
	}
	if resp.Error != "" {
		if known := callErrors[resp.Code]; known != nil {
			if resp.Error == known.Error() {
				return resp, known
			}
			return resp, fmt.Errorf("%w (%s)", known, resp.Error)
		}
		return resp, errors.New(resp.Error)
	}
	return resp, nil
}

// Progress of a replica.
type Progress struct {
	Replica uint64
	// Applied is the log index up to which it is applied.
	Applied uint64
	// Ready as in Host.Ready.
	Ready bool
}

// Progress asks a node how far its replica of a shard is. The error is
// ErrNoReplica when it has none.
func (h *Host) Progress(ctx context.Context, nodeHostID, shardName string) (Progress, error) {
	s, ok := h.cfg.Shards.ByName(shardName)
	if !ok {
		return Progress{}, fmt.Errorf("%w: %q", ErrUnknownShard, shardName)
	}
	q := callRequest{Method: methodProgress, Shard: uint64(s.ID)}
	var resp callResponse
	var err error
	if nodeHostID == h.NodeHostID() {
		resp, err = h.handleCall(ctx, q)
	} else {
		resp, err = h.call(ctx, nodeHostID, q)
	}
	return Progress{Replica: resp.Replica, Applied: resp.Applied, Ready: resp.Ready}, err
}

// NodeState is what a node says of its replicas, by shard, and of its disk.
type NodeState struct {
	Shards map[string]Progress
	Disk   Disk
}

// NodeState asks a node for the progress of all its replicas, in one call.
func (h *Host) NodeState(ctx context.Context, nodeHostID string) (NodeState, error) {
	resp, err := h.state(), error(nil)
	if nodeHostID != h.NodeHostID() {
		if resp, err = h.call(ctx, nodeHostID, callRequest{Method: methodState}); err != nil {
			return NodeState{}, err
		}
	}
	s := NodeState{Shards: map[string]Progress{}, Disk: Disk{
		Sync: time.Duration(resp.Disk.SyncMicros) * time.Microsecond, Slow: resp.Disk.Slow, Since: time.Duration(resp.Disk.ForSeconds) * time.Second}}
	for _, x := range h.cfg.Shards.Shards() {
		if p, ok := resp.Shards[uint64(x.ID)]; ok {
			s.Shards[x.Name] = Progress(p)
		}
	}
	return s, nil
}

func (h *Host) state() callResponse {
	d := h.Disk()
	resp := callResponse{Shards: map[uint64]callProgress{}, Disk: callDisk{SyncMicros: d.Sync.Microseconds(), Slow: d.Slow, ForSeconds: int64(d.Since.Seconds())}}
	for _, s := range h.cfg.Shards.Shards() {
		if r := h.replica(s.ID); r != nil && r.started.Load() && r.ctx.Err() == nil {
			resp.Shards[uint64(s.ID)] = callProgress{Replica: r.id, Applied: r.machine.Applied(), Ready: r.isReady()}
		}
	}
	return resp
}

// RenewLease implements etcdapi.Replica: on the primary lessor, wherever it is.
func (r *replica) RenewLease(ctx context.Context, id int64) (ttl int64, err error) {
	err = r.atPrimary(ctx,
		func(ctx context.Context) error { ttl, err = r.renewHere(ctx, id); return err },
		callRequest{Method: methodRenew, Lease: id}, func(resp callResponse) { ttl = resp.TTL })
	return ttl, err
}

// LeaseTTL implements etcdapi.Replica.
func (r *replica) LeaseTTL(ctx context.Context, id int64, keys bool) (resp *pb.LeaseTimeToLiveResponse, err error) {
	err = r.atPrimary(ctx,
		func(ctx context.Context) error { resp, err = r.ttlHere(ctx, id, keys); return err },
		callRequest{Method: methodTTL, Lease: id, Keys: keys}, func(c callResponse) {
			resp = &pb.LeaseTimeToLiveResponse{ID: id, TTL: c.TTL, GrantedTTL: c.Granted, Keys: c.Keys}
		})
	return resp, err
}

// atPrimary does something here if this is the primary lessor, and else asks the
// leader, until one of them is it.
func (r *replica) atPrimary(ctx context.Context, here func(context.Context) error, q callRequest, there func(callResponse)) error {
	ctx, cancel := r.deadline(ctx)
	defer cancel()
	q.Shard = uint64(r.shard.ID)
	for {
		changed := r.wait()
		var err error = lease.ErrNotPrimary
		if r.primary.Load() != 0 {
			err = here(ctx)
		} else if target, ok := r.leaderTarget(); ok {
			var resp callResponse
			if resp, err = r.h.call(ctx, target, q); err == nil {
				there(resp)
			}
		}
		if err == nil || errors.Is(err, lease.ErrLeaseNotFound) {
			return err
		}
		if err := r.pause(ctx, nil, changed); err != nil {
			return err
		}
	}
}

// leaderTarget is the NodeHostID of another node that leads.
func (r *replica) leaderTarget() (string, bool) {
	leader, _ := r.Leader()
	m := r.membership.Load()
	if leader == 0 || leader == r.id || m == nil {
		return "", false
	}
	target, ok := m.Nodes[leader]
	if !ok {
		r.kickMembership()
	}
	return target, ok
}

func (r *replica) renewHere(ctx context.Context, id int64) (int64, error) {
	if r.primary.Load() == 0 {
		return 0, lease.ErrNotPrimary
	}
	if err := r.ReadIndex(ctx); err != nil { // still the leader, and caught up
		return 0, err
	}
	return r.machine.RenewLease(id)
}

func (r *replica) ttlHere(ctx context.Context, id int64, keys bool) (*pb.LeaseTimeToLiveResponse, error) {
	if r.primary.Load() == 0 {
		return nil, lease.ErrNotPrimary
	}
	if err := r.ReadIndex(ctx); err != nil {
		return nil, err
	}
	resp := &pb.LeaseTimeToLiveResponse{ID: id, TTL: -1}
	l := r.machine.Lease(id)
	if l == nil {
		return resp, nil
	}
	if l.Demoted() {
		return nil, lease.ErrNotPrimary
	}
	resp.TTL, resp.GrantedTTL = int64(l.Remaining().Seconds()), l.TTL()
	if keys {
		names := l.Keys()
		slices.Sort(names)
		for _, k := range names {
			resp.Keys = append(resp.Keys, []byte(k))
		}
	}
	return resp, nil
}
