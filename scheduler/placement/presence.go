package placement

import (
	"math"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
)

// who is what selectors read of a pod.
type who struct {
	namespace string
	labels    labels.Set
}

func whoIs(pod *v1.Pod) who { return who{pod.Namespace, pod.Labels} }

// presence is what decisions about others read of a pod that is there, besides its request, ports and terms. The snapshot
// holds no pod itself: 1.3 KB each, of which the view holds no copy either.
type presence struct {
	who
	name      string
	uid       types.UID
	volumes   []v1.Volume
	started   int64 // as startNanos
	priority  int32
	ending    bool // it is being deleted
	preempted bool // it was evicted for another pod
}

func presenceOf(pod *v1.Pod) presence {
	return presence{
		who: whoIs(pod), name: pod.Name, uid: pod.UID, volumes: pod.Spec.Volumes, started: startNanos(pod),
		priority: priority(pod), ending: pod.DeletionTimestamp != nil,
		preempted: slices.ContainsFunc(pod.Status.Conditions, func(c v1.PodCondition) bool {
			return c.Type == v1.DisruptionTarget && c.Status == v1.ConditionTrue && c.Reason == v1.PodReasonPreemptionByScheduler
		}),
	}
}

// object is as much of the pod as who evicts or displaces it needs: its name, uid and labels, that it is being deleted (not since
// when), its priority, and when it started.
func (p *presence) object() *v1.Pod {
	pod := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.namespace, Name: p.name, UID: p.uid, Labels: p.labels},
		Spec:       v1.PodSpec{Priority: &p.priority},
	}
	if p.ending {
		pod.DeletionTimestamp = &metav1.Time{}
	}
	if p.started != math.MaxInt64 {
		pod.Status.StartTime = &metav1.Time{Time: time.Unix(0, p.started)}
	}
	return pod
}
