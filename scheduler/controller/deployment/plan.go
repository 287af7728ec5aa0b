package deployment

import (
	"cmp"
	"maps"
	"math"
	"slices"
	"strconv"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"skein.io/skein/scheduler/controller"
)

// step is what one sync has to write.
type step struct {
	create     *appsv1.ReplicaSet   // for a template that has none yet
	update     []change             // ReplicaSets whose scale or annotations change
	remove     []*appsv1.ReplicaSet // beyond the history limit
	deployment *appsv1.Deployment   // with its new status and revision annotation
	again      time.Duration        // when to look again though nothing happened; zero: never
}

// change is a ReplicaSet as it is and as it is to be.
type change struct{ old, cur *appsv1.ReplicaSet }

// rollout is the working state of plan: copies that it may change.
type rollout struct {
	d    *appsv1.Deployment
	was  *appsv1.Deployment
	new  *appsv1.ReplicaSet   // nil: there is none yet
	old  []*appsv1.ReplicaSet // oldest first
	orig map[*appsv1.ReplicaSet]*appsv1.ReplicaSet
	now  time.Time
	out  step
}

// plan decides the next step of d's rollout. sets are the ReplicaSets that it
// controls, pods theirs by the set's uid (needed for Recreate only). None of
// the arguments is changed.
func plan(d *appsv1.Deployment, sets []*appsv1.ReplicaSet, pods map[types.UID][]*corev1.Pod, now time.Time) step {
	r := begin(d, sets, now)
	r.syncRevision()
	if d.DeletionTimestamp != nil {
		return r.end(r.countStatus())
	}
	r.markPaused()
	switch {
	case d.Spec.Paused:
		r.scale()
		r.cleanUp()
		return r.end(r.countStatus())
	case r.wasScaled():
		r.scale()
		return r.end(r.countStatus())
	case d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType:
		r.recreate(pods)
	default:
		r.roll()
	}
	return r.end(r.progressStatus())
}

func begin(d *appsv1.Deployment, sets []*appsv1.ReplicaSet, now time.Time) *rollout {
	r := &rollout{d: d.DeepCopy(), was: d, now: now, orig: map[*appsv1.ReplicaSet]*appsv1.ReplicaSet{}}
	sorted := slices.SortedFunc(slices.Values(sets), byAge)
	for _, rs := range sorted {
		// A copy of what plan may change; the template stays shared.
		c := *rs
		c.Annotations = maps.Clone(rs.Annotations)
		if c.Annotations == nil {
			c.Annotations = map[string]string{}
		}
		c.Spec.Replicas = new(*rs.Spec.Replicas)
		r.orig[&c] = rs
		// Of several sets with the template the oldest counts as the new one.
		if r.new == nil && sameTemplate(&rs.Spec.Template, &d.Spec.Template) {
			r.new = &c
		} else {
			r.old = append(r.old, &c)
		}
	}
	return r
}

// end turns the working state into a step.
func (r *rollout) end(status appsv1.DeploymentStatus) step {
	for _, rs := range r.all() {
		old, ok := r.orig[rs]
		if ok && (*old.Spec.Replicas != *rs.Spec.Replicas || old.Spec.MinReadySeconds != rs.Spec.MinReadySeconds ||
			!equality.Semantic.DeepEqual(old.Annotations, rs.Annotations)) {
			r.out.update = append(r.out.update, change{old, rs})
		}
	}
	r.d.Status = status
	r.out.deployment = r.d
	return r.out
}

// all returns all ReplicaSets, the new one last.
func (r *rollout) all() []*appsv1.ReplicaSet {
	if r.new == nil {
		return r.old
	}
	return append(slices.Clip(r.old), r.new)
}

func active(sets []*appsv1.ReplicaSet) []*appsv1.ReplicaSet {
	var out []*appsv1.ReplicaSet
	for _, rs := range sets {
		if *rs.Spec.Replicas > 0 {
			out = append(out, rs)
		}
	}
	return out
}

func sum(sets []*appsv1.ReplicaSet, f func(*appsv1.ReplicaSet) int32) (n int32) {
	for _, rs := range sets {
		n += f(rs)
	}
	return n
}

func wanted(rs *appsv1.ReplicaSet) int32    { return *rs.Spec.Replicas }
func existing(rs *appsv1.ReplicaSet) int32  { return rs.Status.Replicas }
func ready(rs *appsv1.ReplicaSet) int32     { return rs.Status.ReadyReplicas }
func available(rs *appsv1.ReplicaSet) int32 { return rs.Status.AvailableReplicas }

