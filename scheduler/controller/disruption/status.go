package disruption

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"skein.io/skein/scheduler/controller"
)

// Upstream's times.
const (
	// deletionTimeout is how long a pod whose eviction was granted counts as gone.
	deletionTimeout = 2 * time.Minute
	// staleTimeout is how long the announcement of a pod's disruption stays without
	// a deletion.
	staleTimeout = 2 * time.Minute
)

// input is all that newStatus looks at.
type input struct {
	pdb       *policyv1.PodDisruptionBudget
	pods      []*corev1.Pod // that it selects
	scale     int32         // how many the pods' controllers want; where needsScale
	unmanaged int           // pods without a controller
	now       time.Time
}

// needsScale says that the budget is relative to the number of pods wanted.
func needsScale(pdb *policyv1.PodDisruptionBudget) bool {
	return pdb.Spec.MaxUnavailable != nil || pdb.Spec.MinAvailable != nil && pdb.Spec.MinAvailable.Type == intstr.String
}

// wanted is how many pods there should be, and how many of them healthy. Shares
// are rounded up, as upstream does.
func wanted(in input) (expected, healthy int32) {
	scaled := func(v *intstr.IntOrString, of int32) int32 {
		n, err := intstr.GetScaledValueFromIntOrPercent(v, int(of), true)
		if err != nil {
			return of // validation refuses it; nothing may be evicted
		}
		return int32(n)
	}
	switch spec := &in.pdb.Spec; {
	case spec.MaxUnavailable != nil:
		return in.scale, max(0, in.scale-scaled(spec.MaxUnavailable, in.scale))
	case spec.MinAvailable != nil && spec.MinAvailable.Type == intstr.String:
		return in.scale, scaled(spec.MinAvailable, in.scale)
	case spec.MinAvailable != nil:
		return int32(len(in.pods)), spec.MinAvailable.IntVal
	}
	return 0, 0
}

// newStatus works the budget out. again is when to look again though nothing
// changed, zero for never; overdue are pods whose granted eviction never came.
func newStatus(in input) (s policyv1.PodDisruptionBudgetStatus, again time.Duration, overdue []*corev1.Pod) {
	s = *in.pdb.Status.DeepCopy()
	s.ObservedGeneration = in.pdb.Generation
	s.ExpectedPods, s.DesiredHealthy = wanted(in)
	s.CurrentHealthy = 0
	granted := s.DisruptedPods
	s.DisruptedPods = map[string]metav1.Time{}
	for _, pod := range in.pods {
		if pod.DeletionTimestamp != nil {
			continue
		}
		if at, ok := granted[pod.Name]; ok {
			left := at.Add(deletionTimeout).Sub(in.now)
			if left > 0 {
				s.DisruptedPods[pod.Name] = at
				if again == 0 || left < again {
					again = left
				}
				continue
			}
			overdue = append(overdue, pod)
		}
		if controller.PodReady(pod) {
			s.CurrentHealthy++
		}
	}
	if len(s.DisruptedPods) == 0 {
		s.DisruptedPods = nil
	}
	s.DisruptionsAllowed = 0
	if s.ExpectedPods > 0 {
		s.DisruptionsAllowed = max(0, s.CurrentHealthy-s.DesiredHealthy)
	}
	cond := metav1.Condition{Type: policyv1.DisruptionAllowedCondition, Status: metav1.ConditionFalse, Reason: policyv1.InsufficientPodsReason,
		ObservedGeneration: s.ObservedGeneration, LastTransitionTime: metav1.NewTime(in.now)}
	if s.DisruptionsAllowed > 0 {
		cond.Status, cond.Reason = metav1.ConditionTrue, policyv1.SufficientPodsReason
	}
	meta.SetStatusCondition(&s.Conditions, cond)
	return s, again, overdue
}

// failed is the status of a budget that cannot be worked out: nothing may go.
func failed(pdb *policyv1.PodDisruptionBudget, err error, now time.Time) policyv1.PodDisruptionBudgetStatus {
	s := *pdb.Status.DeepCopy()
	s.DisruptionsAllowed = 0
	meta.SetStatusCondition(&s.Conditions, metav1.Condition{Type: policyv1.DisruptionAllowedCondition, Status: metav1.ConditionFalse, Reason: policyv1.SyncFailedReason,
		Message: err.Error(), ObservedGeneration: s.ObservedGeneration, LastTransitionTime: metav1.NewTime(now)})
	return s
}

func disrupted(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.DisruptionTarget {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// staleAfter says whether the pod announces its disruption without being
// deleted, and in what time that is stale. The agent's own announcements are
// never: it ends the pod when it can.
func staleAfter(pod *corev1.Pod, now time.Time) (time.Duration, bool) {
	if pod.DeletionTimestamp != nil || controller.PodTerminal(pod) {
		return 0, false
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.DisruptionTarget && c.Status == corev1.ConditionTrue && c.Reason != corev1.PodReasonTerminationByKubelet {
			return max(0, c.LastTransitionTime.Add(staleTimeout).Sub(now)), true
		}
	}
	return 0, false
}
