package placement

import (
	"fmt"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func mkDeviceClass(name string, edit ...func(*resourceapi.DeviceClass)) *resourceapi.DeviceClass {
	c := &resourceapi.DeviceClass{ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: "1"}}
	c.Spec.Selectors = []resourceapi.DeviceSelector{{CEL: &resourceapi.CELDeviceSelector{Expression: fmt.Sprintf("device.driver == %q", name+".test")}}}
	for _, fn := range edit {
		fn(c)
	}
	return c
}

func backing(name string) func(*resourceapi.DeviceClass) {
	return func(c *resourceapi.DeviceClass) { c.Spec.ExtendedResourceName = &name }
}

// mkSlice offers devices 0 to n-1 of driver on a node.
func mkSlice(node, driver string, n int, edit ...func(*resourceapi.ResourceSlice)) *resourceapi.ResourceSlice {
	s := &resourceapi.ResourceSlice{
		ObjectMeta: metav1.ObjectMeta{Name: node + "-" + driver, ResourceVersion: "1"},
		Spec: resourceapi.ResourceSliceSpec{Driver: driver + ".test", NodeName: &node,
			Pool: resourceapi.ResourcePool{Name: node, ResourceSliceCount: 1}},
	}
	for i := range n {
		s.Spec.Devices = append(s.Spec.Devices, resourceapi.Device{Name: fmt.Sprintf("d%d", i),
			Attributes: map[resourceapi.QualifiedName]resourceapi.DeviceAttribute{"index": {IntValue: new(int64(i))}}})
	}
	for _, fn := range edit {
		fn(s)
	}
	return s
}

func mkDeviceClaim(name string, requests []resourceapi.DeviceRequest, edit ...func(*resourceapi.ResourceClaim)) *resourceapi.ResourceClaim {
	c := &resourceapi.ResourceClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("claim-" + name), ResourceVersion: "1"},
		Spec:       resourceapi.ResourceClaimSpec{Devices: resourceapi.DeviceClaim{Requests: requests}},
	}
	for _, fn := range edit {
		fn(c)
	}
	return c
}

func exactly(class string, n int64) []resourceapi.DeviceRequest {
	return []resourceapi.DeviceRequest{{Name: "r", Exactly: &resourceapi.ExactDeviceRequest{
		DeviceClassName: class, AllocationMode: resourceapi.DeviceAllocationModeExactCount, Count: n}}}
}

// allocated says that the claim has device number i of each node's driver.
func allocated(node, driver string, i int, usedBy ...string) func(*resourceapi.ResourceClaim) {
	return func(c *resourceapi.ResourceClaim) {
		c.Status.Allocation = &resourceapi.AllocationResult{
			Devices: resourceapi.DeviceAllocationResult{Results: []resourceapi.DeviceRequestAllocationResult{
				{Request: "r", Driver: driver + ".test", Pool: node, Device: fmt.Sprintf("d%d", i)}}},
			NodeSelector: &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{{MatchFields: []v1.NodeSelectorRequirement{
				{Key: "metadata.name", Operator: v1.NodeSelectorOpIn, Values: []string{node}}}}}},
		}
		for _, name := range usedBy {
			c.Status.ReservedFor = append(c.Status.ReservedFor, resourceapi.ResourceClaimConsumerReference{Resource: "pods", Name: name, UID: types.UID(name)})
		}
	}
}

func claiming(names ...string) func(*v1.Pod) {
	return func(p *v1.Pod) {
		for _, name := range names {
			p.Spec.ResourceClaims = append(p.Spec.ResourceClaims, v1.PodResourceClaim{Name: name, ResourceClaimName: &name})
		}
	}
}

// devicesOf is a cluster of nodes a and b with what objs say.
func devicesOf(objs ...any) *Snapshot {
	s := cluster([]*v1.Node{mkNode("a", "4", "8Gi"), mkNode("b", "4", "8Gi")})
	for _, obj := range objs {
		switch o := obj.(type) {
		case *resourceapi.DeviceClass:
			s.SetDeviceClass(o)
		case *resourceapi.ResourceSlice:
			s.SetResourceSlice(o)
		case *resourceapi.ResourceClaim:
			s.SetResourceClaim(o)
		}
	}
	return s
}

