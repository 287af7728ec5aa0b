package oracle

import (
	"fmt"
	"math/rand/v2"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	v1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/utils/ptr"
)

// gen makes worlds up. Few values for everything, so that rules meet: pods match selectors, ports clash, nodes are full.
type gen struct {
	*rand.Rand
	w     *world
	names map[string]int
	begin time.Time
}

func (g *gen) chance(percent int) bool { return g.IntN(100) < percent }

func pick[T any](g *gen, from ...T) T { return from[g.IntN(len(from))] }

func (g *gen) name(prefix string) string {
	g.names[prefix]++
	return fmt.Sprintf("%s-%02d", prefix, g.names[prefix])
}

var namespaces = []string{"alpha", "beta", "gamma"}

const gpu, fpga = v1.ResourceName("example.com/gpu"), v1.ResourceName("other.org/fpga")

// generate makes the world of a seed.
func generate(seed uint64, profiles int) *world {
	g := &gen{Rand: rand.New(rand.NewPCG(seed, 2)), w: &world{Seed: seed}, names: map[string]int{}, begin: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	w := g.w
	if g.chance(40) {
		w.Profile = g.IntN(profiles)
	}
	for i, name := range namespaces {
		if i == 0 || g.chance(90) { // a pod may be seen before its namespace
			w.Namespaces = append(w.Namespaces, &v1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"team": pick(g, "red", "blue"), v1.LabelMetadataName: name}}})
		}
	}
	for range 1 + g.IntN(12) {
		w.Nodes = append(w.Nodes, g.node())
	}
	g.owners()
	volumes := g.chance(30)
	if volumes {
		g.storage()
	}
	crowded := pick(g, 1, 4, 8, 12)
	for _, n := range w.Nodes {
		for range g.IntN(crowded + 1) {
			p := g.pod("pod")
			p.Spec.NodeName = n.Name
			g.run(p)
			if volumes {
				g.mount(p)
			}
			if !portClash(w.Pods, p) {
				w.Pods = append(w.Pods, p)
			}
		}
	}
	if g.chance(25) {
		for range 1 + g.IntN(3) {
			p := g.pod("nominated")
			p.Status.NominatedNodeName = pick(g, w.Nodes...).Name
			w.Pods = append(w.Pods, p)
		}
	}
	for range g.IntN(4) {
		w.Budgets = append(w.Budgets, &policyv1.PodDisruptionBudget{
			ObjectMeta: metav1.ObjectMeta{Namespace: pick(g, namespaces...), Name: g.name("budget")},
			Spec:       policyv1.PodDisruptionBudgetSpec{Selector: g.selector()},
			Status:     policyv1.PodDisruptionBudgetStatus{DisruptionsAllowed: int32(g.IntN(3))},
		})
	}
	for range 3 {
		p := g.pod("asked")
		if g.chance(60) {
			p.Spec.Priority = ptr.To(pick[int32](g, 15, 50, 1000))
		}
		if g.chance(20) { // large: something has to go
			p.Spec.Containers[0].Resources.Requests = v1.ResourceList{v1.ResourceCPU: resource.MustParse(pick(g, "3", "7", "14")), v1.ResourceMemory: resource.MustParse(pick(g, "4Gi", "12Gi"))}
		}
		if volumes {
			g.mount(p)
		}
		if g.chance(15) {
			p.Status.NominatedNodeName = pick(g, w.Nodes...).Name
		}
		if g.chance(3) {
			p.Spec.NodeName = pick(g, w.Nodes...).Name
		}
		w.Asked = append(w.Asked, p)
	}
	g.Rand = rand.New(rand.NewPCG(seed, 3)) // what comes before is the same with devices and without
	if g.chance(35) {
		g.devices()
	}
	return w
}

// portClash keeps two pods with one port off one node: upstream gives the port up when the first of them goes.
func portClash(placed []*v1.Pod, p *v1.Pod) bool {
	for _, c := range append(p.Spec.Containers[:len(p.Spec.Containers):len(p.Spec.Containers)], p.Spec.InitContainers...) {
		for _, port := range c.Ports {
			for _, o := range placed {
				if o.Spec.NodeName != p.Spec.NodeName {
					continue
				}
				for _, oc := range append(o.Spec.Containers, o.Spec.InitContainers...) {
					for _, op := range oc.Ports {
						if op.HostPort == port.HostPort {
							return true
						}
					}
				}
			}
		}
	}
	return false
}

