// Package front is a node's door to the API: TCP port 6443 of every node. Where the node serves the
// API itself, connections end here in TLS and HTTP. Elsewhere their bytes go, unread, to the front
// of a node that serves, so that the client's identity is proven end to end and a node without
// replica could not impersonate anybody. When no such node can be reached, the front answers for
// itself: 503, with the reason.
//
// A connection is decided when it opens. It is closed when the node that it was passed to is
// declared dead, so that clients come back at once and are passed elsewhere; and after the next
// answer when the API of this node stops serving. The package knows nothing of Kubernetes but the form of
// that one answer. A Front is run once and is safe for concurrent use.
package front

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Target is another node that serves the API, as this node sees it.
type Target struct {
	Name string         // of the node, unique
	Addr netip.AddrPort // of its front
	RTT  time.Duration  // zero: unknown, tried last
	// Ready tells that new connections may go there: it is alive, and says that it serves. Behind: but that it has lost the store's
	// leader, so others are better.
	Ready, Behind bool
}

// Config says what a front accepts and where it passes things. Fields without a default are required.
type Config struct {
	NodeName string
	// Listeners are accepted from, and closed when Run ends.
	Listeners []net.Listener

	// Local gives the API of this node, or nil while it does not serve.
	Local func() http.Handler
	// Behind tells that Local has lost the store's leader: nodes that have not are better, if one can be reached. Default: never.
	Behind func() bool
	// Replicas gives the other nodes that serve the API, or did: all that are not known to be dead.
	// Connections to a node that is no longer among them are closed.
	Replicas func() []Target
	// Changed gives a channel that gets a value after Replicas or Local changed, and what unsubscribes.
	Changed func() (<-chan struct{}, func())

	// ServingCert gives the certificate of the API, while Local serves. See Minter.
	ServingCert func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// NodeCert gives the node's own certificate, for refusals and when ServingCert fails.
	NodeCert func() (*tls.Certificate, error)
	// ClientCA is announced to clients, so that they choose the right certificate. The API verifies it.
	ClientCA *x509.CertPool

	// Fallback may answer a request while no node that serves can be reached. An error says why it does not, and that nothing
	// has been written. reason is what keeps the node from serving. Default: all are refused.
	Fallback func(w http.ResponseWriter, r *http.Request, reason string) error

	// Reason may add to a refusal what the node knows about it ("the store has no leader"). Default: nothing.
	Reason func() string

	// DialTimeout is how long one node may take to accept. Default 2 s.
	DialTimeout time.Duration
	// DialStagger is how long the nearest node may take before the next one is tried as well. Default 200 ms.
	DialStagger time.Duration
	// Patience is how long a connection is held while nobody serves, before this node answers for itself. It counts from the
	// beginning of the outage, so that later connections are answered at once. Default 1.5 s.
	Patience time.Duration
	// FirstByteTimeout is how long a client may take to say anything. Default 10 s.
	FirstByteTimeout time.Duration
	// ShutdownTimeout is how long requests may take to finish when Run ends. Default 3 s.
	ShutdownTimeout time.Duration
	// MaxConns bounds the connections that are open at once; more are closed at once, and so are those of one address beyond half of
	// it. Default 8192.
	MaxConns int

	// Dial opens connections to other nodes. Default: a net.Dialer.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Logger gets the decisions. Default: nothing.
	Logger *slog.Logger
}

// unacknowledged is how long another node's kernel may take to acknowledge what was sent: who waits for an answer learns of a lost cable
// before gossip is sure of it, and a node that is only busy is not given up.
const unacknowledged = 2 * time.Second

func giveUpSoon(_, _ string, c syscall.RawConn) error {
	var err error
	if cerr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unacknowledged.Milliseconds()))
	}); cerr != nil {
		return cerr
	}
	return err
}

func (c *Config) setDefaults() {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&c.DialTimeout, 2*time.Second)
	def(&c.DialStagger, 200*time.Millisecond)
	def(&c.Patience, 1500*time.Millisecond)
	def(&c.FirstByteTimeout, 10*time.Second)
	def(&c.ShutdownTimeout, 3*time.Second)
	if c.MaxConns == 0 {
		c.MaxConns = 8192
	}
	if c.Behind == nil {
		c.Behind = func() bool { return false }
	}
	if c.Reason == nil {
		c.Reason = func() string { return "" }
	}
	if c.Dial == nil {
		// A node that vanishes without a word is noticed by gossip; this is for when gossip cannot.
		d := &net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}, Control: giveUpSoon}
		c.Dial = d.DialContext
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate reports every fault of a configuration whose defaults are set.
func (c *Config) Validate() error {
	var errs []error
	need := func(ok bool, what string) {
		if !ok {
			errs = append(errs, errors.New(what))
		}
	}
	need(c.NodeName != "", "NodeName is empty")
	need(len(c.Listeners) > 0, "no Listeners")
	need(c.Local != nil, "Local is nil")
	need(c.Replicas != nil, "Replicas is nil")
	need(c.Changed != nil, "Changed is nil")
	need(c.ServingCert != nil, "ServingCert is nil")
	need(c.NodeCert != nil, "NodeCert is nil")
	need(c.ClientCA != nil, "ClientCA is nil")
	need(c.DialTimeout > 0, "DialTimeout is not positive")
	need(c.DialStagger > 0, "DialStagger is not positive")
	need(c.Patience > 0, "Patience is not positive")
	need(c.FirstByteTimeout > 0, "FirstByteTimeout is not positive")
	need(c.ShutdownTimeout > 0, "ShutdownTimeout is not positive")
	need(c.MaxConns > 0, "MaxConns is not positive")
	if len(errs) > 0 {
		return fmt.Errorf("front: %w", errors.Join(errs...))
	}
	return nil
}
