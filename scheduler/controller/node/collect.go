package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/scheduler/controller"
)

// collectOrphans removes the pods of a node that the view does not show, when
// it has been missing for OrphanGrace (a node that is made anew keeps them),
// or at once when it is known to have left.
func (c *Controller) collectOrphans(ctx context.Context, name string) error {
	pods, err := c.podsOn(name)
	if err != nil {
		return err
	}
	now := c.clock.Now()
	c.mu.Lock()
	if len(pods) == 0 {
		delete(c.missing, name)
		c.mu.Unlock()
		return nil
	}
	since, seen := c.missing[name]
	if !seen {
		since = now
		c.missing[name] = now
	}
	c.mu.Unlock()
	if c.health.Verdicts()[name].State != controller.Left {
		if wait := since.Add(c.set.OrphanGrace).Sub(now); wait > 0 {
			c.queue.AddAfter(name, wait)
			return nil
		}
	}
	// The view may be behind; nothing is forced on the word of a stale view.
	_, err = c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err == nil {
		return fmt.Errorf("node %s: %w", name, controller.ErrStaleView)
	}
	if !apierrors.IsNotFound(err) {
		return fmt.Errorf("make sure that node %s is gone: %w", name, err)
	}
	var errs []error
	for _, pod := range pods {
		errs = append(errs, c.forceDelete(ctx, pod, "PodGC: node no longer exists"))
	}
	return errors.Join(errs...)
}

// collectUnbound removes pods that are to be deleted and have no node to end
// them, and the oldest of the ended pods if there are too many.
func (c *Controller) collectUnbound(ctx context.Context) error {
	pending, err := c.podsOn(unbound)
	if err != nil {
		return err
	}
	var errs []error
	for _, pod := range pending {
		if pod.DeletionTimestamp != nil {
			errs = append(errs, c.forceDelete(ctx, pod, ""))
		}
	}
	var ended []*corev1.Pod
	for _, obj := range c.pods.GetStore().List() {
		if pod, ok := obj.(*corev1.Pod); ok && controller.PodTerminal(pod) && pod.DeletionTimestamp == nil {
			ended = append(ended, pod)
		}
	}
	for _, pod := range surplus(ended, c.set.TerminatedPods) {
		errs = append(errs, c.forceDelete(ctx, pod, ""))
	}
	return errors.Join(errs...)
}

// surplus returns the ended pods that are to go so that keep remain: evicted
// ones first, which nobody misses, then the oldest.
func surplus(ended []*corev1.Pod, keep int) []*corev1.Pod {
	if len(ended) <= keep {
		return nil
	}
	evicted := func(pod *corev1.Pod) int {
		if pod.Status.Reason == "Evicted" {
			return 0
		}
		return 1
	}
	slices.SortFunc(ended, func(a, b *corev1.Pod) int {
		return cmp.Or(
			cmp.Compare(evicted(a), evicted(b)),
			a.CreationTimestamp.Compare(b.CreationTimestamp.Time),
			cmp.Compare(a.Namespace+"/"+a.Name, b.Namespace+"/"+b.Name),
		)
	})
	return ended[:len(ended)-keep]
}
