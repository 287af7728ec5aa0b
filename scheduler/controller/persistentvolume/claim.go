package persistentvolume

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	volumehelpers "k8s.io/component-helpers/storage/volume"

	"skein.io/skein/scheduler/controller"
)

// Reasons of events, as upstream's.
const (
	reasonFailedBinding        = "FailedBinding"
	reasonVolumeMismatch       = "VolumeMismatch"
	reasonFailedRecycle        = "VolumeFailedRecycle"
	reasonFailedDelete         = "VolumeFailedDelete"
	reasonExternalProvisioning = "ExternalProvisioning"
	reasonProvisioningFailed   = "ProvisioningFailed"
	reasonWaitForConsumer      = "WaitForFirstConsumer"
	reasonWaitForPod           = "WaitForPodScheduled"
	reasonClaimLost            = "ClaimLost"
	reasonClaimMisbound        = "ClaimMisbound"
	reasonUnknownPolicy        = "VolumeUnknownReclaimPolicy"
)

// annPreResize holds the size of a volume before its file system is resized.
const annPreResize = "volume.alpha.kubernetes.io/pre-resize-capacity"

func (b *binder) syncClaim(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	if migrated := migratedAnnotations(claim.Annotations, volumehelpers.AnnStorageProvisioner, volumehelpers.AnnBetaStorageProvisioner); migrated != nil {
		clone := claim.DeepCopy()
		clone.Annotations = migrated
		var err error
		if claim, err = b.updateClaim(ctx, clone); err != nil {
			return err
		}
	}
	if completed(claim) {
		return b.syncBoundClaim(ctx, claim)
	}
	return b.syncUnboundClaim(ctx, claim)
}

// syncUnboundClaim looks for a volume for a claim that was never bound.
func (b *binder) syncUnboundClaim(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	if claim.Spec.VolumeName != "" {
		return b.syncRequestedVolume(ctx, claim)
	}
	delay, err := volumehelpers.IsDelayBindingMode(claim, b.classLister)
	if err != nil {
		return err
	}
	volume, err := b.bestMatch(claim, delay)
	if err != nil {
		return fmt.Errorf("find a volume for claim %s: %w", controller.Key(claim), err)
	}
	if volume != nil {
		return b.bind(ctx, volume, claim)
	}
	if done, err := b.assignDefaultClass(ctx, claim); done || err != nil {
		return err
	}
	switch class := volumehelpers.GetPersistentVolumeClaimClass(claim); {
	case delay && !volumehelpers.IsDelayBindingProvisioning(claim):
		b.tellWaiting(claim)
	case class != "":
		return b.provision(ctx, claim, class)
	default:
		b.events.Event(claim, corev1.EventTypeNormal, reasonFailedBinding, "no persistent volumes available for this claim and no storage class is set")
	}
	_, err = b.updateClaimStatus(ctx, claim, corev1.ClaimPending, nil)
	return err
}

// syncRequestedVolume binds a claim to the volume that it names, if that is free.
func (b *binder) syncRequestedVolume(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	volume := b.volume(claim.Spec.VolumeName)
	switch {
	case volume == nil: // it may still come
	case volume.Spec.ClaimRef == nil:
		err := satisfies(volume, claim)
		if err == nil {
			return b.bind(ctx, volume, claim)
		}
		b.events.Eventf(claim, corev1.EventTypeWarning, reasonVolumeMismatch, "Cannot bind to requested volume %q: %s", volume.Name, err)
	case volumehelpers.IsVolumeBoundToClaim(volume, claim):
		return b.bind(ctx, volume, claim)
	default:
		b.events.Eventf(claim, corev1.EventTypeWarning, reasonFailedBinding, "volume %q already bound to a different claim.", volume.Name)
		if metav1.HasAnnotation(claim.ObjectMeta, volumehelpers.AnnBoundByController) {
			// Somebody took the annotation that the binding is complete away. Nothing
			// can be done before the volume or the claim changes, which wakes the claim.
			b.Logger.Warn("claim names a volume that belongs to another", "claim", controller.Key(claim), "volume", volume.Name,
				"owner", volume.Spec.ClaimRef.Namespace+"/"+volume.Spec.ClaimRef.Name)
			return nil
		}
	}
	_, err := b.updateClaimStatus(ctx, claim, corev1.ClaimPending, nil)
	return err
}

