package placement

import (
	"fmt"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	volumehelpers "k8s.io/component-helpers/storage/volume"
)

func mkClaim(name, class, size string, edit ...func(*v1.PersistentVolumeClaim)) *v1.PersistentVolumeClaim {
	c := &v1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("claim-" + name), Annotations: map[string]string{}},
		Spec: v1.PersistentVolumeClaimSpec{
			StorageClassName: &class, AccessModes: []v1.PersistentVolumeAccessMode{v1.ReadWriteOnce},
			Resources: v1.VolumeResourceRequirements{Requests: v1.ResourceList{v1.ResourceStorage: resource.MustParse(size)}},
		},
		Status: v1.PersistentVolumeClaimStatus{Phase: v1.ClaimPending},
	}
	for _, fn := range edit {
		fn(c)
	}
	return c
}

func boundTo(volume string) func(*v1.PersistentVolumeClaim) {
	return func(c *v1.PersistentVolumeClaim) {
		c.Spec.VolumeName, c.Status.Phase = volume, v1.ClaimBound
		c.Annotations[volumehelpers.AnnBindCompleted] = "yes"
	}
}

func mkVolume(name, class, size string, edit ...func(*v1.PersistentVolume)) *v1.PersistentVolume {
	v := &v1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("volume-" + name), Labels: map[string]string{}},
		Spec: v1.PersistentVolumeSpec{
			StorageClassName: class, AccessModes: []v1.PersistentVolumeAccessMode{v1.ReadWriteOnce},
			Capacity: v1.ResourceList{v1.ResourceStorage: resource.MustParse(size)},
		},
		Status: v1.PersistentVolumeStatus{Phase: v1.VolumeAvailable},
	}
	for _, fn := range edit {
		fn(v)
	}
	return v
}

func onHosts(hosts ...string) func(*v1.PersistentVolume) {
	return onLabel(v1.LabelHostname, hosts...)
}

func onLabel(key string, values ...string) func(*v1.PersistentVolume) {
	return func(v *v1.PersistentVolume) {
		v.Spec.NodeAffinity = &v1.VolumeNodeAffinity{Required: &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{{
			MatchExpressions: []v1.NodeSelectorRequirement{{Key: key, Operator: v1.NodeSelectorOpIn, Values: values}},
		}}}}
	}
}

func csiVolume(driver, handle string) func(*v1.PersistentVolume) {
	return func(v *v1.PersistentVolume) {
		v.Spec.CSI = &v1.CSIPersistentVolumeSource{Driver: driver, VolumeHandle: handle}
	}
}

func mkClass(name, provisioner string, mode storagev1.VolumeBindingMode, edit ...func(*storagev1.StorageClass)) *storagev1.StorageClass {
	c := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: provisioner, VolumeBindingMode: &mode}
	for _, fn := range edit {
		fn(c)
	}
	return c
}

func usingClaims(names ...string) func(*v1.Pod) {
	return func(p *v1.Pod) {
		for _, name := range names {
			p.Spec.Volumes = append(p.Spec.Volumes, v1.Volume{Name: "v-" + name, VolumeSource: v1.VolumeSource{
				PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{ClaimName: name}}})
		}
	}
}

func withVolume(source v1.VolumeSource) func(*v1.Pod) {
	return func(p *v1.Pod) {
		p.Spec.Volumes = append(p.Spec.Volumes, v1.Volume{Name: fmt.Sprintf("v%d", len(p.Spec.Volumes)), VolumeSource: source})
	}
}

func csiLimit(node, driver string, limit int32) *storagev1.CSINode {
	return &storagev1.CSINode{ObjectMeta: metav1.ObjectMeta{Name: node}, Spec: storagev1.CSINodeSpec{
		Drivers: []storagev1.CSINodeDriver{{Name: driver, NodeID: node, Allocatable: &storagev1.VolumeNodeResources{Count: &limit}}}}}
}

