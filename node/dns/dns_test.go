package dns

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/miekg/dns"
)

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func testView() FakeView {
	many := make([]Endpoint, 0, 200)
	for i := range 200 {
		many = append(many, Endpoint{Addr: netip.AddrFrom4([4]byte{10, 244, 9, byte(i)}), Ready: true})
	}
	http := []Port{{"http", "TCP", 8080}}
	return FakeView{
		Namespaces: map[string]bool{"default": true, "kube-system": true, "empty": true},
		Services: map[string]Service{
			"default/web":       {ClusterIPs: []netip.Addr{addr("10.96.0.20")}, Ports: []Port{{"http", "TCP", 80}, {"dns", "UDP", 53}}},
			"default/db":        {Ports: http},
			"default/starting":  {Ports: http, PublishNotReady: true},
			"default/none":      {},
			"default/many":      {},
			"default/out":       {ExternalName: "www.Example.org"},
			"default/alias":     {ExternalName: "web.default.svc.cluster.local"},
			"default/loop":      {ExternalName: "loop.default.svc.cluster.local"},
			"default/broken":    {ExternalName: "nothing.default.svc.cluster.local"},
			"kube-system/dual6": {ClusterIPs: []netip.Addr{addr("10.96.0.21"), addr("fd00::21")}},
		},
		Backends: map[string][]Endpoint{
			"default/web":      {{Addr: addr("10.244.1.5"), Hostname: "one", Ready: true, Ports: http}},
			"default/db":       {{Addr: addr("10.244.1.7"), Hostname: "db-0", Ready: true, Ports: http}, {Addr: addr("10.244.1.8"), Ready: true, Ports: http}, {Addr: addr("10.244.1.9"), Hostname: "db-2"}},
			"default/starting": {{Addr: addr("10.244.1.10"), Hostname: "s-0", Ports: http}},
			"default/none":     {{Addr: addr("10.244.1.11")}},
			"default/many":     many,
		},
		Addrs: map[netip.Addr][]Owner{
			addr("10.96.0.20"): {{"default", "web", ""}},
			addr("10.244.1.7"): {{"default", "db", "db-0"}},
		},
	}
}

func testServer(t testing.TB, change func(*Config)) *Server {
	t.Helper()
	cfg := Config{View: testView(), Ranges: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("10.96.0.0/16")},
		ResolvConf: filepath.Join(t.TempDir(), "resolv.conf")}
	if err := os.WriteFile(cfg.ResolvConf, []byte("nameserver 192.0.2.1\nnameserver 192.0.2.2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s.up.dial = func(context.Context, string, string, *dns.Msg) (*dns.Msg, error) {
		return nil, errors.New("no network in this test")
	}
	return s
}

func question(name string, typ uint16) *dns.Msg { return new(dns.Msg).SetQuestion(name, typ) }

// show is the answer section, sorted: what tests compare.
func show(rrs []dns.RR) string {
	var out []string
	for _, rr := range rrs {
		out = append(out, strings.ReplaceAll(rr.String(), "\t", " "))
	}
	slices.Sort(out)
	return strings.Join(out, "\n")
}

