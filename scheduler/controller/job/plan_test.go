package job

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

var t0 = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

func newJob(parallelism, completions int32, edit ...func(*batchv1.Job)) *batchv1.Job {
	l := map[string]string{"batch.kubernetes.io/controller-uid": "job-uid"}
	job := &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "sum", UID: "job-uid", Generation: 1, ResourceVersion: "5"},
		Spec: batchv1.JobSpec{
			Parallelism: &parallelism, Completions: &completions, BackoffLimit: new(int32(6)), Selector: &metav1.LabelSelector{MatchLabels: l},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: l},
				Spec: corev1.PodSpec{RestartPolicy: corev1.RestartPolicyNever, Containers: []corev1.Container{{Name: "c", Image: "i"}}}},
		},
	}
	if completions < 0 {
		job.Spec.Completions = nil
	}
	for _, e := range edit {
		e(job)
	}
	return job
}

func indexedJob(j *batchv1.Job) { m := batchv1.IndexedCompletion; j.Spec.CompletionMode = &m }
func perIndex(limit, most int32) func(*batchv1.Job) {
	return func(j *batchv1.Job) {
		indexedJob(j)
		j.Spec.BackoffLimitPerIndex, j.Spec.BackoffLimit = &limit, new(int32(1<<31-1))
		if most >= 0 {
			j.Spec.MaxFailedIndexes = &most
		}
	}
}
func limit(n int32) func(*batchv1.Job) { return func(j *batchv1.Job) { j.Spec.BackoffLimit = &n } }
func suspend(j *batchv1.Job)           { j.Spec.Suspend = new(true) }
func deadline(n int64) func(*batchv1.Job) {
	return func(j *batchv1.Job) { j.Spec.ActiveDeadlineSeconds = &n }
}
func replaceFailed(j *batchv1.Job) { p := batchv1.Failed; j.Spec.PodReplacementPolicy = &p }

// podOf reads a phase - "run", "pend", "ok", "fail", "del" (running, being
// deleted) - with an index after a dot.
func podOf(id int, text string) *corev1.Pod {
	phase, index, hasIndex := strings.Cut(text, ".")
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: fmt.Sprintf("p%d", id), UID: types.UID(fmt.Sprint("u", id)), Annotations: map[string]string{},
			CreationTimestamp: metav1.NewTime(t0.Add(time.Duration(id-1000) * time.Second)), Finalizers: []string{batchv1.JobTrackingFinalizer}},
		Spec: corev1.PodSpec{NodeName: "n"},
	}
	if hasIndex {
		pod.Annotations[batchv1.JobCompletionIndexAnnotation] = index
	}
	switch phase {
	case "run", "del":
		pod.Status.Phase = corev1.PodRunning
	case "pend":
		pod.Status.Phase = corev1.PodPending
	case "ok":
		pod.Status.Phase = corev1.PodSucceeded
	case "fail":
		pod.Status.Phase = corev1.PodFailed
	}
	if phase == "del" {
		pod.DeletionTimestamp = &metav1.Time{Time: t0.Add(-time.Hour)}
	}
	return pod
}

func inputOf(job *batchv1.Job, text string) input {
	in := input{job: job, now: t0}
	for i, f := range strings.Fields(text) {
		in.pods = append(in.pods, podOf(i, f))
	}
	return in
}

// text is what a step creates, removes, releases and concludes.
func text(s step) string {
	var out []string
	for _, c := range s.create {
		out = append(out, strings.TrimSuffix(fmt.Sprintf("+%d", c.index), "-1"))
	}
	for _, p := range s.remove {
		out = append(out, "-"+p.Name)
	}
	for _, p := range s.release {
		out = append(out, "~"+p.Name)
	}
	for _, c := range s.status.Conditions {
		if c.Status == corev1.ConditionTrue {
			out = append(out, c.Reason)
		}
	}
	return strings.Join(out, " ")
}

