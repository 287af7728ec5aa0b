package placement

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	v1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/dynamic-resource-allocation/resourceclaim"
	"k8s.io/dynamic-resource-allocation/structured"
)

// allocationLimit bounds the search for devices for one pod on all nodes: it
// is exhaustive, so a claim with many equal alternatives may take for ever.
// (Upstream allows 10 s for each node; here nothing else is placed meanwhile.)
const allocationLimit = 2 * time.Second

// enoughWithDevices is how many nodes are compared for a pod that needs devices
// allocated: a node is asked in 0.1 ms then, not in 1 us (upstream's
// minFeasibleNodesToFind, which it applies to all pods).
const enoughWithDevices = 100

// BindingTimeout is how long devices may take until they are ready for their
// node (DynamicResourcesArgs' default).
const BindingTimeout = 600 * time.Second

// background is for calls into libraries that want a context and need none.
var background = context.Background()

// wantedClaim is a claim of the planned pod.
type wantedClaim struct {
	claim  *resourceapi.ResourceClaim
	nodes  *nodeaffinity.NodeSelector // where its allocation can be used; nil: anywhere
	broken bool                       // its devices could not be made ready
}

// devicePlan is the part of a plan that is about dynamic resources; a pod
// without any has none.
type devicePlan struct {
	wanted  []wantedClaim
	special *resourceapi.ResourceClaim // stands for the extended resources; made, or nil
	stale   *resourceapi.ResourceClaim // the same, left over from an earlier attempt

	allocator   structured.Allocator // nil: nothing to allocate
	deadline    context.Context      // of the search; nil: it has not begun
	cancel      context.CancelFunc
	byNode      map[*node]*nodeDevices
	unavailable map[int]bool // wanted claims that some node cannot use
	timedOut    error
}

// nodeDevices is what was found out about one node.
type nodeDevices struct {
	reason   string // why not
	results  []resourceapi.AllocationResult
	requests []resourceapi.DeviceRequest // of the special claim
	mappings []v1.ContainerExtendedResourceRequest
}

// PodClaims returns the claims that pod names, in its order. The error says
// which of them does not exist, is about to go or belongs to another.
func (s *Snapshot) PodClaims(pod *v1.Pod) ([]*resourceapi.ResourceClaim, error) {
	var out []*resourceapi.ResourceClaim
	for i := range pod.Spec.ResourceClaims {
		name, mustOwn, err := resourceclaim.Name(pod, &pod.Spec.ResourceClaims[i])
		if err != nil {
			return nil, err
		}
		if name == nil {
			continue // it was found to need none
		}
		claim := s.ResourceClaim(pod.Namespace, *name)
		if claim == nil {
			return nil, fmt.Errorf("could not find ResourceClaim %q", pod.Namespace+"/"+*name)
		}
		if claim.DeletionTimestamp != nil {
			return nil, fmt.Errorf("resourceclaim %q is being deleted", claim.Name)
		}
		if mustOwn {
			if err := resourceclaim.IsForPod(pod, claim, false); err != nil {
				return nil, err
			}
		}
		out = append(out, claim)
	}
	return out, nil
}

// withDevices completes a plan by what is about dynamic resources.
func (p *plan) withDevices(now time.Time) {
	if refusal := p.newDevicePlan(now); refusal != "" {
		p.whole, p.wholeBy = refusal, DynamicResources
	}
}

// endDevices gives up what the search for devices holds beyond memory.
func (p *plan) endDevices() {
	if p.devices != nil && p.devices.cancel != nil {
		p.devices.cancel()
	}
}

