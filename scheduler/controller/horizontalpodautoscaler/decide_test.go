package horizontalpodautoscaler

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var now = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

// world0 is a Deployment of some pods, which request 1 CPU each and have run for an hour, and an autoscaler that wants them to use half of it.
type world0 struct {
	replicas int32
	min, max int32
	metrics  []autoscalingv2.MetricSpec
	readings []reading
	rules    *autoscalingv2.HorizontalPodAutoscalerBehavior
	history  history
	pods     []*corev1.Pod
	selector string
	in       func(*input)
}

func ptr[T any](v T) *T { return &v }

func pod(i int, edit ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: fmt.Sprintf("web-%d", i), Labels: map[string]string{"app": "web"}}}
	p.Spec.Containers = []corev1.Container{{Name: "web", Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1")}}}}
	p.Status.Phase, p.Status.StartTime = corev1.PodRunning, ptr(metav1.NewTime(now.Add(-time.Hour)))
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(now.Add(-time.Hour + 5*time.Second))}}
	for _, e := range edit {
		e(p)
	}
	return p
}

func running(n int) (out []*corev1.Pod) {
	for i := range n {
		out = append(out, pod(i))
	}
	return out
}

// using is what the first pods use, in thousandths.
func using(milli ...int64) reading {
	r := reading{pods: map[string]sample{}}
	for i, v := range milli {
		if v >= 0 { // else it is not known
			r.pods[fmt.Sprintf("web-%d", i)] = sample{value: v, at: now, window: 15 * time.Second}
		}
	}
	return r
}

func cpuAt(percent int32) autoscalingv2.MetricSpec {
	return autoscalingv2.MetricSpec{Type: autoscalingv2.ResourceMetricSourceType, Resource: &autoscalingv2.ResourceMetricSource{
		Name: corev1.ResourceCPU, Target: autoscalingv2.MetricTarget{Type: autoscalingv2.UtilizationMetricType, AverageUtilization: &percent}}}
}

func external(value, average string) autoscalingv2.MetricSpec {
	m := &autoscalingv2.ExternalMetricSource{Metric: autoscalingv2.MetricIdentifier{Name: "qps"}}
	if value != "" {
		m.Target = autoscalingv2.MetricTarget{Type: autoscalingv2.ValueMetricType, Value: ptr(resource.MustParse(value))}
	}
	if average != "" {
		m.Target = autoscalingv2.MetricTarget{Type: autoscalingv2.AverageValueMetricType, AverageValue: ptr(resource.MustParse(average))}
	}
	return autoscalingv2.MetricSpec{Type: autoscalingv2.ExternalMetricSourceType, External: m}
}

func (w world0) input() input {
	if w.metrics == nil {
		w.metrics = []autoscalingv2.MetricSpec{cpuAt(50)}
	}
	if w.max == 0 {
		w.max = 10
	}
	if w.min == 0 {
		w.min = 1
	}
	if w.pods == nil {
		w.pods = running(int(w.replicas))
	}
	if w.selector == "" {
		w.selector = "app=web"
	}
	if w.history.recommended == nil { // else the count that it finds is the first recommendation
		w.history.recommended = []recommendation{{1, now.Add(-time.Hour)}}
	}
	in := input{
		hpa: &autoscalingv2.HorizontalPodAutoscaler{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "web"}, Spec: autoscalingv2.HorizontalPodAutoscalerSpec{
			MinReplicas: &w.min, MaxReplicas: w.max, Metrics: w.metrics, Behavior: w.rules,
			ScaleTargetRef: autoscalingv2.CrossVersionObjectReference{Kind: "Deployment", Name: "web", APIVersion: "apps/v1"}}},
		scale:    &autoscalingv1.Scale{Spec: autoscalingv1.ScaleSpec{Replicas: w.replicas}, Status: autoscalingv1.ScaleStatus{Replicas: w.replicas, Selector: w.selector}},
		pods:     w.pods,
		readings: w.readings,
		history:  w.history,
		now:      now,
	}
	if w.in != nil {
		w.in(&in)
	}
	return in
}

