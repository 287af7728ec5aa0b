package horizontalpodautoscaler

import (
	"errors"
	"fmt"
	"math"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	resourcehelpers "k8s.io/component-helpers/resource"

	"skein.io/skein/scheduler/controller"
)

// sample is what one pod uses of something, in thousandths, as the mean of the window that ended at at.
type sample struct {
	value  int64
	at     time.Time
	window time.Duration
}

// tolerances are the shares by which use may differ from its target before anything is done.
type tolerances struct{ down, up float64 }

func (t tolerances) allow(ratio float64) bool { return 1-t.down <= ratio && ratio <= 1+t.up }

// calculator is upstream's pkg/controller/podautoscaler/replica_calculator.go as functions of what it would read.
type calculator struct {
	// pods that the target's selector matches, sorted by name: a message that names one must name the same the next time.
	pods      []*corev1.Pod
	tolerance tolerances
	now       time.Time
}

var (
	errNoPods   = errors.New("no pods returned by selector while calculating replica count")
	errNoneLeft = errors.New("did not receive metrics for targeted pods (pods might be unready)")
)

// utilization is the count by the use of a resource relative to what is requested of it, in percent.
func (c calculator) utilization(used map[string]sample, current, target int32, resource corev1.ResourceName, container string) (replicas, percent int32, raw int64, err error) {
	if len(c.pods) == 0 {
		return 0, 0, 0, errNoPods
	}
	ready, unready, missing, ignored := c.group(used, resource)
	drop(used, ignored)
	drop(used, unready)
	if len(used) == 0 {
		return 0, 0, 0, errNoneLeft
	}
	requests, err := requestsOf(c.pods, resource, container)
	if err != nil {
		return 0, 0, 0, err
	}
	ratio, percent, raw, err := utilizationRatio(used, requests, target)
	if err != nil {
		return 0, 0, 0, err
	}
	// A pod without metrics counts against the change: all that it requested when there is less to do, nothing when there is more.
	full := func(pod string) int64 { return requests[pod] * int64(max(100, target)) / 100 }
	replicas, err = c.withOthers(used, ratio, current, ready, unready, missing, full, func() (float64, error) {
		again, _, _, err := utilizationRatio(used, requests, target)
		return again, err
	})
	if err != nil {
		return 0, percent, raw, err
	}
	return replicas, percent, raw, nil
}

// average is the count by the mean use of the pods, in thousandths.
func (c calculator) average(used map[string]sample, current int32, target int64, resource corev1.ResourceName) (replicas int32, usage int64, err error) {
	if len(c.pods) == 0 {
		return 0, 0, errNoPods
	}
	ready, unready, missing, ignored := c.group(used, resource)
	drop(used, ignored)
	drop(used, unready)
	if len(used) == 0 {
		return 0, 0, errNoneLeft
	}
	ratio, usage := averageRatio(used, target)
	replicas, err = c.withOthers(used, ratio, current, ready, unready, missing, func(string) int64 { return target }, func() (float64, error) {
		again, _ := averageRatio(used, target)
		return again, nil
	})
	return replicas, usage, err
}

// withOthers takes pods into account of which nothing is known: those without metrics, and, for more replicas, those that are not ready.
func (c calculator) withOthers(used map[string]sample, ratio float64, current int32, ready int, unready, missing sets.Set[string], full func(pod string) int64, again func() (float64, error)) (int32, error) {
	upWithUnready := len(unready) > 0 && ratio > 1
	if !upWithUnready && len(missing) == 0 {
		if c.tolerance.allow(ratio) {
			return current, nil
		}
		return int32(math.Ceil(ratio * float64(ready))), nil
	}
	for pod := range missing {
		switch {
		case ratio < 1:
			used[pod] = sample{value: full(pod)}
		case ratio > 1:
			used[pod] = sample{}
		}
	}
	if upWithUnready {
		for pod := range unready {
			used[pod] = sample{}
		}
	}
	then, err := again()
	if err != nil {
		return 0, err
	}
	if c.tolerance.allow(then) || ratio < 1 && then > 1 || ratio > 1 && then < 1 {
		return current, nil // too small a change, or none in the same direction
	}
	replicas := int32(math.Ceil(then * float64(len(used))))
	if then < 1 && replicas > current || then > 1 && replicas < current {
		return current, nil
	}
	return replicas, nil
}

// value is the count by a value of something that is not a pod's, in thousandths.
func (c calculator) value(usage, target int64, current int32) (int32, error) {
	ratio := float64(usage) / float64(target)
	if current == 0 {
		return int32(math.Ceil(ratio)), nil
	}
	if c.tolerance.allow(ratio) {
		return current, nil
	}
	if len(c.pods) == 0 {
		return 0, fmt.Errorf("unable to calculate ready pods: %w", errNoPods)
	}
	ready := 0
	for _, p := range c.pods {
		if p.Status.Phase == corev1.PodRunning && controller.PodReady(p) {
			ready++
		}
	}
	return ceil(ratio * float64(ready)), nil
}

