package oracle

import (
	"fmt"
	"time"

	v1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
)

// deviceSet is what a world has of devices.
type deviceSet struct {
	Classes []*resourceapi.DeviceClass   `json:"classes,omitempty"`
	Slices  []*resourceapi.ResourceSlice `json:"slices,omitempty"`
	Claims  []*resourceapi.ResourceClaim `json:"claims,omitempty"`
}

// The drivers: cards on nodes, cards that are cut into parts, and what is reached through a network, by several at once.
const cards, parts, links = "card.test", "part.test", "link.test"

const (
	implicitCard = v1.ResourceName(resourceapi.ResourceDeviceClassPrefix + "card")
	place        = "rack.test/place" // an attribute of all drivers' devices
)

// Few expressions, so that those kept compiled are enough for them all.
var expressions = map[string]string{
	"card":  `device.driver == "card.test"`,
	"part":  `device.driver == "part.test"`,
	"link":  `device.driver == "link.test"`,
	"new":   `device.driver == "card.test" && device.attributes["card.test"].model == "new"`,
	"large": `device.driver == "card.test" && device.capacity["card.test"].memory.compareTo(quantity("40Gi")) >= 0`,
	"odd":   `device.attributes["card.test"].absent == "x"`, // an error for every device
}

func selectors(names ...string) (out []resourceapi.DeviceSelector) {
	for _, name := range names {
		out = append(out, resourceapi.DeviceSelector{CEL: &resourceapi.CELDeviceSelector{Expression: expressions[name]}})
	}
	return out
}

// devices adds devices, claims, and pods that want some. Of cards, no two worlds name one alike, and no two have the same
// node selector: upstream remembers for good which ones belong to a class, and which nodes a selector matches, to score by.
func (g *gen) devices() {
	g.deviceClasses()
	for _, n := range g.w.Nodes {
		if g.chance(60) {
			g.cards(n)
		}
		if g.chance(25) {
			g.parts(n)
		}
	}
	if g.chance(60) {
		g.network()
	}
	if g.chance(40) {
		g.fabric()
	}
	for range 1 + g.IntN(4) {
		g.hold(g.deviceClaim(pick(g, "alpha", "alpha", "beta")))
	}
	for _, p := range g.w.Asked {
		if g.chance(70) {
			easeOff(p)
		}
		g.useDevices(p)
	}
}

// easeOff leaves a pod little else to be refused for.
func easeOff(p *v1.Pod) {
	p.Spec.Affinity, p.Spec.TopologySpreadConstraints, p.Spec.NodeSelector, p.Spec.NodeName, p.Spec.Volumes = nil, nil, nil, "", nil
	p.Spec.Tolerations = []v1.Toleration{{Operator: v1.TolerationOpExists}}
	p.Spec.Resources = nil
	for _, list := range [][]v1.Container{p.Spec.InitContainers, p.Spec.Containers} {
		for i := range list {
			list[i].Ports, list[i].RestartPolicyRules = nil, nil
			list[i].Resources.Requests = v1.ResourceList{v1.ResourceCPU: resource.MustParse("10m")}
		}
	}
}

func (g *gen) deviceClasses() {
	class := func(name string, selected ...string) *resourceapi.DeviceClass {
		c := &resourceapi.DeviceClass{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.Time{Time: g.begin}}, Spec: resourceapi.DeviceClassSpec{Selectors: selectors(selected...)}}
		if g.chance(20) {
			c.Spec.Config = []resourceapi.DeviceClassConfiguration{{DeviceConfiguration: opaque(cards, name)}}
		}
		g.w.Devices.Classes = append(g.w.Devices.Classes, c)
		return c
	}
	plain, card, large := class("any"), class("card", "card"), class("large", "card", "large")
	class("part", "part")
	class("link", "link")
	if g.chance(3) {
		class("odd", "odd")
	}
	if !g.chance(50) {
		return
	}
	// Upstream's NodeResourcesBalancedAllocation has no compiler for expressions: it crashes where it weighs such a resource.
	behind := plain
	if g.w.Profile != packed {
		behind = pick(g, plain, card, card, large)
	}
	behind.Spec.ExtendedResourceName = ptr.To(string(gpu))
	if g.chance(20) && g.w.Profile != packed {
		newer := class("newer", "new")
		newer.Spec.ExtendedResourceName = behind.Spec.ExtendedResourceName
		newer.CreationTimestamp.Time = g.begin.Add(time.Hour)
	}
}

