package placement

import (
	v1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/dynamic-resource-allocation/cel"
	"k8s.io/dynamic-resource-allocation/structured"
)

// A profile may weigh an extended resource that devices stand for. What a node
// offers of it is counted then (the rules are those of resource_allocation.go
// of upstream's noderesources plugins): all devices of the class that the node
// can use, whether their pool is complete or not, and as used those that are
// taken.

// classMatch is which devices of a list belong to a class.
type classMatch struct {
	devices []int // by their places
	err     error // of an expression
}

// offered is what a node has of a resource, and how much of it is used by
// others, where used is what its pods count with.
func (p *plan) offered(n *node, name v1.ResourceName, used int64) (int64, int64) {
	alloc := n.alloc.of(name)
	if alloc == 0 && len(p.s.devices.backing) > 0 {
		if class := p.s.devices.backing[name]; class != nil {
			if all, taken := p.s.devices.total(n.obj, class); all > 0 {
				return all, taken
			}
		}
	}
	return alloc, used
}

// total counts the devices of a class that the node can use, and those of them
// that are taken. If that cannot be told there are none.
func (d *devices) total(n *v1.Node, class *resourceapi.DeviceClass) (all, taken int64) {
	for _, slice := range d.allSlices() {
		here, err := usableOn(n, slice)
		if err != nil {
			return 0, 0
		}
		if here == nil {
			continue
		}
		matching := d.ofClass(slice, class)
		if matching.err != nil {
			return 0, 0
		}
		for _, i := range matching.devices {
			device := &slice.Spec.Devices[i]
			ok, err := here(device)
			if err != nil {
				return 0, 0
			}
			if !ok {
				continue
			}
			all++
			if structured.IsDeviceAllocated(structured.MakeDeviceID(slice.Spec.Driver, slice.Spec.Pool.Name, device.Name), &d.state) {
				taken++
			}
		}
	}
	return all, taken
}

// usableOn returns what tells which devices of a list a node can use; nil if none.
func usableOn(n *v1.Node, slice *resourceapi.ResourceSlice) (func(*resourceapi.Device) (bool, error), error) {
	spec := &slice.Spec
	if spec.PerDeviceNodeSelection != nil && *spec.PerDeviceNodeSelection {
		return func(device *resourceapi.Device) (bool, error) {
			if device.AllNodes != nil && *device.AllNodes || device.NodeName != nil && *device.NodeName == n.Name {
				return true, nil
			}
			return selects(device.NodeSelector, n)
		}, nil
	}
	ok := spec.AllNodes != nil && *spec.AllNodes || spec.NodeName != nil && *spec.NodeName == n.Name
	if !ok {
		var err error
		if ok, err = selects(spec.NodeSelector, n); err != nil || !ok {
			return nil, err
		}
	}
	return func(*resourceapi.Device) (bool, error) { return true, nil }, nil
}

func selects(selector *v1.NodeSelector, n *v1.Node) (bool, error) {
	if selector == nil {
		return false, nil
	}
	parsed, err := nodeaffinity.NewNodeSelector(selector)
	return err == nil && parsed.Match(n), err
}

// ofClass returns which devices of a list belong to a class, from memory if
// both are as they were.
func (d *devices) ofClass(slice *resourceapi.ResourceSlice, class *resourceapi.DeviceClass) classMatch {
	known, ok := d.matches[slice][class]
	if !ok {
		known = d.match(slice, class)
		if d.matches[slice] == nil {
			d.matches[slice] = map[*resourceapi.DeviceClass]classMatch{}
		}
		d.matches[slice][class] = known
	}
	return known
}

func (d *devices) match(slice *resourceapi.ResourceSlice, class *resourceapi.DeviceClass) (out classMatch) {
	for i := range slice.Spec.Devices {
		device := &slice.Spec.Devices[i]
		ok := true
		for j := range class.Spec.Selectors {
			selector := class.Spec.Selectors[j].CEL
			if selector == nil {
				continue
			}
			compiled := d.expressions().GetOrCompile(selector.Expression)
			if compiled.Error != nil {
				return classMatch{err: compiled.Error}
			}
			var err error
			ok, _, err = compiled.DeviceMatches(background, cel.Device{Driver: slice.Spec.Driver, Attributes: device.Attributes, Capacity: device.Capacity})
			if err != nil {
				return classMatch{err: err}
			}
			if !ok {
				break
			}
		}
		if ok {
			out.devices = append(out.devices, i)
		}
	}
	return out
}
