package volumeprotection

import (
	"context"
	"errors"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	storagelisters "k8s.io/client-go/listers/storage/v1"
	"k8s.io/client-go/tools/cache"

	"skein.io/skein/scheduler/controller"
)

// indexClass finds claims and volumes by the VolumeAttributesClasses that they name.
const indexClass = "skein/attributes-class"

type classes struct {
	controller.Deps
	queue                         *controller.Queue[string]
	classInf, claimInf, volumeInf cache.SharedIndexInformer
	lister                        storagelisters.VolumeAttributesClassLister
	broken                        error
}

// NewClasses returns the controller that protects VolumeAttributesClasses.
func NewClasses(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	core, of := deps.Factory.Core().V1(), deps.Factory.Storage().V1().VolumeAttributesClasses()
	c := &classes{
		Deps: deps, queue: controller.NewQueue[string]("attributesclassprotection", deps.Clock),
		classInf: of.Informer(), lister: of.Lister(), claimInf: core.PersistentVolumeClaims().Informer(), volumeInf: core.PersistentVolumes().Informer(),
	}
	c.broken = errors.Join(
		c.claimInf.AddIndexers(cache.Indexers{indexClass: func(obj any) ([]string, error) { return classesOfClaim(obj.(*corev1.PersistentVolumeClaim)), nil }}),
		c.volumeInf.AddIndexers(cache.Indexers{indexClass: func(obj any) ([]string, error) { return classesOfVolume(obj.(*corev1.PersistentVolume)), nil }}),
	)
	return c
}

// classesOfClaim are the class that a claim wants, the one that it has, and the
// one that it is being changed to.
func classesOfClaim(claim *corev1.PersistentVolumeClaim) (names []string) {
	if name := claim.Spec.VolumeAttributesClassName; name != nil && *name != "" {
		names = append(names, *name)
	}
	if name := claim.Status.CurrentVolumeAttributesClassName; name != nil && *name != "" {
		names = append(names, *name)
	}
	if m := claim.Status.ModifyVolumeStatus; m != nil && m.TargetVolumeAttributesClassName != "" {
		names = append(names, m.TargetVolumeAttributesClassName)
	}
	return names
}

func classesOfVolume(volume *corev1.PersistentVolume) []string {
	if name := volume.Spec.VolumeAttributesClassName; name != nil && *name != "" {
		return []string{*name}
	}
	return nil
}

func (c *classes) Name() string { return "attributesclassprotection" }

func (c *classes) Run(ctx context.Context) error {
	if c.broken != nil {
		return c.broken
	}
	wake := func(names []string) {
		for _, name := range names {
			c.queue.Add(name)
		}
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: 1,
		Watches: []controller.Watch{
			controller.On(c.classInf, func(_, cur *storagev1.VolumeAttributesClass) {
				if cur != nil && concerned(cur, classFinalizer) {
					c.queue.Add(cur.Name)
				}
			}),
			// What named a class before may name it no longer.
			controller.On(c.claimInf, func(old, _ *corev1.PersistentVolumeClaim) {
				if old != nil {
					wake(classesOfClaim(old))
				}
			}),
			controller.On(c.volumeInf, func(old, _ *corev1.PersistentVolume) {
				if old != nil {
					wake(classesOfVolume(old))
				}
			}),
		},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

func (c *classes) sync(ctx context.Context, name string) error {
	class, err := c.lister.Get(name)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	going := class.DeletionTimestamp != nil
	if !concerned(class, classFinalizer) || going && c.named(name) {
		return nil
	}
	clone := class.DeepCopy()
	set(clone, classFinalizer, !going)
	_, err = c.Client.StorageV1().VolumeAttributesClasses().Update(ctx, clone, metav1.UpdateOptions{})
	return settled(err, "VolumeAttributesClass", name)
}

// named says that a claim or a volume names the class. A look-up that fails
// must not let it go.
func (c *classes) named(name string) bool {
	for _, indexer := range []cache.Indexer{c.claimInf.GetIndexer(), c.volumeInf.GetIndexer()} {
		if keys, err := indexer.IndexKeys(indexClass, name); err != nil || len(keys) > 0 {
			return true
		}
	}
	return false
}
