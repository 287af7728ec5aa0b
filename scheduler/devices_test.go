package scheduler

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"skein.io/skein/scheduler/controller/controllertest"
)

const gpuName = "example.com/gpu"

func gpuClass() *resourceapi.DeviceClass {
	name := gpuName
	return &resourceapi.DeviceClass{ObjectMeta: metav1.ObjectMeta{Name: "gpu", ResourceVersion: "1"}, Spec: resourceapi.DeviceClassSpec{ExtendedResourceName: &name,
		Selectors: []resourceapi.DeviceSelector{{CEL: &resourceapi.CELDeviceSelector{Expression: `device.driver == "gpu.test"`}}}}}
}

func gpuSlice(node string, n int, edit ...func(*resourceapi.Device)) *resourceapi.ResourceSlice {
	s := &resourceapi.ResourceSlice{ObjectMeta: metav1.ObjectMeta{Name: node + "-gpu", ResourceVersion: "1"}, Spec: resourceapi.ResourceSliceSpec{
		Driver: "gpu.test", NodeName: &node, Pool: resourceapi.ResourcePool{Name: node, ResourceSliceCount: 1}}}
	for i := range n {
		d := resourceapi.Device{Name: fmt.Sprintf("d%d", i)}
		for _, fn := range edit {
			fn(&d)
		}
		s.Spec.Devices = append(s.Spec.Devices, d)
	}
	return s
}

func gpuClaim(name string) *resourceapi.ResourceClaim {
	return &resourceapi.ResourceClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("claim-" + name), ResourceVersion: "1"},
		Spec: resourceapi.ResourceClaimSpec{Devices: resourceapi.DeviceClaim{Requests: []resourceapi.DeviceRequest{{Name: "r", Exactly: &resourceapi.ExactDeviceRequest{
			DeviceClassName: "gpu", AllocationMode: resourceapi.DeviceAllocationModeExactCount, Count: 1}}}}}}
}

func using(claims ...string) func(*v1.Pod) {
	return func(p *v1.Pod) {
		for _, name := range claims {
			p.Spec.ResourceClaims = append(p.Spec.ResourceClaims, v1.PodResourceClaim{Name: name, ResourceClaimName: &name})
		}
	}
}

// claimText shows what a claim says: node/device, who uses it.
func claimText(c *resourceapi.ResourceClaim) string {
	out := []string{"free"}
	if a := c.Status.Allocation; a != nil {
		out[0] = a.Devices.Results[0].Pool + "/" + a.Devices.Results[0].Device
		if a.AllocationTimestamp == nil {
			out = append(out, "(no time)")
		}
		if len(c.Finalizers) != 1 || c.Finalizers[0] != resourceapi.Finalizer {
			out = append(out, fmt.Sprint(c.Finalizers))
		}
	}
	for _, r := range c.Status.ReservedFor {
		out = append(out, r.Name)
	}
	return strings.Join(out, " ")
}

func getClaim(t *testing.T, client *fake.Clientset, name string) *resourceapi.ResourceClaim {
	t.Helper()
	c, err := client.ResourceV1().ResourceClaims("default").Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestClaimsAreAllocatedBeforeBinding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "4"), testNode("b", "4"), gpuClass(), gpuClaim("c"), gpuClaim("o"))
		rec := placing(t, client, newHealth())
		create(t, client, testPod("p", "1", using("c")), testPod("q", "1", using("c")))
		settle(time.Second)
		cond := podCondition(get(t, client, "p"), v1.PodScheduled)
		if cond == nil || !strings.Contains(cond.Message, "2 cannot allocate all claims. still not schedulable, preemption") {
			t.Fatalf("condition without devices: %+v", cond)
		}
		settle(10 * time.Second) // any back-off ends
		controllertest.Events(rec)
		if _, err := client.ResourceV1().ResourceSlices().Create(t.Context(), gpuSlice("b", 1), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(5 * time.Second)
		for _, name := range []string{"p", "q"} {
			if n := get(t, client, name).Spec.NodeName; n != "b" {
				t.Errorf("pod %s is on %q: %q", name, n, controllertest.Events(rec))
			}
		}
		if got := claimText(getClaim(t, client, "c")); got != "b/d0 p q" && got != "b/d0 q p" {
			t.Errorf("claim: %s", got)
		}
		// Another claim gets the device when it is given back, not before.
		create(t, client, testPod("r", "1", using("o")))
		settle(10 * time.Second)
		if n := get(t, client, "r").Spec.NodeName; n != "" {
			t.Fatalf("the device was given twice")
		}
		c := getClaim(t, client, "c")
		c.Status = resourceapi.ResourceClaimStatus{}
		if _, err := client.ResourceV1().ResourceClaims("default").UpdateStatus(t.Context(), c, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(10 * time.Second)
		if n := get(t, client, "r").Spec.NodeName; n != "b" {
			t.Errorf("after the device was given back the pod is on %q", n)
		}
		client.ClearActions()
		settle(time.Hour)
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
	})
}

