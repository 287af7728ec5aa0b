package placement

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	v1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// NodeReport is all that one node has to say about a pod. It is what `skein
// why` shows, so its JSON changes only by adding fields.
type NodeReport struct {
	Node string `json:"node"`
	// Refusals are those of every filter that refuses, not of the first alone: a
	// change has to answer them all.
	Refusals []FilterReport `json:"refusals,omitempty"`
	// Scores are weighted, and Total is their sum; of nodes that could take the pod.
	Scores []ScoreReport `json:"scores,omitempty"`
	Total  int64         `json:"total,omitempty"`
	// Evict names pods of lower priority whose eviction would make room, the most
	// important first, and BreaksBudgets how many of the evictions a disruption
	// budget forbids.
	Evict         []string `json:"evict,omitempty"`
	BreaksBudgets int      `json:"breaksBudgets,omitempty"`
}

// FilterReport is why one filter refuses.
type FilterReport struct {
	Filter  Filter   `json:"filter"`
	Reasons []string `json:"reasons"`           // upstream's words
	Details []string `json:"details,omitempty"` // with names and numbers
	// Help is what would change the filter's mind, of which each line is enough.
	Help []string `json:"help,omitempty"`
}

// ScoreReport is what one rule gives.
type ScoreReport struct {
	Rule   string `json:"rule"`
	Points int64  `json:"points"`
}

// Report asks every node about a pod that holds nothing in the snapshot, in
// the order of their names. The snapshot is the same afterwards. It costs a few
// passes over the nodes, so it is for people, not for decisions.
func (s *Snapshot) Report(req Request) ([]NodeReport, error) {
	rules := req.Profile
	if rules == nil {
		rules = DefaultProfile()
	}
	// What is remembered of classes of pods is of no use to the profiles made here, and theirs to nobody else.
	remembered := s.classes
	s.classes = newClassCache()
	defer func() { s.classes = remembered }()
	first, err := s.Explain(req)
	if err != nil {
		return nil, err
	}
	out := make([]NodeReport, len(first))
	for i := range first {
		out[i].Node = first[i].Node
		if first[i].Filter == "" {
			out[i].Scores, out[i].Total = scoresOf(first[i].Scores)
		}
	}
	// A node is refused by the first filter that does. The first of those that
	// refused anybody is left out, and all are asked again, until none is left; not
	// all of them at once, or a node that an early one refused would not be asked
	// about those that only other nodes have named so far.
	off := maps.Clone(rules.Off)
	if off == nil {
		off = map[Filter]bool{}
	}
	for round := first; ; {
		for i := range round {
			f := round[i].Filter
			if f == TaintToleration && cordonedOnly(req.Pod, s.nodes[out[i].Node]) {
				continue // NodeUnschedulable has said it
			}
			if f == "" || slices.ContainsFunc(out[i].Refusals, func(r FilterReport) bool { return r.Filter == f }) {
				continue
			}
			out[i].Refusals = append(out[i].Refusals, s.filterReport(req.Pod, s.nodes[out[i].Node], f, round[i].Reasons))
		}
		next := slices.IndexFunc(Filters(), func(f Filter) bool {
			return !off[f] && slices.ContainsFunc(round, func(e Explanation) bool { return e.Filter == f })
		})
		if next < 0 {
			break
		}
		off[Filters()[next]] = true
		relaxed := *rules
		relaxed.Off = maps.Clone(off)
		again := req
		again.Profile = &relaxed
		if round, err = s.Explain(again); err != nil {
			return nil, err
		}
	}
	if !slices.ContainsFunc(out, func(r NodeReport) bool { return len(r.Refusals) == 0 }) && !neverPreempts(req.Pod, rules) {
		s.reportEvictions(req, out)
	}
	return out, nil
}

// cordonedOnly says that the only taint that the pod does not tolerate is that of a cordoned node.
func cordonedOnly(pod *v1.Pod, n *node) bool {
	return n != nil && n.obj != nil && !n.lost && n.obj.Spec.Unschedulable && !slices.ContainsFunc(n.hardTaints, func(t v1.Taint) bool {
		return t.Key != v1.TaintNodeUnschedulable && !tolerates(pod.Spec.Tolerations, &t)
	})
}

