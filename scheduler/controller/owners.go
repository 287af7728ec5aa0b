package controller

import (
	"context"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// Owners are the objects of one kind that control others by selector.
type Owners[T metav1.Object] struct {
	Kind string
	// Get and List read the shared view.
	Get      func(namespace, name string) (T, error)
	List     func(namespace string) ([]T, error)
	Selector func(T) *metav1.LabelSelector
}

// Concerned calls wake with those that a change of an object concerns: who
// controls or controlled it, and, when nobody controls it and it is new or has
// other labels than before, who may adopt it. old or cur is nil where there is none.
func Concerned[O interface {
	comparable
	metav1.Object
}, T metav1.Object](owners Owners[T], old, cur O, wake func(T)) {
	var none O
	for _, obj := range []O{old, cur} {
		if obj == none {
			continue
		}
		if owner, ok := owners.controlling(obj); ok {
			wake(owner)
		}
	}
	if cur == none || cur.GetDeletionTimestamp() != nil || metav1.GetControllerOfNoCopy(cur) != nil {
		return
	}
	if old != none && metav1.GetControllerOfNoCopy(old) == nil && equality.Semantic.DeepEqual(old.GetLabels(), cur.GetLabels()) {
		return // an orphan that matches nothing new
	}
	all, err := owners.List(cur.GetNamespace())
	if err != nil {
		return // a lister of a cache has no errors
	}
	for _, owner := range all {
		if sel, err := metav1.LabelSelectorAsSelector(owners.Selector(owner)); err == nil && !sel.Empty() && sel.Matches(labels.Set(cur.GetLabels())) {
			wake(owner)
		}
	}
}

func (o Owners[T]) controlling(obj metav1.Object) (owner T, ok bool) {
	ref := metav1.GetControllerOfNoCopy(obj)
	if ref == nil || ref.Kind != o.Kind {
		return owner, false
	}
	owner, err := o.Get(obj.GetNamespace(), ref.Name)
	return owner, err == nil && owner.GetUID() == ref.UID
}

// ClaimPods makes owner control those of pods that its selector matches, and no
// others, and returns them.
func ClaimPods(ctx context.Context, client kubernetes.Interface, owner metav1.Object, kind schema.GroupVersionKind, selector labels.Selector,
	fresh func(context.Context) (metav1.Object, error), pods []*corev1.Pod) ([]*corev1.Pod, error) {
	return Claim(ctx, owner, PlanClaims(owner, selector, pods), Claimer{
		Kind: kind, Fresh: fresh,
		Patch: func(ctx context.Context, pod string, patch []byte) error {
			_, err := client.CoreV1().Pods(owner.GetNamespace()).Patch(ctx, pod, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
			return err
		},
	})
}

// ControlledPods are the pods that Controlled finds.
func ControlledPods(pods cache.SharedIndexInformer, owner metav1.Object) ([]*corev1.Pod, error) {
	return Controlled[*corev1.Pod](pods.GetIndexer(), owner.GetNamespace(), owner.GetUID())
}
