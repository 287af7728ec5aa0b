// Package replicaset keeps as many pods alive as each ReplicaSet asks for, and as
// each ReplicationController, which is an older form of the same thing.
//
// Inputs: ReplicaSets or ReplicationControllers, Pods. Outputs: creates and
// deletes Pods; sets and clears the controller reference of Pods that its
// selector matches or no longer matches; the status of the set; events
// SuccessfulCreate, FailedCreate, SuccessfulDelete and FailedDelete on it.
//
// There is one controller for each of the two kinds. ReplicationControllers are
// seen as ReplicaSets (source), so that all that follows is the same.
//
// It never acts on a view that does not show its own creations and deletions
// yet (controller.Ledger), so it neither overshoots nor deletes twice. What to
// do is decided by plan and newStatus, which are pure.
package replicaset

import (
	"context"
	"errors"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"

	"skein.io/skein/scheduler/controller"
)

const (
	workers = 4
	// burst bounds how many pods one sync creates or deletes; the rest follows in
	// the next sync. Upstream's BurstReplicas.
	burst = 500
	// parallel bounds the requests of one sync that are under way at once.
	parallel = 16
	// lagRecheck is when a sync that found the view behind looks again, if no
	// event woke it before.
	lagRecheck = time.Second
)

type replicaSets struct {
	controller.Deps
	source
	queue   *controller.Queue[string]
	podInf  cache.SharedIndexInformer
	ledger  *controller.Ledger
	events  record.EventRecorder
	initErr error
}

// New returns the ReplicaSet controller.
func New(deps controller.Deps) controller.Controller {
	return newController(deps.WithDefaults(), replicaSetSource)
}

// NewReplication returns the ReplicationController controller.
func NewReplication(deps controller.Deps) controller.Controller {
	return newController(deps.WithDefaults(), replicationSource)
}

func newController(deps controller.Deps, from func(controller.Deps) source) controller.Controller {
	src, pods := from(deps), deps.Factory.Core().V1().Pods()
	return &replicaSets{
		Deps:   deps,
		source: src,
		queue:  controller.NewQueue[string](src.name, deps.Clock),
		podInf: pods.Informer(),
		ledger: controller.NewLedger(pods.Informer().GetIndexer()),
		events: deps.Recorder(src.component),
		initErr: errors.Join(controller.EnsureIndexes(src.rsInf, controller.IndexController),
			controller.EnsureIndexes(pods.Informer(), controller.IndexController)),
	}
}

func (c *replicaSets) Name() string { return c.name }

