// Package namespace removes what is in a namespace that is being deleted, and
// then lets the namespace go.
//
// Inputs: Namespaces, Pods (their grace periods and ends); discovery, and the
// metadata of everything in a namespace that is ending. Outputs: deletes all
// namespaced objects of it; Namespace phase and conditions; takes the finalizer
// "kubernetes" off through the finalize subresource.
//
// Ordering: pods go first and the rest only when they are gone, so that a pod
// never runs without the policies and secrets that it was started under. The
// namespace is let go only after a sweep that found nothing in any kind, with
// discovery complete, and that began at least settle after this process saw the
// deletion: until then another API server may not have known of it and let an
// object in.
package namespace

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "namespace"
	workers = 4
	// settle is how long other API servers may still let objects in; upstream
	// waits 5 s before it even begins.
	settle = 2 * time.Second
	// Between two sweeps of one namespace: doubled as long as nothing gets less.
	firstWait   = 500 * time.Millisecond
	longestWait = 8 * time.Second
)

type namespaces struct {
	controller.Deps
	queue  *controller.Queue[string]
	nsInf  cache.SharedIndexInformer
	podInf cache.SharedIndexInformer
	lister corelisters.NamespaceLister

	mu sync.Mutex
	// ending is what is remembered of namespaces that are being deleted, by name.
	// Guarded by mu; an entry's fields belong to the worker that holds its key.
	ending map[string]*progress
}

// progress is how far the removal of one namespace has come.
type progress struct {
	uid   types.UID
	since time.Time // when its deletion was seen here
	left  int       // objects after the last sweep
	tries int       // sweeps since something got less
}

// New returns the namespace controller. Deps.Metadata is required.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	core := deps.Factory.Core().V1()
	return &namespaces{
		Deps:   deps,
		queue:  controller.NewQueue[string](name, deps.Clock),
		nsInf:  core.Namespaces().Informer(),
		podInf: core.Pods().Informer(),
		lister: core.Namespaces().Lister(),
		ending: map[string]*progress{},
	}
}

func (c *namespaces) Name() string { return name }

func (c *namespaces) Run(ctx context.Context) error {
	if c.Metadata == nil {
		return fmt.Errorf("controller %s: Deps.Metadata is required", name)
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: workers,
		Watches: []controller.Watch{
			controller.On(c.nsInf, c.namespaceChanged),
			controller.On(c.podInf, c.podChanged),
		},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

func (c *namespaces) namespaceChanged(old, cur *corev1.Namespace) {
	switch {
	case cur == nil:
		c.queue.Add(old.Name) // to forget it
	case cur.DeletionTimestamp == nil:
	case old == nil, old.UID != cur.UID, old.DeletionTimestamp == nil, !slices.Equal(old.Spec.Finalizers, cur.Spec.Finalizers):
		// Own changes of the status wake nobody: the sweeps come by themselves.
		c.queue.Add(cur.Name)
	}
}

// podChanged wakes a namespace whose last pod has gone.
func (c *namespaces) podChanged(old, cur *corev1.Pod) {
	if cur != nil {
		return
	}
	ns, err := c.lister.Get(old.Namespace)
	if err != nil || ns.DeletionTimestamp == nil {
		return
	}
	if rest, err := c.podInf.GetIndexer().IndexKeys(cache.NamespaceIndex, old.Namespace); err == nil && len(rest) == 0 {
		c.queue.Add(old.Namespace)
	}
}

func (c *namespaces) sync(ctx context.Context, nsName string) error {
	// From the store itself: what follows cannot be undone.
	ns, err := c.Client.CoreV1().Namespaces().Get(ctx, nsName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		c.forget(nsName)
		return nil
	}
	if err != nil {
		return fmt.Errorf("read namespace %s: %w", nsName, err)
	}
	if ns.DeletionTimestamp == nil {
		c.forget(nsName)
		return nil
	}
	if !slices.Contains(ns.Spec.Finalizers, corev1.FinalizerKubernetes) {
		return nil // done here; others may still hold it
	}
	p := c.progress(ns)
	began := c.Clock.Now()
	found := c.sweep(ctx, ns)
	if err := ctx.Err(); err != nil {
		return err
	}
	if ns, err = c.updateStatus(ctx, ns, found); err != nil {
		return err
	}
	if !found.clean() {
		wait := p.next(found.total())
		if err := found.err(); err != nil {
			c.Logger.Warn("a namespace cannot be emptied yet", "namespace", nsName, "again", wait, "err", err)
		}
		c.queue.AddAfter(nsName, wait)
		return nil
	}
	if wait := settle - began.Sub(p.since); wait > 0 {
		c.queue.AddAfter(nsName, wait)
		return nil
	}
	return c.finalize(ctx, ns)
}

func (c *namespaces) progress(ns *corev1.Namespace) *progress {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.ending[ns.Name]
	if p == nil || p.uid != ns.UID {
		p = &progress{uid: ns.UID, since: c.Clock.Now()}
		c.ending[ns.Name] = p
	}
	return p
}

func (c *namespaces) forget(nsName string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.ending, nsName)
}

// next is how long to wait before the next sweep after one that left so many.
func (p *progress) next(left int) time.Duration {
	if left < p.left {
		p.tries = 0
	}
	p.left = left
	wait := min(longestWait, firstWait<<min(p.tries, 10))
	p.tries++
	return wait
}

func (c *namespaces) updateStatus(ctx context.Context, ns *corev1.Namespace, found sweep) (*corev1.Namespace, error) {
	conditions, changed := judge(ns.Status.Conditions, found, c.Clock.Now())
	if !changed && ns.Status.Phase == corev1.NamespaceTerminating {
		return ns, nil
	}
	upd := ns.DeepCopy()
	upd.Status.Phase = corev1.NamespaceTerminating
	upd.Status.Conditions = conditions
	upd, err := c.Client.CoreV1().Namespaces().UpdateStatus(ctx, upd, metav1.UpdateOptions{})
	if err != nil {
		return nil, fmt.Errorf("update status of namespace %s: %w", ns.Name, err)
	}
	return upd, nil
}

func (c *namespaces) finalize(ctx context.Context, ns *corev1.Namespace) error {
	upd := ns.DeepCopy()
	upd.Spec.Finalizers = slices.DeleteFunc(upd.Spec.Finalizers, func(f corev1.FinalizerName) bool { return f == corev1.FinalizerKubernetes })
	if _, err := c.Client.CoreV1().Namespaces().Finalize(ctx, upd, metav1.UpdateOptions{}); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("finalize namespace %s: %w", ns.Name, err)
	}
	c.forget(ns.Name)
	return nil
}
