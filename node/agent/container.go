package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/agent/lifecycle"
	"skein.io/skein/node/desired"
)

// Reasons why a container waits, as kubelet's.
const (
	reasonConfigError   = "CreateContainerConfigError"
	reasonCreateError   = "CreateContainerError"
	reasonRunError      = "RunContainerError"
	reasonPostStartHook = "PostStartHookError"
)

func isNotFound(err error) bool { return status.Code(err) == codes.NotFound }

// message is an error without gRPC's frame.
func message(err error) string {
	if s, ok := status.FromError(err); ok {
		return s.Message()
	}
	return err.Error()
}

// startContainer pulls the image, creates and starts a container and runs its postStart hook. A failure is kept as the
// reason why the container waits.
func (w *worker) startContainer(ctx context.Context, pod *corev1.Pod, action lifecycle.Action) error {
	spec := containerSpec(pod, action.Container)
	if spec == nil {
		return fmt.Errorf("container %s is not in the spec", action.Container)
	}
	fail := func(reason, msg string, after time.Duration, err error) error {
		if ctx.Err() == nil {
			w.waits[spec.Name] = lifecycle.Wait{Reason: reason, Message: msg, Until: time.Now().Add(after)}
		}
		return err
	}
	image, volumes, perr := w.ensureImages(ctx, pod, spec)
	if perr != nil {
		if ctx.Err() == nil {
			w.eventOnce(pod, spec.Name, corev1.EventTypeWarning, "Failed", "Error: "+perr.reason)
		}
		return fail(perr.reason, perr.message, perr.after, perr)
	}
	// The sandbox may have been made in this round: its address is in the environment.
	if err := w.reobserve(ctx); err != nil {
		return err
	}
	cfg, err := w.containerConfig(ctx, pod, spec, action.Attempt, image, volumes)
	if err != nil {
		if ctx.Err() == nil {
			w.eventOnce(pod, spec.Name, corev1.EventTypeWarning, "Failed", "Error: "+err.Error())
		}
		after := actionRetry
		if errors.Is(err, desired.ErrUnknown) {
			after = observeRetry
		}
		return fail(reasonConfigError, err.Error(), after, err)
	}
	select {
	case w.a.starts <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	id, err := w.createAndStart(ctx, pod, spec, action, cfg, fail)
	<-w.a.starts
	if err != nil {
		return err
	}
	delete(w.waits, spec.Name)
	if spec.Lifecycle == nil || spec.Lifecycle.PostStart == nil {
		return nil
	}
	if err := w.runHook(ctx, pod, spec, id, spec.Lifecycle.PostStart); err != nil && ctx.Err() == nil {
		w.eventf(pod, spec.Name, corev1.EventTypeWarning, "FailedPostStartHook", "PostStartHook failed")
		kerr := w.stopContainer(ctx, pod, spec, lifecycle.Victim{ID: id, Name: spec.Name, Reason: "FailedPostStartHook"}, lifecycle.GraceSeconds(pod))
		return fail(reasonPostStartHook, err.Error(), 0, errors.Join(err, kerr))
	}
	return nil
}

func (w *worker) reobserve(ctx context.Context) error {
	o, err := w.a.observe(ctx, w.uid, w.cache)
	if err == nil {
		w.observed = o
	}
	return err
}

func (w *worker) createAndStart(ctx context.Context, pod *corev1.Pod, spec *corev1.Container, action lifecycle.Action, cfg *runtimeapi.ContainerConfig,
	fail func(string, string, time.Duration, error) error) (string, error) {
	sandbox, err := w.sandboxConfig(pod, 0)
	if err != nil {
		return "", fail(reasonConfigError, err.Error(), actionRetry, err)
	}
	for _, s := range w.observed.Sandboxes {
		if s.ID == action.SandboxID {
			sandbox.Metadata.Attempt = s.Attempt
		}
	}
	id, err := w.a.cfg.Runtime.CreateContainer(ctx, action.SandboxID, cfg, sandbox)
	if err != nil {
		if ctx.Err() == nil {
			w.eventOnce(pod, spec.Name, corev1.EventTypeWarning, "Failed", "Error: "+message(err))
		}
		return "", fail(reasonCreateError, message(err), actionRetry, fmt.Errorf("create container %s: %w", spec.Name, err))
	}
	w.commit(pod, spec, action.Record)
	w.eventf(pod, spec.Name, corev1.EventTypeNormal, "Created", "Container created")
	if err := w.a.cfg.Runtime.StartContainer(ctx, id); err != nil {
		if ctx.Err() == nil {
			w.eventOnce(pod, spec.Name, corev1.EventTypeWarning, "Failed", "Error: "+message(err))
		}
		return "", fail(reasonRunError, message(err), 0, fmt.Errorf("start container %s: %w", spec.Name, err))
	}
	w.eventf(pod, spec.Name, corev1.EventTypeNormal, "Started", "Container started")
	return id, nil
}

// commit keeps the restart history of a container that was created, and with which resources it was.
func (w *worker) commit(pod *corev1.Pod, spec *corev1.Container, rec desired.ContainerRecord) {
	next := desired.Record{UID: w.uid, Namespace: pod.Namespace, Name: pod.Name, Admitted: true}
	if old := w.a.cfg.Desired.Record(w.uid); old != nil {
		next = *old
	}
	all := map[string]desired.ContainerRecord{}
	for n, r := range next.Containers {
		all[n] = r
	}
	all[spec.Name] = rec
	next.Containers = all
	if !hasEphemeral(pod, spec.Name) {
		next.Actuated = next.Actuated.With(spec.Name, spec.Resources)
	}
	w.a.cfg.Desired.PutRecord(&next)
}

// containerConfig is what CRI is told of a container; image and volumes are the IDs of ensureImages.
func (w *worker) containerConfig(ctx context.Context, pod *corev1.Pod, spec *corev1.Container, attempt int32, image string, volumes map[string]string) (*runtimeapi.ContainerConfig, error) {
	facts := w.facts(pod)
	env, err := environment(w.a.cfg.Desired, pod, spec, facts)
	if err != nil {
		return nil, err
	}
	if len(spec.VolumeDevices) > 0 {
		return nil, fmt.Errorf("container %s: this node does not support raw block volumes (volumeDevices)", spec.Name)
	}
	mounts, err := w.mounts(pod, spec, env, facts.PodIPs, attempt, volumes)
	if err != nil {
		return nil, err
	}
	linux, err := w.linuxConfig(ctx, pod, spec)
	if err != nil {
		return nil, err
	}
	get := lookupEnv(env)
	cfg := &runtimeapi.ContainerConfig{
		Metadata:   &runtimeapi.ContainerMetadata{Name: spec.Name, Attempt: uint32(attempt)},
		Image:      &runtimeapi.ImageSpec{Image: image, UserSpecifiedImage: spec.Image},
		Command:    expandAll(spec.Command, get),
		Args:       expandAll(spec.Args, get),
		WorkingDir: spec.WorkingDir,
		Labels: map[string]string{labelPodName: pod.Name, labelPodNamespace: pod.Namespace, labelPodUID: string(pod.UID),
			labelContainer: spec.Name},
		Annotations: map[string]string{annHash: lifecycle.Hash(spec), annRestartCount: strconv.Itoa(int(attempt)),
			annTerminationPath: spec.TerminationMessagePath, annTerminationPol: string(spec.TerminationMessagePolicy),
			annGrace: strconv.FormatInt(lifecycle.GraceSeconds(pod), 10)},
		Mounts:    mounts,
		LogPath:   filepath.Join(spec.Name, strconv.Itoa(int(attempt))+".log"),
		Stdin:     spec.Stdin,
		StdinOnce: spec.StdinOnce,
		Tty:       spec.TTY,
		Linux:     linux,
	}
	if l := spec.Lifecycle; l != nil && l.StopSignal != nil {
		cfg.StopSignal = runtimeapi.Signal(runtimeapi.Signal_value[string(*l.StopSignal)])
	}
	for _, e := range env {
		cfg.Envs = append(cfg.Envs, &runtimeapi.KeyValue{Key: e.Name, Value: []byte(e.Value)})
	}
	if err := os.MkdirAll(filepath.Join(w.a.logDir(pod), spec.Name), 0o755); err != nil {
		return nil, fmt.Errorf("make log directory: %w", err)
	}
	return cfg, nil
}

func expandAll(in []string, get func(string) (string, bool)) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = expand(s, get, nil)
	}
	if len(in) == 0 {
		return nil
	}
	return out
}

