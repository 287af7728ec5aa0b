package agent

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/agent/cgroup"
	"skein.io/skein/node/agent/lifecycle"
	"skein.io/skein/node/desired"
)

// granted returns the pod with what the node has granted to it, and why that is not what its spec asks for. The grant goes into a
// copy of the record, for publish to keep it before anything is done about it.
func (w *worker) granted(pod *corev1.Pod, gone bool, rec **desired.Record) (*corev1.Pod, *lifecycle.Verdict) {
	if w.verdict != nil {
		return pod, nil
	}
	has := (*rec).Allocated
	w.noted = has
	var why *lifecycle.Verdict
	over := (*rec).Status != nil && ((*rec).Status.Phase == corev1.PodFailed || (*rec).Status.Phase == corev1.PodSucceeded)
	if !gone && !over && pod.DeletionTimestamp == nil {
		has, why = w.a.grant(pod, *rec)
	}
	if has == nil {
		return pod, nil
	}
	if before := (*rec).Allocated; before != has {
		next := **rec
		next.Allocated = has
		*rec = &next
		if before != nil && !before.Match(has.Apply(pod)) {
			w.resizeWait = nil
			w.mu.Lock()
			w.stale = true // files may show limits
			w.mu.Unlock()
			w.eventf(pod, "", corev1.EventTypeNormal, "ResizeStarted", "Pod resize started: generation %d", pod.Generation)
		}
	}
	return has.Apply(pod), why
}

// resize sets the cgroups of the pod and of its running containers to what the pod was granted. The pod's own holds what was and
// what is to be until its containers have changed, so that no child needs more than its parent has.
func (w *worker) resize(ctx context.Context, pod *corev1.Pod, action lifecycle.Action) error {
	err := w.tryResize(ctx, pod, action)
	w.resizeWait = nil
	if err != nil && ctx.Err() == nil {
		w.resizeWait = &lifecycle.Wait{Reason: corev1.PodReasonError, Message: message(err), Until: time.Now().Add(actionRetry)}
	}
	return err
}

func (w *worker) tryResize(ctx context.Context, pod *corev1.Pod, action lifecycle.Action) error {
	rec := w.a.cfg.Desired.Record(w.uid)
	if rec == nil {
		return errors.New("the pod has no record yet")
	}
	before, after := podLimits(rec.Actuated.Apply(pod)), podLimits(pod)
	if err := w.checkMemory(ctx, pod, rec.Actuated, action.Updates, before.MemoryLimit, after.MemoryLimit); err != nil {
		return err
	}
	if err := w.a.cgroups.Ensure(string(w.uid), cgroup.Larger(before, after)); err != nil {
		return err
	}
	for _, u := range action.Updates {
		spec := containerSpec(pod, u.Name)
		err := w.a.cfg.Runtime.UpdateContainerResources(ctx, u.ID, &runtimeapi.ContainerResources{Linux: resources(pod, spec, w.a.memoryCapacity())})
		if err != nil {
			return fmt.Errorf("update container %s: %w", u.Name, err)
		}
		w.actuated(func(has *desired.Resources) *desired.Resources { return has.With(u.Name, spec.Resources) })
	}
	if err := w.a.cgroups.Ensure(string(w.uid), after); err != nil {
		return err
	}
	w.actuated(func(has *desired.Resources) *desired.Resources {
		next := &desired.Resources{Pod: pod.Spec.Resources, Containers: map[string]corev1.ResourceRequirements{}}
		all := desired.ResourcesOf(pod)
		if has != nil { // those that do not run get theirs when they are made
			for name := range has.Containers {
				next.Containers[name] = all.Containers[name]
			}
		}
		return next
	})
	return nil
}

// actuated keeps what cgroups were set to.
func (w *worker) actuated(change func(*desired.Resources) *desired.Resources) {
	rec := w.a.cfg.Desired.Record(w.uid)
	if rec == nil {
		return
	}
	next := *rec
	next.Actuated = change(rec.Actuated)
	w.a.cfg.Desired.PutRecord(&next)
}

// checkMemory refuses limits below what is in use: the kernel would refuse them, or kill for them. All are checked before anything
// is changed, so that a pod is not resized by half.
func (w *worker) checkMemory(ctx context.Context, pod *corev1.Pod, has *desired.Resources, updates []lifecycle.Update, podBefore, podAfter int64) error {
	lower := func(before, after int64) bool { return after > 0 && (before == 0 || after < before) }
	var errs []error
	if lower(podBefore, podAfter) {
		used, err := w.a.cgroups.MemoryUsage(string(w.uid))
		if err != nil {
			return err
		}
		if used >= podAfter {
			errs = append(errs, fmt.Errorf("attempting to set pod memory limit (%d) below current usage (%d)", podAfter, used))
		}
	}
	for _, u := range updates {
		var before corev1.ResourceRequirements
		if has != nil {
			before = has.Containers[u.Name]
		}
		after := containerSpec(pod, u.Name).Resources.Limits.Memory().Value()
		if !lower(before.Limits.Memory().Value(), after) {
			continue
		}
		stats, err := w.a.cfg.Runtime.ContainerStats(ctx, u.ID)
		if err != nil {
			return fmt.Errorf("memory usage of container %s: %w", u.Name, err)
		}
		used := int64(max(stats.GetMemory().GetUsageBytes().GetValue(), stats.GetMemory().GetWorkingSetBytes().GetValue()))
		if used >= after {
			errs = append(errs, fmt.Errorf("attempting to set container %q memory limit (%d) below current usage (%d)", u.Name, after, used))
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("cannot decrease memory limits: %w", errors.Join(errs...))
	}
	return nil
}
