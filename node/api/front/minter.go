package front

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// Minter keeps the API's serving certificate: made in memory from the cluster CA, for the names and
// addresses of all members, and made anew when those change or half its life is over.
type Minter struct {
	// Issue signs a server certificate (identity.Authority.IssueServer). The chain should include
	// the CA, by which joining nodes recognise the cluster.
	Issue func(cn string, dnsNames []string, ips []netip.Addr, ttl time.Duration, now time.Time) (tls.Certificate, error)
	// Members gives the names and addresses of all nodes, this one too.
	Members func() ([]string, []netip.Addr)
	// ServiceIP is the address of Service default/kubernetes.
	ServiceIP netip.Addr
	// Domain is the cluster's DNS domain. Default "cluster.local".
	Domain string
	// TTL is the life of a certificate. Default 72 h.
	TTL time.Duration
	// Now is the time. Default time.Now.
	Now func() time.Time

	mu    sync.Mutex // guards what follows
	names string     // what cert was made for
	cert  *tls.Certificate
	renew time.Time
}

// Cert gives the certificate for now. It is a tls.Config.GetCertificate.
func (m *Minter) Cert(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if m.Issue == nil || m.Members == nil || !m.ServiceIP.IsValid() {
		return nil, errors.New("serving certificate: Minter without Issue, Members or ServiceIP")
	}
	now, ttl := time.Now, 72*time.Hour
	if m.Now != nil {
		now = m.Now
	}
	if m.TTL > 0 {
		ttl = m.TTL
	}
	dns, ips := m.wanted()
	key := fmt.Sprint(dns, ips)
	m.mu.Lock()
	defer m.mu.Unlock()
	at := now()
	if m.cert != nil && m.names == key && at.Before(m.renew) {
		return m.cert, nil
	}
	c, err := m.Issue("kubernetes", dns, ips, ttl, at)
	if err != nil {
		if m.cert != nil && at.Before(m.renew.Add(ttl/2)) {
			return m.cert, nil // better than none: it may lack a member
		}
		return nil, fmt.Errorf("serving certificate: %w", err)
	}
	m.cert, m.names, m.renew = &c, key, at.Add(ttl/2)
	return m.cert, nil
}

func (m *Minter) wanted() ([]string, []netip.Addr) {
	domain := m.Domain
	if domain == "" {
		domain = "cluster.local"
	}
	names, addrs := m.Members()
	dns := append(slices.Clone(names), "localhost")
	service := []string{"kubernetes", "default", "svc", domain}
	for i := range service {
		dns = append(dns, strings.Join(service[:i+1], "."))
	}
	slices.Sort(dns)
	ips := append(slices.Clone(addrs), m.ServiceIP, netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback())
	slices.SortFunc(ips, netip.Addr.Compare)
	return slices.Compact(dns), slices.Compact(ips)
}
