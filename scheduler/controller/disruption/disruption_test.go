package disruption

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"skein.io/skein/scheduler/controller/controllertest"
)

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func budget(least, most string) *policyv1.PodDisruptionBudget {
	pdb := &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "pdb", Generation: 2, ResourceVersion: "4"},
		Spec:       policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}},
	}
	if least != "" {
		v := intstr.Parse(least)
		pdb.Spec.MinAvailable = &v
	}
	if most != "" {
		v := intstr.Parse(most)
		pdb.Spec.MaxUnavailable = &v
	}
	return pdb
}

func pod(i int, ready bool) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: fmt.Sprint("p", i), UID: types.UID(fmt.Sprint("u", i)), ResourceVersion: "7", Labels: map[string]string{"app": "web"},
		OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web", UID: "rs", Controller: new(true)}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionFalse}}}}
	if ready {
		p.Status.Conditions[0].Status = corev1.ConditionTrue
	}
	return p
}

func TestNewStatus(t *testing.T) {
	for _, tc := range []struct {
		what                                string
		pdb                                 *policyv1.PodDisruptionBudget
		scale                               int32
		pods                                string // r ready, n not ready, d being deleted, g granted, o granted long ago
		expected, desired, healthy, allowed int32
	}{
		{"at least two of three", budget("2", ""), 0, "rrr", 3, 2, 3, 1},
		{"one is down", budget("2", ""), 0, "rrn", 3, 2, 2, 0},
		{"one is being deleted", budget("2", ""), 0, "rrd", 3, 2, 2, 0},
		{"one is granted", budget("2", ""), 0, "rrg", 3, 2, 2, 0},
		{"the granted one stayed", budget("2", ""), 0, "rro", 3, 2, 3, 1},
		{"a share is rounded up", budget("50%", ""), 5, "rrrrr", 5, 3, 5, 2},
		{"at most one", budget("", "1"), 4, "rrr", 4, 3, 3, 0},
		{"at most half", budget("", "50%"), 5, "rrrrr", 5, 2, 5, 3},
		{"more than there are", budget("", "9"), 2, "rr", 2, 0, 2, 2},
		{"none yet", budget("0", ""), 0, "", 0, 0, 0, 0},
	} {
		in := input{pdb: tc.pdb.DeepCopy(), scale: tc.scale, now: t0}
		in.pdb.Status.DisruptedPods = map[string]metav1.Time{"gone": metav1.NewTime(t0)}
		for i, c := range tc.pods {
			p := pod(i, c != 'n')
			switch c {
			case 'd':
				p.DeletionTimestamp = &metav1.Time{Time: t0}
			case 'g':
				in.pdb.Status.DisruptedPods[p.Name] = metav1.NewTime(t0.Add(-time.Minute))
			case 'o':
				in.pdb.Status.DisruptedPods[p.Name] = metav1.NewTime(t0.Add(-time.Hour))
			}
			in.pods = append(in.pods, p)
		}
		s, again, overdue := newStatus(in)
		if s.ExpectedPods != tc.expected || s.DesiredHealthy != tc.desired || s.CurrentHealthy != tc.healthy || s.DisruptionsAllowed != tc.allowed || s.ObservedGeneration != 2 {
			t.Errorf("%s: %+v", tc.what, s)
		}
		if (again == time.Minute) != strings.Contains(tc.pods, "g") || len(overdue) != strings.Count(tc.pods, "o") || len(s.DisruptedPods) != strings.Count(tc.pods, "g") {
			t.Errorf("%s: again in %v, %d overdue, granted %v", tc.what, again, len(overdue), s.DisruptedPods)
		}
		if c := s.Conditions[0]; (c.Status == metav1.ConditionTrue) != (tc.allowed > 0) || c.Reason == "" {
			t.Errorf("%s: condition %+v", tc.what, c)
		}
	}
}

func TestLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "d"}, Spec: appsv1.DeploymentSpec{Replicas: new(int32(4))}}
		rs := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "rs",
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "Deployment", Name: "web", UID: "d", Controller: new(true)}}}, Spec: appsv1.ReplicaSetSpec{Replicas: new(int32(3))}}
		client := controllertest.NewClient(budget("", "1"), d, rs, pod(0, true), pod(1, true), pod(2, true), pod(3, true))
		controllertest.Start(t, client, nil, New)
		check := func(what string, allowed int32) {
			t.Helper()
			time.Sleep(2 * time.Second)
			synctest.Wait()
			got, err := client.PolicyV1().PodDisruptionBudgets("ns").Get(t.Context(), "web", metav1.GetOptions{})
			if err != nil || got.Status.DisruptionsAllowed != allowed || got.Status.ExpectedPods != 4 {
				t.Errorf("%s: %+v, %v; want %d allowed of 4", what, got.Status, err, allowed)
			}
		}
		check("all healthy", 1)
		p := pod(1, false)
		p.ResourceVersion = ""
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", ContainerID: "containerd://1", ImageID: "sha256:2"}}
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue, Reason: "Test", LastTransitionTime: metav1.Now()})
		if _, err := client.CoreV1().Pods("ns").UpdateStatus(t.Context(), p, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		check("one is down", 0)
		time.Sleep(staleTimeout)
		synctest.Wait()
		if p, err := client.CoreV1().Pods("ns").Get(t.Context(), "p1", metav1.GetOptions{}); err != nil || disrupted(p) {
			t.Errorf("the stale announcement stays: %+v, %v", p.Status.Conditions, err)
		} else if s := p.Status.ContainerStatuses; len(s) != 1 || s[0].ContainerID == "" || s[0].ImageID == "" {
			t.Errorf("what the view does not hold of the pod was lost: %+v", s)
		}
		before := len(client.Actions())
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(client.Actions()) - before; n != 0 {
			t.Errorf("%d requests in an idle hour", n)
		}
	})
}

// A budget over pods whose owner is unknown lets nothing go, says why, and costs little.
func TestUnknownOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(budget("", "1"), pod(0, true))
		rec := controllertest.Start(t, client, nil, New)
		time.Sleep(time.Hour)
		synctest.Wait()
		got, err := client.PolicyV1().PodDisruptionBudgets("ns").Get(t.Context(), "web", metav1.GetOptions{})
		if err != nil || got.Status.DisruptionsAllowed != 0 || got.Status.Conditions[0].Reason != policyv1.SyncFailedReason || !strings.Contains(got.Status.Conditions[0].Message, `pod "p0": its controller ReplicaSet web is gone`) {
			t.Errorf("%+v, %v", got.Status, err)
		}
		if n := controllertest.Writes(client, "update", "poddisruptionbudgets/status"); n != 1 {
			t.Errorf("%d writes, want 1", n)
		}
		if e := strings.Join(controllertest.Events(rec), "\n"); !strings.Contains(e, "CalculateExpectedPodCountFailed") {
			t.Errorf("events %s", e)
		}
	})
}

// A new pod that two budgets select is told so once: it cannot be evicted.
func TestTwoBudgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		second := budget("", "1")
		second.Name, second.UID = "web2", "pdb2"
		client := controllertest.NewClient(budget("", "1"), second)
		rec := controllertest.Start(t, client, nil, New)
		synctest.Wait()
		if _, err := client.CoreV1().Pods("ns").Create(t.Context(), pod(0, false), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if e := strings.Join(controllertest.Events(rec), "\n"); strings.Count(e, `MultiplePodDisruptionBudgets Pod "ns"/"p0" matches multiple PodDisruptionBudgets.`) != 1 {
			t.Errorf("events %s", e)
		}
	})
}