// told is what a decision says, in one line.
func told(o outcome) string {
	var out []string
	for _, c := range o.status.Conditions {
		out = append(out, fmt.Sprintf("%s=%s %s", c.Type, c.Status, c.Reason))
	}
	for _, e := range o.events {
		out = append(out, e.reason+": "+e.message)
	}
	return strings.Join(out, "; ")
}

func TestDecide(t *testing.T) {
	const fine = "AbleToScale=True ReadyForNewScale; ScalingActive=True ValidMetricFound; ScalingLimited=False DesiredWithinRange"
	late := func(ready bool, age time.Duration) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Status.StartTime = ptr(metav1.NewTime(now.Add(-age)))
			c := &p.Status.Conditions[0]
			c.LastTransitionTime = metav1.NewTime(now.Add(-age + time.Second))
			if !ready {
				c.Status = corev1.ConditionFalse
			}
		}
	}
	for name, c := range map[string]struct {
		w    world0
		want int32
		told string
	}{
		"nothing to do":         {world0{replicas: 3, readings: []reading{using(500, 520, 480)}}, 3, fine},
		"within the tolerance":  {world0{replicas: 3, readings: []reading{using(540, 540, 540)}}, 3, fine},
		"more":                  {world0{replicas: 3, readings: []reading{using(900, 900, 900)}}, 6, fine},
		"rounded up":            {world0{replicas: 3, readings: []reading{using(600, 600, 600)}}, 4, fine},
		"fewer":                 {world0{replicas: 4, readings: []reading{using(100, 100, 100, 100)}}, 1, fine},
		"at most double":        {world0{replicas: 3, max: 100, readings: []reading{using(5000, 5000, 5000)}}, 6, "AbleToScale=True ReadyForNewScale; ScalingActive=True ValidMetricFound; ScalingLimited=True ScaleUpLimit"},
		"or four":               {world0{replicas: 1, max: 100, readings: []reading{using(50000)}}, 4, "AbleToScale=True ReadyForNewScale; ScalingActive=True ValidMetricFound; ScalingLimited=True ScaleUpLimit"},
		"at most the maximum":   {world0{replicas: 3, max: 5, readings: []reading{using(900, 900, 900)}}, 5, "AbleToScale=True ReadyForNewScale; ScalingActive=True ValidMetricFound; ScalingLimited=True TooManyReplicas"},
		"at least the minimum":  {world0{replicas: 3, min: 2, readings: []reading{using(0, 0, 0)}}, 2, "AbleToScale=True ReadyForNewScale; ScalingActive=True ValidMetricFound; ScalingLimited=True TooFewReplicas"},
		"above the maximum":     {world0{replicas: 12}, 10, "AbleToScale=True SucceededGetScale"},
		"below the minimum":     {world0{replicas: 1, min: 3}, 3, "AbleToScale=True SucceededGetScale"},
		"zero switches it off":  {world0{replicas: 0}, 0, "AbleToScale=True SucceededGetScale; ScalingActive=False ScalingDisabled"},
		"recent recommendation": {world0{replicas: 4, readings: []reading{using(100, 100, 100, 100)}, history: history{recommended: []recommendation{{3, now.Add(-4 * time.Minute)}}}}, 3, "AbleToScale=True ScaleDownStabilized; ScalingActive=True ValidMetricFound; ScalingLimited=False DesiredWithinRange"},
		"old recommendation":    {world0{replicas: 4, readings: []reading{using(100, 100, 100, 100)}, history: history{recommended: []recommendation{{3, now.Add(-6 * time.Minute)}}}}, 1, fine},

		"missing counts full for fewer":    {world0{replicas: 4, readings: []reading{using(100, 100, 100, -1)}}, 3, fine}, // 300 + 1000 of 4000: 32 %
		"missing counts nothing for more":  {world0{replicas: 4, readings: []reading{using(900, 900, 900, -1)}}, 6, fine}, // 67 %
		"missing turns it":                 {world0{replicas: 2, readings: []reading{using(450, -1)}}, 2, fine},
		"starting counts nothing for more": {world0{replicas: 3, pods: []*corev1.Pod{pod(0), pod(1), pod(2, late(false, time.Minute))}, readings: []reading{using(900, 900, 9000)}}, 4, fine},
		"starting is ignored for fewer":    {world0{replicas: 3, pods: []*corev1.Pod{pod(0), pod(1), pod(2, late(false, time.Minute))}, readings: []reading{using(250, 250, 9000)}}, 1, fine},
		"not ready later counts": {world0{replicas: 2, pods: []*corev1.Pod{pod(0), pod(1, func(p *corev1.Pod) {
			p.Status.Conditions[0].Status = corev1.ConditionFalse
			p.Status.Conditions[0].LastTransitionTime = metav1.NewTime(now)
		})}, readings: []reading{using(900, 900)}}, 4, fine},
		"just ready":         {world0{replicas: 2, pods: []*corev1.Pod{pod(0), pod(1, late(true, 5*time.Second))}, readings: []reading{using(900, 2000)}}, 2, fine},
		"ready for a window": {world0{replicas: 2, pods: []*corev1.Pod{pod(0), pod(1, late(true, time.Minute))}, readings: []reading{using(900, 900)}}, 4, fine},
		"pending and going":  {world0{replicas: 3, pods: []*corev1.Pod{pod(0), pod(1, func(p *corev1.Pod) { p.Status.Phase = corev1.PodPending }), pod(2, func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{Time: now} })}, readings: []reading{using(200, -1, 999)}}, 1, fine},

		"largest of two":      {world0{replicas: 3, metrics: []autoscalingv2.MetricSpec{cpuAt(50), external("10", "")}, readings: []reading{using(500, 500, 500), {values: []int64{10000, 10000}}}}, 6, fine},
		"external per pod":    {world0{replicas: 3, metrics: []autoscalingv2.MetricSpec{external("", "5")}, readings: []reading{{values: []int64{22000}}}}, 5, fine},
		"one missing, more":   {world0{replicas: 3, metrics: []autoscalingv2.MetricSpec{cpuAt(50), external("10", "")}, readings: []reading{{err: errors.New("gone")}, {values: []int64{20000}}}}, 6, fine + "; FailedGetResourceMetric: failed to get cpu utilization: unable to get metrics for resource cpu: gone"},
		"one missing, fewer":  {world0{replicas: 3, metrics: []autoscalingv2.MetricSpec{cpuAt(50), external("10", "")}, readings: []reading{{err: errors.New("gone")}, {values: []int64{1000}}}}, 3, "AbleToScale=True SucceededGetScale; ScalingActive=False FailedGetResourceMetric; FailedGetResourceMetric: failed to get cpu utilization: unable to get metrics for resource cpu: gone; FailedComputeMetricsReplicas: invalid metrics (1 invalid out of 2), first error is: failed to get cpu resource metric value: failed to get cpu utilization: unable to get metrics for resource cpu: gone"},
		"no requests":         {world0{replicas: 2, pods: []*corev1.Pod{pod(0, func(p *corev1.Pod) { p.Spec.Containers[0].Resources = corev1.ResourceRequirements{} }), pod(1)}, readings: []reading{using(1, 1)}}, 2, "AbleToScale=True SucceededGetScale; ScalingActive=False FailedGetResourceMetric; FailedGetResourceMetric: failed to get cpu utilization: missing request for cpu in container web of Pod web-0; FailedComputeMetricsReplicas: invalid metrics (1 invalid out of 1), first error is: failed to get cpu resource metric value: failed to get cpu utilization: missing request for cpu in container web of Pod web-0"},
		"first look":          {world0{replicas: 4, readings: []reading{using(100, 100, 100, 100)}, in: func(in *input) { in.history = history{} }}, 4, "AbleToScale=True ScaleDownStabilized; ScalingActive=True ValidMetricFound; ScalingLimited=False DesiredWithinRange"},
		"no pods":             {world0{replicas: 2, pods: []*corev1.Pod{}, readings: []reading{using(1)}}, 2, "AbleToScale=True SucceededGetScale; ScalingActive=False FailedGetResourceMetric; FailedGetResourceMetric: failed to get cpu utilization: no pods returned by selector while calculating replica count; FailedComputeMetricsReplicas: invalid metrics (1 invalid out of 1), first error is: failed to get cpu resource metric value: failed to get cpu utilization: no pods returned by selector while calculating replica count"},
		"no selector":         {world0{replicas: 2, in: func(in *input) { in.scale.Status.Selector = "" }}, 2, "AbleToScale=True SucceededGetScale; ScalingActive=False InvalidSelector; SelectorRequired: selector is required; FailedComputeMetricsReplicas: selector is required"},
		"selector of another": {world0{replicas: 2, in: func(in *input) { in.rivals = []rival{{"a", "ns"}, {"web", "ns"}} }}, 2, "AbleToScale=True SucceededGetScale; ScalingActive=False AmbiguousSelector; AmbiguousSelector: pods by selector app=web are controlled by multiple HPAs: [{a ns} {web ns}]; FailedComputeMetricsReplicas: pods by selector app=web are controlled by multiple HPAs: [{a ns} {web ns}]"},
	} {
		t.Run(name, func(t *testing.T) {
			in := c.w.input()
			o := decide(in)
			got := o.current
			if o.rescale {
				got = o.desired
			}
			if got != c.want {
				t.Errorf("%d replicas, want %d", got, c.want)
			}
			if s := told(o); s != c.told {
				t.Errorf("it says\n     %s\nwant %s", s, c.told)
			}
		})
	}
}

