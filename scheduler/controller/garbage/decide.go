package garbage

import (
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// owners sorts an object's owners by what they mean for it.
type owners struct {
	solid    []types.UID // exist
	dangling []types.UID // do not exist
	waiting  []types.UID // are being deleted and wait until it is gone
}

// action is what to do about an object. The zero value is nothing.
type action struct {
	drop    []types.UID                 // take these owners off it
	unblock bool                        // let its owners not wait for it any more
	remove  *metav1.DeletionPropagation // delete it so
}

// decide says what becomes of an object with owners. hasDeps: it owns others;
// cycle: one of those waits for its own dependents; finalizers are its own.
func decide(o owners, hasDeps, cycle bool, finalizers []string) action {
	switch {
	case len(o.solid)+len(o.dangling)+len(o.waiting) == 0:
		return action{} // nobody owns it
	case len(o.solid) > 0:
		// It stays, but owners that are gone or wait for it must not be named: the
		// latter would wait for ever.
		return action{drop: slices.Concat(o.dangling, o.waiting)}
	case len(o.waiting) > 0 && hasDeps:
		// Its owner waits for it, so it must wait for its own. If that went round in
		// a circle, nobody would ever go: then its owners do not wait.
		return action{unblock: cycle, remove: new(metav1.DeletePropagationForeground)}
	case slices.Contains(finalizers, metav1.FinalizerOrphanDependents):
		return action{remove: new(metav1.DeletePropagationOrphan)}
	case slices.Contains(finalizers, metav1.FinalizerDeleteDependents):
		return action{remove: new(metav1.DeletePropagationForeground)}
	}
	return action{remove: new(metav1.DeletePropagationBackground)}
}
