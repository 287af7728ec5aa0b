// Package statefulset keeps the pods of each StatefulSet: numbered, each with
// its own name, claims and order.
//
// Inputs: StatefulSets, Pods, PersistentVolumeClaims, ControllerRevisions.
// Outputs: creates, labels and deletes Pods; creates PersistentVolumeClaims and
// sets their owners (retention policy); creates, renumbers and deletes
// ControllerRevisions; sets and clears the controller reference of Pods and
// ControllerRevisions; StatefulSet status; events SuccessfulCreate,
// FailedCreate, SuccessfulDelete, FailedDelete and FailedUpdate on the set.
//
// Two pods of one ordinal never exist: the ordinal is the pod's name, and a pod
// is created only when the view shows none of that name. What to do is decided
// by plan and newStatus, which are pure; nothing is decided on a view that does
// not show this controller's own writes yet.
package statefulset

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	appslisters "k8s.io/client-go/listers/apps/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/history"
)

const (
	name    = "statefulset"
	workers = 4
	// lagRecheck is when a sync that found the view behind looks again, if no
	// event woke it before.
	lagRecheck = time.Second
	// staleRecheck is when a sync that waits for claims to be deleted looks again.
	staleRecheck = time.Second
)

var kind = appsv1.SchemeGroupVersion.WithKind("StatefulSet")

type statefulSets struct {
	controller.Deps
	queue   *controller.Queue[string]
	setInf  cache.SharedIndexInformer
	podInf  cache.SharedIndexInformer
	revInf  cache.SharedIndexInformer
	pvcInf  cache.SharedIndexInformer
	sets    appslisters.StatefulSetLister
	owners  controller.Owners[*appsv1.StatefulSet]
	claims  corelisters.PersistentVolumeClaimLister
	ledgers []*controller.Ledger // of pods, claims, revisions
	keeper  history.Keeper
	events  record.EventRecorder
	initErr error
}

// New returns the StatefulSet controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	apps, core := deps.Factory.Apps().V1(), deps.Factory.Core().V1()
	c := &statefulSets{
		Deps:   deps,
		queue:  controller.NewQueue[string](name, deps.Clock),
		setInf: apps.StatefulSets().Informer(),
		podInf: core.Pods().Informer(),
		revInf: apps.ControllerRevisions().Informer(),
		pvcInf: core.PersistentVolumeClaims().Informer(),
		sets:   apps.StatefulSets().Lister(),
		claims: core.PersistentVolumeClaims().Lister(),
		keeper: history.Keeper{Client: deps.Client},
		events: deps.Recorder("statefulset-controller"),
	}
	c.owners = controller.Owners[*appsv1.StatefulSet]{
		Kind: kind.Kind,
		Get:  func(ns, name string) (*appsv1.StatefulSet, error) { return c.sets.StatefulSets(ns).Get(name) },
		List: func(ns string) ([]*appsv1.StatefulSet, error) {
			return c.sets.StatefulSets(ns).List(labels.Everything())
		},
		Selector: func(set *appsv1.StatefulSet) *metav1.LabelSelector { return set.Spec.Selector },
	}
	for _, inf := range []cache.SharedIndexInformer{c.podInf, c.pvcInf, c.revInf} {
		c.ledgers = append(c.ledgers, controller.NewLedger(inf.GetIndexer()))
	}
	c.initErr = errors.Join(controller.EnsureIndexes(c.podInf, controller.IndexController), controller.EnsureIndexes(c.revInf, controller.IndexController))
	return c
}

func (c *statefulSets) Name() string { return name }

