package agent

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/record"
	cri "k8s.io/cri-api/pkg/apis"

	"skein.io/skein/node/desired"
)

// Config of an Agent.
type Config struct {
	// NodeName is the name of this node's Node object. Required.
	NodeName string
	// NodeIPs are this node's addresses, the primary one first. Required.
	NodeIPs []netip.Addr
	// Client of the API, as the node. Required.
	Client kubernetes.Interface
	// Desired is what should run here. Required; somebody else runs it.
	Desired *desired.Store
	// Runtime and Images are CRI. Required.
	Runtime cri.RuntimeService
	Images  cri.ImageManagerService
	// StateDir holds pods/ and logs/pods/. Required, absolute.
	StateDir string
	// CgroupRoot is the node's cgroup within each hierarchy; pods go to its child "pods". Default /skein.
	CgroupRoot string
	// ClusterDNS are the name servers of pods with dnsPolicy ClusterFirst. Default 10.96.0.10.
	ClusterDNS []string
	// ClusterDomain is the DNS domain of the cluster. Default cluster.local.
	ClusterDomain string
	// ResolvConf is the node's resolver configuration. Default /etc/resolv.conf.
	ResolvConf string
	// HostsFile is the node's hosts file, for pods in the node's network. Default /etc/hosts.
	HostsFile string
	// Recorder of events; default: none are recorded.
	Recorder record.EventRecorder
	// NetworkReady says whether pods can get a network, else why not; nil: they always can. Pods in the node's network do
	// not ask.
	NetworkReady func() (ok bool, reason string)
	// MaxPods bounds the pods of this node. Default 110.
	MaxPods int
	// Reserved is what of the node's capacity is kept from pods. Default: 100 Mi of memory.
	Reserved corev1.ResourceList
	// Zone is the node's topology zone; empty: no label.
	Zone string
	// Labels are further labels of the Node object.
	Labels map[string]string
	// FirstLabels are labels that the node begins with and that users may change: they are set when the Node object is made,
	// and again only when they differ from those of the start before.
	FirstLabels map[string]string
	// Port of the node's own HTTPS API, published in the Node object. Default 10250.
	Port int
	// ImageGCHigh is the use of the image disk in percent from which unused images are removed, until ImageGCLow is reached.
	// Defaults 85 and 80.
	ImageGCHigh, ImageGCLow int
	// LogMaxBytes and LogMaxFiles bound a container's log. Defaults 10 MiB and 5.
	LogMaxBytes int64
	LogMaxFiles int
	// Logger; default: discard.
	Logger *slog.Logger
}

func (c *Config) setDefaults() {
	def := func(s *string, v string) {
		if *s == "" {
			*s = v
		}
	}
	num := func(n *int, v int) {
		if *n == 0 {
			*n = v
		}
	}
	def(&c.CgroupRoot, "/skein")
	def(&c.ClusterDomain, "cluster.local")
	def(&c.ResolvConf, "/etc/resolv.conf")
	def(&c.HostsFile, "/etc/hosts")
	num(&c.MaxPods, 110)
	num(&c.Port, 10250)
	num(&c.ImageGCHigh, 85)
	num(&c.ImageGCLow, 80)
	num(&c.LogMaxFiles, 5)
	if c.LogMaxBytes == 0 {
		c.LogMaxBytes = 10 << 20
	}
	if len(c.ClusterDNS) == 0 {
		c.ClusterDNS = []string{"10.96.0.10"}
	}
	if c.Recorder == nil {
		c.Recorder = noRecorder{}
	}
	if c.NetworkReady == nil {
		c.NetworkReady = func() (bool, string) { return true, "" }
	}
	if c.Reserved == nil {
		c.Reserved = defaultReserved()
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate reports all faults at once.
func (c *Config) Validate() error {
	var errs []error
	need := func(ok bool, format string, a ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf("agent: "+format, a...))
		}
	}
	need(c.NodeName != "", "NodeName is missing")
	need(len(c.NodeIPs) > 0, "NodeIPs is empty")
	need(c.Client != nil, "Client is missing")
	need(c.Desired != nil, "Desired is missing")
	need(c.Runtime != nil, "Runtime is missing")
	need(c.Images != nil, "Images is missing")
	need(filepath.IsAbs(c.StateDir), "StateDir %q must be an absolute path", c.StateDir)
	need(filepath.IsAbs(c.CgroupRoot) && c.CgroupRoot != "/", "CgroupRoot %q must be an absolute path below /", c.CgroupRoot)
	need(c.MaxPods > 0, "MaxPods is %d, must be positive", c.MaxPods)
	need(c.Port > 0 && c.Port < 65536, "Port is %d, must be 1 to 65535", c.Port)
	need(0 < c.ImageGCLow && c.ImageGCLow <= c.ImageGCHigh && c.ImageGCHigh <= 100, "ImageGCLow %d and ImageGCHigh %d must be percents in this order", c.ImageGCLow, c.ImageGCHigh)
	need(c.LogMaxBytes > 0 && c.LogMaxFiles >= 2, "LogMaxBytes %d must be positive and LogMaxFiles %d at least 2", c.LogMaxBytes, c.LogMaxFiles)
	return errors.Join(errs...)
}

func (c *Config) hostIPs() []string {
	out := make([]string, len(c.NodeIPs))
	for i, ip := range c.NodeIPs {
		out[i] = ip.String()
	}
	return out
}
