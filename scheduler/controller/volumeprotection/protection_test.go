package volumeprotection

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clienttesting "k8s.io/client-go/testing"

	"skein.io/skein/scheduler/controller/controllertest"
)

var going = metav1.NewTime(time.Unix(1, 0))

func settle() {
	time.Sleep(time.Second)
	synctest.Wait()
}

func claim(name string, edit ...func(*corev1.PersistentVolumeClaim)) *corev1.PersistentVolumeClaim {
	c := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: "u", ResourceVersion: "1", Finalizers: []string{"example.com/other", claimFinalizer}}}
	for _, fn := range edit {
		fn(c)
	}
	return c
}

func deleted(c *corev1.PersistentVolumeClaim) { c.DeletionTimestamp = &going }

func user(name, claim string, edit ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: "pod", ResourceVersion: "1"}, Spec: corev1.PodSpec{NodeName: "n", Volumes: []corev1.Volume{
		{Name: "v", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim}}}}}}
	for _, fn := range edit {
		fn(p)
	}
	return p
}

func TestClaimsInUseStay(t *testing.T) {
	yes, zero, thirty := true, int64(0), int64(30)
	ephemeral := func(p *corev1.Pod) {
		p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{}}}}
	}
	owned := func(c *corev1.PersistentVolumeClaim) {
		c.OwnerReferences = []metav1.OwnerReference{{Kind: "Pod", Name: "p", UID: "pod", Controller: &yes}}
	}
	ending := func(grace *int64) func(*corev1.Pod) {
		return func(p *corev1.Pod) { p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &going, grace }
	}
	for name, tc := range map[string]struct {
		claim *corev1.PersistentVolumeClaim
		pods  []runtime.Object
		want  bool // it has the finalizer
	}{
		"not in use and deleted":              {claim("c", deleted), nil, false},
		"in use and deleted":                  {claim("c", deleted), []runtime.Object{user("p", "c")}, true},
		"of a pod that has ended":             {claim("c", deleted), []runtime.Object{user("p", "c", func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded })}, true},
		"of a pod without a node":             {claim("c", deleted), []runtime.Object{user("p", "c", func(p *corev1.Pod) { p.Spec.NodeName = "" })}, false},
		"another claim is in use":             {claim("c", deleted), []runtime.Object{user("p", "d")}, false},
		"of an ephemeral volume":              {claim("p-v", deleted, owned), []runtime.Object{user("p", "", ephemeral)}, true},
		"of a pod that ends":                  {claim("p-v", deleted, owned), []runtime.Object{user("p", "", ephemeral, ending(&thirty))}, true},
		"of a pod that its node is done with": {claim("p-v", deleted, owned), []runtime.Object{user("p", "", ephemeral, ending(&zero))}, false},
		"of another pod of that name":         {claim("p-v", deleted), []runtime.Object{user("p", "", ephemeral)}, false},
		"without the finalizer":               {claim("c", func(c *corev1.PersistentVolumeClaim) { c.Finalizers = nil }), nil, true},
		"not deleted":                         {claim("c"), nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := controllertest.NewClient(append(tc.pods, tc.claim)...)
				controllertest.Start(t, client, nil, NewClaims)
				settle()
				c, err := client.CoreV1().PersistentVolumeClaims("ns").Get(t.Context(), tc.claim.Name, metav1.GetOptions{})
				if err != nil {
					t.Fatal(err)
				}
				if got := slices.Contains(c.Finalizers, claimFinalizer); got != tc.want {
					t.Errorf("finalizers %v", c.Finalizers)
				}
				client.ClearActions()
				time.Sleep(time.Hour)
				synctest.Wait()
				if a := client.Actions(); len(a) != 0 {
					t.Errorf("requests while nothing changes: %v", a)
				}
			})
		})
	}
}

