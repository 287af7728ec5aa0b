package scheduler

import (
	"slices"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"

	"skein.io/skein/scheduler/placement"
)

// evictions are, by the pod for which room is made, the pods that were chosen to go and do not show yet that they end: writes are on their way, and the view is
// behind. As long as there is one, no more are chosen for that pod: it would else take the room of others on node after node.
type evictions map[types.UID][]types.UID

// chose notes a preemption that was decided.
func (e evictions) chose(pod *v1.Pod, p *placement.Preemption) {
	victims := make([]types.UID, 0, len(p.Victims))
	for _, v := range p.Victims {
		if v.DeletionTimestamp == nil {
			victims = append(victims, v.UID)
		}
	}
	e[pod.UID] = victims
}

// underWay reports whether one of them is still there as if nothing were.
func (e evictions) underWay(pod types.UID, s *placement.Snapshot) bool {
	left := slices.DeleteFunc(e[pod], func(victim types.UID) bool { return !s.Stays(victim) })
	if len(left) == 0 {
		delete(e, pod)
		return false
	}
	e[pod] = left
	return true
}

// evictionsFailed notes that some victims were not deleted. The pod is tried again after its back-off if nobody knows why; what was refused would be
// refused again, so then it waits for an event.
func (l *loop) evictionsFailed(pod *v1.Pod, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.evictions, pod.UID)
	if !refused(err) {
		l.queue.Retry(pod.UID, l.clock.Now())
		l.nudge()
	}
}
