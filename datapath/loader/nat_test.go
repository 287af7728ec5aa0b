package loader

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"skein.io/skein/datapath/internal/testnet"
	"skein.io/skein/datapath/service"
)

func nodePort(proto service.Proto, port uint16, backends ...service.Backend) service.Service {
	s := clusterIP(fmt.Sprintf("default/web:%s", proto), vip, proto, backends...)
	s.NodePort = port
	return s
}

// from is the address that a back end saw.
func from(t *testing.T, r testnet.Reply) netip.AddrPort {
	t.Helper()
	f := strings.Fields(r.Text[0])
	a, err := netip.ParseAddrPort(strings.TrimSuffix(f[2], ":"))
	if err != nil {
		t.Fatalf("answer %q: %v", r.Text[0], err)
	}
	return a
}

// TestNodePort: from outside, through either node, to back ends on both; replies come from the node's address, remote
// back ends see the node and local ones the client.
func TestNodePort(t *testing.T) {
	a, b, outside := twoNodes(t)
	_, b1 := a.pod("web1")
	_, b2 := b.pod("web2")
	for _, n := range []*node{a, b} {
		n.apply(nodePort(service.TCP, 30080, b1, b2), nodePort(service.UDP, 30080, b1, b2))
	}
	client := testnet.NewProbe(outside, "")
	for _, network := range []string{"tcp4", "udp4"} {
		for _, via := range []*node{a, b} {
			t.Run(network+"/"+via.Name, func(t *testing.T) {
				addr := netip.AddrPortFrom(via.ip, 30080).String()
				seen := map[string]int{}
				for range 60 {
					r := client.Ask(network, addr)
					seen[who(r)]++
					want := netip.MustParseAddr("10.99.0.100")
					if remote := (who(r) == "web1") != (via == a); remote {
						want = via.ip
					}
					if got := from(t, r); got.Addr() != want {
						t.Fatalf("%s saw the client as %s, want %s", who(r), got, want)
					}
				}
				if seen["web1"] < 10 || seen["web2"] < 10 || len(seen) != 2 {
					t.Errorf("answers of %v, want both back ends about equally", seen)
				}
			})
		}
	}
	t.Run("long messages", func(t *testing.T) { // several segments, offloads, fragments
		for _, network := range []string{"tcp4", "udp4"} {
			for range 8 {
				msg := strings.Repeat("0123456789", 800)
				r := client.Do(testnet.Request{Op: "ask", Network: network, Addr: "10.99.0.1:30080", Msg: msg})
				if r.Err != "" || network == "udp4" && !strings.HasSuffix(r.Text[0], msg) {
					t.Fatalf("%s: %s (%d bytes)", network, r.Err, len(strings.Join(r.Text, "")))
				}
			}
		}
	})
	t.Run("closed port", func(t *testing.T) {
		if r := client.Do(testnet.Request{Op: "ask", Network: "tcp4", Addr: "10.99.0.1:30081", Msg: "x"}); r.Errno != unix.ECONNREFUSED {
			t.Errorf("closed port: %q, want connection refused", r.Err)
		}
	})
	t.Run("cluster address from outside", func(t *testing.T) {
		outside.Route("10.96.0.0/16", "10.99.0.1")
		if r := client.Do(testnet.Request{Op: "ask", Network: "tcp4", Addr: vip, Msg: "x", Timeout: 300 * time.Millisecond}); r.Err == "" {
			t.Errorf("a ClusterIP answers outside the cluster: %q", r.Text)
		}
	})
}

