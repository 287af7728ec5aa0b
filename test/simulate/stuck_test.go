package simulate

import (
	"errors"
	"fmt"
	"maps"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// What can never succeed costs each object less than one writing request a minute, events and refused requests included.
func TestStuckObjectsCostNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(1, logs())
		defer w.stop()
		w.namespace("full")
		pods := 0
		w.s.admit = func(obj runtime.Object) error {
			if p, ok := obj.(*corev1.Pod); ok && p.Namespace == "full" {
				if pods++; pods > 10 {
					return apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, p.Name, errors.New("exceeded quota"))
				}
			}
			return nil
		}
		for _, n := range []string{"n1", "n2", "n3"} {
			w.agents.add(n, "z", "8", "16Gi")
		}
		pod := func(name string, edit func(*corev1.PodSpec)) {
			p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{"app": name}}, Spec: podSpec("10m", corev1.RestartPolicyAlways)}
			edit(&p.Spec)
			w.make(p)
		}
		pod("selector", func(s *corev1.PodSpec) { s.NodeSelector = map[string]string{"no": "such"} })
		pod("huge", func(s *corev1.PodSpec) { s.Containers[0].Resources.Requests[corev1.ResourceCPU] = *quantity("1000") })
		pod("spread", func(s *corev1.PodSpec) {
			s.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{{MaxSkew: 1, TopologyKey: "no/such", WhenUnsatisfiable: corev1.DoNotSchedule, LabelSelector: selector("spread")}}
		})
		objects := 3
		w.make(deployment("full", "million", 1000000, intstr.FromInt32(1), intstr.FromInt32(1), false))
		w.make(statefulSet("full", "set", 3, appsv1.ParallelPodManagement))
		w.make(job("full", "job", 5, 5, true, 0))
		failing := job("default", "failing", 3, 3, false, 100)
		w.make(failing)
		cron := &batchv1.CronJob{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "cron"}, Spec: batchv1.CronJobSpec{Schedule: "61 25 * * *", Suspend: ptr(false), ConcurrencyPolicy: batchv1.AllowConcurrent,
			JobTemplate: batchv1.JobTemplateSpec{Spec: failing.Spec}}}
		w.make(cron)
		a := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "a"}}
		w.make(a)
		b := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "b", OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: "a", UID: a.UID}}}}
		w.make(b)
		edit(w, "default", "a", func(c *corev1.ConfigMap) {
			c.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: "b", UID: b.UID}}
		})
		w.make(daemonSet("full", "everywhere", false))
		w.make(&corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "never"}, Spec: corev1.PersistentVolumeClaimSpec{
			AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, StorageClassName: ptr("none"),
			Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceStorage: *quantity("1Gi")}}}})
		// Who may take another's place, whom nobody may delete; and who is evicted by a taint, likewise.
		w.s.keep = func(obj runtime.Object) error {
			if p, ok := obj.(*corev1.Pod); ok && p.Labels["kept"] != "" {
				return apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, p.Name, errors.New("denied by a webhook"))
			}
			return nil
		}
		for name, node := range map[string]string{"victim": "n1", "tainted": "n4"} {
			p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, Labels: map[string]string{"kept": "yes"}}, Spec: podSpec("6", corev1.RestartPolicyAlways)}
			p.Spec.NodeName = node
			w.make(p)
		}
		w.agents.add("n4", "z", "8", "16Gi")
		edit(w, "", "n4", func(n *corev1.Node) {
			n.Spec.Taints = append(n.Spec.Taints, corev1.Taint{Key: "broken", Effect: corev1.TaintEffectNoExecute})
		})
		pod("vip", func(s *corev1.PodSpec) {
			s.NodeSelector, s.Priority = map[string]string{corev1.LabelHostname: "n1"}, ptr(int32(1000))
			s.Containers[0].Resources.Requests[corev1.ResourceCPU] = *quantity("7")
		})
		objects += 8 + 5 // the Deployment's ReplicaSet is one
		w.elect(0)
		time.Sleep(20 * time.Minute)
		w.s.mu.Lock()
		before := maps.Clone(w.s.tries)
		w.s.mu.Unlock()
		const minutes = 60
		time.Sleep(minutes * time.Minute)
		w.s.mu.Lock()
		defer w.s.mu.Unlock()
		sum, of := 0, map[string]int{}
		for what, n := range w.s.tries {
			if n -= before[what]; n > 0 {
				sum += n
				for _, name := range []string{"victim", "tainted", "vip"} {
					if strings.Contains(what, "/"+name) {
						of[name] += n
					}
				}
				t.Logf("%4d %s", n, what)
				if n > 4*minutes { // one path is of several objects: events, the pods of the full namespace
					t.Errorf("%d times %s in an hour", n, what)
				}
			}
		}
		for name, n := range of {
			if n >= minutes {
				t.Errorf("%d times something about %s in an hour", n, name)
			}
		}
		if sum > objects*minutes {
			t.Errorf("%d requests in an hour for %d stuck objects", sum, objects)
		}
		for _, p := range all2[*corev1.Pod](w, podsGVR) {
			if p.Namespace == "default" && (p.Name == "selector" || p.Name == "huge" || p.Name == "spread") {
				if len(p.Status.Conditions) == 0 || p.Status.Conditions[0].Reason != corev1.PodReasonUnschedulable {
					t.Errorf("pod %s does not say why: %+v", p.Name, p.Status.Conditions)
				}
			}
		}
	})
}

// all2 is all, under the store's lock.
func all2[T runtime.Object](w *world, gvr schema.GroupVersionResource) (out []T) {
	for _, e := range w.s.tables[gvr].objs {
		out = append(out, e.obj.(T))
	}
	return out
}

// A Service with more pods than one EndpointSlice holds: a controller that went by slices older than its own writes would leave some out.
func TestServicesOfManyPods(t *testing.T) {
	var res result
	synctest.Test(t, func(*testing.T) {
		w := newWorld(1, logs())
		w.enough = func() bool { return false }
		defer w.stop()
		u := newUser(w, scenario{nodes: 200, pods: 600})
		w.elect(0)
		for i := range 4 {
			ns, name := u.home(), fmt.Sprintf("web-%d", i)
			w.make(deployment(ns, name, 120, intstr.FromString("25%"), intstr.FromString("25%"), false))
			w.make(service(ns, name))
		}
		w.await30(5*time.Minute, &res, "with many pods")
	})
	for _, v := range res.violations {
		t.Error(v)
	}
}
