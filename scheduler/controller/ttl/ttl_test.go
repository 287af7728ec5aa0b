package ttl

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

func TestClimb(t *testing.T) {
	for _, tc := range []struct{ at, nodes, want int }{
		{0, 0, 0}, {0, 100, 0}, {0, 101, 15}, {1, 100, 15}, {1, 90, 15}, {1, 89, 0}, {0, 5000, 300}, {4, 1800, 300}, {4, 1799, 60}, {4, 3, 0}, {2, 451, 30},
	} {
		if got := steps[climb(steps, tc.at, tc.nodes)].seconds; got != tc.want {
			t.Errorf("%d nodes from step %d: %d s, want %d", tc.nodes, tc.at, got, tc.want)
		}
	}
}

func TestAllNodesAreToldAndNothingIsWrittenTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, ctx := controllertest.NewClient(), t.Context()
		controllertest.Start(t, client, func(*controller.Deps) {}, func(d controller.Deps) controller.Controller {
			return newWith(d, []step{{0, 10, 0}, {9, 50, 15}, {45, 100, 30}})
		})
		nodes := client.CoreV1().Nodes()
		add := func(from, to int) {
			t.Helper()
			for i := from; i < to; i++ {
				if _, err := nodes.Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("n%d", i)}}, metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		remove := func(from, to int) {
			t.Helper()
			for i := from; i < to; i++ {
				if err := nodes.Delete(ctx, fmt.Sprintf("n%d", i), metav1.DeleteOptions{}); err != nil {
					t.Fatal(err)
				}
			}
		}
		check := func(want string) {
			t.Helper()
			time.Sleep(time.Second)
			synctest.Wait()
			l, err := nodes.List(ctx, metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range l.Items {
				if got, ok := n.Annotations[corev1.ObjectTTLAnnotationKey]; got != want || !ok {
					t.Fatalf("node %s of %d: %q, want %q", n.Name, len(l.Items), got, want)
				}
			}
		}
		add(0, 10)
		check("0")
		add(10, 11)
		check("15")
		remove(9, 11)
		check("15")
		remove(8, 9)
		check("0")
		if _, err := nodes.Patch(ctx, "n1", "application/merge-patch+json", []byte(`{"metadata":{"annotations":{"node.alpha.kubernetes.io/ttl":null}}}`), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		check("0")
		client.ClearActions()
		time.Sleep(time.Hour)
		synctest.Wait()
		if a := client.Actions(); len(a) != 0 {
			t.Errorf("requests while nothing changes: %v", a)
		}
	})
}
