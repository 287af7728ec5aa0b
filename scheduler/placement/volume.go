package placement

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/component-helpers/storage/ephemeral"
	volumehelpers "k8s.io/component-helpers/storage/volume"
)

// The filters for volumes, in the order in which they are asked (between
// NodeResourcesFit and PodTopologySpread). They follow the plugins of the same
// names in pkg/scheduler/framework/plugins of v1.36, but for the translation
// of volumes of cloud providers to CSI: no node of this cluster has those.
const (
	VolumeRestrictions Filter = "VolumeRestrictions"
	NodeVolumeLimits   Filter = "NodeVolumeLimits"
	VolumeBinding      Filter = "VolumeBinding"
	VolumeZone         Filter = "VolumeZone"
)

// Reasons as upstream's plugins word them.
const (
	reasonDiskConflict     = "node(s) had no available disk"
	reasonOncePod          = "node(s) unavailable due to PersistentVolumeClaim with ReadWriteOncePod access mode already in-use by another pod"
	reasonVolumeCount      = "node(s) exceed max volume count"
	reasonBindConflict     = "node(s) didn't find available persistent volumes to bind"
	reasonVolumeNode       = "node(s) didn't match PersistentVolume's node affinity"
	reasonStorageSpace     = "node(s) did not have enough free storage"
	reasonVolumeMissing    = "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)"
	reasonVolumeZone       = "node(s) had no available volume zone"
	reasonUnboundImmediate = "pod has unbound immediate PersistentVolumeClaims"
)

// volumePlan is what a pod's volumes demand of a node; a pod without claims
// and without disks of the kinds that are looked at has none.
type volumePlan struct {
	st       *storage
	off      map[Filter]bool   // filters that the profile does not ask
	disks    []*v1.Volume      // that two pods of a node cannot share
	oncePod  []string          // claims that one pod alone may use
	attached map[string]string // volume, by driver and handle -> driver
	bound    []*v1.PersistentVolumeClaim
	unbound  []claimSearch               // for a volume on the node, the smallest first
	selected string                      // a node is chosen for some claims already; "" for none
	provide  []*v1.PersistentVolumeClaim // that wait for a volume to be provisioned there
	zones    []volumeTopology
	probe    v1.Node // with the labels of the node that is tried, nothing else
}

// volumeTopology is a label of a bound volume that a node must match.
type volumeTopology struct {
	key    string
	values []string
}

// The labels that VolumeZone looks at; the former of each kind is deprecated.
var volumeTopologies = []string{
	v1.LabelFailureDomainBetaZone, v1.LabelFailureDomainBetaRegion, v1.LabelTopologyZone, v1.LabelTopologyRegion,
}

var successorTopology = map[string]string{
	v1.LabelFailureDomainBetaZone:   v1.LabelTopologyZone,
	v1.LabelFailureDomainBetaRegion: v1.LabelTopologyRegion,
}

// volumeRefusal is why a pod's volumes keep it from all nodes.
type volumeRefusal struct {
	by     Filter
	reason string
}

// newVolumePlan prepares what does not depend on the single node. It returns
// nil for a pod that no filter for volumes concerns, or, with refusal, for one
// that none of the nodes can take.
func (s *Snapshot) newVolumePlan(pod *v1.Pod, rules *Profile) (*volumePlan, *volumeRefusal) {
	if len(pod.Spec.Volumes) == 0 {
		return nil, nil
	}
	vp := &volumePlan{st: &s.storage, off: rules.Off}
	for i := range pod.Spec.Volumes {
		if v := &pod.Spec.Volumes[i]; exclusiveDisk(v) {
			vp.disks = append(vp.disks, v)
		}
	}
	claims := VolumeClaims(pod)
	if len(claims) == 0 {
		if len(vp.disks) == 0 {
			return nil, nil
		}
		return vp, nil
	}
	// Upstream's plugins prepare themselves one after the other; the first that
	// cannot says why.
	for _, step := range []struct {
		by      Filter
		prepare func(*v1.Pod, []VolumeClaim) *volumeRefusal
	}{{VolumeRestrictions, vp.prepareOncePod}, {VolumeBinding, vp.prepareBinding}, {VolumeZone, vp.prepareZones}} {
		if vp.off[step.by] {
			continue
		}
		if refusal := step.prepare(pod, claims); refusal != nil {
			return nil, refusal
		}
	}
	vp.attached = vp.st.attachable(pod.Namespace, pod.UID, claims)
	return vp, nil
}

