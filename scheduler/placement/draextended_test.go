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
)

func requesting(name v1.ResourceName, n int64) func(*v1.Pod) {
	return func(p *v1.Pod) {
		p.Spec.Containers[0].Resources.Requests[name] = *resource.NewQuantity(n, resource.DecimalSI)
	}
}

func offering(name v1.ResourceName, n int64) func(*v1.Node) {
	return func(node *v1.Node) {
		node.Status.Allocatable[name] = *resource.NewQuantity(n, resource.DecimalSI)
	}
}

// A node gives an extended resource itself, or by devices, or not at all.
func TestExtendedResourcesByDevices(t *testing.T) {
	const gpu = v1.ResourceName("example.com/gpu")
	class := mkDeviceClass("gpu", backing(string(gpu)))
	stale := mkDeviceClaim("left", exactly("gpu", 1), func(c *resourceapi.ResourceClaim) {
		c.Annotations = map[string]string{resourceapi.ExtendedResourceClaimAnnotation: "true"}
		c.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: "p", UID: "p", Controller: new(true)}}
	})
	for _, tc := range []struct {
		what    string
		pod     func(*v1.Pod)
		objs    []any
		node    func(*v1.Node)
		devices string
		refusal string
		release bool
	}{
		{"by devices", requesting(gpu, 2), []any{class, mkSlice("a", "gpu", 2)}, nil, "container-0-request-1=a/d0 container-0-request-1=a/d1", "", false},
		{"by the name of the class", requesting("deviceclass.resource.kubernetes.io/gpu", 1), []any{mkDeviceClass("gpu"), mkSlice("a", "gpu", 2)}, nil, "container-0-request-1=a/d0", "", false},
		{"by the node itself", requesting(gpu, 2), []any{class, mkSlice("a", "gpu", 2)}, offering(gpu, 2), "", "", false},
		{"too few of the node", requesting(gpu, 3), []any{class, mkSlice("a", "gpu", 3)}, offering(gpu, 2), "", "Insufficient example.com/gpu", false},
		{"too few devices", requesting(gpu, 3), []any{class, mkSlice("a", "gpu", 2)}, nil, "", "1 cannot allocate all claims. still not schedulable,", false},
		{"no class", requesting(gpu, 1), []any{mkSlice("a", "gpu", 2)}, nil, "", "Insufficient example.com/gpu", false},
		{"left over from an attempt before", requesting(gpu, 1), []any{class, mkSlice("a", "gpu", 2), stale}, nil, "",
			"1 cannot schedule extended resource claim. deletion of ResourceClaim completed,", true},
		{"none requested", requesting(gpu, 0), []any{class}, nil, "", "", false},
		{"beside a claim", func(p *v1.Pod) { requesting(gpu, 1)(p); claiming("c")(p) }, []any{class, mkSlice("a", "gpu", 2), mkDeviceClaim("c", exactly("gpu", 1))}, nil,
			"r=a/d0 container-0-request-1=a/d1", "", false},
	} {
		t.Run(tc.what, func(t *testing.T) {
			s := devicesOf(tc.objs...)
			s.RemoveNode("b")
			if tc.node != nil {
				s.SetNode(mkNode("a", "4", "8Gi", tc.node))
			}
			d, err := s.Place(Request{Pod: mkPod("p", "1", "1Gi", tc.pod), Now: time.Unix(1, 0)}, rnd())
			if err != nil {
				t.Fatal(err)
			}
			if got := given(d.Devices); got != tc.devices || (d.Node == "a") != (tc.refusal == "") {
				t.Errorf("node %q, devices %q, want %q; %v", d.Node, got, tc.devices, d.Refusal)
			}
			if tc.refusal != "" && !strings.Contains(d.Refusal.Error(), tc.refusal) {
				t.Errorf("%s, want %s", d.Refusal, tc.refusal)
			}
			if (d.Release != nil) != tc.release {
				t.Errorf("releases %v", d.Release)
			}
			if d.Devices == nil || d.Devices.Mappings == nil {
				return
			}
			special := d.Devices.Claims[len(d.Devices.Claims)-1]
			if !special.Special || special.Claim.GenerateName != "p-extended-resources-" || special.Claim.Name != "" || !metav1.IsControlledBy(special.Claim, mkPod("p", "", "")) {
				t.Errorf("%+v", special.Claim)
			}
			if m := d.Devices.Mappings[0]; m.ContainerName != "c" || m.RequestName != "container-0-request-1" {
				t.Errorf("mappings %+v", d.Devices.Mappings)
			}
		})
	}
}

func TestTheNewerClassCounts(t *testing.T) {
	at := func(sec int64) func(*resourceapi.DeviceClass) {
		return func(c *resourceapi.DeviceClass) { c.CreationTimestamp = metav1.Unix(sec, 0) }
	}
	s := devicesOf(mkDeviceClass("old", backing("x.io/r"), at(1)), mkDeviceClass("new", backing("x.io/r"), at(2)), mkDeviceClass("nev", backing("x.io/r"), at(2)))
	for _, want := range []string{"nev", "new", "old"} {
		if got := s.devices.backing["x.io/r"]; got == nil || got.Name != want {
			t.Errorf("%v, want %s", got, want)
		}
		s.RemoveDeviceClass(want)
	}
	if len(s.devices.backing) != 0 {
		t.Error(s.devices.backing)
	}
}

