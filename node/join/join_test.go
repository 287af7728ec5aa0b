package join

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"skein.io/skein/gossip/identity"
)

// cluster is a replica with a real store behind real TLS.
type cluster struct {
	t      *testing.T
	ca     *identity.Authority
	tokens *TokenStore
	clock  *clock
	nodes  []Known
	cfg    ServerConfig
	posts  atomic.Int32 // requests that reached the handler
	addr   string
}

func newCluster(t *testing.T, edit func(*ServerConfig)) *cluster {
	t.Helper()
	ca, err := identity.NewAuthority("c1", time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, ca: ca, clock: newClock()}
	c.tokens = NewTokenStore(testKV(t), ca.Hash())
	c.tokens.now = c.clock.now
	c.cfg = ServerConfig{
		Tokens: c.tokens, Authority: func() *identity.Authority { return ca }, Version: "v1-test", Now: c.clock.now,
		Nodes: func(context.Context) ([]Known, error) { return c.nodes, nil },
		Info: func(context.Context) (Info, error) {
			return Info{GossipKey: bytes.Repeat([]byte{7}, 32), Cluster: identity.DefaultCluster(),
				Seeds: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.1:7946")}}, nil
		},
	}
	if edit != nil {
		edit(&c.cfg)
	}
	handler, err := NewServer(c.cfg)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := ca.IssueServer("kubernetes", []string{"kubernetes"}, []netip.Addr{netip.MustParseAddr("127.0.0.1")}, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc(Path, func(w http.ResponseWriter, r *http.Request) {
		c.posts.Add(1)
		handler.ServeHTTP(w, r)
	})
	mux.Handle(RenewPath, handler.Renewal())
	c.addr = serve(t, mux, cert)
	return c
}

func serve(t *testing.T, h http.Handler, cert tls.Certificate) string {
	t.Helper()
	s := httptest.NewUnstartedServer(h)
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s.Listener.Addr().String()
}

func (c *cluster) token(o TokenOptions) identity.Token { c.t.Helper(); return create(c.t, c.tokens, o) }

func (c *cluster) request(name string, token identity.Token) Request {
	return Request{Addresses: []string{c.addr}, Token: token, Name: name, IPs: []netip.Addr{netip.MustParseAddr("10.0.0.9")}, Version: "v1-test", Patience: -1}
}

func (c *cluster) nodeLeaf(name string) *x509.Certificate { return c.nodeCert(name).Leaf }

func (c *cluster) nodeCert(name string) tls.Certificate {
	c.t.Helper()
	id, _, err := Join(context.Background(), c.request(name, c.token(TokenOptions{})))
	if err != nil {
		c.t.Fatal(err)
	}
	return id.Certificate()
}

func TestJoin(t *testing.T) {
	c := newCluster(t, nil)
	token := c.token(TokenOptions{TTL: time.Hour})
	r := c.request("n2", token)
	id, result, err := Join(context.Background(), r)
	if err != nil {
		t.Fatal(err)
	}
	if id.Name != "n2" || id.ClusterID != "c1" || !id.CA.Equal(c.ca.Cert) || id.GossipKey[0] != 7 || id.Cluster != identity.DefaultCluster() ||
		len(id.Seeds) != 1 || id.Cert.VerifyHostname("10.0.0.9") != nil {
		t.Errorf("identity %+v", id)
	}
	if result.Address != c.addr || result.LocalIP != netip.MustParseAddr("127.0.0.1") || result.Version != "v1-test" {
		t.Errorf("result %+v", result)
	}
	dir := filepath.Join(t.TempDir(), "identity")
	if err := id.Save(dir); err != nil {
		t.Fatal(err)
	}
	if _, err := identity.Load(dir); err != nil {
		t.Errorf("what was joined cannot be loaded: %v", err)
	}
	// The same machine again, with its key, while the node is there: welcome. Another one: not.
	c.nodes = []Known{{Name: "n2", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.9")}}}
	r.Key = id.Key
	if again, _, err := Join(context.Background(), r); err != nil || !again.Key.Equal(id.Key) {
		t.Errorf("the same machine again: %v", err)
	}
	r.Key = nil
	if _, _, err := Join(context.Background(), r); !errors.Is(err, ErrNameTaken) {
		t.Errorf("another machine with the name: %v", err)
	}
	// Without addresses of its own the node has the one it called from.
	r = c.request("n3", token)
	r.IPs = nil
	if id, _, err := Join(context.Background(), r); err != nil || id.Cert.VerifyHostname("127.0.0.1") != nil {
		t.Errorf("without IPs: %v", err)
	}
}

// Every refusal is one line that says what to do; and none leaves anything behind.
func TestJoinRefused(t *testing.T) {
	c := newCluster(t, nil)
	other := newCluster(t, nil)
	foreign, _ := identity.NewAuthority("c1", time.Now(), rand.Reader)
	good := c.token(TokenOptions{TTL: time.Hour})
	wrongSecret := good
	wrongSecret.Secret = c.token(TokenOptions{}).Secret
	otherCA := good
	otherCA.CAHash = foreign.Hash()
	expired := c.token(TokenOptions{TTL: time.Minute})
	revoked := c.token(TokenOptions{})
	if err := c.tokens.Revoke(context.Background(), revoked.ID); err != nil {
		t.Fatal(err)
	}
	usedUp := c.token(TokenOptions{MaxUses: 1})
	if _, _, err := Join(context.Background(), c.request("first", usedUp)); err != nil {
		t.Fatal(err)
	}
	c.clock.advance(5 * time.Minute)
	c.nodes = []Known{{Name: "n1", IPs: []netip.Addr{netip.MustParseAddr("::ffff:10.0.0.1")}}}
	before := c.snapshot()

	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	plain := httptest.NewServer(http.NotFoundHandler())
	defer plain.Close()
	empty := serve(t, http.NotFoundHandler(), c.serverCert())
	for _, x := range []struct {
		name string
		edit func(*Request)
		is   error
		want string
		sent bool // the handler may have seen it
	}{
		{"nobody there", func(r *Request) { r.Addresses = []string{closed.Addr().String()} }, ErrUnreachable, "connection refused: check that skein runs there", false},
		{"no TLS there", func(r *Request) { r.Addresses = []string{plain.Listener.Addr().String()} }, ErrUnreachable, "is it the API port (6443", false},
		{"another cluster there", func(r *Request) { r.Addresses = []string{other.addr} }, identity.ErrWrongCA, "nothing was sent; use a token of that cluster", false},
		{"token of another cluster", func(r *Request) { r.Token = otherCA }, identity.ErrWrongCA, "belongs to a cluster with CA", false},
		{"no join service there", func(r *Request) { r.Addresses = []string{empty} }, ErrUnavailable, "no join service runs there", false},
		{"wrong secret", func(r *Request) { r.Token = wrongSecret }, ErrTokenUnknown, "skein token list", true},
		{"unknown token", func(r *Request) { r.Token.ID = "aaaaaaaa" }, ErrTokenUnknown, "skein token create", true},
		{"expired", func(r *Request) { r.Token = expired }, ErrTokenExpired, "make a new one with `skein token create`", true},
		{"revoked", func(r *Request) { r.Token = revoked }, ErrTokenRevoked, "make a new one", true},
		{"used up", func(r *Request) { r.Token = usedUp }, ErrTokenUsedUp, "by 1 of 1 nodes", true},
		{"name taken", func(r *Request) { r.Name = "n1" }, ErrNameTaken, "choose another name (--name)", true},
		{"address taken", func(r *Request) { r.IPs = []netip.Addr{netip.MustParseAddr("10.0.0.1")} }, ErrAddressTaken, "node \"n1\"'s", true},
		{"address of a pod", func(r *Request) { r.IPs = []netip.Addr{netip.MustParseAddr("10.244.1.1")} }, ErrBadRequest, "the cluster's own range", true},
		{"address of the API Service", func(r *Request) { r.IPs = []netip.Addr{netip.MustParseAddr("10.96.0.1")} }, ErrBadRequest, "the cluster's own range", true},
		{"no real address", func(r *Request) { r.IPs = []netip.Addr{netip.IPv4Unspecified()} }, ErrBadRequest, "not an address at which", true},
		{"too new", func(r *Request) { r.Levels = identity.Levels{Level: 9, Min: 9} }, identity.ErrIncompatible, "upgrade the other side", true},
		{"bad name", func(r *Request) { r.Name = "N_1" }, identity.ErrBadName, "only a-z", false},
		{"reserved name", func(r *Request) { r.Name = "kubernetes" }, identity.ErrBadName, "reserved", false},
		{"no address", func(r *Request) { r.Addresses = nil }, ErrBadRequest, "at least one node", false},
		{"bad address", func(r *Request) { r.Addresses = []string{"a:b:c"} }, ErrBadRequest, "host or host:port is expected", false},
		{"no token", func(r *Request) { r.Token = identity.Token{} }, ErrBadRequest, "skein token create", false},
	} {
		t.Run(x.name, func(t *testing.T) {
			r := c.request("n9", good)
			x.edit(&r)
			posts := c.posts.Load() + other.posts.Load()
			id, _, err := Join(context.Background(), r)
			if id != nil || !errors.Is(err, x.is) || !strings.Contains(fmt.Sprint(err), x.want) {
				t.Errorf("error %v\nwant %v with %q", err, x.is, x.want)
			}
			if strings.Contains(fmt.Sprint(err), "\n") || strings.Contains(fmt.Sprint(err), r.Token.Secret) && r.Token.Secret != "" {
				t.Errorf("not one line, or with the secret: %q", err)
			}
			if sent := c.posts.Load()+other.posts.Load() != posts; sent != x.sent {
				t.Errorf("request sent: %t, want %t", sent, x.sent)
			}
		})
	}
	if after := c.snapshot(); after != before {
		t.Errorf("refused joins changed the store:\n%s\nbefore:\n%s", after, before)
	}
}

func (c *cluster) serverCert() tls.Certificate {
	c.t.Helper()
	cert, err := c.ca.IssueServer("kubernetes", []string{"kubernetes"}, nil, time.Hour, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	return cert
}

func (c *cluster) snapshot() string {
	c.t.Helper()
	got, err := c.tokens.kv.Get(context.Background(), "/", clientv3.WithPrefix())
	if err != nil {
		c.t.Fatal(err)
	}
	return fmt.Sprint(got.Kvs)
}

// A node without a way to a replica says so with its node certificate. A stolen one could say more, so it must not be told the
// token's secret.
func TestSecretIsNotToldToNodes(t *testing.T) {
	c := newCluster(t, nil)
	cert := c.nodeCert("thin")
	var seen bytes.Buffer
	thin := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Write(&seen)
		w.WriteHeader(http.StatusServiceUnavailable)
		io.WriteString(w, `{"kind":"Status","reason":"ServiceUnavailable","message":"no API replica is reachable since 12s"}`)
	}), cert)
	token := c.token(TokenOptions{})
	r := c.request("n2", token)
	r.Addresses = []string{thin}
	_, _, err := Join(context.Background(), r)
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "no API replica is reachable since 12s") {
		t.Errorf("error %v", err)
	}
	if seen.Len() == 0 || strings.Contains(seen.String(), token.Secret) || strings.Contains(seen.String(), token.ID) {
		t.Errorf("the node saw: %q", seen.String())
	}
	// The next address helps.
	r.Addresses = []string{thin, c.addr}
	if _, result, err := Join(context.Background(), r); err != nil || result.Address != c.addr {
		t.Errorf("with another address: %v %v", result, err)
	}
}

func TestJoinTriesEveryAddress(t *testing.T) {
	c, other := newCluster(t, nil), newCluster(t, nil)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	r := c.request("n2", c.token(TokenOptions{}))
	r.Addresses = []string{closed.Addr().String(), other.addr, c.addr}
	if _, result, err := Join(context.Background(), r); err != nil || result.Address != c.addr {
		t.Errorf("joined through %q, %v", result.Address, err)
	}
	r.Addresses = r.Addresses[:2]
	_, _, err = Join(context.Background(), r)
	if !errors.Is(err, ErrUnreachable) || !errors.Is(err, identity.ErrWrongCA) || strings.Count(err.Error(), "\n") != 1 {
		t.Errorf("error %v", err)
	}
}

// A replica that is not ready yet, or has no leader, is asked again; a verdict is not.
func TestJoinIsPatient(t *testing.T) {
	var calls atomic.Int32
	c := newCluster(t, func(cfg *ServerConfig) {
		authority := cfg.Authority
		cfg.Authority = func() *identity.Authority {
			if calls.Add(1) < 3 {
				return nil
			}
			return authority()
		}
	})
	r := c.request("n2", c.token(TokenOptions{}))
	r.Patience = 10 * time.Second
	if _, _, err := Join(context.Background(), r); err != nil || calls.Load() != 3 {
		t.Errorf("after %d calls: %v", calls.Load(), err)
	}
	r.Token.ID = "aaaaaaaa"
	start, posts := time.Now(), c.posts.Load()
	if _, _, err := Join(context.Background(), r); !errors.Is(err, ErrTokenUnknown) || c.posts.Load() != posts+1 || time.Since(start) > 5*time.Second {
		t.Errorf("a verdict was asked for %d times: %v", c.posts.Load()-posts, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := Join(ctx, r); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// What the cluster answers is checked as if it came from anywhere.
func TestAnswerIsChecked(t *testing.T) {
	c := newCluster(t, nil)
	token := c.token(TokenOptions{})
	foreign, err := identity.NewAuthority("c1", time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name string
		edit func(*answer)
		want string
	}{
		{"nothing", func(a *answer) { *a = answer{Version: 1, Levels: identity.OwnLevels()} }, "no PEM block"},
		{"newer", func(a *answer) { a.Version = 2 }, "version 2"},
		{"incompatible", func(a *answer) { a.Levels = identity.Levels{Level: 9, Min: 9} }, "upgrade this side"},
		{"another CA", func(a *answer) { a.CA = string(foreign.CertPEM()) }, "wrong cluster CA"},
		{"another node's certificate", func(a *answer) { a.Certificate = string(identity.EncodeCert(c.nodeLeaf("n7"))) }, "another key"},
		{"the CA as certificate", func(a *answer) { a.Certificate = a.CA }, "another key"},
		{"another cluster", func(a *answer) { a.ClusterID = "c2" }, "not of \"c2\""},
		{"short gossip key", func(a *answer) { a.GossipKey = a.GossipKey[:16] }, "16 bytes instead of 32"},
		{"no ranges", func(a *answer) { a.Cluster = identity.Cluster{} }, "CIDR is missing"},
	} {
		t.Run(x.name, func(t *testing.T) {
			liar := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				rec := httptest.NewRecorder()
				handler, err := NewServer(c.cfg)
				if err != nil {
					t.Error(err)
				}
				handler.ServeHTTP(rec, r)
				var a answer
				if err := json.Unmarshal(rec.Body.Bytes(), &a); err != nil {
					t.Error(err)
				}
				x.edit(&a)
				json.NewEncoder(w).Encode(a)
			}), c.serverCert())
			r := c.request("n"+fmt.Sprint(time.Now().UnixNano()), token)
			r.Addresses = []string{liar}
			id, _, err := Join(context.Background(), r)
			if id != nil || !strings.Contains(fmt.Sprint(err), x.want) {
				t.Errorf("error %v, want %q", err, x.want)
			}
		})
	}
	odd := serve(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Write(make([]byte, 2*maxAnswer)) }), c.serverCert())
	r := c.request("n2", token)
	r.Addresses = []string{odd}
	if _, _, err := Join(context.Background(), r); !errors.Is(err, ErrUnavailable) {
		t.Errorf("an endless answer: %v", err)
	}
}

