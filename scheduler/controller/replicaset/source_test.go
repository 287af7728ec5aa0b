package replicaset

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/scheduler/controller/controllertest"
)

func TestReplicationController(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := map[string]string{"app": "web"}
		rc := &corev1.ReplicationController{
			ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "rc-uid", Generation: 1, ResourceVersion: "5"},
			Spec: corev1.ReplicationControllerSpec{Replicas: new(int32(3)), Selector: l,
				Template: &corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: l}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}}}},
		}
		client := controllertest.NewClient(rc)
		rec := controllertest.Start(t, client, nil, New, NewReplication)
		settle := func() {
			time.Sleep(5 * time.Second)
			synctest.Wait()
		}
		settle()
		pods, err := client.CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(pods.Items) != 3 {
			t.Fatalf("%d pods, %v", len(pods.Items), err)
		}
		if ref := pods.Items[0].OwnerReferences[0]; ref.Kind != "ReplicationController" || ref.APIVersion != "v1" || ref.UID != "rc-uid" {
			t.Errorf("owner %+v", ref)
		}
		got, err := client.CoreV1().ReplicationControllers("ns").Get(t.Context(), "web", metav1.GetOptions{})
		if err != nil || got.Status.Replicas != 3 || got.Status.FullyLabeledReplicas != 3 || got.Status.ObservedGeneration != 1 || got.Spec.Template.Spec.Containers[0].Image != "i" {
			t.Errorf("%+v, %v", got, err)
		}
		before := len(client.Actions())
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(client.Actions()) - before; n != 0 {
			t.Errorf("%d requests in an idle hour: %v", n, client.Actions()[before:])
		}
		*got.Spec.Replicas = 1
		if _, err := client.CoreV1().ReplicationControllers("ns").Update(t.Context(), got, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle()
		if pods, err = client.CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{}); err != nil || len(pods.Items) != 1 {
			t.Errorf("%d pods after scaling down, %v", len(pods.Items), err)
		}
		if e := strings.Join(controllertest.Events(rec), "\n"); strings.Count(e, "SuccessfulCreate") != 3 || strings.Count(e, "SuccessfulDelete") != 2 {
			t.Errorf("events\n%s", e)
		}
	})
}
