package daemon

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/keyring"
	"skein.io/skein/gossip/health"
	"skein.io/skein/gossip/membership"
	"skein.io/skein/node/keys"
)

// ringPath is where replicas ask each other for keys, on the agent's port.
const ringPath = "/skein/v1/keyring"

const ringVersion = 1

// ringCall asks a replica about its key ring. With neither field it only asks for the ids.
type ringCall struct {
	Version int    `json:"version"`
	Want    string `json:"want,omitempty"` // id of a key that the caller lacks
	Ring    []byte `json:"ring,omitempty"` // keys that the called node shall add
}

// ringAnswer is the answer.
type ringAnswer struct {
	Version int `json:"version"`
	keys.Report
	Ring []byte `json:"ring,omitempty"` // with the wanted key alone
}

func ringFile(stateDir string) string {
	return filepath.Join(stateDir, "identity", keyring.FileName)
}

// openRing loads this node's key ring; a founding that is not finished brings it along.
func openRing(stateDir string) (*keyring.Holder, error) {
	h, err := keyring.NewHolder(ringFile(stateDir))
	if err != nil {
		return nil, fmt.Errorf("%w; another replica has the same keys: move the file away to fetch them anew", err)
	}
	_, founded, pending, err := foundingFile(stateDir).load()
	if err != nil || !pending {
		return h, err
	}
	_, err = h.Update(func(r keyring.Ring) (keyring.Ring, error) {
		if founded.Empty() && r.Empty() { // a founding that an earlier version began
			return keyring.New(rand.Reader, time.Now())
		}
		return r.Merge(founded)
	})
	return h, diskFull(err)
}

// takeRing adds the keys that came with an order to start a replica.
func (n *node) takeRing(encoded []byte) error {
	if len(encoded) == 0 {
		return nil // the leader has none yet: it makes one for all
	}
	in, err := keyring.Decode(encoded)
	if err != nil {
		return refusal(http.StatusBadRequest, "order: %v", err)
	}
	_, err = n.ring.Update(func(r keyring.Ring) (keyring.Ring, error) { return r.Merge(in) })
	return err
}

// dropRing destroys the key ring of a node that holds no replica any more, also if that happened in an earlier life.
func (n *node) dropRing() {
	if ring, _ := n.ring.Ring(); ring.Empty() || slices.ContainsFunc(n.host.Status(), func(s host.ShardStatus) bool { return s.Role != host.RoleNone }) {
		return
	}
	var err error
	if n.host.WhenEmpty(func() { err = n.ring.Destroy() }) {
		n.log.Info("this node holds no replica any more; its key ring is destroyed")
		n.logIf("destroy the key ring", err)
	}
}

