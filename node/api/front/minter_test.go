package front

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/netip"
	"testing"
	"time"

	"skein.io/skein/gossip/identity"
)

func TestMinter(t *testing.T) {
	now := time.Now()
	ca, err := identity.NewAuthority("test", now, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	names, ips := []string{"n1", "n2"}, []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")}
	var fail error
	m := &Minter{
		Issue: func(cn string, d []string, i []netip.Addr, ttl time.Duration, at time.Time) (tls.Certificate, error) {
			if fail != nil {
				return tls.Certificate{}, fail
			}
			return ca.IssueServer(cn, d, i, ttl, at)
		},
		Members: func() ([]string, []netip.Addr) { return names, ips }, ServiceIP: netip.MustParseAddr("10.96.0.1"),
		TTL: 10 * time.Hour, Now: func() time.Time { return now },
	}
	cert := func() *tls.Certificate {
		t.Helper()
		c, err := m.Cert(nil)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first := cert()
	if len(first.Certificate) != 2 || string(first.Certificate[1]) != string(ca.Cert.Raw) {
		t.Fatal("the chain does not hold the CA")
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.Cert)
	for _, name := range []string{"n1", "n2", "10.0.0.1", "10.0.0.2", "10.96.0.1", "127.0.0.1", "::1", "localhost", "kubernetes",
		"kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"} {
		if _, err := first.Leaf.Verify(x509.VerifyOptions{DNSName: name, Roots: pool, CurrentTime: now}); err != nil {
			t.Errorf("not valid for %s: %v", name, err)
		}
	}
	if cert() != first {
		t.Fatal("made anew without need")
	}
	names, ips = []string{"n2", "n1"}, []netip.Addr{ips[1], ips[0]}
	if cert() != first {
		t.Fatal("made anew because members came in another order")
	}
	names = append(names, "n3")
	second := cert()
	if second == first || second.Leaf.VerifyHostname("n3") != nil {
		t.Fatal("not made anew for a new member")
	}
	now = now.Add(5*time.Hour + time.Second)
	third := cert()
	if third == second {
		t.Fatal("not made anew after half its life")
	}
	// The CA key is out of reach for a while: the old one does, while it is valid.
	fail = errors.New("sealed")
	now = now.Add(6 * time.Hour)
	if cert() != third {
		t.Fatal("no certificate though a valid one was there")
	}
	now = now.Add(5 * time.Hour)
	if _, err := m.Cert(nil); !errors.Is(err, fail) {
		t.Fatalf("got %v for an expired certificate that cannot be replaced", err)
	}
}
