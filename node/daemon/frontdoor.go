package daemon

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/transport"

	"skein.io/skein/gossip/health"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/gossip/membership"
	"skein.io/skein/node/api/front"
	"skein.io/skein/node/api/lastknown"
)

// prepareMinter sets up what makes the API's serving certificate, which the store's endpoints show too.
func (n *node) prepareMinter() {
	n.minter.ServiceIP, n.minter.Domain = n.id.Cluster.ServiceCIDR.Masked().Addr().Next(), n.id.Cluster.Domain
	n.minter.Members = func() (names []string, ips []netip.Addr) {
		for _, m := range n.gossip.Members() {
			names, ips = append(names, m.Name), append(ips, m.Addr)
		}
		return names, ips
	}
	n.minter.Issue = n.issueServer
}

// newFront listens on the API's port at the node's address and on the loopback.
func (n *node) newFront() (*front.Front, error) {
	var ls []net.Listener
	closeAll := func() {
		for _, l := range ls {
			l.Close()
		}
	}
	for _, a := range []netip.Addr{n.cfg.Address, netip.AddrFrom4([4]byte{127, 0, 0, 1})} {
		l, err := net.Listen("tcp", netip.AddrPortFrom(a, apiPort).String())
		if err != nil {
			closeAll()
			return nil, fmt.Errorf("API port: %w", err)
		}
		ls = append(ls, l)
	}
	n.thin = lastknown.New(lastknown.Config{NodeName: n.cfg.Name, ClientCA: n.id.Pool(), Source: n.desired, Age: n.age})
	f, err := front.New(front.Config{
		NodeName: n.cfg.Name, Listeners: ls,
		Local: func() http.Handler {
			if s, _, _ := n.api.get(); s != nil {
				return s.Handler()
			}
			return nil
		},
		Behind:   n.behind,
		Replicas: n.frontTargets, Changed: n.gossip.Subscribe,
		ServingCert: n.minter.Cert,
		NodeCert:    func() (*tls.Certificate, error) { c := n.id.Certificate(); return &c, nil },
		ClientCA:    n.id.Pool(),
		Reason:      n.storeReason,
		Fallback:    n.thin.Answer,
		Logger:      n.log.With("part", "front"),
	})
	if err != nil {
		closeAll()
		return nil, err
	}
	return f, nil
}

var errNoAuthority = errors.New("this node holds no replica of the store, so it cannot sign certificates")

// issueServer signs a serving certificate while this node holds the CA.
func (n *node) issueServer(cn string, dns []string, ips []netip.Addr, ttl time.Duration, now time.Time) (tls.Certificate, error) {
	s, keys, _ := n.api.get()
	if s == nil {
		return tls.Certificate{}, errNoAuthority
	}
	return keys.authority.IssueServer(cn, dns, ips, ttl, now)
}

// frontTargets are the other nodes that serve the API, or did, and are not known to be dead.
func (n *node) frontTargets() (out []front.Target) {
	for _, m := range n.gossip.Members() {
		if m.Self || m.Verdict == health.Dead || m.Verdict == health.Left || m.Tags[membership.TagRole] == "none" {
			continue
		}
		rtt, _ := n.gossip.RTT(m.Name)
		out = append(out, front.Target{
			Name: m.Name, Addr: netip.AddrPortFrom(m.Addr, tagPort(m, membership.TagAPI, apiPort)), RTT: rtt,
			Ready:  m.Verdict == health.Alive && m.Tags[membership.TagReady] != "",
			Behind: m.Tags[membership.TagReady] == servesBehind,
		})
	}
	return out
}

// storeReason tells a refused client what this node knows of the store.
func (n *node) storeReason() string {
	for _, p := range n.parts.list() {
		if !p.Healthy && (p.Name == "store/"+systemShard || p.Name == "api") {
			return p.Message
		}
	}
	return ""
}

// certFilesLook is how often client-go looks at the files of the certificate; its own five minutes are long for a node that comes back
// after its certificate has expired.
const certFilesLook = 10 * time.Second

// localClient makes the client by which the node's own parts speak to the API, as the node: through the local front, so
// it works wherever the replicas are.
func (n *node) localClient() (*rest.Config, *kubernetes.Clientset, error) {
	dir := filepath.Join(n.cfg.StateDir, "identity")
	transport.CertCallbackRefreshDuration = certFilesLook
	cfg := &rest.Config{
		Host: serverURL(netip.AddrFrom4([4]byte{127, 0, 0, 1})),
		TLSClientConfig: rest.TLSClientConfig{
			// A node without a replica that can reach none answers 503 with its own certificate, which has no such name but
			// is of the same CA and valid for the loopback address.
			CAData: identity.EncodeCert(n.id.CA),
			// Files, as client-go looks at them again when the certificate has been renewed.
			CertFile: identity.CertPath(dir), KeyFile: identity.KeyPath(dir),
		},
		ContentConfig: rest.ContentConfig{ContentType: "application/vnd.kubernetes.protobuf"},
		UserAgent:     "skein-agent", QPS: -1, DisableCompression: true,
	}
	c, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		return nil, nil, fmt.Errorf("client of the API: %w", err)
	}
	return cfg, c, nil
}