// syncBoundClaim checks that a bound claim still has its volume.
func (b *binder) syncBoundClaim(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	if claim.Spec.VolumeName == "" {
		return b.lost(ctx, claim, reasonClaimLost, "Bound claim has lost reference to PersistentVolume. Data on the volume is lost!")
	}
	volume := b.volume(claim.Spec.VolumeName)
	switch {
	case volume == nil:
		return b.lost(ctx, claim, reasonClaimLost, "Bound claim has lost its PersistentVolume. Data on the volume is lost!")
	case volume.Spec.ClaimRef == nil || volume.Spec.ClaimRef.UID == claim.UID:
		return b.bind(ctx, volume, claim)
	}
	return b.lost(ctx, claim, reasonClaimMisbound, "Two claims are bound to the same volume, this one is bound incorrectly")
}

// lost marks a claim as lost, and says why once.
func (b *binder) lost(ctx context.Context, claim *corev1.PersistentVolumeClaim, reason, message string) error {
	if claim.Status.Phase == corev1.ClaimLost {
		return nil
	}
	claim, err := b.updateClaimStatus(ctx, claim, corev1.ClaimLost, nil)
	if err == nil {
		b.events.Event(claim, corev1.EventTypeWarning, reason, message)
	}
	return err
}

// tellWaiting says what a claim that waits for its first consumer waits for.
func (b *binder) tellWaiting(claim *corev1.PersistentVolumeClaim) {
	pods, err := controller.ByIndex[*corev1.Pod](b.podInf.GetIndexer(), controller.IndexClaim, controller.Key(claim))
	if err != nil {
		return
	}
	var names []string
	for _, pod := range pods {
		if pod.Spec.NodeName == "" && !controller.PodTerminal(pod) {
			names = append(names, pod.Name)
		}
	}
	slices.Sort(names)
	switch len(names) {
	case 0:
		b.events.Event(claim, corev1.EventTypeNormal, reasonWaitForConsumer, "waiting for first consumer to be created before binding")
	case 1:
		b.events.Eventf(claim, corev1.EventTypeNormal, reasonWaitForPod, "waiting for pod %s to be scheduled", names[0])
	default:
		b.events.Eventf(claim, corev1.EventTypeNormal, reasonWaitForPod, "waiting for pods %s to be scheduled", strings.Join(names, ","))
	}
}

// assignDefaultClass gives a claim that names no class the default one, which
// may have been made after the claim. done: it did, and the claim comes again.
func (b *binder) assignDefaultClass(ctx context.Context, claim *corev1.PersistentVolumeClaim) (done bool, err error) {
	if volumehelpers.PersistentVolumeClaimHasClass(claim) {
		return false, nil
	}
	class, err := b.defaultClass()
	if class == nil || err != nil {
		return false, err
	}
	clone := claim.DeepCopy()
	clone.Spec.StorageClassName = &class.Name
	_, err = b.updateClaim(ctx, clone)
	return err == nil, err
}

// bind saves on both sides that they belong together, the volume first, as far
// as it is not saved yet. An error leaves it to the next attempt to finish.
func (b *binder) bind(ctx context.Context, volume *corev1.PersistentVolume, claim *corev1.PersistentVolumeClaim) error {
	clone, changed, err := volumehelpers.GetBindVolumeToClaim(volume, claim)
	if err != nil {
		return err
	}
	if changed {
		if volume, err = b.updateVolume(ctx, clone); err != nil {
			return err
		}
	}
	if volume, err = b.updateVolumePhase(ctx, volume, corev1.VolumeBound, ""); err != nil {
		return err
	}
	if claim, err = b.bindClaim(ctx, claim, volume); err != nil {
		return err
	}
	_, err = b.updateClaimStatus(ctx, claim, corev1.ClaimBound, volume)
	return err
}

