package api

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"skein.io/skein/scheduler/controller/ephemeralvolume"
	"skein.io/skein/scheduler/controller/persistentvolume"
	"skein.io/skein/scheduler/controller/statefulset"
	"skein.io/skein/scheduler/controller/volumeexpand"
	"skein.io/skein/scheduler/controller/volumeprotection"
)

// storageTest is a cluster with two nodes made by hand and everything that handles volumes.
type storageTest struct {
	*testing.T
	k  kubernetes.Interface
	ns string
}

func newStorageTest(t *testing.T) storageTest {
	t.Helper()
	k := client(t, cluster.servers[0].Loopback("test", nil))
	withControllers(t, statefulset.New, persistentvolume.New, ephemeralvolume.New, volumeexpand.New,
		volumeprotection.NewClaims, volumeprotection.NewVolumes, volumeprotection.NewClasses)
	s := storageTest{t, k, freshNamespace(t, k)}
	for _, name := range []string{"disk-a", "disk-b"} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name}}}
		makeNode(t, k, node)
		// Taken off by hand: no node controller runs here.
		eventually(t, func(ctx context.Context) error {
			n, err := k.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			n.Spec.Taints = nil
			if n, err = k.CoreV1().Nodes().Update(ctx, n, metav1.UpdateOptions{}); err != nil {
				return err
			}
			n.Status.Allocatable = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("8"), corev1.ResourceMemory: resource.MustParse("8Gi"), corev1.ResourcePods: resource.MustParse("110")}
			n.Status.Capacity = n.Status.Allocatable
			n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}
			_, err = k.CoreV1().Nodes().UpdateStatus(ctx, n, metav1.UpdateOptions{})
			return err
		})
	}
	return s
}

func (s storageTest) class(name, provisioner string, mode storagev1.VolumeBindingMode) {
	s.Helper()
	_, err := s.k.StorageV1().StorageClasses().Create(s.Context(), &storagev1.StorageClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Provisioner: provisioner, VolumeBindingMode: &mode}, metav1.CreateOptions{})
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		_ = s.k.StorageV1().StorageClasses().Delete(context.Background(), name, metav1.DeleteOptions{})
	})
}

// volume makes a local volume on host, or a host path if that is "".
func (s storageTest) volume(name, class, size, host string, edit ...func(*corev1.PersistentVolume)) {
	s.Helper()
	pv := &corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PersistentVolumeSpec{
		StorageClassName: class, Capacity: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(size)},
		AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimRetain,
		PersistentVolumeSource: corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/data"}},
	}}
	if host != "" {
		pv.Spec.PersistentVolumeSource = corev1.PersistentVolumeSource{Local: &corev1.LocalVolumeSource{Path: "/data"}}
		pv.Spec.NodeAffinity = &corev1.VolumeNodeAffinity{Required: &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
			MatchExpressions: []corev1.NodeSelectorRequirement{{Key: corev1.LabelHostname, Operator: corev1.NodeSelectorOpIn, Values: []string{host}}}}}}}
	}
	for _, fn := range edit {
		fn(pv)
	}
	if _, err := s.k.CoreV1().PersistentVolumes().Create(s.Context(), pv, metav1.CreateOptions{}); err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() {
		_ = s.k.CoreV1().PersistentVolumes().Delete(context.Background(), name, metav1.DeleteOptions{})
		_, _ = s.k.CoreV1().PersistentVolumes().Patch(context.Background(), name, types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
	})
}

func claimSpec(class, size string) corev1.PersistentVolumeClaimSpec {
	return corev1.PersistentVolumeClaimSpec{StorageClassName: &class, AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce},
		Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(size)}}}
}

func (s storageTest) claim(name, class, size string) {
	s.Helper()
	_, err := s.k.CoreV1().PersistentVolumeClaims(s.ns).Create(s.Context(), &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: claimSpec(class, size)}, metav1.CreateOptions{})
	if err != nil {
		s.Fatal(err)
	}
}

func (s storageTest) pod(name string, volumes ...corev1.VolumeSource) {
	s.Helper()
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "web"}}}}
	for i, v := range volumes {
		p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: fmt.Sprintf("v%d", i), VolumeSource: v})
	}
	if _, err := s.k.CoreV1().Pods(s.ns).Create(s.Context(), p, metav1.CreateOptions{}); err != nil {
		s.Fatal(err)
	}
}

func using(claim string) corev1.VolumeSource {
	return corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim}}
}

// await waits for lines of the picture that begin so: claims with their phase and volume, volumes with their phase, pods with
// their node or why they have none. What follows " ... " may be anywhere in the line.
func (s storageTest) await(lines ...string) {
	s.Helper()
	eventually(s.T, func(ctx context.Context) error {
		got, err := s.picture(ctx)
		if err != nil {
			return err
		}
		for _, line := range lines {
			begin, within, _ := strings.Cut(line, " ... ")
			if !slices.ContainsFunc(got, func(l string) bool { return strings.HasPrefix(l, begin) && strings.Contains(l, within) }) {
				return fmt.Errorf("no %q in\n%s", line, strings.Join(got, "\n"))
			}
		}
		return nil
	})
}

func (s storageTest) picture(ctx context.Context) (lines []string, err error) {
	claims, err := s.k.CoreV1().PersistentVolumeClaims(s.ns).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, c := range claims.Items {
		lines = append(lines, strings.TrimSpace(fmt.Sprintf("claim %s %s %s", c.Name, c.Status.Phase, c.Spec.VolumeName)))
	}
	volumes, err := s.k.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, v := range volumes.Items {
		lines = append(lines, fmt.Sprintf("volume %s %s", v.Name, v.Status.Phase))
	}
	pods, err := s.k.CoreV1().Pods(s.ns).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	for _, p := range pods.Items {
		line := "pod " + p.Name + " " + p.Spec.NodeName
		for _, c := range p.Status.Conditions {
			if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse {
				line += c.Message
			}
		}
		lines = append(lines, line)
	}
	return lines, nil
}

