package persistentvolume

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	volumehelpers "k8s.io/component-helpers/storage/volume"

	"skein.io/skein/scheduler/controller/controllertest"
)

func claim(name, class, size string, edit ...func(*corev1.PersistentVolumeClaim)) *corev1.PersistentVolumeClaim {
	c := &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID("claim-" + name), ResourceVersion: "1"},
		Spec: corev1.PersistentVolumeClaimSpec{StorageClassName: &class, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(size)}}},
		Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimPending},
	}
	for _, fn := range edit {
		fn(c)
	}
	return c
}

func volume(name, class, size string, edit ...func(*corev1.PersistentVolume)) *corev1.PersistentVolume {
	v := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("volume-" + name), ResourceVersion: "1"},
		Spec: corev1.PersistentVolumeSpec{StorageClassName: class, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(size)},
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
			PersistentVolumeSource:        corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/data"}}},
		Status: corev1.PersistentVolumeStatus{Phase: corev1.VolumeAvailable},
	}
	for _, fn := range edit {
		fn(v)
	}
	return v
}

func class(name, provisioner string, mode storagev1.VolumeBindingMode, edit ...func(*storagev1.StorageClass)) *storagev1.StorageClass {
	c := &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: "1"}, Provisioner: provisioner, VolumeBindingMode: &mode}
	for _, fn := range edit {
		fn(c)
	}
	return c
}

// Edits of claims.
func asking(volume string) func(*corev1.PersistentVolumeClaim) {
	return func(c *corev1.PersistentVolumeClaim) { c.Spec.VolumeName = volume }
}

func bound(volume string) func(*corev1.PersistentVolumeClaim) {
	return func(c *corev1.PersistentVolumeClaim) {
		c.Spec.VolumeName, c.Status.Phase = volume, corev1.ClaimBound
		metav1.SetMetaDataAnnotation(&c.ObjectMeta, volumehelpers.AnnBindCompleted, "yes")
	}
}

func noted(key, value string) func(*corev1.PersistentVolumeClaim) {
	return func(c *corev1.PersistentVolumeClaim) { metav1.SetMetaDataAnnotation(&c.ObjectMeta, key, value) }
}

// Edits of volumes.
func named(claim string, uid types.UID) func(*corev1.PersistentVolume) {
	return func(v *corev1.PersistentVolume) {
		v.Spec.ClaimRef = &corev1.ObjectReference{Kind: "PersistentVolumeClaim", APIVersion: "v1", Namespace: "ns", Name: claim, UID: uid}
	}
}

func marked(key, value string) func(*corev1.PersistentVolume) {
	return func(v *corev1.PersistentVolume) { metav1.SetMetaDataAnnotation(&v.ObjectMeta, key, value) }
}

func reclaim(policy corev1.PersistentVolumeReclaimPolicy) func(*corev1.PersistentVolume) {
	return func(v *corev1.PersistentVolume) { v.Spec.PersistentVolumeReclaimPolicy = policy }
}

func modes(m ...corev1.PersistentVolumeAccessMode) func(*corev1.PersistentVolume) {
	return func(v *corev1.PersistentVolume) { v.Spec.AccessModes = m }
}

const wait, immediate = storagev1.VolumeBindingWaitForFirstConsumer, storagev1.VolumeBindingImmediate

