package lifecycle

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"

	"skein.io/skein/node/desired"
)

// resize brings the cgroups in line with what the node granted. Containers whose policy says so are stopped first and get theirs
// when a later step makes them anew.
func (v *view) resize() {
	var victims []Victim
	var updates []Update
	v.resizing = v.Actuated != nil && !desired.SameAmounts(v.Actuated.Pod, v.Pod.Spec.Resources)
	for _, spec := range containers(v.Pod) {
		c := v.current[spec.Name]
		running := c != nil && c.State == Running
		have, known := v.actuated(spec.Name)
		switch {
		case desired.SameAmounts(&have, &spec.Resources): // nothing is what one has of which nothing is known
		case known && running && restartsFor(spec, &have):
			v.resizing = true
			victims = append(victims, Victim{ID: c.ID, Name: c.Name, Reason: fmt.Sprintf("Container %s resize requires restart", c.Name), Again: true})
		case running: // one that nothing is known of was made just before a crash
			v.resizing = true
			updates = append(updates, Update{c.ID, c.Name})
		case known: // it gets the new amounts when it is made; the pod's cgroup holds its share already then
			v.resizing = true
		}
	}
	if !v.resizing {
		return
	}
	if w := v.ResizeWait; w != nil && v.Now.Before(w.Until) {
		v.plan.wake(w.Until)
		return
	}
	if len(victims) > 0 {
		v.restarting = make(map[string]bool, len(victims))
		for _, vic := range victims {
			v.restarting[vic.ID] = true
		}
		v.plan.Actions = append(v.plan.Actions, Action{Kind: Kill, Groups: [][]Victim{victims}, Grace: GraceSeconds(v.Pod)})
	}
	v.plan.Actions = append(v.plan.Actions, Action{Kind: Resize, SandboxID: v.sandbox.ID, Updates: updates})
}

// containers are those of a pod that have resources of their own.
func containers(p *corev1.Pod) []*corev1.Container {
	out := make([]*corev1.Container, 0, len(p.Spec.InitContainers)+len(p.Spec.Containers))
	for i := range p.Spec.InitContainers {
		out = append(out, &p.Spec.InitContainers[i])
	}
	for i := range p.Spec.Containers {
		out = append(out, &p.Spec.Containers[i])
	}
	return out
}

func (v *view) actuated(name string) (corev1.ResourceRequirements, bool) {
	if v.Actuated == nil {
		return corev1.ResourceRequirements{}, false
	}
	have, ok := v.Actuated.Containers[name]
	return have, ok
}

// restartsFor says whether a container is to be restarted to get from what it has to what it was granted.
func restartsFor(spec *corev1.Container, have *corev1.ResourceRequirements) bool {
	for _, p := range spec.ResizePolicy {
		if p.RestartPolicy == corev1.RestartContainer && !desired.SameAmount(have, &spec.Resources, p.ResourceName) {
			return true
		}
	}
	return false
}

// inForce is what a container's status shows as its resources: what its cgroup was set to while it runs, else what it is to get.
func (v *view) inForce(spec *corev1.Container, c *Container) *corev1.ResourceRequirements {
	out := spec.Resources.DeepCopy()
	have, known := v.actuated(spec.Name)
	if c.State != Running || !known || desired.SameAmounts(&have, out) {
		return out
	}
	for _, n := range []corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory} {
		out.Requests = overlay(out.Requests, have.Requests, n)
		out.Limits = overlay(out.Limits, have.Limits, n)
	}
	return out
}

func overlay(list, have corev1.ResourceList, n corev1.ResourceName) corev1.ResourceList {
	if q, ok := have[n]; ok {
		if list == nil {
			list = corev1.ResourceList{}
		}
		list[n] = q.DeepCopy()
		return list
	}
	delete(list, n)
	return list
}

// resizeConditions tell of a resize that waits or is under way, and by events when that changes.
func (v *view) resizeConditions(old *corev1.PodStatus, add func(corev1.PodConditionType, corev1.PodCondition)) {
	if v.plan.Terminating {
		return
	}
	waits, runs := findCondition(old.Conditions, corev1.PodResizePending), findCondition(old.Conditions, corev1.PodResizeInProgress)
	if p := v.Pending; p != nil {
		if waits == nil || waits.Reason != p.Reason || waits.ObservedGeneration != v.Pod.Generation {
			v.plan.Events = append(v.plan.Events, Event{Type: corev1.EventTypeWarning, Reason: "Resize" + p.Reason, Message: "Pod resize " + p.Reason + ": " + p.Message})
		}
		add(corev1.PodResizePending, corev1.PodCondition{Status: corev1.ConditionTrue, Reason: p.Reason, Message: p.Message})
	}
	if !v.resizing {
		if runs != nil {
			v.plan.Events = append(v.plan.Events, Event{Type: corev1.EventTypeNormal, Reason: "ResizeCompleted", Message: fmt.Sprintf("Pod resize completed: generation %d", runs.ObservedGeneration)})
		}
		return
	}
	c := corev1.PodCondition{Status: corev1.ConditionTrue}
	if runs != nil && v.Pending != nil { // what is under way is an older one
		c.ObservedGeneration = runs.ObservedGeneration
	}
	if w := v.ResizeWait; w != nil {
		c.Reason, c.Message = corev1.PodReasonError, w.Message
		if runs == nil || runs.Message != w.Message {
			v.plan.Events = append(v.plan.Events, Event{Type: corev1.EventTypeWarning, Reason: "ResizeError", Message: "Pod resize error: " + w.Message})
		}
	}
	add(corev1.PodResizeInProgress, c)
}