func TestServerBounds(t *testing.T) {
	c := newCluster(t, nil)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: identity.PinnedTLS(c.ca.Hash())}}
	post := func(body string) (int, string, http.Header) {
		t.Helper()
		resp, err := client.Post("https://"+c.addr+Path, "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(text), resp.Header
	}
	if resp, err := client.Get("https://" + c.addr + Path); err != nil || resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("GET: %v %v", resp, err)
	}
	for _, x := range []struct {
		body, want string
		status     int
	}{
		{"", "cannot be read", 400},
		{"{", "cannot be read", 400},
		{`{"version":1} {}`, "something follows", 400},
		{`{"version":7}`, "install the cluster's version", 409},
		{`{"version":1,"name":"` + strings.Repeat("x", maxRequest) + `"}`, "too large", 400},
	} {
		if status, text, _ := post(x.body); status != x.status || !strings.Contains(text, x.want) {
			t.Errorf("%.20q: %d %s", x.body, status, text)
		}
	}
	// Five attempts of ten were used up by these; the rest by a wrong token.
	token := c.token(TokenOptions{})
	bad := c.request("n2", token)
	bad.Token.ID = "aaaaaaaa"
	for range 5 {
		if _, _, err := Join(context.Background(), bad); !errors.Is(err, ErrTokenUnknown) {
			t.Fatal(err)
		}
	}
	good := c.request("n2", token)
	if _, _, err := Join(context.Background(), good); !errors.Is(err, ErrTooMany) || !strings.Contains(err.Error(), "wait 10s") {
		t.Errorf("after ten failures: %v", err)
	}
	if _, _, header := post("{}"); header.Get("Retry-After") != "10" {
		t.Errorf("Retry-After %q", header.Get("Retry-After"))
	}
	c.clock.advance(failureEvery)
	if _, _, err := Join(context.Background(), good); err != nil {
		t.Errorf("after the wait: %v", err)
	}
}

