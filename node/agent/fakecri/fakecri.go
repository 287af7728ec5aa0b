// Package fakecri is a container runtime in memory: enough of CRI for the agent's tests, with programs that are told how to
// behave. All methods may be called from any goroutine. Time is the time package's, so it runs in a synctest bubble.
package fakecri

import (
	"context"
	"fmt"
	"maps"
	"sort"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	utilexec "k8s.io/utils/exec"
)

// Program is how the containers of one name behave.
type Program struct {
	// Run is how long a container runs before it ends by itself; zero: until it is stopped.
	Run time.Duration
	// ExitCode of that end.
	ExitCode int32
	// Term is how long it takes to end after SIGTERM (with code 0); negative: it ignores the signal.
	Term time.Duration
	// StartErr fails StartContainer.
	StartErr error
	// Exec answers commands run in the container; nil: they succeed at once.
	Exec func(cmd []string) (out string, code int, took time.Duration)
}

// Runtime is the fake. Its exported fields are set before use.
type Runtime struct {
	cri.RuntimeService // what the agent does not call panics

	// Programs by container name.
	Programs map[string]Program
	// Pull answers PullImage; nil: every image can be had at once.
	Pull func(ctx context.Context, image string) error

	// mu guards what follows.
	mu         sync.Mutex
	down       error
	seq        int64
	sandboxes  map[string]*sandbox
	containers map[string]*container
	images     map[string]bool
	memory     map[string]uint64
	subs       map[chan *runtimeapi.ContainerEventResponse]bool
	calls      []string
}

type sandbox struct {
	runtimeapi.PodSandboxStatus
}

type container struct {
	runtimeapi.ContainerStatus
	sandbox string
	prog    Program
	ended   chan struct{}
	config  *runtimeapi.ContainerConfig
}

// New makes an empty runtime that has the given images.
func New(images ...string) *Runtime {
	r := &Runtime{Programs: map[string]Program{}, sandboxes: map[string]*sandbox{}, containers: map[string]*container{}, images: map[string]bool{}, memory: map[string]uint64{},
		subs: map[chan *runtimeapi.ContainerEventResponse]bool{}}
	for _, i := range images {
		r.images[i] = true
	}
	return r
}

// SetDown makes every call fail with err; nil: it is up again.
func (r *Runtime) SetDown(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.down = err
}

// Calls returns what was called so far: verbs with the names of pods and containers.
func (r *Runtime) Calls() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.calls...)
}

// Config returns how the newest container of a name was made, nil when there is none.
func (r *Runtime) Config(name string) *runtimeapi.ContainerConfig {
	r.mu.Lock()
	defer r.mu.Unlock()
	var newest *container
	for _, c := range r.containers {
		if c.Metadata.Name == name && (newest == nil || c.CreatedAt > newest.CreatedAt) {
			newest = c
		}
	}
	if newest == nil {
		return nil
	}
	return newest.config
}

// Exit ends the running container of a name, as if its program had.
func (r *Runtime) Exit(name string, code int32) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.containers {
		if c.Metadata.Name == name && c.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			r.end(c, code)
		}
	}
}

// Reboot makes everything dead at once, as a power loss does.
func (r *Runtime) Reboot() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range r.containers {
		r.end(c, 255)
	}
	for _, s := range r.sandboxes {
		s.State = runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	}
}

func notFound(id string) error { return status.Errorf(codes.NotFound, "%s: not found", id) }

// call notes a call. mu is held.
func (r *Runtime) call(format string, a ...any) error {
	if r.down != nil {
		return r.down
	}
	r.calls = append(r.calls, fmt.Sprintf(format, a...))
	return nil
}

// now is a time that never repeats, so that newest is well defined. mu is held.
func (r *Runtime) now() int64 {
	r.seq++
	return time.Now().UnixNano() + r.seq
}

// end ends a container. mu is held.
func (r *Runtime) end(c *container, code int32) {
	if c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return
	}
	c.State, c.ExitCode, c.FinishedAt = runtimeapi.ContainerState_CONTAINER_EXITED, code, r.now()
	c.Reason = "Error"
	if code == 0 {
		c.Reason = "Completed"
	}
	close(c.ended)
	r.tell(c)
}

func (r *Runtime) tell(c *container) {
	e := &runtimeapi.ContainerEventResponse{ContainerId: c.Id, PodSandboxStatus: &runtimeapi.PodSandboxStatus{Metadata: r.sandboxes[c.sandbox].Metadata}}
	for s := range r.subs {
		select {
		case s <- e:
		default: // lost, as may happen
		}
	}
}

