// Package daemonset keeps one pod of each DaemonSet on every node that it is
// meant for.
//
// Inputs: DaemonSets, Nodes, Pods, ControllerRevisions. Outputs: creates and
// deletes Pods; creates, renumbers and deletes ControllerRevisions; sets and
// clears the controller reference of both; DaemonSet status; events
// SuccessfulCreate, FailedCreate, SuccessfulDelete, FailedDelete,
// FailedDaemonPod and SucceededDaemonPod on the set.
//
// Pods are bound by the scheduler, with an affinity to their node. What to do is
// decided by plan, which is pure; nothing is decided on a view that does not
// show this controller's own writes yet, so no node ever gets two.
package daemonset

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
	appslisters "k8s.io/client-go/listers/apps/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/flowcontrol"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/history"
)

const (
	name    = "daemonset"
	workers = 2
	// burst bounds how many pods one sync creates, and how many it deletes; the
	// rest follows in the next. Upstream's BurstReplicas.
	burst = 250
	// lagRecheck is when a sync that found the view behind looks again, if no
	// event woke it before.
	lagRecheck = time.Second
	// A pod that fails is replaced after a back-off of its node: upstream's.
	failedFirst, failedLongest = time.Second, 15 * time.Minute
)

var kind = appsv1.SchemeGroupVersion.WithKind("DaemonSet")

type daemonSets struct {
	controller.Deps
	queue   *controller.Queue[string]
	setInf  cache.SharedIndexInformer
	nodeInf cache.SharedIndexInformer
	podInf  cache.SharedIndexInformer
	revInf  cache.SharedIndexInformer
	sets    appslisters.DaemonSetLister
	owners  controller.Owners[*appsv1.DaemonSet]
	nodes   corelisters.NodeLister
	pods    *controller.Ledger
	revs    *controller.Ledger
	keeper  history.Keeper
	failed  *flowcontrol.Backoff // by set, generation and node
	events  record.EventRecorder
	initErr error
}

// New returns the DaemonSet controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	apps, core := deps.Factory.Apps().V1(), deps.Factory.Core().V1()
	c := &daemonSets{
		Deps:    deps,
		queue:   controller.NewQueue[string](name, deps.Clock),
		setInf:  apps.DaemonSets().Informer(),
		nodeInf: core.Nodes().Informer(),
		podInf:  core.Pods().Informer(),
		revInf:  apps.ControllerRevisions().Informer(),
		sets:    apps.DaemonSets().Lister(),
		nodes:   core.Nodes().Lister(),
		keeper:  history.Keeper{Client: deps.Client},
		failed:  flowcontrol.NewBackOff(failedFirst, failedLongest),
		events:  deps.Recorder("daemonset-controller"),
	}
	c.owners = controller.Owners[*appsv1.DaemonSet]{
		Kind:     kind.Kind,
		Get:      func(ns, name string) (*appsv1.DaemonSet, error) { return c.sets.DaemonSets(ns).Get(name) },
		List:     func(ns string) ([]*appsv1.DaemonSet, error) { return c.sets.DaemonSets(ns).List(labels.Everything()) },
		Selector: func(set *appsv1.DaemonSet) *metav1.LabelSelector { return set.Spec.Selector },
	}
	c.pods, c.revs = controller.NewLedger(c.podInf.GetIndexer()), controller.NewLedger(c.revInf.GetIndexer())
	c.initErr = errors.Join(controller.EnsureIndexes(c.podInf, controller.IndexController), controller.EnsureIndexes(c.revInf, controller.IndexController))
	return c
}

func (c *daemonSets) Name() string { return name }

func (c *daemonSets) Run(ctx context.Context) error {
	if c.initErr != nil {
		return c.initErr
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: workers,
		Watches: []controller.Watch{
			controller.On(c.setInf, c.setChanged),
			controller.On(c.nodeInf, c.nodeChanged),
			controller.On(c.podInf, c.podChanged),
			controller.On(c.revInf, func(_, _ *appsv1.ControllerRevision) {}), // ours to write
		},
		Sync:       c.sync,
		Background: []func(context.Context){c.forget},
		Logger:     c.Logger,
	})
}

// forget drops back-offs that have passed, so that their number stays bounded.
func (c *daemonSets) forget(ctx context.Context) {
	tick := c.Clock.NewTicker(failedLongest)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C():
			c.failed.GC()
		}
	}
}

