package dns

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/dns"
)

// zone answers questions about the cluster: a pure function of the view.
type zone struct {
	view   View
	domain string // canonical, ends with a dot
	ttl    uint32
	ranges []netip.Prefix
}

// result is an answer; alias is the name that the question goes on with.
type result struct {
	rcode             int
	answer, ns, extra []dns.RR
	alias             string
}

// lookup answers q, or says that it is not about the cluster.
func (z zone) lookup(q dns.Question) (result, bool) {
	name := dns.CanonicalName(q.Name)
	if !inDomain(name, z.domain) {
		return z.reverse(q, name)
	}
	r, exists := z.records(q, labels(name, z.domain))
	switch {
	case !exists:
		r = result{rcode: dns.RcodeNameError, ns: []dns.RR{z.soa()}}
	case len(r.answer) == 0:
		r.ns = []dns.RR{z.soa()}
	}
	return r, true
}

// labels is the part of name before domain.
func labels(name, domain string) []string {
	if name == domain {
		return nil
	}
	return dns.SplitDomainName(strings.TrimSuffix(name, "."+domain))
}

// records finds what is at the name and whether the name exists at all (it may without having records of q's type).
func (z zone) records(q dns.Question, l []string) (result, bool) {
	n := len(l)
	if n == 0 {
		return z.apex(q), true
	}
	switch l[n-1] {
	case "dns-version":
		return result{answer: z.txt(q)}, n == 1
	case "svc":
		if n <= 2 {
			return result{}, n == 1 || z.view.Namespace(l[0])
		}
		ns, name := l[n-2], l[n-3]
		svc, ok := z.view.Service(ns, name)
		if !ok {
			return result{}, false
		}
		return z.service(q, svc, ns, name, l[:n-3])
	case "pod":
		if n <= 2 {
			return result{}, n == 1 || z.view.Namespace(l[0])
		}
		// As upstream's usual "insecure" mode: the name itself says the address; it must only be one, of a namespace that exists.
		ip, err := netip.ParseAddr(strings.ReplaceAll(l[0], "-", "."))
		if n != 3 || err != nil || !ip.Is4() || !z.view.Namespace(l[1]) {
			return result{}, false
		}
		return result{answer: z.addrs(q, q.Name, []netip.Addr{ip})}, true
	}
	return result{}, false
}

func (z zone) apex(q dns.Question) result {
	switch q.Qtype {
	case dns.TypeSOA:
		return result{answer: []dns.RR{z.soa()}}
	case dns.TypeNS:
		return result{answer: []dns.RR{&dns.NS{Hdr: z.header(q.Name, dns.TypeNS), Ns: "kube-dns.kube-system.svc." + z.domain}}}
	}
	return result{}
}

func (z zone) txt(q dns.Question) []dns.RR {
	if q.Qtype != dns.TypeTXT && q.Qtype != dns.TypeANY {
		return nil
	}
	return []dns.RR{&dns.TXT{Hdr: z.header(q.Name, dns.TypeTXT), Txt: []string{"1.1.0"}}}
}

// service answers for a service (rest is empty), one of its endpoints or one of its ports.
func (z zone) service(q dns.Question, svc Service, ns, name string, rest []string) (result, bool) {
	full := name + "." + ns + ".svc." + z.domain
	if svc.ExternalName != "" {
		if len(rest) > 0 {
			return result{}, false
		}
		target := dns.CanonicalName(svc.ExternalName)
		r := result{answer: []dns.RR{&dns.CNAME{Hdr: z.header(q.Name, dns.TypeCNAME), Target: target}}}
		if q.Qtype != dns.TypeCNAME && q.Qtype != dns.TypeANY {
			r.alias = target
		}
		return r, true
	}
	var eps []Endpoint
	if len(svc.ClusterIPs) == 0 || len(rest) == 1 {
		for _, e := range z.view.Endpoints(ns, name) {
			if e.Ready || svc.PublishNotReady {
				eps = append(eps, e)
			}
		}
	}
	switch len(rest) {
	case 0:
		if q.Qtype == dns.TypeSRV {
			r := z.srv(q, svc, full, eps, func(Port) bool { return true })
			return r, len(svc.ClusterIPs) > 0 || len(eps) > 0
		}
		if len(svc.ClusterIPs) > 0 {
			return result{answer: z.addrs(q, q.Name, svc.ClusterIPs)}, true
		}
		// The specification (2.4.1) wants NXDOMAIN for a headless service without ready endpoints.
		return result{answer: z.addrs(q, q.Name, addrsOf(eps))}, len(eps) > 0
	case 1:
		if proto := strings.TrimPrefix(rest[0], "_"); proto != rest[0] { // _tcp alone has no records, but names below it
			return result{}, slices.ContainsFunc(append(svc.Ports, portsOf(eps)...), func(p Port) bool { return strings.EqualFold(p.Protocol, proto) })
		}
		eps = slices.DeleteFunc(eps, func(e Endpoint) bool { return e.name() != rest[0] })
		return result{answer: z.addrs(q, q.Name, addrsOf(eps))}, len(eps) > 0
	case 2:
		if rest[0][0] != '_' || rest[1][0] != '_' {
			return result{}, false
		}
		r := z.srv(q, svc, full, eps, func(p Port) bool {
			return strings.EqualFold(p.Name, rest[0][1:]) && strings.EqualFold(p.Protocol, rest[1][1:])
		})
		exists := len(r.answer) > 0
		if q.Qtype != dns.TypeSRV && q.Qtype != dns.TypeANY {
			r = result{}
		}
		return r, exists
	}
	return result{}, false
}

