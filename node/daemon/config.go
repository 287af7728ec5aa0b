package daemon

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"

	"skein.io/skein/consensus/shard"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/api"
	"skein.io/skein/node/api/access"
	"skein.io/skein/node/api/schedconfig"
	"skein.io/skein/node/cri"
)

// Config is what an operator may say about a node. The zero value of a field means its default.
type Config struct {
	// Name of the node, unique in the cluster: an RFC 1123 label. Default: the host name, lower-cased.
	Name string
	// StateDir keeps everything that survives a restart. Default /var/lib/skein.
	StateDir string
	// Address is the IPv4 address at which the other nodes reach this one. No default here: the command line finds one.
	Address netip.Addr
	// Zone is the failure zone, shown as topology.kubernetes.io/zone; voters and pods spread over zones. Default: none.
	Zone string
	// Labels are put onto the Node object.
	Labels map[string]string
	// Voter says whether the node may hold a vote: auto, never or prefer. Default auto. The node begins with it as its label
	// skein.io/voter, which counts from then on.
	Voter string
	// ReplaceAfter is how long a voter may be dead before a spare takes its place; the leader's setting counts. Default 30 s.
	ReplaceAfter time.Duration
	// Profile tunes the failure detector: lan (a dead node is known in 2-3 s) or edge (slow links, about 15 s); a joiner takes the
	// cluster's. Default lan.
	Profile string
	// CRIEndpoint is the socket of a foreign CRI runtime. Default: the embedded containerd.
	CRIEndpoint string
	// CNIDir is where that runtime reads network configurations. Default: what it says, or /etc/cni/net.d.
	CNIDir string
	// CNIBinDir is where it looks for network plugins. Default: the first directory that it says, or /opt/cni/bin.
	CNIBinDir string
	// Registries are those that need more than https at their own name. Default: none.
	Registries cri.Registries
	// CgroupRoot is the cgroup below which the node and its pods live, in every hierarchy. Default /skein.
	CgroupRoot string
	// ServiceCgroup is the cgroup (v2 path) whose processes reach Services. Default: all of the machine's; but with a CgroupRoot
	// of one's own, as when several nodes share a machine, that.
	ServiceCgroup string
	// Uplink is the interface towards the other nodes. Default: the one that has Address.
	Uplink string
	// PodCIDR holds the pods' addresses of the whole cluster; a joiner takes the cluster's. Default 10.244.0.0/16.
	PodCIDR netip.Prefix
	// ServiceCIDR holds the Services' addresses; a joiner takes the cluster's. Default 10.96.0.0/16.
	ServiceCIDR netip.Prefix
	// ServiceCIDR6 holds IPv6 addresses for Services that ask for one. A cluster without takes it when its nodes are started with
	// it; a joiner takes the cluster's. Pods have IPv4 addresses alone, so nothing is reached at these yet. Default none.
	ServiceCIDR6 netip.Prefix
	// ClusterDomain is the DNS domain; a joiner takes the cluster's. Default cluster.local.
	ClusterDomain string
	// RuntimeConfig says which versions of the API this node serves beside the stable ones; see api.Config. Default none.
	RuntimeConfig map[string]string
	// Sealed are resources that this node, when it serves the API, seals in the store beside Secrets. Default none.
	Sealed []schema.GroupResource
	// CertTTL is the life of the nodes' certificates that this node signs. Default a year; tests want less.
	CertTTL time.Duration
	// KeySettle is how long a rotation of the keys waits for requests from before it to end. Default keys.Settle; tests want less.
	KeySettle time.Duration
	// Backup says when this node, while it leads, backs the cluster up. Default: never.
	Backup BackupSchedule
	// EvictionGrace is how long pods stay bound to a dead node. Default 10 s.
	EvictionGrace time.Duration
	// EtcdPort is where the first shard of the store is served as etcd, to administrators, while this node holds a replica; the other
	// shards take the ports behind it. Default 7950; negative: the store is not served.
	EtcdPort int
	// StoreQuota bounds what each shard of the store may have in use, in MiB; it should be the same on all nodes. Default 2048,
	// as etcd; negative: no bound.
	StoreQuota int64
	// Access are the files that say who may use the API, what admission does and what is audited, on this node while it serves the API. All
	// nodes should have the same. Default: none.
	Access access.Config
	// SchedulerConfig is a KubeSchedulerConfiguration file: the profiles by which this node, while it leads, places pods. All nodes should
	// have the same. Default: none, which is upstream's default profile.
	SchedulerConfig string
	scheduling      *schedconfig.Config // what Validate read there; nil for none
	// Limits bound what the API of this node does at once. Default: see there.
	Limits api.Limits
	// RequestLog is the level of the line that each request to this node's API is logged with; lines below the Logger's level cost
	// nothing. Default debug.
	RequestLog *slog.Level
	// Helper is the executable that is the runc shim and the CNI plugin. Default: skein-helper beside this executable.
	Helper string
	// Out gets what a person should read (the join line). Default: nowhere.
	Out io.Writer
	// Logger gets the log. Default: discarded.
	Logger *slog.Logger
}

// Intent is how the node was started.
type Intent struct {
	// Join lists members to join through; empty means: make a cluster, or resume the one on disk.
	Join []string
	// Token is the join token's text.
	Token string
}

const defaultCgroupRoot = "/skein"