func (c *daemonSets) setChanged(old, cur *appsv1.DaemonSet) {
	if cur == nil {
		cur = old
	}
	c.queue.Add(controller.Key(cur))
}

// nodeChanged wakes the sets for which it changed whether a pod should run on
// the node, or may stay there. A thousand nodes that get a label which concerns
// no set cost no sync.
func (c *daemonSets) nodeChanged(old, cur *corev1.Node) {
	if old != nil && cur != nil && equality.Semantic.DeepEqual(old.Labels, cur.Labels) && equality.Semantic.DeepEqual(old.Spec.Taints, cur.Spec.Taints) {
		return
	}
	sets, err := c.sets.List(labels.Everything())
	if err != nil {
		return // a lister of a cache has no errors
	}
	for _, set := range concerned(sets, old, cur) {
		c.queue.Add(controller.Key(set))
	}
}

// concerned are the sets that answer differently for the two states of a node.
func concerned(sets []*appsv1.DaemonSet, old, cur *corev1.Node) (out []*appsv1.DaemonSet) {
	for _, set := range sets {
		ran, stayed := onNodeOf(set, old)
		if run, stay := onNodeOf(set, cur); run != ran || stay != stayed {
			out = append(out, set)
		}
	}
	return out
}

// onNodeOf is shouldRun for a node that may not be there.
func onNodeOf(set *appsv1.DaemonSet, node *corev1.Node) (run, stay bool) {
	if node == nil {
		return false, false
	}
	return shouldRun(set, node)
}

// podChanged wakes the set that controls or controlled the pod, and for a pod
// that nobody controls those that may adopt it.
func (c *daemonSets) podChanged(old, cur *corev1.Pod) {
	controller.Concerned(c.owners, old, cur, func(set *appsv1.DaemonSet) { c.queue.Add(controller.Key(set)) })
}

func (c *daemonSets) sync(ctx context.Context, key string) error {
	ns, setName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	set, err := c.sets.DaemonSets(ns).Get(setName)
	if apierrors.IsNotFound(err) {
		c.pods.Forget(key)
		c.revs.Forget(key)
		return nil
	}
	if err != nil {
		return err
	}
	if now := c.Clock.Now(); c.pods.Pending(key, now)+c.revs.Pending(key, now) > 0 {
		c.queue.AddAfter(key, lagRecheck)
		return nil
	}
	selector, err := metav1.LabelSelectorAsSelector(set.Spec.Selector)
	if err != nil || selector.Empty() {
		// Validation refuses the one; the other would select the pods of everybody.
		c.Logger.Error("selector of a DaemonSet cannot be used", "daemonset", key, "err", err)
		return nil
	}
	revs, err := c.keeper.Claim(ctx, revised(set), selector, c.fresh(set), c.revInf.GetIndexer())
	if err != nil {
		return err
	}
	pods, err := c.claimPods(ctx, set, selector)
	if err != nil {
		return err
	}
	rev, err := c.revision(ctx, key, set, revs)
	if err != nil {
		return err
	}
	nodes, err := c.nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	hash := rev.Labels[appsv1.ControllerRevisionHashLabelKey]
	todo := plan(input{set: set, hash: hash, nodes: nodes, pods: pods, now: c.Clock.Now(), backOff: func(node string) time.Duration {
		if id := failedKey(set, node); c.failed.IsInBackOffSinceUpdate(id, c.Clock.Now()) {
			return c.failed.Get(id)
		}
		return 0
	}})
	workErr := c.carryOut(ctx, key, set, hash, todo)
	if todo.again > 0 {
		c.queue.AddAfter(key, todo.again)
	}
	if err := errors.Join(workErr, c.updateStatus(ctx, set, todo.status)); err != nil {
		return err
	}
	live := map[string]bool{rev.Name: true}
	for _, r := range revs {
		for _, pod := range pods {
			if h := pod.Labels[appsv1.ControllerRevisionHashLabelKey]; h != "" && h == r.Labels[appsv1.ControllerRevisionHashLabelKey] {
				live[r.Name] = true
			}
		}
	}
	limit := int32(10) // the API's default
	if set.Spec.RevisionHistoryLimit != nil {
		limit = *set.Spec.RevisionHistoryLimit
	}
	return c.keeper.Prune(ctx, history.Obsolete(revs, live, limit))
}

func failedKey(set *appsv1.DaemonSet, node string) string {
	return fmt.Sprintf("%s/%d/%s", set.UID, set.Generation, node)
}

