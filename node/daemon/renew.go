package daemon

import (
	"context"
	"crypto/x509"
	"fmt"
	"hash/fnv"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/join"
)

const (
	// renewRetry is the pause after a failed renewal; a year's certificate leaves four months of them.
	renewRetry = time.Minute
	// renewLook is the longest pause between two looks at the clock, which may be set at any time.
	renewLook = time.Hour
)

// renewAt is when a certificate is renewed: when a third of its life is left, a bit earlier on each node, so that not all nodes of a
// cluster that was made in an hour come in that hour.
func renewAt(cert *x509.Certificate, name string) time.Time {
	life := identity.Life(cert)
	h := fnv.New32a()
	h.Write([]byte(name)) // never fails
	early := time.Duration(float64(life) / 30 * float64(h.Sum32()) / (1 << 32))
	return cert.NotAfter.Add(-life/3 - early)
}

// renewer keeps a node's certificate fresh. All that it does to the world are its functions.
type renewer struct {
	name  string
	ip    netip.Addr // which the certificate must have
	cert  func() *x509.Certificate
	issue func(context.Context) (*x509.Certificate, error)
	keep  func(*x509.Certificate) error // on disk and in use
	tell  func(cert *x509.Certificate, err error)
}

func (r renewer) due(now time.Time) bool {
	c := r.cert()
	has := slices.ContainsFunc(c.IPAddresses, func(ip net.IP) bool { a, ok := netip.AddrFromSlice(ip); return ok && a.Unmap() == r.ip })
	return !has || !now.Before(renewAt(c, r.name))
}

// run renews whenever it is time, until ctx ends.
func (r renewer) run(ctx context.Context) error {
	var last error
	for {
		now := time.Now()
		wait := min(max(time.Until(renewAt(r.cert(), r.name)), time.Second), renewLook)
		if r.due(now) {
			cert, err := r.issue(ctx)
			if err == nil {
				err = r.keep(cert)
			}
			if last = err; err != nil {
				wait = min(renewRetry, max(identity.Life(r.cert())/30, time.Second))
			} else {
				wait = 0
			}
		}
		r.tell(r.cert(), last)
		if !pause(ctx, wait) {
			return nil
		}
	}
}

// renewCert keeps this node's certificate fresh.
func (n *node) renewCert(ctx context.Context) error {
	r := renewer{name: n.cfg.Name, ip: n.cfg.Address, cert: n.id.Current, issue: n.issueOwn,
		keep: func(c *x509.Certificate) error {
			before := *n.id
			if err := before.Renewable().Renew(c); err != nil { // nothing unusable reaches the disk
				return err
			}
			if err := identity.SaveCert(filepath.Join(n.cfg.StateDir, "identity"), c); err != nil {
				return err
			}
			n.log.Info("this node's certificate has been renewed", "until", c.NotAfter)
			return n.id.Renew(c)
		},
		tell: func(c *x509.Certificate, err error) {
			until := c.NotAfter.UTC().Format(time.RFC3339)
			if err != nil {
				err = fmt.Errorf("valid until %s, cannot be renewed: %w", until, err)
				n.log.Warn("this node's certificate", "err", err)
			}
			n.parts.set("certificate", err, "valid until "+until)
		},
	}
	return r.run(ctx)
}

// issueOwn gets a new certificate for this node. A replica has the CA and signs for itself, without asking others: a cluster that was
// switched off for so long that all certificates expired could not elect a leader otherwise.
func (n *node) issueOwn(ctx context.Context) (*x509.Certificate, error) {
	ips := []netip.Addr{n.cfg.Address}
	authority, err := n.localAuthority(ctx)
	if err != nil {
		n.log.Debug("no local CA to renew the certificate with", "err", err)
		return join.Renew(ctx, n.id, ips, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), apiPort).String())
	}
	der, err := identity.NewNodeCSR(n.id.Key, n.cfg.Name)
	if err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, err
	}
	return authority.SignNode(csr, n.cfg.Name, ips, time.Now())
}

// localAuthority is the CA, as this node's own replica has it.
func (n *node) localAuthority(ctx context.Context) (*identity.Authority, error) {
	c, ok := n.host.Client(systemShard)
	if !ok {
		return nil, errNoAuthority
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	r, err := c.KV.Get(ctx, keysKey, clientv3.WithSerializable())
	if err != nil {
		return nil, err
	}
	if len(r.Kvs) == 0 {
		return nil, errNoKeys
	}
	ring, _ := n.ring.Ring()
	k, err := openKeys(r.Kvs[0].Value, ring)
	if err != nil {
		return nil, err
	}
	k.authority.NodeTTL = n.cfg.CertTTL
	return k.authority, nil
}