// name is the endpoint's label; one without a host name is called by its address, as upstream does.
func (e Endpoint) name() string {
	if e.Hostname != "" {
		return strings.ToLower(e.Hostname)
	}
	return strings.NewReplacer(".", "-", ":", "-").Replace(e.Addr.Unmap().String())
}

func addrsOf(eps []Endpoint) (out []netip.Addr) {
	for _, e := range eps {
		if !slices.Contains(out, e.Addr) {
			out = append(out, e.Addr)
		}
	}
	return out
}

func portsOf(eps []Endpoint) (out []Port) {
	for _, e := range eps {
		out = append(out, e.Ports...)
	}
	return out
}

// srv lists the ports that match: of the service, or for a headless one of each endpoint.
func (z zone) srv(q dns.Question, svc Service, full string, eps []Endpoint, match func(Port) bool) (r result) {
	add := func(p Port, target string) {
		r.answer = append(r.answer, &dns.SRV{Hdr: z.header(q.Name, dns.TypeSRV), Weight: 100, Port: p.Port, Target: target})
	}
	if len(svc.ClusterIPs) > 0 {
		for _, p := range svc.Ports {
			if match(p) {
				add(p, full)
			}
		}
		if len(r.answer) > 0 {
			r.extra = z.addrs(dns.Question{Qtype: dns.TypeA}, full, svc.ClusterIPs)
		}
		return r
	}
	for _, e := range eps {
		hit := false
		for _, p := range e.Ports {
			if match(p) {
				add(p, e.name()+"."+full)
				hit = true
			}
		}
		if hit {
			r.extra = append(r.extra, z.addrs(dns.Question{Qtype: dns.TypeA}, e.name()+"."+full, []netip.Addr{e.Addr})...)
		}
	}
	return r
}

// addrs makes address records of q's type.
func (z zone) addrs(q dns.Question, owner string, ips []netip.Addr) (out []dns.RR) {
	for _, ip := range ips {
		ip = ip.Unmap()
		switch {
		case ip.Is4() && (q.Qtype == dns.TypeA || q.Qtype == dns.TypeANY):
			out = append(out, &dns.A{Hdr: z.header(owner, dns.TypeA), A: ip.AsSlice()})
		case ip.Is6() && (q.Qtype == dns.TypeAAAA || q.Qtype == dns.TypeANY):
			out = append(out, &dns.AAAA{Hdr: z.header(owner, dns.TypeAAAA), AAAA: ip.AsSlice()})
		}
	}
	return out
}

// reverse answers PTR questions about addresses of the cluster.
func (z zone) reverse(q dns.Question, name string) (result, bool) {
	ip, ok := reverseAddr(name)
	if !ok {
		return result{}, false
	}
	owners := z.view.Owners(ip)
	ours := slices.ContainsFunc(z.ranges, func(p netip.Prefix) bool { return p.Contains(ip) })
	if len(owners) == 0 && !ours {
		return result{}, false
	}
	if len(owners) == 0 {
		return result{rcode: dns.RcodeNameError, ns: []dns.RR{z.soa()}}, true
	}
	var r result
	if q.Qtype == dns.TypePTR || q.Qtype == dns.TypeANY {
		for _, o := range owners {
			target := o.Name + "." + o.Namespace + ".svc." + z.domain
			if o.Endpoint != "" {
				target = o.Endpoint + "." + target
			}
			r.answer = append(r.answer, &dns.PTR{Hdr: z.header(q.Name, dns.TypePTR), Ptr: target})
		}
		return r, true
	}
	r.ns = []dns.RR{z.soa()}
	return r, true
}

// reverseAddr reads d.c.b.a.in-addr.arpa.
func reverseAddr(name string) (netip.Addr, bool) {
	s, ok := strings.CutSuffix(name, ".in-addr.arpa.")
	l := strings.Split(s, ".")
	if !ok || len(l) != 4 {
		return netip.Addr{}, false
	}
	var b [4]byte
	for i, x := range l {
		n, err := strconv.ParseUint(x, 10, 8)
		if err != nil || strconv.Itoa(int(n)) != x {
			return netip.Addr{}, false
		}
		b[3-i] = byte(n)
	}
	return netip.AddrFrom4(b), true
}

func (z zone) header(owner string, t uint16) dns.RR_Header {
	return dns.RR_Header{Name: owner, Rrtype: t, Class: dns.ClassINET, Ttl: z.ttl}
}

// soa says how long a "no" may be kept (RFC 2308).
func (z zone) soa() dns.RR {
	return &dns.SOA{Hdr: z.header(z.domain, dns.TypeSOA), Ns: "kube-dns.kube-system.svc." + z.domain, Mbox: "hostmaster." + z.domain,
		Serial: 1, Refresh: 7200, Retry: 1800, Expire: 86400, Minttl: z.ttl}
}

// shuffled spreads clients that take the first answer.
func shuffled(rrs []dns.RR) []dns.RR {
	out := slices.Clone(rrs)
	rand.Shuffle(len(out), func(i, j int) { out[i], out[j] = out[j], out[i] })
	return out
}
