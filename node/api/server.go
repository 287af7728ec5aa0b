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

	"skein.io/skein/node/api/lastknown"
	"skein.io/skein/node/api/store"
)

const (
	// readyPoll is how often a starting server asks itself whether it is ready.
	readyPoll = 20 * time.Millisecond
	// requestGrace is how long requests may go on when the server stops. Without a leader of the
	// store they would until their own deadline, a minute.
	requestGrace = 5 * time.Second
)

// Server is one API server. See the package comment.
type Server struct {
	cfg    *Config
	build  *build
	bridge *store.Bridge
	chain  *chain
	run    func(context.Context) error
	ready  chan struct{}
	cancel context.CancelFunc // ends what New started
	// requests is the life of all requests; endRequests ends them.
	requests    context.Context
	endRequests context.CancelFunc
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
	s := &Server{cfg: &cfg, ready: make(chan struct{}), cancel: cancel, bridge: store.NewBridge(cfg.Store(cfg.StorePrefix + "/ranges/").Client)}
	s.requests, s.endRequests = context.WithCancel(life)
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
	if s.build, err = newBuild(ctx, s.cfg, s.bridge); err != nil {
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
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	if !s.awaitStore(ctx) {
		s.chain.outer.GenericAPIServer.Destroy()
		return nil
	}
	ended := make(chan struct{})
	inner, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	wg.Go(func() { s.awaitReady(ctx) })
	wg.Go(func() {
		if err := s.build.self.serve(s.bounded(s.chain.outer.GenericAPIServer.Handler)); err != nil {
			s.cfg.Logger.Error("webhooks that this API serves itself cannot be called", "error", err)
		}
	})
	defer s.build.self.Close()
	wg.Go(func() {
		<-ctx.Done()
		s.settle()
		stop()
	})
	wg.Go(func() {
		<-ctx.Done()
		select {
		case <-time.After(requestGrace):
		case <-ended:
		}
		s.endRequests()
	})
	defer close(ended)
	if err := s.run(inner); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("api: %w", err)
	}
	return nil
}

// awaitStore waits until the store answers, and returns false when ctx ends first. Upstream's
// start-up assumes that it does: parts of it end the process when they wait in vain.
func (s *Server) awaitStore(ctx context.Context) bool {
	for logged := false; ; logged = true {
		err := s.build.probe.check()
		if err == nil {
			return ctx.Err() == nil
		}
		if !logged {
			s.cfg.Logger.Warn("the API waits for the store", "error", err)
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(bootstrapRetry):
		}
	}
}

// settle lets the start-up come to an end before the server is stopped: the hook that waits for
// CustomResourceDefinitions ends the process when it is cancelled. If the store was lost just
// then, the hook is told that there are none.
func (s *Server) settle() {
	select {
	case <-s.chain.customKnown:
		return
	default:
	}
	s.build.loopback.Serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if r.Method != http.MethodGet || r.URL.Path != "/apis/apiextensions.k8s.io/v1/customresourcedefinitions" || q.Has("watch") {
			http.Error(w, "the server is stopping", http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"kind":"CustomResourceDefinitionList","apiVersion":"apiextensions.k8s.io/v1","metadata":{"resourceVersion":"1"},"items":[]}`)
	}))
	s.endRequests()
	<-s.chain.customKnown
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

// Ready is closed when the server first may be used: all that is needed to decide has been read, and
// roles, priority classes and the range of Service addresses exist. The first Services follow.
func (s *Server) Ready() <-chan struct{} { return s.ready }

// Handler answers requests whose TLS, if any, has been terminated.
func (s *Server) Handler() http.Handler {
	api := s.bounded(s.chain.outer.GenericAPIServer.Handler)
	if s.cfg.LastKnown != nil {
		api = lastknown.Filter(api)
	}
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
	if s.build.log.enabled() {
		h = s.build.log.wrap(h)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithCancel(r.Context())
		defer cancel()
		defer context.AfterFunc(s.requests, cancel)()
		h.ServeHTTP(w, withVerdict(r.WithContext(ctx)))
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
