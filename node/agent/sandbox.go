package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	resourcehelper "k8s.io/component-helpers/resource"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/agent/cgroup"
	"skein.io/skein/node/desired"
	"skein.io/skein/node/volume"
)

// networkPoll is how often a pod looks whether the network has become ready.
const networkPoll = 500 * time.Millisecond

// createSandbox makes everything that a pod needs before its containers: cgroup, volumes, sandbox.
func (w *worker) createSandbox(ctx context.Context, pod *corev1.Pod, attempt uint32) error {
	if ok, why := w.a.cfg.NetworkReady(); !ok && !pod.Spec.HostNetwork {
		w.eventOnce(pod, "", corev1.EventTypeWarning, "NetworkNotReady", "network is not ready: "+why)
		return &waitError{networkPoll, fmt.Errorf("network is not ready: %s", why)}
	}
	if err := devices(pod); err != nil {
		w.eventOnce(pod, "", corev1.EventTypeWarning, "FailedPrepareDynamicResources", "Failed to prepare dynamic resources: "+err.Error())
		return fmt.Errorf("prepare dynamic resources: %w", err)
	}
	if err := w.a.cgroups.Ensure(string(pod.UID), podLimits(pod)); err != nil {
		w.eventOnce(pod, "", corev1.EventTypeWarning, "FailedCreatePodContainer", err.Error())
		return err
	}
	if old := w.a.cfg.Desired.Record(w.uid); old != nil {
		next := *old // no container has anything any more: each gets what the pod has now
		next.Actuated = &desired.Resources{Pod: pod.Spec.Resources}
		w.a.cfg.Desired.PutRecord(&next)
	}
	if err := w.setupVolumes(ctx, pod); err != nil {
		return err
	}
	cfg, err := w.sandboxConfig(pod, attempt)
	if err != nil {
		w.eventOnce(pod, "", corev1.EventTypeWarning, "FailedCreatePodSandBox", "Failed to create pod sandbox: "+err.Error())
		return err
	}
	if err := os.MkdirAll(cfg.LogDirectory, 0o755); err != nil {
		return fmt.Errorf("make log directory: %w", err)
	}
	select {
	case w.a.starts <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-w.a.starts }()
	if _, err := w.a.cfg.Runtime.RunPodSandbox(ctx, cfg, ""); err != nil {
		if ctx.Err() == nil {
			w.eventOnce(pod, "", corev1.EventTypeWarning, "FailedCreatePodSandBox", "Failed to create pod sandbox: "+message(err))
		}
		return fmt.Errorf("run sandbox: %w", err)
	}
	return nil
}

// devices refuses a pod that claims some: this agent runs no drivers of dynamic resources, and a pod must not run without what it asked for.
func devices(pod *corev1.Pod) error {
	var claims []string
	for _, c := range pod.Spec.ResourceClaims {
		claims = append(claims, c.Name)
	}
	if x := pod.Status.ExtendedResourceClaimStatus; x != nil {
		claims = append(claims, x.ResourceClaimName)
	}
	if len(claims) == 0 {
		return nil
	}
	return fmt.Errorf("no DRA driver is registered on node %s; claims of the pod: %s", pod.Spec.NodeName, strings.Join(claims, ", "))
}

// setupVolumes makes the volumes or brings them up to date, and notes when that is due again.
func (w *worker) setupVolumes(ctx context.Context, pod *corev1.Pod) error {
	w.mu.Lock()
	w.stale = false
	w.mu.Unlock()
	next, err := w.a.volumes.Setup(ctx, pod, w.facts(pod))
	w.volumesAt = next
	if err == nil {
		return nil
	}
	var one *volume.Error
	for _, e := range unjoin(err) {
		msg := e.Error()
		if errors.As(e, &one) {
			msg = one.Error()
		}
		// What is only on its way here from the API is not worth an event: it wakes the pod when it comes.
		if ctx.Err() == nil && !errors.Is(e, desired.ErrUnknown) {
			w.eventOnce(pod, "", corev1.EventTypeWarning, "FailedMount", msg)
		}
	}
	return err
}

