package diffapi

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"skein.io/skein/gossip/identity"
)

// pki is what both servers share: the CA, their certificate, the key of ServiceAccount tokens, the administrator.
type pki struct {
	dir    string
	ca     *identity.Authority
	proxy  *identity.Authority // of the front proxy
	server tls.Certificate
	admin  tls.Certificate
	sa     *ecdsa.PrivateKey
}

// anonymous is Skein's default in upstream's form.
const anonymous = `apiVersion: apiserver.config.k8s.io/v1
kind: AuthenticationConfiguration
anonymous:
  enabled: true
  conditions: [{path: /livez}, {path: /readyz}, {path: /healthz}, {path: /version}, {path: /api}, {path: /apis}, {path: /.well-known/openid-configuration}, {path: /openid/v1/jwks}]
`

func newPKI(dir string) (*pki, error) {
	p := &pki{dir: dir}
	now := time.Now()
	var err error
	if p.ca, err = identity.NewAuthority("diffapi", now, rand.Reader); err != nil {
		return nil, err
	}
	if p.proxy, err = p.ca.Derive("front proxy"); err != nil {
		return nil, err
	}
	front, err := p.proxy.IssueClient("front-proxy-client", nil, 24*time.Hour, now)
	if err != nil {
		return nil, err
	}
	if p.sa, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	loopback := []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1})}
	if p.server, err = p.ca.IssueServer("kubernetes", []string{"localhost"}, loopback, 24*time.Hour, now); err != nil {
		return nil, err
	}
	if p.admin, err = p.ca.IssueClient("admin", []string{"system:masters"}, 24*time.Hour, now); err != nil {
		return nil, err
	}
	sa, err := pemKey(p.sa)
	if err != nil {
		return nil, err
	}
	files := map[string][]byte{"ca.crt": p.ca.CertPEM(), "proxy-ca.crt": p.proxy.CertPEM(), "sa.key": sa, "authentication.yaml": []byte(anonymous)}
	for name, c := range map[string]tls.Certificate{"server": p.server, "admin": p.admin, "proxy": front} {
		key, err := pemKey(c.PrivateKey.(*ecdsa.PrivateKey)) // identity makes no others
		if err != nil {
			return nil, err
		}
		files[name+".crt"], files[name+".key"] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), key
	}
	for name, b := range files {
		if err := os.WriteFile(p.path(name), b, 0o600); err != nil {
			return nil, err
		}
	}
	return p, nil
}

func pemKey(k *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalECPrivateKey(k)
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), err
}

func (p *pki) path(name string) string { return filepath.Join(p.dir, name) }

func (p *pki) kubeconfig(host, ns string) []byte {
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
current-context: c
clusters: [{name: c, cluster: {server: "https://%s", certificate-authority: %q}}]
users: [{name: c, user: {client-certificate: %q, client-key: %q}}]
contexts: [{name: c, context: {cluster: c, user: c, namespace: %q}}]
`, host, p.path("ca.crt"), p.path("admin.crt"), p.path("admin.key"), ns)
}

// client is a raw one: it packs nothing, follows nothing and keeps no idle connections beyond one.
func (p *pki) client(certs ...tls.Certificate) *http.Client {
	roots := x509.NewCertPool()
	roots.AddCert(p.ca.Cert)
	return &http.Client{
		Transport:     &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: certs}, ForceAttemptHTTP2: true, DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func newTarget(name, host, kubectl, dir string, p *pki) (*target, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &target{name: name, host: host, admin: p.client(p.admin), nobody: p.client(), kubectl: kubectl, dir: dir, pki: p}, nil
}
