package job

import (
	"cmp"
	"slices"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"skein.io/skein/scheduler/controller"
)

// Bounds of one sync; upstream's numbers.
const (
	maxPods      = 500 // pods created or removed
	maxUncounted = 500 // pods in status.uncountedTerminatedPods
)

// input is all that plan looks at.
type input struct {
	job  *batchv1.Job
	pods []*corev1.Pod // that the Job controls, in any phase
	now  time.Time
}

// creation is one pod to be made.
type creation struct {
	index   int         // -1 without indexes
	replace *corev1.Pod // the failed pod of the index whose count goes on; nil for none
}

// step is what one sync has to do: create and remove, then write the status,
// then release. A pod keeps its finalizer until a status that accounts for it has
// been written, so that each is counted exactly once whatever happens between.
type step struct {
	create  []creation
	remove  []*corev1.Pod
	status  batchv1.JobStatus // before what is created and removed is counted
	release []*corev1.Pod
	events  []event
	again   time.Duration // when to look again though nothing changed; zero for never
}

type event struct{ kind, reason, text string }

func (s *step) after(d time.Duration) {
	if d > 0 && (s.again == 0 || d < s.again) {
		s.again = d
	}
}

type planner struct {
	input
	out                   step
	s                     *batchv1.JobStatus // out.status
	uncounted             *batchv1.UncountedTerminatedPods
	active, terminating   []*corev1.Pod
	done, lost            indexes // that succeeded, that failed
	succeeded, failedPods int32
	delayed               map[int]*corev1.Pod // the failed pod of an index that waits for its successor
	finish                *batchv1.JobCondition
}

func plan(in input) step {
	p := &planner{input: in, out: step{status: *in.job.Status.DeepCopy()}}
	p.s = &p.out.status
	p.fold()
	p.sort()
	p.count()
	if p.s.StartTime == nil && !p.suspended() {
		p.s.StartTime = &metav1.Time{Time: p.now}
	}
	p.decide()
	switch {
	case p.finish != nil:
		p.removePods(p.active)
	case p.job.DeletionTimestamp == nil:
		p.manage()
		p.suspension()
	}
	if p.finish == nil && p.complete() {
		p.finish = p.condition(batchv1.JobSuccessCriteriaMet, batchv1.JobReasonCompletionsReached, "Reached expected number of succeeded pods")
	}
	p.account()
	p.conclude()
	p.summarise()
	return p.out
}

func (p *planner) indexed() bool {
	return p.job.Spec.CompletionMode != nil && *p.job.Spec.CompletionMode == batchv1.IndexedCompletion
}
func (p *planner) perIndex() bool  { return p.indexed() && p.job.Spec.BackoffLimitPerIndex != nil }
func (p *planner) suspended() bool { return p.job.Spec.Suspend != nil && *p.job.Spec.Suspend }
func (p *planner) completions() int {
	if p.job.Spec.Completions == nil {
		return 0
	}
	return int(*p.job.Spec.Completions)
}

func tracked(pod *corev1.Pod) bool {
	return slices.Contains(pod.Finalizers, batchv1.JobTrackingFinalizer)
}

// fold moves pods that have been released from the list of uncounted ones into
// the counters: nobody can count them again.
func (p *planner) fold() {
	held := map[types.UID]bool{}
	for _, pod := range p.pods {
		if tracked(pod) {
			held[pod.UID] = true
		}
	}
	if p.s.UncountedTerminatedPods == nil {
		p.s.UncountedTerminatedPods = &batchv1.UncountedTerminatedPods{}
	}
	p.uncounted = p.s.UncountedTerminatedPods
	count := func(uids []types.UID, n *int32) (rest []types.UID) {
		for _, uid := range uids {
			if held[uid] {
				rest = append(rest, uid)
			} else {
				*n++
			}
		}
		return rest
	}
	p.uncounted.Succeeded = count(p.uncounted.Succeeded, &p.s.Succeeded)
	p.uncounted.Failed = count(p.uncounted.Failed, &p.s.Failed)
}

func (p *planner) sort() {
	for _, pod := range p.pods {
		switch {
		case controller.PodActive(pod):
			p.active = append(p.active, pod)
		case controller.PodTerminating(pod):
			p.terminating = append(p.terminating, pod)
		}
	}
}

// valid says that the pod's index is one of the Job's, or that it needs none.
func (p *planner) valid(pod *corev1.Pod) bool {
	i := indexOf(pod)
	return !p.indexed() || i >= 0 && i < p.completions()
}

