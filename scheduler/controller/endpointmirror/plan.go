package endpointmirror

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/endpointslice/util"
	netutils "k8s.io/utils/net"
)

// perSubset is how many addresses of a subset are mirrored (upstream's default).
const perSubset = 1000

// group is what one slice may hold together.
type group struct {
	family discoveryv1.AddressType
	ports  util.PortMapKey
}

// content is what a group should hold.
type content struct {
	ports []discoveryv1.EndpointPort
	set   util.EndpointSet
}

// wanted sorts the addresses of an Endpoints object into groups. It also counts
// addresses that are none, and those that are too many.
func wanted(e *corev1.Endpoints) (groups map[group]*content, invalid, tooMany int) {
	groups = map[group]*content{}
	for _, subset := range canonical(e.Subsets) {
		ports := slicePorts(subset.Ports)
		key := util.NewPortMapKey(ports)
		mirrored := 0
		add := func(addresses []corev1.EndpointAddress, ready bool) {
			for i := range addresses {
				if mirrored == perSubset {
					tooMany += len(addresses) - i
					return
				}
				endpoint, family := endpointOf(&addresses[i], ready)
				if endpoint == nil {
					invalid++
					continue
				}
				g := groups[group{family, key}]
				if g == nil {
					g = &content{ports: ports, set: util.EndpointSet{}}
					groups[group{family, key}] = g
				}
				g.set.Insert(endpoint)
				mirrored++
			}
		}
		add(subset.Addresses, true)
		add(subset.NotReadyAddresses, false)
	}
	return groups, invalid, tooMany
}

func endpointOf(a *corev1.EndpointAddress, ready bool) (*discoveryv1.Endpoint, discoveryv1.AddressType) {
	ip := netutils.ParseIPSloppy(a.IP)
	if ip == nil {
		return nil, ""
	}
	family := discoveryv1.AddressTypeIPv4
	if ip.To4() == nil {
		family = discoveryv1.AddressTypeIPv6
	}
	e := &discoveryv1.Endpoint{
		Addresses:  []string{ip.String()}, // in the usual form, whatever the object has
		Conditions: discoveryv1.EndpointConditions{Ready: &ready},
		TargetRef:  a.TargetRef, NodeName: a.NodeName,
	}
	if a.Hostname != "" {
		e.Hostname = &a.Hostname
	}
	return e, family
}

func slicePorts(ports []corev1.EndpointPort) []discoveryv1.EndpointPort {
	out := []discoveryv1.EndpointPort{}
	for i := range ports {
		p := ports[i].DeepCopy()
		out = append(out, discoveryv1.EndpointPort{Name: &p.Name, Port: &p.Port, Protocol: &p.Protocol, AppProtocol: p.AppProtocol})
	}
	return out
}

// portKey tells ports of Endpoints apart; the zero value is "no port".
type portKey struct {
	name, app string
	number    int32
	protocol  corev1.Protocol
}

// addressKey tells addresses apart.
type addressKey struct{ ip, uid string }

// canonical makes one subset of all ports that have the same addresses. An
// address that is not ready somewhere under a port is not.
func canonical(subsets []corev1.EndpointSubset) []corev1.EndpointSubset {
	addresses := map[addressKey]*corev1.EndpointAddress{}
	ports := map[portKey]corev1.EndpointPort{}
	ready := map[portKey]map[addressKey]bool{}
	note := func(p portKey, list []corev1.EndpointAddress, isReady bool) {
		for i := range list {
			k := addressKey{ip: list[i].IP}
			if ref := list[i].TargetRef; ref != nil {
				k.uid = string(ref.UID)
			}
			if addresses[k] == nil {
				addresses[k] = &list[i]
			}
			if ready[p] == nil {
				ready[p] = map[addressKey]bool{}
			}
			was, known := ready[p][k]
			ready[p][k] = isReady && (was || !known)
		}
	}
	for _, s := range subsets {
		keys := []portKey{}
		for _, p := range s.Ports {
			k := portKey{name: p.Name, number: p.Port, protocol: p.Protocol}
			if p.AppProtocol != nil {
				k.app = *p.AppProtocol
			}
			ports[k] = p
			keys = append(keys, k)
		}
		if len(keys) == 0 {
			keys = append(keys, portKey{})
		}
		for _, k := range keys {
			note(k, s.Addresses, true)
			note(k, s.NotReadyAddresses, false)
		}
	}
	type pack struct {
		ports     []portKey
		addresses map[addressKey]bool
	}
	packs := map[string]*pack{}
	for p, set := range ready {
		id := identity(set)
		if packs[id] == nil {
			packs[id] = &pack{addresses: set}
		}
		packs[id].ports = append(packs[id].ports, p)
	}
	var out []corev1.EndpointSubset
	for _, id := range slices.Sorted(maps.Keys(packs)) {
		var s corev1.EndpointSubset
		slices.SortFunc(packs[id].ports, comparePorts)
		for _, p := range packs[id].ports {
			if p != (portKey{}) {
				s.Ports = append(s.Ports, ports[p])
			}
		}
		for _, k := range slices.SortedFunc(maps.Keys(packs[id].addresses), compareAddresses) {
			if packs[id].addresses[k] {
				s.Addresses = append(s.Addresses, *addresses[k])
			} else {
				s.NotReadyAddresses = append(s.NotReadyAddresses, *addresses[k])
			}
		}
		out = append(out, s)
	}
	return out
}

