package placement

import (
	"cmp"
	"fmt"
	"slices"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	volumehelpers "k8s.io/component-helpers/storage/volume"
)

// VolumeBindings is what has to be done to the volumes of a pod before it may
// run on the node that was decided for it.
type VolumeBindings struct {
	Node string
	// Static holds volumes, each to be bound to a claim.
	Static []StaticBinding
	// Provision holds claims, as they are to be written: a volume is to be
	// provisioned for each that the node can reach.
	Provision []*v1.PersistentVolumeClaim
}

// StaticBinding is a volume that exists and the claim that it is for.
type StaticBinding struct {
	Claim   *v1.PersistentVolumeClaim // as it is
	Volume  *v1.PersistentVolume      // as it is to be written
	Changed bool                      // the volume does not name the claim fully yet
}

// VolumeBindings returns what is to be done to the volumes of a pod that was
// decided to run on the node; nil if they are all bound. The snapshot takes it
// for done, so that no other pod gets the same volumes, until the API shows
// newer versions of them or ForgetVolumes is called.
func (s *Snapshot) VolumeBindings(req Request, nodeName string) (*VolumeBindings, error) {
	pod, rules := req.Pod, req.Profile
	if rules == nil {
		rules = defaultProfile
	}
	vp, refusal := s.newVolumePlan(pod, rules)
	if refusal != nil {
		return nil, fmt.Errorf("volumes of pod %s/%s: %s", pod.Namespace, pod.Name, refusal.reason)
	}
	if vp == nil || len(vp.unbound) == 0 && len(vp.provide) == 0 {
		return nil, nil
	}
	n := s.nodes[nodeName]
	if n == nil || n.obj == nil {
		return nil, fmt.Errorf("volumes of pod %s/%s: no node %q", pod.Namespace, pod.Name, nodeName)
	}
	chosen, provide, v := vp.match(n)
	if !v.ok() {
		return nil, fmt.Errorf("volumes of pod %s/%s on node %s: %s", pod.Namespace, pod.Name, nodeName, v.reason)
	}
	out := &VolumeBindings{Node: nodeName}
	for i, info := range chosen {
		if info == nil {
			continue
		}
		claim := vp.unbound[i].claim
		volume, changed, err := volumehelpers.GetBindVolumeToClaim(info.current(), claim)
		if err != nil {
			s.ForgetVolumes(out)
			return nil, fmt.Errorf("bind volume %s to claim %s/%s: %w", info.obj.Name, claim.Namespace, claim.Name, err)
		}
		if changed {
			info.assumed = volume
		}
		out.Static = append(out.Static, StaticBinding{Claim: claim, Volume: volume, Changed: changed})
	}
	for _, claim := range provide {
		claim = claim.DeepCopy()
		metav1.SetMetaDataAnnotation(&claim.ObjectMeta, volumehelpers.AnnSelectedNode, nodeName)
		s.storage.assumedClaims[claim.Namespace+"/"+claim.Name] = claim
		out.Provision = append(out.Provision, claim)
	}
	return out, nil
}

// ForgetVolumes takes back what VolumeBindings assumed, as far as the API has
// not shown newer versions meanwhile.
func (s *Snapshot) ForgetVolumes(b *VolumeBindings) {
	for i := range b.Static {
		if info := s.storage.volumes[b.Static[i].Volume.Name]; info != nil && info.assumed == b.Static[i].Volume {
			info.assumed = nil
		}
	}
	for _, claim := range b.Provision {
		if key := claim.Namespace + "/" + claim.Name; s.storage.assumedClaims[key] == claim {
			delete(s.storage.assumedClaims, key)
		}
	}
}

// claimSearch is a claim that needs a volume, and the volumes that would do if
// the node can reach them.
type claimSearch struct {
	claim *v1.PersistentVolumeClaim
	// given is the volume that is meant for the claim already: no other will do.
	given    *volumeInfo
	byHost   map[string][]*volumeInfo // those that demand a host name
	anywhere []*volumeInfo            // the others, in order
}