func TestFailuresAreBounded(t *testing.T) {
	f, now := newFailures(), time.Now()
	source := func(n int) netip.Addr { return netip.AddrFrom4([4]byte{10, byte(n >> 16), byte(n >> 8), byte(n)}) }
	for n := range 3 * maxSources {
		for range failureBurst {
			f.count(source(n), now)
		}
	}
	if len(f.sources) > maxSources {
		t.Errorf("%d sources are remembered", len(f.sources))
	}
	if _, ok := f.allowed(source(1), now); ok {
		t.Error("a source that failed ten times is let through")
	}
	if _, ok := f.allowed(source(2*maxSources), now); ok {
		t.Error("a source that there was no room for is let through")
	}
	later := now.Add(failureBurst * failureEvery)
	f.count(source(9*maxSources), later)
	if len(f.sources) != 1 {
		t.Errorf("%d sources are remembered though all but one were quiet", len(f.sources))
	}
	if _, ok := f.allowed(source(1), later); !ok {
		t.Error("a source that waited is not let through")
	}
}

func TestServerConfigIsChecked(t *testing.T) {
	_, err := NewServer(ServerConfig{})
	for _, want := range []string{"Tokens", "Authority", "Nodes", "Info"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not name %s", err, want)
		}
	}
}

func TestStoreTroubleIsTold(t *testing.T) {
	c := newCluster(t, func(cfg *ServerConfig) { cfg.Tokens = NewTokenStore(brokenKV{cfg.Tokens.kv}, cfg.Tokens.caHash) })
	token := c.token(TokenOptions{})
	if _, _, err := Join(context.Background(), c.request("n2", token)); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "no leader") {
		t.Errorf("error %v", err)
	}
}

