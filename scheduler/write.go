package scheduler

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	v1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/placement"
)

// maxNote is the longest message, in bytes, that an event may carry
// (validation of events.k8s.io).
const maxNote = 1024

// job is something to be written to the API by a worker.
type job interface {
	do(ctx context.Context, l *loop)
}

// binding carries out a decision.
type binding struct {
	pod  *v1.Pod
	node string
	// version is the pod's version that the decision holds for; the API compares it. "": any.
	version string
	// turns is what loop.turns was when it was made.
	turns uint64
	// expected: the pod's status names the node already.
	expected bool
}

func (b binding) do(ctx context.Context, l *loop) {
	if l.prepareDevices(ctx, &b) {
		bindings{b}.do(ctx, l)
	}
}

// expect tells in the pod's status which node it is about to get, as upstream
// does (NominatedNodeNameForExpectation) if volumes or devices have to be
// prepared first, which may take minutes: who adds and removes nodes should
// know. If it cannot be told, the binding goes on. Binding clears it.
func (b *binding) expect(ctx context.Context, l *loop) {
	if b.expected {
		return
	}
	b.expected = true
	if b.pod.Status.NominatedNodeName == b.node {
		return
	}
	var patch podStatusPatch
	patch.Metadata.UID, patch.Status.NominatedNodeName = b.pod.UID, &b.node
	now, err := l.patchStatus(ctx, b.pod, patch)
	switch {
	case err != nil:
		l.log.Debug("cannot write the expected node", "pod", b.pod.Namespace+"/"+b.pod.Name, "node", b.node, "err", err)
	case b.changed(controller.AsSeen(now)) == nil:
		b.version = now.ResourceVersion // what else would refuse the binding, though nothing changed that matters
	}
}

// bindings carries out many decisions at once; what becomes of one does not
// touch the others.
type bindings []binding

func (all bindings) do(ctx context.Context, l *loop) {
	all = all.standing(ctx, l)
	for wait, tried := bindRetry, false; len(all) > 0; wait, tried = 2*wait, true {
		all = all.send(ctx, l, tried, wait > bindRetryLongest)
		if len(all) == 0 {
			return
		}
		timer := l.clock.NewTimer(wait)
		select {
		case <-timer.C():
		case <-ctx.Done():
			timer.Stop()
			return // no leader any more; the next one sees what became of them
		}
	}
}

// Waits before bindings are sent again of which nobody knows whether they were
// carried out.
const (
	bindRetry        = 50 * time.Millisecond
	bindRetryLongest = 800 * time.Millisecond
)

// send sends the bindings once and returns those of which nobody knows what
// became of them: room on a node must not be given to another pod while the
// first may have it. If the API gives no answer for about 1.5 s, the last try
// takes them back all the same: nothing else is bound then either. tried says
// that an earlier try may have been carried out.
func (all bindings) send(ctx context.Context, l *loop, tried, last bool) (again bindings) {
	list := make([]*v1.Binding, len(all))
	for i, b := range all {
		// UID and version are preconditions: a pod of the same name made meanwhile
		// is another pod, and one that was changed may belong elsewhere.
		list[i] = &v1.Binding{
			ObjectMeta: metav1.ObjectMeta{Namespace: b.pod.Namespace, Name: b.pod.Name, UID: b.pod.UID, ResourceVersion: b.version},
			Target:     v1.ObjectReference{Kind: "Node", Name: b.node},
		}
	}
	var mu sync.Mutex // guards again
	l.cfg.Binder.Bind(ctx, list, func(i int, err error) {
		b, carriedOut := all[i], err == nil
		if refused(err) && (tried || apierrors.IsConflict(err)) {
			now := b.now(ctx, l)
			carriedOut = tried && now != nil && now.Spec.NodeName == b.node
			if !carriedOut && !last && b.holdsFor(now) {
				// What changed about the pod has no say in where it runs.
				b.version, err = now.ResourceVersion, nil
			}
		}
		switch {
		case carriedOut:
			l.bound(b.pod)
			l.events(b.pod).Eventf(b.pod, v1.EventTypeNormal, "Scheduled", "Successfully assigned %s/%s to %s", b.pod.Namespace, b.pod.Name, b.node)
		case refused(err) || last || ctx.Err() != nil:
			b.failed(ctx, l, fmt.Errorf("binding rejected: %w", err), apierrors.IsNotFound(err))
		default:
			mu.Lock()
			defer mu.Unlock()
			again = append(again, b)
		}
	})
	return again
}