func rules(up, down *autoscalingv2.HPAScalingRules) *autoscalingv2.HorizontalPodAutoscalerBehavior {
	return &autoscalingv2.HorizontalPodAutoscalerBehavior{ScaleUp: up, ScaleDown: down}
}

func rule(window int32, choice autoscalingv2.ScalingPolicySelect, policies ...autoscalingv2.HPAScalingPolicy) *autoscalingv2.HPAScalingRules {
	return &autoscalingv2.HPAScalingRules{StabilizationWindowSeconds: &window, SelectPolicy: &choice, Policies: policies}
}

func TestRules(t *testing.T) {
	pods := func(n, period int32) autoscalingv2.HPAScalingPolicy {
		return autoscalingv2.HPAScalingPolicy{Type: autoscalingv2.PodsScalingPolicy, Value: n, PeriodSeconds: period}
	}
	percent := func(n, period int32) autoscalingv2.HPAScalingPolicy {
		return autoscalingv2.HPAScalingPolicy{Type: autoscalingv2.PercentScalingPolicy, Value: n, PeriodSeconds: period}
	}
	const most, least, off = autoscalingv2.MaxChangePolicySelect, autoscalingv2.MinChangePolicySelect, autoscalingv2.DisabledPolicySelect
	free := rule(0, most, percent(100, 15), pods(1000, 15))
	ago := func(s int) time.Time { return now.Add(-time.Duration(s) * time.Second) }
	for name, c := range map[string]struct {
		b    bounds
		h    history
		want int32
		able string
		lim  string
	}{
		"pods per period":           {bounds{10, 40, 1, 100, rules(rule(0, most, pods(4, 60)), free)}, history{}, 14, "ReadyForNewScale", "ScaleUpLimit"},
		"less what was added":       {bounds{10, 40, 1, 100, rules(rule(0, most, pods(4, 60)), free)}, history{ups: []change{{3, ago(30)}, {9, ago(61)}}}, 11, "ReadyForNewScale", "ScaleUpLimit"},
		"none left":                 {bounds{10, 40, 1, 100, rules(rule(0, most, pods(4, 60)), free)}, history{ups: []change{{7, ago(30)}}}, 10, "ReadyForNewScale", "ScaleUpLimit"},
		"largest of two":            {bounds{10, 400, 1, 1000, rules(rule(0, most, pods(4, 60), percent(150, 60)), free)}, history{}, 25, "ReadyForNewScale", "ScaleUpLimit"},
		"smallest of two":           {bounds{10, 400, 1, 1000, rules(rule(0, least, pods(4, 60), percent(150, 60)), free)}, history{}, 14, "ReadyForNewScale", "ScaleUpLimit"},
		"percent is rounded up":     {bounds{1, 5, 1, 10, rules(rule(0, most, percent(10, 60)), free)}, history{}, 2, "ReadyForNewScale", "ScaleUpLimit"},
		"off":                       {bounds{10, 40, 1, 100, rules(rule(0, off), free)}, history{}, 10, "ReadyForNewScale", "ScaleUpLimit"},
		"lowest recent":             {bounds{10, 40, 1, 100, rules(rule(300, most, pods(100, 60)), free)}, history{recommended: []recommendation{{12, ago(200)}, {20, ago(100)}, {11, ago(301)}}}, 12, "ScaleUpStabilized", "DesiredWithinRange"},
		"maximum":                   {bounds{10, 40, 1, 15, rules(free, free)}, history{}, 15, "ReadyForNewScale", "TooManyReplicas"},
		"down, pods per period":     {bounds{10, 1, 1, 100, rules(free, rule(0, most, pods(4, 60)))}, history{}, 6, "ReadyForNewScale", "ScaleDownLimit"},
		"down, less what went":      {bounds{10, 1, 1, 100, rules(free, rule(0, most, pods(4, 60)))}, history{downs: []change{{3, ago(1)}}}, 9, "ReadyForNewScale", "ScaleDownLimit"},
		"down, largest of two":      {bounds{10, 1, 1, 100, rules(free, rule(0, most, pods(4, 60), percent(50, 60)))}, history{}, 5, "ReadyForNewScale", "ScaleDownLimit"},
		"down, smallest of two":     {bounds{10, 1, 1, 100, rules(free, rule(0, least, pods(4, 60), percent(50, 60)))}, history{}, 6, "ReadyForNewScale", "ScaleDownLimit"},
		"down, off":                 {bounds{10, 1, 1, 100, rules(free, rule(0, off))}, history{}, 10, "ReadyForNewScale", "ScaleDownLimit"},
		"down, highest recent":      {bounds{10, 1, 1, 100, rules(free, rule(300, most, percent(100, 15)))}, history{recommended: []recommendation{{7, ago(200)}, {9, ago(301)}}}, 7, "ScaleDownStabilized", "DesiredWithinRange"},
		"down, default window":      {bounds{10, 1, 1, 100, rules(free, &autoscalingv2.HPAScalingRules{SelectPolicy: ptr(most), Policies: []autoscalingv2.HPAScalingPolicy{percent(100, 15)}})}, history{recommended: []recommendation{{7, ago(299)}}}, 7, "ScaleDownStabilized", "DesiredWithinRange"},
		"down, minimum":             {bounds{10, 1, 3, 100, rules(free, free)}, history{}, 3, "ReadyForNewScale", "TooFewReplicas"},
		"down after up in a period": {bounds{10, 1, 1, 100, rules(free, rule(0, most, percent(50, 60)))}, history{ups: []change{{4, ago(5)}}}, 3, "ReadyForNewScale", "ScaleDownLimit"},
	} {
		t.Run(name, func(t *testing.T) {
			before := fmt.Sprint(c.h)
			l, after := c.h.limit(c.b, now)
			if l.replicas != c.want || l.ableReason != c.able || l.limitedReason != c.lim {
				t.Errorf("got %d, %s, %s; want %d, %s, %s", l.replicas, l.ableReason, l.limitedReason, c.want, c.able, c.lim)
			}
			if fmt.Sprint(c.h) != before {
				t.Error("the history that came in was changed")
			}
			if n := len(after.recommended); n == 0 || after.recommended[n-1] != (recommendation{c.b.desired, now}) {
				t.Error("the recommendation was not noted")
			}
		})
	}
}

