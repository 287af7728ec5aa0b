package simulate

import (
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/dynamic-resource-allocation/resourceclaim"
)

// Devices: every third node has some, and a few Deployments claim one for each pod.
const (
	deviceDriver   = "device.simulate"
	devicesPerNode = 3
	deviceEvery    = 3
)

var deviceClaimsGVR = schema.GroupVersionResource{Group: resourceapi.GroupName, Version: "v1", Resource: "resourceclaims"}

func (w *world) deviceClass() {
	w.make(&resourceapi.DeviceClass{ObjectMeta: metav1.ObjectMeta{Name: "device"}, Spec: resourceapi.DeviceClassSpec{
		Selectors: []resourceapi.DeviceSelector{{CEL: &resourceapi.CELDeviceSelector{Expression: `device.driver == "` + deviceDriver + `"`}}}}})
}

// addSlice makes what a driver says of a node's devices; it goes with the Node.
func (w *world) addSlice(node string) {
	e, err := w.s.get(w.s.kinds[nodesGVR], key{"", node})
	if err != nil {
		return
	}
	s := &resourceapi.ResourceSlice{ObjectMeta: metav1.ObjectMeta{Name: node + "-" + deviceDriver, OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: node, UID: e.acc.GetUID(), Controller: ptr(true)}}},
		Spec: resourceapi.ResourceSliceSpec{Driver: deviceDriver, NodeName: &node, Pool: resourceapi.ResourcePool{Name: node, Generation: 1, ResourceSliceCount: 1}}}
	for i := range devicesPerNode {
		s.Spec.Devices = append(s.Spec.Devices, resourceapi.Device{Name: fmt.Sprintf("d%d", i)})
	}
	w.make(s)
}

// withDevice makes each pod of a Deployment claim a device.
func (w *world) withDevice(d *appsv1.Deployment) {
	name := d.Name + "-device"
	w.make(&resourceapi.ResourceClaimTemplate{ObjectMeta: metav1.ObjectMeta{Namespace: d.Namespace, Name: name}, Spec: resourceapi.ResourceClaimTemplateSpec{Spec: resourceapi.ResourceClaimSpec{
		Devices: resourceapi.DeviceClaim{Requests: []resourceapi.DeviceRequest{{Name: "r", Exactly: &resourceapi.ExactDeviceRequest{
			DeviceClassName: "device", AllocationMode: resourceapi.DeviceAllocationModeExactCount, Count: 1}}}}}}})
	spec := &d.Spec.Template.Spec
	spec.ResourceClaims = []corev1.PodResourceClaim{{Name: "device", ResourceClaimTemplateName: &name}}
	spec.Containers[0].Resources.Claims = []corev1.ResourceClaim{{Name: "device"}}
}

type device struct{ driver, pool, name string }

func devicesOf(c *resourceapi.ResourceClaim) (out []device) {
	if c == nil || c.Status.Allocation == nil {
		return nil
	}
	for _, r := range c.Status.Allocation.Devices.Results {
		out = append(out, device{r.Driver, r.Pool, r.Device})
	}
	return out
}

// devicesChanged: no device is given twice, and none taken from a pod that may use it.
func (v *invariants) devicesChanged(old, cur *resourceapi.ResourceClaim) {
	any := cur
	if any == nil {
		any = old
	}
	had, has := devicesOf(old), devicesOf(cur)
	for _, d := range had {
		if v.devices[d] == any.UID {
			delete(v.devices, d)
		}
	}
	for _, d := range has {
		v.checks["devices: given once"]++
		if other, taken := v.devices[d]; taken && other != any.UID {
			v.broken("device %v of claim %s was given to claim %s/%s, too", d, other, any.Namespace, any.Name)
		}
		v.devices[d] = any.UID
	}
	if len(had) == 0 || len(has) > 0 {
		return
	}
	ref := metav1.GetControllerOf(any)
	if ref == nil {
		return
	}
	if e := v.s.tables[podsGVR].objs[key{any.Namespace, ref.Name}]; e != nil && e.acc.GetUID() == ref.UID {
		if p := e.obj.(*corev1.Pod); p.Spec.NodeName != "" && !podEnded(p) {
			v.broken("the devices of claim %s/%s were taken from pod %s on %s", any.Namespace, any.Name, p.Name, p.Spec.NodeName)
		}
	}
}

// devicesThere checks a pod that was bound this moment: its claims have devices of the node, for it.
func (v *invariants) devicesThere(pod *corev1.Pod, node *corev1.Node) {
	for i := range pod.Spec.ResourceClaims {
		v.checks["devices: there"]++
		name, _, err := resourceclaim.Name(pod, &pod.Spec.ResourceClaims[i])
		if err != nil || name == nil {
			v.broken("pod %s/%s was bound to %s without its claim %s", pod.Namespace, pod.Name, node.Name, pod.Spec.ResourceClaims[i].Name)
			continue
		}
		e := v.s.tables[deviceClaimsGVR].objs[key{pod.Namespace, *name}]
		if e == nil {
			v.broken("pod %s/%s was bound to %s, its claim %s is gone", pod.Namespace, pod.Name, node.Name, *name)
			continue
		}
		claim := e.obj.(*resourceapi.ResourceClaim)
		if !resourceclaim.IsReservedForPod(pod, claim, false) {
			v.broken("pod %s/%s was bound to %s, its claim %s is not reserved for it", pod.Namespace, pod.Name, node.Name, *name)
		}
		if got := devicesOf(claim); len(got) != 1 || got[0].pool != node.Name {
			v.broken("pod %s/%s was bound to %s, its claim %s has %v", pod.Namespace, pod.Name, node.Name, *name, got)
		}
	}
}

// devicesDone: each claim is a pod's, each device a claim's of a pod that lives.
func (w *world) devicesDone(add complain) {
	pods := map[types.UID]*corev1.Pod{}
	for _, p := range all[*corev1.Pod](w) {
		pods[p.UID] = p
	}
	for _, c := range all[*resourceapi.ResourceClaim](w) {
		ref := metav1.GetControllerOf(c)
		if ref == nil || pods[ref.UID] == nil || podEnded(pods[ref.UID]) || len(devicesOf(c)) != 1 {
			add("claim %s/%s of %v has %v for %v, finalizers %v, deleted %v", c.Namespace, c.Name, c.OwnerReferences, devicesOf(c), c.Status.ReservedFor, c.Finalizers, c.DeletionTimestamp)
		}
	}
}