func (c *Config) setDefaults() {
	def := func(p *string, v string) {
		if *p == "" {
			*p = v
		}
	}
	def(&c.StateDir, "/var/lib/skein")
	def(&c.Voter, "auto")
	def(&c.Profile, "lan")
	def(&c.CgroupRoot, defaultCgroupRoot)
	def(&c.ClusterDomain, "cluster.local")
	if c.ServiceCgroup == "" {
		c.ServiceCgroup = "/"
		if c.CgroupRoot != defaultCgroupRoot {
			c.ServiceCgroup = c.CgroupRoot
		}
	}
	if !c.PodCIDR.IsValid() {
		c.PodCIDR = netip.MustParsePrefix("10.244.0.0/16")
	}
	if !c.ServiceCIDR.IsValid() {
		c.ServiceCIDR = netip.MustParsePrefix("10.96.0.0/16")
	}
	c.Backup.setDefaults()
	if c.EvictionGrace == 0 {
		c.EvictionGrace = 10 * time.Second
	}
	if c.EtcdPort == 0 {
		c.EtcdPort = etcdPort
	}
	if c.StoreQuota == 0 {
		c.StoreQuota = 2048
	}
	if c.ReplaceAfter == 0 {
		c.ReplaceAfter = 30 * time.Second
	}
	if c.Helper == "" {
		if self, err := os.Executable(); err == nil {
			c.Helper = filepath.Join(filepath.Dir(self), "skein-helper")
		}
	}
	if c.Out == nil {
		c.Out = io.Discard
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate reports every fault at once.
func (c *Config) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf(format, a...)) }
	if err := identity.ValidateName(c.Name); err != nil {
		errs = append(errs, err)
	}
	if !c.Address.Is4() || c.Address.IsUnspecified() || c.Address.IsLoopback() || c.Address.IsMulticast() {
		bad("address %q: want an IPv4 address of this machine that other nodes can reach", c.Address)
	}
	if !filepath.IsAbs(c.StateDir) {
		bad("state directory %q: want an absolute path", c.StateDir)
	}
	if last := c.EtcdPort + len(shard.Default().Shards()) - 1; last > 65535 {
		bad("etcd port %d: the last shard's would be %d, above 65535", c.EtcdPort, last)
	}
	if c.StoreQuota >= 0 && c.StoreQuota < 16 {
		bad("store quota %d MiB: want 16 at least, or a negative number for none", c.StoreQuota)
	}
	if !filepath.IsAbs(c.CgroupRoot) || filepath.Clean(c.CgroupRoot) == "/" {
		bad("cgroup root %q: want a path below the root cgroup, as /skein", c.CgroupRoot)
	}
	if c.CRIEndpoint != "" {
		if err := cri.CheckEndpoint(c.CRIEndpoint); err != nil {
			errs = append(errs, err)
		}
	}
	if err := c.Registries.Validate(); err != nil {
		errs = append(errs, err)
	}
	if r := c.Registries; c.CRIEndpoint != "" && (len(r.Insecure) > 0 || len(r.Mirrors) > 0 || r.Dir != "") {
		bad("registries are settings of the embedded containerd: with another runtime (--cri-endpoint) they are that one's")
	}
	for _, d := range []struct{ what, path string }{{"CNI directory", c.CNIDir}, {"directory of CNI plugins", c.CNIBinDir}} {
		if d.path != "" && !filepath.IsAbs(d.path) {
			bad("%s %q: want an absolute path", d.what, d.path)
		}
		if d.path != "" && c.CRIEndpoint == "" {
			bad("%s %s: the embedded containerd has its own; it is a setting for another runtime (--cri-endpoint)", d.what, d.path)
		}
	}
	switch c.Voter {
	case "auto", "never", "prefer":
	default:
		bad("voter %q: want auto, never or prefer", c.Voter)
	}
	switch c.Profile {
	case "lan", "edge":
	default:
		bad("profile %q: want lan or edge", c.Profile)
	}
	for _, n := range []struct {
		what string
		p    netip.Prefix
		min  int
		max  int
	}{{"pod CIDR", c.PodCIDR, 8, 23}, {"service CIDR", c.ServiceCIDR, 12, 24}} {
		if !n.p.Addr().Is4() || n.p.Bits() < n.min || n.p.Bits() > n.max || n.p != n.p.Masked() {
			bad("%s %s: want an IPv4 network of /%d to /%d", n.what, n.p, n.min, n.max)
		}
	}
	if p := c.ServiceCIDR6; p.IsValid() && (!p.Addr().Is6() || p.Addr().Is4In6() || p != p.Masked() || p.Bits() < 64 || p.Bits() > 120) {
		bad("second service CIDR %s: want an IPv6 network of /64 to /120", p)
	}
	if c.PodCIDR.Overlaps(c.ServiceCIDR) {
		bad("pod CIDR %s and service CIDR %s overlap", c.PodCIDR, c.ServiceCIDR)
	}
	for _, p := range []netip.Prefix{c.PodCIDR, c.ServiceCIDR} {
		if p.Contains(c.Address) {
			bad("address %s lies inside %s, which the cluster gives to pods or Services: choose another network with --pod-cidr or --service-cidr", c.Address, p)
		}
	}
	errs = append(errs, c.Backup.validate()...)
	if c.SchedulerConfig != "" {
		var err error
		if c.scheduling, err = schedconfig.Load(c.SchedulerConfig); err != nil {
			errs = append(errs, err)
		}
	}
	for _, err := range []error{c.Access.Validate(), c.Limits.Validate()} {
		if err != nil {
			errs = append(errs, err)
		}
	}
	if c.EvictionGrace < 0 {
		bad("eviction grace %s: want zero or more", c.EvictionGrace)
	}
	if c.ReplaceAfter < minReplaceAfter {
		bad("replace a dead voter after %s: want %s or more: a shorter absence is no death", c.ReplaceAfter, minReplaceAfter)
	}
	return errors.Join(errs...)
}

// minReplaceAfter is about what gossip takes to be sure of a death.
const minReplaceAfter = 3 * time.Second
