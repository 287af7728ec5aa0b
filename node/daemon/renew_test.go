package daemon

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"skein.io/skein/gossip/identity"
)

// TestRenewer lets ten years pass in which the cluster cannot be reached for weeks.
func TestRenewer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ca, err := identity.NewAuthority("c1", time.Now(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		key, err := identity.NewKey()
		if err != nil {
			t.Fatal(err)
		}
		ip := netip.MustParseAddr("10.0.0.7")
		sign := func() *x509.Certificate {
			der, err := identity.NewNodeCSR(key, "n1")
			if err != nil {
				t.Fatal(err)
			}
			csr, err := x509.ParseCertificateRequest(der)
			if err != nil {
				t.Fatal(err)
			}
			cert, err := ca.SignNode(csr, "n1", []netip.Addr{ip}, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			return cert
		}
		var mu sync.Mutex // guards cert: sleeping orders the renewer and this test, but the race detector does not know it
		cert := sign()
		current := func() *x509.Certificate { mu.Lock(); defer mu.Unlock(); return cert }
		renewals, failures, complaints := 0, 0, 0
		r := renewer{name: "n1", ip: ip, cert: current,
			issue: func(context.Context) (*x509.Certificate, error) {
				if time.Now().YearDay() < 60 || time.Now().Year()%4 == 0 && time.Now().YearDay() < 300 {
					failures++
					return nil, errors.New("nobody answers")
				}
				return sign(), nil
			},
			keep: func(c *x509.Certificate) error { mu.Lock(); defer mu.Unlock(); cert = c; renewals++; return nil },
			tell: func(c *x509.Certificate, err error) {
				if err != nil {
					complaints++
				} else if !time.Now().Before(c.NotAfter) {
					t.Errorf("at %s all seems well with a certificate until %s", time.Now(), c.NotAfter)
				}
			}}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error)
		go func() { ended <- r.run(ctx) }()
		start := time.Now()
		for time.Since(start) < 9*365*24*time.Hour {
			time.Sleep(24 * time.Hour)
			if left := time.Until(current().NotAfter); left < 60*24*time.Hour && time.Now().Year()%4 != 0 && time.Now().YearDay() > 65 {
				t.Fatalf("on %s only %s are left", time.Now(), left)
			}
		}
		cancel()
		if err := <-ended; err != nil || renewals < 10 || renewals > 16 || failures == 0 || complaints < failures {
			t.Errorf("%d renewals, %d failures, %d complaints, %v", renewals, failures, complaints, err)
		}
	})
}

func TestRenewerWantsTheAddress(t *testing.T) {
	ca, err := identity.NewAuthority("c1", time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	id := testNodeIdentity(t, ca, "n1", netip.MustParseAddr("10.0.0.7"))
	r := renewer{name: "n1", ip: netip.MustParseAddr("10.0.0.7"), cert: id.Current}
	if r.due(time.Now()) {
		t.Error("a new certificate is renewed at once")
	}
	if !r.due(id.Cert.NotAfter.Add(-identity.Life(id.Cert) / 3)) {
		t.Error("it is not renewed when a third of its life is left")
	}
	r.ip = netip.MustParseAddr("10.0.0.8")
	if !r.due(time.Now()) {
		t.Error("the node has another address, and its certificate is kept")
	}
	if a, b := renewAt(id.Cert, "n1"), renewAt(id.Cert, "n2"); a.Equal(b) {
		t.Error("all nodes come at the same moment")
	}
}

func testNodeIdentity(t *testing.T, ca *identity.Authority, name string, ips ...netip.Addr) *identity.Identity {
	t.Helper()
	key, err := identity.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	der, err := identity.NewNodeCSR(key, name)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.SignNode(csr, name, ips, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &identity.Identity{Name: name, ClusterID: ca.ClusterID(), Key: key, Cert: cert, CA: ca.Cert,
		GossipKey: []byte(strings.Repeat("k", identity.GossipKeySize)), Cluster: identity.DefaultCluster()}
}
