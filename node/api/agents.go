package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"k8s.io/apimachinery/pkg/types"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apiserver/pkg/authentication/user"
	kubeletclient "k8s.io/kubernetes/pkg/kubelet/client"
)

const (
	// AgentClientUser is the common name of the certificates that API servers show to agents.
	AgentClientUser = "skein:apiserver"
	// agentIdle is how long an unused connection to an agent is kept.
	agentIdle = time.Minute
	// maxAgentTransports bounds the nodes whose connections are kept for reuse.
	maxAgentTransports = 256
)

// agentDialer reaches agents over TLS with certificates of the cluster CA on both sides. A node
// is known by the name in its certificate, not by its address, which may change.
type agentDialer struct {
	ca   *x509.CertPool
	cert func() (*tls.Certificate, error)

	mu         sync.Mutex // guards transports and order
	transports map[string]*http.Transport
	order      []string // least recently made first
}

func newAgentDialer(ca *x509.CertPool, cert func() (*tls.Certificate, error)) *agentDialer {
	return &agentDialer{ca: ca, cert: cert, transports: map[string]*http.Transport{}}
}

// wrap gives a getter that finds addresses as upstream's does and connects as this one does.
func (d *agentDialer) wrap(g kubeletclient.ConnectionInfoGetter) kubeletclient.ConnectionInfoGetter {
	return agentConnections{g, d}
}

type agentConnections struct {
	kubeletclient.ConnectionInfoGetter
	dialer *agentDialer
}

func (c agentConnections) GetConnectionInfo(ctx context.Context, name types.NodeName) (*kubeletclient.ConnectionInfo, error) {
	info, err := c.ConnectionInfoGetter.GetConnectionInfo(ctx, name)
	if err != nil {
		return nil, err
	}
	t := c.dialer.transport(string(name))
	// Logs may ask to skip the verification of the agent's certificate. There is no reason to.
	info.Transport, info.InsecureSkipTLSVerifyTransport = t, t
	return info, nil
}

func (d *agentDialer) transport(node string) *http.Transport {
	d.mu.Lock()
	defer d.mu.Unlock()
	if t, ok := d.transports[node]; ok {
		return t
	}
	if len(d.order) == maxAgentTransports {
		oldest := d.order[0]
		d.order = slices.Delete(d.order, 0, 1)
		d.transports[oldest].CloseIdleConnections()
		delete(d.transports, oldest)
	}
	t := utilnet.SetTransportDefaults(&http.Transport{TLSClientConfig: d.tls(node), IdleConnTimeout: agentIdle})
	d.transports[node], d.order = t, append(d.order, node)
	return t
}

// close drops idle connections.
func (d *agentDialer) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, t := range d.transports {
		t.CloseIdleConnections()
	}
}

func (d *agentDialer) tls(node string) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			c, err := d.cert()
			if err != nil {
				return nil, fmt.Errorf("certificate for the agent of node %s: %w", node, err)
			}
			return c, nil
		},
		// The standard check wants the address among the certificate's names; this one the node's.
		InsecureSkipVerify: true,
		VerifyConnection: func(s tls.ConnectionState) error {
			if err := verifyAgent(s.PeerCertificates, d.ca, node); err != nil {
				return fmt.Errorf("agent of node %s: %w", node, err)
			}
			return nil
		},
	}
}

// verifyAgent checks that chain belongs to the named node.
func verifyAgent(chain []*x509.Certificate, ca *x509.CertPool, node string) error {
	if len(chain) == 0 {
		return errors.New("no certificate")
	}
	between := x509.NewCertPool()
	for _, c := range chain[1:] {
		between.AddCert(c)
	}
	leaf := chain[0]
	if _, err := leaf.Verify(x509.VerifyOptions{Roots: ca, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
		return err
	}
	if want := "system:node:" + node; leaf.Subject.CommonName != want {
		return fmt.Errorf("certificate is for %q, not %q", leaf.Subject.CommonName, want)
	}
	if !slices.Contains(leaf.Subject.Organization, user.NodesGroup) {
		return fmt.Errorf("certificate of %q is not in group %s", leaf.Subject.CommonName, user.NodesGroup)
	}
	return nil
}
