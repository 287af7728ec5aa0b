package daemon

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"skein.io/skein/datapath/service"
)

// hostPorts are the ports of this node that lead to its pods, as Services with one back end each; status is what the agent knows of a
// pod, nil if nothing. A port without an address answers at each of the node's and at 127.0.0.1. Pure.
func hostPorts(node string, pods []*corev1.Pod, status func(*corev1.Pod) *corev1.PodStatus) []service.Service {
	var out []service.Service
	for _, p := range pods {
		if p.Spec.HostNetwork {
			continue // its ports are the node's by themselves
		}
		st := status(p)
		if st == nil {
			st = &p.Status
		}
		ip, err := netip.ParseAddr(st.PodIP)
		if err != nil || st.Phase == corev1.PodSucceeded || st.Phase == corev1.PodFailed {
			continue // no network (any more)
		}
		for _, list := range [][]corev1.Container{p.Spec.InitContainers, p.Spec.Containers} {
			for i := range list {
				for _, port := range list[i].Ports {
					if s, ok := hostPort(p, &port); ok {
						s.Backends = []service.Backend{{Addr: netip.AddrPortFrom(ip, uint16(port.ContainerPort)), Node: node}}
						out = append(out, s)
					}
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b service.Service) int { return cmp.Compare(a.Name, b.Name) })
	return slices.CompactFunc(out, func(a, b service.Service) bool { return a.Name == b.Name })
}

// hostPort makes the front end of one port; false when it has none that the datapath knows.
func hostPort(p *corev1.Pod, port *corev1.ContainerPort) (service.Service, bool) {
	if port.HostPort == 0 {
		return service.Service{}, false
	}
	s := service.Service{Name: fmt.Sprintf("%s/%s hostPort %s:%d/%s", p.Namespace, p.Name, port.HostIP, port.HostPort, port.Protocol), ExternalLocal: true}
	var ok bool
	if s.Proto, ok = protocol(port.Protocol); !ok {
		return s, false
	}
	if port.HostIP == "" {
		s.NodePort = uint16(port.HostPort)
		return s, true
	}
	at, err := netip.ParseAddr(port.HostIP)
	switch {
	case err != nil:
		return s, false
	case at.IsUnspecified():
		s.NodePort = uint16(port.HostPort)
	case at.Is4():
		// Loopback is for processes of the node itself; packets from elsewhere cannot have that address.
		s.Frontends = []service.Frontend{{Addr: netip.AddrPortFrom(at, uint16(port.HostPort)), External: !at.IsLoopback()}}
	default:
		return s, false // IPv4 only
	}
	return s, true
}

// learnPorts looks which ports of the node lead to its pods, and reports whether that changed.
func (w *network) learnPorts() (changed bool) {
	now := hostPorts(w.n.cfg.Name, w.n.desired.Pods(), func(p *corev1.Pod) *corev1.PodStatus {
		if r := w.n.desired.Record(p.UID); r != nil {
			return r.Status
		}
		return nil
	})
	changed = !slices.EqualFunc(now, w.ports, func(a, b service.Service) bool {
		return a.Name == b.Name && slices.Equal(a.Backends, b.Backends) // the name has the rest
	})
	w.ports = now
	return changed
}
