package simulate

import (
	"fmt"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// scenario is a size and a time of troubles.
type scenario struct {
	nodes, pods int
	chaos       time.Duration
	every       time.Duration // the mean time between two troubles
	only        string        // the one trouble that happens; "" for all
}

// user is what the people of the scenario did and still want.
type user struct {
	w     *world
	sc    scenario
	made  int // workloads, jobs and nodes so far: names
	did   map[string]int
	nodes []string
	zones []string
	homes []string // namespaces
	// loaded are the Deployments with a load and an autoscaler.
	loaded []key
}

// labelKept is on Deployments that nobody scales or deletes: something depends on them.
const labelKept = "simulate/kept"

var (
	kNone, kOne = intstr.FromInt32(0), intstr.FromInt32(1)
	k25         = intstr.FromString("25%")
)

func (u *user) keep(d *appsv1.Deployment) { d.Labels[labelKept] = "yes" }

// others are the Deployments that are not kept.
func (u *user) others() []*appsv1.Deployment {
	return slices.DeleteFunc(sorted(all[*appsv1.Deployment](u.w)), func(d *appsv1.Deployment) bool { return d.Labels[labelKept] != "" })
}

func newUser(w *world, sc scenario) *user {
	u := &user{w: w, sc: sc, did: map[string]int{}, zones: []string{"a", "b", "c"}}
	for i := range 1 + sc.pods/1000 {
		ns := fmt.Sprintf("home-%d", i)
		w.namespace(ns)
		u.homes = append(u.homes, ns)
	}
	for range sc.nodes {
		u.addNode()
	}
	return u
}

func (u *user) n(max int) int { return u.w.rnd.IntN(max) }

func (u *user) name(kind string) string {
	u.made++
	return fmt.Sprintf("%s-%d", kind, u.made)
}

func (u *user) home() string { return u.homes[u.n(len(u.homes))] }

func (u *user) addNode() {
	at := len(u.nodes)
	name := fmt.Sprintf("n%04d", at)
	u.w.agents.add(name, u.zones[at%len(u.zones)], []string{"4", "3", "6"}[u.n(3)], "16Gi")
	u.nodes = append(u.nodes, name)
	if at%max(1, u.sc.nodes/50) == 0 {
		for range localsPerNode {
			u.w.storage.addLocal(name)
		}
	}
	if at%max(deviceEvery, u.sc.nodes/50) == 0 {
		u.w.addSlice(name)
	}
}

// populate makes the workloads of the scenario: two DaemonSets, and of the other pods two thirds in Deployments, a fifth in StatefulSets.
func (u *user) populate() {
	u.w.make(daemonSet("default", "agent", false))
	u.w.make(daemonSet("default", "proxy", true))
	rest := u.sc.pods - 2*u.sc.nodes - u.addBounded()
	for _, class := range []string{classLocal, classZonal} {
		rest -= u.addStatefulSetOf(class)
	}
	for range 1 + u.sc.pods/5000 {
		rest -= u.withAutoscaler(u.home())
		rest -= u.addDevices()
	}
	for i := 0; rest > 0; i++ {
		switch {
		case i%5 == 4:
			rest -= u.addStatefulSet()
		case i%25 == 23:
			rest -= 6
			u.addCron()
		default:
			rest -= u.addDeployment(u.home(), u.name("web"))
		}
	}
}

func (u *user) addDeployment(ns, name string) int {
	replicas := int32(1 + u.n(max(20, u.sc.pods/100)))
	kinds := [][2]intstr.IntOrString{
		{intstr.FromString("25%"), intstr.FromString("25%")}, {intstr.FromInt32(0), intstr.FromInt32(1)},
		{intstr.FromInt32(1), intstr.FromInt32(0)}, {intstr.FromInt32(2), intstr.FromString("50%")},
	}
	k := kinds[u.n(len(kinds))]
	d := deployment(ns, name, replicas, k[0], k[1], u.n(10) == 0)
	switch u.n(6) {
	case 0:
		d.Spec.Template.Spec.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{{MaxSkew: 1, TopologyKey: corev1.LabelTopologyZone,
			WhenUnsatisfiable: corev1.ScheduleAnyway, LabelSelector: selector(name)}}
	case 1:
		d.Spec.Template.Spec.Affinity = &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{PreferredDuringSchedulingIgnoredDuringExecution: []corev1.WeightedPodAffinityTerm{{
			Weight: 100, PodAffinityTerm: corev1.PodAffinityTerm{TopologyKey: corev1.LabelHostname, LabelSelector: selector(name)}}}}}
	case 2:
		d.Spec.MinReadySeconds = 3
	}
	u.w.make(d)
	u.w.make(service(ns, name))
	if replicas > 2 && u.n(2) == 0 {
		u.w.make(budget(ns, name, intstr.FromString("34%")))
	}
	return int(replicas)
}

