// Package testetcd runs an etcd inside the process, for tests of packages that are given a client
// of the store.
package testetcd

import (
	"fmt"
	"net/url"
	"path/filepath"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"
)

// startTimeout is how long etcd may take to elect itself.
const startTimeout = 30 * time.Second

// Server is a running etcd.
type Server struct {
	etcd *embed.Etcd
}

// Start runs an etcd with its data below dir, on free loopback ports, without fsync.
func Start(dir string) (*Server, error) {
	cfg := embed.NewConfig()
	cfg.Dir = filepath.Join(dir, "etcd")
	cfg.UnsafeNoFsync = true
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	anyPort := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenClientUrls, cfg.ListenPeerUrls = []url.URL{anyPort}, []url.URL{anyPort}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("start etcd: %w", err)
	}
	select {
	case <-e.Server.ReadyNotify():
		return &Server{e}, nil
	case err := <-e.Err():
		e.Close()
		return nil, fmt.Errorf("start etcd: %w", err)
	case <-time.After(startTimeout):
		e.Close()
		return nil, fmt.Errorf("start etcd: not ready after %s", startTimeout)
	}
}

// Client gives a client of the kind that the API uses. The caller closes it.
func (s *Server) Client() (*kubernetes.Client, error) {
	return kubernetes.New(clientv3.Config{Endpoints: []string{s.etcd.Clients[0].Addr().String()}, Logger: zap.NewNop(), DialTimeout: startTimeout})
}

// Close stops etcd.
func (s *Server) Close() { s.etcd.Close() }
