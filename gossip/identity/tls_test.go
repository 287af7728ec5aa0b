package identity

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// shake runs a TLS handshake over a pipe and, as TLS 1.3 clients learn of a refusal only when they read, one byte from the
// server to the client.
func shake(t *testing.T, server, client *tls.Config) (serverErr, clientErr error) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	done := make(chan error, 1)
	go func() {
		raw, err := ln.Accept()
		if err != nil {
			done <- err
			return
		}
		raw.SetDeadline(time.Now().Add(10 * time.Second))
		conn := tls.Server(raw, server)
		defer conn.Close()
		if err = conn.Handshake(); err == nil {
			_, err = conn.Write([]byte{1})
		}
		done <- err
	}()
	raw, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	raw.SetDeadline(time.Now().Add(10 * time.Second))
	client = client.Clone()
	if client.ServerName == "" {
		client.ServerName = "irrelevant"
	}
	conn := tls.Client(raw, client)
	defer conn.Close()
	if clientErr = conn.Handshake(); clientErr == nil {
		_, clientErr = conn.Read(make([]byte, 1))
	}
	conn.Close()
	return <-done, clientErr
}

func TestNodeTLS(t *testing.T) {
	ca, foreign := testAuthority(t, "c1"), testAuthority(t, "c1") // the same name does not help
	a, b, stranger := testIdentity(t, ca, "a"), testIdentity(t, ca, "b"), testIdentity(t, foreign, "a")
	admin, err := ca.IssueClient("admin", []string{"system:masters"}, time.Hour, testNow)
	if err != nil {
		t.Fatal(err)
	}
	api, err := ca.IssueServer("kubernetes", []string{"kubernetes"}, nil, time.Hour, testNow)
	if err != nil {
		t.Fatal(err)
	}
	late := *b
	if late.Cert, err = ca.SignNode(testCSR(t, b.Key, "b"), "b", nil, testNow.Add(-2*nodeValidity)); err != nil {
		t.Fatal(err)
	}
	with := func(c *tls.Config, cert ...tls.Certificate) *tls.Config {
		c = c.Clone()
		c.Certificates, c.GetCertificate, c.GetClientCertificate = cert, nil, nil
		return c
	}
	for _, c := range []struct {
		name                 string
		server, client       *tls.Config
		wantServer, wantWhat error
		fail                 string // "", "client" or "server": who must refuse
	}{
		{"nodes", a.NodeServerTLS(), b.NodeClientTLS("a"), nil, nil, ""},
		{"any node", a.NodeServerTLS(), b.NodeClientTLS(""), nil, nil, ""},
		{"another node answers", a.NodeServerTLS(), b.NodeClientTLS("c"), nil, ErrWrongPeer, "client"},
		{"server of another cluster", stranger.NodeServerTLS(), b.NodeClientTLS("a"), nil, nil, "client"},
		{"client of another cluster", a.NodeServerTLS(), stranger.NodeClientTLS(""), nil, nil, "client"},
		{"client of another cluster that checks nothing", a.NodeServerTLS(),
			&tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{stranger.Certificate()}}, nil, nil, "server"},
		{"client without certificate", a.NodeServerTLS(), with(b.NodeClientTLS("a")), nil, nil, "server"},
		{"admin is no node", a.NodeServerTLS(), with(b.NodeClientTLS("a"), admin), ErrNotNode, nil, "server"},
		{"server certificate as client", a.NodeServerTLS(), with(b.NodeClientTLS("a"), api), nil, nil, "server"},
		{"API server is no node", with(a.NodeServerTLS(), api), b.NodeClientTLS(""), nil, ErrNotNode, "client"},
		{"user certificate as server", with(a.NodeServerTLS(), admin), b.NodeClientTLS(""), nil, nil, "client"},
		{"expired client", a.NodeServerTLS(), late.NodeClientTLS("a"), nil, nil, "server"},
		{"expired server", late.NodeServerTLS(), a.NodeClientTLS("b"), nil, nil, "client"},
		{"open server, no client certificate", a.ServerTLS(), with(b.NodeClientTLS("a")), nil, nil, ""},
		{"open server, admin", a.ServerTLS(), with(b.NodeClientTLS("a"), admin), nil, nil, ""},
		{"open server, foreign client", a.ServerTLS(), with(b.NodeClientTLS("a"), stranger.Certificate()), nil, nil, "server"},
	} {
		t.Run(c.name, func(t *testing.T) {
			serverErr, clientErr := shake(t, c.server, c.client)
			switch c.fail {
			case "":
				if serverErr != nil || clientErr != nil {
					t.Fatalf("refused: server %v, client %v", serverErr, clientErr)
				}
			default:
				// Whoever refuses, the other side fails as well.
				if serverErr == nil || clientErr == nil {
					t.Fatalf("accepted: server %v, client %v", serverErr, clientErr)
				}
			}
			if c.wantServer != nil && !errors.Is(serverErr, c.wantServer) {
				t.Errorf("server error %v, want %v", serverErr, c.wantServer)
			}
			if c.wantWhat != nil && !errors.Is(clientErr, c.wantWhat) {
				t.Errorf("client error %v, want %v", clientErr, c.wantWhat)
			}
		})
	}
}

