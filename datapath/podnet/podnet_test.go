package podnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"skein.io/skein/datapath/internal/testnet"
)

func TestMain(m *testing.M) {
	testnet.Main(m, map[string]func() int{testnet.CNIMode: CNI})
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestAllocate(t *testing.T) {
	a := addresses{filepath.Join(t.TempDir(), "new")}
	r := prefix("10.244.3.0/29") // .2 to .6
	got := map[string]netip.Addr{}
	for i := range 5 {
		owner := fmt.Sprintf("c%d/eth0", i)
		ip, err := a.allocate(r, owner, "")
		if err != nil || ip.String() != fmt.Sprintf("10.244.3.%d", 2+i) {
			t.Fatalf("%s: %v %v", owner, ip, err)
		}
		got[owner] = ip
	}
	if again, err := a.allocate(r, "c3/eth0", ""); err != nil || again != got["c3/eth0"] {
		t.Errorf("asked again: %v %v", again, err)
	}
	if _, err := a.allocate(r, "c9/eth0", ""); !errors.Is(err, ErrNoAddress) || !strings.Contains(err.Error(), "all 5 of 10.244.3.0/29 are in use") {
		t.Errorf("full: %v", err)
	}
	for range 2 { // twice is fine
		if err := a.release("c1/eth0"); err != nil {
			t.Fatal(err)
		}
	}
	if ip, err := a.allocate(r, "c9/eth0", ""); err != nil || ip != got["c1/eth0"] {
		t.Errorf("the only free one: %v %v", ip, err)
	}
	all, err := Addresses(a.dir)
	if err != nil || len(all) != 5 || all["c9"] != got["c1/eth0"] {
		t.Errorf("%v %v", all, err)
	}
	if ip, err := a.allocate(prefix("10.244.4.0/24"), "c0/eth0", ""); err != nil || ip.String() != "10.244.4.2" { // the node got another range
		t.Errorf("%v %v", ip, err)
	}
}

// TestAddressesRest: what was freed is given out again as late as possible.
func TestAddressesRest(t *testing.T) {
	a := addresses{t.TempDir()}
	r := prefix("10.244.3.0/24")
	seen := map[netip.Addr]bool{}
	for i := range 253 {
		ip, err := a.allocate(r, fmt.Sprintf("c%d/eth0", i), "")
		if err != nil || seen[ip] {
			t.Fatalf("%d: %v %v", i, ip, err)
		}
		seen[ip] = true
		if err := a.release(fmt.Sprintf("c%d/eth0", i)); err != nil {
			t.Fatal(err)
		}
	}
	if seen[prefix("10.244.3.0/24").Addr()] || seen[NodeAddr(r)] || seen[netip.MustParseAddr("10.244.3.255")] {
		t.Error("a reserved address was given out")
	}
}

func TestAllocateAtOnce(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex // guards got
	got := map[netip.Addr]string{}
	var wg sync.WaitGroup
	for i := range 40 {
		wg.Go(func() {
			owner := fmt.Sprintf("c%d/eth0", i)
			ip, err := addresses{dir}.allocate(prefix("10.244.3.0/24"), owner, "")
			mu.Lock()
			defer mu.Unlock()
			if other, taken := got[ip]; err != nil || taken {
				t.Errorf("%s: %v %v (also %s)", owner, ip, err, other)
			}
			got[ip] = owner
		})
	}
	wg.Wait()
}

func TestGC(t *testing.T) {
	dir := t.TempDir()
	a := addresses{dir}
	for _, o := range []string{"live/eth0", "dead/eth0"} {
		if _, err := a.allocate(prefix("10.244.3.0/24"), o, ""); err != nil {
			t.Fatal(err)
		}
	}
	st, err := os.Lstat(filepath.Join(dir, "10.244.3.3"))
	if err != nil {
		t.Fatal(err)
	}
	listed := st.ModTime()
	if n, err := GC(dir, []string{"live"}, listed); n != 0 || err != nil { // given out when the list was made
		t.Errorf("%d %v", n, err)
	}
	if n, err := GC(dir, []string{"live"}, listed.Add(time.Nanosecond)); n != 1 || err != nil {
		t.Errorf("%d %v", n, err)
	}
	if all, _ := Addresses(dir); len(all) != 1 || !all["live"].IsValid() {
		t.Errorf("left: %v", all)
	}
}

func TestNames(t *testing.T) {
	if n := HostLink(strings.Repeat("f", 64), "eth0"); len(n) > 15 || n == HostLink(strings.Repeat("f", 64), "eth1") || n == HostLink(strings.Repeat("f", 63), "eth0") {
		t.Error(n)
	}
	if m := podMAC("x", "eth0"); m[0]&3 != 2 {
		t.Errorf("%v is not local and unicast", m)
	}
}

func TestPlan(t *testing.T) {
	cfg := Config{NodeIP: netip.MustParseAddr("10.0.0.1"), PodCIDR: prefix("10.244.1.0/24"), ClusterCIDR: prefix("10.244.0.0/16")}
	peer := func(node, ip, cidr string) Peer { return Peer{node, netip.MustParseAddr(ip), prefix(cidr)} }
	ways, err := plan(cfg, []netip.Prefix{prefix("10.0.0.0/24")}, []Peer{
		peer("z", "10.0.0.3", "10.244.1.128/25"), // overlaps with us
		peer("c", "10.0.1.3", "10.244.3.0/24"),
		peer("b", "10.0.0.2", "10.244.2.0/24"),
		peer("d", "10.0.0.4", "10.244.3.0/24"), // overlaps with c
		peer("e", "10.0.0.1", "10.244.5.0/24"), // our address
		{Node: "f"},
	})
	var got []string
	for _, w := range ways {
		got = append(got, fmt.Sprintf("%s %s %v", w.dst, w.peer, w.overlay))
	}
	want := "10.244.0.0/16 invalid IP false|10.244.1.0/24 invalid IP false|10.244.2.0/24 10.0.0.2 false|10.244.3.0/24 10.0.1.3 true"
	if strings.Join(got, "|") != want {
		t.Errorf("%s\nwant\n%s", strings.Join(got, "|"), want)
	}
	for _, part := range []string{"node z (10.0.0.3, pods 10.244.1.128/25): its range overlaps with 10.244.1.0/24 of this node", "node d (10.0.0.4, pods 10.244.3.0/24): its range overlaps with 10.244.3.0/24 of c",
		"node e", "node f"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("error lacks %q:\n%v", part, err)
		}
	}
}

