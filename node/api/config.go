package api

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/api/access"
	"skein.io/skein/node/api/encrypt"
	"skein.io/skein/node/api/kinds"
	"skein.io/skein/node/api/store"
)

// How long a connection to a Service or a pod may take, and how often it is probed; those of upstream's default transport.
const (
	dialTimeout   = 30 * time.Second
	dialKeepAlive = 30 * time.Second
)

// Config says what a server serves and where it finds things. Fields without a default are required.
type Config struct {
	// NodeName is this node's name.
	NodeName string
	// AdvertiseIP is the node's own address, which clients are told. Not a loopback address: upstream
	// refuses those as endpoints.
	AdvertiseIP netip.Addr
	// AdvertisePort is the port of the API on every node. Default 6443.
	AdvertisePort uint16

	// Store gives the in-process client of the shard that holds the keys with a prefix. It must give
	// the same client each time, and never nil.
	Store store.Clients
	// StorePrefix begins the keys of all objects. Default "/registry".
	StorePrefix string

	// Keys is the cluster's key ring: Secrets are sealed with it in the store.
	Keys encrypt.Keys
	// Sealed are further resources that are sealed in the store. What is stored already is read either
	// way; Reseal writes it as this says. Default none.
	Sealed []schema.GroupResource

	// ClientCA is the cluster CA in PEM (one or more certificates). Client certificates that it
	// signed are users (common name) in groups (organizations); agents must present one of its
	// certificates too.
	ClientCA []byte
	// SAKey signs ServiceAccount tokens; the same on all replicas.
	SAKey *ecdsa.PrivateKey
	// OldSAKeys also verify ServiceAccount tokens: keys that were SAKey before. Default none.
	OldSAKeys []crypto.PublicKey
	// CAKey is the key of ClientCA's first certificate. RunLeaderHooks signs approved certificate requests with it. Default: they are not signed.
	CAKey crypto.Signer
	// Issuer is the issuer and the audience of ServiceAccount tokens.
	// Default access.DefaultIssuer.
	Issuer string
	// Access are the files that say more about who may use the API, and about the audit log. Default: none.
	Access access.Config

	// FrontProxyCA signs the certificate by which aggregated API servers know this one; nothing else. The same on all replicas
	// (identity.Authority.Derive).
	FrontProxyCA *identity.Authority

	// KubeletClientCert gives the certificate that this server shows to agents (logs, exec and the
	// like), asked at each connection. Its user should be AgentClientUser, which bootstrap gives
	// what it needs.
	KubeletClientCert func() (*tls.Certificate, error)

	// RuntimeConfig says which versions of the API are served beside or instead of the stable ones, as kube-apiserver's flag of that name:
	// "GROUP/VERSION", "GROUP/VERSION/RESOURCE", "api/beta" or "api/all" with "true" or "false". The same on all replicas. Default: none.
	RuntimeConfig map[string]string

	// ServiceCIDR is the range of Service addresses. Default 10.96.0.0/16.
	ServiceCIDR netip.Prefix
	// SecondServiceCIDR, of the other family, makes Services of both possible. Optional.
	SecondServiceCIDR netip.Prefix
	// DNSServiceIP is the address of Service kube-system/kube-dns. Default: the tenth of ServiceCIDR.
	DNSServiceIP netip.Addr
	// NodePorts is the range of node ports. Default 30000-32767.
	NodePorts utilnet.PortRange

	// EvictionGrace is how long a pod stays bound to a node that is not ready or unreachable, unless
	// the pod says otherwise. Whole seconds. Default 10 s.
	EvictionGrace time.Duration
	// EventTTL is how long an Event is kept. Default 1 h.
	EventTTL time.Duration

	// LastKnown lets reads be answered from this node's copy of a store that it has heard no leader of for long; see package
	// lastknown. Default: they are refused.
	LastKnown store.LastKnown

	// Replicas gives the addresses of the API on all nodes that serve it now. RunLeaderHooks makes
	// them the endpoints of Service default/kubernetes.
	Replicas func() []netip.AddrPort

	// Dial opens connections to Services (by their addresses) and to pods: for webhooks, aggregated API servers and the
	// proxies of pods and Services. Default: a net.Dialer, for processes whose connections the datapath leads to endpoints.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)

	// NodeLabels may refuse a change of a Node's labels that is not the node's own; its error is told
	// to the user. Default: all are allowed.
	NodeLabels func(ctx context.Context, node string, before, after map[string]string) error

	// Why explains the placement of a pod: what it returns is sent as JSON. Its errors are those of the API, or client.Error of package node/client. Default: nobody can ask.
	Why func(ctx context.Context, namespace, pod string) (any, error)

	// Extra are handlers of paths outside the Kubernetes API, behind authentication and
	// authorization (as a nonResourceURL). A path that ends in a slash stands for all below it.
	Extra map[string]http.Handler
	// LongRunning are paths of Extra whose requests may take any time.
	LongRunning []string
	// Public are the same without authentication: each looks after itself.
	Public map[string]http.Handler

	// Limits bound what the server does at once. Default: see there.
	Limits Limits
	// RequestLog is the level of the line that each request is logged with. It costs nothing below Logger's level. Default debug.
	RequestLog *slog.Level

	// Logger gets what this package has to say. Upstream's parts log through klog. Default: nothing.
	Logger *slog.Logger
}

