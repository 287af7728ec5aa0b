package scheduler

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/placement"
)

// Why says why a pod is where it is, or why it is nowhere. Its JSON is what
// `skein why -o json` prints; it changes only by adding fields.
type Why struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	// Node is where it is; "" if it waits.
	Node string `json:"node,omitempty"`
	// Since is when it was placed, by the clock of the leader of that time.
	Since time.Time `json:"since,omitzero"`
	// Summary is the answer in sentences.
	Summary []string `json:"summary"`
	// Message is what the condition PodScheduled and the event of a pod that waits say now.
	Message string `json:"message,omitempty"`
	// Nodes have their say as if the pod were to be placed now: those that could take it first, the best of them first.
	Nodes []placement.NodeReport `json:"nodes,omitempty"`
}

// Inspector answers questions about the placement of pods while the Run that it
// was given to works. The zero value is ready; one is used by one Run at a time.
type Inspector struct{ loop atomic.Pointer[loop] }

// ErrNotLeading says that no Run works here, so that nobody knows.
var ErrNotLeading = fmt.Errorf("this node does not place pods now")

// Why explains one pod, from what the scheduler knows and would decide by now.
// Errors are ErrNotLeading, and NotFound as the API has it.
func (i *Inspector) Why(namespace, name string) (Why, error) {
	l := i.loop.Load()
	if l == nil {
		return Why{}, ErrNotLeading
	}
	pod, err := l.view.podLister.Pods(namespace).Get(name)
	if err != nil {
		return Why{}, apierrors.NewNotFound(v1.Resource("pods"), name)
	}
	return l.why(pod)
}

// why asks all nodes about a pod. What it holds is taken off its node for the
// question, so that it does not stand in its own way.
func (l *loop) why(pod *v1.Pod) (Why, error) {
	w := Why{Namespace: pod.Namespace, Pod: pod.Name, Node: pod.Spec.NodeName}
	if c := podCondition(pod, v1.PodScheduled); c != nil && c.Status == v1.ConditionTrue {
		w.Since = c.LastTransitionTime.Time
	}
	if controller.PodTerminal(pod) {
		w.Summary = []string{fmt.Sprintf("It has ended (%s), so it holds nothing on any node.", pod.Status.Phase)}
		return w, nil
	}
	bound := pod.Spec.NodeName != ""
	asked := pod.DeepCopy()
	asked.Spec.NodeName = "" // where it is must not decide where it could be
	req := placement.Request{Pod: asked, Profile: l.profiles[pod.Spec.SchedulerName].profile, Peers: l.view.peers(pod), Budgets: l.view.budgets(pod), Now: l.clock.Now()}

	l.mu.Lock()
	at := l.snapshot.PodNode(pod.UID)
	if at != "" {
		l.snapshot.RemovePod(pod.UID)
	}
	nodes, err := l.snapshot.Report(req)
	if at != "" {
		l.snapshot.SetPod(pod, at)
	}
	l.mu.Unlock()
	if err != nil {
		return w, fmt.Errorf("explain pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	slices.SortStableFunc(nodes, func(a, b placement.NodeReport) int {
		return cmp.Or(cmp.Compare(min(len(a.Refusals), 1), min(len(b.Refusals), 1)), cmp.Compare(b.Total, a.Total), cmp.Compare(len(a.Refusals), len(b.Refusals)))
	})
	w.Nodes = nodes
	if bound {
		w.Summary = l.whyHere(pod, nodes)
	} else {
		w.Summary = l.whyNowhere(pod, at, nodes)
		if c := podCondition(pod, v1.PodScheduled); c != nil && c.Status == v1.ConditionFalse {
			w.Message = c.Message
		}
	}
	return w, nil
}