// Version implements CRI.
func (r *Runtime) Version(context.Context, string) (*runtimeapi.VersionResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return &runtimeapi.VersionResponse{RuntimeName: "fake", RuntimeVersion: "1"}, r.down
}

// Status implements CRI.
func (r *Runtime) Status(context.Context, bool) (*runtimeapi.StatusResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.down != nil {
		return nil, r.down
	}
	return &runtimeapi.StatusResponse{Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{
		{Type: runtimeapi.RuntimeReady, Status: true}, {Type: runtimeapi.NetworkReady, Status: true}}}}, nil
}

// RunPodSandbox implements CRI.
func (r *Runtime) RunPodSandbox(_ context.Context, c *runtimeapi.PodSandboxConfig, _ string) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.call("run sandbox %s", c.Metadata.Name); err != nil {
		return "", err
	}
	r.seq++
	id := fmt.Sprintf("s-%s-%d-%d", c.Metadata.Name, c.Metadata.Attempt, r.seq)
	r.sandboxes[id] = &sandbox{runtimeapi.PodSandboxStatus{Id: id, Metadata: c.Metadata, Labels: c.Labels, CreatedAt: r.now(), State: runtimeapi.PodSandboxState_SANDBOX_READY,
		Network: &runtimeapi.PodSandboxNetworkStatus{Ip: fmt.Sprintf("10.0.0.%d", len(r.sandboxes)+1)},
		Linux:   &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: c.GetLinux().GetSecurityContext().GetNamespaceOptions()}}}}
	return id, nil
}

// StopPodSandbox implements CRI.
func (r *Runtime) StopPodSandbox(_ context.Context, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.sandboxes[id]
	if s == nil {
		return notFound(id)
	}
	if err := r.call("stop sandbox %s", s.Metadata.Name); err != nil {
		return err
	}
	for _, c := range r.containers {
		if c.sandbox == id {
			r.end(c, 137)
		}
	}
	s.State = runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	return nil
}

// RemovePodSandbox implements CRI.
func (r *Runtime) RemovePodSandbox(_ context.Context, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.sandboxes[id]
	if s == nil {
		return notFound(id)
	}
	if err := r.call("remove sandbox %s", s.Metadata.Name); err != nil {
		return err
	}
	maps.DeleteFunc(r.containers, func(_ string, c *container) bool { return c.sandbox == id })
	delete(r.sandboxes, id)
	return nil
}

func matches(labels, sel map[string]string) bool {
	for k, v := range sel {
		if labels[k] != v {
			return false
		}
	}
	return true
}

// ListPodSandbox implements CRI.
func (r *Runtime) ListPodSandbox(_ context.Context, f *runtimeapi.PodSandboxFilter) ([]*runtimeapi.PodSandbox, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*runtimeapi.PodSandbox
	for _, s := range r.sandboxes {
		if matches(s.Labels, f.GetLabelSelector()) {
			out = append(out, &runtimeapi.PodSandbox{Id: s.Id, Metadata: s.Metadata, State: s.State, CreatedAt: s.CreatedAt, Labels: s.Labels})
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Id < out[j].Id })
	return out, r.down
}

// PodSandboxStatus implements CRI.
func (r *Runtime) PodSandboxStatus(_ context.Context, id string, _ bool) (*runtimeapi.PodSandboxStatusResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.sandboxes[id]
	if s == nil {
		return nil, notFound(id)
	}
	return &runtimeapi.PodSandboxStatusResponse{Status: &runtimeapi.PodSandboxStatus{Id: id, Metadata: s.Metadata, State: s.State, CreatedAt: s.CreatedAt,
		Network: s.Network, Linux: s.Linux, Labels: s.Labels}}, r.down
}

// CreateContainer implements CRI.
func (r *Runtime) CreateContainer(_ context.Context, sandboxID string, c *runtimeapi.ContainerConfig, _ *runtimeapi.PodSandboxConfig) (string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.sandboxes[sandboxID]
	if s == nil || s.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		return "", notFound(sandboxID)
	}
	id := fmt.Sprintf("c-%s-%s-%d", s.Id, c.Metadata.Name, c.Metadata.Attempt)
	if r.containers[id] != nil {
		return "", status.Errorf(codes.AlreadyExists, "container %s", id)
	}
	if err := r.call("create %s %d", c.Metadata.Name, c.Metadata.Attempt); err != nil {
		return "", err
	}
	r.containers[id] = &container{sandbox: sandboxID, config: c, prog: r.Programs[c.Metadata.Name], ended: make(chan struct{}),
		ContainerStatus: runtimeapi.ContainerStatus{Id: id, Metadata: c.Metadata, State: runtimeapi.ContainerState_CONTAINER_CREATED, CreatedAt: r.now(),
			Image: c.Image, ImageRef: c.Image.Image, Labels: c.Labels, Annotations: c.Annotations}}
	return id, nil
}

