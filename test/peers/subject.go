// Package peers starts what the benchmarks compare: Skein as a user starts it, on a machine made of namespaces, and upstream's etcd,
// kube-apiserver and kube-scheduler, and reads what their processes hold. Whoever starts one stops it; it needs root for Skein.
package peers

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/client"
	"skein.io/skein/test/cluster"
)

// Subject is one of the two that are compared: a Kubernetes API with everything behind it.
type Subject struct {
	Name   string
	Config *rest.Config // an administrator's
	// Pids are the processes that are counted, the one with the API first.
	Pids func() []int
	// Restart ends and starts the API's process again on the same data; ready is how long it took until it served.
	Restart func(context.Context) (ready time.Duration, err error)
	// StartScheduler starts upstream's kube-scheduler beside its API server, with its defaults but for a client that is not throttled
	// (50 requests a second), as in upstream's own benchmark; nil for Skein, which has one.
	StartScheduler func(path string) error
	Stop           func()
}

// Client speaks protobuf or JSON, over one connection of its own.
func (s *Subject) Client(media string) (*kubernetes.Clientset, error) {
	c := rest.CopyConfig(s.Config)
	c.ContentType, c.AcceptContentTypes = media, media
	c.QPS = -1
	return kubernetes.NewForConfig(c)
}

