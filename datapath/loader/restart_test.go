package loader

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"skein.io/skein/datapath/internal/testnet"
	"skein.io/skein/datapath/podnet"
	"skein.io/skein/datapath/service"
)

// stream talks on one open connection until stop is called, which returns how many exchanges went well; any other fails
// the test.
func stream(t *testing.T, p *testnet.Probe, network, addr string) (stop func() int) {
	t.Helper()
	if r := p.Do(testnet.Request{Op: "open", Network: network, Addr: addr, Msg: "x", ID: "stream"}); r.Err != "" {
		t.Fatal(r.Err)
	}
	var end atomic.Bool
	var wg sync.WaitGroup
	n := 0
	wg.Go(func() {
		for !end.Load() {
			if r := p.Do(testnet.Request{Op: "again", ID: "stream", Msg: "x"}); r.Err != "" {
				t.Errorf("open connection to %s: %s", addr, r.Err)
				return
			}
			n++
		}
	})
	return func() int {
		end.Store(true)
		wg.Wait()
		return n
	}
}

func (n *node) pinNames() (out []string) {
	for _, pattern := range []string{"links/*", layoutPrefix + "*/*"} {
		m, _ := filepath.Glob(filepath.Join(n.pins, pattern))
		out = append(out, m...)
	}
	slices.Sort(out)
	return out
}

// TestRestart: Close, a time without any daemon, and Open again, several times, under a TCP stream through the ClusterIP,
// one through the NodePort from outside and one masqueraded: none is cut, new connections work in every phase, and the
// entries are the same ones.
func TestRestart(t *testing.T) {
	a, b, outside := twoNodes(t)
	pod, _ := a.pod("client")
	_, b1 := a.pod("web1")
	_, b2 := b.pod("web2")
	svc := nodePort(service.TCP, 30080, b1, b2)
	a.apply(svc)
	testnet.Serve(outside, mustAddrPort("10.99.0.100:9000"), "outside")
	stops := []func() int{
		stream(t, testnet.NewProbe(pod, a.cgroup), "tcp4", vip),
		stream(t, testnet.NewProbe(outside, ""), "tcp4", "10.99.0.1:30080"),
		stream(t, testnet.NewProbe(pod, a.cgroup), "tcp4", "10.99.0.100:9000"),
	}
	fresh := testnet.NewProbe(pod, a.cgroup)
	pins := a.pinNames()
	before := a.l.have
	for range 5 {
		if err := a.l.Close(); err != nil {
			t.Fatal(err)
		}
		fresh.Ask("tcp4", vip)
		a.open()
		fresh.Ask("tcp4", vip)
		if ops := service.Diff(before, a.l.have); len(ops) != 0 {
			t.Fatalf("tables differ after the restart: %v", ops)
		}
		a.apply(svc)
		fresh.Ask("tcp4", vip)
	}
	for _, stop := range stops {
		if n := stop(); n < 5 {
			t.Errorf("only %d exchanges", n)
		}
	}
	if after := a.pinNames(); !slices.Equal(pins, after) {
		t.Errorf("pins before\n%s\nafter\n%s", strings.Join(pins, "\n"), strings.Join(after, "\n"))
	}
}

// TestStaleCgroup: the cgroup was removed and made anew (a node that died and came back): the pinned links hang in the
// air, Open must notice.
func TestStaleCgroup(t *testing.T) {
	a, b, _ := twoNodes(t)
	_, b2 := b.pod("web2")
	svc := clusterIP("default/web:http", vip, service.TCP, b2)
	a.apply(svc)
	a.l.Close()
	if err := unix.Rmdir(a.cgroup); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(a.cgroup, 0o755); err != nil {
		t.Fatal(err)
	}
	p := testnet.NewProbe(a.NS, a.cgroup)
	if r := p.Do(testnet.Request{Op: "ask", Network: "tcp4", Addr: vip, Msg: "x", Timeout: 200 * time.Millisecond}); r.Err == "" {
		t.Fatal("the stale link works: this test shows nothing")
	}
	a.open()
	if p.Ask("tcp4", vip); len(a.l.have.Frontends) != 1 {
		t.Errorf("tables lost: %v", a.l.have)
	}
}

