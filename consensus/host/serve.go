package host

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc"

	"skein.io/skein/consensus/etcdapi"
	"skein.io/skein/consensus/shard"
)

const (
	// graceful is how long requests may take to end when a replica stops.
	graceful = time.Second
	// listenAgain is when a port that is taken is tried again.
	listenAgain = time.Second
)

// EtcdConfig serves etcd's v3 API over gRPC, one endpoint a shard, while this node
// holds a replica of it. The zero value serves nothing.
type EtcdConfig struct {
	// Addresses are the IP addresses to listen on. Empty: nothing is served.
	Addresses []string
	// Port of the first shard of the table; shard number i has Port+i. 0 picks free
	// ones (see Host.EtcdEndpoints).
	Port int
	// TLS terminates the connections; it must demand and verify client certificates.
	// nil: neither encrypted nor authenticated, which only tests want.
	TLS *tls.Config
	// Authorize decides whether the bearer of a verified certificate may use the
	// store. Default etcdapi.Admins.
	Authorize func(*x509.Certificate) error
	// Endpoint returns the address (IP) and the first port at which another node
	// serves, for the list of members; false when it does not. Optional.
	Endpoint func(nodeHostID string) (addr string, port int, ok bool)
}

func (c *EtcdConfig) setDefaults() {
	if c.Authorize == nil {
		c.Authorize = etcdapi.Admins
	}
	if c.Endpoint == nil {
		c.Endpoint = func(string) (string, int, bool) { return "", 0, false }
	}
}

func (c *EtcdConfig) validate(shards int) error {
	var errs []error
	for _, a := range c.Addresses {
		if net.ParseIP(a) == nil {
			errs = append(errs, fmt.Errorf("address %q is no IP address", a))
		}
	}
	if last := c.Port + shards - 1; c.Port < 0 || last > 65535 {
		errs = append(errs, fmt.Errorf("port %d: want 0, or 1 to %d", c.Port, 65536-shards))
	}
	if t := c.TLS; t != nil && (t.ClientAuth != tls.RequireAndVerifyClientCert || t.ClientCAs == nil) {
		errs = append(errs, errors.New("TLS does not demand and verify client certificates"))
	}
	return errors.Join(errs...)
}

// endpoint serves one shard.
type endpoint struct {
	replica *replica
	grpc    *grpc.Server
	addrs   []string
	serving sync.WaitGroup
}

// serveLoop opens and closes the endpoints as replicas come and go.
func (h *Host) serveLoop() {
	changes, cancel := h.Subscribe()
	defer cancel()
	open := map[shard.ID]*endpoint{}
	again := time.NewTicker(listenAgain)
	defer again.Stop()
	var told error
	for {
		var errs []error
		for i, s := range h.cfg.Shards.Shards() {
			r, e := h.replica(s.ID), open[s.ID]
			if r != nil && (!r.started.Load() || r.ctx.Err() != nil) {
				r = nil
			}
			if e != nil && e.replica != r {
				e.close()
				delete(open, s.ID)
				e = nil
			}
			if r != nil && e == nil {
				e, err := h.openEndpoint(r, i)
				errs = append(errs, err)
				if err == nil {
					open[s.ID] = e
				}
			}
		}
		h.showEndpoints(open)
		if err := errors.Join(errs...); err != nil && fmt.Sprint(err) != fmt.Sprint(told) {
			h.log.Warn("cannot serve etcd's API", "error", err)
			told = err
		}
		select {
		case <-changes:
		case <-again.C:
		case <-h.ctx.Done():
			var wg sync.WaitGroup
			for _, e := range open {
				wg.Go(e.close)
			}
			wg.Wait()
			h.showEndpoints(nil)
			return
		}
	}
}

func (h *Host) openEndpoint(r *replica, index int) (*endpoint, error) {
	c := h.cfg.Etcd
	port := c.Port
	if port != 0 {
		port += index
	}
	var ls []net.Listener
	for _, a := range c.Addresses {
		l, err := net.Listen("tcp", net.JoinHostPort(a, strconv.Itoa(port)))
		if err != nil {
			for _, l := range ls {
				l.Close()
			}
			return nil, fmt.Errorf("endpoint of shard %s: %w", r.shard.Name, err)
		}
		ls = append(ls, l)
		port = l.Addr().(*net.TCPAddr).Port // the same on all addresses
	}
	e := &endpoint{replica: r, grpc: etcdapi.NewServer(r, etcdapi.ServerOptions{
		TLS: c.TLS, Authorize: c.Authorize, Shards: h.cfg.Shards, Progress: h.cfg.WatchProgress})}
	for _, l := range ls {
		e.addrs = append(e.addrs, l.Addr().String())
		e.serving.Go(func() { _ = e.grpc.Serve(l) }) // ends with Stop
	}
	return e, nil
}

// close tells the clients to go elsewhere, and ends what has not ended by itself:
// the streams have, as the replica has stopped.
func (e *endpoint) close() {
	done := make(chan struct{})
	go func() {
		defer close(done)
		e.grpc.GracefulStop()
	}()
	select {
	case <-done:
	case <-time.After(graceful):
		e.grpc.Stop()
		<-done
	}
	e.serving.Wait()
}

func (h *Host) showEndpoints(open map[shard.ID]*endpoint) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.endpoints = map[shard.ID][]string{}
	for id, e := range open {
		h.endpoints[id] = e.addrs
	}
}

// EtcdEndpoints are the addresses (host:port) at which this node serves etcd's API
// of a shard now.
func (h *Host) EtcdEndpoints(shardName string) []string {
	s, ok := h.cfg.Shards.ByName(shardName)
	if !ok {
		return nil
	}
	h.mu.RLock()
	defer h.mu.RUnlock()
	return slices.Clone(h.endpoints[s.ID])
}

// clientURLs of another node's, or this node's, endpoint of a shard.
func (h *Host) clientURLs(nodeHostID string, id shard.ID) []string {
	scheme := "https://"
	if h.cfg.Etcd.TLS == nil {
		scheme = "http://"
	}
	addr, port, ok := h.cfg.Etcd.Endpoint(nodeHostID)
	if !ok {
		return nil
	}
	for i, s := range h.cfg.Shards.Shards() {
		if s.ID == id {
			port += i
		}
	}
	return []string{scheme + net.JoinHostPort(addr, strconv.Itoa(port))}
}