// addDevices makes a Deployment that uses half of the devices of a few nodes.
func (u *user) addDevices() int {
	replicas := int32(2 + u.n(3))
	d := deployment(u.home(), u.name("device"), replicas, kOne, []intstr.IntOrString{kNone, kOne}[u.n(2)], false)
	u.keep(d)
	u.w.withDevice(d)
	u.w.make(d)
	return int(replicas)
}

func (u *user) addStatefulSet() int {
	return u.addStatefulSetOf([]string{"", "", classLocal, classZonal}[u.n(4)])
}

// addStatefulSetOf makes one whose pods have volumes of a class, or none for "".
func (u *user) addStatefulSetOf(class string) int {
	ns, name, replicas := u.home(), u.name("db"), int32(1+u.n(7))
	policy := appsv1.OrderedReadyPodManagement
	if u.n(3) == 0 {
		policy = appsv1.ParallelPodManagement
	}
	set := statefulSet(ns, name, replicas, policy)
	if class != "" {
		withVolumes(set, class, []appsv1.PersistentVolumeClaimRetentionPolicyType{appsv1.RetainPersistentVolumeClaimRetentionPolicyType, appsv1.DeletePersistentVolumeClaimRetentionPolicyType}[u.n(2)])
	}
	u.w.make(set)
	u.w.make(service(ns, name))
	if replicas > 2 {
		u.w.make(budget(ns, name, intstr.FromInt32(1)))
	}
	return int(replicas)
}

func (u *user) addJob() {
	name := u.name("job")
	completions := int32(1 + u.n(12))
	j := job(u.home(), name, completions, 1+int32(u.n(int(completions))), u.n(2) == 0, []int{0, 0, 10, 30}[u.n(4)])
	if u.n(2) == 0 {
		j.Spec.TTLSecondsAfterFinished = ptr(int32(20))
	}
	u.w.make(j)
}

func (u *user) addCron() {
	name := u.name("cron")
	j := job("default", name, 2, 2, false, 0)
	// Each Job of it needs a selector of its own: the API makes it from the Job's uid, here a Job has none but its controller.
	spec := j.Spec
	u.w.make(&batchv1.CronJob{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Spec: batchv1.CronJobSpec{
		Schedule: "*/2 * * * *", ConcurrencyPolicy: []batchv1.ConcurrencyPolicy{batchv1.ForbidConcurrent, batchv1.ReplaceConcurrent, batchv1.AllowConcurrent}[u.n(3)],
		Suspend: ptr(false), SuccessfulJobsHistoryLimit: ptr(int32(2)), FailedJobsHistoryLimit: ptr(int32(1)), JobTemplate: batchv1.JobTemplateSpec{Spec: spec},
	}})
}

// trouble is something that happens to the cluster.
type trouble struct {
	name   string
	weight int
	do     func(*user)
}

var allTroubles = []trouble{
	{"node dies", 10, (*user).nodeDies},
	{"node is cut off", 10, (*user).nodeCutOff},
	{"zone is cut off", 1, (*user).zoneCutOff},
	{"node leaves", 2, (*user).nodeLeaves},
	{"leader is deposed", 10, (*user).newLeader},
	{"rollout", 20, (*user).rollout},
	{"scale", 12, (*user).scale},
	{"drain", 6, (*user).drain},
	{"job storm", 5, (*user).jobStorm},
	{"workload is deleted", 6, (*user).deleteWorkload},
	{"pod is deleted", 8, (*user).deletePod},
	{"API is flaky", 3, (*user).flaky},
	{"watches expire", 3, (*user).expire},
	{"namespace comes and goes", 2, (*user).namespaceLife},
	{"preemption", 3, (*user).preempt},
	{"load changes", 5, (*user).loadChanges},
	{"Job within a quota", 3, (*user).boundedJob},
}

// torment lets troubles happen, and ends when it healed what it broke.
func (u *user) torment() {
	sum := 0
	var troubles []trouble
	for _, t := range allTroubles {
		if u.sc.only == "" || t.name == u.sc.only {
			troubles = append(troubles, t)
			sum += t.weight
		}
	}
	for end := time.Now().Add(u.sc.chaos); time.Now().Before(end); {
		if u.w.enough() {
			return
		}
		time.Sleep(between(u.sc.every/4, 2*u.sc.every, u.w.rnd.Uint64()))
		at := u.n(sum)
		for _, t := range troubles {
			if at -= t.weight; at < 0 {
				u.did[t.name]++
				t.do(u)
				break
			}
		}
	}
	time.Sleep(5 * time.Minute) // every trouble ends within
	u.w.fails.Store(0)
	for _, name := range u.nodes {
		u.w.agents.heal(name)
		u.cordon(name, false)
	}
	for _, c := range all[*batchv1.CronJob](u.w) {
		edit(u.w, c.Namespace, c.Name, func(c *batchv1.CronJob) { c.Spec.Suspend = ptr(true) })
	}
}

