package oracle

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/cache"
	fwk "k8s.io/kube-scheduler/framework"
	"k8s.io/kubernetes/pkg/scheduler/framework/plugins/dynamicresources"
	"k8s.io/kubernetes/pkg/scheduler/util/assumecache"
	"k8s.io/utils/ptr"
	"sigs.k8s.io/yaml"

	"skein.io/skein/scheduler/placement"
)

// draManager is upstream's, which notes what a decision takes instead of counting it: nothing is placed between questions.
type draManager struct {
	*dynamicresources.DefaultDRAManager
	tracker  claimTracker
	assumed  *assumecache.AssumeCache
	shown    deviceSet
	released []string // claims that DynamicResources' PostFilter gave back or deleted
	patched  []byte   // the status that its PreBind wrote to a pod
}

func (m *draManager) ResourceClaims() fwk.ResourceClaimTracker { return &m.tracker }

type claimTracker struct {
	fwk.ResourceClaimTracker
	reserved []*resourceapi.ResourceClaim
}

func (t *claimTracker) SignalClaimPendingAllocation(_ types.UID, c *resourceapi.ResourceClaim) error {
	t.reserved = append(t.reserved, c.DeepCopy())
	return nil
}

func (t *claimTracker) AssumeClaimAfterAPICall(*resourceapi.ResourceClaim) error { return nil }

// answerWrites makes the client take what the plugin writes and keep none of it.
func (m *draManager) answerWrites(client *fake.Clientset) {
	client.PrependReactor("*", "resourceclaims", func(a clienttesting.Action) (bool, runtime.Object, error) {
		switch w := a.(type) {
		case clienttesting.UpdateActionImpl:
			c := w.Object.(*resourceapi.ResourceClaim)
			if c.Status.Allocation == nil {
				m.released = append(m.released, c.Name)
			}
			return true, c, nil
		case clienttesting.CreateActionImpl:
			c := w.Object.(*resourceapi.ResourceClaim).DeepCopy()
			c.Name, c.UID = c.GenerateName+"made", "made"
			return true, c, nil
		case clienttesting.DeleteActionImpl:
			m.released = append(m.released, w.Name)
			return true, nil, nil
		}
		return true, nil, fmt.Errorf("unexpected: %s of claims", a.GetVerb())
	})
	client.PrependReactor("patch", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
		m.patched = a.(clienttesting.PatchActionImpl).Patch
		return true, &v1.Pod{}, nil
	})
}

// show makes a world's devices the ones there are. Classes come in the order in which each may take over the resource of the
// one before: upstream's note of that depends on the order, and ours does not.
func (u *upstream) showDevices(set *deviceSet) error {
	m := u.dra
	resolver := m.DeviceClassResolver().(cache.ResourceEventHandler)
	for _, c := range m.shown.Claims {
		assumecache.DeleteTestObject(m.assumed, c)
	}
	for _, c := range m.shown.Classes {
		resolver.OnDelete(c)
	}
	m.shown = *set
	for _, c := range set.Claims {
		assumecache.AddTestObject(m.assumed, c)
	}
	for _, c := range set.Classes {
		resolver.OnAdd(c, true)
	}
	api := u.factory.Resource().V1()
	return errors.Join(api.DeviceClasses().Informer().GetIndexer().Replace(anys(set.Classes), ""),
		api.ResourceSlices().Informer().GetIndexer().Replace(anys(set.Slices), ""))
}

// reservation is what is taken for one pod on its node.
type reservation struct {
	Claims   []reserved                            `json:"claims,omitempty"`
	Mappings []v1.ContainerExtendedResourceRequest `json:"mappings,omitempty"`
}

type reserved struct {
	Name       string                        `json:"name"` // "" of one that is to be made
	Requests   []resourceapi.DeviceRequest   `json:"requests,omitempty"`
	Allocation *resourceapi.AllocationResult `json:"allocation"`
}

// reserve runs Reserve and, for what it makes of extended resources, PreBind.
func (u *upstream) reserve(pod *v1.Pod, node string, tally map[string]int) (out reservation, err error) {
	u.dra.tracker.reserved, u.dra.patched = nil, nil
	if s := u.devicePlugin.(fwk.ReservePlugin).Reserve(u.ctx, u.state, pod, node); !s.IsSuccess() {
		return out, fmt.Errorf("reserve: %w", s.AsError())
	}
	taken := u.dra.tracker.reserved
	waits := slices.ContainsFunc(taken, func(c *resourceapi.ResourceClaim) bool { return binds(c.Status.Allocation) })
	for _, c := range taken {
		r := reserved{Name: c.Name, Allocation: plain(c.Status.Allocation)}
		if c.Name == "<extended-resources>" { // not made yet
			if len(c.Spec.Devices.Requests) == 0 {
				tally["empty-claim"]++
				continue
			}
			r.Name, r.Requests = "", c.Spec.Devices.Requests
			if !waits {
				if out.Mappings, err = u.mappings(pod, node); err != nil {
					return out, err
				}
			}
		}
		out.Claims = append(out.Claims, r)
	}
	return out, nil
}