// Prepare makes a namespace and, where no controller does it, its ServiceAccount.
func (s *Subject) Prepare(ctx context.Context, namespace string) error {
	k, err := s.Client("application/vnd.kubernetes.protobuf")
	if err != nil {
		return err
	}
	if _, err := k.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: namespace}}, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("%s: %w", s.Name, err)
	}
	_, _ = k.CoreV1().ServiceAccounts(namespace).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}, metav1.CreateOptions{}) // Skein's controller may have been faster
	for range 200 {
		if _, err = k.CoreV1().ServiceAccounts(namespace).Get(ctx, "default", metav1.GetOptions{}); err == nil {
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("%s: %w", s.Name, err)
}

// ready asks /readyz until it is ok.
func ready(ctx context.Context, cfg *rest.Config) (time.Duration, error) {
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	hc, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return 0, err
	}
	defer hc.CloseIdleConnections()
	var last error
	for {
		if last = ask(ctx, hc, cfg.Host+"/readyz"); last == nil {
			return time.Since(began), nil
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("not ready: %w", last)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Fetch writes what a path of the server answers to a file: profiles, metrics.
func Fetch(cfg *rest.Config, path, file string) error {
	hc, err := rest.HTTPClientFor(cfg)
	if err != nil {
		return err
	}
	defer hc.CloseIdleConnections()
	resp, err := hc.Get(cfg.Host + path)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	raw, err := io.ReadAll(resp.Body)
	if err == nil {
		err = os.WriteFile(file, raw, 0o600)
	}
	return err
}

func ask(ctx context.Context, hc *http.Client, url string) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := hc.Do(r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, b)
	}
	return err
}

// StartSkein starts one daemon as a user would, on a machine of its own in namespaces; up are arguments for "skein up".
func StartSkein(ctx context.Context, skein, dir string, up ...string) (*Subject, error) {
	lab, err := cluster.New(ctx, cluster.Config{Dir: filepath.Join(dir, "lab")})
	if err != nil {
		return nil, err
	}
	s := &Subject{Name: "Skein"}
	s.Stop = func() {
		c, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if err := lab.Close(c); err != nil {
			fmt.Fprintln(os.Stderr, "remove the machine of Skein:", err)
		}
	}
	n, err := lab.AddNode(ctx, "n1", 1)
	if err == nil {
		err = n.Start(ctx, nil, append([]string{skein, "up"}, up...)...)
	}
	if err == nil {
		err = fetchAdmin(ctx, n, s)
	}
	if err == nil {
		_, err = ready(ctx, s.Config)
	}
	if err != nil {
		s.Stop()
		return nil, fmt.Errorf("start Skein: %w", err)
	}
	s.Pids = func() []int { return []int{n.Pid()} }
	s.Restart = func(ctx context.Context) (time.Duration, error) {
		if err := n.Stop(ctx); err != nil {
			return 0, err
		}
		began := time.Now()
		if err := n.Start(ctx, nil); err != nil {
			return 0, err
		}
		_, err := ready(ctx, s.Config)
		return time.Since(began), err
	}
	return s, nil
}

func fetchAdmin(ctx context.Context, n *cluster.Node, s *Subject) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	control := client.Unix(client.SocketPath(n.StateDir()))
	for {
		raw, err := control.Kubeconfig(ctx, "")
		if err == nil {
			if s.Config, err = clientcmd.RESTConfigFromKubeConfig(raw); err != nil {
				return err
			}
			s.Config.Host = fmt.Sprintf("https://%s:6443", n.IP())
			s.Config.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
				return n.DialContext(ctx, network, n.IP().String()+":6443")
			}
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// StartPeer starts upstream's etcd and kube-apiserver with their defaults.
func StartPeer(ctx context.Context, etcd, apiserver, dir string) (*Subject, error) {
	p := &peer{dir: filepath.Join(dir, "peer")}
	s := &Subject{Name: "kube-apiserver + etcd", Stop: p.stop, Pids: p.pids}
	err := p.prepare()
	if err == nil {
		err = p.startEtcd(etcd)
	}
	if err == nil {
		s.Config, err = p.admin()
	}
	begin := func() error { return p.startAPI(apiserver) }
	if err == nil {
		err = begin()
	}
	if err == nil {
		_, err = ready(ctx, s.Config)
	}
	if err != nil {
		p.stop()
		return nil, fmt.Errorf("start kube-apiserver and etcd (their logs are in %s): %w", p.dir, err)
	}
	s.StartScheduler = p.startScheduler
	s.Restart = func(ctx context.Context) (time.Duration, error) {
		end(p.api)
		began := time.Now()
		if err := begin(); err != nil {
			return 0, err
		}
		_, err := ready(ctx, s.Config)
		return time.Since(began), err
	}
	return s, nil
}

type peer struct {
	dir                  string
	ca                   *identity.Authority
	ports                [4]int // etcd's clients, etcd's peers, the API, the scheduler
	etcd, api, scheduler *exec.Cmd
}

func (p *peer) file(name string) string { return filepath.Join(p.dir, name) }

func (p *peer) prepare() (err error) {
	if err := os.MkdirAll(p.dir, 0o700); err != nil {
		return err
	}
	for i := range p.ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		p.ports[i] = l.Addr().(*net.TCPAddr).Port
		defer l.Close()
	}
	if p.ca, err = identity.NewAuthority("bench", time.Now(), rand.Reader); err != nil {
		return err
	}
	crt, err := p.ca.IssueServer("kubernetes", []string{"localhost"}, []netip.Addr{netip.MustParseAddr("127.0.0.1")}, 24*time.Hour, time.Now())
	if err != nil {
		return err
	}
	c, k, err := pems(crt)
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(p.file("ca.crt"), p.ca.CertPEM(), 0o600), os.WriteFile(p.file("tls.crt"), c, 0o600), os.WriteFile(p.file("tls.key"), k, 0o600))
}

func pems(c tls.Certificate) (cert, key []byte, err error) {
	der, err := x509.MarshalECPrivateKey(c.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}), pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

func (p *peer) admin() (*rest.Config, error) {
	crt, err := p.ca.IssueClient("admin", []string{"system:masters"}, 24*time.Hour, time.Now())
	if err != nil {
		return nil, err
	}
	c, k, err := pems(crt)
	return &rest.Config{Host: fmt.Sprint("https://127.0.0.1:", p.ports[2]), TLSClientConfig: rest.TLSClientConfig{CAData: p.ca.CertPEM(), CertData: c, KeyData: k}}, err
}

