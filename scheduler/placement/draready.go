package placement

import (
	"errors"
	"fmt"
	"time"

	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/meta"
)

// ErrDeviceFailed says that a device cannot be made ready for its node.
var ErrDeviceFailed = errors.New("device binding failed")

// ErrDeviceTimeout says that a device took too long to become ready.
var ErrDeviceTimeout = errors.New("device binding timeout")

// ClaimReady reports whether all devices of an allocated claim are ready for
// their node, as far as their drivers said that this takes time. If not, an
// error says that they will not be, else until says when to give up.
func ClaimReady(claim *resourceapi.ResourceClaim, now time.Time) (ready bool, until time.Time, err error) {
	allocation := claim.Status.Allocation
	if allocation == nil {
		return false, time.Time{}, fmt.Errorf("%w: claim=%s: it has no allocation any more", ErrDeviceFailed, claim.Name)
	}
	ready = true
	for i := range allocation.Devices.Results {
		r := &allocation.Devices.Results[i]
		if len(r.BindingConditions) == 0 {
			continue
		}
		status := deviceStatus(claim, r)
		if status == nil {
			ready = false
			continue
		}
		for _, name := range r.BindingFailureConditions {
			if c := meta.FindStatusCondition(status.Conditions, name); c != nil && c.Status == "True" {
				return false, time.Time{}, fmt.Errorf("%w: claim=%s, reason=%s, message=%q", ErrDeviceFailed, claim.Name, c.Reason, c.Message)
			}
		}
		for _, name := range r.BindingConditions {
			ready = ready && meta.IsStatusConditionTrue(status.Conditions, name)
		}
	}
	if ready || allocation.AllocationTimestamp == nil {
		return ready, time.Time{}, nil
	}
	until = allocation.AllocationTimestamp.Add(BindingTimeout)
	if !until.After(now) {
		return false, until, fmt.Errorf("%w: claim=%s", ErrDeviceTimeout, claim.Name)
	}
	return false, until, nil
}

func deviceStatus(claim *resourceapi.ResourceClaim, r *resourceapi.DeviceRequestAllocationResult) *resourceapi.AllocatedDeviceStatus {
	for i := range claim.Status.Devices {
		if d := &claim.Status.Devices[i]; d.Device == r.Device && d.Driver == r.Driver && d.Pool == r.Pool {
			return d
		}
	}
	return nil
}

// bindingFailed reports whether an allocated claim cannot be used because its
// devices did not become ready.
func bindingFailed(claim *resourceapi.ResourceClaim, now time.Time) bool {
	_, _, err := ClaimReady(claim, now)
	return err != nil
}
