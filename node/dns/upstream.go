package dns

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Why a question was not forwarded.
var (
	ErrNoUpstream = errors.New("dns: no upstream server is configured in resolv.conf")
	ErrBusy       = errors.New("dns: too many questions wait for upstream servers")
)

const (
	tryTime    = 2 * time.Second // for one server
	totalTime  = 5 * time.Second // for one question: what resolver libraries wait by default (man 5 resolv.conf, timeout)
	maxServers = 3               // MAXNS of resolv.conf
	restTime   = 10 * time.Second
	reloadTime = time.Second
	maxTTL     = 5 * time.Minute  // of what is kept
	maxNegTTL  = 30 * time.Second // of a kept "no"
)

// upstream asks the servers of resolv.conf.
type upstream struct {
	path   string
	own    []netip.AddrPort // our listeners: never asked
	max    int
	dial   func(ctx context.Context, network, server string, m *dns.Msg) (*dns.Msg, error)
	flying sync.WaitGroup

	mu      sync.Mutex // guards what follows; never held while waiting
	flights map[key]*flight
	waiting int // questions that wait for flights
	cache   *cache
	checked time.Time // when resolv.conf was looked at
	stamp   string    // what it looked like
	servers []string
	rest    map[string]time.Time // servers that failed are asked last until then
}

type key struct {
	name string
	typ  uint16
	do   bool
}

// flight is a question on its way; all who ask the same meanwhile wait for it. That also ends loops: a question that comes
// back to us waits for itself and times out, once.
type flight struct {
	done chan struct{}
	msg  *dns.Msg
	err  error
}

// newUpstream reads the servers: questions that come while they are read again go to those known.
func newUpstream(cfg Config) *upstream {
	u := &upstream{path: cfg.ResolvConf, own: cfg.Listen, max: cfg.MaxForwards, dial: exchange, flights: map[key]*flight{},
		cache: newCache(cfg.CacheSize), rest: map[string]time.Time{}}
	u.servers, u.stamp, _ = readResolvConf(u.path, "", u.own)
	return u
}

func (u *upstream) wait() { u.flying.Wait() }

// ask gives the answer to q from the cache or from upstream. The caller must not change it.
func (u *upstream) ask(ctx context.Context, q dns.Question, do bool) (*dns.Msg, error) {
	k := key{dns.CanonicalName(q.Name), q.Qtype, do}
	now := time.Now()
	u.mu.Lock()
	if m := u.cache.get(k, now); m != nil {
		u.mu.Unlock()
		return named(m, q.Name), nil
	}
	if u.waiting >= u.max {
		u.mu.Unlock()
		return nil, fmt.Errorf("%w: %d", ErrBusy, u.max)
	}
	u.waiting++
	f := u.flights[k]
	if f == nil {
		f = &flight{done: make(chan struct{})}
		u.flights[k] = f
		u.flying.Go(func() { u.fly(ctx, k, f) })
	}
	u.mu.Unlock()
	<-f.done // ends soon after ctx does
	u.mu.Lock()
	u.waiting--
	u.mu.Unlock()
	if f.err != nil {
		return nil, f.err
	}
	return named(f.msg, q.Name), nil
}

// named gives the answer the spelling of the question: some clients compare (0x20).
func named(m *dns.Msg, name string) *dns.Msg {
	out := m.Copy()
	for _, rr := range out.Answer {
		if strings.EqualFold(rr.Header().Name, name) {
			rr.Header().Name = name
		}
	}
	return out
}

// fly carries one question out. ctx is the server's, so that no client's going ends it for the others.
func (u *upstream) fly(ctx context.Context, k key, f *flight) {
	ctx, cancel := context.WithTimeout(ctx, totalTime)
	defer cancel()
	f.msg, f.err = u.fetch(ctx, k)
	u.mu.Lock()
	delete(u.flights, k)
	if f.err == nil {
		u.cache.put(k, f.msg, time.Now())
	}
	u.mu.Unlock()
	close(f.done)
}

func (u *upstream) fetch(ctx context.Context, k key) (*dns.Msg, error) {
	servers := u.pick(time.Now())
	if len(servers) == 0 {
		return nil, fmt.Errorf("%w: %s", ErrNoUpstream, u.path)
	}
	var errs []error
	var worst *dns.Msg
	for _, s := range servers {
		m, err := u.one(ctx, s, k)
		if err == nil && m.Rcode != dns.RcodeServerFailure && m.Rcode != dns.RcodeRefused {
			return m, nil
		}
		if err == nil { // it answers, only not this
			worst = m
			continue
		}
		errs = append(errs, fmt.Errorf("dns: %s: %w", s, err))
		if ctx.Err() != nil {
			break
		}
		u.mu.Lock()
		u.rest[s] = time.Now().Add(restTime)
		u.mu.Unlock()
	}
	if worst != nil {
		return worst, nil
	}
	return nil, errors.Join(errs...)
}

