package simulate

import (
	"fmt"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
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

func ownerKind(p *corev1.Pod) string {
	if ref := metav1.GetControllerOf(p); ref != nil {
		return ref.Kind
	}
	return ""
}

var ownerGVR = map[string]schema.GroupVersionResource{
	"ReplicaSet":            {Group: "apps", Version: "v1", Resource: "replicasets"},
	"Deployment":            {Group: "apps", Version: "v1", Resource: "deployments"},
	"StatefulSet":           {Group: "apps", Version: "v1", Resource: "statefulsets"},
	"DaemonSet":             {Group: "apps", Version: "v1", Resource: "daemonsets"},
	"Job":                   {Group: "batch", Version: "v1", Resource: "jobs"},
	"CronJob":               {Group: "batch", Version: "v1", Resource: "cronjobs"},
	"ReplicationController": {Version: "v1", Resource: "replicationcontrollers"},
}

// owner returns the live owner that a reference names, nil if there is none or it is being deleted. The store's lock is held.
func (v *invariants) owner(kind, ns, name string, uid types.UID) runtime.Object {
	t := v.s.tables[ownerGVR[kind]]
	if t == nil {
		return nil
	}
	if e := t.objs[key{ns, name}]; e != nil && e.acc.GetUID() == uid && e.acc.GetDeletionTimestamp() == nil {
		return e.obj
	}
	return nil
}

// deployment returns the Deployment of a ReplicaSet and all its live pods.
func (v *invariants) deployment(ns string, uid types.UID) (*appsv1.Deployment, []*corev1.Pod) {
	if uid == "" {
		return nil, nil
	}
	for _, e := range v.s.tables[ownerGVR["Deployment"]].objs {
		d := e.obj.(*appsv1.Deployment)
		if d.Namespace != ns || d.UID != uid || d.DeletionTimestamp != nil {
			continue
		}
		var pods []*corev1.Pod
		for set, dep := range v.sets {
			if dep == uid {
				for _, p := range v.pods[set] {
					pods = append(pods, p)
				}
			}
		}
		return d, pods
	}
	return nil, nil
}

func countReady(pods []*corev1.Pod) (n int) {
	for _, p := range pods {
		if ready(p) {
			n++
		}
	}
	return n
}

func scaled(v *intstr.IntOrString, total int32, up bool) int {
	if v == nil {
		return 0
	}
	n, err := intstr.GetScaledValueFromIntOrPercent(v, int(total), up)
	if err != nil {
		return 0
	}
	return n
}

// retired: a controller ended a pod that was ready.
func (v *invariants) retired(ref *metav1.OwnerReference, dep types.UID, pod *corev1.Pod) {
	// Its readiness may be younger than what the controller knows.
	if ns := v.s.tables[namespacesGVR].objs[key{"", pod.Namespace}]; ns == nil || ns.acc.GetDeletionTimestamp() != nil {
		return
	}
	if since, _ := readySince(pod); time.Since(since) < grace || v.troubled(ref.UID, dep) && dep == "" || dep != "" && v.troubled(dep) {
		return
	}
	switch ref.Kind {
	case "ReplicaSet":
		d, pods := v.deployment(pod.Namespace, dep)
		if d == nil || d.Spec.Strategy.Type == appsv1.RecreateDeploymentStrategyType {
			return
		}
		unavailable := 0
		if ru := d.Spec.Strategy.RollingUpdate; ru != nil {
			unavailable = scaled(ru.MaxUnavailable, *d.Spec.Replicas, false)
			if unavailable == 0 && scaled(ru.MaxSurge, *d.Spec.Replicas, true) == 0 {
				unavailable = 1
			}
		}
		v.checks["Deployment: never too few available"]++
		if n := countReady(pods); n < int(*d.Spec.Replicas)-unavailable {
			v.broken("Deployment %s/%s: %s was ended and left %d of %d ready, %d may be missing", d.Namespace, d.Name, pod.Name, n, *d.Spec.Replicas, unavailable)
		}
	case "StatefulSet":
		set, ok := v.owner(ref.Kind, pod.Namespace, ref.Name, ref.UID).(*appsv1.StatefulSet)
		if !ok || set.Spec.PodManagementPolicy == appsv1.ParallelPodManagement {
			return
		}
		v.checks["StatefulSet: one at a time"]++
		allowed := 1
		if ru := set.Spec.UpdateStrategy.RollingUpdate; ru != nil && ru.MaxUnavailable != nil {
			allowed = max(1, scaled(ru.MaxUnavailable, *set.Spec.Replicas, true))
		}
		n := 0
		for _, p := range v.pods[ref.UID] {
			if ready(p) && ordinal(p) < int(*set.Spec.Replicas) {
				n++
			}
		}
		if n < int(*set.Spec.Replicas)-allowed {
			v.broken("StatefulSet %s/%s: %s was ended and left %d of %d ready", set.Namespace, set.Name, pod.Name, n, *set.Spec.Replicas)
		}
	}
}

func ordinal(p *corev1.Pod) int {
	n := 0
	if i := strings.LastIndexByte(p.Name, '-'); i >= 0 {
		for _, c := range p.Name[i+1:] {
			n = n*10 + int(c-'0')
		}
	}
	return n
}

// created: a controller made a pod; it is counted among the live ones already.
func (v *invariants) created(ref *metav1.OwnerReference, dep types.UID, pod *corev1.Pod) {
	if v.troubled(ref.UID) {
		return
	}
	mine := v.pods[ref.UID]
	switch ref.Kind {
	case "ReplicaSet":
		set, ok := v.owner(ref.Kind, pod.Namespace, ref.Name, ref.UID).(*appsv1.ReplicaSet)
		if !ok {
			return
		}
		v.checks["ReplicaSet: never too many"]++
		if len(mine) > int(*set.Spec.Replicas) {
			v.broken("ReplicaSet %s/%s has %d pods, wants %d", set.Namespace, set.Name, len(mine), *set.Spec.Replicas)
		}
		d, _ := v.deployment(pod.Namespace, dep)
		if d == nil || d.Spec.Strategy.RollingUpdate == nil || v.troubled(dep) {
			return
		}
		// What its sets ask for counts, as upstream defines it: the pods follow a moment later.
		asked := 0
		for at, e := range v.s.tables[ownerGVR["ReplicaSet"]].objs {
			if rs := e.obj.(*appsv1.ReplicaSet); at.ns == d.Namespace && v.sets[rs.UID] == dep {
				asked += int(*rs.Spec.Replicas)
			}
		}
		if most := int(*d.Spec.Replicas) + scaled(d.Spec.Strategy.RollingUpdate.MaxSurge, *d.Spec.Replicas, true); asked > most {
			v.broken("Deployment %s/%s asks for %d pods, may ask for %d", d.Namespace, d.Name, asked, most)
		}
	case "StatefulSet":
		set, ok := v.owner(ref.Kind, pod.Namespace, ref.Name, ref.UID).(*appsv1.StatefulSet)
		if !ok || set.Spec.PodManagementPolicy == appsv1.ParallelPodManagement {
			return
		}
		v.checks["StatefulSet: in order"]++
		for i := range ordinal(pod) {
			name := fmt.Sprintf("%s-%d", set.Name, i)
			e := v.s.tables[podsGVR].objs[key{pod.Namespace, name}]
			if e == nil || !ready(e.obj.(*corev1.Pod)) {
				v.broken("StatefulSet %s/%s: %s was made while %s is not ready", set.Namespace, set.Name, pod.Name, name)
				return
			}
		}
	case "DaemonSet":
		v.checks["DaemonSet: one a node"]++
		target, n := pinned(pod), 0
		for _, p := range mine {
			if pinned(p) == target {
				n++
			}
		}
		ds, ok := v.owner(ref.Kind, pod.Namespace, ref.Name, ref.UID).(*appsv1.DaemonSet)
		most := 1
		if ok && ds.Spec.UpdateStrategy.RollingUpdate != nil && scaled(ds.Spec.UpdateStrategy.RollingUpdate.MaxSurge, 100, true) > 0 {
			most = 2
		}
		if n > most {
			v.broken("DaemonSet %s/%s has %d pods for node %s", pod.Namespace, ref.Name, n, target)
		}
	case "Job":
		job, ok := v.owner(ref.Kind, pod.Namespace, ref.Name, ref.UID).(*batchv1.Job)
		if !ok {
			return
		}
		v.checks["Job: never too many"]++
		if len(mine) > int(*job.Spec.Parallelism) {
			v.broken("Job %s/%s has %d active pods, wants %d at most", job.Namespace, job.Name, len(mine), *job.Spec.Parallelism)
		}
	}
}

// pinned is the node that a DaemonSet's pod is for.
func pinned(p *corev1.Pod) string {
	if a := p.Spec.Affinity; a != nil && a.NodeAffinity != nil && a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil {
		for _, t := range a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms {
			for _, f := range t.MatchFields {
				if f.Key == "metadata.name" && len(f.Values) == 1 {
					return f.Values[0]
				}
			}
		}
	}
	return p.Spec.NodeName
}

func (v *invariants) job(uid types.UID) *jobCount {
	if v.jobs[uid] == nil {
		v.jobs[uid] = &jobCount{succeeded: map[types.UID]bool{}, failed: map[types.UID]bool{}}
	}
	return v.jobs[uid]
}

func (v *invariants) jobPod(uid types.UID, old, cur *corev1.Pod) {
	j := v.job(uid)
	p := cur
	if p == nil {
		p = old
	}
	switch {
	case p.Status.Phase == corev1.PodSucceeded:
		j.succeeded[p.UID] = true
	case p.Status.Phase == corev1.PodFailed, p.DeletionTimestamp != nil, cur == nil:
		j.failed[p.UID] = true
	}
}

// jobChanged checks a Job's counts against what really happened.
func (v *invariants) jobChanged(job *batchv1.Job) {
	j := v.job(job.UID)
	v.checks["Job: exact counts"]++
	if int(job.Status.Succeeded) > len(j.succeeded) || int(job.Status.Failed) > len(j.failed) {
		v.broken("Job %s/%s counts %d succeeded and %d failed pods of %d and %d that were", job.Namespace, job.Name,
			job.Status.Succeeded, job.Status.Failed, len(j.succeeded), len(j.failed))
	}
	if job.Status.Succeeded < j.lastSucceeded && job.Spec.CompletionMode != nil && *job.Spec.CompletionMode != batchv1.IndexedCompletion || job.Status.Failed < j.lastFailed {
		v.broken("Job %s/%s counted %d succeeded and %d failed, now %d and %d", job.Namespace, job.Name, j.lastSucceeded, j.lastFailed, job.Status.Succeeded, job.Status.Failed)
	}
	j.lastSucceeded, j.lastFailed = job.Status.Succeeded, job.Status.Failed
	for _, c := range job.Status.Conditions {
		if c.Type == batchv1.JobComplete && c.Status == corev1.ConditionTrue && job.Spec.Completions != nil && job.Spec.SuccessPolicy == nil && job.Status.Succeeded != *job.Spec.Completions {
			v.broken("Job %s/%s is complete with %d of %d", job.Namespace, job.Name, job.Status.Succeeded, *job.Spec.Completions)
		}
	}
}

// evicted is told, under the store's lock, of a granted eviction, after the pod was marked.
func (v *invariants) evicted(pod *corev1.Pod) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for at, e := range v.s.tables[budgetsGVR].objs {
		b := e.obj.(*policyv1.PodDisruptionBudget)
		sel, err := metav1.LabelSelectorAsSelector(b.Spec.Selector)
		if err != nil || at.ns != pod.Namespace || !sel.Matches(labels.Set(pod.Labels)) {
			continue
		}
		ref := metav1.GetControllerOf(pod)
		if ref == nil || v.hurtLately(ref.UID, v.sets[ref.UID]) {
			continue
		}
		healthy, expected := 0, 0
		for pk, pe := range v.s.tables[podsGVR].objs {
			if p := pe.obj.(*corev1.Pod); pk.ns == at.ns && sel.Matches(labels.Set(p.Labels)) && ready(p) {
				healthy++
			}
		}
		if d, _ := v.deployment(pod.Namespace, v.sets[ref.UID]); d != nil {
			expected = int(*d.Spec.Replicas)
		} else if set, ok := v.owner(ref.Kind, pod.Namespace, ref.Name, ref.UID).(*appsv1.StatefulSet); ok {
			expected = int(*set.Spec.Replicas)
		} else {
			continue
		}
		want := 0
		if b.Spec.MinAvailable != nil {
			want = scaled(b.Spec.MinAvailable, int32(expected), true)
		} else if b.Spec.MaxUnavailable != nil {
			want = expected - scaled(b.Spec.MaxUnavailable, int32(expected), true)
		}
		v.checks["budget"]++
		if healthy < want {
			v.broken("budget %s: the eviction of %s left %d healthy, %d are wanted", at, pod.Name, healthy, want)
		}
	}
}

// hurtLately says that a budget's status may not show yet how its pods are.
func (v *invariants) hurtLately(uids ...types.UID) bool {
	for _, uid := range uids {
		if t, ok := v.hurt[uid]; ok && time.Since(t) < 2*time.Second {
			return true
		}
	}
	return time.Now().Before(v.calm)
}
