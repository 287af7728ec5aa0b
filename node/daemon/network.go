package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"

	"skein.io/skein/datapath/loader"
	"skein.io/skein/datapath/podnet"
	"skein.io/skein/datapath/service"
	"skein.io/skein/gossip/health"
	"skein.io/skein/node/cri"
	"skein.io/skein/node/desired"
)

const (
	// networkRetry is the wait after something could not be applied.
	networkRetry = 2 * time.Second
	// networkResync is how often everything is compared though nothing changed: somebody else may have changed the kernel's tables.
	networkResync = time.Minute
	// restAfterPeers is for how many times as long as it took to change the routes they are then left alone: in a cluster that grows fast that
	// bounds what is spent on them, in a small one it is milliseconds.
	restAfterPeers = 5
)

// network keeps the datapath as the desired state and gossip say. One goroutine, Run's, does all the work.
type network struct {
	n      *node
	log    *slog.Logger
	loader *loader.Loader

	mu    sync.Mutex // guards ready
	ready error      // nil once pods can get a network

	// All below is Run's alone.
	peers map[string]podnet.Peer // of the other nodes, by their names
	ports []service.Service      // this node's ports that lead to its pods
	why   string                 // gossip's last decision, as it was logged
	pods  *podnet.Net            // nil until this node has a pod CIDR
	cidr  netip.Prefix
}

var errNoPodCIDR = errors.New("the leader has not assigned a pod CIDR to this node yet")

// newNetwork attaches the eBPF programs; what they did for an earlier daemon goes on.
func (n *node) newNetwork() (*network, error) {
	mount, err := loader.Cgroup2Mount()
	if err != nil {
		return nil, err
	}
	uplink := n.cfg.Uplink
	if uplink == "" {
		if uplink, err = deviceOf(n.cfg.Address); err != nil {
			return nil, err
		}
	}
	log := n.log.With("part", "network")
	l, err := loader.Open(loader.Config{
		Dir: filepath.Join(n.cfg.StateDir, "bpf"), CgroupPath: filepath.Join(mount, n.cfg.ServiceCgroup), Uplink: uplink,
		Node: service.Node{Name: n.cfg.Name, Addrs: []netip.Addr{n.cfg.Address}}, Logger: log,
	})
	if err != nil {
		return nil, err
	}
	return &network{n: n, log: log, loader: l, ready: errNoPodCIDR, peers: map[string]podnet.Peer{}}, nil
}

// Close leaves programs and tables at work.
func (w *network) Close() error { return w.loader.Close() }

// Ready tells whether pods can get a network, else why not.
func (w *network) Ready() (bool, string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.ready != nil {
		return false, w.ready.Error()
	}
	return true, ""
}

func (w *network) setReady(err error) {
	w.mu.Lock()
	w.ready = err
	w.mu.Unlock()
}

// Run applies changes until ctx ends. In a large cluster nodes change all the time, and most of it is nothing to routes: what a change of
// nodes costs is in proportion to the nodes that changed, and when routes have to change, what comes while that is done, and for some
// time after, is done together.
func (w *network) Run(ctx context.Context) error {
	objects, end := w.n.desired.Subscribe(desired.Services, desired.EndpointSlices)
	defer end()
	pods, endPods := w.n.desired.Subscribe(desired.Records)
	defer endPods()
	nodes := w.n.desired.Follow(desired.Nodes)
	defer nodes.End()
	members, endMembers := w.n.gossip.Subscribe()
	defer endMembers()
	w.learn(nodes.Take())
	w.learnPorts()
	var serviceText, peerText string
	var rest <-chan time.Time // set: routes were changed a moment ago
	all := time.NewTimer(networkResync)
	defer all.Stop()
	var serr, perr error // what became of each the last time
	for services, peers := true, true; ; {
		if (services || peers) && (serr != nil || perr != nil) {
			services, peers = true, true
		}
		if services {
			serviceText, serr = w.applyServices()
		}
		if peers {
			began := time.Now()
			peerText, perr = w.applyPeers()
			rest = time.After(restAfterPeers * time.Since(began))
		}
		if err := errors.Join(serr, perr); services || peers {
			w.n.parts.set("network", err, serviceText+peerText)
			if err != nil {
				all.Reset(networkRetry)
				w.log.Warn("the network is not as it should be; trying again", "err", err)
			} else if services && peers {
				all.Reset(networkResync)
			}
		}
		services, peers = false, false
		news := nodes.C
		if rest != nil {
			news = nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-objects:
			services = true
		case <-pods:
			services = w.learnPorts()
		case <-members:
			services = true
		case <-news:
			peers = w.learn(nodes.Take())
		case <-rest:
			rest = nil
		case <-all.C:
			services, peers = true, true
		}
	}
}

// learn takes note of nodes that changed, and reports whether that is anything to the routes.
func (w *network) learn(names []string) (changed bool) {
	for _, name := range names {
		o := w.n.desired.Node(name)
		if name == w.n.cfg.Name {
			cidr, ok := podCIDR(o)
			changed = changed || !ok || w.pods == nil || cidr != w.cidr
			continue
		}
		now, has := peerOf(o)
		if old, had := w.peers[name]; had == has && old == now {
			continue
		}
		changed = true
		if has {
			w.peers[name] = now
		} else {
			delete(w.peers, name)
		}
	}
	return changed
}

