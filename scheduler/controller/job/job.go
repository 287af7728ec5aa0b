// Package job runs each Job's pods until enough of them have succeeded or the
// Job has failed, and deletes finished Jobs after their time to live.
//
// Inputs: Jobs, Pods. Outputs: creates and deletes Pods, takes the tracking
// finalizer off them, sets and clears their controller reference; Job status;
// deletes Jobs (ttlSecondsAfterFinished); events SuccessfulCreate, FailedCreate,
// SuccessfulDelete, FailedDelete, Suspended, Resumed, Completed and the reasons
// of failure on the Job.
//
// Counts are exact: a pod carries a finalizer until a status that lists it has
// been written, and leaves the list only when the view shows it released. What to
// do is decided by plan, which is pure; nothing is decided on a view that does
// not show this controller's own writes yet.
package job

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	batchlisters "k8s.io/client-go/listers/batch/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "job"
	workers = 4
	// lagRecheck is when a sync that found the view behind looks again, if no
	// event woke it before.
	lagRecheck = time.Second
	// maxGenerateName leaves room for the API's suffix in a pod's name of 63.
	maxGenerateName = 58
)

var kind = batchv1.SchemeGroupVersion.WithKind("Job")

// item is a Job, or a pod that has lost its Job.
type item struct{ namespace, job, pod string }

type jobs struct {
	controller.Deps
	queue   *controller.Queue[item]
	jobInf  cache.SharedIndexInformer
	podInf  cache.SharedIndexInformer
	lister  batchlisters.JobLister
	podList corelisters.PodLister
	written *controller.Ledger // statuses
	pods    *controller.Ledger
	events  record.EventRecorder
	initErr error
}

// New returns the Job controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	js, pods := deps.Factory.Batch().V1().Jobs(), deps.Factory.Core().V1().Pods()
	return &jobs{
		Deps:    deps,
		queue:   controller.NewQueue[item](name, deps.Clock),
		jobInf:  js.Informer(),
		podInf:  pods.Informer(),
		lister:  js.Lister(),
		podList: pods.Lister(),
		written: controller.NewLedger(js.Informer().GetIndexer()),
		pods:    controller.NewLedger(pods.Informer().GetIndexer()),
		events:  deps.Recorder("job-controller"),
		initErr: controller.EnsureIndexes(pods.Informer(), controller.IndexController),
	}
}

func (c *jobs) Name() string { return name }