// serveRing answers another node about the ring.
func (n *node) serveRing(w http.ResponseWriter, r *http.Request) {
	answer, err := n.answerRing(r)
	if err != nil {
		writeRefusal(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	_ = json.NewEncoder(w).Encode(answer) // the caller went away
}

func (n *node) answerRing(r *http.Request) (a ringAnswer, err error) {
	peer, err := peerID(r)
	if err != nil {
		return a, refusal(http.StatusForbidden, "only nodes of this cluster may ask for keys: %v", err)
	}
	var q ringCall
	if err := json.NewDecoder(http.MaxBytesReader(nil, r.Body, maxBody)).Decode(&q); err != nil {
		return a, refusal(http.StatusBadRequest, "the call cannot be read")
	}
	if q.Version != ringVersion {
		return a, refusal(http.StatusBadRequest, "the call has version %d, node %s knows version %d", q.Version, n.cfg.Name, ringVersion)
	}
	if q.Want != "" || q.Ring != nil {
		if err := n.isReplica(r.Context(), peer); err != nil {
			return a, err
		}
	}
	if q.Ring != nil {
		in, err := keyring.Decode(q.Ring)
		if err != nil {
			return a, refusal(http.StatusBadRequest, "%v", err)
		}
		if _, err := n.ring.Update(func(r keyring.Ring) (keyring.Ring, error) { return r.Merge(in) }); err != nil {
			return a, err
		}
	}
	ring, _ := n.ring.Ring()
	a = ringAnswer{Version: ringVersion, Report: keys.Report{Keys: ring.IDs(), Primary: ring.Primary()}}
	if q.Want == "" {
		return a, nil
	}
	only, err := ring.Only(q.Want)
	if err != nil {
		return a, refusal(http.StatusNotFound, "node %s: %v", n.cfg.Name, err)
	}
	n.log.Info("gave a key to another replica", "to", n.hostName(peer), "key", q.Want)
	a.Ring = only.Encode()
	return a, nil
}

func (n *node) hostName(hostID string) string {
	if m, ok := n.byHostID(hostID); ok {
		return m.Name
	}
	return hostID
}

// isReplica tells whether a node may have keys: it is in the membership of a shard, as a majority knows it now, of which this node
// holds a replica too.
func (n *node) isReplica(ctx context.Context, hostID string) error {
	members, err := n.replicaNodes(ctx)
	if err != nil {
		return refusal(http.StatusServiceUnavailable, "node %s cannot tell now who holds replicas: %v", n.cfg.Name, err)
	}
	if !slices.ContainsFunc(members, func(r keys.Replica) bool { return r.ID == hostID }) {
		return refusal(http.StatusForbidden, "node %s holds no replica of the store: it gets no keys", n.hostName(hostID))
	}
	return nil
}

// replicaNodes are the nodes that hold replicas of the shards of which this node holds one, by linearizable reads.
func (n *node) replicaNodes(ctx context.Context) (out []keys.Replica, err error) {
	add := func(set map[uint64]string, voter bool) {
		for _, id := range set {
			i := slices.IndexFunc(out, func(r keys.Replica) bool { return r.ID == id })
			if i < 0 {
				i = len(out)
				out = append(out, keys.Replica{ID: id, Node: n.hostName(id), Self: id == n.hostID})
			}
			out[i].Voter = out[i].Voter || voter
		}
	}
	held := 0
	for _, s := range n.host.Status() {
		if s.Role == host.RoleNone {
			continue
		}
		m, err := n.host.Membership(ctx, s.Shard)
		if err != nil {
			return nil, err
		}
		held++
		add(m.Voters, true)
		add(m.NonVoters, false)
	}
	if held == 0 {
		return nil, host.ErrNoReplica
	}
	slices.SortFunc(out, func(a, b keys.Replica) int { return strings.Compare(a.Node, b.Node) })
	return out, nil
}

// apiKeys is the ring as the API server wants it.
type apiKeys struct{ n *node }

func (k apiKeys) Ring() (keyring.Ring, <-chan struct{}) { return k.n.ring.Ring() }

func (k apiKeys) Fetch(ctx context.Context, id string) error { return k.n.fetchKey(ctx, id) }

// fetchTimeout bounds one question to one node.
const fetchTimeout = 3 * time.Second

// fetchKey gets a key that this node's ring lacks from a node that has it. Who is asked is a hint of gossip only: a key is what its id
// says, so nobody can give a false one.
func (n *node) fetchKey(ctx context.Context, id string) error {
	var errs []error
	for _, m := range n.gossip.Members() {
		if m.Self || m.Verdict == health.Dead || m.Verdict == health.Left || m.Tags[membership.TagRole] == string(host.RoleNone) {
			continue
		}
		if ring, _ := n.ring.Ring(); ring.Has(id) {
			return nil // somebody else was faster
		}
		if err := n.fetchFrom(ctx, m, id); err != nil {
			errs = append(errs, err)
			continue
		}
		n.log.Info("got a key from another replica", "from", m.Name, "key", id)
		return nil
	}
	if len(errs) == 0 {
		return fmt.Errorf("no other replica is in reach that could have the key %s", id)
	}
	return errors.Join(errs...)
}

func (n *node) fetchFrom(ctx context.Context, m membership.Member, id string) error {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	var a ringAnswer
	if err := n.call(ctx, m, ringPath, ringCall{Version: ringVersion, Want: id}, &a); err != nil {
		return err
	}
	got, err := keyring.Decode(a.Ring)
	if err == nil {
		got, err = got.Only(id)
	}
	if err != nil {
		return fmt.Errorf("node %s: %w", m.Name, err)
	}
	_, err = n.ring.Update(func(r keyring.Ring) (keyring.Ring, error) { return r.Merge(got) })
	return err
}

// fetchSealing gets the key that seals the cluster's own keys.
func (n *node) fetchSealing(ctx context.Context, kv clientv3.KV) error {
	r, err := kv.Get(ctx, keysKey)
	if err != nil || len(r.Kvs) == 0 {
		return errors.Join(err, errNoKeys)
	}
	id, _ := keyring.SealedBy(r.Kvs[0].Value)
	return n.fetchKey(ctx, id)
}
