// Package deployment rolls each Deployment's pod template out through
// ReplicaSets, one for each template, and keeps old ones for going back.
//
// Inputs: Deployments, ReplicaSets, Pods (Recreate only). Outputs: creates,
// scales, annotates and deletes ReplicaSets, sets and clears their controller
// reference; Deployment status and its revision annotation; events
// ScalingReplicaSet and ReplicaSetCreateError on the Deployment.
//
// Each sync takes one step of the rollout, which plan decides from what the
// view shows; plan is pure. ReplicaSets are written with compare-and-swap, and
// no step is planned on a view that lacks this controller's own writes, so that
// the limits on surge and unavailability hold in every state in between.
package deployment

import (
	"context"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	appslisters "k8s.io/client-go/listers/apps/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "deployment"
	workers = 4
	// lagRecheck is when a sync that found the view behind looks again, if no
	// event woke it before.
	lagRecheck = time.Second
)

var kind = appsv1.SchemeGroupVersion.WithKind("Deployment")

type deployments struct {
	controller.Deps
	queue   *controller.Queue[string]
	depInf  cache.SharedIndexInformer
	rsInf   cache.SharedIndexInformer
	podInf  cache.SharedIndexInformer
	lister  appslisters.DeploymentLister
	sets    appslisters.ReplicaSetLister
	ledger  *controller.Ledger
	events  record.EventRecorder
	initErr error
}

// New returns the Deployment controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	apps := deps.Factory.Apps().V1()
	c := &deployments{
		Deps:   deps,
		queue:  controller.NewQueue[string](name, deps.Clock),
		depInf: apps.Deployments().Informer(),
		rsInf:  apps.ReplicaSets().Informer(),
		podInf: deps.Factory.Core().V1().Pods().Informer(),
		lister: apps.Deployments().Lister(),
		sets:   apps.ReplicaSets().Lister(),
		ledger: controller.NewLedger(apps.ReplicaSets().Informer().GetIndexer()),
		events: deps.Recorder("deployment-controller"),
	}
	c.initErr = controller.EnsureIndexes(c.rsInf, controller.IndexController)
	if c.initErr == nil {
		c.initErr = controller.EnsureIndexes(c.podInf, controller.IndexController)
	}
	return c
}

func (c *deployments) Name() string { return name }

func (c *deployments) Run(ctx context.Context) error {
	if c.initErr != nil {
		return c.initErr
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: workers,
		Watches: []controller.Watch{
			controller.On(c.depInf, c.deploymentChanged),
			controller.On(c.rsInf, c.setChanged),
			controller.On(c.podInf, c.podChanged),
		},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

func (c *deployments) deploymentChanged(old, cur *appsv1.Deployment) {
	if cur == nil {
		cur = old
	}
	c.queue.Add(controller.Key(cur))
}

// setChanged wakes the Deployment that controls or controlled the ReplicaSet,
// and for one that nobody controls those that may adopt it.
func (c *deployments) setChanged(old, cur *appsv1.ReplicaSet) {
	controller.Concerned(controller.Owners[*appsv1.Deployment]{
		Kind: kind.Kind,
		Get:  func(ns, name string) (*appsv1.Deployment, error) { return c.lister.Deployments(ns).Get(name) },
		List: func(ns string) ([]*appsv1.Deployment, error) {
			return c.lister.Deployments(ns).List(labels.Everything())
		},
		Selector: func(d *appsv1.Deployment) *metav1.LabelSelector { return d.Spec.Selector },
	}, old, cur, func(d *appsv1.Deployment) { c.queue.Add(controller.Key(d)) })
}

// podChanged wakes a Recreate Deployment when a pod of it has ended: it waits
// until no old pod runs.
func (c *deployments) podChanged(old, cur *corev1.Pod) {
	pod := cur
	switch {
	case cur == nil:
		pod = old
	case !controller.PodTerminal(cur):
		return
	}
	ref := metav1.GetControllerOfNoCopy(pod)
	if ref == nil || ref.Kind != "ReplicaSet" {
		return
	}
	rs, err := c.sets.ReplicaSets(pod.Namespace).Get(ref.Name)
	if err != nil || rs.UID != ref.UID {
		return
	}
	if d := c.controlling(rs); d != nil && d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType {
		c.queue.Add(controller.Key(d))
	}
}

func (c *deployments) controlling(rs *appsv1.ReplicaSet) *appsv1.Deployment {
	ref := metav1.GetControllerOfNoCopy(rs)
	if ref == nil || ref.Kind != kind.Kind {
		return nil
	}
	d, err := c.lister.Deployments(rs.Namespace).Get(ref.Name)
	if err != nil || d.UID != ref.UID {
		return nil
	}
	return d
}

func (c *deployments) sync(ctx context.Context, key string) error {
	ns, depName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	d, err := c.lister.Deployments(ns).Get(depName)
	if apierrors.IsNotFound(err) {
		c.ledger.Forget(key)
		return nil
	}
	if err != nil {
		return err
	}
	if c.ledger.Pending(key, c.Clock.Now()) > 0 {
		c.queue.AddAfter(key, lagRecheck)
		return nil
	}
	selector, err := metav1.LabelSelectorAsSelector(d.Spec.Selector)
	if err != nil || selector.Empty() {
		// Validation refuses both; nothing to do until it changes.
		c.Logger.Error("selector of a Deployment cannot be used", "deployment", key, "err", err)
		return nil
	}
	sets, err := c.claim(ctx, d, selector)
	if err != nil {
		return err
	}
	pods := map[types.UID][]*corev1.Pod{}
	if d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType {
		for _, rs := range sets {
			if pods[rs.UID], err = controller.ByIndex[*corev1.Pod](c.podInf.GetIndexer(), controller.IndexController, string(rs.UID)); err != nil {
				return err
			}
		}
	}
	return c.carryOut(ctx, key, d, plan(d, sets, pods, c.Clock.Now()))
}

func (c *deployments) claim(ctx context.Context, d *appsv1.Deployment, selector labels.Selector) ([]*appsv1.ReplicaSet, error) {
	sets, err := controller.Controlled[*appsv1.ReplicaSet](c.rsInf.GetIndexer(), d.Namespace, d.UID)
	if err != nil {
		return nil, err
	}
	return controller.Claim(ctx, d, controller.PlanClaims(d, selector, sets), controller.Claimer{
		Kind: kind,
		Fresh: func(ctx context.Context) (metav1.Object, error) {
			return c.Client.AppsV1().Deployments(d.Namespace).Get(ctx, d.Name, metav1.GetOptions{})
		},
		Patch: func(ctx context.Context, rs string, patch []byte) error {
			_, err := c.Client.AppsV1().ReplicaSets(d.Namespace).Patch(ctx, rs, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
			return err
		},
	})
}

// carryOut writes what s says: ReplicaSets first, the Deployment's status last,
// so that the status never promises what was not done.
func (c *deployments) carryOut(ctx context.Context, key string, d *appsv1.Deployment, s step) error {
	if s.create != nil {
		err := c.create(ctx, key, d, s)
		if apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			return nil // whatever is tried here fails, and soon the Deployment is gone as well
		}
		if err != nil {
			return err
		}
	}
	api := c.Client.AppsV1().ReplicaSets(d.Namespace)
	for _, u := range s.update {
		rs, err := api.Update(ctx, u.cur, metav1.UpdateOptions{})
		if err != nil {
			return fmt.Errorf("update ReplicaSet %s/%s: %w", d.Namespace, u.cur.Name, err)
		}
		c.ledger.Wrote(key, rs, c.Clock.Now())
		if was, is := *u.old.Spec.Replicas, *u.cur.Spec.Replicas; was != is {
			c.scaled(d, rs.Name, was, is)
		}
	}
	for _, rs := range s.remove {
		err := api.Delete(ctx, rs.Name, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(rs.UID))})
		if err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("delete old ReplicaSet %s/%s: %w", d.Namespace, rs.Name, err)
		}
	}
	if err := c.updateStatus(ctx, d, s.deployment); err != nil {
		return err
	}
	if s.again > 0 {
		c.queue.AddAfter(key, s.again)
	}
	return nil
}

