package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	watchtools "k8s.io/client-go/tools/watch"

	"skein.io/skein/test/cputime"
	"skein.io/skein/test/peers"
)

// podCIDR has a /24 for each of 8,192 nodes.
const podCIDR = "10.160.0.0/11"

// run is one comparison.
type run struct {
	config
	r     *report
	sides []*side
}

func (r *run) start(ctx context.Context) error {
	s, err := peers.StartSkein(ctx, r.skein, r.dir, "--pod-cidr", podCIDR)
	if err != nil {
		return err
	}
	if err := r.add(ctx, s); err != nil || r.apiserver == "" {
		return err
	}
	p, err := peers.StartPeer(ctx, r.etcd, r.apiserver, r.dir)
	if err != nil {
		r.stop()
		return err
	}
	if err := r.add(ctx, p); err != nil {
		return err
	}
	if err := p.StartScheduler(r.scheduler); err != nil {
		r.stop()
		return err
	}
	return nil
}

func (r *run) add(ctx context.Context, s *peers.Subject) error {
	d, err := newSide(ctx, s)
	if err != nil {
		s.Stop()
		return err
	}
	r.sides = append(r.sides, d)
	if err := d.prepare(ctx); err != nil {
		r.stop()
		return err
	}
	return nil
}

func (r *run) stop() {
	for _, d := range r.sides {
		d.stop()
	}
}

func say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "%s %s\n", time.Now().Format(time.TimeOnly), fmt.Sprintf(format, args...))
}

func (r *run) all(ctx context.Context) error {
	var idle peers.Memory
	if r.wants("memory") {
		if err := pause(ctx, 30*time.Second); err != nil {
			return err
		}
		var err error
		if idle, err = peers.MemoryOf(r.sides[0].Pids()); err != nil {
			return err
		}
	}
	for _, nodes := range []int{r.small, r.large} {
		if nodes == 0 {
			continue
		}
		say("%d nodes", nodes)
		for _, d := range r.sides {
			if err := d.grow(ctx, nodes); err != nil {
				return err
			}
		}
		if err := r.workloads(ctx, nodes); err != nil {
			return err
		}
		if r.wants("latency") {
			for _, d := range r.sides {
				if err := r.latency(ctx, d, nodes); err != nil {
					return err
				}
			}
		}
	}
	if r.wants("memory") {
		return r.memory(ctx, idle)
	}
	return nil
}

// workloads measures each, the sides in turns.
func (r *run) workloads(ctx context.Context, nodes int) error {
	pods := r.pods
	for round := range r.rounds {
		if r.wants("api") {
			for _, d := range r.sides {
				if err := r.api(ctx, d, nodes, pods); err != nil {
					return err
				}
			}
		}
		for _, w := range workloads() {
			if !r.wants(w.name) || w.fill != nil && nodes > r.small {
				continue // upstream gave up preemption on 5,000 nodes (kubernetes issue 108308)
			}
			say("%s, %d nodes, round %d", w.name, nodes, round+1)
			for _, d := range r.sides {
				if err := r.workload(ctx, d, w, nodes, pods); err != nil {
					return fmt.Errorf("%s: %s with %d nodes: %w", d.Name, w.name, nodes, err)
				}
			}
		}
	}
	return nil
}

// api is how many pods that nobody schedules a second can be created: what no scheduler can go beyond if pods are created meanwhile.
func (r *run) api(ctx context.Context, d *side, nodes, pods int) error {
	took, err := d.create(ctx, pods, func(i int) *corev1.Pod {
		p := plain(fmt.Sprintf("p-%05d", i))
		p.Spec.SchedulerName = "nobody"
		return p
	})
	if err != nil {
		return err
	}
	r.r.rate(key("pods created a second, nobody schedules them", nodes), d, pods, took)
	return d.clear(ctx)
}

func key(what string, nodes int) string { return fmt.Sprintf("%d nodes: %s", nodes, what) }

func (r *run) workload(ctx context.Context, d *side, w workload, nodes, pods int) error {
	if w.alone {
		pods = min(pods, nodes*4/5) // with the first ones they fill the nodes, as upstream's do
	}
	if w.fill != nil {
		pods = nodes / 2
		if err := r.placed(ctx, d, 4*nodes, "fill", w.fill); err != nil {
			return err
		}
	} else if err := r.first(ctx, d, w, pods); err != nil {
		return err
	}
	if w.fill == nil && !w.churn {
		if err := r.release(ctx, d, w, nodes, pods); err != nil {
			return err
		}
	}
	if w.alone { // there is room for one measure
		if err := d.clear(ctx); err != nil {
			return err
		}
		if err := r.first(ctx, d, w, pods); err != nil {
			return err
		}
	}
	end := r.profile(d, w.name, nodes)
	err := r.stream(ctx, d, w, nodes, pods)
	end()
	if err != nil {
		return err
	}
	return d.clear(ctx)
}

// first places the pods that are there before the measure of so many begins.
func (r *run) first(ctx context.Context, d *side, w workload, pods int) error {
	if w.first == 0 {
		return nil
	}
	return r.placed(ctx, d, pods*w.first/1000, "first", w.pod)
}

