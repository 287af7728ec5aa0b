package cronjob

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

const (
	// late is how long after a scheduled time the controller looks, so that the
	// clock has surely passed it; upstream's.
	late = 100 * time.Millisecond
	// manyMissed is how many missed times are worth a warning; upstream's.
	manyMissed = 100
)

// input is all that plan looks at.
type input struct {
	cron *batchv1.CronJob
	jobs []*batchv1.Job // that it controls
	now  time.Time
}

// step is what one sync has to do: delete, then start, then write the status.
type step struct {
	remove []*batchv1.Job // of the history, or to make way
	start  *time.Time     // the scheduled time for which to start a Job
	runs   bool           // that Job runs already; only its time is to be written down
	active []corev1.ObjectReference
	last   *metav1.Time // of success
	events []event
	again  time.Duration // when to look again though nothing changed; zero for never
}

type event struct{ kind, reason, text string }

func (s *step) warn(reason, format string, args ...any) {
	s.events = append(s.events, event{corev1.EventTypeWarning, reason, fmt.Sprintf(format, args...)})
}

func (s *step) note(reason, format string, args ...any) {
	s.events = append(s.events, event{corev1.EventTypeNormal, reason, fmt.Sprintf(format, args...)})
}

// condition returns the type of the condition that ended the Job, "" while it runs.
func condition(job *batchv1.Job) batchv1.JobConditionType {
	for _, c := range job.Status.Conditions {
		if (c.Type == batchv1.JobComplete || c.Type == batchv1.JobFailed) && c.Status == corev1.ConditionTrue {
			return c.Type
		}
	}
	return ""
}

// plan decides the next step. At most the most recent of the times that have
// passed is made up for.
func plan(in input) step {
	s := step{last: in.cron.Status.LastSuccessfulTime}
	s.review(in)
	s.prune(in)
	if in.cron.DeletionTimestamp != nil || in.cron.Spec.Suspend != nil && *in.cron.Spec.Suspend {
		return s
	}
	if tz := in.cron.Spec.TimeZone; tz != nil {
		if _, err := time.LoadLocation(*tz); err != nil {
			s.warn("UnknownTimeZone", "invalid timeZone: %q: %s", *tz, err)
			return s
		}
	}
	schedule, err := parse(in.cron)
	if err != nil {
		s.warn("UnparseableSchedule", "unparseable schedule: %q : %s", in.cron.Spec.Schedule, err)
		return s
	}
	at, missed, err := latest(in.cron, schedule, in.now)
	if err != nil {
		s.warn("InvalidSchedule", "invalid schedule: %s : %s", in.cron.Spec.Schedule, err)
		return s
	}
	s.again = schedule.Next(in.now).Add(late).Sub(in.now)
	if at == nil {
		return s
	}
	if missed > manyMissed {
		s.warn("TooManyMissedTimes", "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew")
	}
	s.due(in, *at)
	return s
}

// review keeps the list of Jobs that run, and the time of the last success.
func (s *step) review(in input) {
	jobs := map[types.UID]*batchv1.Job{}
	for _, j := range in.jobs {
		jobs[j.UID] = j
		if condition(j) != batchv1.JobComplete || j.Status.CompletionTime == nil {
			continue
		}
		if s.last == nil || j.Status.CompletionTime.After(s.last.Time) {
			s.last = j.Status.CompletionTime
		}
	}
	listed := map[types.UID]bool{}
	for _, ref := range in.cron.Status.Active {
		listed[ref.UID] = true
		switch j := jobs[ref.UID]; {
		case j == nil:
			s.note("MissingJob", "Active job went missing: %v", ref.Name)
		case condition(j) != "":
			s.note("SawCompletedJob", "Saw completed job: %s, condition: %v", j.Name, condition(j))
		default:
			s.active = append(s.active, ref)
		}
	}
	for _, j := range in.jobs {
		// Started by an earlier leader that could not write it down, or by hand.
		if !listed[j.UID] && condition(j) == "" && j.DeletionTimestamp == nil {
			s.active = append(s.active, reference(j))
		}
	}
}