// bindClaim notes in the claim which volume it has.
func (b *binder) bindClaim(ctx context.Context, claim *corev1.PersistentVolumeClaim, volume *corev1.PersistentVolume) (*corev1.PersistentVolumeClaim, error) {
	if claim.Spec.VolumeName == volume.Name && completed(claim) {
		return claim, nil
	}
	clone := claim.DeepCopy()
	if clone.Spec.VolumeName != volume.Name {
		clone.Spec.VolumeName = volume.Name
		if !metav1.HasAnnotation(clone.ObjectMeta, volumehelpers.AnnBoundByController) {
			metav1.SetMetaDataAnnotation(&clone.ObjectMeta, volumehelpers.AnnBoundByController, "yes")
		}
	}
	if !completed(clone) {
		metav1.SetMetaDataAnnotation(&clone.ObjectMeta, volumehelpers.AnnBindCompleted, "yes")
	}
	return b.updateClaim(ctx, clone)
}

func (b *binder) updateClaim(ctx context.Context, claim *corev1.PersistentVolumeClaim) (*corev1.PersistentVolumeClaim, error) {
	out, err := b.Client.CoreV1().PersistentVolumeClaims(claim.Namespace).Update(ctx, claim, metav1.UpdateOptions{})
	if err != nil {
		return nil, fmt.Errorf("update claim %s: %w", controller.Key(claim), err)
	}
	b.wroteClaims[controller.Key(out)] = out
	return out, nil
}

// updateClaimStatus writes the phase and what the claim got: volume's modes and
// size, or nothing if volume is nil.
func (b *binder) updateClaimStatus(ctx context.Context, claim *corev1.PersistentVolumeClaim, phase corev1.PersistentVolumeClaimPhase,
	volume *corev1.PersistentVolume) (*corev1.PersistentVolumeClaim, error) {
	status, err := claimStatus(&claim.Status, phase, volume)
	if err != nil {
		return nil, err
	}
	if equality.Semantic.DeepEqual(&claim.Status, status) {
		return claim, nil
	}
	clone := claim.DeepCopy()
	clone.Status = *status
	out, err := b.Client.CoreV1().PersistentVolumeClaims(claim.Namespace).UpdateStatus(ctx, clone, metav1.UpdateOptions{})
	if err != nil {
		return nil, fmt.Errorf("update the status of claim %s: %w", controller.Key(claim), err)
	}
	b.wroteClaims[controller.Key(out)] = out
	return out, nil
}

// claimStatus is what the status of a claim should be.
func claimStatus(have *corev1.PersistentVolumeClaimStatus, phase corev1.PersistentVolumeClaimPhase, volume *corev1.PersistentVolume) (*corev1.PersistentVolumeClaimStatus, error) {
	want := have.DeepCopy()
	want.Phase = phase
	if volume == nil {
		want.AccessModes, want.Capacity, want.CurrentVolumeAttributesClassName = nil, nil, nil
		return want, nil
	}
	want.AccessModes = volume.Spec.AccessModes
	if have.Phase != phase {
		// Only when it becomes bound: later the file system's size may differ from
		// the volume's on purpose.
		size, ok := volume.Spec.Capacity[corev1.ResourceStorage]
		if !ok {
			return nil, fmt.Errorf("PersistentVolume %q is without a storage capacity", volume.Name)
		}
		if before, resizing := volume.Annotations[annPreResize]; resizing {
			if q, err := resource.ParseQuantity(before); err == nil {
				size = q
			}
			want.Capacity = corev1.ResourceList{corev1.ResourceStorage: size}
		} else if had, ok := have.Capacity[corev1.ResourceStorage]; !ok || size.Cmp(had) != 0 {
			want.Capacity = volume.Spec.Capacity
		}
	}
	if have.Phase == corev1.ClaimPending && phase == corev1.ClaimBound {
		want.CurrentVolumeAttributesClassName = volume.Spec.VolumeAttributesClassName
	}
	return want, nil
}
