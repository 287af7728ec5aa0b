package placement

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	v1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Extended resources that a class of devices stands for: on a node that does
// not offer the resource itself, the pod gets devices by a claim that the
// scheduler makes for it. Names and order of the requests are upstream's
// (pkg/scheduler/framework/plugins/dynamicresources/extendeddynamicresources.go):
// drivers and the agent read them.

// backedByDevices reports whether the pod requests such a resource. It does
// not matter that the profile has NodeResourcesFit ignore it.
func (p *plan) backedByDevices() bool {
	if len(p.s.devices.backing) == 0 {
		return false
	}
	for name, want := range p.info.request.Scalars {
		if want > 0 && p.s.devices.backing[name] != nil {
			return true
		}
	}
	return false
}

// leftToDevices reports whether the resource is not the node's to give, but
// that of devices.
func (p *plan) leftToDevices(n *node, name v1.ResourceName) bool {
	return len(p.s.devices.backing) > 0 && n.alloc.Scalars[name] <= 0 && p.s.devices.backing[name] != nil
}

// specialClaim is the claim for a pod's extended resources, before a node is
// chosen: it has no name, and a uid of its own that no other claim can have.
func specialClaim(pod *v1.Pod) *resourceapi.ResourceClaim {
	yes := true
	return &resourceapi.ResourceClaim{ObjectMeta: metav1.ObjectMeta{
		Namespace:    pod.Namespace,
		GenerateName: pod.Name + "-extended-resources-",
		UID:          types.UID("extended-resources/" + string(pod.UID)),
		Annotations:  map[string]string{resourceapi.ExtendedResourceClaimAnnotation: "true"},
		OwnerReferences: []metav1.OwnerReference{
			{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID, Controller: &yes},
		},
	}}
}

// specialRequests is what the pod's extended resources ask of the node's
// devices, and which container uses which request. Containers that run to
// their end before others start use the devices of those.
func (p *plan) specialRequests(n *node) (requests []resourceapi.DeviceRequest, mappings []v1.ContainerExtendedResourceRequest) {
	for _, name := range slices.Sorted(maps.Keys(p.info.request.Scalars)) {
		if p.info.request.Scalars[name] > 0 && p.leftToDevices(n, name) {
			r, m := requestsFor(p.pod, name, p.s.devices.backing[name].Name)
			requests, mappings = append(requests, r...), append(mappings, m...)
		}
	}
	slices.SortFunc(requests, func(a, b resourceapi.DeviceRequest) int { return cmp.Compare(a.Name, b.Name) })
	return requests, mappings
}

// requestsFor makes the requests for one resource.
func requestsFor(pod *v1.Pod, resource v1.ResourceName, class string) (requests []resourceapi.DeviceRequest, mappings []v1.ContainerExtendedResourceRequest) {
	all := slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers)
	short := func(i int) bool {
		policy := all[i].RestartPolicy
		return i < len(pod.Spec.InitContainers) && (policy == nil || *policy != v1.ContainerRestartPolicyAlways)
	}
	lasting := make([]*resourceapi.DeviceRequest, len(all)) // by container
	for i := range all {
		if !short(i) {
			r, m := containerRequest(i, &all[i], resource, class, nil)
			lasting[i], mappings = r, append(mappings, m...)
		}
	}
	// Of the containers that end, one after the other, the greediest counts.
	var greediest *resourceapi.DeviceRequest
	own := map[string]bool{}
	from := len(mappings)
	for i := range all {
		if !short(i) {
			continue
		}
		r, m := containerRequest(i, &all[i], resource, class, lasting[i:])
		if r != nil {
			own[r.Name] = true
			if greediest == nil || greediest.Exactly.Count < r.Exactly.Count {
				greediest = r
			}
		}
		mappings = append(mappings, m...)
	}
	for i := range mappings[from:] {
		if m := &mappings[from+i]; own[m.RequestName] {
			m.RequestName = greediest.Name
		}
	}
	if greediest != nil {
		requests = append(requests, *greediest)
	}
	for _, r := range lasting {
		if r != nil {
			requests = append(requests, *r)
		}
	}
	return requests, mappings
}

// containerRequest is what one container needs beyond the requests that it
// can use meanwhile; nil if those are enough.
func containerRequest(index int, c *v1.Container, resource v1.ResourceName, class string, usable []*resourceapi.DeviceRequest) (*resourceapi.DeviceRequest, []v1.ContainerExtendedResourceRequest) {
	quantity := c.Resources.Requests[resource]
	need, ok := quantity.AsInt64()
	if !ok || need == 0 {
		return nil, nil
	}
	var mappings []v1.ContainerExtendedResourceRequest
	uses := func(request string) {
		mappings = append(mappings, v1.ContainerExtendedResourceRequest{ContainerName: c.Name, ResourceName: string(resource), RequestName: request})
	}
	for _, r := range usable {
		if r == nil {
			continue
		}
		uses(r.Name)
		if need -= r.Exactly.Count; need <= 0 {
			return nil, mappings
		}
	}
	// The number is the resource's place among all that the container requests.
	place := 0
	for other := range c.Resources.Requests {
		if other < resource {
			place++
		}
	}
	r := &resourceapi.DeviceRequest{
		Name: fmt.Sprintf("container-%d-request-%d", index, place),
		Exactly: &resourceapi.ExactDeviceRequest{
			DeviceClassName: class, AllocationMode: resourceapi.DeviceAllocationModeExactCount, Count: need,
		},
	}
	uses(r.Name)
	return r, mappings
}
