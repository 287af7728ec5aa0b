package simulate

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"skein.io/skein/scheduler"
)

// process is what a pod is on its machine. It lives by the machine's rules, not by the API's: a pod that was deleted by force may still
// have one.
type process struct {
	uid    types.UID
	at     key
	node   string
	owner  string // kind/name of the controller
	ended  corev1.PodPhase
	ending bool
}

// machine is a node as it really is.
type machine struct {
	name    string
	up      bool // it has power
	linked  bool // the others and the API are in reach
	left    bool // for good
	boots   int
	running map[types.UID]*process
}

// agents are the machines of the cluster, their agents, and the failure detector that looks at them. What they do takes time drawn from
// the seed; every act of an agent is one write at one instant.
type agents struct {
	w *world

	mu       sync.Mutex // guards all below; taken before the store's
	machines map[string]*machine
	verdicts map[string]scheduler.NodeHealth
	subs     map[chan struct{}]bool
	acts     map[string]int
}

func newAgents(w *world) *agents {
	a := &agents{w: w, machines: map[string]*machine{}, verdicts: map[string]scheduler.NodeHealth{}, subs: map[chan struct{}]bool{}, acts: map[string]int{}}
	w.s.onCommit = append(w.s.onCommit, a.look)
	return a
}

// Verdicts and Subscribe are gossip's view.
func (a *agents) Verdicts() map[string]scheduler.NodeHealth {
	a.mu.Lock()
	defer a.mu.Unlock()
	return maps.Clone(a.verdicts)
}

func (a *agents) Subscribe() (<-chan struct{}, func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	ch := make(chan struct{}, 1)
	a.subs[ch] = true
	return ch, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.subs, ch)
	}
}

func (a *agents) judge(name string, state scheduler.NodeHealth) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.verdicts[name].State == state.State {
		return
	}
	a.verdicts[name] = state
	for ch := range a.subs {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}

// look is told of every commit, under the store's lock: it only plans.
func (a *agents) look(c commit) {
	switch {
	case c.kind.gvr == podsGVR:
		obj := c.cur
		if obj == nil {
			obj = c.old
		}
		pod := obj.(*corev1.Pod)
		if pod.Spec.NodeName != "" && c.who != "agent" {
			a.later(pod.Spec.NodeName, "pod/"+pod.Namespace+"/"+pod.Name, 10*time.Millisecond, 120*time.Millisecond, func() { a.care(pod.Spec.NodeName, keyOf(pod)) })
		}
	case c.kind.gvr == nodesGVR && c.cur != nil && c.who != "agent":
		name := c.cur.(*corev1.Node).Name
		a.later(name, "node", 50*time.Millisecond, 300*time.Millisecond, func() { a.report(name) })
	}
}

// later does fn after a while drawn for that node and matter.
func (a *agents) later(node, what string, lo, hi time.Duration, fn func()) {
	// The number of the act is kept under a lock of its own: look is called under the store's.
	a.w.drawMu.Lock()
	id := node + "|" + what
	a.w.draws[id]++
	n := a.w.draws[id]
	a.w.drawMu.Unlock()
	time.AfterFunc(between(lo, hi, draw(a.w.seed, id, n)), func() {
		if !a.w.over.Load() {
			fn()
		}
	})
}

// add makes a machine and its Node object.
func (a *agents) add(name, zone string, cpu, mem string) {
	a.mu.Lock()
	a.machines[name] = &machine{name: name, up: true, linked: true, boots: 1, running: map[types.UID]*process{}}
	a.mu.Unlock()
	n := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name, corev1.LabelTopologyZone: zone, corev1.LabelOSStable: "linux"}},
		Status: corev1.NodeStatus{
			Capacity:    corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(mem), corev1.ResourcePods: resource.MustParse("110")},
			Allocatable: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse(mem), corev1.ResourcePods: resource.MustParse("110")},
			Conditions:  readyConditions(),
		},
	}
	if _, err := a.w.s.create(a.w.s.kinds[nodesGVR], n, "agent"); err != nil {
		panic(err)
	}
	a.judge(name, scheduler.NodeHealth{State: scheduler.Alive, Since: time.Now()})
}

func readyConditions() []corev1.NodeCondition {
	now := metav1.Now()
	out := []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "KubeletReady", LastHeartbeatTime: now, LastTransitionTime: now}}
	for _, t := range []corev1.NodeConditionType{corev1.NodeMemoryPressure, corev1.NodeDiskPressure, corev1.NodePIDPressure} {
		out = append(out, corev1.NodeCondition{Type: t, Status: corev1.ConditionFalse, LastHeartbeatTime: now, LastTransitionTime: now})
	}
	return out
}

// speaks reports whether the node's agent can write now.
func (m *machine) speaks() bool { return m != nil && m.up && m.linked && !m.left }

