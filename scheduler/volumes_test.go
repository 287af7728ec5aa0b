package scheduler

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	volumehelpers "k8s.io/component-helpers/storage/volume"

	"skein.io/skein/scheduler/controller/controllertest"
)

func testClass(name, provisioner string) *storagev1.StorageClass {
	mode := storagev1.VolumeBindingWaitForFirstConsumer
	return &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: provisioner, VolumeBindingMode: &mode}
}

func testClaim(name, class string) *v1.PersistentVolumeClaim {
	return &v1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("claim-" + name), ResourceVersion: "1"},
		Spec: v1.PersistentVolumeClaimSpec{StorageClassName: &class, AccessModes: []v1.PersistentVolumeAccessMode{v1.ReadWriteOnce},
			Resources: v1.VolumeResourceRequirements{Requests: v1.ResourceList{v1.ResourceStorage: resource.MustParse("1Gi")}}},
		Status: v1.PersistentVolumeClaimStatus{Phase: v1.ClaimPending},
	}
}

func testVolume(name, class, host string) *v1.PersistentVolume {
	return &v1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("volume-" + name), ResourceVersion: "1"},
		Spec: v1.PersistentVolumeSpec{StorageClassName: class, AccessModes: []v1.PersistentVolumeAccessMode{v1.ReadWriteOnce},
			Capacity: v1.ResourceList{v1.ResourceStorage: resource.MustParse("1Gi")},
			NodeAffinity: &v1.VolumeNodeAffinity{Required: &v1.NodeSelector{NodeSelectorTerms: []v1.NodeSelectorTerm{{MatchExpressions: []v1.NodeSelectorRequirement{
				{Key: v1.LabelHostname, Operator: v1.NodeSelectorOpIn, Values: []string{host}}}}}}}},
		Status: v1.PersistentVolumeStatus{Phase: v1.VolumeAvailable},
	}
}

func claiming(names ...string) func(*v1.Pod) {
	return func(p *v1.Pod) {
		for _, name := range names {
			p.Spec.Volumes = append(p.Spec.Volumes, v1.Volume{Name: name, VolumeSource: v1.VolumeSource{PersistentVolumeClaim: &v1.PersistentVolumeClaimVolumeSource{ClaimName: name}}})
		}
	}
}

// volumesOf is the API's side of storage, with what the binder does by hand.
type volumesOf struct {
	*testing.T
	client *fake.Clientset
}

func (s volumesOf) volume(name string) *v1.PersistentVolume {
	s.Helper()
	v, err := s.client.CoreV1().PersistentVolumes().Get(s.Context(), name, metav1.GetOptions{})
	if err != nil {
		s.Fatal(err)
	}
	return v
}

func (s volumesOf) claim(name string) *v1.PersistentVolumeClaim {
	s.Helper()
	c, err := s.client.CoreV1().PersistentVolumeClaims("default").Get(s.Context(), name, metav1.GetOptions{})
	if err != nil {
		s.Fatal(err)
	}
	return c
}

func (s volumesOf) write(obj runtime.Object) {
	s.Helper()
	var err error
	switch o := obj.(type) {
	case *v1.PersistentVolume:
		_, err = s.client.CoreV1().PersistentVolumes().Update(s.Context(), o, metav1.UpdateOptions{})
	case *v1.PersistentVolumeClaim:
		_, err = s.client.CoreV1().PersistentVolumeClaims("default").Update(s.Context(), o, metav1.UpdateOptions{})
	}
	if err != nil {
		s.Fatal(err)
	}
}

// bind completes the claim, as the binder does.
func (s volumesOf) bind(claim, volume string) {
	s.Helper()
	c := s.claim(claim)
	c.Spec.VolumeName = volume
	metav1.SetMetaDataAnnotation(&c.ObjectMeta, volumehelpers.AnnBindCompleted, "yes")
	s.write(c)
}