func TestCluster(t *testing.T) {
	s := testServer(t, nil)
	const ok, nx = dns.RcodeSuccess, dns.RcodeNameError
	for _, c := range []struct {
		name  string
		typ   uint16
		rcode int
		want  string // answer; "" with rcode ok = no data
	}{
		{"web.default.svc.cluster.local.", dns.TypeA, ok, "web.default.svc.cluster.local. 5 IN A 10.96.0.20"},
		{"WEB.Default.svc.CLUSTER.local.", dns.TypeA, ok, "WEB.Default.svc.CLUSTER.local. 5 IN A 10.96.0.20"},
		{"web.default.svc.cluster.local.", dns.TypeAAAA, ok, ""},
		{"web.default.svc.cluster.local.", dns.TypeMX, ok, ""},
		{"dual6.kube-system.svc.cluster.local.", dns.TypeAAAA, ok, "dual6.kube-system.svc.cluster.local. 5 IN AAAA fd00::21"},
		{"nope.default.svc.cluster.local.", dns.TypeA, nx, ""},
		{"nope.default.svc.cluster.local.", dns.TypeAAAA, nx, ""},
		{"web.nowhere.svc.cluster.local.", dns.TypeA, nx, ""},
		{"web.empty.svc.cluster.local.", dns.TypeA, nx, ""},
		{"empty.svc.cluster.local.", dns.TypeA, ok, ""},
		{"nowhere.svc.cluster.local.", dns.TypeA, nx, ""},
		{"svc.cluster.local.", dns.TypeA, ok, ""},
		{"pod.cluster.local.", dns.TypeA, ok, ""},
		{"cluster.local.", dns.TypeA, ok, ""},
		{"cluster.local.", dns.TypeSOA, ok, "cluster.local. 5 IN SOA kube-dns.kube-system.svc.cluster.local. hostmaster.cluster.local. 1 7200 1800 86400 5"},
		{"dns-version.cluster.local.", dns.TypeTXT, ok, `dns-version.cluster.local. 5 IN TXT "1.1.0"`},
		{"www.example.org.cluster.local.", dns.TypeA, nx, ""}, // search lists ask this all the time
		{"web.default.cluster.local.", dns.TypeA, nx, ""},
		// headless
		{"db.default.svc.cluster.local.", dns.TypeA, ok, "db.default.svc.cluster.local. 5 IN A 10.244.1.7\ndb.default.svc.cluster.local. 5 IN A 10.244.1.8"},
		{"db-0.db.default.svc.cluster.local.", dns.TypeA, ok, "db-0.db.default.svc.cluster.local. 5 IN A 10.244.1.7"},
		{"10-244-1-8.db.default.svc.cluster.local.", dns.TypeA, ok, "10-244-1-8.db.default.svc.cluster.local. 5 IN A 10.244.1.8"},
		{"db-0.db.default.svc.cluster.local.", dns.TypeAAAA, ok, ""},
		{"db-2.db.default.svc.cluster.local.", dns.TypeA, nx, ""}, // not ready
		{"db-9.db.default.svc.cluster.local.", dns.TypeA, nx, ""},
		{"a.db-0.db.default.svc.cluster.local.", dns.TypeA, nx, ""},
		{"starting.default.svc.cluster.local.", dns.TypeA, ok, "starting.default.svc.cluster.local. 5 IN A 10.244.1.10"},
		{"s-0.starting.default.svc.cluster.local.", dns.TypeA, ok, "s-0.starting.default.svc.cluster.local. 5 IN A 10.244.1.10"},
		{"none.default.svc.cluster.local.", dns.TypeA, nx, ""},
		{"one.web.default.svc.cluster.local.", dns.TypeA, ok, "one.web.default.svc.cluster.local. 5 IN A 10.244.1.5"},
		// SRV
		{"_http._tcp.web.default.svc.cluster.local.", dns.TypeSRV, ok, "_http._tcp.web.default.svc.cluster.local. 5 IN SRV 0 100 80 web.default.svc.cluster.local."},
		{"_HTTP._TCP.web.default.svc.cluster.local.", dns.TypeSRV, ok, "_HTTP._TCP.web.default.svc.cluster.local. 5 IN SRV 0 100 80 web.default.svc.cluster.local."},
		{"_http._udp.web.default.svc.cluster.local.", dns.TypeSRV, nx, ""},
		{"_https._tcp.web.default.svc.cluster.local.", dns.TypeSRV, nx, ""},
		{"_http._tcp.web.default.svc.cluster.local.", dns.TypeA, ok, ""},
		{"_tcp.web.default.svc.cluster.local.", dns.TypeSRV, ok, ""},
		{"_http._tcp.db.default.svc.cluster.local.", dns.TypeSRV, ok, "_http._tcp.db.default.svc.cluster.local. 5 IN SRV 0 100 8080 10-244-1-8.db.default.svc.cluster.local.\n_http._tcp.db.default.svc.cluster.local. 5 IN SRV 0 100 8080 db-0.db.default.svc.cluster.local."},
		{"web.default.svc.cluster.local.", dns.TypeSRV, ok, "web.default.svc.cluster.local. 5 IN SRV 0 100 53 web.default.svc.cluster.local.\nweb.default.svc.cluster.local. 5 IN SRV 0 100 80 web.default.svc.cluster.local."},
		// names of pods
		{"10-244-1-5.default.pod.cluster.local.", dns.TypeA, ok, "10-244-1-5.default.pod.cluster.local. 5 IN A 10.244.1.5"},
		{"10-244-1-5.default.pod.cluster.local.", dns.TypeAAAA, ok, ""},
		{"10-244-1-5.nowhere.pod.cluster.local.", dns.TypeA, nx, ""},
		{"10-244-1.default.pod.cluster.local.", dns.TypeA, nx, ""},
		{"x.10-244-1-5.default.pod.cluster.local.", dns.TypeA, nx, ""},
		{"default.pod.cluster.local.", dns.TypeA, ok, ""},
		// aliases
		{"out.default.svc.cluster.local.", dns.TypeCNAME, ok, "out.default.svc.cluster.local. 5 IN CNAME www.example.org."},
		{"alias.default.svc.cluster.local.", dns.TypeA, ok, "alias.default.svc.cluster.local. 5 IN CNAME web.default.svc.cluster.local.\nweb.default.svc.cluster.local. 5 IN A 10.96.0.20"},
		{"alias.default.svc.cluster.local.", dns.TypeAAAA, ok, "alias.default.svc.cluster.local. 5 IN CNAME web.default.svc.cluster.local."},
		{"broken.default.svc.cluster.local.", dns.TypeA, nx, "broken.default.svc.cluster.local. 5 IN CNAME nothing.default.svc.cluster.local."},
		{"x.out.default.svc.cluster.local.", dns.TypeA, nx, ""},
		// reverse
		{"20.0.96.10.in-addr.arpa.", dns.TypePTR, ok, "20.0.96.10.in-addr.arpa. 5 IN PTR web.default.svc.cluster.local."},
		{"7.1.244.10.in-addr.arpa.", dns.TypePTR, ok, "7.1.244.10.in-addr.arpa. 5 IN PTR db-0.db.default.svc.cluster.local."},
		{"20.0.96.10.in-addr.arpa.", dns.TypeA, ok, ""},
		{"99.0.96.10.in-addr.arpa.", dns.TypePTR, nx, ""},
	} {
		m := s.answer(t.Context(), question(c.name, c.typ), true)
		if m.Rcode != c.rcode || show(m.Answer) != c.want {
			t.Errorf("%s %s: %s\n%s\nwant %s\n%s", c.name, dns.TypeToString[c.typ], dns.RcodeToString[m.Rcode], show(m.Answer), dns.RcodeToString[c.rcode], c.want)
		}
		if !m.Authoritative || !m.RecursionAvailable {
			t.Errorf("%s: flags %v", c.name, m.MsgHdr)
		}
		last := m.Answer
		noData := c.rcode != ok || len(last) == 0 || last[len(last)-1].Header().Rrtype == dns.TypeCNAME && c.typ != dns.TypeCNAME && len(last) == 1
		if soa := len(m.Ns) == 1 && m.Ns[0].Header().Rrtype == dns.TypeSOA; soa != noData {
			t.Errorf("%s %s: SOA %v, want %v", c.name, dns.TypeToString[c.typ], soa, noData)
		}
	}
	m := s.answer(t.Context(), question("_http._tcp.db.default.svc.cluster.local.", dns.TypeSRV), true)
	if got := show(m.Extra); got != "10-244-1-8.db.default.svc.cluster.local. 5 IN A 10.244.1.8\ndb-0.db.default.svc.cluster.local. 5 IN A 10.244.1.7" {
		t.Errorf("additional records\n%s", got)
	}
	if m := s.answer(t.Context(), question("loop.default.svc.cluster.local.", dns.TypeA), true); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("alias of itself: %v", m)
	}
}

