package identity

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net/netip"
	"slices"
	"strings"
	"time"
)

const (
	caValidity   = 10 * 365 * 24 * time.Hour
	nodeValidity = 365 * 24 * time.Hour
	// backdate tolerates machines whose clock is behind the one that signs: their peers' certificates would otherwise not
	// be valid yet.
	backdate = time.Hour

	caNamePrefix = "skein cluster "
)

// ErrBadCSR is wrapped by every refusal of a certificate request.
var ErrBadCSR = errors.New("certificate request refused")

// Authority is the cluster's certificate authority. Whoever holds it can be anyone in the cluster.
type Authority struct {
	Cert *x509.Certificate
	Key  *ecdsa.PrivateKey
	// NodeTTL is the life of nodes' certificates; zero: one year.
	NodeTTL time.Duration
}

// NewAuthority makes the CA of a new cluster, valid for ten years from now. The cluster's id is part of its name.
func NewAuthority(clusterID string, now time.Time, random io.Reader) (*Authority, error) {
	if clusterID == "" {
		return nil, errors.New("certificate authority: the cluster id is empty")
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), random)
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	serial, err := newSerial(random)
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: caNamePrefix + clusterID},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(caValidity),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(random, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	return &Authority{Cert: cert, Key: key}, nil
}

// ParseAuthority reads what [Authority.CertPEM] and [Authority.KeyPEM] wrote.
func ParseAuthority(certPEM, keyPEM []byte) (*Authority, error) {
	cert, err := parseCA(certPEM)
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	key, err := ParseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("certificate authority: %w", err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("certificate authority: the key does not belong to the certificate")
	}
	return &Authority{Cert: cert, Key: key}, nil
}

// CertPEM is the CA's certificate, to be given to everyone.
func (a *Authority) CertPEM() []byte { return EncodeCert(a.Cert) }

// KeyPEM is the CA's private key, to be given to nobody but replicas.
func (a *Authority) KeyPEM() ([]byte, error) { return EncodeKey(a.Key) }

// Hash is what a token pins.
func (a *Authority) Hash() [sha256.Size]byte { return CertHash(a.Cert) }

// ClusterID is the id of the cluster that the CA was made for.
func (a *Authority) ClusterID() string { return CAClusterID(a.Cert) }

// CAClusterID reads the cluster's id off its CA certificate; it is empty for another kind of certificate.
func CAClusterID(ca *x509.Certificate) string {
	id, ok := strings.CutPrefix(ca.Subject.CommonName, caNamePrefix)
	if !ok {
		return ""
	}
	return id
}

// CertHash is the SHA-256 of the certificate's DER form.
func CertHash(cert *x509.Certificate) [sha256.Size]byte { return sha256.Sum256(cert.Raw) }

// Life is for how long a certificate that was made here is valid from the moment of its making.
func Life(cert *x509.Certificate) time.Duration { return cert.NotAfter.Sub(cert.NotBefore) - backdate }

// SignNode makes the certificate of the node called name, for NodeTTL, valid for the node's name, its addresses and the
// loopback. Of the request only the key is used, after its signature, its kind (ECDSA P-256) and its subject were checked:
// what the node may be is the caller's decision, not the request's. A refusal of the request wraps [ErrBadCSR], one of the name
// [ErrBadName].
func (a *Authority) SignNode(csr *x509.CertificateRequest, name string, ips []netip.Addr, now time.Time) (*x509.Certificate, error) {
	if err := ValidateName(name); err != nil {
		return nil, err
	}
	if err := checkNodeCSR(csr, name); err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: NodeUser(name), Organization: []string{NodesGroup}},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    []string{name, "localhost"},
	}
	loopback := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	for _, ip := range append(slices.Clone(ips), loopback) {
		if err := validateNodeIP(ip); err != nil {
			return nil, fmt.Errorf("node %q: %w", name, err)
		}
		template.IPAddresses = append(template.IPAddresses, ip.Unmap().AsSlice())
	}
	ttl := a.NodeTTL
	if ttl == 0 {
		ttl = nodeValidity
	}
	return a.sign(template, csr.PublicKey.(*ecdsa.PublicKey), ttl, now)
}

func checkNodeCSR(csr *x509.CertificateRequest, name string) error {
	refuse := func(why string) error { return fmt.Errorf("node %q: %w: %s", name, ErrBadCSR, why) }
	if csr == nil {
		return refuse("it is missing")
	}
	if err := csr.CheckSignature(); err != nil {
		return refuse("its signature does not fit its key")
	}
	key, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return refuse("its key is not ECDSA P-256")
	}
	if csr.Subject.CommonName != NodeUser(name) || !slices.Equal(csr.Subject.Organization, []string{NodesGroup}) {
		return refuse(fmt.Sprintf("its subject is %q, expected CN=%s,O=%s", csr.Subject, NodeUser(name), NodesGroup))
	}
	return nil
}

// IssueClient makes a key and a certificate with which a client is the user cn in the groups orgs for ttl. It cannot serve.
func (a *Authority) IssueClient(cn string, orgs []string, ttl time.Duration, now time.Time) (tls.Certificate, error) {
	if cn == "" {
		return tls.Certificate{}, errors.New("client certificate: the user name is empty")
	}
	return a.issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: cn, Organization: slices.Clone(orgs)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}, ttl, now)
}

