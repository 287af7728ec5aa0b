// Package hpa runs upstream's controller of HorizontalPodAutoscalers beside Skein's, on worlds that change in the same way, and compares what they do. Tests only.
package hpa

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	scaleclient "k8s.io/client-go/scale"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/controller/podautoscaler"
	"k8s.io/kubernetes/pkg/controller/podautoscaler/metrics"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
	"skein.io/skein/scheduler/controller/horizontalpodautoscaler"
)

const period = 15 * time.Second

// world is one target and what is measured of it.
type world struct {
	mu       sync.Mutex // guards the rest
	replicas int32
	scaled   []string // when and to how many
	used     map[string]int64
	object   int64
	external []int64
	broken   map[string]bool // sources that give errors
}

func (w *world) scale() *autoscalingv1.Scale {
	return &autoscalingv1.Scale{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"}, Spec: autoscalingv1.ScaleSpec{Replicas: w.replicas},
		Status: autoscalingv1.ScaleStatus{Replicas: max(w.replicas, 1), Selector: "app=web"}}
}

func (w *world) set(n int32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.replicas = n
	w.scaled = append(w.scaled, fmt.Sprintf("%s: %d", time.Now().Format("04:05"), n))
}

// history is how often and to how many the target was scaled, and how many there are.
func (w *world) history() (scaled string, replicas int32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.scaled, ", "), w.replicas
}

func (w *world) fails(source string) error {
	if w.broken[source] {
		return errors.New("the " + source + " metrics are away")
	}
	return nil
}

// ours shows the world to Skein's controller.
type ours struct{ *world }

func (o ours) Scale(context.Context, string, autoscalingv2.CrossVersionObjectReference) (*autoscalingv1.Scale, schema.GroupResource, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.scale(), schema.GroupResource{Group: "apps", Resource: "deployments"}, nil
}

func (o ours) SetScale(_ context.Context, _ string, _ schema.GroupResource, s *autoscalingv1.Scale) error {
	o.set(s.Spec.Replicas)
	return nil
}

func (o ours) Resource(context.Context, string, corev1.ResourceName, string, labels.Selector) (map[string]horizontalpodautoscaler.Sample, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	out := map[string]horizontalpodautoscaler.Sample{}
	for pod, v := range o.used {
		out[pod] = horizontalpodautoscaler.Sample{Value: v, At: time.Now(), Window: period}
	}
	return out, o.fails("resource")
}

func (o ours) Pods(ctx context.Context, ns, _ string, pods, _ labels.Selector) (map[string]horizontalpodautoscaler.Sample, error) {
	out, _ := o.Resource(ctx, ns, "", "", pods)
	o.mu.Lock()
	defer o.mu.Unlock()
	return out, o.fails("pods")
}

func (o ours) Object(context.Context, string, string, autoscalingv2.CrossVersionObjectReference, labels.Selector) (int64, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.object, o.fails("object")
}

func (o ours) External(context.Context, string, string, labels.Selector) ([]int64, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return slices.Clone(o.external), o.fails("external")
}

// theirs shows the world to upstream's.
type theirs struct{ *world }

func (t theirs) Scales(string) scaleclient.ScaleInterface { return t }

func (t theirs) Get(context.Context, schema.GroupResource, string, metav1.GetOptions) (*autoscalingv1.Scale, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.scale(), nil
}

func (t theirs) Update(_ context.Context, _ schema.GroupResource, s *autoscalingv1.Scale, _ metav1.UpdateOptions) (*autoscalingv1.Scale, error) {
	t.set(s.Spec.Replicas)
	return s, nil
}

func (t theirs) Patch(context.Context, schema.GroupVersionResource, string, types.PatchType, []byte, metav1.PatchOptions) (*autoscalingv1.Scale, error) {
	return nil, errors.New("nobody patches")
}

func (t theirs) GetResourceMetric(ctx context.Context, r corev1.ResourceName, ns string, s labels.Selector, container string) (metrics.PodMetricsInfo, time.Time, error) {
	found, err := ours(t).Resource(ctx, ns, r, container, s)
	out := metrics.PodMetricsInfo{}
	for pod, v := range found {
		out[pod] = metrics.PodMetric{Timestamp: v.At, Window: v.Window, Value: v.Value}
	}
	return out, time.Now(), err
}