func (c *deployments) scaled(d *appsv1.Deployment, rs string, was, is int32) {
	direction := "up"
	if is < was {
		direction = "down"
	}
	c.events.Eventf(d, corev1.EventTypeNormal, "ScalingReplicaSet", "Scaled %s replica set %s from %d to %d", direction, rs, was, is)
}

// create makes the ReplicaSet for the new template. Its name follows from the
// template, so that making it twice is refused; if one of that name exists that
// is not ours, the collision count changes the name for the next try.
func (c *deployments) create(ctx context.Context, key string, d *appsv1.Deployment, s step) error {
	api := c.Client.AppsV1().ReplicaSets(d.Namespace)
	made, err := api.Create(ctx, s.create, metav1.CreateOptions{})
	switch {
	case err == nil:
		c.ledger.Wrote(key, made, c.Clock.Now())
		if n := *made.Spec.Replicas; n > 0 {
			c.scaled(d, made.Name, 0, n)
		}
		return nil
	case apierrors.IsAlreadyExists(err):
		held, getErr := api.Get(ctx, s.create.Name, metav1.GetOptions{})
		if getErr != nil {
			return fmt.Errorf("read ReplicaSet %s/%s that exists: %w", d.Namespace, s.create.Name, getErr)
		}
		if ref := metav1.GetControllerOfNoCopy(held); ref != nil && ref.UID == d.UID && sameTemplate(&d.Spec.Template, &held.Spec.Template) {
			c.ledger.Wrote(key, held, c.Clock.Now()) // ours; the view will show it
			return fmt.Errorf("ReplicaSet %s/%s: %w", d.Namespace, held.Name, controller.ErrStaleView)
		}
		if err := c.updateStatus(ctx, d, collided(d)); err != nil {
			return err
		}
		return fmt.Errorf("ReplicaSet name %s/%s is taken by another object; the collision count was raised: %w", d.Namespace, held.Name, err)
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return err
	}
	failed, msg := createFailed(d, s.create.Name, err, c.Clock.Now())
	c.events.Event(d, corev1.EventTypeWarning, reasonCreateError, msg)
	// What the caller has to know is why the creation failed.
	_ = c.updateStatus(ctx, d, failed)
	return fmt.Errorf("create ReplicaSet %s/%s: %w", d.Namespace, s.create.Name, err)
}

// updateStatus writes want's status and annotations, if they differ from d's.
func (c *deployments) updateStatus(ctx context.Context, d, want *appsv1.Deployment) error {
	if equality.Semantic.DeepEqual(d.Status, want.Status) && equality.Semantic.DeepEqual(d.Annotations, want.Annotations) {
		return nil
	}
	_, err := c.Client.AppsV1().Deployments(d.Namespace).UpdateStatus(ctx, want, metav1.UpdateOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("update status of Deployment %s/%s: %w", d.Namespace, d.Name, err)
	}
	return nil
}
