package controller

import (
	"encoding/binary"
	"math"
	"sync"
	"time"
	"unique"
	"unsafe"
	"weak"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// packed is a pod as the view holds it: what it has in common with others by reference, and what is its own in one string. That is 0.25 KB,
// where the structure alone of a corev1.Pod is 1.2 KB (BenchmarkViewPod). unpack makes the pod of it that readers get, and
// remembers it for as long as somebody has it and the collector has not come by, so that all handlers of an event share
// one. It is never changed but for that. It is a metav1.Object for reading, as the informer needs.
type packed struct {
	// Shared with others, and never changed. Together they are the pod but for its own part.
	meta   *metav1.ObjectMeta
	spec   *corev1.PodSpec
	status *corev1.PodStatus
	node   unique.Handle[string]
	// own is name, uid and resource version, as long as said below, then what packer.pack writes.
	own                         string
	nameLen, uidLen, versionLen uint8
	volumes                     bool                     // it has some
	cached                      weak.Pointer[corev1.Pod] // guarded by the lock that unpacking gives
}

// unpacking guards packed.cached. One for each pod would make pods larger, and one for all would be waited for.
var unpacking [64]sync.Mutex

func (p *packed) lock() *sync.Mutex {
	return &unpacking[uintptr(unsafe.Pointer(p))>>6%uintptr(len(unpacking))]
}

// unpack returns the pod, which nobody may change.
func (p *packed) unpack() *corev1.Pod {
	mu := p.lock()
	mu.Lock()
	defer mu.Unlock()
	if pod := p.cached.Value(); pod != nil {
		return pod
	}
	pod := p.build()
	p.cached = weak.Make(pod)
	return pod
}

// packs says whether a pod has what packed does not know: then it is held whole.
func packs(pod *corev1.Pod) bool {
	return pod.TypeMeta == (metav1.TypeMeta{}) && len(pod.Name) <= math.MaxUint8 && len(pod.UID) <= math.MaxUint8 && len(pod.ResourceVersion) <= math.MaxUint8
}

// split makes parts of a pod that can be shared, and what remains: what others never have alike. Every field is in one of them, so one
// that is new in the API is in a shared part until it is named here. Times of the status are in neither, see eachTime.
func split(pod *corev1.Pod) (meta metav1.ObjectMeta, spec corev1.PodSpec, status corev1.PodStatus, own corev1.Pod) {
	meta, spec, status = pod.ObjectMeta, pod.Spec, pod.Status
	o := &own.ObjectMeta
	o.DeletionGracePeriodSeconds, o.ManagedFields, o.SelfLink = meta.DeletionGracePeriodSeconds, meta.ManagedFields, meta.SelfLink
	meta.Name, meta.UID, meta.ResourceVersion, meta.Generation = "", "", "", 0
	meta.CreationTimestamp, meta.DeletionTimestamp = metav1.Time{}, nil
	meta.DeletionGracePeriodSeconds, meta.ManagedFields, meta.SelfLink = nil, nil, ""

	own.Spec.Hostname, own.Spec.Volumes = spec.Hostname, spec.Volumes
	spec.NodeName, spec.Hostname, spec.Volumes = "", "", nil

	s := &own.Status
	s.HostIP, s.HostIPs, s.PodIP, s.PodIPs, s.NominatedNodeName = status.HostIP, status.HostIPs, status.PodIP, status.PodIPs, status.NominatedNodeName
	s.ResourceClaimStatuses, s.ExtendedResourceClaimStatus = status.ResourceClaimStatuses, status.ExtendedResourceClaimStatus
	status.HostIP, status.HostIPs, status.PodIP, status.PodIPs, status.NominatedNodeName = "", nil, "", nil, ""
	status.ResourceClaimStatuses, status.ExtendedResourceClaimStatus = nil, nil
	ownTimes(&status)
	return meta, spec, status, own
}

// ownTimes copies of a status what leads to its times, so that they can be changed.
func ownTimes(s *corev1.PodStatus) {
	if s.StartTime != nil {
		s.StartTime = &metav1.Time{Time: s.StartTime.Time}
	}
	if s.Conditions != nil {
		s.Conditions = append(make([]corev1.PodCondition, 0, len(s.Conditions)), s.Conditions...)
	}
	for _, list := range []*[]corev1.ContainerStatus{&s.InitContainerStatuses, &s.ContainerStatuses, &s.EphemeralContainerStatuses} {
		if *list == nil {
			continue
		}
		*list = append(make([]corev1.ContainerStatus, 0, len(*list)), *list...)
		for i := range *list {
			for _, state := range []*corev1.ContainerState{&(*list)[i].State, &(*list)[i].LastTerminationState} {
				if state.Running != nil {
					running := *state.Running
					state.Running = &running
				}
				if state.Terminated != nil {
					terminated := *state.Terminated
					state.Terminated = &terminated
				}
			}
		}
	}
}

// eachTime calls do for the times of a status, always in the same order.
func eachTime(s *corev1.PodStatus, do func(*metav1.Time)) {
	if s.StartTime != nil {
		do(s.StartTime)
	}
	for i := range s.Conditions {
		do(&s.Conditions[i].LastProbeTime)
		do(&s.Conditions[i].LastTransitionTime)
	}
	for _, list := range [][]corev1.ContainerStatus{s.InitContainerStatuses, s.ContainerStatuses, s.EphemeralContainerStatuses} {
		for i := range list {
			for _, state := range []*corev1.ContainerState{&list[i].State, &list[i].LastTerminationState} {
				if state.Running != nil {
					do(&state.Running.StartedAt)
				}
				if state.Terminated != nil {
					do(&state.Terminated.StartedAt)
					do(&state.Terminated.FinishedAt)
				}
			}
		}
	}
}

// appendTime appends a time: 0 for none, else the seconds since another and whether there are parts of one, which follow.
func appendTime(b []byte, t time.Time, since int64) []byte {
	if t.IsZero() {
		return append(b, 0)
	}
	v := zigzag(t.Unix()-since) << 1
	if t.Nanosecond() == 0 {
		return binary.AppendUvarint(b, v+1)
	}
	return binary.AppendUvarint(binary.AppendUvarint(b, v+2), uint64(t.Nanosecond()))
}

// zigzag makes small numbers of such near zero. A time is far from using the bits that are lost with another shift.
func zigzag(v int64) uint64 { return uint64(v)<<1 ^ uint64(v>>63) }

// pieces reads what the append functions have written.
type pieces struct{ rest []byte }

func (r *pieces) number() uint64 {
	v, n := binary.Uvarint(r.rest)
	r.rest = r.rest[n:]
	return v
}

func (r *pieces) time(since int64) time.Time {
	v := r.number()
	if v == 0 {
		return time.Time{}
	}
	v--
	nanos := int64(0)
	if v&1 != 0 {
		nanos = int64(r.number())
	}
	u := v >> 1
	return time.Unix(since+(int64(u>>1)^-int64(u&1)), nanos)
}

// message gives the bytes of one, nil if it says nothing.
func (r *pieces) message() []byte {
	n := r.number()
	if n == 0 {
		return nil
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func decode(b []byte, into interface{ Unmarshal([]byte) error }) {
	if err := into.Unmarshal(b); err != nil {
		panic("controller: a packed pod does not decode: " + err.Error())
	}
}

// build makes a pod anew.
func (p *packed) build() *corev1.Pod {
	pod := &corev1.Pod{ObjectMeta: *p.meta}
	p.named(pod)
	r := pieces{unsafe.Slice(unsafe.StringData(p.own), len(p.own))[len(pod.Name)+len(pod.UID)+len(pod.ResourceVersion):]}
	pod.Generation = int64(r.number())
	pod.CreationTimestamp.Time = r.time(0)
	since := epoch(pod)
	if r.number() != 0 {
		pod.DeletionTimestamp = &metav1.Time{Time: r.time(since)}
	}
	if b := r.message(); b != nil {
		o := &metav1.ObjectMeta{}
		decode(b, o)
		pod.DeletionGracePeriodSeconds, pod.ManagedFields, pod.SelfLink = o.DeletionGracePeriodSeconds, o.ManagedFields, o.SelfLink
	}
	pod.Spec = *p.spec
	pod.Spec.NodeName = p.node.Value()
	if b := r.message(); b != nil {
		o := &corev1.PodSpec{}
		decode(b, o)
		pod.Spec.Hostname, pod.Spec.Volumes = o.Hostname, o.Volumes
	}
	pod.Status = *p.status
	s := &pod.Status
	ownTimes(s)
	if b := r.message(); b != nil {
		o := &corev1.PodStatus{}
		decode(b, o)
		s.HostIP, s.HostIPs, s.PodIP, s.PodIPs, s.NominatedNodeName = o.HostIP, o.HostIPs, o.PodIP, o.PodIPs, o.NominatedNodeName
		s.ResourceClaimStatuses, s.ExtendedResourceClaimStatus = o.ResourceClaimStatuses, o.ExtendedResourceClaimStatus
	}
	eachTime(s, func(t *metav1.Time) { t.Time = r.time(since) })
	return pod
}

// named gives a pod the names that are in own, and the node's.
func (p *packed) named(pod *corev1.Pod) {
	pod.Name, pod.UID, pod.ResourceVersion, pod.Spec.NodeName = p.GetName(), p.GetUID(), p.GetResourceVersion(), p.node.Value()
}

// epoch is what other times of a pod are near to, in seconds.
func epoch(pod *corev1.Pod) int64 {
	if pod.CreationTimestamp.IsZero() {
		return 0
	}
	return pod.CreationTimestamp.Unix()
}

// unpacked gives what readers of the view get for what it holds.
func unpacked(obj any) any {
	switch o := obj.(type) {
	case *packed:
		return o.unpack()
	}
	return obj
}

// What follows makes it a metav1.Object.

func (p *packed) GetNamespace() string { return p.meta.Namespace }
func (p *packed) GetName() string      { return p.own[:p.nameLen] }
func (p *packed) GetUID() types.UID    { return types.UID(p.own[p.nameLen:][:p.uidLen]) }
func (p *packed) GetResourceVersion() string {
	return p.own[int(p.nameLen)+int(p.uidLen):][:p.versionLen]
}
func (p *packed) GetGenerateName() string                       { return p.meta.GenerateName }
func (p *packed) GetLabels() map[string]string                  { return p.meta.Labels }
func (p *packed) GetAnnotations() map[string]string             { return p.meta.Annotations }
func (p *packed) GetFinalizers() []string                       { return p.meta.Finalizers }
func (p *packed) GetOwnerReferences() []metav1.OwnerReference   { return p.meta.OwnerReferences }
func (p *packed) GetGeneration() int64                          { return p.unpack().Generation }
func (p *packed) GetCreationTimestamp() metav1.Time             { return p.unpack().CreationTimestamp }
func (p *packed) GetDeletionTimestamp() *metav1.Time            { return p.unpack().DeletionTimestamp }
func (p *packed) GetDeletionGracePeriodSeconds() *int64         { return p.unpack().DeletionGracePeriodSeconds }
func (p *packed) GetSelfLink() string                           { return p.unpack().SelfLink }
func (p *packed) GetManagedFields() []metav1.ManagedFieldsEntry { return p.unpack().ManagedFields }
func (p *packed) SetNamespace(string)                           { p.fixed() }
func (p *packed) SetName(string)                                { p.fixed() }
func (p *packed) SetGenerateName(string)                        { p.fixed() }
func (p *packed) SetUID(types.UID)                              { p.fixed() }
func (p *packed) SetResourceVersion(string)                     { p.fixed() }
func (p *packed) SetGeneration(int64)                           { p.fixed() }
func (p *packed) SetSelfLink(string)                            { p.fixed() }
func (p *packed) SetCreationTimestamp(metav1.Time)              { p.fixed() }
func (p *packed) SetDeletionTimestamp(*metav1.Time)             { p.fixed() }
func (p *packed) SetDeletionGracePeriodSeconds(*int64)          { p.fixed() }
func (p *packed) SetLabels(map[string]string)                   { p.fixed() }
func (p *packed) SetAnnotations(map[string]string)              { p.fixed() }
func (p *packed) SetFinalizers([]string)                        { p.fixed() }
func (p *packed) SetOwnerReferences([]metav1.OwnerReference)    { p.fixed() }
func (p *packed) SetManagedFields([]metav1.ManagedFieldsEntry)  { p.fixed() }
func (p *packed) fixed()                                        { panic("controller: an object of the view is changed") }
