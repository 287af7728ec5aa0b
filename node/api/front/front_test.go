package front

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"skein.io/skein/gossip/identity"
)

const patience = 10 * time.Second

// cluster is a CA and the view that all its fronts share.
type cluster struct {
	t    *testing.T
	ca   *identity.Authority
	pool *x509.CertPool

	mu       sync.Mutex
	targets  []Target
	watchers []chan struct{}
}

func newCluster(t *testing.T) *cluster {
	ca, err := identity.NewAuthority("test", time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, ca: ca, pool: x509.NewCertPool()}
	c.pool.AddCert(ca.Cert)
	return c
}

func (c *cluster) setTargets(ts ...Target) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.targets = ts
	for _, w := range c.watchers {
		select {
		case w <- struct{}{}:
		default:
		}
	}
}

func (c *cluster) replicas(self string) []Target {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []Target
	for _, t := range c.targets {
		if t.Name != self {
			out = append(out, t)
		}
	}
	return out
}

func (c *cluster) subscribe() (<-chan struct{}, func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	w := make(chan struct{}, 1)
	c.watchers = append(c.watchers, w)
	return w, func() {}
}

// node is a running front.
type node struct {
	*Front
	name  string
	addr  netip.AddrPort
	local atomic.Pointer[http.Handler]
	stop  func()
}

func (n *node) target(rtt time.Duration) Target {
	return Target{Name: n.name, Addr: n.addr, RTT: rtt, Ready: true}
}

func (n *node) serve(h http.Handler) {
	if h == nil {
		n.local.Store(nil)
		return
	}
	n.local.Store(&h)
}

func (c *cluster) start(name string, h http.Handler, change ...func(*Config)) *node {
	c.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		c.t.Fatal(err)
	}
	n := &node{name: name, addr: netip.MustParseAddrPort(l.Addr().String())}
	n.serve(h)
	issue := func(cn string) (*tls.Certificate, error) {
		crt, err := c.ca.IssueServer(cn, []string{"localhost"}, []netip.Addr{netip.MustParseAddr("127.0.0.1")}, time.Hour, time.Now())
		return &crt, err
	}
	cfg := Config{
		NodeName: name, Listeners: []net.Listener{l}, ClientCA: c.pool, Patience: 20 * time.Millisecond,
		Local: func() http.Handler {
			if h := n.local.Load(); h != nil {
				return *h
			}
			return nil
		},
		Replicas:    func() []Target { return c.replicas(name) },
		Changed:     c.subscribe,
		ServingCert: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return issue("api of " + name) },
		NodeCert:    func() (*tls.Certificate, error) { return issue("node " + name) },
	}
	for _, f := range change {
		f(&cfg)
	}
	if n.Front, err = New(cfg); err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	var once sync.Once
	n.stop = func() {
		once.Do(func() {
			cancel()
			select {
			case err := <-done:
				if err != nil {
					c.t.Errorf("front %s: %v", name, err)
				}
			case <-time.After(patience):
				c.t.Errorf("front %s does not stop", name)
			}
		})
	}
	c.t.Cleanup(n.stop)
	return n
}

// client makes a client with a certificate of user and connections of its own.
func (c *cluster) client(user string) *http.Client {
	crt, err := c.ca.IssueClient(user, nil, time.Hour, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	t := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: c.pool, Certificates: []tls.Certificate{crt}}}
	c.t.Cleanup(t.CloseIdleConnections)
	return &http.Client{Transport: t, Timeout: patience}
}

func (c *cluster) get(cl *http.Client, n *node, path string) (*http.Response, string, error) {
	resp, err := cl.Get("https://" + n.addr.String() + path)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, string(b), err
}

func (c *cluster) mustGet(cl *http.Client, n *node, path string) (*http.Response, string) {
	c.t.Helper()
	resp, body, err := c.get(cl, n, path)
	if err != nil {
		c.t.Fatal(err)
	}
	return resp, body
}

