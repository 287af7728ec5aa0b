package devicetaint

import (
	"math"
	"time"

	corev1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/dynamic-resource-allocation/resourceclaim"
)

// evictAt says when a pod has to go because of the devices that its claims
// have; false: never. device finds a device as its driver offers it now, nil if
// it does not.
func evictAt(pod *corev1.Pod, claim func(name string) *resourceapi.ResourceClaim, device func(*resourceapi.DeviceRequestAllocationResult) *resourceapi.Device) (at time.Time, evict bool) {
	if pod.Spec.NodeName == "" {
		return at, false
	}
	for i := range pod.Spec.ResourceClaims {
		name, mine, err := resourceclaim.Name(pod, &pod.Spec.ResourceClaims[i])
		if err != nil || name == nil {
			continue // there is none (yet)
		}
		c := claim(*name)
		if c == nil || c.Status.Allocation == nil || mine && resourceclaim.IsForPod(pod, c, false) != nil || !resourceclaim.IsReservedForPod(pod, c, false) {
			continue // the pod does not use it
		}
		for j := range c.Status.Allocation.Devices.Results {
			r := &c.Status.Allocation.Devices.Results[j]
			d := device(r)
			if d == nil {
				continue
			}
			for k := range d.Taints {
				if when, bad := unbearable(&d.Taints[k], r.Tolerations); bad && (!evict || when.Before(at)) {
					at, evict = when, true
				}
			}
		}
	}
	return at, evict
}

// unbearable says since when a taint drives pods off, if it does.
func unbearable(taint *resourceapi.DeviceTaint, tolerations []resourceapi.DeviceToleration) (time.Time, bool) {
	if taint.Effect != resourceapi.DeviceTaintEffectNoExecute {
		return time.Time{}, false
	}
	var at time.Time // a taint without a time counts from ever
	if taint.TimeAdded != nil {
		at = taint.TimeAdded.Time
	}
	seconds := int64(math.MaxInt64)
	for _, t := range tolerations {
		if t.Effect != resourceapi.DeviceTaintEffectNoExecute || !resourceclaim.ToleratesTaint(t, *taint) {
			continue
		}
		if t.TolerationSeconds == nil {
			return time.Time{}, false
		}
		seconds = min(seconds, max(*t.TolerationSeconds, 0))
	}
	if seconds != math.MaxInt64 {
		at = at.Add(time.Duration(min(seconds, math.MaxInt64/int64(time.Second))) * time.Second)
	}
	return at, true
}

// evicting reports whether the slice has a taint that drives pods off.
func evicting(s *resourceapi.ResourceSlice) bool {
	for i := range s.Spec.Devices {
		for j := range s.Spec.Devices[i].Taints {
			if s.Spec.Devices[i].Taints[j].Effect == resourceapi.DeviceTaintEffectNoExecute {
				return true
			}
		}
	}
	return false
}

// find looks a device up in the slices of its pool. Slices of an older
// generation than the newest do not count.
func find(slices []*resourceapi.ResourceSlice, device string) *resourceapi.Device {
	newest := int64(math.MinInt64)
	for _, s := range slices {
		newest = max(newest, s.Spec.Pool.Generation)
	}
	for _, s := range slices {
		if s.Spec.Pool.Generation != newest {
			continue
		}
		for i := range s.Spec.Devices {
			if s.Spec.Devices[i].Name == device {
				return &s.Spec.Devices[i]
			}
		}
	}
	return nil
}
