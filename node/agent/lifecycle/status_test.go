package lifecycle

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/node/desired"
)

func cond(s corev1.PodStatus, t corev1.PodConditionType) corev1.PodCondition {
	if c := findCondition(s.Conditions, t); c != nil {
		return *c
	}
	return corev1.PodCondition{}
}

func TestContainerStates(t *testing.T) {
	old := func(st corev1.ContainerStatus) *corev1.PodStatus {
		st.Name = "a"
		return &corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{st}}
	}
	ran := corev1.ContainerStatus{ContainerID: "containerd://a0", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}
	oom := exited("a", "s", 0, 137, 9)
	oom.Reason = "OOMKilled"
	oomChild := exited("a", "s", 0, 0, 9)
	oomChild.Reason = "OOMKilled"
	in := func(cs ...Container) Input {
		return Input{Pod: pod(corev1.RestartPolicyAlways, "a"), Now: at(10), HostIPs: []string{"192.0.2.1"}, Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: cs}}
	}
	for _, c := range []struct {
		name  string
		in    Input
		check func(s corev1.ContainerStatus) bool
	}{
		{"not made yet", in(), func(s corev1.ContainerStatus) bool {
			return s.State.Waiting.Reason == "ContainerCreating" && s.Image == "img"
		}},
		{"running", in(running("a", "s", 2)), func(s corev1.ContainerStatus) bool {
			return s.Ready && *s.Started && s.RestartCount == 2 && s.State.Running.StartedAt.Time.Equal(at(2)) && s.ContainerID == "containerd://a2"
		}},
		{"ended by a kill for memory", in(oom), func(s corev1.ContainerStatus) bool {
			return s.State.Terminated.Reason == "OOMKilled" && !s.Ready && !*s.Started
		}},
		{"only a child was killed for memory", in(oomChild), func(s corev1.ContainerStatus) bool { return s.State.Terminated.Reason == "Completed" }},
		{"restarted", in(running("a", "s", 1), exited("a", "s", 0, 3, 1)), func(s corev1.ContainerStatus) bool {
			return s.LastTerminationState.Terminated.ExitCode == 3 && s.LastTerminationState.Terminated.Reason == "Error" && s.RestartCount == 1
		}},
		{"waiting for its image", func() Input {
			i := in()
			i.Waits = map[string]Wait{"a": {Reason: "ErrImagePull", Message: "m", Until: at(99)}}
			return i
		}(), func(s corev1.ContainerStatus) bool {
			return s.State.Waiting.Reason == "ErrImagePull" && s.State.Waiting.Message == "m"
		}},
		{"held back", func() Input {
			i := in(exited("a", "s", 1, 1, 9))
			i.Containers = map[string]desired.ContainerRecord{"a": {Restarts: 1, Backoff: 2 * BackoffInitial, BackoffAt: at(5)}}
			return i
		}(), func(s corev1.ContainerStatus) bool {
			return s.State.Waiting.Reason == "CrashLoopBackOff" && s.State.Waiting.Message == "back-off 20s restarting failed container=a pod=p_ns(u)" && s.LastTerminationState.Terminated.ExitCode == 1
		}},
		{"vanished while it ran", func() Input { i := in(); i.Old = old(ran); return i }(), func(s corev1.ContainerStatus) bool {
			return s.State.Waiting != nil && s.LastTerminationState.Terminated.Reason == "ContainerStatusUnknown" && s.LastTerminationState.Terminated.ExitCode == 137
		}},
		{"a told end is not told differently", func() Input {
			i := in(exited("a", "s", 0, 1, 9))
			i.Old = old(corev1.ContainerStatus{ContainerID: "containerd://a0", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ContainerID: "containerd://a0", ExitCode: 1, Message: "kept"}}})
			return i
		}(), func(s corev1.ContainerStatus) bool { return s.State.Terminated.Message == "kept" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := Step(c.in).Status.ContainerStatuses[0]
			defer func() {
				if r := recover(); r != nil {
					t.Errorf("%v: %+v", r, s)
				}
			}()
			if !c.check(s) {
				t.Errorf("%+v", s)
			}
		})
	}
}

