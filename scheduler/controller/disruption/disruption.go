// Package disruption keeps the status of each PodDisruptionBudget true: how many
// of its pods are healthy, and so how many may be evicted now. The eviction
// subresource and preemption decide by it.
//
// Inputs: PodDisruptionBudgets, Pods, ReplicaSets, Deployments, StatefulSets,
// ReplicationControllers, the scale subresource of other owners. Outputs:
// PodDisruptionBudget status; the DisruptionTarget condition of Pods, set back
// where the deletion that it announced never came; events NoPods, UnmanagedPods,
// CalculateExpectedPodCountFailed and NotDeleted.
//
// When a budget cannot be worked out, nothing may be evicted. What the status
// should be is decided by newStatus, which is pure.
package disruption

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	appslisters "k8s.io/client-go/listers/apps/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	policylisters "k8s.io/client-go/listers/policy/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "disruption"
	workers = 2
	// lagRecheck is when a sync that found the view behind looks again.
	lagRecheck = time.Second
)

// item is a budget, or a pod whose announced deletion may never come.
type item struct{ namespace, budget, pod string }

type budgets struct {
	controller.Deps
	queue       *controller.Queue[item]
	pdbInf      cache.SharedIndexInformer
	podInf      cache.SharedIndexInformer
	lister      policylisters.PodDisruptionBudgetLister
	pods        corelisters.PodLister
	replicas    appslisters.ReplicaSetLister
	deployments appslisters.DeploymentLister
	stateful    appslisters.StatefulSetLister
	replication corelisters.ReplicationControllerLister
	written     *controller.Ledger
	synced      []cache.InformerSynced
	events      record.EventRecorder
}

// New returns the disruption controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	apps, core, pdbs := deps.Factory.Apps().V1(), deps.Factory.Core().V1(), deps.Factory.Policy().V1().PodDisruptionBudgets()
	return &budgets{
		Deps:        deps,
		queue:       controller.NewQueue[item](name, deps.Clock),
		pdbInf:      pdbs.Informer(),
		podInf:      core.Pods().Informer(),
		lister:      pdbs.Lister(),
		pods:        core.Pods().Lister(),
		replicas:    apps.ReplicaSets().Lister(),
		deployments: apps.Deployments().Lister(),
		stateful:    apps.StatefulSets().Lister(),
		replication: core.ReplicationControllers().Lister(),
		written:     controller.NewLedger(pdbs.Informer().GetIndexer()),
		synced: []cache.InformerSynced{apps.ReplicaSets().Informer().HasSynced, apps.Deployments().Informer().HasSynced,
			apps.StatefulSets().Informer().HasSynced, core.ReplicationControllers().Informer().HasSynced},
		events: deps.Recorder("controllermanager"),
	}
}

func (c *budgets) Name() string { return name }

