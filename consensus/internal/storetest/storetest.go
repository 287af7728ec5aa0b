// Package storetest runs several hosts in one process, over loopback with mutual
// TLS, with links between them that can be cut. For the tests of consensus/... .
package storetest

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"go.etcd.io/etcd/client/v3/kubernetes"

	"skein.io/skein/consensus/host"
)

// Shard is the name of the shard that the helpers work on.
const Shard = "system"

// ca signs the nodes' certificates.
type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newCA(t testing.TB) *ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	must(t, err)
	c := &ca{key: key, pool: x509.NewCertPool()}
	c.cert, err = x509.ParseCertificate(der)
	must(t, err)
	c.pool.AddCert(c.cert)
	return c
}

func (c *ca) sign(t testing.TB, name string, groups ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	must(t, err)
	tmpl := &x509.Certificate{SerialNumber: serial, Subject: pkix.Name{CommonName: name, Organization: groups}, DNSNames: []string{name}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.cert, &key.PublicKey, c.key)
	must(t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Cluster of hosts. Nodes are numbered from 0.
type Cluster struct {
	T     testing.TB
	Nodes []*Node
	ca    *ca

	mu    sync.Mutex // guards links and the nodes' hosts and addresses
	links map[[2]int]*link
}

// Node of a cluster.
type Node struct {
	Name string
	ID   string // its NodeHostID
	c    *Cluster
	n    int
	cfg  host.Config
	addr string
	host *host.Host
}

// New makes n nodes and starts their hosts, without any replica. tune, if not
// nil, changes a node's configuration.
func New(t testing.TB, n int, tune func(node int, cfg *host.Config)) *Cluster {
	t.Helper()
	c := &Cluster{T: t, ca: newCA(t), links: map[[2]int]*link{}}
	dir := t.TempDir()
	for i := range n {
		node := &Node{Name: fmt.Sprintf("n%d", i), ID: uuid.NewString(), c: c, n: i}
		cert := c.ca.sign(t, node.Name)
		node.cfg = host.Config{
			NodeName: node.Name, NodeHostID: node.ID, Dir: filepath.Join(dir, node.Name), ListenAddr: "127.0.0.1:0",
			ServerTLS: &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: c.ca.pool, ClientAuth: tls.RequireAndVerifyClientCert},
			ClientTLS: func(id string) *tls.Config {
				return &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: c.ca.pool, ServerName: c.name(id)}
			},
			Authorize: func(cert *x509.Certificate, id string) error {
				if cert.Subject.CommonName != c.name(id) {
					return fmt.Errorf("%s does not speak for %s", cert.Subject.CommonName, c.name(id))
				}
				return nil
			},
			Resolve: func(id string) (string, bool) { return c.resolve(i, id) },
			Peers:   c.ids,
			Name:    c.name,
			Logger:  logger(t, node.Name),
		}
		if tune != nil {
			tune(i, &node.cfg)
		}
		c.Nodes = append(c.Nodes, node)
	}
	t.Cleanup(c.close)
	for _, node := range c.Nodes {
		node.Start()
	}
	return c
}

// logger writes to stderr when SKEIN_TEST_LOG is set (debug, info, ...).
func logger(t testing.TB, name string) *slog.Logger {
	v, ok := os.LookupEnv("SKEIN_TEST_LOG")
	if !ok {
		return nil
	}
	var level slog.Level
	must(t, level.UnmarshalText([]byte(v)))
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level})).With("node", name)
}

func (c *Cluster) byID(id string) *Node {
	for _, n := range c.Nodes {
		if n.ID == id {
			return n
		}
	}
	return nil
}

func (c *Cluster) name(id string) string {
	if n := c.byID(id); n != nil {
		return n.Name
	}
	return id
}

func (c *Cluster) ids() (out []string) {
	for _, n := range c.Nodes {
		out = append(out, n.ID)
	}
	return out
}