func (c *Config) setDefaults() {
	if c.AdvertisePort == 0 {
		c.AdvertisePort = 6443
	}
	if c.StorePrefix == "" {
		c.StorePrefix = "/registry"
	}
	if c.Issuer == "" {
		c.Issuer = access.DefaultIssuer
	}
	if !c.ServiceCIDR.IsValid() {
		c.ServiceCIDR = netip.MustParsePrefix("10.96.0.0/16")
	}
	if !c.DNSServiceIP.IsValid() {
		c.DNSServiceIP = nthAddr(c.ServiceCIDR, 10)
	}
	if c.NodePorts.Size == 0 {
		c.NodePorts = utilnet.PortRange{Base: 30000, Size: 2768}
	}
	if c.EvictionGrace == 0 {
		c.EvictionGrace = 10 * time.Second
	}
	if c.EventTTL == 0 {
		c.EventTTL = time.Hour
	}
	if c.Dial == nil {
		c.Dial = (&net.Dialer{Timeout: dialTimeout, KeepAlive: dialKeepAlive}).DialContext
	}
	c.Limits.setDefaults()
	if c.RequestLog == nil {
		c.RequestLog = ptr(slog.LevelDebug)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate reports every fault of a configuration whose defaults are set.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.NodeName == "" {
		bad("NodeName is empty")
	}
	if a := c.AdvertiseIP; !a.IsValid() || a.IsLoopback() || a.IsUnspecified() {
		bad("AdvertiseIP %s is not an address that others can reach", a)
	}
	if c.Store == nil {
		bad("Store is nil")
	}
	if !strings.HasPrefix(c.StorePrefix, "/") {
		bad("StorePrefix %q does not begin with a slash", c.StorePrefix)
	}
	if c.Keys == nil {
		bad("Keys is nil")
	}
	if !x509.NewCertPool().AppendCertsFromPEM(c.ClientCA) {
		bad("ClientCA contains no certificate in PEM")
	}
	if c.SAKey == nil {
		bad("SAKey is nil")
	}
	if u, err := url.Parse(c.Issuer); err != nil || u.Scheme != "https" || u.Host == "" {
		bad("Issuer %q is not an https URL", c.Issuer)
	}
	if c.FrontProxyCA == nil {
		bad("FrontProxyCA is nil")
	}
	if _, err := kinds.Resources(c.RuntimeConfig); err != nil {
		bad("RuntimeConfig: %v", err)
	}
	for _, err := range []error{c.Access.Validate(), c.Limits.Validate()} {
		if err != nil {
			errs = append(errs, err)
		}
	}
	if c.KubeletClientCert == nil {
		bad("KubeletClientCert is nil")
	}
	if c.ServiceCIDR != c.ServiceCIDR.Masked() || c.ServiceCIDR.Addr().BitLen()-c.ServiceCIDR.Bits() < 4 {
		bad("ServiceCIDR %s must have no host bits and at least 16 addresses", c.ServiceCIDR)
	}
	if s := c.SecondServiceCIDR; s.IsValid() && (s != s.Masked() || s.Addr().Is4() == c.ServiceCIDR.Addr().Is4() || s.Addr().BitLen()-s.Bits() < 4 || s.Addr().BitLen()-s.Bits() > 64) {
		bad("SecondServiceCIDR %s must be of another family than ServiceCIDR %s, with no host bits, at least 16 addresses and at most 2^64", s, c.ServiceCIDR)
	}
	if !c.ServiceCIDR.Contains(c.DNSServiceIP) || c.DNSServiceIP == nthAddr(c.ServiceCIDR, 1) {
		bad("DNSServiceIP %s must be in ServiceCIDR %s and not its first", c.DNSServiceIP, c.ServiceCIDR)
	}
	if c.NodePorts.Base < 1 || c.NodePorts.Base+c.NodePorts.Size > 65536 {
		bad("NodePorts %s is not a range of ports", c.NodePorts.String())
	}
	if c.EvictionGrace < 0 || c.EvictionGrace%time.Second != 0 {
		bad("EvictionGrace %s is not a whole number of seconds", c.EvictionGrace)
	}
	if c.EventTTL < time.Second {
		bad("EventTTL %s is below a second", c.EventTTL)
	}
	if c.Replicas == nil {
		bad("Replicas is nil")
	}
	for kind, m := range map[string]map[string]http.Handler{"Extra": c.Extra, "Public": c.Public} {
		for path, h := range m {
			if !strings.HasPrefix(path, "/") || path == "/" || h == nil {
				bad("%s[%q] must be a path below / and have a handler", kind, path)
			}
			if slices.ContainsFunc([]string{"/api", "/apis", "/openapi"}, func(own string) bool { return path == own || strings.HasPrefix(path, own+"/") }) {
				bad("%s[%q] is in the Kubernetes API", kind, path)
			}
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("api: %w", errors.Join(errs...))
	}
	return nil
}

// nthAddr gives the address n after the first of p.
func nthAddr(p netip.Prefix, n int) netip.Addr {
	a := p.Masked().Addr()
	for range n {
		a = a.Next()
	}
	return a
}