// StartContainer implements CRI.
func (r *Runtime) StartContainer(_ context.Context, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[id]
	if c == nil {
		return notFound(id)
	}
	if err := r.call("start %s", c.Metadata.Name); err != nil {
		return err
	}
	c.StartedAt = r.now()
	if c.prog.StartErr != nil {
		c.State, c.ExitCode, c.Reason, c.FinishedAt = runtimeapi.ContainerState_CONTAINER_EXITED, 128, "StartError", r.now()
		return c.prog.StartErr
	}
	c.State = runtimeapi.ContainerState_CONTAINER_RUNNING
	if c.prog.Run > 0 {
		go func() {
			select {
			case <-time.After(c.prog.Run):
				r.mu.Lock()
				defer r.mu.Unlock()
				r.end(c, c.prog.ExitCode)
			case <-c.ended:
			}
		}()
	}
	r.tell(c)
	return nil
}

// StopContainer implements CRI: it signals, waits for up to timeout seconds, and kills.
func (r *Runtime) StopContainer(ctx context.Context, id string, timeout int64) error {
	r.mu.Lock()
	c := r.containers[id]
	if c == nil {
		r.mu.Unlock()
		return notFound(id)
	}
	err := r.call("stop %s %d", c.Metadata.Name, timeout)
	state := c.State
	r.mu.Unlock()
	if err != nil || state != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return err
	}
	wait, code := c.prog.Term, int32(0)
	if limit := time.Duration(timeout) * time.Second; wait < 0 || wait > limit {
		wait, code = limit, 137
	}
	select {
	case <-time.After(wait):
	case <-c.ended:
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.end(c, code)
	return nil
}

// UpdateContainerResources implements CRI. The call is noted with CPU shares, CPU quota and memory limit.
func (r *Runtime) UpdateContainerResources(_ context.Context, id string, res *runtimeapi.ContainerResources) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[id]
	if c == nil || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return notFound(id)
	}
	return r.call("update %s %d %d %d", c.Metadata.Name, res.Linux.CpuShares, res.Linux.CpuQuota, res.Linux.MemoryLimitInBytes)
}

// SetMemory makes the containers of a name use so many bytes.
func (r *Runtime) SetMemory(name string, used uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.memory[name] = used
}

// ContainerStats implements CRI, for memory.
func (r *Runtime) ContainerStats(_ context.Context, id string) (*runtimeapi.ContainerStats, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[id]
	if c == nil {
		return nil, notFound(id)
	}
	return &runtimeapi.ContainerStats{Memory: &runtimeapi.MemoryUsage{UsageBytes: &runtimeapi.UInt64Value{Value: r.memory[c.Metadata.Name]}}}, r.down
}

// RemoveContainer implements CRI.
func (r *Runtime) RemoveContainer(_ context.Context, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[id]
	if c == nil {
		return notFound(id)
	}
	delete(r.containers, id)
	return r.call("remove %s %d", c.Metadata.Name, c.Metadata.Attempt)
}

// ListContainers implements CRI.
func (r *Runtime) ListContainers(_ context.Context, f *runtimeapi.ContainerFilter) ([]*runtimeapi.Container, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*runtimeapi.Container
	for _, c := range r.containers {
		if matches(c.Labels, f.GetLabelSelector()) && (f.GetState() == nil || f.State.State == c.State) {
			out = append(out, &runtimeapi.Container{Id: c.Id, PodSandboxId: c.sandbox, Metadata: c.Metadata, Image: c.Image, ImageRef: c.ImageRef, State: c.State,
				CreatedAt: c.CreatedAt, Labels: c.Labels, Annotations: c.Annotations})
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Id < out[j].Id })
	return out, r.down
}

// ContainerStatus implements CRI.
func (r *Runtime) ContainerStatus(_ context.Context, id string, _ bool) (*runtimeapi.ContainerStatusResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.containers[id]
	if c == nil {
		return nil, notFound(id)
	}
	return &runtimeapi.ContainerStatusResponse{Status: &runtimeapi.ContainerStatus{Id: c.Id, Metadata: c.Metadata, State: c.State, CreatedAt: c.CreatedAt,
		StartedAt: c.StartedAt, FinishedAt: c.FinishedAt, ExitCode: c.ExitCode, Reason: c.Reason, Message: c.Message, Image: c.Image, ImageRef: c.ImageRef,
		Labels: c.Labels, Annotations: c.Annotations}}, r.down
}

