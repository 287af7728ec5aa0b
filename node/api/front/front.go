package front

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"log/slog"

	"skein.io/skein/node/api/internal/stack"
)

const (
	// readHeaderTimeout and idleTimeout are upstream's.
	readHeaderTimeout = 32 * time.Second
	idleTimeout       = 90 * time.Second
	// maxStreams is how many requests one HTTP/2 connection may have open; a process full of
	// informers has some dozens.
	maxStreams = 250
	// streamBuffer is what a client may send ahead per stream: most objects fit.
	streamBuffer = 256 << 10
	// minReach is how long connections are tried, in an outage too: gossip may say first that it is over.
	minReach = 700 * time.Millisecond
	// acceptRetry is the pause after an error that does not end a listener (no file descriptors left).
	acceptRetry = 50 * time.Millisecond
)

// Front is the API's door on one node.
type Front struct {
	cfg    Config
	local  *handover    // connections that end here
	conns  atomic.Int64 // open ones, of all kinds
	outage outage

	mu      sync.Mutex // guards the rest
	spliced map[*splice]struct{}
	sources map[netip.Addr]int // open connections of each address
}

// New makes a front. Run must be called, for the listeners to be closed.
func New(cfg Config) (*Front, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &Front{cfg: cfg, local: newHandover(cfg.Listeners[0].Addr()), spliced: map[*splice]struct{}{}, sources: map[netip.Addr]int{}}, nil
}

// Run serves until ctx ends or a listener fails. All connections are closed when it returns.
func (f *Front) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// Ends connections that the server gave away to handlers (exec, port-forward).
	life, kill := context.WithCancel(context.Background())
	defer kill()
	var wg sync.WaitGroup
	server := f.server()
	wg.Go(func() {
		if err := server.Serve(tls.NewListener(f.local, server.TLSConfig)); !errors.Is(err, http.ErrServerClosed) {
			cancel(err)
		}
	})
	wg.Go(func() { f.closeDead(ctx) })
	for _, l := range f.cfg.Listeners {
		wg.Go(func() {
			if err := f.accept(ctx, life, &wg, l); err != nil {
				cancel(err)
			}
		})
	}
	<-ctx.Done()
	for _, l := range f.cfg.Listeners {
		l.Close()
	}
	f.local.stop()
	stop, done := context.WithTimeout(context.WithoutCancel(ctx), f.cfg.ShutdownTimeout)
	defer done()
	if server.Shutdown(stop) != nil {
		server.Close() // what did not finish in time
	}
	kill()
	wg.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("front: %w", err)
	}
	return nil
}

func (f *Front) server() *http.Server {
	return &http.Server{
		Handler: http.HandlerFunc(f.serveHTTP), ConnContext: connContext,
		ReadHeaderTimeout: readHeaderTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: 1 << 20,
		ErrorLog: slog.NewLogLogger(f.cfg.Logger.Handler(), slog.LevelDebug), // clients that break off
		HTTP2: &http.HTTP2Config{MaxConcurrentStreams: maxStreams, MaxReadFrameSize: streamBuffer,
			MaxReceiveBufferPerStream: streamBuffer, MaxReceiveBufferPerConnection: streamBuffer * maxStreams},
		TLSConfig: &tls.Config{
			MinVersion: tls.VersionTLS12, // as upstream: old clients
			NextProtos: []string{"h2", "http/1.1"},
			ClientAuth: tls.RequestClientCert, ClientCAs: f.cfg.ClientCA,
			GetCertificate: f.certificate,
		},
	}
}

func (f *Front) certificate(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
	if f.cfg.Local() != nil {
		c, err := f.cfg.ServingCert(hello)
		if err == nil {
			return c, nil
		}
		f.cfg.Logger.Warn("no serving certificate, using the node's", "error", err)
	}
	return f.cfg.NodeCert()
}

func (f *Front) serveHTTP(w http.ResponseWriter, r *http.Request) {
	stack.Small() // upstream's outer filters
	if h := f.cfg.Local(); h != nil {
		f.outage.end()
		if f.cfg.Behind() {
			w.Header().Set("Connection", "close") // the next one may find a better node
		}
		h.ServeHTTP(w, r)
		return
	}
	f.alone(w, r)
}

// accept takes connections from l until it is closed.
func (f *Front) accept(ctx, life context.Context, wg *sync.WaitGroup, l net.Listener) error {
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("listener %s: %w", l.Addr(), err)
		}
		if err != nil {
			f.cfg.Logger.Warn("cannot accept a connection", "listener", l.Addr().String(), "error", err)
			select {
			case <-time.After(acceptRetry):
			case <-ctx.Done():
			}
			continue
		}
		if n := f.conns.Add(1); n > int64(f.cfg.MaxConns) {
			f.conns.Add(-1)
			f.cfg.Logger.Warn("too many connections, closing the newest", "open", f.cfg.MaxConns)
			c.Close()
			continue
		}
		source, ok := f.enter(c)
		if !ok {
			f.conns.Add(-1)
			f.cfg.Logger.Warn("too many connections of one address, closing the newest", "address", source, "open", f.perSource())
			c.Close()
			continue
		}
		counted := &conn{Conn: c}
		forget := context.AfterFunc(life, func() { counted.Close() })
		wg.Add(1) // Run returns when the last one is closed
		counted.closed = func() {
			forget()
			f.conns.Add(-1)
			f.leave(source)
			wg.Done()
		}
		wg.Go(func() { f.decide(ctx, counted) })
	}
}

// perSource is how many connections one address may have open: no one client shuts the others out. Another node's front, through which
// many come, is an address as well.
func (f *Front) perSource() int { return (f.cfg.MaxConns + 1) / 2 }

// enter counts a connection of an address; false when it has too many.
func (f *Front) enter(c net.Conn) (netip.Addr, bool) {
	var source netip.Addr
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		source = a.AddrPort().Addr().Unmap()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.sources[source] >= f.perSource() {
		return source, false
	}
	f.sources[source]++
	return source, true
}

func (f *Front) leave(source netip.Addr) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.sources[source]--; f.sources[source] == 0 {
		delete(f.sources, source)
	}
}

// elsewhere passes a connection on, unless this node serves. While nobody does it holds it for a moment: a node that starts or
// a store between two leaders serves again before clients would come back after a refusal, which makes them wait a second or more.
func (f *Front) elsewhere(ctx context.Context, c *conn) bool {
	began := time.Now()
	if f.cfg.Local() != nil {
		return f.cfg.Behind() && f.ahead(ctx, c)
	}
	left := f.outage.left(f.cfg.Patience, began)
	if f.passOn(ctx, c, began, max(left, minReach)) {
		return true
	}
	changed, unsubscribe := f.cfg.Changed()
	defer unsubscribe()
	enough := time.NewTimer(left - time.Since(began))
	defer enough.Stop()
	for f.cfg.Local() == nil {
		select {
		case <-changed:
		case <-enough.C:
			return false
		case <-ctx.Done():
			return false
		}
		if f.passOn(ctx, c, began, max(left-time.Since(began), minReach)) {
			return true
		}
	}
	return false
}

// decide sends a connection where it belongs.
func (f *Front) decide(ctx context.Context, c *conn) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	forwarded, err := c.peek(f.cfg.FirstByteTimeout)
	if !stop() || err != nil {
		c.Close()
		return
	}
	// What another front passed on ends here in any case: two fronts that each take the other for
	// a server would pass it to and fro.
	if !forwarded && f.elsewhere(ctx, c) {
		return
	}
	if !f.local.give(newGatherer(c)) {
		c.Close()
	}
}
