package simulate

import (
	"fmt"
	"slices"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	volumehelpers "k8s.io/component-helpers/storage/volume"
)

// The classes of volumes: local ones were made by somebody on each node, zonal ones are made by a provisioner when a pod needs one. Both wait
// for their first consumer.
const (
	classLocal    = "local"
	classZonal    = "zonal"
	provisioner   = "disk.simulate"
	localsPerNode = 4
)

var (
	pvcGVR = schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumeclaims"}
	pvGVR  = schema.GroupVersionResource{Version: "v1", Resource: "persistentvolumes"}
)

// storage are the provisioner, who makes and removes zonal volumes, and the administrator, who looks after the local ones.
type storage struct {
	w    *world
	mu   sync.Mutex     // guards made
	made map[string]int // local volumes by node
}

func newStorage(w *world) *storage {
	st := &storage{w: w, made: map[string]int{}}
	for name, by := range map[string]string{classLocal: volumehelpers.NotSupportedProvisioner, classZonal: provisioner} {
		w.make(&storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: by, VolumeBindingMode: ptr(storagev1.VolumeBindingWaitForFirstConsumer),
			ReclaimPolicy: ptr(corev1.PersistentVolumeReclaimDelete)})
	}
	w.s.onCommit = append(w.s.onCommit, st.look)
	return st
}

// look is told of every commit, under the store's lock: it only plans.
func (st *storage) look(c commit) {
	switch obj := c.cur.(type) {
	case *corev1.PersistentVolumeClaim:
		if at := keyOf(obj); obj.Annotations[volumehelpers.AnnSelectedNode] != "" && obj.Annotations[volumehelpers.AnnStorageProvisioner] == provisioner && obj.Spec.VolumeName == "" {
			st.w.agents.later("storage", "claim/"+at.String(), 100*time.Millisecond, 3*time.Second, func() { st.provision(at) })
		}
	case *corev1.PersistentVolume:
		if name := obj.Name; obj.Status.Phase == corev1.VolumeReleased || obj.Spec.StorageClassName == classLocal && obj.Spec.ClaimRef != nil {
			st.w.agents.later("storage", "volume/"+name, 100*time.Millisecond, 2*time.Second, func() { st.reclaim(name) })
		}
	}
}

// provision makes the volume that a claim asks for in the zone of the node that was selected; sometimes it cannot, and says so.
func (st *storage) provision(at key) {
	w := st.w
	e, err := w.s.get(w.s.kinds[pvcGVR], at)
	if err != nil {
		return
	}
	claim := e.obj.(*corev1.PersistentVolumeClaim)
	selected := claim.Annotations[volumehelpers.AnnSelectedNode]
	if claim.DeletionTimestamp != nil || claim.Spec.VolumeName != "" || selected == "" {
		return
	}
	node, err := w.s.get(w.s.kinds[nodesGVR], key{"", selected})
	if err != nil || draw(w.seed, "provision", claim.UID, claim.ResourceVersion)%5 == 0 {
		edit(w, at.ns, at.name, func(c *corev1.PersistentVolumeClaim) { delete(c.Annotations, volumehelpers.AnnSelectedNode) })
		return
	}
	zone := node.acc.GetLabels()[corev1.LabelTopologyZone]
	pv := volume("pvc-"+string(claim.UID), classZonal, corev1.LabelTopologyZone, zone)
	pv.Annotations = map[string]string{volumehelpers.AnnDynamicallyProvisioned: provisioner}
	pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimDelete
	pv.Spec.CSI = &corev1.CSIPersistentVolumeSource{Driver: provisioner, VolumeHandle: pv.Name}
	pv.Spec.ClaimRef = &corev1.ObjectReference{Kind: "PersistentVolumeClaim", APIVersion: "v1", Namespace: at.ns, Name: at.name, UID: claim.UID}
	_, _ = w.s.create(w.s.kinds[pvGVR], pv, "provisioner") // it is there already
}

