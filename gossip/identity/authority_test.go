package identity

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
)

var testNow = time.Now() // TLS checks certificates against the real clock

func testAuthority(t testing.TB, id string) *Authority {
	t.Helper()
	ca, err := NewAuthority(id, testNow, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func testIdentity(t testing.TB, ca *Authority, name string) *Identity {
	t.Helper()
	key, err := NewKey()
	if err != nil {
		t.Fatal(err)
	}
	gossip, err := NewGossipKey()
	if err != nil {
		t.Fatal(err)
	}
	i := &Identity{Name: name, ClusterID: ca.ClusterID(), Key: key, CA: ca.Cert, GossipKey: gossip, Cluster: DefaultCluster(),
		Seeds: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:7946")}}
	if i.Cert, err = ca.SignNode(testCSR(t, key, name), name, []netip.Addr{netip.MustParseAddr("10.0.0.9")}, testNow); err != nil {
		t.Fatal(err)
	}
	return i
}

func testCSR(t testing.TB, key *ecdsa.PrivateKey, name string) *x509.CertificateRequest {
	t.Helper()
	der, err := NewNodeCSR(key, name)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func TestAuthorityRoundTrip(t *testing.T) {
	ca := testAuthority(t, "c1")
	if ca.ClusterID() != "c1" {
		t.Errorf("cluster id %q", ca.ClusterID())
	}
	if left := ca.Cert.NotAfter.Sub(testNow); left < caValidity-time.Minute {
		t.Errorf("the CA is valid for %s only", left)
	}
	key, err := ca.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	back, err := ParseAuthority(ca.CertPEM(), key)
	if err != nil || !back.Cert.Equal(ca.Cert) || !back.Key.Equal(ca.Key) || back.Hash() != ca.Hash() {
		t.Fatalf("the authority did not survive PEM: %v", err)
	}
	otherKey, err := testAuthority(t, "c2").KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	leaf := testIdentity(t, ca, "n1")
	for name, c := range map[string][2][]byte{
		"other key":     {ca.CertPEM(), otherKey},
		"no PEM":        {[]byte("x"), key},
		"key as cert":   {key, key},
		"two certs":     {append(ca.CertPEM(), ca.CertPEM()...), key},
		"not a CA":      {EncodeCert(leaf.Cert), key},
		"cert as key":   {ca.CertPEM(), ca.CertPEM()},
		"damaged block": {bytes.Replace(ca.CertPEM(), []byte("MI"), []byte("AA"), 1), key},
	} {
		if _, err := ParseAuthority(c[0], c[1]); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if _, err := NewAuthority("", testNow, rand.Reader); err == nil {
		t.Error("a CA without a cluster id was made")
	}
}

func TestSignNode(t *testing.T) {
	ca := testAuthority(t, "c1")
	key, _ := NewKey()
	csr := testCSR(t, key, "n1")
	cert, err := ca.SignNode(csr, "n1", []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.9"), netip.MustParseAddr("fd00::9")}, testNow)
	if err != nil {
		t.Fatal(err)
	}
	if cert.Subject.CommonName != "system:node:n1" || !slices.Equal(cert.Subject.Organization, []string{"system:nodes"}) {
		t.Errorf("subject %s", cert.Subject)
	}
	for _, host := range []string{"n1", "localhost", "127.0.0.1", "10.0.0.9", "fd00::9"} {
		if err := cert.VerifyHostname(host); err != nil {
			t.Errorf("not valid for %s: %v", host, err)
		}
	}
	if left := cert.NotAfter.Sub(testNow); left > nodeValidity || left < nodeValidity-time.Minute {
		t.Errorf("valid for %s", left)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.Cert)
	for _, usage := range []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, CurrentTime: testNow, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
			t.Errorf("usage %v: %v", usage, err)
		}
	}
	// A node's certificate must not outlive the CA.
	late := ca.Cert.NotAfter.Add(-time.Hour)
	if cert, err := ca.SignNode(csr, "n1", nil, late); err != nil || cert.NotAfter.After(ca.Cert.NotAfter) {
		t.Errorf("near the CA's end: %v", err)
	}
	if _, err := ca.SignNode(csr, "n1", nil, ca.Cert.NotAfter.Add(time.Hour)); err == nil {
		t.Error("an expired CA signed")
	}
}

func TestSignNodeRefuses(t *testing.T) {
	ca := testAuthority(t, "c1")
	key, _ := NewKey()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	request := func(signer any, cn string, orgs ...string) *x509.CertificateRequest {
		der, err := x509.CreateCertificateRequest(rand.Reader,
			&x509.CertificateRequest{Subject: pkix.Name{CommonName: cn, Organization: orgs}}, signer)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := x509.ParseCertificateRequest(der)
		if err != nil {
			t.Fatal(err)
		}
		return csr
	}
	tampered := testCSR(t, key, "n1")
	other, _ := NewKey()
	tampered.PublicKey = &other.PublicKey
	for _, c := range []struct {
		name, node string
		csr        *x509.CertificateRequest
		ip         string
		want       error
	}{
		{"no request", "n1", nil, "", ErrBadCSR},
		{"stolen key", "n1", tampered, "", ErrBadCSR},
		{"RSA", "n1", request(rsaKey, "system:node:n1", "system:nodes"), "", ErrBadCSR},
		{"other curve", "n1", request(p384, "system:node:n1", "system:nodes"), "", ErrBadCSR},
		{"other node", "n1", request(key, "system:node:n2", "system:nodes"), "", ErrBadCSR},
		{"admin", "n1", request(key, "admin", "system:masters"), "", ErrBadCSR},
		{"more groups", "n1", request(key, "system:node:n1", "system:nodes", "system:masters"), "", ErrBadCSR},
		{"bad name", "N1", testCSR(t, key, "n1"), "", ErrBadName},
		{"reserved name", "kubernetes", request(key, "system:node:kubernetes", "system:nodes"), "", ErrBadName},
		{"unspecified address", "n1", testCSR(t, key, "n1"), "0.0.0.0", nil},
		{"multicast address", "n1", testCSR(t, key, "n1"), "224.0.0.1", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var ips []netip.Addr
			if c.ip != "" {
				ips = []netip.Addr{netip.MustParseAddr(c.ip)}
			}
			_, err := ca.SignNode(c.csr, c.node, ips, testNow)
			if err == nil || c.want != nil && !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
		})
	}
}

func TestValidateName(t *testing.T) {
	for _, name := range []string{"a", "n1", "web-7", "0", strings.Repeat("a", 63)} {
		if err := ValidateName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", "N1", "a.b", "-a", "a-", "a_b", "ä", "kubernetes", "localhost", strings.Repeat("a", 64), "a b", "a\x00"} {
		if err := ValidateName(name); !errors.Is(err, ErrBadName) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if got := DefaultName(" Web-7.Example.COM\n"); got != "web-7" {
		t.Errorf("DefaultName = %q", got)
	}
}

func TestCompatible(t *testing.T) {
	for _, c := range []struct {
		mine, theirs Levels
		want         string // part of the error, empty for none
	}{
		{Levels{1, 1}, Levels{1, 1}, ""},
		{Levels{3, 2}, Levels{2, 1}, ""},
		{Levels{2, 1}, Levels{3, 2}, ""},
		{Levels{3, 2}, Levels{1, 1}, "upgrade the other side"},
		{Levels{1, 1}, Levels{3, 2}, "upgrade this side"},
		{Levels{1, 1}, Levels{}, "no valid protocol level"},
		{Levels{1, 1}, Levels{1, 2}, "no valid protocol level"},
	} {
		err := Compatible(c.mine, c.theirs)
		if c.want == "" && err != nil || c.want != "" && (!errors.Is(err, ErrIncompatible) || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("Compatible(%v, %v) = %v, want %q", c.mine, c.theirs, err, c.want)
		}
	}
	if err := Compatible(OwnLevels(), OwnLevels()); err != nil {
		t.Errorf("this build does not work with itself: %v", err)
	}
}
