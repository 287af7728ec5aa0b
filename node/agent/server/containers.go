package server

import (
	"context"
	"io"
	"net/http"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/sets"
	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The labels by which the agent finds a pod's parts in the runtime: the kubelet's (k8s.io/cri-client and crictl use them too).
const (
	labelUID       = "io.kubernetes.pod.uid"
	labelContainer = "io.kubernetes.container.name"
)

// ReadLog copies the log at path of a container to the streams (nil: not wanted).
type ReadLog func(ctx context.Context, path, containerID string, opts *corev1.PodLogOptions, now time.Time, rt internalapi.RuntimeService, stdout, stderr io.Writer) error

func (s *Server) pod(r *http.Request) (*corev1.Pod, error) {
	ns, name := r.PathValue("namespace"), r.PathValue("pod")
	pod := s.cfg.Pod(ns, name)
	if pod == nil {
		return nil, refuse(http.StatusNotFound, "pod %q does not exist on node %s", ns+"/"+name, s.cfg.NodeName)
	}
	return pod, nil
}

func containerNames(p *corev1.Pod) sets.Set[string] {
	names := sets.New[string]()
	for _, c := range p.Spec.InitContainers {
		names.Insert(c.Name)
	}
	for _, c := range p.Spec.Containers {
		names.Insert(c.Name)
	}
	for _, c := range p.Spec.EphemeralContainers {
		names.Insert(c.Name)
	}
	return names
}

// waiting is why a container has not run yet, by the pod's status.
func waiting(p *corev1.Pod, name string) string {
	for _, l := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for _, c := range l {
			if c.Name == name && c.State.Waiting != nil {
				return c.State.Waiting.Reason
			}
		}
	}
	return "ContainerCreating"
}

// heldBack says whether a container ended and waits for its next start (CrashLoopBackOff).
func heldBack(p *corev1.Pod, name string) bool {
	for _, l := range [][]corev1.ContainerStatus{p.Status.InitContainerStatuses, p.Status.ContainerStatuses} {
		for _, c := range l {
			if c.Name == name {
				return c.State.Waiting != nil && c.LastTerminationState.Terminated != nil
			}
		}
	}
	return false
}

// container finds the newest instance of a container, or the one before it.
func (s *Server) container(r *http.Request, previous bool) (*runtimeapi.Container, error) {
	pod, err := s.pod(r)
	if err != nil {
		return nil, err
	}
	name := r.PathValue("container")
	if !containerNames(pod).Has(name) {
		return nil, refuse(http.StatusNotFound, "container %q not found in pod %q", name, pod.Namespace+"/"+pod.Name)
	}
	cs, err := s.cfg.Runtime.ListContainers(r.Context(), &runtimeapi.ContainerFilter{
		LabelSelector: map[string]string{labelUID: string(pod.UID), labelContainer: name}})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(cs, func(a, b *runtimeapi.Container) int { return int(b.CreatedAt - a.CreatedAt) })
	switch {
	case previous && len(cs) > 0 && cs[0].State == runtimeapi.ContainerState_CONTAINER_EXITED && heldBack(pod, name):
		return cs[0], nil // it waits to be restarted: the one that ended last is the previous one
	case previous && len(cs) < 2:
		return nil, refuse(http.StatusBadRequest, "previous terminated container %q in pod %q not found", name, pod.Name)
	case previous:
		return cs[1], nil
	case len(cs) == 0:
		return nil, refuse(http.StatusBadRequest, "container %q in pod %q is waiting to start: %s", name, pod.Name, waiting(pod, name))
	}
	return cs[0], nil
}

// logs streams the log of a container.
func (s *Server) logs(w http.ResponseWriter, r *http.Request) {
	opts, err := parseLogOptions(r.URL.Query())
	if err != nil {
		fail(w, err)
		return
	}
	c, err := s.container(r, opts.Previous)
	if err != nil {
		fail(w, err)
		return
	}
	st, err := s.cfg.Runtime.ContainerStatus(r.Context(), c.Id, false)
	if err != nil {
		fail(w, err)
		return
	}
	if st.GetStatus().GetLogPath() == "" {
		fail(w, refuse(http.StatusBadRequest, "container %q has no log", r.PathValue("container")))
		return
	}
	out := &flushing{w: w}
	var stdout, stderr io.Writer = out, out
	if opts.Stream != nil {
		switch *opts.Stream {
		case corev1.LogStreamStdout:
			stderr = nil
		case corev1.LogStreamStderr:
			stdout = nil
		}
	}
	if err := s.cfg.ReadLog(r.Context(), st.Status.LogPath, c.Id, opts, timeNow(), s.cfg.Runtime, stdout, stderr); err != nil && r.Context().Err() == nil {
		if !out.began {
			fail(w, refuse(http.StatusBadRequest, "log of container %q: %v", r.PathValue("container"), err))
			return
		}
		s.cfg.Logger.Warn("log ended early", "container", c.Id, "err", err)
	}
}

// flushing sends each write to the client at once: somebody follows.
type flushing struct {
	w     http.ResponseWriter
	began bool
}

func (f *flushing) Write(b []byte) (int, error) {
	f.began = true
	n, err := f.w.Write(b)
	if fl, ok := f.w.(http.Flusher); ok && err == nil {
		fl.Flush()
	}
	return n, err
}
