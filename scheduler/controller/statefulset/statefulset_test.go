package statefulset

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"skein.io/skein/scheduler/controller/controllertest"
)

// settle lets everything run, and between makes all pods ready.
func settle(t *testing.T, client *fake.Clientset, rounds int) {
	t.Helper()
	for range rounds {
		time.Sleep(3 * time.Second)
		synctest.Wait()
		pods, err := client.CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range pods.Items {
			p := &pods.Items[i]
			if p.Status.Phase == corev1.PodRunning {
				continue
			}
			p.Status = corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{
				{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.Now()}}}
			if _, err := client.CoreV1().Pods("ns").UpdateStatus(t.Context(), p, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
	}
}

func images(t *testing.T, client *fake.Clientset) string {
	t.Helper()
	pods, err := client.CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, p := range pods.Items {
		out = append(out, p.Name+"="+p.Spec.Containers[0].Image)
	}
	return strings.Join(out, " ")
}

func TestLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		set := newSet(3, claiming("Delete", "Retain"))
		set.Spec.Template.Spec.Containers[0].Image = "one"
		client := controllertest.NewClient(set)
		rec := controllertest.Start(t, client, nil, New)
		settle(t, client, 6)
		if got := images(t, client); got != "db-0=one db-1=one db-2=one" {
			t.Fatalf("pods %q", got)
		}
		claims, err := client.CoreV1().PersistentVolumeClaims("ns").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(claims.Items) != 3 || claims.Items[1].Name != "data-db-1" || len(claims.Items[1].OwnerReferences) != 1 {
			t.Errorf("claims %+v, %v", claims.Items, err)
		}
		api := client.AppsV1().StatefulSets("ns")
		get := func() *appsv1.StatefulSet {
			got, err := api.Get(t.Context(), "db", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			return got
		}
		got := get()
		if s := got.Status; s.Replicas != 3 || s.ReadyReplicas != 3 || s.AvailableReplicas != 3 || s.CurrentReplicas != 3 || s.UpdatedReplicas != 3 || s.CurrentRevision != s.UpdateRevision || s.ObservedGeneration != got.Generation {
			t.Errorf("status %+v", s)
		}
		first := got.Status.CurrentRevision

		before := len(client.Actions())
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(client.Actions()) - before; n != 0 {
			t.Errorf("%d requests in an idle hour: %v", n, client.Actions()[before:])
		}

		got = get()
		got.Spec.Template.Spec.Containers[0].Image = "two"
		if _, err := api.Update(t.Context(), got, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(t, client, 1)
		if s := get().Status; s.CurrentRevision == s.UpdateRevision || s.CurrentReplicas+s.UpdatedReplicas > 3 {
			t.Errorf("status within a rollout %+v", s)
		}
		settle(t, client, 8)
		if got := images(t, client); got != "db-0=two db-1=two db-2=two" {
			t.Errorf("after the rollout: %q", got)
		}
		got = get()
		if s := got.Status; s.CurrentRevision != s.UpdateRevision || s.CurrentRevision == first || s.UpdatedReplicas != 3 {
			t.Errorf("status after the rollout %+v", s)
		}

		// Back to the first template: its revision is used again, with the next number.
		got.Spec.Template.Spec.Containers[0].Image = "one"
		if _, err := api.Update(t.Context(), got, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(t, client, 9)
		revs, err := client.AppsV1().ControllerRevisions("ns").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(revs.Items) != 2 || get().Status.CurrentRevision != first {
			t.Errorf("revisions %+v, current %s, want %s; %v", revs.Items, get().Status.CurrentRevision, first, err)
		}
		for _, r := range revs.Items {
			if r.Name == first && r.Revision != 3 {
				t.Errorf("revision %s has the number %d, want 3", r.Name, r.Revision)
			}
			if !strings.Contains(string(r.Data.Raw), `"$patch":"replace"`) {
				t.Errorf("revision data %s", r.Data.Raw)
			}
		}

		got = get()
		*got.Spec.Replicas = 1
		if _, err := api.Update(t.Context(), got, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(t, client, 4)
		if got := images(t, client); got != "db-0=one" {
			t.Errorf("scaled down: %q", got)
		}
		events := strings.Join(controllertest.Events(rec), "\n")
		for _, want := range []string{"SuccessfulCreate create Pod db-0 in StatefulSet db successful", "SuccessfulCreate create Claim data-db-0", "SuccessfulDelete delete Pod db-2"} {
			if !strings.Contains(events, want) {
				t.Errorf("no event %q in\n%s", want, events)
			}
		}
	})
}

// A name that another object's revision has is not used.
func TestCollision(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		set := newSet(1)
		client := controllertest.NewClient(set)
		rev := &appsv1.ControllerRevision{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: firstName(set)}}
		if err := client.Tracker().Add(rev); err != nil {
			t.Fatal(err)
		}
		controllertest.Start(t, client, nil, New)
		settle(t, client, 4)
		got, err := client.AppsV1().StatefulSets("ns").Get(t.Context(), "db", metav1.GetOptions{})
		if err != nil || got.Status.CollisionCount == nil || *got.Status.CollisionCount != 1 || got.Status.UpdateRevision == rev.Name || got.Status.ReadyReplicas != 1 {
			t.Errorf("status %+v, %v", got.Status, err)
		}
	})
}

// A pod of the name that is not the set's is neither adopted nor deleted, and said so.
func TestTakenName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		other := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "db-0", UID: "other", ResourceVersion: "3"}}
		client := controllertest.NewClient(newSet(1), other)
		controllertest.Start(t, client, nil, New)
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := controllertest.Writes(client, "create", "pods"); n == 0 || n > 80 {
			t.Errorf("%d tries in an hour", n)
		}
		if n := controllertest.Writes(client, "delete", "pods"); n != 0 {
			t.Errorf("%d deletions", n)
		}
		if _, err := client.CoreV1().Pods("ns").Get(t.Context(), "db-0", metav1.GetOptions{}); apierrors.IsNotFound(err) {
			t.Error("the other's pod is gone")
		}
	})
}