func opaque(driver, say string) resourceapi.DeviceConfiguration {
	return resourceapi.DeviceConfiguration{Opaque: &resourceapi.OpaqueDeviceConfiguration{Driver: driver, Parameters: runtime.RawExtension{Raw: []byte(fmt.Sprintf("{%q: 1}", say))}}}
}

func (g *gen) slice(driver, pool string, generation, of int) *resourceapi.ResourceSlice {
	s := &resourceapi.ResourceSlice{ObjectMeta: metav1.ObjectMeta{Name: g.name("slice")}, Spec: resourceapi.ResourceSliceSpec{
		Driver: driver, Pool: resourceapi.ResourcePool{Name: pool, Generation: int64(generation), ResourceSliceCount: int64(of)},
	}}
	g.w.Devices.Slices = append(g.w.Devices.Slices, s)
	return s
}

// cards are those of one node, in one list or two, which may not all be there (yet), or repeat a name.
func (g *gen) cards(n *v1.Node) {
	generation, of := 1+g.IntN(2), pick(g, 1, 1, 1, 2)
	stated := of
	if g.chance(6) {
		stated++
	}
	for i := range of {
		s := g.slice(cards, n.Name, generation, stated)
		s.Spec.NodeName = &n.Name
		for range 1 + g.IntN(3) {
			s.Spec.Devices = append(s.Spec.Devices, g.card("card"))
		}
		if i == 0 && g.chance(4) {
			s.Spec.Devices = append(s.Spec.Devices, s.Spec.Devices[0])
		}
	}
	if g.chance(8) {
		old := g.slice(cards, n.Name, generation-1, 1)
		old.Spec.NodeName, old.Spec.Devices = &n.Name, []resourceapi.Device{g.card("gone")}
	}
}

func (g *gen) card(prefix string) resourceapi.Device {
	d := resourceapi.Device{
		Name: fmt.Sprintf("%s-%d", g.name(prefix), g.w.Seed),
		Attributes: map[resourceapi.QualifiedName]resourceapi.DeviceAttribute{
			"model": {StringValue: ptr.To(pick(g, "old", "new"))},
			place:   {IntValue: ptr.To(int64(g.IntN(2)))},
		},
		Capacity: map[resourceapi.QualifiedName]resourceapi.DeviceCapacity{"memory": {Value: resource.MustParse(pick(g, "20Gi", "40Gi", "80Gi"))}},
	}
	if g.chance(15) {
		d.Taints = []resourceapi.DeviceTaint{{Key: "worn", Value: pick(g, "", "out"), Effect: pick(g, resourceapi.DeviceTaintEffectNoSchedule, resourceapi.DeviceTaintEffectNoExecute, resourceapi.DeviceTaintEffectNone)}}
	}
	if g.chance(8) {
		d.BindsToNode, d.BindingConditions, d.BindingFailureConditions = ptr.To(true), []string{"example.com/attached"}, []string{"example.com/broken"}
	}
	return d
}

// parts is a card that can be had whole or in halves and quarters.
func (g *gen) parts(n *v1.Node) {
	pool := "parts-" + n.Name
	memory := func(amount string) map[string]resourceapi.Counter {
		return map[string]resourceapi.Counter{"memory": {Value: resource.MustParse(amount)}}
	}
	whole := g.slice(parts, pool, 1, 2)
	whole.Spec.NodeName, whole.Spec.SharedCounters = &n.Name, []resourceapi.CounterSet{{Name: "whole", Counters: memory("80Gi")}}
	s := g.slice(parts, pool, 1, 2)
	s.Spec.NodeName = &n.Name
	for _, size := range []string{"80Gi", "40Gi", "40Gi", "20Gi"}[g.IntN(3):] {
		d := g.card("part")
		d.ConsumesCounters = []resourceapi.DeviceCounterConsumption{{CounterSet: "whole", Counters: memory(size)}}
		s.Spec.Devices = append(s.Spec.Devices, d)
	}
}