func TestPlan(t *testing.T) {
	for _, tc := range []struct {
		what string
		job  *batchv1.Job
		pods string
		want string
	}{
		{"as many as may run", newJob(2, 5), "", "+ +"},
		{"as many as are needed", newJob(9, 2), "", "+ +"},
		{"what has ended is accounted for", newJob(2, 5), "ok run", "+ ~p0"},
		{"enough", newJob(2, 1), "ok", "~p0 CompletionsReached"},
		{"enough, one still runs", newJob(2, 1), "ok run", "-p1 ~p0"},
		{"none wanted", newJob(0, 3), "run", "-p0"},
		{"complete from the start", newJob(1, 0), "", "CompletionsReached"},
		{"without a number: as many as may run", newJob(3, -1), "run", "+ +"},
		{"without a number: the first success ends it", newJob(3, -1), "run ok", "~p1"},
		{"without a number: all have ended", newJob(3, -1), "fail ok", "~p0 ~p1 CompletionsReached"},
		{"a failure is tried again later", newJob(1, 1), "fail", "+ ~p0"}, // it is longer ago than the back-off
		{"too many failures", newJob(1, 1, limit(0)), "fail", "~p0 BackoffLimitExceeded"},
		{"too many failures: what runs is ended", newJob(2, 2, limit(0)), "fail run", "-p1 ~p0 BackoffLimitExceeded"},
		{"a pod that is deleted counts as failed", newJob(1, 1, limit(0)), "del", "~p0 BackoffLimitExceeded"},
		{"unless only failed ones are replaced", newJob(1, 1, limit(0), replaceFailed), "del", ""},
		{"suspended", newJob(2, 2, suspend), "run ok", "-p0 ~p1 JobSuspended"},
		{"indexes", newJob(2, 4, indexedJob), "", "+0 +1"},
		{"the next index", newJob(2, 4, indexedJob), "ok.0 run.2", "+1 ~p0"},
		{"an index twice", newJob(3, 4, indexedJob), "run.0 run.0", "-p1"},
		{"an index too high", newJob(3, 2, indexedJob), "run.7", "-p0"},
		{"all indexes", newJob(2, 2, indexedJob), "ok.0 ok.1 ok.1", "~p0 ~p1 ~p2 CompletionsReached"},
		{"an index fails: its pod waits for the next", newJob(1, 2, perIndex(1, -1)), "fail.0", "+0"},
		{"an index failed for good", newJob(2, 2, perIndex(0, -1)), "fail.0 run.1", "~p0"},
		{"too many indexes failed", newJob(2, 3, perIndex(0, 0)), "fail.0 run.1", "-p1 ~p0 MaxFailedIndexesExceeded"},
		{"every index has ended, one failed", newJob(2, 2, perIndex(0, -1)), "fail.0 ok.1", "~p0 ~p1 FailedIndexes"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			got, want := strings.Fields(text(plan(inputOf(tc.job, tc.pods)))), strings.Fields(tc.want)
			slices.Sort(got)
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("got %v, want %v", got, want)
			}
		})
	}
}

func TestBackOffAndDeadline(t *testing.T) {
	in := inputOf(newJob(1, 1), "fail fail")
	for i, p := range in.pods {
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 1, FinishedAt: metav1.NewTime(t0.Add(time.Duration(i-6) * time.Second))}}}}
	}
	if s := plan(in); len(s.create) != 0 || s.again != 15*time.Second {
		t.Errorf("5 s after the second failure: %q, again in %v, want 20 s after it", text(s), s.again)
	}
	late := newJob(1, 1, deadline(60))
	late.Status.StartTime = &metav1.Time{Time: t0.Add(-50 * time.Second)}
	if s := plan(inputOf(late, "run")); text(s) != "" || s.again != 10*time.Second {
		t.Errorf("before the deadline: %q, again in %v", text(s), s.again)
	}
	late.Status.StartTime = &metav1.Time{Time: t0.Add(-60 * time.Second)}
	if s := plan(inputOf(late, "run")); text(s) != "-p0 DeadlineExceeded" {
		t.Errorf("at the deadline: %q", text(s))
	}
	restarting := newJob(1, 1, limit(3))
	restarting.Spec.Template.Spec.RestartPolicy = corev1.RestartPolicyOnFailure
	in = inputOf(restarting, "run")
	in.pods[0].Status.ContainerStatuses = []corev1.ContainerStatus{{RestartCount: 3}}
	if s := plan(in); text(s) != "-p0 BackoffLimitExceeded" {
		t.Errorf("restarted three times: %q", text(s))
	}
}

