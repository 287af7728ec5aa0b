package horizontalpodautoscaler

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

// fakeWorld is one target whose pods use what use says.
type fakeWorld struct {
	mu       sync.Mutex // guards all
	replicas int32
	selector string
	use      map[string]int64
	reads    int
	sets     int
	scaleErr error
	setErr   []error // of the next writes; the last one stays
	readErr  error
}

func (w *fakeWorld) Scale(context.Context, string, autoscalingv2.CrossVersionObjectReference) (*autoscalingv1.Scale, schema.GroupResource, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.scaleErr != nil {
		return nil, schema.GroupResource{}, w.scaleErr
	}
	return &autoscalingv1.Scale{Spec: autoscalingv1.ScaleSpec{Replicas: w.replicas}, Status: autoscalingv1.ScaleStatus{Replicas: w.replicas, Selector: w.selector}},
		schema.GroupResource{Group: "apps", Resource: "deployments"}, nil
}

func (w *fakeWorld) SetScale(_ context.Context, _ string, _ schema.GroupResource, s *autoscalingv1.Scale) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.sets++
	if len(w.setErr) > 0 {
		err := w.setErr[0]
		if len(w.setErr) > 1 {
			w.setErr = w.setErr[1:]
		}
		if err != nil {
			return err
		}
	}
	w.replicas = s.Spec.Replicas
	return nil
}

func (w *fakeWorld) Resource(context.Context, string, corev1.ResourceName, string, labels.Selector) (map[string]Sample, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.reads++
	if w.readErr != nil {
		return nil, w.readErr
	}
	out := map[string]Sample{}
	for name, v := range w.use {
		out[name] = Sample{Value: v, At: time.Now(), Window: period}
	}
	return out, nil
}

func (w *fakeWorld) Pods(context.Context, string, string, labels.Selector, labels.Selector) (map[string]Sample, error) {
	return nil, errors.New("no custom metrics API (custom.metrics.k8s.io) registered")
}

func (w *fakeWorld) Object(context.Context, string, string, autoscalingv2.CrossVersionObjectReference, labels.Selector) (int64, error) {
	return 0, errors.New("no custom metrics API (custom.metrics.k8s.io) registered")
}

func (w *fakeWorld) External(context.Context, string, string, labels.Selector) ([]int64, error) {
	return nil, errors.New("no external metrics")
}

func (w *fakeWorld) set(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
}

// seen is what became of the target so far.
func (w *fakeWorld) seen() (replicas int32, reads, sets int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.replicas, w.reads, w.sets
}

func (w *fakeWorld) count() (replicas int32) { replicas, _, _ = w.seen(); return replicas }
func (w *fakeWorld) readCount() (reads int)  { _, reads, _ = w.seen(); return reads }
func (w *fakeWorld) setCount() (sets int)    { _, _, sets = w.seen(); return sets }

func autoscaler(hpaName string) *autoscalingv2.HorizontalPodAutoscaler {
	return &autoscalingv2.HorizontalPodAutoscaler{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: hpaName, UID: "uid-" + "hpa", ResourceVersion: "1", Generation: 1},
		Spec: autoscalingv2.HorizontalPodAutoscalerSpec{MaxReplicas: 10, Metrics: []autoscalingv2.MetricSpec{cpuAt(50)},
			ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{Kind: "Deployment", Name: "web", APIVersion: "apps/v1"}}}
}

// oldPods have been ready for long.
func oldPods(n int) (out []runtime.Object) {
	for i := range n {
		out = append(out, pod(i, func(p *corev1.Pod) {
			p.Status.StartTime = &metav1.Time{Time: time.Now().Add(-time.Hour)}
			p.Status.Conditions[0].LastTransitionTime = metav1.NewTime(time.Now().Add(-time.Hour))
		}))
	}
	return out
}

func start(t *testing.T, w World, objs ...runtime.Object) (*fake.Clientset, *record.FakeRecorder) {
	client := controllertest.NewClient(objs...)
	return client, controllertest.Start(t, client, nil, func(d controller.Deps) controller.Controller { return New(d, w) })
}

