package lifecycle

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/node/desired"
)

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func at(s int) time.Time { return t0.Add(time.Duration(s) * time.Second) }

// pod makes a pod; names with a prefix are init containers ("i:") or sidecars ("s:").
func pod(policy corev1.RestartPolicy, names ...string) *corev1.Pod {
	p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "p", UID: "u", Generation: 3}, Spec: corev1.PodSpec{RestartPolicy: policy}}
	always := corev1.ContainerRestartPolicyAlways
	for _, n := range names {
		c := corev1.Container{Name: strings.TrimLeft(n, "is:"), Image: "img"}
		switch {
		case strings.HasPrefix(n, "i:"):
			p.Spec.InitContainers = append(p.Spec.InitContainers, c)
		case strings.HasPrefix(n, "s:"):
			c.RestartPolicy = &always
			p.Spec.InitContainers = append(p.Spec.InitContainers, c)
		default:
			p.Spec.Containers = append(p.Spec.Containers, c)
		}
	}
	return p
}

func box(id string, attempt uint32, ready bool) Sandbox {
	return Sandbox{ID: id, Attempt: attempt, Ready: ready, IPs: []string{"10.0.0.9"}}
}

func running(name, sandbox string, attempt int32) Container {
	return Container{ID: fmt.Sprintf("%s%d", name, attempt), Name: name, SandboxID: sandbox, Attempt: attempt, State: Running, CreatedAt: at(int(attempt)), StartedAt: at(int(attempt))}
}

func exited(name, sandbox string, attempt, code int32, fin int) Container {
	c := running(name, sandbox, attempt)
	c.State, c.ExitCode, c.FinishedAt = Exited, code, at(fin)
	return c
}

func withState(c Container, s State) Container { c.State = s; return c }

func actions(p Plan) string {
	var out []string
	for _, a := range p.Actions {
		out = append(out, a.String())
	}
	return strings.Join(out, ", ")
}