func conf(dir, more string) string {
	return fmt.Sprintf(`{"cniVersion":"1.1.0","name":"test","type":"skein","podCIDR":"10.244.3.0/24","dataDir":%q%s}`, dir, more)
}

// TestCNI drives the plugin as a runtime does: a process in the node's namespace.
func TestCNI(t *testing.T) {
	testnet.Need(t)
	node, pod := testnet.New(t, "node"), testnet.New(t, "pod")
	dir := t.TempDir()
	run := func(command, id, ns, conf string) (string, error) {
		t.Helper()
		out, err := testnet.CNI(node, command, id, ns, conf)
		return string(out), err
	}
	must := func(command, id, ns, conf string) string {
		t.Helper()
		out, err := run(command, id, ns, conf)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	if out := must("VERSION", "", "", `{"cniVersion":"1.0.0"}`); !strings.Contains(out, `"1.1.0"`) {
		t.Error(out)
	}
	must("STATUS", "", "", conf(dir, ""))
	var res struct {
		CNIVersion string
		Interfaces []struct{ Name, Mac, Sandbox string }
		IPs        []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal([]byte(must("ADD", "id1", pod.Path(), conf(dir, `,"mtu":1400`))), &res); err != nil {
		t.Fatal(err)
	}
	if res.CNIVersion != "1.1.0" || res.Interfaces[0].Sandbox != pod.Path() || res.IPs[0].Address != prefix("10.244.3.2/32") {
		t.Errorf("%+v", res)
	}
	pod.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err == nil && (l.Attrs().MTU != 1400 || l.Attrs().HardwareAddr.String() != res.Interfaces[0].Mac) {
			t.Errorf("%+v", l.Attrs())
		}
		return err
	})
	must("CHECK", "id1", pod.Path(), conf(dir, `,"prevResult":{"cniVersion":"1.1.0"}`))
	// ADD again for the same sandbox, as after a crash in the middle
	must("ADD", "id1", testnet.New(t, "pod-again").Path(), conf(dir, ""))

	if _, err := run("CHECK", "id1", pod.Path(), conf(dir, `,"prevResult":{"cniVersion":"1.1.0"}`)); err == nil {
		t.Error("CHECK is content with a pod whose link moved")
	}
	// a failing ADD leaves nothing
	if _, err := run("ADD", "id2", "/proc/self/ns/nothing", conf(dir, "")); err == nil {
		t.Error("ADD into nowhere")
	}
	full := testnet.New(t, "full")
	testnet.Link(full, "eth0", "", node, "taken", "")
	if _, err := run("ADD", "id3", full.Path(), conf(dir, "")); err == nil || !strings.Contains(err.Error(), "file exists") {
		t.Errorf("ADD with eth0 there already: %v", err)
	}
	if all, _ := Addresses(dir); len(all) != 1 {
		t.Errorf("addresses after failed ADDs: %v", all)
	}
	// GC: id4 is not among the valid ones
	must("ADD", "id4", testnet.New(t, "pod4").Path(), conf(dir, ""))
	must("GC", "", "", conf(dir, `,"cni.dev/valid-attachments":[{"containerID":"id1","ifname":"eth0"}]`))
	if all, _ := Addresses(dir); len(all) != 1 || !all["id1"].IsValid() {
		t.Errorf("addresses after GC: %v", all)
	}
	for range 2 {
		must("DEL", "id1", "", conf(dir, "")) // also with the namespace gone, and twice
	}
	if all, _ := Addresses(dir); len(all) != 0 {
		t.Errorf("addresses after DEL: %v", all)
	}
	node.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if strings.HasPrefix(l.Attrs().Name, "sk") {
				t.Errorf("link %s is left", l.Attrs().Name)
			}
		}
		return err
	})
	for c, want := range map[string]string{
		`{"cniVersion":"1.0.0","name":"t","type":"s","podCIDR":"x","dataDir":"/x"}`:             `podCIDR \"x\"`,
		`{"cniVersion":"1.0.0","name":"t","type":"s","podCIDR":"10.0.0.0/30","dataDir":"/x"}`:   "/29 or larger",
		`{"cniVersion":"1.0.0","name":"t","type":"s","podCIDR":"10.0.0.0/24"}`:                  "no dataDir",
		`{"cniVersion":"9.0.0","name":"t","type":"s","podCIDR":"10.0.0.0/24","dataDir":"/x"}`:   "incompatible CNI versions",
		`{"cniVersion":"1.0.0","name":"t","type":"s","podCIDR":"fd00::/64","dataDir":"/x","x":`: "error",
	} {
		if _, err := run("ADD", "id5", pod.Path(), c); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", c, err, want)
		}
	}
}

