package simulate

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
)

func quantity(s string) *resource.Quantity {
	q := resource.MustParse(s)
	return &q
}

// unfinished says what is not yet as it should be in a cluster that nobody disturbs: nothing, in the end.
func (w *world) unfinished() (out []string) {
	add := func(format string, a ...any) {
		if len(out) < 30 {
			out = append(out, fmt.Sprintf(format, a...))
		}
	}
	w.nodesDone(add)
	w.workloadsDone(add)
	w.jobsDone(add)
	w.podsDone(add)
	w.trafficDone(add)
	w.volumesDone(add)
	w.devicesDone(add)
	w.scalesDone(add)
	w.quotasDone(add)
	w.nothingOrphaned(add)
	slices.Sort(out)
	return out
}

type complain func(format string, a ...any)

func (w *world) nodesDone(add complain) {
	cidrs := map[string]string{}
	for _, n := range all[*corev1.Node](w) {
		for _, c := range n.Status.Conditions {
			if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
				add("node %s is not ready: %s", n.Name, c.Message)
			}
		}
		if len(n.Spec.Taints) > 0 {
			add("node %s has taints %v", n.Name, n.Spec.Taints)
		}
		if other := cidrs[n.Spec.PodCIDR]; other != "" || n.Spec.PodCIDR == "" {
			add("node %s has pod network %q, as %s", n.Name, n.Spec.PodCIDR, other)
		}
		cidrs[n.Spec.PodCIDR] = n.Name
	}
}

func (w *world) workloadsDone(add complain) {
	for _, d := range all[*appsv1.Deployment](w) {
		s, n := d.Status, *d.Spec.Replicas
		if s.ObservedGeneration != d.Generation || s.Replicas != n || s.UpdatedReplicas != n || s.AvailableReplicas != n || s.UnavailableReplicas != 0 {
			add("Deployment %s/%s wants %d: %d pods, %d updated, %d available, generation %d of %d", d.Namespace, d.Name, n, s.Replicas, s.UpdatedReplicas, s.AvailableReplicas, s.ObservedGeneration, d.Generation)
		}
	}
	for _, s := range all[*appsv1.StatefulSet](w) {
		st, n := s.Status, *s.Spec.Replicas
		if st.ObservedGeneration != s.Generation || st.Replicas != n || st.ReadyReplicas != n || st.UpdatedReplicas != n || st.CurrentRevision != st.UpdateRevision {
			add("StatefulSet %s/%s wants %d: %d pods, %d ready, %d updated, revision %s of %s", s.Namespace, s.Name, n, st.Replicas, st.ReadyReplicas, st.UpdatedReplicas, st.CurrentRevision, st.UpdateRevision)
		}
	}
	nodes := len(all[*corev1.Node](w))
	for _, d := range all[*appsv1.DaemonSet](w) {
		if s := d.Status; int(s.DesiredNumberScheduled) != nodes || int(s.UpdatedNumberScheduled) != nodes || int(s.NumberAvailable) != nodes || s.NumberMisscheduled != 0 {
			add("DaemonSet %s/%s on %d nodes: %d desired, %d updated, %d available, %d misscheduled", d.Namespace, d.Name, nodes, s.DesiredNumberScheduled, s.UpdatedNumberScheduled, s.NumberAvailable, s.NumberMisscheduled)
		}
	}
}

func (w *world) jobsDone(add complain) {
	for _, j := range all[*batchv1.Job](w) {
		done := false
		for _, c := range j.Status.Conditions {
			done = done || (c.Type == batchv1.JobComplete || c.Type == batchv1.JobFailed) && c.Status == corev1.ConditionTrue
		}
		if !done || j.Status.Active != 0 || j.Status.UncountedTerminatedPods != nil && len(j.Status.UncountedTerminatedPods.Succeeded)+len(j.Status.UncountedTerminatedPods.Failed) > 0 {
			add("Job %s/%s is not done: %+v", j.Namespace, j.Name, j.Status)
		}
	}
}