// now asks the API itself for the pod; nil if it is not there, or another one has its name.
func (b binding) now(ctx context.Context, l *loop) *v1.Pod {
	now, err := l.client.CoreV1().Pods(b.pod.Namespace).Get(ctx, b.pod.Name, metav1.GetOptions{})
	if err != nil || now.UID != b.pod.UID {
		return nil
	}
	return controller.AsSeen(now)
}

// holdsFor reports whether the decision would be the same for a later version
// of the pod that the API has not been asked to bind yet.
func (b binding) holdsFor(now *v1.Pod) bool {
	return now != nil && now.ResourceVersion != b.version && b.changed(now) == nil
}

// changed says what about the pod makes the decision void.
func (b binding) changed(now *v1.Pod) error {
	switch {
	case now.DeletionTimestamp != nil:
		return errors.New("the pod is being deleted")
	case pendingPodChanged(b.pod, now):
		return errors.New("the pod has changed since the node was chosen for it")
	}
	return nil
}

// standing takes back what was overtaken between the decision and now, and
// returns the rest. The API knows pods, but nothing of what nodes and volumes
// must be like; and what waited for its volumes was decided minutes ago.
func (all bindings) standing(ctx context.Context, l *loop) bindings {
	var void []error // nil until there is one
	l.mu.Lock()
	for i := range all {
		err := l.overtaken(&all[i])
		if err != nil && void == nil {
			void = make([]error, len(all))
		}
		if err != nil {
			void[i] = err
		}
	}
	l.mu.Unlock()
	if void == nil {
		return all
	}
	var kept bindings
	for i, b := range all {
		if void[i] == nil {
			kept = append(kept, b)
		} else {
			b.failed(ctx, l, fmt.Errorf("binding rejected: %w", void[i]), false)
		}
	}
	return kept
}

// overtaken says why a decision that was not sent yet does not stand any more,
// and moves it on to the version of the pod that the view shows. l.mu is held.
func (l *loop) overtaken(b *binding) error {
	if cur, err := l.view.podLister.Pods(b.pod.Namespace).Get(b.pod.Name); err == nil && cur.ResourceVersion != b.pod.ResourceVersion && cur.UID == b.pod.UID && cur.Spec.NodeName == "" {
		if err := b.changed(cur); err != nil {
			return err
		}
		b.version = cur.ResourceVersion
	}
	if b.turns == l.turns || l.snapshot.PodNode(b.pod.UID) != b.node {
		return nil
	}
	if !l.snapshot.HasNode(b.node) {
		return fmt.Errorf("node %q is gone", b.node)
	}
	l.snapshot.RemovePod(b.pod.UID) // it must not be in its own way
	fits := l.snapshot.Fits(b.pod, b.node, l.profiles[b.pod.Spec.SchedulerName].profile)
	l.snapshot.SetPod(b.pod, b.node)
	if !fits {
		return fmt.Errorf("node %q does not take the pod any more: it was cordoned, tainted, filled or lost, or changed, since it was chosen", b.node)
	}
	for _, c := range placement.VolumeClaims(b.pod) {
		claim, err := l.volumes.view.claimLister.PersistentVolumeClaims(b.pod.Namespace).Get(c.Name)
		if err != nil {
			return err // it says which one is not found
		}
		if claim.DeletionTimestamp != nil {
			return fmt.Errorf("persistentvolumeclaim %q is being deleted", c.Name)
		}
	}
	return nil
}

