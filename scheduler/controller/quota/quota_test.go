package quota

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

// usage counts pods that have not ended, and claims to know nothing of memory.
type usage struct {
	client *fake.Clientset
	asked  int
	err    error
}

func (u *usage) Usage(ctx context.Context, q *corev1.ResourceQuota) (corev1.ResourceList, bool, error) {
	u.asked++
	pods, err := u.client.CoreV1().Pods(q.Namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, false, err
	}
	n := int64(0)
	for i := range pods.Items {
		if !controller.PodTerminal(&pods.Items[i]) {
			n++
		}
	}
	_, counts := q.Spec.Hard["count/secrets"]
	return corev1.ResourceList{corev1.ResourcePods: *resource.NewQuantity(n, resource.DecimalSI)}, counts, u.err
}

func newQuota(limits ...string) *corev1.ResourceQuota {
	q := &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "q", UID: "q", ResourceVersion: "3"}, Spec: corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{}}}
	for _, l := range limits {
		q.Spec.Hard[corev1.ResourceName(l)] = resource.MustParse("5")
	}
	return q
}

func TestLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQuota("pods", "memory")
		q.Status.Used = corev1.ResourceList{"memory": resource.MustParse("1Gi"), "cpu": resource.MustParse("1")}
		client := controllertest.NewClient(q)
		u := &usage{client: client}
		controllertest.Start(t, client, func(d *controller.Deps) { d.Quota = u }, New)
		check := func(what, pods string) {
			t.Helper()
			time.Sleep(2 * time.Second)
			synctest.Wait()
			got, err := client.CoreV1().ResourceQuotas("ns").Get(t.Context(), "q", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			n, m := got.Status.Used[corev1.ResourcePods], got.Status.Used[corev1.ResourceMemory]
			if n.String() != pods || m.String() != "1Gi" || len(got.Status.Used) != 2 || len(got.Status.Hard) != 2 {
				t.Errorf("%s: %v of %v, want %s pods", what, got.Status.Used, got.Status.Hard, pods)
			}
		}
		check("the first", "0")
		for _, name := range []string{"a", "b"} {
			p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name}}
			if _, err := client.CoreV1().Pods("ns").Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		check("admission counts what is made", "0")
		p, err := client.CoreV1().Pods("ns").Get(t.Context(), "a", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		p.Status.Phase = corev1.PodSucceeded
		if _, err := client.CoreV1().Pods("ns").UpdateStatus(t.Context(), p, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		check("one has ended", "1")
		if err := client.CoreV1().Pods("ns").Delete(t.Context(), "b", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		check("the other has gone", "0")
		time.Sleep(recount) // the last change is checked once more
		synctest.Wait()
		before, asked := len(client.Actions()), u.asked
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := len(client.Actions()) - before; n != 0 || u.asked != asked {
			t.Errorf("%d requests and %d questions in an idle hour", n, u.asked-asked)
		}
	})
}

// What others write into the status does not stay there.
func TestForeignStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := newQuota("pods")
		client := controllertest.NewClient(q)
		controllertest.Start(t, client, func(d *controller.Deps) { d.Quota = &usage{client: client} }, New)
		for _, c := range []struct {
			what   string
			change func(*corev1.ResourceQuotaStatus)
			within time.Duration
		}{
			{"limits", func(s *corev1.ResourceQuotaStatus) { s.Hard["pods"] = resource.MustParse("7") }, 2 * time.Second},
			{"usage", func(s *corev1.ResourceQuotaStatus) { s.Used["pods"] = resource.MustParse("3") }, recount + 2*time.Second},
		} {
			time.Sleep(time.Minute)
			got, err := client.CoreV1().ResourceQuotas("ns").Get(t.Context(), "q", metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			c.change(&got.Status)
			if _, err := client.CoreV1().ResourceQuotas("ns").UpdateStatus(t.Context(), got, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(c.within)
			synctest.Wait()
			if got, err = client.CoreV1().ResourceQuotas("ns").Get(t.Context(), "q", metav1.GetOptions{}); err != nil {
				t.Fatal(err)
			}
			if n, m := got.Status.Hard["pods"], got.Status.Used["pods"]; n.String() != "5" || m.String() != "0" {
				t.Errorf("%s: %v of %v", c.what, got.Status.Used, got.Status.Hard)
			}
		}
	})
}

// What nobody tells about is asked for again, and costs no write while it stays.
func TestRecount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(newQuota("pods", "count/secrets"))
		u := &usage{client: client, err: errors.New("secrets cannot be counted")}
		controllertest.Start(t, client, func(d *controller.Deps) { d.Quota = u }, New)
		time.Sleep(time.Minute)
		synctest.Wait()
		if u.asked < 6 || u.asked > 30 {
			t.Errorf("asked %d times in a minute", u.asked)
		}
		if n := controllertest.Writes(client, "update", "resourcequotas/status"); n != 1 {
			t.Errorf("%d writes, want 1", n)
		}
	})
}
