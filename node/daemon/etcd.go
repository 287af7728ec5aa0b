package daemon

import (
	"crypto/tls"
	"fmt"
	"net/http"
	"net/netip"
	"strconv"
	"time"

	"skein.io/skein/consensus/host"
	"skein.io/skein/gossip/health"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/gossip/membership"
	"skein.io/skein/node/client"
)

// etcdPort is where the store's first shard is served as etcd, unless the configuration says otherwise; the others follow it. Not
// etcd's own port, which servers often use.
const etcdPort = 7950

// tagEtcd is the port of the first shard's etcd endpoint, if it is not etcdPort; 0 when the node serves none.
const tagEtcd = "et"

var loopbackAddr = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// etcdConfig serves the store as etcd to administrators: clients with a certificate of the cluster's CA for system:masters. Nodes'
// own certificates do not open it.
func (n *node) etcdConfig() host.EtcdConfig {
	c := host.EtcdConfig{Endpoint: n.etcdEndpoint}
	if n.cfg.EtcdPort < 0 {
		return c
	}
	c.Addresses, c.Port = []string{n.cfg.Address.String(), loopbackAddr.String()}, n.cfg.EtcdPort
	c.TLS = &tls.Config{
		MinVersion: tls.VersionTLS12, // etcd's tools of older releases
		ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: n.id.Pool(),
		GetCertificate: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if c, err := n.minter.Cert(hello); err == nil {
				return c, nil
			}
			// The store can be looked at also when the API does not work: by the node's name or over the loopback.
			c := n.id.Certificate()
			return &c, nil
		},
	}
	return c
}

// etcdEndpoint is where a node serves its replicas of the store as etcd.
func (n *node) etcdEndpoint(hostID string) (addr string, port int, ok bool) {
	if m, known := n.byHostID(hostID); known {
		addr, port, ok = etcdEndpointOf(m)
	}
	return addr, port, ok
}

func etcdEndpointOf(m membership.Member) (addr string, port int, ok bool) {
	port = etcdPort
	if v, set := m.Tags[tagEtcd]; set {
		p, err := strconv.ParseUint(v, 10, 16)
		if err != nil || p == 0 {
			return "", 0, false
		}
		port = int(p)
	}
	return m.Addr.String(), port, true
}

// etcdAccess gives an administrator what etcd's tools need.
func (n *node) etcdAccess(r *http.Request) (any, error) {
	if err := mayReadAll(r.Context(), "the store's credentials open", "get them"); err != nil {
		return nil, err
	}
	srv, keys, _ := n.api.get()
	if srv == nil {
		return nil, n.notHere("issue credentials for the store")
	}
	a := client.EtcdAccess{Endpoints: map[string][]string{}, CA: identity.EncodeCert(n.id.CA)}
	for i, s := range n.host.Shards().Shards() {
		for _, m := range n.gossip.Members() {
			addr, port, ok := etcdEndpointOf(m)
			if ok && m.Verdict == health.Alive && m.Tags[membership.TagRole] != string(host.RoleNone) {
				a.Endpoints[s.Name] = append(a.Endpoints[s.Name], fmt.Sprintf("https://%s:%d", addr, port+i))
			}
		}
		if len(a.Endpoints[s.Name]) == 0 {
			return nil, refusal(http.StatusConflict, "no node serves the store as etcd: all that hold a replica were started with --etcd-port=-1")
		}
	}
	var err error
	a.Cert, a.Key, err = adminPEM(keys.authority, time.Now())
	return a, err
}
