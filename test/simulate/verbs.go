package simulate

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/apimachinery/pkg/watch"
)

var (
	podsGVR       = schema.GroupVersionResource{Version: "v1", Resource: "pods"}
	nodesGVR      = schema.GroupVersionResource{Version: "v1", Resource: "nodes"}
	namespacesGVR = schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}
	budgetsGVR    = schema.GroupVersionResource{Group: "policy", Version: "v1", Resource: "poddisruptionbudgets"}
)

// change replaces an object by what edit makes of it: of the subresource "status" only the status counts, else only the rest.
// edit gets a copy and may refuse.
func (s *store) change(k kind, at key, sub, verb, who string, edit func(runtime.Object) (runtime.Object, error)) (*entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.changeLocked(k, at, sub, verb, who, edit)
}

func (s *store) changeLocked(k kind, at key, sub, verb, who string, edit func(runtime.Object) (runtime.Object, error)) (*entry, error) {
	t := s.tables[k.gvr]
	held := t.objs[at]
	if held == nil {
		return nil, apierrors.NewNotFound(k.resource(), at.name)
	}
	obj, err := edit(held.obj.DeepCopyObject())
	if err != nil {
		return nil, err
	}
	acc, err := meta.Accessor(obj)
	if err != nil {
		return nil, err
	}
	if uid := acc.GetUID(); uid != "" && uid != held.acc.GetUID() {
		return nil, apierrors.NewConflict(k.resource(), at.name, fmt.Errorf("precondition failed: UID in precondition: %s, UID in object meta: %s", uid, held.acc.GetUID()))
	}
	if rv := acc.GetResourceVersion(); rv != "" && rv != held.acc.GetResourceVersion() {
		return nil, apierrors.NewConflict(k.resource(), at.name, errors.New("the object has been modified; please apply your changes to the latest version and try again"))
	}
	if err := s.merge(k, held, obj, acc, sub); err != nil {
		return nil, err
	}
	s.count(verb, k, sub)
	if equality.Semantic.DeepEqual(obj, held.obj) {
		s.noops[verb+" "+k.gvr.Resource+"/"+sub]++
		return held, nil
	}
	if acc.GetDeletionTimestamp() != nil && len(acc.GetFinalizers()) == 0 && s.mayVanish(obj, acc) {
		return s.put(t, watch.Deleted, obj, who), nil
	}
	return s.put(t, watch.Modified, obj, who), nil
}

// merge restores in obj what that kind of update may not change.
func (s *store) merge(k kind, held *entry, obj runtime.Object, acc metav1.Object, sub string) error {
	obj.GetObjectKind().SetGroupVersionKind(k.gvk)
	if sub == "status" {
		status := field(obj, "Status")
		next := held.obj.DeepCopyObject()
		field(next, "Status").Set(status)
		nacc, _ := meta.Accessor(next) // upstream's strategies let a status update change these
		nacc.SetAnnotations(acc.GetAnnotations())
		nacc.SetLabels(acc.GetLabels())
		// The object itself must become next, whoever holds it.
		copyInto(obj, next)
		return nil
	}
	acc.SetUID(held.acc.GetUID())
	acc.SetResourceVersion(held.acc.GetResourceVersion())
	acc.SetCreationTimestamp(held.acc.GetCreationTimestamp())
	acc.SetDeletionTimestamp(held.acc.GetDeletionTimestamp())
	acc.SetDeletionGracePeriodSeconds(held.acc.GetDeletionGracePeriodSeconds())
	acc.SetGeneration(held.acc.GetGeneration())
	if k.status {
		field(obj, "Status").Set(field(held.obj, "Status"))
	}
	if pod, ok := obj.(*corev1.Pod); ok && sub == "" {
		if old := held.obj.(*corev1.Pod); old.Spec.NodeName != pod.Spec.NodeName {
			return apierrors.NewInvalid(k.gvk.GroupKind(), pod.Name, nil)
		}
	}
	if spec := field(obj, "Spec"); spec.IsValid() && !equality.Semantic.DeepEqual(spec.Interface(), field(held.obj, "Spec").Interface()) {
		acc.SetGeneration(acc.GetGeneration() + 1)
	}
	if slice, ok := obj.(*discoveryv1.EndpointSlice); ok && sliceChanged(held.obj.(*discoveryv1.EndpointSlice), slice) {
		slice.Generation++
	}
	return nil
}