// Containers that end before others start use the devices of those; of several
// that end the greediest counts (upstream's TestCreateRequestsAndMappings).
func TestRequestsOfContainers(t *testing.T) {
	c := func(name string, n int64, sidecar bool) v1.Container {
		c := v1.Container{Name: name, Resources: v1.ResourceRequirements{Requests: v1.ResourceList{}}}
		if n > 0 {
			c.Resources.Requests["x.io/r"] = *resource.NewQuantity(n, resource.DecimalSI)
		}
		if sidecar {
			always := v1.ContainerRestartPolicyAlways
			c.RestartPolicy = &always
		}
		return c
	}
	for _, tc := range []struct {
		what       string
		init, main []v1.Container
		want       string
	}{
		{"two containers", nil, []v1.Container{c("a", 1, false), c("b", 2, false)}, "container-0-request-0:1 container-1-request-0:2 | a=container-0-request-0 b=container-1-request-0"},
		{"init needs less", []v1.Container{c("i", 1, false)}, []v1.Container{c("a", 2, false)}, "container-1-request-0:2 | a=container-1-request-0 i=container-1-request-0"},
		{"init needs more", []v1.Container{c("i", 3, false)}, []v1.Container{c("a", 2, false)},
			"container-0-request-0:1 container-1-request-0:2 | a=container-1-request-0 i=container-1-request-0 i=container-0-request-0"},
		{"two inits", []v1.Container{c("i", 1, false), c("j", 2, false)}, []v1.Container{c("a", 0, false)},
			"container-1-request-0:2 | i=container-1-request-0 j=container-1-request-0"},
		{"a sidecar before is not shared", []v1.Container{c("s", 1, true), c("i", 1, false)}, []v1.Container{c("a", 0, false)},
			"container-0-request-0:1 container-1-request-0:1 | s=container-0-request-0 i=container-1-request-0"},
		{"a sidecar after is", []v1.Container{c("i", 1, false), c("s", 1, true)}, []v1.Container{c("a", 0, false)},
			"container-1-request-0:1 | s=container-1-request-0 i=container-1-request-0"},
	} {
		pod := &v1.Pod{Spec: v1.PodSpec{InitContainers: tc.init, Containers: tc.main, Overhead: nil}}
		p := &plan{s: devicesOf(mkDeviceClass("k", backing("x.io/r"))), pod: pod, info: &podInfo{request: Resources{Scalars: map[v1.ResourceName]int64{"x.io/r": 1}}}}
		requests, mappings := p.specialRequests(p.s.nodes["a"])
		var out []string
		for _, r := range requests {
			out = append(out, fmt.Sprintf("%s:%d", r.Name, r.Exactly.Count))
		}
		out = append(out, "|")
		for _, m := range mappings {
			out = append(out, m.ContainerName+"="+m.RequestName)
		}
		if got := strings.Join(out, " "); got != tc.want {
			t.Errorf("%s: %s, want %s", tc.what, got, tc.want)
		}
	}
}

// A resource that the profile has NodeResourcesFit ignore is had of devices all the same.
func TestIgnoredResourceByDevices(t *testing.T) {
	const gpu = v1.ResourceName("example.com/gpu")
	settings := DefaultSettings()
	settings.IgnoredGroups = []string{"example.com"}
	profile, err := NewProfile(settings)
	if err != nil {
		t.Fatal(err)
	}
	s := devicesOf(mkDeviceClass("gpu", backing(string(gpu))), mkSlice("b", "gpu", 1))
	d, err := s.Place(Request{Pod: mkPod("p", "1", "1Gi", requesting(gpu, 1)), Profile: profile}, rnd())
	if err != nil || d.Node != "b" || given(d.Devices) != "container-0-request-1=b/d0" {
		t.Errorf("node %q, devices %q, %v %v", d.Node, given(d.Devices), d.Refusal, err)
	}
}

// A profile may weigh a resource that devices stand for: what is free of them counts, as of now.
func TestDevicesAreWeighed(t *testing.T) {
	const gpu = v1.ResourceName("example.com/gpu")
	settings := DefaultSettings()
	settings.Weights = Weights{Fit: 1}
	settings.Resources = []ResourceWeight{{Name: gpu, Weight: 1}}
	profile, err := NewProfile(settings)
	if err != nil {
		t.Fatal(err)
	}
	s := devicesOf(mkDeviceClass("gpu", backing(string(gpu))), mkSlice("a", "gpu", 4), mkSlice("a", "nic", 4), mkSlice("b", "gpu", 4), mkDeviceClaim("c", exactly("gpu", 1), allocated("b", "gpu", 0)))
	req := Request{Pod: mkPod("p", "1", "1Gi", requesting(gpu, 1)), Profile: profile}
	check := func(a, b int64) {
		t.Helper()
		got, err := s.Explain(req)
		if err != nil || got[0].Scores.Fit != a || got[1].Scores.Fit != b {
			t.Errorf("%+v %v, want %d and %d", got, err, a, b)
		}
		better := "a"
		if b > a {
			better = "b"
		}
		if d, err := s.Place(req, rnd()); err != nil || d.Node != better {
			t.Errorf("placed on %q, %v; %s is better", d.Node, err, better)
		}
	}
	check(75, 50)
	s.SetResourceClaim(mkDeviceClaim("d", exactly("gpu", 1), allocated("a", "gpu", 0)))
	s.SetResourceClaim(mkDeviceClaim("e", exactly("gpu", 1), allocated("a", "gpu", 1)))
	check(25, 50)
	s.SetResourceSlice(mkSlice("a", "gpu", 10))
	check(70, 50)
}
