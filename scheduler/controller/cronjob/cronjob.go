// Package cronjob starts a Job at each time that a CronJob names, and keeps the
// history of those Jobs within its limits.
//
// Inputs: CronJobs, Jobs. Outputs: creates and deletes Jobs; CronJob status;
// events SuccessfulCreate, FailedCreate, SuccessfulDelete, FailedDelete,
// SawCompletedJob, MissingJob, MissSchedule, JobAlreadyActive and what is wrong
// with the schedule on the CronJob.
//
// The name of a Job follows from its scheduled time, so that no time is served
// twice, whatever leader asks. What to do is decided by plan, which is pure.
package cronjob

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"
	_ "time/tzdata" // a node need not have the time zones

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	batchlisters "k8s.io/client-go/listers/batch/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "cronjob"
	workers = 2
	// lagRecheck is when a sync that found the view behind looks again, if no
	// event woke it before.
	lagRecheck = time.Second
)

var kind = batchv1.SchemeGroupVersion.WithKind("CronJob")

type cronJobs struct {
	controller.Deps
	queue   *controller.Queue[string]
	cronInf cache.SharedIndexInformer
	jobInf  cache.SharedIndexInformer
	lister  batchlisters.CronJobLister
	jobs    *controller.Ledger
	written *controller.Ledger // statuses
	events  record.EventRecorder
	initErr error
}

// New returns the CronJob controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	batch := deps.Factory.Batch().V1()
	return &cronJobs{
		Deps:    deps,
		queue:   controller.NewQueue[string](name, deps.Clock),
		cronInf: batch.CronJobs().Informer(),
		jobInf:  batch.Jobs().Informer(),
		lister:  batch.CronJobs().Lister(),
		jobs:    controller.NewLedger(batch.Jobs().Informer().GetIndexer()),
		written: controller.NewLedger(batch.CronJobs().Informer().GetIndexer()),
		events:  deps.Recorder("cronjob-controller"),
		initErr: controller.EnsureIndexes(batch.Jobs().Informer(), controller.IndexController),
	}
}

func (c *cronJobs) Name() string { return name }

