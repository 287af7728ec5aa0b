package daemonset

import (
	"cmp"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	schedulinghelpers "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/klog/v2"

	"skein.io/skein/scheduler/controller"
)

// input is all that plan looks at.
type input struct {
	set   *appsv1.DaemonSet
	hash  string // of the set's template: the label of pods that are up to date
	nodes []*corev1.Node
	pods  []*corev1.Pod // that the set controls, in any phase
	now   time.Time
	// backOff tells how long a node's failed pod has to stay before it is
	// replaced; nil for no time at all.
	backOff func(node string) time.Duration
}

// step is what one sync has to do.
type step struct {
	create []string // names of nodes that need a pod
	remove []*corev1.Pod
	ended  []*corev1.Pod // of remove: those that failed or succeeded, which is told in an event
	status appsv1.DaemonSetStatus
	again  time.Duration // when to look again though nothing changed; zero for never
}

func (s *step) after(d time.Duration) {
	if d > 0 && (s.again == 0 || d < s.again) {
		s.again = d
	}
}

// onNode is one node with the set's pods on it.
type onNode struct {
	node       *corev1.Node // nil if there is none of the name
	run, stay  bool         // a pod should run here; one that runs here may stay
	alive      []*corev1.Pod
	ending     bool // a pod is being deleted
	old, fresh *corev1.Pod
}

type planner struct {
	input
	places    map[string]*onNode
	names     []string
	available func(*corev1.Pod) bool
	out       step
	gone      map[*corev1.Pod]bool
}

// plan decides the next step: one pod on every node that should have one, none
// elsewhere, and old pods replaced within the limits of the update strategy.
func plan(in input) step {
	p := &planner{input: in, places: map[string]*onNode{}, gone: map[*corev1.Pod]bool{}}
	p.available = func(pod *corev1.Pod) bool {
		ok, wait := controller.PodAvailable(pod, in.set.Spec.MinReadySeconds, in.now)
		p.out.after(wait)
		return ok
	}
	p.sort()
	p.out.status = p.status()
	if in.set.DeletionTimestamp != nil {
		return p.out
	}
	for _, name := range p.names {
		p.manage(name, p.places[name])
	}
	if in.set.Spec.UpdateStrategy.Type == appsv1.RollingUpdateDaemonSetStrategyType {
		surge, unavailable := limits(in.set, int(p.out.status.DesiredNumberScheduled))
		if surge > 0 {
			p.rollSurging(surge)
		} else {
			p.roll(unavailable)
		}
	}
	return p.out
}

func (p *planner) at(node string) *onNode {
	o := p.places[node]
	if o == nil {
		o = &onNode{}
		p.places[node] = o
		p.names = append(p.names, node)
	}
	return o
}

func (p *planner) sort() {
	for _, n := range p.nodes {
		o := p.at(n.Name)
		o.node = n
		o.run, o.stay = shouldRun(p.set, n)
	}
	for _, pod := range p.pods {
		o := p.at(nodeOf(pod))
		switch {
		case pod.DeletionTimestamp != nil:
			o.ending = o.ending || !controller.PodTerminal(pod)
		default:
			o.alive = append(o.alive, pod)
		}
	}
	slices.Sort(p.names)
	for _, o := range p.places {
		// The bound before the others, then those that work (upstream does not look
		// at that, and so may keep the broken one of two), then the oldest.
		slices.SortFunc(o.alive, func(a, b *corev1.Pod) int {
			return cmp.Or(boolFirst(a.Spec.NodeName != "", b.Spec.NodeName != ""), boolFirst(controller.PodReady(a), controller.PodReady(b)),
				a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
		})
	}
}

func boolFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return -1
	}
	return 1
}

func (p *planner) drop(pod *corev1.Pod) {
	if !p.gone[pod] {
		p.gone[pod] = true
		p.out.remove = append(p.out.remove, pod)
	}
}