// store puts objects of storage into the snapshot.
func store(s *Snapshot, objs ...any) *Snapshot {
	for _, obj := range objs {
		switch o := obj.(type) {
		case *v1.PersistentVolumeClaim:
			s.SetClaim(o)
		case *v1.PersistentVolume:
			s.SetVolume(o)
		case *storagev1.StorageClass:
			s.SetStorageClass(o)
		case *storagev1.CSINode:
			s.SetCSINode(o)
		case *storagev1.CSIDriver:
			s.SetCSIDriver(o)
		case *storagev1.CSIStorageCapacity:
			s.SetStorageCapacity(o)
		case *storagev1.VolumeAttachment:
			s.SetAttachment(o)
		default:
			panic(fmt.Sprintf("%T", obj))
		}
	}
	return s
}

const wait, immediate = storagev1.VolumeBindingWaitForFirstConsumer, storagev1.VolumeBindingImmediate

func TestVolumesDecideWhereAPodCanRun(t *testing.T) {
	yes := true
	ebs := v1.VolumeSource{AWSElasticBlockStore: &v1.AWSElasticBlockStoreVolumeSource{VolumeID: "vol"}}
	gce := func(ro bool) v1.VolumeSource {
		return v1.VolumeSource{GCEPersistentDisk: &v1.GCEPersistentDiskVolumeSource{PDName: "d", ReadOnly: ro}}
	}
	rbd := func(monitors ...string) v1.VolumeSource {
		return v1.VolumeSource{RBD: &v1.RBDVolumeSource{CephMonitors: monitors, RBDPool: "p", RBDImage: "i"}}
	}
	scratch := func(p *v1.Pod) {
		p.Spec.Volumes = append(p.Spec.Volumes, v1.Volume{Name: "scratch", VolumeSource: v1.VolumeSource{Ephemeral: &v1.EphemeralVolumeSource{}}})
	}
	owned := func(uid types.UID) func(*v1.PersistentVolumeClaim) {
		return func(c *v1.PersistentVolumeClaim) {
			c.OwnerReferences = []metav1.OwnerReference{{Kind: "Pod", Name: "p", UID: uid, Controller: &yes}}
		}
	}
	oncePod := func(c *v1.PersistentVolumeClaim) {
		c.Spec.AccessModes = []v1.PersistentVolumeAccessMode{v1.ReadWriteOncePod}
	}
	selected := func(node string) func(*v1.PersistentVolumeClaim) {
		return func(c *v1.PersistentVolumeClaim) { c.Annotations[volumehelpers.AnnSelectedNode] = node }
	}
	meantFor := func(claim string) func(*v1.PersistentVolume) {
		return func(v *v1.PersistentVolume) { v.Spec.ClaimRef = &v1.ObjectReference{Namespace: "default", Name: claim} }
	}
	capacityOn := func(host, size string) *storagev1.CSIStorageCapacity {
		q := resource.MustParse(size)
		return &storagev1.CSIStorageCapacity{ObjectMeta: metav1.ObjectMeta{Namespace: "x", Name: host}, StorageClassName: "dyn", Capacity: &q,
			NodeTopology: &metav1.LabelSelector{MatchLabels: map[string]string{v1.LabelHostname: host}}}
	}
	tracked := &storagev1.CSIDriver{ObjectMeta: metav1.ObjectMeta{Name: "csi.example"}, Spec: storagev1.CSIDriverSpec{StorageCapacity: &yes}}
	pvName := "pv1"
	attachment := &storagev1.VolumeAttachment{ObjectMeta: metav1.ObjectMeta{Name: "va"}, Spec: storagev1.VolumeAttachmentSpec{
		NodeName: "a", Attacher: "csi.example", Source: storagev1.VolumeAttachmentSource{PersistentVolumeName: &pvName}}}
	nodes := []*v1.Node{mkNode("a", "4", "8Gi", zone("z1")), mkNode("b", "4", "8Gi", zone("z2"))}
	everywhere := "a b"

	for name, tc := range map[string]struct {
		pod     func(*v1.Pod)
		objs    []any
		placed  []any
		want    string // the nodes that take it
		refusal string // part of the message if there are none
	}{
		"no claim of that name": {pod: usingClaims("c"), refusal: `0/2 nodes are available: persistentvolumeclaim "c" not found.`},
		"its ephemeral claim is not made yet": {pod: scratch,
			refusal: `waiting for ephemeral volume controller to create the persistentvolumeclaim "p-scratch".`},
		"an ephemeral claim of another pod": {pod: scratch, objs: []any{mkClaim("p-scratch", "dyn", "1Gi", owned("other"))},
			refusal: `PVC default/p-scratch was not created for pod default/p (pod is not owner).`},
		"its ephemeral claim": {pod: scratch, objs: []any{mkClaim("p-scratch", "dyn", "1Gi", owned("p")), mkClass("dyn", "csi.example", wait)}, want: everywhere},
		"a claim that is not bound, of a class that binds at once": {pod: usingClaims("c"),
			objs: []any{mkClaim("c", "now", "1Gi"), mkClass("now", "csi.example", immediate)}, refusal: "0/2 nodes are available: pod has unbound immediate PersistentVolumeClaims."},
		"a claim without a class": {pod: usingClaims("c"), objs: []any{mkClaim("c", "", "1Gi")}, refusal: "pod has unbound immediate PersistentVolumeClaims."},
		"a claim that asks for one volume by name, not bound yet": {pod: usingClaims("c"),
			objs:    []any{mkClaim("c", "local", "1Gi", func(c *v1.PersistentVolumeClaim) { c.Spec.VolumeName = "pv1" }), mkClass("local", volumehelpers.NotSupportedProvisioner, wait), mkVolume("pv1", "local", "1Gi")},
			refusal: "pod has unbound immediate PersistentVolumeClaims."},
		"a lost claim": {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1"), func(c *v1.PersistentVolumeClaim) { c.Status.Phase = v1.ClaimLost })},
			refusal: `persistentvolumeclaim "c" bound to non-existent persistentvolume "pv1".`},
		"a claim that goes": {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1"), func(c *v1.PersistentVolumeClaim) { c.DeletionTimestamp = &metav1.Time{} })},
			refusal: `persistentvolumeclaim "c" is being deleted.`},
		"bound to a volume that is gone": {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1"))}, refusal: `persistentvolume "pv1" not found.`},
		"bound to a volume on b":         {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1")), mkVolume("pv1", "x", "1Gi", onHosts("b"))}, want: "b"},
		"bound to a volume on a third node": {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1")), mkVolume("pv1", "x", "1Gi", onHosts("z"))},
			refusal: "0/2 nodes are available: 2 node(s) didn't match PersistentVolume's node affinity. no new claims to deallocate, preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling."},
		"bound to a volume that any node reaches": {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1")), mkVolume("pv1", "x", "1Gi")}, want: everywhere},

		"a free volume on b": {pod: usingClaims("c"), objs: []any{mkClaim("c", "local", "1Gi"), mkClass("local", volumehelpers.NotSupportedProvisioner, wait), mkVolume("pv1", "local", "1Gi", onHosts("b"))}, want: "b"},
		"a free volume in a zone": {pod: usingClaims("c"),
			objs: []any{mkClaim("c", "local", "1Gi"), mkClass("local", volumehelpers.NotSupportedProvisioner, wait), mkVolume("pv1", "local", "1Gi", onLabel(v1.LabelTopologyZone, "z1"))}, want: "a"},
		"no volume is free, large enough, of the mode, or selected": {pod: usingClaims("c"), objs: []any{
			mkClass("local", volumehelpers.NotSupportedProvisioner, wait),
			mkClaim("c", "local", "2Gi", func(c *v1.PersistentVolumeClaim) { c.Spec.Selector = selectorOf("disk", "fast") }),
			mkVolume("small", "local", "1Gi", func(v *v1.PersistentVolume) { v.Labels["disk"] = "fast" }),
			mkVolume("slow", "local", "2Gi"),
			mkVolume("taken", "local", "2Gi", func(v *v1.PersistentVolume) { v.Labels["disk"] = "fast" }, meantFor("other")),
			mkVolume("released", "local", "2Gi", func(v *v1.PersistentVolume) { v.Labels["disk"], v.Status.Phase = "fast", v1.VolumeReleased }),
			mkVolume("block", "local", "2Gi", func(v *v1.PersistentVolume) {
				mode := v1.PersistentVolumeBlock
				v.Labels["disk"], v.Spec.VolumeMode = "fast", &mode
			}),
			mkVolume("shared", "local", "2Gi", func(v *v1.PersistentVolume) {
				v.Labels["disk"], v.Spec.AccessModes = "fast", []v1.PersistentVolumeAccessMode{v1.ReadOnlyMany}
			}),
			mkVolume("elsewhere", "other", "2Gi", func(v *v1.PersistentVolume) { v.Labels["disk"] = "fast" }),
			mkVolume("going", "local", "2Gi", func(v *v1.PersistentVolume) { v.Labels["disk"], v.DeletionTimestamp = "fast", &metav1.Time{} }),
			mkVolume("attributes", "local", "2Gi", func(v *v1.PersistentVolume) {
				class := "gold"
				v.Labels["disk"], v.Spec.VolumeAttributesClassName = "fast", &class
			}),
		}, refusal: "0/2 nodes are available: 2 node(s) didn't find available persistent volumes to bind."},
		"a volume that is meant for the claim goes before a better one": {pod: usingClaims("c"), objs: []any{mkClaim("c", "local", "1Gi"), mkClass("local", volumehelpers.NotSupportedProvisioner, wait),
			mkVolume("exact", "local", "1Gi", onHosts("a")), mkVolume("mine", "local", "5Gi", onHosts("b"), meantFor("c"))}, want: "b"},
		"two claims, one volume on each node": {pod: usingClaims("c", "d"), objs: []any{mkClaim("c", "local", "1Gi"), mkClaim("d", "local", "1Gi"), mkClass("local", volumehelpers.NotSupportedProvisioner, wait),
			mkVolume("pv1", "local", "1Gi", onHosts("a")), mkVolume("pv2", "local", "1Gi", onHosts("b"))}, refusal: "2 node(s) didn't find available persistent volumes to bind."},
		"two claims, the small one must not take the large volume": {pod: usingClaims("big", "c"), objs: []any{mkClaim("c", "local", "1Gi"), mkClaim("big", "local", "5Gi"), mkClass("local", volumehelpers.NotSupportedProvisioner, wait),
			mkVolume("pv1", "local", "5Gi", onHosts("a")), mkVolume("pv2", "local", "1Gi", onHosts("a"))}, want: "a"},
		"provisioned anywhere": {pod: usingClaims("c"), objs: []any{mkClaim("c", "dyn", "1Gi"), mkClass("dyn", "csi.example", wait)}, want: everywhere},
		"provisioned where the class allows it": {pod: usingClaims("c"), objs: []any{mkClaim("c", "dyn", "1Gi"), mkClass("dyn", "csi.example", wait, func(c *storagev1.StorageClass) {
			c.AllowedTopologies = []v1.TopologySelectorTerm{{MatchLabelExpressions: []v1.TopologySelectorLabelRequirement{{Key: v1.LabelTopologyZone, Values: []string{"z2", "z3"}}}}}
		})}, want: "b"},
		"a node is selected already": {pod: usingClaims("c"), objs: []any{mkClaim("c", "dyn", "1Gi", selected("b")), mkClass("dyn", "csi.example", wait)}, want: "b"},
		"two nodes are selected": {pod: usingClaims("c", "d"), objs: []any{mkClaim("c", "dyn", "1Gi", selected("a")), mkClaim("d", "dyn", "1Gi", selected("b")), mkClass("dyn", "csi.example", wait)},
			refusal: "2 node(s) didn't find available persistent volumes to bind."},
		"room on one node only": {pod: usingClaims("c"), objs: []any{mkClaim("c", "dyn", "2Gi"), mkClass("dyn", "csi.example", wait), tracked, capacityOn("a", "1Gi"), capacityOn("b", "2Gi")}, want: "b"},
		"no room": {pod: usingClaims("c"), objs: []any{mkClaim("c", "dyn", "2Gi"), mkClass("dyn", "csi.example", wait), tracked, capacityOn("a", "1Gi")},
			refusal: "2 node(s) did not have enough free storage."},
		"an ephemeral volume bound to a volume that is gone": {pod: scratch, objs: []any{mkClaim("p-scratch", "dyn", "1Gi", owned("p"), boundTo("gone"))},
			refusal: "2 node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)."},

		"a volume in a zone":                   {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1")), mkVolume("pv1", "x", "1Gi", func(v *v1.PersistentVolume) { v.Labels[v1.LabelTopologyZone] = "z0__z2" })}, want: "b"},
		"a volume in a zone, by the old label": {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1")), mkVolume("pv1", "x", "1Gi", func(v *v1.PersistentVolume) { v.Labels[v1.LabelFailureDomainBetaZone] = "z1" })}, want: "a"},
		"a volume in a zone without nodes": {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1")), mkVolume("pv1", "x", "1Gi", func(v *v1.PersistentVolume) { v.Labels[v1.LabelTopologyZone] = "z9" })},
			refusal: "2 node(s) had no available volume zone."},

		"a claim for one pod that another uses": {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1"), oncePod), mkVolume("pv1", "x", "1Gi")},
			placed: []any{mkPod("other", "1", "1Gi", usingClaims("c")), "a"}, refusal: "0/2 nodes are available: 2 node(s) unavailable due to PersistentVolumeClaim with ReadWriteOncePod access mode already in-use by another pod."},
		"a claim that two pods may use": {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1")), mkVolume("pv1", "x", "1Gi")},
			placed: []any{mkPod("other", "1", "1Gi", usingClaims("c")), "a"}, want: everywhere},
		"an EBS volume is in use on a":     {pod: withVolume(ebs), placed: []any{mkPod("other", "1", "1Gi", withVolume(ebs)), "a"}, want: "b"},
		"a GCE disk read-only by both":     {pod: withVolume(gce(true)), placed: []any{mkPod("other", "1", "1Gi", withVolume(gce(true))), "a"}, want: everywhere},
		"a GCE disk read-only by one":      {pod: withVolume(gce(true)), placed: []any{mkPod("other", "1", "1Gi", withVolume(gce(false))), "a"}, want: "b"},
		"an RBD image, one monitor shared": {pod: withVolume(rbd("m1", "m2")), placed: []any{mkPod("other", "1", "1Gi", withVolume(rbd("m2", "m3"))), "a"}, want: "b"},
		"an RBD image, other monitors":     {pod: withVolume(rbd("m1")), placed: []any{mkPod("other", "1", "1Gi", withVolume(rbd("m2"))), "a"}, want: everywhere},

		"a node's driver is full": {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1")), mkVolume("pv1", "x", "1Gi", csiVolume("csi.example", "1")),
			mkClaim("d", "x", "1Gi", boundTo("pv2")), mkVolume("pv2", "x", "1Gi", csiVolume("csi.example", "2")), csiLimit("a", "csi.example", 1)},
			placed: []any{mkPod("other", "1", "1Gi", usingClaims("d")), "a"}, want: "b"},
		"a full driver, but the volume is there": {pod: usingClaims("d"), objs: []any{mkClaim("d", "x", "1Gi", boundTo("pv2")), mkVolume("pv2", "x", "1Gi", csiVolume("csi.example", "2")), csiLimit("a", "csi.example", 1)},
			placed: []any{mkPod("other", "1", "1Gi", usingClaims("d")), "a"}, want: everywhere},
		"a driver full of volumes that no pod uses any more": {pod: usingClaims("c"), objs: []any{mkClaim("c", "dyn", "1Gi"), mkClass("dyn", "csi.example", wait),
			mkVolume("pv1", "x", "1Gi", csiVolume("csi.example", "1")), csiLimit("a", "csi.example", 1), attachment}, want: "b"},
		"volumes of another driver": {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1")), mkVolume("pv1", "x", "1Gi", csiVolume("csi.other", "1")), csiLimit("a", "csi.example", 0)}, want: everywhere},
		"no room for volumes anywhere": {pod: usingClaims("c"), objs: []any{mkClaim("c", "x", "1Gi", boundTo("pv1")), mkVolume("pv1", "x", "1Gi", csiVolume("csi.example", "1")), csiLimit("a", "csi.example", 0), csiLimit("b", "csi.example", 0)},
			refusal: "0/2 nodes are available: 2 node(s) exceed max volume count."},
		"no volume that matters": {pod: withVolume(v1.VolumeSource{EmptyDir: &v1.EmptyDirVolumeSource{}}), want: everywhere},
	} {
		t.Run(name, func(t *testing.T) {
			s := store(cluster(nodes, tc.placed...), tc.objs...)
			pod := mkPod("p", "1", "1Gi", tc.pod)
			all, err := s.Explain(Request{Pod: pod})
			if err != nil {
				t.Fatal(err)
			}
			var takes []string
			for _, e := range all {
				if e.Filter == "" {
					takes = append(takes, e.Node)
				}
			}
			if got := strings.Join(takes, " "); got != tc.want {
				t.Errorf("taken by %q, want %q", got, tc.want)
			}
			d := place(t, s, pod)
			if tc.refusal != "" && (d.Refusal == nil || !strings.Contains(d.Refusal.Error(), tc.refusal)) {
				t.Errorf("refusal %v, want %s", d.Refusal, tc.refusal)
			}
		})
	}
}

// Two pods decided one after the other must not get the same volume, and what
// is taken back is free again.
func TestDecidedVolumesAreTaken(t *testing.T) {
	s := store(cluster([]*v1.Node{mkNode("a", "4", "8Gi")}), mkClass("local", volumehelpers.NotSupportedProvisioner, wait), mkClass("dyn", "csi.example", wait),
		mkVolume("pv1", "local", "1Gi", onHosts("a")), mkVolume("pv2", "local", "2Gi"), mkClaim("c1", "local", "1Gi"), mkClaim("c2", "local", "1Gi"), mkClaim("c3", "local", "1Gi"), mkClaim("d", "dyn", "1Gi"))
	bind := func(pod *v1.Pod) *VolumeBindings {
		t.Helper()
		if d := place(t, s, pod); d.Node != "a" {
			t.Fatalf("%s: %v", pod.Name, d.Refusal)
		}
		b, err := s.VolumeBindings(Request{Pod: pod}, "a")
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	first := bind(mkPod("p1", "1", "1Gi", usingClaims("c1")))
	if len(first.Static) != 1 || first.Static[0].Volume.Name != "pv1" || !first.Static[0].Changed || first.Static[0].Volume.Spec.ClaimRef.UID != "claim-c1" {
		t.Fatalf("the smallest that fits: %+v", first)
	}
	second := bind(mkPod("p2", "1", "1Gi", usingClaims("c2", "d")))
	if second.Static[0].Volume.Name != "pv2" || len(second.Provision) != 1 || second.Provision[0].Annotations[volumehelpers.AnnSelectedNode] != "a" {
		t.Fatalf("the next one: %+v", second)
	}
	third := mkPod("p3", "1", "1Gi", usingClaims("c3"))
	if d := place(t, s, third); d.Refusal == nil || !d.Refusal.Filters[VolumeBinding] {
		t.Fatalf("both volumes are taken: %+v", d)
	}
	s.ForgetVolumes(first)
	if b := bind(third); b.Static[0].Volume.Name != "pv1" {
		t.Fatalf("given back: %+v", b)
	}
	// The API's news win over what was assumed.
	s.SetVolume(mkVolume("pv2", "local", "2Gi"))
	if b := bind(mkPod("p4", "1", "1Gi", usingClaims("c2"))); b.Static[0].Volume.Name != "pv2" {
		t.Fatalf("the API shows it free: %+v", b)
	}
	bound := mkClaim("c1", "local", "1Gi", boundTo("pv1"))
	s.SetClaim(bound)
	if b, err := s.VolumeBindings(Request{Pod: mkPod("p1", "1", "1Gi", usingClaims("c1"))}, "a"); b != nil || err != nil {
		t.Fatalf("nothing to do for bound claims: %+v, %v", b, err)
	}
}

// A pod of higher priority may take a claim from the one that uses it alone.
func TestPreemptionFreesAClaimForOnePod(t *testing.T) {
	s := store(cluster([]*v1.Node{mkNode("a", "4", "8Gi"), mkNode("b", "4", "8Gi")}, mkPod("low", "1", "1Gi", usingClaims("c"), withPriority(1)), "b"),
		mkClaim("c", "x", "1Gi", boundTo("pv1"), func(c *v1.PersistentVolumeClaim) {
			c.Spec.AccessModes = []v1.PersistentVolumeAccessMode{v1.ReadWriteOncePod}
		}), mkVolume("pv1", "x", "1Gi"))
	d := place(t, s, mkPod("high", "1", "1Gi", usingClaims("c"), withPriority(10)))
	if d.Preempt == nil || d.Preempt.Node != "b" || len(d.Preempt.Victims) != 1 || d.Preempt.Victims[0].Name != "low" {
		t.Fatalf("%+v, %v", d.Preempt, d.Refusal)
	}
}
