package lifecycle

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"skein.io/skein/node/desired"
)

// amounts are requests and limits: CPU in thousandths, memory in MiB; 0 is none.
func amounts(cpuReq, cpuLim, memReq, memLim int64) corev1.ResourceRequirements {
	var r corev1.ResourceRequirements
	set := func(l *corev1.ResourceList, n corev1.ResourceName, q *resource.Quantity) {
		if q.IsZero() {
			return
		}
		if *l == nil {
			*l = corev1.ResourceList{}
		}
		(*l)[n] = *q
	}
	set(&r.Requests, corev1.ResourceCPU, resource.NewMilliQuantity(cpuReq, resource.DecimalSI))
	set(&r.Limits, corev1.ResourceCPU, resource.NewMilliQuantity(cpuLim, resource.DecimalSI))
	set(&r.Requests, corev1.ResourceMemory, resource.NewQuantity(memReq<<20, resource.BinarySI))
	set(&r.Limits, corev1.ResourceMemory, resource.NewQuantity(memLim<<20, resource.BinarySI))
	return r
}

func shown(r *corev1.ResourceRequirements) string {
	return fmt.Sprint(r.Requests.Cpu().MilliValue(), r.Limits.Cpu().MilliValue(), r.Requests.Memory().Value()>>20, r.Limits.Memory().Value()>>20)
}

func TestResize(t *testing.T) {
	two, more := amounts(100, 200, 64, 128), amounts(300, 400, 64, 128)
	restart := []corev1.ContainerResizePolicy{{ResourceName: corev1.ResourceCPU, RestartPolicy: corev1.NotRequired},
		{ResourceName: corev1.ResourceMemory, RestartPolicy: corev1.RestartContainer}}
	inProgress := &corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodResizeInProgress, Status: corev1.ConditionTrue, ObservedGeneration: 2}}}
	for _, c := range []struct {
		name       string
		want, has  corev1.ResourceRequirements // of container a
		unknown    bool                        // nothing is known of what it has
		policy     []corev1.ContainerResizePolicy
		a          Container
		pending    *Verdict
		wait       *Wait
		again      bool
		restarts   corev1.RestartPolicy
		old        *corev1.PodStatus
		actions    string
		conditions string // of the resize: type reason generation
		events     string
		shown      string // resources in the status; "": not looked at
	}{
		{name: "nothing to do", want: two, has: two, a: running("a", "s", 0), shown: "100 200 64 128"},
		{name: "same in other words", want: amounts(1000, 0, 0, 0), has: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("1")}}, a: running("a", "s", 0)},
		{name: "grow", want: more, has: two, a: running("a", "s", 0), actions: "Resize a", conditions: "PodResizeInProgress  3", shown: "100 200 64 128"},
		{name: "limits added", want: two, has: amounts(100, 0, 64, 0), a: running("a", "s", 0), actions: "Resize a", conditions: "PodResizeInProgress  3", shown: "100 0 64 0"},
		{name: "done", want: more, has: more, a: running("a", "s", 0), old: inProgress, events: "ResizeCompleted", shown: "300 400 64 128"},
		{name: "policy of another resource", want: more, has: two, policy: restart, a: running("a", "s", 0), actions: "Resize a", conditions: "PodResizeInProgress  3"},
		{name: "restart", want: amounts(100, 200, 64, 256), has: two, policy: restart, a: running("a", "s", 0), actions: "Kill [a] grace 30, Resize", conditions: "PodResizeInProgress  3"},
		{name: "restart for a request", want: amounts(100, 200, 100, 128), has: two, policy: restart, a: running("a", "s", 0), actions: "Kill [a] grace 30, Resize", conditions: "PodResizeInProgress  3"},
		{name: "not running", want: more, has: two, a: exited("a", "s", 0, 1, 1), actions: "Resize, Start a 1", conditions: "PodResizeInProgress  3", shown: "300 400 64 128"},
		{name: "stopped for it, though it succeeded", want: two, has: two, a: exited("a", "s", 0, 0, 1), again: true, restarts: corev1.RestartPolicyOnFailure, actions: "Start a 1"},
		{name: "succeeded by itself", want: two, has: two, a: exited("a", "s", 0, 0, 1), restarts: corev1.RestartPolicyOnFailure},
		{name: "made just before a crash", want: two, unknown: true, a: running("a", "s", 0), actions: "Resize a", conditions: "PodResizeInProgress  3"},
		{name: "deferred", want: two, has: two, a: running("a", "s", 0), pending: &Verdict{"Deferred", "no room"}, conditions: "PodResizePending Deferred 3", events: "ResizeDeferred"},
		{name: "deferred while an older one is under way", want: more, has: two, a: running("a", "s", 0), old: inProgress, pending: &Verdict{"Infeasible", "too big"}, actions: "Resize a",
			conditions: "PodResizePending Infeasible 3, PodResizeInProgress  2", events: "ResizeInfeasible"},
		{name: "failed", want: more, has: two, a: running("a", "s", 0), wait: &Wait{Message: "in use", Until: at(20)}, conditions: "PodResizeInProgress Error 3", events: "ResizeError"},
		{name: "failed some time ago", want: more, has: two, a: running("a", "s", 0), wait: &Wait{Message: "in use", Until: at(5)}, actions: "Resize a", conditions: "PodResizeInProgress Error 3", events: "ResizeError"},
	} {
		t.Run(c.name, func(t *testing.T) {
			policy := corev1.RestartPolicyAlways
			if c.restarts != "" {
				policy = c.restarts
			}
			p := pod(policy, "a", "b")
			p.Spec.Containers[0].Resources, p.Spec.Containers[0].ResizePolicy = c.want, c.policy
			actuated := &desired.Resources{Containers: map[string]corev1.ResourceRequirements{"b": {}}}
			if !c.unknown {
				actuated.Containers["a"] = c.has
			}
			in := Input{Pod: p, Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{c.a, running("b", "s", 0)}}, Old: c.old,
				Containers: map[string]desired.ContainerRecord{"a": {}, "b": {}}, Actuated: actuated, Pending: c.pending, ResizeWait: c.wait, Now: at(10)}
			if c.again {
				in.Again = map[string]bool{c.a.ID: true}
			}
			plan := Step(in)
			if got := actions(plan); got != c.actions {
				t.Errorf("actions %q, want %q", got, c.actions)
			}
			var conds, events string
			for _, cond := range plan.Status.Conditions {
				if cond.Type == corev1.PodResizePending || cond.Type == corev1.PodResizeInProgress {
					conds += fmt.Sprintf(", %s %s %d", cond.Type, cond.Reason, cond.ObservedGeneration)
				}
			}
			for _, e := range plan.Events {
				events += ", " + e.Reason
			}
			if c.conditions != "" {
				c.conditions = ", " + c.conditions
			}
			if c.events != "" {
				c.events = ", " + c.events
			}
			if conds != c.conditions || events != c.events {
				t.Errorf("conditions %q, want %q; events %q, want %q", conds, c.conditions, events, c.events)
			}
			if got := shown(plan.Status.ContainerStatuses[0].Resources); c.shown != "" && got != c.shown {
				t.Errorf("resources in the status %s, want %s", got, c.shown)
			}
			if want := c.want.Requests.Cpu(); plan.Status.ContainerStatuses[0].AllocatedResources.Cpu().Cmp(*want) != 0 {
				t.Errorf("allocated %v, want %v", plan.Status.ContainerStatuses[0].AllocatedResources, want)
			}
			if plan.Status.Phase != corev1.PodRunning {
				t.Errorf("phase %s", plan.Status.Phase)
			}
		})
	}
}