func current(t *testing.T, client *fake.Clientset, hpaName string) *autoscalingv2.HorizontalPodAutoscaler {
	t.Helper()
	hpa, err := client.AutoscalingV2().HorizontalPodAutoscalers("ns").Get(t.Context(), hpaName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return hpa
}

func TestScales(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &fakeWorld{replicas: 2, selector: "app=web", use: map[string]int64{"web-0": 900, "web-1": 900}}
		client, rec := start(t, w, append(oldPods(2), autoscaler("web"))...)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if w.readCount() != 1 || w.setCount() != 0 {
			t.Errorf("before the first period: %d reads (one, so that the agents begin to measure), %d writes", w.readCount(), w.setCount())
		}
		time.Sleep(period)
		synctest.Wait()
		if w.count() != 4 {
			t.Fatalf("%d replicas", w.count())
		}
		st := current(t, client, "web").Status
		if st.CurrentReplicas != 2 || st.DesiredReplicas != 4 || st.LastScaleTime == nil || len(st.CurrentMetrics) != 1 || *st.CurrentMetrics[0].Resource.Current.AverageUtilization != 90 {
			t.Errorf("status %+v", st)
		}
		if e := strings.Join(controllertest.Events(rec), "\n"); e != "Normal SuccessfulRescale New size: 4; reason: cpu resource utilization (percentage of request) above target" {
			t.Errorf("events:\n%s", e)
		}
		// There is less to do: for five minutes nothing goes, then it does.
		for i := 2; i < 4; i++ {
			p := oldPods(4)[i].(*corev1.Pod)
			if err := client.Tracker().Add(p); err != nil {
				t.Fatal(err)
			}
		}
		w.set(func() { w.use = map[string]int64{"web-0": 100, "web-1": 100, "web-2": 100, "web-3": 100} })
		time.Sleep(4 * time.Minute)
		synctest.Wait()
		if w.count() != 4 {
			t.Fatalf("scaled down to %d within the window", w.count())
		}
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		if w.count() != 1 {
			t.Errorf("%d replicas", w.count())
		}
		// An autoscaler that is gone costs nothing.
		if err := client.AutoscalingV2().HorizontalPodAutoscalers("ns").Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		reads := w.readCount()
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		if w.readCount() != reads {
			t.Errorf("%d reads for an autoscaler that is gone", w.readCount()-reads)
		}
	})
}

// changing is an error that never says the same twice.
type changing struct{}

func (changing) Error() string { return "at " + time.Now().String() }

// What cannot work is said once, and costs less than a write a minute.
func TestStuck(t *testing.T) {
	notFound := apierrors.NewNotFound(schema.GroupResource{Group: "apps", Resource: "deployments/scale"}, "web")
	for name, c := range map[string]struct {
		w    *fakeWorld
		hpas []string
		edit func(*autoscalingv2.HorizontalPodAutoscaler)
		kind autoscalingv2.HorizontalPodAutoscalerConditionType
		want string
	}{
		"no target":      {&fakeWorld{scaleErr: notFound}, []string{"a"}, nil, autoscalingv2.AbleToScale, `FailedGetScale: the HPA controller was unable to get the target's current scale: deployments/scale.apps "web" not found`},
		"no metrics":     {&fakeWorld{replicas: 2, selector: "app=web", readErr: errors.New("no metrics returned from resource metrics API")}, []string{"a"}, nil, autoscalingv2.ScalingActive, "FailedGetResourceMetric: the HPA was unable to compute the replica count: failed to get cpu utilization: unable to get metrics for resource cpu: no metrics returned from resource metrics API"},
		"no selector":    {&fakeWorld{replicas: 2}, []string{"a"}, nil, autoscalingv2.ScalingActive, "InvalidSelector: the HPA target's scale is missing a selector"},
		"bad selector":   {&fakeWorld{replicas: 2, selector: "a in ("}, []string{"a"}, nil, autoscalingv2.ScalingActive, "InvalidSelector: couldn't convert selector into a corresponding internal selector object: "},
		"two of them":    {&fakeWorld{replicas: 2, selector: "app=web", use: map[string]int64{"web-0": 500, "web-1": 500}}, []string{"a", "b"}, nil, autoscalingv2.ScalingActive, "AmbiguousSelector: pods by selector app=web are controlled by multiple HPAs: [{a ns} {b ns}]"},
		"refused":        {&fakeWorld{replicas: 20, selector: "app=web", setErr: []error{apierrors.NewForbidden(schema.GroupResource{Resource: "deployments"}, "web", errors.New("quota"))}}, []string{"a"}, nil, autoscalingv2.AbleToScale, "FailedUpdateScale: the HPA controller was unable to update the target scale: "},
		"changing words": {&fakeWorld{replicas: 2, selector: "app=web"}, []string{"a"}, nil, autoscalingv2.ScalingActive, "FailedGetResourceMetric: "},
		"no such adapter": {&fakeWorld{replicas: 2, selector: "app=web"}, []string{"a"}, func(h *autoscalingv2.HorizontalPodAutoscaler) {
			h.Spec.Metrics = []autoscalingv2.MetricSpec{external("1", "")}
		}, autoscalingv2.ScalingActive, "FailedGetExternalMetric: the HPA was unable to compute the replica count: unable to get external metric ns/qps/nil: no external metrics"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				objs := oldPods(2)
				for _, h := range c.hpas {
					hpa := autoscaler(h)
					if c.edit != nil {
						c.edit(hpa)
					}
					objs = append(objs, hpa)
				}
				client, rec := start(t, c.w, objs...)
				time.Sleep(time.Minute)
				synctest.Wait()
				var got string
				for _, cond := range current(t, client, "a").Status.Conditions {
					if cond.Type == c.kind && cond.Status == corev1.ConditionFalse {
						got = cond.Reason + ": " + cond.Message
					}
				}
				if !strings.HasPrefix(got, c.want) {
					t.Errorf("the condition says\n     %s\nwant %s", got, c.want)
				}
				controllertest.Events(rec)
				before, sets := controllertest.Writes(client, "update", "horizontalpodautoscalers/status"), c.w.setCount()
				time.Sleep(30 * time.Minute)
				synctest.Wait()
				writes, told, tries := controllertest.Writes(client, "update", "horizontalpodautoscalers/status")-before, len(controllertest.Events(rec)), c.w.setCount()-sets
				limit := 30 * len(c.hpas)
				if name == "changing words" {
					told = 0 // the recorder of events bounds those that differ: 25, then one in five minutes
				}
				if writes+told+tries >= limit {
					t.Errorf("%d status writes, %d events and %d attempts in half an hour", writes, told, tries)
				}
			})
		})
	}
}

