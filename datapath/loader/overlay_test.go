package loader

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"skein.io/skein/datapath/internal/testnet"
	"skein.io/skein/datapath/podnet"
	"skein.io/skein/datapath/service"
)

func mustAddrPort(s string) netip.AddrPort { return netip.MustParseAddrPort(s) }

// twoNetworks is two nodes behind a router that knows no pods, and a client in the first one's network.
func twoNetworks(t *testing.T) (a, b *node, outside *testnet.NS) {
	t.Helper()
	testnet.Need(t)
	router, lan := testnet.New(t, "router"), testnet.New(t, "lan")
	a, b, outside = newNode(t, 1, "10.99.1.1"), newNode(t, 2, "10.99.2.1"), testnet.New(t, "outside")
	testnet.Link(a.NS, "eth0", "10.99.1.1/24", lan, "p1", "")
	testnet.Link(outside, "eth0", "10.99.1.100/24", lan, "p2", "")
	testnet.Link(router, "r1", "10.99.1.254/24", lan, "p3", "")
	lan.Bridge("br0", "p1", "p2", "p3")
	testnet.Link(b.NS, "eth0", "10.99.2.1/24", router, "r2", "10.99.2.254/24")
	router.Sysctl("net/ipv4/ip_forward", "1")
	for _, f := range []string{"all", "r1", "r2"} {
		router.Sysctl("net/ipv4/conf/"+f+"/rp_filter", "1") // as a router that drops sources it has no route to
	}
	a.Route("0.0.0.0/0", "10.99.1.254")
	outside.Route("0.0.0.0/0", "10.99.1.254")
	b.Route("0.0.0.0/0", "10.99.2.254")
	a.start(b)
	b.start(a)
	return a, b, outside
}

func TestOverlay(t *testing.T) {
	a, b, outside := twoNetworks(t)
	if !a.state.Overlay.IsValid() || len(a.state.Direct) != 0 {
		t.Fatalf("state %+v, want the overlay", a.state)
	}
	pod, _ := a.pod("client")
	_, b2 := b.pod("web2")
	a.apply(nodePort(service.TCP, 30080, b2), nodePort(service.UDP, 30080, b2))
	b.apply(nodePort(service.TCP, 30080, b2), nodePort(service.UDP, 30080, b2))
	inPod, onNode, client := testnet.NewProbe(pod, a.cgroup), testnet.NewProbe(a.NS, a.cgroup), testnet.NewProbe(outside, "")
	long := strings.Repeat("0123456789", 800)
	check := func(name string, p *testnet.Probe, addr string, want netip.Addr) {
		t.Run(name, func(t *testing.T) {
			for _, network := range []string{"tcp4", "udp4"} {
				r := p.Ask(network, addr)
				if got := from(t, r).Addr(); want.IsValid() && got != want {
					t.Errorf("%s: seen as %s, want %s", network, got, want)
				}
				r = p.Do(testnet.Request{Op: "ask", Network: network, Addr: addr, Msg: long})
				if r.Err != "" || network == "udp4" && !strings.HasSuffix(r.Text[0], long) {
					t.Errorf("%s, long: %s", network, r.Err)
				}
			}
		})
	}
	check("pod to pod", inPod, b2.Addr.String(), addrOf(t, pod))
	check("node to pod", onNode, b2.Addr.String(), podnet.NodeAddr(a.podCIDR))
	check("pod to service", inPod, vip, addrOf(t, pod))
	check("outside to node port", client, "10.99.1.1:30080", podnet.NodeAddr(a.podCIDR))
	check("outside to the other node's port", client, "10.99.2.1:30080", netip.MustParseAddr("10.99.1.100"))
	// pod to a node of another network: masqueraded, because routers between need not know pods
	check("pod to the other node's port", inPod, "10.99.2.1:30080", a.ip)
}

// TestPathMTU: a client that may not fragment learns through the NodePort that the overlay is narrower, and a masqueraded
// pod that a link outside is: both only work if ICMP errors are translated.
func TestPathMTU(t *testing.T) {
	a, b, outside := twoNetworks(t)
	pod, _ := a.pod("client")
	_, b2 := b.pod("web2")
	a.apply(nodePort(service.UDP, 30080, b2), nodePort(service.TCP, 30080, b2))
	mtu := func(ns *testnet.NS, dst mtuTarget) (got int) {
		t.Helper()
		ns.Do(func() (err error) { got, err = discover(dst); return err })
		return got
	}
	if got := mtu(outside, mtuTarget{"10.99.1.1:30080", 1500}); got != 1450 {
		t.Errorf("path MTU through the node port %d, want 1450", got)
	}
	narrow := testnet.New(t, "narrow")
	testnet.Link(outside, "slow", "10.77.0.1/24", narrow, "eth0", "10.77.0.2/24")
	outside.Do(func() error { return setMTU("slow", 1280) })
	narrow.Do(func() error { return setMTU("eth0", 1280) })
	outside.Sysctl("net/ipv4/ip_forward", "1")
	narrow.Route("0.0.0.0/0", "10.77.0.1")
	a.Route("10.77.0.0/24", "10.99.1.100")
	testnet.Serve(narrow, mustAddrPort("10.77.0.2:9000"), "narrow")
	if got := mtu(pod, mtuTarget{"10.77.0.2:9000", 1500}); got != 1280 {
		t.Errorf("path MTU of a masqueraded flow %d, want 1280", got)
	}
	if r := testnet.NewProbe(pod, a.cgroup).Ask("udp4", "10.77.0.2:9000"); from(t, r).Addr() != a.ip {
		t.Errorf("not masqueraded: %q", r.Text)
	}
}

