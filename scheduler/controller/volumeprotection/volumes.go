package volumeprotection

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"skein.io/skein/scheduler/controller"
)

type volumes struct {
	controller.Deps
	queue  *controller.Queue[string]
	inf    cache.SharedIndexInformer
	lister corelisters.PersistentVolumeLister
}

// NewVolumes returns the controller that protects volumes.
func NewVolumes(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	of := deps.Factory.Core().V1().PersistentVolumes()
	return &volumes{Deps: deps, queue: controller.NewQueue[string]("volumeprotection", deps.Clock), inf: of.Informer(), lister: of.Lister()}
}

func (c *volumes) Name() string { return "volumeprotection" }

func (c *volumes) Run(ctx context.Context) error {
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: 2,
		Watches: []controller.Watch{
			controller.On(c.inf, func(_, cur *corev1.PersistentVolume) {
				if cur != nil && concerned(cur, volumeFinalizer) {
					c.queue.Add(cur.Name)
				}
			}),
		},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

func (c *volumes) sync(ctx context.Context, name string) error {
	volume, err := c.lister.Get(name)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	going := volume.DeletionTimestamp != nil
	if !concerned(volume, volumeFinalizer) || going && volume.Status.Phase == corev1.VolumeBound {
		return nil
	}
	clone := volume.DeepCopy()
	set(clone, volumeFinalizer, !going)
	_, err = c.Client.CoreV1().PersistentVolumes().Update(ctx, clone, metav1.UpdateOptions{})
	return settled(err, "volume", name)
}