func (c *statefulSets) Run(ctx context.Context) error {
	if c.initErr != nil {
		return c.initErr
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: workers,
		Watches: []controller.Watch{
			controller.On(c.setInf, c.setChanged),
			controller.On(c.podInf, c.podChanged),
			// Claims and revisions wake nobody: they are this controller's to write.
			controller.On(c.revInf, func(_, _ *appsv1.ControllerRevision) {}),
			controller.On(c.pvcInf, func(_, _ *corev1.PersistentVolumeClaim) {}),
		},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

func (c *statefulSets) setChanged(old, cur *appsv1.StatefulSet) {
	if cur == nil {
		cur = old
	}
	c.queue.Add(controller.Key(cur))
}

// podChanged wakes the set that controls or controlled the pod, and for a pod
// that nobody controls those that may adopt it.
func (c *statefulSets) podChanged(old, cur *corev1.Pod) {
	controller.Concerned(c.owners, old, cur, func(set *appsv1.StatefulSet) { c.queue.Add(controller.Key(set)) })
}

func (c *statefulSets) sync(ctx context.Context, key string) error {
	ns, setName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	set, err := c.sets.StatefulSets(ns).Get(setName)
	if apierrors.IsNotFound(err) {
		for _, l := range c.ledgers {
			l.Forget(key)
		}
		return nil
	}
	if err != nil {
		return err
	}
	for _, l := range c.ledgers {
		if l.Pending(key, c.Clock.Now()) > 0 {
			c.queue.AddAfter(key, lagRecheck)
			return nil
		}
	}
	selector, err := metav1.LabelSelectorAsSelector(set.Spec.Selector)
	if err != nil || selector.Empty() {
		// Validation refuses both; nothing to do until it changes.
		c.Logger.Error("selector of a StatefulSet cannot be used", "statefulset", key, "err", err)
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
	in, err := c.input(ctx, key, set, revs, pods)
	if err != nil {
		return err
	}
	todo := plan(in)
	done, workErr := c.carryOut(ctx, key, in, todo)
	if todo.again > 0 {
		c.queue.AddAfter(key, todo.again)
	}
	err = c.updateStatus(ctx, set, newStatus(in, done, set.Status.CollisionCount))
	if err = errors.Join(workErr, err); err != nil {
		return err
	}
	return c.prune(ctx, in, revs)
}

func (c *statefulSets) fresh(set *appsv1.StatefulSet) func(context.Context) (metav1.Object, error) {
	return func(ctx context.Context) (metav1.Object, error) {
		return c.Client.AppsV1().StatefulSets(set.Namespace).Get(ctx, set.Name, metav1.GetOptions{})
	}
}

func (c *statefulSets) claimPods(ctx context.Context, set *appsv1.StatefulSet, selector labels.Selector) ([]*corev1.Pod, error) {
	all, err := controller.ControlledPods(c.podInf, set)
	if err != nil {
		return nil, err
	}
	// A pod whose name is not one of the set's is none of its pods, whatever its labels.
	all = slices.DeleteFunc(all, func(p *corev1.Pod) bool {
		_, ours := ordinal(set, p.Name)
		return !ours && metav1.GetControllerOfNoCopy(p) == nil
	})
	return controller.ClaimPods(ctx, c.Client, set, kind, selector, c.fresh(set), all)
}

func revised(set *appsv1.StatefulSet) history.Owner {
	return history.Owner{Object: set, Kind: kind, Template: &set.Spec.Template, Collisions: set.Status.CollisionCount}
}

// input reads what plan needs, and makes the revision of the set's template if
// there is none.
func (c *statefulSets) input(ctx context.Context, key string, set *appsv1.StatefulSet, revs []*appsv1.ControllerRevision, pods []*corev1.Pod) (input, error) {
	in := input{set: set, pods: pods, claims: map[string]*corev1.PersistentVolumeClaim{}, now: c.Clock.Now()}
	update, wrote, err := c.keeper.Ensure(ctx, revised(set), history.Choose(revs, &set.Spec.Template))
	if errors.Is(err, history.ErrCollision) {
		upd := set.Status.DeepCopy()
		upd.CollisionCount = history.Collided(set.Status.CollisionCount)
		return in, errors.Join(err, c.updateStatus(ctx, set, *upd))
	}
	if err != nil {
		return in, err
	}
	if wrote {
		c.ledgers[2].Wrote(key, update, c.Clock.Now())
	}
	in.update = revision{update.Name, &set.Spec.Template}
	in.current = in.update
	if at := slices.IndexFunc(revs, func(r *appsv1.ControllerRevision) bool { return r.Name == set.Status.CurrentRevision }); at >= 0 {
		t, err := history.Template(revs[at])
		if err != nil {
			return in, err
		}
		in.current = revision{revs[at].Name, t}
	}
	if len(set.Spec.VolumeClaimTemplates) > 0 {
		all, err := c.claims.PersistentVolumeClaims(set.Namespace).List(labels.Everything())
		if err != nil {
			return in, err
		}
		for _, pvc := range all {
			in.claims[pvc.Name] = pvc
		}
	}
	return in, nil
}

// carryOut does what todo says and returns what of it was done.
func (c *statefulSets) carryOut(ctx context.Context, key string, in input, todo step) (done step, err error) {
	set := in.set
	for _, pvc := range todo.claims {
		made, err := c.Client.CoreV1().PersistentVolumeClaims(pvc.Namespace).Create(ctx, pvc, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			return done, fmt.Errorf("PersistentVolumeClaim %s/%s: %w", pvc.Namespace, pvc.Name, controller.ErrStaleView)
		}
		if err != nil {
			return done, c.failed(set, "FailedCreate", "create PersistentVolumeClaim", pvc.Name, err)
		}
		c.ledgers[1].Wrote(key, made, c.Clock.Now())
		c.events.Eventf(set, corev1.EventTypeNormal, "SuccessfulCreate", "create Claim %s for StatefulSet %s success", pvc.Name, set.Name)
	}
	for _, pvc := range todo.own {
		upd, err := c.Client.CoreV1().PersistentVolumeClaims(pvc.Namespace).Update(ctx, pvc, metav1.UpdateOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			return done, c.failed(set, "FailedUpdate", "update the owners of PersistentVolumeClaim", pvc.Name, err)
		}
		if err == nil {
			c.ledgers[1].Wrote(key, upd, c.Clock.Now())
		}
	}
	done.create, err = controller.Each(ctx, todo.create, func(pod *corev1.Pod) error { return c.create(ctx, key, set, pod) })
	if err != nil {
		return done, err
	}
	if _, err = controller.Each(ctx, todo.repair, func(pod *corev1.Pod) error { return c.repair(ctx, key, set, pod) }); err != nil {
		return done, err
	}
	done.remove, err = controller.Each(ctx, todo.remove, func(pod *corev1.Pod) error { return c.remove(ctx, key, set, pod) })
	return done, err
}

func (c *statefulSets) create(ctx context.Context, key string, set *appsv1.StatefulSet, pod *corev1.Pod) error {
	made, err := c.Client.CoreV1().Pods(pod.Namespace).Create(ctx, pod, metav1.CreateOptions{})
	switch {
	case err == nil:
		c.ledgers[0].Wrote(key, made, c.Clock.Now())
		c.events.Eventf(set, corev1.EventTypeNormal, "SuccessfulCreate", "create Pod %s in StatefulSet %s successful", pod.Name, set.Name)
		return nil
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return nil // whatever is tried here fails, and soon this set is gone as well
	case apierrors.IsAlreadyExists(err):
		// Ours and not in the view yet, or somebody else's: then it has to go first.
		return fmt.Errorf("create Pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return c.failed(set, "FailedCreate", "create Pod", pod.Name, err)
}

func (c *statefulSets) repair(ctx context.Context, key string, set *appsv1.StatefulSet, pod *corev1.Pod) error {
	// The view does not have all of the pod.
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"uid": pod.UID, "labels": pod.Labels}})
	if err != nil {
		return fmt.Errorf("labels of Pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	upd, err := c.Client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.MergePatchType, patch, metav1.PatchOptions{})
	switch {
	case err == nil:
		c.ledgers[0].Wrote(key, upd, c.Clock.Now())
		return nil
	case apierrors.IsNotFound(err):
		return nil
	}
	return c.failed(set, "FailedUpdate", "update Pod", pod.Name, err)
}

func (c *statefulSets) remove(ctx context.Context, key string, set *appsv1.StatefulSet, pod *corev1.Pod) error {
	err := c.Client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(pod.UID))})
	if err != nil && !apierrors.IsNotFound(err) {
		return c.failed(set, "FailedDelete", "delete Pod", pod.Name, err)
	}
	c.ledgers[0].Deleted(key, pod, c.Clock.Now())
	c.events.Eventf(set, corev1.EventTypeNormal, "SuccessfulDelete", "delete Pod %s in StatefulSet %s successful", pod.Name, set.Name)
	return nil
}

func (c *statefulSets) failed(set *appsv1.StatefulSet, reason, verb, object string, err error) error {
	if !apierrors.IsConflict(err) {
		c.events.Eventf(set, corev1.EventTypeWarning, reason, "%s %s in StatefulSet %s failed error: %v", verb, object, set.Name, err)
	}
	return fmt.Errorf("%s %s/%s: %w", verb, set.Namespace, object, err)
}

func (c *statefulSets) updateStatus(ctx context.Context, set *appsv1.StatefulSet, status appsv1.StatefulSetStatus) error {
	if equality.Semantic.DeepEqual(set.Status, status) {
		return nil
	}
	upd := set.DeepCopy()
	upd.Status = status
	_, err := c.Client.AppsV1().StatefulSets(set.Namespace).UpdateStatus(ctx, upd, metav1.UpdateOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("update status of StatefulSet %s/%s: %w", set.Namespace, set.Name, err)
	}
	return nil
}

// prune deletes revisions that nothing refers to, beyond the set's limit.
func (c *statefulSets) prune(ctx context.Context, in input, revs []*appsv1.ControllerRevision) error {
	live := map[string]bool{in.current.name: true, in.update.name: true}
	for _, pod := range in.pods {
		live[revisionOf(pod)] = true
	}
	limit := int32(10) // the API's default
	if in.set.Spec.RevisionHistoryLimit != nil {
		limit = *in.set.Spec.RevisionHistoryLimit
	}
	return c.keeper.Prune(ctx, history.Obsolete(revs, live, limit))
}
