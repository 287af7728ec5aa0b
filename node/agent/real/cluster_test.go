package real

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	etcdclient "go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcore "k8s.io/client-go/kubernetes/typed/core/v1"
	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/consensus/keyring"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/agent"
	"skein.io/skein/node/api"
	"skein.io/skein/node/api/encrypt"
	"skein.io/skein/node/cri"
	"skein.io/skein/node/desired"
)

const patience = 60 * time.Second

// realCluster is a real API on a real store, one real containerd, and the agent under test.
type realCluster struct {
	t       *testing.T
	admin   kubernetes.Interface
	node    *restclient.Config
	dir     string
	cgroups string
	ctrd    *cri.Containerd
	rt      *cri.Runtime
	api     *httptest.Server
	desired *desired.Store
	stop    func() // of the agent
}

func newRealCluster(t *testing.T) *realCluster {
	t.Helper()
	dir := filepath.Join(work, strings.ReplaceAll(t.Name(), "/", "_"))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	c := &realCluster{t: t, dir: dir, cgroups: cgroupRoot + "/n1"}
	c.startAPI()
	c.ctrd, c.rt = startContainerd(t, filepath.Join(dir, "c"), c.cgroups)
	c.startAgent()
	return c
}

func (c *realCluster) startAPI() {
	t := c.t
	ec := embed.NewConfig()
	ec.Dir, ec.UnsafeNoFsync, ec.ZapLoggerBuilder = filepath.Join(c.dir, "etcd"), true, embed.NewZapLoggerBuilder(zap.NewNop())
	anyPort := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	ec.ListenClientUrls, ec.ListenPeerUrls = []url.URL{anyPort}, []url.URL{anyPort}
	e, err := embed.StartEtcd(ec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	<-e.Server.ReadyNotify()
	store, err := etcdclient.New(clientv3.Config{Endpoints: []string{e.Clients[0].Addr().String()}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	ca, err := identity.NewAuthority("test", time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ring, err := keyring.New(rand.Reader, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	proxies, err := ca.Derive("front proxy")
	if err != nil {
		t.Fatal(err)
	}
	s, err := api.New(ctx, api.Config{NodeName: "n1", FrontProxyCA: proxies, AdvertiseIP: netip.MustParseAddr(nodeAddress),
		Store:    func(string) *etcdclient.Client { return store },
		ClientCA: identity.EncodeCert(ca.Cert), SAKey: key, Keys: encrypt.Fixed(ring),
		KubeletClientCert: func() (*tls.Certificate, error) {
			crt, err := ca.IssueClient(api.AgentClientUser, nil, time.Hour, time.Now())
			return &crt, err
		},
		Replicas: func() []netip.AddrPort { return []netip.AddrPort{netip.MustParseAddrPort(nodeAddress + ":6443")} }})
	if err != nil {
		t.Fatal(err)
	}
	crt, err := ca.IssueServer("kubernetes", []string{"localhost"}, []netip.Addr{netip.MustParseAddr("127.0.0.1")}, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	c.api = httptest.NewUnstartedServer(s.Handler())
	c.api.TLS = &tls.Config{Certificates: []tls.Certificate{crt}, ClientAuth: tls.RequestClientCert}
	c.api.EnableHTTP2 = true
	c.api.StartTLS()
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		<-done
		c.api.CloseClientConnections()
		c.api.Close()
	})
	select {
	case <-s.Ready():
	case err := <-done:
		t.Fatalf("API ended: %v", err)
	}
	as := func(user string, groups ...string) *restclient.Config {
		crt, err := ca.IssueClient(user, groups, time.Hour, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		keyPEM, err := identity.EncodeKey(crt.PrivateKey.(*ecdsa.PrivateKey))
		if err != nil {
			t.Fatal(err)
		}
		return &restclient.Config{Host: c.api.URL, QPS: -1, TLSClientConfig: restclient.TLSClientConfig{CAData: identity.EncodeCert(ca.Cert),
			CertData: pemCert(crt.Certificate[0]), KeyData: keyPEM}}
	}
	c.admin = kubernetes.NewForConfigOrDie(as("admin", "system:masters"))
	c.node = as("system:node:n1", "system:nodes")
	c.create("default")
}

// create furnishes a namespace as the controllers would.
func (c *realCluster) create(ns string) {
	t := c.t
	if _, err := c.admin.CoreV1().Namespaces().Get(t.Context(), ns, metav1.GetOptions{}); err != nil {
		if _, err := c.admin.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: ns}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.admin.CoreV1().ServiceAccounts(ns).Create(t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c.admin.CoreV1().ConfigMaps(ns).Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "kube-root-ca.crt"}, Data: map[string]string{"ca.crt": "CA"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// agentSpec is what an agent needs to run, here or in a process of its own.
type agentSpec struct {
	Host              string
	CA, Cert, Key     []byte
	Dir, Cgroups      string
	Endpoint, ExitDir string
}

func (c *realCluster) spec() agentSpec {
	return agentSpec{Host: c.node.Host, CA: c.node.CAData, Cert: c.node.CertData, Key: c.node.KeyData, Dir: c.dir, Cgroups: c.cgroups,
		Endpoint: c.ctrd.Endpoint(), ExitDir: c.ctrd.ExitDir()}
}

// newAgent opens the state and makes an agent; run runs both until ctx ends.
func newAgent(ctx context.Context, s agentSpec, log *slog.Logger) (store *desired.Store, run func(context.Context) error, err error) {
	client, err := kubernetes.NewForConfig(&restclient.Config{Host: s.Host, QPS: -1, TLSClientConfig: restclient.TLSClientConfig{CAData: s.CA, CertData: s.Cert, KeyData: s.Key}})
	if err != nil {
		return nil, nil, err
	}
	rt, err := cri.Dial(ctx, cri.DialConfig{Endpoint: s.Endpoint, ExitDir: s.ExitDir})
	if err != nil {
		return nil, nil, err
	}
	if store, err = desired.Open(filepath.Join(s.Dir, "desired.db"), nil, log); err != nil {
		return nil, nil, err
	}
	events := record.NewBroadcaster()
	events.StartRecordingToSink(&typedcore.EventSinkImpl{Interface: client.CoreV1().Events("")})
	a, err := agent.New(agent.Config{NodeName: "n1", NodeIPs: []netip.Addr{netip.MustParseAddr(nodeAddress)}, Client: client, Desired: store,
		Runtime: rt, Images: rt.Images, StateDir: filepath.Join(s.Dir, "state"), CgroupRoot: s.Cgroups, Zone: "z1", Logger: log,
		Recorder: events.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "kubelet", Host: "n1"})})
	if err != nil {
		return nil, nil, err
	}
	return store, func(ctx context.Context) error {
		done := make(chan error, 2)
		go func() { done <- store.Run(ctx, client, "n1") }()
		go func() { done <- a.Run(ctx) }()
		err := errors.Join(<-done, <-done)
		events.Shutdown()
		return errors.Join(err, store.Close(), rt.Close(context.Background()))
	}, nil
}

// startAgent runs the agent, as a daemon would, until stop or the end of the test.
func (c *realCluster) startAgent() {
	t := c.t
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	store, run, err := newAgent(t.Context(), c.spec(), log)
	if err != nil {
		t.Fatal(err)
	}
	c.desired = store
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- run(ctx) }()
	stopped := false
	c.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("agent: %v", err)
		}
	}
	t.Cleanup(c.stop)
}

// agentProcess starts an agent as a process of its own.
func (c *realCluster) agentProcess() *exec.Cmd {
	c.t.Helper()
	in, err := json.Marshal(c.spec())
	if err != nil {
		c.t.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe", "agent")
	cmd.Stdin, cmd.Stderr, cmd.Env = bytes.NewReader(in), os.Stderr, os.Environ()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // nothing outlives a killed test
	if err := cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd
}

// agentMain is that process: it works until it is killed.
func agentMain() error {
	var s agentSpec
	if err := json.NewDecoder(os.Stdin).Decode(&s); err != nil {
		return err
	}
	_, run, err := newAgent(context.Background(), s, slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	return run(context.Background())
}

// run creates a pod bound to the node.
func (c *realCluster) run(p *corev1.Pod) *corev1.Pod {
	c.t.Helper()
	p.Spec.NodeName = "n1"
	if p.Namespace == "" {
		p.Namespace = "default"
	}
	out, err := c.admin.CoreV1().Pods(p.Namespace).Create(c.t.Context(), p, metav1.CreateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}

// wait waits until a pod fulfils a condition and returns it.
func (c *realCluster) wait(name, what string, ok func(*corev1.Pod) bool) *corev1.Pod {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	var last *corev1.Pod
	for {
		p, err := c.admin.CoreV1().Pods("default").Get(ctx, name, metav1.GetOptions{})
		if err == nil {
			last = p
			if ok(p) {
				return p
			}
		}
		select {
		case <-ctx.Done():
			c.t.Fatalf("pod %s: timed out waiting for %s; last %v; %s", name, what, err, statusText(last))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func statusText(p *corev1.Pod) string {
	if p == nil {
		return "no pod"
	}
	b := fmt.Sprintf("phase %s %s %s", p.Status.Phase, p.Status.Reason, p.Status.Message)
	for _, s := range append(append([]corev1.ContainerStatus(nil), p.Status.InitContainerStatuses...), p.Status.ContainerStatuses...) {
		b += fmt.Sprintf("; %s ready %v restarts %d state %v last %v", s.Name, s.Ready, s.RestartCount, s.State.String(), s.LastTerminationState.String())
	}
	for _, cond := range p.Status.Conditions {
		b += fmt.Sprintf("; %s=%s %s %s", cond.Type, cond.Status, cond.Reason, cond.Message)
	}
	return b
}

func ready(p *corev1.Pod) bool {
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// gone waits until a pod is no longer in the API.
func (c *realCluster) gone(name string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	for {
		p, err := c.admin.CoreV1().Pods("default").Get(ctx, name, metav1.GetOptions{})
		if err != nil && ctx.Err() == nil {
			return
		}
		select {
		case <-ctx.Done():
			c.t.Fatalf("pod %s is still there: %s", name, statusText(p))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (c *realCluster) delete(name string, grace int64) {
	c.t.Helper()
	if err := c.admin.CoreV1().Pods("default").Delete(c.t.Context(), name, metav1.DeleteOptions{GracePeriodSeconds: &grace}); err != nil {
		c.t.Fatal(err)
	}
}

// appPod is a pod with one container of the test image.
func appPod(name string, args ...string) *corev1.Pod {
	zero := int64(2)
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PodSpec{TerminationGracePeriodSeconds: &zero,
		Containers: []corev1.Container{{Name: "c", Image: appImage, Args: args, ImagePullPolicy: corev1.PullNever}}}}
}