// requested is how much a claim asks for; the API demands it.
func requested(claim *v1.PersistentVolumeClaim) *resource.Quantity {
	q := claim.Spec.Resources.Requests[v1.ResourceStorage]
	return &q
}

func capacity(volume *v1.PersistentVolume) *resource.Quantity {
	q := volume.Spec.Capacity[v1.ResourceStorage]
	return &q
}

// smaller orders volumes by their size, then by name.
func smaller(a, b *volumeInfo) int {
	return cmp.Or(capacity(a.obj).Cmp(*capacity(b.obj)), cmp.Compare(a.obj.Name, b.obj.Name))
}

// collect looks through the volumes of the claim's class once for all nodes
// (FindMatchingVolume of component-helpers does it for each).
func (cs *claimSearch) collect(st *storage) {
	claim := cs.claim
	var selector labels.Selector
	if claim.Spec.Selector != nil {
		var err error
		if selector, err = metav1.LabelSelectorAsSelector(claim.Spec.Selector); err != nil {
			return // validation excludes it; nothing matches
		}
	}
	for _, info := range st.byClass[volumehelpers.GetPersistentVolumeClaimClass(claim)] {
		volume := info.current()
		mine := volumehelpers.IsVolumeBoundToClaim(volume, claim)
		switch {
		case volume.Spec.ClaimRef != nil && !mine,
			volume.DeletionTimestamp != nil,
			capacity(volume).Cmp(*requested(claim)) < 0,
			volumehelpers.CheckVolumeModeMismatches(&claim.Spec, &volume.Spec),
			deref(claim.Spec.VolumeAttributesClassName) != deref(volume.Spec.VolumeAttributesClassName):
			continue
		case mine:
			if cs.given == nil || smaller(info, cs.given) < 0 {
				cs.given = info
			}
			continue
		case volume.Status.Phase != v1.VolumeAvailable,
			selector != nil && !selector.Matches(labels.Set(volume.Labels)),
			!volumehelpers.CheckAccessModes(claim, volume):
			continue
		}
		if info.hosts == nil {
			cs.anywhere = append(cs.anywhere, info)
			continue
		}
		if cs.byHost == nil {
			cs.byHost = map[string][]*volumeInfo{}
		}
		for host := range info.hosts {
			cs.byHost[host] = append(cs.byHost[host], info)
		}
	}
	slices.SortFunc(cs.anywhere, smaller)
}