// newDevicePlan looks at the pod's claims. What it finds wrong with them
// refuses the pod as a whole.
func (p *plan) newDevicePlan(now time.Time) (refusal string) {
	backed := p.backedByDevices()
	if len(p.pod.Spec.ResourceClaims) == 0 && !backed {
		return ""
	}
	claims, err := p.s.PodClaims(p.pod)
	if err != nil {
		return err.Error()
	}
	d := &devicePlan{byNode: map[*node]*nodeDevices{}}
	toAllocate := 0
	for _, claim := range claims {
		w := wantedClaim{claim: claim}
		if claim.Status.Allocation != nil {
			w.broken = bindingFailed(claim, now)
			if w.nodes, err = allocationNodes(claim); err != nil {
				return err.Error()
			}
		} else {
			toAllocate++
			if refusal := p.s.devices.mayAllocate(claim); refusal != "" {
				return refusal
			}
		}
		d.wanted = append(d.wanted, w)
	}
	if backed {
		if d.stale = p.s.devices.special[p.pod.UID]; d.stale == nil {
			d.special = specialClaim(p.pod)
			toAllocate++
		}
	}
	if len(d.wanted) == 0 && !backed {
		return ""
	}
	if toAllocate > 0 {
		if d.allocator, err = p.s.devices.allocator(); err != nil {
			return err.Error()
		}
	}
	p.devices = d
	return ""
}

func allocationNodes(claim *resourceapi.ResourceClaim) (*nodeaffinity.NodeSelector, error) {
	if claim.Status.Allocation.NodeSelector == nil {
		return nil, nil
	}
	return nodeaffinity.NewNodeSelector(claim.Status.Allocation.NodeSelector)
}

// mayAllocate says what keeps a claim from being allocated on any node.
func (d *devices) mayAllocate(claim *resourceapi.ResourceClaim) string {
	name := claim.Namespace + "/" + claim.Name
	if d.pending[claim.UID] != nil {
		return fmt.Sprintf("resource claim %s is in the process of being allocated", name)
	}
	for i := range claim.Spec.Devices.Requests {
		request := &claim.Spec.Devices.Requests[i]
		switch {
		case request.Exactly != nil:
			if d.classes[request.Exactly.DeviceClassName] == nil {
				return noClass(request.Name, request.Exactly.DeviceClassName)
			}
		case len(request.FirstAvailable) > 0:
			for j := range request.FirstAvailable {
				if sub := &request.FirstAvailable[j]; d.classes[sub.DeviceClassName] == nil {
					return noClass(request.Name+"/"+sub.Name, sub.DeviceClassName)
				}
			}
		default:
			return fmt.Sprintf("resource claim %s, request %s: unknown request type", name, request.Name)
		}
	}
	return ""
}

func noClass(request, class string) string {
	return fmt.Sprintf("request %s: device class %s does not exist", request, class)
}

// tryDevices asks whether the node has, or can use, all devices of the pod.
// Evicting pods never helps: it does not free a claim at once.
func (p *plan) tryDevices(n *node) verdict {
	found := p.devices.byNode[n]
	if found == nil {
		found = p.findDevices(n)
		p.devices.byNode[n] = found
	}
	return refused(DynamicResources, found.reason)
}

func (p *plan) findDevices(n *node) *nodeDevices {
	d, found := p.devices, &nodeDevices{}
	if d.stale != nil {
		// Its devices may not be the best, or not there, any more: it is deleted
		// when all nodes have refused the pod.
		found.reason = reasonStaleSpecial
		return found
	}
	claims := make([]*resourceapi.ResourceClaim, 0, len(d.wanted)+1)
	for i := range d.wanted {
		if d.wanted[i].claim.Status.Allocation == nil {
			claims = append(claims, d.wanted[i].claim)
		}
	}
	if d.special != nil {
		if found.requests, found.mappings = p.specialRequests(n); len(found.requests) > 0 {
			claim := *d.special
			claim.Spec.Devices.Requests = found.requests
			claims = append(claims, &claim)
		}
	}
	if len(claims) > 0 {
		found.results, found.reason = d.allocate(n, claims)
	}
	if found.reason != "" {
		return found // whatever the claims that are allocated: to give them up would not help
	}
	for i := range d.wanted {
		if w := &d.wanted[i]; w.broken || w.nodes != nil && !w.nodes.Match(n.obj) {
			found.reason = reasonClaimElsewhere
			if d.unavailable == nil {
				d.unavailable = map[int]bool{}
			}
			d.unavailable[i] = true
		}
	}
	return found
}