// sliceChanged says what upstream counts as a new generation of an EndpointSlice; its controller tells by that what it has not seen yet.
func sliceChanged(old, cur *discoveryv1.EndpointSlice) bool {
	a, b := *old, *cur
	a.TypeMeta, b.TypeMeta = metav1.TypeMeta{}, metav1.TypeMeta{}
	a.ObjectMeta, b.ObjectMeta = metav1.ObjectMeta{Labels: old.Labels}, metav1.ObjectMeta{Labels: cur.Labels}
	return !equality.Semantic.DeepEqual(&a, &b)
}

func copyInto(dst, src runtime.Object) {
	d, s := field(dst, "ObjectMeta"), field(src, "ObjectMeta")
	d.Set(s)
	for _, name := range []string{"Spec", "Status"} {
		if f := field(dst, name); f.IsValid() {
			f.Set(field(src, name))
		}
	}
}

// mayVanish says that nothing but finalizers keeps a deleted object.
func (s *store) mayVanish(obj runtime.Object, acc metav1.Object) bool {
	switch o := obj.(type) {
	case *corev1.Pod:
		grace := acc.GetDeletionGracePeriodSeconds()
		return grace == nil || *grace == 0
	case *corev1.Namespace:
		return len(o.Spec.Finalizers) == 0
	}
	return true
}

func (s *store) update(k kind, at key, sub, who string, obj runtime.Object) (*entry, error) {
	return s.change(k, at, sub, "update", who, func(runtime.Object) (runtime.Object, error) { return obj, nil })
}

// patch applies a strategic or a JSON merge patch.
func (s *store) patch(k kind, at key, sub, who string, typ types.PatchType, body []byte) (*entry, error) {
	return s.change(k, at, sub, "patch", who, func(cur runtime.Object) (runtime.Object, error) {
		acc, _ := meta.Accessor(cur)
		var pre struct {
			Metadata struct {
				UID             types.UID `json:"uid"`
				ResourceVersion string    `json:"resourceVersion"`
			} `json:"metadata"`
		}
		if err := json.Unmarshal(body, &pre); err != nil {
			return nil, apierrors.NewBadRequest(err.Error())
		}
		if pre.Metadata.ResourceVersion == "" {
			acc.SetResourceVersion("") // nothing to compare with
		}
		orig, err := json.Marshal(cur)
		if err != nil {
			return nil, err
		}
		var out []byte
		switch typ {
		case types.StrategicMergePatchType:
			out, err = strategicpatch.StrategicMergePatch(orig, body, newOf(k))
		case types.MergePatchType:
			out, err = jsonMerge(orig, body)
		default:
			err = fmt.Errorf("the simulated API knows no %s", typ)
		}
		if err != nil {
			return nil, apierrors.NewBadRequest(err.Error())
		}
		obj := newOf(k)
		if err := json.Unmarshal(out, obj); err != nil {
			return nil, apierrors.NewBadRequest(err.Error())
		}
		return obj, nil
	})
}

func jsonMerge(orig, patch []byte) ([]byte, error) {
	var o, p any
	if err := errors.Join(json.Unmarshal(orig, &o), json.Unmarshal(patch, &p)); err != nil {
		return nil, err
	}
	return json.Marshal(mergeValue(o, p))
}

// mergeValue is RFC 7386.
func mergeValue(target, patch any) any {
	p, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	t, ok := target.(map[string]any)
	if !ok {
		t = map[string]any{}
	}
	for name, v := range p {
		if v == nil {
			delete(t, name)
		} else {
			t[name] = mergeValue(t[name], v)
		}
	}
	return t
}

// remove is a DELETE.
func (s *store) remove(k kind, at key, opts metav1.DeleteOptions, who string) (*entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.removeLocked(k, at, opts, who)
}

