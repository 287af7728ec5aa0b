// Package usage works out how much CPU and memory the containers of a node use, from what has been counted up to two moments.
//
// It measures only when it is asked: nothing runs in between, so a node that nobody asks spends nothing. CPU needs two samples. Somebody
// who asks regularly (every 15 s, say) gets the mean since his last time; the first one waits for a second sample, a second long. At most one sample
// is taken at a time and at most one every [Shared], however many ask.
//
// Rates and choose are pure. A Sampler may be used by any number of callers at once; the agent's server is the one that does.
package usage

import (
	"cmp"
	"context"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	metricsv1beta1 "k8s.io/metrics/pkg/apis/metrics/v1beta1"
)

const (
	// Shared is how long a sample serves those who ask after it.
	Shared = 2 * time.Second
	// wanted is the shortest window of those who ask regularly; metrics-server's is 10 s, too.
	wanted = 10 * time.Second
	// shortest is the window of somebody who asks for the first time.
	shortest = time.Second
	// kept is how long a sample may be the beginning of a window.
	kept = 2 * time.Minute
	// maxKept bounds the samples: more than one every Shared are never taken.
	maxKept = int(kept / Shared)
)

// Report is the answer of a node's agent.
type Report struct {
	Node metricsv1beta1.NodeMetrics  `json:"node"`
	Pods []metricsv1beta1.PodMetrics `json:"pods"`
}

// Container is what one container has used.
type Container struct {
	PodUID  string
	Name    string
	Started time.Time
	At      time.Time // when it was read
	CPU     uint64    // nanoseconds since it started
	Memory  uint64    // working set, bytes
}

// Sample is what has been counted up to a moment.
type Sample struct {
	At     time.Time
	CPU    uint64 // of the machine, in nanoseconds of one processor
	Memory uint64 // of the machine, not available, in bytes
	// Containers that run, by the runtime's id.
	Containers map[string]Container
}

// Rates is the use between two samples. Containers that began in between count from their start; a pod of which a container has run for less than a
// second is left out, as it has no rate yet. Pods are sorted by namespace and name.
func Rates(node string, base, now Sample, pods []*corev1.Pod) Report {
	window := now.At.Sub(base.At)
	r := Report{
		Node: metricsv1beta1.NodeMetrics{ObjectMeta: metav1.ObjectMeta{Name: node}, Timestamp: metav1.NewTime(now.At), Window: metav1.Duration{Duration: window.Round(time.Millisecond)},
			Usage: quantities(rate(base.CPU, now.CPU, window), now.Memory)},
		Pods: []metricsv1beta1.PodMetrics{},
	}
	byPod := map[string][]string{}
	for id, c := range now.Containers {
		byPod[c.PodUID] = append(byPod[c.PodUID], id)
	}
	for _, pod := range pods {
		if m, ok := podRates(pod, byPod[string(pod.UID)], base, now); ok {
			r.Pods = append(r.Pods, m)
		}
	}
	slices.SortFunc(r.Pods, func(a, b metricsv1beta1.PodMetrics) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return r
}

func podRates(pod *corev1.Pod, ids []string, base, now Sample) (metricsv1beta1.PodMetrics, bool) {
	m := metricsv1beta1.PodMetrics{ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, Labels: pod.Labels}}
	for _, id := range ids {
		c := now.Containers[id]
		from, counted := c.Started, uint64(0)
		if b, ok := base.Containers[id]; ok && b.CPU <= c.CPU {
			from, counted = b.At, b.CPU
		}
		window := c.At.Sub(from)
		if window < shortest/2 {
			return m, false
		}
		m.Containers = append(m.Containers, metricsv1beta1.ContainerMetrics{Name: c.Name, Usage: quantities(rate(counted, c.CPU, window), c.Memory)})
		if m.Timestamp.IsZero() || c.At.Before(m.Timestamp.Time) {
			m.Timestamp = metav1.NewTime(c.At)
		}
		m.Window.Duration = max(m.Window.Duration, window.Round(time.Millisecond))
	}
	slices.SortFunc(m.Containers, func(a, b metricsv1beta1.ContainerMetrics) int { return cmp.Compare(a.Name, b.Name) })
	return m, len(m.Containers) > 0
}

// rate is in billionths of a processor.
func rate(from, to uint64, window time.Duration) uint64 {
	if to <= from || window <= 0 {
		return 0
	}
	return uint64(float64(to-from) / window.Seconds())
}

func quantities(nanoCores, bytes uint64) corev1.ResourceList {
	return corev1.ResourceList{
		corev1.ResourceCPU:    *resource.NewScaledQuantity(int64(nanoCores), resource.Nano),
		corev1.ResourceMemory: *resource.NewQuantity(int64(bytes), resource.BinarySI),
	}
}

// Sampler keeps the samples of those who asked lately.
type Sampler struct {
	take func(context.Context) (Sample, error)
	turn chan struct{} // whoever takes it may look at samples
	// samples, the oldest first.
	samples []Sample
}

// NewSampler makes a Sampler of what take reads.
func NewSampler(take func(context.Context) (Sample, error)) *Sampler {
	return &Sampler{take: take, turn: make(chan struct{}, 1)}
}

// Window returns two samples, at least half a second apart.
func (s *Sampler) Window(ctx context.Context) (base, now Sample, err error) {
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return base, now, ctx.Err()
	}
	if n := len(s.samples); n == 0 || time.Since(s.samples[n-1].At) >= Shared {
		if err := s.add(ctx); err != nil {
			return base, now, err
		}
	}
	if b, n, ok := choose(s.samples); ok {
		return b, n, nil
	}
	t := time.NewTimer(shortest - time.Since(s.samples[len(s.samples)-1].At))
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return base, now, ctx.Err()
	}
	if err := s.add(ctx); err != nil {
		return base, now, err
	}
	base, now, _ = choose(s.samples)
	return base, now, nil
}

func (s *Sampler) add(ctx context.Context) error {
	sample, err := s.take(ctx)
	if err != nil {
		return err
	}
	old := func(o Sample) bool { return sample.At.Sub(o.At) > kept }
	s.samples = append(slices.DeleteFunc(s.samples, old), sample)
	if len(s.samples) > maxKept {
		s.samples = slices.Delete(s.samples, 0, len(s.samples)-maxKept)
	}
	return nil
}

// choose finds the window to answer with: up to the newest sample, from the youngest that is old enough, or else from the oldest, if that makes a window
// at all.
func choose(samples []Sample) (base, now Sample, ok bool) {
	if len(samples) < 2 {
		return base, now, false
	}
	now = samples[len(samples)-1]
	for i := len(samples) - 2; i >= 0; i-- {
		if base = samples[i]; now.At.Sub(base.At) >= wanted {
			break
		}
	}
	return base, now, now.At.Sub(base.At) >= shortest/2
}