func neverPreempts(pod *v1.Pod, rules *Profile) bool {
	return rules.NoPreemption || pod.Spec.PreemptionPolicy != nil && *pod.Spec.PreemptionPolicy == v1.PreemptNever
}

func (s *Snapshot) reportEvictions(req Request, out []NodeReport) {
	for _, p := range s.Preemptions(req) {
		i := slices.IndexFunc(out, func(r NodeReport) bool { return r.Node == p.Node })
		if i < 0 {
			continue
		}
		for _, victim := range p.Victims {
			out[i].Evict = append(out[i].Evict, victim.Namespace+"/"+victim.Name)
		}
		out[i].BreaksBudgets = p.Violations
	}
}

// plugins are upstream's names of the rules that score.
var plugins = map[string]string{
	"Taints": "TaintToleration", "Spread": "PodTopologySpread", "InterPod": "InterPodAffinity",
	"Fit": "NodeResourcesFit", "Balanced": "NodeResourcesBalancedAllocation",
}

// scoresOf lists the fields of Scores, whichever there are.
func scoresOf(scores Scores) (out []ScoreReport, total int64) {
	v := reflect.ValueOf(scores)
	for i := range v.NumField() {
		name := v.Type().Field(i).Name
		out = append(out, ScoreReport{cmp.Or(plugins[name], name), v.Field(i).Int()})
	}
	return out, scores.Total()
}

// filterReport puts names and numbers to a refusal.
func (s *Snapshot) filterReport(pod *v1.Pod, n *node, f Filter, reasons []string) FilterReport {
	r := FilterReport{Filter: f, Reasons: reasons}
	if n == nil || n.obj == nil {
		return r
	}
	switch f {
	case NodeUnschedulable:
		r.detail("it is cordoned")
		r.help("kubectl uncordon %s", n.name)
	case NodeName:
		r.detail("the pod asks for node %s", pod.Spec.NodeName)
	case TaintToleration:
		s.reportTaints(&r, pod, n)
	case NodeAffinity:
		reportAffinity(&r, pod, n)
	case NodePorts:
		reportPorts(&r, pod, n)
	case NodeResourcesFit:
		reportFit(&r, pod, n)
	case PodTopologySpread:
		reportSpread(&r, pod, n)
	case InterPodAffinity:
		s.reportInterPod(&r, pod, n)
	case DynamicResources:
		s.reportDevices(&r, pod, n)
	}
	return r
}

func (r *FilterReport) detail(format string, a ...any) {
	r.Details = append(r.Details, fmt.Sprintf(format, a...))
}
func (r *FilterReport) help(format string, a ...any) {
	r.Help = append(r.Help, fmt.Sprintf(format, a...))
}

func (s *Snapshot) reportTaints(r *FilterReport, pod *v1.Pod, n *node) {
	if n.lost && !tolerates(pod.Spec.Tolerations, &unreachableTaint) {
		r.detail("nobody hears of it")
		r.help("node %s comes back", n.name)
		return
	}
	var open []string
	for i := range n.hardTaints {
		if t := &n.hardTaints[i]; !tolerates(pod.Spec.Tolerations, t) {
			open = append(open, t.ToString())
		}
	}
	r.detail("taint %s", strings.Join(open, ", "))
	r.help("a toleration for %s", strings.Join(open, " and "))
	r.help("kubectl taint node %s %s-", n.name, strings.Join(open, "- "))
}

