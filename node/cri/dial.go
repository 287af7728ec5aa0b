package cri

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"time"

	internalapi "k8s.io/cri-api/pkg/apis"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	remote "k8s.io/cri-client/pkg"

	"skein.io/skein/node/cri/exits"
	"skein.io/skein/node/cri/image"
)

// DialConfig says which runtime to talk to.
type DialConfig struct {
	// Endpoint is a unix:// address. Required.
	Endpoint string
	// ExitDir is where exit records are kept (Containerd.ExitDir). Empty for a runtime that is not Skein's own: then exit codes are
	// what that runtime says.
	ExitDir string
	// Timeout of each call that has no own one. Default: 2 min, as upstream's kubelet.
	Timeout time.Duration
	// Logger gets records that cannot be read. Default: none.
	Logger *slog.Logger
}

// Runtime is a connection to a container runtime. It connects again by itself when the runtime was restarted; calls made meanwhile fail.
type Runtime struct {
	internalapi.RuntimeService
	// Images is the image service.
	Images internalapi.ImageManagerService

	dir string
	log *slog.Logger
}

// Dial connects, and fails when the runtime does not answer with CRI v1.
func Dial(ctx context.Context, cfg DialConfig) (*Runtime, error) {
	if cfg.Timeout == 0 {
		cfg.Timeout = 2 * time.Minute
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	path, err := socketOf(cfg.Endpoint)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no container runtime listens on %s: start it, or leave the endpoint out to use skein's own: %w", path, err)
	}
	rs, err := remote.NewRemoteRuntimeService(ctx, cfg.Endpoint, cfg.Timeout, nil, false)
	if err != nil {
		return nil, fmt.Errorf("container runtime at %s: %w", cfg.Endpoint, err)
	}
	is, err := remote.NewRemoteImageService(ctx, cfg.Endpoint, cfg.Timeout, nil, false)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("image service at %s: %w", cfg.Endpoint, err), rs.Close(ctx))
	}
	return newRuntime(rs, is, cfg.ExitDir, cfg.Logger), nil
}

func newRuntime(rs internalapi.RuntimeService, is internalapi.ImageManagerService, dir string, log *slog.Logger) *Runtime {
	return &Runtime{RuntimeService: rs, Images: guardedImages{is}, dir: dir, log: log}
}

// Close ends both connections.
func (r *Runtime) Close(ctx context.Context) error {
	return errors.Join(r.RuntimeService.Close(ctx), r.Images.Close(ctx))
}

// Reasons of a container's status, as containerd gives them (internal/cri/server).
const (
	reasonCompleted = "Completed"
	reasonError     = "Error"
	reasonOOM       = "OOMKilled"
	oomExitCode     = 128 + 9
)

// correct replaces what the runtime says about the end of a container by what its shim had seen.
func (r *Runtime) correct(st *runtimeapi.ContainerStatus) {
	if r.dir == "" || st.GetState() != runtimeapi.ContainerState_CONTAINER_EXITED {
		return
	}
	rec, err := exits.Read(r.dir, st.Id)
	if err != nil {
		if !errors.Is(err, exits.ErrNone) {
			r.log.Warn("exit record", "container", st.Id, "error", err)
		}
		return
	}
	correct(st, rec)
}

// correct is pure.
func correct(st *runtimeapi.ContainerStatus, rec exits.Record) {
	if st.ExitCode != int32(rec.Status) {
		st.ExitCode, st.FinishedAt, st.Message = int32(rec.Status), rec.At.UnixNano(), ""
		if st.Reason = reasonError; st.ExitCode == 0 {
			st.Reason = reasonCompleted
		}
	}
	// The runtime learns of it by an event, which may get lost with it.
	if rec.OOM && st.ExitCode == oomExitCode {
		st.Reason = reasonOOM
	}
}

