package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/members"
	"skein.io/skein/datapath/loader"
)

// leaveTimeout bounds how long a node may take to hand over what it holds.
const leaveTimeout = 2 * time.Minute

// leave hands over what this node holds, tells the others, and lets the daemon end. Until the last step it can be refused
// and nothing has changed.
func (n *node) leave(r *http.Request) (any, error) {
	ctx, cancel := context.WithTimeout(r.Context(), leaveTimeout)
	defer cancel()
	holds := false
	for _, s := range n.host.Status() {
		holds = holds || s.Role != host.RoleNone
	}
	if holds {
		m, err := n.membersManager()
		if err != nil {
			return nil, err
		}
		if err := m.Leave(ctx, n.hostID); err != nil {
			if errors.Is(err, members.ErrCannotLeave) {
				return nil, refusal(http.StatusConflict, "%v", err)
			}
			return nil, err
		}
	}
	if err := n.gossip.Leave(ctx); err != nil {
		return nil, fmt.Errorf("tell the other nodes: %w", err)
	}
	// The answer has to reach the caller before the daemon ends.
	go func() {
		pause(context.WithoutCancel(ctx), 200*time.Millisecond)
		n.once.Do(func() { close(n.leaving) })
	}()
	return struct{}{}, nil
}

// forget removes what a node that left must not keep: its pods, its programs, its identity. Images stay.
func (n *node) forget() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	errs := []error{n.removePods(ctx)}
	if n.runtime != nil && n.runtime.child != nil {
		errs = append(errs, n.runtime.child.Shutdown(ctx))
	}
	errs = append(errs, loader.Detach(filepath.Join(n.cfg.StateDir, "bpf")))
	for _, name := range []string{"identity", "raft", "gossip", "desired.db", "founding.json", "pods", "cni"} {
		errs = append(errs, os.RemoveAll(filepath.Join(n.cfg.StateDir, name)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("this node has left the cluster, but not all of its state could be removed from %s: %w", n.cfg.StateDir, err)
	}
	return nil
}

// removePods ends every pod of this node.
func (n *node) removePods(ctx context.Context) error {
	if n.runtime == nil {
		return nil
	}
	rt, err := n.runtime.dial(ctx)
	if err != nil {
		return err
	}
	defer rt.Close(ctx)
	boxes, err := rt.ListPodSandbox(ctx, &runtimeapi.PodSandboxFilter{})
	if err != nil {
		return err
	}
	var errs []error
	for _, b := range boxes {
		if err := rt.StopPodSandbox(ctx, b.Id); err != nil {
			errs = append(errs, fmt.Errorf("stop pod %s/%s: %w", b.Metadata.GetNamespace(), b.Metadata.GetName(), err))
			continue
		}
		if err := rt.RemovePodSandbox(ctx, b.Id); err != nil {
			errs = append(errs, fmt.Errorf("remove pod %s/%s: %w", b.Metadata.GetNamespace(), b.Metadata.GetName(), err))
		}
	}
	return errors.Join(errs...)
}
