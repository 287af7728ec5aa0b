// Package persistentvolume binds PersistentVolumeClaims to PersistentVolumes,
// and looks after volumes whose claims are gone. What it does, the annotations,
// phases, events and their texts are those of upstream's controller of the same
// name (pkg/controller/volume/persistentvolume of v1.36).
//
// Inputs: PersistentVolumeClaims, PersistentVolumes, StorageClasses; Pods that
// use claims, for the events of claims that wait for a consumer.
// Outputs: updates claims and volumes and their status, and writes events of both.
//
// A claim that waits for its first consumer is bound by placement: it gives the
// volume to the claim, or names the node for a provisioner; this controller
// completes it. Volumes are provisioned and deleted by provisioners outside,
// which it asks by annotation: unlike upstream's it has no plugin of its own,
// so a volume of no provisioner whose reclaim policy is Delete or Recycle fails
// with the reason, as it does upstream for most kinds.
//
// Upstream looks at everything every 15 s; this controller is woken by what
// changes: a free volume wakes the claims that it would do for, a class those
// that wait for it. One key is worked on at a time: two claims must not be
// given the same volume from a view that does not show the first binding yet.
package persistentvolume

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	corelisters "k8s.io/client-go/listers/core/v1"
	storagelisters "k8s.io/client-go/listers/storage/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	volumehelpers "k8s.io/component-helpers/storage/volume"

	"skein.io/skein/scheduler/controller"
)

const (
	name      = "persistentvolume"
	component = "persistentvolume-controller"
)

// Indexes of the shared view that this controller adds.
const (
	indexVolumeClass  = "skein/volume-class"  // volumes by class
	indexVolumeClaim  = "skein/volume-claim"  // volumes by the claim that they name
	indexClaimPending = "skein/claim-pending" // claims that are not bound, by class
	indexClaimVolume  = "skein/claim-volume"  // claims by the volume that they name
)

// key is a claim (namespace/name) or a volume to look after.
type key struct {
	volume bool
	name   string
}

type binder struct {
	controller.Deps
	queue  *controller.Queue[key]
	events record.EventRecorder

	claimInf, volumeInf, classInf, podInf cache.SharedIndexInformer

	claimLister  corelisters.PersistentVolumeClaimLister
	volumeLister corelisters.PersistentVolumeLister
	classLister  storagelisters.StorageClassLister

	// What was written and the view may not show yet; only the worker uses them.
	wroteClaims  written[*corev1.PersistentVolumeClaim]
	wroteVolumes written[*corev1.PersistentVolume]
	// broken is why the indexes cannot be made: a bug.
	broken error
}

// New returns the controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	core, storage := deps.Factory.Core().V1(), deps.Factory.Storage().V1()
	b := &binder{
		Deps: deps, queue: controller.NewQueue[key](name, deps.Clock), events: deps.Recorder(component),
		claimInf: core.PersistentVolumeClaims().Informer(), volumeInf: core.PersistentVolumes().Informer(),
		classInf: storage.StorageClasses().Informer(), podInf: core.Pods().Informer(),
		claimLister: core.PersistentVolumeClaims().Lister(), volumeLister: core.PersistentVolumes().Lister(), classLister: storage.StorageClasses().Lister(),
		wroteClaims: written[*corev1.PersistentVolumeClaim]{}, wroteVolumes: written[*corev1.PersistentVolume]{},
	}
	for _, add := range []func() error{
		func() error { return controller.EnsureIndexes(b.podInf, controller.IndexClaim) },
		func() error {
			return b.volumeInf.AddIndexers(cache.Indexers{indexVolumeClass: byClass, indexVolumeClaim: byClaim})
		},
		func() error {
			return b.claimInf.AddIndexers(cache.Indexers{indexClaimPending: pendingByClass, indexClaimVolume: byVolume})
		},
	} {
		if err := add(); err != nil && b.broken == nil {
			b.broken = err
		}
	}
	return b
}

func byClass(obj any) ([]string, error) {
	return []string{volumehelpers.GetPersistentVolumeClass(obj.(*corev1.PersistentVolume))}, nil
}

func byClaim(obj any) ([]string, error) {
	if ref := obj.(*corev1.PersistentVolume).Spec.ClaimRef; ref != nil {
		return []string{ref.Namespace + "/" + ref.Name}, nil
	}
	return nil, nil
}

func pendingByClass(obj any) ([]string, error) {
	claim := obj.(*corev1.PersistentVolumeClaim)
	if completed(claim) {
		return nil, nil
	}
	return []string{volumehelpers.GetPersistentVolumeClaimClass(claim)}, nil
}

func byVolume(obj any) ([]string, error) {
	if claim := obj.(*corev1.PersistentVolumeClaim); claim.Spec.VolumeName != "" {
		return []string{claim.Spec.VolumeName}, nil
	}
	return nil, nil
}

// completed says that the claim was bound once.
func completed(claim *corev1.PersistentVolumeClaim) bool {
	return metav1.HasAnnotation(claim.ObjectMeta, volumehelpers.AnnBindCompleted)
}

func (b *binder) Name() string { return name }

func (b *binder) Run(ctx context.Context) error {
	if b.broken != nil {
		return b.broken
	}
	return controller.Run(ctx, controller.Work[key]{
		Queue:   b.queue,
		Workers: 1,
		Watches: []controller.Watch{
			controller.On(b.classInf, b.classChanged),
			controller.On(b.volumeInf, b.volumeChanged),
			controller.On(b.claimInf, b.claimChanged),
			controller.On(b.podInf, b.podChanged),
		},
		Sync:   b.sync,
		Logger: b.Logger,
	})
}