func (t theirs) GetRawMetric(_ string, ns string, s labels.Selector, _ labels.Selector) (metrics.PodMetricsInfo, time.Time, error) {
	out, at, _ := t.GetResourceMetric(context.Background(), "", ns, s, "")
	t.mu.Lock()
	defer t.mu.Unlock()
	return out, at, t.fails("pods")
}

func (t theirs) GetObjectMetric(string, string, *autoscalingv2.CrossVersionObjectReference, labels.Selector) (int64, time.Time, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.object, time.Now(), t.fails("object")
}

func (t theirs) GetExternalMetric(string, string, labels.Selector) ([]int64, time.Time, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return slices.Clone(t.external), time.Now(), t.fails("external")
}

func ptr[T any](v T) *T { return &v }

// randomRules are rules as the API's defaults leave them: whole.
func randomRules(rnd *rand.Rand, window int32) *autoscalingv2.HPAScalingRules {
	r := &autoscalingv2.HPAScalingRules{StabilizationWindowSeconds: ptr(window * rnd.Int32N(3) / 2)}
	r.SelectPolicy = ptr([]autoscalingv2.ScalingPolicySelect{autoscalingv2.MaxChangePolicySelect, autoscalingv2.MinChangePolicySelect, autoscalingv2.MaxChangePolicySelect, autoscalingv2.DisabledPolicySelect}[rnd.IntN(4)])
	for range 1 + rnd.IntN(2) {
		p := autoscalingv2.HPAScalingPolicy{Type: autoscalingv2.PodsScalingPolicy, Value: 1 + rnd.Int32N(5), PeriodSeconds: 15 * (1 + rnd.Int32N(8))}
		if rnd.IntN(2) == 0 {
			p.Type, p.Value = autoscalingv2.PercentScalingPolicy, 10*(1+rnd.Int32N(15))
		}
		r.Policies = append(r.Policies, p)
	}
	if rnd.IntN(3) == 0 {
		r.Tolerance = ptr(resource.MustParse(fmt.Sprintf("0.%02d", rnd.IntN(50))))
	}
	return r
}

func randomMetrics(rnd *rand.Rand) (out []autoscalingv2.MetricSpec) {
	id := autoscalingv2.MetricIdentifier{Name: "m"}
	milli := func(n int64) *resource.Quantity { return resource.NewMilliQuantity(n, resource.DecimalSI) }
	all := []autoscalingv2.MetricSpec{
		{Type: autoscalingv2.ResourceMetricSourceType, Resource: &autoscalingv2.ResourceMetricSource{Name: corev1.ResourceCPU, Target: autoscalingv2.MetricTarget{Type: autoscalingv2.UtilizationMetricType, AverageUtilization: ptr(20 + rnd.Int32N(120))}}},
		{Type: autoscalingv2.ResourceMetricSourceType, Resource: &autoscalingv2.ResourceMetricSource{Name: corev1.ResourceMemory, Target: autoscalingv2.MetricTarget{Type: autoscalingv2.AverageValueMetricType, AverageValue: milli(100 + rnd.Int64N(900))}}},
		{Type: autoscalingv2.ContainerResourceMetricSourceType, ContainerResource: &autoscalingv2.ContainerResourceMetricSource{Name: corev1.ResourceCPU, Container: "c", Target: autoscalingv2.MetricTarget{Type: autoscalingv2.UtilizationMetricType, AverageUtilization: ptr(20 + rnd.Int32N(80))}}},
		{Type: autoscalingv2.PodsMetricSourceType, Pods: &autoscalingv2.PodsMetricSource{Metric: id, Target: autoscalingv2.MetricTarget{Type: autoscalingv2.AverageValueMetricType, AverageValue: milli(100 + rnd.Int64N(900))}}},
		{Type: autoscalingv2.ObjectMetricSourceType, Object: &autoscalingv2.ObjectMetricSource{Metric: id, DescribedObject: autoscalingv2.CrossVersionObjectReference{Kind: "Service", Name: "web"}, Target: autoscalingv2.MetricTarget{Type: autoscalingv2.ValueMetricType, Value: milli(500 + rnd.Int64N(2000))}}},
		{Type: autoscalingv2.ObjectMetricSourceType, Object: &autoscalingv2.ObjectMetricSource{Metric: id, DescribedObject: autoscalingv2.CrossVersionObjectReference{Kind: "Service", Name: "web"}, Target: autoscalingv2.MetricTarget{Type: autoscalingv2.AverageValueMetricType, AverageValue: milli(200 + rnd.Int64N(500))}}},
		{Type: autoscalingv2.ExternalMetricSourceType, External: &autoscalingv2.ExternalMetricSource{Metric: id, Target: autoscalingv2.MetricTarget{Type: autoscalingv2.ValueMetricType, Value: milli(500 + rnd.Int64N(2000))}}},
		{Type: autoscalingv2.ExternalMetricSourceType, External: &autoscalingv2.ExternalMetricSource{Metric: id, Target: autoscalingv2.MetricTarget{Type: autoscalingv2.AverageValueMetricType, AverageValue: milli(200 + rnd.Int64N(500))}}},
	}
	rnd.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:1+rnd.IntN(3)]
}