func (u *user) someNode() string { return u.nodes[u.n(len(u.nodes))] }

// after does fn once d has passed.
func (u *user) after(d time.Duration, fn func()) {
	time.AfterFunc(d, func() {
		if !u.w.over.Load() {
			fn()
		}
	})
}

func (u *user) span(lo, hi time.Duration) time.Duration { return between(lo, hi, u.w.rnd.Uint64()) }

func (u *user) nodeDies() {
	name := u.someNode()
	u.w.agents.fail(name, true)
	u.after(u.span(5*time.Second, 4*time.Minute), func() { u.w.agents.heal(name) })
}

func (u *user) nodeCutOff() {
	name := u.someNode()
	u.w.agents.fail(name, false)
	u.after(u.span(time.Second, 4*time.Minute), func() { u.w.agents.heal(name) })
}

func (u *user) zoneCutOff() {
	zone, back := u.n(len(u.zones)), u.span(20*time.Second, 2*time.Minute)
	for i, name := range u.nodes {
		if i%len(u.zones) == zone {
			u.w.agents.fail(name, false)
			u.after(back, func() { u.w.agents.heal(name) })
		}
	}
}

func (u *user) nodeLeaves() {
	name := u.someNode()
	u.w.agents.leave(name)
	u.w.storage.left(name)
	u.addNode()
}

func (u *user) newLeader() {
	u.w.elect([]time.Duration{0, u.span(time.Millisecond, 100*time.Millisecond), u.span(100*time.Millisecond, 2*time.Second)}[u.n(3)])
}

func pickOne[T any](u *user, from []T) (one T, ok bool) {
	if len(from) == 0 {
		return one, false
	}
	return from[u.n(len(from))], true
}

// sorted lists objects in an order that does not depend on a map.
func sorted[T metav1.Object](in []T) []T {
	slices.SortFunc(in, func(a, b T) int { return compare(keyOf(a).String(), keyOf(b).String()) })
	return in
}

func (u *user) rollout() {
	stamp := map[string]string{"simulate/rolled": time.Now().Format(time.RFC3339Nano)}
	switch u.n(6) {
	case 0:
		edit(u.w, "default", []string{"agent", "proxy"}[u.n(2)], func(d *appsv1.DaemonSet) { d.Spec.Template.Annotations = stamp })
	case 1, 2:
		if s, ok := pickOne(u, sorted(all[*appsv1.StatefulSet](u.w))); ok {
			edit(u.w, s.Namespace, s.Name, func(s *appsv1.StatefulSet) { s.Spec.Template.Annotations = stamp })
		}
	default:
		if d, ok := pickOne(u, sorted(all[*appsv1.Deployment](u.w))); ok {
			edit(u.w, d.Namespace, d.Name, func(d *appsv1.Deployment) { d.Spec.Template.Annotations = stamp })
		}
	}
}

func (u *user) scale() {
	if u.n(3) == 0 {
		if s, ok := pickOne(u, sorted(all[*appsv1.StatefulSet](u.w))); ok {
			n := int32(u.n(8))
			edit(u.w, s.Namespace, s.Name, func(s *appsv1.StatefulSet) { s.Spec.Replicas = &n })
		}
		return
	}
	if d, ok := pickOne(u, u.others()); ok {
		n := int32(u.n(int(2**d.Spec.Replicas) + 2))
		n = min(n, int32(max(20, u.sc.pods/100)))
		edit(u.w, d.Namespace, d.Name, func(d *appsv1.Deployment) { d.Spec.Replicas = &n })
	}
}

func (u *user) cordon(name string, yes bool) {
	edit(u.w, "", name, func(n *corev1.Node) { n.Spec.Unschedulable = yes })
}

// drain asks for evictions every second for a minute, as kubectl does.
func (u *user) drain() {
	name := u.someNode()
	u.cordon(name, true)
	var round func(left int)
	round = func(left int) {
		entries, _ := u.w.s.list(u.w.s.kinds[podsGVR], "")
		var at []key
		for _, e := range entries {
			if p := e.obj.(*corev1.Pod); p.Spec.NodeName == name && p.DeletionTimestamp == nil && ownerKind(p) != "DaemonSet" {
				at = append(at, keyOf(p))
			}
		}
		slices.SortFunc(at, func(a, b key) int { return compare(a.String(), b.String()) })
		for _, k := range at {
			_ = u.w.s.evict(k, "drain") // refused by a budget: later
		}
		if left > 0 {
			u.after(time.Second, func() { round(left - 1) })
			return
		}
		u.cordon(name, false)
	}
	u.after(100*time.Millisecond, func() { round(60) })
}

