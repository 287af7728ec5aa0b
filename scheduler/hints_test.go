package scheduler

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"skein.io/skein/scheduler/controller/controllertest"
)

// A pod that fits nowhere is not tried again by what cannot help it: each
// attempt would show as an event. Then by what can.
func TestOnlyWhatHelpsWakes(t *testing.T) {
	antiWeb := func(p *v1.Pod) {
		p.Spec.Affinity = &v1.Affinity{PodAntiAffinity: &v1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []v1.PodAffinityTerm{
			{TopologyKey: v1.LabelHostname, LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}}}}}
	}
	on := func(node string, labels map[string]string) func(*v1.Pod) {
		return func(p *v1.Pod) { p.Spec.NodeName, p.Labels = node, labels }
	}
	web := map[string]string{"app": "web"}
	remove := func(w *fake.Clientset, name string) error {
		return w.Tracker().Delete(v1.SchemeGroupVersion.WithResource("pods"), "default", name)
	}
	end := func(w *fake.Clientset, name string) error {
		pods := v1.SchemeGroupVersion.WithResource("pods")
		obj, err := w.Tracker().Get(pods, "default", name)
		if err != nil {
			return err
		}
		pod, now := obj.(*v1.Pod).DeepCopy(), metav1.Now()
		pod.DeletionTimestamp = &now
		return w.Tracker().Update(pods, pod, "default")
	}
	three := int32(3)
	spread := func(p *v1.Pod) {
		p.Labels = web
		p.Spec.TopologySpreadConstraints = []v1.TopologySpreadConstraint{{MaxSkew: 1, MinDomains: &three, TopologyKey: v1.LabelHostname,
			WhenUnsatisfiable: v1.DoNotSchedule, LabelSelector: &metav1.LabelSelector{MatchLabels: web}}}
	}
	for _, tc := range []struct {
		name        string
		pod         *v1.Pod
		idle, helps func(*fake.Clientset) error
	}{
		{"room on a node that is too small, then enough",
			testPod("p", "3"),
			func(c *fake.Clientset) error { return remove(c, "small") },
			func(c *fake.Clientset) error { return remove(c, "large") }},
		{"a pod of another kind goes, then the one to keep away from",
			testPod("p", "500m", antiWeb),
			func(c *fake.Clientset) error { return remove(c, "large") },
			func(c *fake.Clientset) error { return remove(c, "web") }},
		{"the pod to keep away from begins to end, then has ended",
			testPod("p", "500m", antiWeb),
			func(c *fake.Clientset) error { return end(c, "web") },
			func(c *fake.Clientset) error { return remove(c, "web") }},
		{"a pod of another kind begins to end, then one that this is spread from",
			testPod("p", "500m", spread),
			func(c *fake.Clientset) error { return end(c, "large") },
			func(c *fake.Clientset) error { return end(c, "web") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := newClient(nil, testNode("a", "4"), testNode("b", "2"),
					testPod("large", "3", on("a", nil)), testPod("small", "1", on("b", nil)),
					testPod("web", "100m", on("a", web)), testPod("web2", "100m", on("b", web)))
				rec := placing(t, client, newHealth())
				settle(time.Second)
				create(t, client, tc.pod)
				settle(time.Minute)
				if events := controllertest.Events(rec); len(events) != 1 || !strings.Contains(events[0], "FailedScheduling") {
					t.Fatalf("%q", events)
				}
				if err := tc.idle(client); err != nil {
					t.Fatal(err)
				}
				settle(time.Minute)
				if events := controllertest.Events(rec); len(events) != 0 {
					t.Errorf("tried again by what cannot help: %q", events)
				}
				if err := tc.helps(client); err != nil {
					t.Fatal(err)
				}
				settle(time.Second)
				if get(t, client, "p").Spec.NodeName == "" {
					t.Error("not woken by what helps")
				}
			})
		})
	}
}

// counting is a Binder that notes how many bindings come together.
type counting struct {
	Binder
	calls, pods atomic.Int64
}

func (c *counting) Bind(ctx context.Context, all []*v1.Binding, done func(int, error)) {
	c.calls.Add(1)
	c.pods.Add(int64(len(all)))
	c.Binder.Bind(ctx, all, done)
}

// Pods that are there together are decided on one state and bound together;
// of a batch in which some bindings meet a conflict only those pods are
// planned again.
func TestConflictReplansOnlyThatPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := map[string]int{}
		var mu sync.Mutex // guards refused
		client := newClient(func(pod, _ string) error {
			mu.Lock()
			defer mu.Unlock()
			if strings.HasSuffix(pod, "7") && refused[pod] == 0 {
				refused[pod]++
				return errors.New("the object has been modified")
			}
			return nil
		})
		for i := range 5 {
			if err := client.Tracker().Add(testNode(fmt.Sprint("n", i), "20")); err != nil {
				t.Fatal(err)
			}
		}
		for i := range 100 {
			create(t, client, testPod(fmt.Sprintf("p%02d", i), "1"))
		}
		binder := &counting{Binder: requests{client, 32}}
		placing(t, client, newHealth(), func(c *Config) { c.Binder = binder })
		settle(10 * time.Second)
		for i := range 100 {
			if p := get(t, client, fmt.Sprintf("p%02d", i)); p.Spec.NodeName == "" {
				t.Errorf("%s is not bound", p.Name)
			}
		}
		if pods, calls := binder.pods.Load(), binder.calls.Load(); pods != 110 || calls > 20 {
			t.Errorf("%d bindings in %d batches: want 110, in a few", pods, calls)
		}
	})
}

// When all waiting pods are tried again and are refused as before, nothing is written about them again.
func TestUnchangedRefusalsAreNotWrittenAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const pods = 300
		client := newClient(nil, testNode("a", "2"))
		rec := placing(t, client, newHealth())
		settle(time.Second)
		for i := range pods {
			create(t, client, testPod(fmt.Sprint("p", i), "3"))
		}
		settle(time.Minute)
		if n := controllertest.Writes(client, "patch", "pods/status"); n != pods {
			t.Fatalf("%d conditions were written of %d pods", n, pods)
		}
		controllertest.Events(rec)
		client.ClearActions()
		for i := range pods { // what has them tried again
			p := get(t, client, fmt.Sprint("p", i))
			p.Labels = map[string]string{"changed": "yes"}
			if err := client.Tracker().Update(v1.SchemeGroupVersion.WithResource("pods"), p, p.Namespace); err != nil {
				t.Fatal(err)
			}
		}
		settle(time.Minute)
		if n := len(controllertest.Events(rec)); n != pods {
			t.Errorf("%d of %d pods were tried again", n, pods)
		}
		if n := controllertest.Writes(client, "patch", "pods/status"); n != 0 {
			t.Errorf("%d conditions were written again", n)
		}
		if err := client.Tracker().Add(testNode("b", "2")); err != nil { // another count of nodes is another message
			t.Fatal(err)
		}
		settle(time.Minute)
		if n := controllertest.Writes(client, "patch", "pods/status"); n > pods {
			t.Errorf("%d conditions of %d pods were written for one node", n, pods)
		}
	})
}