func unjoin(err error) []error {
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		return j.Unwrap()
	}
	return []error{err}
}

func (w *worker) facts(pod *corev1.Pod) volume.PodFacts {
	f := volume.PodFacts{HostIPs: w.a.cfg.hostIPs(), NodeName: w.a.cfg.NodeName, Allocatable: w.a.allocatable()}
	if n := w.a.cfg.Desired.Node(w.a.cfg.NodeName); n != nil {
		f.NodeLabels = n.Labels
	}
	switch {
	case pod.Spec.HostNetwork:
		f.PodIPs = f.HostIPs
	case len(w.observed.Sandboxes) > 0:
		f.PodIPs = w.observed.Sandboxes[0].IPs
	}
	return f
}

// podLimits are the limits of a pod's cgroup: a limit holds for the pod only when each container has one.
func podLimits(pod *corev1.Pod) cgroup.Limits {
	reqs := resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{})
	limits := resourcehelper.PodLimits(pod, resourcehelper.PodResourcesOptions{})
	l := cgroup.Limits{MilliCPURequest: reqs.Cpu().MilliValue()}
	cpu, mem := true, true
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			cpu = cpu && !list[i].Resources.Limits.Cpu().IsZero()
			mem = mem && !list[i].Resources.Limits.Memory().IsZero()
		}
	}
	if cpu || resourcehelper.IsPodLevelLimitsSet(pod) {
		l.MilliCPULimit = limits.Cpu().MilliValue()
	}
	if mem || resourcehelper.IsPodLevelLimitsSet(pod) {
		l.MemoryLimit = limits.Memory().Value()
	}
	return l
}

func (a *Agent) logDir(pod *corev1.Pod) string {
	return filepath.Join(a.cfg.StateDir, "logs", "pods", fmt.Sprintf("%s_%s_%s", pod.Namespace, pod.Name, pod.UID))
}

// sandboxConfig is what CRI is told of a pod.
func (w *worker) sandboxConfig(pod *corev1.Pod, attempt uint32) (*runtimeapi.PodSandboxConfig, error) {
	if rc := pod.Spec.RuntimeClassName; rc != nil && *rc != "" {
		return nil, fmt.Errorf("RuntimeClass %q: this node has only the default runtime", *rc)
	}
	if hu := pod.Spec.HostUsers; hu != nil && !*hu {
		return nil, errors.New("hostUsers is false: this node does not support user namespaces, and does not run such a pod without one")
	}
	dns, err := w.a.dnsConfig(pod)
	if err != nil {
		return nil, err
	}
	hostname, _ := w.a.hostname(pod)
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: pod.Name, Namespace: pod.Namespace, Uid: string(pod.UID), Attempt: attempt},
		LogDirectory: w.a.logDir(pod),
		DnsConfig:    dns,
		Labels:       podLabels(pod),
		Annotations:  podAnnotations(pod),
		Linux: &runtimeapi.LinuxPodSandboxConfig{CgroupParent: w.a.cgroups.Path(string(pod.UID)), Sysctls: map[string]string{},
			SecurityContext: sandboxSecurity(pod)},
	}
	if !pod.Spec.HostNetwork {
		cfg.Hostname = hostname // runc refuses one without a UTS namespace
		cfg.PortMappings = portMappings(pod)
	}
	if sc := pod.Spec.SecurityContext; sc != nil {
		for _, s := range sc.Sysctls {
			cfg.Linux.Sysctls[strings.ReplaceAll(s.Name, "/", ".")] = s.Value
		}
	}
	return cfg, nil
}

func podLabels(pod *corev1.Pod) map[string]string {
	l := make(map[string]string, len(pod.Labels)+3)
	for k, v := range pod.Labels {
		l[k] = v
	}
	l[labelPodName], l[labelPodNamespace], l[labelPodUID] = pod.Name, pod.Namespace, string(pod.UID)
	return l
}

func podAnnotations(pod *corev1.Pod) map[string]string {
	out := make(map[string]string, len(pod.Annotations)+1)
	for k, v := range pod.Annotations {
		out[k] = v
	}
	return out
}

