package deployment

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"skein.io/skein/scheduler/controller/controllertest"
	"skein.io/skein/scheduler/controller/replicaset"

	"skein.io/skein/scheduler/controller/history"
)

// nodes plays the agents: pods become ready some seconds after they were made.
// It checks the limits as it goes.
type nodes struct {
	t      *testing.T
	client *fake.Clientset
	most   int
	least  int
}

func (n *nodes) run(d time.Duration) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range int(d / time.Second) {
		time.Sleep(time.Second)
		synctest.Wait()
		pods := n.pods()
		ready := 0
		for _, p := range pods {
			if len(p.Status.Conditions) > 0 {
				ready++
			} else if rng.IntN(4) == 0 {
				p.Spec.NodeName = "n1"
				p.Status.Phase = corev1.PodRunning
				p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.Now()}}
				if _, err := n.client.CoreV1().Pods("ns").UpdateStatus(n.t.Context(), &p, metav1.UpdateOptions{}); err != nil {
					n.t.Fatal(err)
				}
			}
		}
		if len(pods) > n.most || ready < n.least {
			n.t.Errorf("%d pods, %d ready; want at most %d and at least %d", len(pods), ready, n.most, n.least)
		}
	}
	synctest.Wait()
}

func (n *nodes) pods() []corev1.Pod {
	l, err := n.client.CoreV1().Pods("ns").List(n.t.Context(), metav1.ListOptions{})
	if err != nil {
		n.t.Fatal(err)
	}
	return l.Items
}

func get(t *testing.T, client *fake.Clientset) *appsv1.Deployment {
	t.Helper()
	d, err := client.AppsV1().Deployments("ns").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func edit(t *testing.T, client *fake.Clientset, f func(*appsv1.Deployment)) {
	t.Helper()
	d := get(t, client)
	f(d)
	if _, err := client.AppsV1().Deployments("ns").Update(t.Context(), d, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func checkDone(t *testing.T, n *nodes, image string, revision string) {
	t.Helper()
	d := get(t, n.client)
	if !complete(d, &d.Status) || d.Annotations[annRevision] != revision || progressing(t, step{deployment: d}) != "True NewReplicaSetAvailable" {
		t.Errorf("revision %s, progressing %s, status %+v", d.Annotations[annRevision], progressing(t, step{deployment: d}), d.Status)
	}
	for _, p := range n.pods() {
		if got := p.Spec.Containers[0].Image; got != image {
			t.Errorf("a pod runs %s, want %s", got, image)
		}
	}
}

// Two controllers together, with pods that take their time: create, roll, go
// back, scale in mid-rollout, and then silence.
func TestRollingUpdateAndBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(deployment(6, "2", "1"))
		rec := controllertest.Start(t, client, nil, New, replicaset.New)
		n := &nodes{t: t, client: client, most: 6}
		n.run(time.Minute)
		checkDone(t, n, "i:1", "1")

		n.most, n.least = 8, 5
		edit(t, client, func(d *appsv1.Deployment) {
			d.Spec.Template = template("2")
			d.Annotations["kubernetes.io/change-cause"] = "second"
		})
		n.run(2 * time.Minute)
		checkDone(t, n, "i:2", "2")

		edit(t, client, func(d *appsv1.Deployment) { d.Spec.Template = template("1") }) // what kubectl rollout undo does
		n.run(3 * time.Second)
		edit(t, client, func(d *appsv1.Deployment) { d.Spec.Replicas = new(int32(12)) })
		n.most = 14
		n.run(2 * time.Minute)
		checkDone(t, n, "i:1", "3")
		if len(n.pods()) != 12 {
			t.Errorf("%d pods, want 12", len(n.pods()))
		}
		sets, _ := client.AppsV1().ReplicaSets("ns").List(t.Context(), metav1.ListOptions{})
		if len(sets.Items) != 2 {
			t.Errorf("%d ReplicaSets, want 2", len(sets.Items))
		}
		for _, s := range sets.Items {
			if s.Annotations[annRevision] == "3" && s.Annotations[annHistory] != "1" {
				t.Errorf("history of the set that was gone back to: %v", s.Annotations)
			}
			if s.Annotations[annRevision] == "2" && s.Annotations["kubernetes.io/change-cause"] != "second" {
				t.Errorf("change cause of revision 2: %v", s.Annotations)
			}
		}
		if ev := strings.Join(controllertest.Events(rec), "\n"); !strings.Contains(ev, "Normal ScalingReplicaSet Scaled up replica set web-") || !strings.Contains(ev, "Scaled down replica set") {
			t.Errorf("events:\n%s", ev)
		}
		client.ClearActions()
		time.Sleep(time.Hour)
		synctest.Wait()
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
	})
}

func TestRecreateNeverMixesVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(recreate(deployment(4, "0", "0")))
		controllertest.Start(t, client, nil, New, replicaset.New)
		n := &nodes{t: t, client: client, most: 4}
		n.run(time.Minute)
		edit(t, client, func(d *appsv1.Deployment) { d.Spec.Template = template("2") })
		for range 60 {
			n.run(time.Second)
			images := map[string]bool{}
			for _, p := range n.pods() {
				images[p.Spec.Containers[0].Image] = true
			}
			if len(images) > 1 {
				t.Fatalf("pods of several versions: %v", images)
			}
		}
		checkDone(t, n, "i:2", "2")
	})
}

func TestDeadlinePassesInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(deployment(2, "1", "0"))
		controllertest.Start(t, client, nil, New, replicaset.New)
		time.Sleep(9 * time.Minute)
		synctest.Wait()
		if got := progressing(t, step{deployment: get(t, client)}); got != "True ReplicaSetUpdated" {
			t.Errorf("before the deadline: %s", got)
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if got := progressing(t, step{deployment: get(t, client)}); got != "False ProgressDeadlineExceeded" {
			t.Errorf("after the deadline: %s", got)
		}
	})
}

func TestANameThatIsTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := deployment(1, "1", "0")
		taken := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web-" + history.Hash(&d.Spec.Template, nil), UID: "other", ResourceVersion: "4"},
			Spec: appsv1.ReplicaSetSpec{Replicas: new(int32), Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"x": "y"}}}}
		client := controllertest.NewClient(d, taken)
		controllertest.Start(t, client, nil, New)
		time.Sleep(time.Minute)
		synctest.Wait()
		sets, _ := client.AppsV1().ReplicaSets("ns").List(t.Context(), metav1.ListOptions{})
		if got := get(t, client).Status.CollisionCount; got == nil || *got != 1 || len(sets.Items) != 2 {
			t.Errorf("collisions %v, %d sets; want 1 and 2", fmt.Sprint(got), len(sets.Items))
		}
	})
}

func TestAdoptsItsOrphan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := deployment(3, "1", "0")
		orphan := rs(d, "1", 3, 3, 3)
		orphan.Labels = map[string]string{"app": "web"}
		orphan.ResourceVersion = "4"
		orphan.Spec.Selector = d.Spec.Selector
		client := controllertest.NewClient(d, orphan)
		controllertest.Start(t, client, nil, New)
		time.Sleep(time.Minute)
		synctest.Wait()
		sets, _ := client.AppsV1().ReplicaSets("ns").List(t.Context(), metav1.ListOptions{})
		if len(sets.Items) != 1 || !metav1.IsControlledBy(&sets.Items[0], d) {
			t.Errorf("sets %v", sets.Items)
		}
	})
}