// placed makes pods and waits until they are bound.
func (r *run) placed(ctx context.Context, d *side, n int, prefix string, make func(string) *corev1.Pod) error {
	b, err := d.watch(ctx, "bench-set="+prefix)
	if err != nil {
		return err
	}
	defer b.stop()
	if _, err := d.create(ctx, n, func(i int) *corev1.Pod { return labelled(make(fmt.Sprintf("%s-%05d", prefix, i)), "bench-set", prefix) }); err != nil {
		return err
	}
	return b.await(ctx, n)
}

func labelled(p *corev1.Pod, key, value string) *corev1.Pod {
	labels := map[string]string{key: value}
	for k, v := range p.Labels {
		labels[k] = v
	}
	p.Labels = labels
	return p
}

// release measures decisions and bindings of pods that are all there: they are kept waiting by the guard until it goes.
func (r *run) release(ctx context.Context, d *side, w workload, nodes, pods int) error {
	if err := r.placed(ctx, d, 1, "guard", func(string) *corev1.Pod { return guard() }); err != nil {
		return err
	}
	b, err := d.watch(ctx, held+"=yes")
	if err != nil {
		return err
	}
	defer b.stop()
	if _, err := d.create(ctx, pods, func(i int) *corev1.Pod { return labelled(w.pod(fmt.Sprintf("held-%05d", i)), held, "yes") }); err != nil {
		return err
	}
	err = d.await(ctx, "all pods were refused", func() (bool, error) {
		list, err := d.k.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: held + "=yes"})
		if err != nil {
			return false, err
		}
		return !slices.ContainsFunc(list.Items, func(p corev1.Pod) bool {
			return !slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
				return c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse
			})
		}), nil
	})
	if err != nil {
		return err
	}
	if err := pause(ctx, 3*time.Second); err != nil { // beyond the first back-off, and what was written is done with
		return err
	}
	if n := b.n.Load(); n != 0 {
		return fmt.Errorf("%d pods were bound before they were released", n)
	}
	end := r.profile(d, w.name+"-waited", nodes)
	defer end()
	none := int64(0)
	return r.measured(ctx, d, b, nodes, pods, w.name+": pods that waited bound a second", w.name+": CPU for each, us", func() error {
		return d.k.CoreV1().Pods(namespace).Delete(ctx, "guard", metav1.DeleteOptions{GracePeriodSeconds: &none})
	}, func() {})
}

// measured reports how many pods a second are bound from the beginning of do until all are, and what CPU each takes, with the events that tell of it. It calls bound
// when all are: what else writes events has to end.
func (r *run) measured(ctx context.Context, d *side, b *bindings, nodes, pods int, rate, each string, do func() error, bound func()) error {
	events, err := d.events(ctx)
	if err != nil {
		return err
	}
	before, err := cputime.Of(d.Pids())
	if err != nil {
		return err
	}
	began := time.Now()
	if err := do(); err != nil {
		return err
	}
	if err := b.await(ctx, pods); err != nil {
		return err
	}
	took := b.last.Load().Sub(began)
	bound()
	written, after, err := d.told(ctx)
	if err != nil {
		return err
	}
	r.r.rate(key(rate, nodes), d, pods, took)
	r.r.put(key(each, nodes), d.Name, float64((after-before).Microseconds())/float64(pods), lower)
	say("%s: %d events of %d pods in that time", d.Name, written-events, pods)
	return nil
}

// stream measures pods created as fast as the API takes them until all are bound.
func (r *run) stream(ctx context.Context, d *side, w workload, nodes, pods int) error {
	b, err := d.watch(ctx, "bench-set=stream")
	if err != nil {
		return err
	}
	defer b.stop()
	end := func() {}
	if w.churn {
		ctx, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		wg.Go(func() { churn(ctx, d) })
		end = func() { cancel(); wg.Wait() }
	}
	defer end()
	return r.measured(ctx, d, b, nodes, pods, w.name+": pods created and bound a second", w.name+": CPU for creating and binding each, us", func() error {
		_, err := d.create(ctx, pods, func(i int) *corev1.Pod {
			return labelled(w.pod(fmt.Sprintf("stream-%05d", i)), "bench-set", "stream")
		})
		return err
	}, end)
}

// churn makes and removes a node, a pod that fits nowhere and a Service once a second, as upstream's workload does.
func churn(ctx context.Context, d *side) {
	none := int64(0)
	for i := 0; ctx.Err() == nil; i++ {
		n := node(0)
		n.Name, n.Labels = "churn", nil
		n.Status.Allocatable = corev1.ResourceList{}
		big := labelled(pod("churn", "9", nil), "bench-set", "churn")
		big.Spec.PriorityClassName = high
		svc := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "churn"}, Spec: corev1.ServiceSpec{Selector: map[string]string{"app": "foo"},
			Ports: []corev1.ServicePort{{Port: 8080, TargetPort: intstr.FromInt32(8080)}}}}
		// The next turn makes up for what fails.
		_, _ = d.k.CoreV1().Nodes().Create(ctx, n, metav1.CreateOptions{})
		_, _ = d.k.CoreV1().Pods(namespace).Create(ctx, big, metav1.CreateOptions{})
		_, _ = d.k.CoreV1().Services(namespace).Create(ctx, svc, metav1.CreateOptions{})
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
		all := context.WithoutCancel(ctx)
		_ = d.k.CoreV1().Nodes().Delete(all, "churn", metav1.DeleteOptions{})
		_ = d.k.CoreV1().Pods(namespace).Delete(all, "churn", metav1.DeleteOptions{GracePeriodSeconds: &none})
		_ = d.k.CoreV1().Services(namespace).Delete(all, "churn", metav1.DeleteOptions{})
	}
}

