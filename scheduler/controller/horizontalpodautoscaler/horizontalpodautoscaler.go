// Package horizontalpodautoscaler sets the number of replicas of whatever has a scale subresource, so that its pods use as much as their
// HorizontalPodAutoscaler wants.
//
// Inputs: HorizontalPodAutoscalers, Pods; the scale of their targets and the APIs metrics.k8s.io, custom.metrics.k8s.io and
// external.metrics.k8s.io, through World. Outputs: the scale of the targets; the status of the autoscalers; upstream's events on them.
//
// Each autoscaler is looked at every 15 s, as upstream; without one nothing runs. What to do is decided by decide, which is
// upstream's algorithm (pkg/controller/podautoscaler) as a pure function of what was read: see its tests. Three things are written less often than
// upstream does, so that an autoscaler that can do nothing costs next to nothing: a message that was told is told again after ten minutes, a status in which
// only measurements moved a little, or texts changed, is written at most every 90 s, and a target that refuses to be scaled is tried ever less
// often, down to every five minutes.
package horizontalpodautoscaler

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	autoscalinglisters "k8s.io/client-go/listers/autoscaling/v2"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/retry"

	"skein.io/skein/scheduler/controller"
)

// The defaults of kube-controller-manager (pkg/controller/podautoscaler/config).
const (
	name              = "horizontalpodautoscaler"
	component         = "horizontal-pod-autoscaler"
	workers           = 5
	period            = 15 * time.Second
	downWindow        = 5 * time.Minute
	cpuInitialization = 5 * time.Minute
	initialReadiness  = 30 * time.Second
	tolerance         = 0.1
	scaleUpFactor     = 2.0
	scaleUpMinimum    = 4.0
)

const (
	// tellAgain is when a message is written that was written before.
	tellAgain = 10 * time.Minute
	// maxTold bounds the messages remembered for that, of one autoscaler.
	maxTold = 32
	// writeAgain is when a status is written that says little new.
	writeAgain = 90 * time.Second
	// maxPause is the longest pause between attempts to scale a target that refuses.
	maxPause = 5 * time.Minute
)

// World is what autoscalers read and change outside the shared view.
type World interface {
	// Scale reads the scale of a target, and says of which resource it is.
	Scale(ctx context.Context, namespace string, ref autoscalingv2.CrossVersionObjectReference) (*autoscalingv1.Scale, schema.GroupResource, error)
	// SetScale writes a scale; a conflict is an error that apierrors.IsConflict knows.
	SetScale(ctx context.Context, namespace string, of schema.GroupResource, scale *autoscalingv1.Scale) error
	// Resource is what the pods that a selector matches use, or one container of each, by pod.
	Resource(ctx context.Context, namespace string, resource corev1.ResourceName, container string, pods labels.Selector) (map[string]Sample, error)
	// Pods is a metric of the pods that a selector matches.
	Pods(ctx context.Context, namespace, metric string, pods, metrics labels.Selector) (map[string]Sample, error)
	// Object is a metric of an object, in thousandths.
	Object(ctx context.Context, namespace, metric string, ref autoscalingv2.CrossVersionObjectReference, metrics labels.Selector) (int64, error)
	// External are the values of a metric that is no object's, in thousandths.
	External(ctx context.Context, namespace, metric string, metrics labels.Selector) ([]int64, error)
}

// Sample is what one pod was found to use, in thousandths, as the mean of the window that ended at At.
type Sample struct {
	Value  int64
	At     time.Time
	Window time.Duration
}

type autoscalers struct {
	controller.Deps
	world  World
	queue  *controller.Queue[string]
	hpaInf cache.SharedIndexInformer
	podInf cache.SharedIndexInformer
	lister autoscalinglisters.HorizontalPodAutoscalerLister
	pods   corelisters.PodLister
	events record.EventRecorder

	mu     sync.Mutex        // guards states
	states map[string]*state // by key; a state's worker alone changes it, but for selector
}

// state is what is remembered of one autoscaler.
type state struct {
	history  history
	selector labels.Selector      // of its target's pods, as it was last; guarded by mu of autoscalers
	told     map[string]time.Time // when a message was written
	wrote    time.Time            // when the status was
	refused  int                  // how often in a row the target refused
}