func TestRenewedCertificateIsPresented(t *testing.T) {
	ca := testAuthority(t, "c1")
	a, b := testIdentity(t, ca, "a"), testIdentity(t, ca, "b")
	late, err := ca.SignNode(testCSR(t, b.Key, "b"), "b", nil, testNow.Add(-2*nodeValidity))
	if err != nil {
		t.Fatal(err)
	}
	b.Cert = late
	b = b.Renewable()
	// Configurations from before the renewal.
	server, client := b.NodeServerTLS(), b.NodeClientTLS("a")
	for name, c := range map[string][2]*tls.Config{"server": {server, a.NodeClientTLS("b")}, "client": {a.NodeServerTLS(), client}} {
		if s, c := shake(t, c[0], c[1]); s == nil || c == nil {
			t.Errorf("%s: the expired certificate was accepted: %v, %v", name, s, c)
		}
	}
	fresh, err := ca.SignNode(testCSR(t, b.Key, "b"), "b", nil, testNow)
	if err != nil {
		t.Fatal(err)
	}
	for name, cert := range map[string]*x509.Certificate{"another key": a.Cert, "no certificate": nil} {
		if err := b.Renew(cert); !errors.Is(err, ErrForeignCert) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := b.Renew(fresh); err != nil || !b.Current().Equal(fresh) || !b.Cert.Equal(late) {
		t.Fatalf("renewed: %v", err)
	}
	for name, c := range map[string][2]*tls.Config{"server": {server, a.NodeClientTLS("b")}, "client": {a.NodeServerTLS(), client}, "open": {b.ServerTLS(), a.NodeClientTLS("b")}} {
		if s, c := shake(t, c[0], c[1]); s != nil || c != nil {
			t.Errorf("%s: the new certificate was refused: %v, %v", name, s, c)
		}
	}
}

func TestPinnedTLS(t *testing.T) {
	ca, foreign := testAuthority(t, "c1"), testAuthority(t, "c1")
	a := testIdentity(t, ca, "a")
	api, err := ca.IssueServer("kubernetes", []string{"kubernetes"}, []netip.Addr{netip.MustParseAddr("10.0.0.1")}, time.Hour, testNow)
	if err != nil {
		t.Fatal(err)
	}
	serve := func(cert tls.Certificate) *tls.Config {
		return &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}}
	}
	// A server that shows the right CA's certificate beside a leaf of its own CA.
	forged := testIdentity(t, foreign, "a").Certificate()
	forged.Certificate = [][]byte{forged.Certificate[0], ca.Cert.Raw}
	bare := a.Certificate()
	bare.Certificate = bare.Certificate[:1]
	expired, err := ca.IssueServer("kubernetes", []string{"kubernetes"}, nil, time.Minute, testNow.Add(-time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		cert tls.Certificate
		want string
		is   error
	}{
		{"API replica", api, "", nil},
		{"node", a.Certificate(), "", nil},
		{"another cluster", testIdentity(t, foreign, "a").Certificate(), "belongs to a cluster with CA", ErrWrongCA},
		{"no CA in chain", bare, "presents no CA certificate", ErrWrongCA},
		{"borrowed CA", forged, "does not verify", nil},
		{"expired", expired, "check the clocks", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := shake(t, serve(c.cert), PinnedTLS(ca.Hash()))
			if c.want == "" && err != nil || c.want != "" && !strings.Contains(fmt.Sprint(err), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
			if c.is != nil && !errors.Is(err, c.is) {
				t.Errorf("error %v is not %v", err, c.is)
			}
		})
	}
	if IsNodeCert(api.Leaf) || !IsNodeCert(a.Cert) {
		t.Error("IsNodeCert confuses a node with an API replica")
	}
}