func portMappings(pod *corev1.Pod) []*runtimeapi.PortMapping {
	var out []*runtimeapi.PortMapping
	for i := range pod.Spec.Containers {
		for _, p := range pod.Spec.Containers[i].Ports {
			if p.HostPort == 0 {
				continue
			}
			proto := runtimeapi.Protocol_TCP
			switch p.Protocol {
			case corev1.ProtocolUDP:
				proto = runtimeapi.Protocol_UDP
			case corev1.ProtocolSCTP:
				proto = runtimeapi.Protocol_SCTP
			}
			out = append(out, &runtimeapi.PortMapping{Protocol: proto, ContainerPort: p.ContainerPort, HostPort: p.HostPort, HostIp: p.HostIP})
		}
	}
	return out
}

// namespaces are the namespaces of a pod's sandbox and containers. Without a word CRI takes a PID namespace of the pod for
// granted, in which the death of the pause process kills everything.
func namespaces(pod *corev1.Pod) *runtimeapi.NamespaceOption {
	o := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER}
	if pod.Spec.ShareProcessNamespace != nil && *pod.Spec.ShareProcessNamespace {
		o.Pid = runtimeapi.NamespaceMode_POD
	}
	if pod.Spec.HostPID {
		o.Pid = runtimeapi.NamespaceMode_NODE
	}
	if pod.Spec.HostIPC {
		o.Ipc = runtimeapi.NamespaceMode_NODE
	}
	if pod.Spec.HostNetwork {
		o.Network = runtimeapi.NamespaceMode_NODE
	}
	return o
}

func sandboxSecurity(pod *corev1.Pod) *runtimeapi.LinuxSandboxSecurityContext {
	sc := &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: namespaces(pod), Privileged: anyPrivileged(pod),
		Seccomp: &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}}
	p := pod.Spec.SecurityContext
	if sc.Privileged {
		sc.Seccomp.ProfileType = runtimeapi.SecurityProfile_Unconfined
	}
	if p == nil {
		return sc
	}
	if p.RunAsUser != nil {
		sc.RunAsUser = &runtimeapi.Int64Value{Value: *p.RunAsUser}
	}
	if p.RunAsGroup != nil && p.RunAsUser != nil {
		sc.RunAsGroup = &runtimeapi.Int64Value{Value: *p.RunAsGroup}
	}
	sc.SupplementalGroups = append(sc.SupplementalGroups, p.SupplementalGroups...)
	if p.FSGroup != nil {
		sc.SupplementalGroups = append(sc.SupplementalGroups, *p.FSGroup)
	}
	sc.SupplementalGroupsPolicy = groupsPolicy(p)
	sc.SelinuxOptions = selinux(p.SELinuxOptions)
	return sc
}

func groupsPolicy(p *corev1.PodSecurityContext) runtimeapi.SupplementalGroupsPolicy {
	if p != nil && p.SupplementalGroupsPolicy != nil && *p.SupplementalGroupsPolicy == corev1.SupplementalGroupsPolicyStrict {
		return runtimeapi.SupplementalGroupsPolicy_Strict
	}
	return runtimeapi.SupplementalGroupsPolicy_Merge
}

func anyPrivileged(pod *corev1.Pod) bool {
	for _, list := range [][]corev1.Container{pod.Spec.InitContainers, pod.Spec.Containers} {
		for i := range list {
			if sc := list[i].SecurityContext; sc != nil && sc.Privileged != nil && *sc.Privileged {
				return true
			}
		}
	}
	return false
}

// remove takes a pod's dead containers, sandboxes and logs from the node.
func (w *worker) remove(ctx context.Context, pod *corev1.Pod) error {
	var errs []error
	for _, s := range w.observed.Sandboxes {
		if err := w.a.cfg.Runtime.RemovePodSandbox(ctx, s.ID); err != nil && !isNotFound(err) {
			errs = append(errs, fmt.Errorf("remove sandbox %s: %w", s.ID, err))
		}
	}
	errs = append(errs, os.RemoveAll(w.a.logDir(pod)))
	return errors.Join(errs...)
}
