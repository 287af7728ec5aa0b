package controller

import (
	"fmt"
	"reflect"
	"runtime"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// decoded is a pod as it comes from the API: nothing of it is anybody else's.
func decoded(t testing.TB, p *corev1.Pod) *corev1.Pod {
	t.Helper()
	b, err := p.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	out := &corev1.Pod{}
	if err := out.Unmarshal(b); err != nil {
		t.Fatal(err)
	}
	return out
}

func sharedPod(template, i int) *corev1.Pod {
	seconds, yes := int64(300), true
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: fmt.Sprintf("web-%d-%d", template, i), UID: types.UID(fmt.Sprintf("uid-%d-%d", template, i)), ResourceVersion: fmt.Sprint(i),
			GenerateName: "web-", Labels: map[string]string{"app": "web", "template": fmt.Sprint(template)},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: fmt.Sprintf("web-%d", template), UID: "rs", Controller: &yes}}},
		Spec: corev1.PodSpec{NodeName: fmt.Sprintf("n%d", i%3), Hostname: fmt.Sprintf("web-%d", i), SchedulerName: "default-scheduler",
			Volumes:     []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: fmt.Sprintf("data-%d", i)}}}},
			Tolerations: []corev1.Toleration{{Key: corev1.TaintNodeNotReady, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: &seconds}},
			Containers: []corev1.Container{{Name: "nginx", Image: fmt.Sprintf("nginx:1.%d", template), Ports: []corev1.ContainerPort{{ContainerPort: 80}},
				Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{"cpu": resource.MustParse("10m"), "memory": resource.MustParse("16Mi")}}}}},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, HostIP: "192.0.2.1", QOSClass: corev1.PodQOSBurstable,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}},
	}
}

// Pods of a template share what they have in common, and what is not in use any more is forgotten.
func TestViewShares(t *testing.T) {
	s := &shares{}
	var pods []*corev1.Pod
	for i := range 2 {
		obj, err := s.strip(decoded(t, sharedPod(1, i)))
		if err != nil {
			t.Fatal(err)
		}
		p, ok := obj.(*packed)
		if !ok {
			t.Fatalf("an ordinary pod is held as %T", obj)
		}
		if first := p.unpack(); p.unpack() != first {
			t.Error("a pod that somebody has is made twice")
		}
		pods = append(pods, p.unpack(), p.build())
	}
	for _, o := range pods[1:] {
		if &pods[0].Spec.Containers[0] != &o.Spec.Containers[0] || reflect.ValueOf(pods[0].Labels).Pointer() != reflect.ValueOf(o.Labels).Pointer() || &pods[0].OwnerReferences[0] != &o.OwnerReferences[0] {
			t.Error("two pods of a template share nothing")
		}
	}
	for i := range 5 * minClean {
		if _, err := s.strip(sharedPod(i, 0)); err != nil {
			t.Fatal(err)
		}
		if i%minClean == 0 {
			runtime.GC()
		}
	}
	if n := max(len(s.specs.known), len(s.metas.known), len(s.states.known)); n > 3*minClean {
		t.Errorf("%d templates are remembered", n)
	}
	runtime.KeepAlive(pods)
}

// How much of the heap a pod takes, as it comes and as the view keeps it.
func BenchmarkViewPod(b *testing.B) {
	for name, strip := range map[string]func(any) (any, error){"as it comes": func(o any) (any, error) { return o, nil }, "in the view": (&shares{}).strip} {
		b.Run(name, func(b *testing.B) {
			raw := make([][]byte, b.N)
			for i := range raw {
				raw[i], _ = sharedPod(1, i).Marshal()
			}
			held := make([]any, b.N)
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			b.ResetTimer()
			for i := range held {
				p := &corev1.Pod{}
				if err := p.Unmarshal(raw[i]); err != nil {
					b.Fatal(err)
				}
				held[i], _ = strip(p)
			}
			b.StopTimer()
			runtime.GC()
			runtime.ReadMemStats(&after)
			b.ReportMetric(float64(int64(after.HeapAlloc-before.HeapAlloc))/float64(b.N), "heap-B/pod")
			runtime.KeepAlive(held)
			runtime.KeepAlive(raw)
		})
	}
}

// What it takes to make a pod of what the view holds.
func BenchmarkUnpack(b *testing.B) {
	obj, err := (&shares{}).strip(decoded(b, sharedPod(1, 1)))
	if err != nil {
		b.Fatal(err)
	}
	p := obj.(*packed)
	b.Run("anew", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			p.build()
		}
	})
	b.Run("known", func(b *testing.B) {
		pod := p.unpack()
		for b.Loop() {
			p.unpack()
		}
		runtime.KeepAlive(pod)
	})
	b.Run("remembered", func(b *testing.B) {
		all := make([]*packed, 10000)
		for i := range all {
			obj, _ := (&shares{}).strip(decoded(b, sharedPod(1, i)))
			all[i] = obj.(*packed)
		}
		for b.Loop() {
			b.StopTimer()
			runtime.GC()
			b.StartTimer()
			for _, p := range all {
				p.unpack()
			}
		}
		b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*len(all)), "ns/pod")
	})
}