// given lists the devices of a decision: request=device.
func given(b *DeviceBinding) string {
	if b == nil {
		return ""
	}
	var out []string
	for _, c := range b.Claims {
		a := c.Allocation
		if a == nil {
			out = append(out, "has")
			continue
		}
		for _, r := range a.Devices.Results {
			out = append(out, fmt.Sprintf("%s=%s/%s", r.Request, r.Pool, r.Device))
		}
	}
	return strings.Join(out, " ")
}

// The cases are those of upstream's TestPlugin that ask for a decision
// (pkg/scheduler/framework/plugins/dynamicresources/dynamicresources_test.go).
func TestDevices(t *testing.T) {
	now := time.Unix(10000, 0)
	template, made := "tpl", "made"
	byTemplate := func(p *v1.Pod) {
		p.Spec.ResourceClaims = []v1.PodResourceClaim{{Name: "c", ResourceClaimTemplateName: &template}}
	}
	byTemplateMade := func(p *v1.Pod) {
		byTemplate(p)
		p.Status.ResourceClaimStatuses = []v1.PodResourceClaimStatus{{Name: "c", ResourceClaimName: &made}}
	}
	ownedBy := func(uid types.UID) func(*resourceapi.ResourceClaim) {
		return func(c *resourceapi.ResourceClaim) {
			c.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "p", UID: uid, Controller: new(true)}}
		}
	}
	admin := exactly("gpu", 1)
	admin[0].Exactly.AdminAccess = new(true)
	broken := exactly("gpu", 1)
	broken[0].Exactly.Selectors = []resourceapi.DeviceSelector{{CEL: &resourceapi.CELDeviceSelector{Expression: `device.attributes["gpu.test"].nothing == 1`}}}
	second := exactly("gpu", 1)
	second[0].Exactly.Selectors = []resourceapi.DeviceSelector{{CEL: &resourceapi.CELDeviceSelector{Expression: `device.attributes["gpu.test"].index == 1`}}}
	tainted := func(s *resourceapi.ResourceSlice) {
		s.Spec.Devices[0].Taints = []resourceapi.DeviceTaint{{Key: "sick", Effect: resourceapi.DeviceTaintEffectNoSchedule}}
	}
	tolerant := exactly("gpu", 1)
	tolerant[0].Exactly.Tolerations = []resourceapi.DeviceToleration{{Operator: resourceapi.DeviceTolerationOpExists}}
	deleted := func(c *resourceapi.ResourceClaim) { c.DeletionTimestamp = &metav1.Time{Time: now} }
	condition := func(name string, at time.Time) func(*resourceapi.ResourceClaim) {
		return func(c *resourceapi.ResourceClaim) {
			r := &c.Status.Allocation.Devices.Results[0]
			r.BindingConditions, r.BindingFailureConditions = []string{"ready"}, []string{"failed"}
			c.Status.Allocation.AllocationTimestamp = &metav1.Time{Time: at}
			c.Status.Devices = []resourceapi.AllocatedDeviceStatus{{Driver: r.Driver, Pool: r.Pool, Device: r.Device,
				Conditions: []metav1.Condition{{Type: name, Status: metav1.ConditionTrue, Reason: "Why", Message: "because"}}}}
		}
	}
	refusedBy := func(reason, words string) string {
		return fmt.Sprintf("0/2 nodes are available: %s. %s, preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling.", reason, words)
	}
	whole := func(reason string) string { return refusedBy(reason, "no new claims to deallocate") }
	gpu := mkDeviceClass("gpu")
	for _, tc := range []struct {
		what    string
		pod     func(*v1.Pod)
		objs    []any
		node    string // "" if refused
		devices string
		refusal string
		release string
	}{
		{"a pod without claims", func(*v1.Pod) {}, []any{gpu}, "any", "", "", ""},
		{"the node that has the device", claiming("c"), []any{gpu, mkSlice("b", "gpu", 1), mkDeviceClaim("c", exactly("gpu", 1))}, "b", "r=b/d0", "", ""},
		{"several devices and claims", claiming("c", "d"), []any{gpu, mkSlice("a", "gpu", 2), mkSlice("b", "gpu", 3),
			mkDeviceClaim("c", exactly("gpu", 2)), mkDeviceClaim("d", exactly("gpu", 1))}, "b", "r=b/d0 r=b/d1 r=b/d2", "", ""},
		{"selected by its attributes", claiming("c"), []any{gpu, mkSlice("a", "gpu", 1), mkSlice("b", "gpu", 2), mkDeviceClaim("c", second)}, "b", "r=b/d1", "", ""},
		{"no devices", claiming("c"), []any{gpu, mkDeviceClaim("c", exactly("gpu", 1))}, "", "", refusedBy("2 cannot allocate all claims", "still not schedulable"), ""},
		{"devices of another class", claiming("c"), []any{gpu, mkSlice("a", "nic", 1), mkDeviceClaim("c", exactly("gpu", 1))}, "", "", refusedBy("2 cannot allocate all claims", "still not schedulable"), ""},
		{"all taken", claiming("c"), []any{gpu, mkSlice("a", "gpu", 1), mkDeviceClaim("o", exactly("gpu", 1), allocated("a", "gpu", 0, "other")),
			mkDeviceClaim("c", exactly("gpu", 1))}, "", "", refusedBy("2 cannot allocate all claims", "still not schedulable"), ""},
		{"one left", claiming("c"), []any{gpu, mkSlice("a", "gpu", 2), mkDeviceClaim("o", exactly("gpu", 1), allocated("a", "gpu", 0, "other")),
			mkDeviceClaim("c", exactly("gpu", 1))}, "a", "r=a/d1", "", ""},
		{"an administrator looks at what is taken", claiming("c"), []any{gpu, mkSlice("a", "gpu", 1), mkDeviceClaim("o", exactly("gpu", 1), allocated("a", "gpu", 0, "other")),
			mkDeviceClaim("c", admin)}, "a", "r=a/d0", "", ""},
		{"what an administrator looks at is free", claiming("c"), []any{gpu, mkSlice("a", "gpu", 1),
			mkDeviceClaim("o", admin, allocated("a", "gpu", 0, "other"), func(c *resourceapi.ResourceClaim) {
				c.Status.Allocation.Devices.Results[0].AdminAccess = new(true)
			}), mkDeviceClaim("c", exactly("gpu", 1))}, "a", "r=a/d0", "", ""},
		{"tainted", claiming("c"), []any{gpu, mkSlice("a", "gpu", 1, tainted), mkDeviceClaim("c", exactly("gpu", 1))}, "", "", refusedBy("2 cannot allocate all claims", "still not schedulable"), ""},
		{"tainted and tolerated", claiming("c"), []any{gpu, mkSlice("a", "gpu", 1, tainted), mkDeviceClaim("c", tolerant)}, "a", "r=a/d0", "", ""},
		{"allocated before", claiming("c"), []any{gpu, mkSlice("a", "gpu", 1), mkDeviceClaim("c", exactly("gpu", 1), allocated("a", "gpu", 0))}, "a", "has", "", ""},
		{"shared with another pod", claiming("c"), []any{gpu, mkSlice("b", "gpu", 1), mkDeviceClaim("c", exactly("gpu", 1), allocated("b", "gpu", 0, "other"))}, "b", "has", "", ""},
		{"allocated on a node that is gone", claiming("c"), []any{gpu, mkDeviceClaim("c", exactly("gpu", 1), allocated("gone", "gpu", 0))}, "", "",
			refusedBy("2 resourceclaim not available on the node", "deallocation of ResourceClaim completed"), "c"},
		{"the same, in use", claiming("c"), []any{gpu, mkDeviceClaim("c", exactly("gpu", 1), allocated("gone", "gpu", 0, "other"))}, "", "",
			refusedBy("2 resourceclaim not available on the node", "still not schedulable"), ""},
		{"the same, in use by itself", claiming("c"), []any{gpu, mkDeviceClaim("c", exactly("gpu", 1), allocated("gone", "gpu", 0, "p"))}, "", "",
			refusedBy("2 resourceclaim not available on the node", "deallocation of ResourceClaim completed"), "c"},
		{"devices made ready", claiming("c"), []any{gpu, mkDeviceClaim("c", exactly("gpu", 1), allocated("a", "gpu", 0), condition("ready", now))}, "a", "has", "", ""},
		{"devices not ready yet", claiming("c"), []any{gpu, mkDeviceClaim("c", exactly("gpu", 1), allocated("a", "gpu", 0), condition("other", now.Add(-9*time.Minute)))}, "a", "has", "", ""},
		{"devices that failed", claiming("c"), []any{gpu, mkDeviceClaim("c", exactly("gpu", 1), allocated("a", "gpu", 0), condition("failed", now))}, "", "",
			refusedBy("2 resourceclaim not available on the node", "deallocation of ResourceClaim completed"), "c"},
		{"devices that took too long", claiming("c"), []any{gpu, mkDeviceClaim("c", exactly("gpu", 1), allocated("a", "gpu", 0), condition("other", now.Add(-11*time.Minute)))}, "", "",
			refusedBy("2 resourceclaim not available on the node", "deallocation of ResourceClaim completed"), "c"},
		{"no such claim", claiming("c"), []any{gpu}, "", "", whole(`could not find ResourceClaim "default/c"`), ""},
		{"a claim that goes", claiming("c"), []any{gpu, mkDeviceClaim("c", exactly("gpu", 1), deleted)}, "", "", whole(`resourceclaim "c" is being deleted`), ""},
		{"not made from the template yet", byTemplate, []any{gpu}, "", "", whole(`pod "default/p": ResourceClaim not created yet`), ""},
		{"made from the template", byTemplateMade, []any{gpu, mkSlice("a", "gpu", 1), mkDeviceClaim("made", exactly("gpu", 1), ownedBy("p"))}, "a", "r=a/d0", "", ""},
		{"made for another", byTemplateMade, []any{gpu, mkSlice("a", "gpu", 1), mkDeviceClaim("made", exactly("gpu", 1), ownedBy("q"))}, "", "",
			whole("ResourceClaim default/made was not created for Pod default/p (Pod is not owner)"), ""},
		{"no such class", claiming("c"), []any{mkSlice("a", "gpu", 1), mkDeviceClaim("c", exactly("gpu", 1))}, "", "", whole("request r: device class gpu does not exist"), ""},
		{"an expression that fails", claiming("c"), []any{gpu, mkSlice("a", "gpu", 1), mkDeviceClaim("c", broken)}, "", "",
			refusedBy("1 cannot allocate all claims, 1 claim default/c: selector #0: CEL runtime error: no such key: nothing", "still not schedulable"), ""},
	} {
		t.Run(tc.what, func(t *testing.T) {
			s := devicesOf(tc.objs...)
			before := deviceState(s)
			d, err := s.Place(Request{Pod: mkPod("p", "1", "1Gi", tc.pod), Now: now}, rnd())
			if err != nil {
				t.Fatal(err)
			}
			if after := deviceState(s); after != before {
				t.Errorf("a decision changed the snapshot: %s, %s", before, after)
			}
			if tc.refusal != "" {
				if d.Refusal == nil || d.Refusal.Error() != tc.refusal {
					t.Fatalf("%+v\nwant %s", d.Refusal, tc.refusal)
				}
				if !d.Refusal.Filters[DynamicResources] {
					t.Errorf("refused by %v", d.Refusal.Filters)
				}
			} else if d.Refusal != nil {
				t.Fatal(d.Refusal)
			}
			if tc.node != "any" && d.Node != tc.node || given(d.Devices) != tc.devices {
				t.Errorf("node %q, devices %q, want %q, %q", d.Node, given(d.Devices), tc.node, tc.devices)
			}
			release := ""
			if d.Release != nil {
				release = d.Release.Name
			}
			if release != tc.release {
				t.Errorf("releases %q, want %q", release, tc.release)
			}
		})
	}
}

