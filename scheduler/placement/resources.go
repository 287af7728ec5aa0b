package placement

import (
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	resourcehelper "k8s.io/component-helpers/resource"
)

// A container that names no request counts with these amounts when nodes are
// scored (never when they are filtered), so that many such pods do not all go
// to one node. Source: pkg/scheduler/util/pod_resources.go of Kubernetes.
const (
	scoreMilliCPU = 100               // thousandths of a core
	scoreMemory   = 200 * 1024 * 1024 // bytes
)

// Resources is an amount of everything that can be requested from a node.
type Resources struct {
	MilliCPU         int64                     // thousandths of a core
	Memory           int64                     // bytes
	EphemeralStorage int64                     // bytes
	Scalars          map[v1.ResourceName]int64 // huge pages (bytes), extended resources (pieces); may be nil
}

// add adds sign times o.
func (r *Resources) add(o *Resources, sign int64) {
	r.MilliCPU += sign * o.MilliCPU
	r.Memory += sign * o.Memory
	r.EphemeralStorage += sign * o.EphemeralStorage
	if len(o.Scalars) == 0 {
		return
	}
	if r.Scalars == nil {
		r.Scalars = make(map[v1.ResourceName]int64, len(o.Scalars))
	}
	for name, n := range o.Scalars {
		r.Scalars[name] += sign * n
		if r.Scalars[name] == 0 {
			delete(r.Scalars, name)
		}
	}
}

// isZero reports whether nothing is requested; a scalar named with amount 0
// does not count as a request.
func (r *Resources) isZero() bool {
	return r.MilliCPU == 0 && r.Memory == 0 && r.EphemeralStorage == 0 && len(r.Scalars) == 0
}

// isScalar tells the resources that are counted by name: extended and other
// prefixed ones, huge pages, attachable volumes.
func isScalar(name v1.ResourceName) bool {
	s := string(name)
	return strings.Contains(s, "/") ||
		strings.HasPrefix(s, v1.ResourceHugePagesPrefix) ||
		strings.HasPrefix(s, v1.ResourceAttachableVolumesPrefix)
}

func resourcesOf(list v1.ResourceList) Resources {
	var r Resources
	for name, q := range list {
		switch name {
		case v1.ResourceCPU:
			r.MilliCPU = q.MilliValue()
		case v1.ResourceMemory:
			r.Memory = q.Value()
		case v1.ResourceEphemeralStorage:
			r.EphemeralStorage = q.Value()
		default:
			if n := q.Value(); n != 0 && isScalar(name) {
				if r.Scalars == nil {
					r.Scalars = map[v1.ResourceName]int64{}
				}
				r.Scalars[name] = n
			}
		}
	}
	return r
}

// PodRequest returns what a pod takes from its node: for each resource the
// larger of the sum over its containers and the largest need of its init
// phase (sidecars, which are init containers that keep running, count in
// both), or the pod's own request where it states one, plus its overhead.
// The formula is that of KEP-753 and KEP-2837 and comes from
// k8s.io/component-helpers. placed says that the pod is bound: what its node
// has already granted to a container during an in-place resize then counts,
// if it is more than the specification.
func PodRequest(pod *v1.Pod, placed bool) Resources {
	return resourcesOf(resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{
		UseStatusResources: placed,
		InPlacePodLevelResourcesVerticalScalingEnabled: placed,
	}))
}

// scoringRequest is PodRequest in CPU and memory with the amounts above for
// containers that request none.
func scoringRequest(pod *v1.Pod, placed bool, request *Resources) (milliCPU, memory int64) {
	missing := v1.ResourceList{}
	podLevel := resourcehelper.IsPodLevelRequestsSet(pod)
	if !podLevel || request.MilliCPU == 0 {
		missing[v1.ResourceCPU] = *resource.NewMilliQuantity(scoreMilliCPU, resource.DecimalSI)
	}
	if !podLevel || request.Memory == 0 {
		missing[v1.ResourceMemory] = *resource.NewQuantity(scoreMemory, resource.DecimalSI)
	}
	if len(missing) == 0 || everyContainerRequests(pod) {
		return request.MilliCPU, request.Memory
	}
	list := resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{
		UseStatusResources: placed,
		InPlacePodLevelResourcesVerticalScalingEnabled: placed,
		NonMissingContainerRequests:                    missing,
	})
	cpu, mem := list[v1.ResourceCPU], list[v1.ResourceMemory]
	return cpu.MilliValue(), mem.Value()
}

// everyContainerRequests is the common case in which the second, costly sum
// of scoringRequest would be the same as the first.
func everyContainerRequests(pod *v1.Pod) bool {
	has := func(cs []v1.Container) bool {
		for i := range cs {
			_, cpu := cs[i].Resources.Requests[v1.ResourceCPU]
			_, mem := cs[i].Resources.Requests[v1.ResourceMemory]
			if !cpu || !mem {
				return false
			}
		}
		return true
	}
	return has(pod.Spec.Containers) && has(pod.Spec.InitContainers)
}
