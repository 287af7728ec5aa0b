package controller

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"runtime"
	"testing"
	"unsafe"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
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

// What pods have in common they share, nothing of any pod is changed by that, and what is not in use any more is forgotten.
func TestViewShares(t *testing.T) {
	s := &shares{}
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	var pods []*corev1.Pod
	for i := range 300 {
		p := decoded(t, sharedPod(r.IntN(5), i))
		if r.IntN(20) == 0 {
			p.Spec.NodeSelector, p.Labels = map[string]string{"own": fmt.Sprint(i)}, map[string]string{"own": fmt.Sprint(i)}
		}
		want := p.DeepCopy()
		slim(want)
		got, err := s.strip(p)
		if err != nil {
			t.Fatal(err)
		}
		if !equality.Semantic.DeepEqual(got, want) {
			t.Fatalf("seed %d: the pod became\n%v\nwant\n%v", seed, got, want)
		}
		pods = append(pods, p)
	}
	for _, p := range pods { // the later ones left the earlier ones alone
		if p.Spec.Hostname != fmt.Sprintf("web-%s", p.ResourceVersion) || p.Spec.Volumes[0].PersistentVolumeClaim.ClaimName != "data-"+p.ResourceVersion {
			t.Errorf("seed %d: pod %s has the host name %s and the claim %s", seed, p.Name, p.Spec.Hostname, p.Spec.Volumes[0].PersistentVolumeClaim.ClaimName)
		}
	}
	a, b := decoded(t, sharedPod(1, 1)), decoded(t, sharedPod(1, 2))
	for _, p := range []*corev1.Pod{a, b} {
		if _, err := s.strip(p); err != nil {
			t.Fatal(err)
		}
	}
	if &a.Spec.Containers[0] != &b.Spec.Containers[0] || reflect.ValueOf(a.Labels).Pointer() != reflect.ValueOf(b.Labels).Pointer() || &a.OwnerReferences[0] != &b.OwnerReferences[0] {
		t.Error("two pods of a template share nothing")
	}
	if unsafe.StringData(string(a.Status.Phase)) != unsafe.StringData(string(b.Status.Phase)) {
		t.Error("two pods have a phase each")
	}
	for i := range 5 * maxShared {
		p := sharedPod(i, 0)
		if _, err := s.strip(p); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(s.specs.young) + len(s.specs.old) + len(s.metas.young) + len(s.metas.old); n > 4*maxShared {
		t.Errorf("%d templates are remembered", n)
	}
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
		})
	}
}