// A pod whose claim is to be made from a template is not tried before, and at
// once then.
func TestPodsWaitForTheirClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "4"), gpuClass(), gpuSlice("a", 1))
		rec := placing(t, client, newHealth())
		template := "tpl"
		create(t, client, testPod("p", "1", func(p *v1.Pod) {
			p.Spec.ResourceClaims = []v1.PodResourceClaim{{Name: "x", ResourceClaimTemplateName: &template}}
		}))
		settle(10 * time.Minute)
		if e := controllertest.Events(rec); len(e) != 0 || podCondition(get(t, client, "p"), v1.PodScheduled) != nil {
			t.Errorf("it was tried: %q", e)
		}
		claim, name := gpuClaim("p-x"), "p-x"
		claim.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "p", UID: "pod-p", Controller: new(true)}}
		p := get(t, client, "p")
		p.Status.ResourceClaimStatuses = []v1.PodResourceClaimStatus{{Name: "x", ResourceClaimName: &name}}
		if _, err := client.CoreV1().Pods("default").UpdateStatus(t.Context(), p, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(time.Second)
		if e := controllertest.Events(rec); len(e) != 0 {
			t.Errorf("it was tried without its claim: %q", e)
		}
		if err := client.Tracker().Add(claim); err != nil {
			t.Fatal(err)
		}
		settle(50 * time.Millisecond)
		if n := get(t, client, "p").Spec.NodeName; n != "a" {
			t.Errorf("on %q: %q", n, controllertest.Events(rec))
		}
	})
}

// If the binding fails, the reservation is given back and the next attempt
// uses what is allocated.
func TestFailedBindingGivesTheClaimBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var refusing atomic.Bool
		refusing.Store(true)
		client := newClient(func(pod, node string) error {
			if refusing.Load() {
				return apierrors.NewTooManyRequestsError("no")
			}
			return nil
		}, testNode("a", "4"), gpuClass(), gpuSlice("a", 2), gpuClaim("c"))
		placing(t, client, newHealth())
		create(t, client, testPod("p", "1", using("c")))
		settle(500 * time.Millisecond)
		if got := claimText(getClaim(t, client, "c")); got != "a/d0" {
			t.Errorf("after a refused binding: %s", got)
		}
		refusing.Store(false)
		settle(10 * time.Second)
		if got := claimText(getClaim(t, client, "c")); got != "a/d0 p" || get(t, client, "p").Spec.NodeName != "a" {
			t.Errorf("at last: %s", got)
		}
	})
}

// A claim that cannot be written is nobody's, and a conflict is tried again at once.
func TestRefusedClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "4"), gpuClass(), gpuSlice("a", 1), gpuClaim("c"), gpuClaim("o"))
		client.PrependReactor("update", "resourceclaims", func(a clienttesting.Action) (bool, runtime.Object, error) {
			c := a.(clienttesting.UpdateAction).GetObject().(*resourceapi.ResourceClaim)
			if c.Name == "c" && a.GetSubresource() == "status" {
				return true, nil, errors.New("never")
			}
			return false, nil, nil
		})
		rec := placing(t, client, newHealth())
		create(t, client, testPod("p", "1", using("c")))
		settle(100 * time.Millisecond)
		if e := fmt.Sprint(controllertest.Events(rec)); !strings.Contains(e, `running PreBind plugin "DynamicResources": add allocation and reservation to claim default/c: never`) {
			t.Error(e)
		}
		create(t, client, testPod("q", "1", using("o")))
		settle(100 * time.Millisecond)
		if got := claimText(getClaim(t, client, "o")); got != "a/d0 q" {
			t.Errorf("what could not be written still holds the device: %s", got)
		}
	})
}

