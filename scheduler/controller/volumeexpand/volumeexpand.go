// Package volumeexpand hands claims that ask for more than they have to whoever
// enlarges their volumes.
//
// Inputs: PersistentVolumeClaims.
// Outputs: events of claims.
//
// That is what upstream's expand controller still does in v1.36: no plugin that
// it has built in can be enlarged, and a driver's resizer watches the claims
// itself. Whether a claim may ask for more at all, admission decides
// (allowVolumeExpansion of its class).
package volumeexpand

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
)

const (
	name      = "volumeexpand"
	component = "volume_expand"
	reason    = "ExternalExpanding"
)

type expander struct {
	controller.Deps
	queue    *controller.Queue[string]
	events   record.EventRecorder
	claimInf cache.SharedIndexInformer
	claims   corelisters.PersistentVolumeClaimLister
}

// New returns the controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	of := deps.Factory.Core().V1().PersistentVolumeClaims()
	return &expander{
		Deps: deps, queue: controller.NewQueue[string](name, deps.Clock), events: deps.Recorder(component),
		claimInf: of.Informer(), claims: of.Lister(),
	}
}

func (c *expander) Name() string { return name }

func (c *expander) Run(ctx context.Context) error {
	return controller.Run(ctx, controller.Work[string]{
		Queue: c.queue,
		Watches: []controller.Watch{controller.On(c.claimInf, func(old, cur *corev1.PersistentVolumeClaim) {
			if cur != nil && wantsMore(cur) && (old == nil || !wantsMore(old) || requested(old) != requested(cur)) {
				c.queue.Add(controller.Key(cur))
			}
		})},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

// wantsMore says that a bound claim asks for more than it has.
func wantsMore(claim *corev1.PersistentVolumeClaim) bool {
	asked, has := claim.Spec.Resources.Requests[corev1.ResourceStorage], claim.Status.Capacity[corev1.ResourceStorage]
	return claim.Status.Phase == corev1.ClaimBound && asked.Cmp(has) > 0
}

func requested(claim *corev1.PersistentVolumeClaim) int64 {
	asked := claim.Spec.Resources.Requests[corev1.ResourceStorage]
	return asked.Value()
}

func (c *expander) sync(_ context.Context, key string) error {
	namespace, claimName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	claim, err := c.claims.PersistentVolumeClaims(namespace).Get(claimName)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if wantsMore(claim) {
		c.events.Event(claim, corev1.EventTypeNormal, reason, "waiting for an external controller to expand this PVC")
	}
	return nil
}