// change is what happens to both worlds and to the pods of both clients.
func change(t *testing.T, rnd *rand.Rand, base int64, worlds []*world, clients []*fake.Clientset) {
	t.Helper()
	now := time.Now()
	_, n := worlds[0].history()
	pods := map[string]*corev1.Pod{}
	used := map[string]int64{}
	for i := range n {
		name := fmt.Sprintf("web-%d", i)
		started := now.Add(-time.Duration(rnd.IntN(900)) * time.Second)
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, Labels: map[string]string{"app": "web"}},
			Spec:   corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: *resource.NewMilliQuantity(500+rnd.Int64N(500), resource.DecimalSI)}}}}},
			Status: corev1.PodStatus{Phase: corev1.PodRunning, StartTime: &metav1.Time{Time: started}}}
		ready := corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(started.Add(time.Duration(rnd.IntN(60)) * time.Second))}
		switch rnd.IntN(12) {
		case 0:
			p.Status.Phase = corev1.PodPending
		case 1:
			p.Status.Phase = corev1.PodFailed
		case 2:
			p.DeletionTimestamp = &metav1.Time{Time: now}
		case 3, 4:
			ready.Status = corev1.ConditionFalse
		case 5:
			p.Spec.Resources = &corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("2")}}
		}
		p.Status.Conditions = []corev1.PodCondition{ready}
		if rnd.IntN(40) == 0 {
			p.Spec.Containers[0].Resources.Requests = nil
		}
		pods[name] = p
		if rnd.IntN(8) > 0 {
			used[name] = base + rnd.Int64N(base)
		}
	}
	object, external := rnd.Int64N(8000), []int64{rnd.Int64N(3000), rnd.Int64N(3000)}
	broken := map[string]bool{}
	for _, source := range []string{"resource", "pods", "object", "external"} {
		broken[source] = rnd.IntN(10) == 0
	}
	for i, w := range worlds {
		w.mu.Lock()
		w.used, w.object, w.external, w.broken = used, object, external, broken
		w.mu.Unlock()
		tracker, gvr := clients[i].Tracker(), corev1.SchemeGroupVersion.WithResource("pods")
		have, err := clients[i].CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, old := range have.Items {
			if pods[old.Name] == nil {
				err = errors.Join(err, tracker.Delete(gvr, "ns", old.Name))
			} else {
				err = errors.Join(err, tracker.Update(gvr, pods[old.Name].DeepCopy(), "ns"))
			}
		}
		for name, p := range pods {
			if !slices.ContainsFunc(have.Items, func(old corev1.Pod) bool { return old.Name == name }) {
				err = errors.Join(err, tracker.Create(gvr, p.DeepCopy(), "ns"))
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// conditions are an autoscaler's, without their words: Skein tells those less often.
func conditions(t *testing.T, client *fake.Clientset) string {
	t.Helper()
	hpa, err := client.AutoscalingV2().HorizontalPodAutoscalers("ns").Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, c := range hpa.Status.Conditions {
		out = append(out, fmt.Sprintf("%s=%s %s", c.Type, c.Status, c.Reason))
	}
	slices.Sort(out)
	return fmt.Sprintf("%d/%d %s", hpa.Status.CurrentReplicas, hpa.Status.DesiredReplicas, strings.Join(out, ", "))
}

func startUpstream(t *testing.T, client *fake.Clientset, w *world) {
	mapper := meta.NewDefaultRESTMapper([]schema.GroupVersion{appsv1.SchemeGroupVersion})
	mapper.Add(appsv1.SchemeGroupVersion.WithKind("Deployment"), meta.RESTScopeNamespace)
	f := informers.NewSharedInformerFactory(client, 0)
	ctx := klog.NewContext(t.Context(), klog.Background().V(100))
	c := podautoscaler.NewHorizontalController(ctx, client.CoreV1(), theirs{w}, client.AutoscalingV2(), mapper, theirs{w},
		f.Autoscaling().V2().HorizontalPodAutoscalers(), f.Core().V1().Pods(), period, 5*time.Minute, 0.1, 5*time.Minute, 30*time.Second)
	f.Start(ctx.Done())
	ended := make(chan struct{})
	go func() { defer close(ended); c.Run(ctx, 1) }()
	t.Cleanup(func() { <-ended; f.Shutdown() }) // after ctx has ended
}

// Upstream slows errors down by a clock that all of a process share, which bubbles of virtual time must not.
func init() { utilruntime.ErrorHandlers = nil }

// The same things happen to two worlds; the two controllers do the same at the same moments.
func TestSameAsUpstream(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	const steps = 50
	worlds := 16
	if os.Getenv("SKEIN_LONG") != "" {
		worlds = 500
	}
	t.Logf("seed %d", seed)
	for n := range worlds {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				rnd := rand.New(rand.NewPCG(seed, uint64(n)))
				hpa := &autoscalingv2.HorizontalPodAutoscaler{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web", UID: "uid-hpa", ResourceVersion: "1"},
					Spec: autoscalingv2.HorizontalPodAutoscalerSpec{MinReplicas: ptr(1 + rnd.Int32N(3)), MaxReplicas: 4 + rnd.Int32N(30), Metrics: randomMetrics(rnd),
						ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{Kind: "Deployment", Name: "web", APIVersion: "apps/v1"}}}
				if rnd.IntN(2) == 0 {
					hpa.Spec.Behavior = &autoscalingv2.HorizontalPodAutoscalerBehavior{ScaleUp: randomRules(rnd, 60), ScaleDown: randomRules(rnd, 300)}
				}
				first := rnd.Int32N(6)
				a, b := &world{replicas: first}, &world{replicas: first}
				both := []*fake.Clientset{fake.NewSimpleClientset(hpa.DeepCopy()), fake.NewSimpleClientset(hpa.DeepCopy())}
				base := 100 + rnd.Int64N(500)
				change(t, rnd, base, []*world{a, b}, both)
				controllertest.Start(t, both[0], nil, func(d controller.Deps) controller.Controller { return horizontalpodautoscaler.New(d, ours{a}) })
				startUpstream(t, both[1], b)
				time.Sleep(7 * time.Second)
				for step := range steps {
					if rnd.IntN(3) == 0 { // more or less to do
						base = max(10, base*int64(50+rnd.IntN(120))/100)
					}
					change(t, rnd, base, []*world{a, b}, both)
					if rnd.IntN(25) == 0 { // by hand
						by := rnd.Int32N(8)
						a.set(by)
						b.set(by)
					}
					time.Sleep(period)
					synctest.Wait()
					x, _ := a.history()
					y, _ := b.history()
					if s, u := conditions(t, both[0]), conditions(t, both[1]); x != y || s != u {
						t.Fatalf("step %d: Skein scaled %s and says %s\nupstream %s and says %s\n%+v", step, x, s, y, u, hpa.Spec)
					}
				}
				if n == 0 {
					scaled, _ := a.history()
					t.Logf("scaled %s", scaled)
				}
			})
		})
	}
}