// New returns the controller, which rests if world is nil.
func New(deps controller.Deps, world World) controller.Controller {
	deps = deps.WithDefaults()
	hpas, pods := deps.Factory.Autoscaling().V2().HorizontalPodAutoscalers(), deps.Factory.Core().V1().Pods()
	return &autoscalers{
		Deps: deps, world: world, queue: controller.NewQueue[string](name, deps.Clock),
		hpaInf: hpas.Informer(), podInf: pods.Informer(), lister: hpas.Lister(), pods: pods.Lister(),
		events: deps.Recorder(component), states: map[string]*state{},
	}
}

func (c *autoscalers) Name() string { return name }

func (c *autoscalers) Run(ctx context.Context) error {
	if c.world == nil {
		defer c.queue.Stop()
		<-ctx.Done()
		return nil
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue: c.queue, Workers: workers,
		Watches: []controller.Watch{controller.On(c.hpaInf, c.changed)},
		Ready:   []cache.InformerSynced{c.podInf.HasSynced},
		Sync:    c.sync, Logger: c.Logger,
	})
}

// changed wakes the worker of an autoscaler that is new or gone. All others are looked at regularly, soon enough for any change.
func (c *autoscalers) changed(old, cur *autoscalingv2.HorizontalPodAutoscaler) {
	switch {
	case old == nil:
		c.queue.Add(controller.Key(cur))
	case cur == nil:
		c.queue.Add(controller.Key(old))
	}
}

func (c *autoscalers) sync(ctx context.Context, key string) error {
	namespace, hpaName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	hpa, err := c.lister.HorizontalPodAutoscalers(namespace).Get(hpaName)
	if apierrors.IsNotFound(err) {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.states, key)
		return nil
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	st, known := c.states[key]
	if !known {
		st = &state{told: map[string]time.Time{}}
		c.states[key] = st
	}
	c.mu.Unlock()
	if !known {
		// As upstream, it is looked at after a period. What is measured until then makes the first measurement one of a whole period.
		c.prepare(ctx, hpa)
		c.queue.AddAfter(key, period)
		return nil
	}
	c.reconcile(ctx, hpa, st)
	pause := period
	for range st.refused {
		pause = min(2*pause, maxPause)
	}
	c.queue.AddAfter(key, pause)
	return nil
}

// prepare makes the agents measure.
func (c *autoscalers) prepare(ctx context.Context, hpa *autoscalingv2.HorizontalPodAutoscaler) {
	scale, _, err := c.world.Scale(ctx, hpa.Namespace, hpa.Spec.ScaleTargetRef)
	if err != nil || !needsMetrics(hpa, scale.Spec.Replicas) {
		return
	}
	if selector, err := labels.Parse(scale.Status.Selector); err == nil && !selector.Empty() {
		c.read(ctx, hpa, selector)
	}
}

// reconcile does what is to be done for one autoscaler now. There is nothing that could usefully be tried again at once.
func (c *autoscalers) reconcile(ctx context.Context, hpa *autoscalingv2.HorizontalPodAutoscaler, st *state) {
	scale, target, err := c.world.Scale(ctx, hpa.Namespace, hpa.Spec.ScaleTargetRef)
	var o outcome
	if err != nil {
		o = noScale(hpa, err, st.history, c.Clock.Now())
	} else {
		in := c.gather(ctx, hpa, scale, st)
		o = decide(in)
		if o.rescale {
			o = c.rescale(ctx, hpa, scale, target, o, st)
		} else {
			st.refused = 0
		}
	}
	if ctx.Err() != nil {
		return
	}
	st.history = o.history
	if o.err != nil {
		c.Logger.Debug("an autoscaler cannot see all that it should", "hpa", controller.Key(hpa), "err", o.err)
	}
	c.tell(hpa, st, o.events)
	if err := c.write(ctx, hpa, st, o.status); err != nil && ctx.Err() == nil {
		c.Logger.Warn("cannot write the status of an autoscaler", "hpa", controller.Key(hpa), "err", err)
	}
}

