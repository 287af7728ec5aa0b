package ephemeralvolume

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/scheduler/controller/controllertest"
)

func pod(name string) *corev1.Pod {
	class := "fast"
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}, Spec: corev1.PodSpec{Volumes: []corev1.Volume{
		{Name: "scratch", VolumeSource: corev1.VolumeSource{Ephemeral: &corev1.EphemeralVolumeSource{VolumeClaimTemplate: &corev1.PersistentVolumeClaimTemplate{
			ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"l": "x"}, Annotations: map[string]string{"a": "y"}},
			Spec:       corev1.PersistentVolumeClaimSpec{StorageClassName: &class},
		}}}},
	}}}
}

func TestClaimsOfEphemeralVolumes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx := t.Context()
		foreign := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "q-scratch", UID: "foreign", ResourceVersion: "1"}}
		client := controllertest.NewClient(foreign)
		core := client.CoreV1()
		rec := controllertest.Start(t, client, nil, New)
		settle := func() {
			time.Sleep(time.Second)
			synctest.Wait()
		}
		p, err := core.Pods("ns").Create(ctx, pod("p"), metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		settle()
		made := func(name string) *corev1.PersistentVolumeClaim {
			t.Helper()
			c, err := core.PersistentVolumeClaims("ns").Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		if c := made("p-scratch"); !metav1.IsControlledBy(c, p) || c.Labels["l"] != "x" || c.Annotations["a"] != "y" || *c.Spec.StorageClassName != "fast" || !*c.OwnerReferences[0].BlockOwnerDeletion {
			t.Errorf("%+v", c)
		}
		// It is made again when somebody deletes it.
		if err := core.PersistentVolumeClaims("ns").Delete(ctx, "p-scratch", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		settle()
		made("p-scratch")

		// One of that name that is not the pod's is not touched, and the pod says so.
		if _, err := core.Pods("ns").Create(ctx, pod("q"), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle()
		if c := made("q-scratch"); c.UID != "foreign" || len(c.OwnerReferences) != 0 {
			t.Errorf("%+v", c)
		}
		want := "Warning FailedBinding ephemeral volume scratch: PVC ns/q-scratch was not created for pod ns/q (pod is not owner)"
		if got := strings.Join(controllertest.Events(rec), "\n"); got != want {
			t.Errorf("events %s", got)
		}
		client.ClearActions()
		time.Sleep(time.Hour)
		synctest.Wait()
		if a, e := client.Actions(), controllertest.Events(rec); len(a)+len(e) != 0 {
			t.Errorf("while nothing changes: %v, %v", a, e)
		}
		if err := core.PersistentVolumeClaims("ns").Delete(ctx, "q-scratch", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		settle()
		if c := made("q-scratch"); len(c.OwnerReferences) != 1 {
			t.Errorf("%+v", c)
		}
	})
}
