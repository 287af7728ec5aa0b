package simulate

import (
	"fmt"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// grace is how old a controller's knowledge may be that it decides by: what happened to a workload from outside (a node died, somebody
// changed its spec) within this time is not held against it.
const grace = 5 * time.Second

// invariants looks at every commit and at every process, and notes what must never be.
type invariants struct {
	s *store

	mu         sync.Mutex // guards all below; taken last
	violations []string
	more       int
	running    map[key]*process                        // of StatefulSets' pods
	used       map[string]usage                        // by node
	pods       map[types.UID]map[types.UID]*corev1.Pod // live pods by controller
	sets       map[types.UID]types.UID                 // ReplicaSet -> Deployment
	trouble    map[types.UID]time.Time                 // of a workload
	hurt       map[types.UID]time.Time                 // the same without evictions, with what rolling updates do
	calm       time.Time                               // before it, the API failed at random
	jobs       map[types.UID]*jobCount
	cordoned   map[string]time.Time
	devices    map[device]types.UID    // by whose claim it is held
	raised     map[types.UID]time.Time // when an autoscaler raised a Deployment
	checks     map[string]int          // how often each rule was really applied
}

type usage struct{ cpu, mem, pods int64 }

// jobCount is what really became of a Job's pods.
type jobCount struct {
	succeeded, failed map[types.UID]bool // failed: reported so, or gone without having succeeded
	lastSucceeded     int32
	lastFailed        int32
}

func watchInvariants(s *store) *invariants {
	v := &invariants{s: s, running: map[key]*process{}, used: map[string]usage{}, pods: map[types.UID]map[types.UID]*corev1.Pod{}, sets: map[types.UID]types.UID{},
		trouble: map[types.UID]time.Time{}, hurt: map[types.UID]time.Time{}, jobs: map[types.UID]*jobCount{}, cordoned: map[string]time.Time{}, devices: map[device]types.UID{}, raised: map[types.UID]time.Time{}, checks: map[string]int{}}
	s.onCommit = append(s.onCommit, v.look)
	return v
}

// broken notes a violation. v.mu is held.
func (v *invariants) broken(format string, args ...any) {
	if len(v.violations) >= 20 {
		v.more++
		return
	}
	v.violations = append(v.violations, time.Now().UTC().Format("15:04:05.000 ")+fmt.Sprintf(format, args...))
}

// found returns what was noted.
func (v *invariants) found() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	out := append([]string(nil), v.violations...)
	if v.more > 0 {
		out = append(out, fmt.Sprintf("and %d more", v.more))
	}
	return out
}

func (v *invariants) started(p *process) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if !strings.HasPrefix(p.owner, "StatefulSet/") {
		return
	}
	v.checks["one process an ordinal"]++
	if other := v.running[p.at]; other != nil && other != p {
		v.broken("two processes of ordinal %s: on %s (%s) and on %s (%s)", p.at, other.node, other.uid, p.node, p.uid)
	}
	v.running[p.at] = p
}

func (v *invariants) stopped(p *process) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.running[p.at] == p {
		delete(v.running, p.at)
	}
}

func (v *invariants) ended(*process) {}

func live(p *corev1.Pod) bool {
	return p != nil && p.DeletionTimestamp == nil && !podEnded(p)
}

func ready(p *corev1.Pod) bool {
	_, ok := readySince(p)
	return ok
}

func readySince(p *corev1.Pod) (time.Time, bool) {
	if !live(p) {
		return time.Time{}, false
	}
	for i := range p.Status.Conditions {
		if c := &p.Status.Conditions[i]; c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			return c.LastTransitionTime.Time, true
		}
	}
	return time.Time{}, false
}

func disrupted(p *corev1.Pod) bool {
	for i := range p.Status.Conditions {
		if p.Status.Conditions[i].Type == corev1.DisruptionTarget {
			return true
		}
	}
	return false
}

// look is told of every commit, in order, under the store's lock.
func (v *invariants) look(c commit) {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch obj := pick(c).(type) {
	case *corev1.Pod:
		old, _ := c.old.(*corev1.Pod)
		cur, _ := c.cur.(*corev1.Pod)
		v.podChanged(old, cur, c.who)
	case *corev1.Node:
		if c.cur != nil && obj.Spec.Unschedulable {
			if _, had := v.cordoned[obj.Name]; !had {
				v.cordoned[obj.Name] = time.Now()
			}
		} else {
			delete(v.cordoned, obj.Name)
		}
	case *appsv1.ReplicaSet:
		if ref := metav1.GetControllerOf(obj); ref != nil {
			v.sets[obj.UID] = ref.UID
		}
		v.specChanged(c, obj.UID)
	case *corev1.PersistentVolume, *corev1.PersistentVolumeClaim:
		if c.cur != nil {
			v.volumeChanged(c.old, c.cur)
		}
	case *resourceapi.ResourceClaim:
		old, _ := c.old.(*resourceapi.ResourceClaim)
		cur, _ := c.cur.(*resourceapi.ResourceClaim)
		v.devicesChanged(old, cur)
	case *appsv1.Deployment, *appsv1.StatefulSet, *appsv1.DaemonSet:
		acc, _ := meta.Accessor(obj)
		v.specChanged(c, acc.GetUID())
		old, _ := c.old.(*appsv1.Deployment)
		cur, _ := c.cur.(*appsv1.Deployment)
		if old != nil && cur != nil && *old.Spec.Replicas != *cur.Spec.Replicas && strings.HasPrefix(c.who, "leader") {
			v.autoscaled(old, cur)
		}
	case *batchv1.Job:
		v.specChanged(c, obj.UID)
		if c.cur != nil {
			v.jobChanged(obj)
		}
	}
}