func deviceState(s *Snapshot) string {
	d := &s.devices
	return fmt.Sprint(len(d.claims), len(d.pending), d.taken, d.shares, len(d.state.AllocatedDevices), len(d.state.AllocatedSharedDeviceIDs), len(d.state.AggregatedCapacity))
}

// Nodes with the devices that a claim names first are better.
func TestAlternativesAreScored(t *testing.T) {
	either := []resourceapi.DeviceRequest{{Name: "r", FirstAvailable: []resourceapi.DeviceSubRequest{
		{Name: "best", DeviceClassName: "gpu", AllocationMode: resourceapi.DeviceAllocationModeExactCount, Count: 1},
		{Name: "other", DeviceClassName: "nic", AllocationMode: resourceapi.DeviceAllocationModeExactCount, Count: 1},
	}}}
	s := devicesOf(mkDeviceClass("gpu"), mkDeviceClass("nic"), mkSlice("a", "nic", 1), mkSlice("b", "gpu", 1), mkDeviceClaim("c", either))
	pod := mkPod("p", "1", "1Gi", claiming("c"))
	d := place(t, s, pod)
	if d.Node != "b" || d.Feasible != 2 || given(d.Devices) != "r/best=b/d0" {
		t.Errorf("%+v %s", d, given(d.Devices))
	}
	all, err := s.Explain(Request{Pod: pod})
	if err != nil || all[0].Scores.Devices != 2*87 || all[1].Scores.Devices != 2*100 {
		t.Errorf("%+v %v", all, err)
	}
}

