//go:build diffapi

package diffapi

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"crypto/rand"

	"github.com/go-logr/logr"
	"github.com/google/uuid"
	clientv3 "go.etcd.io/etcd/client/v3"
	clientv3kube "go.etcd.io/etcd/client/v3/kubernetes"
	"k8s.io/klog/v2"
	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/keyring"
	"skein.io/skein/node/api"
	"skein.io/skein/node/api/encrypt"
	"skein.io/skein/node/api/front"
)

const (
	// advertised is the address that both servers tell their clients. Nothing is sent there.
	advertised = "192.0.2.10"
	// startTimeout is how long a server may take to be ready on a busy machine.
	startTimeout = 120 * time.Second
	issuer       = "https://kubernetes.default.svc.cluster.local"
)

// upstreamArgs are the options of kube-apiserver that make it what Skein is by default.
func upstreamArgs(p *pki, etcd string, port int) []string {
	return []string{
		"--etcd-servers=" + etcd, "--bind-address=127.0.0.1", fmt.Sprint("--secure-port=", port), "--advertise-address=" + advertised,
		"--client-ca-file=" + p.path("ca.crt"), "--tls-cert-file=" + p.path("server.crt"), "--tls-private-key-file=" + p.path("server.key"),
		"--service-account-issuer=" + issuer, "--service-account-key-file=" + p.path("sa.key"), "--service-account-signing-key-file=" + p.path("sa.key"),
		"--authorization-mode=Node,RBAC", "--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged",
		"--requestheader-client-ca-file=" + p.path("proxy-ca.crt"), "--requestheader-allowed-names=" + api.FrontProxyUser,
		"--requestheader-username-headers=X-Remote-User", "--requestheader-group-headers=X-Remote-Group", "--requestheader-extra-headers-prefix=X-Remote-Extra-", "--requestheader-uid-headers=X-Remote-Uid",
		"--proxy-client-cert-file=" + p.path("proxy.crt"), "--proxy-client-key-file=" + p.path("proxy.key"),
		"--authentication-config=" + p.path("authentication.yaml"),
		// What a Skein cluster adds to upstream's defaults.
		"--enable-admission-plugins=NodeRestriction", "--default-not-ready-toleration-seconds=10", "--default-unreachable-toleration-seconds=10",
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// tool is an executable that the Makefile built.
func tool(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("SKEIN_TOOLS")
	path := filepath.Join(dir, name)
	if _, err := os.Stat(path); dir == "" || err != nil {
		t.Fatalf("%s: run this through make diff-api or make diff-api-fast: %v", path, err)
	}
	return path
}

func freePorts(t testing.TB, n int) []int {
	t.Helper()
	ports := make([]int, n)
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		defer l.Close()
		ports[i] = l.Addr().(*net.TCPAddr).Port
	}
	return ports
}

// process runs an executable until the end of the test.
func process(t testing.TB, log, path string, args ...string) {
	t.Helper()
	f, err := os.Create(log)
	must(t, err)
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = f, f
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // killed
		f.Close()
	})
}

// startUpstream runs kube-apiserver on etcd.
func startUpstream(t testing.TB, p *pki) *target {
	t.Helper()
	dir := t.TempDir()
	ports := freePorts(t, 3)
	etcd := fmt.Sprint("http://127.0.0.1:", ports[0])
	peer := fmt.Sprint("http://127.0.0.1:", ports[1])
	process(t, filepath.Join(dir, "etcd.log"), tool(t, "etcd"), "--data-dir", filepath.Join(dir, "etcd"), "--listen-client-urls", etcd, "--advertise-client-urls", etcd,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer, "--unsafe-no-fsync")
	log := filepath.Join(dir, "kube-apiserver.log")
	process(t, log, tool(t, "kube-apiserver"), upstreamArgs(p, etcd, ports[2])...)
	tg, err := newTarget("upstream", fmt.Sprint("127.0.0.1:", ports[2]), tool(t, "kubectl"), filepath.Join(dir, "kubectl"), p)
	must(t, err)
	awaitReady(t, tg, log)
	return tg
}