func TestPolicies(t *testing.T) {
	exit := func(code int32) func(*corev1.Pod) {
		return func(p *corev1.Pod) {
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: code}}}}
		}
	}
	evicted := func(p *corev1.Pod) {
		p.Status.Conditions = []corev1.PodCondition{{Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue}}
	}
	policy := &batchv1.PodFailurePolicy{Rules: []batchv1.PodFailurePolicyRule{
		{Action: batchv1.PodFailurePolicyActionIgnore, OnPodConditions: []batchv1.PodFailurePolicyOnPodConditionsPattern{{Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue}}},
		{Action: batchv1.PodFailurePolicyActionFailJob, OnExitCodes: &batchv1.PodFailurePolicyOnExitCodesRequirement{Operator: batchv1.PodFailurePolicyOnExitCodesOpIn, Values: []int32{42}}},
		{Action: batchv1.PodFailurePolicyActionCount, OnExitCodes: &batchv1.PodFailurePolicyOnExitCodesRequirement{Operator: batchv1.PodFailurePolicyOnExitCodesOpNotIn, Values: []int32{1, 2}}},
		{Action: batchv1.PodFailurePolicyActionFailIndex, OnExitCodes: &batchv1.PodFailurePolicyOnExitCodesRequirement{Operator: batchv1.PodFailurePolicyOnExitCodesOpIn, Values: []int32{2}}},
	}}
	for _, tc := range []struct {
		what string
		mk   func(*corev1.Pod)
		want ruling
	}{
		{"evicted", evicted, ruling{}},
		{"42", exit(42), ruling{counts: true, failJob: "Container c for pod ns/p0 failed with exit code 42 matching FailJob rule at index 1"}},
		{"7", exit(7), ruling{counts: true}},
		{"2", exit(2), ruling{counts: true, failIndex: true}},
		{"1", exit(1), ruling{counts: true}},
	} {
		p := podOf(0, "fail")
		tc.mk(p)
		if got := judge(policy, p); got != tc.want {
			t.Errorf("%s: %+v, want %+v", tc.what, got, tc.want)
		}
	}
	job := newJob(2, 2, func(j *batchv1.Job) { j.Spec.PodFailurePolicy = policy })
	in := inputOf(job, "fail run")
	exit(42)(in.pods[0])
	if s := plan(in); text(s) != "-p1 ~p0 PodFailurePolicy" {
		t.Errorf("%q", text(s))
	}
	in = inputOf(newJob(1, 1, limit(0), func(j *batchv1.Job) { j.Spec.PodFailurePolicy = policy }), "fail")
	evicted(in.pods[0])
	if s := plan(in); text(s) != "+ ~p0" || len(s.status.UncountedTerminatedPods.Failed) != 0 {
		t.Errorf("an ignored failure: %q, uncounted %v", text(s), s.status.UncountedTerminatedPods)
	}
	success := newJob(5, 5, indexedJob, func(j *batchv1.Job) {
		j.Spec.SuccessPolicy = &batchv1.SuccessPolicy{Rules: []batchv1.SuccessPolicyRule{{SucceededIndexes: new("0,2-3"), SucceededCount: new(int32(2))}}}
	})
	if s := plan(inputOf(success, "run.0 ok.2 run.1 run.4 ok.3")); text(s) != "-p0 -p2 -p3 ~p1 ~p4 SuccessPolicy" {
		t.Errorf("%q", text(s))
	}
}