// prune chooses what is beyond the limits of the history, the oldest first.
func (s *step) prune(in input) {
	for kind, limit := range map[batchv1.JobConditionType]*int32{
		batchv1.JobComplete: in.cron.Spec.SuccessfulJobsHistoryLimit, batchv1.JobFailed: in.cron.Spec.FailedJobsHistoryLimit,
	} {
		if limit == nil {
			continue
		}
		var ended []*batchv1.Job
		for _, j := range in.jobs {
			if condition(j) == kind && j.DeletionTimestamp == nil {
				ended = append(ended, j)
			}
		}
		slices.SortFunc(ended, func(a, b *batchv1.Job) int {
			return cmp.Or(began(a).Compare(began(b)), cmp.Compare(a.Name, b.Name))
		})
		s.remove = append(s.remove, ended[:max(0, len(ended)-int(*limit))]...)
	}
}

func began(j *batchv1.Job) time.Time {
	if j.Status.StartTime != nil {
		return j.Status.StartTime.Time
	}
	return j.CreationTimestamp.Time
}

// due starts the Job of a time that has passed, if it may start.
func (s *step) due(in input, at time.Time) {
	if d := in.cron.Spec.StartingDeadlineSeconds; d != nil && at.Add(time.Duration(*d)*time.Second).Before(in.now) {
		s.warn("MissSchedule", "Missed scheduled time to start a job: %s", at.UTC().Format(time.RFC1123Z))
		return
	}
	if slices.ContainsFunc(s.active, func(r corev1.ObjectReference) bool { return r.Name == jobName(in.cron, at) }) {
		s.start, s.runs = &at, true
		return
	}
	switch in.cron.Spec.ConcurrencyPolicy {
	case batchv1.ForbidConcurrent:
		if len(s.active) > 0 {
			s.note("JobAlreadyActive", "Not starting job because prior execution is running and concurrency policy is Forbid")
			return
		}
	case batchv1.ReplaceConcurrent:
		for _, j := range in.jobs {
			if slices.ContainsFunc(s.active, func(r corev1.ObjectReference) bool { return r.UID == j.UID }) {
				s.remove = append(s.remove, j)
			}
		}
		s.active = nil
	}
	s.start = &at
}

// parse reads the schedule, in its time zone. The library panics on some input.
func parse(c *batchv1.CronJob) (schedule cron.Schedule, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%v", p)
		}
	}()
	text := c.Spec.Schedule
	if c.Spec.TimeZone != nil && !strings.Contains(text, "TZ") {
		text = "TZ=" + *c.Spec.TimeZone + " " + text
	}
	return cron.ParseStandard(text)
}

var errNever = errors.New("it never comes, or more often than once a second")

// latest is the most recent scheduled time that has passed and for which nothing
// was started, nil if there is none, with about how many have passed.
func latest(c *batchv1.CronJob, schedule cron.Schedule, now time.Time) (*time.Time, int64, error) {
	from := c.CreationTimestamp.Time
	if c.Status.LastScheduleTime != nil {
		from = c.Status.LastScheduleTime.Time
	}
	if d := c.Spec.StartingDeadlineSeconds; d != nil {
		if first := now.Add(-time.Duration(*d) * time.Second); first.After(from) {
			from = first
		}
	}
	t := schedule.Next(from)
	if t.IsZero() {
		return nil, 0, errNever // such as the 31st of February
	}
	if t.After(now) {
		return nil, 0, nil
	}
	t2 := schedule.Next(t)
	if t2.After(now) {
		return &t, 1, nil
	}
	each := t2.Sub(t).Round(time.Second)
	if each < time.Second {
		return nil, 0, errNever
	}
	// Years of minutes must not be walked one by one: jump by whole intervals
	// (@every counts from where it started). Intervals may differ, so a jump may
	// land behind now: it is halved until it does not, and the rest is walked.
	missed := int64(now.Sub(t)/each) + 1
	for k := missed - 2; k > 0; k /= 2 {
		if n := schedule.Next(t.Add(time.Duration(k) * each)); !n.IsZero() && !n.After(now) {
			t = n
			break
		}
	}
	for n := schedule.Next(t); !n.IsZero() && !n.After(now); n = schedule.Next(n) {
		t = n
	}
	return &t, missed, nil
}

// jobName is upstream's: the minute of the scheduled time makes it the same for
// whoever starts the Job, so it cannot be started twice.
func jobName(c *batchv1.CronJob, at time.Time) string {
	return c.Name + "-" + strconv.FormatInt(at.Unix()/60, 10)
}

func reference(j *batchv1.Job) corev1.ObjectReference {
	return corev1.ObjectReference{APIVersion: batchv1.SchemeGroupVersion.String(), Kind: "Job", Namespace: j.Namespace, Name: j.Name, UID: j.UID, ResourceVersion: j.ResourceVersion}
}