// perPod is the count by a value of something that all pods share, in thousandths.
func (c calculator) perPod(usage, target int64, status int32) (replicas int32, each int64) {
	replicas = status
	if !c.tolerance.allow(float64(usage) / (float64(target) * float64(replicas))) {
		replicas = ceil(float64(usage) / float64(target))
	}
	if usage == math.MaxInt64 || status == 0 { // upstream divides by zero
		return replicas, usage
	}
	return replicas, int64(math.Ceil(float64(usage) / float64(status)))
}

// ceil rounds up, within what a count can be.
func ceil(f float64) int32 {
	if f > math.MaxInt32 {
		return math.MaxInt32
	}
	return int32(math.Ceil(f))
}

// total adds values up, within what fits.
func total(values []int64) (sum int64) {
	for _, v := range values {
		if v > 0 && sum > math.MaxInt64-v {
			return math.MaxInt64
		}
		sum += v
	}
	return sum
}

// group sorts the pods by what their metrics are worth.
func (c calculator) group(used map[string]sample, resource corev1.ResourceName) (ready int, unready, missing, ignored sets.Set[string]) {
	unready, missing, ignored = sets.New[string](), sets.New[string](), sets.New[string]()
	for _, p := range c.pods {
		metric, found := used[p.Name]
		switch {
		case p.DeletionTimestamp != nil || p.Status.Phase == corev1.PodFailed:
			ignored.Insert(p.Name)
		case p.Status.Phase == corev1.PodPending:
			unready.Insert(p.Name)
		case !found:
			missing.Insert(p.Name)
		case resource == corev1.ResourceCPU && c.starting(p, metric):
			unready.Insert(p.Name)
		default:
			ready++
		}
	}
	return ready, unready, missing, ignored
}

// starting says that what a pod uses of the processor says nothing about its work yet.
func (c calculator) starting(p *corev1.Pod, metric sample) bool {
	var cond *corev1.PodCondition
	for i := range p.Status.Conditions {
		if p.Status.Conditions[i].Type == corev1.PodReady {
			cond = &p.Status.Conditions[i]
		}
	}
	if cond == nil || p.Status.StartTime == nil {
		return true
	}
	if p.Status.StartTime.Add(cpuInitialization).After(c.now) {
		return cond.Status == corev1.ConditionFalse || metric.at.Before(cond.LastTransitionTime.Add(metric.window))
	}
	// It has been not ready since it started, or nearly.
	return cond.Status == corev1.ConditionFalse && p.Status.StartTime.Add(initialReadiness).After(cond.LastTransitionTime.Time)
}

func drop(used map[string]sample, pods sets.Set[string]) {
	for p := range pods {
		delete(used, p)
	}
}

// utilizationRatio compares what is used of what is requested with the target, in percent. raw is the mean use, in thousandths.
func utilizationRatio(used map[string]sample, requests map[string]int64, target int32) (ratio float64, percent int32, raw int64, err error) {
	var sum, requested, n int64
	for pod, m := range used {
		if r, ok := requests[pod]; ok {
			sum, requested, n = sum+m.value, requested+r, n+1
		}
	}
	if requested == 0 {
		return 0, 0, 0, errors.New("no metrics returned matched known pods")
	}
	percent = int32(sum * 100 / requested)
	return float64(percent) / float64(target), percent, sum / n, nil
}

func averageRatio(used map[string]sample, target int64) (ratio float64, usage int64) {
	var sum int64
	for _, m := range used {
		sum += m.value
	}
	usage = sum / int64(len(used))
	return float64(usage) / float64(target), usage
}

// requestsOf is what each pod, or one container of each, requests of a resource, in thousandths. What the pod says of itself as a whole goes before
// what its containers say.
func requestsOf(pods []*corev1.Pod, resource corev1.ResourceName, container string) (map[string]int64, error) {
	out := make(map[string]int64, len(pods))
	for _, p := range pods {
		if container == "" && resourcehelpers.IsPodLevelRequestsSet(p) {
			q, ok := resourcehelpers.PodRequests(p, resourcehelpers.PodResourcesOptions{})[resource]
			if !ok {
				return nil, fmt.Errorf("missing pod-level request for %s in Pod %s", resource, p.Name)
			}
			out[p.Name] = q.MilliValue()
			continue
		}
		var err error
		if out[p.Name], err = requestOfContainers(p, resource, container); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func requestOfContainers(p *corev1.Pod, resource corev1.ResourceName, container string) (sum int64, err error) {
	var lasting []*corev1.Container
	for i := range p.Spec.Containers {
		lasting = append(lasting, &p.Spec.Containers[i])
	}
	for i := range p.Spec.InitContainers {
		if c := &p.Spec.InitContainers[i]; c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			lasting = append(lasting, c)
		}
	}
	found := container == ""
	for _, c := range lasting {
		if container != "" && container != c.Name {
			continue
		}
		q, ok := c.Resources.Requests[resource]
		if !ok {
			return 0, fmt.Errorf("missing request for %s in container %s of Pod %s", resource, c.Name, p.Name)
		}
		found, sum = true, sum+q.MilliValue()
	}
	if !found {
		return 0, fmt.Errorf("container %s not found in Pod %s", container, p.Name)
	}
	return sum, nil
}