func (c *replicaSets) Run(ctx context.Context) error {
	if c.initErr != nil {
		return c.initErr
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: workers,
		Watches: []controller.Watch{
			controller.On(c.rsInf, c.setChanged),
			controller.On(c.podInf, c.podChanged),
		},
		Own:    c.own,
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

func (c *replicaSets) setChanged(old, cur *appsv1.ReplicaSet) {
	if cur == nil {
		cur = old
	}
	c.queue.Add(controller.Key(cur))
}

// podChanged wakes the ReplicaSet that controls or controlled the pod, and for
// a pod that nobody controls those that may adopt it.
func (c *replicaSets) podChanged(old, cur *corev1.Pod) {
	controller.Concerned(controller.Owners[*appsv1.ReplicaSet]{
		Kind:     c.kind.Kind,
		Get:      func(ns, name string) (*appsv1.ReplicaSet, error) { return c.sets.ReplicaSets(ns).Get(name) },
		List:     func(ns string) ([]*appsv1.ReplicaSet, error) { return c.sets.ReplicaSets(ns).List(labels.Everything()) },
		Selector: func(rs *appsv1.ReplicaSet) *metav1.LabelSelector { return rs.Spec.Selector },
	}, old, cur, func(rs *appsv1.ReplicaSet) { c.queue.Add(controller.Key(rs)) })
}

func (c *replicaSets) sync(ctx context.Context, key string) error {
	ns, setName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	rs, err := c.sets.ReplicaSets(ns).Get(setName)
	if apierrors.IsNotFound(err) {
		c.ledger.Forget(key)
		return nil
	}
	if err != nil {
		return err
	}
	selector, err := metav1.LabelSelectorAsSelector(rs.Spec.Selector)
	if err != nil {
		// Validation refuses such a selector; nothing to do until it changes.
		c.Logger.Error("selector cannot be read", "kind", c.kind.Kind, "object", key, "err", err)
		return nil
	}
	pending := c.ledger.Pending(key, c.Clock.Now()) // before the view is read
	all, err := controller.Controlled[*corev1.Pod](c.podInf.GetIndexer(), rs.Namespace, rs.UID)
	if err != nil {
		return err
	}
	active, err := c.claim(ctx, rs, selector, filter(all, controller.PodActive))
	if err != nil {
		return err
	}
	terminating := controller.PlanClaims(rs, selector, filter(all, controller.PodTerminating)).Owned

	var manageErr error
	if pending > 0 {
		c.queue.AddAfter(key, lagRecheck)
	} else if rs.DeletionTimestamp == nil {
		manageErr = c.manage(ctx, key, rs, active)
	}
	now, failure := c.Clock.Now(), manageErr
	if failure == nil {
		failure = held(rs, active) // nothing to try again for
	}
	if err := c.updateStatus(ctx, rs, newStatus(rs, active, terminating, failure, now)); err != nil {
		return err
	}
	if manageErr != nil {
		return manageErr
	}
	if wait := nextAvailable(active, rs.Spec.MinReadySeconds, now); wait > 0 {
		c.queue.AddAfter(key, wait)
	}
	return nil
}

func (c *replicaSets) claim(ctx context.Context, rs *appsv1.ReplicaSet, selector labels.Selector, pods []*corev1.Pod) ([]*corev1.Pod, error) {
	fresh := func(ctx context.Context) (metav1.Object, error) { return c.fresh(ctx, rs) }
	return controller.ClaimPods(ctx, c.Client, rs, c.kind, selector, fresh, pods)
}

// manage creates or deletes pods until there are as many as asked for.
func (c *replicaSets) manage(ctx context.Context, key string, rs *appsv1.ReplicaSet, active []*corev1.Pod) error {
	var siblings []*corev1.Pod
	if len(active) > int(*rs.Spec.Replicas) {
		var err error
		if siblings, err = c.siblings(rs); err != nil {
			return err
		}
	}
	todo := plan(rs, active, siblings, c.Clock.Now())
	if todo.create > 0 {
		return c.create(ctx, key, rs, todo.create)
	}
	return c.remove(ctx, key, rs, todo.remove)
}

// siblings returns the pods of all ReplicaSets of rs's own controller, rs's
// included: during a rollout, pods that share a node with such go first.
func (c *replicaSets) siblings(rs *appsv1.ReplicaSet) ([]*corev1.Pod, error) {
	ref := metav1.GetControllerOfNoCopy(rs)
	if ref == nil {
		return nil, nil
	}
	sets, err := controller.ByIndex[*appsv1.ReplicaSet](c.rsInf.GetIndexer(), controller.IndexController, string(ref.UID))
	if err != nil {
		return nil, err
	}
	var uids []string
	for _, s := range sets {
		uids = append(uids, string(s.UID))
	}
	return controller.ByIndex[*corev1.Pod](c.podInf.GetIndexer(), controller.IndexController, uids...)
}

// create makes n pods in batches that double as long as all of one succeed:
// where every creation is refused, a large ReplicaSet must not ask a thousand times.
func (c *replicaSets) create(ctx context.Context, key string, rs *appsv1.ReplicaSet, n int) error {
	pod := podFor(rs, c.kind)
	for batch := 1; n > 0; batch *= 2 {
		size := min(batch, n)
		errs := make([]error, size)
		workqueue.ParallelizeUntil(ctx, min(size, parallel), size, func(i int) {
			own := *pod // encoding writes the kind and version into it for a moment
			errs[i] = c.createOne(ctx, key, rs, &own)
		})
		if err := first(errs); err != nil {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		n -= size
	}
	return nil
}

func (c *replicaSets) createOne(ctx context.Context, key string, rs *appsv1.ReplicaSet, pod *corev1.Pod) error {
	made, err := c.Client.CoreV1().Pods(rs.Namespace).Create(ctx, pod, metav1.CreateOptions{})
	switch {
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return nil // whatever is tried here fails, and soon this set is gone as well
	case err != nil:
		c.events.Eventf(c.reference(rs), corev1.EventTypeWarning, "FailedCreate", "Error creating: %v", err)
		return err
	}
	c.ledger.Wrote(key, made, c.Clock.Now())
	c.events.Eventf(c.reference(rs), corev1.EventTypeNormal, "SuccessfulCreate", "Created pod: %v", made.Name)
	return nil
}

func (c *replicaSets) remove(ctx context.Context, key string, rs *appsv1.ReplicaSet, pods []*corev1.Pod) error {
	errs := make([]error, len(pods))
	workqueue.ParallelizeUntil(ctx, min(len(pods), parallel), len(pods), func(i int) {
		pod := pods[i]
		err := c.Client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{
			Preconditions: metav1.NewUIDPreconditions(string(pod.UID)),
		})
		switch {
		case err == nil:
			c.ledger.Deleted(key, pod, c.Clock.Now())
			c.events.Eventf(c.reference(rs), corev1.EventTypeNormal, "SuccessfulDelete", "Deleted pod: %v", pod.Name)
		case apierrors.IsNotFound(err):
			// Gone already; wait until the view shows that too.
			c.ledger.Deleted(key, pod, c.Clock.Now())
		default:
			c.events.Eventf(c.reference(rs), corev1.EventTypeWarning, "FailedDelete", "Error deleting: %v", err)
			errs[i] = fmt.Errorf("unable to delete pods: %w", err)
		}
	})
	return first(errs)
}

func (c *replicaSets) updateStatus(ctx context.Context, rs *appsv1.ReplicaSet, status appsv1.ReplicaSetStatus) error {
	if !c.countsTerminating {
		status.TerminatingReplicas = nil
	}
	if equality.Semantic.DeepEqual(rs.Status, status) {
		return nil
	}
	upd := rs.DeepCopy()
	upd.Status = status
	err := c.putStatus(ctx, upd)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("update status of %s %s/%s: %w", c.kind.Kind, rs.Namespace, rs.Name, err)
	}
	return nil
}

func filter(pods []*corev1.Pod, keep func(*corev1.Pod) bool) []*corev1.Pod {
	var out []*corev1.Pod
	for _, p := range pods {
		if keep(p) {
			out = append(out, p)
		}
	}
	return out
}

func first(errs []error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}