// lasting is how many available pods are left once rs is as small as it is
// asked to be. Its status may be from before that, and then counts pods that
// are about to go; to count on them would take away too many others.
func lasting(rs *appsv1.ReplicaSet) int32 {
	return min(rs.Status.AvailableReplicas, *rs.Spec.Replicas)
}

func byAge(a, b *appsv1.ReplicaSet) int {
	return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
}

// limits returns how many pods may be too many and too few while rolling.
func limits(d *appsv1.Deployment) (surge, unavailable int32) {
	ru := d.Spec.Strategy.RollingUpdate
	if d.Spec.Strategy.Type != appsv1.RollingUpdateDeploymentStrategyType || ru == nil {
		return 0, 0
	}
	n := int(*d.Spec.Replicas)
	zero := intstr.FromInt32(0)
	// Validation refuses what cannot be scaled; then both stay 0.
	s, _ := intstr.GetScaledValueFromIntOrPercent(cmp.Or(ru.MaxSurge, &zero), n, true)
	u, _ := intstr.GetScaledValueFromIntOrPercent(cmp.Or(ru.MaxUnavailable, &zero), n, false)
	if s == 0 && u == 0 {
		u = 1 // percentages may round to nothing, and then nothing would move
	}
	return int32(s), int32(min(u, n))
}

// setScale sets how many pods rs is to have, and notes beside it for which size
// of the Deployment that was right.
func (r *rollout) setScale(rs *appsv1.ReplicaSet, n int32) {
	rs.Spec.Replicas = new(n)
	surge, _ := limits(r.d)
	rs.Annotations[annDesired] = strconv.Itoa(int(*r.d.Spec.Replicas))
	rs.Annotations[annMax] = strconv.Itoa(int(*r.d.Spec.Replicas + surge))
}

// scaleIfNeeded is setScale where the size differs; it reports whether it did.
func (r *rollout) scaleIfNeeded(rs *appsv1.ReplicaSet, n int32) bool {
	if *rs.Spec.Replicas == n {
		return false
	}
	r.setScale(rs, n)
	return true
}

// newSize is how many pods the new set may have now: up to what is asked for,
// and all sets together no more than the surge allows.
func (r *rollout) newSize() int32 {
	want, have := *r.d.Spec.Replicas, *r.new.Spec.Replicas
	if r.d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType || have > want {
		return want
	}
	surge, _ := limits(r.d)
	room := want + surge - sum(r.all(), wanted)
	return have + max(0, min(room, want-have))
}

// roll does what a rolling update allows now: first up, then, if that was
// nothing, down.
func (r *rollout) roll() {
	r.ensureNew()
	if r.scaleIfNeeded(r.new, r.newSize()) {
		return
	}
	if r.shrinkOld() {
		return
	}
	if complete(r.d, &r.d.Status) {
		r.cleanUp()
	}
}

// shrinkOld scales old sets down as far as availability allows. Pods of old
// sets that are not available go first: taking them away makes nothing worse,
// and if they stayed, a rollout over a broken one would stand still.
func (r *rollout) shrinkOld() bool {
	old := active(r.old)
	if len(old) == 0 {
		return false
	}
	_, unavailable := limits(r.d)
	minAvailable := *r.d.Spec.Replicas - unavailable
	// What the new set was promised and is not available yet counts as missing.
	budget := sum(r.all(), wanted) - minAvailable - (*r.new.Spec.Replicas - lasting(r.new))
	if budget <= 0 {
		return false
	}
	shrunk := false
	for _, rs := range old {
		if n := min(budget, *rs.Spec.Replicas-lasting(rs)); n > 0 {
			shrunk = r.scaleIfNeeded(rs, *rs.Spec.Replicas-n) || shrunk
			budget -= n
		}
	}
	spare := sum(r.all(), lasting) - minAvailable
	for _, rs := range old {
		if n := min(spare, *rs.Spec.Replicas); n > 0 {
			shrunk = r.scaleIfNeeded(rs, *rs.Spec.Replicas-n) || shrunk
			spare -= n
		}
	}
	return shrunk
}

// recreate takes all old pods away, waits until they are gone, then makes new ones.
func (r *rollout) recreate(pods map[types.UID][]*corev1.Pod) {
	stopping := false
	for _, rs := range r.old {
		stopping = r.scaleIfNeeded(rs, 0) || stopping
	}
	if stopping || r.oldPodsRun(pods) {
		return
	}
	r.ensureNew()
	r.scaleIfNeeded(r.new, *r.d.Spec.Replicas)
	if complete(r.d, &r.d.Status) {
		r.cleanUp()
	}
}