// whoAmI tells which node answered whom, and streams under /stream.
func whoAmI(name string) http.Handler {
	m := http.NewServeMux()
	m.HandleFunc("/who", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%s %s", name, r.TLS.PeerCertificates[0].Subject.CommonName)
	})
	m.HandleFunc("/stream", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, "open")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	return m
}

func TestLocalServesHTTP2(t *testing.T) {
	c := newCluster(t)
	n := c.start("a", whoAmI("a"))
	resp, body := c.mustGet(c.client("eve"), n, "/who")
	if resp.ProtoMajor != 2 || body != "a eve" {
		t.Fatalf("got %s %q, want HTTP/2 and the client's name", resp.Proto, body)
	}
	if cn := resp.TLS.PeerCertificates[0].Subject.CommonName; cn != "api of a" {
		t.Fatalf("certificate of %q, want the serving one", cn)
	}
}

func TestPassesOnWithIdentityEndToEnd(t *testing.T) {
	c := newCluster(t)
	thin, replica := c.start("thin", nil), c.start("replica", whoAmI("replica"))
	c.setTargets(replica.target(time.Millisecond))
	resp, body := c.mustGet(c.client("eve"), thin, "/who")
	if resp.ProtoMajor != 2 || body != "replica eve" {
		t.Fatalf("got %s %q, want the replica's answer to eve", resp.Proto, body)
	}
	if cn := resp.TLS.PeerCertificates[0].Subject.CommonName; cn != "api of replica" {
		t.Fatalf("TLS ends at %q, want the replica", cn)
	}
}

func TestTriesNearestThenNext(t *testing.T) {
	c := newCluster(t)
	thin, near, far := c.start("thin", nil), c.start("near", whoAmI("near")), c.start("far", whoAmI("far"))
	notReady := far.target(time.Microsecond)
	notReady.Name, notReady.Ready = "starting", false
	unknown := far.target(0)
	c.setTargets(unknown, notReady, near.target(time.Millisecond))
	if _, body := c.mustGet(c.client("x"), thin, "/who"); body != "near x" {
		t.Fatalf("answer %q, want near's", body)
	}
	near.stop()
	if _, body := c.mustGet(c.client("x"), thin, "/who"); body != "far x" {
		t.Fatalf("answer %q after near died unnoticed, want far's", body)
	}
}

func TestClosesStreamsToDeadReplicas(t *testing.T) {
	c := newCluster(t)
	thin, dying, other := c.start("thin", nil), c.start("dying", whoAmI("dying")), c.start("other", whoAmI("other"))
	c.setTargets(dying.target(time.Millisecond), other.target(time.Second))
	cl := c.client("x")
	resp, err := cl.Get("https://" + thin.addr.String() + "/stream")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	lines := bufio.NewReader(resp.Body)
	if l, err := lines.ReadString('\n'); err != nil || l != "open\n" {
		t.Fatalf("stream begins with %q, %v", l, err)
	}
	// The node itself goes on: only gossip says that it is dead.
	c.setTargets(other.target(time.Second))
	began := time.Now()
	if _, err := lines.ReadString('\n'); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("stream to a dead replica ended with %v", err)
	}
	if d := time.Since(began); d > patience/2 {
		t.Fatalf("stream to a dead replica ended after %s", d)
	}
	if _, body := c.mustGet(cl, thin, "/who"); body != "other x" {
		t.Fatalf("answer %q, want other's", body)
	}
}

