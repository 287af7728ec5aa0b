package placement

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"

	v1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	corev1helpers "k8s.io/component-helpers/scheduling/corev1"
)

// Preemption is a way to make room: evict the victims, and the pod fits.
type Preemption struct {
	Node       string
	Victims    []*v1.Pod // of lower priority, the most important first; see presence.object
	Violations int       // how many of the evictions break a disruption budget
}

// Nominate keeps what pod needs on the named node free from pods of lower
// priority, until Unnominate or SetPod: to all filters such a pod is there.
func (s *Snapshot) Nominate(pod *v1.Pod, nodeName string) {
	s.Unnominate(pod.UID)
	info, err := newPodInfo(pod, false)
	if err != nil {
		return // such a pod fits nowhere
	}
	info.node = s.ensureNode(nodeName)
	info.node.nominated = append(info.node.nominated, info)
	s.waited[info.node.slot]++
	s.nominated[pod.UID] = info
}

// Unnominate gives up what Nominate keeps free; unknown UIDs are ignored.
func (s *Snapshot) Unnominate(uid types.UID) {
	info := s.nominated[uid]
	if info == nil {
		return
	}
	delete(s.nominated, uid)
	info.node.nominated = slices.DeleteFunc(info.node.nominated, func(o *podInfo) bool { return o == info })
	s.waited[info.node.slot]--
	s.dropIfUnused(info.node)
}

// NominatedTo is the node on which room is kept for the pod; "": none. If there is no word of Nominate, it is the one that
// the pod's status names.
func (s *Snapshot) NominatedTo(pod *v1.Pod) string {
	if info := s.nominated[pod.UID]; info != nil {
		return info.node.name
	}
	return pod.Status.NominatedNodeName
}

// NominatedBelow lists the pods of a priority below the given one for which room
// is kept on the named node; see presence.object.
func (s *Snapshot) NominatedBelow(nodeName string, limit int32) (below []*v1.Pod) {
	n := s.nodes[nodeName]
	if n == nil {
		return nil
	}
	for _, info := range n.nominated {
		if info.pod.priority < limit {
			below = append(below, info.pod.object())
		}
	}
	return below
}

// heldFor lists the pods nominated to the node that go before the planned one.
func (n *node) heldFor(p *plan) (before []*podInfo) {
	for _, info := range n.nominated {
		if info.pod.uid != p.pod.UID && info.pod.priority >= priority(p.pod) {
			before = append(before, info)
		}
	}
	return before
}

// arrive takes pods to be on the node (sign 1), or away again (-1), for the
// plan's eyes only: sums, ports, and what the plan counts per domain.
func (p *plan) arrive(infos []*podInfo, n *node, sign int64) {
	p.occupy(infos, n, sign)
	for _, info := range infos {
		p.count(info, n, sign)
	}
}

// occupy is the part of it that concerns the node alone.
func (p *plan) occupy(infos []*podInfo, n *node, sign int64) {
	for _, info := range infos {
		n.sum(info, sign)
		p.s.storage.use(&info.pod, int(sign))
		if sign > 0 {
			n.pods = append(n.pods, info)
		} else {
			n.pods[len(n.pods)-1] = nil
			n.pods = n.pods[:len(n.pods)-1]
		}
	}
}

// count changes what the plan knows about domains as if a pod came or went.
func (p *plan) count(info *podInfo, n *node, sign int64) {
	p.spreadTrial(&info.pod, n, sign)
	p.interTrial(info, n, sign)
}

func priority(pod *v1.Pod) int32 { return corev1helpers.PodPriority(pod) }

// preemptionText words why preemption does not help, as upstream does; tried
// are the reasons of the nodes on which it was tried.
func (p *plan) preemptionText(tried map[string]int) string {
	if policy := p.pod.Spec.PreemptionPolicy; policy != nil && *policy == v1.PreemptNever {
		return reasonPreemptNever
	}
	reasons, told := map[string]int{}, tried[""]
	for reason, n := range tried {
		if reason != "" {
			reasons[reason] = n
		}
	}
	if rest := len(p.s.order) - told; rest > 0 {
		reasons[reasonPreemptNoHelp] += rest
	}
	return fmt.Sprintf("0/%d nodes are available: %s.", len(p.s.order), histogram(reasons))
}

