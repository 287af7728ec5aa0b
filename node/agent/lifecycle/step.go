package lifecycle

import (
	"fmt"
	"hash/fnv"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	"skein.io/skein/node/desired"
)

// Hash identifies the part of a container's spec whose change in a running pod restarts it: its image.
func Hash(c *corev1.Container) string {
	h := fnv.New64a()
	_, _ = h.Write([]byte(c.Name + "\x00" + c.Image))
	return strconv.FormatUint(h.Sum64(), 16)
}

// PodDesc names a pod in messages as kubelet does.
func PodDesc(p *corev1.Pod) string { return fmt.Sprintf("%s_%s(%s)", p.Name, p.Namespace, p.UID) }

// IsSidecar says whether an init container keeps running beside the others.
func IsSidecar(c *corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

// GraceSeconds is how long the pod may take to stop: what its deletion says, else its spec. At least 1, so that there is
// one signal before the kill.
func GraceSeconds(p *corev1.Pod) int64 {
	g := int64(30)
	switch {
	case p.DeletionGracePeriodSeconds != nil:
		g = *p.DeletionGracePeriodSeconds
	case p.Spec.TerminationGracePeriodSeconds != nil:
		g = *p.Spec.TerminationGracePeriodSeconds
	}
	return max(g, 1)
}

// view is the input of one step with what is looked up often.
type view struct {
	*Input
	plan Plan
	// sandbox is the newest one when it can be used, nil when a new one is needed.
	sandbox *Sandbox
	// current holds the newest container of each name in sandbox; latest that of all sandboxes.
	current, latest map[string]*Container
	// resizing: what was granted is not in force yet. restarting are the running containers that are restarted for it, by ID.
	resizing   bool
	restarting map[string]bool
}

func newView(in *Input) *view {
	v := &view{Input: in, current: map[string]*Container{}, latest: map[string]*Container{}}
	v.plan.Containers = make(map[string]desired.ContainerRecord, len(in.Containers))
	for n, r := range in.Containers {
		v.plan.Containers[n] = r
	}
	if len(in.Observed.Sandboxes) > 0 {
		s := &in.Observed.Sandboxes[0]
		ready := 0
		for i := range in.Observed.Sandboxes {
			if in.Observed.Sandboxes[i].Ready {
				ready++
			}
		}
		if s.Ready && ready == 1 && (s.HostNetwork || len(s.IPs) > 0) && s.HostNetwork == in.Pod.Spec.HostNetwork {
			v.sandbox = s
		}
	}
	for i := range in.Observed.Containers {
		c := &in.Observed.Containers[i]
		if v.latest[c.Name] == nil {
			v.latest[c.Name] = c
		}
		if v.sandbox != nil && c.SandboxID == v.sandbox.ID && v.current[c.Name] == nil {
			v.current[c.Name] = c
		}
		// The record may lack a container that was made just before a crash.
		if r, ok := v.plan.Containers[c.Name]; !ok || r.Restarts < c.Attempt {
			r.Restarts = c.Attempt
			v.plan.Containers[c.Name] = r
		}
	}
	return v
}

// Step decides the next step.
func Step(in Input) Plan {
	v := newView(&in)
	if in.Fail == nil {
		in.Fail = v.deadline()
	}
	terminal := in.Old != nil && isTerminal(in.Old.Phase) || isTerminal(in.Pod.Status.Phase)
	if in.Gone || in.Pod.DeletionTimestamp != nil || in.Fail != nil || terminal {
		v.terminate()
	} else {
		v.advance()
	}
	v.plan.Status = v.status()
	return v.plan
}

func isTerminal(p corev1.PodPhase) bool { return p == corev1.PodSucceeded || p == corev1.PodFailed }

// deadline fails a pod that was active for longer than its spec allows.
func (v *view) deadline() *Verdict {
	d := v.Pod.Spec.ActiveDeadlineSeconds
	if d == nil || v.Old == nil || v.Old.StartTime == nil {
		return nil
	}
	end := v.Old.StartTime.Add(time.Duration(*d) * time.Second)
	if v.Now.Before(end) {
		v.plan.wake(end)
		return nil
	}
	return &Verdict{"DeadlineExceeded", "Pod was active on the node longer than the specified deadline"}
}

// terminate stops everything, then releases what the pod holds.
func (v *view) terminate() {
	v.plan.Terminating = true
	var main, other []Victim
	sidecars := map[string]Victim{}
	for i := range v.Observed.Containers {
		c := &v.Observed.Containers[i]
		if c.State == Exited || c.State == Created {
			continue
		}
		vic := Victim{ID: c.ID, Name: c.Name, Reason: "Stopping container " + c.Name}
		switch ic := initContainer(v.Pod, c.Name); {
		case ic == nil:
			main = append(main, vic)
		case IsSidecar(ic) && sidecars[c.Name].ID == "":
			sidecars[c.Name] = vic
		default:
			other = append(other, vic)
		}
	}
	if len(main)+len(other)+len(sidecars) > 0 {
		var groups [][]Victim
		if first := append(main, other...); len(first) > 0 {
			groups = append(groups, first)
		}
		for i := len(v.Pod.Spec.InitContainers) - 1; i >= 0; i-- { // sidecars stop last, in reverse
			if vic, ok := sidecars[v.Pod.Spec.InitContainers[i].Name]; ok {
				groups = append(groups, []Victim{vic})
			}
		}
		grace := GraceSeconds(v.Pod)
		if v.Gone && v.Pod.DeletionTimestamp != nil {
			grace = 1 // somebody deleted it by force while it was being deleted: nobody waits for it any more
		}
		v.plan.Actions = append(v.plan.Actions, Action{Kind: Kill, Groups: groups, Grace: grace})
		return
	}
	if v.stopSandboxes() {
		return
	}
	v.plan.Done = true
	v.plan.Actions = append(v.plan.Actions, Action{Kind: Finish})
}

// stopSandboxes stops all ready sandboxes.
func (v *view) stopSandboxes() bool {
	any := false
	for i := range v.Observed.Sandboxes {
		if s := &v.Observed.Sandboxes[i]; s.Ready {
			v.plan.Actions = append(v.plan.Actions, Action{Kind: StopSandbox, SandboxID: s.ID})
			any = true
		}
	}
	return any
}

// advance brings a pod closer to running.
func (v *view) advance() {
	if v.sandbox == nil {
		v.newSandbox()
		return
	}
	v.resize()
	v.startEphemeral()
	initialized := v.initContainers()
	if v.plan.Terminating || !initialized {
		return
	}
	v.mainContainers()
}

// newSandbox replaces a sandbox that is missing or dead, unless nothing would run in it.
func (v *view) newSandbox() {
	if !v.worthSandbox() {
		v.terminate()
		return
	}
	// What still runs beside a dead sandbox (a dead pause process leaves containers running) goes first.
	var left []Victim
	for i := range v.Observed.Containers {
		if c := &v.Observed.Containers[i]; c.State == Running || c.State == Unknown {
			left = append(left, Victim{ID: c.ID, Name: c.Name, Reason: "Pod sandbox changed, it will be killed and re-created."})
		}
	}
	if len(left) > 0 {
		v.plan.Events = append(v.plan.Events, Event{Type: corev1.EventTypeNormal, Reason: "SandboxChanged", Message: "Pod sandbox changed, it will be killed and re-created."})
		v.plan.Actions = append(v.plan.Actions, Action{Kind: Kill, Groups: [][]Victim{left}, Grace: GraceSeconds(v.Pod)})
		return
	}
	if v.stopSandboxes() {
		return
	}
	if w := v.SandboxWait; w != nil && v.Now.Before(w.Until) {
		v.plan.wake(w.Until)
		return
	}
	attempt := int32(0)
	if len(v.Observed.Sandboxes) > 0 {
		attempt = int32(v.Observed.Sandboxes[0].Attempt) + 1
	}
	v.plan.Actions = append(v.plan.Actions, Action{Kind: CreateSandbox, Attempt: attempt})
}

// worthSandbox says whether any container would run in a new sandbox.
func (v *view) worthSandbox() bool {
	if v.Pod.Spec.RestartPolicy == corev1.RestartPolicyNever && len(v.plan.Containers) > 0 {
		return false
	}
	for i := range v.Pod.Spec.Containers {
		if !v.over(v.Pod.Spec.Containers[i].Name) {
			return true
		}
	}
	return false
}

// over says whether a container ended and its policy does not restart it. When the runtime lost the container, the status
// that was decided before counts.
func (v *view) over(name string) bool {
	c := v.latest[name]
	if c == nil && v.Old != nil {
		if t := containerStatus(v.Old.ContainerStatuses, name).State.Terminated; t != nil {
			c = &Container{State: Exited, ExitCode: t.ExitCode}
		}
	}
	return c != nil && c.State == Exited && !v.restarts(c)
}

// started says whether a running container passed its startup probe.
func (v *view) started(spec *corev1.Container, c *Container) bool {
	return c != nil && c.State == Running && (spec.StartupProbe == nil || v.Probes[c.ID].Startup == Success)
}

// podInitialized says whether any regular container was made in this sandbox.
func (v *view) podInitialized() bool {
	for i := range v.Pod.Spec.Containers {
		if v.current[v.Pod.Spec.Containers[i].Name] != nil {
			return true
		}
	}
	return false
}

// initContainers runs the init containers in order and keeps the sidecars alive. It reports whether the regular containers
// may run.
func (v *view) initContainers() bool {
	before := v.podInitialized()
	for i := range v.Pod.Spec.InitContainers {
		spec := &v.Pod.Spec.InitContainers[i]
		c := v.current[spec.Name]
		if IsSidecar(spec) {
			if c == nil || c.State == Exited || c.State == Unknown {
				if !before || v.wanted() {
					v.start(spec, c)
				}
			} else if c.State == Running {
				v.unhealthy(spec, c)
			}
			if !before && !v.started(spec, c) {
				return false
			}
			continue
		}
		if before {
			continue
		}
		switch {
		case c == nil, c.State == Unknown:
			v.start(spec, c)
			return false
		case c.State == Exited && c.ExitCode != 0:
			if v.Pod.Spec.RestartPolicy == corev1.RestartPolicyNever {
				v.terminate() // the pod has failed
				return false
			}
			v.start(spec, c)
			return false
		case c.State != Exited:
			return false
		}
	}
	return true
}

// wanted says whether a regular container runs or will be started: sidecars are not restarted for a pod that is over.
func (v *view) wanted() bool {
	for i := range v.Pod.Spec.Containers {
		c := v.current[v.Pod.Spec.Containers[i].Name]
		if c == nil || c.State == Running || c.State == Created || v.restarts(c) {
			return true
		}
	}
	return false
}

// restarts says whether the pod's policy restarts a container that does not run.
func (v *view) restarts(c *Container) bool {
	if c == nil || c.State == Unknown || v.Again[c.ID] {
		return true
	}
	switch v.Pod.Spec.RestartPolicy {
	case corev1.RestartPolicyNever:
		return false
	case corev1.RestartPolicyOnFailure:
		return c.ExitCode != 0
	}
	return true
}

func (v *view) mainContainers() {
	alive := 0
	for i := range v.Pod.Spec.Containers {
		spec := &v.Pod.Spec.Containers[i]
		c := v.current[spec.Name]
		switch {
		case c == nil:
			if v.over(spec.Name) {
				continue // it ended for good in a former sandbox
			}
			v.start(spec, v.latest[spec.Name])
			alive++
		case c.State == Running:
			v.unhealthy(spec, c)
			alive++
		case c.State == Created:
			// Made by a daemon that died before it started it: make another.
			v.start(spec, c)
			alive++
		case v.restarts(c):
			v.start(spec, c)
			alive++
		}
	}
	if alive == 0 {
		v.terminate()
	}
}

// unhealthy stops a running container that failed a probe or whose spec changed; a later step restarts it if the policy says.
func (v *view) unhealthy(spec *corev1.Container, c *Container) {
	if v.restarting[c.ID] {
		return // it is stopped and started anyway
	}
	p := v.Probes[c.ID]
	grace := GraceSeconds(v.Pod)
	override := func(pr *corev1.Probe) {
		if pr.TerminationGracePeriodSeconds != nil {
			grace = max(*pr.TerminationGracePeriodSeconds, 1)
		}
	}
	var why string
	switch {
	case c.Hash != "" && c.Hash != Hash(spec):
		why = fmt.Sprintf("Container %s definition changed", spec.Name)
	case spec.LivenessProbe != nil && p.Liveness == Failure:
		why = fmt.Sprintf("Container %s failed liveness probe", spec.Name)
		override(spec.LivenessProbe)
	case spec.StartupProbe != nil && p.Startup == Failure:
		why = fmt.Sprintf("Container %s failed startup probe", spec.Name)
		override(spec.StartupProbe)
	default:
		return
	}
	if v.Pod.Spec.RestartPolicy != corev1.RestartPolicyNever || IsSidecar(spec) {
		why += ", will be restarted"
	}
	v.plan.Actions = append(v.plan.Actions, Action{Kind: Kill, Groups: [][]Victim{{{ID: c.ID, Name: c.Name, Reason: why}}}, Grace: grace})
}

// start plans the start of a container after prev, its latest instance, unless it has to wait.
func (v *view) start(spec *corev1.Container, prev *Container) {
	rec, made := v.plan.Containers[spec.Name]
	if w, ok := v.Waits[spec.Name]; ok && v.Now.Before(w.Until) {
		v.plan.wake(w.Until)
		return
	}
	if prev != nil && prev.State == Exited && !v.Again[prev.ID] {
		if until, in := InBackoff(rec, prev.FinishedAt, v.Now); in {
			v.plan.wake(until)
			return
		}
		rec = NextBackoff(rec, prev.FinishedAt, v.Now)
	}
	if made {
		rec.Restarts++
	}
	v.plan.Actions = append(v.plan.Actions, Action{Kind: Start, SandboxID: v.sandbox.ID, Container: spec.Name, Attempt: rec.Restarts, Record: rec})
}

// startEphemeral starts ephemeral containers, each once.
func (v *view) startEphemeral() {
	for i := range v.Pod.Spec.EphemeralContainers {
		name := v.Pod.Spec.EphemeralContainers[i].Name
		if v.latest[name] != nil {
			continue
		}
		if w, ok := v.Waits[name]; ok && v.Now.Before(w.Until) {
			v.plan.wake(w.Until)
			continue
		}
		v.plan.Actions = append(v.plan.Actions, Action{Kind: Start, SandboxID: v.sandbox.ID, Container: name})
	}
}

func initContainer(p *corev1.Pod, name string) *corev1.Container {
	for i := range p.Spec.InitContainers {
		if p.Spec.InitContainers[i].Name == name {
			return &p.Spec.InitContainers[i]
		}
	}
	return nil
}