func (b *binder) wakeClaim(namespace, name string) { b.queue.Add(key{name: namespace + "/" + name}) }

func (b *binder) wakeClaims(claims []*corev1.PersistentVolumeClaim, err error) {
	for _, c := range claims { // an index that is there has no errors
		b.wakeClaim(c.Namespace, c.Name)
	}
}

// claimChanged wakes the claim and the volumes that name it.
func (b *binder) claimChanged(old, cur *corev1.PersistentVolumeClaim) {
	if cur == nil {
		cur = old
	}
	b.wakeClaim(cur.Namespace, cur.Name)
	if cur.Spec.VolumeName != "" {
		b.queue.Add(key{volume: true, name: cur.Spec.VolumeName})
	}
	volumes, err := controller.ByIndex[*corev1.PersistentVolume](b.volumeInf.GetIndexer(), indexVolumeClaim, controller.Key(cur))
	if err != nil {
		return
	}
	for _, v := range volumes {
		b.queue.Add(key{volume: true, name: v.Name})
	}
}

// volumeChanged wakes the volume, the claims that name it or that it names,
// and, if it is free, the claims that it would do for.
func (b *binder) volumeChanged(old, cur *corev1.PersistentVolume) {
	for _, v := range []*corev1.PersistentVolume{old, cur} {
		if v != nil && v.Spec.ClaimRef != nil {
			b.wakeClaim(v.Spec.ClaimRef.Namespace, v.Spec.ClaimRef.Name)
		}
	}
	free := cur != nil && cur.Spec.ClaimRef == nil && cur.Status.Phase == corev1.VolumeAvailable
	if cur == nil {
		cur = old
	}
	b.queue.Add(key{volume: true, name: cur.Name})
	b.wakeClaims(controller.ByIndex[*corev1.PersistentVolumeClaim](b.claimInf.GetIndexer(), indexClaimVolume, cur.Name))
	if !free {
		return
	}
	pending, err := controller.ByIndex[*corev1.PersistentVolumeClaim](b.claimInf.GetIndexer(), indexClaimPending, volumehelpers.GetPersistentVolumeClass(cur))
	if err != nil {
		return
	}
	for _, claim := range pending {
		delay, err := volumehelpers.IsDelayBindingMode(claim, b.classLister)
		if err != nil || claim.Spec.VolumeName != "" || !volumehelpers.CheckAccessModes(claim, cur) {
			continue
		}
		if match, err := volumehelpers.FindMatchingVolume(claim, []*corev1.PersistentVolume{cur}, nil, nil, delay, true); err == nil && match != nil {
			b.wakeClaim(claim.Namespace, claim.Name)
		}
	}
}

// classChanged wakes the claims that wait for the class, or for a default one.
func (b *binder) classChanged(_, cur *storagev1.StorageClass) {
	if cur == nil {
		return
	}
	classes := []string{cur.Name}
	if isDefault(cur) {
		classes = append(classes, "")
	}
	b.wakeClaims(controller.ByIndex[*corev1.PersistentVolumeClaim](b.claimInf.GetIndexer(), indexClaimPending, classes...))
}

// podChanged wakes the claims of a pod that is new: those that wait for a
// consumer say so.
func (b *binder) podChanged(old, cur *corev1.Pod) {
	if old != nil || cur == nil || len(cur.Spec.Volumes) == 0 || cur.Spec.NodeName != "" {
		return
	}
	for _, name := range controller.PodClaims(cur) {
		if claim, err := b.claimLister.PersistentVolumeClaims(cur.Namespace).Get(name); err == nil && !completed(claim) {
			b.wakeClaim(cur.Namespace, name)
		}
	}
}

func (b *binder) sync(ctx context.Context, k key) error {
	if k.volume {
		if volume := b.volume(k.name); volume != nil {
			return b.syncVolume(ctx, volume)
		}
		return nil
	}
	namespace, name, err := cache.SplitMetaNamespaceKey(k.name)
	if err != nil {
		return err
	}
	if claim := b.claim(namespace, name); claim != nil {
		return b.syncClaim(ctx, claim)
	}
	return nil
}

// claim returns a claim as it was last seen or written; nil if there is none.
func (b *binder) claim(namespace, name string) *corev1.PersistentVolumeClaim {
	seen, err := b.claimLister.PersistentVolumeClaims(namespace).Get(name)
	return b.wroteClaims.latest(namespace+"/"+name, seen, !apierrors.IsNotFound(err))
}

// volume is the same for volumes.
func (b *binder) volume(name string) *corev1.PersistentVolume {
	seen, err := b.volumeLister.Get(name)
	return b.wroteVolumes.latest(name, seen, !apierrors.IsNotFound(err))
}

// written holds, by key, objects that were written and that the view may not
// show yet. It is as large as what the view lags behind: an event of each write
// makes the controller look at the object again.
type written[T metav1.Object] map[string]T

// latest is the newer one of what is seen in the view and what was written.
func (w written[T]) latest(key string, seen T, exists bool) T {
	have, ok := w[key]
	switch {
	case !exists:
		delete(w, key)
		var none T
		return none
	case !ok:
		return seen
	}
	c, err := resourceversion.CompareResourceVersion(seen.GetResourceVersion(), have.GetResourceVersion())
	if err == nil && c < 0 && seen.GetUID() == have.GetUID() {
		return have
	}
	delete(w, key)
	return seen
}
