package horizontalpodautoscaler

import (
	"errors"
	"fmt"
	"time"

	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// reading is what one metric of the specification was found to be, or why it is not known.
type reading struct {
	pods   map[string]sample // Resource, ContainerResource, Pods: by the pod's name
	value  int64             // Object, in thousandths
	values []int64           // External, in thousandths
	err    error
}

// rival is another autoscaler of the same pods, printed as upstream prints it.
type rival struct{ Name, Namespace string }

// input is all that a decision looks at. Nothing of it is changed, but for the samples of readings.
type input struct {
	hpa     *autoscalingv2.HorizontalPodAutoscaler
	scale   *autoscalingv1.Scale
	pods    []*corev1.Pod // that the scale's selector matches, sorted by name
	history history
	now     time.Time
	// readings, one for each metric of the specification; where needsMetrics.
	readings []reading
	// selectorErr is why the scale's selector cannot be used, and rivals, if there are any, the autoscalers that share its pods (this one among them).
	selectorErr error
	rivals      []rival
}

// event is one to be written about the autoscaler.
type event struct{ kind, reason, message string }

// outcome is a decision. The status is the whole of what it should be if nothing has to be scaled; else done or failed say the rest.
type outcome struct {
	status  autoscalingv2.HorizontalPodAutoscalerStatus
	events  []event
	history history
	rescale bool
	current int32
	desired int32
	reason  string // of a rescale
	// err says that (some) metrics are missing: nothing that trying at once would help.
	err error
}

func minReplicas(hpa *autoscalingv2.HorizontalPodAutoscaler) int32 {
	if hpa.Spec.MinReplicas != nil {
		return *hpa.Spec.MinReplicas
	}
	return 1
}

// needsMetrics says that the count depends on them: it is within the bounds, and not zero, which switches an autoscaler off.
func needsMetrics(hpa *autoscalingv2.HorizontalPodAutoscaler, current int32) bool {
	return current != 0 && current <= hpa.Spec.MaxReplicas && current >= minReplicas(hpa)
}

// tolerancesOf are the autoscaler's own, or else the default.
func tolerancesOf(hpa *autoscalingv2.HorizontalPodAutoscaler) tolerances {
	t := tolerances{down: tolerance, up: tolerance}
	if b := hpa.Spec.Behavior; b != nil {
		if b.ScaleDown != nil && b.ScaleDown.Tolerance != nil {
			t.down = b.ScaleDown.Tolerance.AsApproximateFloat64()
		}
		if b.ScaleUp != nil && b.ScaleUp.Tolerance != nil {
			t.up = b.ScaleUp.Tolerance.AsApproximateFloat64()
		}
	}
	return t
}

// noScale is the decision about a target whose scale cannot be read.
func noScale(hpa *autoscalingv2.HorizontalPodAutoscaler, err error, h history, now time.Time) outcome {
	o := outcome{status: *hpa.Status.DeepCopy(), history: h, err: err}
	o.warn("FailedGetScale", err.Error())
	o.condition(now, autoscalingv2.AbleToScale, corev1.ConditionFalse, "FailedGetScale", fmt.Sprintf("the HPA controller was unable to get the target's current scale: %v", err))
	return o
}

// decide is upstream's reconcileAutoscaler, between reading and writing.
func decide(in input) outcome {
	hpa, current, lowest := in.hpa, in.scale.Spec.Replicas, minReplicas(in.hpa)
	o := outcome{status: *hpa.Status.DeepCopy(), history: in.history.begin(current, in.now), current: current}
	o.condition(in.now, autoscalingv2.AbleToScale, corev1.ConditionTrue, "SucceededGetScale", "the HPA controller was able to get the target's current scale")
	switch {
	case current == 0:
		o.condition(in.now, autoscalingv2.ScalingActive, corev1.ConditionFalse, "ScalingDisabled", "scaling is disabled since the replica count of the target is zero")
	case current > hpa.Spec.MaxReplicas:
		o.rescale, o.desired, o.reason = true, hpa.Spec.MaxReplicas, "Current number of replicas above Spec.MaxReplicas"
	case current < lowest:
		o.rescale, o.desired, o.reason = true, lowest, "Current number of replicas below Spec.MinReplicas"
	default:
		return o.byMetrics(in)
	}
	o.keep(current, nil)
	o.status.DesiredReplicas = o.desired
	return o
}

// keep writes what is, and leaves what is wanted as it was.
func (o *outcome) keep(current int32, metrics []autoscalingv2.MetricStatus) {
	o.status.CurrentReplicas, o.status.CurrentMetrics = current, metrics
}

// byMetrics decides within the bounds.
func (o outcome) byMetrics(in input) outcome {
	proposed, metric, statuses, err := o.proposal(in)
	o.keep(o.current, statuses)
	o.err = err
	if err != nil && proposed < 0 {
		o.warn("FailedComputeMetricsReplicas", err.Error())
		return o
	}
	desired := max(proposed, 0)
	switch {
	case desired > o.current:
		o.reason = metric + " above target"
	case desired < o.current:
		o.reason = "All metrics below target"
	}
	var l limited
	l, o.history = o.history.limit(bounds{current: o.current, desired: desired, lowest: minReplicas(in.hpa), highest: in.hpa.Spec.MaxReplicas, rules: in.hpa.Spec.Behavior}, in.now)
	o.condition(in.now, autoscalingv2.AbleToScale, corev1.ConditionTrue, l.ableReason, l.ableMessage)
	held := corev1.ConditionTrue
	if l.replicas == l.stabilized {
		held = corev1.ConditionFalse
	}
	o.condition(in.now, autoscalingv2.ScalingLimited, held, l.limitedReason, l.limitedMessage)
	o.desired = l.replicas
	o.rescale = o.desired != o.current
	o.status.DesiredReplicas = o.desired
	return o
}

// done is the decision after the target was scaled.
func (o outcome) done(hpa *autoscalingv2.HorizontalPodAutoscaler, now time.Time) outcome {
	o.condition(now, autoscalingv2.AbleToScale, corev1.ConditionTrue, "SucceededRescale", fmt.Sprintf("the HPA controller was able to update the target scale to %d", o.desired))
	o.events = append(o.events, event{corev1.EventTypeNormal, "SuccessfulRescale", fmt.Sprintf("New size: %d; reason: %s", o.desired, o.reason)})
	o.history = o.history.scaled(hpa.Spec.Behavior, o.current, o.desired, now)
	at := metav1.NewTime(now)
	o.status.LastScaleTime = &at
	return o
}

// failed is the decision after the target could not be scaled.
func (o outcome) failed(hpa *autoscalingv2.HorizontalPodAutoscaler, err error, now time.Time) outcome {
	o.warn("FailedRescale", fmt.Sprintf("New size: %d; reason: %s; error: %v", o.desired, o.reason, err))
	o.condition(now, autoscalingv2.AbleToScale, corev1.ConditionFalse, "FailedUpdateScale", fmt.Sprintf("the HPA controller was unable to update the target scale: %v", err))
	o.status.DesiredReplicas = hpa.Status.DesiredReplicas
	return o
}

func (o *outcome) warn(reason, message string) {
	o.events = append(o.events, event{corev1.EventTypeWarning, reason, message})
}

func (o *outcome) condition(now time.Time, kind autoscalingv2.HorizontalPodAutoscalerConditionType, status corev1.ConditionStatus, reason, message string) {
	for i := range o.status.Conditions {
		if c := &o.status.Conditions[i]; c.Type == kind {
			if c.Status != status {
				c.LastTransitionTime = metav1.NewTime(now)
			}
			c.Status, c.Reason, c.Message = status, reason, message
			return
		}
	}
	o.status.Conditions = append(o.status.Conditions, autoscalingv2.HorizontalPodAutoscalerCondition{
		Type: kind, Status: status, Reason: reason, Message: message, LastTransitionTime: metav1.NewTime(now)})
}

func (o *outcome) inactive(now time.Time, reason, message string) {
	o.condition(now, autoscalingv2.ScalingActive, corev1.ConditionFalse, reason, message)
}

// proposal is the largest count that a metric asks for, and what asked; -1 if none can be followed. It may come with an error: some metrics are missing, but
// those that are there ask for more replicas.
func (o *outcome) proposal(in input) (replicas int32, metric string, statuses []autoscalingv2.MetricStatus, err error) {
	if err := o.checkSelector(in); err != nil {
		return -1, "", nil, err
	}
	specs := in.hpa.Spec.Metrics
	statuses = make([]autoscalingv2.MetricStatus, len(specs))
	var invalid int
	var first error
	var firstReason, firstMessage string
	for i := range specs {
		p := proposalOf(in, &specs[i], in.readings[i], &statuses[i])
		if p.err != nil {
			if p.message == nil {
				p.message = p.err
			}
			o.warn(p.failure, p.message.Error())
			if invalid++; invalid == 1 {
				first, firstReason, firstMessage = p.err, p.failure, fmt.Sprintf("the HPA was unable to compute the replica count: %v", p.message)
			}
			continue
		}
		if replicas == 0 || p.replicas > replicas {
			replicas, metric = p.replicas, p.metric
		}
	}
	if first != nil {
		err = fmt.Errorf("invalid metrics (%v invalid out of %v), first error is: %w", invalid, len(specs), first)
	}
	if invalid >= len(specs) || invalid > 0 && replicas < in.scale.Spec.Replicas {
		o.inactive(in.now, firstReason, firstMessage)
		return -1, "", statuses, err
	}
	o.condition(in.now, autoscalingv2.ScalingActive, corev1.ConditionTrue, "ValidMetricFound", "the HPA was able to successfully calculate a replica count from "+metric)
	return replicas, metric, statuses, err
}

// checkSelector refuses a target whose pods cannot be told, or are another autoscaler's as well.
func (o *outcome) checkSelector(in input) error {
	selector := in.scale.Status.Selector
	switch {
	case selector == "":
		o.warn("SelectorRequired", "selector is required")
		o.inactive(in.now, "InvalidSelector", "the HPA target's scale is missing a selector")
		return errors.New("selector is required")
	case in.selectorErr != nil:
		err := fmt.Errorf("couldn't convert selector into a corresponding internal selector object: %w", in.selectorErr)
		o.warn("InvalidSelector", err.Error())
		o.inactive(in.now, "InvalidSelector", err.Error())
		return err
	case len(in.rivals) > 1:
		err := fmt.Errorf("pods by selector %v are controlled by multiple HPAs: %v", selector, in.rivals)
		o.warn("AmbiguousSelector", err.Error())
		o.inactive(in.now, "AmbiguousSelector", err.Error())
		return err
	}
	return nil
}

// proposed is what one metric asks for.
type proposed struct {
	replicas int32
	metric   string // its name, for people
	failure  string // the reason in condition and event, if err is set
	err      error
	message  error // what they say, where that is not err
}

// proposalOf works one metric out. The words are upstream's, whatever one may think of them.
func proposalOf(in input, spec *autoscalingv2.MetricSpec, r reading, status *autoscalingv2.MetricStatus) proposed {
	c := calculator{pods: in.pods, tolerance: tolerancesOf(in.hpa), now: in.now}
	fail := func(reason, outer string, err error) proposed {
		return proposed{failure: reason, message: err, err: fmt.Errorf("%s: %w", outer, err)}
	}
	switch spec.Type {
	case autoscalingv2.ResourceMetricSourceType:
		m := spec.Resource
		p, value := c.resource(in, m.Target, m.Name, "", r)
		if p.err != nil {
			return fail("FailedGetResourceMetric", fmt.Sprintf("failed to get %s resource metric value", m.Name), p.err)
		}
		*status = autoscalingv2.MetricStatus{Type: spec.Type, Resource: &autoscalingv2.ResourceMetricStatus{Name: m.Name, Current: value}}
		return p
	case autoscalingv2.ContainerResourceMetricSourceType:
		m := spec.ContainerResource
		p, value := c.resource(in, m.Target, m.Name, m.Container, r)
		if p.err != nil {
			return fail("FailedGetContainerResourceMetric", fmt.Sprintf("failed to get %s container metric value", m.Container), p.err)
		}
		*status = autoscalingv2.MetricStatus{Type: spec.Type, ContainerResource: &autoscalingv2.ContainerResourceMetricStatus{Name: m.Name, Container: m.Container, Current: value}}
		return p
	case autoscalingv2.PodsMetricSourceType:
		p, value := c.custom(in, spec.Pods, r)
		if p.err != nil {
			return fail("FailedGetPodsMetric", "failed to get pods metric value", p.err)
		}
		*status = autoscalingv2.MetricStatus{Type: spec.Type, Pods: &autoscalingv2.PodsMetricStatus{Metric: spec.Pods.Metric, Current: value}}
		return p
	case autoscalingv2.ObjectMetricSourceType:
		p, value := c.object(in, spec.Object, r)
		if p.err != nil {
			f := fail("FailedGetObjectMetric", "failed to get object metric value", p.err)
			if p.message != nil {
				f.message = p.message
			}
			return f
		}
		*status = autoscalingv2.MetricStatus{Type: spec.Type, Object: &autoscalingv2.ObjectMetricStatus{DescribedObject: spec.Object.DescribedObject, Metric: spec.Object.Metric, Current: value}}
		return p
	case autoscalingv2.ExternalMetricSourceType:
		p, value := c.external(in, spec.External, r)
		if p.err != nil {
			f := fail("FailedGetExternalMetric", fmt.Sprintf("failed to get %s external metric value", spec.External.Metric.Name), p.err)
			if p.message != nil {
				f.message = p.message
			}
			return f
		}
		*status = autoscalingv2.MetricStatus{Type: spec.Type, External: &autoscalingv2.ExternalMetricStatus{Metric: spec.External.Metric, Current: value}}
		return p
	}
	return proposed{failure: "InvalidMetricSourceType", err: fmt.Errorf("unknown metric source type %q", string(spec.Type))}
}

func (c calculator) resource(in input, target autoscalingv2.MetricTarget, name corev1.ResourceName, container string, r reading) (proposed, autoscalingv2.MetricValueStatus) {
	err := r.err
	if err != nil {
		err = fmt.Errorf("unable to get metrics for resource %s: %w", name, err)
	}
	var none autoscalingv2.MetricValueStatus
	switch current := in.scale.Spec.Replicas; {
	case target.AverageValue != nil:
		var n int32
		var usage int64
		if err == nil {
			n, usage, err = c.average(r.pods, current, target.AverageValue.MilliValue(), name)
		}
		if err != nil {
			return proposed{err: fmt.Errorf("failed to get %s usage: %w", name, err)}, none
		}
		return proposed{replicas: n, metric: fmt.Sprintf("%s resource", name)}, autoscalingv2.MetricValueStatus{AverageValue: quantity(name, usage)}
	case target.AverageUtilization != nil:
		var n, percent int32
		var raw int64
		if err == nil {
			n, percent, raw, err = c.utilization(r.pods, current, *target.AverageUtilization, name, container)
		}
		if err != nil {
			return proposed{err: fmt.Errorf("failed to get %s utilization: %w", name, err)}, none
		}
		of := " resource utilization (percentage of request)"
		if container != "" {
			of = " container" + of
		}
		return proposed{replicas: n, metric: string(name) + of}, autoscalingv2.MetricValueStatus{AverageUtilization: &percent, AverageValue: quantity(name, raw)}
	}
	return proposed{err: errors.New("invalid resource metric source: neither an average utilization target nor an average value (usage) target was set")}, none
}

// quantity is a number of thousandths as metrics.k8s.io would write it.
func quantity(name corev1.ResourceName, milli int64) *resource.Quantity {
	if name == corev1.ResourceMemory {
		return resource.NewMilliQuantity(milli, resource.BinarySI)
	}
	return resource.NewMilliQuantity(milli, resource.DecimalSI)
}

func (c calculator) custom(in input, m *autoscalingv2.PodsMetricSource, r reading) (proposed, autoscalingv2.MetricValueStatus) {
	if r.err != nil {
		return proposed{err: fmt.Errorf("unable to get metric %s: %w", m.Metric.Name, r.err)}, autoscalingv2.MetricValueStatus{}
	}
	n, usage, err := c.average(r.pods, in.scale.Spec.Replicas, m.Target.AverageValue.MilliValue(), "")
	return proposed{replicas: n, metric: "pods metric " + m.Metric.Name, err: err}, autoscalingv2.MetricValueStatus{AverageValue: quantity("", usage)}
}

func (c calculator) object(in input, m *autoscalingv2.ObjectMetricSource, r reading) (proposed, autoscalingv2.MetricValueStatus) {
	err := r.err
	if err != nil {
		err = fmt.Errorf("unable to get metric %s: %w on %s %s/%s", m.Metric.Name, err, m.DescribedObject.Kind, in.hpa.Namespace, m.DescribedObject.Name)
	}
	switch {
	case m.Target.Type == autoscalingv2.ValueMetricType && m.Target.Value != nil:
		var n int32
		if err == nil {
			n, err = c.value(r.value, m.Target.Value.MilliValue(), in.scale.Spec.Replicas)
		}
		return proposed{replicas: n, metric: fmt.Sprintf("%s metric %s", m.DescribedObject.Kind, m.Metric.Name), err: err}, autoscalingv2.MetricValueStatus{Value: quantity("", r.value)}
	case m.Target.Type == autoscalingv2.AverageValueMetricType && m.Target.AverageValue != nil:
		if err != nil {
			return proposed{err: fmt.Errorf("failed to get %s object metric: %w", m.Metric.Name, err), message: err}, autoscalingv2.MetricValueStatus{}
		}
		n, each := c.perPod(r.value, m.Target.AverageValue.MilliValue(), in.scale.Status.Replicas)
		return proposed{replicas: n, metric: fmt.Sprintf("external metric %s(%+v)", m.Metric.Name, m.Metric.Selector)}, autoscalingv2.MetricValueStatus{AverageValue: quantity("", each)}
	}
	return proposed{err: errors.New("invalid object metric source: neither a value target nor an average value target was set")}, autoscalingv2.MetricValueStatus{}
}

func (c calculator) external(in input, m *autoscalingv2.ExternalMetricSource, r reading) (proposed, autoscalingv2.MetricValueStatus) {
	err := r.err
	if err != nil {
		err = fmt.Errorf("unable to get external metric %s/%s/%+v: %w", in.hpa.Namespace, m.Metric.Name, m.Metric.Selector, err)
	}
	sum := total(r.values)
	switch {
	case m.Target.AverageValue != nil:
		if err != nil {
			return proposed{err: fmt.Errorf("failed to get %s external metric: %w", m.Metric.Name, err), message: err}, autoscalingv2.MetricValueStatus{}
		}
		n, each := c.perPod(sum, m.Target.AverageValue.MilliValue(), in.scale.Status.Replicas)
		return proposed{replicas: n, metric: fmt.Sprintf("external metric %s(%+v)", m.Metric.Name, m.Metric.Selector)}, autoscalingv2.MetricValueStatus{AverageValue: quantity("", each)}
	case m.Target.Value != nil:
		var n int32
		if err == nil {
			n, err = c.value(sum, m.Target.Value.MilliValue(), in.scale.Spec.Replicas)
		}
		if err != nil {
			return proposed{err: fmt.Errorf("failed to get external metric %s: %w", m.Metric.Name, err), message: err}, autoscalingv2.MetricValueStatus{}
		}
		return proposed{replicas: n, metric: fmt.Sprintf("external metric %s(%+v)", m.Metric.Name, m.Metric.Selector)}, autoscalingv2.MetricValueStatus{Value: quantity("", sum)}
	}
	return proposed{err: errors.New("invalid external metric source: neither a value target nor an average value target was set")}, autoscalingv2.MetricValueStatus{}
}
