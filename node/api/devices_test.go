package api

import (
	"context"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	resourcev1 "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/devicetaint"
	"skein.io/skein/scheduler/controller/endpointmirror"
	"skein.io/skein/scheduler/controller/resourceclaim"
)

// devices makes a node with four devices and a class of them, and gives the resource's name that they stand for.
func devices(t *testing.T, k kubernetes.Interface) (extended string) {
	t.Helper()
	extended = "example.com/gpu"
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "has-devices"}, Status: corev1.NodeStatus{Allocatable: corev1.ResourceList{
		"cpu": resource.MustParse("8"), "memory": resource.MustParse("8Gi"), "pods": resource.MustParse("100")}}}
	class := &resourcev1.DeviceClass{ObjectMeta: metav1.ObjectMeta{Name: "gpu"}, Spec: resourcev1.DeviceClassSpec{ExtendedResourceName: &extended,
		Selectors: []resourcev1.DeviceSelector{{CEL: &resourcev1.CELDeviceSelector{Expression: `device.driver == "gpu.example.com"`}}}}}
	slice := &resourcev1.ResourceSlice{ObjectMeta: metav1.ObjectMeta{Name: "has-devices"}, Spec: resourcev1.ResourceSliceSpec{
		Driver: "gpu.example.com", NodeName: &node.Name, Pool: resourcev1.ResourcePool{Name: node.Name, Generation: 1, ResourceSliceCount: 1}}}
	for i := range 4 {
		slice.Spec.Devices = append(slice.Spec.Devices, resourcev1.Device{Name: fmt.Sprintf("d%d", i)})
	}
	ctx := context.Background()
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	makeNode(t, k, node)
	must(k.ResourceV1().DeviceClasses().Create(ctx, class, metav1.CreateOptions{}))
	t.Cleanup(func() { _ = k.ResourceV1().DeviceClasses().Delete(ctx, class.Name, metav1.DeleteOptions{}) })
	must(k.ResourceV1().ResourceSlices().Create(ctx, slice, metav1.CreateOptions{}))
	t.Cleanup(func() { _ = k.ResourceV1().ResourceSlices().Delete(ctx, slice.Name, metav1.DeleteOptions{}) })
	return extended
}

