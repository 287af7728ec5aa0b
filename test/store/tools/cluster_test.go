//go:build storetools

package tools

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// until repeats f until it succeeds.
func until(t *testing.T, what string, limit time.Duration, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// authority signs certificates into files.
type authority struct {
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{dir: t.TempDir()}
	var err error
	a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &a.key.PublicKey, a.key)
	must(t, err)
	a.cert, err = x509.ParseCertificate(der)
	must(t, err)
	writePEM(t, a.path("ca.crt"), "CERTIFICATE", der)
	return a
}

func (a *authority) path(name string) string { return filepath.Join(a.dir, name) }

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	must(t, os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
}

// issue writes NAME.crt and NAME.key, good for clients and for servers on the loopback.
func (a *authority) issue(t *testing.T, name string, groups ...string) (cert, key string) {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	must(t, err)
	tmpl := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name, Organization: groups}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &k.PublicKey, a.key)
	must(t, err)
	kder, err := x509.MarshalECPrivateKey(k)
	must(t, err)
	writePEM(t, a.path(name+".crt"), "CERTIFICATE", der)
	writePEM(t, a.path(name+".key"), "EC PRIVATE KEY", kder)
	return a.path(name + ".crt"), a.path(name + ".key")
}

// tool is the path of a program that was built for these tests.
func tool(t *testing.T, name string) string {
	t.Helper()
	p, err := filepath.Abs(filepath.Join(os.Getenv("SKEIN_TOOLS"), name))
	must(t, err)
	if _, err := os.Stat(p); err != nil {
		t.Fatalf("%v (the Makefile builds it and sets SKEIN_TOOLS)", err)
	}
	return p
}

// store is three processes.
type store struct {
	t     *testing.T
	ca    *authority
	nodes []*node
}

type node struct {
	name, id, dir, raft, admin string
	etcd                       int
	args                       []string
	cmd                        *exec.Cmd
}

// freePorts finds n ports that follow each other.
func freePorts(t *testing.T, n int) int {
	t.Helper()
next:
	for range 100 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		first := l.Addr().(*net.TCPAddr).Port
		ls := []net.Listener{l}
		for i := 1; i < n && err == nil; i++ {
			var x net.Listener
			if x, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", first+i)); err == nil {
				ls = append(ls, x)
			}
		}
		for _, l := range ls {
			l.Close()
		}
		if err != nil {
			continue next
		}
		return first
	}
	t.Fatal("no free ports")
	return 0
}

// startStore starts three processes and makes them voters of all shards.
func startStore(t *testing.T) *store {
	t.Helper()
	s := &store{t: t, ca: newAuthority(t)}
	cert, key := s.ca.issue(t, "server")
	var peers []string
	for i := range 3 {
		p := freePorts(t, 5)
		n := &node{name: fmt.Sprint("n", i+1), id: uuid.NewString(), dir: t.TempDir(), raft: fmt.Sprintf("127.0.0.1:%d", p), admin: fmt.Sprintf("127.0.0.1:%d", p+1), etcd: p + 2}
		peers = append(peers, fmt.Sprintf("%s=%s=%s=127.0.0.1:%d", n.name, n.id, n.raft, n.etcd))
		s.nodes = append(s.nodes, n)
	}
	for _, n := range s.nodes {
		n.args = []string{"--name", n.name, "--dir", n.dir, "--listen", n.raft, "--admin", n.admin, "--peers", strings.Join(peers, ","), "--etcd", fmt.Sprint("127.0.0.1:", n.etcd),
			"--etcd-ca", s.ca.path("ca.crt"), "--etcd-cert", cert, "--etcd-key", key}
		s.start(n)
	}
	t.Cleanup(func() {
		for _, n := range s.nodes {
			n.kill()
		}
	})
	s.call(s.nodes[0], "/bootstrap")
	for _, shard := range []string{"events", "pods", "system"} {
		for i, n := range s.nodes[1:] {
			replica := strings.TrimSpace(s.call(s.nodes[0], "/member/add", "shard", shard, "node", n.id))
			s.call(n, "/start-replica", "shard", shard, "replica", replica)
			until(t, "catch up", 20*time.Second, func() error {
				out, err := s.ask(s.nodes[0], "/progress", "shard", shard, "node", n.id)
				if err == nil && !strings.Contains(out, `"Ready":true`) {
					err = fmt.Errorf("node %d: %s", i, out)
				}
				return err
			})
			s.call(s.nodes[0], "/member/promote", "shard", shard, "replica", replica, "node", n.id)
		}
	}
	return s
}

func (s *store) start(n *node) {
	s.t.Helper()
	n.cmd = exec.Command(tool(s.t, "skein-store"), n.args...)
	var out bytes.Buffer
	n.cmd.Stdout, n.cmd.Stderr = &out, &out
	must(s.t, n.cmd.Start())
	until(s.t, "admin endpoint of "+n.name, 20*time.Second, func() error {
		_, err := s.ask(n, "/status")
		return err
	})
}

func (n *node) kill() {
	if n.cmd != nil {
		_ = n.cmd.Process.Kill() // it may have ended
		_ = n.cmd.Wait()         // killed
		n.cmd = nil
	}
}

func (s *store) ask(n *node, path string, args ...string) (string, error) {
	q := url.Values{}
	for i := 0; i < len(args); i += 2 {
		q.Set(args[i], args[i+1])
	}
	r, err := http.Get("http://" + n.admin + path + "?" + q.Encode())
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err == nil && r.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", path, b)
	}
	return string(b), err
}

func (s *store) call(n *node, path string, args ...string) (out string) {
	s.t.Helper()
	until(s.t, path, 20*time.Second, func() (err error) {
		out, err = s.ask(n, path, args...)
		return err
	})
	return out
}

// endpoints of a shard (0 system, 1 pods, 2 events) at all nodes.
func (s *store) endpoints(shard int) string {
	var out []string
	for _, n := range s.nodes {
		out = append(out, fmt.Sprintf("https://127.0.0.1:%d", n.etcd+shard))
	}
	return strings.Join(out, ",")
}
