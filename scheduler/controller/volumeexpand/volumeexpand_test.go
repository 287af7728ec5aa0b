package volumeexpand

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/scheduler/controller/controllertest"
)

func TestAClaimThatAsksForMoreSaysWhoItWaitsFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		size := func(s string) corev1.ResourceList {
			return corev1.ResourceList{corev1.ResourceStorage: resource.MustParse(s)}
		}
		claim := &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "c", ResourceVersion: "1"},
			Spec:   corev1.PersistentVolumeClaimSpec{Resources: corev1.VolumeResourceRequirements{Requests: size("1Gi")}},
			Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound, Capacity: size("1Gi")}}
		client := controllertest.NewClient(claim)
		rec := controllertest.Start(t, client, nil, New)
		events := func() string {
			time.Sleep(time.Second)
			synctest.Wait()
			return strings.Join(controllertest.Events(rec), "\n")
		}
		ask := func(s string) {
			c, err := client.CoreV1().PersistentVolumeClaims("ns").Get(t.Context(), "c", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			c.Spec.Resources.Requests = size(s)
			if _, err := client.CoreV1().PersistentVolumeClaims("ns").Update(t.Context(), c, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		if e := events(); e != "" {
			t.Errorf("a claim that has what it asks for: %s", e)
		}
		ask("2Gi")
		if e := events(); e != "Normal ExternalExpanding waiting for an external controller to expand this PVC" {
			t.Errorf("a claim that asks for more: %s", e)
		}
		ask("2Gi")
		if e := events(); e != "" {
			t.Errorf("told twice: %s", e)
		}
	})
}
