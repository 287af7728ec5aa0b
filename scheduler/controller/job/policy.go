package job

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"

	"skein.io/skein/scheduler/controller"
)

// Back-off between a failure and the next pod; upstream's.
const (
	failureFirst   = 10 * time.Second
	failureLongest = 10 * time.Minute
)

// onlyReplacesFailed says that a pod that is being deleted is not replaced, and
// not counted as failed, before it has ended.
func onlyReplacesFailed(job *batchv1.Job) bool {
	p := job.Spec.PodReplacementPolicy
	return p != nil && *p == batchv1.Failed || job.Spec.PodFailurePolicy != nil
}

// failed says that the pod counts as failed. One that is being deleted may never
// reach the phase.
func failed(job *batchv1.Job, pod *corev1.Pod) bool {
	return pod.Status.Phase == corev1.PodFailed ||
		!onlyReplacesFailed(job) && pod.DeletionTimestamp != nil && pod.Status.Phase != corev1.PodSucceeded
}

// ruling is what the failure policy says of a failed pod.
type ruling struct {
	counts    bool   // the failure counts
	failIndex bool   // the pod's index has failed for good
	failJob   string // why the whole Job has failed, "" if not
}

func judge(policy *batchv1.PodFailurePolicy, pod *corev1.Pod) ruling {
	if policy == nil {
		return ruling{counts: true}
	}
	for i, rule := range policy.Rules {
		var why string
		if rule.OnExitCodes != nil {
			s := exited(&pod.Status, rule.OnExitCodes)
			if s == nil {
				continue
			}
			why = fmt.Sprintf("Container %s for pod %s/%s failed with exit code %v matching %v rule at index %d",
				s.Name, pod.Namespace, pod.Name, s.State.Terminated.ExitCode, rule.Action, i)
		} else {
			at := slices.IndexFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
				return slices.ContainsFunc(rule.OnPodConditions, func(p batchv1.PodFailurePolicyOnPodConditionsPattern) bool {
					return p.Type == c.Type && p.Status == c.Status
				})
			})
			if at < 0 {
				continue
			}
			why = fmt.Sprintf("Pod %s/%s has condition %v matching %v rule at index %d", pod.Namespace, pod.Name, pod.Status.Conditions[at].Type, rule.Action, i)
		}
		switch rule.Action {
		case batchv1.PodFailurePolicyActionIgnore:
			return ruling{}
		case batchv1.PodFailurePolicyActionFailIndex:
			return ruling{counts: true, failIndex: true}
		case batchv1.PodFailurePolicyActionFailJob:
			return ruling{counts: true, failJob: why}
		case batchv1.PodFailurePolicyActionCount:
			return ruling{counts: true}
		}
	}
	return ruling{counts: true}
}

// exited finds the container that ended with one of the codes that the rule means.
func exited(s *corev1.PodStatus, rule *batchv1.PodFailurePolicyOnExitCodesRequirement) *corev1.ContainerStatus {
	for _, list := range [][]corev1.ContainerStatus{s.ContainerStatuses, s.InitContainerStatuses} {
		for i := range list {
			t := list[i].State.Terminated
			if t == nil || t.ExitCode == 0 || rule.ContainerName != nil && *rule.ContainerName != list[i].Name {
				continue
			}
			if slices.Contains(rule.Values, t.ExitCode) == (rule.Operator == batchv1.PodFailurePolicyOnExitCodesOpIn) {
				return &list[i]
			}
		}
	}
	return nil
}

// succeededBy says whether the success policy is met by the indexes that
// succeeded, and by which rule.
func succeededBy(policy *batchv1.SuccessPolicy, done indexes, completions int) (string, bool) {
	if policy == nil || len(done) == 0 {
		return "", false
	}
	for i, rule := range policy.Rules {
		met := rule.SucceededCount != nil && done.total() >= int(*rule.SucceededCount)
		if rule.SucceededIndexes != nil {
			want := parseIndexes(*rule.SucceededIndexes, completions)
			n := want.overlap(done)
			met = len(want) > 0 && (n == want.total() || rule.SucceededCount != nil && n >= int(*rule.SucceededCount))
		}
		if met {
			return fmt.Sprintf("Matched rules at index %d", i), true
		}
	}
	return "", false
}

// restartsExceed says that pods restarted in place too often.
func restartsExceed(job *batchv1.Job, pods []*corev1.Pod) bool {
	if job.Spec.Template.Spec.RestartPolicy != corev1.RestartPolicyOnFailure {
		return false
	}
	n := int32(0)
	for _, pod := range pods {
		if pod.Status.Phase != corev1.PodRunning && pod.Status.Phase != corev1.PodPending {
			continue
		}
		for _, s := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
			n += s.RestartCount
		}
	}
	if *job.Spec.BackoffLimit == 0 {
		return n > 0
	}
	return n >= *job.Spec.BackoffLimit
}

// ended is when the pod ended, as well as can be told: by its containers, by its
// readiness, by its deletion.
func ended(pod *corev1.Pod) time.Time {
	var last time.Time
	whole := len(pod.Status.ContainerStatuses) > 0
	for _, s := range pod.Status.ContainerStatuses {
		if s.State.Terminated == nil || s.State.Terminated.FinishedAt.IsZero() {
			whole = false
			break
		}
		if t := s.State.Terminated.FinishedAt.Time; t.After(last) {
			last = t
		}
	}
	if whole {
		return last
	}
	if at, ready := controller.PodReadySince(pod); !ready && !at.IsZero() {
		return at
	}
	if pod.DeletionTimestamp != nil {
		grace := time.Duration(0)
		if pod.DeletionGracePeriodSeconds != nil {
			grace = time.Duration(*pod.DeletionGracePeriodSeconds) * time.Second
		}
		return pod.DeletionTimestamp.Add(-grace)
	}
	return pod.CreationTimestamp.Time
}

// remaining is how long after the latest of n failures in a row no new pod is made.
func remaining(n int, latest, now time.Time) time.Duration {
	if n == 0 {
		return 0
	}
	d := failureFirst
	for i := 1; i < n && d < failureLongest; i++ {
		d *= 2
	}
	return max(0, min(d, failureLongest)-now.Sub(latest))
}

// failuresInARow counts the failures since the last success and says when the
// latest was.
func failuresInARow(job *batchv1.Job, pods []*corev1.Pod) (n int, latest time.Time) {
	var success time.Time
	for _, pod := range pods {
		if pod.Status.Phase == corev1.PodSucceeded {
			if t := ended(pod); t.After(success) {
				success = t
			}
		}
	}
	for _, pod := range pods {
		if t := ended(pod); failed(job, pod) && t.After(success) {
			n++
			if t.After(latest) {
				latest = t
			}
		}
	}
	return n, latest
}

// indexOf is the pod's completion index, -1 for none.
func indexOf(pod *corev1.Pod) int {
	n, err := strconv.Atoi(pod.Annotations[batchv1.JobCompletionIndexAnnotation])
	if err != nil || n < 0 {
		return -1
	}
	return n
}

// failuresOf reads how often the index had failed before this pod.
func failuresOf(pod *corev1.Pod) (counted, ignored int) {
	read := func(annotation string) int {
		n, err := strconv.Atoi(pod.Annotations[annotation])
		if err != nil || n < 0 {
			return 0
		}
		return n
	}
	return read(batchv1.JobIndexFailureCountAnnotation), read(batchv1.JobIndexIgnoredFailureCountAnnotation)
}
