package join

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"skein.io/skein/gossip/identity"
)

const (
	readTimeout   = 10 * time.Second // to read a request
	handleTimeout = 15 * time.Second // to answer it
	maxAtOnce     = 16               // requests; each costs a signature and a few reads of the store
)

// Known is a node that exists.
type Known struct {
	Name string
	IPs  []netip.Addr
}

// Info is what a new node is told, beyond its certificate.
type Info struct {
	GossipKey []byte
	Cluster   identity.Cluster
	Seeds     []netip.AddrPort // gossip addresses of members, best first
}

// ServerConfig is what the join handler needs.
type ServerConfig struct {
	Tokens *TokenStore
	// Authority is the cluster's CA, nil while this node does not hold it.
	Authority func() *identity.Authority
	// Nodes are all nodes that exist: members of gossip that did not leave, also dead ones, and registered ones.
	Nodes func(context.Context) ([]Known, error)
	Info  func(context.Context) (Info, error)
	// Levels of the protocol that a new node must fit; default identity.OwnLevels.
	Levels identity.Levels
	// Version of this binary, for people.
	Version string
	// Now is the clock; default time.Now.
	Now func() time.Time
	// Logger; nil discards.
	Logger *slog.Logger
}

// Validate reports all faults at once.
func (c *ServerConfig) Validate() error {
	var errs []error
	for _, part := range []struct {
		name    string
		missing bool
	}{{"Tokens", c.Tokens == nil}, {"Authority", c.Authority == nil}, {"Nodes", c.Nodes == nil}, {"Info", c.Info == nil}} {
		if part.missing {
			errs = append(errs, fmt.Errorf("join server: %s is missing", part.name))
		}
	}
	return errors.Join(errs...)
}

// Server is the handler of [Path]. It is safe for concurrent use and keeps no goroutine.
type Server struct {
	cfg      ServerConfig
	failures *failures
	slots    chan struct{}
}

// NewServer makes the handler.
func NewServer(cfg ServerConfig) (*Server, error) {
	if cfg.Levels == (identity.Levels{}) {
		cfg.Levels = identity.OwnLevels()
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &Server{cfg: cfg, failures: newFailures(), slots: make(chan struct{}, maxAtOnce)}, nil
}

// ServeHTTP answers one request to join.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodPost {
		w.Header().Set("Allow", http.MethodPost)
		http.Error(w, "only POST joins", http.StatusMethodNotAllowed)
		return
	}
	from := sourceOf(r)
	select {
	case s.slots <- struct{}{}:
		defer func() { <-s.slots }()
	default:
		s.refuse(w, from, "", fmt.Errorf("%w: %d machines are joining at this moment; try again in a few seconds", ErrUnavailable, maxAtOnce))
		return
	}
	if wait, ok := s.failures.allowed(from, s.cfg.Now()); !ok {
		w.Header().Set("Retry-After", strconv.Itoa(int(wait.Seconds())))
		s.refuse(w, from, "", fmt.Errorf("%w from %s: wait %s and check the token", ErrTooMany, from, wait))
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), handleTimeout)
	defer cancel()
	// Not every server can set a deadline on one request; those have their own.
	_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(readTimeout))
	ask, err := decodeRequest(http.MaxBytesReader(w, r.Body, maxRequest))
	if err != nil {
		s.failures.count(from, s.cfg.Now())
		s.refuse(w, from, "", err)
		return
	}
	reply, err := s.admit(ctx, from, ask)
	if err != nil {
		s.refuse(w, from, ask.Name, err)
		return
	}
	s.cfg.Logger.Info("node admitted", "node", ask.Name, "from", from.String(), "token", ask.TokenID, "version", ask.SkeinVersion)
	writeJSON(w, http.StatusOK, reply)
}