func TestIndexes(t *testing.T) {
	for _, tc := range []struct{ in, out string }{{"", ""}, {"0", "0"}, {"0,1", "0,1"}, {"0-1", "0,1"}, {"0,1,2", "0-2"}, {"5,1-2,3", "1-3,5"}, {"1-9", "1-7"}, {"9", ""}, {"x,2,4-y", "2"}, {"-3", ""}, {"3-1", ""}} {
		if got := parseIndexes(tc.in, 8).String(); got != tc.out {
			t.Errorf("%q: %q, want %q", tc.in, got, tc.out)
		}
	}
	x := parseIndexes("1-3,5", 8)
	if got := fmt.Sprint(x.missing(3, 8)); got != "[0 4 6]" {
		t.Errorf("missing %s", got)
	}
	if x.has(0) || !x.has(1) || !x.has(3) || x.has(4) || !x.has(5) || x.has(6) || x.total() != 4 || x.overlap(parseIndexes("3-6", 8)) != 2 {
		t.Errorf("%v", x)
	}
}

func FuzzIndexes(f *testing.F) {
	f.Add("0,2-3", 5)
	f.Fuzz(func(t *testing.T, text string, completions int) {
		if completions < 0 || completions > 1<<20 {
			return
		}
		x := parseIndexes(text, completions)
		if again := parseIndexes(x.String(), completions); again.String() != x.String() || again.total() != x.total() {
			t.Errorf("%q reads as %v, and that as %v", text, x, again)
		}
		if n := len(x.missing(1<<20, completions)); n+x.total() != completions {
			t.Errorf("%d missing and %d there of %d", n, x.total(), completions)
		}
	})
}