// ContainerStatus implements internalapi.ContainerManager.
func (r *Runtime) ContainerStatus(ctx context.Context, id string, verbose bool) (*runtimeapi.ContainerStatusResponse, error) {
	res, err := r.RuntimeService.ContainerStatus(ctx, id, verbose)
	if err == nil {
		r.correct(res.Status)
	}
	return res, err
}

// PodSandboxStatus implements internalapi.PodSandboxManager; some runtimes put the statuses of the containers into it.
func (r *Runtime) PodSandboxStatus(ctx context.Context, id string, verbose bool) (*runtimeapi.PodSandboxStatusResponse, error) {
	res, err := r.RuntimeService.PodSandboxStatus(ctx, id, verbose)
	if err == nil {
		for _, st := range res.ContainersStatuses {
			r.correct(st)
		}
	}
	return res, err
}

// GetContainerEvents implements internalapi.ContainerManager: it sends to ch until the stream or ctx ends.
func (r *Runtime) GetContainerEvents(ctx context.Context, ch chan *runtimeapi.ContainerEventResponse, connected func(runtimeapi.RuntimeService_GetContainerEventsClient)) error {
	raw := make(chan *runtimeapi.ContainerEventResponse)
	done := make(chan struct{})
	go func() { // ends with raw, which is closed below
		defer close(done)
		for e := range raw {
			for _, st := range e.ContainersStatuses {
				r.correct(st)
			}
			select {
			case ch <- e:
			case <-ctx.Done():
			}
		}
	}()
	err := r.RuntimeService.GetContainerEvents(ctx, raw, connected)
	close(raw)
	<-done
	return err
}

// RemoveContainer implements internalapi.ContainerManager, and forgets the container's exit.
func (r *Runtime) RemoveContainer(ctx context.Context, id string) error {
	if err := r.RuntimeService.RemoveContainer(ctx, id); err != nil {
		return err
	}
	if r.dir == "" {
		return nil
	}
	return exits.Remove(r.dir, id)
}

// RemovePodSandbox implements internalapi.PodSandboxManager, and forgets the exits of the containers that went with the pod.
func (r *Runtime) RemovePodSandbox(ctx context.Context, id string) error {
	if err := r.RuntimeService.RemovePodSandbox(ctx, id); err != nil {
		return err
	}
	return r.forget(ctx)
}

// forget drops the records of all containers that the runtime does not know. The order matters: a record read first, of a
// container that is not listed afterwards, belongs to one that was removed.
func (r *Runtime) forget(ctx context.Context) error {
	if r.dir == "" {
		return nil
	}
	ids, err := exits.IDs(r.dir)
	if err != nil || len(ids) == 0 {
		return err
	}
	cs, err := r.RuntimeService.ListContainers(ctx, nil)
	if err != nil {
		return fmt.Errorf("forget exit records: %w", err)
	}
	known := make(map[string]bool, len(cs))
	for _, c := range cs {
		known[c.Id] = true
	}
	var errs []error
	for _, id := range ids {
		if !known[id] {
			errs = append(errs, exits.Remove(r.dir, id))
		}
	}
	return errors.Join(errs...)
}

// guardedImages keeps the image that every pod needs: containerd would remove it though it is pinned, and then try to pull it.
type guardedImages struct {
	internalapi.ImageManagerService
}

// ErrPinned is returned by RemoveImage for the pause image.
var ErrPinned = errors.New("image is pinned: every pod needs it")

// RemoveImage implements internalapi.ImageManagerService.
func (g guardedImages) RemoveImage(ctx context.Context, spec *runtimeapi.ImageSpec) error {
	res, err := g.ImageManagerService.ImageStatus(ctx, spec, false)
	if err != nil {
		return err
	}
	for _, tag := range res.GetImage().GetRepoTags() {
		if tag == image.PauseName {
			return fmt.Errorf("remove image %s: %w", tag, ErrPinned)
		}
	}
	return g.ImageManagerService.RemoveImage(ctx, spec)
}