func TestDevicesThatMustBeMadeReady(t *testing.T) {
	conditions := func(d *resourceapi.Device) {
		d.BindingConditions, d.BindingFailureConditions, d.BindsToNode = []string{"ready"}, []string{"failed"}, new(true)
	}
	say := func(t *testing.T, client *fake.Clientset, what string) {
		t.Helper()
		c := getClaim(t, client, "c")
		r := c.Status.Allocation.Devices.Results[0]
		c.Status.Devices = []resourceapi.AllocatedDeviceStatus{{Driver: r.Driver, Pool: r.Pool, Device: r.Device,
			Conditions: []metav1.Condition{{Type: what, Status: metav1.ConditionTrue, Reason: "Why", Message: "because"}}}}
		if _, err := client.ResourceV1().ResourceClaims("default").UpdateStatus(t.Context(), c, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		what, says string
		after      time.Duration
		event      string
	}{
		{"ready", "ready", time.Second, "Scheduled"},
		{"failed", "failed", time.Second, `device binding failed: claim=c, reason=Why, message="because"`},
		{"too long", "", 601 * time.Second, "device binding timeout: claim=c"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := newClient(nil, testNode("a", "4"), gpuClass(), gpuSlice("a", 1, conditions), gpuClaim("c"))
				rec := placing(t, client, newHealth())
				create(t, client, testPod("p", "1", using("c")), testPod("plain", "1"))
				settle(10 * time.Second)
				if e := controllertest.Events(rec); !strings.Contains(fmt.Sprint(e), "BindingConditionsPending waiting for binding conditions for device on node a") {
					t.Errorf("events %q", e)
				}
				if get(t, client, "p").Spec.NodeName != "" || get(t, client, "plain").Spec.NodeName != "a" {
					t.Error("only the pod with the device has to wait")
				}
				if tc.says != "" {
					say(t, client, tc.says)
				}
				settle(tc.after)
				e := fmt.Sprint(controllertest.Events(rec))
				if bound := get(t, client, "p").Spec.NodeName != ""; bound != (tc.what == "ready") || !strings.Contains(e, tc.event) {
					t.Errorf("bound %t: %s", bound, e)
				}
				if tc.what != "ready" {
					// The next attempt takes the allocation away and gets another.
					settle(10 * time.Second)
					if e += fmt.Sprint(controllertest.Events(rec)); !strings.Contains(e, "deallocation of ResourceClaim completed") {
						t.Error(e)
					}
					say(t, client, "ready")
					settle(10 * time.Second)
					if get(t, client, "p").Spec.NodeName != "a" {
						t.Errorf("not bound by another try: %s", controllertest.Events(rec))
					}
				}
			})
		})
	}
}

// A pod that goes while its devices are made ready leaves nothing behind.
func TestAPodGoesWhileItsDevicesAreMadeReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "4"), gpuClass(), gpuSlice("a", 1, func(d *resourceapi.Device) { d.BindingConditions = []string{"ready"} }), gpuClaim("c"))
		placing(t, client, newHealth())
		create(t, client, testPod("p", "4", using("c")))
		settle(time.Second)
		if err := client.CoreV1().Pods("default").Delete(t.Context(), "p", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		create(t, client, testPod("q", "4"))
		settle(10 * time.Second)
		if n := get(t, client, "q").Spec.NodeName; n != "a" {
			t.Errorf("its room is not free: %q", n)
		}
	})
}

func TestExtendedResourcesByDevices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var refusals atomic.Int32
		client := newClient(func(pod, node string) error {
			if refusals.Add(1) == 1 {
				return apierrors.NewTooManyRequestsError("no")
			}
			return nil
		}, testNode("a", "4"), gpuClass(), gpuSlice("a", 1))
		placing(t, client, newHealth())
		create(t, client, testPod("p", "1", func(p *v1.Pod) {
			p.Spec.Containers[0].Resources.Requests[gpuName] = resource.MustParse("1")
		}))
		settle(500 * time.Millisecond)
		claims := func() []resourceapi.ResourceClaim {
			l, err := client.ResourceV1().ResourceClaims("default").List(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			return l.Items
		}
		if c := claims(); len(c) != 0 {
			t.Errorf("a refused binding left claims: %+v", c)
		}
		settle(10 * time.Second)
		c, p := claims(), get(t, client, "p")
		if len(c) != 1 || claimText(&c[0]) != "a/d0 p" || p.Spec.NodeName != "a" {
			t.Fatalf("claims %+v, node %q", c, p.Spec.NodeName)
		}
		s := p.Status.ExtendedResourceClaimStatus
		if s == nil || s.ResourceClaimName != c[0].Name || len(s.RequestMappings) != 1 || s.RequestMappings[0] != (v1.ContainerExtendedResourceRequest{ContainerName: "c", ResourceName: gpuName, RequestName: "container-0-request-1"}) {
			t.Errorf("pod status %+v", s)
		}
	})
}