// manage sees to it that a node has the pod that it should have, and no more.
func (p *planner) manage(name string, o *onNode) {
	if !o.stay {
		for _, pod := range o.alive {
			p.drop(pod)
		}
		return
	}
	var running []*corev1.Pod
	for _, pod := range o.alive {
		if !controller.PodTerminal(pod) {
			running = append(running, pod)
			continue
		}
		if pod.Status.Phase == corev1.PodFailed && p.backOff != nil {
			// The node may refuse the pod again and again.
			if wait := p.backOff(name); wait > 0 {
				p.out.after(wait)
				continue
			}
		}
		p.out.ended = append(p.out.ended, pod)
		p.drop(pod)
	}
	surging := allowsSurge(p.set)
	for _, pod := range running {
		fresh := pod.Labels[appsv1.ControllerRevisionHashLabelKey] == p.hash
		switch {
		case !surging && o.old == nil && o.fresh == nil, surging && fresh && o.fresh == nil, surging && !fresh && o.old == nil:
			if fresh {
				o.fresh = pod
			} else {
				o.old = pod
			}
		default:
			p.drop(pod)
		}
	}
	if surging && o.old != nil && o.fresh != nil && (!controller.PodReady(o.old) || p.available(o.fresh)) {
		p.drop(o.old)
		o.old = nil
	}
	// A pod that ends still holds its node's ports and volumes; while surging two
	// may meet anyway.
	if o.run && len(running) == 0 && len(o.alive) == 0 && (!o.ending || surging) {
		p.out.create = append(p.out.create, name)
	}
}

// roll replaces old pods where they stand: those that do not work at once, the
// others as far as no more than limit nodes are without a pod that works.
func (p *planner) roll(limit int) {
	var candidates []*corev1.Pod
	down := 0
	for _, name := range p.names {
		switch o := p.places[name]; {
		case !o.run:
		case o.old == nil && (o.fresh == nil || !p.available(o.fresh)):
			down++
		case o.old == nil:
		case !p.available(o.old):
			down++
			p.drop(o.old)
		default:
			candidates = append(candidates, o.old)
		}
	}
	for _, pod := range candidates[:max(0, min(limit-down, len(candidates)))] {
		p.drop(pod)
	}
}

// rollSurging starts new pods beside old ones: where the old one does not work
// at once, elsewhere on no more than limit nodes at a time. manage removes the
// old one when the new one is available.
func (p *planner) rollSurging(limit int) {
	var candidates []string
	surging := 0
	for _, name := range p.names {
		switch o := p.places[name]; {
		case !o.run || o.old == nil:
		case o.fresh != nil:
			surging++
		case !p.available(o.old):
			p.out.create = append(p.out.create, name)
		default:
			candidates = append(candidates, name)
		}
	}
	p.out.create = append(p.out.create, candidates[:max(0, min(limit-surging, len(candidates)))]...)
}

func (p *planner) status() appsv1.DaemonSetStatus {
	s := *p.set.Status.DeepCopy()
	s.ObservedGeneration = p.set.Generation
	s.DesiredNumberScheduled, s.CurrentNumberScheduled, s.NumberMisscheduled = 0, 0, 0
	s.NumberReady, s.NumberAvailable, s.UpdatedNumberScheduled = 0, 0, 0
	for _, o := range p.places {
		switch {
		case o.node == nil:
		case !o.run:
			if len(o.alive) > 0 || o.ending {
				s.NumberMisscheduled++
			}
		default:
			s.DesiredNumberScheduled++
			if len(o.alive) == 0 && !o.ending {
				continue
			}
			s.CurrentNumberScheduled++
			if len(o.alive) == 0 {
				continue
			}
			pod := o.alive[0]
			if controller.PodReady(pod) {
				s.NumberReady++
				if p.available(pod) {
					s.NumberAvailable++
				}
			}
			if pod.Labels[appsv1.ControllerRevisionHashLabelKey] == p.hash {
				s.UpdatedNumberScheduled++
			}
		}
	}
	s.NumberUnavailable = s.DesiredNumberScheduled - s.NumberAvailable
	return s
}

func allowsSurge(set *appsv1.DaemonSet) bool {
	surge, _ := limits(set, 1)
	return surge > 0
}

// limits are the numbers of nodes that may have two pods, and none, during an
// update; shares of desired are rounded up, as upstream does.
func limits(set *appsv1.DaemonSet, desired int) (surge, unavailable int) {
	if set.Spec.UpdateStrategy.Type != appsv1.RollingUpdateDaemonSetStrategyType {
		return 0, 0
	}
	r := set.Spec.UpdateStrategy.RollingUpdate
	if r == nil {
		return 0, 1
	}
	scaled := func(v *intstr.IntOrString) int {
		n, err := intstr.GetScaledValueFromIntOrPercent(intstr.ValueOrDefault(v, intstr.FromInt32(0)), desired, true)
		if err != nil {
			return 0 // validation refuses it
		}
		return n
	}
	surge, unavailable = scaled(r.MaxSurge), scaled(r.MaxUnavailable)
	if desired > 0 && surge == 0 && unavailable == 0 {
		unavailable = 1 // as upstream: or nothing would ever be updated
	}
	return surge, unavailable
}