func TestOddQuestions(t *testing.T) {
	s := testServer(t, nil)
	q := question("web.default.svc.cluster.local.", dns.TypeA)
	for name, c := range map[string]struct {
		change func(*dns.Msg)
		want   int
	}{
		"chaos":         {func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }, dns.RcodeRefused},
		"transfer":      {func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAXFR }, dns.RcodeRefused},
		"two questions": {func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }, dns.RcodeFormatError},
		"none":          {func(m *dns.Msg) { m.Question = nil }, dns.RcodeFormatError},
		"update":        {func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }, dns.RcodeNotImplemented},
		"EDNS 1":        {func(m *dns.Msg) { m.SetEdns0(1232, false).IsEdns0().SetVersion(1) }, dns.RcodeBadVers},
	} {
		m := q.Copy()
		c.change(m)
		r := s.answer(t.Context(), m, true)
		if r.Rcode != c.want || len(r.Answer) != 0 || r.Id != m.Id {
			t.Errorf("%s: %v, want %s", name, r, dns.RcodeToString[c.want])
		}
		if _, err := r.Pack(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSizes(t *testing.T) {
	s := testServer(t, nil)
	for _, c := range []struct {
		edns uint16
		udp  bool
		max  int
		tc   bool
	}{{0, true, 512, true}, {100, true, 512, true}, {900, true, 900, true}, {65000, true, maxUDP, true}, {0, false, 65535, false}} {
		q := question("many.default.svc.cluster.local.", dns.TypeA)
		if c.edns > 0 {
			q.SetEdns0(c.edns, false)
		}
		m := s.answer(t.Context(), q, c.udp)
		b, err := m.Pack()
		if err != nil || len(b) > c.max || m.Truncated != c.tc || !c.tc && len(m.Answer) != 200 {
			t.Errorf("%+v: %d bytes, truncated %v, %d answers, %v", c, len(b), m.Truncated, len(m.Answer), err)
		}
		if (m.IsEdns0() != nil) != (c.edns > 0) {
			t.Errorf("%+v: EDNS %v", c, m.IsEdns0())
		}
	}
}

// reply makes an upstream answer.
func reply(q *dns.Msg, rrs ...string) *dns.Msg {
	m := new(dns.Msg).SetReply(q)
	for _, s := range rrs {
		rr, err := dns.NewRR(s)
		if err != nil {
			panic(err)
		}
		if rr.Header().Rrtype == dns.TypeSOA {
			m.Ns = append(m.Ns, rr)
		} else {
			m.Answer = append(m.Answer, rr)
		}
	}
	return m
}

// TestForward: order of servers, TCP, failures, aliases into the outside, spelling.
func TestForward(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testServer(t, nil)
		var asked []string
		behave := map[string]func(network string, q *dns.Msg) (*dns.Msg, error){}
		s.up.dial = func(_ context.Context, network, server string, q *dns.Msg) (*dns.Msg, error) {
			asked = append(asked, network+" "+server)
			return behave[server](network, q)
		}
		good := func(_ string, q *dns.Msg) (*dns.Msg, error) {
			return reply(q, q.Question[0].Name+" 60 IN A 198.51.100.7"), nil
		}
		one, two := "192.0.2.1:53", "192.0.2.2:53"
		ask := func(name string) *dns.Msg {
			t.Helper()
			asked = nil
			return s.answer(t.Context(), question(name, dns.TypeA), true)
		}
		behave[one], behave[two] = good, good
		if m := ask("WWW.Example.Org."); show(m.Answer) != "WWW.Example.Org. 60 IN A 198.51.100.7" || len(asked) != 1 || m.Authoritative {
			t.Errorf("%v %v", m, asked)
		}
		if m := ask("out.default.svc.cluster.local."); !strings.Contains(show(m.Answer), "www.example.org. 60 IN A 198.51.100.7") || !strings.Contains(show(m.Answer), "CNAME www.example.org.") {
			t.Errorf("%v", m)
		}
		behave[one] = func(string, *dns.Msg) (*dns.Msg, error) { return nil, errors.New("no route") }
		if m := ask("a.example.org."); m.Rcode != 0 || !slices.Equal(asked, []string{"udp " + one, "udp " + two}) {
			t.Errorf("%v %v", m, asked)
		}
		if ask("b.example.org."); !slices.Equal(asked, []string{"udp " + two}) {
			t.Errorf("a server that failed is asked first again: %v", asked)
		}
		time.Sleep(restTime)
		behave[one] = func(network string, q *dns.Msg) (*dns.Msg, error) {
			m, _ := good(network, q)
			m.Truncated = network == "udp"
			return m, nil
		}
		if m := ask("c.example.org."); m.Truncated || len(m.Answer) != 1 || !slices.Equal(asked, []string{"udp " + one, "tcp " + one}) {
			t.Errorf("%v %v", m, asked)
		}
		behave[one] = func(_ string, q *dns.Msg) (*dns.Msg, error) { return new(dns.Msg).SetRcode(q, dns.RcodeRefused), nil }
		if m := ask("d.example.org."); m.Rcode != 0 {
			t.Errorf("%v", m)
		}
		behave[two] = behave[one]
		if m := ask("e.example.org."); m.Rcode != dns.RcodeRefused {
			t.Errorf("%v", m)
		}
		behave[one] = func(_ string, q *dns.Msg) (*dns.Msg, error) { return reply(question("evil.example.", dns.TypeA)), nil }
		behave[two] = behave[one]
		if m := ask("f.example.org."); m.Rcode != dns.RcodeServerFailure {
			t.Errorf("an answer to another question is believed: %v", m)
		}
		if m := ask("5.2.0.192.in-addr.arpa."); len(asked) == 0 {
			t.Errorf("a foreign reverse name is not forwarded: %v", m)
		}
	})
}