func (w *world) podsDone(add complain) {
	running := map[types.UID]string{}
	w.agents.mu.Lock()
	for _, m := range w.agents.machines {
		for uid := range m.running {
			running[uid] = m.name
		}
	}
	w.agents.mu.Unlock()
	for _, p := range all[*corev1.Pod](w) {
		switch {
		case p.DeletionTimestamp != nil:
			add("pod %s/%s on %q is being deleted, with finalizers %v", p.Namespace, p.Name, p.Spec.NodeName, p.Finalizers)
		case podEnded(p):
			if len(p.Finalizers) > 0 {
				add("pod %s/%s has ended and has finalizers %v", p.Namespace, p.Name, p.Finalizers)
			}
		case p.Spec.NodeName == "":
			add("pod %s/%s has no node: %v", p.Namespace, p.Name, p.Status.Conditions)
		case running[p.UID] != p.Spec.NodeName:
			add("pod %s/%s on %s does not run there but on %q", p.Namespace, p.Name, p.Spec.NodeName, running[p.UID])
		case !ready(p):
			add("pod %s/%s on %s is not ready", p.Namespace, p.Name, p.Spec.NodeName)
		}
		delete(running, p.UID)
	}
	for uid, node := range running {
		add("a process of pod %s runs on %s; there is no such pod", uid, node)
	}
}

// trafficDone compares EndpointSlices and budgets with the pods that they are about.
func (w *world) trafficDone(add complain) {
	slices_ := map[key]map[string]bool{}
	for _, s := range all[*discoveryv1.EndpointSlice](w) {
		at := key{s.Namespace, s.Labels[discoveryv1.LabelServiceName]}
		if slices_[at] == nil {
			slices_[at] = map[string]bool{}
		}
		for _, e := range s.Endpoints {
			if e.Conditions.Ready != nil && *e.Conditions.Ready {
				for _, ip := range e.Addresses {
					slices_[at][ip] = true
				}
			}
		}
	}
	byApp := map[key]map[string]bool{}
	for _, p := range all[*corev1.Pod](w) {
		if !ready(p) {
			continue
		}
		at := key{p.Namespace, p.Labels["app"]}
		if byApp[at] == nil {
			byApp[at] = map[string]bool{}
		}
		byApp[at][p.Status.PodIP] = true
	}
	for _, s := range all[*corev1.Service](w) {
		if at := keyOf(s); !maps.Equal(slices_[at], byApp[at]) {
			add("Service %s leads to %d addresses, %d pods are ready; not at %v, wrongly at %v", at, len(slices_[at]), len(byApp[at]), lacking(byApp[at], slices_[at]), lacking(slices_[at], byApp[at]))
		}
	}
	for _, b := range all[*policyv1.PodDisruptionBudget](w) {
		sel, _ := metav1.LabelSelectorAsSelector(b.Spec.Selector)
		n := int32(0)
		for _, p := range all[*corev1.Pod](w) {
			if p.Namespace == b.Namespace && sel.Matches(labels.Set(p.Labels)) && ready(p) {
				n++
			}
		}
		if b.Status.CurrentHealthy != n || b.Status.ObservedGeneration != b.Generation || len(b.Status.DisruptedPods) > 0 {
			add("budget %s/%s counts %d of %d healthy, disrupted %v", b.Namespace, b.Name, b.Status.CurrentHealthy, n, b.Status.DisruptedPods)
		}
	}
}

// lacking lists what is in a and not in b.
func lacking(a, b map[string]bool) (out []string) {
	for k := range a {
		if !b[k] {
			out = append(out, k)
		}
	}
	slices.Sort(out)
	return out
}

// nothingOrphaned looks at everything that has an owner, is being deleted, or belongs to a namespace.
func (w *world) nothingOrphaned(add complain) {
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	uids := map[types.UID]bool{}
	for _, t := range w.s.tables {
		for _, e := range t.objs {
			uids[e.acc.GetUID()] = true
		}
	}
	for gvr, t := range w.s.tables {
		for at, e := range t.objs {
			if e.acc.GetDeletionTimestamp() != nil && gvr != podsGVR {
				add("%s %s is being deleted, with finalizers %v", gvr.Resource, at, e.acc.GetFinalizers())
			}
			if at.ns != "" && w.s.tables[namespacesGVR].objs[key{"", at.ns}] == nil {
				add("%s %s: its namespace is gone", gvr.Resource, at)
			}
			var gone []string
			for _, ref := range e.acc.GetOwnerReferences() {
				if !uids[ref.UID] {
					gone = append(gone, ref.Kind+"/"+ref.Name)
				}
			}
			if len(gone) > 0 {
				add("%s %s: its owners are gone: %s", gvr.Resource, at, strings.Join(gone, ", "))
			}
		}
	}
}
