package api

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-logr/logr"
	etcdclient "go.etcd.io/etcd/client/v3/kubernetes"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	restclient "k8s.io/client-go/rest"
	"k8s.io/klog/v2"
	"skein.io/skein/consensus/keyring"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/api/internal/testetcd"
	skeinclient "skein.io/skein/node/client"
)

// patience is how long anything may take on a slow machine.
const patience = 90 * time.Second

// fixture is a cluster of two API servers, started at the same moment on one empty store.
type fixture struct {
	store   *etcdclient.Client
	ca      *identity.Authority
	saKey   *ecdsa.PrivateKey
	keys    *memoryKeys
	proxies *identity.Authority
	servers []*running

	storeOf    func(key string) *etcdclient.Client
	closeStore func()

	prefixes *sync.Map // of keys for which a server asked for a store
	routes   *sync.Map // address of a Service or pod -> where a test listens for it
}

// dial stands for the datapath.
func (f *fixture) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	to, ok := f.routes.Load(addr)
	if !ok {
		return nil, fmt.Errorf("dial %s: no route in this test", addr)
	}
	var d net.Dialer
	return d.DialContext(ctx, network, to.(string))
}

type running struct {
	*Server
	tls  *httptest.Server
	stop func() error
}

var cluster *fixture

func TestMain(m *testing.M) {
	if bad := os.Getenv(badClientEnv); bad != "" {
		runBadClient(bad)
		return
	}
	if good := os.Getenv(goodClientEnv); good != "" {
		runGoodClient(good)
		return
	}
	// The testing package replaces os.Stderr when it runs (golang/go#33419), while the servers below log already.
	if os.Getenv("SKEIN_TEST_KLOG") == "" {
		klog.SetLogger(logr.Discard())
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "api-test")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if cluster, err = newFixture(dir); err != nil {
			panic(err)
		}
		defer cluster.close()
		return m.Run()
	}())
}

func newFixture(dir string) (*fixture, error) {
	f := &fixture{routes: &sync.Map{}, prefixes: &sync.Map{}}
	var err error
	begin := f.startEtcd
	if os.Getenv("SKEIN_LOAD") != "" {
		begin = f.startOwn
	}
	if err = begin(dir); err != nil {
		return nil, err
	}
	if f.ca, err = identity.NewAuthority("test", time.Now(), rand.Reader); err != nil {
		return nil, err
	}
	if f.saKey, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, err
	}
	if f.proxies, err = f.ca.Derive("front proxy"); err != nil {
		return nil, err
	}
	ring, err := keyring.New(rand.Reader, time.Now())
	if err != nil {
		return nil, err
	}
	f.keys = &memoryKeys{ring: ring}
	started := make(chan error, 2)
	f.servers = make([]*running, 2)
	for i := range f.servers {
		go func() {
			var err error
			f.servers[i], err = f.start(f.config(fmt.Sprintf("n%d", i+1)))
			started <- err
		}()
	}
	for range f.servers {
		if err := <-started; err != nil {
			return nil, err
		}
	}
	return f, nil
}

func (f *fixture) close() {
	for _, s := range f.servers {
		if err := s.stop(); err != nil {
			fmt.Fprintln(os.Stderr, "stop:", err)
		}
	}
	f.closeStore()
}

func (f *fixture) startEtcd(dir string) error {
	etcd, err := testetcd.Start(dir)
	if err != nil {
		return err
	}
	if f.store, err = etcd.Client(); err != nil {
		return err
	}
	f.storeOf = func(string) *etcdclient.Client { return f.store }
	f.closeStore = func() { f.store.Close(); etcd.Close() }
	return nil
}

// config is what a server of the cluster gets.
func (f *fixture) config(node string) Config {
	return Config{
		NodeName: node, AdvertiseIP: netip.MustParseAddr("192.0.2.10"), SecondServiceCIDR: netip.MustParsePrefix("fd00:96::/112"),
		Store: func(key string) *etcdclient.Client {
			f.prefixes.Store(key, true)
			return f.storeOf(key)
		},
		ClientCA: identity.EncodeCert(f.ca.Cert), CAKey: f.ca.Key, SAKey: f.saKey, Keys: f.keys, FrontProxyCA: f.proxies, Dial: f.dial,
		KubeletClientCert: func() (*tls.Certificate, error) {
			c, err := f.ca.IssueClient(AgentClientUser, nil, time.Hour, time.Now())
			return &c, err
		},
		Replicas: func() []netip.AddrPort { return []netip.AddrPort{netip.MustParseAddrPort("192.0.2.10:6443")} },
		Why: func(_ context.Context, namespace, pod string) (any, error) {
			switch pod {
			case "gone":
				return nil, &skeinclient.Error{Code: http.StatusNotFound, Message: "gone"}
			case "leaderless":
				return nil, &skeinclient.Error{Code: http.StatusServiceUnavailable, Message: "no leader"}
			}
			return map[string]string{"namespace": namespace, "pod": pod}, nil
		},
		Extra: map[string]http.Handler{"/skein/v1/": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "extra %s", r.URL.Path)
		})},
		Public: map[string]http.Handler{"/skein/v1/join": http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "public %s", r.URL.Path)
		})},
	}
}