func (c *Cluster) resolve(from int, id string) (string, bool) {
	to := c.byID(id)
	if to == nil {
		return "", false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if to.addr == "" {
		return "", false
	}
	l := c.links[[2]int{from, to.n}]
	if l == nil {
		var err error
		if l, err = newLink(func() string { c.mu.Lock(); defer c.mu.Unlock(); return to.addr }); err != nil {
			return "", false
		}
		c.links[[2]int{from, to.n}] = l
	}
	return l.l.Addr().String(), true
}

func (c *Cluster) close() {
	var wg sync.WaitGroup
	for _, n := range c.Nodes {
		wg.Go(n.Kill)
	}
	wg.Wait()
	c.mu.Lock()
	links := c.links
	c.links = nil
	c.mu.Unlock()
	for _, l := range links {
		l.close()
	}
}

// Cut drops everything that node `from` sends to node `to`, or stops doing so.
func (c *Cluster) Cut(from, to int, cut bool) {
	c.resolve(from, c.Nodes[to].ID)
	c.mu.Lock()
	l := c.links[[2]int{from, to}]
	c.mu.Unlock()
	if l != nil {
		l.setCut(cut)
	}
}

// Fuse breaks the connections from one node to another once, after so many bytes.
// The channel is closed when that has happened.
func (c *Cluster) Fuse(from, to int, bytes int64) <-chan struct{} {
	c.resolve(from, c.Nodes[to].ID)
	c.mu.Lock()
	l := c.links[[2]int{from, to}]
	c.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fuse, l.blown = bytes, make(chan struct{})
	return l.blown
}

// Isolate cuts a node off in both directions, or reconnects it.
func (c *Cluster) Isolate(node int, cut bool) {
	for i := range c.Nodes {
		if i != node {
			c.Cut(i, node, cut)
			c.Cut(node, i, cut)
		}
	}
}

// ClientTLS is of a client with a certificate of the nodes' CA, for a node as its server.
func (c *Cluster) ClientTLS(n *Node, name string, groups ...string) *tls.Config {
	c.T.Helper()
	return &tls.Config{Certificates: []tls.Certificate{c.ca.sign(c.T, name, groups...)}, RootCAs: c.ca.pool, ServerName: n.Name}
}

// Start starts the node's host.
func (n *Node) Start() {
	n.c.T.Helper()
	h, err := host.New(n.cfg)
	must(n.c.T, err)
	n.c.mu.Lock()
	n.host, n.addr = h, h.Addr()
	n.c.mu.Unlock()
}

// Config of the node's host, for its next start.
func (n *Node) Config() *host.Config { return &n.cfg }

// Dial connects to another node's transport with this node's certificate.
func (n *Node) Dial(to *Node) net.Conn {
	n.c.T.Helper()
	conn, err := tls.Dial("tcp", to.Host().Addr(), n.cfg.ClientTLS(to.ID))
	must(n.c.T, err)
	n.c.T.Cleanup(func() { _ = conn.Close() })
	return conn
}

// Host is the node's running host; nil when it is stopped.
func (n *Node) Host() *host.Host {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	return n.host
}

// Client of the node's replica.
func (n *Node) Client() *kubernetes.Client {
	n.c.T.Helper()
	c, ok := n.Host().Client(Shard)
	if !ok {
		n.c.T.Fatalf("%s has no replica", n.Name)
	}
	return c
}

// Kill cuts the node off and then stops its host without handing anything over,
// which looks to the others like the death of its process.
func (n *Node) Kill() {
	n.c.Isolate(n.n, true)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	n.stop(ctx)
	n.c.Isolate(n.n, false)
}

// Stop closes the host as a daemon does.
func (n *Node) Stop() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	n.stop(ctx)
}

func (n *Node) stop(ctx context.Context) {
	h := n.Host()
	if h == nil {
		return
	}
	if err := h.Close(ctx); err != nil {
		n.c.T.Errorf("close %s: %v", n.Name, err)
	}
	n.c.mu.Lock()
	n.host, n.addr = nil, ""
	n.c.mu.Unlock()
}

// Voters bootstraps node 0 and makes the first n nodes voters.
func (c *Cluster) Voters(n int) {
	c.T.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	must(c.T, c.Nodes[0].Host().Bootstrap(ctx))
	for i := 1; i < n; i++ {
		c.Add(ctx, 0, i, true)
	}
}

// Add makes a node a replica of all shards, through node via, and returns the ID of
// that of Shard, which becomes one last: whoever may lead the cluster holds all.
func (c *Cluster) Add(ctx context.Context, via, node int, voter bool) (replica uint64) {
	c.T.Helper()
	for _, s := range slices.Backward(c.Nodes[via].Host().Shards().Shards()) {
		replica = c.AddTo(ctx, s.Name, via, node, voter)
	}
	return replica
}