func reportAffinity(r *FilterReport, pod *v1.Pod, n *node) {
	for _, key := range slices.Sorted(maps.Keys(pod.Spec.NodeSelector)) {
		want := pod.Spec.NodeSelector[key]
		if have, ok := n.obj.Labels[key]; have != want {
			r.detail("the node selector wants %s=%s, it has %s", key, want, orNone(have, ok))
			r.help("kubectl label node %s %s=%s%s", n.name, key, want, overwrite(ok))
		}
	}
	a := pod.Spec.Affinity
	if a == nil || a.NodeAffinity == nil || a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return
	}
	terms := a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms
	for i := range terms {
		for _, e := range slices.Concat(terms[i].MatchFields, terms[i].MatchExpressions) {
			have, ok := n.obj.Labels[e.Key]
			if e.Key == metav1.ObjectNameField {
				have, ok = n.name, true
			}
			if !meets(e, have, ok) {
				of := ""
				if len(terms) > 1 {
					of = fmt.Sprintf(" (alternative %d of %d)", i+1, len(terms))
				}
				r.detail("its affinity wants %s %s %s%s, it has %s", e.Key, strings.ToLower(string(e.Operator)), strings.Join(e.Values, ","), of, orNone(have, ok))
			}
		}
	}
}

// meets is one requirement of a node selector.
func meets(e v1.NodeSelectorRequirement, have string, ok bool) bool {
	selector, err := metav1.LabelSelectorAsSelector(&metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{
		Key: "x", Operator: metav1.LabelSelectorOperator(e.Operator), Values: e.Values}}})
	if err != nil {
		return true // Gt and Lt; others are told by the reason alone
	}
	set := labels.Set{}
	if ok {
		set["x"] = have
	}
	return selector.Matches(set)
}

func orNone(value string, ok bool) string {
	if !ok {
		return "none"
	}
	return value
}

func overwrite(ok bool) string {
	if ok {
		return " --overwrite"
	}
	return ""
}

func reportPorts(r *FilterReport, pod *v1.Pod, n *node) {
	for _, want := range hostPortsOf(pod) {
		for _, other := range n.pods {
			for _, taken := range other.ports {
				if want.clashes(taken) {
					r.detail("host port %d/%s is %s/%s's", want.port, want.protocol, other.pod.namespace, other.pod.name)
					r.help("another host port than %d", want.port)
				}
			}
		}
	}
}

func reportFit(r *FilterReport, pod *v1.Pod, n *node) {
	if int64(len(n.pods))+1 > n.allocPods {
		r.detail("%d of %d pods", len(n.pods), n.allocPods)
	}
	want := PodRequest(pod, false)
	var help []string // all of it is needed
	one := func(name v1.ResourceName, want, used, alloc int64, text func(int64) string) {
		free := max(alloc-used, 0)
		if want <= free {
			return
		}
		r.detail("%s: wants %s, %s of %s free", name, text(want), text(free), text(alloc))
		switch {
		case alloc == 0 && isScalar(name):
			help = append(help, fmt.Sprintf("a driver that offers %s there, or no request of it", name))
		case want > alloc:
			help = append(help, fmt.Sprintf("a request of at most %s of %s (the whole node has %s)", text(free), name, text(alloc)))
		default:
			help = append(help, fmt.Sprintf("%s more of %s free, or a request of at most %s", text(want-free), name, text(free)))
		}
	}
	milli := func(v int64) string { return resource.NewMilliQuantity(v, resource.DecimalSI).String() }
	bytes := func(v int64) string { return resource.NewQuantity(v, resource.BinarySI).String() }
	plain := func(v int64) string { return resource.NewQuantity(v, resource.DecimalSI).String() }
	one(v1.ResourceCPU, want.MilliCPU, n.used.MilliCPU, n.alloc.MilliCPU, milli)
	one(v1.ResourceMemory, want.Memory, n.used.Memory, n.alloc.Memory, bytes)
	one(v1.ResourceEphemeralStorage, want.EphemeralStorage, n.used.EphemeralStorage, n.alloc.EphemeralStorage, bytes)
	for _, name := range slices.Sorted(maps.Keys(want.Scalars)) {
		one(name, want.Scalars[name], n.used.Scalars[name], n.alloc.Scalars[name], plain)
	}
	if len(help) > 0 {
		r.help("%s", strings.Join(help, "; and "))
	}
}