// report writes the node's conditions if somebody else's are there.
func (a *agents) report(name string) {
	a.mu.Lock()
	m := a.machines[name]
	speaks := m.speaks()
	a.mu.Unlock()
	if !speaks {
		return
	}
	k := a.w.s.kinds[nodesGVR]
	e, err := a.w.s.get(k, key{"", name})
	if err != nil {
		return
	}
	for _, c := range e.obj.(*corev1.Node).Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
			return
		}
	}
	_, _ = a.w.s.change(k, key{"", name}, "status", "update", "agent", func(o runtime.Object) (runtime.Object, error) {
		n := o.(*corev1.Node)
		n.Status.Conditions = readyConditions()
		return n, nil
	})
}

// fail takes the power from a machine, or its link.
func (a *agents) fail(name string, power bool) {
	a.mu.Lock()
	m := a.machines[name]
	if power {
		m.up = false
		for _, p := range m.running {
			a.w.inv.stopped(p)
		}
		clear(m.running)
	} else {
		m.linked = false
	}
	a.mu.Unlock()
	a.later(name, "verdict", 2*time.Second, 4*time.Second, func() {
		a.mu.Lock()
		out := !m.up || !m.linked
		a.mu.Unlock()
		if out && !m.left {
			a.judge(name, scheduler.NodeHealth{State: scheduler.Dead, Since: time.Now()})
		}
	})
}

// heal gives power and link back.
func (a *agents) heal(name string) {
	a.mu.Lock()
	m := a.machines[name]
	if m.left {
		a.mu.Unlock()
		return
	}
	if !m.up {
		m.boots++
	}
	m.up, m.linked = true, true
	a.mu.Unlock()
	a.later(name, "verdict", 200*time.Millisecond, time.Second, func() {
		a.mu.Lock()
		speaks := m.speaks()
		a.mu.Unlock()
		if speaks {
			a.judge(name, scheduler.NodeHealth{State: scheduler.Alive, Since: time.Now()})
			a.report(name)
		}
	})
	a.later(name, "all", 300*time.Millisecond, 2*time.Second, func() { a.careAll(name) })
}

// leave takes a node out of the cluster for good: its pods end, its object goes as the leader removes it.
func (a *agents) leave(name string) {
	a.mu.Lock()
	m := a.machines[name]
	m.left = true
	for _, p := range m.running {
		a.w.inv.stopped(p)
	}
	clear(m.running)
	a.mu.Unlock()
	a.judge(name, scheduler.NodeHealth{State: scheduler.Left, Since: time.Now()})
	a.later(name, "leave", 50*time.Millisecond, time.Second, func() {
		_, _ = a.w.s.remove(a.w.s.kinds[nodesGVR], key{"", name}, metav1.DeleteOptions{}, "leader")
	})
}

// careAll looks at all that runs and should run on a node.
func (a *agents) careAll(name string) {
	at := map[key]bool{}
	entries, _ := a.w.s.list(a.w.s.kinds[podsGVR], "")
	for _, e := range entries {
		if e.obj.(*corev1.Pod).Spec.NodeName == name {
			at[keyOf(e.acc)] = true
		}
	}
	a.mu.Lock()
	for _, p := range a.machines[name].running {
		at[p.at] = true
	}
	a.mu.Unlock()
	for _, k := range slices.SortedFunc(maps.Keys(at), func(x, y key) int { return compare(x.String(), y.String()) }) {
		a.care(name, k)
	}
}

func compare(a, b string) int {
	switch {
	case a < b:
		return -1
	case a > b:
		return 1
	}
	return 0
}

// care brings one pod on one node a step further.
func (a *agents) care(node string, at key) {
	a.mu.Lock()
	defer a.mu.Unlock()
	m := a.machines[node]
	if !m.speaks() {
		return
	}
	var pod *corev1.Pod
	if e, err := a.w.s.get(a.w.s.kinds[podsGVR], at); err == nil {
		if p := e.obj.(*corev1.Pod); p.Spec.NodeName == node {
			pod = p
		}
	}
	for uid, p := range m.running {
		if p.at == at && (pod == nil || pod.UID != uid || podEnded(pod)) {
			a.w.inv.stopped(p) // its pod is gone: so is it
			delete(m.running, uid)
		}
	}
	if pod == nil {
		return
	}
	p := m.running[pod.UID]
	what := "pod/" + at.String() + "/" + string(pod.UID)
	again := func(lo, hi time.Duration, why string) {
		a.later(node, what+"/"+why, lo, hi, func() { a.care(node, at) })
	}
	switch {
	case pod.DeletionTimestamp != nil && p != nil && p.ended != "" && !podEnded(pod):
		a.finish(pod, p.ended)
	case pod.DeletionTimestamp != nil && p != nil && !p.ending:
		p.ending = true
		grace := 2 * time.Second
		if g := pod.DeletionGracePeriodSeconds; g != nil {
			grace = min(grace, time.Duration(*g)*time.Second)
		}
		boot := m.boots
		a.later(node, what+"/stop", 50*time.Millisecond, grace+51*time.Millisecond, func() {
			a.mu.Lock()
			if m.up && m.boots == boot && m.running[pod.UID] == p {
				a.w.inv.stopped(p)
				delete(m.running, pod.UID)
			}
			a.mu.Unlock()
			a.care(node, at)
		})
	case pod.DeletionTimestamp != nil && p != nil:
	case pod.DeletionTimestamp != nil:
		a.bury(pod)
	case podEnded(pod):
	case p == nil && pod.Status.Phase == corev1.PodRunning && pod.Spec.RestartPolicy == corev1.RestartPolicyNever:
		a.finish(pod, corev1.PodFailed) // it died with the machine
	case p == nil:
		a.start(m, pod, again)
	case p.ended != "":
		a.finish(pod, p.ended)
	default:
		a.keepReady(pod)
	}
}

