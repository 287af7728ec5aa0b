package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
)

// Derive gives another authority, for one purpose, which everybody who holds this one derives alike, to the byte: it needs no
// place to be kept and no agreement about who makes it. Neither's certificates are good for the other's purpose.
//
// The key is HKDF-SHA256 of this one's, its certificate is signed without randomness (RFC 6979) and as long valid as this one's.
func (a *Authority) Derive(purpose string) (*Authority, error) {
	fail := func(err error) (*Authority, error) {
		return nil, fmt.Errorf("certificate authority for %q: %w", purpose, err)
	}
	if purpose == "" {
		return fail(errors.New("the purpose is empty"))
	}
	secret, err := a.Key.Bytes()
	if err != nil {
		return fail(err)
	}
	draw := func(what string, n int) ([]byte, error) {
		return hkdf.Key(sha256.New, secret, nil, "skein derived authority v1\x00"+purpose+"\x00"+what, n)
	}
	var key *ecdsa.PrivateKey
	for try := 0; key == nil; try++ { // a draw is no key of the curve in one of 2^32 cases
		scalar, err := draw(fmt.Sprintf("key %d", try), 32)
		if err != nil {
			return fail(err)
		}
		if key, err = ecdsa.ParseRawPrivateKey(elliptic.P256(), scalar); err != nil && try > 8 {
			return fail(err)
		}
	}
	serial, err := draw("serial", 16)
	if err != nil {
		return fail(err)
	}
	serial[0] = serial[0]&0x7f | 0x40
	template := &x509.Certificate{
		SerialNumber:          new(big.Int).SetBytes(serial),
		Subject:               pkix.Name{CommonName: purpose + " of " + a.Cert.Subject.CommonName},
		NotBefore:             a.Cert.NotBefore,
		NotAfter:              a.Cert.NotAfter,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(nil, template, template, key.Public(), key)
	if err != nil {
		return fail(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return fail(err)
	}
	return &Authority{Cert: cert, Key: key}, nil
}