// TestForwardBounds: one flight for equal questions, a limit for others, the whole time bounded.
func TestForwardBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testServer(t, func(c *Config) { c.MaxForwards = 10 })
		var dials atomic.Int32
		s.up.dial = func(ctx context.Context, _, _ string, _ *dns.Msg) (*dns.Msg, error) {
			dials.Add(1)
			<-ctx.Done()
			return nil, ctx.Err()
		}
		start := time.Now()
		var wg sync.WaitGroup
		for range 10 {
			wg.Go(func() {
				if m := s.answer(t.Context(), question("slow.example.", dns.TypeA), true); m.Rcode != dns.RcodeServerFailure {
					t.Errorf("%v", m)
				}
			})
		}
		synctest.Wait()
		if dials.Load() != 1 {
			t.Errorf("%d dials for one question", dials.Load())
		}
		if m := s.answer(t.Context(), question("other.example.", dns.TypeA), true); m.Rcode != dns.RcodeServerFailure || time.Since(start) != 0 {
			t.Errorf("over the limit: %v after %v", m, time.Since(start))
		}
		if _, err := s.up.ask(t.Context(), dns.Question{Name: "x.example.", Qtype: dns.TypeA}, false); !errors.Is(err, ErrBusy) {
			t.Errorf("%v", err)
		}
		wg.Wait()
		if d := time.Since(start); d > totalTime {
			t.Errorf("took %v", d)
		}
		if s.up.waiting != 0 || len(s.up.flights) != 0 {
			t.Errorf("left behind: %d waiting, %d flights", s.up.waiting, len(s.up.flights))
		}
	})
}

func TestCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := testServer(t, func(c *Config) { c.CacheSize = 3 })
		dials := 0
		s.up.dial = func(_ context.Context, _, _ string, q *dns.Msg) (*dns.Msg, error) {
			dials++
			switch name := q.Question[0].Name; {
			case strings.HasPrefix(name, "no"):
				m := reply(q, "example. 3600 IN SOA a. b. 1 2 3 4 20")
				m.Rcode = dns.RcodeNameError
				return m, nil
			case strings.HasPrefix(name, "fail"):
				return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure), nil
			default:
				return reply(q, name+" 60 IN A 198.51.100.7", name+" 40 IN A 198.51.100.8"), nil
			}
		}
		ask := func(name string, want int, ttl uint32) {
			t.Helper()
			dials = 0
			m := s.answer(t.Context(), question(name, dns.TypeA), true)
			if dials != want {
				t.Errorf("%s: %d dials, want %d", name, dials, want)
			}
			for _, rr := range m.Answer {
				if rr.Header().Ttl != ttl && rr.Header().Ttl != ttl+20 {
					t.Errorf("%s: %v, want TTL %d", name, rr, ttl)
				}
			}
		}
		ask("a.example.", 1, 40)
		time.Sleep(30 * time.Second)
		ask("A.example.", 0, 10)
		time.Sleep(10 * time.Second)
		ask("a.example.", 1, 40)
		ask("no.example.", 1, 0)
		ask("no.example.", 0, 0)
		time.Sleep(20 * time.Second)
		ask("no.example.", 1, 0)
		ask("fail.example.", 2, 0)
		ask("fail.example.", 2, 0)
		for i := range 10 {
			ask(fmt.Sprintf("n%d.example.", i), 1, 40)
		}
		if n := len(s.up.cache.at); n != 3 || s.up.cache.order.Len() != 3 {
			t.Errorf("%d entries, want 3", n)
		}
	})
}