func (g *gen) node() *v1.Node {
	name := g.name("node")
	n := &v1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{v1.LabelHostname: name}}}
	if g.chance(85) {
		n.Labels[v1.LabelTopologyZone] = pick(g, "east", "west", "north")
	}
	if g.chance(50) {
		n.Labels["disk"] = pick(g, "ssd", "hdd")
	}
	if g.chance(40) {
		n.Labels["cores"] = pick(g, "4", "8", "16", "many")
	}
	if g.chance(10) {
		delete(n.Labels, v1.LabelHostname)
	}
	n.Spec.Unschedulable = g.chance(7)
	for range pick(g, 0, 0, 0, 0, 0, 1, 1, 2) {
		n.Spec.Taints = append(n.Spec.Taints, v1.Taint{
			Key: pick(g, "dedicated", "gpu", v1.TaintNodeUnschedulable), Value: pick(g, "", "a", "b"),
			Effect: pick(g, v1.TaintEffectNoSchedule, v1.TaintEffectNoExecute, v1.TaintEffectPreferNoSchedule, v1.TaintEffectPreferNoSchedule),
		})
	}
	n.Status.Allocatable = v1.ResourceList{v1.ResourcePods: resource.MustParse(pick(g, "110", "110", "110", "110", "6", "3"))}
	set := func(percent int, name v1.ResourceName, amounts ...string) {
		if g.chance(percent) {
			n.Status.Allocatable[name] = resource.MustParse(pick(g, amounts...))
		}
	}
	set(97, v1.ResourceCPU, "4", "8", "8", "16", "32", "7500m", "2")
	set(97, v1.ResourceMemory, "8Gi", "16Gi", "16Gi", "32Gi", "7000M", "0")
	set(80, v1.ResourceEphemeralStorage, "10Gi", "50Gi")
	set(30, gpu, "1", "2", "8")
	set(15, fpga, "1", "4")
	set(10, "hugepages-2Mi", "1Gi", "64Mi")
	if g.chance(10) {
		n.Status.DeclaredFeatures = []string{"RestartAllContainersOnContainerExits", "SomethingElse", "UserNamespacesHostNetworkSupport"}[g.IntN(2):]
	}
	for _, image := range images {
		if g.chance(35) {
			n.Status.Images = append(n.Status.Images, image)
		}
	}
	return n
}

// An image has one size: which node's word counts where they differ depends on the order in which they were seen.
var images = []v1.ContainerImage{
	{Names: []string{"registry.test/web:latest", "registry.test/web@sha256:1111"}, SizeBytes: 300 << 20},
	{Names: []string{"registry.test/db:v1"}, SizeBytes: 1500 << 20},
	{Names: []string{"registry.test:5000/tool:latest"}, SizeBytes: 20 << 20},
	{Names: []string{"plain:latest"}, SizeBytes: 90 << 20},
}

func (g *gen) labels() map[string]string {
	out := map[string]string{}
	if g.chance(80) {
		out["app"] = pick(g, "web", "db")
	}
	if g.chance(50) {
		out["tier"] = pick(g, "front", "back")
	}
	if g.chance(40) {
		out["version"] = pick(g, "1", "2")
	}
	return out
}

// selector is mostly one that matches something.
func (g *gen) selector() *metav1.LabelSelector {
	switch g.IntN(12) {
	case 0:
		if g.chance(30) {
			return &metav1.LabelSelector{}
		}
		return nil
	case 1:
		return &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "tier", Operator: pick(g, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist)}}}
	case 2:
		return &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: pick(g, metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn), Values: []string{"web", "other"}}}}
	case 3:
		return &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web", "tier": pick(g, "front", "back")}}
	case 4:
		return &metav1.LabelSelector{MatchLabels: map[string]string{"version": pick(g, "1", "2")}}
	}
	return &metav1.LabelSelector{MatchLabels: map[string]string{"app": pick(g, "web", "db")}}
}

func (g *gen) owners() {
	w := g.w
	for range g.IntN(3) {
		s := &v1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: pick(g, namespaces...), Name: g.name("service")}}
		if g.chance(90) {
			s.Spec.Selector = map[string]string{"app": pick(g, "web", "db")}
		}
		w.Services = append(w.Services, s)
	}
	for _, ns := range namespaces {
		w.ReplicaSets = append(w.ReplicaSets, &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "set"}, Spec: appsv1.ReplicaSetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web", "version": "1"}}}})
		w.StatefulSets = append(w.StatefulSets, &appsv1.StatefulSet{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "stateful"}, Spec: appsv1.StatefulSetSpec{Selector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "app", Operator: metav1.LabelSelectorOpIn, Values: []string{"db"}}}}}})
		w.Controllers = append(w.Controllers, &v1.ReplicationController{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: "rc"}, Spec: v1.ReplicationControllerSpec{Selector: map[string]string{"tier": "back"}}})
	}
}