// A conflict is no failure: somebody else wrote the target meanwhile.
func TestConflict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conflict := apierrors.NewConflict(schema.GroupResource{Resource: "deployments"}, "web", errors.New("changed"))
		w := &fakeWorld{replicas: 20, selector: "app=web", setErr: []error{conflict, conflict, nil}}
		client, rec := start(t, w, autoscaler("web"))
		time.Sleep(period + time.Second)
		synctest.Wait()
		if w.count() != 10 || w.setCount() != 3 {
			t.Errorf("%d replicas after %d attempts", w.count(), w.setCount())
		}
		if e := controllertest.Events(rec); len(e) != 1 || !strings.Contains(e[0], "New size: 10; reason: Current number of replicas above Spec.MaxReplicas") {
			t.Errorf("%q", e)
		}
		if st := current(t, client, "web").Status; st.DesiredReplicas != 10 || st.CurrentReplicas != 20 {
			t.Errorf("%+v", st)
		}
	})
}

// An autoscaler at rest is looked at every 15 s; what is measured moves a little and is not written each time.
func TestAtRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &fakeWorld{replicas: 2, selector: "app=web", use: map[string]int64{"web-0": 500, "web-1": 500}}
		client, rec := start(t, w, append(oldPods(2), autoscaler("web"))...)
		time.Sleep(time.Minute)
		synctest.Wait()
		reads, writes := w.readCount(), controllertest.Writes(client, "update", "horizontalpodautoscalers/status")
		for i := range 120 {
			w.set(func() { w.use = map[string]int64{"web-0": 500 + int64(i%7), "web-1": 500} })
			time.Sleep(period)
		}
		synctest.Wait()
		if n := w.readCount() - reads; n < 119 || n > 121 {
			t.Errorf("%d reads in half an hour", n)
		}
		if n := controllertest.Writes(client, "update", "horizontalpodautoscalers/status") - writes; n == 0 || n > 30 {
			t.Errorf("%d writes in half an hour", n)
		}
		if e := controllertest.Events(rec); len(e) != 0 {
			t.Errorf("%q", e)
		}
		// A percent is written at once.
		w.set(func() { w.use = map[string]int64{"web-0": 530, "web-1": 530} })
		time.Sleep(period)
		synctest.Wait()
		if got := *current(t, client, "web").Status.CurrentMetrics[0].Resource.Current.AverageUtilization; got != 53 {
			t.Errorf("%d %%", got)
		}
	})
}