// together makes one job of all bindings that need no preparation. l.mu is held.
func (l *loop) together(jobs []job) []job {
	var plain bindings
	rest := jobs[:0]
	for _, j := range jobs {
		if b, ok := j.(binding); ok && l.devices.held[b.pod.UID] == nil {
			plain = append(plain, b)
		} else {
			rest = append(rest, j)
		}
	}
	if len(plain) > 0 {
		rest = append(rest, plain)
	}
	return rest
}

// Binder binds pods.
type Binder interface {
	// Bind binds each pod or says why not, with the errors of the API. It calls
	// done for each as soon as that is known, several at a time, and returns
	// after the last.
	Bind(ctx context.Context, all []*v1.Binding, done func(i int, err error))
}

// counted is a Binder that knows how many bindings are under way.
type counted struct {
	Binder
	underWay atomic.Int64
}

// manyBindings is how many bindings at once are worth that events wait.
const manyBindings = 16

func (c *counted) busy() bool { return c.underWay.Load() > manyBindings }

// Bind implements Binder.
func (c *counted) Bind(ctx context.Context, all []*v1.Binding, done func(i int, err error)) {
	c.underWay.Add(int64(len(all)))
	c.Binder.Bind(ctx, all, func(i int, err error) {
		c.underWay.Add(-1)
		done(i, err)
	})
}

// requests is a Binder that makes a request for each binding.
type requests struct {
	client kubernetes.Interface
	atOnce int
}

func (r requests) Bind(ctx context.Context, all []*v1.Binding, done func(i int, err error)) {
	next := make(chan int)
	var wg sync.WaitGroup
	for range min(r.atOnce, len(all)) {
		wg.Go(func() {
			for i := range next {
				done(i, r.client.CoreV1().Pods(all[i].Namespace).Bind(ctx, all[i], metav1.CreateOptions{}))
			}
		})
	}
	for i := range all {
		next <- i
	}
	close(next)
	wg.Wait()
}

// refused says that the API has refused a request, so that it will never be
// carried out. All else (a lost connection, a time-out, a fault of the server)
// leaves that open.
func refused(err error) bool {
	var status apierrors.APIStatus
	return errors.As(err, &status) && status.Status().Code/100 == 4 && !apierrors.IsTimeout(err)
}

// failed takes the decision back; gone says that there is no such pod.
func (b binding) failed(ctx context.Context, l *loop, err error, gone bool) {
	pod := b.pod
	if ctx.Err() != nil {
		return // no leader any more; the next one sees what became of it
	}
	l.mu.Lock()
	devices := l.devices.held[pod.UID]
	l.mu.Unlock()
	if !l.undo(pod, gone) {
		return
	}
	if devices != nil {
		devices.release(ctx, l)
	}
	l.log.Warn("not bound, will be planned again", "pod", pod.Namespace+"/"+pod.Name, "node", b.node, "err", err)
	failure{pod: pod, reason: v1.PodReasonSchedulerError, message: err.Error(), expected: b.expected}.do(ctx, l)
}

// failure tells why a pod has no node, and makes room for it if that helps.
type failure struct {
	pod     *v1.Pod
	reason  string // of the condition
	message string
	preempt *placement.Preemption
	release *resourceapi.ResourceClaim // to be taken away; may be nil
	// keepNomination: pods that were evicted for this one are still ending.
	keepNomination bool
	// expected: the pod's status names a node, though the view may not show it yet.
	expected bool
	// displaced are pods that lose the node to this one.
	displaced []*v1.Pod
}

