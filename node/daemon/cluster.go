package daemon

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"maps"
	"net/netip"
	"path/filepath"
	"strconv"
	"time"

	"github.com/google/uuid"
	"k8s.io/component-base/version"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/space"
	"skein.io/skein/gossip/health"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/gossip/membership"
)

// tagVoter says whether a node may vote (Config.Voter); absent means auto.
const tagVoter = "vt"

// tagLeads names the shards that a node leads, for those that hold no replica; absent for none.
const tagLeads = "ld"

// hostIDOf is a node's name in the store's memberships: made of its enrolled key, so that a certificate proves it and a
// node with a new key is a new node.
func hostIDOf(public any) (string, error) {
	h, err := identity.KeyHash(public)
	if err != nil {
		return "", fmt.Errorf("node id: %w", err)
	}
	return hostIDOfHash(h[:])
}

// hostIDOfHash is hostIDOf of a key whose hash is known.
func hostIDOfHash(h []byte) (string, error) {
	if len(h) < 16 {
		return "", fmt.Errorf("node id: a hash of %d bytes", len(h))
	}
	id, err := uuid.FromBytes(h[:16])
	if err != nil {
		return "", fmt.Errorf("node id: %w", err)
	}
	id[6], id[8] = id[6]&0x0f|0x80, id[8]&0x3f|0x80 // version 8, RFC 9562 section 5.8: bits of our own making
	return id.String(), nil
}

func (n *node) startGossip() (*membership.Membership, error) {
	profile := n.id.Cluster.GossipProfile
	if profile == "" {
		profile = string(membership.LAN)
	}
	tags := map[string]string{
		membership.TagID: n.hostID, membership.TagIP: n.cfg.Address.String(), membership.TagAPI: strconv.Itoa(apiPort),
		membership.TagRaft: strconv.Itoa(raftPort), membership.TagAgent: strconv.Itoa(agentPort), membership.TagRole: "none",
		membership.TagVersion: version.Get().GitVersion,
	}
	switch {
	case n.cfg.EtcdPort < 0:
		tags[tagEtcd] = "0"
	case n.cfg.EtcdPort != etcdPort:
		tags[tagEtcd] = strconv.Itoa(n.cfg.EtcdPort)
	}
	if n.cfg.Zone != "" {
		tags[membership.TagZone] = n.cfg.Zone
	}
	if n.cfg.Voter != "auto" {
		tags[tagVoter] = n.cfg.Voter
	}
	return membership.Start(context.Background(), membership.Config{
		Name: n.cfg.Name, Addr: n.cfg.Address, Key: n.id.GossipKey, Tags: tags, Profile: membership.Profile(profile),
		Dir: filepath.Join(n.cfg.StateDir, "gossip"), Seeds: n.id.Seeds, Logger: n.log.With("part", "gossip"),
		OnConflict: func(c membership.Conflict) { n.parts.set("gossip", fmt.Errorf("%v", c), "") },
	})
}

// watchGossip keeps the health of the part and ends the daemon when this node has to yield its name.
func (n *node) watchGossip(ctx context.Context) error {
	changed, end := n.gossip.Subscribe()
	defer end()
	for {
		alive, all := 0, 0
		for _, m := range n.gossip.Members() {
			all++
			if m.Verdict == health.Alive {
				alive++
			}
		}
		n.parts.set("gossip", nil, fmt.Sprintf("%d of %d nodes alive", alive, all))
		select {
		case <-ctx.Done():
			return nil
		case <-n.gossip.Done():
			if err := n.gossip.Err(); err != nil {
				return err
			}
			return nil
		case <-changed:
		}
	}
}

// raftAddr is where a member's Raft transport listens.
func raftAddr(m membership.Member) string {
	return netip.AddrPortFrom(m.Addr, tagPort(m, membership.TagRaft, raftPort)).String()
}

func tagPort(m membership.Member, tag string, otherwise uint16) uint16 {
	if p, err := strconv.ParseUint(m.Tags[tag], 10, 16); err == nil && p > 0 {
		return uint16(p)
	}
	return otherwise
}

// byHostID finds a member by its name in the store's memberships.
func (n *node) byHostID(id string) (membership.Member, bool) {
	for _, m := range n.gossip.Members() {
		if m.Tags[membership.TagID] == id {
			return m, true
		}
	}
	return membership.Member{}, false
}

// allBatch tells whether every member of the cluster understands entries of several commands.
func (n *node) allBatch() bool {
	for _, m := range n.gossip.Members() {
		if m.Levels().Level < identity.BatchLevel {
			return false
		}
	}
	return true
}

func (n *node) startHost() (*host.Host, error) {
	h, err := host.New(host.Config{
		NodeName: n.cfg.Name, NodeHostID: n.hostID, Dir: filepath.Join(n.cfg.StateDir, "raft"),
		ListenAddr: netip.AddrPortFrom(n.cfg.Address, raftPort).String(),
		ServerTLS:  n.id.NodeServerTLS(),
		Batch:      n.allBatch,
		ClientTLS: func(hostID string) *tls.Config {
			m, ok := n.byHostID(hostID)
			if !ok {
				return n.id.NodeClientTLS("")
			}
			return n.id.NodeClientTLS(m.Name)
		},
		Authorize: func(cert *x509.Certificate, hostID string) error {
			is, err := hostIDOf(cert.PublicKey)
			if err == nil && is != hostID {
				err = fmt.Errorf("the certificate of %s does not speak for %s", cert.Subject.CommonName, hostID)
			}
			return err
		},
		Resolve: func(hostID string) (string, bool) {
			m, ok := n.byHostID(hostID)
			if !ok {
				return "", false
			}
			return raftAddr(m), true
		},
		Peers: func() (ids []string) {
			for _, m := range n.gossip.Members() {
				if m.Verdict == health.Alive && !m.Self {
					ids = append(ids, m.Tags[membership.TagID])
				}
			}
			return ids
		},
		Name: func(hostID string) string {
			if m, ok := n.byHostID(hostID); ok {
				return m.Name
			}
			return hostID
		},
		OnRemoved: func(r host.Removed) {
			n.log.Info("this node's replica has been removed from the shard", "shard", r.Shard, "why", r.Reason)
			n.logIf("delete the removed replica", r.Clear(context.Background()))
		},
		VerifyGeneration: n.verifyGeneration,
		Full:             n.disk.err,
		Etcd:             n.etcdConfig(),
		Space:            space.Config{Quota: n.cfg.StoreQuota << 20},
		Logger:           n.log.With("part", "store"),
	})
	if err != nil {
		return nil, fmt.Errorf("store: %w", diskFull(err))
	}
	if _, _, pending, err := foundingFile(n.cfg.StateDir).load(); err != nil {
		return nil, err
	} else if pending {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := h.Bootstrap(ctx); err != nil {
			_ = h.Close(ctx)
			return nil, fmt.Errorf("store: %w", diskFull(err))
		}
	}
	return h, nil
}

// announce puts what this node holds into its gossip tags; it writes only when something changed.
func (n *node) announce(set map[string]string) {
	n.tagsMu.Lock() // reading and setting are two steps
	defer n.tagsMu.Unlock()
	before := n.gossip.Tags()
	tags := maps.Clone(before)
	for k, v := range set {
		if v == "" {
			delete(tags, k)
		} else {
			tags[k] = v
		}
	}
	if maps.Equal(before, tags) {
		return
	}
	n.logIf("announce this node's role", n.gossip.SetTags(tags))
}
