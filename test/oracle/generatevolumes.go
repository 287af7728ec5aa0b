package oracle

import (
	"fmt"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
)

// storage is what a world has of volumes.
type storage struct {
	Classes     []*storagev1.StorageClass       `json:"classes,omitempty"`
	Claims      []*v1.PersistentVolumeClaim     `json:"claims,omitempty"`
	Volumes     []*v1.PersistentVolume          `json:"volumes,omitempty"`
	CSINodes    []*storagev1.CSINode            `json:"csiNodes,omitempty"`
	Drivers     []*storagev1.CSIDriver          `json:"drivers,omitempty"`
	Capacities  []*storagev1.CSIStorageCapacity `json:"capacities,omitempty"`
	Attachments []*storagev1.VolumeAttachment   `json:"attachments,omitempty"`
}

const driver, keeper = "csi.test", "keeper.test" // the latter tells how much it has left

// storage makes classes, drivers and volumes, some of them bound.
func (g *gen) storage() {
	w := g.w
	for _, c := range []struct {
		name, by string
		mode     storagev1.VolumeBindingMode
	}{{"now", driver, storagev1.VolumeBindingImmediate}, {"local", "kubernetes.io/no-provisioner", storagev1.VolumeBindingWaitForFirstConsumer},
		{"later", driver, storagev1.VolumeBindingWaitForFirstConsumer}, {"kept", keeper, storagev1.VolumeBindingWaitForFirstConsumer}} {
		class := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: c.name}, Provisioner: c.by, VolumeBindingMode: &c.mode}
		if c.name != "local" && g.chance(40) {
			class.AllowedTopologies = []v1.TopologySelectorTerm{{MatchLabelExpressions: []v1.TopologySelectorLabelRequirement{{Key: v1.LabelTopologyZone, Values: pick(g, []string{"east"}, []string{"west", "north"})}}}}
		}
		w.Storage.Classes = append(w.Storage.Classes, class)
		if c.name == "kept" {
			for _, zone := range []string{"east", "west"} {
				if g.chance(80) {
					w.Storage.Capacities = append(w.Storage.Capacities, &storagev1.CSIStorageCapacity{
						ObjectMeta: metav1.ObjectMeta{Namespace: "alpha", Name: "left-" + zone}, StorageClassName: c.name,
						NodeTopology: &metav1.LabelSelector{MatchLabels: map[string]string{v1.LabelTopologyZone: zone}},
						Capacity:     ptr.To(resource.MustParse(pick(g, "1Gi", "5Gi", "100Gi"))),
					})
				}
			}
		}
	}
	w.Storage.Drivers = []*storagev1.CSIDriver{
		{ObjectMeta: metav1.ObjectMeta{Name: driver}},
		{ObjectMeta: metav1.ObjectMeta{Name: keeper}, Spec: storagev1.CSIDriverSpec{StorageCapacity: ptr.To(true)}},
	}
	for _, n := range w.Nodes {
		if g.chance(70) {
			limit := storagev1.CSINodeDriver{Name: driver, NodeID: n.Name}
			if g.chance(60) {
				limit.Allocatable = &storagev1.VolumeNodeResources{Count: ptr.To(int32(g.IntN(3)))}
			}
			w.Storage.CSINodes = append(w.Storage.CSINodes, &storagev1.CSINode{ObjectMeta: metav1.ObjectMeta{Name: n.Name}, Spec: storagev1.CSINodeSpec{Drivers: []storagev1.CSINodeDriver{limit}}})
		}
	}
	for i := range 2 + g.IntN(7) {
		pv := g.volume(i)
		if g.chance(60) {
			claim := g.claim(fmt.Sprintf("bound-%d", i), pv.Spec.StorageClassName)
			claim.Spec.VolumeName, claim.Spec.AccessModes = pv.Name, pv.Spec.AccessModes
			claim.Annotations = map[string]string{"pv.kubernetes.io/bind-completed": "yes"}
			claim.Status.Phase, claim.Status.Capacity = v1.ClaimBound, pv.Spec.Capacity
			pv.Spec.ClaimRef = &v1.ObjectReference{Kind: "PersistentVolumeClaim", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID}
			pv.Status.Phase = v1.VolumeBound
		}
	}
	for _, class := range []string{"local", "local", "later", "kept", "now"} {
		if g.chance(60) {
			g.claim(g.name("open"), class)
		}
	}
}