func pick(c commit) runtime.Object {
	if c.cur != nil {
		return c.cur
	}
	return c.old
}

// specChanged notes when somebody wants another number of pods, or allows another number to be missing.
func (v *invariants) specChanged(c commit, uid types.UID) {
	if c.old == nil || c.cur == nil {
		return
	}
	changed := false
	switch cur := c.cur.(type) {
	case *appsv1.ReplicaSet:
		changed = *cur.Spec.Replicas < *c.old.(*appsv1.ReplicaSet).Spec.Replicas
	case *appsv1.Deployment:
		old := c.old.(*appsv1.Deployment)
		changed = *cur.Spec.Replicas != *old.Spec.Replicas || !equality.Semantic.DeepEqual(cur.Spec.Strategy, old.Spec.Strategy)
	case *appsv1.StatefulSet:
		old := c.old.(*appsv1.StatefulSet)
		changed = *cur.Spec.Replicas != *old.Spec.Replicas || !equality.Semantic.DeepEqual(cur.Spec.UpdateStrategy, old.Spec.UpdateStrategy)
	case *batchv1.Job:
		changed = *cur.Spec.Parallelism != *c.old.(*batchv1.Job).Spec.Parallelism
	}
	if changed {
		v.trouble[uid] = time.Now()
	}
}

// troubled says that something came from outside within the time of grace.
func (v *invariants) troubled(uids ...types.UID) bool {
	for _, uid := range uids {
		if t, ok := v.trouble[uid]; ok && time.Since(t) < grace {
			return true
		}
	}
	return time.Now().Before(v.calm)
}

// flaky says that the API fails at random until then: what is done later than it was decided is no fault.
func (v *invariants) flaky(until time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.calm = until
}

func request(p *corev1.Pod) (cpu, mem int64) {
	for i := range p.Spec.Containers {
		r := p.Spec.Containers[i].Resources.Requests
		cpu += r.Cpu().MilliValue()
		mem += r.Memory().Value()
	}
	return cpu, mem
}

func (v *invariants) podChanged(old, cur *corev1.Pod, who string) {
	v.capacity(old, cur)
	any := cur
	if any == nil {
		any = old
	}
	ref := metav1.GetControllerOf(any)
	if ref == nil {
		if old == nil {
			return
		}
		if ref = metav1.GetControllerOf(old); ref == nil {
			return
		}
	}
	g := v.pods[ref.UID]
	if g == nil {
		g = map[types.UID]*corev1.Pod{}
		v.pods[ref.UID] = g
	}
	wasReady, isReady := ready(old), ready(cur)
	if live(cur) {
		g[cur.UID] = cur
	} else {
		delete(g, any.UID)
	}
	dep := v.sets[ref.UID]
	switch {
	case old == nil:
		v.withinQuota(cur)
		v.created(ref, dep, cur)
	case wasReady && !isReady && strings.HasPrefix(who, "leader") && !disrupted(any) && !live(cur):
		v.retired(ref, dep, old)
		v.hurt[ref.UID], v.hurt[dep] = time.Now(), time.Now()
	case wasReady && !isReady || live(old) && !live(cur) && !strings.HasPrefix(who, "leader"):
		v.trouble[ref.UID], v.trouble[dep] = time.Now(), time.Now()
		if who != "drain" {
			v.hurt[ref.UID], v.hurt[dep] = time.Now(), time.Now()
		}
	}
	if ref.Kind == "Job" {
		v.jobPod(ref.UID, old, cur)
	}
}

// capacity checks that what is bound to a node fits, at the moment of each binding.
func (v *invariants) capacity(old, cur *corev1.Pod) {
	holds := func(p *corev1.Pod) bool { return p != nil && p.Spec.NodeName != "" && !podEnded(p) }
	add := func(p *corev1.Pod, sign int64) {
		cpu, mem := request(p)
		u := v.used[p.Spec.NodeName]
		v.used[p.Spec.NodeName] = usage{u.cpu + sign*cpu, u.mem + sign*mem, u.pods + sign}
	}
	if holds(old) {
		add(old, -1)
	}
	if holds(cur) {
		add(cur, 1)
	}
	if old == nil || cur == nil || old.Spec.NodeName == cur.Spec.NodeName {
		return
	}
	if old.Spec.NodeName != "" {
		v.broken("pod %s/%s was bound to %s and is now bound to %s", cur.Namespace, cur.Name, old.Spec.NodeName, cur.Spec.NodeName)
	}
	name := cur.Spec.NodeName
	v.checks["capacity"]++
	e := v.s.tables[nodesGVR].objs[key{"", name}]
	if e == nil {
		return // it went while the binding was under way
	}
	n, u := e.obj.(*corev1.Node), v.used[name]
	v.volumesReach(cur, n)
	v.devicesThere(cur, n)
	if u.cpu > n.Status.Allocatable.Cpu().MilliValue() || u.mem > n.Status.Allocatable.Memory().Value() || u.pods > n.Status.Allocatable.Pods().Value() {
		v.broken("node %s is over capacity with %s/%s: %dm CPU, %d bytes, %d pods", name, cur.Namespace, cur.Name, u.cpu, u.mem, u.pods)
	}
	if at, ok := v.cordoned[name]; ok && time.Since(at) > grace && ownerKind(cur) != "DaemonSet" {
		v.broken("pod %s/%s was bound to %s, cordoned %v ago", cur.Namespace, cur.Name, name, time.Since(at))
	}
}
