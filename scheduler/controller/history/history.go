// Package history keeps the revisions of pod templates that StatefulSets and
// DaemonSets roll out: one ControllerRevision for each template, numbered in the
// order in which they were last asked for. kubectl rollout history and undo read
// and write them, so their form is upstream's.
//
// Everything but Keeper is pure. Only controllers use it.
package history

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/rand"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/utils/dump"

	"skein.io/skein/scheduler/controller"
)

// Hash is upstream's ComputeHash (32 bit FNV-1a over the template's canonical
// dump and the collision count), so that objects keep their names.
func Hash(t *corev1.PodTemplateSpec, collisions *int32) string {
	h := fnv.New32a()
	fmt.Fprintf(h, "%v", dump.ForHash(*t))
	if collisions != nil {
		var b [8]byte
		binary.LittleEndian.PutUint32(b[:], uint32(*collisions))
		h.Write(b[:])
	}
	return rand.SafeEncodeString(fmt.Sprint(h.Sum32()))
}

// Name is the owner's name, shortened where needed, and the hash.
func Name(owner, hash string) string {
	if room := validation.DNS1123SubdomainMaxLength - 1 - len(hash); len(owner) > room {
		owner = owner[:room]
	}
	return owner + "-" + hash
}

// Data is the template as a strategic merge patch of its owner: what a revision
// stores, and what kubectl rollout undo applies.
func Data(t *corev1.PodTemplateSpec) ([]byte, error) {
	b, err := json.Marshal(t)
	if err != nil {
		return nil, fmt.Errorf("history: encode a template: %w", err)
	}
	var m map[string]any
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.UseNumber()
	if err := dec.Decode(&m); err != nil {
		return nil, fmt.Errorf("history: encode a template: %w", err)
	}
	m["$patch"] = "replace"
	return json.Marshal(map[string]any{"spec": map[string]any{"template": m}})
}

// ErrData says that a revision holds no template.
var ErrData = errors.New("the revision holds no pod template")

// Template is the template that a revision stores. The error is ErrData.
func Template(rev *appsv1.ControllerRevision) (*corev1.PodTemplateSpec, error) {
	var data struct {
		Spec struct {
			Template *corev1.PodTemplateSpec `json:"template"`
		} `json:"spec"`
	}
	if err := json.Unmarshal(rev.Data.Raw, &data); err != nil {
		return nil, fmt.Errorf("ControllerRevision %s/%s: %w: %v", rev.Namespace, rev.Name, ErrData, err)
	}
	if data.Spec.Template == nil {
		return nil, fmt.Errorf("ControllerRevision %s/%s: %w", rev.Namespace, rev.Name, ErrData)
	}
	return data.Spec.Template, nil
}

// Holds says that the revision stores that template.
func Holds(rev *appsv1.ControllerRevision, t *corev1.PodTemplateSpec) bool {
	have, err := Template(rev)
	return err == nil && equality.Semantic.DeepEqual(have, t)
}