func deref(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// reaches reports whether the volume's affinity lets the node use it. Only its
// labels count, as upstream.
func (vp *volumePlan) reaches(n *node, info *volumeInfo) bool {
	if info.affinity == nil {
		return true
	}
	vp.probe.Labels = n.obj.Labels
	match, err := info.affinity.Match(&vp.probe)
	return err == nil && match
}

// find returns the smallest volume for the claim that the node can reach and
// that no other claim of the pod takes; nil if there is none.
func (vp *volumePlan) find(n *node, cs *claimSearch, taken []*volumeInfo) *volumeInfo {
	usable := func(info *volumeInfo) bool { return !slices.Contains(taken, info) && vp.reaches(n, info) }
	if cs.given != nil {
		if usable(cs.given) {
			return cs.given
		}
		return nil
	}
	var best *volumeInfo
	for _, info := range cs.byHost[n.obj.Labels[v1.LabelHostname]] {
		if (best == nil || smaller(info, best) < 0) && usable(info) {
			best = info
		}
	}
	for _, info := range cs.anywhere {
		if best != nil && smaller(best, info) < 0 {
			break
		}
		if usable(info) {
			return info
		}
	}
	return best
}

// tryBinding checks that the node reaches the bound volumes, and that there
// are volumes for the other claims, or can be.
func (vp *volumePlan) tryBinding(n *node) verdict {
	v := verdict{by: VolumeBinding}
	missing := false
	for _, claim := range vp.bound {
		info := vp.st.volumes[claim.Spec.VolumeName]
		if info == nil {
			missing = true
			break
		}
		if !vp.reaches(n, info) {
			v.add(reasonVolumeNode)
			break
		}
	}
	if len(vp.unbound) > 0 || len(vp.provide) > 0 {
		_, _, m := vp.match(n)
		v.add(m.reason)
	}
	if missing {
		v.add(reasonVolumeMissing)
	}
	return v
}

// add notes a reason; "" is none.
func (v *verdict) add(reason string) {
	switch {
	case reason == "":
	case v.reason == "":
		v.reason = reason
	default:
		v.more = append(v.more, reason)
	}
}

// match finds what each unbound claim gets on the node: a volume (parallel to
// vp.unbound) or one that is to be provisioned.
func (vp *volumePlan) match(n *node) (chosen []*volumeInfo, provide []*v1.PersistentVolumeClaim, v verdict) {
	if vp.selected != "" && vp.selected != n.name {
		return nil, nil, refused(VolumeBinding, reasonBindConflict)
	}
	provide = slices.Clone(vp.provide)
	chosen = make([]*volumeInfo, 0, len(vp.unbound))
	for i := range vp.unbound {
		info := vp.find(n, &vp.unbound[i], chosen)
		if info == nil {
			provide = append(provide, vp.unbound[i].claim)
		}
		chosen = append(chosen, info)
	}
	for _, claim := range provide {
		if reason := vp.st.provisionable(n, claim); reason != "" {
			return nil, nil, refused(VolumeBinding, reason)
		}
	}
	return chosen, provide, verdict{}
}

// provisionable says why no volume can be provisioned for the claim that the
// node can reach; "" if one can.
func (st *storage) provisionable(n *node, claim *v1.PersistentVolumeClaim) string {
	class := st.classes[volumehelpers.GetPersistentVolumeClaimClass(claim)]
	switch {
	case class == nil, class.Provisioner == "", class.Provisioner == volumehelpers.NotSupportedProvisioner,
		!topologyAllowed(class.AllowedTopologies, n.obj.Labels):
		return reasonBindConflict
	}
	size, asked := claim.Spec.Resources.Requests[v1.ResourceStorage]
	driver := st.drivers[class.Provisioner]
	if !asked || driver == nil || driver.Spec.StorageCapacity == nil || !*driver.Spec.StorageCapacity {
		return "" // nobody tells how much there is
	}
	for _, c := range st.capacities {
		if c.StorageClassName == class.Name && roomFor(c, &size) && nodeHasAccess(n, c) {
			return ""
		}
	}
	return reasonStorageSpace
}

// topologyAllowed reports whether the labels match one of the terms, which
// demand a value from each of their lists; no term at all demands nothing.
func topologyAllowed(terms []v1.TopologySelectorTerm, set map[string]string) bool {
	return len(terms) == 0 || slices.ContainsFunc(terms, func(t v1.TopologySelectorTerm) bool {
		return len(t.MatchLabelExpressions) > 0 && !slices.ContainsFunc(t.MatchLabelExpressions, func(r v1.TopologySelectorLabelRequirement) bool {
			value, ok := set[r.Key]
			return !ok || !slices.Contains(r.Values, value)
		})
	})
}

func roomFor(c *storagev1.CSIStorageCapacity, size *resource.Quantity) bool {
	limit := StorageLimit(c)
	return limit != nil && limit.Value() >= size.Value()
}

// StorageLimit is the largest volume that the capacity has room for, as far as
// is known: nil if it is not.
func StorageLimit(c *storagev1.CSIStorageCapacity) *resource.Quantity {
	if c.MaximumVolumeSize != nil {
		return c.MaximumVolumeSize
	}
	return c.Capacity
}

func nodeHasAccess(n *node, c *storagev1.CSIStorageCapacity) bool {
	if c.NodeTopology == nil {
		return false
	}
	selector, err := metav1.LabelSelectorAsSelector(c.NodeTopology)
	return err == nil && selector.Matches(labels.Set(n.obj.Labels))
}