func (f failure) do(ctx context.Context, l *loop) {
	l.events(f.pod).Event(f.pod, v1.EventTypeWarning, "FailedScheduling", truncate(f.message))
	nominate := new(string)
	if f.keepNomination {
		nominate = nil
	}
	if f.release != nil {
		if err := l.deallocate(ctx, f.release); err != nil {
			l.log.Warn("cannot take a claim away that keeps a pod from other nodes; the pod is planned again", "pod", f.pod.Namespace+"/"+f.pod.Name, "err", err)
		}
	}
	if f.preempt != nil {
		nominate = &f.preempt.Node
		f.displace(ctx, l)
	}
	// The nomination is written before anybody is evicted for it: the next leader, if this one ends now, must not evict others elsewhere.
	err := l.writeCondition(ctx, f, nominate)
	if err != nil && ctx.Err() == nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		l.log.Warn("cannot write why a pod is not scheduled", "pod", f.pod.Namespace+"/"+f.pod.Name, "err", err)
	}
	if f.preempt == nil || apierrors.IsNotFound(err) {
		return
	}
	if err := l.evict(ctx, f.pod, f.preempt); err != nil && ctx.Err() == nil {
		l.evictionsFailed(f.pod, err)
		l.log.Warn("preemption failed in part; the pod is planned again", "pod", f.pod.Namespace+"/"+f.pod.Name, "err", err)
	}
}

// displace takes the node out of the status of those that lose it.
func (f failure) displace(ctx context.Context, l *loop) {
	for _, low := range f.displaced {
		var patch podStatusPatch
		patch.Metadata.UID, patch.Status.NominatedNodeName = low.UID, new(string)
		if _, err := l.patchStatus(ctx, low, patch); err != nil && ctx.Err() == nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
			l.log.Warn("cannot take back the nomination of a less important pod", "pod", low.Namespace+"/"+low.Name, "node", f.preempt.Node, "err", err)
		}
		l.elsewhere(low)
	}
}

// elsewhere has a pod tried again that has no node kept for it any more; the view may not show that yet.
func (l *loop) elsewhere(low *v1.Pod) {
	l.mu.Lock()
	defer l.mu.Unlock()
	cur, err := l.view.podLister.Pods(low.Namespace).Get(low.Name)
	if err == nil && cur.UID == low.UID && l.queue.Has(low.UID) {
		free := *cur
		free.Status.NominatedNodeName = ""
		l.queue.Add(&free, true, l.clock.Now())
		l.nudge()
	}
}

// podStatusPatch is a strategic merge patch of a pod's status; the UID in it
// makes the API refuse it for another pod of the same name.
type podStatusPatch struct {
	Metadata struct {
		UID types.UID `json:"uid"`
	} `json:"metadata"`
	Status struct {
		Conditions        []v1.PodCondition `json:"conditions,omitempty"`
		NominatedNodeName *string           `json:"nominatedNodeName,omitempty"`
	} `json:"status"`
}

// writeCondition sets PodScheduled=False with the reason, and the nominated
// node (nil: whatever it is), unless the pod says so already.
func (l *loop) writeCondition(ctx context.Context, f failure, nominate *string) error {
	pod := f.pod
	if cur, err := l.view.podLister.Pods(pod.Namespace).Get(pod.Name); err == nil && cur.UID == pod.UID {
		if cur.Spec.NodeName != "" {
			return nil // bound meanwhile
		}
		pod = cur
	}
	var patch podStatusPatch
	patch.Metadata.UID = pod.UID
	if nominate != nil && (pod.Status.NominatedNodeName != *nominate || f.expected) {
		patch.Status.NominatedNodeName = nominate
	}
	cond := v1.PodCondition{
		Type: v1.PodScheduled, Status: v1.ConditionFalse, Reason: f.reason, Message: f.message,
		ObservedGeneration: pod.Generation, LastTransitionTime: metav1.NewTime(l.clock.Now()),
	}
	if !says(pod, cond) {
		if old := podCondition(pod, cond.Type); old != nil && old.Status == cond.Status {
			cond.LastTransitionTime = old.LastTransitionTime
		}
		patch.Status.Conditions = []v1.PodCondition{cond}
	}
	if patch.Status.NominatedNodeName == nil && patch.Status.Conditions == nil {
		return nil
	}
	_, err := l.patchStatus(ctx, pod, patch)
	return err
}

