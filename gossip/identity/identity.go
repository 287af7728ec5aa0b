package identity

import (
	"crypto/ecdsa"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync/atomic"
)

// GossipKeySize is the length of the gossip key in bytes: AES-256.
const GossipKeySize = 32

// Cluster is what every node must know of its cluster to work while it can reach nobody.
type Cluster struct {
	PodCIDR       netip.Prefix `json:"podCIDR"`                 // all pods' addresses
	ServiceCIDR   netip.Prefix `json:"serviceCIDR"`             // all Services' cluster addresses
	ServiceCIDR6  netip.Prefix `json:"serviceCIDR6,omitzero"`   // and IPv6 ones, if Services may have them
	DNS           netip.Addr   `json:"dns"`                     // cluster address of the DNS Service
	Domain        string       `json:"domain"`                  // DNS domain, without a dot at its ends
	GossipProfile string       `json:"gossipProfile,omitempty"` // "lan" (also when empty) or "edge"; one for the whole cluster
}

// DefaultCluster are the addresses of a cluster for which nobody chose others.
func DefaultCluster() Cluster {
	return Cluster{
		PodCIDR:       netip.MustParsePrefix("10.244.0.0/16"),
		ServiceCIDR:   netip.MustParsePrefix("10.96.0.0/16"),
		DNS:           netip.MustParseAddr("10.96.0.10"),
		Domain:        "cluster.local",
		GossipProfile: "lan",
	}
}

// Validate reports everything that is wrong at once.
func (c Cluster) Validate() error {
	var errs []error
	for n, p := range []netip.Prefix{c.PodCIDR, c.ServiceCIDR} {
		what := []string{"pod", "service"}[n]
		switch {
		case !p.IsValid():
			errs = append(errs, fmt.Errorf("%s CIDR is missing", what))
		case p != p.Masked():
			errs = append(errs, fmt.Errorf("%s CIDR %s has bits set behind its length, %s is meant", what, p, p.Masked()))
		}
	}
	if c.PodCIDR.IsValid() && c.ServiceCIDR.IsValid() && c.PodCIDR.Overlaps(c.ServiceCIDR) {
		errs = append(errs, fmt.Errorf("pod CIDR %s and service CIDR %s overlap", c.PodCIDR, c.ServiceCIDR))
	}
	if p := c.ServiceCIDR6; p.IsValid() && (!p.Addr().Is6() || p.Addr().Is4In6() || p != p.Masked()) {
		errs = append(errs, fmt.Errorf("second service CIDR %s is no IPv6 network", p))
	}
	if !c.ServiceCIDR.Contains(c.DNS) {
		errs = append(errs, fmt.Errorf("DNS address %s is not in the service CIDR %s", c.DNS, c.ServiceCIDR))
	}
	if c.Domain == "" {
		errs = append(errs, errors.New("DNS domain is missing"))
	}
	if !slices.Contains([]string{"", "lan", "edge"}, c.GossipProfile) {
		errs = append(errs, fmt.Errorf("gossip profile %q is not known: lan or edge", c.GossipProfile))
	}
	return errors.Join(errs...)
}

// Identity is one node's membership in one cluster. It is a value to read: whoever changes one changes his own copy.
type Identity struct {
	Name      string            // the node's name
	ClusterID string            // the cluster's id, also in the CA's name
	Key       *ecdsa.PrivateKey // the node's enrolled key; it stays when the certificate is renewed
	Cert      *x509.Certificate // of Key, by CA
	CA        *x509.Certificate // the cluster's
	GossipKey []byte            // GossipKeySize bytes
	Cluster   Cluster
	// Seeds are gossip addresses of members at the time of the join, for the first contact; empty on the first node.
	Seeds []netip.AddrPort

	newest *atomic.Pointer[x509.Certificate] // set by Renewable
}

// ErrForeignCert says that a certificate is not one for this identity.
var ErrForeignCert = errors.New("the certificate is not this node's")

// Renewable returns a copy whose certificate can be renewed: from a call of Renew on, every connection that a TLS configuration of the
// copy makes, also one that was asked for before, presents the new certificate. Copies of the copy share it.
func (i *Identity) Renewable() *Identity {
	out := *i
	out.newest = &atomic.Pointer[x509.Certificate]{}
	return &out
}

// Renew puts a new certificate in use. It must be for the same key, name and CA: ErrForeignCert otherwise.
func (i *Identity) Renew(cert *x509.Certificate) error {
	next := *i
	next.Cert, next.newest = cert, nil
	if err := next.Validate(); err != nil {
		return fmt.Errorf("%w: %w", ErrForeignCert, err)
	}
	i.newest.Store(cert)
	return nil
}

// Current is the certificate in use: Cert, or the one that Renew put in its place.
func (i *Identity) Current() *x509.Certificate {
	if i.newest != nil {
		if c := i.newest.Load(); c != nil {
			return c
		}
	}
	return i.Cert
}

// NewGossipKey makes the key of a new cluster.
func NewGossipKey() ([]byte, error) {
	key := make([]byte, GossipKeySize)
	if _, err := rand.Read(key); err != nil {
		return nil, fmt.Errorf("gossip key: %w", err)
	}
	return key, nil
}

// LocalKeySize is the length of a local key in bytes: AES-256.
const LocalKeySize = 32

// LocalKey derives a key from the node's own (HKDF-SHA256), for what the node keeps on its disk and nobody else reads. It lasts as long
// as the node's key.
func (i *Identity) LocalKey(purpose string) ([]byte, error) {
	secret, err := i.Key.Bytes()
	if err != nil {
		return nil, fmt.Errorf("local key for %s: %w", purpose, err)
	}
	return hkdf.Key(sha256.New, secret, nil, "skein local key v1\x00"+purpose, LocalKeySize)
}

// Certificate is the node's certificate for TLS; the chain includes the CA, for clients that only know its hash.
func (i *Identity) Certificate() tls.Certificate {
	c := i.Current()
	return tls.Certificate{Certificate: [][]byte{c.Raw, i.CA.Raw}, PrivateKey: i.Key, Leaf: c}
}

// Pool holds the cluster's CA, and nothing else.
func (i *Identity) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(i.CA)
	return pool
}

// Validate checks that the parts belong together, whatever the time is: an expired certificate is no reason not to start.
// All faults are reported at once.
func (i *Identity) Validate() error {
	var errs []error
	if err := ValidateName(i.Name); err != nil {
		errs = append(errs, err)
	}
	if i.Key == nil || i.Cert == nil || i.CA == nil {
		return errors.Join(append(errs, errors.New("key, certificate or CA certificate is missing"))...)
	}
	if !i.Key.PublicKey.Equal(i.Cert.PublicKey) {
		errs = append(errs, errors.New("the node's certificate is for another key"))
	}
	if err := i.Cert.CheckSignatureFrom(i.CA); err != nil {
		errs = append(errs, fmt.Errorf("the node's certificate was not made by the cluster's CA: %w", err))
	}
	if cn := i.Cert.Subject.CommonName; cn != NodeUser(i.Name) || !IsNodeCert(i.Cert) {
		errs = append(errs, fmt.Errorf("the node's certificate is for %q, not for node %q", i.Cert.Subject, i.Name))
	}
	if id := CAClusterID(i.CA); id == "" || id != i.ClusterID {
		errs = append(errs, fmt.Errorf("the CA is of cluster %q, not of %q", id, i.ClusterID))
	}
	if len(i.GossipKey) != GossipKeySize {
		errs = append(errs, fmt.Errorf("the gossip key has %d bytes instead of %d", len(i.GossipKey), GossipKeySize))
	}
	if err := i.Cluster.Validate(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
