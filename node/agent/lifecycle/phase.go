package lifecycle

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// phase sets phase, reason and message. A terminal phase is final.
func (v *view) phase(s, old *corev1.PodStatus) {
	s.Phase = v.computePhase(s)
	if !isTerminal(s.Phase) {
		if isTerminal(old.Phase) {
			s.Phase = old.Phase
		} else if isTerminal(v.Pod.Status.Phase) {
			s.Phase = v.Pod.Status.Phase
		}
	}
	if s.Phase == old.Phase {
		s.Reason, s.Message = old.Reason, old.Message
	}
	if v.Fail != nil && !isTerminal(old.Phase) {
		s.Phase, s.Reason, s.Message = corev1.PodFailed, v.Fail.Reason, v.Fail.Message
	}
	if isTerminal(v.Pod.Status.Phase) {
		s.Phase = v.Pod.Status.Phase // the API allows no way back
	}
}

// tally counts the states of the regular containers and sidecars.
type tally struct{ unknown, running, waiting, stopped, succeeded, over int }

func (v *view) computePhase(s *corev1.PodStatus) corev1.PodPhase {
	never := v.Pod.Spec.RestartPolicy == corev1.RestartPolicyNever
	pending, failed := v.initProgress(s, never)
	if failed {
		return corev1.PodFailed
	}
	var n tally
	for i := range v.Pod.Spec.InitContainers {
		spec := &v.Pod.Spec.InitContainers[i]
		if !IsSidecar(spec) {
			continue
		}
		st := containerStatus(s.InitContainerStatuses, spec.Name)
		switch {
		case st.State.Running != nil:
			n.running++
			if (st.Started == nil || !*st.Started) && !v.podInitialized() {
				pending = true
			}
		case st.State.Waiting != nil && st.LastTerminationState.Terminated == nil:
			n.waiting++
		}
	}
	for i := range v.Pod.Spec.Containers {
		v.count(&n, containerStatus(s.ContainerStatuses, v.Pod.Spec.Containers[i].Name))
	}
	switch {
	case pending, n.waiting > 0:
		return corev1.PodPending
	case n.running > 0 && n.unknown == 0:
		return corev1.PodRunning
	case n.running == 0 && n.stopped > 0 && n.unknown == 0:
		if !v.plan.Done && n.over != n.stopped {
			return corev1.PodRunning // some will be restarted
		}
		if n.succeeded == n.stopped {
			return corev1.PodSucceeded
		}
		return corev1.PodFailed
	}
	return corev1.PodPending
}

func (v *view) count(n *tally, st corev1.ContainerStatus) {
	ended := func(t *corev1.ContainerStateTerminated) {
		n.stopped++
		if c := v.latest[st.Name]; (c == nil || !v.Again[c.ID]) && !v.restarts(&Container{State: Exited, ExitCode: t.ExitCode}) {
			n.over++
		}
	}
	switch {
	case st.State.Running != nil:
		n.running++
	case st.State.Terminated != nil:
		ended(st.State.Terminated)
		if st.State.Terminated.ExitCode == 0 {
			n.succeeded++
		}
	case st.State.Waiting != nil && st.LastTerminationState.Terminated != nil:
		ended(st.LastTerminationState.Terminated)
	case st.State.Waiting != nil:
		n.waiting++
	default:
		n.unknown++
	}
}

// initProgress says whether ordinary init containers are still to be done, and whether one failed for good.
func (v *view) initProgress(s *corev1.PodStatus, never bool) (pending, failed bool) {
	for i := range v.Pod.Spec.InitContainers {
		spec := &v.Pod.Spec.InitContainers[i]
		if IsSidecar(spec) {
			continue
		}
		st := containerStatus(s.InitContainerStatuses, spec.Name)
		t := st.State.Terminated
		if st.State.Waiting != nil {
			t = st.LastTerminationState.Terminated
		}
		switch {
		case t == nil:
			pending = true
		case t.ExitCode != 0 && never:
			return pending, true
		case t.ExitCode != 0, st.State.Terminated == nil:
			pending = true
		}
	}
	return pending, false
}

// ownConditions are the condition types that the node decides.
var ownConditions = map[corev1.PodConditionType]bool{corev1.PodScheduled: true, corev1.PodReady: true, corev1.PodInitialized: true,
	corev1.ContainersReady: true, corev1.PodReadyToStartContainers: true, corev1.PodResizePending: true, corev1.PodResizeInProgress: true}

// Owns says whether a type of condition is the node's to decide.
func Owns(t corev1.PodConditionType) bool { return ownConditions[t] }

func findCondition(cs []corev1.PodCondition, t corev1.PodConditionType) *corev1.PodCondition {
	for i := range cs {
		if cs[i].Type == t {
			return &cs[i]
		}
	}
	return nil
}