// Between decision and status nobody else gets the devices, and a pod that
// shares the claim waits.
func TestAssumedDevices(t *testing.T) {
	s := devicesOf(mkDeviceClass("gpu"), mkSlice("a", "gpu", 1), mkDeviceClaim("c", exactly("gpu", 1)), mkDeviceClaim("o", exactly("gpu", 1)))
	empty := deviceState(s)
	d := place(t, s, mkPod("p", "1", "1Gi", claiming("c")))
	s.AssumeDevices(d.Devices)
	for claim, want := range map[string]string{"o": "cannot allocate all claims", "c": "resource claim default/c is in the process of being allocated"} {
		if d := place(t, s, mkPod("q", "1", "1Gi", claiming(claim))); d.Refusal == nil || !strings.Contains(d.Refusal.Error(), want) {
			t.Errorf("claim %s: %+v", claim, d.Refusal)
		}
	}
	s.ForgetDevices(d.Devices)
	if got := deviceState(s); got != empty {
		t.Errorf("after forgetting %s, want %s", got, empty)
	}
	s.AssumeDevices(d.Devices)
	written := mkDeviceClaim("c", exactly("gpu", 1), func(c *resourceapi.ResourceClaim) {
		c.Status.Allocation, c.ResourceVersion = d.Devices.Claims[0].Allocation, "5"
	})
	s.SetResourceClaim(written)
	s.ForgetDevices(d.Devices)                                // too late: the status has it
	s.SetResourceClaim(mkDeviceClaim("c", exactly("gpu", 1))) // late news
	if d := place(t, s, mkPod("q", "1", "1Gi", claiming("o"))); d.Refusal == nil {
		t.Error("devices were given twice")
	}
	s.RemoveResourceClaim(written)
	if d := place(t, s, mkPod("q", "1", "1Gi", claiming("o"))); given(d.Devices) != "r=a/d0" {
		t.Errorf("after the claim went: %+v", d)
	}
}