func comparePorts(a, b portKey) int {
	return cmp.Or(cmp.Compare(a.name, b.name), cmp.Compare(a.number, b.number), cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.app, b.app))
}

func compareAddresses(a, b addressKey) int {
	return cmp.Or(cmp.Compare(a.ip, b.ip), cmp.Compare(a.uid, b.uid))
}

// identity is the same for the same addresses with the same readiness.
func identity(set map[addressKey]bool) string {
	var b strings.Builder
	for _, k := range slices.SortedFunc(maps.Keys(set), compareAddresses) {
		fmt.Fprintf(&b, "%s/%s/%t ", k.ip, k.uid, set[k])
	}
	return b.String()
}

// changes are what is to be written.
type changes struct {
	create, update, remove []*discoveryv1.EndpointSlice
}

// plan compares the slices that mirror e with what they should be.
func plan(e *corev1.Endpoints, groups map[group]*content, have []*discoveryv1.EndpointSlice) (c changes) {
	byGroup := map[group][]*discoveryv1.EndpointSlice{}
	for _, s := range have {
		g := group{s.AddressType, util.NewPortMapKey(s.Ports)}
		byGroup[g] = append(byGroup[g], s)
	}
	for g, slices := range byGroup {
		if groups[g] == nil {
			c.remove = append(c.remove, slices...)
		}
	}
	for g, want := range groups {
		existing := byGroup[g]
		if len(existing) == 0 {
			c.create = append(c.create, newSlice(e, g, want))
			continue
		}
		c.remove = append(c.remove, existing[1:]...)
		if !shows(existing[0], e, want.set) {
			c.update = append(c.update, replace(existing[0], newSlice(e, g, want)))
		}
	}
	c.recycle()
	return c
}

// recycle writes new slices over those that would go: what watches sees less.
func (c *changes) recycle() {
	var create []*discoveryv1.EndpointSlice
	for _, s := range c.create {
		at := slices.IndexFunc(c.remove, func(old *discoveryv1.EndpointSlice) bool { return old.AddressType == s.AddressType })
		if at < 0 {
			create = append(create, s)
			continue
		}
		c.update = append(c.update, replace(c.remove[at], s))
		c.remove = slices.Delete(c.remove, at, at+1)
	}
	c.create = create
}

// replace gives s the place of old.
func replace(old, s *discoveryv1.EndpointSlice) *discoveryv1.EndpointSlice {
	s.GenerateName, s.Name, s.UID, s.ResourceVersion = "", old.Name, old.UID, old.ResourceVersion
	return s
}

// shows reports whether the slice says all that it should.
func shows(s *discoveryv1.EndpointSlice, e *corev1.Endpoints, set util.EndpointSet) bool {
	if len(s.Endpoints) != set.Len() {
		return false
	}
	for i := range s.Endpoints {
		want := set.Get(&s.Endpoints[i])
		if want == nil || !util.EndpointsEqualBeyondHash(want, &s.Endpoints[i]) {
			return false
		}
	}
	for _, ref := range s.OwnerReferences {
		if ref.Kind == "Endpoints" && ref.Name == e.Name && ref.UID != e.UID {
			return false
		}
	}
	return equality.Semantic.DeepEqual(s.Labels, labelsOf(e)) && equality.Semantic.DeepEqual(s.Annotations, annotationsOf(e))
}

func newSlice(e *corev1.Endpoints, g group, want *content) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: e.Namespace, GenerateName: e.Name + "-", Labels: labelsOf(e), Annotations: annotationsOf(e),
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(e, corev1.SchemeGroupVersion.WithKind("Endpoints"))},
		},
		Ports: want.ports, AddressType: g.family,
	}
	for _, endpoint := range want.set.UnsortedList() {
		s.Endpoints = append(s.Endpoints, *endpoint)
	}
	slices.SortFunc(s.Endpoints, func(a, b discoveryv1.Endpoint) int { return cmp.Compare(a.Addresses[0], b.Addresses[0]) })
	return s
}

func labelsOf(e *corev1.Endpoints) map[string]string {
	out := maps.Clone(e.Labels)
	if out == nil {
		out = map[string]string{}
	}
	out[discoveryv1.LabelServiceName], out[discoveryv1.LabelManagedBy] = e.Name, managedBy
	return out
}

// annotationsOf leaves out what changes with every write.
func annotationsOf(e *corev1.Endpoints) map[string]string {
	out := maps.Clone(e.Annotations)
	delete(out, corev1.EndpointsLastChangeTriggerTime)
	delete(out, corev1.LastAppliedConfigAnnotation)
	return out
}
