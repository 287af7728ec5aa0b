package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"time"

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
}

// runMembers keeps the replicas of the store on the right nodes; only the leader runs it.
func (n *node) runMembers(ctx context.Context, term uint64) error {
	m, err := n.membersManager()
	if err != nil {
		return err
	}
	m.Run(ctx, term)
	return nil
}

func (n *node) membersManager() (*members.Manager, error) {
	return members.New(members.Config{Store: n.host, Nodes: orders{n}, Members: n.storeMembers, Logger: n.log.With("part", "members")})
}

// storeMembers shows gossip's view to the store in its own terms.
func (n *node) storeMembers() (out []members.Node) {
	for _, m := range n.gossip.Members() {
		o := members.Node{ID: m.Tags[membership.TagID], Name: m.Name, Zone: m.Tags[membership.TagZone],
			Voter: members.Preference(m.Tags[tagVoter]), For: time.Since(m.Since)}
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
	return o.send(ctx, hostID, order{Start: true, Shard: shard, Replica: replica, Term: term})
}

func (o orders) StopReplica(ctx context.Context, hostID, shard string, replica, term uint64) error {
	return o.send(ctx, hostID, order{Shard: shard, Replica: replica, Term: term})
}

func (o orders) send(ctx context.Context, hostID string, x order) error {
	x.Version = orderVersion
	m, ok := o.n.byHostID(hostID)
	if !ok {
		return fmt.Errorf("order to node %s: gossip does not know it", hostID)
	}
	if m.Self {
		return o.n.obey(ctx, x)
	}
	b, err := json.Marshal(x)
	if err != nil {
		return err
	}
	url := "https://" + netip.AddrPortFrom(m.Addr, tagPort(m, membership.TagAgent, agentPort)).String() + replicaPath
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(b))
	if err != nil {
		return err
	}
	t := &http.Transport{TLSClientConfig: o.n.id.NodeClientTLS(m.Name), DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		return fmt.Errorf("order to node %s: %w", m.Name, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK {
		return nil
	}
	msg, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	e := &client.Error{}
	if err != nil || json.Unmarshal(msg, e) != nil || e.Message == "" {
		e.Message = resp.Status
	}
	return fmt.Errorf("node %s refuses: %s", m.Name, e.Message)
}

// obey carries an order out, unless a later leader has given one before.
func (n *node) obey(ctx context.Context, x order) error {
	if x.Version != orderVersion {
		return refusal(http.StatusBadRequest, "order has version %d, node %s knows version %d", x.Version, n.cfg.Name, orderVersion)
	}
	if err := n.host.Admit(x.Term); err != nil {
		return err
	}
	if x.Start {
		return n.host.StartReplica(ctx, x.Shard, x.Replica)
	}
	return n.host.StopReplica(ctx, x.Shard, x.Replica, true)
}

// nodeHandler is what other nodes may ask of this one, on the agent's port.
func (n *node) nodeHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+replicaPath, func(w http.ResponseWriter, r *http.Request) {
		err := errors.New("this connection is not encrypted")
		if r.TLS != nil {
			_, err = identity.PeerNode(*r.TLS)
		}
		if err != nil {
			writeRefusal(w, refusal(http.StatusForbidden, "only nodes of this cluster may give orders: %v", err))
			return
		}
		var x order
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&x); err != nil {
			writeRefusal(w, refusal(http.StatusBadRequest, "order: %v", err))
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