func (r *rollout) oldPodsRun(pods map[types.UID][]*corev1.Pod) bool {
	for _, rs := range r.old {
		if rs.Status.Replicas > 0 || slices.ContainsFunc(pods[rs.UID], func(p *corev1.Pod) bool { return !controller.PodTerminal(p) }) {
			return true
		}
	}
	return false
}

// wasScaled says that the Deployment's size changed since its sets were scaled:
// that is done at once, before the rollout goes on.
func (r *rollout) wasScaled() bool {
	if r.d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType && r.onlyActive() == nil {
		return false // scale would do nothing; recreate stops all but one
	}
	for _, rs := range active(r.all()) {
		if n, ok := count(rs, annDesired); ok && n != *r.d.Spec.Replicas {
			return true
		}
	}
	return false
}

// onlyActive returns the only set that has pods, or the newest if none has; nil
// if several have, or there are no sets.
func (r *rollout) onlyActive() *appsv1.ReplicaSet {
	switch a := active(r.all()); {
	case len(a) == 1:
		return a[0]
	case len(a) > 1:
		return nil
	case r.new != nil:
		return r.new
	case len(r.old) > 0:
		return r.old[len(r.old)-1]
	}
	return nil
}

// scale brings the sets to the Deployment's size. In the middle of a rolling
// update each gets its share, so that a template that turns out bad does not
// get more than that.
func (r *rollout) scale() {
	want := *r.d.Spec.Replicas
	if rs := r.onlyActive(); rs != nil {
		r.setScale(rs, want)
		return
	}
	if r.new != nil && *r.new.Spec.Replicas == want && r.new.Status.AvailableReplicas == want {
		if n, ok := count(r.new, annDesired); ok && n == want {
			for _, rs := range active(r.old) {
				r.scaleIfNeeded(rs, 0)
			}
			return
		}
	}
	if r.d.Spec.Strategy.Type == appsv1.RollingUpdateDeploymentStrategyType {
		r.scaleProportionally(active(r.all()))
	}
}

func (r *rollout) scaleProportionally(sets []*appsv1.ReplicaSet) {
	surge, _ := limits(r.d)
	target := int32(0)
	if *r.d.Spec.Replicas > 0 {
		target = *r.d.Spec.Replicas + surge
	}
	add := target - sum(sets, wanted)
	// Largest first; among equals the newer grows and the older shrinks first.
	slices.SortStableFunc(sets, func(a, b *appsv1.ReplicaSet) int {
		age := byAge(a, b)
		if add > 0 {
			age = -age
		}
		return cmp.Or(cmp.Compare(*b.Spec.Replicas, *a.Spec.Replicas), age)
	})
	sizes := make([]int32, len(sets))
	added := int32(0)
	for i, rs := range sets {
		sizes[i] = *rs.Spec.Replicas
		if add == 0 {
			continue
		}
		share := r.share(rs)
		if add > 0 {
			share = min(share, add-added)
		} else {
			share = max(share, add-added)
		}
		sizes[i] += share
		added += share
	}
	for i, rs := range sets {
		if i == 0 { // what rounding left goes to the largest
			sizes[i] = max(0, sizes[i]+add-added)
		}
		r.setScale(rs, sizes[i])
	}
}

// share is by how much rs would grow or shrink if it kept its part of the whole.
func (r *rollout) share(rs *appsv1.ReplicaSet) int32 {
	have := *rs.Spec.Replicas
	if *r.d.Spec.Replicas == 0 {
		return -have
	}
	surge, _ := limits(r.d)
	before, ok := count(rs, annMax)
	if !ok || before == 0 {
		if before = r.d.Status.Replicas; before == 0 {
			return 0
		}
	}
	return int32(math.Round(float64(have)*float64(*r.d.Spec.Replicas+surge)/float64(before))) - have
}

// cleanUp removes the oldest empty sets beyond the history limit.
func (r *rollout) cleanUp() {
	limit := r.d.Spec.RevisionHistoryLimit
	if limit == nil || *limit == math.MaxInt32 {
		return
	}
	var kept []*appsv1.ReplicaSet
	for _, rs := range r.old {
		if rs.DeletionTimestamp == nil {
			kept = append(kept, rs)
		}
	}
	slices.SortStableFunc(kept, func(a, b *appsv1.ReplicaSet) int { return cmp.Compare(revision(a), revision(b)) })
	for _, rs := range kept[:max(0, len(kept)-int(*limit))] {
		if rs.Status.Replicas == 0 && *rs.Spec.Replicas == 0 && *r.orig[rs].Spec.Replicas == 0 && rs.Generation <= rs.Status.ObservedGeneration {
			r.out.remove = append(r.out.remove, r.orig[rs])
		}
	}
}
