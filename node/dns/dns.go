// Package dns is the node's DNS server: it answers names of the cluster from what the node knows (View) and forwards all
// others to the servers of the node's own resolv.conf.
//
// It follows the Kubernetes DNS-Based Service Discovery specification 1.1.0. Contract: answers about the cluster never wait
// for anything but View; forwarded questions are bounded in number and time, asked once for all who wait, and cached a
// little. A Server may be used by many goroutines; Run returns when all of its own have ended. Caller: node/daemon.
package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// View is what the server reads. Names are in lower case. It must be safe for concurrent use and fast.
type View interface {
	// Service by namespace and name.
	Service(namespace, name string) (Service, bool)
	// Endpoints of a service, ready or not, in any order.
	Endpoints(namespace, name string) []Endpoint
	// Namespace tells whether a namespace exists.
	Namespace(name string) bool
	// Owners tells who has an address: a service as its ClusterIP, or services as one of their endpoints.
	Owners(addr netip.Addr) []Owner
}

// Service is one service.
type Service struct {
	ClusterIPs      []netip.Addr // none = headless, or an ExternalName
	ExternalName    string       // "" = none
	Ports           []Port
	PublishNotReady bool // endpoints count although they are not ready
}

// Port is a port of a service or an endpoint.
type Port struct {
	Name     string
	Protocol string // TCP, UDP or SCTP
	Port     uint16
}

// Endpoint is one address behind a service.
type Endpoint struct {
	Addr     netip.Addr
	Hostname string // "" = its name is made from the address
	Ready    bool
	Ports    []Port
}

// Owner is the answer to "whose address is this"; Endpoint is the endpoint's host name, "" for a ClusterIP.
type Owner struct{ Namespace, Name, Endpoint string }

// Config configures a Server.
type Config struct {
	View        View
	Domain      string           // of the cluster; default cluster.local
	Listen      []netip.AddrPort // UDP and TCP; default 169.254.20.10:53. An address may appear on the node later
	Ranges      []netip.Prefix   // pods and services: reverse questions about them are never forwarded
	ResolvConf  string           // where upstream servers are read from, again when it changes; default /etc/resolv.conf
	TTL         time.Duration    // of answers about the cluster, whole seconds; default 5 s
	MaxForwards int              // questions that wait for upstream at once, more are refused with SERVFAIL; default 1024
	CacheSize   int              // upstream answers kept; default 2048 (about 1 kB each)
	MaxConns    int              // TCP connections per address; default 256
	Logger      *slog.Logger     // nil = discard
}

func (c *Config) setDefaults() {
	if c.Domain == "" {
		c.Domain = "cluster.local"
	}
	c.Domain = dns.CanonicalName(c.Domain)
	if len(c.Listen) == 0 {
		c.Listen = []netip.AddrPort{netip.MustParseAddrPort("169.254.20.10:53")}
	}
	if c.ResolvConf == "" {
		c.ResolvConf = "/etc/resolv.conf"
	}
	if c.TTL == 0 {
		c.TTL = 5 * time.Second
	}
	for p, d := range map[*int]int{&c.MaxForwards: 1024, &c.CacheSize: 2048, &c.MaxConns: 256} {
		if *p == 0 {
			*p = d
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if c.View == nil {
		errs = append(errs, errors.New("dns: no view"))
	}
	if _, ok := dns.IsDomainName(c.Domain); !ok || c.Domain == "." {
		errs = append(errs, fmt.Errorf("dns: %q is no domain", c.Domain))
	}
	for _, a := range c.Listen {
		if !a.IsValid() {
			errs = append(errs, fmt.Errorf("dns: %v is no address to listen on", a))
		}
	}
	if c.TTL < time.Second || c.TTL > time.Hour {
		errs = append(errs, fmt.Errorf("dns: TTL %v is not between 1 s and 1 h", c.TTL))
	}
	if c.MaxForwards < 1 || c.CacheSize < 1 || c.MaxConns < 1 {
		errs = append(errs, fmt.Errorf("dns: limits must be positive: %d forwards, %d cached, %d connections", c.MaxForwards, c.CacheSize, c.MaxConns))
	}
	return errors.Join(errs...)
}

// Server answers DNS questions. Use New, then Run.
type Server struct {
	cfg  Config
	zone zone
	up   *upstream
}

// New checks the configuration.
func New(cfg Config) (*Server, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &Server{
		cfg:  cfg,
		zone: zone{view: cfg.View, domain: cfg.Domain, ttl: uint32(cfg.TTL.Seconds()), ranges: cfg.Ranges},
		up:   newUpstream(cfg),
	}, nil
}

// Run listens and answers until ctx ends.
func (s *Server) Run(ctx context.Context) error {
	// Free binding: the address is added to the node by somebody else, perhaps later.
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_FREEBIND, 1) }); e != nil {
			return e
		}
		return err
	}}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var servers []*dns.Server
	abandon := func() {
		for _, v := range servers {
			if v.PacketConn != nil {
				v.PacketConn.Close()
			} else {
				v.Listener.Close()
			}
		}
	}
	for _, a := range s.cfg.Listen {
		pc, err := lc.ListenPacket(ctx, "udp", a.String())
		if err != nil {
			abandon()
			return fmt.Errorf("dns: listen: %w", err)
		}
		servers = append(servers, &dns.Server{PacketConn: pc, Net: "udp", Handler: s.handler(ctx, true)})
		l, err := lc.Listen(ctx, "tcp", a.String())
		if err != nil {
			abandon()
			return fmt.Errorf("dns: listen: %w", err)
		}
		servers = append(servers, &dns.Server{Listener: limit(l, s.cfg.MaxConns), Net: "tcp", Handler: s.handler(ctx, false),
			IdleTimeout: func() time.Duration { return 10 * time.Second }})
	}
	var wg sync.WaitGroup
	errs := make(chan error, len(servers))
	for _, v := range servers {
		started := make(chan struct{})
		v.NotifyStartedFunc = func() { close(started) }
		wg.Go(func() {
			if err := v.ActivateAndServe(); err != nil {
				errs <- fmt.Errorf("dns: serve: %w", err)
			}
			cancel()
		})
		select { // Shutdown of a server that has not started does nothing
		case <-started:
		case <-ctx.Done():
		}
	}
	<-ctx.Done()
	for _, v := range servers {
		end, done := context.WithTimeout(context.Background(), time.Second)
		_ = v.ShutdownContext(end) // what a client has not fetched by then is lost, as UDP would be
		done()
	}
	abandon()
	wg.Wait()
	s.up.wait()
	select {
	case err := <-errs:
		return err
	default:
		return nil
	}
}