// admit decides on a request. Nothing has changed when it returns an error.
func (s *Server) admit(ctx context.Context, from netip.Addr, ask request) (answer, error) {
	if _, err := s.cfg.Tokens.Verify(ctx, ask.TokenID, ask.TokenSecret); err != nil {
		if !errors.Is(err, ErrUnavailable) {
			s.failures.count(from, s.cfg.Now())
		}
		return answer{}, err
	}
	// Said from the node's side, as it is read there.
	if err := identity.Compatible(ask.Levels, s.cfg.Levels); err != nil {
		return answer{}, fmt.Errorf("this node's skein (%s) and the cluster's (%s) do not fit: %w", ask.SkeinVersion, s.cfg.Version, err)
	}
	ca := s.cfg.Authority()
	if ca == nil {
		return answer{}, fmt.Errorf("%w: this node does not hold the cluster's CA", ErrUnavailable)
	}
	info, err := s.cfg.Info(ctx)
	if err != nil {
		return answer{}, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	exists, err := s.checkPlace(ctx, ask, info.Cluster)
	if err != nil {
		return answer{}, err
	}
	csr, err := x509.ParseCertificateRequest(ask.CSR)
	if err != nil {
		return answer{}, fmt.Errorf("%w: its certificate request cannot be read: %w", ErrBadRequest, err)
	}
	cert, err := ca.SignNode(csr, ask.Name, ask.IPs, s.cfg.Now())
	if err != nil {
		if errors.Is(err, identity.ErrBadCSR) {
			err = fmt.Errorf("%w: %w", ErrBadRequest, err)
		}
		return answer{}, err
	}
	keyHash, err := identity.KeyHash(csr.PublicKey)
	if err != nil {
		return answer{}, fmt.Errorf("%w: %w", ErrBadRequest, err)
	}
	// Last, so that no claim is left of a request that fails otherwise. The certificate is of no use to anyone until it is sent.
	if err := s.cfg.Tokens.Enrol(ctx, Claim{Name: ask.Name, KeyHash: keyHash, TokenID: ask.TokenID, Exists: exists}); err != nil {
		return answer{}, err
	}
	return answer{
		Version: wireVersion, Certificate: string(identity.EncodeCert(cert)), CA: string(ca.CertPEM()), ClusterID: ca.ClusterID(),
		GossipKey: info.GossipKey, Cluster: info.Cluster, Seeds: info.Seeds[:min(len(info.Seeds), maxSeeds)],
		SkeinVersion: s.cfg.Version, Levels: s.cfg.Levels,
	}, nil
}

// checkPlace checks the name and the addresses against the nodes that exist, and tells whether one has the name. A node's
// certificate is valid for its addresses, so none may be another node's or one that Services and pods have.
func (s *Server) checkPlace(ctx context.Context, ask request, cluster identity.Cluster) (exists bool, err error) {
	if err := identity.ValidateName(ask.Name); err != nil {
		return false, err
	}
	if len(ask.IPs) == 0 || len(ask.IPs) > maxAddresses {
		return false, fmt.Errorf("%w: a node has 1 to %d addresses, not %d", ErrBadRequest, maxAddresses, len(ask.IPs))
	}
	for i, ip := range ask.IPs {
		if !ip.IsValid() || ip.IsUnspecified() || ip.IsMulticast() || ip.IsLinkLocalUnicast() || ip.Zone() != "" {
			return false, fmt.Errorf("%w: %q is not an address at which other nodes can reach a machine; choose another", ErrBadRequest, ip)
		}
		ask.IPs[i] = ip.Unmap()
		if cluster.PodCIDR.Contains(ask.IPs[i]) || cluster.ServiceCIDR.Contains(ask.IPs[i]) {
			return false, fmt.Errorf("%w: node address %s lies in the cluster's own range (pods %s, Services %s): the machine needs another address, or the cluster other ranges",
				ErrBadRequest, ip, cluster.PodCIDR, cluster.ServiceCIDR)
		}
	}
	nodes, err := s.cfg.Nodes(ctx)
	if err != nil {
		return false, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	for _, node := range nodes {
		if node.Name == ask.Name {
			exists = true
			continue
		}
		for _, ip := range node.IPs {
			if slices.Contains(ask.IPs, ip.Unmap()) {
				return false, fmt.Errorf("%w: %s is node %q's; let that node leave or delete it first if this machine replaces it", ErrAddressTaken, ip, node.Name)
			}
		}
	}
	return exists, nil
}

func decodeRequest(r io.Reader) (request, error) {
	var ask request
	d := json.NewDecoder(r)
	if err := d.Decode(&ask); err != nil {
		return request{}, fmt.Errorf("%w: it cannot be read: %w", ErrBadRequest, err)
	}
	if d.More() {
		return request{}, fmt.Errorf("%w: something follows it", ErrBadRequest)
	}
	if ask.Version != wireVersion {
		return request{}, fmt.Errorf("%w: the join request has version %d, this cluster understands %d: install the cluster's version of skein",
			identity.ErrIncompatible, ask.Version, wireVersion)
	}
	ask.SkeinVersion = oneLine(ask.SkeinVersion)
	return ask, nil
}

func (s *Server) refuse(w http.ResponseWriter, from netip.Addr, name string, err error) {
	r := reasonOf(err)
	s.cfg.Logger.Warn("join refused", "node", name, "from", from.String(), "reason", r.name, "err", err)
	writeJSON(w, r.status, refusal{Kind: "Status", APIVersion: "v1", Status: "Failure", Reason: r.name, Message: err.Error(), Code: r.status})
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // the client is gone; it will ask again
}

func sourceOf(r *http.Request) netip.Addr {
	at, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{} // in process, or a unix socket: all of them together
	}
	return at.Addr().Unmap()
}
