package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"skein.io/skein/scheduler/controller"
)

// taintRecord remembers, for a node with NoExecute taints, since when it has
// them and which pods came later, so that every pod gets its whole toleration.
type taintRecord struct {
	since map[string]time.Time    // by key, value and effect of the taint
	known map[types.UID]time.Time // pods seen on the node -> since when; zero for those that were there first
	due   map[types.UID]bool      // those that were to go, but not at once
	// later is until when pods are left alone whose eviction was done, which the view may not show yet, or refused: every change of a pod wakes its node, also
	// the one that says why it is to go, and the one that takes that back after two minutes.
	later map[types.UID]time.Time
}

func taintID(t *corev1.Taint) string {
	return t.Key + "=" + t.Value + ":" + string(t.Effect)
}

// EvictAt decides when a pod must leave a node for the NoExecute taints that
// the node has; since says for each of them when the pod's patience began.
// The second result is false if it may stay. A taint that no toleration covers
// drives the pod off at once; else, as upstream, the toleration that each taint
// is first matched by counts, and the shortest of them decides.
func EvictAt(tolerations []corev1.Toleration, taints []corev1.Taint, since func(*corev1.Taint) time.Time) (time.Time, bool) {
	var at time.Time
	due := false
	earlier := func(t time.Time) {
		if !due || t.Before(at) {
			at, due = t, true
		}
	}
	for i := range taints {
		t := &taints[i]
		if t.Effect != corev1.TaintEffectNoExecute {
			continue
		}
		covered := false
		for k := range tolerations {
			if !covers(&tolerations[k], t) {
				continue
			}
			covered = true
			if s := tolerations[k].TolerationSeconds; s != nil {
				earlier(since(t).Add(time.Duration(max(*s, 0)) * time.Second))
			}
			break
		}
		if !covered {
			earlier(since(t))
		}
	}
	return at, due
}

func covers(tol *corev1.Toleration, t *corev1.Taint) bool {
	if tol.Effect != "" && tol.Effect != t.Effect || tol.Key != "" && tol.Key != t.Key {
		return false
	}
	switch tol.Operator {
	case "", corev1.TolerationOpEqual:
		return tol.Value == t.Value
	case corev1.TolerationOpExists:
		return true
	}
	return false
}

// syncPods does what the node's state means for its pods.
func (c *Controller) syncPods(ctx context.Context, n *corev1.Node, j judgement) error {
	if !j.needsCare() && !c.anyDue(n.Name) {
		return nil
	}
	pods, err := c.podsOn(n.Name)
	if err != nil {
		return err
	}
	var errs []error
	deadlines, spared := c.deadlines(n, j, pods)
	for _, pod := range spared {
		c.tell(pod, "Cancelling deletion of Pod")
	}
	now := c.clock.Now()
	var next time.Time
	sooner := func(at time.Time) {
		if next.IsZero() || at.Before(next) {
			next = at
		}
	}
	for i, pod := range pods {
		switch {
		case j.fate == left:
			errs = append(errs, c.forceDelete(ctx, pod))
		case pod.DeletionTimestamp != nil, deadlines[i].IsZero():
		case !deadlines[i].After(now):
			if again := c.evictLater(n.Name, pod); again.After(now) {
				sooner(again)
				continue
			}
			err := c.evict(ctx, pod)
			switch {
			case err == nil:
				c.leaveAlone(n.Name, pod, now.Add(lag))
			case apierrors.IsForbidden(err), apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
				c.leaveAlone(n.Name, pod, now.Add(controller.RetryLongest))
			}
			errs = append(errs, err)
		default:
			sooner(deadlines[i])
		}
	}
	if !next.IsZero() {
		c.queue.AddAfter(n.Name, next.Sub(now))
	}
	return errors.Join(errs...)
}

// lag is longer than the view takes to show an eviction that was done.
const lag = 10 * time.Second

// evictLater is when an eviction may be tried again; zero: now.
func (c *Controller) evictLater(node string, pod *corev1.Pod) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if rec := c.tainted[node]; rec != nil {
		return rec.later[pod.UID]
	}
	return time.Time{}
}

func (c *Controller) leaveAlone(node string, pod *corev1.Pod, until time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if rec := c.tainted[node]; rec != nil {
		if rec.later == nil {
			rec.later = map[types.UID]time.Time{}
		}
		rec.later[pod.UID] = until
	}
}

// anyDue reports whether pods of the node were to go; if none, it forgets the node's taints.
func (c *Controller) anyDue(name string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	rec := c.tainted[name]
	if rec == nil || len(rec.due) == 0 {
		delete(c.tainted, name)
		return false
	}
	return true
}

