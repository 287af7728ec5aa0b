package daemon

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/members"
	"skein.io/skein/gossip/health"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/gossip/membership"
	"skein.io/skein/node/client"
)

// replicaPath is where a node takes the leader's orders about its replicas, on the agent's port.
const replicaPath = "/skein/v1/replica"

const orderVersion = 1

// order tells a node to start or stop its replica of a shard, on behalf of the leader of a term.
type order struct {
	Version int    `json:"version"`
	Start   bool   `json:"start"`
	Shard   string `json:"shard"`
	Replica uint64 `json:"replica"`
	Term    uint64 `json:"term"`
	// Ring is the cluster's key ring (keyring.Encode), with every order to start: the replica cannot serve without.
	Ring []byte `json:"ring,omitempty"`
	// Generation of the store that the leader leads.
	Generation uint64 `json:"generation,omitempty"`
}

// runMembers keeps the replicas of the store on the right nodes; only the leader runs it.
func (n *node) runMembers(ctx context.Context, term uint64) error {
	b, err := members.NewBalancer(members.BalancerConfig{Store: n.host, Decisions: n.voters.Decisions, Members: n.storeMembers,
		RTT: n.rttTo, Logger: n.log.With("part", "members")})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	wg.Go(func() { b.Run(ctx) })
	n.voters.Run(ctx, term)
	wg.Wait()
	return nil
}

// rttTo is gossip's estimate of a round trip to a node of the store.
func (n *node) rttTo(hostID string) (time.Duration, bool) {
	m, ok := n.byHostID(hostID)
	if !ok || m.Self {
		return 0, false
	}
	return n.gossip.RTT(m.Name)
}

// newManager makes what keeps the replicas of the store on the right nodes; it works while this node leads, and answers
// questions at any time.
func (n *node) newManager() (*members.Manager, error) {
	return members.New(members.Config{Store: n.host, Nodes: orders{n}, Members: n.storeMembers, Logger: n.log.With("part", "members"),
		Policy: members.Policy{ReplaceAfter: n.cfg.ReplaceAfter}})
}

// storeMembers shows gossip's view of the nodes to the store, in its own terms. What the user may change is on the Node object; what
// the node itself says of it counts only while there is none.
func (n *node) storeMembers() (out []members.Node) {
	for _, m := range n.gossip.Members() {
		o := members.Node{ID: m.Tags[membership.TagID], Name: m.Name, Zone: m.Tags[membership.TagZone],
			Voter: members.Preference(m.Tags[tagVoter]), For: time.Since(m.Since)}
		if n.desired.HasNode(m.Name) {
			o.Zone, o.Voter = n.desired.NodeLabel(m.Name, corev1.LabelTopologyZone), members.Preference(n.desired.NodeLabel(m.Name, members.Label))
		}
		switch m.Verdict {
		case health.Alive:
			o.State = members.Alive
		case health.Suspect:
			o.State = members.Suspect
		case health.Left:
			o.State = members.Left
		default:
			o.State = members.Dead
		}
		if o.ID != "" {
			out = append(out, o)
		}
	}
	return out
}

// orders carries the leader's orders to nodes over mutual TLS.
type orders struct{ n *node }

func (o orders) StartReplica(ctx context.Context, hostID, shard string, replica, term uint64) error {
	x := order{Start: true, Shard: shard, Replica: replica, Term: term}
	if ring, _ := o.n.ring.Ring(); !ring.Empty() {
		x.Ring = ring.Encode()
	}
	return o.send(ctx, hostID, x)
}

func (o orders) StopReplica(ctx context.Context, hostID, shard string, replica, term uint64) error {
	return o.send(ctx, hostID, order{Shard: shard, Replica: replica, Term: term})
}

func (o orders) send(ctx context.Context, hostID string, x order) error {
	x.Version = orderVersion
	x.Generation, _ = o.n.host.Generation()
	m, ok := o.n.byHostID(hostID)
	if !ok {
		return fmt.Errorf("order to node %s: gossip does not know it", hostID)
	}
	if m.Self {
		return o.n.obey(ctx, x)
	}
	return o.n.call(ctx, m, replicaPath, x, nil)
}

