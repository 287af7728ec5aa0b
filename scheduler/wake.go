package scheduler

import (
	"maps"
	"slices"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/dynamic-resource-allocation/resourceclaim"

	"skein.io/skein/scheduler/placement"
	"skein.io/skein/scheduler/queue"
)

// helpers says for each filter which events can change its mind, as the
// EventsToRegister of upstream's plugins do.
var helpers = map[placement.Filter]queue.Event{
	placement.NodeUnschedulable: queue.NodeAdded | queue.NodeTaints,
	placement.NodeName:          queue.NodeAdded,
	placement.TaintToleration:   queue.NodeAdded | queue.NodeTaints | queue.NodeReturned,
	placement.NodeAffinity:      queue.NodeAdded | queue.NodeLabels,
	placement.NodePorts:         queue.NodeAdded | queue.PodGone,
	placement.NodeResourcesFit:  queue.NodeAdded | queue.NodeAllocatable | queue.PodGone | queue.PodShrunk | queue.DeviceClasses,
	// A claim that is not there refuses for the first filter that wants to read it.
	placement.VolumeRestrictions: queue.NodeAdded | queue.PodGone | queue.PeerGone | queue.PodClaims,
	placement.NodeVolumeLimits:   queue.NodeAdded | queue.PodGone | queue.PodClaims | queue.CSI,
	placement.VolumeBinding:      queue.NodeAdded | queue.NodeLabels | queue.PodClaims | queue.Volumes | queue.StorageClasses | queue.CSI,
	placement.VolumeZone:         queue.NodeAdded | queue.NodeLabels | queue.PodClaims | queue.Volumes | queue.StorageClasses,
	placement.PodTopologySpread:  queue.Topology | queue.NodeRemoved | queue.PodPlaced | queue.PeerGone | queue.PodLabels | queue.PodEnding,
	placement.InterPodAffinity:   queue.Topology | queue.PodPlaced | queue.PeerGone | queue.PodLabels | queue.NamespaceLabels,
	placement.DynamicResources: queue.NodeAdded | queue.NodeLabels | queue.NodeAllocatable |
		queue.ResourceClaims | queue.DeviceClasses | queue.DeviceSlices,
	placement.NodeDeclaredFeatures: queue.NodeAdded | queue.NodeLabels,
}

// wakers is the set of events that may help a refused pod.
func wakers(r *placement.Refusal) queue.Event {
	if r.Nodes == 0 {
		return queue.NodeAdded
	}
	var ev queue.Event
	for filter := range r.Filters {
		ev |= helpers[filter]
	}
	return ev
}

// nodeChange says what about a node changed that waiting pods may care for,
// and whether decisions must be made on the new version at all.
func nodeChange(old, cur *v1.Node) (ev queue.Event, matters bool) {
	if old == nil {
		return queue.NodeAdded, true
	}
	if !equality.Semantic.DeepEqual(old.Status.Allocatable, cur.Status.Allocatable) {
		ev |= queue.NodeAllocatable
	}
	// What a node's agent can do is rare news, so it has no event of its own.
	if !maps.Equal(old.Labels, cur.Labels) || !slices.Equal(old.Status.DeclaredFeatures, cur.Status.DeclaredFeatures) {
		ev |= queue.NodeLabels
	}
	if old.Spec.Unschedulable != cur.Spec.Unschedulable || !equality.Semantic.DeepEqual(old.Spec.Taints, cur.Spec.Taints) {
		ev |= queue.NodeTaints
	}
	return ev, ev != 0 || !equality.Semantic.DeepEqual(old.Status.Images, cur.Status.Images)
}

// moveAt tells the queue of something that happened on one node: of the pods
// that it may help, those that the node would still not take sleep on. Pods of
// one template are asked once. l.mu is held.
func (l *loop) moveAt(ev queue.Event, node string) {
	if ev == 0 {
		return
	}
	asked := map[*v1.Container]bool{} // the view's pods of one template share their containers
	l.moveIf(ev, func(pod *v1.Pod) bool {
		if len(pod.Spec.Containers) == 0 {
			return true
		}
		profile := l.profiles[pod.Spec.SchedulerName].profile
		if l.snapshot.NominatedTo(pod) == node {
			// A pod for which others end here learns that it fits, or that it must look elsewhere when they have.
			return !l.evictions.underWay(pod.UID, l.snapshot) && !l.snapshot.EvictionUnderWay(pod, node) || l.snapshot.Fits(pod, node, profile)
		}
		key := &pod.Spec.Containers[0]
		fits, known := asked[key]
		if !known {
			fits = l.snapshot.Welcomes(pod, node, profile)
			asked[key] = fits
		}
		return fits
	})
}

// movePeers tells the queue of something that happened to a placed pod: it
// wakes only those to whom it can matter where that one is. l.mu is held.
func (l *loop) movePeers(ev queue.Event, pod *v1.Pod) {
	if ev != 0 {
		concerned := l.snapshot.Concern(pod)
		l.moveIf(ev, func(pod *v1.Pod) bool { return concerned(pod, l.profiles[pod.Spec.SchedulerName].profile) })
	}
}

func (l *loop) moveIf(ev queue.Event, may func(*v1.Pod) bool) {
	if l.queue.Move(ev, may, l.clock.Now()) > 0 {
		l.nudge()
	}
}

// placedPodChange says what about a bound pod changed that waiting pods may
// care for.
func placedPodChange(old, cur *v1.Pod) (ev queue.Event) {
	if !maps.Equal(old.Labels, cur.Labels) {
		ev |= queue.PodLabels
	}
	if old.DeletionTimestamp == nil && cur.DeletionTimestamp != nil {
		ev |= queue.PodEnding
	}
	before, after := placement.PodRequest(old, true), placement.PodRequest(cur, true)
	if after.MilliCPU < before.MilliCPU || after.Memory < before.Memory || after.EphemeralStorage < before.EphemeralStorage {
		ev |= queue.PodShrunk
	}
	return ev
}

// pendingPodChanged reports whether a pod's new version may be schedulable
// where the old one was not. What the scheduler itself writes (conditions,
// the nominated node) must not count, or a refused pod would wake itself.
func pendingPodChanged(old, cur *v1.Pod) bool {
	return !maps.Equal(old.Labels, cur.Labels) || !equality.Semantic.DeepEqual(&old.Spec, &cur.Spec) ||
		!resourceclaim.PodStatusEqual(old.Status.ResourceClaimStatuses, cur.Status.ResourceClaimStatuses)
}
