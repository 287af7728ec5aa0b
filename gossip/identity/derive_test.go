package identity

import (
	"bytes"
	"crypto/rand"
	"crypto/x509"
	"testing"
	"time"
)

// Every holder of an authority derives the same one from it; it trusts nothing of the first, and the other way round.
func TestDerive(t *testing.T) {
	now := time.Now()
	a, err := NewAuthority("c", now, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := a.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	again, err := ParseAuthority(a.CertPEM(), key) // on another node
	if err != nil {
		t.Fatal(err)
	}
	other, err := NewAuthority("c", now, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	derive := func(a *Authority, purpose string) *Authority {
		t.Helper()
		d, err := a.Derive(purpose)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	d := derive(a, "front proxy")
	if e := derive(again, "front proxy"); !bytes.Equal(d.Cert.Raw, e.Cert.Raw) || !d.Key.Equal(e.Key) {
		t.Error("two holders derive different authorities")
	}
	for what, e := range map[string]*Authority{"for another purpose": derive(a, "other"), "of another cluster": derive(other, "front proxy")} {
		if d.Key.Equal(e.Key) {
			t.Errorf("the same key %s", what)
		}
	}
	if d.Key.Equal(a.Key) {
		t.Error("the derived key is the key itself")
	}
	client, err := d.IssueClient("proxy", nil, time.Hour, now)
	if err != nil {
		t.Fatal(err)
	}
	verify := func(ca *Authority) error {
		pool := x509.NewCertPool()
		pool.AddCert(ca.Cert)
		_, err := client.Leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
		return err
	}
	if err := verify(derive(again, "front proxy")); err != nil {
		t.Error(err)
	}
	if verify(a) == nil || verify(derive(a, "other")) == nil {
		t.Error("another authority accepts the certificate")
	}
	if _, err := a.Derive(""); err == nil {
		t.Error("derived for no purpose")
	}
}