// TestSpoof: a pod cannot send in another's name.
func TestSpoof(t *testing.T) {
	testnet.Need(t)
	node := testnet.New(t, "node")
	dir := t.TempDir()
	node.Do(func() error { return sysctl("net/ipv4/conf/all/rp_filter", "0") })
	testnet.Pod(node, "good", dir, prefix("10.244.3.0/24"))
	bad, _ := testnet.Pod(node, "bad", dir, prefix("10.244.3.0/24"))
	node.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(lo, &netlink.Addr{IPNet: host(netip.MustParseAddr("10.9.9.9"))})
	})
	testnet.Serve(node, netip.MustParseAddrPort("10.9.9.9:7"), "node")
	testnet.NewProbe(bad, "").Ask("udp4", "10.9.9.9:7")
	bad.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(l, &netlink.Addr{IPNet: host(netip.MustParseAddr("10.244.3.77"))})
	})
	before := received(t, node)
	r := testnet.NewProbe(bad, "").Do(testnet.Request{Op: "ask", Network: "udp4", Addr: "10.9.9.9:7", Local: "10.244.3.77:0", Msg: "x", Timeout: 200 * time.Millisecond})
	if r.Err == "" || received(t, node) != before {
		t.Errorf("a packet with a foreign source arrived: %v", r)
	}
}

// received is the node's count of UDP datagrams.
func received(t *testing.T, node *testnet.NS) (line string) {
	node.Do(func() error {
		b, err := os.ReadFile("/proc/thread-self/net/snmp")
		for l := range strings.Lines(string(b)) {
			if strings.HasPrefix(l, "Udp: ") {
				f := strings.Fields(l)
				line = f[1]
			}
		}
		return err
	})
	return line
}

// TestSetup: idempotent, and the DNS address is never a source.
func TestSetup(t *testing.T) {
	testnet.Need(t)
	node, other := testnet.New(t, "node"), testnet.New(t, "other")
	testnet.Link(node, "eth0", "10.0.0.1/24", other, "eth0", "10.0.0.2/24")
	node.Sysctl("net/ipv4/conf/eth0/rp_filter", "1")
	node.Do(func() error {
		n, err := New(Config{NodeIP: netip.MustParseAddr("10.0.0.1"), PodCIDR: prefix("10.244.3.0/24"), DNS: netip.MustParseAddr("169.254.20.10")})
		if err != nil {
			return err
		}
		for range 2 {
			if err := n.Setup(); err != nil {
				return err
			}
		}
		for f, want := range map[string]string{"ip_forward": "1", "conf/all/rp_filter": "0", "conf/eth0/rp_filter": "2", "conf/eth0/send_redirects": "0"} {
			if b, err := os.ReadFile("/proc/sys/net/ipv4/" + f); err != nil || strings.TrimSpace(string(b)) != want {
				t.Errorf("%s is %s, want %s (%v)", f, b, want, err)
			}
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		addrs, err := netlink.AddrList(lo, unix.AF_INET)
		if err != nil {
			return err
		}
		found := false
		for _, a := range addrs {
			found = found || a.IP.String() == "169.254.20.10" && a.Scope == unix.RT_SCOPE_HOST
		}
		if !found {
			t.Errorf("addresses of lo: %v", addrs)
		}
		if _, err := New(Config{NodeIP: netip.MustParseAddr("10.0.0.9"), PodCIDR: prefix("10.244.3.0/24")}); err == nil || !strings.Contains(err.Error(), "no network device has the node's address 10.0.0.9") {
			t.Errorf("%v", err)
		}
		return nil
	})
	err := Config{VNI: 1 << 24, Port: 70000}.Validate()
	for _, part := range []string{"node address", "pod CIDR", "16777216", "70000"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("Validate: %v lacks %q", err, part)
		}
	}
}