func TestStep(t *testing.T) {
	always, never, onFailure := corev1.RestartPolicyAlways, corev1.RestartPolicyNever, corev1.RestartPolicyOnFailure
	deleted := func(p *corev1.Pod, grace int64) *corev1.Pod {
		now := metav1.NewTime(t0)
		p.DeletionTimestamp, p.DeletionGracePeriodSeconds = &now, &grace
		return p
	}
	probed := func(p *corev1.Pod) *corev1.Pod {
		grace := int64(7)
		c := &p.Spec.Containers[0]
		c.LivenessProbe = &corev1.Probe{TerminationGracePeriodSeconds: &grace}
		c.StartupProbe = &corev1.Probe{}
		return p
	}
	sideProbe := func(p *corev1.Pod) *corev1.Pod {
		p.Spec.InitContainers[0].StartupProbe = &corev1.Probe{}
		return p
	}
	for _, c := range []struct {
		name  string
		in    Input
		want  string
		phase corev1.PodPhase
		wake  int // seconds; 0: never
	}{
		{name: "new pod", in: Input{Pod: pod(always, "a")}, want: "CreateSandbox 0", phase: corev1.PodPending},
		{name: "sandbox without address", in: Input{Pod: pod(always, "a"), Observed: Observed{Sandboxes: []Sandbox{{ID: "s", Ready: true}}}}, want: "StopSandbox s", phase: corev1.PodPending},
		{name: "sandbox ready", in: Input{Pod: pod(always, "a", "b"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}}}, want: "Start a 0, Start b 0", phase: corev1.PodPending},
		{name: "two sandboxes", in: Input{Pod: pod(always, "a"), Observed: Observed{Sandboxes: []Sandbox{box("t", 1, true), box("s", 0, true)}}}, want: "StopSandbox t, StopSandbox s", phase: corev1.PodPending},
		{name: "sandbox failed before", in: Input{Pod: pod(always, "a"), Now: at(1), SandboxWait: &Wait{Until: at(5)}}, want: "", phase: corev1.PodPending, wake: 5},
		{name: "running", in: Input{Pod: pod(always, "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("a", "s", 0)}}}, want: "", phase: corev1.PodRunning},
		{name: "one still to start", in: Input{Pod: pod(always, "a", "b"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("a", "s", 0)}}}, want: "Start b 0", phase: corev1.PodPending},
		{name: "made but not started by a daemon that died", in: Input{Pod: pod(always, "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{withState(running("a", "s", 0), Created)}}}, want: "Start a 1", phase: corev1.PodPending},

		{name: "first restart at once", in: Input{Pod: pod(always, "a"), Now: at(20), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("a", "s", 0, 1, 20)}}}, want: "Start a 1", phase: corev1.PodRunning},
		{name: "second restart waits", in: Input{Pod: pod(always, "a"), Now: at(22), Containers: map[string]desired.ContainerRecord{"a": {Restarts: 1, Backoff: BackoffInitial, BackoffAt: at(20)}},
			Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("a", "s", 1, 1, 21)}}}, want: "", phase: corev1.PodRunning, wake: 31},
		{name: "exit 0 is restarted too", in: Input{Pod: pod(always, "a"), Now: at(40), Containers: map[string]desired.ContainerRecord{"a": {Restarts: 1, Backoff: BackoffInitial, BackoffAt: at(20)}},
			Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("a", "s", 1, 0, 21)}}}, want: "Start a 2", phase: corev1.PodRunning},
		{name: "image wait", in: Input{Pod: pod(always, "a"), Now: at(1), Waits: map[string]Wait{"a": {Reason: "ErrImagePull", Until: at(9)}}, Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}}}, want: "", phase: corev1.PodPending, wake: 9},
		{name: "on failure: done", in: Input{Pod: pod(onFailure, "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("a", "s", 0, 0, 3)}}}, want: "StopSandbox s", phase: corev1.PodSucceeded},
		{name: "on failure: again", in: Input{Pod: pod(onFailure, "a", "b"), Now: at(9), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("a", "s", 0, 0, 3), exited("b", "s", 0, 1, 3)}}}, want: "Start b 1", phase: corev1.PodRunning},
		{name: "never: failed", in: Input{Pod: pod(never, "a", "b"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, false)}, Containers: []Container{exited("a", "s", 0, 0, 3), exited("b", "s", 0, 1, 3)}}}, want: "Finish", phase: corev1.PodFailed},
		{name: "never: one still runs", in: Input{Pod: pod(never, "a", "b"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("a", "s", 0, 1, 3), running("b", "s", 0)}}}, want: "", phase: corev1.PodRunning},

		{name: "node rebooted, always", in: Input{Pod: pod(always, "a"), Now: at(99), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, false)}, Containers: []Container{exited("a", "s", 0, 255, 50)}}}, want: "CreateSandbox 1", phase: corev1.PodRunning},
		{name: "node rebooted, never", in: Input{Pod: pod(never, "a"), Now: at(99), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, false)}, Containers: []Container{exited("a", "s", 0, 255, 50)}}}, want: "Finish", phase: corev1.PodFailed},
		{name: "runtime lost all, never", in: Input{Pod: pod(never, "a"), Now: at(99), Containers: map[string]desired.ContainerRecord{"a": {}},
			Old: &corev1.PodStatus{Phase: corev1.PodRunning, ContainerStatuses: []corev1.ContainerStatus{{Name: "a", State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}}}}, want: "Finish", phase: corev1.PodFailed},
		{name: "runtime lost all, always", in: Input{Pod: pod(always, "a"), Now: at(99), Containers: map[string]desired.ContainerRecord{"a": {Restarts: 4}}}, want: "CreateSandbox 0", phase: corev1.PodPending},
		{name: "after the loss the count goes on", in: Input{Pod: pod(always, "a"), Now: at(99), Containers: map[string]desired.ContainerRecord{"a": {Restarts: 4}}, Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}}}, want: "Start a 5", phase: corev1.PodPending},
		{name: "dead pause, live container", in: Input{Pod: pod(always, "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, false)}, Containers: []Container{running("a", "s", 0)}}}, want: "Kill [a] grace 30", phase: corev1.PodRunning},
		{name: "on failure: ended in a former sandbox", in: Input{Pod: pod(onFailure, "a", "b"), Now: at(99), Observed: Observed{Sandboxes: []Sandbox{box("t", 1, true), box("s", 0, false)},
			Containers: []Container{exited("a", "s", 0, 0, 3), exited("b", "s", 0, 255, 50)}}}, want: "Start b 1", phase: corev1.PodRunning},

		{name: "liveness", in: Input{Pod: probed(pod(always, "a")), Probes: map[string]Probes{"a0": {Startup: Success, Liveness: Failure}}, Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("a", "s", 0)}}}, want: "Kill [a] grace 7", phase: corev1.PodRunning},
		{name: "startup", in: Input{Pod: probed(pod(always, "a")), Probes: map[string]Probes{"a0": {Startup: Failure}}, Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("a", "s", 0)}}}, want: "Kill [a] grace 30", phase: corev1.PodRunning},
		{name: "image changed", in: Input{Pod: pod(always, "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{func() Container { c := running("a", "s", 0); c.Hash = "x"; return c }()}}}, want: "Kill [a] grace 30", phase: corev1.PodRunning},

		{name: "init first", in: Input{Pod: pod(always, "i:x", "i:y", "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}}}, want: "Start x 0", phase: corev1.PodPending},
		{name: "init running", in: Input{Pod: pod(always, "i:x", "i:y", "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("x", "s", 0)}}}, want: "", phase: corev1.PodPending},
		{name: "init next", in: Input{Pod: pod(always, "i:x", "i:y", "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("x", "s", 0, 0, 1)}}}, want: "Start y 0", phase: corev1.PodPending},
		{name: "init failed, never", in: Input{Pod: pod(never, "i:x", "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("x", "s", 0, 1, 1)}}}, want: "StopSandbox s", phase: corev1.PodFailed},
		{name: "init failed, again", in: Input{Pod: pod(onFailure, "i:x", "a"), Now: at(5), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("x", "s", 0, 1, 1)}}}, want: "Start x 1", phase: corev1.PodPending},
		{name: "init done", in: Input{Pod: pod(always, "i:x", "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("x", "s", 0, 0, 1)}}}, want: "Start a 0", phase: corev1.PodPending},
		{name: "init again in a new sandbox", in: Input{Pod: pod(always, "i:x", "a"), Now: at(99), Observed: Observed{Sandboxes: []Sandbox{box("t", 1, true), box("s", 0, false)},
			Containers: []Container{exited("a", "s", 0, 255, 50), exited("x", "s", 0, 0, 1)}}}, want: "Start x 1", phase: corev1.PodRunning},
		{name: "init container collected after it ran", in: Input{Pod: pod(always, "i:x", "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("a", "s", 0)}}}, want: "", phase: corev1.PodPending},

		{name: "sidecar not started holds", in: Input{Pod: sideProbe(pod(always, "s:x", "a")), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("x", "s", 0)}}}, want: "", phase: corev1.PodPending},
		{name: "sidecar started", in: Input{Pod: sideProbe(pod(always, "s:x", "a")), Probes: map[string]Probes{"x0": {Startup: Success}}, Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("x", "s", 0)}}}, want: "Start a 0", phase: corev1.PodPending},
		{name: "sidecar died", in: Input{Pod: pod(never, "s:x", "a"), Now: at(50), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("a", "s", 0), exited("x", "s", 0, 1, 40)}}}, want: "Start x 1", phase: corev1.PodRunning},
		{name: "sidecar of a job that is done", in: Input{Pod: pod(never, "s:x", "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("a", "s", 0, 0, 9), running("x", "s", 0)}}}, want: "Kill [x] grace 30", phase: corev1.PodRunning},
		{name: "dead sidecar of a job that is done", in: Input{Pod: pod(never, "s:x", "a"), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("a", "s", 0, 0, 9), exited("x", "s", 0, 0, 9)}}}, want: "StopSandbox s", phase: corev1.PodSucceeded},

		{name: "deleted", in: Input{Pod: deleted(pod(always, "s:x", "s:y", "a", "b"), 5), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)},
			Containers: []Container{running("a", "s", 0), running("b", "s", 0), running("x", "s", 0), running("y", "s", 0)}}}, want: "Kill [a b] [y] [x] grace 5", phase: corev1.PodRunning},
		{name: "deleted, at least a second", in: Input{Pod: deleted(pod(always, "a"), 0), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("a", "s", 0)}}}, want: "Kill [a] grace 1", phase: corev1.PodRunning},
		{name: "deleted, stopped", in: Input{Pod: deleted(pod(always, "a"), 5), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{exited("a", "s", 0, 143, 9)}}}, want: "StopSandbox s", phase: corev1.PodRunning},
		{name: "deleted, over", in: Input{Pod: deleted(pod(always, "a"), 5), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, false)}, Containers: []Container{exited("a", "s", 0, 143, 9)}}}, want: "Finish", phase: corev1.PodFailed},
		{name: "deleted before it started", in: Input{Pod: deleted(pod(always, "a"), 5)}, want: "Finish", phase: corev1.PodPending},
		{name: "gone", in: Input{Pod: pod(always, "a"), Gone: true, Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("a", "s", 0)}}}, want: "Kill [a] grace 30", phase: corev1.PodRunning},
		{name: "gone while being deleted", in: Input{Pod: deleted(pod(always, "a"), 50), Gone: true, Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("a", "s", 0)}}}, want: "Kill [a] grace 1", phase: corev1.PodRunning},
		{name: "terminal phases are final", in: Input{Pod: pod(always, "a"), Old: &corev1.PodStatus{Phase: corev1.PodSucceeded}}, want: "Finish", phase: corev1.PodSucceeded},
		{name: "refused", in: Input{Pod: pod(always, "a"), Fail: &Verdict{"OutOfcpu", "m"}}, want: "Finish", phase: corev1.PodFailed},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.in.Now.IsZero() {
				c.in.Now = at(10)
			}
			p := Step(c.in)
			if got := actions(p); got != c.want {
				t.Errorf("actions %q, want %q", got, c.want)
			}
			if p.Status.Phase != c.phase {
				t.Errorf("phase %s, want %s", p.Status.Phase, c.phase)
			}
			if c.wake == 0 != p.Wake.IsZero() || c.wake != 0 && !p.Wake.Equal(at(c.wake)) {
				t.Errorf("wake %v, want second %d", p.Wake, c.wake)
			}
			if p.Done != strings.HasSuffix(c.want, "Finish") {
				t.Errorf("done: %v", p.Done)
			}
		})
	}
}