// The life of pods with devices: claims made from a template, allocated and reserved by placement, an extended resource that devices stand
// for, eviction from a tainted device, and all free again at the end.
func TestDevices(t *testing.T) {
	withControllers(t, func(d controller.Deps) controller.Controller { return resourceclaim.New(d, nil) }, devicetaint.New)
	ctx, k := t.Context(), admin(t)
	ns, extended := freshNamespace(t, k), devices(t, k)
	template := &resourcev1.ResourceClaimTemplate{ObjectMeta: metav1.ObjectMeta{Name: "two"}, Spec: resourcev1.ResourceClaimTemplateSpec{Spec: resourcev1.ResourceClaimSpec{
		Devices: resourcev1.DeviceClaim{Requests: []resourcev1.DeviceRequest{{Name: "g", Exactly: &resourcev1.ExactDeviceRequest{DeviceClassName: "gpu", AllocationMode: resourcev1.DeviceAllocationModeExactCount, Count: 2}}}}}}}
	if _, err := k.ResourceV1().ResourceClaimTemplates(ns).Create(ctx, template, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod := func(name string, change func(*corev1.PodSpec)) {
		t.Helper()
		p := simplePod(name)
		p.Spec.Tolerations = []corev1.Toleration{{Operator: corev1.TolerationOpExists}} // the node has no agent that makes it ready
		change(&p.Spec)
		if _, err := k.CoreV1().Pods(ns).Create(ctx, p, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	byTemplate := func(s *corev1.PodSpec) {
		s.ResourceClaims = []corev1.PodResourceClaim{{Name: "x", ResourceClaimTemplateName: &template.Name}}
		s.Containers[0].Resources.Claims = []corev1.ResourceClaim{{Name: "x"}}
	}
	placed := func(name string) (p *corev1.Pod) {
		t.Helper()
		eventually(t, func(ctx context.Context) (err error) {
			if p, err = k.CoreV1().Pods(ns).Get(ctx, name, metav1.GetOptions{}); err == nil && p.Spec.NodeName == "" {
				err = fmt.Errorf("pod %s has no node: %+v", name, p.Status.Conditions)
			}
			return err
		})
		return p
	}
	claimOf := func(name string) *resourcev1.ResourceClaim {
		t.Helper()
		c, err := k.ResourceV1().ResourceClaims(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	pod("a", byTemplate)
	a := placed("a")
	if len(a.Status.ResourceClaimStatuses) != 1 || a.Status.ResourceClaimStatuses[0].ResourceClaimName == nil {
		t.Fatalf("status %+v", a.Status.ResourceClaimStatuses)
	}
	c := claimOf(*a.Status.ResourceClaimStatuses[0].ResourceClaimName)
	if c.Status.Allocation == nil || len(c.Status.Allocation.Devices.Results) != 2 || len(c.Status.ReservedFor) != 1 || c.Status.ReservedFor[0].UID != a.UID || !metav1.IsControlledBy(c, a) || !strings.HasPrefix(c.Name, "a-x-") {
		t.Errorf("claim %+v", c)
	}
	pod("b", func(s *corev1.PodSpec) {
		s.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceName(extended): resource.MustParse("1")}
		s.Containers[0].Resources.Limits = s.Containers[0].Resources.Requests
	})
	b := placed("b")
	if s := b.Status.ExtendedResourceClaimStatus; s == nil || len(s.RequestMappings) != 1 || claimOf(s.ResourceClaimName).Status.Allocation == nil {
		t.Errorf("status %+v", b.Status)
	}
	// One device is left: not enough.
	pod("c", byTemplate)
	eventually(t, func(ctx context.Context) error {
		p, err := k.CoreV1().Pods(ns).Get(ctx, "c", metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, cond := range p.Status.Conditions {
			if strings.Contains(cond.Message, "cannot allocate all claims. still not schedulable, preemption: ") {
				return nil
			}
		}
		return fmt.Errorf("conditions %+v", p.Status.Conditions)
	})
	now := int64(0)
	if err := k.CoreV1().Pods(ns).Delete(ctx, "b", metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		t.Fatal(err)
	}
	placed("c")
	// The devices of one pod fail.
	slice, err := k.ResourceV1().ResourceSlices().Get(ctx, "has-devices", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range slice.Spec.Devices {
		if slice.Spec.Devices[i].Name == c.Status.Allocation.Devices.Results[0].Device {
			slice.Spec.Devices[i].Taints = []resourcev1.DeviceTaint{{Key: "sick", Effect: resourcev1.DeviceTaintEffectNoExecute}}
		}
	}
	if _, err := k.ResourceV1().ResourceSlices().Update(ctx, slice, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		p, err := k.CoreV1().Pods(ns).Get(ctx, "a", metav1.GetOptions{})
		if err == nil && p.DeletionTimestamp == nil {
			err = fmt.Errorf("pod a is not evicted")
		}
		return err
	})
	for _, name := range []string{"a", "c"} {
		if err := k.CoreV1().Pods(ns).Delete(ctx, name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func(ctx context.Context) error {
		l, err := k.ResourceV1().ResourceClaims(ns).List(ctx, metav1.ListOptions{})
		if err == nil && len(l.Items) > 0 {
			err = fmt.Errorf("%d claims are left, the first: %+v", len(l.Items), l.Items[0])
		}
		return err
	})
}

// Endpoints made by hand appear as EndpointSlices, and go with them: the steps of upstream's conformance test of EndpointSliceMirroring.
func TestEndpointsAreMirrored(t *testing.T) {
	withControllers(t, endpointmirror.New)
	ctx, k := t.Context(), admin(t)
	ns := freshNamespace(t, k)
	if _, err := k.CoreV1().Services(ns).Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "by-hand"},
		Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "example", Port: 80, Protocol: corev1.ProtocolTCP}}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	shows := func(want string) {
		t.Helper()
		eventually(t, func(ctx context.Context) error {
			l, err := k.DiscoveryV1().EndpointSlices(ns).List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=by-hand"})
			if err != nil {
				return err
			}
			var got []string
			for _, s := range l.Items {
				if s.Labels[discoveryv1.LabelManagedBy] != "endpointslicemirroring-controller.k8s.io" || s.OwnerReferences[0].Kind != "Endpoints" {
					t.Errorf("slice %+v", s.ObjectMeta)
				}
				for _, e := range s.Endpoints {
					got = append(got, fmt.Sprintf("%s:%d", e.Addresses[0], *s.Ports[0].Port))
				}
			}
			if strings.Join(got, " ") != want {
				return fmt.Errorf("slices show %v, want %q", got, want)
			}
			return nil
		})
	}
	e := &corev1.Endpoints{ObjectMeta: metav1.ObjectMeta{Name: "by-hand"}, Subsets: []corev1.EndpointSubset{{
		Ports: []corev1.EndpointPort{{Name: "example", Port: 80, Protocol: corev1.ProtocolTCP}}, Addresses: []corev1.EndpointAddress{{IP: "10.1.2.3"}}}}}
	api := k.CoreV1().Endpoints(ns)
	e, err := api.Create(ctx, e, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	shows("10.1.2.3:80")
	e.Subsets[0].Addresses[0].IP = "10.2.3.4"
	if _, err = api.Update(ctx, e, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	shows("10.2.3.4:80")
	if err := api.Delete(ctx, "by-hand", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	shows("")
}
