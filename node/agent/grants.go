package agent

import (
	"cmp"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	resourcehelper "k8s.io/component-helpers/resource"

	"skein.io/skein/node/agent/lifecycle"
	"skein.io/skein/node/desired"
)

// grants is what the node has granted to its pods. A pod whose spec asks for something else is resized when that is granted too:
// at once, or when another pod makes room.
type grants struct {
	// mu guards what follows, and makes decisions come one after the other.
	mu sync.Mutex
	// given is what pods that count were granted.
	given map[types.UID]*desired.Resources
	// asking are the pods that wait for room.
	asking map[types.UID]ask
}

// ask is a resize that a pod waits for.
type ask struct {
	pod   *corev1.Pod // as its spec is
	since time.Time
}

func newGrants() grants {
	return grants{given: map[types.UID]*desired.Resources{}, asking: map[types.UID]ask{}}
}

// admit checks a new pod against what the others were granted, and grants it what it asks for.
func (g *grants) admit(a *Agent, p *corev1.Pod, pods []*corev1.Pod, labels map[string]string) *lifecycle.Verdict {
	g.mu.Lock()
	defer g.mu.Unlock()
	others := slices.DeleteFunc(g.running(a, pods), func(o *corev1.Pod) bool { return o.UID == p.UID })
	v := Fits(p, others, labels, a.allocatable())
	if v == nil {
		g.given[p.UID] = desired.ResourcesOf(p)
	}
	return v
}

// running are the pods that take room on the node, with what they were granted. mu is held.
func (g *grants) running(a *Agent, pods []*corev1.Pod) []*corev1.Pod {
	var out []*corev1.Pod
	for _, o := range pods {
		given, rec := g.given[o.UID], a.cfg.Desired.Record(o.UID)
		// One that ran here before this daemon did may have no worker yet.
		before := rec != nil && rec.Admitted || o.Status.Phase == corev1.PodRunning
		if given == nil && !before && a.worker(o.UID) == nil {
			continue
		}
		if rec != nil && rec.Status != nil && (rec.Status.Phase == corev1.PodFailed || rec.Status.Phase == corev1.PodSucceeded) {
			continue
		}
		if given == nil && rec != nil {
			given = rec.Allocated
		}
		out = append(out, given.Apply(o))
	}
	return out
}

// grant returns what the pod has been granted, which is what its spec asks for unless it says why not.
func (a *Agent) grant(p *corev1.Pod, rec *desired.Record) (*desired.Resources, *lifecycle.Verdict) {
	has, verdict, woken := a.grants.ask(a, p, rec)
	for _, uid := range woken {
		a.kick(uid)
	}
	return has, verdict
}

func (g *grants) ask(a *Agent, p *corev1.Pod, rec *desired.Record) (has *desired.Resources, why *lifecycle.Verdict, woken []types.UID) {
	g.mu.Lock()
	defer g.mu.Unlock()
	has = g.given[p.UID]
	if has == nil {
		if has = rec.Allocated; has == nil {
			has = desired.ResourcesOf(p)
		}
		g.given[p.UID] = has
	}
	if has.Match(p) {
		delete(g.asking, p.UID)
		return has, nil, nil
	}
	since := time.Now()
	if before, ok := g.asking[p.UID]; ok {
		since = before.since
	}
	g.asking[p.UID] = ask{p, since}
	verdicts := Resizes(g.asks(), g.running(a, a.cfg.Desired.Pods()), a.allocatable())
	for uid, v := range verdicts {
		if v == nil {
			g.given[uid] = desired.ResourcesOf(g.asking[uid].pod)
			if uid != p.UID {
				woken = append(woken, uid)
			}
		}
		if v == nil || v.Reason == corev1.PodReasonInfeasible {
			delete(g.asking, uid)
		}
	}
	return g.given[p.UID], verdicts[p.UID], woken
}

func (g *grants) asks() []*corev1.Pod {
	all := make([]ask, 0, len(g.asking))
	for _, a := range g.asking {
		all = append(all, a)
	}
	slices.SortFunc(all, func(x, y ask) int {
		return cmp.Or(x.since.Compare(y.since), cmp.Compare(x.pod.UID, y.pod.UID))
	})
	out := make([]*corev1.Pod, len(all))
	for i := range all {
		out[i] = all[i].pod
	}
	return out
}

// release forgets a pod that takes no room any more, and has those look again that wait for some.
func (a *Agent) release(uid types.UID) {
	g := &a.grants
	g.mu.Lock()
	delete(g.given, uid)
	delete(g.asking, uid)
	waiting := make([]types.UID, 0, len(g.asking))
	for other := range g.asking {
		waiting = append(waiting, other)
	}
	g.mu.Unlock()
	for _, other := range waiting {
		a.kick(other)
	}
}

// Resizes decides which pods get what their specs ask for, and why not: Deferred while others have the room, Infeasible if the
// node is too small. asking is given with who waits longest first; running has what was granted, also to those that ask. As with
// kubelet those go first that ask for no more than they have, then by priority, then pods of class Guaranteed; one that does not
// fit holds up no other. Pure.
func Resizes(asking, running []*corev1.Pod, allocatable corev1.ResourceList) map[types.UID]*lifecycle.Verdict {
	has := make(map[types.UID]int, len(running))
	for i, p := range running {
		has[p.UID] = i
	}
	type turn struct {
		pod        *corev1.Pod
		grows      bool
		priority   int32
		guaranteed bool
	}
	var turns []turn
	out := map[types.UID]*lifecycle.Verdict{}
	for _, p := range asking {
		i, ok := has[p.UID]
		if !ok {
			out[p.UID] = &lifecycle.Verdict{Reason: corev1.PodReasonDeferred, Message: "the pod is not running yet"}
			continue
		}
		t := turn{pod: p, grows: grows(running[i], p), guaranteed: p.Status.QOSClass == corev1.PodQOSGuaranteed}
		if p.Spec.Priority != nil {
			t.priority = *p.Spec.Priority
		}
		turns = append(turns, t)
	}
	first := func(x, y bool) int { // who is first
		switch {
		case x == y:
			return 0
		case x:
			return -1
		}
		return 1
	}
	slices.SortStableFunc(turns, func(x, y turn) int {
		return cmp.Or(first(!x.grows, !y.grows), cmp.Compare(y.priority, x.priority), first(x.guaranteed, y.guaranteed))
	})
	for _, t := range turns {
		i := has[t.pod.UID]
		others := slices.Concat(running[:i], running[i+1:])
		v := room(t.pod, running[i], others, allocatable)
		switch {
		case v == nil:
			running[i] = t.pod
		case room(t.pod, running[i], nil, allocatable) != nil:
			v = &lifecycle.Verdict{Reason: corev1.PodReasonInfeasible, Message: v.Message}
		default:
			v = &lifecycle.Verdict{Reason: corev1.PodReasonDeferred, Message: v.Message}
		}
		out[t.pod.UID] = v
	}
	return out
}

// grows says whether a pod asks for more CPU or memory than it has.
func grows(has, wants *corev1.Pod) bool {
	h := resourcehelper.PodRequests(has, resourcehelper.PodResourcesOptions{})
	w := resourcehelper.PodRequests(wants, resourcehelper.PodResourcesOptions{})
	return w.Cpu().Cmp(*h.Cpu()) > 0 || w.Memory().Cmp(*h.Memory()) > 0
}