// mappings are what PreBind tells the agent of extended resources. It must not have to wait for devices.
func (u *upstream) mappings(pod *v1.Pod, node string) ([]v1.ContainerExtendedResourceRequest, error) {
	for _, c := range u.dra.shown.Claims {
		if binds(c.Status.Allocation) {
			return nil, nil
		}
	}
	if s := u.devicePlugin.(fwk.PreBindPlugin).PreBind(u.ctx, u.state, pod, node); !s.IsSuccess() {
		return nil, fmt.Errorf("prebind: %w", s.AsError())
	}
	var said v1.Pod
	if err := json.Unmarshal(u.dra.patched, &said); err != nil {
		return nil, fmt.Errorf("status patch %q: %w", u.dra.patched, err)
	}
	return said.Status.ExtendedResourceClaimStatus.RequestMappings, nil
}

func binds(a *resourceapi.AllocationResult) bool {
	return a != nil && slices.ContainsFunc(a.Devices.Results, func(r resourceapi.DeviceRequestAllocationResult) bool { return len(r.BindingConditions) > 0 })
}

// plain is an allocation without what is drawn by lot.
func plain(a *resourceapi.AllocationResult) *resourceapi.AllocationResult {
	a = a.DeepCopy()
	a.AllocationTimestamp = nil
	for i := range a.Devices.Results {
		if r := &a.Devices.Results[i]; r.ShareID != nil {
			r.ShareID = ptr.To(types.UID("some"))
		}
	}
	return a
}

// reservationOf is the same of ours.
func reservationOf(b *placement.DeviceBinding, mappings bool) (out reservation) {
	if b == nil {
		return out
	}
	for i := range b.Claims {
		switch c := &b.Claims[i]; {
		case c.Special:
			out.Claims = append(out.Claims, reserved{"", c.Claim.Spec.Devices.Requests, plain(c.Allocation)})
		case c.Allocation != nil:
			out.Claims = append(out.Claims, reserved{c.Claim.Name, nil, plain(c.Allocation)})
		}
	}
	if mappings {
		out.Mappings = b.Mappings
	}
	return out
}

// compareDevices compares what the decision takes with what upstream takes on the same node.
func (j *judge) compareDevices(u *upstream, d *placement.Decision, pod *v1.Pod) error {
	if u.devicePlugin == nil || !u.filtersDevices {
		return nil
	}
	want, err := u.reserve(pod, d.Node, j.tally.Accepted)
	if err != nil {
		return err
	}
	got := reservationOf(d.Devices, want.Mappings != nil)
	j.tally.Allocations += len(want.Claims)
	if equality.Semantic.DeepEqual(got, want) {
		return nil
	}
	text := func(r reservation) string {
		out, err := yaml.Marshal(r)
		return strings.TrimSpace(fmt.Sprintln(string(out), err))
	}
	return fmt.Errorf("takes on %s:\n%s\nupstream:\n%s", d.Node, text(got), text(want))
}

// releases asks often which claim of a pod that fits nowhere is given up: upstream draws it by lot.
func (u *upstream) releases(state fwk.CycleState, pod *v1.Pod) map[string]bool {
	out := map[string]bool{}
	for range 24 {
		u.dra.released = []string{""}
		u.devices.PostFilter(u.ctx, state, pod, nil)
		out[u.dra.released[len(u.dra.released)-1]] = true
	}
	return out
}

// compareRelease compares it with the one that ours gives up.
func compareRelease(want *answer, d *placement.Decision) error {
	got := ""
	if d.Release != nil {
		got = d.Release.Name
	}
	if want.Released == nil || want.Released[got] {
		return nil
	}
	return fmt.Errorf("gives up claim %q, upstream one of %q", got, slices.Sorted(maps.Keys(want.Released)))
}

// laterFailure is true of a pod with a claim of which one device is not ready yet and a later one has failed.
func laterFailure(w *world, pod *v1.Pod) bool {
	for _, c := range w.Devices.Claims {
		if c.Namespace != pod.Namespace || c.Status.Allocation == nil || len(c.Status.Allocation.Devices.Results) < 2 {
			continue
		}
		if _, _, err := placement.ClaimReady(c, c.Status.Allocation.AllocationTimestamp.Time); err != nil {
			return true
		}
	}
	return false
}
