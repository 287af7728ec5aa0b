package scheduler

import (
	"context"
	"fmt"
	"maps"
	"time"

	v1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	volumehelpers "k8s.io/component-helpers/storage/volume"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/placement"
	"skein.io/skein/scheduler/queue"
)

// volumeTimeout is how long a pod with a node waits for its volumes before it
// is planned anew: upstream's VolumeBindingArgs.BindTimeoutSeconds.
const volumeTimeout = 10 * time.Minute

// volumeView is what placement reads of storage.
type volumeView struct {
	claims, volumes, classes, csiNodes, drivers, capacities, attachments cache.SharedIndexInformer

	claimLister  corelisters.PersistentVolumeClaimLister
	volumeLister corelisters.PersistentVolumeLister
	nodeLister   corelisters.NodeLister
}

func newVolumeView(f informers.SharedInformerFactory) volumeView {
	core, storage := f.Core().V1(), f.Storage().V1()
	return volumeView{
		claims: core.PersistentVolumeClaims().Informer(), volumes: core.PersistentVolumes().Informer(),
		classes: storage.StorageClasses().Informer(), csiNodes: storage.CSINodes().Informer(), drivers: storage.CSIDrivers().Informer(),
		capacities: storage.CSIStorageCapacities().Informer(), attachments: storage.VolumeAttachments().Informer(),

		claimLister: core.PersistentVolumeClaims().Lister(), volumeLister: core.PersistentVolumes().Lister(), nodeLister: core.Nodes().Lister(),
	}
}

// volumeWork is what is under way for the volumes of decided pods. It belongs
// to the loop, whose mu guards all but view.
type volumeWork struct {
	view volumeView
	// held is what the snapshot takes for done, from the decision until the pod
	// is bound or the decision undone.
	held map[types.UID]*placement.VolumeBindings
	// waits are the pods whose bindings are written and not carried out yet, all
	// with the same time-out.
	waits   map[types.UID]*volumeWait
	byClaim map[string]map[types.UID]bool
	settled []job
}

// volumeWait is a pod that waits for the binder or a provisioner.
type volumeWait struct {
	binding  binding                  // to be carried out then
	written  placement.VolumeBindings // as the API returned it
	deadline time.Time
}

func newVolumeWork(f informers.SharedInformerFactory) volumeWork {
	return volumeWork{
		view:    newVolumeView(f),
		held:    map[types.UID]*placement.VolumeBindings{},
		waits:   map[types.UID]*volumeWait{},
		byClaim: map[string]map[types.UID]bool{},
	}
}

// volumeWatches feed the snapshot's picture of storage.
func (l *loop) volumeWatches() []controller.Watch {
	v := &l.volumes.view
	return []controller.Watch{
		controller.On(v.classes, l.classChanged),
		controller.On(v.drivers, l.driverChanged),
		controller.On(v.csiNodes, l.csiNodeChanged),
		controller.On(v.capacities, l.capacityChanged),
		controller.On(v.attachments, l.attachmentChanged),
		controller.On(v.volumes, l.volumeChanged),
		controller.On(v.claims, l.claimChanged),
	}
}

func (l *loop) claimChanged(old, cur *v1.PersistentVolumeClaim) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cur == nil {
		l.turns++
		l.snapshot.RemoveClaim(old.Namespace, old.Name)
		l.checkWaits(old.Namespace + "/" + old.Name)
		return
	}
	if cur.DeletionTimestamp != nil {
		l.turns++
	}
	l.snapshot.SetClaim(cur)
	l.checkWaits(cur.Namespace + "/" + cur.Name)
	if l.queue.Move(queue.PodClaims, func(pod *v1.Pod) bool { return placement.UsesClaim(pod, cur.Namespace, cur.Name) }, l.clock.Now()) > 0 {
		l.nudge()
	}
}

