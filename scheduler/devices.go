package scheduler

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/retry"
	resourcehelper "k8s.io/component-helpers/resource"
	"k8s.io/dynamic-resource-allocation/resourceclaim"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/placement"
	"skein.io/skein/scheduler/queue"
)

// deviceWatches feed the snapshot with what dynamic resources are made of.
func (l *loop) deviceWatches() []controller.Watch {
	return []controller.Watch{
		controller.On(l.devices.classes, l.deviceClassChanged),
		controller.On(l.devices.slices, l.sliceChanged),
		controller.On(l.devices.claims, l.resourceClaimChanged),
	}
}

func (l *loop) deviceClassChanged(old, cur *resourceapi.DeviceClass) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cur == nil {
		l.snapshot.RemoveDeviceClass(old.Name)
		return
	}
	l.snapshot.SetDeviceClass(cur)
	if old == nil || !equality.Semantic.DeepEqual(old.Spec, cur.Spec) {
		if l.queue.Move(queue.DeviceClasses, mayUseDevices, l.clock.Now()) > 0 {
			l.nudge()
		}
	}
}

// mayUseDevices reports whether the pod has claims, or requests resources that
// devices may stand for.
func mayUseDevices(pod *v1.Pod) bool {
	if len(pod.Spec.ResourceClaims) > 0 {
		return true
	}
	for name := range resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{}) {
		if strings.Contains(string(name), "/") {
			return true
		}
	}
	return false
}

func (l *loop) sliceChanged(old, cur *resourceapi.ResourceSlice) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cur == nil {
		l.snapshot.RemoveResourceSlice(old.Name)
		return
	}
	l.snapshot.SetResourceSlice(cur)
	if old == nil || !equality.Semantic.DeepEqual(old.Spec, cur.Spec) {
		l.move(queue.DeviceSlices)
	}
}

func (l *loop) resourceClaimChanged(old, cur *resourceapi.ResourceClaim) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old != nil && cur != nil && old.UID != cur.UID {
		l.resourceClaimGone(old) // deleted and made anew in a gap of the watch
		old = nil
	}
	if cur == nil {
		l.resourceClaimGone(old)
		return
	}
	l.snapshot.SetResourceClaim(cur)
	l.claimed(cur)
	l.wakeForClaim(old, cur)
}

func (l *loop) resourceClaimGone(claim *resourceapi.ResourceClaim) {
	l.snapshot.RemoveResourceClaim(claim)
	if claim.Status.Allocation != nil {
		l.move(queue.ResourceClaims)
	}
	l.wakeDevices(func(p *v1.Pod) bool { return usesClaim(p, claim) })
}

// wakeForClaim wakes whom the new version of a claim may help: all who wait
// for devices if it gave some back, else its own pods. l.mu is held.
func (l *loop) wakeForClaim(old, cur *resourceapi.ResourceClaim) {
	own := func(p *v1.Pod) bool { return usesClaim(p, cur) }
	switch {
	case old != nil && old.Status.Allocation != nil && cur.Status.Allocation == nil:
		l.move(queue.ResourceClaims)
	case old == nil || !equality.Semantic.DeepEqual(old.Status, cur.Status):
		if l.queue.Move(queue.ResourceClaims, own, l.clock.Now()) > 0 {
			l.nudge()
		}
	default:
		return
	}
	l.wakeDevices(own)
}

func usesClaim(pod *v1.Pod, claim *resourceapi.ResourceClaim) bool {
	if pod.Namespace != claim.Namespace {
		return false
	}
	for i := range pod.Spec.ResourceClaims {
		if name, _, err := resourceclaim.Name(pod, &pod.Spec.ResourceClaims[i]); err == nil && name != nil && *name == claim.Name {
			return true
		}
	}
	return metav1.IsControlledBy(claim, pod) // made for its extended resources
}

// unclaimed reports whether a pod has to wait until the claims that its
// templates ask for exist: there is nothing to say about it until then.
func (l *loop) unclaimed(pod *v1.Pod) bool {
	templates := slices.ContainsFunc(pod.Spec.ResourceClaims, func(c v1.PodResourceClaim) bool { return c.ResourceClaimTemplateName != nil })
	if !templates {
		return false
	}
	for i := range pod.Spec.ResourceClaims {
		name, made, err := resourceclaim.Name(pod, &pod.Spec.ResourceClaims[i])
		if err != nil || made && name != nil && l.snapshot.ResourceClaim(pod.Namespace, *name) == nil {
			return true
		}
	}
	return false
}

