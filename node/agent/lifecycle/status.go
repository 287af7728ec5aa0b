package lifecycle

import (
	"sort"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Reasons in container statuses.
const (
	reasonCreating       = "ContainerCreating"
	reasonInitializing   = "PodInitializing"
	reasonCompleted      = "Completed"
	reasonError          = "Error"
	reasonOOM            = "OOMKilled"
	reasonStatusUnknown  = "ContainerStatusUnknown"
	reasonCrashLoop      = "CrashLoopBackOff"
	containerIDPrefix    = "containerd://"
	exitKilled           = 137
	messageNotLocated    = "The container could not be located when the pod was terminated"
	messageNotLocatedOld = "The container could not be located when the pod was deleted.  The container used to be Running"
)

// ContainerID is a container's ID as the API shows it.
func ContainerID(id string) string { return containerIDPrefix + id }

func containerStatus(all []corev1.ContainerStatus, name string) corev1.ContainerStatus {
	for i := range all {
		if all[i].Name == name {
			return all[i]
		}
	}
	return corev1.ContainerStatus{}
}

// status decides the pod's status.
func (v *view) status() corev1.PodStatus {
	old := v.Old
	if old == nil {
		old = &v.Pod.Status
	}
	s := corev1.PodStatus{
		ObservedGeneration: v.Pod.Generation,
		StartTime:          old.StartTime,
		QOSClass:           v.Pod.Status.QOSClass,
		NominatedNodeName:  v.Pod.Status.NominatedNodeName,
		PodIP:              old.PodIP,
		PodIPs:             old.PodIPs,
	}
	if s.StartTime == nil {
		now := metav1.NewTime(v.Now).Rfc3339Copy()
		s.StartTime = &now
	}
	v.addresses(&s)
	hasInit := len(v.Pod.Spec.InitContainers) > 0
	s.InitContainerStatuses = v.containerStatuses(v.Pod.Spec.InitContainers, old.InitContainerStatuses, hasInit, true)
	s.ContainerStatuses = v.containerStatuses(v.Pod.Spec.Containers, old.ContainerStatuses, hasInit, false)
	sort.Slice(s.ContainerStatuses, func(i, j int) bool { return s.ContainerStatuses[i].Name < s.ContainerStatuses[j].Name })
	s.EphemeralContainerStatuses = v.containerStatuses(ephemeral(v.Pod), old.EphemeralContainerStatuses, hasInit, false)
	v.phase(&s, old)
	s.Conditions = v.conditions(&s, old)
	return s
}

func ephemeral(p *corev1.Pod) []corev1.Container {
	out := make([]corev1.Container, len(p.Spec.EphemeralContainers))
	for i := range p.Spec.EphemeralContainers {
		out[i] = corev1.Container(p.Spec.EphemeralContainers[i].EphemeralContainerCommon)
	}
	return out
}

func (v *view) addresses(s *corev1.PodStatus) {
	if len(v.HostIPs) > 0 {
		s.HostIP = v.HostIPs[0]
		s.HostIPs = nil
		for _, ip := range v.HostIPs {
			s.HostIPs = append(s.HostIPs, corev1.HostIP{IP: ip})
		}
	}
	ips := []string(nil)
	if v.Pod.Spec.HostNetwork {
		ips = v.HostIPs
	} else if v.sandbox != nil {
		ips = v.sandbox.IPs
	}
	if len(ips) > 0 {
		s.PodIP = ips[0]
		s.PodIPs = nil
		for _, ip := range ips {
			s.PodIPs = append(s.PodIPs, corev1.PodIP{IP: ip})
		}
	}
}

func (v *view) containerStatuses(specs []corev1.Container, old []corev1.ContainerStatus, hasInit, isInit bool) []corev1.ContainerStatus {
	if len(specs) == 0 {
		return nil
	}
	out := make([]corev1.ContainerStatus, 0, len(specs))
	for i := range specs {
		out = append(out, v.containerStatus(&specs[i], containerStatus(old, specs[i].Name), hasInit, isInit))
	}
	return out
}

// containerStatus merges what runs with what was known.
func (v *view) containerStatus(spec *corev1.Container, old corev1.ContainerStatus, hasInit, isInit bool) corev1.ContainerStatus {
	c, prev := v.newest(spec.Name)
	var s corev1.ContainerStatus
	switch {
	case c != nil:
		s = convert(c, old)
		if prev != nil && prev.State == Exited {
			s.LastTerminationState = corev1.ContainerState{Terminated: terminated(prev, old)}
		}
	default:
		s = v.missing(spec, old, hasInit)
	}
	s.VolumeMounts = volumeMounts(spec)
	s.Resources = old.Resources
	if c != nil && c.State != Running {
		s.Resources = nil
	}
	if c != nil {
		s.Resources = v.inForce(spec, c)
		if len(s.Resources.Limits)+len(s.Resources.Requests)+len(s.Resources.Claims) == 0 {
			s.Resources = &corev1.ResourceRequirements{}
		}
		if len(spec.Resources.Requests) > 0 {
			s.AllocatedResources = spec.Resources.Requests.DeepCopy()
		}
	}
	v.waiting(spec, c, &s)
	started := v.started(spec, c)
	s.Started = &started
	switch {
	case isInit && !IsSidecar(spec):
		s.Ready = s.State.Terminated != nil && s.State.Terminated.ExitCode == 0
	case started:
		s.Ready = spec.ReadinessProbe == nil || v.Probes[c.ID].Readiness == Success
	}
	return s
}

// newest returns the latest container of a name and the one before it.
func (v *view) newest(name string) (c, prev *Container) {
	for i := range v.Observed.Containers {
		o := &v.Observed.Containers[i]
		if o.Name != name {
			continue
		}
		if c == nil {
			c = o
			continue
		}
		return c, o
	}
	return c, nil
}

func convert(c *Container, old corev1.ContainerStatus) corev1.ContainerStatus {
	s := corev1.ContainerStatus{Name: c.Name, RestartCount: max(c.Attempt, 0), Image: c.Image, ImageID: c.ImageID, ContainerID: ContainerID(c.ID)}
	if old.ContainerID != s.ContainerID && old.State.Terminated != nil {
		s.LastTerminationState = old.State // its container was removed meanwhile
	} else {
		s.LastTerminationState = old.LastTerminationState
	}
	switch c.State {
	case Running:
		s.State.Running = &corev1.ContainerStateRunning{StartedAt: metav1.NewTime(c.StartedAt).Rfc3339Copy()}
	case Exited:
		s.State.Terminated = terminated(c, old)
	case Unknown:
		if old.State.Running != nil {
			s.State.Terminated = &corev1.ContainerStateTerminated{Reason: reasonStatusUnknown, Message: messageNotLocated, ExitCode: exitKilled, ContainerID: s.ContainerID}
			break
		}
		s.State.Waiting = &corev1.ContainerStateWaiting{}
	default:
		s.State.Waiting = &corev1.ContainerStateWaiting{}
	}
	return s
}

// terminated describes an ended container. Once told it is not told differently: its message file goes with the pod's
// directory.
func terminated(c *Container, old corev1.ContainerStatus) *corev1.ContainerStateTerminated {
	id := ContainerID(c.ID)
	for _, t := range []*corev1.ContainerStateTerminated{old.State.Terminated, old.LastTerminationState.Terminated} {
		if t != nil && t.ContainerID == id {
			return t
		}
	}
	reason := c.Reason
	// The runtime says OOMKilled when any process of the container was; the container itself was only with this exit code.
	if reason == "" || reason == reasonOOM && c.ExitCode != exitKilled {
		reason = reasonError
		if c.ExitCode == 0 {
			reason = reasonCompleted
		}
	}
	return &corev1.ContainerStateTerminated{ExitCode: c.ExitCode, Reason: reason, Message: c.Message,
		StartedAt: metav1.NewTime(c.StartedAt).Rfc3339Copy(), FinishedAt: metav1.NewTime(c.FinishedAt).Rfc3339Copy(), ContainerID: id}
}

// missing is the status of a container that the runtime does not have.
func (v *view) missing(spec *corev1.Container, old corev1.ContainerStatus, hasInit bool) corev1.ContainerStatus {
	s := corev1.ContainerStatus{Name: spec.Name, Image: spec.Image, RestartCount: old.RestartCount, LastTerminationState: old.LastTerminationState}
	if rec, ok := v.plan.Containers[spec.Name]; ok && rec.Restarts > s.RestartCount {
		s.RestartCount = rec.Restarts
	}
	if old.State.Terminated != nil {
		return old
	}
	s.State.Waiting = &corev1.ContainerStateWaiting{Reason: reasonCreating}
	if hasInit {
		s.State.Waiting.Reason = reasonInitializing
	}
	if old.State.Running == nil {
		return s
	}
	// It ran, and nobody can tell how it ended.
	t := &corev1.ContainerStateTerminated{Reason: reasonStatusUnknown, Message: messageNotLocated, ExitCode: exitKilled,
		ContainerID: old.ContainerID}
	if v.plan.Terminating || !v.restarts(&Container{State: Exited, ExitCode: exitKilled}) {
		s.State = corev1.ContainerState{Terminated: t}
		s.ContainerID, s.ImageID = old.ContainerID, old.ImageID
		return s
	}
	t.Message = messageNotLocatedOld
	s.LastTerminationState = corev1.ContainerState{Terminated: t}
	return s
}

// waiting replaces the state of a container that should run but does not by the reason why.
func (v *view) waiting(spec *corev1.Container, c *Container, s *corev1.ContainerStatus) {
	if v.plan.Terminating || c != nil && c.State == Running {
		return
	}
	sidecarOrMain := IsSidecar(spec) || initContainer(v.Pod, spec.Name) == nil
	if c != nil && c.State == Exited && (sidecarOrMain && !v.restarts(c) && !IsSidecar(spec) || !sidecarOrMain && (c.ExitCode == 0 || v.Pod.Spec.RestartPolicy == corev1.RestartPolicyNever)) {
		return
	}
	w, ok := v.Waits[spec.Name]
	if c != nil && c.State == Exited && !ok && !v.Again[c.ID] {
		rec := v.plan.Containers[spec.Name]
		if _, in := InBackoff(rec, c.FinishedAt, v.Now); in {
			w = Wait{Reason: reasonCrashLoop, Message: "back-off " + rec.Backoff.String() + " restarting failed container=" + spec.Name + " pod=" + PodDesc(v.Pod)}
			ok = true
		}
	}
	if !ok {
		return
	}
	if s.State.Terminated != nil {
		s.LastTerminationState = s.State
	}
	s.State = corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: w.Reason, Message: w.Message}}
}

func volumeMounts(spec *corev1.Container) []corev1.VolumeMountStatus {
	var out []corev1.VolumeMountStatus
	for _, m := range spec.VolumeMounts {
		st := corev1.VolumeMountStatus{Name: m.Name, MountPath: m.MountPath, ReadOnly: m.ReadOnly}
		if m.ReadOnly {
			mode := corev1.RecursiveReadOnlyDisabled
			st.RecursiveReadOnly = &mode
		}
		out = append(out, st)
	}
	return out
}
