package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"skein.io/skein/node/cri"
)

const (
	// foreignRetry is how often a runtime that does not answer is asked again, foreignLook how often one that did.
	foreignRetry = time.Second
	foreignLook  = 10 * time.Second
	// foreignSay is how many unanswered questions are one message.
	foreignSay = 15
)

// errNoRuntime says that the foreign runtime has not answered yet, so nobody knows where it looks for networks.
var errNoRuntime = errors.New("the container runtime has not answered yet")

// watchForeign keeps the health of a runtime that somebody else runs.
func (r *runtime) watchForeign(ctx context.Context) error {
	for {
		f, err := cri.Inspect(ctx, r.n.cfg.CRIEndpoint)
		r.n.parts.set("runtime", err, fmt.Sprintf("%s at %s", f, r.n.cfg.CRIEndpoint))
		wait := foreignLook
		if err != nil {
			wait = foreignRetry
		}
		if !pause(ctx, wait) {
			return nil
		}
	}
}

// awaitForeign waits until the foreign runtime answers, and prepares it for this node's pods once.
func (r *runtime) awaitForeign(ctx context.Context) error {
	for asked := 0; ; asked++ {
		f, err := cri.Inspect(ctx, r.n.cfg.CRIEndpoint)
		if err == nil {
			r.adopt(ctx, f)
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if asked%foreignSay == 0 {
			r.n.log.Warn("the container runtime does not serve this node yet", "err", err)
			r.n.reportNoRuntime(ctx, err)
		}
		if !pause(ctx, foreignRetry) {
			return ctx.Err()
		}
	}
}

// reportNoRuntime says on the Node object that no pods can start here: the agent, which speaks for the node, cannot begin without a
// runtime, and what it said in an earlier life stands there still.
func (n *node) reportNoRuntime(ctx context.Context, why error) {
	if !nodeReady(n.desired.Node(n.cfg.Name)) {
		return
	}
	now := metav1.Now()
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{{
		Type: corev1.NodeReady, Status: corev1.ConditionFalse, Reason: "ContainerRuntimeNotReady", Message: why.Error(),
		LastHeartbeatTime: now, LastTransitionTime: now,
	}}}})
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_, err = n.client.CoreV1().Nodes().Patch(ctx, n.cfg.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	}
	n.logIf("report that the container runtime does not answer", err)
}

func (r *runtime) adopt(ctx context.Context, f cri.Foreign) {
	r.mu.Lock()
	first := r.foreign == nil
	r.foreign = &f
	r.mu.Unlock()
	if !first {
		return
	}
	dir, bin := foreignCNI(r.n.cfg, f)
	r.n.log.Info("pods run in a runtime that skein does not run itself", "runtime", f.String(), "cni-dir", dir, "cni-bin-dir", bin)
	if f.Name != "containerd" {
		return // it has a sandbox image of its own
	}
	// Which image holds a pod's namespaces is that containerd's setting; a registry may be out of reach.
	if err := cri.ImportPause(ctx, r.n.cfg.CRIEndpoint); err != nil {
		r.n.log.Warn("cannot give the runtime a pause image; it needs its own", "err", err)
		return
	}
	r.n.log.Info("if the runtime cannot pull its sandbox image, let it use ours, which it has now: pinned_images.sandbox", "image", cri.PauseImage)
}

// foreignCNI gives the directories of network configurations and plugins: the operator's word, else the runtime's, else the usual.
func foreignCNI(cfg Config, f cri.Foreign) (dir, bin string) {
	dir, bin = cri.DefaultCNIDir, cri.DefaultCNIBinDir
	if f.CNIDir != "" {
		dir = f.CNIDir
	}
	if len(f.CNIBinDirs) > 0 {
		bin = f.CNIBinDirs[0]
	}
	if cfg.CNIDir != "" {
		dir = cfg.CNIDir
	}
	if cfg.CNIBinDir != "" {
		bin = cfg.CNIBinDir
	}
	return dir, bin
}

// installCNI tells the runtime of this node's network.
func (r *runtime) installCNI(conflist []byte) error {
	if r.child != nil {
		return cri.WriteCNI(r.child.CNIDir(), conflist)
	}
	r.mu.Lock()
	f := r.foreign
	r.mu.Unlock()
	if f == nil {
		return errNoRuntime
	}
	dir, bin := foreignCNI(r.n.cfg, *f)
	return cri.InstallCNI(dir, bin, r.n.cfg.Helper, conflist)
}

// removeCNI takes the network away from a foreign runtime when the node leaves.
func (r *runtime) removeCNI() error {
	r.mu.Lock()
	f := r.foreign
	r.mu.Unlock()
	if f == nil {
		return nil
	}
	dir, bin := foreignCNI(r.n.cfg, *f)
	return cri.RemoveCNI(dir, bin, r.n.cfg.Helper, networkName(r.n.cfg.Name))
}