func (p *planner) count() {
	p.failedPods = p.s.Failed + int32(len(p.uncounted.Failed))
	p.succeeded = p.s.Succeeded + int32(len(p.uncounted.Succeeded))
	if p.indexed() {
		p.done = parseIndexes(p.s.CompletedIndexes, p.completions())
	}
	if p.perIndex() && p.s.FailedIndexes != nil {
		p.lost = parseIndexes(*p.s.FailedIndexes, p.completions())
	}
	for _, pod := range p.pods {
		if !tracked(pod) || !p.valid(pod) {
			continue
		}
		switch {
		case pod.Status.Phase == corev1.PodSucceeded && !slices.Contains(p.uncounted.Failed, pod.UID):
			if p.indexed() {
				p.done = p.done.with(indexOf(pod))
			} else if !slices.Contains(p.uncounted.Succeeded, pod.UID) {
				p.succeeded++
			}
		case failed(p.job, pod):
			r := judge(p.job.Spec.PodFailurePolicy, pod)
			if r.counts && !slices.Contains(p.uncounted.Failed, pod.UID) {
				p.failedPods++
			}
			if n, _ := failuresOf(pod); p.perIndex() && (r.failIndex || r.counts && n >= int(*p.job.Spec.BackoffLimitPerIndex)) {
				p.lost = p.lost.with(indexOf(pod))
			}
		}
	}
	if p.indexed() {
		p.succeeded = int32(p.done.total())
	}
	p.delay()
}

// delay finds, for each index that has to be tried again, the pod that carries
// the number of its failures: it may not go before its successor is there.
func (p *planner) delay() {
	p.delayed = map[int]*corev1.Pod{}
	if !p.perIndex() {
		return
	}
	busy := map[int]bool{}
	for _, pod := range p.active {
		busy[indexOf(pod)] = true
	}
	for _, pod := range p.pods {
		i := indexOf(pod)
		if !tracked(pod) || !p.valid(pod) || !failed(p.job, pod) || p.done.has(i) || p.lost.has(i) || busy[i] {
			continue
		}
		was := p.delayed[i]
		if was == nil || later(pod, was) {
			p.delayed[i] = pod
		}
	}
}

// later says that pod followed the other of its index.
func later(pod, other *corev1.Pod) bool {
	a, b := failuresOf(pod)
	c, d := failuresOf(other)
	return cmp.Or(cmp.Compare(a+b, c+d), ended(pod).Compare(ended(other))) > 0
}

func (p *planner) condition(t batchv1.JobConditionType, reason, message string) *batchv1.JobCondition {
	return &batchv1.JobCondition{Type: t, Status: corev1.ConditionTrue, Reason: reason, Message: message,
		LastProbeTime: metav1.NewTime(p.now), LastTransitionTime: metav1.NewTime(p.now)}
}

func find(conditions []batchv1.JobCondition, t batchv1.JobConditionType) *batchv1.JobCondition {
	for i := range conditions {
		if conditions[i].Type == t && conditions[i].Status == corev1.ConditionTrue {
			return &conditions[i]
		}
	}
	return nil
}

// finished says that nothing more happens to the Job.
func finished(job *batchv1.Job) bool {
	return find(job.Status.Conditions, batchv1.JobComplete) != nil || find(job.Status.Conditions, batchv1.JobFailed) != nil
}

// decide finds out whether the Job is to end, and why. What was decided once
// stays; failure goes before success.
func (p *planner) decide() {
	for _, t := range []batchv1.JobConditionType{batchv1.JobSuccessCriteriaMet, batchv1.JobFailureTarget} {
		if p.finish = find(p.s.Conditions, t); p.finish != nil {
			return
		}
	}
	fail := func(reason, message string) { p.finish = p.condition(batchv1.JobFailureTarget, reason, message) }
	for _, pod := range p.pods {
		if failed(p.job, pod) {
			if why := judge(p.job.Spec.PodFailurePolicy, pod).failJob; why != "" {
				fail(batchv1.JobReasonPodFailurePolicy, why)
				return
			}
		}
	}
	overdue := false
	if d := p.job.Spec.ActiveDeadlineSeconds; d != nil && p.s.StartTime != nil && !p.suspended() {
		left := p.s.StartTime.Add(time.Duration(*d) * time.Second).Sub(p.now)
		p.out.after(left)
		overdue = left <= 0
	}
	switch {
	case p.failedPods > *p.job.Spec.BackoffLimit || restartsExceed(p.job, p.pods):
		fail(batchv1.JobReasonBackoffLimitExceeded, "Job has reached the specified backoff limit")
	case overdue:
		fail(batchv1.JobReasonDeadlineExceeded, "Job was active longer than specified deadline")
	case p.perIndex() && p.job.Spec.MaxFailedIndexes != nil && p.lost.total() > int(*p.job.Spec.MaxFailedIndexes):
		fail(batchv1.JobReasonMaxFailedIndexesExceeded, "Job has exceeded the specified maximal number of failed indexes")
	case p.perIndex() && p.lost.total() > 0 && p.lost.total()+p.done.total() >= p.completions():
		fail(batchv1.JobReasonFailedIndexes, "Job has failed indexes")
	case p.indexed():
		if why, met := succeededBy(p.job.Spec.SuccessPolicy, p.done, p.completions()); met {
			p.finish = p.condition(batchv1.JobSuccessCriteriaMet, batchv1.JobReasonSuccessPolicy, why)
		}
	}
}