// A leader that comes in the middle goes on: what is allocated and reserved is
// used, what was made for extended resources only is made anew.
func TestTheNextLeaderGoesOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		half := gpuClaim("c")
		half.Finalizers = []string{resourceapi.Finalizer}
		half.Status.Allocation = &resourceapi.AllocationResult{
			AllocationTimestamp: &metav1.Time{Time: time.Now()},
			Devices:             resourceapi.DeviceAllocationResult{Results: []resourceapi.DeviceRequestAllocationResult{{Request: "r", Driver: "gpu.test", Pool: "b", Device: "d0"}}},
			NodeSelector: &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{{MatchFields: []v1.NodeSelectorRequirement{
				{Key: "metadata.name", Operator: v1.NodeSelectorOpIn, Values: []string{"b"}}}}}},
		}
		half.Status.ReservedFor = []resourceapi.ResourceClaimConsumerReference{{Resource: "pods", Name: "p", UID: "pod-p"}}
		special := gpuClaim("q-extended-resources-x")
		special.Finalizers = []string{resourceapi.Finalizer}
		special.Annotations = map[string]string{resourceapi.ExtendedResourceClaimAnnotation: "true"}
		special.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "q", UID: "pod-q", Controller: new(true)}}
		special.Spec.Devices.Requests[0].Name = "container-0-request-1"
		special.Status.Allocation = half.Status.Allocation.DeepCopy()
		special.Status.Allocation.Devices.Results[0].Device = "d1"
		client := newClient(nil, testNode("a", "4"), testNode("b", "4"), gpuClass(), gpuSlice("b", 2), half, special,
			testPod("p", "1", using("c")), testPod("q", "1", func(p *v1.Pod) { p.Spec.Containers[0].Resources.Requests[gpuName] = resource.MustParse("1") }))
		placing(t, client, newHealth())
		settle(30 * time.Second)
		if got := claimText(getClaim(t, client, "c")); got != "b/d0 p" || get(t, client, "p").Spec.NodeName != "b" {
			t.Errorf("the claim that was written: %s, pod on %q", got, get(t, client, "p").Spec.NodeName)
		}
		q := get(t, client, "q")
		if s := q.Status.ExtendedResourceClaimStatus; q.Spec.NodeName != "b" || s == nil || s.ResourceClaimName == special.Name || claimText(getClaim(t, client, s.ResourceClaimName)) != "b/d1 q" {
			t.Errorf("extended resources: pod on %q, %+v", q.Spec.NodeName, s)
		}
	})
}

// A pod that cannot have its devices costs no write while nothing changes.
func TestAPodWithoutHopeIsQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broken, many := gpuClaim("broken"), gpuClaim("many")
		broken.Spec.Devices.Requests[0].Exactly.Selectors = []resourceapi.DeviceSelector{{CEL: &resourceapi.CELDeviceSelector{Expression: `device.attributes["gpu.test"].nothing`}}}
		many.Spec.Devices.Requests[0].Exactly.Count = 1000
		client := newClient(nil, testNode("a", "4"), gpuClass(), gpuSlice("a", 1), broken, many)
		rec := placing(t, client, newHealth())
		create(t, client, testPod("p", "1", using("broken")), testPod("q", "1", using("many")), testPod("r", "1", using("missing")))
		settle(time.Minute)
		e := fmt.Sprint(controllertest.Events(rec))
		for _, want := range []string{"CEL runtime error: no such key: nothing", "exceeds the claim limit", `could not find ResourceClaim "default/missing"`} {
			if !strings.Contains(e, want) {
				t.Errorf("no event says %q: %s", want, e)
			}
		}
		client.ClearActions()
		settle(time.Hour)
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
		if n := len(controllertest.Events(rec)); n > 3*13 {
			t.Errorf("%d events in an hour", n)
		}
	})
}