func claimNotFound(name string) string {
	return apierrors.NewNotFound(v1.Resource("persistentvolumeclaim"), name).Error()
}

// prepareOncePod finds the claims that one pod alone may use.
func (vp *volumePlan) prepareOncePod(pod *v1.Pod, claims []VolumeClaim) *volumeRefusal {
	for _, c := range claims {
		if c.Ephemeral {
			continue // made for this pod
		}
		key := pod.Namespace + "/" + c.Name
		claim := vp.st.claim(key)
		if claim == nil {
			return &volumeRefusal{VolumeRestrictions, claimNotFound(c.Name)}
		}
		if slices.Contains(claim.Spec.AccessModes, v1.ReadWriteOncePod) {
			vp.oncePod = append(vp.oncePod, key)
		}
	}
	return nil
}

// prepareBinding sorts the claims into those that are bound, those that need a
// volume on the node, and those that should be bound but are not.
func (vp *volumePlan) prepareBinding(pod *v1.Pod, claims []VolumeClaim) *volumeRefusal {
	refuse := func(format string, args ...any) *volumeRefusal {
		return &volumeRefusal{VolumeBinding, fmt.Sprintf(format, args...)}
	}
	immediate := false
	for _, c := range claims {
		claim := vp.st.claim(pod.Namespace + "/" + c.Name)
		switch {
		case claim == nil && c.Ephemeral:
			return refuse("waiting for ephemeral volume controller to create the persistentvolumeclaim %q", c.Name)
		case claim == nil:
			return refuse("%s", claimNotFound(c.Name))
		case claim.Status.Phase == v1.ClaimLost:
			return refuse("persistentvolumeclaim %q bound to non-existent persistentvolume %q", claim.Name, claim.Spec.VolumeName)
		case claim.DeletionTimestamp != nil:
			return refuse("persistentvolumeclaim %q is being deleted", claim.Name)
		}
		if c.Ephemeral {
			if err := ephemeral.VolumeIsForPod(pod, claim); err != nil {
				return refuse("%v", err)
			}
		}
		switch {
		case fullyBound(claim):
			vp.bound = append(vp.bound, claim)
		case claim.Spec.VolumeName != "" || !vp.st.waitsForConsumer(claim):
			immediate = true
		default:
			if node, ok := claim.Annotations[volumehelpers.AnnSelectedNode]; ok {
				if vp.selected != "" && vp.selected != node {
					node = "" // two claims, two nodes: none fits
				}
				vp.selected, vp.provide = cmp.Or(node, noNode), append(vp.provide, claim)
				continue
			}
			vp.unbound = append(vp.unbound, claimSearch{claim: claim})
		}
	}
	if immediate {
		return refuse(reasonUnboundImmediate)
	}
	// The small ones first: they must not take the large volumes.
	slices.SortStableFunc(vp.unbound, func(a, b claimSearch) int { return requested(a.claim).Cmp(*requested(b.claim)) })
	for i := range vp.unbound {
		vp.unbound[i].collect(vp.st)
	}
	return nil
}

// noNode is no node's name.
const noNode = "\x00"

// fullyBound says that the binder has finished with the claim.
func fullyBound(claim *v1.PersistentVolumeClaim) bool {
	_, done := claim.Annotations[volumehelpers.AnnBindCompleted]
	return done && claim.Spec.VolumeName != ""
}

// waitsForConsumer says that the claim's class leaves its binding to placement.
func (st *storage) waitsForConsumer(claim *v1.PersistentVolumeClaim) bool {
	class := st.classes[volumehelpers.GetPersistentVolumeClaimClass(claim)]
	return class != nil && class.VolumeBindingMode != nil && *class.VolumeBindingMode == storagev1.VolumeBindingWaitForFirstConsumer
}

