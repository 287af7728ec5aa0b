package daemon

import (
	"crypto/ecdsa"
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/api"
)

const (
	// agentClientTTL is the life of the certificate that the API shows to agents; it exists in memory only.
	agentClientTTL = 30 * 24 * time.Hour
	// adminTTL is the life of the certificate in a kubeconfig that `skein kubeconfig` prints.
	adminTTL = 365 * 24 * time.Hour
)

// minted is a certificate in memory that is made anew at half of its life.
type minted struct {
	mu   sync.Mutex // guards the rest
	cert *tls.Certificate
	till time.Time
}

// agentClientCert gives the certificate that the API on a replica shows to agents.
func (m *minted) agentClientCert(a *identity.Authority, now time.Time) (*tls.Certificate, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.cert != nil && now.Before(m.till) {
		return m.cert, nil
	}
	c, err := a.IssueClient(api.AgentClientUser, nil, agentClientTTL, now)
	if err != nil {
		return nil, err
	}
	m.cert, m.till = &c, now.Add(agentClientTTL/2)
	return m.cert, nil
}

// kubeconfig makes an administrator's credentials for the API at server.
func kubeconfig(a *identity.Authority, server string, now time.Time) ([]byte, error) {
	cert, key, err := adminPEM(a, now)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	const name = "skein"
	c := clientcmdapi.NewConfig()
	c.Clusters[name] = &clientcmdapi.Cluster{Server: server, CertificateAuthorityData: a.CertPEM()}
	c.AuthInfos[name] = &clientcmdapi.AuthInfo{
		ClientCertificateData: cert,
		ClientKeyData:         key,
	}
	c.Contexts[name] = &clientcmdapi.Context{Cluster: name, AuthInfo: name}
	c.CurrentContext = name
	return clientcmd.Write(*c)
}

// adminPEM makes an administrator's certificate and its key.
func adminPEM(a *identity.Authority, now time.Time) (cert, key []byte, err error) {
	c, err := a.IssueClient("skein:admin", []string{"system:masters"}, adminTTL, now)
	if err != nil {
		return nil, nil, err
	}
	k, ok := c.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, nil, fmt.Errorf("a %T is no ECDSA key", c.PrivateKey)
	}
	key, err = identity.EncodeKey(k)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), key, err
}

// serverURL is how clients call the API of a node.
func serverURL(addr netip.Addr) string {
	return "https://" + netip.AddrPortFrom(addr, apiPort).String()
}