// Devices that several may use are shared out by their capacity.
func TestSharedDevices(t *testing.T) {
	big := mkSlice("a", "gpu", 1, func(s *resourceapi.ResourceSlice) {
		s.Spec.Devices[0].AllowMultipleAllocations = new(true)
		s.Spec.Devices[0].Capacity = map[resourceapi.QualifiedName]resourceapi.DeviceCapacity{"memory": {Value: resource.MustParse("10Gi")}}
	})
	want := func(amount string) []resourceapi.DeviceRequest {
		r := exactly("gpu", 1)
		r[0].Exactly.Capacity = &resourceapi.CapacityRequirements{Requests: map[resourceapi.QualifiedName]resource.Quantity{"memory": resource.MustParse(amount)}}
		return r
	}
	s := devicesOf(mkDeviceClass("gpu"), big, mkDeviceClaim("x", want("6Gi")), mkDeviceClaim("y", want("6Gi")), mkDeviceClaim("z", want("4Gi")))
	empty := deviceState(s)
	var took []*DeviceBinding
	for _, tc := range []struct {
		claim string
		ok    bool
	}{{"x", true}, {"y", false}, {"z", true}} {
		d := place(t, s, mkPod("p"+tc.claim, "1", "1Gi", claiming(tc.claim)))
		if (d.Node == "a") != tc.ok {
			t.Fatalf("claim %s: %+v", tc.claim, d)
		}
		if tc.ok {
			s.AssumeDevices(d.Devices)
			took = append(took, d.Devices)
		}
	}
	for _, b := range took {
		s.ForgetDevices(b)
	}
	if got := deviceState(s); got != empty {
		t.Errorf("after all was given back %s, want %s", got, empty)
	}
}

// A claim is not given up for a node that lacks the pod's other devices.
func TestNothingIsReleasedInVain(t *testing.T) {
	s := devicesOf(mkDeviceClass("gpu"), mkDeviceClass("nic"), mkSlice("a", "gpu", 1),
		mkDeviceClaim("c", exactly("gpu", 1), allocated("elsewhere", "gpu", 0)), mkDeviceClaim("d", exactly("nic", 1)))
	d, err := s.Place(Request{Pod: mkPod("p", "1", "1Gi", claiming("c", "d"))}, rnd())
	if err != nil || d.Release != nil || d.Refusal == nil || !strings.Contains(d.Refusal.Error(), "2 cannot allocate all claims. still not schedulable") {
		t.Errorf("%+v %v", d, err)
	}
}