func awaitReady(t testing.TB, tg *target, log string) {
	t.Helper()
	began := time.Now()
	var last string
	for time.Since(began) < startTimeout {
		r, err := tg.send(t.Context(), &Case{Method: http.MethodGet, Path: "/readyz", Header: http.Header{}})
		if err == nil && r.code == http.StatusOK {
			t.Logf("%s is ready after %s", tg.name, time.Since(began).Round(10*time.Millisecond))
			return
		}
		last = fmt.Sprint(err)
		time.Sleep(50 * time.Millisecond) // it cannot be asked to tell
	}
	b, _ := os.ReadFile(log) // for the message only
	t.Fatalf("%s is not ready: %s\n%s", tg.name, last, b[max(0, len(b)-3000):])
}

// startSkein runs the API as a node runs it: on a replica of the store (the only one), behind the front.
func startSkein(t testing.TB, p *pki) *target {
	t.Helper()
	klog.SetLogger(logr.Discard())
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	store, closeStore := startStore(t, dir)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	self := netip.AddrPortFrom(netip.MustParseAddr(advertised), port)
	ring, err := keyring.New(rand.Reader, time.Now())
	must(t, err)
	srv, err := api.New(ctx, api.Config{
		NodeName: "n1", AdvertiseIP: self.Addr(), AdvertisePort: port, Store: store,
		ClientCA: p.ca.CertPEM(), SAKey: p.sa, Issuer: issuer, Keys: encrypt.Fixed(ring), FrontProxyCA: p.proxy,
		KubeletClientCert: func() (*tls.Certificate, error) {
			c, err := p.ca.IssueClient(api.AgentClientUser, nil, time.Hour, time.Now())
			return &c, err
		},
		ServiceCIDR: netip.MustParsePrefix("10.96.0.0/16"), EvictionGrace: 10 * time.Second,
		Replicas: func() []netip.AddrPort { return []netip.AddrPort{self} },
	})
	must(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(p.ca.Cert)
	cert := func() (*tls.Certificate, error) { return &p.server, nil }
	door, err := front.New(front.Config{
		NodeName: "n1", Listeners: []net.Listener{l}, Local: srv.Handler, Replicas: func() []front.Target { return nil },
		Changed:     func() (<-chan struct{}, func()) { return nil, func() {} },
		ServingCert: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return cert() }, NodeCert: cert, ClientCA: pool,
	})
	must(t, err)
	ended := make(chan error, 3)
	go func() { ended <- srv.Run(ctx) }()
	go func() { ended <- door.Run(ctx) }()
	go func() {
		select {
		case <-srv.Ready():
			ended <- srv.RunLeaderHooks(ctx, nil)
		case <-ctx.Done():
			ended <- nil
		}
	}()
	t.Cleanup(func() {
		cancel()
		for range 3 {
			if err := <-ended; err != nil {
				t.Errorf("the end of Skein's API: %v", err)
			}
		}
		closeStore()
	})
	select {
	case <-srv.Ready():
	case <-time.After(startTimeout):
		t.Fatal("Skein's API is not ready")
	}
	tg, err := newTarget("skein", l.Addr().String(), tool(t, "kubectl"), filepath.Join(dir, "kubectl"), p)
	must(t, err)
	awaitReady(t, tg, "")
	return tg
}

// startStore founds a cluster of one replica per shard.
func startStore(t testing.TB, dir string) (clients func(string) *clientv3kube.Client, stop func()) {
	t.Helper()
	id := uuid.NewString()
	h, err := host.New(host.Config{NodeName: "n1", NodeHostID: id, Dir: filepath.Join(dir, "store"), ListenAddr: "127.0.0.1:0",
		Resolve: func(string) (string, bool) { return "", false }, Peers: func() []string { return []string{id} }, Name: func(string) string { return "n1" }})
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	must(t, h.Bootstrap(ctx))
	table := h.Shards()
	clients = func(prefix string) *clientv3kube.Client {
		s, err := table.ForRange(prefix, clientv3.GetPrefixRangeEnd(prefix))
		if err != nil {
			panic(err)
		}
		c, ok := h.Client(s.Name)
		if !ok {
			panic("no replica of shard " + s.Name)
		}
		return c
	}
	return clients, func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := h.Close(ctx); err != nil {
			t.Errorf("close the store: %v", err)
		}
	}
}
