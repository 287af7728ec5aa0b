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

// of returns the amount of one resource.
func (r *Resources) of(name v1.ResourceName) int64 {
	switch name {
	case v1.ResourceCPU:
		return r.MilliCPU
	case v1.ResourceMemory:
		return r.Memory
	case v1.ResourceEphemeralStorage:
		return r.EphemeralStorage
	}
	return r.Scalars[name]
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
func PodRequest(pod *v1.Pod, placed bool) Resources { return resourcesOf(podRequests(pod, placed)) }

func podRequests(pod *v1.Pod, placed bool) v1.ResourceList {
	return resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{
		UseStatusResources: placed,
		InPlacePodLevelResourcesVerticalScalingEnabled: placed,
	})
}

// scored is what a pod counts with when nodes are scored: in CPU and memory
// with the amounts above for containers that request none.
//
// Of a pod that is placed, its own request (spec.resources) goes before its
// containers'. Of the pod to be placed, kube-scheduler 1.36 looks at the
// containers only (NewFit does not hand the feature gate to its scorer); that
// is kept, so that nodes rank as they do there.
func scored(pod *v1.Pod, placed bool, request v1.ResourceList) v1.ResourceList {
	podLevel := resourcehelper.IsPodLevelRequestsSet(pod)
	missing := v1.ResourceList{}
	if _, ok := request[v1.ResourceCPU]; !ok || !podLevel || !placed {
		missing[v1.ResourceCPU] = *resource.NewMilliQuantity(scoreMilliCPU, resource.DecimalSI)
	}
	if _, ok := request[v1.ResourceMemory]; !ok || !podLevel || !placed {
		missing[v1.ResourceMemory] = *resource.NewQuantity(scoreMemory, resource.DecimalSI)
	}
	if len(missing) == 0 || everyContainerRequests(pod) && !resizeInfeasible(pod) && (placed || !podLevel) {
		return request
	}
	return resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{
		UseStatusResources: placed,
		InPlacePodLevelResourcesVerticalScalingEnabled: placed,
		SkipPodLevelResources:                          !placed,
		NonMissingContainerRequests:                    missing,
	})
}

// resizeInfeasible is true of a pod whose node will never grant what its
// specification wants: then only what is granted counts.
func resizeInfeasible(pod *v1.Pod) bool {
	for i := range pod.Status.Conditions {
		if c := &pod.Status.Conditions[i]; c.Type == v1.PodResizePending {
			return c.Reason == v1.PodReasonInfeasible
		}
	}
	return false
}

// everyContainerRequests is the common case in which the second, costly sum
// of scored would be the same as the first.
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

// isExtended tells the resources that only a node's agent or a device plugin
// knows about, outside of kubernetes.io.
func isExtended(name v1.ResourceName) bool {
	s := string(name)
	return strings.Contains(s, "/") && !strings.Contains(s, v1.ResourceDefaultNamespacePrefix) && !strings.HasPrefix(s, v1.DefaultResourceRequestsPrefix)
}

// ignores reports whether the profile leaves the resource to somebody else.
func (r *Profile) ignores(name v1.ResourceName) bool {
	if len(r.ignored)+len(r.ignoredGroups) == 0 || !isExtended(name) {
		return false
	}
	group, _, _ := strings.Cut(string(name), "/")
	return r.ignored[name] || r.ignoredGroups[group]
}