func (l *loop) patchStatus(ctx context.Context, pod *v1.Pod, patch podStatusPatch) (*v1.Pod, error) {
	data, err := json.Marshal(patch)
	if err != nil {
		panic("scheduler: a status patch does not encode: " + err.Error())
	}
	return l.client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, data, metav1.PatchOptions{}, "status")
}

// evict deletes the victims of a preemption, all at once.
func (l *loop) evict(ctx context.Context, pod *v1.Pod, p *placement.Preemption) error {
	errs := make([]error, len(p.Victims))
	var wg sync.WaitGroup
	for i, victim := range p.Victims {
		if victim.DeletionTimestamp == nil {
			wg.Go(func() { errs[i] = l.evictOne(ctx, pod, victim, p.Node) })
		}
	}
	wg.Wait()
	return errors.Join(errs...)
}

// evictOne deletes a victim after saying in it why. One that is not bound yet,
// since something has to be prepared for it, is only planned again.
func (l *loop) evictOne(ctx context.Context, pod, victim *v1.Pod, node string) error {
	if b, ok := l.stopPreparing(victim.UID); ok {
		b.failed(ctx, l, errors.New("preempted by DefaultPreemption"), false)
		l.events(pod).Eventf(victim, v1.EventTypeNormal, "Preempted", "Preempted by pod %s on node %s (in kube-scheduler memory).", pod.UID, node)
		return nil
	}
	if cur, err := l.view.podLister.Pods(victim.Namespace).Get(victim.Name); err == nil && cur.UID == victim.UID {
		victim = cur // the snapshot knows little of it
	}
	cond := v1.PodCondition{
		Type: v1.DisruptionTarget, Status: v1.ConditionTrue, Reason: v1.PodReasonPreemptionByScheduler,
		Message:            pod.Spec.SchedulerName + ": preempting to accommodate a higher priority pod",
		ObservedGeneration: victim.Generation, LastTransitionTime: metav1.NewTime(l.clock.Now()),
	}
	var err error
	if !says(victim, cond) { // else its deletion was refused before
		var patch podStatusPatch
		patch.Metadata.UID = victim.UID
		patch.Status.Conditions = []v1.PodCondition{cond}
		_, err = l.patchStatus(ctx, victim, patch)
	}
	if err == nil {
		uid := victim.UID
		err = l.client.CoreV1().Pods(victim.Namespace).Delete(ctx, victim.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
	}
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case err != nil:
		return fmt.Errorf("evict %s/%s: %w", victim.Namespace, victim.Name, err)
	}
	l.events(pod).Eventf(victim, v1.EventTypeNormal, "Preempted", "Preempted by pod %s on node %s", pod.UID, node)
	return nil
}

// stopPreparing ends the wait of a decided pod for its volumes or devices, and
// returns the binding that is not to be.
func (l *loop) stopPreparing(uid types.UID) (b binding, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if w := l.volumes.waits[uid]; w != nil {
		l.endWait(uid)
		return w.binding, true
	}
	r, ok := l.devices.resting[uid]
	delete(l.devices.resting, uid)
	return r.binding, ok
}

// says reports whether the pod has the condition already.
func says(pod *v1.Pod, cond v1.PodCondition) bool {
	is := podCondition(pod, cond.Type)
	return is != nil && is.Status == cond.Status && is.Reason == cond.Reason && is.Message == cond.Message
}

func podCondition(pod *v1.Pod, kind v1.PodConditionType) *v1.PodCondition {
	for i := range pod.Status.Conditions {
		if pod.Status.Conditions[i].Type == kind {
			return &pod.Status.Conditions[i]
		}
	}
	return nil
}

func truncate(message string) string {
	const tail = " ..."
	if len(message) <= maxNote {
		return message
	}
	return message[:maxNote-len(tail)] + tail
}
