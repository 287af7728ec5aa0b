package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// story is what happened to each object of a kind, in order: "created 12", "updated 15", "deleted". It is written by whoever makes it
// happen and by each informer, and all have to tell the same.
type story struct {
	mu sync.Mutex // guards of
	of map[string][]string
}

func newStory() *story { return &story{of: map[string][]string{}} }

func (s *story) add(name, what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.of[name] = append(s.of[name], what)
}

// differs tells the first difference; "" for none.
func (s *story) differs(o *story) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	o.mu.Lock()
	defer o.mu.Unlock()
	for name, want := range s.of {
		if !slices.Equal(o.of[name], want) {
			return fmt.Sprintf("%s: written %v, seen %v", name, want, o.of[name])
		}
	}
	for name, seen := range o.of {
		if s.of[name] == nil {
			return fmt.Sprintf("%s: never written, seen %v", name, seen)
		}
	}
	return ""
}

func (s *story) events() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.of {
		n += len(x)
	}
	return n
}

// handler writes down what an informer tells.
func (s *story) handler() cache.ResourceEventHandler {
	meta := func(o any) metav1.Object { return o.(metav1.Object) }
	return cache.ResourceEventHandlerFuncs{
		AddFunc: func(o any) { s.add(meta(o).GetName(), "created "+meta(o).GetResourceVersion()) },
		UpdateFunc: func(_, o any) {
			if meta(o).GetDeletionTimestamp() != nil { // who asked for it is not told the resource version
				s.add(meta(o).GetName(), "ending")
				return
			}
			s.add(meta(o).GetName(), "updated "+meta(o).GetResourceVersion())
		},
		DeleteFunc: func(o any) {
			if u, ok := o.(cache.DeletedFinalStateUnknown); ok { // it missed the event and noticed by a list
				s.add(u.Key, "deleted, as it seems")
				return
			}
			s.add(meta(o).GetName(), "deleted")
		},
	}
}

// objects is how to write one kind.
type objects[T metav1.Object] struct {
	make   func(name string) T
	create func(context.Context, T, metav1.CreateOptions) (T, error)
	update func(context.Context, T, metav1.UpdateOptions) (T, error)
	get    func(context.Context, string, metav1.GetOptions) (T, error)
	delete func(context.Context, string, metav1.DeleteOptions) error
	// gentle: the API marks an object before it deletes it.
	gentle bool
}

