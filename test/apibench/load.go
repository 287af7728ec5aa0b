package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"

	"skein.io/skein/test/cputime"
	"skein.io/skein/test/peers"
)

const (
	protobuf  = "application/vnd.kubernetes.protobuf"
	jsonMedia = "application/json"
	namespace = "bench"
	clients   = 8 // requests at once
)

// pod is what a Deployment of a web server makes of its template. Nobody schedules it: that would be work of parts that the peer lacks.
func pod(name string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace, Labels: map[string]string{"app": "web", "tier": "front"}},
		Spec: corev1.PodSpec{SchedulerName: "bench", Containers: []corev1.Container{{Name: "nginx", Image: "nginx:1.25", Ports: []corev1.ContainerPort{{ContainerPort: 80}},
			Env:       []corev1.EnvVar{{Name: "A", Value: "1"}, {Name: "B", Value: "two"}},
			Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{"cpu": resource.MustParse("10m"), "memory": resource.MustParse("16Mi")}}}}}}
}

// operation is one kind of request; i counts up.
type operation struct {
	name string
	// per is what the cost is divided by besides the number of requests.
	per   int
	media string
	do    func(ctx context.Context, k *kubernetes.Clientset, i int) error
}

func podName(i int) string { return fmt.Sprintf("p-%05d", i) }

// operations that are compared. known says how many pods there are.
func operations(known int) []operation {
	get := func(ctx context.Context, k *kubernetes.Clientset, i int) error {
		_, err := k.CoreV1().Pods(namespace).Get(ctx, podName(i%known), metav1.GetOptions{})
		return err
	}
	list := func(ctx context.Context, k *kubernetes.Clientset, i int) error {
		l, err := k.CoreV1().RESTClient().Get().Namespace(namespace).Resource("pods").VersionedParams(&metav1.ListOptions{Limit: 500}, scheme.ParameterCodec).Do(ctx).Raw()
		if err == nil && len(l) < 100*min(known, 500) {
			err = fmt.Errorf("a list of %d pods has %d bytes", min(known, 500), len(l))
		}
		return err
	}
	patch := func(ctx context.Context, k *kubernetes.Clientset, i int) error {
		_, err := k.CoreV1().Pods(namespace).Patch(ctx, podName(i%known), types.StrategicMergePatchType, fmt.Appendf(nil, `{"status":{"message":"m%d"}}`, i), metav1.PatchOptions{}, "status")
		return err
	}
	return []operation{
		{"get", 1, protobuf, get}, {"get, JSON", 1, jsonMedia, get},
		{"list of 500", 1, protobuf, list}, {"list of 500, JSON", 1, jsonMedia, list},
		{"status patch", 1, protobuf, patch},
	}
}

func create(from int) operation {
	return operation{"create", 1, protobuf, func(ctx context.Context, k *kubernetes.Clientset, i int) error {
		_, err := k.CoreV1().Pods(namespace).Create(ctx, pod(podName(from+i)), metav1.CreateOptions{})
		return err
	}}
}

// cost of requests: CPU time of the processes, and time on the clock.
type cost struct {
	n    int
	cpu  time.Duration
	wall time.Duration
}

func (c *cost) add(d cost) { c.n, c.cpu, c.wall = c.n+d.n, c.cpu+d.cpu, c.wall+d.wall }

// each is microseconds of CPU for one.
func (c *cost) each() float64 {
	if c.n == 0 {
		return 0
	}
	return float64(c.cpu.Microseconds()) / float64(c.n)
}

// run makes requests first..first+n-1 and says what they cost.
func run(ctx context.Context, s *peers.Subject, k *kubernetes.Clientset, op operation, first, n int) (cost, error) {
	return runWith(ctx, s, k, op, first, n, clients)
}

// runWith does that with so many at once.
func runWith(ctx context.Context, s *peers.Subject, k *kubernetes.Clientset, op operation, first, n, clients int) (cost, error) {
	before, err := cputime.Of(s.Pids())
	if err != nil {
		return cost{}, err
	}
	began := time.Now()
	var next atomic.Int64
	var failed atomic.Pointer[error]
	var wg sync.WaitGroup
	for range clients {
		wg.Go(func() {
			for failed.Load() == nil {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := op.do(ctx, k, first+i); err != nil {
					failed.CompareAndSwap(nil, &err)
				}
			}
		})
	}
	wg.Wait()
	wall := time.Since(began)
	if e := failed.Load(); e != nil {
		return cost{}, fmt.Errorf("%s: %s: %w", s.Name, op.name, *e)
	}
	after, err := cputime.Of(s.Pids())
	return cost{n, after - before, wall}, err
}

// watchers are open watches whose events are counted and not decoded.
type watchers struct {
	events, bytes atomic.Int64
	synced        atomic.Int64 // got the end of their initial events
	ended         atomic.Int64 // were ended by the server
	err           atomic.Pointer[error]
	each          func(event []byte) // may be nil
	stop          func()
}

// watch opens n watches with the options that o gives for each.
func watch(ctx context.Context, k *kubernetes.Clientset, n int, o func(i int) metav1.ListOptions) *watchers {
	return watchEach(ctx, k, n, o, nil)
}

// watchEach hands each event over as well, if each is not nil.
func watchEach(ctx context.Context, k *kubernetes.Clientset, n int, o func(i int) metav1.ListOptions, each func(event []byte)) *watchers {
	ctx, cancel := context.WithCancel(ctx)
	w := &watchers{each: each}
	var wg, open sync.WaitGroup
	w.stop = func() { cancel(); wg.Wait() }
	open.Add(n)
	for i := range n {
		wg.Go(func() {
			opts := o(i)
			opts.Watch = true
			body, err := k.CoreV1().RESTClient().Get().Namespace(namespace).Resource("pods").VersionedParams(&opts, scheme.ParameterCodec).Stream(ctx)
			open.Done()
			if err == nil {
				err = w.count(body)
				body.Close()
			}
			if ctx.Err() == nil {
				w.ended.Add(1)
				w.err.CompareAndSwap(nil, &err)
			}
		})
	}
	open.Wait()
	return w
}

func (w *watchers) count(body io.Reader) error {
	return peers.Frames(body, 16<<10, func(event []byte) error {
		w.bytes.Add(int64(len(event)))
		if bytes.Contains(event, []byte(metav1.InitialEventsAnnotationKey)) {
			w.synced.Add(1)
			return nil
		}
		if w.each != nil {
			w.each(event)
		}
		w.events.Add(1)
		return nil
	})
}

// await waits until f says yes.
func (w *watchers) await(what string, within time.Duration, f func() bool) error {
	for end := time.Now().Add(within); !f(); time.Sleep(5 * time.Millisecond) {
		if e := w.err.Load(); e != nil {
			return fmt.Errorf("%s: a watch ended: %w", what, *e)
		}
		if time.Now().After(end) {
			return fmt.Errorf("%s: not within %s: %d events, %d synced", what, within, w.events.Load(), w.synced.Load())
		}
	}
	return nil
}