func (c *daemonSets) fresh(set *appsv1.DaemonSet) func(context.Context) (metav1.Object, error) {
	return func(ctx context.Context) (metav1.Object, error) {
		return c.Client.AppsV1().DaemonSets(set.Namespace).Get(ctx, set.Name, metav1.GetOptions{})
	}
}

func (c *daemonSets) claimPods(ctx context.Context, set *appsv1.DaemonSet, selector labels.Selector) ([]*corev1.Pod, error) {
	all, err := controller.ControlledPods(c.podInf, set)
	if err != nil {
		return nil, err
	}
	return controller.ClaimPods(ctx, c.Client, set, kind, selector, c.fresh(set), all)
}

func revised(set *appsv1.DaemonSet) history.Owner {
	return history.Owner{Object: set, Kind: kind, Template: &set.Spec.Template, Collisions: set.Status.CollisionCount}
}

// revision is the revision of the set's template; it is made if there is none.
func (c *daemonSets) revision(ctx context.Context, key string, set *appsv1.DaemonSet, revs []*appsv1.ControllerRevision) (*appsv1.ControllerRevision, error) {
	rev, wrote, err := c.keeper.Ensure(ctx, revised(set), history.Choose(revs, &set.Spec.Template))
	if errors.Is(err, history.ErrCollision) {
		status := set.Status.DeepCopy()
		status.CollisionCount = history.Collided(set.Status.CollisionCount)
		return nil, errors.Join(err, c.updateStatus(ctx, set, *status))
	}
	if err == nil && wrote {
		c.revs.Wrote(key, rev, c.Clock.Now())
	}
	return rev, err
}

func (c *daemonSets) carryOut(ctx context.Context, key string, set *appsv1.DaemonSet, hash string, todo step) error {
	for _, pod := range todo.ended {
		if pod.Status.Phase == corev1.PodFailed {
			c.failed.Next(failedKey(set, nodeOf(pod)), c.Clock.Now())
			c.events.Eventf(set, corev1.EventTypeWarning, "FailedDaemonPod", "Found failed daemon pod %s/%s on node %s, will try to kill it", pod.Namespace, pod.Name, nodeOf(pod))
		} else {
			c.events.Eventf(set, corev1.EventTypeNormal, "SucceededDaemonPod", "Found succeeded daemon pod %s/%s on node %s, will try to delete it", pod.Namespace, pod.Name, nodeOf(pod))
		}
	}
	_, removeErr := controller.Each(ctx, todo.remove[:min(burst, len(todo.remove))], func(pod *corev1.Pod) error {
		err := c.Client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(pod.UID))})
		if err != nil && !apierrors.IsNotFound(err) {
			c.events.Eventf(set, corev1.EventTypeWarning, "FailedDelete", "Error deleting: %v", err)
			return fmt.Errorf("delete pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		c.pods.Deleted(key, pod, c.Clock.Now())
		c.events.Eventf(set, corev1.EventTypeNormal, "SuccessfulDelete", "Deleted pod: %v", pod.Name)
		return nil
	})
	_, createErr := controller.Each(ctx, todo.create[:min(burst, len(todo.create))], func(node string) error {
		made, err := c.Client.CoreV1().Pods(set.Namespace).Create(ctx, newPod(set, hash, node), metav1.CreateOptions{})
		if apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			return nil // whatever is tried here fails, and soon this set is gone as well
		}
		if err != nil {
			c.events.Eventf(set, corev1.EventTypeWarning, "FailedCreate", "Error creating: %v", err)
			return fmt.Errorf("create a pod for node %s: %w", node, err)
		}
		c.pods.Wrote(key, made, c.Clock.Now())
		c.events.Eventf(set, corev1.EventTypeNormal, "SuccessfulCreate", "Created pod: %v", made.Name)
		return nil
	})
	return errors.Join(removeErr, createErr)
}

func (c *daemonSets) updateStatus(ctx context.Context, set *appsv1.DaemonSet, status appsv1.DaemonSetStatus) error {
	if equality.Semantic.DeepEqual(set.Status, status) {
		return nil
	}
	upd := set.DeepCopy()
	upd.Status = status
	_, err := c.Client.AppsV1().DaemonSets(set.Namespace).UpdateStatus(ctx, upd, metav1.UpdateOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("update status of DaemonSet %s/%s: %w", set.Namespace, set.Name, err)
	}
	return nil
}