// AddTo makes a node a replica of one shard, through node via.
func (c *Cluster) AddTo(ctx context.Context, shard string, via, node int, voter bool) (replica uint64) {
	c.T.Helper()
	h, n := c.Nodes[via].Host(), c.Nodes[node]
	m, err := h.Membership(ctx, shard)
	must(c.T, err)
	id := m.ConfigChangeID + 1
	must(c.T, h.ChangeMembership(ctx, shard, host.AddNonVoter, id, n.ID, m.ConfigChangeID))
	must(c.T, n.Host().StartReplica(ctx, shard, id))
	c.Until("caught up", func() error {
		p, err := h.Progress(ctx, n.ID, shard)
		if err == nil && !p.Ready {
			err = errors.New("not ready")
		}
		return err
	})
	if voter {
		m, err = h.Membership(ctx, shard)
		must(c.T, err)
		must(c.T, h.ChangeMembership(ctx, shard, host.Promote, id, n.ID, m.ConfigChangeID))
		c.known(shard, node)
	}
	return id
}

// known waits until all replicas know that a node votes. A promotion counts for a
// replica when it hears that it is committed, with the leader's next message: if the
// leader died before, the others would wait for it.
func (c *Cluster) known(shard string, node int) {
	c.T.Helper()
	for _, n := range c.Nodes {
		h := n.Host()
		if h == nil {
			continue
		}
		c.Until("all to know the voter", func() error {
			for _, s := range h.Status() {
				if s.Shard == shard && s.Role != host.RoleNone && !slices.ContainsFunc(s.Voters, func(m host.Member) bool { return m.NodeHostID == c.Nodes[node].ID }) {
					return fmt.Errorf("%s: %+v", n.Name, s)
				}
			}
			return nil
		})
	}
}

// Leader waits for a leader of Shard that has opened its epoch and returns its number.
func (c *Cluster) Leader() int {
	c.T.Helper()
	return c.LeaderOf(Shard)
}

// LeaderOf waits for a shard's leader that has opened its epoch and returns its number.
func (c *Cluster) LeaderOf(shard string) int {
	c.T.Helper()
	found := -1
	c.Until("a leader", func() error {
		for i, n := range c.Nodes {
			h := n.Host()
			if h == nil {
				continue
			}
			for _, s := range h.Status() {
				if s.Shard == shard && s.Role == host.RoleLeader && s.Epoch == s.Term && s.Ready {
					found = i
					return nil
				}
			}
		}
		return errors.New("none")
	})
	return found
}

// Until waits until f returns nil, at most 20 s.
func (c *Cluster) Until(what string, f func() error) {
	c.T.Helper()
	Until(c.T, what, f)
}

// Until waits until f returns nil, at most 20 s.
func Until(t testing.TB, what string, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("waiting for %s: %v", what, err)
}

// link forwards connections from one node to another.
type link struct {
	l  net.Listener
	to func() string
	wg sync.WaitGroup

	mu    sync.Mutex // guards below
	cut   bool
	conns map[net.Conn]bool
	fuse  int64         // bytes left until it blows, if blown is not nil
	blown chan struct{} // closed and forgotten then
}

// fused counts what is read from a connection.
type fused struct {
	net.Conn
	l *link
}

func (f fused) Read(b []byte) (int, error) {
	n, err := f.Conn.Read(b)
	f.l.mu.Lock()
	defer f.l.mu.Unlock()
	if f.l.blown == nil {
		return n, err
	}
	if f.l.fuse -= int64(n); f.l.fuse <= 0 {
		close(f.l.blown)
		f.l.blown = nil
		for c := range f.l.conns {
			_ = c.Close()
		}
	}
	return n, err
}

func newLink(to func() string) (*link, error) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	l := &link{l: ln, to: to, conns: map[net.Conn]bool{}}
	l.wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			l.wg.Go(func() { l.forward(c) })
		}
	})
	return l, nil
}

func (l *link) add(c net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cut {
		_ = c.Close()
		return false
	}
	l.conns[c] = true
	return true
}

func (l *link) forward(a net.Conn) {
	if !l.add(a) {
		return
	}
	defer l.drop(a)
	b, err := net.DialTimeout("tcp", l.to(), time.Second)
	if err != nil || !l.add(b) {
		return
	}
	defer l.drop(b)
	var wg sync.WaitGroup
	wg.Go(func() { _, _ = io.Copy(b, fused{a, l}); _ = a.Close(); _ = b.Close() })
	wg.Go(func() { _, _ = io.Copy(a, b); _ = a.Close(); _ = b.Close() })
	wg.Wait()
}

func (l *link) drop(c net.Conn) {
	_ = c.Close()
	l.mu.Lock()
	delete(l.conns, c)
	l.mu.Unlock()
}

func (l *link) setCut(cut bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cut = cut
	if cut {
		for c := range l.conns {
			_ = c.Close()
		}
	}
}

func (l *link) close() {
	_ = l.l.Close()
	l.setCut(true)
	l.wg.Wait()
}