func (p *planner) removePods(pods []*corev1.Pod) {
	for _, pod := range pods[:min(len(pods), maxPods)] {
		p.out.remove = append(p.out.remove, pod)
	}
}

// manage creates or removes pods; in one step only one of the two.
func (p *planner) manage() {
	if p.suspended() {
		p.removePods(p.active)
		return
	}
	active := len(p.active)
	want := int(*p.job.Spec.Parallelism)
	if p.job.Spec.Completions != nil {
		want = max(0, min(want, p.completions()-int(p.succeeded)))
	} else if p.succeeded > 0 {
		want = active // no new ones after the first success
	}
	if surplus := p.surplus(max(0, active-want)); len(surplus) > 0 {
		p.removePods(surplus)
		return
	}
	if onlyReplacesFailed(p.job) {
		active += len(p.terminating)
	}
	n := min(want-active, maxPods, controller.Room(p.active))
	if n <= 0 {
		return
	}
	if !p.indexed() {
		if wait := remainingOf(p); wait > 0 {
			p.out.after(wait)
			return
		}
		for range n {
			p.out.create = append(p.out.create, creation{index: -1})
		}
		return
	}
	if !p.perIndex() {
		if wait := remainingOf(p); wait > 0 {
			p.out.after(wait)
			return
		}
	}
	for _, i := range p.pending(n) {
		if len(p.out.create) == n {
			break // those that wait are of higher indexes
		}
		c := creation{index: i, replace: p.delayed[i]}
		if c.replace != nil {
			a, b := failuresOf(c.replace)
			if wait := remaining(a+b+1, ended(c.replace), p.now); wait > 0 {
				p.out.after(wait)
				continue
			}
		}
		p.out.create = append(p.out.create, c)
	}
}

func remainingOf(p *planner) time.Duration {
	n, latest := failuresInARow(p.job, p.pods)
	return remaining(n, latest, p.now)
}

// pending returns the first n indexes without a pod that neither succeeded nor
// failed. Those that wait for their back-off are among them, beyond n.
func (p *planner) pending(n int) []int {
	busy := slices.Concat(p.done, p.lost)
	pods := p.active
	if onlyReplacesFailed(p.job) {
		pods = slices.Concat(pods, p.terminating)
	}
	for _, pod := range pods {
		if i := indexOf(pod); i >= 0 {
			busy = append(busy, span{i, i})
		}
	}
	waiting := 0
	for _, pod := range p.delayed {
		if a, b := failuresOf(pod); remaining(a+b+1, ended(pod), p.now) > 0 {
			waiting++
		}
	}
	return busy.normal().missing(n+waiting, p.completions())
}