// applyServices balances what the desired state lists, without the endpoints on nodes that gossip holds for dead.
func (w *network) applyServices() (string, error) {
	// What an earlier life of this node heard is enough: after a reboot without the API the tables are empty.
	if !w.n.desired.Known(desired.Services, desired.EndpointSlices) {
		return "waiting for the first list of Services", nil // what the tables hold stays
	}
	all := translate(w.n.desired.Services(), w.n.desired.EndpointSlices(),
		local{api: netip.AddrPortFrom(w.n.cfg.Address, apiPort), dns: dnsAddr})
	all = append(all, w.ports...)
	decision := health.PanicThreshold{}.Decide(w.n.cfg.Name, w.n.gossip.Verdicts())
	live, withheld := withhold(all, decision)
	if why := decision.String(); why != w.why {
		w.why = why
		w.log.Info("endpoints follow gossip", "why", why, "withheld", withheld)
	}
	if err := w.loader.ApplyServices(live); err != nil {
		return "", err
	}
	text := fmt.Sprintf("%d Service ports, %d endpoints withheld", len(live), withheld)
	if faults := w.loader.Faults(); faults != nil {
		text += "; left out: " + faults.Error()
	}
	return text, nil
}

// withhold returns the Services without the back ends that gossip's decision takes out, and how many these are. The argument is not
// modified; Services that change are copied.
func withhold(services []service.Service, d health.Decision) (live []service.Service, withheld int) {
	live = slices.Clone(services)
	for i := range live {
		nodes := make([]string, len(live[i].Backends))
		for j, b := range live[i].Backends {
			nodes[j] = b.Node
		}
		keep := d.Keep(nodes)
		if !slices.Contains(keep, false) {
			continue
		}
		backends := live[i].Backends
		live[i].Backends = nil
		for j, b := range backends {
			if keep[j] {
				live[i].Backends = append(live[i].Backends, b)
			}
		}
		withheld += len(backends) - len(live[i].Backends)
	}
	return live, withheld
}

// applyPeers keeps the routes to the pods of the other nodes, and this node's CNI configuration.
func (w *network) applyPeers() (faults string, err error) {
	own := w.n.desired.Node(w.n.cfg.Name)
	cidr, ok := podCIDR(own)
	if !ok {
		w.setReady(errNoPodCIDR)
		return "", nil
	}
	if w.pods == nil || cidr != w.cidr {
		p, err := podnet.New(podnet.Config{NodeIP: w.n.cfg.Address, PodCIDR: cidr, ClusterCIDR: w.n.id.Cluster.PodCIDR, DNS: dnsAddr.Addr(), Logger: w.log})
		if err == nil {
			err = p.Setup()
		}
		if err != nil {
			w.setReady(err)
			return "", err
		}
		w.pods, w.cidr = p, cidr
	}
	state, err := w.pods.Apply(slices.SortedFunc(maps.Values(w.peers), func(a, b podnet.Peer) int { return a.IP.Compare(b.IP) }))
	if err != nil {
		w.setReady(err)
		return "", err
	}
	if state.Faults != nil {
		faults = "; peers left out: " + state.Faults.Error()
	}
	net := loader.Network{PodCIDR: cidr, NoMasquerade: []netip.Prefix{w.n.id.Cluster.PodCIDR}}
	for _, d := range state.Direct {
		net.NoMasquerade = append(net.NoMasquerade, netip.PrefixFrom(d, 32))
	}
	if state.Overlay.IsValid() {
		net.Devices = append(net.Devices, loader.Device{Name: podnet.OverlayDevice, Addr: state.Overlay})
	}
	err = w.loader.ApplyNetwork(net)
	if err == nil {
		err = w.writeCNI(cidr, state.MTU)
	}
	w.setReady(err)
	return faults, err
}

// networkName is that of the pod network in CNI's terms. Two nodes on one machine must not meet in libcni's cache, whose path is
// fixed: the name carries the node.
func networkName(node string) string { return "skein-" + node }

// writeCNI tells the runtime how pods get their links.
func (w *network) writeCNI(cidr netip.Prefix, mtu int) error {
	data := filepath.Join(w.n.cfg.StateDir, "cni")
	if err := os.MkdirAll(data, 0o711); err != nil {
		return fmt.Errorf("CNI addresses: %w", err)
	}
	conf, err := podnet.Conflist(networkName(w.n.cfg.Name), cri.HelperName, data, cidr, w.n.cfg.Address, mtu)
	if err != nil {
		return fmt.Errorf("CNI configuration: %w", err)
	}
	return w.n.runtime.installCNI(conf)
}

// podCIDR is the range that the leader gave a node.
func podCIDR(n *corev1.Node) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	p, err := netip.ParsePrefix(n.Spec.PodCIDR)
	return p, err == nil && p.Addr().Is4()
}

// peerOf is what routes to a node's pods need; false: it has none yet, or is not there (nil).
func peerOf(o *corev1.Node) (podnet.Peer, bool) {
	cidr, ok := podCIDR(o)
	if !ok {
		return podnet.Peer{}, false
	}
	ip := internalIP(o)
	if !ip.IsValid() {
		return podnet.Peer{}, false
	}
	return podnet.Peer{Node: o.Name, IP: ip, PodCIDR: cidr}, true
}

func internalIP(n *corev1.Node) netip.Addr {
	for _, a := range n.Status.Addresses {
		if ip, err := netip.ParseAddr(a.Address); a.Type == corev1.NodeInternalIP && err == nil && ip.Is4() {
			return ip
		}
	}
	return netip.Addr{}
}

func nodeReady(n *corev1.Node) bool {
	if n == nil {
		return false
	}
	for _, c := range n.Status.Conditions {
		if c.Type == corev1.NodeReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}
