package deployment

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Reasons of a Deployment's conditions, which kubectl rollout status and users
// of the API read.
const (
	reasonCreated     = "NewReplicaSetCreated"
	reasonFoundNew    = "FoundNewReplicaSet"
	reasonUpdated     = "ReplicaSetUpdated"
	reasonCreateError = "ReplicaSetCreateError"
	reasonAvailable   = "NewReplicaSetAvailable"
	reasonTimedOut    = "ProgressDeadlineExceeded"
	reasonPaused      = "DeploymentPaused"
	reasonResumed     = "DeploymentResumed"
	reasonEnough      = "MinimumReplicasAvailable"
	reasonTooFew      = "MinimumReplicasUnavailable"
)

func hasDeadline(d *appsv1.Deployment) bool {
	return d.Spec.ProgressDeadlineSeconds != nil && *d.Spec.ProgressDeadlineSeconds != math.MaxInt32
}

func condition(s *appsv1.DeploymentStatus, t appsv1.DeploymentConditionType) *appsv1.DeploymentCondition {
	for i := range s.Conditions {
		if s.Conditions[i].Type == t {
			return &s.Conditions[i]
		}
	}
	return nil
}

func dropCondition(s *appsv1.DeploymentStatus, t appsv1.DeploymentConditionType) {
	s.Conditions = slices.DeleteFunc(slices.Clone(s.Conditions), func(c appsv1.DeploymentCondition) bool { return c.Type == t })
}

func (r *rollout) setCondition(s *appsv1.DeploymentStatus, t appsv1.DeploymentConditionType, v corev1.ConditionStatus, reason, msg string) {
	setCondition(s, appsv1.DeploymentCondition{
		Type: t, Status: v, Reason: reason, Message: msg,
		LastUpdateTime: metav1.NewTime(r.now), LastTransitionTime: metav1.NewTime(r.now),
	})
}

// setCondition puts c into s, unless it says what s says already: same status
// and reason. The transition time stays where the status does.
func setCondition(s *appsv1.DeploymentStatus, c appsv1.DeploymentCondition) {
	if cur := condition(s, c.Type); cur != nil {
		if cur.Status == c.Status && cur.Reason == c.Reason {
			return
		}
		if cur.Status == c.Status {
			c.LastTransitionTime = cur.LastTransitionTime
		}
	}
	dropCondition(s, c.Type)
	s.Conditions = append(s.Conditions, c)
}

// noteProgress sets the Progressing condition to true as of now, also where it
// has that status and reason already: from each such note the deadline counts anew.
func (r *rollout) noteProgress(s *appsv1.DeploymentStatus, reason, msg string) {
	c := appsv1.DeploymentCondition{
		Type: appsv1.DeploymentProgressing, Status: corev1.ConditionTrue, Reason: reason, Message: msg,
		LastUpdateTime: metav1.NewTime(r.now), LastTransitionTime: metav1.NewTime(r.now),
	}
	if cur := condition(s, c.Type); cur != nil && cur.Status == c.Status {
		c.LastTransitionTime = cur.LastTransitionTime
	}
	dropCondition(s, c.Type)
	s.Conditions = append(s.Conditions, c)
}

// rolloutKnown says that the Progressing condition is about the rollout of the
// new set, which its message names. It may be about an earlier rollout: after
// going back to a set that exists, or where the status that told of a set's
// creation was not written. Judged by the outcome of that one, a rollout would
// count as done, or as failed, from the start.
func (r *rollout) rolloutKnown() bool {
	c := condition(&r.d.Status, appsv1.DeploymentProgressing)
	return c != nil && (c.Reason == reasonPaused || c.Reason == reasonResumed || strings.Contains(c.Message, strconv.Quote(r.new.Name)))
}

// markPaused notes pausing and resuming, from which the deadline counts anew.
func (r *rollout) markPaused() {
	cond := condition(&r.d.Status, appsv1.DeploymentProgressing)
	if !hasDeadline(r.d) || cond != nil && cond.Reason == reasonTimedOut {
		return
	}
	paused := cond != nil && cond.Reason == reasonPaused
	switch {
	case r.d.Spec.Paused && !paused:
		r.setCondition(&r.d.Status, appsv1.DeploymentProgressing, corev1.ConditionUnknown, reasonPaused, "Deployment is paused")
	case !r.d.Spec.Paused && paused:
		r.setCondition(&r.d.Status, appsv1.DeploymentProgressing, corev1.ConditionUnknown, reasonResumed, "Deployment is resumed")
	}
}

// countStatus is the status that follows from the sets, without any judgement
// of progress.
func (r *rollout) countStatus() appsv1.DeploymentStatus {
	all := r.all()
	s := appsv1.DeploymentStatus{
		ObservedGeneration: r.d.Generation,
		Replicas:           sum(all, existing),
		ReadyReplicas:      sum(all, ready),
		AvailableReplicas:  sum(all, available),
		CollisionCount:     r.d.Status.CollisionCount,
		Conditions:         slices.Clone(r.d.Status.Conditions),
	}
	if r.new != nil {
		s.UpdatedReplicas = r.new.Status.Replicas
	}
	s.UnavailableReplicas = max(0, sum(all, wanted)-s.AvailableReplicas)
	s.TerminatingReplicas = terminating(all)
	_, unavailable := limits(r.d)
	if s.AvailableReplicas >= *r.d.Spec.Replicas-unavailable {
		r.setCondition(&s, appsv1.DeploymentAvailable, corev1.ConditionTrue, reasonEnough, "Deployment has minimum availability.")
	} else {
		r.setCondition(&s, appsv1.DeploymentAvailable, corev1.ConditionFalse, reasonTooFew, "Deployment does not have minimum availability.")
	}
	return s
}

