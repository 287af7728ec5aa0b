package dns

import "net/netip"

// FakeView is a View from maps, for tests. Services and endpoints are keyed by "namespace/name"; it must not change while
// it is read.
type FakeView struct {
	Services   map[string]Service
	Backends   map[string][]Endpoint
	Namespaces map[string]bool
	Addrs      map[netip.Addr][]Owner
}

var _ View = FakeView{}

// Service implements View.
func (v FakeView) Service(namespace, name string) (Service, bool) {
	s, ok := v.Services[namespace+"/"+name]
	return s, ok
}

// Endpoints implements View.
func (v FakeView) Endpoints(namespace, name string) []Endpoint { return v.Backends[namespace+"/"+name] }

// Namespace implements View.
func (v FakeView) Namespace(name string) bool { return v.Namespaces[name] }

// Owners implements View.
func (v FakeView) Owners(addr netip.Addr) []Owner { return v.Addrs[addr] }