// conditions keeps those of others and decides the node's own. The time of the last change is kept while the status is.
func (v *view) conditions(s, old *corev1.PodStatus) []corev1.PodCondition {
	var out []corev1.PodCondition
	for _, c := range v.Pod.Status.Conditions {
		if !ownConditions[c.Type] {
			out = append(out, c)
		}
	}
	initialized := v.initializedCondition(s)
	containers := v.containersReady(s)
	ready := v.readyCondition(containers)
	start := corev1.PodCondition{Status: corev1.ConditionFalse}
	if v.sandbox != nil {
		start.Status = corev1.ConditionTrue
	}
	add := func(t corev1.PodConditionType, c corev1.PodCondition) {
		c.Type = t
		if c.ObservedGeneration == 0 {
			c.ObservedGeneration = v.Pod.Generation
		}
		c.LastTransitionTime = metav1.NewTime(v.Now).Rfc3339Copy()
		o := findCondition(old.Conditions, t)
		if o == nil {
			o = findCondition(v.Pod.Status.Conditions, t)
		}
		if o != nil && o.Status == c.Status {
			c.LastTransitionTime, c.LastProbeTime = o.LastTransitionTime, o.LastProbeTime
		}
		out = append(out, c)
	}
	add(corev1.PodReadyToStartContainers, start)
	add(corev1.PodInitialized, initialized)
	add(corev1.PodReady, ready)
	add(corev1.ContainersReady, containers)
	add(corev1.PodScheduled, corev1.PodCondition{Status: corev1.ConditionTrue})
	v.resizeConditions(old, add)
	return out
}

func (v *view) initializedCondition(s *corev1.PodStatus) corev1.PodCondition {
	var open []string
	for i := range v.Pod.Spec.InitContainers {
		spec := &v.Pod.Spec.InitContainers[i]
		st := containerStatus(s.InitContainerStatuses, spec.Name)
		if IsSidecar(spec) && (st.Started == nil || !*st.Started) || !IsSidecar(spec) && !st.Ready {
			open = append(open, spec.Name)
		}
	}
	if s.Phase == corev1.PodSucceeded {
		return corev1.PodCondition{Status: corev1.ConditionTrue, Reason: "PodCompleted"}
	}
	for i := range v.Pod.Spec.Containers {
		st := containerStatus(s.ContainerStatuses, v.Pod.Spec.Containers[i].Name)
		if st.State.Running != nil || st.State.Terminated != nil || st.RestartCount > 0 || st.LastTerminationState.Terminated != nil {
			return corev1.PodCondition{Status: corev1.ConditionTrue}
		}
	}
	if len(open) == 0 {
		return corev1.PodCondition{Status: corev1.ConditionTrue}
	}
	return corev1.PodCondition{Status: corev1.ConditionFalse, Reason: "ContainersNotInitialized", Message: fmt.Sprintf("containers with incomplete status: %s", open)}
}

func (v *view) containersReady(s *corev1.PodStatus) corev1.PodCondition {
	var unready []string
	for i := range v.Pod.Spec.InitContainers {
		spec := &v.Pod.Spec.InitContainers[i]
		if IsSidecar(spec) && !containerStatus(s.InitContainerStatuses, spec.Name).Ready {
			unready = append(unready, spec.Name)
		}
	}
	for i := range v.Pod.Spec.Containers {
		if n := v.Pod.Spec.Containers[i].Name; !containerStatus(s.ContainerStatuses, n).Ready {
			unready = append(unready, n)
		}
	}
	switch {
	case s.Phase == corev1.PodSucceeded:
		return corev1.PodCondition{Status: corev1.ConditionFalse, Reason: "PodCompleted"}
	case s.Phase == corev1.PodFailed:
		return corev1.PodCondition{Status: corev1.ConditionFalse, Reason: "PodFailed"}
	case len(unready) > 0:
		return corev1.PodCondition{Status: corev1.ConditionFalse, Reason: "ContainersNotReady", Message: fmt.Sprintf("containers with unready status: %s", unready)}
	}
	return corev1.PodCondition{Status: corev1.ConditionTrue}
}

func (v *view) readyCondition(containers corev1.PodCondition) corev1.PodCondition {
	if containers.Status != corev1.ConditionTrue {
		return containers
	}
	var open []string
	for _, g := range v.Pod.Spec.ReadinessGates {
		c := findCondition(v.Pod.Status.Conditions, g.ConditionType)
		if c == nil {
			open = append(open, fmt.Sprintf("corresponding condition of pod readiness gate %q does not exist.", string(g.ConditionType)))
		} else if c.Status != corev1.ConditionTrue {
			open = append(open, fmt.Sprintf("the status of pod readiness gate %q is not \"True\", but %v", string(g.ConditionType), c.Status))
		}
	}
	if len(open) > 0 {
		return corev1.PodCondition{Status: corev1.ConditionFalse, Reason: "ReadinessGatesNotReady", Message: strings.Join(open, ", ")}
	}
	return corev1.PodCondition{Status: corev1.ConditionTrue}
}