// claimed queues the pod of a claim that it has waited for. l.mu is held.
func (l *loop) claimed(claim *resourceapi.ResourceClaim) {
	owner := metav1.GetControllerOfNoCopy(claim)
	if owner == nil {
		return
	}
	if pod := l.devices.unclaimed[owner.UID]; pod != nil && !l.unclaimed(pod) {
		delete(l.devices.unclaimed, owner.UID)
		l.queue.Add(pod, false, l.clock.Now())
		l.nudge()
	}
}

// deviceView is what is under way for the claims of pods. It belongs to the
// loop, whose mu guards all but the informers.
type deviceView struct {
	claims, classes, slices cache.SharedIndexInformer
	// unclaimed are pods whose claims do not exist yet.
	unclaimed map[types.UID]*v1.Pod
	// held is what the snapshot takes for done, from the decision until the pod
	// is bound or the decision undone.
	held map[types.UID]*deviceWork
	// resting are bindings that wait until devices are ready for their node,
	// rested those that are to go on.
	resting map[types.UID]resting
	rested  []job
}

type resting struct {
	binding binding
	until   time.Time
}

func newDeviceView(f informers.SharedInformerFactory) deviceView {
	api := f.Resource().V1()
	return deviceView{
		claims: api.ResourceClaims().Informer(), classes: api.DeviceClasses().Informer(), slices: api.ResourceSlices().Informer(),
		unclaimed: map[types.UID]*v1.Pod{},
		held:      map[types.UID]*deviceWork{},
		resting:   map[types.UID]resting{},
	}
}

// deviceWork is what has to be written about one pod's claims.
type deviceWork struct {
	pod     *v1.Pod
	node    string
	plan    *placement.DeviceBinding
	written []*resourceapi.ResourceClaim // by claim of plan; nil: not yet. Used by one worker at a time
	told    bool                         // an event says that the pod waits for its devices
}

// reserveDevices takes the devices that a decision needs. l.mu is held.
func (l *loop) reserveDevices(pod *v1.Pod, d placement.Decision) {
	if d.Devices == nil {
		return
	}
	l.snapshot.AssumeDevices(d.Devices)
	l.devices.held[pod.UID] = &deviceWork{pod: pod, node: d.Node, plan: d.Devices, written: make([]*resourceapi.ResourceClaim, len(d.Devices.Claims))}
}

// releaseDevices ends what is under way for the claims of a pod: it is bound,
// gone, or to be planned anew. l.mu is held.
func (l *loop) releaseDevices(uid types.UID) {
	delete(l.devices.unclaimed, uid)
	w := l.devices.held[uid]
	if w == nil {
		return
	}
	delete(l.devices.held, uid)
	delete(l.devices.resting, uid)
	if l.snapshot.ForgetDevices(w.plan) {
		l.move(queue.ResourceClaims)
	}
}

// prepareDevices does what has to be done about the pod's claims before it is
// bound. It reports false if the binding has to rest, or was given up.
func (l *loop) prepareDevices(ctx context.Context, b *binding) bool {
	l.mu.Lock()
	w := l.devices.held[b.pod.UID]
	l.mu.Unlock()
	if w == nil {
		return true
	}
	b.expect(ctx, l)
	err := w.write(ctx, l)
	rests := false
	if err == nil {
		rests, err = l.restIfNeeded(w, *b)
	}
	if err != nil {
		b.failed(ctx, l, fmt.Errorf("running PreBind plugin %q: %w", placement.DynamicResources, err), false)
	}
	return !rests && err == nil
}

// restIfNeeded lets a binding rest while its devices are not ready. That is
// decided under the same lock as the events that end the rest.
func (l *loop) restIfNeeded(w *deviceWork, b binding) (bool, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.devices.held[b.pod.UID] != w {
		return false, errors.New("the pod is gone, or bound by somebody else")
	}
	ok, until, err := w.ready(l, l.clock.Now())
	if ok || err != nil {
		return false, err
	}
	l.devices.resting[b.pod.UID] = resting{binding: b, until: until}
	l.nudge() // the time at which the loop wakes may be earlier now
	return true, nil
}

// wakeDevices ends the rest of those bindings whose pods are concerned. l.mu is held.
func (l *loop) wakeDevices(concerned func(*v1.Pod) bool) {
	for uid, r := range l.devices.resting {
		if concerned(r.binding.pod) {
			delete(l.devices.resting, uid)
			l.devices.rested = append(l.devices.rested, r.binding)
			l.nudge()
		}
	}
}

// settledDevices adds the bindings that have rested, and says when the next
// one has rested long enough if that is before next. l.mu is held.
func (l *loop) settledDevices(now time.Time, jobs []job, next time.Time, timed bool) ([]job, time.Time, bool) {
	for uid, r := range l.devices.resting {
		switch {
		case r.until.IsZero():
		case !now.Before(r.until):
			delete(l.devices.resting, uid)
			l.devices.rested = append(l.devices.rested, r.binding)
		case !timed || r.until.Before(next):
			next, timed = r.until, true
		}
	}
	jobs = append(jobs, l.devices.rested...)
	l.devices.rested = nil
	return jobs, next, timed
}