// picture tells the state of all claims and volumes, a line for each.
func picture(t *testing.T, client *fake.Clientset) string {
	t.Helper()
	var lines []string
	claims, err := client.CoreV1().PersistentVolumeClaims("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range claims.Items {
		line := fmt.Sprintf("claim %s %s", c.Name, c.Status.Phase)
		if c.Spec.VolumeName != "" {
			line += " " + c.Spec.VolumeName
		}
		if q, ok := c.Status.Capacity[corev1.ResourceStorage]; ok {
			line += " has " + q.String()
		}
		lines = append(lines, line+notes(c.Annotations))
	}
	volumes, err := client.CoreV1().PersistentVolumes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range volumes.Items {
		line := fmt.Sprintf("volume %s %s", v.Name, v.Status.Phase)
		if ref := v.Spec.ClaimRef; ref != nil {
			line += fmt.Sprintf(" of %s(%s)", ref.Name, ref.UID)
		}
		lines = append(lines, line+notes(v.Annotations))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// notes are the annotations, shortened.
func notes(annotations map[string]string) string {
	var out []string
	for key, value := range annotations {
		key = key[strings.LastIndexByte(key, '/')+1:]
		if value != "yes" {
			key += "=" + value
		}
		out = append(out, key)
	}
	slices.Sort(out)
	if len(out) == 0 {
		return ""
	}
	return " [" + strings.Join(slices.Compact(out), " ") + "]"
}

func TestBinding(t *testing.T) {
	block := corev1.PersistentVolumeBlock
	for name, tc := range map[string]struct {
		objs   []runtime.Object
		want   string
		events string // part of them; "" none
	}{
		"the smallest volume that fits": {
			objs: []runtime.Object{claim("c", "x", "1Gi"), volume("v1", "x", "5Gi"), volume("v2", "x", "2Gi"), volume("v3", "x", "512Mi"), volume("v4", "y", "1Gi")},
			want: "claim c Bound v2 has 2Gi [bind-completed bound-by-controller]\nvolume v1 Available\nvolume v2 Bound of c(claim-c) [bound-by-controller]\nvolume v3 Available\nvolume v4 Available",
		},
		"a new volume becomes available": {
			objs: []runtime.Object{volume("v1", "x", "1Gi", func(v *corev1.PersistentVolume) { v.Status.Phase = corev1.VolumePending })},
			want: "volume v1 Available",
		},
		"the fewest access modes go before the size": {
			objs: []runtime.Object{claim("c", "x", "1Gi"), volume("v1", "x", "1Gi", modes(corev1.ReadWriteOnce, corev1.ReadWriteMany)), volume("v2", "x", "9Gi"), volume("v3", "x", "1Gi", modes(corev1.ReadOnlyMany))},
			want: "claim c Bound v2 has 9Gi [bind-completed bound-by-controller]\nvolume v1 Available\nvolume v2 Bound of c(claim-c) [bound-by-controller]\nvolume v3 Available",
		},
		"a volume that names the claim goes before all": {
			objs: []runtime.Object{claim("c", "x", "1Gi"), volume("v1", "x", "1Gi"), volume("v2", "x", "9Gi", modes(corev1.ReadWriteOnce, corev1.ReadWriteMany), named("c", ""))},
			want: "claim c Bound v2 has 9Gi [bind-completed bound-by-controller]\nvolume v1 Available\nvolume v2 Bound of c(claim-c)",
		},
		"a volume for somebody else": {
			objs:   []runtime.Object{claim("c", "x", "1Gi"), class("x", "csi.example", immediate), volume("v1", "x", "1Gi", named("other", ""))},
			want:   "claim c Pending [storage-provisioner=csi.example]\nvolume v1 Available of other()",
			events: "Normal ExternalProvisioning Waiting for a volume to be created either by the external provisioner 'csi.example'",
		},
		"of two claims one gets the volume": {
			objs:   []runtime.Object{claim("c1", "", "1Gi", noted("n", "1")), claim("c2", "", "3Gi"), volume("v1", "", "2Gi")},
			want:   "claim c1 Bound v1 has 2Gi [bind-completed bound-by-controller n=1]\nclaim c2 Pending\nvolume v1 Bound of c1(claim-c1) [bound-by-controller]",
			events: "Normal FailedBinding no persistent volumes available for this claim and no storage class is set",
		},
		"other mode, labels or attributes": {
			objs: []runtime.Object{
				claim("c", "x", "1Gi", func(c *corev1.PersistentVolumeClaim) {
					c.Spec.Selector = &metav1.LabelSelector{MatchLabels: map[string]string{"disk": "fast"}}
				}),
				volume("v1", "x", "1Gi"),
				volume("v2", "x", "1Gi", func(v *corev1.PersistentVolume) {
					v.Labels, v.Spec.VolumeMode = map[string]string{"disk": "fast"}, &block
				}),
				volume("v3", "x", "1Gi", func(v *corev1.PersistentVolume) {
					gold := "gold"
					v.Labels, v.Spec.VolumeAttributesClassName = map[string]string{"disk": "fast"}, &gold
				})},
			want:   "claim c Pending\nvolume v1 Available\nvolume v2 Available\nvolume v3 Available",
			events: `Warning ProvisioningFailed storageclass.storage.k8s.io "x" not found`,
		},
		"the volume that the claim asks for": {
			objs: []runtime.Object{claim("c", "x", "1Gi", asking("v2")), volume("v1", "x", "1Gi"), volume("v2", "x", "2Gi")},
			want: "claim c Bound v2 has 2Gi [bind-completed]\nvolume v1 Available\nvolume v2 Bound of c(claim-c) [bound-by-controller]",
		},
		"both name each other": {
			objs: []runtime.Object{claim("c", "x", "1Gi", asking("v1")), volume("v1", "x", "1Gi", named("c", ""))},
			want: "claim c Bound v1 has 1Gi [bind-completed]\nvolume v1 Bound of c(claim-c)",
		},
		"the volume that the claim asks for is too small": {
			objs:   []runtime.Object{claim("c", "x", "2Gi", asking("v1")), volume("v1", "x", "1Gi")},
			want:   "claim c Pending v1\nvolume v1 Available",
			events: `Warning VolumeMismatch Cannot bind to requested volume "v1": requested PV is too small`,
		},
		"the volume that the claim asks for is of another class": {
			objs:   []runtime.Object{claim("c", "x", "1Gi", asking("v1")), volume("v1", "y", "1Gi")},
			want:   "claim c Pending v1\nvolume v1 Available",
			events: `Cannot bind to requested volume "v1": storageClassName does not match`,
		},
		"the volume that the claim asks for belongs to another": {
			objs:   []runtime.Object{claim("c", "x", "1Gi", asking("v1")), claim("other", "x", "1Gi", bound("v1")), volume("v1", "x", "1Gi", named("other", "claim-other"))},
			want:   "claim c Pending v1\nclaim other Bound v1 [bind-completed]\nvolume v1 Bound of other(claim-other)",
			events: `Warning FailedBinding volume "v1" already bound to a different claim.`,
		},
		"the volume that the claim asks for is not there": {
			objs: []runtime.Object{claim("c", "x", "1Gi", asking("v1"))},
			want: "claim c Pending v1",
		},
		"a bound claim without its volume is lost": {
			objs:   []runtime.Object{claim("c", "x", "1Gi", bound("v1"))},
			want:   "claim c Lost v1 [bind-completed]",
			events: "Warning ClaimLost Bound claim has lost its PersistentVolume. Data on the volume is lost!",
		},
		"a bound claim that names no volume any more is lost": {
			objs:   []runtime.Object{claim("c", "x", "1Gi", bound(""))},
			want:   "claim c Lost [bind-completed]",
			events: "Warning ClaimLost Bound claim has lost reference to PersistentVolume. Data on the volume is lost!",
		},
		"two claims of one volume": {
			objs:   []runtime.Object{claim("c", "x", "1Gi", bound("v1")), claim("d", "x", "1Gi", bound("v1")), volume("v1", "x", "1Gi", named("d", "claim-d"))},
			want:   "claim c Lost v1 [bind-completed]\nclaim d Bound v1 [bind-completed]\nvolume v1 Bound of d(claim-d)",
			events: "Warning ClaimMisbound Two claims are bound to the same volume, this one is bound incorrectly",
		},
		"a bound claim whose volume forgot it": {
			objs: []runtime.Object{claim("c", "x", "1Gi", bound("v1")), volume("v1", "x", "1Gi")},
			want: "claim c Bound v1 [bind-completed]\nvolume v1 Bound of c(claim-c) [bound-by-controller]",
		},
		"a claim that placement gave a volume": {
			objs: []runtime.Object{claim("c", "local", "1Gi"), class("local", volumehelpers.NotSupportedProvisioner, wait), volume("v1", "local", "2Gi", named("c", "claim-c"), marked(volumehelpers.AnnBoundByController, "yes")), volume("v2", "local", "1Gi")},
			want: "claim c Bound v1 has 2Gi [bind-completed bound-by-controller]\nvolume v1 Bound of c(claim-c) [bound-by-controller]\nvolume v2 Available",
		},
		"a claim that waits for its first consumer": {
			objs:   []runtime.Object{claim("c", "local", "1Gi"), class("local", volumehelpers.NotSupportedProvisioner, wait), volume("v1", "local", "1Gi")},
			want:   "claim c Pending\nvolume v1 Available",
			events: "Normal WaitForFirstConsumer waiting for first consumer to be created before binding",
		},
		"a claim whose consumer has a node": {
			objs:   []runtime.Object{claim("c", "dyn", "1Gi", noted(volumehelpers.AnnSelectedNode, "n1")), class("dyn", "csi.example", wait)},
			want:   "claim c Pending [selected-node=n1 storage-provisioner=csi.example]",
			events: "ExternalProvisioning",
		},
		"a provisioner that a driver took over from": {
			objs:   []runtime.Object{claim("c", "ebs", "1Gi"), class("ebs", "kubernetes.io/aws-ebs", immediate)},
			want:   "claim c Pending [storage-provisioner=ebs.csi.aws.com]",
			events: "external provisioner 'ebs.csi.aws.com'",
		},
		"a class that provisions nothing": {
			objs:   []runtime.Object{claim("c", "none", "1Gi"), class("none", volumehelpers.NotSupportedProvisioner, immediate)},
			want:   "claim c Pending",
			events: "Warning ProvisioningFailed no volume plugin matched name: kubernetes.io/no-provisioner",
		},
		"a volume of the wrong mode that names the claim": {
			objs:   []runtime.Object{claim("c", "", "1Gi"), volume("v1", "", "1Gi", named("c", "claim-c"), func(v *corev1.PersistentVolume) { v.Spec.VolumeMode = &block })},
			want:   "claim c Pending\nvolume v1 Available of c(claim-c)", // the phase of the volume is left, as upstream
			events: `Cannot bind PersistentVolume to requested PersistentVolumeClaim "c" due to incompatible volumeMode.`,
		},
		"kept when its claim is gone": {
			objs: []runtime.Object{volume("v1", "x", "1Gi", named("c", "gone"))},
			want: "volume v1 Released of c(gone)",
		},
		"left to its provisioner when its claim is gone": {
			objs: []runtime.Object{volume("v1", "x", "1Gi", named("c", "gone"), reclaim(corev1.PersistentVolumeReclaimDelete), marked(volumehelpers.AnnDynamicallyProvisioned, "csi.example"))},
			want: "volume v1 Released of c(gone) [provisioned-by=csi.example]",
		},
		"nobody deletes it": {
			objs:   []runtime.Object{volume("v1", "x", "1Gi", named("c", "gone"), reclaim(corev1.PersistentVolumeReclaimDelete))},
			want:   "volume v1 Failed of c(gone)",
			events: `Warning VolumeFailedDelete error getting deleter volume plugin for volume "v1": no deletable volume plugin matched`,
		},
		"nobody recycles it": {
			objs:   []runtime.Object{volume("v1", "x", "1Gi", named("c", "gone"), reclaim(corev1.PersistentVolumeReclaimRecycle))},
			want:   "volume v1 Failed of c(gone)",
			events: "Warning VolumeFailedRecycle No recycler plugin found for the volume!",
		},
		"its claim was made anew": {
			objs:   []runtime.Object{claim("c", "", "1Gi"), volume("v1", "", "1Gi", named("c", "earlier"))},
			want:   "claim c Pending\nvolume v1 Released of c(earlier)",
			events: "FailedBinding",
		},
		"its claim has another volume": {
			objs: []runtime.Object{claim("c", "x", "1Gi", bound("v2")), volume("v1", "x", "1Gi", named("c", "claim-c"), marked(volumehelpers.AnnBoundByController, "yes")), volume("v2", "x", "1Gi", named("c", "claim-c"))},
			want: "claim c Bound v2 [bind-completed]\nvolume v1 Available\nvolume v2 Bound of c(claim-c)",
		},
		"its claim has another volume, and it was meant for it": {
			objs: []runtime.Object{claim("c", "x", "1Gi", bound("v2")), volume("v1", "x", "1Gi", named("c", "claim-c")), volume("v2", "x", "1Gi", named("c", "claim-c"))},
			want: "claim c Bound v2 [bind-completed]\nvolume v1 Available of c()\nvolume v2 Bound of c(claim-c)",
		},
		"provisioned for a claim that has another volume": {
			objs: []runtime.Object{claim("c", "x", "1Gi", bound("v2")), volume("v2", "x", "1Gi", named("c", "claim-c")),
				volume("v1", "x", "1Gi", named("c", "claim-c"), marked(volumehelpers.AnnDynamicallyProvisioned, "csi.example"), reclaim(corev1.PersistentVolumeReclaimDelete))},
			want: "claim c Bound v2 [bind-completed]\nvolume v1 Released of c(claim-c) [provisioned-by=csi.example]\nvolume v2 Bound of c(claim-c)",
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := controllertest.NewClient(tc.objs...)
				rec := controllertest.Start(t, client, nil, New)
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if got := picture(t, client); got != tc.want {
					t.Errorf("got\n%s\nwant\n%s", got, tc.want)
				}
				events := strings.Join(controllertest.Events(rec), "\n")
				if !strings.Contains(events, tc.events) || tc.events == "" && events != "" {
					t.Errorf("events\n%s\nwant\n%s", events, tc.events)
				}
				client.ClearActions()
				time.Sleep(time.Hour)
				synctest.Wait()
				if a := client.Actions(); len(a) != 0 {
					t.Errorf("requests while nothing changes: %v", a)
				}
				if e := controllertest.Events(rec); len(e) != 0 {
					t.Errorf("events while nothing changes: %v", e)
				}
			})
		})
	}
}