func (u *user) jobStorm() {
	for range 5 + u.n(max(10, u.sc.nodes/20)) {
		u.addJob()
	}
}

func (u *user) deleteWorkload() {
	policies := []metav1.DeletionPropagation{metav1.DeletePropagationBackground, metav1.DeletePropagationForeground, metav1.DeletePropagationOrphan}
	policy := policies[u.n(3)]
	opts := metav1.DeleteOptions{PropagationPolicy: &policy}
	switch u.n(4) {
	case 0:
		if s, ok := pickOne(u, sorted(all[*appsv1.StatefulSet](u.w))); ok && policy != metav1.DeletePropagationOrphan {
			_, _ = u.w.s.remove(u.w.kindOf(s), keyOf(s), opts, "user")
			u.addStatefulSet()
		}
	case 1:
		if j, ok := pickOne(u, sorted(all[*batchv1.Job](u.w))); ok && policy != metav1.DeletePropagationOrphan {
			_, _ = u.w.s.remove(u.w.kindOf(j), keyOf(j), opts, "user")
		}
	default:
		d, ok := pickOne(u, u.others())
		if !ok {
			return
		}
		_, _ = u.w.s.remove(u.w.kindOf(d), keyOf(d), opts, "user")
		if policy != metav1.DeletePropagationOrphan {
			u.addDeployment(u.home(), u.name("web"))
			return
		}
		// Whoever makes it anew takes over what it left.
		var anew func()
		anew = func() {
			if _, err := u.w.s.get(u.w.kindOf(d), keyOf(d)); err == nil {
				u.after(time.Second, anew)
				return
			}
			next := d.DeepCopy()
			next.ObjectMeta = metav1.ObjectMeta{Namespace: d.Namespace, Name: d.Name, Labels: d.Labels}
			next.Status = appsv1.DeploymentStatus{}
			_, _ = u.w.s.create(u.w.kindOf(d), next, "user") // somebody was faster
		}
		u.after(time.Second, anew)
	}
}

func (u *user) deletePod() {
	for range 1 + u.n(5) {
		entries, _ := u.w.s.list(u.w.s.kinds[podsGVR], u.home())
		if len(entries) == 0 {
			return
		}
		slices.SortFunc(entries, func(a, b *entry) int { return compare(keyOf(a.acc).String(), keyOf(b.acc).String()) })
		_, _ = u.w.s.remove(u.w.s.kinds[podsGVR], keyOf(entries[u.n(len(entries))].acc), metav1.DeleteOptions{}, "user")
	}
}

// flaky loses requests for a while.
func (u *user) flaky() {
	d := u.span(5*time.Second, 30*time.Second)
	u.w.inv.flaky(time.Now().Add(d + 2*time.Minute)) // a delayed decision may be carried out much later
	u.w.fails.Store(uint64(10 + u.n(100)))
	u.after(d, func() { u.w.fails.Store(0) })
}

func (u *user) expire() { u.w.s.expire() }

func (u *user) namespaceLife() {
	ns := u.name("team")
	u.w.namespace(ns)
	u.w.make(deployment(ns, "web", int32(1+u.n(10)), intstr.FromInt32(1), intstr.FromInt32(1), false))
	u.w.make(statefulSet(ns, "db", int32(1+u.n(3)), appsv1.OrderedReadyPodManagement))
	u.w.make(job(ns, "work", 5, 2, true, 10))
	u.w.make(service(ns, "web"))
	u.after(u.span(time.Second, 2*time.Minute), func() {
		_, _ = u.w.s.remove(u.w.s.kinds[namespacesGVR], key{"", ns}, metav1.DeleteOptions{}, "user")
	})
}

// preempt asks for more than is free somewhere, with priority, for a while.
func (u *user) preempt() {
	name := u.name("urgent")
	d := deployment("default", name, int32(1+u.n(3)), intstr.FromInt32(1), intstr.FromInt32(0), false)
	d.Spec.Template.Spec.Priority = ptr(int32(1000))
	d.Spec.Template.Spec.Containers[0].Resources.Requests[corev1.ResourceCPU] = *quantity("2500m")
	u.w.make(d)
	u.after(u.span(10*time.Second, time.Minute), func() {
		policy := metav1.DeletePropagationBackground
		_, _ = u.w.s.remove(u.w.kindOf(d), key{"default", name}, metav1.DeleteOptions{PropagationPolicy: &policy}, "user")
	})
}