func TestDeadline(t *testing.T) {
	p := pod(corev1.RestartPolicyAlways, "a")
	d := int64(60)
	p.Spec.ActiveDeadlineSeconds = &d
	start := metav1.NewTime(t0)
	in := Input{Pod: p, Old: &corev1.PodStatus{StartTime: &start}, Now: at(59), Observed: Observed{Sandboxes: []Sandbox{box("s", 0, true)}, Containers: []Container{running("a", "s", 0)}}}
	if plan := Step(in); len(plan.Actions) != 0 || !plan.Wake.Equal(at(60)) {
		t.Errorf("before: %s, wake %v", actions(plan), plan.Wake)
	}
	in.Now = at(60)
	if plan := Step(in); actions(plan) != "Kill [a] grace 30" || plan.Status.Phase != corev1.PodFailed || plan.Status.Reason != "DeadlineExceeded" {
		t.Errorf("after: %s, %s %s", actions(plan), plan.Status.Phase, plan.Status.Reason)
	}
}

func TestBackoff(t *testing.T) {
	var r desired.ContainerRecord
	now := t0
	var got []time.Duration
	for range 8 { // it always ends one second after its start
		if until, in := InBackoff(r, now, now); in {
			now = until
		}
		r = NextBackoff(r, now, now)
		got = append(got, r.Backoff)
		now = now.Add(time.Second)
	}
	want := "[10s 20s 40s 1m20s 2m40s 5m0s 5m0s 5m0s]"
	if fmt.Sprint(got) != want {
		t.Errorf("got %v, want %v", got, want)
	}
	// After it ran for more than ten minutes all is forgotten.
	fin := r.BackoffAt.Add(10*time.Minute + time.Second)
	if _, in := InBackoff(r, fin, fin); in {
		t.Error("held back after it ran well")
	}
	if r = NextBackoff(r, fin, fin); r.Backoff != BackoffInitial {
		t.Errorf("back-off %v after it ran well", r.Backoff)
	}
}