// preempt looks for the node from which the least harmful set of pods of
// lower priority can be evicted so that the pod fits. If there is none it
// says so in the refusal. Pods are taken away on trial and put back: the
// snapshot is the same afterwards.
func (p *plan) preempt(candidates []*node, budgets []*policyv1.PodDisruptionBudget, refusal *Refusal, rnd *rand.Rand) *Preemption {
	if len(p.s.order) == 0 || p.rules.NoPreemption {
		return nil
	}
	if policy := p.pod.Spec.PreemptionPolicy; policy != nil && *policy == v1.PreemptNever {
		refusal.Preemption = reasonPreemptNever
		return nil
	}
	if p.evictionUnderWay(candidates) {
		refusal.Preemption, refusal.EvictionUnderWay = reasonPreemptWaiting, true
		return nil
	}
	if n := len(candidates); n > 0 && !p.s.anyBelow(priority(p.pod)) {
		refusal.Preemption = p.preemptionText(map[string]int{"": n, reasonPreemptNoVictims: n})
		return nil
	}
	offset := 0
	if len(candidates) > 0 {
		offset = rnd.IntN(len(candidates))
	}
	limit := max(int(p.rules.MinPreemptionNodes), len(candidates)*int(p.rules.MinPreemptionPercent)/100)
	found, tried := p.options(candidates, budgets, offset, limit)
	if len(found) == 0 {
		refusal.Preemption = p.preemptionText(tried)
		return nil
	}
	return slices.MinFunc(found, compareHarm)
}

// options tries eviction on candidates from offset on until limit ways are
// found, one of them without breaking a budget. The reasons of the others are
// counted in tried.
func (p *plan) options(candidates []*node, budgets []*policyv1.PodDisruptionBudget, offset, limit int) (found []*Preemption, tried map[string]int) {
	tried = map[string]int{}
	pdbs := parseBudgets(budgets)
	clean := 0
	for i := range candidates {
		if clean > 0 && len(found) >= limit {
			break
		}
		if option := p.victimsOn(candidates[(offset+i)%len(candidates)], pdbs, tried); option != nil {
			found = append(found, option)
			if option.Violations == 0 {
				clean++
			}
		}
	}
	return found, tried
}

// Preemptions lists, in the order of the nodes, every way in which evicting
// pods of lower priority would make room for a pod that fits nowhere.
func (s *Snapshot) Preemptions(req Request) []*Preemption {
	p := s.newPlan(&req)
	defer p.end()
	if p.whole != "" {
		return nil
	}
	_, candidates := p.refusal()
	found, _ := p.options(candidates, req.Budgets, 0, math.MaxInt)
	return found
}

// anyBelow reports whether there is any pod of lower priority.
func (s *Snapshot) anyBelow(priority int32) bool {
	for p := range s.priorities {
		if p < priority {
			return true
		}
	}
	return false
}

// evictionUnderWay reports whether pods that were evicted for this one are
// still ending on its nominated node: then nothing more is evicted.
func (p *plan) evictionUnderWay(candidates []*node) bool {
	n := p.s.nodes[p.s.NominatedTo(p.pod)]
	return n != nil && slices.Contains(candidates, n) && (p.evicting || n.endingFor(p.pod))
}

// EvictionUnderWay reports whether pods that were evicted for one of the pod's priority are still ending on the node.
func (s *Snapshot) EvictionUnderWay(pod *v1.Pod, nodeName string) bool {
	n := s.nodes[nodeName]
	return n != nil && n.endingFor(pod)
}

func (n *node) endingFor(pod *v1.Pod) bool {
	return slices.ContainsFunc(n.pods, func(info *podInfo) bool {
		return info.pod.ending && info.pod.preempted && info.pod.priority < priority(pod)
	})
}