// reclaim removes a volume that was released, and a local one whose node is gone for good, with its claim. A local one that was
// released is wiped: a new one takes its place.
func (st *storage) reclaim(name string) {
	w := st.w
	e, err := w.s.get(w.s.kinds[pvGVR], key{"", name})
	if err != nil {
		return
	}
	pv := e.obj.(*corev1.PersistentVolume)
	host := hostOf(pv)
	gone := host != "" && w.agents.hasLeft(host)
	if gone && pv.Spec.ClaimRef != nil {
		_, _ = w.s.remove(w.s.kinds[pvcGVR], key{pv.Spec.ClaimRef.Namespace, pv.Spec.ClaimRef.Name}, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &pv.Spec.ClaimRef.UID}}, "user")
	}
	if pv.DeletionTimestamp != nil || !gone && pv.Status.Phase != corev1.VolumeReleased {
		return
	}
	_, _ = w.s.remove(w.s.kinds[pvGVR], key{"", name}, metav1.DeleteOptions{}, "provisioner")
	if host != "" && !gone {
		st.addLocal(host)
	}
}

func (st *storage) addLocal(node string) {
	st.mu.Lock()
	st.made[node]++
	n := st.made[node]
	st.mu.Unlock()
	pv := volume(fmt.Sprintf("local-%s-%d", node, n), classLocal, corev1.LabelHostname, node)
	pv.Spec.PersistentVolumeReclaimPolicy = corev1.PersistentVolumeReclaimRetain
	pv.Spec.Local = &corev1.LocalVolumeSource{Path: "/disk"}
	st.w.make(pv)
}

// left removes the local volumes of a node that is gone for good.
func (st *storage) left(node string) {
	st.mu.Lock()
	n := st.made[node]
	st.mu.Unlock()
	for i := 1; i <= n; i++ {
		st.reclaim(fmt.Sprintf("local-%s-%d", node, i))
	}
}

func volume(name, class, label, value string) *corev1.PersistentVolume {
	return &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeSpec{
		StorageClassName: class, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, VolumeMode: ptr(corev1.PersistentVolumeFilesystem),
		Capacity: corev1.ResourceList{corev1.ResourceStorage: *quantity("1Gi")},
		NodeAffinity: &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{{Key: label, Operator: corev1.NodeSelectorOpIn, Values: []string{value}}}}}}},
	}}
}

// hostOf is the node of a local volume.
func hostOf(pv *corev1.PersistentVolume) string {
	if pv.Spec.StorageClassName != classLocal {
		return ""
	}
	return pv.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0].Values[0]
}

func (a *agents) hasLeft(name string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	m := a.machines[name]
	return m == nil || m.left
}

// withVolumes gives each pod of a StatefulSet a volume of a class.
func withVolumes(set *appsv1.StatefulSet, class string, whenScaled appsv1.PersistentVolumeClaimRetentionPolicyType) {
	set.Spec.VolumeClaimTemplates = []corev1.PersistentVolumeClaim{{ObjectMeta: metav1.ObjectMeta{Name: "data"}, Spec: corev1.PersistentVolumeClaimSpec{
		StorageClassName: &class, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, VolumeMode: ptr(corev1.PersistentVolumeFilesystem),
		Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: *quantity("1Gi")}}}}}
	set.Spec.PersistentVolumeClaimRetentionPolicy = &appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy{
		WhenDeleted: appsv1.DeletePersistentVolumeClaimRetentionPolicyType, WhenScaled: whenScaled}
}

// defaultVolume does to claims and volumes what the API's strategies and admission do.
func defaultVolume(obj runtime.Object, acc metav1.Object) {
	switch o := obj.(type) {
	case *corev1.PersistentVolumeClaim:
		o.Status.Phase = corev1.ClaimPending
		acc.SetFinalizers(append(acc.GetFinalizers(), "kubernetes.io/pvc-protection"))
	case *corev1.PersistentVolume:
		o.Status.Phase = corev1.VolumePending
		acc.SetFinalizers(append(acc.GetFinalizers(), "kubernetes.io/pv-protection"))
	}
}

