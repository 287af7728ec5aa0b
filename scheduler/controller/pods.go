package controller

import (
	"time"

	corev1 "k8s.io/api/core/v1"
)

// PodActive says that the pod counts towards what its controller wants: it has
// not ended and is not being deleted.
func PodActive(pod *corev1.Pod) bool { return !PodTerminal(pod) && pod.DeletionTimestamp == nil }

// PodTerminal says that all containers of the pod have ended for good.
func PodTerminal(pod *corev1.Pod) bool {
	return ended(pod.Status.Phase)
}

func ended(phase corev1.PodPhase) bool {
	return phase == corev1.PodSucceeded || phase == corev1.PodFailed
}

// PodTerminating says that the pod is being deleted and has not ended yet.
func PodTerminating(pod *corev1.Pod) bool { return !PodTerminal(pod) && pod.DeletionTimestamp != nil }

// MaxWaiting is how many pods without a node an owner is given: more wait until
// some of these have one. Whoever asks for a million pods by mistake gets what
// the cluster has room for and this, not a store full of pods that nobody can
// run; and a workload of any size grows as fast as its pods are placed. Upstream
// has no such bound.
const MaxWaiting = 5000

// Room returns how many more pods an owner may be given that has these.
func Room(pods []*corev1.Pod) int {
	waiting := 0
	for _, p := range pods {
		if p.Spec.NodeName == "" && PodActive(p) {
			waiting++
		}
	}
	return max(0, MaxWaiting-waiting)
}

// PodReady says that the pod's Ready condition is true.
func PodReady(pod *corev1.Pod) bool {
	_, ok := PodReadySince(pod)
	return ok
}

// PodReadySince returns since when the pod is ready, which may be the zero time,
// and whether it is.
func PodReadySince(pod *corev1.Pod) (time.Time, bool) {
	for i := range pod.Status.Conditions {
		c := &pod.Status.Conditions[i]
		if c.Type == corev1.PodReady {
			return c.LastTransitionTime.Time, c.Status == corev1.ConditionTrue
		}
	}
	return time.Time{}, false
}

// PodAvailable says that the pod has been ready for at least minReadySeconds.
// If it is ready but not available yet, wait is how long that takes from now;
// else it is zero.
func PodAvailable(pod *corev1.Pod, minReadySeconds int32, now time.Time) (available bool, wait time.Duration) {
	since, ready := PodReadySince(pod)
	switch {
	case !ready:
		return false, 0
	case minReadySeconds <= 0:
		return true, 0
	case since.IsZero():
		return false, 0
	}
	wait = since.Add(time.Duration(minReadySeconds) * time.Second).Sub(now)
	if wait <= 0 {
		return true, 0
	}
	return false, wait
}
