package node

import (
	"context"
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/scheduler/controller"
)

// collectLeft removes at once the pods of a node whose object is gone, if the
// node is known to have left the cluster. Pods of other nodes that are gone
// are the pod collector's, after a quarantine.
func (c *Controller) collectLeft(ctx context.Context, name string) error {
	if c.health.Verdicts()[name].State != controller.Left {
		return nil
	}
	pods, err := c.podsOn(name)
	if err != nil || len(pods) == 0 {
		return err
	}
	// The view may be behind; nothing is forced on the word of a stale view.
	_, err = c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err == nil {
		return fmt.Errorf("node %s: %w", name, controller.ErrStaleView)
	}
	if !apierrors.IsNotFound(err) {
		return fmt.Errorf("make sure that node %s is gone: %w", name, err)
	}
	var errs []error
	for _, pod := range pods {
		errs = append(errs, c.forceDelete(ctx, pod))
	}
	return errors.Join(errs...)
}