// What changes wakes exactly those who wait for it.
func TestWaitingClaimsAreWoken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		plain := claim("plain", "", "1Gi")
		plain.Spec.StorageClassName = nil
		client := controllertest.NewClient(claim("c", "x", "1Gi"), claim("d", "x", "1Gi"), claim("late", "late", "1Gi"), plain, claim("asks", "z", "1Gi", asking("v9")),
			claim("waits", "wait", "1Gi"), class("wait", "csi.example", wait))
		core := client.CoreV1()
		rec := controllertest.Start(t, client, nil, New)
		check := func(what, want string) {
			t.Helper()
			time.Sleep(time.Second)
			synctest.Wait()
			if got := picture(t, client); !strings.Contains(got, want) {
				t.Errorf("%s:\n%s\nlacks\n%s", what, got, want)
			}
		}
		must := func(err error) {
			t.Helper()
			if err != nil {
				t.Fatal(err)
			}
		}
		check("at first", "claim c Pending\nclaim d Pending\nclaim late Pending\nclaim plain Pending\nclaim waits Pending")
		_, err := core.PersistentVolumes().Create(ctx, volume("v1", "x", "1Gi"), metav1.CreateOptions{})
		must(err)
		check("a volume came", "volume v1 Bound of ")
		_, err = core.PersistentVolumes().Create(ctx, volume("v2", "x", "1Gi"), metav1.CreateOptions{})
		must(err)
		check("a second one", "volume v2 Bound of ")
		_, err = core.PersistentVolumes().Create(ctx, volume("v9", "z", "1Gi"), metav1.CreateOptions{})
		must(err)
		check("the volume that a claim asked for", "claim asks Bound v9")
		_, err = client.StorageV1().StorageClasses().Create(ctx, class("late", "csi.example", immediate), metav1.CreateOptions{})
		must(err)
		check("its class came", "claim late Pending [storage-provisioner=csi.example]")
		_, err = client.StorageV1().StorageClasses().Create(ctx, class("standard", "csi.standard", immediate, func(c *storagev1.StorageClass) {
			c.Annotations = map[string]string{annDefault: "true"}
		}), metav1.CreateOptions{})
		must(err)
		check("a default class came", "claim plain Pending [storage-provisioner=csi.standard]")
		if c, err := core.PersistentVolumeClaims("ns").Get(ctx, "plain", metav1.GetOptions{}); err != nil || deref(c.Spec.StorageClassName) != "standard" {
			t.Errorf("%v, %v", c.Spec.StorageClassName, err)
		}
		controllertest.Events(rec)
		_, err = core.Pods("ns").Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Spec: corev1.PodSpec{Volumes: []corev1.Volume{{Name: "v",
			VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "waits"}}}}}}, metav1.CreateOptions{})
		must(err)
		check("its consumer came", "claim waits Pending")
		if got := strings.Join(controllertest.Events(rec), "\n"); got != "Normal WaitForPodScheduled waiting for pod p to be scheduled" {
			t.Errorf("events of a claim with a consumer: %s", got)
		}

		// The claim goes: its volume is released, and the next claim does not get it.
		must(core.PersistentVolumeClaims("ns").Delete(ctx, "asks", metav1.DeleteOptions{}))
		check("a claim went", "volume v9 Released of asks(claim-asks)")
		// The volume goes: its claim is lost.
		for _, name := range []string{"v1", "v2"} {
			must(core.PersistentVolumes().Delete(ctx, name, metav1.DeleteOptions{}))
		}
		check("volumes went", "claim c Lost")
		check("volumes went", "claim d Lost")
	})
}

// Many claims and volumes at once: each volume has one claim, and no write is refused.
func TestManyClaimsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var objs []runtime.Object
		const n = 100
		for i := range n {
			objs = append(objs, claim(fmt.Sprintf("c%03d", i), "x", "1Gi"), volume(fmt.Sprintf("v%03d", i), "x", "1Gi"))
		}
		client := controllertest.NewClient(objs...)
		controllertest.Start(t, client, nil, New)
		time.Sleep(time.Minute)
		synctest.Wait()
		got := picture(t, client)
		if strings.Count(got, " Bound v") != n || strings.Count(got, " Bound of c") != n {
			t.Fatal(got)
		}
		// claimRef, Bound; volumeName, Bound.
		if writes := controllertest.Writes(client, "update", "persistentvolumes") + controllertest.Writes(client, "update", "persistentvolumes/status") +
			controllertest.Writes(client, "update", "persistentvolumeclaims") + controllertest.Writes(client, "update", "persistentvolumeclaims/status"); writes != 4*n {
			t.Errorf("%d writes for %d bindings, want 4 for each", writes, n)
		}
	})
}