func setMTU(name string, mtu int) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetMTU(l, mtu)
}

type mtuTarget struct {
	addr string
	size int
}

// discover sends UDP packets of size bytes that may not be fragmented until the kernel has learned a smaller path MTU.
func discover(d mtuTarget) (int, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	if err := unix.SetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_DO); err != nil {
		return 0, err
	}
	to := mustAddrPort(d.addr)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}); err != nil {
		return 0, err
	}
	mtu := 0
	for range 100 {
		_, _ = unix.Write(fd, make([]byte, d.size-28)) // fails once the size is known
		if mtu, err = unix.GetsockoptInt(fd, unix.IPPROTO_IP, unix.IP_MTU); err != nil || mtu < d.size {
			return mtu, err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return mtu, nil
}

// TestPeersComeAndGo: Apply is idempotent and removes what is not wanted any more, down to the overlay device.
func TestPeersComeAndGo(t *testing.T) {
	a, b, _ := twoNetworks(t)
	_, b2 := b.pod("web2")
	p := testnet.NewProbe(a.NS, a.cgroup)
	p.Ask("tcp4", b2.Addr.String())
	before := a.dump()
	extra := append(peersOf([]*node{b}),
		podnet.Peer{Node: "x", IP: netip.MustParseAddr("10.99.1.77"), PodCIDR: netip.MustParsePrefix("10.244.7.0/24")},
		podnet.Peer{Node: "y", IP: netip.MustParseAddr("10.99.9.9"), PodCIDR: netip.MustParsePrefix("10.244.9.0/24")})
	apply := func(peers []podnet.Peer) (st podnet.State) {
		t.Helper()
		a.Do(func() (err error) { st, err = a.net.Apply(peers); return err })
		return st
	}
	if st := apply(extra); len(st.Direct) != 1 {
		t.Errorf("direct peers %v", st.Direct)
	}
	with := a.dump()
	for _, part := range []string{"10.244.7.0/24 via 10.99.1.77", "10.244.9.0/24 via 10.244.9.1", "10.99.9.9"} {
		if !strings.Contains(with, part) {
			t.Errorf("%q is missing in\n%s", part, with)
		}
	}
	apply(extra)
	if again := a.dump(); again != with {
		t.Errorf("not idempotent:\n%s\nthen\n%s", with, again)
	}
	apply(peersOf([]*node{b}))
	if after := a.dump(); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
	p.Ask("tcp4", b2.Addr.String())
	if st := apply(nil); st.Overlay.IsValid() || strings.Contains(a.dump(), "10.244.2.0") {
		t.Errorf("without peers: %+v\n%s", st, a.dump())
	}
	start := time.Now()
	if r := p.Do(testnet.Request{Op: "ask", Network: "tcp4", Addr: b2.Addr.String(), Msg: "x"}); r.Errno != unix.EHOSTUNREACH || time.Since(start) > time.Second {
		t.Errorf("pod of a node that left: %s, want a prompt no route to host", r.Err)
	}
	apply(peersOf([]*node{b}))
	a.Do(func() error { return a.l.ApplyNetwork(a.network()) })
	p.Ask("tcp4", b2.Addr.String())
}

// dump shows the routes and the overlay's neighbours of a node.
func (n *node) dump() string {
	var out []string
	n.Do(func() error {
		routes, err := netlink.RouteList(nil, unix.AF_INET)
		if err != nil {
			return err
		}
		for _, r := range routes {
			out = append(out, strings.TrimSpace(r.Dst.String()+" via "+r.Gw.String()+" src "+r.Src.String()))
		}
		l, err := netlink.LinkByName(podnet.OverlayDevice)
		if err != nil {
			return nil
		}
		for _, family := range []int{unix.AF_BRIDGE, unix.AF_INET} {
			neighs, err := netlink.NeighList(l.Attrs().Index, family)
			if err != nil {
				return err
			}
			for _, e := range neighs {
				if e.State&netlink.NUD_PERMANENT != 0 {
					out = append(out, e.String())
				}
			}
		}
		return nil
	})
	return strings.Join(out, "\n")
}