// TestStaleDevice: the same for a device that went and came back under its name, and for one that is not wanted any more.
func TestStaleDevice(t *testing.T) {
	a, _, outside := twoNodes(t)
	_, b1 := a.pod("web1")
	client := testnet.NewProbe(outside, "")
	a.l.Close()
	cfg := a.config()
	cfg.Uplink = "eth1"
	cfg.Node.Addrs = append(cfg.Node.Addrs, mustAddrPort("10.99.7.1:1").Addr())
	for i := range 2 {
		testnet.Link(a.NS, "eth1", "10.99.7.1/24", outside, "direct", "10.99.7.2/24")
		if i == 0 {
			a.Do(func() (err error) { a.l, err = Open(cfg); return err })
		} else {
			a.Do(func() error { return a.l.ApplyNetwork(Network{}) })
		}
		a.apply(nodePort(service.TCP, 30080, b1))
		client.Ask("tcp4", "10.99.7.1:30080")
		links, _ := filepath.Glob(filepath.Join(a.pins, linksName, tcxPrefix+"*"))
		if len(links) != 2 {
			t.Errorf("links %v, want the new device's two only", links)
		}
		a.Do(func() error {
			l, err := netlink.LinkByName("eth1")
			if err != nil {
				return err
			}
			return netlink.LinkDel(l)
		})
	}
}

// TestLayoutChange: other limits are another layout. The old tables serve until the new ones are full, then they go.
func TestLayoutChange(t *testing.T) {
	a, b, _ := twoNodes(t)
	pod, _ := a.pod("client")
	_, b2 := b.pod("web2")
	svc := clusterIP("default/web:http", vip, service.TCP, b2)
	a.apply(svc)
	stop := stream(t, testnet.NewProbe(pod, a.cgroup), "tcp4", vip)
	p := testnet.NewProbe(pod, a.cgroup)
	old := a.l.layout
	a.l.Close()
	cfg := a.config()
	cfg.MaxBackends = 999
	a.Do(func() (err error) { a.l, err = Open(cfg); return err })
	p.Ask("tcp4", vip)
	a.Do(func() error { return a.l.ApplyNetwork(a.network()) })
	p.Ask("tcp4", vip)
	if _, err := os.Stat(old); err != nil {
		t.Error("old tables gone too early: ", err)
	}
	a.apply(svc)
	p.Ask("tcp4", vip)
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Error("old tables still there: ", err)
	}
	if n := stop(); n == 0 {
		t.Error("no exchange")
	}
	many := svc
	for i := range 1000 {
		x := b2
		x.Addr = mustAddrPort(fmt.Sprintf("10.1.%d.%d:80", i/250, i%250+1))
		many.Backends = append(many.Backends, x)
	}
	a.Do(func() error {
		if err := a.l.ApplyServices([]service.Service{many}); err == nil || !strings.Contains(err.Error(), "1001 back ends, but the table holds 999") {
			t.Errorf("too many back ends: %v", err)
		}
		return nil
	})
	p.Ask("tcp4", vip)
}

