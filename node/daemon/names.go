package daemon

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"sync/atomic"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"skein.io/skein/node/desired"
	"skein.io/skein/node/dns"
)

// names is what the DNS server knows at one moment: an index over the desired state, never changed once made.
type names struct {
	services   map[string]dns.Service
	endpoints  map[string][]dns.Endpoint
	namespaces map[string]bool
	owners     map[netip.Addr][]dns.Owner
}

// indexNames is a pure function of the objects.
func indexNames(svcs []*corev1.Service, eps []*discoveryv1.EndpointSlice) *names {
	x := &names{services: map[string]dns.Service{}, endpoints: map[string][]dns.Endpoint{}, namespaces: map[string]bool{"default": true}, owners: map[netip.Addr][]dns.Owner{}}
	for _, s := range svcs {
		x.namespaces[s.Namespace] = true
		d := dns.Service{ExternalName: s.Spec.ExternalName, PublishNotReady: s.Spec.PublishNotReadyAddresses}
		if s.Spec.Type != corev1.ServiceTypeExternalName {
			d.ExternalName = ""
		}
		for _, ip := range s.Spec.ClusterIPs {
			if a, err := netip.ParseAddr(ip); err == nil {
				d.ClusterIPs = append(d.ClusterIPs, a)
				x.owners[a] = append(x.owners[a], dns.Owner{Namespace: s.Namespace, Name: s.Name})
			}
		}
		for _, p := range s.Spec.Ports {
			d.Ports = append(d.Ports, dns.Port{Name: p.Name, Protocol: string(p.Protocol), Port: uint16(p.Port)})
		}
		x.services[s.Namespace+"/"+s.Name] = d
	}
	for _, e := range eps {
		x.addSlice(e)
	}
	return x
}

func (x *names) addSlice(e *discoveryv1.EndpointSlice) {
	svc := e.Labels[discoveryv1.LabelServiceName]
	if svc == "" {
		return
	}
	key := e.Namespace + "/" + svc
	var ports []dns.Port
	for _, p := range e.Ports {
		if p.Port == nil {
			continue
		}
		d := dns.Port{Port: uint16(*p.Port), Protocol: string(corev1.ProtocolTCP)}
		if p.Name != nil {
			d.Name = *p.Name
		}
		if p.Protocol != nil {
			d.Protocol = string(*p.Protocol)
		}
		ports = append(ports, d)
	}
	for _, ep := range e.Endpoints {
		for _, addr := range ep.Addresses {
			a, err := netip.ParseAddr(addr)
			if err != nil {
				continue
			}
			d := dns.Endpoint{Addr: a, Ready: ep.Conditions.Ready == nil || *ep.Conditions.Ready, Ports: ports}
			if ep.Hostname != nil {
				d.Hostname = *ep.Hostname
			}
			x.endpoints[key] = append(x.endpoints[key], d)
			name := d.Hostname
			if name == "" {
				name = strings.ReplaceAll(a.String(), ".", "-")
			}
			if o := (dns.Owner{Namespace: e.Namespace, Name: svc, Endpoint: name}); !slices.Contains(x.owners[a], o) {
				x.owners[a] = append(x.owners[a], o)
			}
		}
	}
}

// nameView is the View of the DNS server: the newest index.
type nameView struct{ p atomic.Pointer[names] }

func (v *nameView) Service(ns, name string) (dns.Service, bool) {
	s, ok := v.p.Load().services[ns+"/"+name]
	return s, ok
}
func (v *nameView) Endpoints(ns, name string) []dns.Endpoint {
	return v.p.Load().endpoints[ns+"/"+name]
}
func (v *nameView) Namespace(name string) bool      { return v.p.Load().namespaces[name] }
func (v *nameView) Owners(a netip.Addr) []dns.Owner { return v.p.Load().owners[a] }

// runDNS answers names on this node, from the desired state.
func (n *node) runDNS(ctx context.Context) error {
	view := &nameView{}
	changed, end := n.desired.Subscribe(desired.Services, desired.EndpointSlices)
	defer end()
	fill := func() { view.p.Store(indexNames(n.desired.Services(), n.desired.EndpointSlices())) }
	fill()
	s, err := dns.New(dns.Config{
		View: view, Domain: n.id.Cluster.Domain, Listen: []netip.AddrPort{dnsAddr},
		Ranges: []netip.Prefix{n.id.Cluster.PodCIDR, n.id.Cluster.ServiceCIDR}, Logger: n.log.With("part", "dns"),
	})
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	ctx, cancel := context.WithCancel(ctx)
	go func() { ended <- s.Run(ctx) }()
	defer func() { cancel(); <-ended }()
	n.parts.set("dns", nil, dnsAddr.String())
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-ended:
			ended <- nil // for the deferred wait
			return err
		case <-changed:
			fill()
		}
	}
}
