package resourceclaim

import (
	"sync"

	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/labels"

	"skein.io/skein/scheduler/controller"
)

// Kind tells claims apart as upstream's metrics do.
type Kind struct {
	Allocated   bool
	AdminAccess bool
	// Source is "resource_claim_template", "extended_resource" or, for claims
	// that users made, "".
	Source string
}

// Creation tells requests to create claims apart.
type Creation struct{ OK, AdminAccess bool }

// Board counts the claims that a running controller sees, and the creations of
// all that used it. The zero value is ready; it is safe for concurrent use. A
// nil Board counts nothing.
type Board struct {
	running controller.Running[*claims]

	mu      sync.Mutex // guards creates
	creates map[Creation]int
}

// Claims counts the claims by kind; nil while no controller runs.
func (b *Board) Claims() map[Kind]int {
	if b == nil {
		return nil
	}
	c := b.running.Get()
	if c == nil {
		return nil
	}
	all, err := c.lister.List(labels.Everything())
	if err != nil {
		return nil // a lister of a cache has no errors
	}
	out := map[Kind]int{}
	for _, claim := range all {
		k := Kind{Allocated: claim.Status.Allocation != nil, AdminAccess: adminAccess(claim)}
		switch {
		case claim.Annotations[resourceapi.ExtendedResourceClaimAnnotation] == "true":
			k.Source = "extended_resource"
		case claim.Annotations[resourceapi.PodResourceClaimAnnotation] != "":
			k.Source = "resource_claim_template"
		}
		out[k]++
	}
	return out
}

// Creations counts the requests to create claims since the Board was made.
func (b *Board) Creations() map[Creation]int {
	out := map[Creation]int{}
	if b == nil {
		return out
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for k, n := range b.creates {
		out[k] = n
	}
	return out
}

func (b *Board) follow(c *claims) (stop func()) {
	if b == nil {
		return func() {}
	}
	return b.running.Follow(c)
}

func (b *Board) created(claim *resourceapi.ResourceClaim, ok bool) {
	if b == nil {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.creates == nil {
		b.creates = map[Creation]int{}
	}
	b.creates[Creation{OK: ok, AdminAccess: adminAccess(claim)}]++
}

// adminAccess reports whether a request of the claim is an administrator's.
func adminAccess(claim *resourceapi.ResourceClaim) bool {
	for i := range claim.Spec.Devices.Requests {
		if e := claim.Spec.Devices.Requests[i].Exactly; e != nil && e.AdminAccess != nil && *e.AdminAccess {
			return true
		}
	}
	return false
}