// whyHere is about a pod that is on a node.
func (l *loop) whyHere(pod *v1.Pod, nodes []placement.NodeReport) (out []string) {
	if _, ours := l.profiles[pod.Spec.SchedulerName]; !ours {
		out = append(out, fmt.Sprintf("It was placed by %q, not by this scheduler.", pod.Spec.SchedulerName))
	}
	if _, static := pod.Annotations[v1.MirrorPodAnnotationKey]; static {
		out = append(out, "It is a static pod: a file on that node asks for it.")
	}
	const moves = "pods that run are not moved for that."
	i := slices.IndexFunc(nodes, func(n placement.NodeReport) bool { return n.Node == pod.Spec.NodeName })
	fit := slices.IndexFunc(nodes, func(n placement.NodeReport) bool { return len(n.Refusals) > 0 })
	if fit < 0 {
		fit = len(nodes)
	}
	switch {
	case i < 0:
		return append(out, fmt.Sprintf("The node %s is not known any more.", pod.Spec.NodeName))
	case len(nodes[i].Refusals) > 0:
		return append(out, fmt.Sprintf("Were it placed now, %s would refuse it (%s); %s", pod.Spec.NodeName, reasonsOf(nodes[i]), moves))
	case fit == 1:
		return append(out, fmt.Sprintf("%s is the only one of %d nodes that can take it.", pod.Spec.NodeName, len(nodes)))
	case nodes[i].Total == nodes[0].Total:
		equals := 0
		for _, n := range nodes[:fit] {
			if n.Total == nodes[0].Total {
				equals++
			}
		}
		s := fmt.Sprintf("Of the %d nodes that can take it (%d in all) %s scores best", fit, len(nodes), pod.Spec.NodeName)
		if equals > 1 {
			s += fmt.Sprintf(", with %d others: chance decides among equals", equals-1)
		}
		return append(out, s+".")
	}
	return append(out, fmt.Sprintf("Were it placed now, %s would score %d and %s %d: things have changed since, and %s", nodes[0].Node, nodes[0].Total, pod.Spec.NodeName, nodes[i].Total, moves))
}

// whyNowhere is about a pod that waits; assumed is where it is being bound to.
func (l *loop) whyNowhere(pod *v1.Pod, assumed string, nodes []placement.NodeReport) (out []string) {
	if len(pod.Spec.SchedulingGates) > 0 {
		var gates []string
		for _, g := range pod.Spec.SchedulingGates {
			gates = append(gates, g.Name)
		}
		return []string{fmt.Sprintf("It is held back by its scheduling gates (%s): it is placed when whoever set them has removed them.", strings.Join(gates, ", "))}
	}
	if _, ours := l.profiles[pod.Spec.SchedulerName]; !ours {
		return []string{fmt.Sprintf("It waits for a scheduler of the name %q; here that may be one of %s.", pod.Spec.SchedulerName, strings.Join(slices.Sorted(maps.Keys(l.profiles)), ", "))}
	}
	if pod.DeletionTimestamp != nil {
		return []string{"It is being deleted, so it is not placed any more."}
	}
	if assumed != "" {
		return []string{fmt.Sprintf("It is being bound to %s.", assumed)}
	}
	if len(nodes) == 0 {
		return []string{"There is no node at all."}
	}
	if len(nodes[0].Refusals) == 0 {
		return []string{fmt.Sprintf("%s can take it: it is placed as soon as it is its turn.", nodes[0].Node)}
	}
	out = append(out, fmt.Sprintf("None of %d nodes can take it.", len(nodes)))
	if n := pod.Status.NominatedNodeName; n != "" {
		out = append(out, fmt.Sprintf("Pods of lower priority are being evicted from %s for it.", n))
		return out
	}
	best := slices.MinFunc(nodes, func(a, b placement.NodeReport) int {
		return cmp.Or(cmp.Compare(len(a.Refusals), len(b.Refusals)), cmp.Compare(a.Node, b.Node))
	})
	var help []string
	for _, r := range best.Refusals {
		if len(r.Help) > 0 {
			help = append(help, r.Help[0])
		}
	}
	if len(help) == len(best.Refusals) {
		out = append(out, fmt.Sprintf("The least that would help, on %s: %s.", best.Node, strings.Join(help, "; and ")))
	}
	for _, n := range nodes {
		if len(n.Evict) > 0 {
			out = append(out, "Evicting pods of lower priority would make room, see below; the scheduler does so by itself unless that cannot help.")
			break
		}
	}
	return out
}

func reasonsOf(n placement.NodeReport) string {
	var all []string
	for _, r := range n.Refusals {
		all = append(all, r.Reasons...)
	}
	return strings.Join(all, ", ")
}
