package main

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	namespace = "sched-0" // as scheduler_perf names it
	// held marks pods that a guard keeps waiting: see guard.
	held = "bench-held"
	// everywhere is a label that all nodes share.
	everywhere = "bench-cluster"
	// high and above are priority classes.
	high, above = "bench-high", "bench-above"
)

// workload is one of scheduler_perf's (test/integration/scheduler_perf of Kubernetes 1.36): its pods, and what is there before.
type workload struct {
	name  string
	from  string // upstream's name
	pod   func(name string) *corev1.Pod
	first int // of each thousand pods, so many are placed before the measure begins
	// fill is a pod of which each node gets four before, for preemption; nil: none.
	fill func(name string) *corev1.Pod
	// churn: nodes, pods that fit nowhere and Services come and go meanwhile.
	churn bool
	// alone: a node takes one pod.
	alone bool
}

func workloads() []workload {
	return []workload{
		{name: "basic", from: "SchedulingBasic", pod: plain, first: 100},
		{name: "affinity", from: "SchedulingPodAffinity", pod: withAffinity, first: 100},
		{name: "antiaffinity", from: "SchedulingPodAntiAffinity", pod: withAntiAffinity, first: 250, alone: true},
		{name: "spread", from: "TopologySpreading", pod: withSpread, first: 100},
		{name: "churn", from: "SchedulingWithMixedChurn", pod: plain, churn: true},
		{name: "preemption", from: "PreemptionBasic", pod: important, fill: filler},
	}
}

func names() string {
	var out []string
	for _, w := range workloads() {
		out = append(out, w.name)
	}
	return strings.Join(out, ",")
}

func (c *config) wants(part string) bool {
	return c.only == "" || slices.Contains(strings.Split(c.only, ","), part)
}

// pod is upstream's pod-default.yaml with other amounts.
func pod(name, cpu string, labels map[string]string) *corev1.Pod {
	amount := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(cpu), corev1.ResourceMemory: resource.MustParse("500Mi")}
	none := int64(0)
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: namespace, Labels: labels},
		Spec: corev1.PodSpec{TerminationGracePeriodSeconds: &none, Containers: []corev1.Container{{Name: "pause", Image: "registry.k8s.io/pause:3.10.2",
			Ports:     []corev1.ContainerPort{{ContainerPort: 80}},
			Resources: corev1.ResourceRequirements{Requests: amount, Limits: amount}}}}}
}

func plain(name string) *corev1.Pod { return pod(name, "100m", nil) }

func term(color, key string) []corev1.PodAffinityTerm {
	return []corev1.PodAffinityTerm{{TopologyKey: key, Namespaces: []string{"sched-1", namespace},
		LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"color": color}}}}
}

func withAffinity(name string) *corev1.Pod {
	p := pod(name, "100m", map[string]string{"color": "blue"})
	p.Spec.Affinity = &corev1.Affinity{PodAffinity: &corev1.PodAffinity{RequiredDuringSchedulingIgnoredDuringExecution: term("blue", corev1.LabelTopologyZone)}}
	return p
}

func withAntiAffinity(name string) *corev1.Pod {
	p := pod(name, "100m", map[string]string{"color": "green"})
	p.Spec.Affinity = &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: term("green", corev1.LabelHostname)}}
	return p
}

func withSpread(name string) *corev1.Pod {
	p := pod(name, "100m", map[string]string{"color": "blue"})
	p.Spec.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{{MaxSkew: 5, TopologyKey: corev1.LabelTopologyZone, WhenUnsatisfiable: corev1.DoNotSchedule,
		LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"color": "blue"}}}}
	return p
}

func filler(name string) *corev1.Pod { return pod(name, "900m", map[string]string{"filler": "yes"}) }

func important(name string) *corev1.Pod {
	p := pod(name, "3", nil)
	p.Spec.PriorityClassName = high
	return p
}

// guard is a pod beside which no pod with the label held may be, in a domain that all nodes are in: as long as it is there, those pods
// are refused by all nodes; when it goes, one event releases them all.
func guard() *corev1.Pod {
	p := pod("guard", "1m", nil)
	p.Spec.PriorityClassName = above
	p.Spec.Containers[0].Resources.Limits = nil
	p.Spec.Affinity = &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{{
		TopologyKey: everywhere, LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{held: "yes"}}}}}}
	return p
}

func priorityClasses() []*schedulingv1.PriorityClass {
	return []*schedulingv1.PriorityClass{
		{ObjectMeta: metav1.ObjectMeta{Name: high}, Value: 10},
		{ObjectMeta: metav1.ObjectMeta{Name: above}, Value: 1000},
	}
}

func nodeName(i int) string { return fmt.Sprintf("bench-%05d", i) }

// node is upstream's node-default.yaml, in one of three zones.
func node(i int) *corev1.Node {
	amount := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("32Gi"), corev1.ResourcePods: resource.MustParse("110")}
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: nodeName(i), Labels: map[string]string{
			corev1.LabelHostname: nodeName(i), corev1.LabelTopologyZone: fmt.Sprintf("zone-%d", i%3), everywhere: "yes"}},
		Status: corev1.NodeStatus{Capacity: amount, Allocatable: amount,
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "Bench", LastHeartbeatTime: metav1.Now()}}},
	}
}