// gather reads all that decide looks at.
func (c *autoscalers) gather(ctx context.Context, hpa *autoscalingv2.HorizontalPodAutoscaler, scale *autoscalingv1.Scale, st *state) input {
	in := input{hpa: hpa, scale: scale, history: st.history}
	if needsMetrics(hpa, scale.Spec.Replicas) && scale.Status.Selector != "" {
		var selector labels.Selector
		if selector, in.selectorErr = labels.Parse(scale.Status.Selector); in.selectorErr == nil {
			in.pods, _ = c.pods.Pods(hpa.Namespace).List(selector) // reads memory, cannot fail
			slices.SortFunc(in.pods, func(a, b *corev1.Pod) int { return cmp.Compare(a.Name, b.Name) })
			if in.rivals = c.rivals(hpa, selector, in.pods); len(in.rivals) < 2 {
				in.readings = c.read(ctx, hpa, selector)
			}
		}
	}
	in.now = c.Clock.Now()
	return in
}

// rivals notes the selector of an autoscaler, and lists those that share its pods.
func (c *autoscalers) rivals(hpa *autoscalingv2.HorizontalPodAutoscaler, selector labels.Selector, pods []*corev1.Pod) (out []rival) {
	all, _ := c.lister.HorizontalPodAutoscalers(hpa.Namespace).List(labels.Everything()) // reads memory, cannot fail
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, other := range all {
		st := c.states[controller.Key(other)]
		if st == nil {
			continue
		}
		if other.Name == hpa.Name {
			st.selector = selector
		}
		if st.selector != nil && slices.ContainsFunc(pods, func(p *corev1.Pod) bool { return st.selector.Matches(labels.Set(p.Labels)) }) {
			out = append(out, rival{other.Name, other.Namespace})
		}
	}
	slices.SortFunc(out, func(a, b rival) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// read gets the metrics of the specification.
func (c *autoscalers) read(ctx context.Context, hpa *autoscalingv2.HorizontalPodAutoscaler, selector labels.Selector) []reading {
	out := make([]reading, len(hpa.Spec.Metrics))
	for i := range hpa.Spec.Metrics {
		out[i] = c.readOne(ctx, hpa.Namespace, &hpa.Spec.Metrics[i], selector)
	}
	return out
}

func (c *autoscalers) readOne(ctx context.Context, namespace string, m *autoscalingv2.MetricSpec, selector labels.Selector) (r reading) {
	var found map[string]Sample
	var metrics labels.Selector
	of := func(id autoscalingv2.MetricIdentifier) bool {
		metrics, r.err = metav1.LabelSelectorAsSelector(id.Selector)
		if id.Selector == nil {
			metrics = labels.Everything() // which is what upstream's nil becomes on the wire
		}
		return r.err == nil
	}
	switch m.Type {
	case autoscalingv2.ResourceMetricSourceType:
		found, r.err = c.world.Resource(ctx, namespace, m.Resource.Name, "", selector)
	case autoscalingv2.ContainerResourceMetricSourceType:
		found, r.err = c.world.Resource(ctx, namespace, m.ContainerResource.Name, m.ContainerResource.Container, selector)
	case autoscalingv2.PodsMetricSourceType:
		if of(m.Pods.Metric) {
			found, r.err = c.world.Pods(ctx, namespace, m.Pods.Metric.Name, selector, metrics)
		}
	case autoscalingv2.ObjectMetricSourceType:
		if of(m.Object.Metric) {
			r.value, r.err = c.world.Object(ctx, namespace, m.Object.Metric.Name, m.Object.DescribedObject, metrics)
		}
	case autoscalingv2.ExternalMetricSourceType:
		if of(m.External.Metric) {
			r.values, r.err = c.world.External(ctx, namespace, m.External.Metric.Name, metrics)
		}
	}
	if found != nil {
		r.pods = make(map[string]sample, len(found))
		for pod, s := range found {
			r.pods[pod] = sample{value: s.Value, at: s.At, window: s.Window}
		}
	}
	return r
}

// rescale writes the scale that was decided on, again if somebody else wrote it meanwhile.
func (c *autoscalers) rescale(ctx context.Context, hpa *autoscalingv2.HorizontalPodAutoscaler, scale *autoscalingv1.Scale, target schema.GroupResource, o outcome, st *state) outcome {
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		scale.Spec.Replicas = o.desired
		err := c.world.SetScale(ctx, hpa.Namespace, target, scale)
		if apierrors.IsConflict(err) {
			if fresh, _, gerr := c.world.Scale(ctx, hpa.Namespace, hpa.Spec.ScaleTargetRef); gerr == nil {
				scale = fresh
			}
		}
		return err
	})
	if err != nil {
		if ctx.Err() == nil {
			st.refused++
			c.Logger.Warn("the target of an autoscaler cannot be scaled", "hpa", controller.Key(hpa), "replicas", o.desired, "err", err)
		}
		return o.failed(hpa, err, c.Clock.Now())
	}
	st.refused = 0
	c.Logger.Info("scaled", "hpa", controller.Key(hpa), "from", o.current, "to", o.desired, "reason", o.reason)
	return o.done(hpa, c.Clock.Now())
}