// reportDevices counts the devices of the classes that the pod's claims ask for.
func (s *Snapshot) reportDevices(r *FilterReport, pod *v1.Pod, n *node) {
	claims, err := s.PodClaims(pod)
	if err != nil {
		return // the reason says so
	}
	for _, claim := range claims {
		if claim.Status.Allocation != nil {
			continue
		}
		for i := range claim.Spec.Devices.Requests {
			request := claim.Spec.Devices.Requests[i].Exactly
			if request == nil || s.devices.classes[request.DeviceClassName] == nil {
				continue
			}
			wants := fmt.Sprint(request.Count)
			if request.AllocationMode == resourceapi.DeviceAllocationModeAll {
				wants = "all"
			}
			all, taken := s.devices.total(n.obj, s.devices.classes[request.DeviceClassName])
			r.detail("claim %s, request %s: wants %s of class %s, %d of %d there are free", claim.Name, claim.Spec.Devices.Requests[i].Name, wants, request.DeviceClassName, all-taken, all)
		}
	}
}

func reportSpread(r *FilterReport, pod *v1.Pod, n *node) {
	for i := range pod.Spec.TopologySpreadConstraints {
		c := &pod.Spec.TopologySpreadConstraints[i]
		if c.WhenUnsatisfiable != v1.DoNotSchedule {
			continue
		}
		if domain, ok := n.obj.Labels[c.TopologyKey]; ok {
			r.detail("one more in %s=%s would exceed maxSkew %d", c.TopologyKey, domain, c.MaxSkew)
		} else {
			r.detail("it has no label %s", c.TopologyKey)
			r.help("kubectl label node %s %s=...", n.name, c.TopologyKey)
		}
	}
}

// maxNamed bounds the pods that a refusal names.
const maxNamed = 3

// reportInterPod names the pods that are in the way, or says what is missing.
func (s *Snapshot) reportInterPod(r *FilterReport, pod *v1.Pod, n *node) {
	own, err := termsOf(pod)
	if err != nil {
		return // the reason says it
	}
	for i := range own.required {
		t := &own.required[i]
		if where, ok := n.obj.Labels[t.topologyKey]; !ok {
			r.detail("it has no label %s, which the pod's affinity asks for", t.topologyKey)
		} else if len(s.inDomain(t, where, func(o who) bool { return t.matches(o, s.namespaces[o.namespace]) })) == 0 {
			r.detail("no pod with %s in %s=%s", t.selector, t.topologyKey, where)
			r.help("a pod with %s there", t.selector)
		}
	}
	for i := range own.requiredAnti {
		t := &own.requiredAnti[i]
		if where, ok := n.obj.Labels[t.topologyKey]; ok {
			if there := s.inDomain(t, where, func(o who) bool { return t.matches(o, s.namespaces[o.namespace]) }); len(there) > 0 {
				r.detail("in %s=%s there is %s, which the pod does not want to be near", t.topologyKey, where, strings.Join(there, ", "))
			}
		}
	}
	var against []string
	for _, o := range s.pods {
		if o.node == nil || o.node.obj == nil {
			continue
		}
		for i := range o.terms.requiredAnti {
			t := &o.terms.requiredAnti[i]
			where, ok := n.obj.Labels[t.topologyKey]
			if ok && o.node.obj.Labels[t.topologyKey] == where && t.matches(whoIs(pod), s.namespaces[pod.Namespace]) {
				against = append(against, fmt.Sprintf("%s/%s in %s=%s does not want to be near the pod", o.pod.namespace, o.pod.name, t.topologyKey, where))
			}
		}
	}
	slices.Sort(against)
	r.Details = append(r.Details, against[:min(len(against), maxNamed)]...)
}

// inDomain names pods in a domain, the first few.
func (s *Snapshot) inDomain(t *affinityTerm, where string, match func(who) bool) (out []string) {
	for _, o := range s.pods {
		if o.node != nil && o.node.obj != nil && o.node.obj.Labels[t.topologyKey] == where && match(o.pod.who) {
			out = append(out, o.pod.namespace+"/"+o.pod.name)
		}
	}
	slices.Sort(out)
	return out[:min(len(out), maxNamed)]
}
