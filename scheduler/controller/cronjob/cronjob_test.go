package cronjob

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/robfig/cron/v3"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	clienttesting "k8s.io/client-go/testing"

	"skein.io/skein/scheduler/controller/controllertest"
)

var t0 = time.Date(2026, 3, 2, 10, 0, 0, 0, time.UTC) // a Monday

func newCron(schedule string, edit ...func(*batchv1.CronJob)) *batchv1.CronJob {
	c := &batchv1.CronJob{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "tidy", UID: "cron-uid", ResourceVersion: "3", CreationTimestamp: metav1.NewTime(t0)},
		Spec:       batchv1.CronJobSpec{Schedule: schedule, ConcurrencyPolicy: batchv1.AllowConcurrent, SuccessfulJobsHistoryLimit: new(int32(3)), FailedJobsHistoryLimit: new(int32(1))},
	}
	for _, e := range edit {
		e(c)
	}
	return c
}

func policy(p batchv1.ConcurrencyPolicy) func(*batchv1.CronJob) {
	return func(c *batchv1.CronJob) { c.Spec.ConcurrencyPolicy = p }
}
func within(n int64) func(*batchv1.CronJob) {
	return func(c *batchv1.CronJob) { c.Spec.StartingDeadlineSeconds = &n }
}
func zone(z string) func(*batchv1.CronJob) { return func(c *batchv1.CronJob) { c.Spec.TimeZone = &z } }
func last(t time.Time) func(*batchv1.CronJob) {
	return func(c *batchv1.CronJob) { c.Status.LastScheduleTime = &metav1.Time{Time: t} }
}
func running(names ...string) func(*batchv1.CronJob) {
	return func(c *batchv1.CronJob) {
		for _, n := range names {
			c.Status.Active = append(c.Status.Active, corev1.ObjectReference{Name: n, UID: types.UID(n)})
		}
	}
}

func jobOf(name string, end batchv1.JobConditionType, at time.Time) *batchv1.Job {
	j := &batchv1.Job{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID(name), CreationTimestamp: metav1.NewTime(at),
		OwnerReferences: []metav1.OwnerReference{{Kind: "CronJob", Name: "tidy", UID: "cron-uid", Controller: new(true)}}}}
	if end != "" {
		j.Status.Conditions = []batchv1.JobCondition{{Type: end, Status: corev1.ConditionTrue}}
		j.Status.CompletionTime = &metav1.Time{Time: at.Add(time.Minute)}
	}
	return j
}