// write puts allocation and reservation into all claims.
func (w *deviceWork) write(ctx context.Context, l *loop) error {
	for i := range w.plan.Claims {
		if w.written[i] != nil {
			continue
		}
		c := &w.plan.Claims[i]
		if c.Allocation == nil && resourceclaim.IsReservedForPod(w.pod, c.Claim, false) {
			w.written[i] = c.Claim
			continue
		}
		claim, err := w.writeClaim(ctx, l, c)
		if claim != nil {
			w.written[i] = claim
			l.mu.Lock()
			l.snapshot.SetResourceClaim(claim)
			if c.Special {
				// It counts under its own name now.
				l.snapshot.ForgetDevices(&placement.DeviceBinding{Claims: w.plan.Claims[i : i+1]})
			}
			l.mu.Unlock()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// writeClaim allocates and reserves one claim. It returns the claim if there is
// something to take back, also with an error.
func (w *deviceWork) writeClaim(ctx context.Context, l *loop, c *placement.ClaimBinding) (*resourceapi.ResourceClaim, error) {
	api := l.client.ResourceV1().ResourceClaims(w.pod.Namespace)
	claim := c.Claim.DeepCopy()
	if c.Special {
		claim.UID = "" // it was only for counting
		made, err := api.Create(ctx, claim, metav1.CreateOptions{})
		if err != nil {
			return nil, fmt.Errorf("create claim for extended resources of pod %s/%s: %w", w.pod.Namespace, w.pod.Name, err)
		}
		claim = made
	}
	reserved, err := l.reserve(ctx, w.pod, claim, c.Allocation)
	switch {
	case err != nil && c.Special:
		return claim, err
	case err != nil:
		return nil, err
	case c.Special:
		return reserved, w.tellPod(ctx, l, reserved)
	}
	return reserved, nil
}

// reserve writes the pod's reservation and, if given, the allocation into a
// claim. Somebody else may write it meanwhile: what does not matter is written over.
func (l *loop) reserve(ctx context.Context, pod *v1.Pod, claim *resourceapi.ResourceClaim, allocation *resourceapi.AllocationResult) (*resourceapi.ResourceClaim, error) {
	api := l.client.ResourceV1().ResourceClaims(claim.Namespace)
	name := claim.Namespace + "/" + claim.Name
	again := false
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		if again {
			fresh, err := api.Get(ctx, claim.Name, metav1.GetOptions{})
			if err != nil {
				return fmt.Errorf("get updated claim %s after conflict: %w", name, err)
			}
			if fresh.UID != claim.UID {
				return fmt.Errorf("claim %s got deleted in the meantime, another has its name", name)
			}
			claim = fresh
		}
		again = true
		if claim.DeletionTimestamp != nil {
			return fmt.Errorf("claim %s got deleted in the meantime", name)
		}
		if allocation != nil {
			if claim.Status.Allocation != nil {
				return fmt.Errorf("claim %s got allocated elsewhere in the meantime", name)
			}
			// It is deleted by whoever takes the allocation away.
			if !slices.Contains(claim.Finalizers, resourceapi.Finalizer) {
				claim.Finalizers = append(claim.Finalizers, resourceapi.Finalizer)
				updated, err := api.Update(ctx, claim, metav1.UpdateOptions{})
				if err != nil {
					return fmt.Errorf("add finalizer to claim %s: %w", name, err)
				}
				claim = updated
			}
			claim.Status.Allocation = allocation.DeepCopy()
		}
		if claim.Status.Allocation == nil {
			return fmt.Errorf("claim %s got deallocated elsewhere in the meantime", name)
		}
		if claim.Status.Allocation.AllocationTimestamp == nil {
			claim.Status.Allocation.AllocationTimestamp = &metav1.Time{Time: l.clock.Now()}
		}
		claim.Status.ReservedFor = append(claim.Status.ReservedFor, resourceapi.ResourceClaimConsumerReference{Resource: "pods", Name: pod.Name, UID: pod.UID})
		updated, err := api.UpdateStatus(ctx, claim, metav1.UpdateOptions{})
		if err != nil {
			return fmt.Errorf("add allocation and reservation to claim %s: %w", name, err)
		}
		claim = updated
		return nil
	})
	return claim, err
}

// tellPod writes into the pod's status which container gets what of the claim
// for its extended resources.
func (w *deviceWork) tellPod(ctx context.Context, l *loop, claim *resourceapi.ResourceClaim) error {
	var patch struct {
		Metadata struct {
			UID types.UID `json:"uid"`
		} `json:"metadata"`
		Status struct {
			Claim v1.PodExtendedResourceClaimStatus `json:"extendedResourceClaimStatus"`
		} `json:"status"`
	}
	patch.Metadata.UID = w.pod.UID
	patch.Status.Claim = v1.PodExtendedResourceClaimStatus{ResourceClaimName: claim.Name, RequestMappings: w.plan.Mappings}
	data, err := json.Marshal(patch)
	if err != nil {
		panic("scheduler: a status patch does not encode: " + err.Error())
	}
	_, err = l.client.CoreV1().Pods(w.pod.Namespace).Patch(ctx, w.pod.Name, types.MergePatchType, data, metav1.PatchOptions{}, "status")
	if err != nil {
		return fmt.Errorf("update pod %s/%s ExtendedResourceClaimStatus: %w", w.pod.Namespace, w.pod.Name, err)
	}
	return nil
}

// ready waits for devices that have to be made ready for their node first.
func (w *deviceWork) ready(l *loop, now time.Time) (ok bool, until time.Time, err error) {
	ok = true
	for _, written := range w.written {
		claim := l.snapshot.ResourceClaim(written.Namespace, written.Name)
		if claim == nil || claim.UID != written.UID {
			return false, time.Time{}, fmt.Errorf("claim %s/%s got deleted in the meantime", written.Namespace, written.Name)
		}
		ready, limit, err := placement.ClaimReady(claim, now)
		if err != nil {
			return false, time.Time{}, err
		}
		ok = ok && ready
		if !limit.IsZero() && (until.IsZero() || limit.Before(until)) {
			until = limit
		}
	}
	if !ok && !w.told {
		w.told = true
		l.events(w.pod).Eventf(w.pod, v1.EventTypeNormal, "BindingConditionsPending", "waiting for binding conditions for device on node %s", w.node)
	}
	return ok, until, nil
}

// release gives the reservations back. Allocations stay: the next attempt uses
// them or, if they are in its way, takes them away.
func (w *deviceWork) release(ctx context.Context, l *loop) {
	for i, claim := range w.written {
		var err error
		switch {
		case claim == nil:
		case w.plan.Claims[i].Special:
			err = l.deleteClaim(ctx, claim)
		case resourceclaim.IsReservedForPod(w.pod, claim, false):
			err = l.unreserve(ctx, w.pod, claim)
		}
		if err != nil && ctx.Err() == nil && !apierrors.IsNotFound(err) {
			l.log.Warn("cannot give a reservation of a claim back", "pod", w.pod.Namespace+"/"+w.pod.Name, "claim", claim.Name, "err", err)
		}
	}
}

func (l *loop) unreserve(ctx context.Context, pod *v1.Pod, claim *resourceapi.ResourceClaim) error {
	patch := fmt.Sprintf(`{"metadata":{"uid":%q},"status":{"reservedFor":[{"$patch":"delete","uid":%q}]}}`, claim.UID, pod.UID)
	_, err := l.client.ResourceV1().ResourceClaims(claim.Namespace).Patch(ctx, claim.Name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "status")
	return err
}

// deleteClaim deletes a claim that the scheduler made, with what keeps it.
func (l *loop) deleteClaim(ctx context.Context, claim *resourceapi.ResourceClaim) error {
	api := l.client.ResourceV1().ResourceClaims(claim.Namespace)
	uid := claim.UID
	err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		fresh, err := api.Get(ctx, claim.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		at := slices.Index(fresh.Finalizers, resourceapi.Finalizer)
		if fresh.UID != uid || at < 0 {
			return nil
		}
		fresh.Finalizers = slices.Delete(fresh.Finalizers, at, at+1)
		_, err = api.Update(ctx, fresh, metav1.UpdateOptions{})
		return err
	})
	if err != nil {
		return fmt.Errorf("take the finalizer off claim %s/%s: %w", claim.Namespace, claim.Name, err)
	}
	return api.Delete(ctx, claim.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}})
}

// deallocate takes away what keeps a refused pod from other nodes: see
// [placement.Decision].
func (l *loop) deallocate(ctx context.Context, claim *resourceapi.ResourceClaim) error {
	var err error
	if placement.IsSpecialClaim(claim) {
		err = l.deleteClaim(ctx, claim)
	} else {
		claim = claim.DeepCopy() // not fresh: if anything changed it may be used now
		claim.Status.Allocation, claim.Status.ReservedFor, claim.Status.Devices = nil, nil, nil
		_, err = l.client.ResourceV1().ResourceClaims(claim.Namespace).UpdateStatus(ctx, claim, metav1.UpdateOptions{})
	}
	if err == nil || apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return fmt.Errorf("deallocate claim %s/%s: %w", claim.Namespace, claim.Name, err)
}