func (c *budgets) Run(ctx context.Context) error {
	return controller.Run(ctx, controller.Work[item]{
		Queue:   c.queue,
		Workers: workers,
		Watches: []controller.Watch{
			controller.On(c.pdbInf, c.budgetChanged),
			controller.On(c.podInf, c.podChanged),
		},
		Ready:  c.synced,
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

func (c *budgets) budgetChanged(old, cur *policyv1.PodDisruptionBudget) {
	if cur == nil {
		cur = old
	}
	c.queue.Add(item{namespace: cur.Namespace, budget: cur.Name})
}

// podChanged wakes the budgets that select the pod, as it was and as it is.
func (c *budgets) podChanged(old, cur *corev1.Pod) {
	if old != nil && cur != nil && !matters(old, cur) {
		return
	}
	for _, pod := range []*corev1.Pod{old, cur} {
		if pod == nil {
			continue
		}
		all, err := c.lister.PodDisruptionBudgets(pod.Namespace).List(labels.Everything())
		if err != nil {
			return // a lister of a cache has no errors
		}
		var of []string
		for _, pdb := range all {
			if sel, err := metav1.LabelSelectorAsSelector(pdb.Spec.Selector); err == nil && sel.Matches(labels.Set(pod.Labels)) {
				c.queue.Add(item{namespace: pdb.Namespace, budget: pdb.Name})
				of = append(of, pdb.Name)
			}
		}
		if len(of) > 1 && old == nil && pod.Spec.NodeName == "" { // once, when it is new; an eviction is refused as long as that is so
			c.events.Eventf(pod, corev1.EventTypeWarning, "MultiplePodDisruptionBudgets", "Pod %q/%q matches multiple PodDisruptionBudgets.  Chose %q arbitrarily.", pod.Namespace, pod.Name, of[0])
		}
	}
	if cur != nil {
		if _, has := staleAfter(cur, c.Clock.Now()); has {
			c.queue.Add(item{namespace: cur.Namespace, pod: cur.Name})
		}
	}
}

// matters says that something changed that budgets look at: agents write the
// status of pods often, and mostly nothing of this.
func matters(old, cur *corev1.Pod) bool {
	return controller.PodReady(old) != controller.PodReady(cur) || (old.DeletionTimestamp == nil) != (cur.DeletionTimestamp == nil) ||
		old.Status.Phase != cur.Status.Phase || !equality.Semantic.DeepEqual(old.Labels, cur.Labels) ||
		!equality.Semantic.DeepEqual(old.OwnerReferences, cur.OwnerReferences) || disrupted(old) != disrupted(cur)
}

func (c *budgets) sync(ctx context.Context, it item) error {
	if it.pod != "" {
		return c.clear(ctx, it)
	}
	key := it.namespace + "/" + it.budget
	if c.written.Pending(key, c.Clock.Now()) > 0 {
		c.queue.AddAfter(it, lagRecheck)
		return nil
	}
	pdb, err := c.lister.PodDisruptionBudgets(it.namespace).Get(it.budget)
	if apierrors.IsNotFound(err) {
		c.written.Forget(key)
		return nil
	}
	if err != nil {
		return err
	}
	sel, err := metav1.LabelSelectorAsSelector(pdb.Spec.Selector)
	if err != nil {
		c.Logger.Error("selector of a PodDisruptionBudget cannot be used", "budget", key, "err", err) // validation refuses it
		return nil
	}
	pods, err := c.pods.Pods(it.namespace).List(sel)
	if err != nil {
		return err
	}
	in := input{pdb: pdb, pods: pods, now: c.Clock.Now()}
	if needsScale(pdb) {
		in.scale, in.unmanaged, err = c.scale(ctx, pods)
		if err != nil {
			c.events.Eventf(pdb, corev1.EventTypeWarning, "CalculateExpectedPodCountFailed", "Failed to calculate the number of expected pods: %v", err)
			return errors.Join(err, c.update(ctx, key, pdb, failed(pdb, err, in.now)))
		}
	}
	c.tell(in)
	status, again, overdue := newStatus(in)
	for _, pod := range overdue {
		c.events.Eventf(pod, corev1.EventTypeWarning, "NotDeleted", "Pod was expected by PDB %s/%s to be deleted but it wasn't", pdb.Namespace, pdb.Name)
	}
	if again > 0 {
		c.queue.AddAfter(it, again)
	}
	return c.update(ctx, key, pdb, status)
}

// tell says what is odd about a budget, when its status is about to change.
func (c *budgets) tell(in input) {
	if in.pdb.Status.ObservedGeneration == in.pdb.Generation && in.pdb.Status.ExpectedPods != 0 {
		return
	}
	if len(in.pods) == 0 {
		c.events.Eventf(in.pdb, corev1.EventTypeNormal, "NoPods", "No matching pods found")
	}
	if in.unmanaged > 0 {
		c.events.Eventf(in.pdb, corev1.EventTypeWarning, "UnmanagedPods", "%d pods selected by this PodDisruptionBudget have no controller, so how many there should be is unknown. "+
			"To account for them set .spec.minAvailable to a number", in.unmanaged)
	}
}

func (c *budgets) update(ctx context.Context, key string, pdb *policyv1.PodDisruptionBudget, status policyv1.PodDisruptionBudgetStatus) error {
	if equality.Semantic.DeepEqual(pdb.Status, status) {
		return nil
	}
	upd := pdb.DeepCopy()
	upd.Status = status
	upd, err := c.Client.PolicyV1().PodDisruptionBudgets(pdb.Namespace).UpdateStatus(ctx, upd, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("update status of PodDisruptionBudget %s: %w", key, err)
	}
	c.written.Wrote(key, upd, c.Clock.Now())
	return nil
}

// scale adds up how many pods the owners of these pods want. Pods without an
// owner are counted apart.
func (c *budgets) scale(ctx context.Context, pods []*corev1.Pod) (total int32, unmanaged int, err error) {
	owners := map[types.UID]int32{}
	for _, pod := range pods {
		ref := metav1.GetControllerOfNoCopy(pod)
		if ref == nil {
			unmanaged++
			continue
		}
		if _, known := owners[ref.UID]; known {
			continue
		}
		uid, n, err := c.scaleOf(ctx, pod.Namespace, ref)
		if err != nil {
			return 0, 0, fmt.Errorf("pod %q: %w", pod.Name, err)
		}
		owners[ref.UID] = 0 // counted under uid, which may be its owner's
		owners[uid] = n
	}
	for _, n := range owners {
		total += n
	}
	return total, unmanaged, nil
}

// scaleOf is the number of pods that a controller wants; a ReplicaSet's owner
// wants as many as all its sets together.
func (c *budgets) scaleOf(ctx context.Context, namespace string, ref *metav1.OwnerReference) (types.UID, int32, error) {
	gv, err := schema.ParseGroupVersion(ref.APIVersion)
	if err != nil {
		return "", 0, err
	}
	gone := fmt.Errorf("its controller %s %s is gone", ref.Kind, ref.Name)
	switch gv.Group + "/" + ref.Kind {
	case "apps/ReplicaSet":
		rs, err := c.replicas.ReplicaSets(namespace).Get(ref.Name)
		if err != nil || rs.UID != ref.UID {
			return "", 0, gone
		}
		if owner := metav1.GetControllerOfNoCopy(rs); owner != nil && owner.Kind == "Deployment" {
			if d, err := c.deployments.Deployments(namespace).Get(owner.Name); err == nil && d.UID == owner.UID {
				return d.UID, *d.Spec.Replicas, nil
			}
		}
		return rs.UID, *rs.Spec.Replicas, nil
	case "apps/StatefulSet":
		set, err := c.stateful.StatefulSets(namespace).Get(ref.Name)
		if err != nil || set.UID != ref.UID {
			return "", 0, gone
		}
		return set.UID, *set.Spec.Replicas, nil
	case "/ReplicationController":
		rc, err := c.replication.ReplicationControllers(namespace).Get(ref.Name)
		if err != nil || rc.UID != ref.UID {
			return "", 0, gone
		}
		return rc.UID, *rc.Spec.Replicas, nil
	}
	return c.scaleOfOther(ctx, namespace, gv.WithKind(ref.Kind), ref)
}

// scaleOfOther asks the scale subresource of kinds that only the API knows.
func (c *budgets) scaleOfOther(ctx context.Context, namespace string, kind schema.GroupVersionKind, ref *metav1.OwnerReference) (types.UID, int32, error) {
	if c.Dynamic == nil {
		return "", 0, fmt.Errorf("its controller %s %s cannot be scaled", ref.Kind, ref.Name)
	}
	resource, _ := meta.UnsafeGuessKindToResource(kind)
	scale, err := c.Dynamic.Resource(resource).Namespace(namespace).Get(ctx, ref.Name, metav1.GetOptions{}, "scale")
	if err != nil {
		return "", 0, fmt.Errorf("the scale of its controller %s %s: %w", ref.Kind, ref.Name, err)
	}
	n, _, err := unstructured.NestedInt64(scale.Object, "spec", "replicas")
	if err != nil {
		return "", 0, fmt.Errorf("the scale of its controller %s %s: %w", ref.Kind, ref.Name, err)
	}
	return ref.UID, int32(n), nil
}

// clear takes back the announcement of a deletion that never came.
func (c *budgets) clear(ctx context.Context, it item) error {
	pod, err := c.pods.Pods(it.namespace).Get(it.pod)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	wait, has := staleAfter(pod, c.Clock.Now())
	switch {
	case !has:
		return nil
	case wait > 0:
		c.queue.AddAfter(it, wait)
		return nil
	}
	// A patch: the view's pod is not whole. The version makes the API refuse it if the deletion came after all.
	patch := fmt.Appendf(nil, `{"metadata":{"uid":%q,"resourceVersion":%q},"status":{"conditions":[{"type":%q,"status":"False","reason":null,"message":null,"lastTransitionTime":%q}]}}`,
		pod.UID, pod.ResourceVersion, corev1.DisruptionTarget, c.Clock.Now().UTC().Format(time.RFC3339))
	if _, err := c.Client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status"); err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("pod %s/%s: clear DisruptionTarget: %w", pod.Namespace, pod.Name, err)
	}
	return nil
}
