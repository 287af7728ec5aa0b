package daemon

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"skein.io/skein/datapath/service"
)

// local are the Services that every node answers itself, whatever the API says their endpoints are: so they work on a node
// that is cut off, and the API has no single address to lose.
type local struct {
	api netip.AddrPort // this node's API front, for default/kubernetes
	dns netip.AddrPort // this node's DNS server, for kube-system/kube-dns
}

// translate turns the cluster's Services and EndpointSlices into what the datapath balances on this node: one
// service.Service for each port. It is a pure function; equal input gives equal output in the same order.
func translate(svcs []*corev1.Service, slicesIn []*discoveryv1.EndpointSlice, loc local) []service.Service {
	bySvc := map[string][]*discoveryv1.EndpointSlice{}
	for _, s := range slicesIn {
		if name := s.Labels[discoveryv1.LabelServiceName]; name != "" && s.AddressType == discoveryv1.AddressTypeIPv4 {
			key := s.Namespace + "/" + name
			bySvc[key] = append(bySvc[key], s)
		}
	}
	var out []service.Service
	for _, svc := range svcs {
		key := svc.Namespace + "/" + svc.Name
		if svc.Spec.Type == corev1.ServiceTypeExternalName {
			continue
		}
		for i := range svc.Spec.Ports {
			port := &svc.Spec.Ports[i]
			s, ok := translatePort(svc, port)
			if !ok {
				continue
			}
			switch key {
			case "default/kubernetes":
				s.Backends = []service.Backend{{Addr: loc.api}}
			case "kube-system/kube-dns":
				s.Backends = []service.Backend{{Addr: netip.AddrPortFrom(loc.dns.Addr(), loc.dns.Port())}}
			default:
				s.Backends = backends(bySvc[key], port.Name, svc.Spec.PublishNotReadyAddresses)
			}
			out = append(out, s)
		}
	}
	slices.SortFunc(out, func(a, b service.Service) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// protocol is the datapath's name of one; false when it has none.
func protocol(p corev1.Protocol) (service.Proto, bool) {
	switch p {
	case corev1.ProtocolTCP, "":
		return service.TCP, true
	case corev1.ProtocolUDP:
		return service.UDP, true
	}
	return 0, false
}

// translatePort makes the front ends of one port; false when it has none that the datapath knows.
func translatePort(svc *corev1.Service, p *corev1.ServicePort) (service.Service, bool) {
	s := service.Service{
		Name:          fmt.Sprintf("%s/%s:%s", svc.Namespace, svc.Name, cmp.Or(p.Name, strconv.Itoa(int(p.Port)))),
		InternalLocal: svc.Spec.InternalTrafficPolicy != nil && *svc.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
		ExternalLocal: svc.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal,
		NodePort:      uint16(p.NodePort),
	}
	var ok bool
	if s.Proto, ok = protocol(p.Protocol); !ok {
		return s, false
	}
	if svc.Spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		seconds := int32(corev1.DefaultClientIPServiceAffinitySeconds)
		if c := svc.Spec.SessionAffinityConfig; c != nil && c.ClientIP != nil && c.ClientIP.TimeoutSeconds != nil {
			seconds = *c.ClientIP.TimeoutSeconds
		}
		s.Affinity = time.Duration(seconds) * time.Second
	}
	front := func(addr string, external bool) {
		if a, err := netip.ParseAddr(addr); err == nil && a.Is4() {
			s.Frontends = append(s.Frontends, service.Frontend{Addr: netip.AddrPortFrom(a, uint16(p.Port)), External: external})
		}
	}
	front(svc.Spec.ClusterIP, false) // "None" of a headless Service is no address
	if more := svc.Spec.ClusterIPs; len(more) > 1 {
		front(more[1], false) // of the other family
	}
	for _, a := range svc.Spec.ExternalIPs {
		front(a, true)
	}
	for _, in := range svc.Status.LoadBalancer.Ingress {
		if in.IPMode == nil || *in.IPMode == corev1.LoadBalancerIPModeVIP {
			front(in.IP, true)
		}
	}
	return s, len(s.Frontends) > 0 || s.NodePort != 0
}

// backends lists the endpoints of one port: those that are ready, and those that end but still serve.
func backends(in []*discoveryv1.EndpointSlice, port string, notReadyToo bool) []service.Backend {
	seen := map[netip.AddrPort]int{}
	var out []service.Backend
	for _, slice := range in {
		for _, p := range slice.Ports {
			if p.Port == nil || p.Name != nil && *p.Name != port || p.Name == nil && port != "" {
				continue
			}
			for i := range slice.Endpoints {
				e := &slice.Endpoints[i]
				terminating := isTrue(e.Conditions.Terminating)
				ready := e.Conditions.Ready == nil || *e.Conditions.Ready || notReadyToo
				if !ready && !(terminating && isTrue(e.Conditions.Serving)) {
					continue
				}
				for _, addr := range e.Addresses {
					a, err := netip.ParseAddr(addr)
					if err != nil {
						continue
					}
					b := service.Backend{Addr: netip.AddrPortFrom(a, uint16(*p.Port)), Terminating: !ready}
					if e.NodeName != nil {
						b.Node = *e.NodeName
					}
					// An endpoint may stand in two slices for a moment while it moves between them.
					if at, dup := seen[b.Addr]; dup {
						out[at].Terminating = out[at].Terminating && b.Terminating
						continue
					}
					seen[b.Addr] = len(out)
					out = append(out, b)
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b service.Backend) int { return a.Addr.Compare(b.Addr) })
	return out
}

func isTrue(b *bool) bool { return b != nil && *b }