// allocate finds devices on the node for all claims, or says why not.
func (d *devicePlan) allocate(n *node, claims []*resourceapi.ResourceClaim) ([]resourceapi.AllocationResult, string) {
	if d.timedOut != nil {
		return nil, d.timedOut.Error() // the attempt is over, whatever the other nodes say
	}
	if d.deadline == nil {
		d.deadline, d.cancel = context.WithTimeout(background, allocationLimit)
	}
	results, err := d.allocator.Allocate(d.deadline, n.obj, claims)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		d.timedOut = fmt.Errorf("node %s: timed out trying to allocate devices", n.name)
		return nil, d.timedOut.Error()
	case err != nil:
		// Something is wrong with the claim, a class or the pools; when that
		// changes the pod is tried again.
		return nil, err.Error()
	case len(results) != len(claims):
		return nil, reasonNoDevices
	}
	return results, ""
}

// score prefers nodes that have the devices that requests with alternatives
// name first.
func (d *devicePlan) score(n *node) (score int64) {
	found, next := d.byNode[n], 0
	for i := range d.wanted {
		claim := d.wanted[i].claim
		allocation := claim.Status.Allocation
		if allocation == nil {
			allocation = &found.results[next]
			next++
		}
		score += scoreAlternatives(claim, allocation)
	}
	return score
}

func scoreAlternatives(claim *resourceapi.ResourceClaim, allocation *resourceapi.AllocationResult) (score int64) {
	given := map[string]bool{}
	for i := range allocation.Devices.Results {
		given[allocation.Devices.Results[i].Request] = true
	}
	for i := range claim.Spec.Devices.Requests {
		request := &claim.Spec.Devices.Requests[i]
		for j := range request.FirstAvailable {
			if given[resourceclaim.CreateSubRequestRef(request.Name, request.FirstAvailable[j].Name)] {
				score += int64(resourceapi.FirstAvailableDeviceRequestMaxSize - j)
			}
		}
	}
	return score
}

// DeviceBinding is what has to be written about a pod's claims before it may
// be bound to its node.
type DeviceBinding struct {
	Claims []ClaimBinding
	// Mappings say which container gets what of the claim that stands for the
	// pod's extended resources, which is the last one then.
	Mappings []v1.ContainerExtendedResourceRequest
}

// ClaimBinding is one of the claims.
type ClaimBinding struct {
	// Claim is as the decision was made on. If Special, it does not exist yet.
	Claim *resourceapi.ResourceClaim
	// Allocation is to be written; nil if the claim has one.
	Allocation *resourceapi.AllocationResult
	// Special says that the claim is to be made for extended resources.
	Special bool
}

// binding is what the choice of n means for the pod's claims; nil: nothing.
func (d *devicePlan) binding(n *node) *DeviceBinding {
	if d == nil {
		return nil
	}
	found, next := d.byNode[n], 0
	b := &DeviceBinding{Mappings: found.mappings}
	for i := range d.wanted {
		c := ClaimBinding{Claim: d.wanted[i].claim}
		if c.Claim.Status.Allocation == nil {
			c.Allocation = &found.results[next]
			next++
		}
		b.Claims = append(b.Claims, c)
	}
	if len(found.requests) > 0 {
		claim := d.special.DeepCopy()
		claim.Spec.Devices.Requests = found.requests
		b.Claims = append(b.Claims, ClaimBinding{Claim: claim, Allocation: &found.results[next], Special: true})
	}
	if len(b.Claims) == 0 {
		return nil
	}
	return b
}

// release picks a claim that keeps the pod from running somewhere else and
// that nobody else uses: its allocation, or the claim itself if it was made
// for extended resources, should go. The words are upstream's.
func (p *plan) release(rnd *rand.Rand) (claim *resourceapi.ResourceClaim, words string) {
	d := p.devices
	if d == nil {
		return nil, reasonNothingToRelease
	}
	seen := 0
	for i := range d.wanted {
		c := d.wanted[i].claim
		used := c.Status.ReservedFor
		if d.unavailable[i] && (len(used) == 0 || len(used) == 1 && used[0].UID == p.pod.UID) {
			if seen++; rnd.IntN(seen) == 0 {
				claim = c
			}
		}
	}
	switch {
	case claim != nil:
		return claim, reasonDeallocated
	case d.stale != nil:
		return d.stale, reasonSpecialDeleted
	}
	return nil, reasonStillNot
}

// IsSpecialClaim reports whether the claim was made for a pod's extended
// resources.
func IsSpecialClaim(claim *resourceapi.ResourceClaim) bool { return podOfSpecial(claim) != "" }
