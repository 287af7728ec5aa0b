package endpoints

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	endpointslicelib "k8s.io/endpointslice"
	"k8s.io/endpointslice/util"
	netutils "k8s.io/utils/net"
)

// capacity is the most addresses that one object holds; upstream's.
const capacity = 1000

// address is a pod at which a Service can be reached.
type address struct {
	corev1.EndpointAddress
	ready bool
}

// portKey tells ports of Endpoints apart. The zero value is "no port".
type portKey struct {
	name     string
	port     int32
	protocol corev1.Protocol
	app      string
}

// reach returns the addresses of a Service under each port that they offer.
func reach(service *corev1.Service, pods []*corev1.Pod) map[portKey][]address {
	out := map[portKey][]address{}
	for _, pod := range pods {
		if !util.ShouldPodBeInEndpoints(pod, service.Spec.PublishNotReadyAddresses) {
			continue
		}
		ip := podIP(service, pod)
		if ip == "" {
			continue // has none of the Service's family
		}
		a := address{ready: service.Spec.PublishNotReadyAddresses || util.IsPodReady(pod), EndpointAddress: corev1.EndpointAddress{
			IP: ip, NodeName: &pod.Spec.NodeName,
			TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		}}
		if util.ShouldSetHostname(pod, service) {
			a.Hostname = pod.Spec.Hostname
		}
		if len(service.Spec.Ports) == 0 && service.Spec.ClusterIP == corev1.ClusterIPNone {
			out[portKey{}] = append(out[portKey{}], a)
		}
		for i := range service.Spec.Ports {
			p := &service.Spec.Ports[i]
			num, err := endpointslicelib.FindPort(pod, p)
			if err != nil {
				continue // the pod has no port of that name
			}
			k := portKey{name: p.Name, port: int32(num), protocol: p.Protocol}
			if p.AppProtocol != nil {
				k.app = *p.AppProtocol
			}
			out[k] = append(out[k], a)
		}
	}
	return out
}

// podIP is the pod's address of the Service's (first) family.
func podIP(service *corev1.Service, pod *corev1.Pod) string {
	v6 := len(service.Spec.IPFamilies) > 0 && service.Spec.IPFamilies[0] == corev1.IPv6Protocol ||
		len(service.Spec.IPFamilies) == 0 && netutils.IsIPv6String(service.Spec.ClusterIP)
	ips := pod.Status.PodIPs
	if len(ips) == 0 {
		ips = []corev1.PodIP{{IP: pod.Status.PodIP}}
	}
	for _, ip := range ips {
		if netutils.IsIPv6String(ip.IP) == v6 && ip.IP != "" {
			return ip.IP
		}
	}
	return ""
}

// pack makes one subset of all ports that have the same addresses, in an order
// that depends on the content only.
func pack(byPort map[portKey][]address) []corev1.EndpointSubset {
	type group struct {
		ports []portKey
		addrs []address
	}
	groups := map[string]*group{}
	for port, addrs := range byPort {
		slices.SortFunc(addrs, func(a, b address) int {
			return cmp.Or(cmp.Compare(a.IP, b.IP), cmp.Compare(a.TargetRef.UID, b.TargetRef.UID))
		})
		var key strings.Builder
		for _, a := range addrs {
			fmt.Fprintf(&key, "%s/%s/%t ", a.IP, a.TargetRef.UID, a.ready)
		}
		g := groups[key.String()]
		if g == nil {
			g = &group{addrs: addrs}
			groups[key.String()] = g
		}
		g.ports = append(g.ports, port)
	}
	var out []corev1.EndpointSubset
	for _, g := range groups {
		var s corev1.EndpointSubset
		for _, a := range g.addrs {
			if a.ready {
				s.Addresses = append(s.Addresses, a.EndpointAddress)
			} else {
				s.NotReadyAddresses = append(s.NotReadyAddresses, a.EndpointAddress)
			}
		}
		slices.SortFunc(g.ports, comparePorts)
		for _, p := range g.ports {
			if p != (portKey{}) {
				s.Ports = append(s.Ports, p.endpointPort())
			}
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b corev1.EndpointSubset) int { return cmp.Compare(subsetKey(a), subsetKey(b)) })
	return out
}

func comparePorts(a, b portKey) int {
	return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.port, b.port), cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.app, b.app))
}

func (p portKey) endpointPort() corev1.EndpointPort {
	e := corev1.EndpointPort{Name: p.name, Port: p.port, Protocol: p.protocol}
	if p.app != "" {
		e.AppProtocol = &p.app
	}
	return e
}

// subsetKey differs between any two subsets of one object, since no port is in two.
func subsetKey(s corev1.EndpointSubset) string {
	var b strings.Builder
	for _, p := range s.Ports {
		fmt.Fprintf(&b, "%s/%06d/%s ", p.Name, p.Port, p.Protocol)
	}
	return b.String()
}

// truncate keeps no more than capacity addresses, ready ones before others.
func truncate(subsets []corev1.EndpointSubset) ([]corev1.EndpointSubset, bool) {
	room, cut := capacity, false
	trim := func(addrs *[]corev1.EndpointAddress) {
		if len(*addrs) > room {
			*addrs, cut = (*addrs)[:room], true
		}
		room -= len(*addrs)
	}
	for i := range subsets {
		trim(&subsets[i].Addresses)
	}
	for i := range subsets {
		trim(&subsets[i].NotReadyAddresses)
	}
	return slices.DeleteFunc(subsets, func(s corev1.EndpointSubset) bool { return len(s.Addresses)+len(s.NotReadyAddresses) == 0 }), cut
}