func TestConflist(t *testing.T) {
	b, err := Conflist("skein-n1", "skein-helper", "/var/lib/skein/cni", prefix("10.244.3.0/24"), netip.MustParseAddr("10.0.0.1"), 1500)
	if err != nil {
		t.Fatal(err)
	}
	var l struct {
		CNIVersion, Name string
		Plugins          []map[string]any
	}
	if err := json.Unmarshal(b, &l); err != nil || l.Name != "skein-n1" || len(l.Plugins) != 1 || l.Plugins[0]["type"] != "skein-helper" {
		t.Fatalf("%v %s", err, b)
	}
	l.Plugins[0]["cniVersion"], l.Plugins[0]["name"] = l.CNIVersion, l.Name
	one, _ := json.Marshal(l.Plugins[0])
	if c, r, err := parseConf(one); err != nil || r != prefix("10.244.3.0/24") || c.MTU != 1500 || c.NodeIP != "10.0.0.1" || c.DataDir != "/var/lib/skein/cni" {
		t.Errorf("%+v %v %v", c, r, err)
	}
}

// FuzzConf: whatever a runtime sends is refused or gives a usable range.
func FuzzConf(f *testing.F) {
	f.Add([]byte(conf("/x", `,"mtu":1400`)))
	f.Add([]byte(`{"podCIDR":"10.0.0.0/33"}`))
	f.Add([]byte(`{`))
	f.Fuzz(func(t *testing.T, b []byte) {
		c, r, err := parseConf(b)
		if err != nil {
			return
		}
		if _, ok := next(r, netip.Addr{}, func(netip.Addr) bool { return false }); !ok || c.DataDir == "" || c.MTU <= 0 {
			t.Fatalf("%+v %v", c, r)
		}
	})
}

// TestAddressOfSamePod shows that a pod whose sandbox is made anew keeps its address, also when nobody told that the old one is gone.
func TestAddressOfSamePod(t *testing.T) {
	r := prefix("10.244.3.0/29")
	for name, released := range map[string]bool{"reboot": false, "new sandbox": true} {
		t.Run(name, func(t *testing.T) {
			a := addresses{t.TempDir()}
			take := func(owner, pod string) netip.Addr {
				t.Helper()
				ip, err := a.allocate(r, owner, pod)
				if err != nil {
					t.Fatal(err)
				}
				return ip
			}
			first, other := take("c1/eth0", "uid-1"), take("c2/eth0", "uid-2")
			if second := take("c1/net1", "uid-1"); second == first {
				t.Fatalf("two interfaces of one sandbox share %s", first)
			}
			if released {
				if err := a.release("c1/eth0"); err != nil {
					t.Fatal(err)
				}
			}
			if ip := take("c3/eth0", "uid-1"); ip != first {
				t.Errorf("the pod had %s, its new sandbox has %s", first, ip)
			}
			// The old sandbox is removed later: that is not the new one's loss.
			if err := a.release("c1/eth0"); err != nil {
				t.Fatal(err)
			}
			have, err := Addresses(a.dir)
			if err != nil || have["c3"] != first || have["c2"] != other {
				t.Errorf("addresses %v, %v", have, err)
			}
			// What another pod got meanwhile is not taken back.
			if err := a.release("c2/eth0"); err != nil {
				t.Fatal(err)
			}
			var got netip.Addr
			for i := 0; got != other && i < 5; i++ {
				got = take(fmt.Sprintf("d%d/eth0", i), fmt.Sprintf("uid-d%d", i))
			}
			if err := a.release("c1/net1"); err != nil { // room for one
				t.Fatal(err)
			}
			if ip := take("c4/eth0", "uid-2"); ip == other {
				t.Errorf("%s has two owners", ip)
			}
		})
	}
}
