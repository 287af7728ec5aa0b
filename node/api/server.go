package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	restclient "k8s.io/client-go/rest"
	"skein.io/skein/node/api/kinds"
	"skein.io/skein/node/api/store"
)

// readyPoll is how often a starting server asks itself whether it is ready.
const readyPoll = 20 * time.Millisecond

// Server is one API server. See the package comment.
type Server struct {
	cfg    *Config
	build  *build
	bridge *store.Bridge
	chain  *chain
	run    func(context.Context) error
	ready  chan struct{}
	life   context.Context    // of what New started, and of all requests
	cancel context.CancelFunc // ends life
}

// New builds a server. ctx bounds the building only; what New starts ends when Run returns, so a
// server that was built must be run.
func New(ctx context.Context, cfg Config) (*Server, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	// Upstream's parts keep the context that they are built with.
	life, cancel := context.WithCancel(context.WithoutCancel(ctx))
	s := &Server{cfg: &cfg, ready: make(chan struct{}), life: life, cancel: cancel, bridge: store.NewBridge(cfg.Store(kinds.Services).Client)}
	if err := s.assemble(life); err != nil {
		cancel()
		s.bridge.Close()
		return nil, fmt.Errorf("api: %w", err)
	}
	if err := ctx.Err(); err != nil {
		cancel()
		s.bridge.Close()
		return nil, err
	}
	return s, nil
}

func (s *Server) assemble(ctx context.Context) error {
	var err error
	if s.build, err = newBuild(s.cfg, s.bridge); err != nil {
		return err
	}
	if s.chain, err = s.build.chain(ctx); err != nil {
		return err
	}
	prepared, err := s.chain.outer.PrepareRun()
	if err != nil {
		return err
	}
	s.run = prepared.Run
	s.build.loopback.Serve(s.bounded(s.chain.outer.GenericAPIServer.Handler))
	return nil
}

// Run serves until ctx ends, then lets requests finish (watches are ended) and stops. Stop the
// server before its store.
func (s *Server) Run(ctx context.Context) error {
	defer s.bridge.Close()
	defer s.build.agents.close()
	defer s.cancel()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Add(1)
	go func() {
		defer wg.Done()
		s.awaitReady(ctx)
	}()
	if err := s.run(ctx); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("api: %w", err)
	}
	return nil
}

func (s *Server) awaitReady(ctx context.Context) {
	client := &http.Client{Transport: s.build.loopback}
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, inProcess+"/readyz", nil)
		if err == nil {
			r.Header.Set("Authorization", "Bearer "+s.build.generic.LoopbackClientConfig.BearerToken)
			if resp, err := client.Do(r); err == nil {
				_, _ = io.Copy(io.Discard, resp.Body) // the handler takes an early Close for a broken connection
				resp.Body.Close()
				if resp.StatusCode == http.StatusOK {
					close(s.ready)
					return
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Ready is closed when the server first may be used: all that is needed to answer has been read,
// and every object exists that clients rely on.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Handler answers requests whose TLS, if any, has been terminated.
func (s *Server) Handler() http.Handler {
	api := s.bounded(s.chain.outer.GenericAPIServer.Handler)
	if len(s.cfg.Public) == 0 {
		return api
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if h := s.public(r.URL.Path); h != nil {
			h.ServeHTTP(w, r)
			return
		}
		api.ServeHTTP(w, r)
	})
}

// bounded ends requests with the server: upstream leaves long ones to the end of the process, which
// goes on here.
func (s *Server) bounded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		defer context.AfterFunc(s.life, cancel)()
		h.ServeHTTP(w, r.WithContext(ctx))
	})
}

// public finds the handler with the longest matching path.
func (s *Server) public(path string) http.Handler {
	var found http.Handler
	longest := 0
	for p, h := range s.cfg.Public {
		if len(p) > longest && (path == p || p[len(p)-1] == '/' && strings.HasPrefix(path, p)) {
			found, longest = h, len(p)
		}
	}
	return found
}

// Loopback gives the configuration of a client inside this process, with all rights. The first word
// of userAgent becomes the manager of the fields that it sets. decorate, which may be nil, is
// applied to the context of each request, which reaches the store's client: the leader puts its
// term there.
func (s *Server) Loopback(userAgent string, decorate func(context.Context) context.Context) *restclient.Config {
	c := restclient.CopyConfig(s.build.generic.LoopbackClientConfig)
	c.UserAgent = userAgent
	c.Transport = s.build.loopback.Decorated(decorate)
	return c
}

// idleListener never accepts anything.
type idleListener struct {
	once sync.Once
	done chan struct{}
}

func newIdleListener() *idleListener { return &idleListener{done: make(chan struct{})} }

func (l *idleListener) Accept() (net.Conn, error) {
	<-l.done
	return nil, net.ErrClosed
}

func (l *idleListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *idleListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4zero} }
