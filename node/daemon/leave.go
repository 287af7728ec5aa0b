package daemon

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/keyring"
	"skein.io/skein/consensus/members"
	"skein.io/skein/datapath/loader"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/volume"
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
		if err := n.voters.Leave(ctx, n.hostID); err != nil {
			if errors.Is(err, members.ErrCannotLeave) {
				return nil, refusal(http.StatusConflict, "%v", err)
			}
			return nil, err
		}
	}
	// The leader deletes the Node object as soon as it hears of the leaving: an agent that still ran would register it anew.
	goOn, err := n.agentBreak.hold(ctx)
	if err != nil {
		return nil, fmt.Errorf("stop the agent: %w", err)
	}
	if err := n.gossip.Leave(ctx); err != nil {
		goOn()
		return nil, fmt.Errorf("tell the other nodes: %w", err)
	}
	// The answer has to reach the caller before the daemon ends.
	go func() {
		pause(context.WithoutCancel(ctx), 200*time.Millisecond)
		n.once.Do(func() { close(n.leaving) })
	}()
	return struct{}{}, nil
}

// breaker lets one part of the node be held while the others run.
type breaker struct {
	holds chan chan<- chan struct{} // each hold sends where it wants to hear that the part has ended, with what lets it go on
}

func newBreaker() breaker { return breaker{make(chan chan<- chan struct{})} }

// hold ends the part and returns when it has ended; the function lets it start anew.
func (b breaker) hold(ctx context.Context) (goOn func(), err error) {
	held := make(chan chan struct{}, 1)
	select {
	case b.holds <- held:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	again := <-held // the part's context has been cancelled: it ends
	return sync.OnceFunc(func() { close(again) }), nil
}

// run runs the part until ctx or the part itself ends, except while it is held.
func (b breaker) run(ctx context.Context, part func(context.Context) error) error {
	for {
		pctx, cancel := context.WithCancel(ctx)
		ended := make(chan error, 1)
		go func() { ended <- part(pctx) }()
		select {
		case err := <-ended:
			cancel()
			return err
		case held := <-b.holds:
			cancel()
			<-ended
			again := make(chan struct{})
			held <- again
			select {
			case <-ctx.Done():
				return nil
			case <-again:
			}
		}
	}
}

// forget removes what a node that left must not keep: its pods, its programs, its identity. Images stay.
func (n *node) forget() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	errs := []error{n.removePods(ctx)}
	if n.runtime != nil && n.runtime.child != nil {
		errs = append(errs, n.runtime.child.Shutdown(ctx))
	} else if n.runtime != nil {
		errs = append(errs, n.runtime.removeCNI())
	}
	errs = append(errs, loader.Detach(filepath.Join(n.cfg.StateDir, "bpf")), volume.RemoveAll(filepath.Join(n.cfg.StateDir, "pods")))
	errs = append(errs, n.ring.Destroy(), keyring.Destroy(identity.KeyPath(filepath.Join(n.cfg.StateDir, "identity"))), keyring.Destroy(foundingFile(n.cfg.StateDir).path))
	former, _ := filepath.Glob(filepath.Join(n.cfg.StateDir, formerStore+"*")) // the pattern is good
	for _, name := range []string{"identity", "raft", "gossip", "desired.db", "founding.json", "cni"} {
		errs = append(errs, os.RemoveAll(filepath.Join(n.cfg.StateDir, name)))
	}
	for _, path := range former {
		errs = append(errs, os.RemoveAll(path))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("this node has left the cluster, but not all of its state could be removed from %s: %w", n.cfg.StateDir, err)
	}
	return nil
}

// labelPodUID is on each sandbox that an agent makes (k8s.io/kubelet/pkg/types).
const labelPodUID = "io.kubernetes.pod.uid"

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
		if b.Labels[labelPodUID] == "" {
			continue // somebody else's, in a runtime that is not ours alone
		}
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