func (g *gen) volume(i int) *v1.PersistentVolume {
	pv := &v1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("pv-%d", i), Labels: map[string]string{}}}
	pv.Spec.StorageClassName = pick(g, "local", "local", "later", "now")
	pv.Spec.Capacity = v1.ResourceList{v1.ResourceStorage: resource.MustParse(pick(g, "1Gi", "2Gi", "10Gi"))}
	pv.Spec.AccessModes = []v1.PersistentVolumeAccessMode{pick(g, v1.ReadWriteOnce, v1.ReadWriteOnce, v1.ReadWriteOncePod, v1.ReadOnlyMany)}
	pv.Spec.VolumeMode, pv.Status.Phase = ptr.To(v1.PersistentVolumeFilesystem), v1.VolumeAvailable
	require := func(key string, values ...string) {
		pv.Spec.NodeAffinity = &v1.VolumeNodeAffinity{Required: &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{{MatchExpressions: []v1.NodeSelectorRequirement{{Key: key, Operator: v1.NodeSelectorOpIn, Values: values}}}}}}
	}
	if pv.Spec.StorageClassName == "local" {
		pv.Spec.Local = &v1.LocalVolumeSource{Path: "/disk"}
		require(v1.LabelHostname, pick(g, g.w.Nodes...).Name)
	} else {
		pv.Spec.CSI = &v1.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: pv.Name}
		switch g.IntN(3) {
		case 0:
			require(v1.LabelTopologyZone, pick(g, "east", "west"))
		case 1:
			pv.Labels[v1.LabelTopologyZone] = pick(g, "east", "west__north")
		}
	}
	g.w.Storage.Volumes = append(g.w.Storage.Volumes, pv)
	return pv
}

func (g *gen) claim(name, class string) *v1.PersistentVolumeClaim {
	c := &v1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: pick(g, "alpha", "alpha", "beta"), Name: name, UID: types.UID("claim-" + name)}}
	c.Spec.StorageClassName, c.Spec.VolumeMode, c.Status.Phase = &class, ptr.To(v1.PersistentVolumeFilesystem), v1.ClaimPending
	c.Spec.AccessModes = []v1.PersistentVolumeAccessMode{pick(g, v1.ReadWriteOnce, v1.ReadWriteOnce, v1.ReadWriteOncePod)}
	c.Spec.Resources.Requests = v1.ResourceList{v1.ResourceStorage: resource.MustParse(pick(g, "1Gi", "2Gi", "8Gi"))}
	g.w.Storage.Claims = append(g.w.Storage.Claims, c)
	return c
}

// mount gives a pod volumes; one that is placed has only claims that are bound, as it could not have been placed else.
func (g *gen) mount(p *v1.Pod) {
	if !g.chance(45) {
		return
	}
	add := func(source v1.VolumeSource) {
		p.Spec.Volumes = append(p.Spec.Volumes, v1.Volume{Name: fmt.Sprintf("v%d", len(p.Spec.Volumes)), VolumeSource: source})
	}
	var usable []string
	for _, c := range g.w.Storage.Claims {
		if c.Namespace == p.Namespace && (p.Spec.NodeName == "" || c.Spec.VolumeName != "") {
			usable = append(usable, c.Name)
		}
	}
	used := map[string]bool{}
	for range pick(g, 1, 1, 2) {
		if len(usable) > 0 {
			if name := pick(g, usable...); !used[name] && !(p.Spec.NodeName != "" && g.taken(p.Namespace, name)) {
				used[name] = true
				add(v1.VolumeSource{PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{ClaimName: name}})
			}
		}
	}
	if p.Spec.NodeName == "" && g.chance(3) {
		add(v1.VolumeSource{PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{ClaimName: "missing"}})
	}
	if g.chance(15) {
		add(v1.VolumeSource{GCEPersistentDisk: &v1.GCEPersistentDiskVolumeSource{PDName: "disk", ReadOnly: g.chance(50)}})
	}
	if g.chance(10) {
		add(v1.VolumeSource{ISCSI: &v1.ISCSIVolumeSource{TargetPortal: "t", IQN: pick(g, "iqn.a", "iqn.b"), ReadOnly: g.chance(50)}})
	}
	if g.chance(10) {
		add(v1.VolumeSource{RBD: &v1.RBDVolumeSource{CephMonitors: []string{pick(g, "m1", "m2")}, RBDImage: "image", RBDPool: "pool", ReadOnly: g.chance(50)}})
	}
}

// taken is true of a claim for one pod alone that has its pod.
func (g *gen) taken(namespace, name string) bool {
	for _, c := range g.w.Storage.Claims {
		if c.Namespace != namespace || c.Name != name || c.Spec.AccessModes[0] != v1.ReadWriteOncePod {
			continue
		}
		for _, p := range g.w.Pods {
			for _, v := range p.Spec.Volumes {
				if p.Namespace == namespace && v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ClaimName == name {
					return true
				}
			}
		}
	}
	return false
}

// drop leaves claims bound to volumes that were cut away out, and the other way round, so that a smaller world stays sound.
func (s storage) drop() storage {
	kept, bound := labels.Set{}, labels.Set{}
	for _, v := range s.Volumes {
		kept[v.Name] = ""
	}
	out := s
	out.Claims = nil
	for _, c := range s.Claims {
		if c.Spec.VolumeName == "" || kept.Has(c.Spec.VolumeName) {
			out.Claims = append(out.Claims, c)
			bound[string(c.UID)] = ""
		}
	}
	out.Volumes = nil
	for _, v := range s.Volumes {
		if v.Spec.ClaimRef == nil || bound.Has(string(v.Spec.ClaimRef.UID)) {
			out.Volumes = append(out.Volumes, v)
		}
	}
	return out
}