// mounts are a container's volumes, its hosts file and its termination message file.
func (w *worker) mounts(pod *corev1.Pod, spec *corev1.Container, env []envVar, ips []string, attempt int32, images map[string]string) ([]*runtimeapi.Mount, error) {
	var out []*runtimeapi.Mount
	hosts := false
	for i := range spec.VolumeMounts {
		m := &spec.VolumeMounts[i]
		sub, err := subPath(m, env)
		if err != nil {
			return nil, err
		}
		at := m.MountPath
		if !filepath.IsAbs(at) {
			at = "/" + at
		}
		if id, ok := images[m.Name]; ok { // the runtime mounts it, always read-only
			out = append(out, &runtimeapi.Mount{ContainerPath: at, Readonly: true, Propagation: propagation(m.MountPropagation),
				Image: &runtimeapi.ImageSpec{Image: id}, ImageSubPath: sub})
			continue
		}
		host, err := w.a.volumes.HostPath(pod, spec.Name, i, m, sub)
		if err != nil {
			return nil, err
		}
		if m.RecursiveReadOnly != nil && *m.RecursiveReadOnly == corev1.RecursiveReadOnlyEnabled {
			return nil, fmt.Errorf("volume mount %s: recursive read-only mounts are not supported by this node", m.Name)
		}
		hosts = hosts || filepath.Clean(at) == "/etc/hosts"
		out = append(out, &runtimeapi.Mount{HostPath: host, ContainerPath: at, Readonly: m.ReadOnly || w.a.volumes.ReadOnly(pod, m.Name), Propagation: propagation(m.MountPropagation)})
	}
	if !hosts && (pod.Spec.HostNetwork || len(ips) > 0) {
		name, err := w.hostsFile(pod, ips)
		if err != nil {
			return nil, fmt.Errorf("hosts file: %w", err)
		}
		ro := spec.SecurityContext != nil && isTrue(spec.SecurityContext.ReadOnlyRootFilesystem)
		out = append(out, &runtimeapi.Mount{HostPath: name, ContainerPath: "/etc/hosts", Readonly: ro})
	}
	if spec.TerminationMessagePath != "" {
		name := w.a.terminationFile(pod.UID, spec.Name, attempt)
		if err := touch(name, 0o666); err != nil {
			return nil, fmt.Errorf("termination message file: %w", err)
		}
		out = append(out, &runtimeapi.Mount{HostPath: name, ContainerPath: spec.TerminationMessagePath})
	}
	return out, nil
}

func touch(name string, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o750); err != nil {
		return err
	}
	if err := os.WriteFile(name, nil, mode); err != nil {
		return err
	}
	return os.Chmod(name, mode)
}

func subPath(m *corev1.VolumeMount, env []envVar) (string, error) {
	if m.SubPathExpr == "" {
		return m.SubPath, nil
	}
	var unknown []string
	s := expand(m.SubPathExpr, lookupEnv(env), func(n string) { unknown = append(unknown, n) })
	if len(unknown) > 0 {
		return "", fmt.Errorf("missing value for %q in subPathExpr of volume mount %s", strings.Join(unknown, ", "), m.Name)
	}
	if filepath.IsAbs(s) {
		return "", fmt.Errorf("error SubPath `%s` must not be an absolute path", s)
	}
	return s, nil
}

func propagation(p *corev1.MountPropagationMode) runtimeapi.MountPropagation {
	switch {
	case p == nil:
		return runtimeapi.MountPropagation_PROPAGATION_PRIVATE
	case *p == corev1.MountPropagationHostToContainer:
		return runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	case *p == corev1.MountPropagationBidirectional:
		return runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL
	}
	return runtimeapi.MountPropagation_PROPAGATION_PRIVATE
}