// prepareZones reads the zones of the bound volumes from their labels.
func (vp *volumePlan) prepareZones(pod *v1.Pod, claims []VolumeClaim) *volumeRefusal {
	for _, c := range claims {
		if c.Ephemeral {
			continue
		}
		claim := vp.st.claim(pod.Namespace + "/" + c.Name)
		if claim == nil {
			return &volumeRefusal{VolumeZone, claimNotFound(c.Name)}
		}
		if claim.Spec.VolumeName == "" {
			continue // if it does not wait for its first consumer, prepareBinding refuses it
		}
		volume := vp.st.volume(claim.Spec.VolumeName)
		if volume == nil {
			return &volumeRefusal{VolumeZone, apierrors.NewNotFound(v1.Resource("persistentvolume"), claim.Spec.VolumeName).Error()}
		}
		for _, key := range volumeTopologies {
			if value, ok := volume.Labels[key]; ok {
				if values := zonesOf(value); values != nil {
					vp.zones = append(vp.zones, volumeTopology{key, values})
				}
			}
		}
	}
	return nil
}

// zonesOf splits the value of a zone label, which may hold several
// (cloud-provider/volume/helpers); nil if one of them is empty.
func zonesOf(value string) []string {
	zones := strings.Split(value, "__")
	for i := range zones {
		if zones[i] = strings.TrimSpace(zones[i]); zones[i] == "" {
			return nil
		}
	}
	return zones
}

// try asks the filters in their order; the first refusal counts.
func (vp *volumePlan) try(n *node) verdict {
	if !vp.off[VolumeRestrictions] && vp.diskConflict(n) {
		return refusedForNow(VolumeRestrictions, reasonDiskConflict)
	}
	for _, key := range vp.oncePod {
		if vp.st.users[key] > 0 {
			return refusedForNow(VolumeRestrictions, reasonOncePod)
		}
	}
	if !vp.off[NodeVolumeLimits] && vp.tooMany(n) {
		return refusedForNow(NodeVolumeLimits, reasonVolumeCount)
	}
	if v := vp.tryBinding(n); !v.ok() {
		return v
	}
	if !vp.inZone(n) {
		return refused(VolumeZone, reasonVolumeZone)
	}
	return verdict{}
}

// exclusiveDisk says that the volume is of a kind that pods of one node share
// under conditions only.
func exclusiveDisk(v *v1.Volume) bool {
	return v.GCEPersistentDisk != nil || v.AWSElasticBlockStore != nil || v.RBD != nil || v.ISCSI != nil
}

func (vp *volumePlan) diskConflict(n *node) bool {
	for _, disk := range vp.disks {
		for _, info := range n.pods {
			for i := range info.pod.volumes {
				if disksConflict(disk, &info.pod.volumes[i]) {
					return true
				}
			}
		}
	}
	return false
}

// disksConflict: the same disk is mounted by several pods of a node only if
// all mount it read-only, and an EBS volume never.
func disksConflict(a, b *v1.Volume) bool {
	switch {
	case a.GCEPersistentDisk != nil && b.GCEPersistentDisk != nil:
		return a.GCEPersistentDisk.PDName == b.GCEPersistentDisk.PDName && !(a.GCEPersistentDisk.ReadOnly && b.GCEPersistentDisk.ReadOnly)
	case a.AWSElasticBlockStore != nil && b.AWSElasticBlockStore != nil:
		return a.AWSElasticBlockStore.VolumeID == b.AWSElasticBlockStore.VolumeID
	case a.ISCSI != nil && b.ISCSI != nil:
		return a.ISCSI.IQN == b.ISCSI.IQN && !(a.ISCSI.ReadOnly && b.ISCSI.ReadOnly)
	case a.RBD != nil && b.RBD != nil:
		return slices.ContainsFunc(a.RBD.CephMonitors, func(m string) bool { return slices.Contains(b.RBD.CephMonitors, m) }) &&
			a.RBD.RBDPool == b.RBD.RBDPool && a.RBD.RBDImage == b.RBD.RBDImage && !(a.RBD.ReadOnly && b.RBD.ReadOnly)
	}
	return false
}