func (s *store) removeLocked(k kind, at key, opts metav1.DeleteOptions, who string) (*entry, error) {
	t := s.tables[k.gvr]
	held := t.objs[at]
	if held == nil {
		return nil, apierrors.NewNotFound(k.resource(), at.name)
	}
	if p := opts.Preconditions; p != nil {
		if p.UID != nil && *p.UID != held.acc.GetUID() {
			return nil, apierrors.NewConflict(k.resource(), at.name, fmt.Errorf("the UID in the precondition (%s) does not match the UID in record (%s)", *p.UID, held.acc.GetUID()))
		}
		if p.ResourceVersion != nil && *p.ResourceVersion != held.acc.GetResourceVersion() {
			return nil, apierrors.NewConflict(k.resource(), at.name, errors.New("the ResourceVersion in the precondition does not match"))
		}
	}
	s.count("delete", k, "")
	if s.keep != nil {
		if err := s.keep(held.obj); err != nil {
			return nil, err
		}
	}
	obj := held.obj.DeepCopyObject()
	acc, _ := meta.Accessor(obj)
	var grace int64
	if pod, ok := obj.(*corev1.Pod); ok {
		grace = podGrace(pod, opts)
	}
	if policy := opts.PropagationPolicy; policy != nil && acc.GetDeletionTimestamp() == nil {
		fs := slices.DeleteFunc(slices.Clone(acc.GetFinalizers()), func(f string) bool {
			return f == metav1.FinalizerOrphanDependents || f == metav1.FinalizerDeleteDependents
		})
		switch *policy {
		case metav1.DeletePropagationOrphan:
			fs = append(fs, metav1.FinalizerOrphanDependents)
		case metav1.DeletePropagationForeground:
			fs = append(fs, metav1.FinalizerDeleteDependents)
		}
		acc.SetFinalizers(fs)
	}
	if ns, ok := obj.(*corev1.Namespace); ok {
		ns.Status.Phase = corev1.NamespaceTerminating
	}
	if old := acc.GetDeletionGracePeriodSeconds(); acc.GetDeletionTimestamp() != nil && old != nil && grace >= *old {
		grace = *old
	}
	// Deleted for good, and no change of what it holds, but a revision of its own.
	if grace == 0 && len(acc.GetFinalizers()) == 0 && s.mayVanish(withGrace(obj, acc), acc) {
		return s.put(t, watch.Deleted, obj, who), nil
	}
	if acc.GetDeletionTimestamp() == nil {
		acc.SetGeneration(acc.GetGeneration() + 1)
		acc.SetDeletionTimestamp(&metav1.Time{Time: time.Now().Add(time.Duration(grace) * time.Second).Truncate(time.Second)})
		acc.SetDeletionGracePeriodSeconds(&grace)
	} else if old := acc.GetDeletionGracePeriodSeconds(); old == nil || grace < *old {
		acc.SetDeletionGracePeriodSeconds(&grace)
	}
	if equality.Semantic.DeepEqual(obj, held.obj) {
		s.noops["delete "+k.gvr.Resource]++
		return held, nil
	}
	return s.put(t, watch.Modified, obj, who), nil
}

func withGrace(obj runtime.Object, acc metav1.Object) runtime.Object {
	if _, ok := obj.(*corev1.Pod); ok {
		var none int64
		acc.SetDeletionGracePeriodSeconds(&none)
	}
	return obj
}

// podGrace is how long a pod may take to end, as upstream's strategy decides.
func podGrace(pod *corev1.Pod, opts metav1.DeleteOptions) int64 {
	var grace int64
	switch {
	case opts.GracePeriodSeconds != nil:
		grace = *opts.GracePeriodSeconds
	case pod.Spec.TerminationGracePeriodSeconds != nil:
		grace = *pod.Spec.TerminationGracePeriodSeconds
	}
	if pod.Spec.NodeName == "" || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return 0
	}
	return grace
}