// Sort orders revisions by number, then by age, then by name.
func Sort(revs []*appsv1.ControllerRevision) {
	slices.SortFunc(revs, func(a, b *appsv1.ControllerRevision) int {
		return cmp.Or(cmp.Compare(a.Revision, b.Revision), a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
}

// Choice says how to come to the revision of a template.
type Choice struct {
	// Have is the revision that holds the template, nil if one has to be made.
	Have *appsv1.ControllerRevision
	// Number is what the revision's number has to be: of Have, when it differs
	// from Have's (the template is asked for again), or of the new one.
	Number int64
}

// Choose looks for the template among revisions, which Sort has sorted.
func Choose(revs []*appsv1.ControllerRevision, t *corev1.PodTemplateSpec) Choice {
	next := int64(1)
	if n := len(revs); n > 0 {
		next = revs[n-1].Revision + 1
		if Holds(revs[n-1], t) {
			return Choice{Have: revs[n-1], Number: revs[n-1].Revision}
		}
	}
	for _, rev := range slices.Backward(revs) {
		if Holds(rev, t) {
			return Choice{Have: rev, Number: next}
		}
	}
	return Choice{Number: next}
}

// Obsolete returns the oldest revisions beyond limit of those that are not live;
// revisions are sorted by Sort. A negative limit keeps all.
func Obsolete(revs []*appsv1.ControllerRevision, live map[string]bool, limit int32) []*appsv1.ControllerRevision {
	var dead []*appsv1.ControllerRevision
	for _, rev := range revs {
		if !live[rev.Name] {
			dead = append(dead, rev)
		}
	}
	if limit < 0 || len(dead) <= int(limit) {
		return nil
	}
	return dead[:len(dead)-int(limit)]
}

// Owner is who has revisions.
type Owner struct {
	metav1.Object
	Kind     schema.GroupVersionKind
	Template *corev1.PodTemplateSpec
	// Collisions counts the names that were taken by others.
	Collisions *int32
}

// New makes the revision of the owner's template.
func New(o Owner, number int64) (*appsv1.ControllerRevision, error) {
	data, err := Data(o.Template)
	if err != nil {
		return nil, fmt.Errorf("%s %s/%s: %w", o.Kind.Kind, o.GetNamespace(), o.GetName(), err)
	}
	hash := Hash(o.Template, o.Collisions)
	labels := maps.Clone(o.Template.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	labels[appsv1.ControllerRevisionHashLabelKey] = hash
	return &appsv1.ControllerRevision{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: o.GetNamespace(), Name: Name(o.GetName(), hash),
			Labels: labels, Annotations: maps.Clone(o.GetAnnotations()),
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(o, o.Kind)},
		},
		Data:     runtime.RawExtension{Raw: data},
		Revision: number,
	}, nil
}

// ErrCollision says that another object has the name of the revision to be made:
// the owner's collision count has to go up.
var ErrCollision = errors.New("the name of the revision is taken by another object")

// Keeper carries choices out.
type Keeper struct{ Client kubernetes.Interface }

// Ensure returns the revision of the owner's template: it is made, or gets the
// number that the choice asks for. The error is ErrCollision when the name is taken.
func (k Keeper) Ensure(ctx context.Context, o Owner, c Choice) (rev *appsv1.ControllerRevision, wrote bool, err error) {
	api := k.Client.AppsV1().ControllerRevisions(o.GetNamespace())
	if c.Have != nil {
		if c.Have.Revision == c.Number {
			return c.Have, false, nil
		}
		upd := c.Have.DeepCopy()
		upd.Revision = c.Number
		if rev, err = api.Update(ctx, upd, metav1.UpdateOptions{}); err != nil {
			return nil, false, fmt.Errorf("renumber ControllerRevision %s/%s: %w", upd.Namespace, upd.Name, err)
		}
		return rev, true, nil
	}
	made, err := New(o, c.Number)
	if err != nil {
		return nil, false, err
	}
	rev, err = api.Create(ctx, made, metav1.CreateOptions{})
	if !apierrors.IsAlreadyExists(err) {
		if err != nil {
			err = fmt.Errorf("create ControllerRevision %s/%s: %w", made.Namespace, made.Name, err)
		}
		return rev, err == nil, err
	}
	held, err := api.Get(ctx, made.Name, metav1.GetOptions{})
	if err != nil {
		return nil, false, fmt.Errorf("read ControllerRevision %s/%s that exists: %w", made.Namespace, made.Name, err)
	}
	if ref := metav1.GetControllerOfNoCopy(held); ref != nil && ref.UID == o.GetUID() && Holds(held, o.Template) {
		return held, true, nil // ours, the view did not show it
	}
	return nil, false, fmt.Errorf("ControllerRevision %s/%s: %w", made.Namespace, made.Name, ErrCollision)
}

// Claim makes the owner control those revisions that its selector matches, and no
// others, and returns them sorted. fresh reads the owner from the store itself.
func (k Keeper) Claim(ctx context.Context, o Owner, selector labels.Selector, fresh func(context.Context) (metav1.Object, error), view cache.Indexer) ([]*appsv1.ControllerRevision, error) {
	all, err := controller.Controlled[*appsv1.ControllerRevision](view, o.GetNamespace(), o.GetUID())
	if err != nil {
		return nil, err
	}
	revs, err := controller.Claim(ctx, o.Object, controller.PlanClaims(o.Object, selector, all), controller.Claimer{
		Kind: o.Kind, Fresh: fresh,
		Patch: func(ctx context.Context, rev string, patch []byte) error {
			_, err := k.Client.AppsV1().ControllerRevisions(o.GetNamespace()).Patch(ctx, rev, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
			return err
		},
	})
	Sort(revs)
	return revs, err
}

// Collided is the count after one more collision; nil counts as none.
func Collided(count *int32) *int32 {
	n := int32(1)
	if count != nil {
		n += *count
	}
	return &n
}

// Prune deletes revisions; what is gone already is no error.
func (k Keeper) Prune(ctx context.Context, revs []*appsv1.ControllerRevision) error {
	var errs []error
	for _, rev := range revs {
		err := k.Client.AppsV1().ControllerRevisions(rev.Namespace).Delete(ctx, rev.Name, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(rev.UID))})
		if err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, fmt.Errorf("delete ControllerRevision %s/%s: %w", rev.Namespace, rev.Name, err))
		}
	}
	return errors.Join(errs...)
}