// attachable returns the volumes of CSI drivers that the pod needs, by driver
// and handle, with their driver.
func (st *storage) attachable(namespace string, pod types.UID, claims []VolumeClaim) map[string]string {
	var out map[string]string
	for _, c := range claims {
		claim := st.claim(namespace + "/" + c.Name)
		if claim == nil || c.Ephemeral && !controlledBy(claim, pod) {
			continue
		}
		driver, handle := st.csiVolume(claim)
		if driver == "" || handle == "" {
			continue
		}
		if out == nil {
			out = map[string]string{}
		}
		out[driver+"/"+handle] = driver
	}
	return out
}

func controlledBy(claim *v1.PersistentVolumeClaim, pod types.UID) bool {
	ref := metav1.GetControllerOfNoCopy(claim)
	return ref != nil && ref.UID == pod
}

// csiVolume is the driver and the handle of a claim's volume. A volume that is
// not there yet counts by its class, under a handle that no driver gives.
func (st *storage) csiVolume(claim *v1.PersistentVolumeClaim) (driver, handle string) {
	if volume := st.volume(claim.Spec.VolumeName); volume != nil {
		if csi := volume.Spec.CSI; csi != nil {
			return csi.Driver, csi.VolumeHandle
		}
		return "", ""
	}
	if class := st.classes[volumehelpers.GetPersistentVolumeClaimClass(claim)]; class != nil {
		return class.Provisioner, "\x00" + claim.Namespace + "/" + claim.Name
	}
	return "", ""
}

// tooMany reports whether the pod's volumes are more than a driver of the node
// can attach besides those of the pods that are there, and those that are
// still attached although their pods are gone.
func (vp *volumePlan) tooMany(n *node) bool {
	csi := vp.st.csiNodes[n.name]
	if len(vp.attached) == 0 || csi == nil {
		return false
	}
	limits := map[string]int{}
	for i := range csi.Spec.Drivers {
		if d := &csi.Spec.Drivers[i]; d.Allocatable != nil && d.Allocatable.Count != nil {
			limits[d.Name] = int(*d.Allocatable.Count)
		}
	}
	if len(limits) == 0 {
		return false
	}
	there := map[string]string{}
	for _, info := range n.pods {
		if len(info.pod.volumes) > 0 {
			for volume, driver := range vp.st.attachable(info.pod.namespace, info.pod.uid, volumeClaims(info.pod.name, info.pod.volumes)) {
				there[volume] = driver
			}
		}
	}
	for _, a := range vp.st.attachments[n.name] {
		if name := a.Spec.Source.PersistentVolumeName; name != nil && a.Spec.Attacher != "" {
			if volume := vp.st.volume(*name); volume != nil && volume.Spec.CSI != nil {
				there[a.Spec.Attacher+"/"+volume.Spec.CSI.VolumeHandle] = a.Spec.Attacher
			}
		}
	}
	// An attached volume counts, whether the pod shares it or not; one that the
	// pod shares with another is not a new one.
	count, wanted := map[string]int{}, map[string]bool{}
	for _, driver := range there {
		count[driver]++
	}
	for volume, driver := range vp.attached {
		if _, shared := there[volume]; !shared {
			count[driver]++
			wanted[driver] = true
		}
	}
	for driver := range wanted {
		if limit, ok := limits[driver]; ok && count[driver] > limit {
			return true
		}
	}
	return false
}

// inZone compares the zones of the bound volumes with the node's. A node
// without any such label is in a cluster without zones.
func (vp *volumePlan) inZone(n *node) bool {
	if len(vp.zones) == 0 || !slices.ContainsFunc(volumeTopologies, func(key string) bool { _, ok := n.obj.Labels[key]; return ok }) {
		return true
	}
	for _, t := range vp.zones {
		value, ok := n.obj.Labels[t.key]
		if !ok {
			value, ok = n.obj.Labels[successorTopology[t.key]]
		}
		if !ok || !slices.Contains(t.values, value) {
			return false
		}
	}
	return true
}
