package simulate

import (
	"context"
	"errors"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"skein.io/skein/scheduler/controller/horizontalpodautoscaler"
)

// Autoscaling: a few Deployments have a load, which their ready pods share evenly; an autoscaler wants half of what each asked for to be used.
const (
	hpaMin, hpaMax = 2, 8
	hpaTarget      = 50 // percent of the 100m that each pod requests
	perPod         = 50 // thousandths of a CPU: what that is
	// stays is how long a scale that was raised must not fall: upstream's stabilization of 5 minutes, less the time of a look.
	stays = 5*time.Minute - 20*time.Second
)

var hpaGVR = schema.GroupVersionResource{Group: "autoscaling", Version: "v2", Resource: "horizontalpodautoscalers"}

// withAutoscaler makes a Deployment with a load that its replicas do for.
func (u *user) withAutoscaler(ns string) int {
	name, replicas := u.name("scaled"), int32(hpaMin+u.n(hpaMax-hpaMin))
	d := deployment(ns, name, replicas, k25, k25, false)
	d.Labels[labelKept] = "yes"
	u.w.setLoad(key{ns, name}, int64(replicas)*perPod)
	u.w.make(d)
	u.w.make(&autoscalingv2.HorizontalPodAutoscaler{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name}, Spec: autoscalingv2.HorizontalPodAutoscalerSpec{
		ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{APIVersion: "apps/v1", Kind: "Deployment", Name: name}, MinReplicas: ptr(int32(hpaMin)), MaxReplicas: hpaMax,
		Metrics: []autoscalingv2.MetricSpec{{Type: autoscalingv2.ResourceMetricSourceType, Resource: &autoscalingv2.ResourceMetricSource{Name: corev1.ResourceCPU,
			Target: autoscalingv2.MetricTarget{Type: autoscalingv2.UtilizationMetricType, AverageUtilization: ptr(int32(hpaTarget))}}}},
	}})
	u.loaded = append(u.loaded, key{ns, name})
	return int(replicas)
}

// loadChanges gives an autoscaled Deployment another load, sometimes more or less than its bounds are for.
func (u *user) loadChanges() {
	if at, ok := pickOne(u, u.loaded); ok {
		u.w.setLoad(at, int64(u.n((hpaMax+3)*perPod)))
	}
}

func (w *world) setLoad(at key, milli int64) {
	w.drawMu.Lock()
	defer w.drawMu.Unlock()
	w.loads[at] = milli
}

func (w *world) load(at key) int64 {
	w.drawMu.Lock()
	defer w.drawMu.Unlock()
	return w.loads[at]
}

// scaling is what autoscalers of one leadership read and change.
type scaling struct {
	w *world
	d *door
}

func (s scaling) Scale(ctx context.Context, ns string, ref autoscalingv2.CrossVersionObjectReference) (*autoscalingv1.Scale, schema.GroupResource, error) {
	of := schema.GroupResource{Group: "apps", Resource: "deployments"}
	if !sleep(ctx, time.Millisecond) {
		return nil, of, ctx.Err()
	}
	e, err := s.w.s.get(s.w.s.kinds[ownerGVR["Deployment"]], key{ns, ref.Name})
	if err != nil {
		return nil, of, err
	}
	d := e.obj.(*appsv1.Deployment)
	return &autoscalingv1.Scale{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: d.Name, UID: d.UID, ResourceVersion: d.ResourceVersion},
		Spec:   autoscalingv1.ScaleSpec{Replicas: *d.Spec.Replicas},
		Status: autoscalingv1.ScaleStatus{Replicas: d.Status.Replicas, Selector: metav1.FormatLabelSelector(d.Spec.Selector)}}, of, nil
}

func (s scaling) SetScale(ctx context.Context, ns string, of schema.GroupResource, scale *autoscalingv1.Scale) error {
	if !sleep(ctx, time.Millisecond) {
		return ctx.Err()
	}
	s.d.begun("PUT scale " + ns + "/" + scale.Name)
	if s.d.deposed() {
		return apierrors.NewInternalError(errDeposed)
	}
	_, err := s.w.s.change(s.w.s.kinds[ownerGVR["Deployment"]], key{ns, scale.Name}, "", "update", s.d.who, func(o runtime.Object) (runtime.Object, error) {
		d := o.(*appsv1.Deployment)
		d.ResourceVersion = scale.ResourceVersion
		d.Spec.Replicas = &scale.Spec.Replicas
		return d, nil
	})
	return err
}