// TestChecksums: the same ways with checksums that somebody looks at, and UDP that has none.
func TestChecksums(t *testing.T) {
	a, b, outside := twoNodes(t)
	pod, b1 := a.pod("web1")
	pod2, b2 := b.pod("web2")
	a.apply(nodePort(service.TCP, 30080, b1, b2), nodePort(service.UDP, 30080, b1, b2))
	testnet.Serve(outside, netip.MustParseAddrPort("10.99.0.100:9000"), "outside")
	for _, ns := range []*testnet.NS{a.NS, b.NS, outside, pod, pod2} {
		ns.NoOffload()
	}
	client, inPod := testnet.NewProbe(outside, ""), testnet.NewProbe(pod, a.cgroup)
	for range 10 {
		for _, network := range []string{"tcp4", "udp4"} {
			client.Ask(network, "10.99.0.1:30080")
			inPod.Ask(network, "10.99.0.100:9000")
		}
		for p, to := range map[*testnet.Probe]string{client: "10.99.0.1:30080", inPod: "10.99.0.100:9000"} {
			r := p.Do(testnet.Request{Op: "sendto", Network: "udp4", Addr: to, Msg: "x", NoCheck: true})
			if r.Err != "" || r.Remote[0] != to {
				t.Errorf("UDP without checksum to %s: %+v", to, r)
			}
		}
	}
	pod.Do(func() error { return ping("10.99.0.100") })
}

// TestNodePortLocally: clients on the node use the node's address or 127.0.0.1; in a pod 127.0.0.1 is the pod.
func TestNodePortLocally(t *testing.T) {
	a, b, _ := twoNodes(t)
	clientPod, _ := a.pod("client")
	_, b2 := b.pod("web2")
	a.apply(nodePort(service.TCP, 30080, b2), nodePort(service.UDP, 30080, b2))
	b.apply(nodePort(service.TCP, 30080, b2), nodePort(service.UDP, 30080, b2))
	onNode, inPod := testnet.NewProbe(a.NS, a.cgroup), testnet.NewProbe(clientPod, a.cgroup)
	for _, network := range []string{"tcp4", "udp4"} {
		for _, addr := range []string{"127.0.0.1:30080", "10.99.0.1:30080", "10.99.0.2:30080"} {
			if r := onNode.Ask(network, addr); who(r) != "web2" {
				t.Errorf("node, %s %s: %q", network, addr, r.Text)
			}
			if strings.HasPrefix(addr, "127") {
				continue
			}
			if r := inPod.Ask(network, addr); who(r) != "web2" {
				t.Errorf("pod, %s %s: %q", network, addr, r.Text)
			}
		}
	}
	if r := inPod.Do(testnet.Request{Op: "ask", Network: "tcp4", Addr: "127.0.0.1:30080", Msg: "x"}); r.Errno != unix.ECONNREFUSED {
		t.Errorf("127.0.0.1 in a pod: %q %q, want the pod's own closed port", r.Text, r.Err)
	}
}

// TestHostPort: one port of a node leads to one pod at 127.0.0.1, to a second at the node's address, and to a third with UDP; a client
// on the node may have bound its socket to the node's address.
func TestHostPort(t *testing.T) {
	a, b, outside := twoNodes(t)
	hostPort := func(name, addr string, proto service.Proto) service.Service {
		_, backend := a.pod(name)
		at := netip.MustParseAddrPort(addr)
		return service.Service{Name: name, Proto: proto, ExternalLocal: true, Backends: []service.Backend{backend},
			Frontends: []service.Frontend{{Addr: at, External: !at.Addr().IsLoopback()}}}
	}
	a.apply(hostPort("web1", "127.0.0.1:5432", service.TCP), hostPort("web2", "10.99.0.1:5432", service.TCP), hostPort("web3", "10.99.0.1:5432", service.UDP))
	clientPod, _ := b.pod("client")
	onNode := testnet.NewProbe(a.NS, a.cgroup)
	for _, local := range []string{"", "10.99.0.1:0"} {
		for _, c := range [][3]string{{"tcp4", "127.0.0.1:5432", "web1"}, {"tcp4", "10.99.0.1:5432", "web2"}, {"udp4", "10.99.0.1:5432", "web3"}} {
			if r := onNode.Do(testnet.Request{Op: "ask", Network: c[0], Addr: c[1], Msg: "x", Local: local}); r.Err != "" || who(r) != c[2] {
				t.Errorf("node, from %q to %s %s: %q %s, want %s", local, c[0], c[1], r.Text, r.Err, c[2])
			}
		}
	}
	for name, p := range map[string]*testnet.Probe{"outside": testnet.NewProbe(outside, ""), "pod of another node": testnet.NewProbe(clientPod, b.cgroup)} {
		for network, want := range map[string]string{"tcp4": "web2", "udp4": "web3"} {
			if r := p.Ask(network, "10.99.0.1:5432"); who(r) != want {
				t.Errorf("%s, %s: %q, want %s", name, network, r.Text, want)
			}
		}
	}
}

