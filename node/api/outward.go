package api

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apiserver/pkg/authentication/request/headerrequest"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	apiwebhook "k8s.io/apiserver/pkg/util/webhook"
	restclient "k8s.io/client-go/rest"
	"k8s.io/kubernetes/pkg/controlplane/controller/clusterauthenticationtrust"
)

// What this server does towards others: webhooks and aggregated API servers.

const (
	// FrontProxyUser is the common name of the certificate that API servers show to aggregated ones; kubeadm's.
	FrontProxyUser = "front-proxy-client"
	// selfName is how webhooks may name this API: as Service default/kubernetes.
	selfName = "kubernetes.default.svc"
)

// frontProxy is who this server is to aggregated API servers. They believe the bearer of such a certificate when it says in headers
// who asks. Its CA signs nothing else and is derived by each server alike, so that all of them are believed by all.
type frontProxy struct {
	ca        dynamiccertificates.CAContentProvider
	cert, key []byte // PEM
}

func newFrontProxy(cfg *Config) (*frontProxy, error) {
	ca := cfg.FrontProxyCA
	now := time.Now()
	// As long as its CA, which is in the same memory: to make it anew before would protect nothing.
	c, err := ca.IssueClient(FrontProxyUser, nil, ca.Cert.NotAfter.Sub(now), now)
	if err != nil {
		return nil, fmt.Errorf("front proxy: %w", err)
	}
	key, err := x509.MarshalECPrivateKey(c.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		return nil, fmt.Errorf("front proxy: %w", err)
	}
	p := &frontProxy{
		cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Certificate[0]}),
		key:  pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: key}),
	}
	if p.ca, err = dynamiccertificates.NewStaticCAContent("front-proxy-ca", ca.CertPEM()); err != nil {
		return nil, fmt.Errorf("front proxy: %w", err)
	}
	return p, nil
}

func (p *frontProxy) pair() (cert, key []byte) { return p.cert, p.key }

// trust is what aggregated API servers read in ConfigMap kube-system/extension-apiserver-authentication.
func (p *frontProxy) trust(clientCA dynamiccertificates.CAContentProvider) clusterauthenticationtrust.ClusterAuthenticationInfo {
	return clusterauthenticationtrust.ClusterAuthenticationInfo{
		ClientCA:                         clientCA,
		RequestHeaderCA:                  p.ca,
		RequestHeaderAllowedNames:        headerrequest.StaticStringSlice{FrontProxyUser},
		RequestHeaderUsernameHeaders:     headerrequest.StaticStringSlice{"X-Remote-User"},
		RequestHeaderUIDHeaders:          headerrequest.StaticStringSlice{"X-Remote-Uid"},
		RequestHeaderGroupHeaders:        headerrequest.StaticStringSlice{"X-Remote-Group"},
		RequestHeaderExtraHeaderPrefixes: headerrequest.StaticStringSlice{"X-Remote-Extra-"},
	}
}

// asFiles calls f with the names of files that hold the certificate and its key: upstream reads them once, and takes nothing else.
// They are in memory only, and gone when f returns.
func (p *frontProxy) asFiles(f func(cert, key string) error) error {
	name := func(what string, content []byte) (string, func(), error) {
		fd, err := unix.MemfdCreate("skein-front-proxy-"+what, unix.MFD_CLOEXEC)
		if err != nil {
			return "", nil, fmt.Errorf("front proxy: memory for its %s: %w", what, err)
		}
		file := os.NewFile(uintptr(fd), what)
		if _, err := file.Write(content); err != nil {
			file.Close()
			return "", nil, fmt.Errorf("front proxy: memory for its %s: %w", what, err)
		}
		return fmt.Sprintf("/proc/self/fd/%d", fd), func() { file.Close() }, nil
	}
	cert, forget, err := name("certificate", p.cert)
	if err != nil {
		return err
	}
	defer forget()
	key, forget, err := name("key", p.key)
	if err != nil {
		return err
	}
	defer forget()
	return f(cert, key)
}

// outward is the transport whose dialer reaches Services and pods.
func (b *build) outward() *http.Transport { return &http.Transport{DialContext: b.cfg.Dial} }

// podTransport is what the proxies of pods and Services use. They go to addresses of pods, for which no certificate is made, so they believe
// any, as upstream's (CreateProxyTransport in k8s.io/kubernetes/pkg/controlplane/apiserver).
func (b *build) podTransport() *http.Transport {
	t := b.outward()
	t.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	return utilnet.SetTransportDefaults(t)
}

// webhookAuth says how webhooks of admission and of conversion are called: a Service by its address, over TLS for its DNS name. A webhook that is
// Service default/kubernetes (served by an aggregated API server, say) is this very server, called as itself.
func (b *build) webhookAuth() apiwebhook.AuthenticationInfoResolverWrapper {
	return apiwebhook.NewDefaultAuthenticationInfoResolverWrapper(b.outward(), nil, b.self.client(b.generic.LoopbackClientConfig.BearerToken), b.tracer)
}

// selfDoor is a door to this server with TLS, within the process. Most in-process clients need none (see package loopback), but
// upstream's client of webhooks adds a CA to whatever it is given, and that goes with TLS only.
type selfDoor struct {
	cfg   *Config
	conns chan net.Conn
	once  sync.Once
	done  chan struct{}

	mint sync.Once
	cert tls.Certificate
	err  error
}

func newSelfDoor(cfg *Config) *selfDoor {
	return &selfDoor{cfg: cfg, conns: make(chan net.Conn), done: make(chan struct{})}
}

func (d *selfDoor) client(token string) *restclient.Config {
	return &restclient.Config{
		Host: "https://" + selfName, BearerToken: token, QPS: -1, Dial: d.dial,
		TLSClientConfig: restclient.TLSClientConfig{ServerName: selfName, CAData: d.cfg.FrontProxyCA.CertPEM()},
	}
}

func (d *selfDoor) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case d.conns <- selfConn{far}:
		return near, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-d.done:
		return nil, net.ErrClosed
	}
}

// serve answers with h until Close.
func (d *selfDoor) serve(h http.Handler) error {
	s := &http.Server{Handler: h, ReadHeaderTimeout: time.Minute, TLSConfig: &tls.Config{MinVersion: tls.VersionTLS13, GetCertificate: d.certificate}}
	defer s.Close()
	if err := s.ServeTLS(d, "", ""); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

func (d *selfDoor) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	d.mint.Do(func() {
		now := time.Now()
		d.cert, d.err = d.cfg.FrontProxyCA.IssueServer("kubernetes", []string{selfName}, []netip.Addr{}, d.cfg.FrontProxyCA.Cert.NotAfter.Sub(now), now)
	})
	return &d.cert, d.err
}

// Accept, Close and Addr implement net.Listener.
func (d *selfDoor) Accept() (net.Conn, error) {
	select {
	case c := <-d.conns:
		return c, nil
	case <-d.done:
		return nil, net.ErrClosed
	}
}

func (d *selfDoor) Close() error {
	d.once.Do(func() { close(d.done) })
	return nil
}

func (d *selfDoor) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

// selfConn has an address that upstream can parse.
type selfConn struct{ net.Conn }

func (selfConn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }
