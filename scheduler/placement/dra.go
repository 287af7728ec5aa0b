package placement

import (
	"maps"
	"slices"

	v1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/dynamic-resource-allocation/cel"
	"k8s.io/dynamic-resource-allocation/structured"
)

// devices is what a snapshot knows of dynamic resources. Devices count as
// taken from the moment of the decision, like the resources of a node.
type devices struct {
	classes map[string]*resourceapi.DeviceClass
	backing map[v1.ResourceName]*resourceapi.DeviceClass // extended resources that devices stand for
	slices  map[string]*resourceapi.ResourceSlice
	list    []*resourceapi.ResourceSlice // of slices; nil when it has to be made anew
	claims  map[types.NamespacedName]*resourceapi.ResourceClaim
	special map[types.UID]*resourceapi.ResourceClaim    // by pod: claims made for its extended resources
	pending map[types.UID]*resourceapi.AllocationResult // by claim: decided, not in the claim's status yet
	taken   map[structured.DeviceID]int                 // by how many allocations; more than one only while events cross
	shares  map[structured.SharedDeviceID]int           // likewise
	state   structured.AllocatedState                   // the same, as the library wants it
	exprs   *cel.Cache                                  // made when it is first needed

	// matches remembers which devices are of which class: only of resources that
	// a profile weighs.
	matches map[*resourceapi.ResourceSlice]map[*resourceapi.DeviceClass]classMatch
	gen     uint64 // grows with every change that such a weight depends on
}

func newDevices() devices {
	return devices{
		classes: map[string]*resourceapi.DeviceClass{},
		backing: map[v1.ResourceName]*resourceapi.DeviceClass{},
		slices:  map[string]*resourceapi.ResourceSlice{},
		claims:  map[types.NamespacedName]*resourceapi.ResourceClaim{},
		special: map[types.UID]*resourceapi.ResourceClaim{},
		pending: map[types.UID]*resourceapi.AllocationResult{},
		taken:   map[structured.DeviceID]int{},
		shares:  map[structured.SharedDeviceID]int{},
		matches: map[*resourceapi.ResourceSlice]map[*resourceapi.DeviceClass]classMatch{},
		state: structured.AllocatedState{
			AllocatedDevices:         sets.New[structured.DeviceID](),
			AllocatedSharedDeviceIDs: sets.New[structured.SharedDeviceID](),
			AggregatedCapacity:       structured.NewConsumedCapacityCollection(),
		},
	}
}

// SetDeviceClass adds a class of devices or replaces what was known of it.
func (s *Snapshot) SetDeviceClass(class *resourceapi.DeviceClass) {
	s.devices.classes[class.Name] = class
	s.backingChanged()
}

// RemoveDeviceClass forgets a class of devices.
func (s *Snapshot) RemoveDeviceClass(name string) {
	delete(s.devices.classes, name)
	s.backingChanged()
}

// backingChanged finds out anew which resources devices stand for. What nodes
// answered before may not hold any more.
func (s *Snapshot) backingChanged() {
	s.devices.mapResources()
	clear(s.devices.matches)
	s.classes = newClassCache()
}

// mapResources finds out which extended resources stand for devices of which
// class. If two classes name the same one the newer counts, or that of the
// lower name (the rule of k8s.io/dynamic-resource-allocation's
// extendedresourcecache, but as of now instead of by the order of events).
func (d *devices) mapResources() {
	d.backing = make(map[v1.ResourceName]*resourceapi.DeviceClass, len(d.classes))
	for name, class := range d.classes {
		d.backing[v1.ResourceName(resourceapi.ResourceDeviceClassPrefix+name)] = class
		if class.Spec.ExtendedResourceName == nil {
			continue
		}
		resource := v1.ResourceName(*class.Spec.ExtendedResourceName)
		if other := d.backing[resource]; other == nil || class.CreationTimestamp.After(other.CreationTimestamp.Time) ||
			class.CreationTimestamp.Equal(&other.CreationTimestamp) && class.Name < other.Name {
			d.backing[resource] = class
		}
	}
}

// SetResourceSlice adds a list of devices or replaces what was known of it.
func (s *Snapshot) SetResourceSlice(slice *resourceapi.ResourceSlice) {
	s.devices.forgetSlice(slice.Name)
	s.devices.slices[slice.Name] = slice
}

// RemoveResourceSlice forgets a list of devices.
func (s *Snapshot) RemoveResourceSlice(name string) {
	s.devices.forgetSlice(name)
}

func (d *devices) forgetSlice(name string) {
	delete(d.matches, d.slices[name])
	delete(d.slices, name)
	d.list = nil
	d.gen++
}

func (d *devices) allSlices() []*resourceapi.ResourceSlice {
	if d.list == nil {
		d.list = slices.Collect(maps.Values(d.slices))
	}
	return d.list
}

// SetResourceClaim adds a claim or replaces what was known of it, unless that is
// newer: what was just written may be known before the view shows it.
func (s *Snapshot) SetResourceClaim(claim *resourceapi.ResourceClaim) {
	d := &s.devices
	key := claimKey(claim)
	if old := d.claims[key]; old != nil {
		if old.UID == claim.UID && newer(old, claim) {
			return
		}
		d.drop(old)
	}
	if claim.Status.Allocation != nil {
		d.settle(claim.UID)
		d.count(claim.Status.Allocation, 1)
	}
	d.claims[key] = claim
	if pod := podOfSpecial(claim); pod != "" {
		d.special[pod] = claim
	}
}

