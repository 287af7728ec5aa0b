package statefulset

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"skein.io/skein/scheduler/controller"
)

// burst bounds how many pods one step creates: upstream's of ReplicaSets and Jobs.
const burst = 500

// revision is a pod template with its name.
type revision struct {
	name     string
	template *corev1.PodTemplateSpec
}

// input is all that plan looks at.
type input struct {
	set *appsv1.StatefulSet
	// pods that the set controls, in any phase.
	pods []*corev1.Pod
	// claims of the set's namespace, by name.
	claims map[string]*corev1.PersistentVolumeClaim
	// current is what pods had before the rollout that is under way, update what
	// it brings. The same when there is none.
	current, update revision
	now             time.Time
}

// step is what one sync has to do, in this order.
type step struct {
	claims []*corev1.PersistentVolumeClaim // to create
	own    []*corev1.PersistentVolumeClaim // to update: their owners
	create []*corev1.Pod
	repair []*corev1.Pod // to update: their labels
	remove []*corev1.Pod
	// again is when to look again though nothing changed; zero for never.
	again time.Duration
}

func (s *step) after(d time.Duration) {
	if d > 0 && (s.again == 0 || d < s.again) {
		s.again = d
	}
}

// plan decides the next step. With OrderedReady pods are created from the first
// ordinal up and removed from the last down, one at a time, each only while
// those before it are available; Parallel knows no order. A rollout removes pods
// of other revisions from the last ordinal down to the partition, and never
// makes more pods unavailable than its strategy allows.
func plan(in input) step {
	p := &planner{input: in, ordered: in.set.Spec.PodManagementPolicy != appsv1.ParallelPodManagement, room: min(burst, controller.Room(in.pods))}
	if in.set.DeletionTimestamp != nil {
		return p.out
	}
	p.sort()
	if p.keepReplicas() && p.removeCondemned() {
		p.rollOut()
	}
	return p.out
}

type planner struct {
	input
	ordered   bool
	room      int           // how many pods may be made
	replicas  []*corev1.Pod // by ordinal from the first; nil where none exists
	condemned []*corev1.Pod // beyond the ordinals wanted, the last first
	out       step
}

func (p *planner) sort() {
	p.replicas = make([]*corev1.Pod, max(0, *p.set.Spec.Replicas))
	for _, pod := range p.pods {
		switch at, ok := ordinal(p.set, pod.Name); {
		case !ok: // not one of ours, whatever its owner reference says
		case inRange(p.set, at):
			p.replicas[at-start(p.set)] = pod
		default:
			p.condemned = append(p.condemned, pod)
		}
	}
	slices.SortFunc(p.condemned, func(a, b *corev1.Pod) int {
		x, _ := ordinal(p.set, a.Name)
		y, _ := ordinal(p.set, b.Name)
		return cmp.Compare(y, x)
	})
}

// keepReplicas creates, repairs and replaces the pods that should exist; false
// if what follows has to wait.
func (p *planner) keepReplicas() bool {
	for i, pod := range p.replicas {
		at := start(p.set) + i
		if goOn := p.keep(at, pod); !goOn && p.ordered {
			return false
		}
	}
	return true
}

func (p *planner) keep(at int, pod *corev1.Pod) (goOn bool) {
	switch {
	case pod == nil && len(p.out.create) >= p.room:
		return false // the events of those that are made wake the set
	case pod == nil:
		if p.stale(at) {
			p.out.after(staleRecheck)
			return false
		}
		pod = p.newPod(at)
		p.ensureClaims(at)
		p.ownClaims(at, pod)
		p.out.create = append(p.out.create, pod)
		return false
	case controller.PodTerminal(pod):
		// Also one that succeeded: a pod that was evicted or whose node went down
		// may end so, and a StatefulSet's pods run for ever.
		if pod.DeletionTimestamp == nil {
			p.out.remove = append(p.out.remove, pod)
		}
		return false
	}
	if pod.Status.Phase == corev1.PodPending {
		p.ensureClaims(at)
	}
	available, wait := controller.PodAvailable(pod, p.set.Spec.MinReadySeconds, p.now)
	if p.ordered && (pod.DeletionTimestamp != nil || !available) {
		p.out.after(wait)
		return false
	}
	p.out.after(wait)
	p.ownClaims(at, pod)
	if l := pod.Labels; l[appsv1.StatefulSetPodNameLabel] != pod.Name || l[appsv1.PodIndexLabel] != strconv.Itoa(at) {
		upd := pod.DeepCopy()
		identify(upd, at)
		p.out.repair = append(p.out.repair, upd)
	}
	return true
}

// removeCondemned removes what is beyond the number wanted; false if the rollout
// has to wait.
func (p *planner) removeCondemned() bool {
	for _, pod := range p.condemned {
		at, _ := ordinal(p.set, pod.Name)
		p.ownClaims(at, pod)
	}
	// The lowest that is not available may go before the others, or nothing that
	// is broken could be scaled down.
	var broken *corev1.Pod
	for _, pod := range slices.Backward(p.condemned) {
		if broken == nil && p.unavailable(pod) {
			broken = pod
		}
	}
	for _, pod := range p.condemned {
		switch {
		case pod.DeletionTimestamp != nil:
			if p.ordered {
				return false
			}
		case p.ordered && p.unavailable(pod) && pod != broken && !controller.PodTerminal(pod):
			return false // it may recover; one that has ended never does
		default:
			p.out.remove = append(p.out.remove, pod)
			if p.ordered {
				return false
			}
		}
	}
	return true
}

