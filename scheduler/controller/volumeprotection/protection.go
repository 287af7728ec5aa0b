// Package volumeprotection keeps what is in use from going: three controllers
// hold finalizers on PersistentVolumeClaims that pods use, on PersistentVolumes
// that are bound, and on VolumeAttributesClasses that a claim or a volume names
// (upstream's pvcprotection, pvprotection and vacprotection).
//
// Inputs: PersistentVolumeClaims and Pods; PersistentVolumes;
// VolumeAttributesClasses, PersistentVolumeClaims and PersistentVolumes. Before
// a claim is let go, the pods of its namespace are read from the store itself:
// the view may not show the newest yet.
// Outputs: adds the finalizer to objects that lack it, and takes it off those
// that are being deleted when nothing uses them any more.
package volumeprotection

import (
	"fmt"
	"slices"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The finalizers, as upstream's.
const (
	claimFinalizer  = "kubernetes.io/pvc-protection"
	volumeFinalizer = "kubernetes.io/pv-protection"
	classFinalizer  = "kubernetes.io/vac-protection"
)

// concerned says that an object lacks the finalizer, or waits for it to go.
func concerned(obj metav1.Object, finalizer string) bool {
	return slices.Contains(obj.GetFinalizers(), finalizer) == (obj.GetDeletionTimestamp() != nil)
}

// set adds the finalizer, or takes it off.
func set(obj metav1.Object, finalizer string, on bool) {
	if on {
		obj.SetFinalizers(append(obj.GetFinalizers(), finalizer))
		return
	}
	obj.SetFinalizers(slices.DeleteFunc(slices.Clone(obj.GetFinalizers()), func(f string) bool { return f == finalizer }))
}

// settled drops the error of an object that is gone, and names the object in others.
func settled(err error, what, name string) error {
	if err == nil || apierrors.IsNotFound(err) {
		return nil
	}
	return fmt.Errorf("finalizer of %s %s: %w", what, name, err)
}