func TestPlan(t *testing.T) {
	at := func(h, m int) time.Time { return time.Date(2026, 3, 2, h, m, 0, 0, time.UTC) }
	for _, tc := range []struct {
		what  string
		cron  *batchv1.CronJob
		jobs  []*batchv1.Job
		now   time.Time
		want  string // start time, "-name" of Jobs to remove
		event string
		again time.Duration
	}{
		{"not yet", newCron("0 * * * *"), nil, at(10, 59), "", "", time.Minute + late},
		{"now", newCron("0 * * * *"), nil, at(11, 0), "11:00", "", time.Hour + late},
		{"a little late", newCron("0 * * * *"), nil, at(11, 30), "11:00", "", 30*time.Minute + late},
		{"done", newCron("0 * * * *", last(at(11, 0))), nil, at(11, 30), "", "", 30*time.Minute + late},
		{"several have passed: the last", newCron("0 * * * *"), nil, at(14, 30), "14:00", "", 30*time.Minute + late},
		{"too late", newCron("0 * * * *", within(3600)), nil, at(11, 59), "11:00", "", time.Minute + late},
		{"much too late", newCron("30 10 * * *", within(60)), nil, at(10, 40), "", "", 23*time.Hour + 50*time.Minute + late},
		{"suspended", newCron("0 * * * *", func(c *batchv1.CronJob) { c.Spec.Suspend = new(true) }), nil, at(12, 0), "", "", 0},
		{"another time zone", newCron("0 9 * * *", zone("America/New_York")), nil, at(14, 0), "14:00", "", 24*time.Hour - time.Hour*0 + late},
		{"no such zone", newCron("0 * * * *", zone("Nowhere/City")), nil, at(12, 0), "", "UnknownTimeZone", 0},
		{"no such schedule", newCron("61 * * * *"), nil, at(12, 0), "", "UnparseableSchedule", 0},
		{"no such schedule, a panic of the library", newCron("TZ=0"), nil, at(12, 0), "", "UnparseableSchedule", 0},
		{"a day that never comes", newCron("0 0 31 2 *"), nil, at(12, 0), "", "InvalidSchedule", 0},
		{"one runs, both may", newCron("0 * * * *", running("a")), []*batchv1.Job{jobOf("a", "", t0)}, at(11, 0), "11:00", "", time.Hour + late},
		{"one runs, forbidden", newCron("0 * * * *", running("a"), policy(batchv1.ForbidConcurrent)), []*batchv1.Job{jobOf("a", "", t0)}, at(11, 0), "", "JobAlreadyActive", time.Hour + late},
		{"it has ended", newCron("0 * * * *", running("a"), policy(batchv1.ForbidConcurrent)), []*batchv1.Job{jobOf("a", batchv1.JobComplete, t0)}, at(11, 0), "11:00", "SawCompletedJob", time.Hour + late},
		{"it is gone", newCron("0 * * * *", running("a"), policy(batchv1.ForbidConcurrent)), nil, at(11, 0), "11:00", "MissingJob", time.Hour + late},
		{"one runs, it makes way", newCron("0 * * * *", running("a"), policy(batchv1.ReplaceConcurrent)), []*batchv1.Job{jobOf("a", "", t0)}, at(11, 0), "-a 11:00", "", time.Hour + late},
		{"history", newCron("0 * * * *", last(at(11, 0))), []*batchv1.Job{
			jobOf("e", batchv1.JobComplete, at(5, 0)), jobOf("a", batchv1.JobComplete, at(1, 0)), jobOf("b", batchv1.JobComplete, at(2, 0)), jobOf("d", batchv1.JobComplete, at(4, 0)), jobOf("c", batchv1.JobComplete, at(3, 0)),
			jobOf("y", batchv1.JobFailed, at(2, 0)), jobOf("x", batchv1.JobFailed, at(1, 0))}, at(11, 30), "-a -b -x", "", 30*time.Minute + late},
		{"thousands have passed", newCron("* * * * *", last(t0.AddDate(-3, 0, 0))), nil, at(11, 0), "11:00", "TooManyMissedTimes", time.Minute + late},
	} {
		t.Run(tc.what, func(t *testing.T) {
			s := plan(input{cron: tc.cron, jobs: tc.jobs, now: tc.now})
			var got []string
			for _, n := range []string{"a", "b", "c", "d", "e", "x", "y"} {
				for _, j := range s.remove {
					if j.Name == n {
						got = append(got, "-"+n)
					}
				}
			}
			if s.start != nil {
				got = append(got, s.start.UTC().Format("15:04"))
			}
			reasons := ""
			for _, e := range s.events {
				reasons += e.reason
			}
			if g := strings.Join(got, " "); g != tc.want || reasons != tc.event || s.again != tc.again {
				t.Errorf("got %q, events %q, again in %v; want %q, %q, %v", g, reasons, s.again, tc.want, tc.event, tc.again)
			}
		})
	}
}

