package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"time"

	"skein.io/skein/consensus/members"
	"skein.io/skein/gossip/membership"
	"skein.io/skein/node/client"
)

// votersPath is where the leader tells other nodes what it has decided about the replicas, on the agent's port.
const votersPath = "/skein/v1/voters"

// votersTimeout bounds how long a status waits for the leader's word.
const votersTimeout = 2 * time.Second

// placement shows the leader's decisions to people.
func placement(decisions map[string]members.Decision, shards []string, nodes []members.Node) *client.Placement {
	if len(decisions) == 0 {
		return nil
	}
	p := &client.Placement{}
	for _, s := range shards {
		d, ok := decisions[s]
		if !ok {
			continue
		}
		plan := client.ShardPlan{Shard: s, Blocked: d.Blocked}
		if d.Step.Action != members.Nothing {
			plan.Next = fmt.Sprintf("%s %s: %s", d.Step.Action, nodeName(nodes, d.Step.Node), d.Step.Reason)
		}
		for id, reason := range d.Refused {
			plan.Blocked = append(plan.Blocked, fmt.Sprintf("%s keeps what it holds: %s", nodeName(nodes, id), reason))
		}
		slices.Sort(plan.Blocked)
		p.Shards = append(p.Shards, plan)
	}
	for _, n := range nodes {
		if why := decisions[systemShard].Why[n.ID]; why != "" {
			p.Nodes = append(p.Nodes, client.NodePlacement{Node: n.Name, Zone: n.Zone, Why: why})
		}
	}
	slices.SortFunc(p.Nodes, func(a, b client.NodePlacement) int { return strings.Compare(a.Node, b.Node) })
	return p
}

func nodeName(nodes []members.Node, id string) string {
	for _, n := range nodes {
		if n.ID == id {
			return n.Name
		}
	}
	return id
}

func (n *node) ownPlacement() *client.Placement {
	var shards []string
	for _, s := range n.host.Shards().Shards() {
		shards = append(shards, s.Name)
	}
	return placement(n.voters.Decisions(), shards, n.storeMembers())
}

// ownWord is what this node says as the leader; nil if it has not looked at the voters.
func (n *node) ownWord() *leaderWord {
	p := n.ownPlacement()
	if p == nil {
		return nil
	}
	return &leaderWord{Placement: p, Zones: zoneStates(n.zones.Zones(), time.Now())}
}

// word is the leader's view, wherever it is; nil with the reason if it cannot be had.
func (n *node) word(ctx context.Context, leader string) (*leaderWord, error) {
	if w := n.ownWord(); w != nil {
		return w, nil
	}
	for _, m := range n.gossip.Members() {
		if m.Name != leader || m.Self {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, votersTimeout)
		defer cancel()
		return n.askLeader(ctx, m)
	}
	return nil, fmt.Errorf("the leader (%s) has not looked at the voters yet", leader)
}

func (n *node) askLeader(ctx context.Context, m membership.Member) (*leaderWord, error) {
	url := "https://" + netip.AddrPortFrom(m.Addr, tagPort(m, membership.TagAgent, agentPort)).String() + votersPath
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	t := &http.Transport{TLSClientConfig: n.id.NodeClientTLS(m.Name), DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask the leader %s about the voters: %w", m.Name, err)
	}
	defer resp.Body.Close()
	w := &leaderWord{Placement: &client.Placement{}}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask the leader %s about the voters: %s", m.Name, resp.Status)
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxBody)).Decode(w); err != nil {
		return nil, fmt.Errorf("ask the leader %s about the voters: %w", m.Name, err)
	}
	return w, nil
}

func (n *node) serveVoters(w http.ResponseWriter, r *http.Request) {
	if _, err := peerID(r); err != nil {
		writeRefusal(w, refusal(http.StatusForbidden, "only nodes of this cluster may ask: %v", err))
		return
	}
	word := n.ownWord()
	if word == nil {
		writeRefusal(w, refusal(http.StatusConflict, "node %s does not lead", n.cfg.Name))
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(word) // the caller went away
}

// mayLabel refuses to take the vote by a label from those that nobody can replace. What comes about otherwise (a label that was there
// when others died) the leader does not obey.
func (n *node) mayLabel(ctx context.Context, node string, before, after map[string]string) error {
	now := members.Preference(after[members.Label])
	if now == members.Preference(before[members.Label]) {
		return nil
	}
	for _, m := range n.storeMembers() {
		if m.Name == node {
			return n.voters.MayLabel(ctx, m.ID, now)
		}
	}
	return nil // it is not in the cluster, so it holds nothing
}