// surplus chooses at least n active pods to remove: those of no index of the
// Job, all but one of an index, and then those that are least use.
func (p *planner) surplus(n int) []*corev1.Pod {
	sorted := slices.Clone(p.active)
	slices.SortFunc(sorted, func(a, b *corev1.Pod) int {
		return cmp.Or(unready(b)-unready(a), b.CreationTimestamp.Compare(a.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	if !p.indexed() {
		return sorted[:n]
	}
	var out, rest []*corev1.Pod
	per := map[int]int{}
	for _, pod := range sorted {
		per[indexOf(pod)]++
	}
	for _, pod := range sorted {
		if i := indexOf(pod); !p.valid(pod) || p.done.has(i) || per[i] > 1 {
			per[i]--
			out = append(out, pod)
		} else {
			rest = append(rest, pod)
		}
	}
	return append(out, rest[:max(0, min(n-len(out), len(rest)))]...)
}

// unready ranks pods that may be removed first: not bound, then not running,
// then not ready.
func unready(pod *corev1.Pod) int {
	switch {
	case pod.Spec.NodeName == "":
		return 3
	case pod.Status.Phase != corev1.PodRunning:
		return 2
	case !controller.PodReady(pod):
		return 1
	}
	return 0
}

// complete says that there are enough successes and nothing runs any more.
func (p *planner) complete() bool {
	if len(p.active) > 0 || len(p.out.create) > 0 {
		return false
	}
	if p.job.Spec.Completions == nil {
		return p.succeeded > 0
	}
	return int(p.succeeded) >= p.completions()
}

// suspension tells of suspending and resuming, once each.
func (p *planner) suspension() {
	at := slices.IndexFunc(p.s.Conditions, func(c batchv1.JobCondition) bool { return c.Type == batchv1.JobSuspended })
	is := at >= 0 && p.s.Conditions[at].Status == corev1.ConditionTrue
	if is == p.suspended() {
		return
	}
	c := p.condition(batchv1.JobSuspended, "JobSuspended", "Job suspended")
	if p.suspended() {
		p.s.StartTime = nil
		p.out.events = append(p.out.events, event{corev1.EventTypeNormal, "Suspended", c.Message})
	} else {
		c.Status, c.Reason, c.Message = corev1.ConditionFalse, "JobResumed", "Job resumed"
		p.s.StartTime = &metav1.Time{Time: p.now}
		p.out.events = append(p.out.events, event{corev1.EventTypeNormal, "Resumed", c.Message})
	}
	if at >= 0 {
		p.s.Conditions[at] = *c
	} else {
		p.s.Conditions = append(p.s.Conditions, *c)
	}
}

// account enters pods that have ended into the status; those may be released
// once it is written.
func (p *planner) account() {
	pods := slices.Clone(p.pods)
	slices.SortFunc(pods, func(a, b *corev1.Pod) int { return cmp.Or(indexOf(a)-indexOf(b), cmp.Compare(a.Name, b.Name)) })
	var won []int
	for _, pod := range pods {
		if !tracked(pod) || !p.releasable(pod) {
			continue
		}
		if len(won)+len(p.uncounted.Succeeded)+len(p.uncounted.Failed) >= maxUncounted {
			break // the next step goes on
		}
		p.out.release = append(p.out.release, pod)
		ruled := slices.Contains(p.uncounted.Failed, pod.UID)
		switch {
		case pod.Status.Phase == corev1.PodSucceeded && !ruled:
			switch {
			case p.indexed():
				if p.valid(pod) {
					won = append(won, indexOf(pod))
				}
			case !slices.Contains(p.uncounted.Succeeded, pod.UID):
				p.uncounted.Succeeded = append(p.uncounted.Succeeded, pod.UID)
			}
		case pod.Status.Phase != corev1.PodSucceeded && !ruled && p.valid(pod):
			isFailed := failed(p.job, pod) || p.finish != nil && p.finish.Type == batchv1.JobFailureTarget
			if isFailed && judge(p.job.Spec.PodFailurePolicy, pod).counts {
				p.uncounted.Failed = append(p.uncounted.Failed, pod.UID)
			}
		}
	}
	if p.indexed() {
		written := parseIndexes(p.job.Status.CompletedIndexes, p.completions()).with(won...)
		p.s.CompletedIndexes, p.s.Succeeded = written.String(), int32(written.total())
	}
	if p.perIndex() {
		text := p.lost.String()
		p.s.FailedIndexes = &text
	}
}

func (p *planner) releasable(pod *corev1.Pod) bool {
	switch {
	case pod.Status.Phase == corev1.PodSucceeded:
		return true
	case p.job.DeletionTimestamp != nil, p.finish != nil:
		// Whatever becomes of it, it counts for nothing more.
		return pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodFailed || p.job.DeletionTimestamp != nil
	}
	return failed(p.job, pod) && p.delayed[indexOf(pod)] != pod
}

// conclude writes what was decided, and that the Job has ended once every pod
// has been accounted for and has gone.
func (p *planner) conclude() {
	if p.finish == nil {
		return
	}
	if find(p.s.Conditions, p.finish.Type) == nil {
		p.s.Conditions = append(p.s.Conditions, *p.finish)
		return // the end is written after this is
	}
	if len(p.active)+len(p.terminating)+len(p.out.release)+len(p.uncounted.Succeeded)+len(p.uncounted.Failed) > 0 {
		return
	}
	end := p.condition(batchv1.JobComplete, p.finish.Reason, p.finish.Message)
	if p.finish.Type == batchv1.JobFailureTarget {
		end.Type = batchv1.JobFailed
		p.out.events = append(p.out.events, event{corev1.EventTypeWarning, end.Reason, end.Message})
	} else {
		p.s.CompletionTime = &end.LastTransitionTime
		if want := p.job.Spec.Completions; want != nil && p.s.Succeeded > *want {
			p.out.events = append(p.out.events, event{corev1.EventTypeWarning, "TooManySucceededPods", "Too many succeeded pods running after completion count reached"})
		}
		p.out.events = append(p.out.events, event{corev1.EventTypeNormal, "Completed", "Job completed"})
	}
	if p.s.StartTime == nil {
		p.s.StartTime = &metav1.Time{Time: p.now} // suspended all its life; the API wants one
	}
	p.s.Conditions = append(p.s.Conditions, *end)
}

// summarise counts the pods as the view shows them, before what is to be done.
func (p *planner) summarise() {
	ready := int32(0)
	for _, pod := range p.active {
		if controller.PodReady(pod) {
			ready++
		}
	}
	ending := int32(len(p.terminating))
	p.s.Active, p.s.Ready, p.s.Terminating = int32(len(p.active)), &ready, &ending
}
