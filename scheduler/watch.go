package scheduler

import (
	"context"
	"fmt"
	"maps"
	"math"
	"time"

	v1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	appslisters "k8s.io/client-go/listers/apps/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	policylisters "k8s.io/client-go/listers/policy/v1"
	"k8s.io/client-go/tools/cache"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/placement"
	"skein.io/skein/scheduler/queue"
)

// view is what placement reads of the shared view.
type view struct {
	pods, nodes, namespaces, services, replicaSets cache.SharedIndexInformer

	podLister         corelisters.PodLister
	serviceLister     corelisters.ServiceLister
	controllerLister  corelisters.ReplicationControllerLister
	replicaSetLister  appslisters.ReplicaSetLister
	statefulSetLister appslisters.StatefulSetLister
	budgetLister      policylisters.PodDisruptionBudgetLister
}

func newView(f informers.SharedInformerFactory) view {
	core, apps := f.Core().V1(), f.Apps().V1()
	return view{
		pods: core.Pods().Informer(), nodes: core.Nodes().Informer(), namespaces: core.Namespaces().Informer(),
		services: core.Services().Informer(), replicaSets: apps.ReplicaSets().Informer(),

		podLister:         core.Pods().Lister(),
		serviceLister:     core.Services().Lister(),
		controllerLister:  core.ReplicationControllers().Lister(),
		replicaSetLister:  apps.ReplicaSets().Lister(),
		statefulSetLister: apps.StatefulSets().Lister(),
		budgetLister:      f.Policy().V1().PodDisruptionBudgets().Lister(),
	}
}

// peers selects the pods that this one is spread from if it says nothing
// itself: those of its Services and its workload.
func (v *view) peers(pod *v1.Pod) labels.Selector {
	if len(pod.Spec.TopologySpreadConstraints) > 0 {
		return nil
	}
	// The lister cannot fail: it reads memory.
	services, _ := v.serviceLister.Services(pod.Namespace).List(labels.Everything())
	return placement.DefaultSelector(pod, services, v.workload(pod))
}

// workload returns the selector of the pod's controller if that is of a kind
// whose pods are alike.
func (v *view) workload(pod *v1.Pod) *metav1.LabelSelector {
	owner := metav1.GetControllerOfNoCopy(pod)
	if owner == nil {
		return nil
	}
	switch owner.APIVersion + "/" + owner.Kind {
	case "apps/v1/ReplicaSet":
		if rs, err := v.replicaSetLister.ReplicaSets(pod.Namespace).Get(owner.Name); err == nil {
			return rs.Spec.Selector
		}
	case "apps/v1/StatefulSet":
		if set, err := v.statefulSetLister.StatefulSets(pod.Namespace).Get(owner.Name); err == nil {
			return set.Spec.Selector
		}
	case "v1/ReplicationController":
		if rc, err := v.controllerLister.ReplicationControllers(pod.Namespace).Get(owner.Name); err == nil {
			return &metav1.LabelSelector{MatchLabels: rc.Spec.Selector}
		}
	}
	return nil
}

// budgets are needed only when lower pods may have to go.
func (v *view) budgets(pod *v1.Pod) []*policyv1.PodDisruptionBudget {
	if pod.Spec.Priority == nil || *pod.Spec.Priority <= 0 {
		return nil
	}
	all, _ := v.budgetLister.List(labels.Everything()) // reads memory, cannot fail
	return all
}

// watch feeds snapshot and queue from the view until the returned function is
// called. It returns when both hold all that exists, or ctx has ended.
func (l *loop) watch(ctx context.Context) (stop func(), err error) {
	// Nodes and namespaces first: pods that wait are tried when all is known.
	watches := append(append(l.volumeWatches(), l.deviceWatches()...),
		controller.On(l.view.nodes, l.nodeChanged),
		controller.On(l.view.namespaces, l.namespaceChanged),
		controller.On(l.view.pods, l.podChanged),
	)
	var undo []func()
	stop = func() {
		for _, fn := range undo {
			fn()
		}
	}
	synced := []cache.InformerSynced{l.view.services.HasSynced, l.view.replicaSets.HasSynced}
	for _, w := range watches {
		reg, err := w.Informer.AddEventHandler(w.Handler)
		if err != nil {
			stop()
			return nil, fmt.Errorf("watch the shared view: %w", err)
		}
		// An error here means that the informer has stopped, with its handlers.
		undo = append(undo, func() { _ = w.Informer.RemoveEventHandler(reg) })
		synced = append(synced, reg.HasSynced)
	}
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for _, ready := range synced {
		for !ready() {
			select {
			case <-ctx.Done():
				return stop, nil
			case <-tick.C:
			}
		}
	}
	return stop, nil
}

func (l *loop) nodeChanged(old, cur *v1.Node) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cur == nil {
		l.turns++
		l.snapshot.RemoveNode(old.Name)
		l.move(queue.NodeRemoved)
		for _, pod := range l.snapshot.NominatedBelow(old.Name, math.MaxInt32) {
			l.queue.Retry(pod.UID, l.clock.Now()) // what it waits for will not be
			l.nudge()
		}
		return
	}
	ev, matters := nodeChange(old, cur)
	if matters {
		l.snapshot.SetNode(cur)
	} else {
		l.snapshot.KeepNode(cur)
	}
	if old != nil && ev != 0 {
		l.turns++
	}
	l.moveAt(ev, cur.Name)
	if ev&(queue.NodeAdded|queue.NodeLabels|queue.NodeTaints) != 0 {
		l.move(queue.Topology)
	}
}