// lives makes one object after the other, changes it and deletes it, until ctx ends, and writes down what really happened: a request that
// failed may have been carried out, so it looks.
func lives[T metav1.Object](ctx context.Context, prefix string, o objects[T], s *story) {
	try := func(f func(context.Context) error) error {
		rctx, cancel := context.WithTimeout(background, 2*time.Second)
		defer cancel()
		return f(rctx)
	}
	// look asks until it is known what is there.
	look := func(name string) (now T, there bool) {
		for {
			err := try(func(c context.Context) (err error) { now, err = o.get(c, name, metav1.GetOptions{}); return err })
			if err == nil || apierrors.IsNotFound(err) {
				return now, err == nil
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	for i := 0; ctx.Err() == nil; i++ {
		name := fmt.Sprintf("%s-%d", prefix, i)
		var now T
		for {
			err := try(func(c context.Context) (err error) {
				now, err = o.create(c, o.make(name), metav1.CreateOptions{})
				return err
			})
			if err == nil {
				break
			}
			var there bool
			if now, there = look(name); there {
				break
			}
		}
		s.add(name, "created "+now.GetResourceVersion())
		for k := range 3 {
			for want := fmt.Sprint(k); ; {
				last := now.GetResourceVersion()
				now.SetAnnotations(map[string]string{"k": want})
				next := now
				err := try(func(c context.Context) (err error) { next, err = o.update(c, now, metav1.UpdateOptions{}); return err })
				if err != nil {
					next, _ = look(name)
				}
				now = next
				if now.GetResourceVersion() != last {
					s.add(name, "updated "+now.GetResourceVersion())
					break
				}
			}
		}
		now0 := int64(0)
		for {
			err := try(func(c context.Context) error {
				return o.delete(c, name, metav1.DeleteOptions{GracePeriodSeconds: &now0})
			})
			if err == nil || apierrors.IsNotFound(err) {
				break
			}
		}
		if o.gentle {
			s.add(name, "ending")
		}
		s.add(name, "deleted")
		time.Sleep(5 * time.Millisecond)
	}
}

// informers watches pods and ConfigMaps through every node while the leader of each shard is killed in turn, under writes from several
// nodes: every informer tells each event once and in order.
func (w *world) informers(t *testing.T) {
	const namespace = "informed"
	w.apply(t, "n1", "apiVersion: v1\nkind: Namespace\nmetadata: {name: informed}\n")
	eventually(t, 10*time.Second, "the namespace has what every one has", func() error {
		return errOf(w.on("n1").CoreV1().ServiceAccounts(namespace).Get(background, "default", metav1.GetOptions{}))
	})
	ctx, stop := context.WithCancel(background)
	defer stop()
	seen := map[string]*story{}
	for _, node := range []string{"n1", "n2", "n3", "n4"} {
		k := w.longLived(t, node)
		f := informers.NewSharedInformerFactoryWithOptions(k, 0, informers.WithNamespace(namespace), informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = "told" }))
		for kind, i := range map[string]cache.SharedIndexInformer{"pods": f.Core().V1().Pods().Informer(), "configmaps": f.Core().V1().ConfigMaps().Informer()} {
			s := newStory()
			seen[kind+" through "+node] = s
			must(t, errOf(i.AddEventHandler(s.handler())))
		}
		f.Start(ctx.Done())
		defer f.Shutdown()
		defer stop()
		f.WaitForCacheSync(ctx.Done())
	}
	written := map[string]*story{"pods": newStory(), "configmaps": newStory()}
	writing, enough := context.WithCancel(background)
	defer enough()
	var writers sync.WaitGroup
	labels := map[string]string{"told": "yes"}
	for _, node := range []string{"n1", "n2", "n3", "n4"} {
		c := w.on(node).CoreV1()
		maps, pods := c.ConfigMaps(namespace), c.Pods(namespace)
		writers.Go(func() {
			lives(writing, "map-"+node, objects[*corev1.ConfigMap]{
				make: func(n string) *corev1.ConfigMap {
					return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: n, Labels: labels}}
				}, create: maps.Create, update: maps.Update, get: maps.Get, delete: maps.Delete,
			}, written["configmaps"])
		})
		writers.Go(func() {
			lives(writing, "pod-"+node, objects[*corev1.Pod]{
				make: func(n string) *corev1.Pod { // nobody's business but its writer's
					return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: n, Labels: labels},
						Spec: corev1.PodSpec{SchedulerName: "nobody", Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
				}, create: pods.Create, update: pods.Update, get: pods.Get, delete: pods.Delete, gentle: true,
			}, written["pods"])
		})
	}
	grows := func(by int) {
		for _, s := range written {
			until := s.events() + by
			eventually(t, 30*time.Second, "writes", func() error {
				if n := s.events(); n < until {
					return fmt.Errorf("%d of %d", n, until)
				}
				return nil
			})
		}
	}
	grows(100)
	for _, shard := range []string{"system", "pods", "events"} {
		leader := w.leaderOf(t, shard)
		must(t, w.node(leader).KillDaemon(background))
		died := time.Now()
		w.hangUp(leader)
		time.Sleep(1500 * time.Millisecond) // its successor works for a while
		must(t, w.node(leader).Start(background, nil))
		eventually(t, 40*time.Second, leader+" works", func() error { return w.healthy(leader) })
		t.Logf("the leader of %s, %s, was killed and works again after %s", shard, leader, time.Since(died).Round(10*time.Millisecond))
		grows(50)
	}
	enough()
	writers.Wait()
	for name, s := range seen {
		kind, _, _ := strings.Cut(name, " ")
		took := time.Now()
		var wrong string
		for time.Since(took) < 15*time.Second {
			if wrong = written[kind].differs(s); wrong == "" {
				break
			}
			time.Sleep(50 * time.Millisecond)
		}
		if wrong != "" {
			t.Errorf("%s: %s", name, wrong)
		}
	}
	t.Logf("%d events of pods and %d of ConfigMaps, each seen once through each of four nodes", written["pods"].events(), written["configmaps"].events())
}

// leaderOf is who leads a shard, as any running node knows it.
func (w *world) leaderOf(t *testing.T, shard string) (leader string) {
	t.Helper()
	eventually(t, 20*time.Second, "a leader of "+shard, func() error {
		for _, n := range w.others() {
			ctx, cancel := timeout(3 * time.Second)
			s, err := w.control(n).Status(ctx)
			cancel()
			if err != nil {
				continue
			}
			for _, x := range s.Shards {
				if x.Name == shard && x.Leader != "" {
					leader = x.Leader
					return nil
				}
			}
		}
		return fmt.Errorf("nobody knows one")
	})
	return leader
}

// longLived gives a client of one node's API without a bound for a whole request: watches last.
func (w *world) longLived(t *testing.T, node string) *kubernetes.Clientset {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	cfg := w.configFor(node, w.lab.DialContext)
	cfg.Timeout = 0
	return get(kubernetes.NewForConfig(cfg))(t)
}