func TestFullAddress(t *testing.T) {
	for in, want := range map[string]string{
		"10.0.0.1": "10.0.0.1:6443", "10.0.0.1:1": "10.0.0.1:1", "n1": "n1:6443", "n1.example:7000": "n1.example:7000",
		"fd00::1": "[fd00::1]:6443", "[fd00::1]": "[fd00::1]:6443", "[fd00::1]:1": "[fd00::1]:1", " https://n1:6443/ ": "n1:6443",
		"": "", "n1:0": "", "n1:70000": "", "n1:x": "", "http://n1": "", "a b": "", ":6443": "", "user@n1": "", "n1/path": "",
	} {
		got, err := fullAddress(in)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q became %q, %v; want %q", in, got, err, want)
		}
	}
}

func TestNothingIsWritten(t *testing.T) {
	c := newCluster(t, nil)
	dir := t.TempDir()
	t.Chdir(dir)
	t.Setenv("HOME", dir)
	if _, _, err := Join(context.Background(), c.request("n2", c.token(TokenOptions{}))); err != nil {
		t.Fatal(err)
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) > 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
}

func FuzzDecodeRequest(f *testing.F) {
	f.Add([]byte(`{"version":1,"tokenID":"a","ips":["10.0.0.1"],"csr":"AAAA","levels":{"level":1,"min":1}}`))
	f.Add([]byte(`{}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if ask, err := decodeRequest(bytes.NewReader(data)); err == nil && ask.Version != wireVersion {
			t.Fatalf("accepted %+v", ask)
		}
	})
}

func FuzzDecodeRefusal(f *testing.F) {
	f.Add(403, []byte(`{"reason":"TokenExpired","message":"x"}`))
	f.Add(500, []byte(`<html>`))
	f.Fuzz(func(t *testing.T, status int, data []byte) {
		err := decodeRefusal(status, data)
		if err == nil || strings.ContainsAny(err.Error(), "\n\r\x1b") {
			t.Fatalf("error %q", err)
		}
	})
}