// TestRandomHistories plays plan against a world in which pods end, are deleted
// and vanish at random, and in which the controller stops between any two of its
// writes. Every success and every failure is counted exactly once.
func TestRandomHistories(t *testing.T) {
	for seed := range uint64(2000) {
		if err := play(seed); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

func play(seed uint64) error {
	rnd := rand.New(rand.NewPCG(seed, 3))
	edits := []func(*batchv1.Job){limit(rnd.Int32N(8))}
	mode := rnd.IntN(3)
	switch mode {
	case 1:
		edits = append(edits, indexedJob)
	case 2:
		edits = append(edits, perIndex(rnd.Int32N(3), rnd.Int32N(4)-1))
	}
	if rnd.IntN(2) == 0 {
		edits = append(edits, replaceFailed)
	}
	job := newJob(1+rnd.Int32N(4), 1+rnd.Int32N(8), edits...)
	pods := map[types.UID]*corev1.Pod{}
	// A seed is one history: no order of a map may have a part in it.
	ordered := func() []types.UID {
		uids := slices.Sorted(maps.Keys(pods))
		rnd.Shuffle(len(uids), func(i, j int) { uids[i], uids[j] = uids[j], uids[i] })
		return uids
	}
	now, id, won, lost := t0, 0, 0, 0
	wonIndexes := map[int]bool{}
	for round := range 3000 {
		in := input{job: job, now: now}
		for _, uid := range ordered() {
			in.pods = append(in.pods, pods[uid])
		}
		if finished(job) {
			break
		}
		s := plan(in)
		stop := rnd.IntN(4) // the controller dies before its first, second, third write, or not
		if stop > 0 || round > 2500 {
			for _, p := range s.remove {
				p.DeletionTimestamp = &metav1.Time{Time: now}
			}
			for _, c := range s.create {
				id++
				p := newPod(job, c)
				p.Name, p.UID, p.CreationTimestamp = fmt.Sprint("p", id), types.UID(fmt.Sprint("u", id)), metav1.NewTime(now)
				p.Status.Phase = corev1.PodPending
				pods[p.UID] = p
			}
			active, per := 0, map[int]int{}
			for _, p := range pods {
				if p.DeletionTimestamp == nil && (p.Status.Phase == corev1.PodPending || p.Status.Phase == corev1.PodRunning) {
					active++
					per[indexOf(p)]++
				}
			}
			if active > int(*job.Spec.Parallelism) {
				return fmt.Errorf("%d pods at once, allowed are %d", active, *job.Spec.Parallelism)
			}
			for i, n := range per {
				if i >= 0 && n > 1 {
					return fmt.Errorf("%d pods of index %d", n, i)
				}
			}
		}
		if stop > 1 || round > 2500 {
			job.Status = s.status
			if stop > 2 || round > 2500 {
				for _, p := range s.release {
					if rnd.IntN(5) > 0 {
						p.Finalizers = nil
					}
				}
			}
		}
		now = now.Add(time.Duration(rnd.IntN(20)) * time.Second)
		for _, uid := range ordered() {
			p := pods[uid]
			running := p.Status.Phase == corev1.PodPending || p.Status.Phase == corev1.PodRunning
			switch n := rnd.IntN(20); {
			case running && p.DeletionTimestamp == nil && n < 4:
				p.Status.Phase = corev1.PodSucceeded
				won++
				wonIndexes[indexOf(p)] = true
			case running && (n < 6 || p.DeletionTimestamp != nil && n < 12):
				p.Status.Phase = corev1.PodFailed
				lost++
			case running && n == 6:
				p.DeletionTimestamp = &metav1.Time{Time: now}
			}
			if p.DeletionTimestamp != nil && len(p.Finalizers) == 0 && rnd.IntN(2) == 0 {
				delete(pods, uid)
			}
		}
	}
	if !finished(job) {
		return fmt.Errorf("not finished: %+v", job.Status)
	}
	st := job.Status
	u := st.UncountedTerminatedPods
	if len(u.Succeeded)+len(u.Failed) > 0 {
		return fmt.Errorf("finished with uncounted pods %+v", u)
	}
	for _, p := range pods {
		if tracked(p) {
			return fmt.Errorf("finished, and pod %s is held", p.Name)
		}
	}
	complete := find(st.Conditions, batchv1.JobComplete) != nil
	switch {
	case mode == 0 && complete && int(st.Succeeded) < int(*job.Spec.Completions):
		return fmt.Errorf("complete with %d successes of %d", st.Succeeded, *job.Spec.Completions)
	case mode == 0 && int(st.Succeeded) != won:
		return fmt.Errorf("%d successes counted, there were %d", st.Succeeded, won)
	case mode != 0 && int(st.Succeeded) != len(wonIndexes):
		return fmt.Errorf("%d indexes counted (%s), there were %d", st.Succeeded, st.CompletedIndexes, len(wonIndexes))
	case mode != 0 && complete && int(st.Succeeded) != int(*job.Spec.Completions):
		return fmt.Errorf("complete with the indexes %s of %d", st.CompletedIndexes, *job.Spec.Completions)
	case int(st.Failed) > id:
		return fmt.Errorf("%d failures of %d pods", st.Failed, id)
	}
	return nil
}

// A Job of which more pods have succeeded than it asked for says so when it ends.
func TestTooManySucceeded(t *testing.T) {
	job := newJob(2, 1)
	job.Status.Succeeded = 2
	job.Status.Conditions = []batchv1.JobCondition{{Type: batchv1.JobSuccessCriteriaMet, Status: corev1.ConditionTrue, Reason: batchv1.JobReasonCompletionsReached}}
	out := plan(inputOf(job, ""))
	if len(out.events) != 2 || out.events[0].reason != "TooManySucceededPods" || out.events[1].reason != "Completed" {
		t.Errorf("%+v", out.events)
	}
}
