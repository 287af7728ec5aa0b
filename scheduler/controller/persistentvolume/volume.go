package persistentvolume

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	volumehelpers "k8s.io/component-helpers/storage/volume"
)

// syncVolume brings a volume's phase in line with its claim, and reclaims the
// volume when that is gone.
func (b *binder) syncVolume(ctx context.Context, volume *corev1.PersistentVolume) error {
	volume, err := b.noteMigration(ctx, volume)
	if err != nil {
		return err
	}
	ref := volume.Spec.ClaimRef
	if ref == nil || ref.UID == "" {
		// Free, or meant for a claim that is not bound to it yet.
		_, err := b.updateVolumePhase(ctx, volume, corev1.VolumeAvailable, "")
		return err
	}
	claim, err := b.claimOf(ctx, volume)
	switch {
	case err != nil:
		return err
	case claim == nil:
		return b.release(ctx, volume)
	case claim.Spec.VolumeName == "":
		if volumehelpers.CheckVolumeModeMismatches(&claim.Spec, &volume.Spec) {
			b.events.Eventf(volume, corev1.EventTypeWarning, reasonVolumeMismatch, "Cannot bind PersistentVolume to requested PersistentVolumeClaim %q due to incompatible volumeMode.", claim.Name)
			b.events.Eventf(claim, corev1.EventTypeWarning, reasonVolumeMismatch, "Cannot bind PersistentVolume %q to requested PersistentVolumeClaim due to incompatible volumeMode.", volume.Name)
			return nil
		}
		b.wakeClaim(claim.Namespace, claim.Name) // its sync completes the binding
		return nil
	case claim.Spec.VolumeName == volume.Name:
		_, err := b.updateVolumePhase(ctx, volume, corev1.VolumeBound, "")
		return err
	}
	// The claim has another volume.
	if metav1.HasAnnotation(volume.ObjectMeta, volumehelpers.AnnDynamicallyProvisioned) && volume.Spec.PersistentVolumeReclaimPolicy == corev1.PersistentVolumeReclaimDelete {
		return b.release(ctx, volume)
	}
	return b.unbind(ctx, volume)
}

// claimOf returns the claim that the volume is bound to, nil if it is gone. A
// claim that the view does not show may be too new for it: before a volume is
// reclaimed the store itself is asked.
func (b *binder) claimOf(ctx context.Context, volume *corev1.PersistentVolume) (*corev1.PersistentVolumeClaim, error) {
	ref := volume.Spec.ClaimRef
	claim := b.claim(ref.Namespace, ref.Name)
	released := volume.Status.Phase == corev1.VolumeReleased || volume.Status.Phase == corev1.VolumeFailed
	if claim == nil && released || claim != nil && claim.UID == ref.UID {
		return claim, nil
	}
	claim, err := b.Client.CoreV1().PersistentVolumeClaims(ref.Namespace).Get(ctx, ref.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("claim %s/%s of volume %s: %w", ref.Namespace, ref.Name, volume.Name, err)
	case claim.UID != ref.UID:
		return nil, nil // another one of that name
	}
	return claim, nil
}

// release does with a volume without a claim what its policy says.
func (b *binder) release(ctx context.Context, volume *corev1.PersistentVolume) error {
	if volume.Status.Phase != corev1.VolumeReleased && volume.Status.Phase != corev1.VolumeFailed {
		var err error
		if volume, err = b.updateVolumePhase(ctx, volume, corev1.VolumeReleased, ""); err != nil {
			return err
		}
	}
	if volume.Annotations[volumehelpers.AnnMigratedTo] != "" {
		return nil // a driver's business
	}
	switch volume.Spec.PersistentVolumeReclaimPolicy {
	case corev1.PersistentVolumeReclaimRetain:
		return nil
	case corev1.PersistentVolumeReclaimRecycle:
		return b.failVolume(ctx, volume, reasonFailedRecycle, "No recycler plugin found for the volume!")
	case corev1.PersistentVolumeReclaimDelete:
		if why := deletable(volume); why != "" {
			return b.failVolume(ctx, volume, reasonFailedDelete, why)
		}
		return nil
	}
	return b.failVolume(ctx, volume, reasonUnknownPolicy, "Volume has unrecognized PersistentVolumeReclaimPolicy")
}