// TestUpdatesUnderLoad: back ends come and go all the time, one always stays; no connect may fail or meet one that left
// before the update before.
func TestUpdatesUnderLoad(t *testing.T) {
	a, b, _ := twoNodes(t)
	pod, _ := a.pod("client")
	var all []service.Backend
	for i := range 6 {
		on := []*node{a, b}[i%2]
		_, be := on.pod(fmt.Sprintf("web%d", i))
		all = append(all, be)
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	a.apply(clusterIP("default/web:http", vip, service.TCP, all[0]))
	var end atomic.Bool
	var asked atomic.Int32
	var wg sync.WaitGroup
	p := testnet.NewProbe(pod, a.cgroup)
	wg.Go(func() {
		for !end.Load() {
			r := p.Do(testnet.Request{Op: "ask", Network: "tcp4", Addr: vip, Msg: "x"})
			if r.Err != "" {
				t.Error(r.Err)
			}
			asked.Add(1)
		}
	})
	var have service.Entries
	for i := 0; i < 500 || asked.Load() < 300 && i < 20000; i++ {
		var some []service.Backend
		for _, j := range rnd.Perm(len(all))[:1+rnd.IntN(len(all))] {
			some = append(some, all[j])
		}
		a.apply(clusterIP("default/web:http", vip, service.TCP, some...))
		have = a.l.have
	}
	end.Store(true)
	wg.Wait()
	t.Logf("%d connects", asked.Load())
	real, err := a.l.readBack()
	if err != nil {
		t.Fatal(err)
	}
	if ops := service.Diff(real, have); len(ops) != 0 {
		t.Errorf("mirror and tables differ: %v", ops)
	}
}

// TestFaults: a service that cannot be is told, and hinders no other.
func TestFaults(t *testing.T) {
	a, b, _ := twoNodes(t)
	_, b2 := b.pod("web2")
	bad := clusterIP("default/zz:http", vip, service.TCP, b2)
	a.apply(bad, clusterIP("default/web:http", vip, service.TCP, b2), clusterIP("default/y:http", "10.96.0.21:80", service.TCP, b2))
	if err := a.l.Faults(); err == nil || !strings.Contains(err.Error(), "service default/zz:http: front end 10.96.0.20:80/TCP belongs to service default/web:http already") {
		t.Errorf("%v", err)
	}
	p := testnet.NewProbe(a.NS, a.cgroup)
	p.Ask("tcp4", vip)
	p.Ask("tcp4", "10.96.0.21:80")
	if a.apply(bad); a.l.Faults() != nil {
		t.Errorf("%v", a.l.Faults())
	}
	var st podnet.State
	a.Do(func() (err error) {
		st, err = a.net.Apply(append(peersOf([]*node{b}), podnet.Peer{Node: "twin", IP: b.ip, PodCIDR: b.podCIDR}))
		return err
	})
	if st.Faults == nil || !strings.Contains(st.Faults.Error(), "overlaps with 10.244.2.0/24 of node2") {
		t.Errorf("%v", st.Faults)
	}
	p.Ask("tcp4", b2.Addr.String())
}

// TestDetach: nothing is left, and a second time is fine.
func TestDetach(t *testing.T) {
	a, b, _ := twoNodes(t)
	_, b2 := b.pod("web2")
	a.apply(clusterIP("default/web:http", vip, service.TCP, b2))
	p := testnet.NewProbe(a.NS, a.cgroup)
	p.Ask("tcp4", vip)
	a.Do(func() error {
		var ids []link.ID
		for _, pin := range a.pinNames() {
			if k, err := link.LoadPinnedLink(pin, nil); err == nil {
				i, err := k.Info()
				if err != nil {
					return err
				}
				ids = append(ids, i.ID)
				k.Close()
			}
		}
		if len(ids) != len(hooks)+2 {
			t.Errorf("%d links, want %d", len(ids), len(hooks)+2)
		}
		a.l.Close()
		if err := Detach(a.pins); err != nil {
			return err
		}
		for _, id := range ids {
			if _, err := link.NewFromID(id); err == nil {
				t.Errorf("link %d lives", id)
			}
		}
		return Detach(a.pins)
	})
	if r := p.Do(testnet.Request{Op: "ask", Network: "tcp4", Addr: vip, Msg: "x", Timeout: 200 * time.Millisecond}); r.Err == "" {
		t.Error("still translated")
	}
}

// TestRefusals: what the machine lacks is said, with what to do.
func TestRefusals(t *testing.T) {
	testnet.Need(t)
	mount, err := Cgroup2Mount()
	if err != nil {
		t.Fatal(err)
	}
	good := Config{Dir: t.TempDir(), CgroupPath: testnet.Cgroup(t, mount), Node: service.Node{Name: "n"}}
	for name, c := range map[string]struct {
		change func(*Config)
		want   error
	}{
		"not a cgroup":   {func(c *Config) { c.CgroupPath = t.TempDir() }, ErrNoCgroup},
		"no such cgroup": {func(c *Config) { c.CgroupPath += "/none" }, ErrNoCgroup},
		"no such device": {func(c *Config) {
			c.Uplink, c.Node.Addrs = "none0", append(c.Node.Addrs, mustAddrPort("10.0.0.1:1").Addr())
		}, ErrNoDevice},
	} {
		cfg := good
		c.change(&cfg)
		if l, err := Open(cfg); !errors.Is(err, c.want) {
			t.Errorf("%s: %v %v, want %v", name, l, err, c.want)
		}
	}
	if err := Detach(good.Dir); err != nil {
		t.Error(err)
	}
	err = Config{SNATPorts: [2]uint16{9, 3}}.Validate()
	for _, part := range []string{"no directory", "no cgroup", "no node name", "9-3", "MaxFrontends", "MaxFlows"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("Validate: %v lacks %q", err, part)
		}
	}
}