// A StatefulSet gets its volumes, keeps them from pod to pod, and they from it.
func TestStatefulSetOnStaticVolumes(t *testing.T) {
	s := newStorageTest(t)
	s.volume("pv-small", "static", "1Gi", "")
	s.volume("pv-large", "static", "5Gi", "")
	replicas, labels := int32(2), map[string]string{"app": "db"}
	set := &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Name: "db"}, Spec: appsv1.StatefulSetSpec{
		Replicas: &replicas, ServiceName: "db", PodManagementPolicy: appsv1.ParallelPodManagement, Selector: &metav1.LabelSelector{MatchLabels: labels},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "db",
			VolumeMounts: []corev1.VolumeMount{{Name: "data", MountPath: "/data"}}}}}},
		VolumeClaimTemplates: []corev1.PersistentVolumeClaim{{ObjectMeta: metav1.ObjectMeta{Name: "data"}, Spec: claimSpec("static", "1Gi")}},
	}}
	if _, err := s.k.AppsV1().StatefulSets(s.ns).Create(t.Context(), set, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s.await("volume pv-small Bound", "volume pv-large Bound")
	var of string
	eventually(t, func(ctx context.Context) error {
		p, err := s.k.CoreV1().Pods(s.ns).Get(ctx, "db-0", metav1.GetOptions{})
		if err != nil || p.Spec.NodeName == "" {
			return fmt.Errorf("db-0: %v, %v", p.Status.Conditions, err)
		}
		c, err := s.k.CoreV1().PersistentVolumeClaims(s.ns).Get(ctx, "data-db-0", metav1.GetOptions{})
		if err != nil || c.Status.Phase != corev1.ClaimBound {
			return fmt.Errorf("its claim: %v, %v", c.Status, err)
		}
		of = c.Spec.VolumeName
		return nil
	})

	// A claim in use is not let go, a volume that is bound neither.
	if err := s.k.CoreV1().PersistentVolumeClaims(s.ns).Delete(t.Context(), "data-db-0", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := s.k.CoreV1().PersistentVolumes().Delete(t.Context(), of, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond) // what must not happen has no event to wait for
	s.await("claim data-db-0 Bound "+of, "volume "+of+" Bound")

	// With the pod go the claim, and then its volume.
	if err := s.k.AppsV1().StatefulSets(s.ns).Delete(t.Context(), "db", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	grace := int64(0)
	if err := s.k.CoreV1().Pods(s.ns).DeleteCollection(t.Context(), metav1.DeleteOptions{GracePeriodSeconds: &grace}, metav1.ListOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		if _, err := s.k.CoreV1().PersistentVolumeClaims(s.ns).Get(ctx, "data-db-0", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("the claim: %v", err)
		}
		if _, err := s.k.CoreV1().PersistentVolumes().Get(ctx, of, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("the volume: %v", err)
		}
		return nil
	})
	// The other claim stays with its volume, as the set's policy says, until it is deleted.
	c, err := s.k.CoreV1().PersistentVolumeClaims(s.ns).Get(t.Context(), "data-db-1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.k.CoreV1().PersistentVolumeClaims(s.ns).Delete(t.Context(), c.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.await("volume " + c.Spec.VolumeName + " Released")
}

// Local volumes are bound when a pod comes that needs them, where they and the pod can be together.
func TestLocalVolumesWaitForTheirFirstConsumer(t *testing.T) {
	s := newStorageTest(t)
	s.class("local", "kubernetes.io/no-provisioner", storagev1.VolumeBindingWaitForFirstConsumer)
	s.volume("local-b", "local", "1Gi", "disk-b")
	s.claim("c", "local", "1Gi")
	s.await("claim c Pending", "volume local-b Available")
	s.pod("p", using("c"))
	s.await("pod p disk-b", "claim c Bound local-b", "volume local-b Bound")

	// A second pod of the claim follows it; one that needs another volume waits, and says why, until there is one.
	s.pod("q", using("c"))
	s.claim("d", "local", "1Gi")
	s.pod("r", using("d"))
	s.await("pod q disk-b", "pod r 0/ ... 2 node(s) didn't find available persistent volumes to bind.")
	s.volume("local-a", "local", "1Gi", "disk-a")
	s.await("pod r disk-a", "claim d Bound local-a")
	// What nobody has made yet is waited for as well.
	s.pod("early", using("later"))
	s.await(`pod early 0/ ... persistentvolumeclaim "later" not found.`)
}

// A provisioner outside is asked for a volume where the pod will run; this test is the provisioner.
func TestProvisionersAreAskedByAnnotation(t *testing.T) {
	s := newStorageTest(t)
	s.class("dyn", "example.com/disks", storagev1.VolumeBindingWaitForFirstConsumer)
	template := &corev1.PersistentVolumeClaimTemplate{Spec: claimSpec("dyn", "1Gi")}
	s.pod("p", corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{VolumeClaimTemplate: template}})
	var node string
	eventually(t, func(ctx context.Context) error {
		c, err := s.k.CoreV1().PersistentVolumeClaims(s.ns).Get(ctx, "p-v0", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if node = c.Annotations["volume.kubernetes.io/selected-node"]; node == "" || c.Annotations["volume.kubernetes.io/storage-provisioner"] != "example.com/disks" {
			return fmt.Errorf("annotations %v", c.Annotations)
		}
		return nil
	})
	if p, err := s.k.CoreV1().Pods(s.ns).Get(t.Context(), "p", metav1.GetOptions{}); err != nil || p.Spec.NodeName != "" {
		t.Fatalf("the pod must wait for its volume: %+v, %v", p, err)
	}
	s.volume("made", "dyn", "1Gi", node, func(pv *corev1.PersistentVolume) {
		pv.Spec.ClaimRef = &corev1.ObjectReference{Kind: "PersistentVolumeClaim", APIVersion: "v1", Namespace: s.ns, Name: "p-v0"}
	})
	s.await("pod p "+node, "claim p-v0 Bound made")

	// The claim of an ephemeral volume goes with its pod.
	grace := int64(0)
	if err := s.k.CoreV1().Pods(s.ns).Delete(t.Context(), "p", metav1.DeleteOptions{GracePeriodSeconds: &grace}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		if _, err := s.k.CoreV1().PersistentVolumeClaims(s.ns).Get(ctx, "p-v0", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("the claim: %v", err)
		}
		return nil
	})
	s.await("volume made Released")
}