// network is what all nodes of a zone, or all there are, can use, and several pods at once.
func (g *gen) network() {
	s := g.slice(links, "network", 1, 1)
	if g.chance(50) {
		s.Spec.AllNodes = ptr.To(true)
	} else {
		s.Spec.NodeSelector = g.zones("east", "west")
	}
	for range 1 + g.IntN(3) {
		d := g.card("link")
		if g.chance(70) {
			d.AllowMultipleAllocations = ptr.To(true)
			c := resourceapi.DeviceCapacity{Value: resource.MustParse("10G")}
			switch g.IntN(3) {
			case 0:
				c.RequestPolicy = &resourceapi.CapacityRequestPolicy{Default: ptr.To(resource.MustParse("2G")), ValidRange: &resourceapi.CapacityRequestPolicyRange{Min: ptr.To(resource.MustParse("1G")), Max: ptr.To(resource.MustParse("8G")), Step: ptr.To(resource.MustParse("1G"))}}
			case 1:
				c.RequestPolicy = &resourceapi.CapacityRequestPolicy{Default: ptr.To(resource.MustParse("5G")), ValidValues: []resource.Quantity{resource.MustParse("1G"), resource.MustParse("5G")}}
			}
			d.Capacity = map[resourceapi.QualifiedName]resourceapi.DeviceCapacity{"bandwidth": c}
		}
		s.Spec.Devices = append(s.Spec.Devices, d)
	}
}

// fabric is a pool whose devices say each for itself which nodes can use it.
func (g *gen) fabric() {
	s := g.slice(links, "fabric", 1, 1)
	s.Spec.PerDeviceNodeSelection = ptr.To(true)
	for range 2 + g.IntN(3) {
		d := g.card("port")
		switch g.IntN(3) {
		case 0:
			d.NodeName = ptr.To(pick(g, g.w.Nodes...).Name)
		case 1:
			d.NodeSelector = g.zones("north", "west")
		default:
			d.AllNodes = ptr.To(true)
		}
		s.Spec.Devices = append(s.Spec.Devices, d)
	}
}

func (g *gen) zones(from ...string) *v1.NodeSelector {
	return &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{{MatchExpressions: []v1.NodeSelectorRequirement{
		{Key: v1.LabelTopologyZone, Operator: v1.NodeSelectorOpIn, Values: []string{pick(g, from...), fmt.Sprintf("world-%d", g.w.Seed)}},
	}}}}
}

func (g *gen) deviceClaim(namespace string) *resourceapi.ResourceClaim {
	name := g.name("devices")
	c := &resourceapi.ResourceClaim{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(name)}}
	spec := &c.Spec.Devices
	for i := range pick(g, 1, 1, 2) {
		r := resourceapi.DeviceRequest{Name: fmt.Sprintf("r%d", i)}
		if g.chance(30) {
			for j := range 2 + g.IntN(2) {
				e := g.exactly()
				r.FirstAvailable = append(r.FirstAvailable, resourceapi.DeviceSubRequest{
					Name: fmt.Sprintf("s%d", j), DeviceClassName: e.DeviceClassName, Selectors: e.Selectors, AllocationMode: e.AllocationMode,
					Count: e.Count, Tolerations: e.Tolerations, Capacity: e.Capacity,
				})
			}
		} else {
			r.Exactly = g.exactly()
			if g.chance(6) {
				r.Exactly.AdminAccess = ptr.To(true)
			}
		}
		spec.Requests = append(spec.Requests, r)
	}
	if g.chance(25) {
		constraint := resourceapi.DeviceConstraint{MatchAttribute: ptr.To(resourceapi.FullyQualifiedName(place))}
		if g.chance(30) {
			constraint = resourceapi.DeviceConstraint{DistinctAttribute: ptr.To(resourceapi.FullyQualifiedName(place))}
		}
		if g.chance(40) {
			constraint.Requests = []string{pick(g, spec.Requests...).Name}
		}
		spec.Constraints = append(spec.Constraints, constraint)
	}
	if g.chance(20) {
		config := resourceapi.DeviceClaimConfiguration{DeviceConfiguration: opaque(cards, "claim")}
		if g.chance(50) {
			config.Requests = []string{"r0"}
		}
		spec.Config = append(spec.Config, config)
	}
	g.w.Devices.Claims = append(g.w.Devices.Claims, c)
	return c
}

