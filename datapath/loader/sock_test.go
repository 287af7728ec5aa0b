package loader

import (
	"strings"
	"syscall"
	"testing"

	"skein.io/skein/datapath/internal/testnet"
	"skein.io/skein/datapath/service"
)

const vip = "10.96.0.20:80"

func who(r testnet.Reply) string {
	name, _, _ := strings.Cut(strings.Join(r.Text, " "), " ")
	return name
}

// TestClusterIP: a client in the cgroup reaches pods of both nodes through one address, in every way that programs use.
func TestClusterIP(t *testing.T) {
	a, b, _ := twoNodes(t)
	clientPod, _ := a.pod("client")
	_, b1 := a.pod("web1")
	_, b2 := b.pod("web2")
	tcp, udp := clusterIP("default/web:http", vip, service.TCP, b1, b2), clusterIP("default/web:dns", vip, service.UDP, b1, b2)
	a.apply(tcp, udp)
	for _, c := range []struct {
		name  string
		probe *testnet.Probe
	}{{"pod", testnet.NewProbe(clientPod, a.cgroup)}, {"node", testnet.NewProbe(a.NS, a.cgroup)}} {
		for _, n := range []struct{ network, addr string }{{"tcp4", vip}, {"tcp6mapped", vip}, {"udp4", vip}, {"udp6mapped", vip}} {
			t.Run(c.name+"/"+n.network, func(t *testing.T) {
				seen := map[string]int{}
				for range 40 {
					r := c.probe.Ask(n.network, n.addr)
					seen[who(r)]++
					if r.Remote[0] != vip {
						t.Fatalf("the peer is %s, want %s", r.Remote[0], vip)
					}
				}
				if seen["web1"] < 5 || seen["web2"] < 5 || len(seen) != 2 {
					t.Errorf("answers of %v, want both back ends about equally", seen)
				}
			})
			if !strings.HasPrefix(n.network, "udp") {
				continue
			}
			t.Run(c.name+"/"+n.network+" unconnected", func(t *testing.T) {
				r := c.probe.Do(testnet.Request{Op: "sendto", Network: strings.Replace(n.network, "6mapped", "", 1), Addr: n.addr, Msg: "x", N: 20})
				if r.Err != "" {
					t.Fatal(r.Err)
				}
				for i := range r.Text {
					if r.Remote[i] != vip {
						t.Fatalf("answer from %s, want %s", r.Remote[i], vip)
					}
					if strings.Fields(r.Text[i])[0] != strings.Fields(r.Text[0])[0] {
						t.Fatalf("one socket was answered by several back ends: %q", r.Text)
					}
				}
			})
		}
	}
}

// TestHairpin: a pod reaches itself through its own Service and NodePort.
func TestHairpin(t *testing.T) {
	a, b, _ := twoNodes(t)
	pod, self := a.pod("web1")
	for _, n := range []*node{a, b} {
		n.apply(nodePort(service.TCP, 30080, self), nodePort(service.UDP, 30080, self))
	}
	p := testnet.NewProbe(pod, a.cgroup)
	for _, network := range []string{"tcp4", "udp4"} {
		for _, addr := range []string{vip, "10.99.0.1:30080", "10.99.0.2:30080"} { // the last one leaves the node and comes back
			if r := p.Ask(network, addr); who(r) != "web1" || r.Remote[0] != addr {
				t.Errorf("%s %s: %+v", network, addr, r)
			}
		}
	}
}

// TestNodeServices: pods reach what every node offers itself: DNS at its link-local address, the API at its own one.
func TestNodeServices(t *testing.T) {
	a, _, _ := twoNodes(t)
	pod, _ := a.pod("client")
	testnet.Serve(a.NS, mustAddrPort("169.254.20.10:53"), "dns")
	testnet.Serve(a.NS, mustAddrPort("10.99.0.1:6443"), "api")
	const dns, api = "10.96.0.10:53", "10.96.0.1:443"
	at := func(s string) service.Backend { return service.Backend{Addr: mustAddrPort(s), Node: a.Name} }
	a.apply(clusterIP("kube-system/kube-dns:udp", dns, service.UDP, at("169.254.20.10:53")),
		clusterIP("kube-system/kube-dns:tcp", dns, service.TCP, at("169.254.20.10:53")),
		clusterIP("default/kubernetes:https", api, service.TCP, at("10.99.0.1:6443")))
	for _, ns := range []*testnet.NS{pod, a.NS} {
		p := testnet.NewProbe(ns, a.cgroup)
		for _, c := range []struct{ op, network, addr, who string }{{"ask", "udp4", dns, "dns"}, {"sendto", "udp4", dns, "dns"}, {"sendto", "udp", dns, "dns"}, {"ask", "tcp4", dns, "dns"}, {"ask", "tcp4", api, "api"}} {
			r := p.Do(testnet.Request{Op: c.op, Network: c.network, Addr: c.addr, Msg: "x"})
			if r.Err != "" || who(r) != c.who || r.Remote[0] != c.addr {
				t.Errorf("%s: %+v: %+v", ns.Name, c, r)
			}
		}
	}
}

func TestNoBackend(t *testing.T) {
	a, _, _ := twoNodes(t)
	a.apply(clusterIP("default/none:http", vip, service.TCP), clusterIP("default/none:udp", vip, service.UDP))
	p := testnet.NewProbe(a.NS, a.cgroup)
	for _, n := range []struct{ op, network, addr string }{{"ask", "tcp4", vip}, {"ask", "tcp6mapped", vip}, {"ask", "udp4", vip}, {"sendto", "udp4", vip}} {
		r := p.Do(testnet.Request{Op: n.op, Network: n.network, Addr: n.addr, Msg: "x"})
		if r.Errno != syscall.ECONNREFUSED {
			t.Errorf("%s %s: %q, want connection refused", n.op, n.network, r.Err)
		}
	}
}

// TestOutsideCgroup: other processes of the same namespace are not touched.
func TestOutsideCgroup(t *testing.T) {
	a, b, _ := twoNodes(t)
	_, b2 := b.pod("web2")
	a.apply(clusterIP("default/web:http", vip, service.TCP, b2))
	if r := testnet.NewProbe(a.NS, "").Do(testnet.Request{Op: "ask", Network: "tcp4", Addr: vip, Msg: "x", Timeout: 200e6}); r.Err == "" {
		t.Errorf("a process outside the cgroup reached the service: %v", r)
	}
	testnet.NewProbe(a.NS, a.cgroup).Ask("tcp4", vip)
}