func (c *cronJobs) Run(ctx context.Context) error {
	if c.initErr != nil {
		return c.initErr
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: workers,
		Watches: []controller.Watch{
			controller.On(c.cronInf, c.cronChanged),
			controller.On(c.jobInf, c.jobChanged),
		},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

func (c *cronJobs) cronChanged(old, cur *batchv1.CronJob) {
	if cur == nil {
		cur = old
	}
	c.queue.Add(controller.Key(cur))
}

func (c *cronJobs) jobChanged(old, cur *batchv1.Job) {
	job := cur
	if job == nil {
		job = old
	}
	if ref := metav1.GetControllerOfNoCopy(job); ref != nil && ref.Kind == kind.Kind {
		c.queue.Add(job.Namespace + "/" + ref.Name)
	}
}

func (c *cronJobs) sync(ctx context.Context, key string) error {
	ns, cronName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	if now := c.Clock.Now(); c.jobs.Pending(key, now)+c.written.Pending(key, now) > 0 {
		c.queue.AddAfter(key, lagRecheck)
		return nil
	}
	cj, err := c.lister.CronJobs(ns).Get(cronName)
	if apierrors.IsNotFound(err) {
		c.jobs.Forget(key)
		c.written.Forget(key)
		return nil
	}
	if err != nil {
		return err
	}
	all, err := controller.ByIndex[*batchv1.Job](c.jobInf.GetIndexer(), controller.IndexController, string(cj.UID))
	if err != nil {
		return err
	}
	todo := plan(input{cron: cj, jobs: all, now: c.Clock.Now()})
	if todo.again > 0 {
		c.queue.AddAfter(key, todo.again)
	}
	for _, e := range todo.events {
		c.events.Event(cj, e.kind, e.reason, e.text)
	}
	return c.carryOut(ctx, key, cj, todo)
}

func (c *cronJobs) carryOut(ctx context.Context, key string, cj *batchv1.CronJob, todo step) error {
	status := *cj.Status.DeepCopy()
	status.Active, status.LastSuccessfulTime = todo.active, todo.last
	_, err := controller.Each(ctx, todo.remove, func(job *batchv1.Job) error { return c.remove(ctx, key, cj, job) })
	if todo.runs {
		status.LastScheduleTime = &metav1.Time{Time: *todo.start}
	} else if err == nil && todo.start != nil {
		var job *batchv1.Job
		if job, err = c.create(ctx, key, cj, *todo.start); job != nil {
			status.LastScheduleTime = &metav1.Time{Time: *todo.start}
			listed := false
			for _, r := range status.Active {
				listed = listed || r.UID == job.UID
			}
			if !listed && condition(job) == "" {
				status.Active = append(status.Active, reference(job))
			}
		}
	}
	return errors.Join(err, c.updateStatus(ctx, key, cj, status))
}

func (c *cronJobs) remove(ctx context.Context, key string, cj *batchv1.CronJob, job *batchv1.Job) error {
	background := metav1.DeletePropagationBackground
	err := c.Client.BatchV1().Jobs(job.Namespace).Delete(ctx, job.Name, metav1.DeleteOptions{
		PropagationPolicy: &background, Preconditions: metav1.NewUIDPreconditions(string(job.UID))})
	if err != nil && !apierrors.IsNotFound(err) {
		c.events.Eventf(cj, corev1.EventTypeWarning, "FailedDelete", "Deleted job: %v", err)
		return fmt.Errorf("delete Job %s/%s: %w", job.Namespace, job.Name, err)
	}
	c.jobs.Deleted(key, job, c.Clock.Now())
	c.events.Eventf(cj, corev1.EventTypeNormal, "SuccessfulDelete", "Deleted job %v", job.Name)
	return nil
}

// create makes the Job of a scheduled time, or returns the one that has been
// made; nil when the name is somebody else's.
func (c *cronJobs) create(ctx context.Context, key string, cj *batchv1.CronJob, at time.Time) (*batchv1.Job, error) {
	api := c.Client.BatchV1().Jobs(cj.Namespace)
	made, err := api.Create(ctx, newJob(cj, at), metav1.CreateOptions{})
	switch {
	case err == nil:
		c.jobs.Wrote(key, made, c.Clock.Now())
		c.events.Eventf(cj, corev1.EventTypeNormal, "SuccessfulCreate", "Created job %v", made.Name)
		return made, nil
	case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return nil, nil // whatever is tried here fails, and soon the CronJob is gone as well
	case apierrors.IsAlreadyExists(err):
		held, err := api.Get(ctx, jobName(cj, at), metav1.GetOptions{})
		if err != nil {
			return nil, fmt.Errorf("read Job %s/%s that exists: %w", cj.Namespace, jobName(cj, at), err)
		}
		if !metav1.IsControlledBy(held, cj) {
			return nil, fmt.Errorf("Job %s/%s exists and is not of this CronJob", held.Namespace, held.Name)
		}
		c.jobs.Wrote(key, held, c.Clock.Now())
		return held, nil
	}
	c.events.Eventf(cj, corev1.EventTypeWarning, "FailedCreate", "Error creating job: %v", err)
	return nil, fmt.Errorf("create Job %s/%s: %w", cj.Namespace, jobName(cj, at), err)
}

func (c *cronJobs) updateStatus(ctx context.Context, key string, cj *batchv1.CronJob, status batchv1.CronJobStatus) error {
	if equality.Semantic.DeepEqual(cj.Status, status) {
		return nil
	}
	upd := cj.DeepCopy()
	upd.Status = status
	upd, err := c.Client.BatchV1().CronJobs(cj.Namespace).UpdateStatus(ctx, upd, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("update status of CronJob %s: %w", key, err)
	}
	c.written.Wrote(key, upd, c.Clock.Now())
	return nil
}

func newJob(cj *batchv1.CronJob, at time.Time) *batchv1.Job {
	t := cj.Spec.JobTemplate.DeepCopy()
	zone := time.UTC
	if tz := cj.Spec.TimeZone; tz != nil {
		if l, err := time.LoadLocation(*tz); err == nil {
			zone = l
		}
	}
	t.Annotations = maps.Clone(t.Annotations)
	if t.Annotations == nil {
		t.Annotations = map[string]string{}
	}
	t.Annotations[batchv1.CronJobScheduledTimestampAnnotation] = at.In(zone).Format(time.RFC3339)
	return &batchv1.Job{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: cj.Namespace, Name: jobName(cj, at), Labels: t.Labels, Annotations: t.Annotations,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(cj, kind)},
		},
		Spec: t.Spec,
	}
}