// volumesReach checks a pod that was bound this moment: each of its volumes is there, is its own and can be reached from the node. A
// claim that somebody deletes meanwhile is his fault. v.mu and the store's are held.
func (v *invariants) volumesReach(pod *corev1.Pod, node *corev1.Node) {
	for i := range pod.Spec.Volumes {
		src := pod.Spec.Volumes[i].PersistentVolumeClaim
		if src == nil {
			continue
		}
		v.checks["volumes: in reach"]++
		ce := v.s.tables[pvcGVR].objs[key{pod.Namespace, src.ClaimName}]
		if ce == nil || ce.acc.GetDeletionTimestamp() != nil {
			continue
		}
		claim := ce.obj.(*corev1.PersistentVolumeClaim)
		pe := v.s.tables[pvGVR].objs[key{"", claim.Spec.VolumeName}]
		if pe == nil {
			v.broken("pod %s/%s was bound to %s, its claim %s has no volume (%q)", pod.Namespace, pod.Name, node.Name, claim.Name, claim.Spec.VolumeName)
			continue
		}
		pv := pe.obj.(*corev1.PersistentVolume)
		if pv.Spec.ClaimRef == nil || pv.Spec.ClaimRef.UID != claim.UID {
			v.broken("pod %s/%s was bound to %s, the volume %s of its claim %s belongs to another", pod.Namespace, pod.Name, node.Name, pv.Name, claim.Name)
		}
		if err := volumehelpers.CheckNodeAffinity(pv, node.Labels); err != nil {
			v.broken("pod %s/%s was bound to %s, out of reach of its volume %s: %v", pod.Namespace, pod.Name, node.Name, pv.Name, err)
		}
	}
}

// volumeChanged: a volume is never given from one claim to another, a claim never has two.
func (v *invariants) volumeChanged(old, cur runtime.Object) {
	owner := func(o runtime.Object) types.UID {
		if pv, ok := o.(*corev1.PersistentVolume); ok && pv.Spec.ClaimRef != nil {
			return pv.Spec.ClaimRef.UID
		}
		return ""
	}
	if a, b := owner(old), owner(cur); a != "" && b != "" && a != b {
		v.broken("volume %s was claim %s's and is now claim %s's", cur.(*corev1.PersistentVolume).Name, a, b)
	}
	claim, ok := cur.(*corev1.PersistentVolumeClaim)
	if !ok || claim.Spec.VolumeName == "" {
		return
	}
	if was, ok := old.(*corev1.PersistentVolumeClaim); ok && was.Spec.VolumeName != "" {
		if was.Spec.VolumeName != claim.Spec.VolumeName {
			v.broken("claim %s/%s had volume %s and has now %s", claim.Namespace, claim.Name, was.Spec.VolumeName, claim.Spec.VolumeName)
		}
		return
	}
	v.checks["volumes: one claim each"]++
	for at, e := range v.s.tables[pvcGVR].objs {
		if other := e.obj.(*corev1.PersistentVolumeClaim); other.UID != claim.UID && other.Spec.VolumeName == claim.Spec.VolumeName {
			v.broken("volume %s is of claims %s and %s/%s", claim.Spec.VolumeName, at, claim.Namespace, claim.Name)
		}
	}
}

// volumesDone: each volume is free or its claim's, and no claim waits that a pod needs.
func (w *world) volumesDone(add complain) {
	claims := map[types.UID]*corev1.PersistentVolumeClaim{}
	for _, c := range all[*corev1.PersistentVolumeClaim](w) {
		claims[c.UID] = c
	}
	for _, pv := range all[*corev1.PersistentVolume](w) {
		phase, ref := pv.Status.Phase, pv.Spec.ClaimRef
		switch {
		case ref == nil && phase != corev1.VolumeAvailable, ref != nil && phase != corev1.VolumeBound:
			add("volume %s is %s, of claim %v", pv.Name, phase, ref)
		case ref != nil && (claims[ref.UID] == nil || claims[ref.UID].Spec.VolumeName != pv.Name):
			add("volume %s is of claim %s/%s, which does not say so", pv.Name, ref.Namespace, ref.Name)
		}
		if host := hostOf(pv); host != "" && w.agents.hasLeft(host) {
			add("volume %s is on %s, which left", pv.Name, host)
		}
	}
	pods := all[*corev1.Pod](w)
	for _, c := range claims {
		if c.Status.Phase != corev1.ClaimBound && slices.ContainsFunc(pods, func(p *corev1.Pod) bool {
			return p.Namespace == c.Namespace && slices.ContainsFunc(p.Spec.Volumes, func(v corev1.Volume) bool {
				return v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == c.Name
			})
		}) {
			add("claim %s/%s is %s", c.Namespace, c.Name, c.Status.Phase)
		}
	}
}
