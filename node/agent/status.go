package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/apimachinery/pkg/util/strategicpatch"
	"k8s.io/client-go/util/workqueue"

	"skein.io/skein/node/agent/lifecycle"
)

const (
	// statusWriters is how many statuses are sent at once.
	statusWriters = 4
	// statusTimeout bounds one request.
	statusTimeout = 15 * time.Second
	// Retry of failed requests, per pod.
	statusRetryMin = 200 * time.Millisecond
	statusRetryMax = 10 * time.Second
)

// statusWriter sends recorded statuses to the API: only the latest one of a pod, only when it differs from what the API has,
// and then, for a pod that has ended, its deletion. What cannot be sent is tried again for as long as the pod exists.
type statusWriter struct {
	a     *Agent
	queue workqueue.TypedRateLimitingInterface[types.UID]

	// mu guards what follows.
	mu sync.Mutex
	// written holds what the API answered last, which may be newer than what the watch has brought.
	written map[types.UID]*corev1.Pod
	// ended are the pods that are to be deleted once their status is written.
	ended map[types.UID]bool
}

func newStatusWriter(a *Agent) *statusWriter {
	return &statusWriter{a: a, written: map[types.UID]*corev1.Pod{}, ended: map[types.UID]bool{},
		queue: workqueue.NewTypedRateLimitingQueue(workqueue.NewTypedItemExponentialFailureRateLimiter[types.UID](statusRetryMin, statusRetryMax))}
}

func (s *statusWriter) enqueue(uid types.UID) { s.queue.Add(uid) }

// finished has a pod deleted from the API.
func (s *statusWriter) finished(uid types.UID) {
	s.mu.Lock()
	s.ended[uid] = true
	s.mu.Unlock()
	s.queue.Add(uid)
}

func (s *statusWriter) forget(uid types.UID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.written, uid)
	delete(s.ended, uid)
}

func (s *statusWriter) run(ctx context.Context) {
	var wg sync.WaitGroup
	for range statusWriters {
		wg.Go(func() {
			for {
				uid, quit := s.queue.Get()
				if quit {
					return
				}
				if err := s.send(ctx, uid); err != nil && ctx.Err() == nil {
					s.a.cfg.Logger.Debug("pod status not written, tried again", "uid", uid, "err", err)
					s.queue.AddRateLimited(uid)
				} else {
					s.queue.Forget(uid)
				}
				s.queue.Done(uid)
			}
		})
	}
	<-ctx.Done()
	s.queue.ShutDown()
	wg.Wait()
}

// base returns the newest version of a pod that is known here.
func (s *statusWriter) base(uid types.UID) (*corev1.Pod, bool) {
	w := s.a.worker(uid)
	if w == nil {
		return nil, false
	}
	pod, gone, _ := w.current()
	s.mu.Lock()
	defer s.mu.Unlock()
	if wr := s.written[uid]; wr != nil {
		if c, err := resourceversion.CompareResourceVersion(wr.ResourceVersion, pod.ResourceVersion); err == nil && c > 0 {
			pod = wr
		} else {
			delete(s.written, uid)
		}
	}
	return pod, gone
}

func (s *statusWriter) send(ctx context.Context, uid types.UID) error {
	rec := s.a.cfg.Desired.Record(uid)
	pod, gone := s.base(uid)
	if pod == nil || gone || rec == nil || rec.Status == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	patch, err := statusPatch(pod, rec.Status)
	if err != nil {
		return err
	}
	pods := s.a.cfg.Client.CoreV1().Pods(pod.Namespace)
	if patch != nil {
		out, err := pods.Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
		switch {
		case apierrors.IsNotFound(err) || err == nil && out.UID != uid:
			return nil // the watch will say so
		case apierrors.IsConflict(err): // the UID in the patch does not fit: another pod of that name
			return nil
		case err != nil:
			return fmt.Errorf("patch status of pod %s/%s: %w", pod.Namespace, pod.Name, err)
		}
		s.mu.Lock()
		s.written[uid] = out
		s.mu.Unlock()
	}
	s.mu.Lock()
	ended := s.ended[uid]
	s.mu.Unlock()
	if !ended {
		return nil
	}
	zero := int64(0)
	err = pods.Delete(ctx, pod.Name, metav1.DeleteOptions{GracePeriodSeconds: &zero, Preconditions: metav1.NewUIDPreconditions(string(uid))})
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		return fmt.Errorf("delete pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return nil
}

// statusPatch is the change from what the API has to what was decided here; nil when there is none.
func statusPatch(pod *corev1.Pod, want *corev1.PodStatus) ([]byte, error) {
	next := want.DeepCopy()
	keepForeign(&pod.Status, next)
	if apiequality.Semantic.DeepEqual(pod.Status, *next) {
		return nil, nil
	}
	before, err1 := json.Marshal(corev1.Pod{Status: pod.Status})
	after, err2 := json.Marshal(corev1.Pod{Status: *next})
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	patch, err := strategicpatch.CreateTwoWayMergePatch(before, after, corev1.Pod{})
	if err != nil {
		return nil, fmt.Errorf("status patch of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	if string(patch) == "{}" {
		return nil, nil
	}
	var m map[string]any
	if err := json.Unmarshal(patch, &m); err != nil {
		return nil, err
	}
	m["metadata"] = map[string]any{"uid": pod.UID}
	return json.Marshal(m)
}

// keepForeign leaves alone what others write into the status.
func keepForeign(have, next *corev1.PodStatus) {
	next.QOSClass = have.QOSClass
	next.NominatedNodeName = have.NominatedNodeName
	next.Resize = have.Resize
	next.ResourceClaimStatuses = have.ResourceClaimStatuses
	next.ExtendedResourceClaimStatus = have.ExtendedResourceClaimStatus
	if next.StartTime != nil && have.StartTime != nil {
		next.StartTime = have.StartTime // the first one stays
	}
	var conds []corev1.PodCondition
	for _, c := range have.Conditions {
		if !lifecycle.Owns(c.Type) {
			conds = append(conds, c)
		}
	}
	for _, c := range next.Conditions {
		if lifecycle.Owns(c.Type) {
			conds = append(conds, c)
		}
	}
	next.Conditions = conds
}