func podEnded(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}

// start makes a pod's process; it is ready a while later, and a Job's ends by itself. a.mu is held.
func (a *agents) start(m *machine, pod *corev1.Pod, again func(lo, hi time.Duration, why string)) {
	p := &process{uid: pod.UID, at: keyOf(pod), node: m.name}
	if ref := metav1.GetControllerOf(pod); ref != nil {
		p.owner = ref.Kind + "/" + ref.Name
	}
	m.running[pod.UID] = p
	a.w.inv.started(p)
	again(200*time.Millisecond, 2*time.Second, "ready")
	if pod.Spec.RestartPolicy == corev1.RestartPolicyAlways {
		return
	}
	boot := m.boots
	a.later(m.name, "pod/"+p.at.String()+"/"+string(p.uid)+"/work", time.Second, a.w.jobLength, func() {
		a.mu.Lock()
		if m.up && m.boots == boot && m.running[pod.UID] == p && !p.ending {
			p.ended = corev1.PodSucceeded
			if fails, _ := strconv.Atoi(pod.Annotations[annotationFails]); draw(a.w.seed, "outcome", pod.UID)%100 < uint64(fails) {
				p.ended = corev1.PodFailed
			}
			a.w.inv.ended(p)
		}
		a.mu.Unlock()
		a.care(m.name, p.at)
	})
}

// annotationFails is how many of a hundred pods of a Job fail.
const annotationFails = "simulate/fails"

func (a *agents) write(pod *corev1.Pod, edit func(*corev1.Pod) bool) {
	k := a.w.s.kinds[podsGVR]
	_, err := a.w.s.change(k, keyOf(pod), "status", "update", "agent", func(o runtime.Object) (runtime.Object, error) {
		cur := o.(*corev1.Pod)
		if cur.UID != pod.UID || !edit(cur) {
			return nil, errUnchanged
		}
		return cur, nil
	})
	if err != nil && err != errUnchanged && !apierrors.IsNotFound(err) {
		panic(fmt.Sprintf("an agent cannot write the status of %s: %v", keyOf(pod), err))
	}
}

var errUnchanged = fmt.Errorf("it is so already")

func (a *agents) keepReady(pod *corev1.Pod) {
	a.write(pod, func(p *corev1.Pod) bool {
		if podEnded(p) {
			return false
		}
		changed := p.Status.Phase != corev1.PodRunning
		p.Status.Phase = corev1.PodRunning
		if p.Status.StartTime == nil {
			now := metav1.Now()
			p.Status.StartTime = &now
			p.Status.PodIP = fmt.Sprintf("10.%d.%d.%d", draw(1, pod.UID)%200, draw(2, pod.UID)%250, draw(3, pod.UID)%250)
			p.Status.PodIPs = []corev1.PodIP{{IP: p.Status.PodIP}}
		}
		changed = setCondition(p, corev1.PodReady, corev1.ConditionTrue) || changed
		changed = setCondition(p, corev1.ContainersReady, corev1.ConditionTrue) || changed
		return changed
	})
}

// finish reports how a process ended by itself.
func (a *agents) finish(pod *corev1.Pod, phase corev1.PodPhase) {
	a.write(pod, func(p *corev1.Pod) bool {
		if podEnded(p) {
			return false
		}
		p.Status.Phase = phase
		setCondition(p, corev1.PodReady, corev1.ConditionFalse)
		now := metav1.Now()
		term := &corev1.ContainerStateTerminated{FinishedAt: now, StartedAt: now}
		if phase == corev1.PodFailed {
			term.ExitCode = 1
		}
		p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: p.Spec.Containers[0].Name, State: corev1.ContainerState{Terminated: term}}}
		return true
	})
}

// bury removes a deleted pod whose process has ended.
func (a *agents) bury(pod *corev1.Pod) {
	if !podEnded(pod) {
		a.finish(pod, corev1.PodFailed)
	}
	var now int64
	uid := pod.UID
	_, err := a.w.s.remove(a.w.s.kinds[podsGVR], keyOf(pod), metav1.DeleteOptions{GracePeriodSeconds: &now, Preconditions: &metav1.Preconditions{UID: &uid}}, "agent")
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
		panic(err)
	}
}