// latency is from the answer to a create until a watch shows the pod bound, with 100 creates a second.
func (r *run) latency(ctx context.Context, d *side, nodes int) error {
	const perSecond, seconds = 100, 20
	say("latency, %d nodes, %s", nodes, d.Name)
	k, err := d.Client(protobuf)
	if err != nil {
		return err
	}
	var mu sync.Mutex // guards both
	made, bound := map[string]time.Time{}, map[string]time.Time{}
	count := func() int { mu.Lock(); defer mu.Unlock(); return len(bound) }
	opts := metav1.ListOptions{FieldSelector: "spec.nodeName!="}
	list, err := k.CoreV1().Pods(namespace).List(ctx, opts)
	if err != nil {
		return err
	}
	w, err := watchtools.NewRetryWatcherWithContext(ctx, list.ResourceVersion, &cache.ListWatch{
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = opts.FieldSelector
			return k.CoreV1().Pods(namespace).Watch(ctx, o)
		}})
	if err != nil {
		return err
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for ev := range w.ResultChan() {
			if p, ok := ev.Object.(*corev1.Pod); ok {
				mu.Lock()
				if _, known := bound[p.Name]; !known {
					bound[p.Name] = time.Now()
				}
				mu.Unlock()
			}
		}
	})
	var errs sync.Map
	tick := time.NewTicker(time.Second / perSecond)
	for i := range perSecond * seconds {
		<-tick.C
		wg.Go(func() {
			name := fmt.Sprintf("late-%05d", i)
			if _, err := d.k.CoreV1().Pods(namespace).Create(ctx, plain(name), metav1.CreateOptions{}); err != nil {
				errs.Store(name, err)
			}
			mu.Lock()
			made[name] = time.Now()
			mu.Unlock()
		})
	}
	tick.Stop()
	err = d.await(ctx, "all pods are bound", func() (bool, error) { return count() >= perSecond*seconds, nil })
	w.Stop()
	wg.Wait()
	errs.Range(func(_, e any) bool { err = e.(error); return false })
	if err != nil {
		return err
	}
	var late []float64
	for name, at := range made {
		late = append(late, max(0, bound[name].Sub(at).Seconds()*1000))
	}
	slices.Sort(late)
	for _, p := range []int{50, 99} {
		r.r.put(key(fmt.Sprintf("created to bound at %d pods/s, p%d, ms", perSecond, p), nodes), d.Name, late[len(late)*p/100], lower)
	}
	return d.clear(ctx)
}

// memory is what the leader holds more with all nodes and many bound pods than when it was idle.
func (r *run) memory(ctx context.Context, idle peers.Memory) error {
	d := r.sides[0]
	say("memory with %d pods", r.crowd)
	if err := r.placed(ctx, d, r.crowd, "crowd", plain); err != nil {
		return err
	}
	if err := pause(ctx, 40*time.Second); err != nil {
		return err
	}
	m, err := peers.MemoryOf(d.Pids())
	if err != nil {
		return err
	}
	r.r.put(fmt.Sprintf("anonymous MB when idle and empty"), d.Name, idle.Anon, lower)
	r.r.put(fmt.Sprintf("anonymous MB more with %d nodes and %d pods", d.nodes.Load(), r.crowd), d.Name, m.Anon-idle.Anon, lower)
	if r.profiles == "" {
		return nil
	}
	// The first has the runtime's account of all its memory as it was measured.
	for _, f := range [][2]string{{"heap?debug=1", "heap.txt"}, {"heap?gc=1", "heap.pprof"}, {"goroutine?debug=1", "goroutines.txt"}} {
		if err := peers.Fetch(d.Config, "/debug/pprof/"+f[0], filepath.Join(r.profiles, f[1])); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) profile(d *side, name string, nodes int) (end func()) {
	if r.profiles == "" || d.StartScheduler != nil {
		return func() {}
	}
	var wg sync.WaitGroup
	for path, suffix := range map[string]string{"profile": "", "allocs": "-allocs"} {
		wg.Go(func() {
			if err := peers.Fetch(d.Config, "/debug/pprof/"+path+"?seconds=8", filepath.Join(r.profiles, fmt.Sprintf("%s-%d%s.pprof", name, nodes, suffix))); err != nil {
				say("%s: %v", path, err)
			}
		})
	}
	return wg.Wait
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