func TestConditions(t *testing.T) {
	p := pod(corev1.RestartPolicyAlways, "i:x", "a")
	p.Spec.Containers[0].ReadinessProbe = &corev1.Probe{}
	p.Spec.ReadinessGates = []corev1.PodReadinessGate{{ConditionType: "gate"}}
	p.Status.Conditions = []corev1.PodCondition{{Type: "foreign", Status: corev1.ConditionTrue}}
	in := Input{Pod: p, Now: at(10), HostIPs: []string{"192.0.2.1"}}
	s := Step(in).Status
	if c := cond(s, corev1.PodInitialized); c.Status != corev1.ConditionFalse || c.Reason != "ContainersNotInitialized" || c.Message != "containers with incomplete status: [x]" || c.ObservedGeneration != 3 {
		t.Errorf("Initialized: %+v", c)
	}
	if c := cond(s, corev1.PodReady); c.Status != corev1.ConditionFalse || c.Reason != "ContainersNotReady" || c.Message != "containers with unready status: [a]" {
		t.Errorf("Ready: %+v", c)
	}
	if cond(s, corev1.PodReadyToStartContainers).Status != corev1.ConditionFalse || cond(s, corev1.PodScheduled).Status != corev1.ConditionTrue || cond(s, "foreign").Status != corev1.ConditionTrue {
		t.Errorf("%+v", s.Conditions)
	}
	if s.StartTime == nil || !s.StartTime.Time.Equal(at(10)) || s.HostIP != "192.0.2.1" || s.PodIP != "" || s.ObservedGeneration != 3 {
		t.Errorf("%+v", s)
	}
	in.Old, in.Now = &s, at(20)
	in.Observed = Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("a", "s", 0), exited("x", "s", 0, 0, 1)}}
	in.Probes = map[string]Probes{"a0": {Readiness: Success}}
	s = Step(in).Status
	if c := cond(s, corev1.ContainersReady); c.Status != corev1.ConditionTrue || !c.LastTransitionTime.Time.Equal(at(20)) {
		t.Errorf("ContainersReady: %+v", c)
	}
	if c := cond(s, corev1.PodReady); c.Reason != "ReadinessGatesNotReady" || !strings.Contains(c.Message, `"gate" does not exist`) {
		t.Errorf("Ready: %+v", c)
	}
	if s.PodIP != "10.0.0.9" || len(s.PodIPs) != 1 {
		t.Errorf("addresses: %+v", s)
	}
	p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: "gate", Status: corev1.ConditionTrue})
	in.Old, in.Now = &s, at(30)
	s = Step(in).Status
	if c := cond(s, corev1.PodReady); c.Status != corev1.ConditionTrue || !c.LastTransitionTime.Time.Equal(at(30)) {
		t.Errorf("Ready: %+v", c)
	}
	if c := cond(s, corev1.ContainersReady); !c.LastTransitionTime.Time.Equal(at(20)) {
		t.Errorf("an unchanged condition got a new time: %+v", c)
	}
	if !s.StartTime.Time.Equal(at(10)) {
		t.Errorf("start time changed: %v", s.StartTime)
	}
	// The same input gives the same status: nothing is written while nothing happens.
	in.Old, in.Now = &s, at(40)
	again := Step(in).Status
	if again.String() != s.String() {
		t.Errorf("status changed by itself:\n%v\n%v", s.String(), again.String())
	}
	// A node that is not trusted by the rest: somebody else said not ready; the node's own word stands.
	p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: corev1.ConditionFalse, LastTransitionTime: metav1.NewTime(at(39))})
	if c := cond(Step(in).Status, corev1.PodReady); c.Status != corev1.ConditionTrue {
		t.Errorf("Ready: %+v", c)
	}
}