// bind is what POST .../binding does.
func (s *store) bind(b *corev1.Binding, at key, who string) error {
	k := s.kinds[podsGVR]
	_, err := s.change(k, at, "binding", "create", who, func(obj runtime.Object) (runtime.Object, error) {
		pod := obj.(*corev1.Pod)
		switch {
		case b.UID != "" && b.UID != pod.UID:
			return nil, apierrors.NewConflict(k.resource(), at.name, fmt.Errorf("the UID in the precondition (%s) does not match", b.UID))
		case b.ResourceVersion != "" && b.ResourceVersion != pod.ResourceVersion:
			return nil, apierrors.NewConflict(k.resource(), at.name, fmt.Errorf("the ResourceVersion in the precondition (%s) does not match", b.ResourceVersion))
		case pod.DeletionTimestamp != nil:
			return nil, apierrors.NewConflict(k.resource(), at.name, fmt.Errorf("pod %s is being deleted, cannot be assigned to a host", at.name))
		case pod.Spec.NodeName != "":
			return nil, apierrors.NewConflict(k.resource(), at.name, fmt.Errorf("pod %s is already assigned to node %q", at.name, pod.Spec.NodeName))
		case len(pod.Spec.SchedulingGates) > 0:
			return nil, apierrors.NewConflict(k.resource(), at.name, fmt.Errorf("pod %s has non-empty .spec.schedulingGates", at.name))
		}
		pod.Spec.NodeName = b.Target.Name
		return pod, nil
	})
	if err == nil {
		_, err = s.change(k, at, "status", "bound", who, func(obj runtime.Object) (runtime.Object, error) {
			pod := obj.(*corev1.Pod)
			setCondition(pod, corev1.PodScheduled, corev1.ConditionTrue)
			return pod, nil
		})
		if apierrors.IsNotFound(err) {
			err = nil
		}
	}
	return err
}

func setCondition(pod *corev1.Pod, typ corev1.PodConditionType, status corev1.ConditionStatus) bool {
	for i := range pod.Status.Conditions {
		c := &pod.Status.Conditions[i]
		if c.Type == typ {
			if c.Status == status {
				return false
			}
			*c = corev1.PodCondition{Type: typ, Status: status, LastTransitionTime: metav1.Now()}
			return true
		}
	}
	pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: typ, Status: status, LastTransitionTime: metav1.Now()})
	return true
}

// errBudget says that a disruption budget forbids an eviction now.
var errBudget = errors.New("cannot evict pod as it would violate the pod's disruption budget")

// evict is what POST .../eviction does: upstream's EvictionREST, without its cases for pods that are not ready.
func (s *store) evict(at key, who string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.kinds[podsGVR]
	e := s.tables[k.gvr].objs[at]
	if e == nil {
		return apierrors.NewNotFound(k.resource(), at.name)
	}
	pod := e.obj.(*corev1.Pod)
	if pod.DeletionTimestamp == nil && pod.Status.Phase == corev1.PodRunning {
		for bk, be := range s.tables[budgetsGVR].objs {
			b := be.obj.(*policyv1.PodDisruptionBudget)
			sel, err := metav1.LabelSelectorAsSelector(b.Spec.Selector)
			if err != nil || bk.ns != at.ns || !sel.Matches(labels.Set(pod.Labels)) {
				continue
			}
			if b.Status.ObservedGeneration < b.Generation || b.Status.DisruptionsAllowed <= 0 {
				return errBudget
			}
			_, err = s.changeLocked(s.kinds[budgetsGVR], bk, "status", "update", who, func(obj runtime.Object) (runtime.Object, error) {
				b := obj.(*policyv1.PodDisruptionBudget)
				b.Status.DisruptionsAllowed--
				if b.Status.DisruptedPods == nil {
					b.Status.DisruptedPods = map[string]metav1.Time{}
				}
				b.Status.DisruptedPods[pod.Name] = metav1.Now()
				return b, nil
			})
			if err != nil {
				return err
			}
		}
	}
	_, err := s.removeLocked(k, at, metav1.DeleteOptions{}, who)
	if err == nil && s.onEvict != nil {
		s.onEvict(pod)
	}
	return err
}

// finalizeNamespace is what PUT .../finalize does.
func (s *store) finalizeNamespace(at key, obj *corev1.Namespace, who string) (*entry, error) {
	return s.change(s.kinds[namespacesGVR], at, "finalize", "update", who, func(cur runtime.Object) (runtime.Object, error) {
		ns := cur.(*corev1.Namespace)
		ns.Spec.Finalizers = obj.Spec.Finalizers
		ns.ResourceVersion = obj.ResourceVersion
		return ns, nil
	})
}

func parseRev(s string) (uint64, error) {
	if s == "" {
		return 0, nil
	}
	return strconv.ParseUint(s, 10, 64)
}