func (p *peer) start(name, path string, args ...string) (*exec.Cmd, error) {
	log, err := os.OpenFile(p.file(name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = log, log
	return cmd, cmd.Start()
}

func (p *peer) startEtcd(path string) (err error) {
	client, raft := fmt.Sprint("http://127.0.0.1:", p.ports[0]), fmt.Sprint("http://127.0.0.1:", p.ports[1])
	p.etcd, err = p.start("etcd", path, "--data-dir="+p.file("etcd"), "--listen-client-urls="+client, "--advertise-client-urls="+client,
		"--listen-peer-urls="+raft, "--initial-advertise-peer-urls="+raft, "--initial-cluster=default="+raft)
	return err
}

func (p *peer) startAPI(path string) (err error) {
	p.api, err = p.start("kube-apiserver", path, fmt.Sprint("--etcd-servers=http://127.0.0.1:", p.ports[0]), fmt.Sprint("--secure-port=", p.ports[2]),
		"--bind-address=127.0.0.1", "--advertise-address=192.0.2.10", "--client-ca-file="+p.file("ca.crt"), "--tls-cert-file="+p.file("tls.crt"),
		"--tls-private-key-file="+p.file("tls.key"), "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
		"--service-account-key-file="+p.file("tls.key"), "--service-account-signing-key-file="+p.file("tls.key"),
		"--authorization-mode=Node,RBAC", "--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged", "--enable-admission-plugins=NodeRestriction")
	return err
}

// schedulerQPS is what upstream's scheduler_perf allows its client.
const schedulerQPS = 5000

func (p *peer) startScheduler(path string) error {
	admin, err := p.admin()
	if err != nil {
		return err
	}
	kubeconfig, err := clientcmd.Write(clientcmdapi.Config{
		Clusters:       map[string]*clientcmdapi.Cluster{"peer": {Server: admin.Host, CertificateAuthorityData: admin.CAData}},
		AuthInfos:      map[string]*clientcmdapi.AuthInfo{"peer": {ClientCertificateData: admin.CertData, ClientKeyData: admin.KeyData}},
		Contexts:       map[string]*clientcmdapi.Context{"peer": {Cluster: "peer", AuthInfo: "peer"}},
		CurrentContext: "peer",
	})
	if err != nil {
		return err
	}
	config := fmt.Sprintf("apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\nleaderElection: {leaderElect: false}\n"+
		"clientConnection: {kubeconfig: %q, qps: %d, burst: %d, contentType: application/vnd.kubernetes.protobuf}\n",
		p.file("scheduler.kubeconfig"), schedulerQPS, schedulerQPS)
	err = errors.Join(os.WriteFile(p.file("scheduler.kubeconfig"), kubeconfig, 0o600), os.WriteFile(p.file("scheduler.yaml"), []byte(config), 0o600))
	if err != nil {
		return err
	}
	p.scheduler, err = p.start("kube-scheduler", path, "--config="+p.file("scheduler.yaml"), "--bind-address=127.0.0.1", fmt.Sprint("--secure-port=", p.ports[3]),
		"--authentication-kubeconfig="+p.file("scheduler.kubeconfig"), "--authorization-kubeconfig="+p.file("scheduler.kubeconfig"),
		"--authorization-always-allow-paths=/metrics,/healthz")
	return err
}

func (p *peer) pids() []int {
	pids := []int{p.api.Process.Pid, p.etcd.Process.Pid}
	if p.scheduler != nil {
		pids = append(pids, p.scheduler.Process.Pid)
	}
	return pids
}

func (p *peer) stop() {
	end(p.scheduler)
	end(p.api)
	end(p.etcd)
}

// end kills a process of ours and waits for it; its data is not needed.
func end(c *exec.Cmd) {
	if c != nil && c.Process != nil {
		_ = c.Process.Kill() // it may have ended by itself
		_ = c.Wait()         // says that it was killed
	}
}
