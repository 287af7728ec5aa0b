package agent

import (
	"context"
	"fmt"
	"path/filepath"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/agent/cgroup"
)

// Paths hidden and read-only in a container's /proc and /sys: kubelet's pkg/securitycontext. CRI applies none by itself.
var (
	maskedPaths = []string{"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

// linuxConfig is the Linux part of a container: who it runs as, what it may do, what it may use.
func (w *worker) linuxConfig(ctx context.Context, pod *corev1.Pod, spec *corev1.Container) (*runtimeapi.LinuxContainerConfig, error) {
	uid, user, err := w.imageUser(ctx, spec.Image)
	if err != nil {
		return nil, err
	}
	sc, err := w.containerSecurity(pod, spec)
	if err != nil {
		return nil, err
	}
	if err := verifyNonRoot(pod, spec, uid, user); err != nil {
		return nil, err
	}
	if sc.RunAsUser == nil && sc.RunAsUsername == "" { // as kubelet: what the image says, so that the group can be told too
		if uid != nil {
			sc.RunAsUser = &runtimeapi.Int64Value{Value: *uid}
		} else {
			sc.RunAsUsername = user
		}
	}
	return &runtimeapi.LinuxContainerConfig{Resources: resources(pod, spec, w.a.memoryCapacity()), SecurityContext: sc}, nil
}

// imageUser is the user that the image names.
func (w *worker) imageUser(ctx context.Context, image string) (*int64, string, error) {
	r, err := w.a.cfg.Images.ImageStatus(ctx, &runtimeapi.ImageSpec{Image: image}, false)
	if err != nil {
		return nil, "", fmt.Errorf("inspect image %q: %w", image, err)
	}
	if r.GetImage() == nil {
		return nil, "", fmt.Errorf("image %q is gone", image)
	}
	if u := r.Image.GetUid(); u != nil {
		return &u.Value, "", nil
	}
	if n := r.Image.GetUsername(); n != "" {
		return nil, n, nil
	}
	root := int64(0)
	return &root, "", nil
}

// effective is the security context of a container after the pod's was merged in.
func effective(pod *corev1.Pod, spec *corev1.Container) corev1.SecurityContext {
	var e corev1.SecurityContext
	if spec.SecurityContext != nil {
		e = *spec.SecurityContext
	}
	p := pod.Spec.SecurityContext
	if p == nil {
		return e
	}
	if e.RunAsUser == nil {
		e.RunAsUser = p.RunAsUser
	}
	if e.RunAsGroup == nil {
		e.RunAsGroup = p.RunAsGroup
	}
	if e.RunAsNonRoot == nil {
		e.RunAsNonRoot = p.RunAsNonRoot
	}
	if e.SeccompProfile == nil {
		e.SeccompProfile = p.SeccompProfile
	}
	if e.SELinuxOptions == nil {
		e.SELinuxOptions = p.SELinuxOptions
	}
	if e.AppArmorProfile == nil {
		e.AppArmorProfile = p.AppArmorProfile
	}
	return e
}

func verifyNonRoot(pod *corev1.Pod, spec *corev1.Container, uid *int64, user string) error {
	e := effective(pod, spec)
	if !isTrue(e.RunAsNonRoot) {
		return nil
	}
	desc := fmt.Sprintf("(pod: %q, container: %s)", pod.Name+"_"+pod.Namespace+"("+string(pod.UID)+")", spec.Name)
	switch {
	case e.RunAsUser != nil && *e.RunAsUser == 0:
		return fmt.Errorf("container's runAsUser breaks non-root policy %s", desc)
	case e.RunAsUser != nil:
		return nil
	case uid != nil && *uid == 0:
		return fmt.Errorf("container has runAsNonRoot and image will run as root %s", desc)
	case uid == nil && user != "":
		return fmt.Errorf("container has runAsNonRoot and image has non-numeric user (%s), cannot verify user is non-root %s", user, desc)
	}
	return nil
}

func (w *worker) containerSecurity(pod *corev1.Pod, spec *corev1.Container) (*runtimeapi.LinuxContainerSecurityContext, error) {
	e := effective(pod, spec)
	sc := &runtimeapi.LinuxContainerSecurityContext{
		NamespaceOptions: namespaces(pod),
		Privileged:       isTrue(e.Privileged),
		ReadonlyRootfs:   isTrue(e.ReadOnlyRootFilesystem),
		NoNewPrivs:       e.AllowPrivilegeEscalation != nil && !*e.AllowPrivilegeEscalation,
		SelinuxOptions:   selinux(e.SELinuxOptions),
	}
	if target := targetContainer(pod, spec.Name); target != "" {
		for i := range w.observed.Containers {
			if c := &w.observed.Containers[i]; c.Name == target {
				sc.NamespaceOptions.Pid, sc.NamespaceOptions.TargetId = runtimeapi.NamespaceMode_TARGET, c.ID
				break
			}
		}
	}
	if e.RunAsUser != nil {
		sc.RunAsUser = &runtimeapi.Int64Value{Value: *e.RunAsUser}
	}
	if e.RunAsGroup != nil {
		sc.RunAsGroup = &runtimeapi.Int64Value{Value: *e.RunAsGroup}
	}
	if p := pod.Spec.SecurityContext; p != nil {
		sc.SupplementalGroups = append(sc.SupplementalGroups, p.SupplementalGroups...)
		if p.FSGroup != nil {
			sc.SupplementalGroups = append(sc.SupplementalGroups, *p.FSGroup)
		}
		sc.SupplementalGroupsPolicy = groupsPolicy(p)
	}
	if c := e.Capabilities; c != nil {
		sc.Capabilities = &runtimeapi.Capability{}
		for _, a := range c.Add {
			sc.Capabilities.AddCapabilities = append(sc.Capabilities.AddCapabilities, string(a))
		}
		for _, d := range c.Drop {
			sc.Capabilities.DropCapabilities = append(sc.Capabilities.DropCapabilities, string(d))
		}
	}
	if !sc.Privileged && (e.ProcMount == nil || *e.ProcMount == corev1.DefaultProcMount) {
		sc.MaskedPaths, sc.ReadonlyPaths = maskedPaths, readonlyPaths
	}
	sc.Apparmor = apparmor(e.AppArmorProfile)
	var err error
	sc.Seccomp, err = w.a.seccomp(e.SeccompProfile, sc.Privileged)
	return sc, err
}

func targetContainer(pod *corev1.Pod, name string) string {
	for i := range pod.Spec.EphemeralContainers {
		if pod.Spec.EphemeralContainers[i].Name == name {
			return pod.Spec.EphemeralContainers[i].TargetContainerName
		}
	}
	return ""
}

// seccomp turns a profile into CRI's. Without one a container is unconfined, as by kubelet's default.
func (a *Agent) seccomp(p *corev1.SeccompProfile, privileged bool) (*runtimeapi.SecurityProfile, error) {
	out := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
	if privileged || p == nil {
		return out, nil
	}
	switch p.Type {
	case corev1.SeccompProfileTypeRuntimeDefault:
		out.ProfileType = runtimeapi.SecurityProfile_RuntimeDefault
	case corev1.SeccompProfileTypeLocalhost:
		if p.LocalhostProfile == nil || *p.LocalhostProfile == "" {
			return nil, fmt.Errorf("localhostProfile must be set if seccompProfile type is Localhost")
		}
		out.ProfileType = runtimeapi.SecurityProfile_Localhost
		out.LocalhostRef = filepath.Join(a.cfg.StateDir, "seccomp", *p.LocalhostProfile)
	}
	return out, nil
}

// apparmor passes an explicit profile on; a runtime that cannot enforce it says so.
func apparmor(p *corev1.AppArmorProfile) *runtimeapi.SecurityProfile {
	if p == nil {
		return nil
	}
	switch p.Type {
	case corev1.AppArmorProfileTypeUnconfined:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
	case corev1.AppArmorProfileTypeLocalhost:
		out := &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost}
		if p.LocalhostProfile != nil {
			out.LocalhostRef = *p.LocalhostProfile
		}
		return out
	}
	return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
}

func selinux(o *corev1.SELinuxOptions) *runtimeapi.SELinuxOption {
	if o == nil {
		return nil
	}
	return &runtimeapi.SELinuxOption{User: o.User, Role: o.Role, Type: o.Type, Level: o.Level}
}

// Bounds of CPU settings, the kernel's.
const (
	minShares = 2
	maxShares = 262144
	minQuota  = 1000 // microseconds
)

// resources turns requests and limits into cgroup settings.
func resources(pod *corev1.Pod, spec *corev1.Container, memory int64) *runtimeapi.LinuxContainerResources {
	req, lim := spec.Resources.Requests, spec.Resources.Limits
	r := &runtimeapi.LinuxContainerResources{}
	cpu := req.Cpu().MilliValue()
	if _, ok := req[corev1.ResourceCPU]; !ok {
		cpu = lim.Cpu().MilliValue()
	}
	r.CpuShares = min(max(cpu*1024/1000, minShares), maxShares)
	if l := lim.Cpu().MilliValue(); l > 0 {
		r.CpuPeriod = cgroup.CPUPeriod
		r.CpuQuota = max(l*cgroup.CPUPeriod/1000, minQuota)
	}
	if l := lim.Memory().Value(); l > 0 {
		r.MemoryLimitInBytes, r.MemorySwapLimitInBytes = l, l // no swap
	}
	r.OomScoreAdj = oomScore(pod, req.Memory().Value(), memory)
	return r
}

// oomScore is kubelet's rule, except that no pod is put before the node's own processes (which needs a privilege that a
// nested node lacks): nothing below 0.
func oomScore(pod *corev1.Pod, request, capacity int64) int64 {
	switch pod.Status.QOSClass {
	case corev1.PodQOSGuaranteed:
		return 0
	case corev1.PodQOSBestEffort:
		return 1000
	}
	if capacity <= 0 {
		return 999
	}
	return min(max(1000-1000*request/capacity, 3), 999)
}