func TestResolvConf(t *testing.T) {
	own := []netip.AddrPort{netip.MustParseAddrPort("169.254.20.10:53")}
	for text, want := range map[string]string{
		"nameserver 10.0.0.1\n": "10.0.0.1:53",
		"# c\nsearch x\nnameserver\t10.0.0.1 \nnameserver fe80::1%eth0":                                                                "10.0.0.1:53 [fe80::1%eth0]:53",
		"nameserver 169.254.20.10\nnameserver 10.0.0.2":                                                                                "10.0.0.2:53",
		"nameserver x\nnameserver\nnameserver 1.1.1.1\nnameserver 1.1.1.1\nnameserver 2.2.2.2\nnameserver 3.3.3.3\nnameserver 4.4.4.4": "1.1.1.1:53 2.2.2.2:53 3.3.3.3:53",
		"": "",
	} {
		if got := strings.Join(parseServers(text, own), " "); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		s := testServer(t, nil)
		if got := s.up.pick(time.Now()); len(got) != 2 {
			t.Fatal(got)
		}
		if err := os.WriteFile(s.cfg.ResolvConf, []byte("nameserver 192.0.2.9"), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(reloadTime)
		if got := s.up.pick(time.Now()); !slices.Equal(got, []string{"192.0.2.9:53"}) {
			t.Errorf("%v", got)
		}
		if err := os.Remove(s.cfg.ResolvConf); err != nil {
			t.Fatal(err)
		}
		time.Sleep(reloadTime)
		if m := s.answer(t.Context(), question("a.example.", dns.TypeA), true); m.Rcode != dns.RcodeServerFailure {
			t.Errorf("%v", m)
		}
		if _, err := s.up.ask(t.Context(), dns.Question{Name: "a.example.", Qtype: dns.TypeA}, false); !errors.Is(err, ErrNoUpstream) {
			t.Errorf("%v", err)
		}
	})
}

// TestFirstQuestions: none of many that come at once, the first of all, misses the servers that another one is reading.
func TestFirstQuestions(t *testing.T) {
	for range 200 {
		s := testServer(t, nil)
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				if got := s.up.pick(time.Now()); len(got) != 2 {
					t.Errorf("servers %v, want 2", got)
				}
			})
		}
		all.Wait()
	}
}

// loop is an address of this test's own in 127.0.0.0/8.
func loopAddr(n byte) netip.AddrPort {
	pid := os.Getpid()
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, byte(64 + pid>>8&63), byte(pid), n}), 53)
}