// shouldRun says whether a pod of the set should run on the node, and whether
// one that runs there may stay: a taint that only forbids new pods lets it.
func shouldRun(set *appsv1.DaemonSet, node *corev1.Node) (run, stay bool) {
	spec := &set.Spec.Template.Spec
	if spec.NodeName != "" && spec.NodeName != node.Name {
		return false, false
	}
	// An affinity that cannot be read matches nothing; validation refuses it.
	if fits, err := nodeaffinity.GetRequiredNodeAffinity(&corev1.Pod{Spec: *spec}).Match(node); err != nil || !fits {
		return false, false
	}
	tolerations := tolerations(spec)
	untolerated := func(effects ...corev1.TaintEffect) bool {
		_, found := schedulinghelpers.FindMatchingUntoleratedTaint(klog.Background(), node.Spec.Taints, tolerations,
			func(t *corev1.Taint) bool { return slices.Contains(effects, t.Effect) }, true)
		return found
	}
	if untolerated(corev1.TaintEffectNoExecute) {
		return false, false
	}
	return !untolerated(corev1.TaintEffectNoSchedule), true
}

// tolerations are the template's and those that every daemon has: it stays on
// its node whatever state that is in.
func tolerations(spec *corev1.PodSpec) []corev1.Toleration {
	all := slices.Clone(spec.Tolerations)
	add := func(key string, effect corev1.TaintEffect) {
		t := corev1.Toleration{Key: key, Operator: corev1.TolerationOpExists, Effect: effect}
		if !slices.ContainsFunc(all, func(o corev1.Toleration) bool { return o.MatchToleration(&t) }) {
			all = append(all, t)
		}
	}
	add(corev1.TaintNodeNotReady, corev1.TaintEffectNoExecute)
	add(corev1.TaintNodeUnreachable, corev1.TaintEffectNoExecute)
	for _, key := range []string{corev1.TaintNodeDiskPressure, corev1.TaintNodeMemoryPressure, corev1.TaintNodePIDPressure, corev1.TaintNodeUnschedulable} {
		add(key, corev1.TaintEffectNoSchedule)
	}
	if spec.HostNetwork {
		add(corev1.TaintNodeNetworkUnavailable, corev1.TaintEffectNoSchedule)
	}
	return all
}

// newPod is the set's pod for a node. The scheduler binds it: the affinity
// leaves it no other node.
func newPod(set *appsv1.DaemonSet, hash, node string) *corev1.Pod {
	t := set.Spec.Template.DeepCopy()
	if t.Labels == nil {
		t.Labels = map[string]string{}
	}
	t.Labels[appsv1.ControllerRevisionHashLabelKey] = hash
	if g := set.Annotations[appsv1.DeprecatedTemplateGeneration]; g != "" {
		t.Labels["pod-template-generation"] = g
	}
	t.Spec.Tolerations = tolerations(&t.Spec)
	t.Spec.Affinity = pinTo(t.Spec.Affinity, node)
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: set.Namespace, GenerateName: set.Name + "-",
			Labels: t.Labels, Annotations: t.Annotations, Finalizers: t.Finalizers,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(set, kind)},
		},
		Spec: t.Spec,
	}
}

// pinTo replaces what the affinity requires of nodes: the template's own terms
// have been looked at already.
func pinTo(a *corev1.Affinity, node string) *corev1.Affinity {
	if a == nil {
		a = &corev1.Affinity{}
	}
	if a.NodeAffinity == nil {
		a.NodeAffinity = &corev1.NodeAffinity{}
	}
	a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution = &corev1.NodeSelector{NodeSelectorTerms: []corev1.NodeSelectorTerm{{
		MatchFields: []corev1.NodeSelectorRequirement{{Key: metav1.ObjectNameField, Operator: corev1.NodeSelectorOpIn, Values: []string{node}}}}}}
	return a
}

// nodeOf is the node that the pod runs on or is meant for, "" if that cannot be told.
func nodeOf(pod *corev1.Pod) string {
	if pod.Spec.NodeName != "" {
		return pod.Spec.NodeName
	}
	a := pod.Spec.Affinity
	if a == nil || a.NodeAffinity == nil || a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution == nil {
		return ""
	}
	for _, term := range a.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms {
		for _, f := range term.MatchFields {
			if f.Key == metav1.ObjectNameField && f.Operator == corev1.NodeSelectorOpIn && len(f.Values) == 1 {
				return f.Values[0]
			}
		}
	}
	return ""
}