// TestNodePortFollowsBackends: a flow's next connection goes to a live back end when its former one left, even from the
// same client port; and one client port may use two node ports that share a back end.
func TestNodePortFollowsBackends(t *testing.T) {
	a, b, outside := twoNodes(t)
	_, b1 := a.pod("web1")
	_, b2 := b.pod("web2")
	client := testnet.NewProbe(outside, "")
	ask := func(port int) testnet.Reply {
		t.Helper()
		r := client.Do(testnet.Request{Op: "sendto", Network: "udp4", Local: "10.99.0.100:5353", Addr: fmt.Sprintf("10.99.0.1:%d", port), Msg: "x"})
		if r.Err != "" || r.Remote[0] != fmt.Sprintf("10.99.0.1:%d", port) {
			t.Fatalf("port %d: %+v", port, r)
		}
		return r
	}
	a.apply(nodePort(service.UDP, 30080, b1))
	if who(ask(30080)) != "web1" {
		t.Fatal("not web1")
	}
	a.apply(nodePort(service.UDP, 30080, b2))
	if who(ask(30080)) != "web2" {
		t.Fatal("the flow stays with a back end that left")
	}
	other := nodePort(service.UDP, 30081, b2)
	other.Name, other.Frontends = "default/other:UDP", nil
	a.apply(nodePort(service.UDP, 30080, b2), other)
	for range 20 { // one client, one port, one back end, two node ports: each answer comes from the right one
		if r := ask(30081); who(r) != "web2" || from(t, r).Addr() != a.ip {
			t.Fatalf("%q", r.Text)
		}
		ask(30080)
	}
}

// TestExternalLocal: with the Local policy only the node's own back ends answer; elsewhere the port is closed.
func TestExternalLocal(t *testing.T) {
	a, b, outside := twoNodes(t)
	_, b1 := a.pod("web1")
	for _, n := range []*node{a, b} {
		s := nodePort(service.TCP, 30080, b1)
		s.ExternalLocal = true
		n.apply(s)
	}
	client := testnet.NewProbe(outside, "")
	if r := client.Ask("tcp4", "10.99.0.1:30080"); from(t, r).Addr() != netip.MustParseAddr("10.99.0.100") {
		t.Errorf("source not kept: %q", r.Text)
	}
	if r := client.Do(testnet.Request{Op: "ask", Network: "tcp4", Addr: "10.99.0.2:30080", Msg: "x"}); r.Errno != unix.ECONNREFUSED {
		t.Errorf("node without back end: %q %q", r.Text, r.Err)
	}
	testnet.NewProbe(b.NS, b.cgroup).Ask("tcp4", vip) // internal clients are not restricted
}

// TestAffinity: one client address stays with one back end, from outside and from a pod.
func TestAffinity(t *testing.T) {
	a, b, outside := twoNodes(t)
	pod, _ := a.pod("client")
	_, b1 := a.pod("web1")
	_, b2 := b.pod("web2")
	s := nodePort(service.TCP, 30080, b1, b2)
	s.Affinity = time.Hour
	a.apply(s)
	for name, p := range map[string]*testnet.Probe{"10.99.0.1:30080": testnet.NewProbe(outside, ""), vip: testnet.NewProbe(pod, a.cgroup)} {
		first := who(p.Ask("tcp4", name))
		for range 20 {
			if got := who(p.Ask("tcp4", name)); got != first {
				t.Fatalf("%s: %s, then %s", name, first, got)
			}
		}
		left, other := b1, "web2"
		if first == "web2" {
			left, other = b2, "web1"
		}
		rest := s
		rest.Backends = nil
		for _, x := range s.Backends {
			if x != left {
				rest.Backends = append(rest.Backends, x)
			}
		}
		a.apply(rest)
		if got := who(p.Ask("tcp4", name)); got != other {
			t.Fatalf("%s: %s though it left", name, got)
		}
		a.apply(s)
	}
}

