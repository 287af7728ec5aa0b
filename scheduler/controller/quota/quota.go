// Package quota keeps the status of each ResourceQuota true: what its limits are
// and how much of them is used. Admission adds to the usage when something is
// made; only this controller takes off it, when something has gone.
//
// Inputs: ResourceQuotas, Pods, Services, PersistentVolumeClaims, and the number
// of whatever else a quota limits. Outputs: ResourceQuota status.
//
// What counts, and how much, is Kubernetes' to say (Usage). Kinds that are only
// counted are not watched: the leader would have to hold all Secrets of the
// cluster in memory for it. They are counted again every recount while a quota
// limits them, so their usage falls within that time.
package quota

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "resourcequota"
	workers = 2
	// recount is how often kinds are counted that are not watched.
	recount = 10 * time.Second
	// settle is how long a change waits for others: a namespace that is emptied
	// is counted a few times, not once for each pod.
	settle = 200 * time.Millisecond
	// lagRecheck is when a sync that found the view behind looks again.
	lagRecheck = time.Second
)

type quotas struct {
	controller.Deps
	queue    *controller.Queue[string]
	quotaInf cache.SharedIndexInformer
	podInf   cache.SharedIndexInformer
	svcInf   cache.SharedIndexInformer
	pvcInf   cache.SharedIndexInformer
	lister   corelisters.ResourceQuotaLister
	written  *controller.Ledger
}

// New returns the quota controller. It does nothing without Deps.Quota.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	core := deps.Factory.Core().V1()
	return &quotas{
		Deps:     deps,
		queue:    controller.NewQueue[string](name, deps.Clock),
		quotaInf: core.ResourceQuotas().Informer(),
		podInf:   core.Pods().Informer(),
		svcInf:   core.Services().Informer(),
		pvcInf:   core.PersistentVolumeClaims().Informer(),
		lister:   core.ResourceQuotas().Lister(),
		written:  controller.NewLedger(core.ResourceQuotas().Informer().GetIndexer()),
	}
}

func (c *quotas) Name() string { return name }

func (c *quotas) Run(ctx context.Context) error {
	if c.Quota == nil {
		<-ctx.Done()
		return nil
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: workers,
		Watches: []controller.Watch{
			controller.On(c.quotaInf, c.quotaChanged),
			controller.On(c.podInf, c.podChanged),
			controller.On(c.svcInf, func(old, cur *corev1.Service) {
				if cur == nil || old != nil && !equality.Semantic.DeepEqual(old.Spec, cur.Spec) {
					c.wake(old.Namespace)
				}
			}),
			controller.On(c.pvcInf, func(old, cur *corev1.PersistentVolumeClaim) {
				if cur == nil || old != nil && !equality.Semantic.DeepEqual(old.Spec, cur.Spec) {
					c.wake(old.Namespace)
				}
			}),
		},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

// quotaChanged wakes at once for other limits, also when somebody else wrote them into the status. A changed usage
// is checked later, once for all changes until then: admission counts what it lets pass, also what is refused behind it.
func (c *quotas) quotaChanged(old, cur *corev1.ResourceQuota) {
	switch {
	case cur == nil:
	case old == nil, !equality.Semantic.DeepEqual(old.Spec, cur.Spec), !same(cur.Status.Hard, cur.Spec.Hard):
		c.queue.Add(controller.Key(cur))
	case !same(old.Status.Used, cur.Status.Used):
		c.queue.AddAfter(controller.Key(cur), recount)
	}
}

// podChanged wakes quotas when a pod may count for less: it has gone or ended,
// has begun to end, or asks for other resources.
func (c *quotas) podChanged(old, cur *corev1.Pod) {
	switch {
	case old == nil:
	case cur == nil, controller.PodTerminal(cur) && !controller.PodTerminal(old),
		(old.DeletionTimestamp == nil) != (cur.DeletionTimestamp == nil),
		(old.Spec.ActiveDeadlineSeconds == nil) != (cur.Spec.ActiveDeadlineSeconds == nil),
		!equality.Semantic.DeepEqual(requests(old), requests(cur)), !equality.Semantic.DeepEqual(granted(old), granted(cur)):
		c.wake(old.Namespace)
	}
	if cur != nil && cur.DeletionTimestamp != nil {
		// A pod that has not ended by its deadline does not count any more.
		if left := cur.DeletionTimestamp.Sub(c.Clock.Now()); left > 0 {
			c.wakeAfter(cur.Namespace, left+settle)
		}
	}
}

func requests(pod *corev1.Pod) (out []corev1.ResourceRequirements) {
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			out = append(out, list[i].Resources)
		}
	}
	return out
}