// terminating sums the pods that are ending; nil if a set does not tell.
func terminating(sets []*appsv1.ReplicaSet) *int32 {
	n := int32(0)
	for _, rs := range sets {
		switch {
		case rs.Status.TerminatingReplicas != nil:
			n += *rs.Status.TerminatingReplicas
		case rs.Status.ObservedGeneration != 0:
			return nil
		}
	}
	return &n
}

// progressStatus is countStatus with the Progressing condition judged, and the
// sets' failures passed on.
func (r *rollout) progressStatus() appsv1.DeploymentStatus {
	s := r.countStatus()
	if hasDeadline(r.d) {
		r.judgeProgress(&s)
		r.out.again = r.nextCheck(&s)
	} else {
		dropCondition(&s, appsv1.DeploymentProgressing)
	}
	if c := r.failure(); c != nil {
		setCondition(&s, *c)
	} else {
		dropCondition(&s, appsv1.DeploymentReplicaFailure)
	}
	return s
}

func (r *rollout) judgeProgress(s *appsv1.DeploymentStatus) {
	cur := condition(&r.d.Status, appsv1.DeploymentProgressing)
	if s.Replicas == s.UpdatedReplicas && cur != nil && cur.Reason == reasonAvailable {
		return // the rollout ended before; what happens to pods now is no lack of progress
	}
	what := fmt.Sprintf("Deployment %q", r.d.Name)
	if r.new != nil {
		what = fmt.Sprintf("ReplicaSet %q", r.new.Name)
	}
	switch {
	case complete(r.d, s):
		r.setCondition(s, appsv1.DeploymentProgressing, corev1.ConditionTrue, reasonAvailable, what+" has successfully progressed.")
	case progressed(&r.d.Status, s):
		r.noteProgress(s, reasonUpdated, what+" is progressing.")
	case r.timedOut(s):
		r.setCondition(s, appsv1.DeploymentProgressing, corev1.ConditionFalse, reasonTimedOut, what+" has timed out progressing.")
	}
}

// complete says that all pods that d asks for are new and available, and no
// others are left.
func complete(d *appsv1.Deployment, s *appsv1.DeploymentStatus) bool {
	n := *d.Spec.Replicas
	return s.UpdatedReplicas == n && s.Replicas == n && s.AvailableReplicas == n && s.ObservedGeneration >= d.Generation
}

// progressed says that there are more new, ready or available pods than before,
// or fewer old ones.
func progressed(old, s *appsv1.DeploymentStatus) bool {
	return s.UpdatedReplicas > old.UpdatedReplicas ||
		s.Replicas-s.UpdatedReplicas < old.Replicas-old.UpdatedReplicas ||
		s.ReadyReplicas > old.ReadyReplicas ||
		s.AvailableReplicas > old.AvailableReplicas
}

func (r *rollout) deadline() time.Duration {
	return time.Duration(*r.d.Spec.ProgressDeadlineSeconds) * time.Second
}

func (r *rollout) timedOut(s *appsv1.DeploymentStatus) bool {
	switch c := condition(s, appsv1.DeploymentProgressing); {
	case c == nil, c.Reason == reasonAvailable:
		return false
	case c.Reason == reasonTimedOut:
		return true
	default:
		return c.LastUpdateTime.Add(r.deadline()).Before(r.now)
	}
}

// nextCheck is when the deadline may have passed; zero if none runs.
func (r *rollout) nextCheck(s *appsv1.DeploymentStatus) time.Duration {
	c := condition(s, appsv1.DeploymentProgressing)
	if c == nil || c.Reason == reasonTimedOut || c.Reason == reasonAvailable || complete(r.d, s) {
		return 0
	}
	// A second more, because times are stored in whole seconds.
	return max(0, c.LastUpdateTime.Add(r.deadline()).Sub(r.now)) + time.Second
}

// failure is the first failure of a set, of the new one before old ones.
func (r *rollout) failure() *appsv1.DeploymentCondition {
	sets := slices.Clone(r.all())
	slices.Reverse(sets)
	for _, rs := range sets {
		for _, c := range rs.Status.Conditions {
			if c.Type == appsv1.ReplicaSetReplicaFailure {
				return &appsv1.DeploymentCondition{
					Type: appsv1.DeploymentReplicaFailure, Status: c.Status, Reason: c.Reason, Message: c.Message,
					LastUpdateTime: c.LastTransitionTime, LastTransitionTime: c.LastTransitionTime,
				}
			}
		}
	}
	return nil
}

// collided returns d with one more collision of names counted.
func collided(d *appsv1.Deployment) *appsv1.Deployment {
	c := d.DeepCopy()
	n := int32(1)
	if d.Status.CollisionCount != nil {
		n = *d.Status.CollisionCount + 1
	}
	c.Status.CollisionCount = &n
	return c
}

// createFailed returns d with a condition that says why its new ReplicaSet
// could not be made, and the message.
func createFailed(d *appsv1.Deployment, rs string, err error, now time.Time) (*appsv1.Deployment, string) {
	msg := fmt.Sprintf("Failed to create new replica set %q: %v", rs, err)
	c := d.DeepCopy()
	if hasDeadline(d) {
		setCondition(&c.Status, appsv1.DeploymentCondition{
			Type: appsv1.DeploymentProgressing, Status: corev1.ConditionFalse, Reason: reasonCreateError, Message: msg,
			LastUpdateTime: metav1.NewTime(now), LastTransitionTime: metav1.NewTime(now),
		})
	}
	return c, msg
}