func (p *planner) rollOut() {
	if p.set.Spec.UpdateStrategy.Type == appsv1.OnDeleteStatefulSetStrategyType {
		return
	}
	budget := maxUnavailable(p.set)
	for _, pod := range p.replicas {
		if pod == nil || p.unavailable(pod) {
			budget--
		}
	}
	for i := len(p.replicas) - 1; i >= partition(p.set); i-- {
		pod := p.replicas[i]
		if pod == nil || pod.DeletionTimestamp != nil || slices.Contains(p.out.remove, pod) || revisionOf(pod) == p.update.name {
			continue
		}
		if !p.unavailable(pod) {
			if budget <= 0 {
				return
			}
			budget--
		}
		p.out.remove = append(p.out.remove, pod)
	}
}

// maxUnavailable is upstream's: 1 unless said otherwise, a share is rounded
// down, but never to zero.
func maxUnavailable(set *appsv1.StatefulSet) int {
	r := set.Spec.UpdateStrategy.RollingUpdate
	if r == nil || r.MaxUnavailable == nil {
		return 1
	}
	n, err := intstr.GetScaledValueFromIntOrPercent(r.MaxUnavailable, int(*set.Spec.Replicas), false)
	if err != nil {
		return 1 // validation refuses it
	}
	return max(1, n)
}

// partition is how many of the first pods a rollout leaves alone.
func partition(set *appsv1.StatefulSet) int {
	if r := set.Spec.UpdateStrategy.RollingUpdate; r != nil && r.Partition != nil {
		return int(*r.Partition)
	}
	return 0
}

func (p *planner) unavailable(pod *corev1.Pod) bool {
	ok, _ := controller.PodAvailable(pod, p.set.Spec.MinReadySeconds, p.now)
	return !ok || pod.DeletionTimestamp != nil
}

// revisionAt is the revision that a new pod at the ordinal gets: the current one
// for those that the rollout has not reached.
func (p *planner) revisionAt(at int) revision {
	if p.set.Spec.UpdateStrategy.Type != appsv1.RollingUpdateStatefulSetStrategyType {
		return p.update
	}
	limit := start(p.set) + int(p.set.Status.CurrentReplicas)
	if r := p.set.Spec.UpdateStrategy.RollingUpdate; r != nil {
		limit = start(p.set) + partition(p.set)
	}
	if at < limit {
		return p.current
	}
	return p.update
}

func (p *planner) newPod(at int) *corev1.Pod {
	rev := p.revisionAt(at)
	t := rev.template.DeepCopy()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.set.Namespace, Name: podName(p.set, at),
			Labels: t.Labels, Annotations: t.Annotations, Finalizers: t.Finalizers,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(p.set, kind)},
		},
		Spec: t.Spec,
	}
	identify(pod, at)
	pod.Labels[appsv1.StatefulSetRevisionLabel] = rev.name
	pod.Spec.Hostname, pod.Spec.Subdomain = pod.Name, p.set.Spec.ServiceName
	mountClaims(p.set, pod, at)
	return pod
}

func identify(pod *corev1.Pod, at int) {
	pod.Labels = maps.Clone(pod.Labels)
	if pod.Labels == nil {
		pod.Labels = map[string]string{}
	}
	pod.Labels[appsv1.StatefulSetPodNameLabel] = pod.Name
	pod.Labels[appsv1.PodIndexLabel] = strconv.Itoa(at)
}

func revisionOf(pod *corev1.Pod) string { return pod.Labels[appsv1.StatefulSetRevisionLabel] }

func start(set *appsv1.StatefulSet) int {
	if set.Spec.Ordinals != nil {
		return int(set.Spec.Ordinals.Start)
	}
	return 0
}

func inRange(set *appsv1.StatefulSet, at int) bool {
	return at >= start(set) && at < start(set)+int(*set.Spec.Replicas)
}

func podName(set *appsv1.StatefulSet, at int) string { return set.Name + "-" + strconv.Itoa(at) }

// ordinal is the pod's number, false if the name is not one of the set's.
func ordinal(set *appsv1.StatefulSet, pod string) (int, bool) {
	digits, ok := strings.CutPrefix(pod, set.Name+"-")
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(digits, 10, 31)
	return int(n), err == nil && podName(set, int(n)) == pod
}

// newStatus is the set's status after the step has been carried out.
func newStatus(in input, done step, collisions *int32) appsv1.StatefulSetStatus {
	s := *in.set.Status.DeepCopy()
	s.ObservedGeneration = in.set.Generation
	s.CurrentRevision, s.UpdateRevision, s.CollisionCount = in.current.name, in.update.name, collisions
	s.Replicas, s.ReadyReplicas, s.AvailableReplicas, s.CurrentReplicas, s.UpdatedReplicas = 0, 0, 0, 0, 0
	for _, pod := range slices.Concat(in.pods, done.create) {
		if _, ours := ordinal(in.set, pod.Name); !ours {
			continue
		}
		s.Replicas++
		if pod.Status.Phase == corev1.PodRunning && controller.PodReady(pod) {
			s.ReadyReplicas++
			if ok, _ := controller.PodAvailable(pod, in.set.Spec.MinReadySeconds, in.now); ok {
				s.AvailableReplicas++
			}
		}
		if pod.DeletionTimestamp != nil || slices.Contains(done.remove, pod) {
			continue
		}
		if revisionOf(pod) == in.current.name {
			s.CurrentReplicas++
		}
		if revisionOf(pod) == in.update.name {
			s.UpdatedReplicas++
		}
	}
	n := *in.set.Spec.Replicas
	if in.set.Spec.UpdateStrategy.Type == appsv1.RollingUpdateStatefulSetStrategyType && s.UpdatedReplicas == n && s.ReadyReplicas == n && s.Replicas == n {
		s.CurrentReplicas, s.CurrentRevision = s.UpdatedReplicas, s.UpdateRevision // the rollout is complete
	}
	return s
}