// tell writes events, those that were written lately excepted.
func (c *autoscalers) tell(hpa *autoscalingv2.HorizontalPodAutoscaler, st *state, events []event) {
	now := c.Clock.Now()
	for text, at := range st.told {
		if now.Sub(at) >= tellAgain {
			delete(st.told, text)
		}
	}
	for _, e := range events {
		text := e.reason + "\x00" + e.message
		if _, told := st.told[text]; told && e.kind == corev1.EventTypeWarning {
			continue
		}
		if len(st.told) < maxTold {
			st.told[text] = now
		}
		c.events.Event(hpa, e.kind, e.reason, e.message)
	}
}

// write keeps the status true.
func (c *autoscalers) write(ctx context.Context, hpa *autoscalingv2.HorizontalPodAutoscaler, st *state, status autoscalingv2.HorizontalPodAutoscalerStatus) error {
	if equality.Semantic.DeepEqual(hpa.Status, status) {
		return nil
	}
	now := c.Clock.Now()
	if now.Sub(st.wrote) < writeAgain && !saysMore(&hpa.Status, &status) {
		return nil
	}
	upd := hpa.DeepCopy()
	upd.Status = status
	_, err := c.Client.AutoscalingV2().HorizontalPodAutoscalers(hpa.Namespace).UpdateStatus(ctx, upd, metav1.UpdateOptions{})
	if err == nil {
		st.wrote = now
		return nil
	}
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil // gone, or changed meanwhile: it is looked at again in any case
	}
	c.tell(hpa, st, []event{{corev1.EventTypeWarning, "FailedUpdateStatus", err.Error()}})
	return fmt.Errorf("update status of HorizontalPodAutoscaler %s: %w", controller.Key(hpa), err)
}

// saysMore says that a status differs from the one before in more than texts and small movements of what is measured.
func saysMore(old, cur *autoscalingv2.HorizontalPodAutoscalerStatus) bool {
	if old.CurrentReplicas != cur.CurrentReplicas || old.DesiredReplicas != cur.DesiredReplicas || !old.LastScaleTime.Equal(cur.LastScaleTime) ||
		len(old.Conditions) != len(cur.Conditions) || len(old.CurrentMetrics) != len(cur.CurrentMetrics) {
		return true
	}
	for i, c := range cur.Conditions {
		if o := old.Conditions[i]; o.Type != c.Type || o.Status != c.Status || o.Reason != c.Reason {
			return true
		}
	}
	for i := range cur.CurrentMetrics {
		a, b := valueOf(&old.CurrentMetrics[i]), valueOf(&cur.CurrentMetrics[i])
		if (a == nil) != (b == nil) || a != nil && moved(a, b) {
			return true
		}
	}
	return false
}

func valueOf(m *autoscalingv2.MetricStatus) *autoscalingv2.MetricValueStatus {
	switch {
	case m.Resource != nil:
		return &m.Resource.Current
	case m.ContainerResource != nil:
		return &m.ContainerResource.Current
	case m.Pods != nil:
		return &m.Pods.Current
	case m.Object != nil:
		return &m.Object.Current
	case m.External != nil:
		return &m.External.Current
	}
	return nil
}

// moved says that a value moved by a percent of what is requested, or by a twentieth where nothing is said of that.
func moved(a, b *autoscalingv2.MetricValueStatus) bool {
	if a.AverageUtilization != nil && b.AverageUtilization != nil {
		return *a.AverageUtilization != *b.AverageUtilization
	}
	milli := func(v *autoscalingv2.MetricValueStatus) int64 {
		switch {
		case v.AverageValue != nil:
			return v.AverageValue.MilliValue()
		case v.Value != nil:
			return v.Value.MilliValue()
		}
		return 0
	}
	x, y := milli(a), milli(b)
	return max(x, y)-min(x, y) > max(x, y)/20
}