// TestMasquerade: pods reach the outside with the node's address, the cluster with their own.
func TestMasquerade(t *testing.T) {
	a, b, outside := twoNodes(t)
	pod, _ := a.pod("client")
	pod2, _ := a.pod("client2")
	_, b2 := b.pod("web2")
	testnet.Serve(outside, netip.MustParseAddrPort("10.99.0.100:9000"), "outside")
	p, p2 := testnet.NewProbe(pod, a.cgroup), testnet.NewProbe(pod2, a.cgroup)
	for _, network := range []string{"tcp4", "udp4"} {
		ports := map[netip.AddrPort]bool{}
		for range 30 {
			for i, x := range []*testnet.Probe{p, p2} { // both from the same port
				r := x.Do(testnet.Request{Op: "open", Network: network, Addr: "10.99.0.100:9000", Msg: "x", ID: fmt.Sprint(network, len(ports), i)})
				if r.Err != "" {
					t.Fatal(r.Err)
				}
				f := from(t, r)
				if f.Addr() != a.ip || f.Port() < 61000 {
					t.Fatalf("%s: outside saw %s, want %s and a port from 61000", network, f, a.ip)
				}
				ports[f] = true
			}
		}
		if len(ports) != 60 {
			t.Errorf("%s: %d sources for 60 open flows", network, len(ports))
		}
		r := p.Do(testnet.Request{Op: "ask", Network: network, Addr: b2.Addr.String(), Msg: "x"})
		if r.Err != "" || from(t, r).Addr() != addrOf(t, pod) {
			t.Errorf("%s to a pod: %+v, want the pod's own address", network, r)
		}
		msg := strings.Repeat("0123456789", 800)
		if r := p.Do(testnet.Request{Op: "ask", Network: network, Addr: "10.99.0.100:9000", Msg: msg}); r.Err != "" || network == "udp4" && !strings.HasSuffix(r.Text[0], msg) {
			t.Errorf("%s, long: %s", network, r.Err)
		}
	}
	t.Run("ping", func(t *testing.T) {
		pod.Do(func() error { return ping("10.99.0.100") })
		pod.Do(func() error { return ping(b2.Addr.Addr().String()) })
	})
	t.Run("replies to outside clients of a pod", func(t *testing.T) { // not masqueraded: they would not fit their question
		outside.Route("10.244.0.0/16", "10.99.0.2")
		testnet.NewProbe(outside, "").Ask("tcp4", b2.Addr.String())
	})
}

func addrOf(t *testing.T, ns *testnet.NS) (ip netip.Addr) {
	t.Helper()
	ns.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(l, unix.AF_INET)
		ip, _ = netip.AddrFromSlice(addrs[0].IP.To4())
		return err
	})
	return ip
}

// ping sends ICMP echo requests from the calling thread's namespace.
func ping(to string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	dst := unix.SockaddrInet4{Addr: netip.MustParseAddr(to).As4()}
	msg := []byte{8, 0, 0, 0, 0x12, 0x34, 0, 1}
	sum := 0x0800 + 0x1234 + 1
	msg[2], msg[3] = byte(^sum>>8), byte(^sum)
	if err := unix.Sendto(fd, msg, 0, &dst); err != nil {
		return err
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 2}); err != nil {
		return err
	}
	buf := make([]byte, 1500)
	for {
		n, _, err := unix.Recvfrom(fd, buf, 0)
		if err != nil {
			return fmt.Errorf("no answer from %s: %w", to, err)
		}
		if h := int(buf[0]&15) * 4; n >= h+8 && buf[h] == 0 && buf[h+4] == 0x12 && buf[h+5] == 0x34 && net.IP(buf[12:16]).String() == to {
			return nil
		}
	}
}