func (l *loop) namespaceChanged(old, cur *v1.Namespace) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if cur == nil {
		l.snapshot.RemoveNamespace(old.Name)
		return
	}
	l.snapshot.SetNamespace(cur.Name, cur.Labels)
	if old == nil || !maps.Equal(old.Labels, cur.Labels) {
		l.move(queue.NamespaceLabels)
	}
}

func (l *loop) podChanged(old, cur *v1.Pod) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old != nil && cur != nil && old.UID != cur.UID {
		// Deleted and made anew in a gap of the watch.
		l.podGone(old)
		old = nil
	}
	switch {
	case cur == nil:
		l.podGone(old)
	case cur.Spec.NodeName != "":
		l.podPlaced(old, cur)
	default:
		l.podPending(old, cur)
	}
}

// podGone frees what the pod held. l.mu is held.
func (l *loop) podGone(pod *v1.Pod) {
	l.queue.Remove(pod.UID)
	delete(l.assumed, pod.UID)
	delete(l.evictions, pod.UID)
	l.releaseVolumes(pod.UID)
	l.releaseDevices(pod.UID)
	kept := l.snapshot.NominatedTo(pod)
	l.snapshot.Unnominate(pod.UID)
	node := l.snapshot.PodNode(pod.UID)
	l.snapshot.RemovePod(pod.UID)
	if node != "" {
		l.movePeers(queue.PeerGone, pod)
	} else {
		node = kept // nothing is kept for it there any more
	}
	if node != "" {
		l.moveAt(queue.PodGone, node)
	}
}

// podPlaced counts a bound pod on its node. l.mu is held.
func (l *loop) podPlaced(old, cur *v1.Pod) {
	if controller.PodTerminal(cur) {
		if l.snapshot.PodNode(cur.UID) != "" {
			l.podGone(cur)
		}
		return
	}
	was := l.snapshot.PodNode(cur.UID)
	if was != cur.Spec.NodeName {
		l.turns++ // bound by somebody else: it may take what was meant for others
	}
	delete(l.assumed, cur.UID)
	delete(l.evictions, cur.UID)
	l.releaseVolumes(cur.UID)
	l.releaseDevices(cur.UID)
	l.snapshot.Unnominate(cur.UID)
	l.snapshot.SetPod(cur, cur.Spec.NodeName)
	if old == nil || old.Spec.NodeName == "" {
		l.queue.Remove(cur.UID)
		l.movePeers(queue.PodPlaced, cur)
		if was != "" && was != cur.Spec.NodeName { // assumed on one node, bound to another by somebody else
			l.moveAt(queue.PodGone, was)
			l.movePeers(queue.PeerGone, cur)
		}
		return
	}
	ev := placedPodChange(old, cur)
	if ev&queue.PodLabels != 0 {
		l.movePeers(queue.PodLabels, old)
	}
	l.movePeers(ev&(queue.PodLabels|queue.PodEnding), cur)
	l.moveAt(ev&queue.PodShrunk, cur.Spec.NodeName)
}

// nominationChanged follows what a pod's status says of the node that is kept
// for it. If it says nothing, and did not before, what was decided and is not
// written yet stands. l.mu is held.
func (l *loop) nominationChanged(old, cur *v1.Pod) {
	was, is := "", cur.Status.NominatedNodeName
	if old != nil {
		was = old.Status.NominatedNodeName
	}
	switch {
	case is != "":
		l.snapshot.Nominate(cur, is)
	case was != "":
		l.snapshot.Unnominate(cur.UID)
	}
	if was != "" && was != is {
		l.moveAt(queue.PodGone, was) // nothing is kept for it there any more
	}
}

// podPending queues a pod that is ours to place. l.mu is held.
func (l *loop) podPending(old, cur *v1.Pod) {
	if _, ours := l.profiles[cur.Spec.SchedulerName]; !ours {
		return
	}
	_, assumed := l.assumed[cur.UID]
	if cur.DeletionTimestamp != nil || controller.PodTerminal(cur) {
		delete(l.devices.unclaimed, cur.UID)
		l.queue.Remove(cur.UID) // if its binding is under way and fails, it is not tried again
		if !assumed {
			l.snapshot.Unnominate(cur.UID)
		}
		return
	}
	if assumed {
		// Its binding is under way: the new version is for the case that it fails.
		// If it has been carried out already, this is only late news.
		if l.queue.Has(cur.UID) {
			l.queue.Add(cur, false, l.clock.Now())
		}
		return
	}
	l.nominationChanged(old, cur)
	if len(cur.Spec.ResourceClaims) > 0 && !l.queue.Has(cur.UID) && l.unclaimed(cur) {
		l.devices.unclaimed[cur.UID] = cur
		return
	}
	delete(l.devices.unclaimed, cur.UID)
	l.queue.Add(cur, old != nil && pendingPodChanged(old, cur), l.clock.Now())
	l.nudge()
}