// RemoveResourceClaim forgets a claim, and frees its devices.
func (s *Snapshot) RemoveResourceClaim(claim *resourceapi.ResourceClaim) {
	key := claimKey(claim)
	if old := s.devices.claims[key]; old != nil && old.UID == claim.UID {
		s.devices.drop(old)
		delete(s.devices.claims, key)
	}
}

// ResourceClaim returns the claim of that name; nil if there is none.
func (s *Snapshot) ResourceClaim(namespace, name string) *resourceapi.ResourceClaim {
	return s.devices.claims[types.NamespacedName{Namespace: namespace, Name: name}]
}

func (d *devices) drop(claim *resourceapi.ResourceClaim) {
	if claim.Status.Allocation != nil {
		d.count(claim.Status.Allocation, -1)
	}
	if pod := podOfSpecial(claim); d.special[pod] == claim {
		delete(d.special, pod)
	}
}

// newer reports whether old is a later version than cur. Versions that cannot
// be compared are taken in the order in which they come.
func newer(old, cur *resourceapi.ResourceClaim) bool {
	c, err := resourceversion.CompareResourceVersion(old.ResourceVersion, cur.ResourceVersion)
	return err == nil && c > 0
}

func claimKey(claim *resourceapi.ResourceClaim) types.NamespacedName {
	return types.NamespacedName{Namespace: claim.Namespace, Name: claim.Name}
}

// podOfSpecial returns the pod for whose extended resources the claim was
// made, "" if it is another claim.
func podOfSpecial(claim *resourceapi.ResourceClaim) types.UID {
	if claim.Annotations[resourceapi.ExtendedResourceClaimAnnotation] != "true" {
		return ""
	}
	for i := range claim.OwnerReferences {
		if ref := &claim.OwnerReferences[i]; ref.Controller != nil && *ref.Controller && ref.Kind == "Pod" {
			return ref.UID
		}
	}
	return ""
}

// AssumeDevices takes the devices of a decision, before its claims say so.
func (s *Snapshot) AssumeDevices(b *DeviceBinding) {
	for i := range b.Claims {
		if c := &b.Claims[i]; c.Allocation != nil {
			s.devices.settle(c.Claim.UID)
			s.devices.pending[c.Claim.UID] = c.Allocation
			s.devices.count(c.Allocation, 1)
		}
	}
}

// ForgetDevices gives back what AssumeDevices took and no claim's status has
// by now. It reports whether there was something.
func (s *Snapshot) ForgetDevices(b *DeviceBinding) (freed bool) {
	for i := range b.Claims {
		if c := &b.Claims[i]; c.Allocation != nil && s.devices.pending[c.Claim.UID] == c.Allocation {
			s.devices.settle(c.Claim.UID)
			freed = true
		}
	}
	return freed
}

// settle ends the claim's decision being under way.
func (d *devices) settle(uid types.UID) {
	if allocation := d.pending[uid]; allocation != nil {
		delete(d.pending, uid)
		d.count(allocation, -1)
	}
}

// count adds sign times an allocation to what is taken. Devices that an
// administrator looks at are not taken by that.
func (d *devices) count(allocation *resourceapi.AllocationResult, sign int) {
	d.gen++
	for i := range allocation.Devices.Results {
		r := &allocation.Devices.Results[i]
		if r.AdminAccess != nil && *r.AdminAccess {
			continue
		}
		id := structured.MakeDeviceID(r.Driver, r.Pool, r.Device)
		if r.ShareID == nil {
			tally(d.taken, d.state.AllocatedDevices, id, sign)
			continue
		}
		tally(d.shares, d.state.AllocatedSharedDeviceIDs, structured.MakeSharedDeviceID(id, r.ShareID), sign)
		if r.ConsumedCapacity == nil {
			continue
		}
		if consumed := structured.NewDeviceConsumedCapacity(id, r.ConsumedCapacity); sign > 0 {
			d.state.AggregatedCapacity.Insert(consumed)
		} else {
			d.state.AggregatedCapacity.Remove(consumed)
		}
	}
}

// tally counts and keeps a set of those that are not zero.
func tally[ID comparable](counts map[ID]int, set sets.Set[ID], id ID, sign int) {
	if counts[id] += sign; counts[id] > 0 {
		set.Insert(id)
		return
	}
	delete(counts, id)
	set.Delete(id)
}

// classLister shows the classes to the library.
type classLister map[string]*resourceapi.DeviceClass

func (l classLister) List() ([]*resourceapi.DeviceClass, error) {
	return slices.Collect(maps.Values(l)), nil
}

func (l classLister) Get(name string) (*resourceapi.DeviceClass, error) {
	if class := l[name]; class != nil {
		return class, nil
	}
	return nil, apierrors.NewNotFound(resourceapi.Resource("deviceclass"), name)
}

// allocator makes what allocates claims on single nodes in the present state.
// The features are those that are on by default in Kubernetes 1.36.
func (d *devices) allocator() (structured.Allocator, error) {
	return structured.NewAllocator(background, structured.Features{
		AdminAccess: true, PrioritizedList: true, PartitionableDevices: true,
		DeviceTaints: true, DeviceBindingAndStatus: true, ConsumableCapacity: true,
	}, d.state, classLister(d.classes), d.allSlices(), d.expressions())
}

// expressions keeps the ten most recent ones compiled, as upstream does.
func (d *devices) expressions() *cel.Cache {
	if d.exprs == nil {
		d.exprs = cel.NewCache(10, cel.Features{EnableConsumableCapacity: true})
	}
	return d.exprs
}