// The view may not show a pod yet that the store has.
func TestAClaimIsLetGoOnlyWhenTheStoreShowsNoUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(claim("c", deleted))
		hidden := true
		client.PrependReactor("list", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
			if hidden && a.GetNamespace() == "ns" {
				return true, &corev1.PodList{Items: []corev1.Pod{*user("p", "c")}}, nil
			}
			return false, nil, nil
		})
		controllertest.Start(t, client, nil, NewClaims)
		settle()
		if n := controllertest.Writes(client, "update", "persistentvolumeclaims"); n != 0 {
			t.Fatal("let go although the store shows a pod")
		}
		// The pod comes into view and goes.
		hidden = false
		if _, err := client.CoreV1().Pods("ns").Create(t.Context(), user("p", "c"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle()
		if err := client.CoreV1().Pods("ns").Delete(t.Context(), "p", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		settle()
		if n := controllertest.Writes(client, "update", "persistentvolumeclaims"); n != 1 {
			t.Fatalf("%d writes after the last pod went", n)
		}
	})
}

func TestVolumesAndClassesInUseStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		volume := func(name string, phase corev1.PersistentVolumePhase, del bool) *corev1.PersistentVolume {
			v := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: "1"}, Status: corev1.PersistentVolumeStatus{Phase: phase}}
			if del {
				v.DeletionTimestamp, v.Finalizers = &going, []string{volumeFinalizer, "example.com/other"}
			}
			return v
		}
		gold := "gold"
		named := volume("named", corev1.VolumeBound, false)
		named.Spec.VolumeAttributesClassName = &gold
		class := func(name string) *storagev1.VolumeAttributesClass {
			return &storagev1.VolumeAttributesClass{ObjectMeta: metav1.ObjectMeta{Name: name, ResourceVersion: "1", DeletionTimestamp: &going, Finalizers: []string{classFinalizer, "example.com/other"}}}
		}
		client := controllertest.NewClient(volume("new", corev1.VolumeAvailable, false), volume("bound", corev1.VolumeBound, true), volume("free", corev1.VolumeReleased, true), named,
			class("gold"), class("silver"), claim("c", func(c *corev1.PersistentVolumeClaim) {
				c.Status.ModifyVolumeStatus = &corev1.ModifyVolumeStatus{TargetVolumeAttributesClassName: "gold"}
			}), &storagev1.VolumeAttributesClass{ObjectMeta: metav1.ObjectMeta{Name: "fresh", ResourceVersion: "1"}})
		controllertest.Start(t, client, nil, NewVolumes, NewClasses)
		settle()
		volumeHas := func(name string, want bool) {
			t.Helper()
			v, err := client.CoreV1().PersistentVolumes().Get(ctx, name, metav1.GetOptions{})
			if err != nil || slices.Contains(v.Finalizers, volumeFinalizer) != want {
				t.Errorf("volume %s: %v, %v", name, v.Finalizers, err)
			}
		}
		classHas := func(name string, want bool) {
			t.Helper()
			c, err := client.StorageV1().VolumeAttributesClasses().Get(ctx, name, metav1.GetOptions{})
			if err != nil || slices.Contains(c.Finalizers, classFinalizer) != want {
				t.Errorf("class %s: %v, %v", name, c.Finalizers, err)
			}
		}
		volumeHas("new", true)
		volumeHas("bound", true)
		volumeHas("free", false)
		classHas("fresh", true)
		classHas("gold", true)
		classHas("silver", false)
		v, _ := client.CoreV1().PersistentVolumes().Get(ctx, "bound", metav1.GetOptions{})
		v.Status.Phase = corev1.VolumeReleased
		if _, err := client.CoreV1().PersistentVolumes().UpdateStatus(ctx, v, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		// The tracker keeps a volume that is deleted although its last finalizer went.
		if err := client.CoreV1().PersistentVolumes().Delete(ctx, "named", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		settle()
		volumeHas("bound", false)
		classHas("gold", true) // the claim still names it
		if err := client.CoreV1().PersistentVolumeClaims("ns").Delete(ctx, "c", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		settle()
		classHas("gold", false)
	})
}