func (s *Server) handler(ctx context.Context, udp bool) dns.Handler {
	return dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		if err := w.WriteMsg(s.answer(ctx, req, udp)); err != nil && ctx.Err() == nil {
			s.cfg.Logger.Debug("answer not sent", "to", w.RemoteAddr(), "err", err)
		}
	})
}

// maxUDP is the largest answer over UDP that we send even if asked for more (DNS flag day 2020: no fragments).
const maxUDP = 1232

// answer makes the whole answer to any message.
func (s *Server) answer(ctx context.Context, req *dns.Msg, udp bool) *dns.Msg {
	m := new(dns.Msg)
	if req.Response || req.Opcode != dns.OpcodeQuery {
		return m.SetRcode(req, dns.RcodeNotImplemented)
	}
	if len(req.Question) != 1 {
		return m.SetRcode(req, dns.RcodeFormatError)
	}
	q := req.Question[0]
	switch {
	case q.Qclass != dns.ClassINET || q.Qtype == dns.TypeAXFR || q.Qtype == dns.TypeIXFR:
		m.SetRcode(req, dns.RcodeRefused)
	default:
		m.SetReply(req)
		m.RecursionAvailable = true
		s.fill(ctx, m, q, dnssec(req))
	}
	size := dns.MaxMsgSize
	if opt := req.IsEdns0(); opt != nil {
		m.SetEdns0(maxUDP, opt.Do())
		if opt.Version() != 0 {
			m.Answer, m.Ns, m.Rcode = nil, nil, dns.RcodeBadVers
		}
		if udp {
			size = min(max(int(opt.UDPSize()), dns.MinMsgSize), maxUDP)
		}
	} else if udp {
		size = dns.MinMsgSize
	}
	m.Compress = true
	m.Truncate(size)
	return m
}

func dnssec(req *dns.Msg) bool {
	opt := req.IsEdns0()
	return opt != nil && opt.Do()
}

// maxChain is how many aliases are followed for one question.
const maxChain = 8

// fill answers q from the cluster or from upstream, and goes after aliases that lead from one to the other: resolver
// libraries do not do that themselves.
func (s *Server) fill(ctx context.Context, m *dns.Msg, q dns.Question, do bool) {
	for range maxChain {
		r, ours := s.zone.lookup(q)
		if !ours {
			up, err := s.up.ask(ctx, q, do)
			if err != nil {
				s.cfg.Logger.Debug("not forwarded", "name", q.Name, "type", dns.TypeToString[q.Qtype], "err", err)
				m.Rcode = dns.RcodeServerFailure
				return
			}
			m.Rcode, m.AuthenticatedData = up.Rcode, up.AuthenticatedData && len(m.Answer) == 0
			m.Answer, m.Ns = append(m.Answer, up.Answer...), up.Ns
			return
		}
		m.Authoritative = len(m.Answer) == 0 || m.Authoritative
		m.Rcode = r.rcode
		m.Answer, m.Ns, m.Extra = append(m.Answer, shuffled(r.answer)...), r.ns, append(m.Extra, r.extra...)
		if r.alias == "" {
			return
		}
		q.Name = r.alias
	}
	m.Rcode = dns.RcodeServerFailure
}

// limitListener accepts at most n connections at once; others wait in the kernel's queue.
type limitListener struct {
	net.Listener
	free chan struct{}
	done chan struct{}
	once sync.Once
}

func limit(l net.Listener, n int) net.Listener {
	return &limitListener{Listener: l, free: make(chan struct{}, n), done: make(chan struct{})}
}

func (l *limitListener) Accept() (net.Conn, error) {
	select {
	case l.free <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.free
		return nil, err
	}
	return &limitConn{Conn: c, release: func() { <-l.free }}, nil
}

func (l *limitListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Listener.Close()
}

type limitConn struct {
	net.Conn
	once    sync.Once
	release func()
}

func (c *limitConn) Close() error {
	c.once.Do(c.release)
	return c.Conn.Close()
}

// inDomain says whether name (canonical) is domain or below it.
func inDomain(name, domain string) bool {
	return name == domain || strings.HasSuffix(name, "."+domain)
}