// ExecSync implements CRI.
func (r *Runtime) ExecSync(ctx context.Context, id string, cmd []string, timeout time.Duration) ([]byte, []byte, error) {
	r.mu.Lock()
	c := r.containers[id]
	if c == nil || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		r.mu.Unlock()
		return nil, nil, notFound(id)
	}
	err := r.call("exec %s %v", c.Metadata.Name, cmd)
	r.mu.Unlock()
	if err != nil || c.prog.Exec == nil {
		return nil, nil, err
	}
	out, code, took := c.prog.Exec(cmd)
	if timeout > 0 && took > timeout {
		took, err = timeout, status.Error(codes.DeadlineExceeded, "exec timed out")
	}
	select {
	case <-time.After(took):
	case <-ctx.Done():
		return nil, nil, status.FromContextError(ctx.Err()).Err()
	}
	if err == nil && code != 0 {
		err = utilexec.CodeExitError{Err: fmt.Errorf("exit %d", code), Code: code}
	}
	return []byte(out), nil, err
}

// GetContainerEvents implements CRI.
func (r *Runtime) GetContainerEvents(ctx context.Context, ch chan *runtimeapi.ContainerEventResponse, connected func(runtimeapi.RuntimeService_GetContainerEventsClient)) error {
	r.mu.Lock()
	if r.down != nil {
		defer r.mu.Unlock()
		return r.down
	}
	r.subs[ch] = true
	r.mu.Unlock()
	connected(nil)
	<-ctx.Done()
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.subs, ch)
	return ctx.Err()
}

// ReopenContainerLog implements CRI.
func (r *Runtime) ReopenContainerLog(_ context.Context, id string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.call("reopen log %s", id)
}

// Images is the image service of the same runtime.
type Images struct {
	cri.ImageManagerService
	R *Runtime
	// Fs answers ImageFsInfo.
	Fs []*runtimeapi.FilesystemUsage
}

// ListImages implements CRI.
func (i *Images) ListImages(context.Context, *runtimeapi.ImageFilter) ([]*runtimeapi.Image, error) {
	i.R.mu.Lock()
	defer i.R.mu.Unlock()
	var out []*runtimeapi.Image
	for n := range i.R.images {
		out = append(out, &runtimeapi.Image{Id: "id-" + n, RepoTags: []string{n}, Size: uint64(len(n))})
	}
	return out, i.R.down
}

// ImageStatus implements CRI.
func (i *Images) ImageStatus(_ context.Context, s *runtimeapi.ImageSpec, _ bool) (*runtimeapi.ImageStatusResponse, error) {
	i.R.mu.Lock()
	defer i.R.mu.Unlock()
	if i.R.down != nil {
		return nil, i.R.down
	}
	if !i.R.images[s.Image] {
		return &runtimeapi.ImageStatusResponse{}, nil
	}
	return &runtimeapi.ImageStatusResponse{Image: &runtimeapi.Image{Id: "id-" + s.Image, RepoTags: []string{s.Image}}}, nil
}

// PullImage implements CRI.
func (i *Images) PullImage(ctx context.Context, s *runtimeapi.ImageSpec, _ *runtimeapi.AuthConfig, _ *runtimeapi.PodSandboxConfig) (string, error) {
	i.R.mu.Lock()
	err := i.R.call("pull %s", s.Image)
	i.R.mu.Unlock()
	if err != nil {
		return "", err
	}
	if i.R.Pull != nil {
		if err := i.R.Pull(ctx, s.Image); err != nil {
			return "", err
		}
	}
	i.R.mu.Lock()
	defer i.R.mu.Unlock()
	i.R.images[s.Image] = true
	return "id-" + s.Image, nil
}

// RemoveImage implements CRI.
func (i *Images) RemoveImage(_ context.Context, s *runtimeapi.ImageSpec) error {
	i.R.mu.Lock()
	defer i.R.mu.Unlock()
	maps.DeleteFunc(i.R.images, func(n string, _ bool) bool { return n == s.Image || "id-"+n == s.Image })
	return i.R.call("remove image %s", s.Image)
}

// ImageFsInfo implements CRI.
func (i *Images) ImageFsInfo(context.Context) (*runtimeapi.ImageFsInfoResponse, error) {
	return &runtimeapi.ImageFsInfoResponse{ImageFilesystems: i.Fs}, nil
}
