package loader

import (
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"testing"

	"skein.io/skein/datapath/internal/testnet"
	"skein.io/skein/datapath/podnet"
	"skein.io/skein/datapath/service"
)

func TestMain(m *testing.M) {
	testnet.Main(m, map[string]func() int{testnet.CNIMode: podnet.CNI})
}

var clusterCIDR = netip.MustParsePrefix("10.244.0.0/16")

// node is a node of the test cluster: a namespace with its own pins, cgroup, pods and loader.
type node struct {
	*testnet.NS
	t       testing.TB
	ip      netip.Addr
	podCIDR netip.Prefix
	cgroup  string
	pins    string
	addrs   string
	l       *Loader
	net     *podnet.Net
	state   podnet.State
}

func newNode(t testing.TB, i int, ip string) *node {
	t.Helper()
	mount, err := Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{NS: testnet.New(t, fmt.Sprintf("node%d", i)), t: t, ip: netip.MustParseAddr(ip), cgroup: testnet.Cgroup(t, mount),
		podCIDR: netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", i)), pins: t.TempDir(), addrs: t.TempDir()}
	return n
}

// start makes the pod network and the datapath, once the node's links are up.
func (n *node) start(peers ...*node) {
	n.t.Helper()
	n.Do(func() (err error) {
		n.net, err = podnet.New(podnet.Config{NodeIP: n.ip, PodCIDR: n.podCIDR, ClusterCIDR: clusterCIDR, DNS: netip.MustParseAddr("169.254.20.10")})
		if err != nil {
			return err
		}
		if err := n.net.Setup(); err != nil {
			return err
		}
		n.state, err = n.net.Apply(peersOf(peers))
		return err
	})
	n.open()
	n.t.Cleanup(func() {
		n.Do(func() error {
			n.l.Close()
			return Detach(n.pins)
		})
	})
}

func peersOf(nodes []*node) (out []podnet.Peer) {
	for _, p := range nodes {
		out = append(out, podnet.Peer{Node: p.Name, IP: p.ip, PodCIDR: p.podCIDR})
	}
	return out
}

func (n *node) config() Config {
	return Config{Dir: n.pins, CgroupPath: n.cgroup, Uplink: n.state.Uplink, Node: service.Node{Name: n.Name, Addrs: []netip.Addr{n.ip}},
		MaxFlows: 4096, Logger: slog.New(slog.NewTextHandler(os.Stderr, nil))}
}

func (n *node) open() {
	n.t.Helper()
	n.Do(func() (err error) {
		if n.l, err = Open(n.config()); err != nil {
			return err
		}
		return n.l.ApplyNetwork(n.network())
	})
}

func (n *node) network() Network {
	keep := []netip.Prefix{clusterCIDR}
	for _, p := range append(n.state.Direct, n.ip) {
		keep = append(keep, netip.PrefixFrom(p, 32))
	}
	nw := Network{PodCIDR: n.podCIDR, NoMasquerade: keep}
	if n.state.Overlay.IsValid() {
		nw.Devices = []Device{{podnet.OverlayDevice, n.state.Overlay}}
	}
	return nw
}

func (n *node) apply(s ...service.Service) {
	n.t.Helper()
	n.Do(func() error { return n.l.ApplyServices(s) })
}

// pod makes a pod that serves at port 8080.
func (n *node) pod(name string) (*testnet.NS, service.Backend) {
	n.t.Helper()
	ns, ip := testnet.Pod(n.NS, name, n.addrs, n.podCIDR)
	addr := netip.AddrPortFrom(ip, 8080)
	testnet.Serve(ns, addr, name)
	return ns, service.Backend{Addr: addr, Node: n.Name}
}

// twoNodes is a bridge with two nodes and a client outside, 10.99.0.1, .2 and .100.
func twoNodes(t testing.TB) (a, b *node, outside *testnet.NS) {
	t.Helper()
	testnet.Need(t)
	fabric := testnet.New(t, "fabric")
	a, b, outside = newNode(t, 1, "10.99.0.1"), newNode(t, 2, "10.99.0.2"), testnet.New(t, "outside")
	testnet.Link(a.NS, "eth0", "10.99.0.1/24", fabric, "p1", "")
	testnet.Link(b.NS, "eth0", "10.99.0.2/24", fabric, "p2", "")
	testnet.Link(outside, "eth0", "10.99.0.100/24", fabric, "p3", "")
	fabric.Bridge("br0", "p1", "p2", "p3")
	a.start(b)
	b.start(a)
	return a, b, outside
}

func clusterIP(name, addr string, proto service.Proto, backends ...service.Backend) service.Service {
	return service.Service{Name: name, Proto: proto, Frontends: []service.Frontend{{Addr: netip.MustParseAddrPort(addr)}}, Backends: backends}
}