// start runs a server behind TLS and waits until it is ready.
func (f *fixture) start(cfg Config) (*running, error) {
	ctx, cancel := context.WithCancel(context.Background())
	s, err := New(ctx, cfg)
	if err != nil {
		cancel()
		return nil, err
	}
	crt, err := f.ca.IssueServer("kubernetes", []string{"localhost"}, []netip.Addr{netip.MustParseAddr("127.0.0.1")}, time.Hour, time.Now())
	if err != nil {
		cancel()
		return nil, err
	}
	front := httptest.NewUnstartedServer(s.Handler())
	front.TLS = &tls.Config{Certificates: []tls.Certificate{crt}, ClientAuth: tls.RequestClientCert}
	front.EnableHTTP2 = true
	front.StartTLS()
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	if cfg.NodeName == "n1" {
		go func() {
			<-s.Ready()
			if err := s.RunLeaderHooks(ctx, nil); err != nil {
				panic(err)
			}
		}()
	}
	var stopped atomic.Bool
	r := &running{Server: s, tls: front, stop: func() error {
		if stopped.Swap(true) {
			return nil
		}
		cancel()
		select {
		case err := <-done:
			front.CloseClientConnections()
			front.Close()
			return err
		case <-time.After(patience):
			return fmt.Errorf("server of %s does not stop", cfg.NodeName)
		}
	}}
	select {
	case <-s.Ready():
		return r, nil
	case err := <-done:
		return nil, fmt.Errorf("server of %s ended: %v", cfg.NodeName, err)
	case <-time.After(patience):
		return nil, fmt.Errorf("server of %s is not ready", cfg.NodeName)
	}
}

// as gives the configuration of a client with a certificate for the user.
func (f *fixture) as(s *running, user string, groups ...string) *restclient.Config {
	c := f.anonymous(s)
	crt, err := f.ca.IssueClient(user, groups, time.Hour, time.Now())
	if err != nil {
		panic(err)
	}
	key, err := x509.MarshalECPrivateKey(crt.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		panic(err)
	}
	c.CertData = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: crt.Certificate[0]})
	c.KeyData = pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: key})
	return c
}

func (f *fixture) anonymous(s *running) *restclient.Config {
	return &restclient.Config{Host: s.tls.URL, QPS: -1, UserAgent: "test", WarningHandler: restclient.NoWarnings{},
		TLSClientConfig: restclient.TLSClientConfig{CAData: identity.EncodeCert(f.ca.Cert)}}
}

// dialTLS opens a connection as the client of a configuration, for what a library would not send.
func dialTLS(t *testing.T, c *restclient.Config) *tls.Conn {
	t.Helper()
	crt, err := tls.X509KeyPair(c.CertData, c.KeyData)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cluster.ca.Cert)
	conn, err := tls.Dial("tcp", strings.TrimPrefix(c.Host, "https://"), &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{crt}, NextProtos: []string{"http/1.1"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(patience))
	return conn
}

func client(t *testing.T, c *restclient.Config) kubernetes.Interface {
	t.Helper()
	k, err := kubernetes.NewForConfig(c)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

// admin gives a client with all rights of the first server.
func admin(t *testing.T) kubernetes.Interface {
	t.Helper()
	return client(t, cluster.as(cluster.servers[0], "admin", "system:masters"))
}

// namespace makes a namespace with the ServiceAccount that a controller would make.
func namespace(t *testing.T, k kubernetes.Interface) string {
	t.Helper()
	ns, err := k.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "t-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.CoreV1().ServiceAccounts(ns.Name).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return ns.Name
}

// makeNode makes a Node with k, and removes it when the test ends: to others that place pods, it would be one more.
func makeNode(t *testing.T, k kubernetes.Interface, node *corev1.Node) *corev1.Node {
	t.Helper()
	node, err := k.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := admin(t).CoreV1().Nodes().Delete(context.Background(), node.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	})
	return node
}

// eventually repeats f until it gives no error.
func eventually(t *testing.T, f func(context.Context) error) {
	t.Helper()
	var last error
	// Not the test's own context: that is over when it cleans up.
	err := wait.PollUntilContextTimeout(context.WithoutCancel(t.Context()), 20*time.Millisecond, patience, true, func(ctx context.Context) (bool, error) {
		err := f(ctx)
		if err == nil || ctx.Err() == nil { // else it says only that time is up
			last = err
		}
		return err == nil, nil
	})
	if err != nil {
		t.Fatalf("%v, last: %v", err, last)
	}
}

func simplePod(name string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"app": name}},
		Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "example/image"}}}}
}

func newFixtureCA() (*identity.Authority, error) {
	return identity.NewAuthority("other", time.Now(), rand.Reader)
}

func roleBinding(clusterRole, kind, name string) *rbacv1.RoleBinding {
	return &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: clusterRole},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: clusterRole},
		Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: kind, Name: name}}}
}