func (g *gen) exactly() *resourceapi.ExactDeviceRequest {
	r := &resourceapi.ExactDeviceRequest{DeviceClassName: pick(g, "card", "card", "card", "large", "part", "link", "link", "any"), AllocationMode: resourceapi.DeviceAllocationModeExactCount, Count: int64(pick(g, 1, 1, 1, 2, 3))}
	if g.chance(15) {
		r.AllocationMode, r.Count = resourceapi.DeviceAllocationModeAll, 0
	}
	switch {
	case g.chance(3):
		r.DeviceClassName = pick(g, "odd", "absent")
	case g.chance(20):
		r.Selectors = selectors(pick(g, "new", "large"))
	case g.chance(2):
		r.Selectors = selectors("odd")
	}
	if g.chance(20) {
		r.Tolerations = []resourceapi.DeviceToleration{{Key: pick(g, "worn", ""), Operator: resourceapi.DeviceTolerationOpExists, Effect: pick(g, "", resourceapi.DeviceTaintEffectNoSchedule)}}
	}
	if r.DeviceClassName == "link" && g.chance(50) {
		r.Capacity = &resourceapi.CapacityRequirements{Requests: map[resourceapi.QualifiedName]resource.Quantity{"bandwidth": resource.MustParse(pick(g, "1G", "3G", "8G", "500M"))}}
	}
	return r
}

// hold gives some claims devices, as if they had been allocated before.
func (g *gen) hold(c *resourceapi.ResourceClaim) {
	if !g.chance(75) || len(g.w.Devices.Slices) == 0 {
		return
	}
	allocation := &resourceapi.AllocationResult{AllocationTimestamp: &metav1.Time{Time: time.Now().Add(-pick(g, time.Second, time.Hour))}}
	for range pick(g, 1, 1, 2) {
		s := pick(g, g.w.Devices.Slices...)
		if len(s.Spec.Devices) == 0 {
			continue
		}
		d := pick(g, s.Spec.Devices...)
		request := c.Spec.Devices.Requests[0]
		r := resourceapi.DeviceRequestAllocationResult{Request: request.Name, Driver: s.Spec.Driver, Pool: s.Spec.Pool.Name, Device: d.Name, BindingConditions: d.BindingConditions, BindingFailureConditions: d.BindingFailureConditions}
		if len(request.FirstAvailable) > 0 {
			r.Request += "/" + pick(g, request.FirstAvailable...).Name
		} else {
			r.AdminAccess = request.Exactly.AdminAccess
		}
		if d.AllowMultipleAllocations != nil {
			r.ShareID = ptr.To(types.UID(g.name("share")))
			r.ConsumedCapacity = map[resourceapi.QualifiedName]resource.Quantity{"bandwidth": resource.MustParse(pick(g, "1G", "5G"))}
		} else if g.given(&r) {
			continue
		}
		allocation.Devices.Results = append(allocation.Devices.Results, r)
		allocation.NodeSelector = selectorOf(s)
		if len(d.BindingConditions) > 0 {
			g.attach(c, &r)
		}
	}
	if len(allocation.Devices.Results) == 0 {
		return
	}
	c.Status.Allocation = allocation
	for range pick(g, 0, 1, 1, 2) {
		c.Status.ReservedFor = append(c.Status.ReservedFor, resourceapi.ResourceClaimConsumerReference{Resource: "pods", Name: "other", UID: types.UID(g.name("other"))})
	}
}

// given is true of a device that another claim has to itself.
func (g *gen) given(r *resourceapi.DeviceRequestAllocationResult) bool {
	for _, c := range g.w.Devices.Claims {
		if c.Status.Allocation == nil {
			continue
		}
		for _, o := range c.Status.Allocation.Devices.Results {
			if o.Driver == r.Driver && o.Pool == r.Pool && o.Device == r.Device {
				return true
			}
		}
	}
	return false
}