// one asks one server, over TCP if the answer does not fit.
func (u *upstream) one(ctx context.Context, server string, k key) (*dns.Msg, error) {
	m := new(dns.Msg)
	m.SetQuestion(k.name, k.typ)
	m.SetEdns0(maxUDP, k.do)
	for _, network := range []string{"udp", "tcp"} {
		try, cancel := context.WithTimeout(ctx, tryTime)
		r, err := u.dial(try, network, server, m)
		cancel()
		if err != nil {
			return nil, err
		}
		if len(r.Question) != 1 || r.Question[0].Qtype != k.typ || dns.CanonicalName(r.Question[0].Name) != k.name {
			return nil, errors.New("the answer is to another question")
		}
		if r.Rcode == dns.RcodeFormatError && m.IsEdns0() != nil { // a server older than EDNS
			m.Extra = nil
			try, cancel := context.WithTimeout(ctx, tryTime)
			r, err = u.dial(try, network, server, m)
			cancel()
			if err != nil {
				return nil, err
			}
		}
		if !r.Truncated || network == "tcp" {
			r.Extra = nil // ours to add
			return r, nil
		}
	}
	panic("dns: unreachable")
}

func exchange(ctx context.Context, network, server string, m *dns.Msg) (*dns.Msg, error) {
	c := dns.Client{Net: network, UDPSize: maxUDP}
	r, _, err := c.ExchangeContext(ctx, m, server)
	return r, err
}

// pick lists the servers to ask, those that failed lately last. It looks at resolv.conf once a second.
func (u *upstream) pick(now time.Time) []string {
	u.mu.Lock()
	due := now.Sub(u.checked) >= reloadTime
	if due {
		u.checked = now
	}
	stamp := u.stamp
	u.mu.Unlock()
	if due {
		if servers, next, changed := readResolvConf(u.path, stamp, u.own); changed {
			u.mu.Lock()
			u.servers, u.stamp = servers, next
			clear(u.rest)
			u.mu.Unlock()
		}
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	var good, bad []string
	for _, s := range u.servers {
		if now.Before(u.rest[s]) {
			bad = append(bad, s)
		} else {
			delete(u.rest, s)
			good = append(good, s)
		}
	}
	return append(good, bad...)
}

// readResolvConf reads the servers if the file changed since stamp was taken. A missing file has none.
func readResolvConf(path, stamp string, own []netip.AddrPort) (servers []string, next string, changed bool) {
	st, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, "missing", stamp != "missing"
	case err != nil:
		return nil, stamp, false
	}
	next = fmt.Sprint(st.ModTime().UnixNano(), st.Size(), fileID(st))
	if next == stamp {
		return nil, stamp, false
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, stamp, false
	}
	return parseServers(string(b), own), next, true
}

// parseServers finds the nameserver lines (man 5 resolv.conf), without ourselves.
func parseServers(text string, own []netip.AddrPort) (out []string) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" || len(out) == maxServers {
			continue
		}
		ip, err := netip.ParseAddr(f[1])
		if err != nil || slices.Contains(own, netip.AddrPortFrom(ip, 53)) {
			continue
		}
		if s := net.JoinHostPort(ip.String(), "53"); !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}

// cache keeps answers, the least recently used goes first.
type cache struct {
	max   int
	order *list.List // of *kept, the freshest first
	at    map[key]*list.Element
}

type kept struct {
	k          key
	msg        *dns.Msg
	born, dies time.Time
}

func newCache(max int) *cache {
	return &cache{max: max, order: list.New(), at: map[key]*list.Element{}}
}

// get gives a copy with the TTLs that are left.
func (c *cache) get(k key, now time.Time) *dns.Msg {
	e := c.at[k]
	if e == nil {
		return nil
	}
	v := e.Value.(*kept)
	if !now.Before(v.dies) {
		c.order.Remove(e)
		delete(c.at, k)
		return nil
	}
	c.order.MoveToFront(e)
	m := v.msg.Copy()
	age := uint32(now.Sub(v.born) / time.Second)
	for _, rr := range slices.Concat(m.Answer, m.Ns) {
		rr.Header().Ttl -= min(age, rr.Header().Ttl)
	}
	return m
}

func (c *cache) put(k key, m *dns.Msg, now time.Time) {
	ttl := lifetime(m)
	if ttl <= 0 {
		return
	}
	if e := c.at[k]; e != nil {
		c.order.Remove(e)
	}
	c.at[k] = c.order.PushFront(&kept{k, m.Copy(), now, now.Add(ttl)})
	for c.order.Len() > c.max {
		e := c.order.Back()
		delete(c.at, e.Value.(*kept).k)
		c.order.Remove(e)
	}
}

// lifetime is how long an answer may be kept: the shortest TTL in it, for a "no" the SOA's (RFC 2308); failures not at all.
func lifetime(m *dns.Msg) time.Duration {
	if m.Truncated || m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError {
		return 0
	}
	if m.Rcode == dns.RcodeSuccess && len(m.Answer) > 0 {
		d := maxTTL
		for _, rr := range slices.Concat(m.Answer, m.Ns) {
			d = min(d, time.Duration(rr.Header().Ttl)*time.Second)
		}
		return d
	}
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			return min(maxNegTTL, time.Duration(min(soa.Hdr.Ttl, soa.Minttl))*time.Second)
		}
	}
	return 0
}
