package daemon

import (
	"context"
	"errors"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"skein.io/skein/gossip/health"
	"skein.io/skein/node/join"
)

// leftRetry is the wait after what a node left behind could not be cleared.
const leftRetry = 2 * time.Second

// clearLeft removes what a node that left the cluster leaves behind: its Node object, its claim to its name, its place in
// gossip. Only the leader runs it. The pods go by themselves once the Node object has gone.
func (n *node) clearLeft(ctx context.Context, client kubernetes.Interface, tokens *join.TokenStore) error {
	changed, end := n.gossip.Subscribe()
	defer end()
	for {
		var errs []error
		for _, m := range n.gossip.Members() {
			if m.Verdict != health.Left || m.Self {
				continue
			}
			if err := client.CoreV1().Nodes().Delete(ctx, m.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
				errs = append(errs, err)
				continue
			}
			if err := tokens.Release(ctx, m.Name); err != nil {
				errs = append(errs, err)
				continue
			}
			n.log.Info("the node has left; its name is free again", "left", m.Name)
			errs = append(errs, n.gossip.Forget(m.Name))
		}
		var again <-chan time.Time
		if err := errors.Join(errs...); err != nil && ctx.Err() == nil {
			n.log.Warn("cannot clear what a node that left leaves behind; trying again", "err", err)
			t := time.NewTimer(leftRetry)
			defer t.Stop()
			again = t.C
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-again:
		}
	}
}