// Histories stay small however long an autoscaler lives.
func TestHistoryIsBounded(t *testing.T) {
	b := bounds{current: 5, desired: 6, lowest: 1, highest: 10, rules: rules(rule(60, autoscalingv2.MaxChangePolicySelect, autoscalingv2.HPAScalingPolicy{Type: autoscalingv2.PodsScalingPolicy, Value: 1, PeriodSeconds: 60}),
		rule(300, autoscalingv2.MaxChangePolicySelect, autoscalingv2.HPAScalingPolicy{Type: autoscalingv2.PodsScalingPolicy, Value: 1, PeriodSeconds: 60}))}
	var with, without history
	at := now
	for range 1000 {
		at = at.Add(period)
		_, with = with.limit(b, at)
		with = with.scaled(b.rules, 5, 6, at)
		with = with.scaled(b.rules, 6, 5, at)
		plain := b
		plain.rules = nil
		_, without = without.limit(plain, at)
		without = without.scaled(nil, 5, 6, at)
	}
	if n := max(len(with.recommended), len(without.recommended)); n > 22 {
		t.Errorf("%d recommendations", n)
	}
	if n := max(len(with.ups), len(with.downs)); n > 6 || len(without.ups) > 0 {
		t.Errorf("%d changes, and %d that nobody asks for", n, len(without.ups))
	}
}