func TestAPodIsBoundWhenItsVolumesAre(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "4"), testNode("b", "4"), testClass("local", volumehelpers.NotSupportedProvisioner), testClass("dyn", "csi.example"),
			testVolume("pv1", "local", "b"), testClaim("c", "local"), testClaim("d", "dyn"))
		api := volumesOf{t, client}
		rec := placing(t, client, newHealth())
		settle(time.Second)
		create(t, client, testPod("p", "1", claiming("c", "d")))
		settle(time.Second)
		pv := api.volume("pv1")
		if ref := pv.Spec.ClaimRef; ref == nil || ref.Name != "c" || ref.UID != "claim-c" || ref.Kind != "PersistentVolumeClaim" || pv.Annotations[volumehelpers.AnnBoundByController] != "yes" {
			t.Fatalf("the volume was not given to the claim: %+v", pv)
		}
		if got := api.claim("d").Annotations[volumehelpers.AnnSelectedNode]; got != "b" {
			t.Fatalf("the node selected for provisioning: %q", got)
		}
		settle(time.Minute)
		if get(t, client, "p").Spec.NodeName != "" {
			t.Fatal("bound before its volumes")
		}
		// A pod without claims goes its way meanwhile.
		create(t, client, testPod("plain", "1"))
		settle(time.Second)
		if get(t, client, "plain").Spec.NodeName == "" {
			t.Fatal("a pod without claims waits for those of another")
		}
		api.bind("c", "pv1")
		settle(time.Second)
		if get(t, client, "p").Spec.NodeName != "" {
			t.Fatal("bound with one of two volumes")
		}
		api.bind("d", "pv1")
		settle(time.Second)
		if got := get(t, client, "p").Spec.NodeName; got != "b" {
			t.Fatalf("on %q, events %v", got, controllertest.Events(rec))
		}
		client.ClearActions()
		settle(time.Hour)
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
	})
}

func TestVolumesThatCannotBeBoundAreTriedAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "4"), testNode("b", "4"), testClass("local", volumehelpers.NotSupportedProvisioner), testClass("dyn", "csi.example"),
			testVolume("pv1", "local", "a"), testClaim("c", "local"), testClaim("d", "dyn"))
		api := volumesOf{t, client}
		refusals := 1
		client.PrependReactor("update", "persistentvolumes", func(a clienttesting.Action) (bool, runtime.Object, error) {
			if refusals == 0 {
				return false, nil, nil
			}
			refusals--
			return true, nil, errors.New("the store is busy")
		})
		rec := placing(t, client, newHealth())
		settle(time.Second)

		create(t, client, testPod("p", "1", claiming("c")))
		settle(500 * time.Millisecond)
		if cond := podCondition(get(t, client, "p"), v1.PodScheduled); cond == nil || cond.Reason != v1.PodReasonSchedulerError || !strings.Contains(cond.Message, `running PreBind plugin "VolumeBinding": bind persistentvolume "pv1" to claim default/c: the store is busy`) {
			t.Fatalf("a refused write: %+v", cond)
		}
		settle(2 * time.Second)
		if api.volume("pv1").Spec.ClaimRef == nil {
			t.Fatal("not tried again")
		}
		// The binder gives the volume back: somebody else was faster.
		pv := api.volume("pv1")
		pv.Spec.ClaimRef = nil
		api.write(pv)
		settle(500 * time.Millisecond)
		if cond := podCondition(get(t, client, "p"), v1.PodScheduled); !strings.Contains(cond.Message, `binding volumes: ClaimRef got reset for pv "pv1"`) {
			t.Fatalf("a volume that was taken away: %+v", cond)
		}
		settle(10 * time.Second)
		api.bind("c", "pv1")
		settle(time.Second)
		if get(t, client, "p").Spec.NodeName != "a" {
			t.Fatal("not bound after the retry")
		}

		// A provisioner that cannot takes the node away; one that never answers is waited for ten minutes.
		create(t, client, testPod("q", "1", claiming("d"), func(p *v1.Pod) { p.Spec.NodeSelector = map[string]string{v1.LabelHostname: "b"} }))
		settle(time.Second)
		c := api.claim("d")
		if c.Annotations[volumehelpers.AnnSelectedNode] != "b" {
			t.Fatalf("no node selected: %v", c.Annotations)
		}
		delete(c.Annotations, volumehelpers.AnnSelectedNode)
		api.write(c)
		settle(500 * time.Millisecond)
		if cond := podCondition(get(t, client, "q"), v1.PodScheduled); cond == nil || !strings.Contains(cond.Message, `binding volumes: provisioning failed for PVC "d"`) {
			t.Fatalf("a provisioner that gives up: %+v", cond)
		}
		settle(5 * time.Second)
		if api.claim("d").Annotations[volumehelpers.AnnSelectedNode] != "b" {
			t.Fatal("not asked again")
		}
		settle(9 * time.Minute)
		controllertest.Events(rec)
		settle(2 * time.Minute)
		if got := strings.Join(controllertest.Events(rec), "\n"); !strings.Contains(got, "binding volumes: context deadline exceeded") {
			t.Errorf("after ten minutes: %s", got)
		}
	})
}