func (c *jobs) Run(ctx context.Context) error {
	if c.initErr != nil {
		return c.initErr
	}
	return controller.Run(ctx, controller.Work[item]{
		Queue:   c.queue,
		Workers: workers,
		Watches: []controller.Watch{
			controller.On(c.jobInf, c.jobChanged),
			controller.On(c.podInf, c.podChanged),
		},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

func (c *jobs) jobChanged(old, cur *batchv1.Job) {
	if cur == nil {
		cur = old
		c.orphans(cur)
	}
	c.queue.Add(item{namespace: cur.Namespace, job: cur.Name})
}

// orphans wakes the pods of a Job that is gone: nobody else takes the finalizer
// off them.
func (c *jobs) orphans(job *batchv1.Job) {
	pods, err := controller.ByIndex[*corev1.Pod](c.podInf.GetIndexer(), controller.IndexController, string(job.UID))
	if err != nil {
		return // the index exists
	}
	for _, pod := range pods {
		if tracked(pod) {
			c.queue.Add(item{namespace: pod.Namespace, pod: pod.Name})
		}
	}
}

func (c *jobs) podChanged(old, cur *corev1.Pod) {
	for _, pod := range []*corev1.Pod{old, cur} {
		if pod == nil {
			continue
		}
		ref := metav1.GetControllerOfNoCopy(pod)
		if ref != nil && ref.Kind != kind.Kind {
			continue
		}
		var job *batchv1.Job
		if ref != nil {
			job, _ = c.lister.Jobs(pod.Namespace).Get(ref.Name)
		}
		switch {
		case job != nil && job.UID == ref.UID:
			c.queue.Add(item{namespace: pod.Namespace, job: job.Name})
		case pod == cur && tracked(pod):
			c.queue.Add(item{namespace: pod.Namespace, pod: pod.Name})
		}
	}
	if cur == nil || cur.DeletionTimestamp != nil || metav1.GetControllerOfNoCopy(cur) != nil {
		return
	}
	all, err := c.lister.Jobs(cur.Namespace).List(labels.Everything())
	if err != nil {
		return // a lister of a cache has no errors
	}
	for _, job := range all {
		if sel, err := metav1.LabelSelectorAsSelector(job.Spec.Selector); err == nil && !sel.Empty() && sel.Matches(labels.Set(cur.Labels)) {
			c.queue.Add(item{namespace: job.Namespace, job: job.Name})
		}
	}
}

func (c *jobs) sync(ctx context.Context, it item) error {
	if it.pod != "" {
		return c.releaseOrphan(ctx, it)
	}
	key := it.namespace + "/" + it.job
	if now := c.Clock.Now(); c.written.Pending(key, now)+c.pods.Pending(key, now) > 0 {
		c.queue.AddAfter(it, lagRecheck)
		return nil
	}
	job, err := c.lister.Jobs(it.namespace).Get(it.job)
	if apierrors.IsNotFound(err) {
		c.pods.Forget(key)
		c.written.Forget(key)
		return nil
	}
	if err != nil {
		return err
	}
	if by := job.Spec.ManagedBy; by != nil && *by != batchv1.JobControllerName {
		return c.expire(ctx, it, job)
	}
	if finished(job) {
		return c.expire(ctx, it, job)
	}
	selector, err := metav1.LabelSelectorAsSelector(job.Spec.Selector)
	if err != nil || selector.Empty() {
		// Validation refuses both; nothing to do until it changes.
		c.Logger.Error("selector of a Job cannot be used", "job", key, "err", err)
		return nil
	}
	pods, err := c.claim(ctx, job, selector)
	if err != nil {
		return err
	}
	todo := plan(input{job: job, pods: pods, now: c.Clock.Now()})
	if todo.again > 0 {
		c.queue.AddAfter(it, todo.again)
	}
	return c.carryOut(ctx, key, job, todo)
}

func (c *jobs) claim(ctx context.Context, job *batchv1.Job, selector labels.Selector) ([]*corev1.Pod, error) {
	all, err := controller.ControlledPods(c.podInf, job)
	if err != nil {
		return nil, err
	}
	fresh := func(ctx context.Context) (metav1.Object, error) {
		return c.Client.BatchV1().Jobs(job.Namespace).Get(ctx, job.Name, metav1.GetOptions{})
	}
	return controller.ClaimPods(ctx, c.Client, job, kind, selector, fresh, all)
}

// carryOut does what todo says. The status is written even if pods could not be
// made or removed: what has ended has to be accounted for.
func (c *jobs) carryOut(ctx context.Context, key string, job *batchv1.Job, todo step) error {
	removed, removeErr := controller.Each(ctx, todo.remove, func(pod *corev1.Pod) error { return c.remove(ctx, key, job, pod) })
	created, createErr := controller.Each(ctx, todo.create, func(n creation) error { return c.create(ctx, key, job, n) })
	todo.status.Active += int32(len(created) - len(removed))
	*todo.status.Terminating += int32(len(removed))
	for _, pod := range removed {
		if controller.PodReady(pod) {
			*todo.status.Ready--
		}
	}
	workErr := errors.Join(removeErr, createErr)
	if err := c.updateStatus(ctx, key, job, todo.status); err != nil {
		return errors.Join(workErr, err)
	}
	for _, e := range todo.events {
		c.events.Event(job, e.kind, e.reason, e.text)
	}
	_, releaseErr := controller.Each(ctx, todo.release, func(pod *corev1.Pod) error { return c.release(ctx, key, pod) })
	return errors.Join(workErr, releaseErr)
}

func (c *jobs) updateStatus(ctx context.Context, key string, job *batchv1.Job, status batchv1.JobStatus) error {
	if equality.Semantic.DeepEqual(job.Status, status) {
		return nil
	}
	upd := job.DeepCopy()
	upd.Status = status
	upd, err := c.Client.BatchV1().Jobs(job.Namespace).UpdateStatus(ctx, upd, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("update status of Job %s: %w", key, err)
	}
	c.written.Wrote(key, upd, c.Clock.Now())
	return nil
}

func (c *jobs) create(ctx context.Context, key string, job *batchv1.Job, n creation) error {
	made, err := c.Client.CoreV1().Pods(job.Namespace).Create(ctx, newPod(job, n), metav1.CreateOptions{})
	if err != nil {
		if apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			return nil // whatever is tried here fails, and soon this Job is gone as well
		}
		c.events.Eventf(job, corev1.EventTypeWarning, "FailedCreate", "Error creating: %v", err)
		return fmt.Errorf("create a pod of Job %s: %w", key, err)
	}
	c.pods.Wrote(key, made, c.Clock.Now())
	c.events.Eventf(job, corev1.EventTypeNormal, "SuccessfulCreate", "Created pod: %v", made.Name)
	return nil
}

func (c *jobs) remove(ctx context.Context, key string, job *batchv1.Job, pod *corev1.Pod) error {
	err := c.Client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(pod.UID))})
	if err != nil && !apierrors.IsNotFound(err) {
		c.events.Eventf(job, corev1.EventTypeWarning, "FailedDelete", "Error deleting: %v", err)
		return fmt.Errorf("delete pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	c.pods.Deleted(key, pod, c.Clock.Now())
	c.events.Eventf(job, corev1.EventTypeNormal, "SuccessfulDelete", "Deleted pod: %v", pod.Name)
	return nil
}

// release takes the finalizer off a pod; the uid makes the API refuse it for
// another pod of the name.
func (c *jobs) release(ctx context.Context, key string, pod *corev1.Pod) error {
	patch := fmt.Appendf(nil, `{"metadata":{"uid":%q,"$deleteFromPrimitiveList/finalizers":[%q]}}`, pod.UID, batchv1.JobTrackingFinalizer)
	upd, err := c.Client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
	switch {
	case apierrors.IsNotFound(err), apierrors.IsInvalid(err), apierrors.IsConflict(err): // gone, or another of the name
		c.pods.Deleted(key, pod, c.Clock.Now())
		return nil
	case err != nil:
		return fmt.Errorf("release pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	c.pods.Wrote(key, upd, c.Clock.Now())
	return nil
}

// releaseOrphan lets a pod go whose Job is gone.
func (c *jobs) releaseOrphan(ctx context.Context, it item) error {
	pod, err := c.podList.Pods(it.namespace).Get(it.pod)
	if apierrors.IsNotFound(err) || err == nil && !tracked(pod) {
		return nil
	}
	if err != nil {
		return err
	}
	if ref := metav1.GetControllerOfNoCopy(pod); ref != nil {
		if ref.Kind != kind.Kind {
			return nil
		}
		// The view may not show the Job yet: only the store knows.
		job, err := c.Client.BatchV1().Jobs(it.namespace).Get(ctx, ref.Name, metav1.GetOptions{})
		if err == nil && job.UID == ref.UID {
			return nil
		}
		if err != nil && !apierrors.IsNotFound(err) {
			return err
		}
	}
	return c.release(ctx, it.namespace+"/"+it.pod, pod)
}

// expire deletes a finished Job, with its pods, when its time has come.
func (c *jobs) expire(ctx context.Context, it item, job *batchv1.Job) error {
	ttl := job.Spec.TTLSecondsAfterFinished
	if ttl == nil || !finished(job) || job.DeletionTimestamp != nil {
		return nil
	}
	end := find(job.Status.Conditions, batchv1.JobComplete)
	if end == nil {
		end = find(job.Status.Conditions, batchv1.JobFailed)
	}
	if wait := end.LastTransitionTime.Add(time.Duration(*ttl) * time.Second).Sub(c.Clock.Now()); wait > 0 {
		c.queue.AddAfter(it, wait)
		return nil
	}
	// The time to live may have been raised since the view was made.
	foreground := metav1.DeletePropagationForeground
	err := c.Client.BatchV1().Jobs(job.Namespace).Delete(ctx, job.Name, metav1.DeleteOptions{
		PropagationPolicy: &foreground,
		Preconditions:     &metav1.Preconditions{UID: &job.UID, ResourceVersion: &job.ResourceVersion},
	})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete finished Job %s/%s: %w", job.Namespace, job.Name, err)
	}
	return nil
}

// newPod is a pod of the Job.
func newPod(job *batchv1.Job, n creation) *corev1.Pod {
	t := job.Spec.Template.DeepCopy()
	prefix := job.Name + "-"
	if n.index >= 0 {
		index := strconv.Itoa(n.index)
		t.Annotations, t.Labels = maps.Clone(t.Annotations), maps.Clone(t.Labels)
		if t.Annotations == nil {
			t.Annotations = map[string]string{}
		}
		if t.Labels == nil {
			t.Labels = map[string]string{}
		}
		t.Annotations[batchv1.JobCompletionIndexAnnotation] = index
		t.Labels[batchv1.JobCompletionIndexAnnotation] = index
		t.Spec.Hostname = job.Name + "-" + index
		if job.Spec.BackoffLimitPerIndex != nil {
			countFailures(job, t.Annotations, n.replace)
		}
		tellIndex(t.Spec.InitContainers)
		tellIndex(t.Spec.Containers)
		suffix := "-" + index + "-"
		prefix = job.Name[:min(len(job.Name), maxGenerateName-len(suffix))] + suffix
	}
	finalizers := slices.Clone(t.Finalizers)
	if !slices.Contains(finalizers, batchv1.JobTrackingFinalizer) {
		finalizers = append(finalizers, batchv1.JobTrackingFinalizer)
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: job.Namespace, GenerateName: strings.TrimLeft(prefix, "-"),
			Labels: t.Labels, Annotations: t.Annotations, Finalizers: finalizers,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(job, kind)},
		},
		Spec: t.Spec,
	}
}

// countFailures carries the failures of an index over to the next pod of it.
func countFailures(job *batchv1.Job, annotations map[string]string, replaced *corev1.Pod) {
	counted, ignored := 0, 0
	if replaced != nil {
		counted, ignored = failuresOf(replaced)
		if judge(job.Spec.PodFailurePolicy, replaced).counts {
			counted++
		} else {
			ignored++
		}
	}
	annotations[batchv1.JobIndexFailureCountAnnotation] = strconv.Itoa(counted)
	if ignored > 0 {
		annotations[batchv1.JobIndexIgnoredFailureCountAnnotation] = strconv.Itoa(ignored)
	}
}

// tellIndex gives containers their index in JOB_COMPLETION_INDEX.
func tellIndex(containers []corev1.Container) {
	const variable = "JOB_COMPLETION_INDEX"
	for i := range containers {
		if slices.ContainsFunc(containers[i].Env, func(e corev1.EnvVar) bool { return e.Name == variable }) {
			continue
		}
		containers[i].Env = append(containers[i].Env, corev1.EnvVar{Name: variable, ValueFrom: &corev1.EnvVarSource{
			FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.labels['" + batchv1.JobCompletionIndexAnnotation + "']"}}})
	}
}