// IssueServer makes a key and a certificate for a server that is called by the names and addresses, for ttl. It cannot be a
// client, and it is no node's certificate ([IsNodeCert]).
func (a *Authority) IssueServer(cn string, dnsNames []string, ips []netip.Addr, ttl time.Duration, now time.Time) (tls.Certificate, error) {
	if len(dnsNames)+len(ips) == 0 {
		return tls.Certificate{}, fmt.Errorf("server certificate %q: it has no name and no address", cn)
	}
	template := &x509.Certificate{
		Subject:     pkix.Name{CommonName: cn},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    slices.Clone(dnsNames),
	}
	for _, ip := range ips {
		if err := validateNodeIP(ip); err != nil {
			return tls.Certificate{}, fmt.Errorf("server certificate %q: %w", cn, err)
		}
		template.IPAddresses = append(template.IPAddresses, ip.Unmap().AsSlice())
	}
	return a.issue(template, ttl, now)
}

// issue makes a key of its own for the certificate. The chain holds the CA too, for peers that only know its hash.
func (a *Authority) issue(template *x509.Certificate, ttl time.Duration, now time.Time) (tls.Certificate, error) {
	if ttl <= 0 {
		return tls.Certificate{}, fmt.Errorf("certificate %q: it would be valid for %s", template.Subject.CommonName, ttl)
	}
	key, err := NewKey()
	if err != nil {
		return tls.Certificate{}, err
	}
	cert, err := a.sign(template, &key.PublicKey, ttl, now)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{cert.Raw, a.Cert.Raw}, PrivateKey: key, Leaf: cert}, nil
}

func (a *Authority) sign(template *x509.Certificate, key *ecdsa.PublicKey, ttl time.Duration, now time.Time) (*x509.Certificate, error) {
	if now.After(a.Cert.NotAfter) {
		return nil, fmt.Errorf("certificate %q: the cluster's CA expired on %s", template.Subject.CommonName, a.Cert.NotAfter.UTC())
	}
	serial, err := newSerial(rand.Reader)
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	template.KeyUsage = x509.KeyUsageDigitalSignature
	template.BasicConstraintsValid = true
	template.NotBefore, template.NotAfter = now.Add(-backdate), now.Add(ttl)
	if template.NotAfter.After(a.Cert.NotAfter) {
		template.NotAfter = a.Cert.NotAfter // nothing outlives what it rests on
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.Cert, key, a.Key)
	if err != nil {
		return nil, fmt.Errorf("certificate %q: %w", template.Subject.CommonName, err)
	}
	return x509.ParseCertificate(der)
}

// newSerial draws 127 bits: positive, and within RFC 5280's 20 octets.
func newSerial(random io.Reader) (*big.Int, error) {
	raw := make([]byte, 16)
	if _, err := io.ReadFull(random, raw); err != nil {
		return nil, fmt.Errorf("serial number: reading randomness: %w", err)
	}
	raw[0] = raw[0]&0x7f | 0x40 // never zero
	return new(big.Int).SetBytes(raw), nil
}

// NewKey makes an ECDSA P-256 key, the only kind in a Skein cluster.
func NewKey() (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("new key: %w", err)
	}
	return key, nil
}

// NewNodeCSR makes the request (DER) with which the node called name asks for its certificate.
func NewNodeCSR(key *ecdsa.PrivateKey, name string) ([]byte, error) {
	if err := ValidateName(name); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: NodeUser(name), Organization: []string{NodesGroup}},
	}, key)
	if err != nil {
		return nil, fmt.Errorf("certificate request of node %q: %w", name, err)
	}
	return der, nil
}

// KeyHash is the SHA-256 of a public key's PKIX form: what the cluster remembers of a node to know it again.
func KeyHash(public any) ([sha256.Size]byte, error) {
	der, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return [sha256.Size]byte{}, fmt.Errorf("public key: %w", err)
	}
	return sha256.Sum256(der), nil
}

const (
	pemCert = "CERTIFICATE"
	pemKey  = "PRIVATE KEY"
)

// EncodeCert writes one certificate as PEM.
func EncodeCert(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: pemCert, Bytes: cert.Raw})
}

// EncodeKey writes a private key as PEM (PKCS #8).
func EncodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der}), nil
}

// ParseKey reads an ECDSA P-256 private key from PEM.
func ParseKey(text []byte) (*ecdsa.PrivateKey, error) {
	der, err := onePEM(text, pemKey)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("private key: %w", err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("private key: it is not ECDSA P-256")
	}
	return key, nil
}

// ParseCert reads exactly one certificate from PEM.
func ParseCert(text []byte) (*x509.Certificate, error) {
	der, err := onePEM(text, pemCert)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("certificate: %w", err)
	}
	return cert, nil
}

func parseCA(text []byte) (*x509.Certificate, error) {
	cert, err := ParseCert(text)
	if err != nil {
		return nil, err
	}
	if !cert.IsCA || !cert.BasicConstraintsValid {
		return nil, errors.New("the certificate is not a CA's")
	}
	return cert, nil
}

func onePEM(text []byte, kind string) ([]byte, error) {
	block, rest := pem.Decode(text)
	switch {
	case block == nil:
		return nil, fmt.Errorf("no PEM block of type %q found", kind)
	case block.Type != kind:
		return nil, fmt.Errorf("PEM block of type %q found, %q expected", block.Type, kind)
	case len(strings.TrimSpace(string(rest))) > 0:
		return nil, fmt.Errorf("something follows the PEM block of type %q", kind)
	}
	return block.Bytes, nil
}