// TestServe: real sockets; an upstream server at port 53 whose answer only fits TCP; many clients at once; an address that
// loops back; and an end that leaves nothing running.
func TestServe(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for port 53")
	}
	up, me := loopAddr(1), loopAddr(2)
	upstreamServer := func(network string) *dns.Server {
		return &dns.Server{Addr: up.String(), Net: network, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
			m := reply(q)
			for i := range 100 {
				m.Answer = append(m.Answer, &dns.A{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeA, Class: 1, Ttl: 60}, A: []byte{198, 51, 100, byte(i)}})
			}
			if network == "udp" {
				m.Truncate(512)
			}
			_ = w.WriteMsg(m)
		})}
	}
	var wg sync.WaitGroup
	for _, network := range []string{"udp", "tcp"} {
		srv := upstreamServer(network)
		started := make(chan struct{})
		srv.NotifyStartedFunc = func() { close(started) }
		wg.Go(func() { _ = srv.ListenAndServe() })
		<-started
		t.Cleanup(func() { _ = srv.Shutdown() })
	}
	s := testServer(t, func(c *Config) {
		c.Listen = []netip.AddrPort{me}
		conf := fmt.Sprintf("nameserver %s\nnameserver %s\n", me.Addr(), up.Addr())
		if err := os.WriteFile(c.ResolvConf, []byte(conf), 0o600); err != nil {
			t.Fatal(err)
		}
	})
	s.up.dial = exchange
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	ask := func(network, name string) (*dns.Msg, error) {
		c := dns.Client{Net: network, Timeout: 5 * time.Second}
		m, _, err := c.Exchange(question(name, dns.TypeA), me.String())
		return m, err
	}
	for end := time.Now().Add(5 * time.Second); ; { // until it listens
		if _, err := ask("tcp", "web.default.svc.cluster.local."); err == nil {
			break
		} else if time.Now().After(end) {
			t.Fatal(err)
		}
	}
	var clients sync.WaitGroup
	for i := range 50 {
		clients.Go(func() {
			if m, err := ask("udp", "web.default.svc.cluster.local."); err != nil || len(m.Answer) != 1 {
				t.Errorf("%v %v", m, err)
			}
			name := fmt.Sprintf("big%d.example.", i%5)
			if m, err := ask("tcp", name); err != nil || len(m.Answer) != 100 {
				t.Errorf("%v %v", m, err)
			}
			if m, err := ask("udp", name); err != nil || !m.Truncated {
				t.Errorf("%v %v", m, err)
			}
		})
	}
	clients.Wait()
	busy, err := New(Config{View: testView(), Listen: []netip.AddrPort{me}})
	if err != nil {
		t.Fatal(err)
	}
	if err := busy.Run(t.Context()); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Errorf("a busy port: %v", err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestConfig(t *testing.T) {
	if _, err := New(Config{Domain: "a..b", TTL: -1, CacheSize: -1, Listen: []netip.AddrPort{{}}}); err == nil {
		t.Error("no error")
	} else {
		for _, part := range []string{"no view", "a..b", "TTL -1ns", "-1 cached", "listen"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("%v lacks %q", err, part)
			}
		}
	}
}

// FuzzAnswer: any bytes that parse as a message get an answer that can be sent, fits, belongs to the question and is final
// for names of the cluster.
func FuzzAnswer(f *testing.F) {
	for _, name := range []string{"web.default.svc.cluster.local.", "_http._tcp.db.default.svc.cluster.local.", "many.default.svc.cluster.local.", "7.1.244.10.in-addr.arpa.",
		"a-b.default.pod.cluster.local.", "loop.default.svc.cluster.local.", "www.example.org.", `\000\..default.svc.cluster.local.`, "."} {
		for _, typ := range []uint16{dns.TypeA, dns.TypeSRV, dns.TypePTR, dns.TypeANY} {
			m := question(name, typ).SetEdns0(800, true)
			b, err := m.Pack()
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b, typ%2 == 0)
		}
	}
	s := testServer(f, nil)
	s.up.dial = func(_ context.Context, _, _ string, q *dns.Msg) (*dns.Msg, error) {
		return reply(q, "x.example. 60 IN A 198.51.100.7"), nil
	}
	f.Fuzz(func(t *testing.T, b []byte, udp bool) {
		q := new(dns.Msg)
		if q.Unpack(b) != nil {
			return
		}
		m := s.answer(t.Context(), q, udp)
		out, err := m.Pack()
		if err != nil {
			t.Fatalf("%v\n%v", err, m)
		}
		if m.Id != q.Id || !m.Response || udp && len(out) > maxUDP {
			t.Fatalf("%d bytes: %v", len(out), m)
		}
		if len(q.Question) == 1 && len(m.Question) == 1 && m.Question[0] != q.Question[0] {
			t.Fatalf("another question: %v", m)
		}
	})
}
