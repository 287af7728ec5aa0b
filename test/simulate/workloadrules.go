package simulate

import (
	"fmt"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
)

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