// granted is what containers have, which counts as long as a resize to less is under way.
func granted(pod *corev1.Pod) (out []corev1.ResourceList) {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for i := range list {
			if r := list[i].Resources; r != nil {
				out = append(out, r.Requests)
			}
			out = append(out, list[i].AllocatedResources)
		}
	}
	return out
}

func (c *quotas) wake(namespace string) { c.wakeAfter(namespace, settle) }

func (c *quotas) wakeAfter(namespace string, d time.Duration) {
	all, err := c.lister.ResourceQuotas(namespace).List(labels.Everything())
	if err != nil {
		return // a lister of a cache has no errors
	}
	for _, q := range all {
		c.queue.AddAfter(controller.Key(q), d)
	}
}

func (c *quotas) sync(ctx context.Context, key string) error {
	ns, quotaName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	if c.written.Pending(key, c.Clock.Now()) > 0 {
		c.queue.AddAfter(key, lagRecheck)
		return nil
	}
	q, err := c.lister.ResourceQuotas(ns).Get(quotaName)
	if apierrors.IsNotFound(err) {
		c.written.Forget(key)
		return nil
	}
	if err != nil {
		return err
	}
	used, counted, usageErr := c.Quota.Usage(ctx, q)
	if counted {
		c.queue.AddAfter(key, recount)
	}
	// What could be worked out is written, whatever could not.
	return errors.Join(usageErr, c.update(ctx, key, q, newStatus(q, used)))
}

// newStatus takes what is known of the usage from used, and else what was known.
func newStatus(q *corev1.ResourceQuota, used corev1.ResourceList) corev1.ResourceQuotaStatus {
	s := corev1.ResourceQuotaStatus{Hard: q.Spec.Hard.DeepCopy(), Used: corev1.ResourceList{}}
	for r := range q.Spec.Hard {
		if n, ok := used[r]; ok {
			s.Used[r] = n
		} else if n, ok := q.Status.Used[r]; ok {
			s.Used[r] = n
		}
	}
	return s
}

func (c *quotas) update(ctx context.Context, key string, q *corev1.ResourceQuota, status corev1.ResourceQuotaStatus) error {
	if same(q.Status.Hard, status.Hard) && same(q.Status.Used, status.Used) {
		return nil
	}
	upd := q.DeepCopy()
	upd.Status = status
	// Admission may have counted something meanwhile: the write is refused then,
	// and everything is counted again.
	upd, err := c.Client.CoreV1().ResourceQuotas(q.Namespace).UpdateStatus(ctx, upd, metav1.UpdateOptions{})
	switch {
	case err == nil:
		c.written.Wrote(key, upd, c.Clock.Now())
		return nil
	case apierrors.IsNotFound(err):
		return nil
	}
	return fmt.Errorf("update status of ResourceQuota %s: %w", key, err)
}

// same compares quantities by value: 1000m is 1.
func same(a, b corev1.ResourceList) bool {
	if len(a) != len(b) || (a == nil) != (b == nil) {
		return false
	}
	for r, n := range a {
		if m, ok := b[r]; !ok || n.Cmp(m) != 0 {
			return false
		}
	}
	return true
}