func TestAWaitingPodThatGoesFreesItsVolume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "4"), testClass("local", volumehelpers.NotSupportedProvisioner), testClaim("c", "local"), testClaim("e", "local"))
		api := volumesOf{t, client}
		placing(t, client, newHealth())
		settle(time.Second)
		create(t, client, testPod("p", "1", claiming("c")), testPod("missing", "1", claiming("later")))
		settle(time.Second)
		if cond := podCondition(get(t, client, "p"), v1.PodScheduled); cond == nil || !strings.Contains(cond.Message, "1 node(s) didn't find available persistent volumes to bind") {
			t.Fatalf("no volume: %+v", cond)
		}
		if cond := podCondition(get(t, client, "missing"), v1.PodScheduled); cond == nil || !strings.Contains(cond.Message, `persistentvolumeclaim "later" not found`) {
			t.Fatalf("no claim: %+v", cond)
		}
		if _, err := client.CoreV1().PersistentVolumes().Create(t.Context(), testVolume("pv1", "local", "a"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(2 * time.Second)
		if ref := api.volume("pv1").Spec.ClaimRef; ref == nil || ref.Name != "c" {
			t.Fatalf("a new volume did not wake the pod that wants it: %+v", ref)
		}
		if err := client.CoreV1().Pods("default").Delete(t.Context(), "p", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		pv := api.volume("pv1")
		pv.Spec.ClaimRef = nil
		api.write(pv)
		create(t, client, testPod("q", "1", claiming("e")))
		settle(2 * time.Second)
		if ref := api.volume("pv1").Spec.ClaimRef; ref == nil || ref.Name != "e" {
			t.Fatalf("the volume of a pod that went: %+v", ref)
		}
		// A claim that comes wakes the pod that names it, and no other.
		client.ClearActions()
		if _, err := client.CoreV1().PersistentVolumeClaims("default").Create(t.Context(), testClaim("later", "local"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(2 * time.Second)
		if cond := podCondition(get(t, client, "missing"), v1.PodScheduled); !strings.Contains(cond.Message, "didn't find available persistent volumes to bind") {
			t.Fatalf("after its claim came: %+v", cond)
		}
		if n := controllertest.Writes(client, "patch", "pods/status"); n != 1 {
			t.Errorf("%d conditions written, want 1", n)
		}
	})
}

// What a leader began for a pod's volumes the next one finishes, without writing anything twice.
func TestANewLeaderGoesOnWithTheVolumesOfThePreviousOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		given := testVolume("pv1", "local", "b")
		given.Spec.ClaimRef = &v1.ObjectReference{APIVersion: "v1", Kind: "PersistentVolumeClaim", Namespace: "default", Name: "c", UID: "claim-c", ResourceVersion: "1"}
		given.Annotations = map[string]string{volumehelpers.AnnBoundByController: "yes"}
		asked := testClaim("d", "dyn")
		asked.Annotations = map[string]string{volumehelpers.AnnSelectedNode: "b"}
		client := newClient(nil, testNode("a", "4"), testNode("b", "4"), testClass("local", volumehelpers.NotSupportedProvisioner), testClass("dyn", "csi.example"),
			given, testVolume("pv2", "local", "a"), testClaim("c", "local"), asked, testPod("p", "1", claiming("c", "d")))
		api := volumesOf{t, client}
		placing(t, client, newHealth())
		settle(time.Second)
		if n := controllertest.Writes(client, "update", "persistentvolumes"); n != 0 || api.volume("pv2").Spec.ClaimRef != nil {
			t.Errorf("%d writes of volumes, another volume has %v", n, api.volume("pv2").Spec.ClaimRef)
		}
		api.bind("c", "pv1")
		api.bind("d", "pv1")
		settle(time.Second)
		if got := get(t, client, "p").Spec.NodeName; got != "b" {
			t.Errorf("on %q", got)
		}
	})
}
