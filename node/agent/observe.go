package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	kubetypes "k8s.io/kubelet/pkg/types"

	"skein.io/skein/node/agent/lifecycle"
)

// Labels and annotations of sandboxes and containers: kubelet's, so that tools which know those find their way.
const (
	labelPodName       = kubetypes.KubernetesPodNameLabel
	labelPodNamespace  = kubetypes.KubernetesPodNamespaceLabel
	labelPodUID        = kubetypes.KubernetesPodUIDLabel
	labelContainer     = kubetypes.KubernetesContainerNameLabel
	annHash            = "io.kubernetes.container.hash"
	annRestartCount    = "io.kubernetes.container.restartCount"
	annTerminationPath = "io.kubernetes.container.terminationMessagePath"
	annTerminationPol  = "io.kubernetes.container.terminationMessagePolicy"
	annGrace           = "io.kubernetes.pod.terminationGracePeriod"
)

// Bounds of a termination message, as kubelet's.
const (
	maxTerminationMessage = 4096
	maxTerminationLog     = 2048
	maxTerminationLines   = 80
)

// observe reads what the runtime has of a pod. cache holds what cannot change any more: ended containers.
func (a *Agent) observe(ctx context.Context, uid types.UID, cache map[string]lifecycle.Container) (lifecycle.Observed, error) {
	var out lifecycle.Observed
	sel := map[string]string{labelPodUID: string(uid)}
	sandboxes, err := a.cfg.Runtime.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{LabelSelector: sel})
	if err != nil {
		return out, fmt.Errorf("list sandboxes: %w", err)
	}
	for _, s := range sandboxes {
		ls := lifecycle.Sandbox{ID: s.Id, Attempt: s.Metadata.GetAttempt(), CreatedAt: time.Unix(0, s.CreatedAt), Ready: s.State == runtimeapi.PodSandboxState_SANDBOX_READY}
		if ls.Ready {
			r, err := a.cfg.Runtime.PodSandboxStatus(ctx, s.Id, false)
			if err != nil {
				return out, fmt.Errorf("status of sandbox %s: %w", s.Id, err)
			}
			fillSandbox(&ls, r.GetStatus())
		}
		out.Sandboxes = append(out.Sandboxes, ls)
	}
	sort.SliceStable(out.Sandboxes, func(i, j int) bool { return out.Sandboxes[i].CreatedAt.After(out.Sandboxes[j].CreatedAt) })
	containers, err := a.cfg.Runtime.ListContainers(ctx, &runtimeapi.ContainerFilter{LabelSelector: sel})
	if err != nil {
		return out, fmt.Errorf("list containers: %w", err)
	}
	alive := make(map[string]bool, len(containers))
	for _, c := range containers {
		alive[c.Id] = true
		if known, ok := cache[c.Id]; ok {
			out.Containers = append(out.Containers, known)
			continue
		}
		r, err := a.cfg.Runtime.ContainerStatus(ctx, c.Id, false)
		if err != nil {
			return out, fmt.Errorf("status of container %s: %w", c.Id, err)
		}
		lc := a.container(uid, c, r.GetStatus())
		if lc.State == lifecycle.Exited {
			cache[c.Id] = lc
		}
		out.Containers = append(out.Containers, lc)
	}
	for id := range cache {
		if !alive[id] {
			delete(cache, id)
		}
	}
	sort.SliceStable(out.Containers, func(i, j int) bool { return out.Containers[i].CreatedAt.After(out.Containers[j].CreatedAt) })
	return out, nil
}

func fillSandbox(s *lifecycle.Sandbox, st *runtimeapi.PodSandboxStatus) {
	s.Ready = st.GetState() == runtimeapi.PodSandboxState_SANDBOX_READY
	s.HostNetwork = st.GetLinux().GetNamespaces().GetOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE
	if ip := st.GetNetwork().GetIp(); ip != "" {
		s.IPs = append(s.IPs, ip)
	}
	for _, more := range st.GetNetwork().GetAdditionalIps() {
		s.IPs = append(s.IPs, more.GetIp())
	}
}

func nanos(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n)
}

func (a *Agent) container(uid types.UID, c *runtimeapi.Container, st *runtimeapi.ContainerStatus) lifecycle.Container {
	attempt := int32(c.Metadata.GetAttempt())
	if n, err := strconv.ParseInt(c.Annotations[annRestartCount], 10, 32); err == nil {
		attempt = int32(n)
	}
	out := lifecycle.Container{ID: c.Id, Name: c.Labels[labelContainer], SandboxID: c.PodSandboxId, Attempt: attempt,
		CreatedAt: nanos(st.GetCreatedAt()), StartedAt: nanos(st.GetStartedAt()), FinishedAt: nanos(st.GetFinishedAt()), ExitCode: st.GetExitCode(),
		Reason: st.GetReason(), Message: st.GetMessage(), Image: c.GetImage().GetUserSpecifiedImage(), ImageID: st.GetImageRef(), Hash: c.Annotations[annHash]}
	if out.Image == "" {
		out.Image = st.GetImage().GetImage()
	}
	switch st.GetState() {
	case runtimeapi.ContainerState_CONTAINER_CREATED:
		out.State = lifecycle.Created
	case runtimeapi.ContainerState_CONTAINER_RUNNING:
		out.State = lifecycle.Running
	case runtimeapi.ContainerState_CONTAINER_EXITED:
		out.State = lifecycle.Exited
		if m := a.terminationMessage(uid, c, st, out); m != "" {
			out.Message = m
		}
	default:
		out.State = lifecycle.Unknown
	}
	return out
}

// terminationFile is what is mounted at a container's terminationMessagePath.
func (a *Agent) terminationFile(uid types.UID, container string, attempt int32) string {
	return filepath.Join(a.volumes.PodDir(uid), "containers", container, strconv.Itoa(int(attempt)))
}

func (a *Agent) terminationMessage(uid types.UID, c *runtimeapi.Container, st *runtimeapi.ContainerStatus, lc lifecycle.Container) string {
	if c.Annotations[annTerminationPath] == "" {
		return ""
	}
	m := readTail(a.terminationFile(uid, lc.Name, lc.Attempt), maxTerminationMessage)
	if m == "" && lc.ExitCode != 0 && c.Annotations[annTerminationPol] == string(corev1.TerminationMessageFallbackToLogsOnError) {
		m = tailOfLog(st.GetLogPath())
	}
	return m
}

// readTail returns the last max bytes of a file, nothing when it cannot be read.
func readTail(name string, max int64) string {
	f, err := os.Open(name)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return ""
	}
	from := info.Size() - max
	if from < 0 {
		from = 0
	}
	b := make([]byte, info.Size()-from)
	n, _ := f.ReadAt(b, from)
	return strings.ToValidUTF8(string(b[:n]), "�")
}

// tailOfLog returns the last lines of a container's log, as plain text. The entries of a CRI log are "<time> <stream> <tag>
// <text>"; tag P marks a part of a line.
func tailOfLog(path string) string {
	lines := strings.Split(strings.TrimSuffix(readTail(path, 16*maxTerminationLog), "\n"), "\n")
	lines = lines[max(0, len(lines)-maxTerminationLines):]
	var b strings.Builder
	for _, l := range lines {
		f := strings.SplitN(l, " ", 4)
		if len(f) < 4 {
			continue
		}
		b.WriteString(f[3])
		if f[2] != "P" {
			b.WriteByte('\n')
		}
	}
	out := b.String()
	return out[max(0, len(out)-maxTerminationLog):]
}