func TestTolerance(t *testing.T) {
	w := world0{replicas: 4, readings: []reading{using(650, 650, 650, 650)}, rules: rules(
		&autoscalingv2.HPAScalingRules{Tolerance: ptr(resource.MustParse("0.4")), SelectPolicy: ptr(autoscalingv2.MaxChangePolicySelect), StabilizationWindowSeconds: ptr(int32(0)), Policies: []autoscalingv2.HPAScalingPolicy{{Type: autoscalingv2.PodsScalingPolicy, Value: 10, PeriodSeconds: 15}}},
		rule(0, autoscalingv2.MaxChangePolicySelect, autoscalingv2.HPAScalingPolicy{Type: autoscalingv2.PercentScalingPolicy, Value: 100, PeriodSeconds: 15}))}
	if o := decide(w.input()); o.rescale {
		t.Errorf("scaled to %d within its own tolerance", o.desired)
	}
	w.rules.ScaleUp.Tolerance = ptr(resource.MustParse("0.2"))
	w.readings = []reading{using(650, 650, 650, 650)}
	if o := decide(w.input()); o.desired != 6 {
		t.Errorf("scaled to %d", o.desired)
	}
}

func TestContainerAndPodLevelRequests(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	p := pod(0, func(p *corev1.Pod) {
		side := corev1.Container{Name: "side", RestartPolicy: &always, Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("500m")}}}
		p.Spec.InitContainers = []corev1.Container{side, {Name: "init"}}
	})
	whole := pod(1, func(p *corev1.Pod) {
		p.Spec.Resources = &corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("3")}}
	})
	for _, c := range []struct {
		pod       *corev1.Pod
		container string
		want      int64
		err       string
	}{
		{p, "", 1500, ""}, {p, "web", 1000, ""}, {p, "side", 500, ""},
		{p, "init", 0, "container init not found in Pod web-0"}, {whole, "", 3000, ""}, {whole, "web", 1000, ""},
	} {
		got, err := requestsOf([]*corev1.Pod{c.pod}, corev1.ResourceCPU, c.container)
		if c.err != "" {
			if err == nil || err.Error() != c.err {
				t.Errorf("%s: %v, want %s", c.container, err, c.err)
			}
			continue
		}
		if err != nil || got[c.pod.Name] != c.want {
			t.Errorf("%s of %s: %d, %v; want %d", c.container, c.pod.Name, got[c.pod.Name], err, c.want)
		}
	}
	if _, err := requestsOf([]*corev1.Pod{whole}, corev1.ResourceMemory, ""); err == nil || !strings.Contains(err.Error(), "missing pod-level request for memory") {
		t.Error(err)
	}
}

// A decision changes nothing that it was given, but for the samples that it was given to use up.
func TestDecideIsPure(t *testing.T) {
	in := world0{replicas: 3, readings: []reading{using(900, 900, 900)}}.input()
	before := fmt.Sprint(in.hpa, in.scale, in.pods, in.history)
	first := decide(in)
	first = first.done(in.hpa, now)
	if fmt.Sprint(in.hpa, in.scale, in.pods, in.history) != before {
		t.Error("the input was changed")
	}
	if first.status.LastScaleTime == nil || first.status.DesiredReplicas != 6 || first.status.CurrentReplicas != 3 {
		t.Errorf("%+v", first.status)
	}
	i := slices.IndexFunc(first.status.Conditions, func(c autoscalingv2.HorizontalPodAutoscalerCondition) bool {
		return c.Type == autoscalingv2.AbleToScale
	})
	if c := first.status.Conditions[i]; c.Reason != "SucceededRescale" || c.Message != "the HPA controller was able to update the target scale to 6" {
		t.Errorf("%+v", c)
	}
	if e := first.events[len(first.events)-1]; e != (event{"Normal", "SuccessfulRescale", "New size: 6; reason: cpu resource utilization (percentage of request) above target"}) {
		t.Errorf("%+v", e)
	}
}