// deadlines returns, parallel to pods, when each must go by the node's taints;
// the zero time for those that may stay. Spared are those of them that were to go before.
func (c *Controller) deadlines(n *corev1.Node, j judgement, pods []*corev1.Pod) (out []time.Time, spared []*corev1.Pod) {
	out = make([]time.Time, len(pods))
	now := c.clock.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	rec := c.tainted[n.Name]
	fresh := rec == nil
	if fresh {
		rec = &taintRecord{since: map[string]time.Time{}, known: map[types.UID]time.Time{}}
	}
	was, due := rec.due, map[types.UID]bool{}
	defer func() {
		rec.due = due
		for _, pod := range pods {
			if was[pod.UID] && !due[pod.UID] && pod.DeletionTimestamp == nil {
				spared = append(spared, pod)
			}
		}
	}()
	since := map[string]time.Time{}
	for i := range n.Spec.Taints {
		t := &n.Spec.Taints[i]
		if t.Effect != corev1.TaintEffectNoExecute {
			continue
		}
		id := taintID(t)
		at, had := rec.since[id]
		if !had {
			at = now
			// Found at the start of a leadership: the patience with a lost node began
			// when it was lost, not when this leader came.
			if fresh && t.Key == corev1.TaintNodeUnreachable && j.fate != live && !j.since.IsZero() && j.since.Before(now) {
				at = j.since
			}
		}
		since[id] = at
	}
	if len(since) == 0 {
		delete(c.tainted, n.Name)
		return out, nil
	}
	rec.since = since
	c.tainted[n.Name] = rec
	known := make(map[types.UID]time.Time, len(pods))
	for i, pod := range pods {
		came, had := rec.known[pod.UID]
		if !had && !fresh {
			came = now
		}
		known[pod.UID] = came
		out[i], _ = EvictAt(pod.Spec.Tolerations, n.Spec.Taints, func(t *corev1.Taint) time.Time {
			if at := since[taintID(t)]; at.After(came) {
				return at
			}
			return came
		})
		if !out[i].IsZero() && (was[pod.UID] || out[i].After(now)) {
			due[pod.UID] = true
		}
	}
	rec.known = known
	maps.DeleteFunc(rec.later, func(uid types.UID, _ time.Time) bool { _, there := known[uid]; return !there })
	return out, nil
}

// tell says in a pod's events what becomes of it.
func (c *Controller) tell(pod *corev1.Pod, what string) {
	ref := &corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID}
	c.taint.Eventf(ref, corev1.EventTypeNormal, "TaintManagerEviction", "%s %s/%s", what, pod.Namespace, pod.Name)
}

// evict deletes a pod gracefully: on a node that is cut off it stays, marked
// for deletion, until the node is back or gone, because it may still run. Its
// controller makes another at once.
func (c *Controller) evict(ctx context.Context, pod *corev1.Pod) error {
	c.tell(pod, "Marking for deletion Pod")
	err := c.disrupt(ctx, pod, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint", false)
	if err == nil {
		err = c.client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{Preconditions: preconditions(pod)})
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("evict %s/%s from node %s: %w", pod.Namespace, pod.Name, pod.Spec.NodeName, err)
	}
	return nil
}

// forceDelete removes a pod whose node has left the cluster, without waiting
// for anybody to end it.
func (c *Controller) forceDelete(ctx context.Context, pod *corev1.Pod) error {
	err := c.disrupt(ctx, pod, "DeletionByPodGC", "PodGC: node has left the cluster", !controller.PodTerminal(pod))
	if err == nil {
		now := int64(0)
		err = c.client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{
			GracePeriodSeconds: &now, Preconditions: preconditions(pod),
		})
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("remove %s/%s of node %q: %w", pod.Namespace, pod.Name, pod.Spec.NodeName, err)
	}
	return nil
}

func preconditions(pod *corev1.Pod) *metav1.Preconditions {
	uid := pod.UID
	return &metav1.Preconditions{UID: &uid}
}

// disrupt says in the pod why it is deleted, and that it failed if failed.
func (c *Controller) disrupt(ctx context.Context, pod *corev1.Pod, reason, message string, failed bool) error {
	if !failed && slices.ContainsFunc(pod.Status.Conditions, func(is corev1.PodCondition) bool {
		return is.Type == corev1.DisruptionTarget && is.Status == corev1.ConditionTrue && is.Reason == reason && is.Message == message
	}) {
		return nil // its deletion was refused before
	}
	status := map[string]any{"conditions": []corev1.PodCondition{{
		Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue, Reason: reason, Message: message,
		ObservedGeneration: pod.Generation, LastTransitionTime: metav1.NewTime(c.clock.Now()),
	}}}
	if failed {
		status["phase"] = corev1.PodFailed
	}
	return c.patchPodStatus(ctx, pod, status)
}

// markNotReady takes a pod that cannot be reached out of Services.
func (c *Controller) markNotReady(ctx context.Context, pod *corev1.Pod) error {
	for _, cond := range pod.Status.Conditions {
		if cond.Type != corev1.PodReady || cond.Status != corev1.ConditionTrue {
			continue
		}
		cond.Status = corev1.ConditionFalse
		cond.LastTransitionTime = metav1.NewTime(c.clock.Now())
		err := c.patchPodStatus(ctx, pod, map[string]any{"conditions": []corev1.PodCondition{cond}})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("mark %s/%s not ready: %w", pod.Namespace, pod.Name, err)
		}
		c.events.Event(pod, corev1.EventTypeWarning, "NodeNotReady", "Node is not ready")
		return nil
	}
	return nil
}

// patchPodStatus sends a strategic merge patch; the UID in it makes the API
// refuse it for another pod of the same name.
func (c *Controller) patchPodStatus(ctx context.Context, pod *corev1.Pod, status map[string]any) error {
	_, err := c.client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, mustJSON(map[string]any{
		"metadata": map[string]any{"uid": pod.UID},
		"status":   status,
	}), metav1.PatchOptions{}, "status")
	return err
}