func selectorOf(s *resourceapi.ResourceSlice) *v1.NodeSelector {
	if s.Spec.NodeName == nil {
		return s.Spec.NodeSelector
	}
	return &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{{MatchFields: []v1.NodeSelectorRequirement{{Key: "metadata.name", Operator: v1.NodeSelectorOpIn, Values: []string{*s.Spec.NodeName}}}}}}
}

// attach is what the driver of a device that has to be made ready says.
func (g *gen) attach(c *resourceapi.ResourceClaim, r *resourceapi.DeviceRequestAllocationResult) {
	said := resourceapi.AllocatedDeviceStatus{Driver: r.Driver, Pool: r.Pool, Device: r.Device}
	switch g.IntN(4) {
	case 0:
		return // nothing yet
	case 1:
		said.Conditions = []metav1.Condition{{Type: r.BindingConditions[0], Status: metav1.ConditionTrue, Reason: "Done"}}
	case 2:
		said.Conditions = []metav1.Condition{{Type: r.BindingFailureConditions[0], Status: metav1.ConditionTrue, Reason: "Broken", Message: "it smokes"}}
	}
	c.Status.Devices = append(c.Status.Devices, said)
}

// useDevices makes a pod want devices: by claims, and by extended resources that devices stand for.
func (g *gen) useDevices(p *v1.Pod) {
	named := map[string]bool{}
	for range pick(g, 0, 1, 1, 1, 2) {
		var c *resourceapi.ResourceClaim
		if g.chance(50) {
			c = g.deviceClaim(p.Namespace)
		} else if c = pick(g, g.w.Devices.Claims...); c.Namespace != p.Namespace || named[c.Name] || c.Annotations != nil {
			continue
		}
		named[c.Name] = true
		g.refer(p, c)
	}
	if g.chance(30) {
		for _, list := range [][]v1.Container{p.Spec.InitContainers, p.Spec.Containers} {
			for i := range list {
				if g.chance(50) {
					list[i].Resources.Requests[pick(g, gpu, implicitCard)] = resource.MustParse(pick(g, "1", "1", "2"))
				}
			}
		}
		if g.chance(8) { // left over from an earlier attempt
			c := g.deviceClaim(p.Namespace)
			c.Annotations = map[string]string{resourceapi.ExtendedResourceClaimAnnotation: "true"}
			c.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: p.Name, UID: p.UID, Controller: ptr.To(true)}}
			g.hold(c)
		}
	}
}

// refer makes a pod use a claim, by its name or by a template that it was made from; now and then something is wrong with it.
func (g *gen) refer(p *v1.Pod, c *resourceapi.ResourceClaim) {
	use := v1.PodResourceClaim{Name: fmt.Sprintf("c%d", len(p.Spec.ResourceClaims)), ResourceClaimName: &c.Name}
	if g.chance(25) && c.OwnerReferences == nil {
		use.ResourceClaimName, use.ResourceClaimTemplateName = nil, ptr.To("template")
		owner := p.UID
		if g.chance(6) {
			owner = "somebody"
		}
		c.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: p.Name, UID: owner, Controller: ptr.To(true)}}
		made := v1.PodResourceClaimStatus{Name: use.Name, ResourceClaimName: &c.Name}
		if g.chance(6) {
			made.ResourceClaimName = nil // found to need none
		}
		p.Status.ResourceClaimStatuses = append(p.Status.ResourceClaimStatuses, made)
	}
	switch {
	case g.chance(2):
		use.ResourceClaimName, use.ResourceClaimTemplateName = ptr.To("missing"), nil
	case g.chance(2):
		c.DeletionTimestamp = &metav1.Time{Time: g.begin}
	case g.chance(30) && c.Status.Allocation != nil:
		c.Status.ReservedFor = []resourceapi.ResourceClaimConsumerReference{{Resource: "pods", Name: p.Name, UID: p.UID}}
	}
	p.Spec.ResourceClaims = append(p.Spec.ResourceClaims, use)
}
