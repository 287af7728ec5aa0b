package main

import (
	"context"
	"os"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/task"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/log"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/containerd/ttrpc"

	"skein.io/skein/node/cri/exits"
)

// runShim is containerd's own runc shim, with Skein's task service around upstream's.
func runShim() {
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "task",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn: func(ic *plugin.InitContext) (any, error) {
			pub, err := ic.GetByID(plugins.EventPlugin, "publisher")
			if err != nil {
				return nil, err
			}
			down, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
			if err != nil {
				return nil, err
			}
			dir := os.Getenv(exits.DirEnv)
			inner, err := task.NewTaskService(ic.Context, publisher{pub.(shim.Publisher), dir}, down.(shutdown.Service))
			if err != nil {
				return nil, err
			}
			return &taskService{TTRPCTaskService: inner, dir: dir}, nil
		},
	})
	shim.RunShim(context.Background(), manager.NewShimManager("io.containerd.runc.v2"))
}

// taskService keeps the exit code of a container over any death of containerd.
type taskService struct {
	taskapi.TTRPCTaskService
	// dir holds the exit records; empty = none are kept.
	dir string
}

// RegisterTTRPC implements shim.TTRPCService.
func (s *taskService) RegisterTTRPC(server *ttrpc.Server) error {
	taskapi.RegisterTTRPCTaskService(server, s)
	return nil
}

// Pids answers for a container that ended, but was not deleted yet, with the process id that its first process had.
// containerd asks for the processes of every container when it starts, takes one without any for the leftover of a
// failed start, and throws it away with its exit code (core/runtime/v2/shim_load.go, shouldCleanupShim). With this answer
// it keeps the container, reads its state, and so finds the exit code and time by itself.
func (s *taskService) Pids(ctx context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	res, err := s.TTRPCTaskService.Pids(ctx, r)
	if err == nil && len(res.Processes) > 0 {
		return res, nil
	}
	// "runc ps" may also fail on a container whose cgroup went with its last process.
	st, serr := s.State(ctx, &taskapi.StateRequest{ID: r.ID})
	if serr != nil || st.Status != tasktypes.Status_STOPPED {
		return res, err
	}
	return &taskapi.PidsResponse{Processes: []*tasktypes.ProcessInfo{{Pid: st.Pid}}}, nil
}

// Delete forgets a container, so what its exit was is written down before containerd gets the answer: containerd may
// be killed before it has written it down itself.
func (s *taskService) Delete(ctx context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	if s.dir != "" && r.ExecID == "" {
		st, err := s.State(ctx, &taskapi.StateRequest{ID: r.ID})
		if err == nil && st.Status == tasktypes.Status_STOPPED && st.ExitedAt != nil {
			if err := exits.Write(s.dir, r.ID, st.ExitStatus, st.ExitedAt.AsTime()); err != nil {
				log.G(ctx).WithError(err).WithField("container_id", r.ID).Error("keep the exit code")
			}
		}
	}
	return s.TTRPCTaskService.Delete(ctx, r)
}

// publisher keeps that a container ran out of memory: containerd learns this by an event only, and a shim drops an
// event that it could not deliver five times.
type publisher struct {
	shim.Publisher
	dir string
}

// Publish implements events.Publisher.
func (p publisher) Publish(ctx context.Context, topic string, e events.Event) error {
	if oom, ok := e.(*eventstypes.TaskOOM); ok && p.dir != "" {
		if err := exits.WriteOOM(p.dir, oom.ContainerID); err != nil {
			log.G(ctx).WithError(err).WithField("container_id", oom.ContainerID).Error("keep the out-of-memory mark")
		}
	}
	return p.Publisher.Publish(ctx, topic, e)
}