func (l *loop) volumeChanged(old, cur *v1.PersistentVolume) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cur == nil {
		l.snapshot.RemoveVolume(old.Name)
	} else {
		l.snapshot.SetVolume(cur)
		if volumeHelps(old, cur) {
			l.move(queue.Volumes)
		}
	}
	for _, volume := range []*v1.PersistentVolume{old, cur} {
		if volume != nil && volume.Spec.ClaimRef != nil {
			l.checkWaits(volume.Spec.ClaimRef.Namespace + "/" + volume.Spec.ClaimRef.Name)
		}
	}
}

// volumeHelps reports whether a change of a volume may let a pod run that
// could not: a free volume can be bound, and the labels of any say where it is.
func volumeHelps(old, cur *v1.PersistentVolume) bool {
	if old == nil || !maps.Equal(old.Labels, cur.Labels) {
		return true
	}
	return cur.Status.Phase == v1.VolumeAvailable &&
		(old.Status.Phase != cur.Status.Phase || !equality.Semantic.DeepEqual(&old.Spec, &cur.Spec))
}

func (l *loop) classChanged(old, cur *storagev1.StorageClass) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cur == nil {
		l.snapshot.RemoveStorageClass(old.Name)
		return
	}
	l.snapshot.SetStorageClass(cur)
	if old == nil || !equality.Semantic.DeepEqual(old.AllowedTopologies, cur.AllowedTopologies) {
		l.move(queue.StorageClasses)
	}
}

func (l *loop) driverChanged(old, cur *storagev1.CSIDriver) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cur == nil {
		l.snapshot.RemoveCSIDriver(old.Name)
		l.move(queue.CSI)
		return
	}
	l.snapshot.SetCSIDriver(cur)
	l.move(queue.CSI)
}

func (l *loop) csiNodeChanged(old, cur *storagev1.CSINode) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cur == nil {
		l.snapshot.RemoveCSINode(old.Name)
		return
	}
	l.snapshot.SetCSINode(cur)
	if old == nil || !equality.Semantic.DeepEqual(old.Spec, cur.Spec) {
		l.move(queue.CSI)
	}
}

func (l *loop) capacityChanged(old, cur *storagev1.CSIStorageCapacity) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cur == nil {
		l.snapshot.RemoveStorageCapacity(old.Namespace, old.Name)
		return
	}
	l.snapshot.SetStorageCapacity(cur)
	limit := placement.StorageLimit(cur)
	if limit == nil {
		return
	}
	if old != nil {
		if was := placement.StorageLimit(old); was != nil && limit.Cmp(*was) <= 0 {
			return
		}
	}
	l.move(queue.CSI)
}

func (l *loop) attachmentChanged(old, cur *storagev1.VolumeAttachment) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cur == nil {
		l.snapshot.RemoveAttachment(old)
		l.move(queue.CSI)
		return
	}
	l.snapshot.SetAttachment(cur)
}

// reserveVolumes takes the volumes that a decision needs; nil if there is
// nothing to be done for them. l.mu is held.
func (l *loop) reserveVolumes(req placement.Request, node string) (*placement.VolumeBindings, error) {
	if len(req.Pod.Spec.Volumes) == 0 {
		return nil, nil
	}
	bindings, err := l.snapshot.VolumeBindings(req, node)
	if bindings != nil {
		l.volumes.held[req.Pod.UID] = bindings
	}
	return bindings, err
}

// releaseVolumes ends what is under way for the volumes of a pod: it is bound,
// gone, or to be planned anew. l.mu is held.
func (l *loop) releaseVolumes(uid types.UID) {
	bindings := l.volumes.held[uid]
	if bindings == nil {
		return
	}
	delete(l.volumes.held, uid)
	l.snapshot.ForgetVolumes(bindings)
	l.endWait(uid)
}

// endWait forgets that a pod waits. l.mu is held.
func (l *loop) endWait(uid types.UID) {
	w := l.volumes.waits[uid]
	if w == nil {
		return
	}
	delete(l.volumes.waits, uid)
	for _, key := range claimsOf(&w.written) {
		delete(l.volumes.byClaim[key], uid)
		if len(l.volumes.byClaim[key]) == 0 {
			delete(l.volumes.byClaim, key)
		}
	}
}

