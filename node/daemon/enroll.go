package daemon

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"k8s.io/component-base/version"

	"skein.io/skein/consensus/keyring"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/join"
)

// errOtherName says that the state directory belongs to a node of another name.
var errOtherName = errors.New("the state directory belongs to another node")

// enrol gives the node its identity: the one on disk, a new cluster's, or one that a member of a cluster gives out.
func (n *node) enrol(ctx context.Context, in Intent) error {
	id, err := resume(n.cfg)
	switch {
	case err == nil:
		if len(in.Join) > 0 {
			n.log.Info("this node is a member already; it resumes and does not join again", "cluster", id.ClusterID)
		}
	case !errors.Is(err, identity.ErrNoIdentity):
		return err
	case len(in.Join) > 0:
		if id, err = joinCluster(ctx, n.cfg, in); err != nil {
			return err
		}
	default:
		if id, err = found(n.cfg, time.Now()); err != nil {
			if !enrolled(n.cfg.StateDir) {
				_ = os.Remove(foundingFile(n.cfg.StateDir).path) // nobody has these keys: the next start makes others
			}
			return fmt.Errorf("make a cluster: %w", diskFull(err))
		}
		n.log.Info("this node is the first of a new cluster", "cluster", id.ClusterID)
	}
	n.id = id.Renewable()
	if n.ring, err = openRing(n.cfg.StateDir); err != nil {
		return err
	}
	n.hostID, err = hostIDOf(id.Key.Public())
	return err
}

// joinCluster asks the members, in turn, to take this node in. Nothing is on disk before one of them has.
func joinCluster(ctx context.Context, cfg Config, in Intent) (*identity.Identity, error) {
	token, err := identity.ParseToken(in.Token)
	if err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	id, _, err := join.Join(ctx, join.Request{
		Addresses: in.Join, Token: token, Name: cfg.Name, IPs: []netip.Addr{cfg.Address}, Version: version.Get().GitVersion,
	})
	if err != nil {
		return nil, fmt.Errorf("join: %w", err)
	}
	if err := id.Save(filepath.Join(cfg.StateDir, "identity")); err != nil {
		return nil, diskFull(err)
	}
	return id, nil
}

// enrolled tells whether the state directory has an identity already, whatever it is worth.
func enrolled(stateDir string) bool {
	_, err := os.Stat(filepath.Join(stateDir, "identity"))
	return err == nil
}

// resume loads the identity that an earlier start left; identity.ErrNoIdentity when there is none.
func resume(cfg Config) (*identity.Identity, error) {
	id, err := identity.Load(filepath.Join(cfg.StateDir, "identity"))
	if err != nil {
		return nil, err
	}
	if id.Name != cfg.Name {
		return nil, fmt.Errorf("%s: %w: it was made by node %q, this one is called %q: use --name %s, or another --state-dir",
			cfg.StateDir, errOtherName, id.Name, cfg.Name, id.Name)
	}
	if p := cfg.ServiceCIDR6; p.IsValid() && p != id.Cluster.ServiceCIDR6 {
		if have := id.Cluster.ServiceCIDR6; have.IsValid() {
			return nil, fmt.Errorf("second service CIDR %s: the cluster has %s already, whose addresses are in use", p, have)
		}
		id.Cluster.ServiceCIDR6 = p // the cluster gets one
		if err := id.SaveCluster(filepath.Join(cfg.StateDir, "identity")); err != nil {
			return nil, err
		}
	}
	return id, nil
}

// found makes a new cluster of which this node is the first member. The keys lie in the founding file until the store has
// them, so a founding that is interrupted at any point is finished by the next start.
func found(cfg Config, now time.Time) (*identity.Identity, error) {
	var raw [8]byte
	if _, err := rand.Read(raw[:]); err != nil {
		return nil, fmt.Errorf("cluster id: %w", err)
	}
	clusterID := hex.EncodeToString(raw[:])
	authority, err := identity.NewAuthority(clusterID, now, rand.Reader)
	if err != nil {
		return nil, err
	}
	sa, err := identity.NewKey()
	if err != nil {
		return nil, fmt.Errorf("ServiceAccount key: %w", err)
	}
	key, err := identity.NewKey()
	if err != nil {
		return nil, fmt.Errorf("node key: %w", err)
	}
	der, err := identity.NewNodeCSR(key, cfg.Name)
	if err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("node certificate: %w", err)
	}
	authority.NodeTTL = cfg.CertTTL
	cert, err := authority.SignNode(csr, cfg.Name, []netip.Addr{cfg.Address}, now)
	if err != nil {
		return nil, err
	}
	gossipKey, err := identity.NewGossipKey()
	if err != nil {
		return nil, err
	}
	ring, err := keyring.New(rand.Reader, now)
	if err != nil {
		return nil, err
	}
	id := &identity.Identity{
		Name: cfg.Name, ClusterID: clusterID, Key: key, Cert: cert, CA: authority.Cert, GossipKey: gossipKey,
		Cluster: identity.Cluster{
			PodCIDR: cfg.PodCIDR, ServiceCIDR: cfg.ServiceCIDR, ServiceCIDR6: cfg.ServiceCIDR6, Domain: cfg.ClusterDomain, GossipProfile: cfg.Profile,
			DNS: nth(cfg.ServiceCIDR, 10),
		},
	}
	if err := id.Validate(); err != nil {
		return nil, err
	}
	if err := foundingFile(cfg.StateDir).save(clusterKeys{authority: authority, sa: sa}, ring); err != nil {
		return nil, err
	}
	return id, id.Save(filepath.Join(cfg.StateDir, "identity"))
}

// nth is the address n after the first of p.
func nth(p netip.Prefix, n int) netip.Addr {
	a := p.Masked().Addr()
	for range n {
		a = a.Next()
	}
	return a
}
