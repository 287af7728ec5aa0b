package host

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/lni/dragonboat/v4/config"
	"github.com/lni/dragonboat/v4/raftio"
)

// target of a node, and what it was made of.
type target struct {
	addr    string
	setBack int
	target  string
}

// maxTargets bounds what is remembered of nodes that were once members.
const maxTargets = 64

var errUnknownTarget = errors.New("host: address of the peer unknown")

// registry maps replicas to NodeHostIDs, as the membership says, and those to
// addresses, as the resolver says at the moment. It implements dragonboat's
// NodeRegistryFactory and INodeRegistry.
type registry struct {
	resolve func(nodeHostID string) (string, bool)

	now func() (wall, mono time.Duration)

	mu sync.RWMutex // guards the rest
	m  map[raftio.NodeInfo]string
	// targets are what target returned last, by NodeHostID: it is asked for every message.
	targets map[string]target
	// lead of the wall clock on the monotonic one, and how often it was set back.
	lead    time.Duration
	setBack int
}

var (
	_ config.NodeRegistryFactory = (*registry)(nil)
	_ raftio.INodeRegistry       = (*registry)(nil)
)

func newRegistry(resolve func(string) (string, bool)) *registry {
	r := &registry{resolve: resolve, now: clocks, m: map[raftio.NodeInfo]string{}, targets: map[string]target{}}
	wall, mono := r.now()
	r.lead = wall - mono
	return r
}

// clocks since 1970, and since this process began.
func clocks() (wall, mono time.Duration) {
	now := time.Now()
	return time.Duration(now.UnixNano()), now.Sub(began)
}

// clockTolerance is how much of a change of the wall clock does not matter: the library
// waits for about as long between two attempts to reach a node.
const clockTolerance = 500 * time.Millisecond

// timesSetBack counts how often the wall clock was set back. The library notes by the wall
// clock when a node could not be reached, and does not try again before that time has come
// once more: days, if the clock was days ahead. So targets contain the count, and those
// after it are other ones, which nothing is known of.
func (r *registry) timesSetBack() int {
	wall, mono := r.now()
	lead := wall - mono
	r.mu.RLock()
	known, n := r.lead, r.setBack
	r.mu.RUnlock()
	if d := lead - known; d < clockTolerance && -d < clockTolerance {
		return n
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if lead <= r.lead-clockTolerance {
		r.setBack++
	}
	r.lead = lead
	return r.setBack
}

func (r *registry) Create(string, uint64, config.TargetValidator) (raftio.INodeRegistry, error) {
	return r, nil
}

func (r *registry) Close() error { return nil }

// Add is called for every message that arrives.
func (r *registry) Add(shardID, replicaID uint64, nodeHostID string) {
	if known, ok := r.lookup(shardID, replicaID); ok && known == nodeHostID {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.m[raftio.GetNodeInfo(shardID, replicaID)] = nodeHostID
}

func (r *registry) Remove(shardID, replicaID uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.m, raftio.GetNodeInfo(shardID, replicaID))
}

func (r *registry) RemoveShard(shardID uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k := range r.m {
		if k.ShardID == shardID {
			delete(r.m, k)
		}
	}
}

// lookup returns the NodeHostID of a replica.
func (r *registry) lookup(shardID, replicaID uint64) (nodeHostID string, ok bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	nodeHostID, ok = r.m[raftio.GetNodeInfo(shardID, replicaID)]
	return nodeHostID, ok
}

// members are the NodeHostIDs of a shard's replicas.
func (r *registry) members(shardID uint64) (out []string) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	for k, id := range r.m {
		if k.ShardID == shardID {
			out = append(out, id)
		}
	}
	return out
}

// Resolve returns the dial target and the key of dragonboat's send queue. Both
// contain the address: a queue keeps dialling what it was made with.
func (r *registry) Resolve(shardID, replicaID uint64) (string, string, error) {
	r.mu.RLock()
	id, ok := r.m[raftio.GetNodeInfo(shardID, replicaID)]
	r.mu.RUnlock()
	if !ok {
		return "", "", fmt.Errorf("%w: replica %d of shard %d", errUnknownTarget, replicaID, shardID)
	}
	t, err := r.target(id)
	return t, t, err
}

// target of the transport: NodeHostID@host:port, and #n when the wall clock was set back
// n times.
func (r *registry) target(nodeHostID string) (string, error) {
	addr, ok := r.resolve(nodeHostID)
	if !ok {
		return "", fmt.Errorf("%w: node %s", errUnknownTarget, nodeHostID)
	}
	n := r.timesSetBack()
	r.mu.RLock()
	t := r.targets[nodeHostID]
	r.mu.RUnlock()
	if t.addr == addr && t.setBack == n && t.target != "" {
		return t.target, nil
	}
	t = target{addr, n, nodeHostID + "@" + addr}
	if n > 0 {
		t.target += "#" + strconv.Itoa(n)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.targets) >= maxTargets {
		clear(r.targets)
	}
	r.targets[nodeHostID] = t
	return t.target, nil
}

func splitTarget(t string) (nodeHostID, addr string) {
	nodeHostID, addr, _ = strings.Cut(t, "@")
	addr, _, _ = strings.Cut(addr, "#")
	return nodeHostID, addr
}