func claimsOf(b *placement.VolumeBindings) (keys []string) {
	for i := range b.Static {
		keys = append(keys, b.Static[i].Claim.Namespace+"/"+b.Static[i].Claim.Name)
	}
	for _, claim := range b.Provision {
		keys = append(keys, claim.Namespace+"/"+claim.Name)
	}
	return keys
}

// volumeBinding writes what a decision makes of volumes and claims. The binder
// does the rest; the pod is bound when it has.
type volumeBinding struct {
	pod      *v1.Pod
	bindings *placement.VolumeBindings
	turns    uint64 // as of a binding
}

func (b volumeBinding) do(ctx context.Context, l *loop) {
	bind := binding{pod: b.pod, node: b.bindings.Node, version: b.pod.ResourceVersion, turns: b.turns}
	bind.expect(ctx, l)
	written, err := b.write(ctx, l)
	if err != nil {
		volumeFailure{b.pod, err}.do(ctx, l)
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.volumes.held[b.pod.UID] != b.bindings {
		return // the pod is gone meanwhile, or bound by somebody else
	}
	l.volumes.waits[b.pod.UID] = &volumeWait{binding: bind, written: written, deadline: l.clock.Now().Add(volumeTimeout)}
	for _, key := range claimsOf(&written) {
		if l.volumes.byClaim[key] == nil {
			l.volumes.byClaim[key] = map[types.UID]bool{}
		}
		l.volumes.byClaim[key][b.pod.UID] = true
	}
	l.checkWait(b.pod.UID)
	l.nudge() // there may be a deadline now
}

// write makes the volumes known to their claims and the node known to the
// claims that wait for a provisioner. What was written stays if a later write
// fails: the next attempt finds it and goes on.
func (b volumeBinding) write(ctx context.Context, l *loop) (placement.VolumeBindings, error) {
	written := placement.VolumeBindings{Node: b.bindings.Node}
	for _, s := range b.bindings.Static {
		if s.Changed {
			// A copy, here and below: encoding writes the kind into the object, which the snapshot holds as well.
			volume, err := l.client.CoreV1().PersistentVolumes().Update(ctx, s.Volume.DeepCopy(), metav1.UpdateOptions{})
			if err != nil {
				return written, fmt.Errorf("bind persistentvolume %q to claim %s/%s: %w", s.Volume.Name, s.Claim.Namespace, s.Claim.Name, err)
			}
			s.Volume = volume
		}
		written.Static = append(written.Static, s)
	}
	for _, claim := range b.bindings.Provision {
		claim, err := l.client.CoreV1().PersistentVolumeClaims(claim.Namespace).Update(ctx, claim.DeepCopy(), metav1.UpdateOptions{})
		if err != nil {
			return written, fmt.Errorf("ask for a volume: %w", err)
		}
		written.Provision = append(written.Provision, claim)
	}
	return written, nil
}

// volumeFailure undoes a decision because of the pod's volumes.
type volumeFailure struct {
	pod *v1.Pod
	err error
}

func (f volumeFailure) do(ctx context.Context, l *loop) {
	if ctx.Err() != nil || !l.undo(f.pod, false) {
		return
	}
	l.log.Info("volumes not bound, the pod will be planned again", "pod", f.pod.Namespace+"/"+f.pod.Name, "err", f.err)
	failure{pod: f.pod, reason: v1.PodReasonSchedulerError, message: fmt.Sprintf("running PreBind plugin %q: %v", placement.VolumeBinding, f.err), expected: true}.do(ctx, l)
}

// checkWaits looks after the pods that wait for a claim. l.mu is held.
func (l *loop) checkWaits(claim string) {
	for uid := range l.volumes.byClaim[claim] {
		l.checkWait(uid)
	}
}

// checkWait looks whether a pod's volumes are bound, or will not be. l.mu is held.
func (l *loop) checkWait(uid types.UID) {
	w := l.volumes.waits[uid]
	done, err := l.volumes.view.bound(&w.written)
	switch {
	case err != nil:
		l.settle(uid, volumeFailure{w.binding.pod, fmt.Errorf("binding volumes: %w", err)})
	case done:
		l.settle(uid, w.binding)
	}
}

// settle ends a wait with what is to be done now. l.mu is held.
func (l *loop) settle(uid types.UID, j job) {
	l.endWait(uid)
	l.volumes.settled = append(l.volumes.settled, j)
	l.nudge()
}

// settledVolumes returns what is to be done for pods that wait no longer, and
// when the next wait ends unless something happens. l.mu is held.
func (l *loop) settledVolumes(now time.Time) (jobs []job, next time.Time, timed bool) {
	for uid, w := range l.volumes.waits {
		if !w.deadline.After(now) {
			l.settle(uid, volumeFailure{w.binding.pod, fmt.Errorf("binding volumes: %w", context.DeadlineExceeded)})
		} else if !timed || w.deadline.Before(next) {
			next, timed = w.deadline, true
		}
	}
	jobs, l.volumes.settled = l.volumes.settled, nil
	return jobs, next, timed
}

// bound reports whether the binder has done all that was asked for. The error
// says that it never will, so that the pod must be planned anew.
func (v *volumeView) bound(b *placement.VolumeBindings) (bool, error) {
	node, err := v.nodeLister.Get(b.Node)
	if err != nil {
		return false, fmt.Errorf("failed to get node %q: %w", b.Node, err)
	}
	all := true
	for i := range b.Static {
		volume, err := v.volumeLister.Get(b.Static[i].Volume.Name)
		if err != nil {
			return false, fmt.Errorf("failed to check binding: %w", err)
		}
		claim, err := v.claimLister.PersistentVolumeClaims(b.Static[i].Claim.Namespace).Get(b.Static[i].Claim.Name)
		if err != nil {
			return false, fmt.Errorf("failed to check binding: %w", err)
		}
		switch {
		case older(volume, b.Static[i].Volume):
			all = false
			continue
		case volume.Spec.ClaimRef == nil || volume.Spec.ClaimRef.UID == "":
			return false, fmt.Errorf("ClaimRef got reset for pv %q", volume.Name)
		}
		if err := reachable(volume, node); err != nil {
			return false, err
		}
		all = all && fullyBound(claim)
	}
	for _, asked := range b.Provision {
		claim, err := v.claimLister.PersistentVolumeClaims(asked.Namespace).Get(asked.Name)
		if err != nil {
			return false, fmt.Errorf("failed to check provisioning pvc: %w", err)
		}
		if older(claim, asked) {
			all = false
			continue
		}
		if claim.Annotations[volumehelpers.AnnSelectedNode] != b.Node {
			// How a provisioner says that it cannot.
			return false, fmt.Errorf("provisioning failed for PVC %q", claim.Name)
		}
		if claim.Spec.VolumeName != "" {
			// A volume that the view does not show yet will come.
			if volume, err := v.volumeLister.Get(claim.Spec.VolumeName); err != nil {
				all = false
			} else if err := reachable(volume, node); err != nil {
				return false, err
			}
		}
		all = all && fullyBound(claim)
	}
	return all, nil
}

func fullyBound(claim *v1.PersistentVolumeClaim) bool {
	return claim.Spec.VolumeName != "" && metav1.HasAnnotation(claim.ObjectMeta, volumehelpers.AnnBindCompleted)
}

func reachable(volume *v1.PersistentVolume, node *v1.Node) error {
	if err := volumehelpers.CheckNodeAffinity(volume, node.Labels); err != nil {
		return fmt.Errorf("pv %q node affinity doesn't match node %q: %w", volume.Name, node.Name, err)
	}
	return nil
}

// older says that the view does not show what was written yet.
func older(seen, written metav1.Object) bool {
	c, err := resourceversion.CompareResourceVersion(seen.GetResourceVersion(), written.GetResourceVersion())
	return err == nil && c < 0
}
