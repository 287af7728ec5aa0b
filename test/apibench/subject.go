package main

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

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/client"
	"skein.io/skein/test/cluster"
)

// subject is one of the two that are compared: a Kubernetes API with everything behind it.
type subject struct {
	name string
	cfg  *rest.Config // an administrator's
	// pids are the processes that are counted, the one with the API first.
	pids func() []int
	// restart ends and starts the API's process again on the same data; ready is how long it took until it served.
	restart func(context.Context) (ready time.Duration, err error)
	stop    func()
}

// client speaks protobuf or JSON, over one connection of its own.
func (s *subject) client(media string) (*kubernetes.Clientset, error) {
	c := rest.CopyConfig(s.cfg)
	c.ContentType, c.AcceptContentTypes = media, media
	c.QPS = -1
	return kubernetes.NewForConfig(c)
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

// startSkein starts one daemon as a user would, on a machine of its own in namespaces.
func startSkein(ctx context.Context, skein, dir string) (*subject, error) {
	lab, err := cluster.New(ctx, cluster.Config{Dir: filepath.Join(dir, "lab")})
	if err != nil {
		return nil, err
	}
	s := &subject{name: "Skein"}
	s.stop = func() {
		c, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if err := lab.Close(c); err != nil {
			fmt.Fprintln(os.Stderr, "remove the machine of Skein:", err)
		}
	}
	n, err := lab.AddNode(ctx, "n1", 1)
	if err == nil {
		err = n.Start(ctx, nil, skein, "up")
	}
	if err == nil {
		err = fetchAdmin(ctx, n, s)
	}
	if err == nil {
		_, err = ready(ctx, s.cfg)
	}
	if err != nil {
		s.stop()
		return nil, fmt.Errorf("start Skein: %w", err)
	}
	s.pids = func() []int { return []int{n.Pid()} }
	s.restart = func(ctx context.Context) (time.Duration, error) {
		if err := n.Stop(ctx); err != nil {
			return 0, err
		}
		began := time.Now()
		if err := n.Start(ctx, nil); err != nil {
			return 0, err
		}
		_, err := ready(ctx, s.cfg)
		return time.Since(began), err
	}
	return s, nil
}

func fetchAdmin(ctx context.Context, n *cluster.Node, s *subject) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	control := client.Unix(client.SocketPath(n.StateDir()))
	for {
		raw, err := control.Kubeconfig(ctx, "")
		if err == nil {
			if s.cfg, err = clientcmd.RESTConfigFromKubeConfig(raw); err != nil {
				return err
			}
			s.cfg.Host = fmt.Sprintf("https://%s:6443", n.IP())
			s.cfg.Dial = func(ctx context.Context, network, _ string) (net.Conn, error) {
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

// startPeer starts upstream's etcd and kube-apiserver with their defaults.
func startPeer(ctx context.Context, etcd, apiserver, dir string) (*subject, error) {
	p := &peer{dir: filepath.Join(dir, "peer")}
	s := &subject{name: "kube-apiserver + etcd", stop: p.stop, pids: p.pids}
	err := p.prepare()
	if err == nil {
		err = p.startEtcd(etcd)
	}
	if err == nil {
		s.cfg, err = p.admin()
	}
	begin := func() error { return p.startAPI(apiserver) }
	if err == nil {
		err = begin()
	}
	if err == nil {
		_, err = ready(ctx, s.cfg)
	}
	if err != nil {
		p.stop()
		return nil, fmt.Errorf("start kube-apiserver and etcd (their logs are in %s): %w", p.dir, err)
	}
	s.restart = func(ctx context.Context) (time.Duration, error) {
		end(p.api)
		began := time.Now()
		if err := begin(); err != nil {
			return 0, err
		}
		_, err := ready(ctx, s.cfg)
		return time.Since(began), err
	}
	return s, nil
}

type peer struct {
	dir       string
	ca        *identity.Authority
	ports     [3]int // etcd's clients, etcd's peers, the API
	etcd, api *exec.Cmd
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

func (p *peer) pids() []int { return []int{p.api.Process.Pid, p.etcd.Process.Pid} }

func (p *peer) stop() {
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