// deletable says why nobody will delete a released volume; "" if its
// provisioner does.
func deletable(volume *corev1.PersistentVolume) string {
	if plugin := volume.Annotations[volumehelpers.AnnDynamicallyProvisioned]; plugin != "" {
		if strings.HasPrefix(plugin, inTree) {
			return "no volume plugin matched name: " + plugin
		}
		return ""
	}
	if volume.Spec.CSI != nil {
		return ""
	}
	return fmt.Sprintf("error getting deleter volume plugin for volume %q: no deletable volume plugin matched", volume.Name)
}

// failVolume marks a volume as failed, and says why once.
func (b *binder) failVolume(ctx context.Context, volume *corev1.PersistentVolume, reason, message string) error {
	if volume.Status.Phase == corev1.VolumeFailed {
		return nil
	}
	volume, err := b.updateVolumePhase(ctx, volume, corev1.VolumeFailed, message)
	if err == nil {
		b.events.Event(volume, corev1.EventTypeWarning, reason, message)
	}
	return err
}

// unbind frees a volume whose claim has another one: wholly if the binding was
// this controller's, else it stays meant for the claim.
func (b *binder) unbind(ctx context.Context, volume *corev1.PersistentVolume) error {
	clone := volume.DeepCopy()
	if metav1.HasAnnotation(volume.ObjectMeta, volumehelpers.AnnBoundByController) {
		clone.Spec.ClaimRef = nil
		delete(clone.Annotations, volumehelpers.AnnBoundByController)
	} else {
		clone.Spec.ClaimRef.UID = ""
	}
	volume, err := b.updateVolume(ctx, clone)
	if err != nil {
		return err
	}
	_, err = b.updateVolumePhase(ctx, volume, corev1.VolumeAvailable, "")
	return err
}

// noteMigration notes which driver took over from the plugin that provisioned
// the volume; that one's finalizer has nobody left to take it off.
func (b *binder) noteMigration(ctx context.Context, volume *corev1.PersistentVolume) (*corev1.PersistentVolume, error) {
	annotations := migratedAnnotations(volume.Annotations, volumehelpers.AnnDynamicallyProvisioned)
	stale := migrated[volume.Annotations[volumehelpers.AnnDynamicallyProvisioned]] != "" && slices.Contains(volume.Finalizers, volumehelpers.PVDeletionInTreeProtectionFinalizer)
	if annotations == nil && !stale {
		return volume, nil
	}
	clone := volume.DeepCopy()
	if annotations != nil {
		clone.Annotations = annotations
	}
	if stale {
		clone.Finalizers = slices.DeleteFunc(clone.Finalizers, func(f string) bool { return f == volumehelpers.PVDeletionInTreeProtectionFinalizer })
	}
	return b.updateVolume(ctx, clone)
}

func (b *binder) updateVolume(ctx context.Context, volume *corev1.PersistentVolume) (*corev1.PersistentVolume, error) {
	out, err := b.Client.CoreV1().PersistentVolumes().Update(ctx, volume, metav1.UpdateOptions{})
	if err != nil {
		return nil, fmt.Errorf("update volume %s: %w", volume.Name, err)
	}
	b.wroteVolumes[out.Name] = out
	return out, nil
}

// updateVolumePhase writes the phase unless the volume has it.
func (b *binder) updateVolumePhase(ctx context.Context, volume *corev1.PersistentVolume, phase corev1.PersistentVolumePhase, message string) (*corev1.PersistentVolume, error) {
	if volume.Status.Phase == phase {
		return volume, nil
	}
	clone := volume.DeepCopy()
	clone.Status.Phase, clone.Status.Message = phase, message
	out, err := b.Client.CoreV1().PersistentVolumes().UpdateStatus(ctx, clone, metav1.UpdateOptions{})
	if err != nil {
		return nil, fmt.Errorf("update the phase of volume %s: %w", volume.Name, err)
	}
	b.wroteVolumes[out.Name] = out
	return out, nil
}
