package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// Claims says what is to be done so that an owner controls exactly the objects
// that its selector matches.
type Claims[T metav1.Object] struct {
	Owned   []T // controlled by the owner and matching
	Adopt   []T // controlled by nobody and matching
	Release []T // controlled by the owner, matching no longer
}

// PlanClaims sorts objects by what their owner should do with them. Objects of
// other controllers and of other namespaces are left alone; an owner that is
// being deleted neither adopts nor releases, and nobody adopts what is being
// deleted.
func PlanClaims[T metav1.Object](owner metav1.Object, selector labels.Selector, objects []T) Claims[T] {
	var c Claims[T]
	deleting := owner.GetDeletionTimestamp() != nil
	for _, obj := range objects {
		match := selector.Matches(labels.Set(obj.GetLabels()))
		ref := metav1.GetControllerOfNoCopy(obj)
		switch {
		case obj.GetNamespace() != owner.GetNamespace():
		case ref != nil && ref.UID != owner.GetUID():
		case ref != nil && match:
			c.Owned = append(c.Owned, obj)
		case ref != nil && !deleting:
			c.Release = append(c.Release, obj)
		case ref == nil && match && !deleting && obj.GetDeletionTimestamp() == nil:
			c.Adopt = append(c.Adopt, obj)
		}
	}
	return c
}

// Claimer carries out Claims.
type Claimer struct {
	// Kind of the owner.
	Kind schema.GroupVersionKind
	// Fresh reads the owner from the store itself. It is called at most once, and
	// only before an adoption: an owner that was deleted and made anew meanwhile,
	// or is being deleted, must not adopt.
	Fresh func(ctx context.Context) (metav1.Object, error)
	// Patch sends a strategic merge patch for the object of that name.
	Patch func(ctx context.Context, name string, patch []byte) error
}

// Claim carries c out and returns the objects that owner controls now. The
// error joins those of all objects that could not be adopted or released;
// objects that are gone are no error.
func Claim[T metav1.Object](ctx context.Context, owner metav1.Object, c Claims[T], m Claimer) ([]T, error) {
	owned := append([]T(nil), c.Owned...)
	var errs []error
	if len(c.Adopt) > 0 {
		if err := m.mayAdopt(ctx, owner); err != nil {
			errs = append(errs, err)
			c.Adopt = nil
		}
	}
	for _, obj := range c.Adopt {
		err := m.Patch(ctx, obj.GetName(), adoptPatch(owner, m.Kind, obj.GetUID()))
		switch {
		case apierrors.IsNotFound(err):
		case err != nil:
			errs = append(errs, fmt.Errorf("adopt %s/%s for %s %s: %w", obj.GetNamespace(), obj.GetName(), m.Kind.Kind, owner.GetName(), err))
		default:
			owned = append(owned, obj)
		}
	}
	for _, obj := range c.Release {
		err := m.Patch(ctx, obj.GetName(), releasePatch(owner, obj.GetUID()))
		// Invalid: the object has no such owner any more, or is another of that name.
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsInvalid(err) {
			errs = append(errs, fmt.Errorf("release %s/%s from %s %s: %w", obj.GetNamespace(), obj.GetName(), m.Kind.Kind, owner.GetName(), err))
		}
	}
	return owned, errors.Join(errs...)
}

func (m Claimer) mayAdopt(ctx context.Context, owner metav1.Object) error {
	fresh, err := m.Fresh(ctx)
	if err != nil {
		return fmt.Errorf("adopt for %s %s/%s: read it again: %w", m.Kind.Kind, owner.GetNamespace(), owner.GetName(), err)
	}
	if fresh.GetUID() != owner.GetUID() {
		return fmt.Errorf("adopt for %s %s/%s: it is gone, another has its name", m.Kind.Kind, owner.GetNamespace(), owner.GetName())
	}
	if fresh.GetDeletionTimestamp() != nil {
		return fmt.Errorf("adopt for %s %s/%s: it is being deleted", m.Kind.Kind, owner.GetNamespace(), owner.GetName())
	}
	return nil
}

// adoptPatch makes owner the controller of the object with that uid; the uid in
// the patch makes the API refuse it for another object of the same name.
func adoptPatch(owner metav1.Object, kind schema.GroupVersionKind, uid types.UID) []byte {
	yes := true
	return mustJSON(map[string]any{"metadata": map[string]any{
		"uid": uid,
		"ownerReferences": []metav1.OwnerReference{{
			APIVersion: kind.GroupVersion().String(), Kind: kind.Kind,
			Name: owner.GetName(), UID: owner.GetUID(),
			Controller: &yes, BlockOwnerDeletion: &yes,
		}},
	}})
}

// releasePatch takes owner off the object's owner references.
func releasePatch(owner metav1.Object, uid types.UID) []byte {
	return mustJSON(map[string]any{"metadata": map[string]any{
		"uid":             uid,
		"ownerReferences": []map[string]any{{"$patch": "delete", "uid": owner.GetUID()}},
	}})
}

// mustJSON encodes values whose types always encode.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("controller: encode a patch: " + err.Error())
	}
	return b
}