func TestRefusesWithReason(t *testing.T) {
	c := newCluster(t)
	gone := c.start("gone", nil)
	target := gone.target(time.Millisecond)
	gone.stop()
	thin := c.start("thin", nil, func(cfg *Config) { cfg.Reason = func() string { return "two of three voters are dead" } })
	c.setTargets(target, Target{Name: "slow", Addr: target.Addr})
	cl := c.client("x")
	resp, body := c.mustGet(cl, thin, "/api/v1/pods")
	if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") == "" {
		t.Fatalf("got %s, Retry-After %q", resp.Status, resp.Header.Get("Retry-After"))
	}
	if cn := resp.TLS.PeerCertificates[0].Subject.CommonName; cn != "node thin" {
		t.Fatalf("refusal with the certificate of %q, want the node's", cn)
	}
	var s struct {
		Kind, APIVersion, Reason, Message string
		Code                              int
	}
	if err := json.Unmarshal([]byte(body), &s); err != nil {
		t.Fatal(err)
	}
	if s.Kind != "Status" || s.APIVersion != "v1" || s.Code != 503 || s.Reason != "ServiceUnavailable" {
		t.Fatalf("got %+v", s)
	}
	for _, part := range []string{"node thin", "2 other replicas known, 1 tried", "gone (127.0.0.1:", "refused", "since 20", "two of three voters are dead"} {
		if !strings.Contains(s.Message, part) {
			t.Errorf("message %q lacks %q", s.Message, part)
		}
	}
	// The connection was ended, so the next request finds the replica that has come.
	back := c.start("back", whoAmI("back"))
	c.setTargets(back.target(time.Millisecond))
	if _, body := c.mustGet(cl, thin, "/who"); body != "back x" {
		t.Fatalf("answer %q, want back's", body)
	}
}

// A connection that comes while nobody serves is answered as soon as somebody does, here or elsewhere.
func TestHoldsConnections(t *testing.T) {
	long := func(cfg *Config) { cfg.Patience = patience }
	for _, where := range []string{"here", "elsewhere"} {
		t.Run(where, func(t *testing.T) {
			c := newCluster(t)
			a, other := c.start("a", nil, long), c.start("other", whoAmI("other"))
			asked := make(chan string, 1)
			go func() {
				_, body, err := c.get(c.client("x"), a, "/who")
				if err != nil {
					body = err.Error()
				}
				asked <- body
			}()
			for !a.outage.on.Load() { // until it was found that nobody serves
				time.Sleep(time.Millisecond)
			}
			want := "other x"
			if where == "here" {
				want = "a x"
				a.serve(whoAmI("a"))
				c.setTargets()
			} else {
				c.setTargets(other.target(time.Millisecond))
			}
			if got := <-asked; got != want {
				t.Errorf("answer %q, want %q", got, want)
			}
		})
	}
}

// Two fronts that each take the other for a server must not pass a connection to and fro.
func TestNoLoop(t *testing.T) {
	c := newCluster(t)
	a, b := c.start("a", nil), c.start("b", nil)
	c.setTargets(a.target(time.Millisecond), b.target(time.Millisecond))
	resp, body := c.mustGet(c.client("x"), a, "/who")
	if resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(body, "node b ") {
		t.Fatalf("got %s %q, want a refusal by b", resp.Status, body)
	}
}

func TestLocalStops(t *testing.T) {
	c := newCluster(t)
	a, b := c.start("a", whoAmI("a")), c.start("b", whoAmI("b"))
	c.setTargets(b.target(time.Millisecond))
	cl := c.client("x")
	if _, body := c.mustGet(cl, a, "/who"); body != "a x" {
		t.Fatalf("answer %q, want a's", body)
	}
	a.serve(nil)
	if resp, _ := c.mustGet(cl, a, "/who"); resp.StatusCode != http.StatusServiceUnavailable {
		t.Fatalf("first answer after the API stopped: %s", resp.Status)
	}
	if _, body := c.mustGet(cl, a, "/who"); body != "b x" {
		t.Fatalf("answer %q on a new connection, want b's", body)
	}
	a.serve(whoAmI("a"))
	if _, body := c.mustGet(c.client("y"), a, "/who"); body != "a y" {
		t.Fatalf("answer %q after the API started again, want a's", body)
	}
}