// victimsOn finds the smallest set of pods on one node, taken from the least
// important upwards, without which the pod fits. The reasons why not are
// counted in tried, the node itself under "".
func (p *plan) victimsOn(n *node, budgets []budget, tried map[string]int) *Preemption {
	var lower []*podInfo
	for _, info := range n.pods {
		if info.pod.priority < priority(p.pod) {
			lower = append(lower, info)
		}
	}
	if len(lower) == 0 {
		tried[""]++
		tried[reasonPreemptNoVictims]++
		return nil
	}
	slices.SortFunc(lower, byImportance)
	for _, info := range lower {
		p.leave(info, n)
	}
	if _, v := p.consider(n); !v.ok() {
		tried[""]++
		v.countIn(tried, 1)
		p.back(lower, n)
		return nil
	}
	option := &Preemption{Node: n.name}
	var victims []*podInfo
	breaking, free := splitByBudgets(lower, budgets)
	for i, info := range slices.Concat(breaking, free) {
		p.back([]*podInfo{info}, n)
		if _, v := p.consider(n); !v.ok() {
			p.leave(info, n)
			victims = append(victims, info)
			if i < len(breaking) {
				option.Violations++
			}
		}
	}
	p.back(victims, n)
	if len(victims) == 0 {
		// The node was refused and is not any more although nothing changed.
		panic("placement: preemption without a victim on node " + n.name)
	}
	slices.SortFunc(victims, byImportance)
	for _, info := range victims {
		option.Victims = append(option.Victims, info.pod.object())
	}
	return option
}

// leave takes a pod off its node on trial, back puts pods there again.
func (p *plan) leave(info *podInfo, n *node) {
	p.s.detach(info)
	p.count(info, n, -1)
}

func (p *plan) back(infos []*podInfo, n *node) {
	for _, info := range infos {
		p.s.attach(info, n)
		p.count(info, n, 1)
	}
}

// startNanos is when a pod started; one that has not is the youngest.
func startNanos(pod *v1.Pod) int64 {
	if pod.Status.StartTime == nil {
		return math.MaxInt64
	}
	return pod.Status.StartTime.UnixNano()
}

// byImportance orders pods of higher priority, then older ones, first.
func byImportance(a, b *podInfo) int {
	return cmp.Or(
		cmp.Compare(b.pod.priority, a.pod.priority),
		cmp.Compare(a.pod.started, b.pod.started),
		cmp.Compare(a.pod.uid, b.pod.uid),
	)
}

// budget is a disruption budget made ready to be asked.
type budget struct {
	*policyv1.PodDisruptionBudget
	selector labels.Selector
}

// parseBudgets leaves out those that cover no pod: with an empty selector, or
// one that cannot be parsed.
func parseBudgets(all []*policyv1.PodDisruptionBudget) []budget {
	var out []budget
	for _, b := range all {
		if selector, err := metav1.LabelSelectorAsSelector(b.Spec.Selector); err == nil && !selector.Empty() {
			out = append(out, budget{b, selector})
		}
	}
	return out
}

// covers leaves out pods whose eviction the budget has already counted.
func (b *budget) covers(pod *presence) bool {
	if b.Namespace != pod.namespace || len(pod.labels) == 0 || !b.selector.Matches(pod.labels) {
		return false
	}
	_, counted := b.Status.DisruptedPods[pod.name]
	return !counted
}

// splitByBudgets separates the pods whose eviction would break a budget,
// given that those before them in the list are evicted as well.
func splitByBudgets(infos []*podInfo, budgets []budget) (breaking, free []*podInfo) {
	left := make([]int32, len(budgets))
	for i := range budgets {
		left[i] = budgets[i].Status.DisruptionsAllowed
	}
	for _, info := range infos {
		broken := false
		for i := range budgets {
			if !budgets[i].covers(&info.pod) {
				continue
			}
			left[i]--
			broken = broken || left[i] < 0
		}
		if broken {
			breaking = append(breaking, info)
		} else {
			free = append(free, info)
		}
	}
	return breaking, free
}

// compareHarm orders options by upstream's criteria: fewer broken budgets, a
// less important most important victim, a smaller sum of priorities, fewer
// victims, and victims of the highest priority that started later.
func compareHarm(a, b *Preemption) int {
	sum := func(o *Preemption) (total int64) {
		for _, pod := range o.Victims {
			// Shifted to be positive, so that more victims of negative priority
			// do not look like less harm.
			total += int64(priority(pod)) + math.MaxInt32 + 1
		}
		return total
	}
	earliest := func(o *Preemption) int64 {
		first := int64(math.MaxInt64)
		for _, pod := range o.Victims {
			if priority(pod) == priority(o.Victims[0]) {
				first = min(first, startNanos(pod))
			}
		}
		return first
	}
	return cmp.Or(
		cmp.Compare(a.Violations, b.Violations),
		cmp.Compare(priority(a.Victims[0]), priority(b.Victims[0])),
		cmp.Compare(sum(a), sum(b)),
		cmp.Compare(len(a.Victims), len(b.Victims)),
		cmp.Compare(earliest(b), earliest(a)),
	)
}