// run gives a placed pod the status of one that runs, or ends.
func (g *gen) run(p *v1.Pod) {
	if g.chance(90) {
		// No two start at once: which of equals is evicted is left to chance upstream.
		g.begin = g.begin.Add(time.Minute)
		p.Status.StartTime = &metav1.Time{Time: g.begin.Add(time.Duration(g.IntN(5)) * time.Second)}
	} else {
		p.Status.StartTime = &metav1.Time{Time: g.begin.Add(24 * time.Hour).Add(time.Duration(g.names["pod"]) * time.Second)}
	}
	if g.chance(6) {
		p.DeletionTimestamp = &metav1.Time{Time: g.begin}
		if g.chance(50) {
			p.Status.Conditions = append(p.Status.Conditions, v1.PodCondition{Type: v1.DisruptionTarget, Status: v1.ConditionTrue, Reason: v1.PodReasonPreemptionByScheduler})
		}
	}
	if g.chance(15) { // a resize is under way
		for _, c := range p.Spec.Containers {
			granted := g.requests(60)
			p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, v1.ContainerStatus{Name: c.Name, AllocatedResources: granted, Resources: &v1.ResourceRequirements{Requests: granted}})
		}
		if g.chance(20) {
			p.Status.Conditions = append(p.Status.Conditions, v1.PodCondition{Type: v1.PodResizePending, Status: v1.ConditionTrue, Reason: v1.PodReasonInfeasible})
		}
		if p.Spec.Resources != nil && g.chance(60) {
			p.Status.AllocatedResources = g.requests(100)
			p.Status.Resources = &v1.ResourceRequirements{Requests: g.requests(100)}
		}
	}
}

func (g *gen) pod(prefix string) *v1.Pod {
	name := g.name(prefix)
	p := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: pick(g, "alpha", "alpha", "alpha", "beta", "gamma"), Name: name, UID: types.UID(name), Labels: g.labels()}}
	if g.chance(30) {
		owner := pick(g, [2]string{"apps/v1", "ReplicaSet"}, [2]string{"apps/v1", "StatefulSet"}, [2]string{"v1", "ReplicationController"}, [2]string{"batch/v1", "Job"})
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: owner[0], Kind: owner[1], Controller: ptr.To(true), Name: map[string]string{"ReplicaSet": "set", "StatefulSet": "stateful", "ReplicationController": "rc", "Job": "job"}[owner[1]]}}
	}
	g.containers(p)
	if g.chance(60) {
		p.Spec.Priority = ptr.To(pick[int32](g, 0, 10, 10, 20, 100, -5))
	}
	if g.chance(5) {
		p.Spec.PreemptionPolicy = ptr.To(v1.PreemptNever)
	}
	if g.chance(3) {
		p.Spec.HostNetwork, p.Spec.HostUsers = true, ptr.To(false)
	}
	for range pick(g, 0, 0, 1, 2) {
		p.Spec.Tolerations = append(p.Spec.Tolerations, v1.Toleration{
			Key: pick(g, "dedicated", "gpu", "", v1.TaintNodeUnschedulable), Operator: pick(g, v1.TolerationOpExists, v1.TolerationOpEqual, ""),
			Value: pick(g, "", "a", "b"), Effect: pick(g, "", v1.TaintEffectNoSchedule, v1.TaintEffectPreferNoSchedule, v1.TaintEffectNoExecute),
		})
	}
	if g.chance(12) {
		p.Spec.NodeSelector = map[string]string{"disk": pick(g, "ssd", "hdd")}
	}
	g.affinity(p)
	for range pick(g, 0, 0, 0, 1, 2) {
		p.Spec.TopologySpreadConstraints = append(p.Spec.TopologySpreadConstraints, g.spread())
	}
	return p
}

func (g *gen) spread() v1.TopologySpreadConstraint {
	c := v1.TopologySpreadConstraint{
		MaxSkew: int32(1 + g.IntN(3)), TopologyKey: pick(g, v1.LabelHostname, v1.LabelTopologyZone, v1.LabelTopologyZone, "disk"),
		WhenUnsatisfiable: pick(g, v1.DoNotSchedule, v1.ScheduleAnyway), LabelSelector: g.selector(),
	}
	if c.WhenUnsatisfiable == v1.DoNotSchedule && g.chance(30) {
		c.MinDomains = ptr.To(int32(1 + g.IntN(4)))
	}
	if g.chance(30) {
		c.NodeAffinityPolicy = ptr.To(pick(g, v1.NodeInclusionPolicyHonor, v1.NodeInclusionPolicyIgnore))
	}
	if g.chance(30) {
		c.NodeTaintsPolicy = ptr.To(pick(g, v1.NodeInclusionPolicyHonor, v1.NodeInclusionPolicyIgnore))
	}
	if g.chance(20) && c.LabelSelector != nil {
		c.MatchLabelKeys = []string{pick(g, "version", "absent")}
	}
	return c
}