func TestStopsWithOpenConnections(t *testing.T) {
	c := newCluster(t)
	thin := c.start("thin", nil, func(cfg *Config) { cfg.ShutdownTimeout = 50 * time.Millisecond })
	hijacked := make(chan struct{})
	replica := c.start("replica", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		close(hijacked)
		_, _ = io.Copy(io.Discard, conn) // like exec: until the connection ends
	}), func(cfg *Config) { cfg.ShutdownTimeout = 50 * time.Millisecond })
	c.setTargets(replica.target(time.Millisecond))
	silent, err := net.Dial("tcp", thin.addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	upgraded, err := tls.Dial("tcp", thin.addr.String(), &tls.Config{RootCAs: c.pool, NextProtos: []string{"http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer upgraded.Close()
	fmt.Fprintf(upgraded, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	<-hijacked
	replica.stop()
	thin.stop()
	for name, conn := range map[string]net.Conn{"silent": silent, "upgraded": upgraded} {
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s connection still open: %v", name, err)
		}
	}
	if n := thin.conns.Load() + replica.conns.Load(); n != 0 {
		t.Errorf("%d connections counted as open after the end", n)
	}
}

func TestFirstBytes(t *testing.T) {
	c := newCluster(t)
	n := c.start("a", whoAmI("a"), func(cfg *Config) { cfg.FirstByteTimeout = 100 * time.Millisecond })
	for _, tc := range []struct{ name, send, want string }{
		{"plain HTTP gets told", "GET / HTTP/1.0\r\n\r\n", "HTTP request to an HTTPS server"},
		{"nothing is closed", "", ""},
		{"half a preface is closed", preface[:5], ""},
		{"a later preface is closed", "skein-front/2\n", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			conn, err := net.Dial("tcp", n.addr.String())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := io.WriteString(conn, tc.send); err != nil {
				t.Fatal(err)
			}
			_ = conn.SetReadDeadline(time.Now().Add(patience))
			b, err := io.ReadAll(conn)
			if errors.Is(err, context.DeadlineExceeded) || !strings.Contains(string(b), tc.want) || tc.want == "" && len(b) > 0 {
				t.Fatalf("got %q, %v", b, err)
			}
		})
	}
}

func TestBoundsConnections(t *testing.T) {
	c := newCluster(t)
	n := c.start("a", whoAmI("a"), func(cfg *Config) { cfg.MaxConns = 1 })
	cl := c.client("x")
	c.mustGet(cl, n, "/who") // stays open
	if _, _, err := c.get(c.client("y"), n, "/who"); err == nil {
		t.Fatal("a second connection was served")
	}
	c.mustGet(cl, n, "/who")
}

// One address does not take all connections.
func TestBoundsAnAddress(t *testing.T) {
	c := newCluster(t)
	n := c.start("a", whoAmI("a"), func(cfg *Config) { cfg.MaxConns = 4 })
	first := c.client("x")
	c.mustGet(first, n, "/who")
	c.mustGet(c.client("y"), n, "/who")
	if _, _, err := c.get(c.client("z"), n, "/who"); err == nil {
		t.Fatal("a third connection of four was served to one address")
	}
	if source, ok := n.enter(&net.TCPConn{}); !ok || len(n.sources) != 2 { // of nowhere
		t.Errorf("another address is refused: %v, %v", source, n.sources)
	}
	n.leave(netip.Addr{})
	first.CloseIdleConnections()
	for { // the front hears of it
		if _, _, err := c.get(c.client("z"), n, "/who"); err == nil {
			break
		}
		time.Sleep(time.Millisecond)
	}
}

func TestValidateReportsAll(t *testing.T) {
	_, err := New(Config{MaxConns: -1})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, part := range []string{"NodeName", "Listeners", "Local", "Replicas", "Changed", "ServingCert", "NodeCert", "ClientCA", "MaxConns"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%v lacks %s", err, part)
		}
	}
}

func FuzzPeek(f *testing.F) {
	f.Add([]byte(preface))
	f.Add([]byte(preface + "\x16\x03\x01"))
	f.Add([]byte("\x16\x03\x01\x02\x00"))
	f.Add([]byte("skein-front/2\n"))
	f.Add([]byte("s"))
	f.Fuzz(func(t *testing.T, b []byte) {
		near, far := net.Pipe()
		go func() {
			_, _ = far.Write(b)
			far.Close()
		}()
		c := &conn{Conn: near, closed: func() {}}
		defer c.Close()
		forwarded, err := c.peek(patience)
		if err != nil {
			if len(b) > 0 && b[0] != preface[0] {
				t.Fatalf("refused %q: %v", b, err)
			}
			return
		}
		rest, _ := io.ReadAll(c)
		want := string(b)
		if forwarded {
			want = strings.TrimPrefix(want, preface)
		}
		if string(rest) != want || forwarded != strings.HasPrefix(string(b), preface) {
			t.Fatalf("%q: forwarded %v, then %q", b, forwarded, rest)
		}
	})
}

// A front whose targets do not answer gives each a head start only, and answers for itself before its patience ends twice.
func TestFallsBackSoon(t *testing.T) {
	c := newCluster(t)
	dead := func(name string) Target {
		return Target{Name: name, Addr: netip.MustParseAddrPort("127.0.0.1:1"), RTT: time.Millisecond, Ready: true}
	}
	live := c.start("live", whoAmI("live"))
	hangs := func(cfg *Config) {
		cfg.DialStagger, cfg.Patience = 20*time.Millisecond, 500*time.Millisecond
		cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			if address == "127.0.0.1:1" { // as a cable that is out
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return (&net.Dialer{}).DialContext(ctx, network, address)
		}
		cfg.Fallback = func(w http.ResponseWriter, r *http.Request, reason string) error {
			if r.URL.Path != "/known" {
				return errors.New("not known here")
			}
			_, err := io.WriteString(w, "as it was: "+reason)
			return err
		}
	}
	thin := c.start("thin", nil, hangs)
	last := live.target(time.Hour)
	last.RTT = time.Hour
	c.setTargets(dead("a"), dead("b"), dead("c"), last)
	began := time.Now()
	if _, body := c.mustGet(c.client("x"), thin, "/who"); body != "live x" || time.Since(began) > 400*time.Millisecond {
		t.Errorf("with three dead ones before it, %q answered after %s", body, time.Since(began))
	}
	c.setTargets(dead("a"), dead("b"))
	for i := range 3 {
		began = time.Now()
		_, body := c.mustGet(c.client("x"), thin, "/known")
		if !strings.Contains(body, "as it was: node thin reaches no API replica") {
			t.Errorf("answer %q", body)
		}
		if most := []time.Duration{time.Second, minReach + 250*time.Millisecond, minReach + 250*time.Millisecond}[i]; time.Since(began) > most {
			t.Errorf("request %d was answered after %s", i, time.Since(began))
		}
	}
	resp, body := c.mustGet(c.client("x"), thin, "/other")
	if resp.StatusCode != http.StatusServiceUnavailable || !strings.Contains(body, "not known here") {
		t.Errorf("%s %s", resp.Status, body)
	}
}

// A node whose API has lost the store's leader prefers one that has not, and serves by itself where there is none.
func TestPrefersWhoIsNotBehind(t *testing.T) {
	c := newCluster(t)
	var lost atomic.Bool
	a := c.start("a", whoAmI("a"), func(cfg *Config) { cfg.Behind = lost.Load })
	b := c.start("b", whoAmI("b"))
	thin := c.start("thin", nil)
	near, far := a.target(time.Millisecond), b.target(time.Second)
	c.setTargets(near, far)
	who := func(asked *node, want string) {
		t.Helper()
		if _, body := c.mustGet(c.client("x"), asked, "/who"); body != want {
			t.Errorf("answer %q, want %q", body, want)
		}
	}
	kept := c.client("y")
	if _, body := c.mustGet(kept, a, "/who"); body != "a y" {
		t.Errorf("answer %q", body)
	}
	who(thin, "a x")
	lost.Store(true)
	near.Behind = true
	c.setTargets(near, far)
	who(a, "b x")
	who(thin, "b x")
	c.mustGet(kept, a, "/who") // the last over this connection
	if _, body := c.mustGet(kept, a, "/who"); body != "b y" {
		t.Errorf("a connection from before: answer %q", body)
	}
	far.Behind = true
	c.setTargets(near, far)
	who(a, "a x")
	who(thin, "a x")
}
