package replicaset

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/validation"

	"skein.io/skein/scheduler/controller"
)

// todo is what one sync has to do: create so many, or remove these.
type todo struct {
	create int
	remove []*corev1.Pod
}

// reasonWaiting is the reason of the condition of a set of which too many pods have no node yet.
const reasonWaiting = "TooManyWaiting"

// heldBack says that pods are not made because too many have no node yet. It
// passes by itself: a pod that gets a node, or goes, wakes the set.
type heldBack struct{ wanted int32 }

func (e heldBack) Error() string {
	return fmt.Sprintf("%d pods wait for a node, which is the most at a time: the others of %d are made as those get one", controller.MaxWaiting, e.wanted)
}

// held returns a heldBack if rs wants more pods than it may be given. Once said it
// stays as long as that may happen again, or it would come and go with each pod.
func held(rs *appsv1.ReplicaSet, active []*corev1.Pod) error {
	missing, room := int(*rs.Spec.Replicas)-len(active), controller.Room(active)
	said := slices.ContainsFunc(rs.Status.Conditions, func(c appsv1.ReplicaSetCondition) bool { return c.Reason == reasonWaiting })
	if missing > 0 && room == 0 || said && missing > controller.MaxWaiting {
		return heldBack{*rs.Spec.Replicas}
	}
	return nil
}

// plan compares the active pods of rs with what it asks for. siblings are the
// pods of all ReplicaSets of the same Deployment.
func plan(rs *appsv1.ReplicaSet, active, siblings []*corev1.Pod, now time.Time) todo {
	diff := len(active) - int(*rs.Spec.Replicas)
	if diff <= 0 {
		return todo{create: min(-diff, burst, controller.Room(active))}
	}
	return todo{remove: victims(active, siblings, now)[:min(diff, burst)]}
}

// victims sorts pods so that those to delete first come first, by upstream's
// rules (ActivePodsWithRanks): not bound; pending, then unknown, then running;
// not ready; lower deletion cost; more siblings on the same node; ready for a
// shorter time; more restarts; younger. Times are compared by magnitude
// (log2), equal ones by uid, so that the choice among alike pods is random.
func victims(active, siblings []*corev1.Pod, now time.Time) []*corev1.Pod {
	onNode := map[string]int{}
	for _, p := range siblings {
		if controller.PodActive(p) {
			onNode[p.Spec.NodeName]++
		}
	}
	sorted := slices.Clone(active)
	slices.SortStableFunc(sorted, func(a, b *corev1.Pod) int { return compare(a, b, onNode, now) })
	return sorted
}

var phaseOrder = map[corev1.PodPhase]int{corev1.PodPending: 0, corev1.PodUnknown: 1, corev1.PodRunning: 2}

func compare(a, b *corev1.Pod, onNode map[string]int, now time.Time) int {
	if c := falseFirst(a.Spec.NodeName != "", b.Spec.NodeName != ""); c != 0 {
		return c
	}
	if c := cmp.Compare(phaseOrder[a.Status.Phase], phaseOrder[b.Status.Phase]); c != 0 {
		return c
	}
	readyA, isReadyA := controller.PodReadySince(a)
	readyB, isReadyB := controller.PodReadySince(b)
	if c := falseFirst(isReadyA, isReadyB); c != 0 {
		return c
	}
	if c := cmp.Compare(deletionCost(a), deletionCost(b)); c != 0 {
		return c
	}
	if c := cmp.Compare(onNode[b.Spec.NodeName], onNode[a.Spec.NodeName]); c != 0 {
		return c
	}
	if isReadyA && !readyA.Equal(readyB) {
		return younger(readyA, readyB, a, b, now)
	}
	regA, sideA := restarts(a)
	regB, sideB := restarts(b)
	if c := cmp.Or(cmp.Compare(regB, regA), cmp.Compare(sideB, sideA)); c != 0 {
		return c
	}
	if bornA, bornB := a.CreationTimestamp.Time, b.CreationTimestamp.Time; !bornA.Equal(bornB) {
		return younger(bornA, bornB, a, b, now)
	}
	return 0
}

func falseFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// younger puts the pod of the later time first, if the two ages differ in
// magnitude, else the lower uid. A zero time is the latest.
func younger(ta, tb time.Time, a, b *corev1.Pod, now time.Time) int {
	if ta.IsZero() || tb.IsZero() {
		return falseFirst(!ta.IsZero(), !tb.IsZero())
	}
	return cmp.Or(cmp.Compare(magnitude(now.Sub(ta)), magnitude(now.Sub(tb))), cmp.Compare(a.UID, b.UID))
}

func magnitude(age time.Duration) int64 {
	if age <= 0 {
		return -1
	}
	return int64(math.Log2(float64(age)))
}

// deletionCost is the annotation's value; one that is not a plain integer counts as 0.
func deletionCost(pod *corev1.Pod) int64 {
	s := pod.Annotations[corev1.PodDeletionCost]
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil || strconv.FormatInt(n, 10) != s {
		return 0
	}
	return n
}

// restarts returns the most restarts of any container, and of any sidecar.
func restarts(pod *corev1.Pod) (regular, sidecar int32) {
	for _, s := range pod.Status.ContainerStatuses {
		regular = max(regular, s.RestartCount)
	}
	for _, s := range pod.Status.InitContainerStatuses {
		if slices.ContainsFunc(pod.Spec.InitContainers, func(c corev1.Container) bool {
			return c.Name == s.Name && c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
		}) {
			sidecar = max(sidecar, s.RestartCount)
		}
	}
	return regular, sidecar
}

// podFor returns the pod that rs's template describes; kind is what rs is to the API.
func podFor(rs *appsv1.ReplicaSet, kind schema.GroupVersionKind) *corev1.Pod {
	t := rs.Spec.Template.DeepCopy()
	// The name of the set as prefix, if that can be a pod's name.
	prefix := rs.Name + "-"
	if len(validation.IsDNS1123Subdomain(prefix+"x")) != 0 {
		prefix = rs.Name
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace:       rs.Namespace,
			GenerateName:    prefix,
			Labels:          t.Labels,
			Annotations:     t.Annotations,
			Finalizers:      t.Finalizers,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(rs, kind)},
		},
		Spec: t.Spec,
	}
}

// newStatus is the status of rs now; manageErr is why pods could not be
// created or deleted.
func newStatus(rs *appsv1.ReplicaSet, active, terminating []*corev1.Pod, manageErr error, now time.Time) appsv1.ReplicaSetStatus {
	s := *rs.Status.DeepCopy()
	s.ObservedGeneration = rs.Generation
	s.Replicas = int32(len(active))
	s.FullyLabeledReplicas, s.ReadyReplicas, s.AvailableReplicas = 0, 0, 0
	ending := int32(len(terminating))
	s.TerminatingReplicas = &ending
	template := labels.SelectorFromSet(rs.Spec.Template.Labels)
	for _, pod := range active {
		if template.Matches(labels.Set(pod.Labels)) {
			s.FullyLabeledReplicas++
		}
		if controller.PodReady(pod) {
			s.ReadyReplicas++
		}
		if ok, _ := controller.PodAvailable(pod, rs.Spec.MinReadySeconds, now); ok {
			s.AvailableReplicas++
		}
	}
	failed := slices.IndexFunc(s.Conditions, func(c appsv1.ReplicaSetCondition) bool { return c.Type == appsv1.ReplicaSetReplicaFailure })
	switch {
	case manageErr == nil && failed >= 0:
		s.Conditions = slices.Delete(s.Conditions, failed, failed+1)
	case manageErr != nil && failed < 0:
		reason := "FailedCreate"
		if errors.As(manageErr, new(heldBack)) {
			reason = reasonWaiting
		} else if len(active) > int(*rs.Spec.Replicas) {
			reason = "FailedDelete"
		}
		s.Conditions = append(s.Conditions, appsv1.ReplicaSetCondition{
			Type: appsv1.ReplicaSetReplicaFailure, Status: corev1.ConditionTrue,
			LastTransitionTime: metav1.NewTime(now), Reason: reason, Message: manageErr.Error(),
		})
	}
	return s
}

// nextAvailable is how long until the next ready pod becomes available; zero if
// no pod is ready that is not available.
func nextAvailable(active []*corev1.Pod, minReadySeconds int32, now time.Time) time.Duration {
	var next time.Duration
	for _, pod := range active {
		if _, wait := controller.PodAvailable(pod, minReadySeconds, now); wait > 0 && (next == 0 || wait < next) {
			next = wait
		}
	}
	return next
}