// TestLatest compares the jump to the last scheduled time with walking there.
func TestLatest(t *testing.T) {
	for _, text := range []string{"* * * * *", "*/7 * * * *", "30 6-16/4 * * 1-5", "0 0 1 * *", "0 9 * * 1", "@every 90s", "@every 7h", "15 3 29 2 *", "0 2 * * *"} {
		for _, tz := range []string{"UTC", "Europe/Berlin"} {
			schedule, err := cron.ParseStandard("TZ=" + tz + " " + text)
			if strings.HasPrefix(text, "@") {
				schedule, err = cron.ParseStandard(text)
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, span := range []time.Duration{time.Minute, time.Hour, 26 * time.Hour, 40 * 24 * time.Hour} {
				from := time.Date(2026, 3, 1, 17, 11, 30, 0, time.UTC)
				now := from.Add(span)
				c := newCron(text, last(from))
				got, _, err := latest(c, schedule, now)
				if err != nil {
					t.Fatalf("%s: %v", text, err)
				}
				var want *time.Time
				for n := schedule.Next(from); !n.After(now); n = schedule.Next(n) {
					want = &n
				}
				if (got == nil) != (want == nil) || got != nil && !got.Equal(*want) {
					t.Errorf("%s in %s, %v on: %v, want %v", text, tz, span, got, want)
				}
			}
		}
	}
}

func FuzzSchedule(f *testing.F) {
	for _, s := range []string{"* * * * *", "TZ=0", "@every 1ns", "0 0 31 2 *", "CRON_TZ=Asia/Tokyo 5 4 * * sun"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		s := plan(input{cron: newCron(text), now: t0.AddDate(0, 0, 3)})
		if s.start != nil && s.start.After(t0.AddDate(0, 0, 3)) {
			t.Errorf("%q: starts at %v, that is to come", text, s.start)
		}
	})
}

func TestLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cj := newCron("*/10 * * * *", func(c *batchv1.CronJob) {
			c.CreationTimestamp = metav1.Now()
			c.Spec.JobTemplate.Labels = map[string]string{"a": "b"}
		})
		client := controllertest.NewClient(cj)
		rec := controllertest.Start(t, client, nil, New)
		for range 6 * 60 {
			time.Sleep(time.Minute)
			synctest.Wait()
			jobs, err := client.BatchV1().Jobs("ns").List(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			for _, j := range jobs.Items {
				if condition(&j) == "" && time.Since(j.CreationTimestamp.Time) > 3*time.Minute {
					j.Status = jobOf("", batchv1.JobComplete, time.Now()).Status
					if _, err := client.BatchV1().Jobs("ns").UpdateStatus(t.Context(), &j, metav1.UpdateOptions{}); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		started := map[string]bool{}
		for _, a := range client.Actions() {
			if c, ok := a.(clienttesting.CreateAction); ok && a.Matches("create", "jobs") {
				started[c.GetObject().(*batchv1.Job).Name] = true
			}
		}
		if len(started) != 35 { // the 36th is about to start
			t.Errorf("%d Jobs in six hours, want 35", len(started))
		}
		if n := controllertest.Writes(client, "create", "jobs"); n > 2*35 {
			t.Errorf("%d tries to start 35 Jobs", n)
		}
		jobs, _ := client.BatchV1().Jobs("ns").List(t.Context(), metav1.ListOptions{})
		if len(jobs.Items) > 4 || jobs.Items[0].Labels["a"] != "b" || jobs.Items[0].Annotations["batch.kubernetes.io/cronjob-scheduled-timestamp"] == "" {
			t.Errorf("%d Jobs left, %+v", len(jobs.Items), jobs.Items[0].ObjectMeta)
		}
		got, err := client.BatchV1().CronJobs("ns").Get(t.Context(), "tidy", metav1.GetOptions{})
		if err != nil || got.Status.LastScheduleTime == nil || got.Status.LastSuccessfulTime == nil || len(got.Status.Active) > 1 {
			t.Errorf("status %+v, %v", got.Status, err)
		}
		if n := controllertest.Writes(client, "update", "cronjobs/status"); n > 4*36 {
			t.Errorf("%d status writes for 36 Jobs", n)
		}
		if e := fmt.Sprint(controllertest.Events(rec)); !strings.Contains(e, "SuccessfulCreate Created job tidy-") || !strings.Contains(e, "SawCompletedJob") || !strings.Contains(e, "SuccessfulDelete") {
			t.Errorf("events %s", e)
		}
	})
}
