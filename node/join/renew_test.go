package join

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"skein.io/skein/gossip/identity"
)

func TestRenew(t *testing.T) {
	c := newCluster(t, nil)
	id, _, err := Join(t.Context(), c.request("n2", c.token(TokenOptions{})))
	if err != nil {
		t.Fatal(err)
	}
	// Also when the certificate has long expired, and the address has changed.
	ca := *c.ca
	ca.NodeTTL = -time.Minute
	if id.Cert, err = ca.SignNode(csrOf(t, id), "n2", nil, time.Now()); err != nil || time.Now().Before(id.Cert.NotAfter) {
		t.Fatalf("%v, %v", id.Cert, err)
	}
	id = id.Renewable()
	ips := []netip.Addr{netip.MustParseAddr("10.0.0.77")}
	cert, err := Renew(t.Context(), id, ips, c.addr)
	if err != nil {
		t.Fatal(err)
	}
	if err := id.Renew(cert); err != nil || cert.VerifyHostname("10.0.0.77") != nil || time.Until(cert.NotAfter) < time.Hour {
		t.Errorf("certificate for %v until %v: %v", cert.IPAddresses, cert.NotAfter, err)
	}

	c.nodes = []Known{{Name: "n1", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}}
	if _, err := Renew(t.Context(), id, []netip.Addr{netip.MustParseAddr("10.0.0.1")}, c.addr); !errors.Is(err, ErrAddressTaken) {
		t.Errorf("another node's address: %v", err)
	}
	thief := *id
	if thief.Key, err = identity.NewKey(); err != nil {
		t.Fatal(err)
	}
	if _, err := Renew(t.Context(), &thief, ips, c.addr); !errors.Is(err, ErrNotEnrolled) {
		t.Errorf("the name with another key: %v", err)
	}
	stranger := *id
	stranger.Name = "n9"
	if _, err := Renew(t.Context(), &stranger, ips, c.addr); !errors.Is(err, ErrNotEnrolled) {
		t.Errorf("an unknown name: %v", err)
	}
	if err := c.tokens.Release(t.Context(), "n2"); err != nil {
		t.Fatal(err)
	}
	if _, err := Renew(t.Context(), id, ips, c.addr); !errors.Is(err, ErrNotEnrolled) {
		t.Errorf("a node that has left: %v", err)
	}
	foreign := newCluster(t, nil)
	if _, err := Renew(t.Context(), id, ips, foreign.addr); !errors.Is(err, identity.ErrWrongCA) {
		t.Errorf("another cluster: %v", err)
	}
}

func csrOf(t *testing.T, id *identity.Identity) *x509.CertificateRequest {
	t.Helper()
	der, err := identity.NewNodeCSR(id.Key, id.Name)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

// TestRenewNeedsTheKey: who only knows the public key, as from a certificate, gets nothing.
func TestRenewNeedsTheKey(t *testing.T) {
	c := newCluster(t, nil)
	id, _, err := Join(t.Context(), c.request("n2", c.token(TokenOptions{})))
	if err != nil {
		t.Fatal(err)
	}
	der := csrOf(t, id).Raw
	der[len(der)-5] ^= 1 // in the signature
	for name, ask := range map[string]renewRequest{
		"bad signature": {Version: wireVersion, Name: "n2", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.9")}, CSR: der},
		"no request":    {Version: wireVersion, Name: "n2", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.9")}},
		"no address":    {Version: wireVersion, Name: "n2", CSR: csrOf(t, id).Raw},
		"newer version": {Version: wireVersion + 1, Name: "n2", CSR: csrOf(t, id).Raw},
	} {
		body, err := json.Marshal(ask)
		if err != nil {
			t.Fatal(err)
		}
		tr := &http.Transport{TLSClientConfig: identity.PinnedTLS(c.ca.Hash())}
		resp, err := (&http.Client{Transport: tr}).Post("https://"+c.addr+RenewPath, "application/json", strings.NewReader(string(body)))
		if err != nil {
			t.Fatal(err)
		}
		answer, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		tr.CloseIdleConnections()
		if resp.StatusCode != http.StatusBadRequest || strings.Contains(string(answer), "CERTIFICATE") {
			t.Errorf("%s: %s %s", name, resp.Status, answer)
		}
	}
}

func TestEnrolled(t *testing.T) {
	s := NewTokenStore(testKV(t), [32]byte{})
	ctx := context.Background()
	if err := s.Enrol(ctx, Claim{Name: "n1", KeyHash: [32]byte{1}}); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name string
		key  byte
		want error
	}{{"n1", 1, nil}, {"n1", 2, ErrNotEnrolled}, {"n2", 1, ErrNotEnrolled}, {"../n1", 1, identity.ErrBadName}} {
		if err := s.Enrolled(ctx, x.name, [32]byte{x.key}); !errors.Is(err, x.want) {
			t.Errorf("%s with key %d: %v, want %v", x.name, x.key, err, x.want)
		}
	}
}