// Resource shares the load of the Deployment whose pods are selected among those that are ready.
func (s scaling) Resource(ctx context.Context, ns string, _ corev1.ResourceName, _ string, pods labels.Selector) (map[string]horizontalpodautoscaler.Sample, error) {
	if !sleep(ctx, time.Millisecond) {
		return nil, ctx.Err()
	}
	var names []string
	var load int64
	entries, _ := s.w.s.list(s.w.s.kinds[podsGVR], ns)
	for _, e := range entries {
		if p := e.obj.(*corev1.Pod); ready(p) && pods.Matches(labels.Set(p.Labels)) {
			names = append(names, p.Name)
			load = s.w.load(key{ns, p.Labels["app"]})
		}
	}
	out := map[string]horizontalpodautoscaler.Sample{}
	for _, name := range names {
		out[name] = horizontalpodautoscaler.Sample{Value: load / int64(len(names)), At: time.Now(), Window: 30 * time.Second}
	}
	if len(out) == 0 {
		return nil, errors.New("no metrics returned from resource metrics API")
	}
	return out, nil
}

var errNoMetric = errors.New("the simulated API has no such metric")

func (scaling) Pods(context.Context, string, string, labels.Selector, labels.Selector) (map[string]horizontalpodautoscaler.Sample, error) {
	return nil, errNoMetric
}

func (scaling) Object(context.Context, string, string, autoscalingv2.CrossVersionObjectReference, labels.Selector) (int64, error) {
	return 0, errNoMetric
}

func (scaling) External(context.Context, string, string, labels.Selector) ([]int64, error) {
	return nil, errNoMetric
}

// scaled: an autoscaler - nobody else in the control plane does - set the replicas of a Deployment.
func (v *invariants) autoscaled(old, cur *appsv1.Deployment) {
	e := v.s.tables[hpaGVR].objs[keyOf(cur)]
	if e == nil {
		v.broken("somebody scaled Deployment %s/%s, which has no autoscaler", cur.Namespace, cur.Name)
		return
	}
	v.checks["autoscaler: in bounds, no flapping"]++
	spec := e.obj.(*autoscalingv2.HorizontalPodAutoscaler).Spec
	was, is := *old.Spec.Replicas, *cur.Spec.Replicas
	if is < *spec.MinReplicas || is > spec.MaxReplicas {
		v.broken("Deployment %s/%s was scaled to %d, allowed are %d to %d", cur.Namespace, cur.Name, is, *spec.MinReplicas, spec.MaxReplicas)
	}
	if is > was {
		v.raised[cur.UID] = time.Now()
	} else if up, ok := v.raised[cur.UID]; ok && time.Since(up) < stays {
		v.broken("Deployment %s/%s was scaled down to %d, %v after it was scaled up", cur.Namespace, cur.Name, is, time.Since(up))
	}
}

// scalesDone: each load has the replicas that it needs.
func (w *world) scalesDone(add complain) {
	for _, h := range all[*autoscalingv2.HorizontalPodAutoscaler](w) {
		e, err := w.s.get(w.s.kinds[ownerGVR["Deployment"]], keyOf(h))
		if err != nil {
			add("autoscaler %s/%s has no Deployment", h.Namespace, h.Name)
			continue
		}
		n, load := *e.obj.(*appsv1.Deployment).Spec.Replicas, float64(w.load(keyOf(h)))
		// The tolerance is 10 %, a load is whole thousandths for each pod.
		ratio := load / float64(n*perPod)
		if ratio > 1.12 && n < hpaMax || n > hpaMin && ratio < 0.88 && load < float64((n-1)*perPod)*0.98 {
			add("autoscaler %s/%s has %d replicas for a load of %vm", h.Namespace, h.Name, n, load)
		}
	}
}