// call asks another node something over mutual TLS; answer may be nil. The node must be the very one that the store's memberships
// name (its key is its id there): gossip alone could be told that somebody else has that id.
func (n *node) call(ctx context.Context, m membership.Member, path string, ask, answer any) error {
	b, err := json.Marshal(ask)
	if err != nil {
		return err
	}
	url := "https://" + netip.AddrPortFrom(m.Addr, tagPort(m, membership.TagAgent, agentPort)).String() + path
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(b))
	if err != nil {
		return err
	}
	cfg := n.id.NodeClientTLS(m.Name)
	isNode := cfg.VerifyConnection
	cfg.VerifyConnection = func(state tls.ConnectionState) error {
		if err := isNode(state); err != nil {
			return err
		}
		is, err := hostIDOf(state.PeerCertificates[0].PublicKey)
		if err == nil && is != m.Tags[membership.TagID] {
			err = fmt.Errorf("%w: it is %s, expected %s", identity.ErrWrongPeer, is, m.Tags[membership.TagID])
		}
		return err
	}
	resp, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: cfg, DisableKeepAlives: true}}).Do(req)
	if err != nil {
		return fmt.Errorf("call node %s: %w", m.Name, err)
	}
	defer resp.Body.Close()
	msg, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return fmt.Errorf("call node %s: %w", m.Name, err)
	}
	if resp.StatusCode != http.StatusOK {
		e := &client.Error{}
		if json.Unmarshal(msg, e) != nil || e.Message == "" {
			e.Message = resp.Status
		}
		return fmt.Errorf("node %s refuses: %s", m.Name, e.Message)
	}
	if answer == nil {
		return nil
	}
	if err := json.Unmarshal(msg, answer); err != nil {
		return fmt.Errorf("node %s gives an answer that cannot be read", m.Name) // it may hold keys
	}
	return nil
}

// obey carries an order out, unless a later leader has given one before.
func (n *node) obey(ctx context.Context, x order) error {
	if x.Version != orderVersion {
		return refusal(http.StatusBadRequest, "order has version %d, node %s knows version %d", x.Version, n.cfg.Name, orderVersion)
	}
	if mine, _ := n.host.Generation(); mine != x.Generation { // gossip tells this node soon, or that one
		return refusal(http.StatusConflict, "node %s is in generation %d of the cluster, the order is from %d", n.cfg.Name, mine, x.Generation)
	}
	if err := n.host.Admit(x.Term); err != nil {
		return err
	}
	if x.Start {
		if err := n.takeRing(x.Ring); err != nil {
			return err
		}
		return n.host.StartReplica(ctx, x.Shard, x.Replica)
	}
	return n.host.DropRemoved(ctx, x.Shard, x.Replica)
}

// nodeHandler is what other nodes may ask of this one, on the agent's port.
func (n *node) nodeHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+ringPath, n.serveRing)
	mux.HandleFunc("GET "+votersPath, n.serveVoters)
	mux.HandleFunc("GET "+whyPath, n.serveWhy)
	mux.HandleFunc("POST "+replicaPath, func(w http.ResponseWriter, r *http.Request) {
		if err := n.heeds(r); err != nil {
			writeRefusal(w, refusal(http.StatusForbidden, "only the leader of this cluster may give orders: %v", err))
			return
		}
		var x order
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&x); err != nil {
			writeRefusal(w, refusal(http.StatusBadRequest, "the order cannot be read")) // the decoder's words may quote a key
			return
		}
		if err := n.obey(r.Context(), x); err != nil {
			if errors.Is(err, host.ErrFenced) {
				err = refusal(http.StatusConflict, "node %s: %v", n.cfg.Name, err)
			}
			writeRefusal(w, err)
			return
		}
		w.WriteHeader(http.StatusOK)
	})
	return mux
}

// heeds says why this node does not listen to the node that makes a request, if it does not.
func (n *node) heeds(r *http.Request) error {
	from, err := peerID(r)
	if err != nil {
		return err
	}
	return n.host.Heeds(from)
}

// peerID is the store's name (NodeHostID) of the node that makes a request, as its certificate proves it.
func peerID(r *http.Request) (string, error) {
	if r.TLS == nil {
		return "", errors.New("this connection is not encrypted")
	}
	if _, err := identity.PeerNode(*r.TLS); err != nil {
		return "", err
	}
	return hostIDOf(r.TLS.PeerCertificates[0].PublicKey)
}
