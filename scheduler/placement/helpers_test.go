package placement

import (
	"fmt"
	"math/rand/v2"
	"testing"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

func list(cpu, memory string) v1.ResourceList {
	l := v1.ResourceList{}
	if cpu != "" {
		l[v1.ResourceCPU] = resource.MustParse(cpu)
	}
	if memory != "" {
		l[v1.ResourceMemory] = resource.MustParse(memory)
	}
	return l
}

func mkNode(name, cpu, memory string, edit ...func(*v1.Node)) *v1.Node {
	n := &v1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name), Labels: map[string]string{v1.LabelHostname: name}},
		Status:     v1.NodeStatus{Allocatable: list(cpu, memory)},
	}
	n.Status.Allocatable[v1.ResourcePods] = resource.MustParse("110")
	for _, fn := range edit {
		fn(n)
	}
	return n
}

func zone(z string) func(*v1.Node) {
	return func(n *v1.Node) { n.Labels[v1.LabelTopologyZone] = z }
}

func taint(key string, effect v1.TaintEffect) func(*v1.Node) {
	return func(n *v1.Node) { n.Spec.Taints = append(n.Spec.Taints, v1.Taint{Key: key, Effect: effect}) }
}

func mkPod(name, cpu, memory string, edit ...func(*v1.Pod)) *v1.Pod {
	p := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(name), Labels: map[string]string{}},
		Spec:       v1.PodSpec{Containers: []v1.Container{{Name: "c", Image: "web", Resources: v1.ResourceRequirements{Requests: list(cpu, memory)}}}},
	}
	for _, fn := range edit {
		fn(p)
	}
	return p
}

func labelled(kv ...string) func(*v1.Pod) {
	return func(p *v1.Pod) {
		for i := 0; i < len(kv); i += 2 {
			p.Labels[kv[i]] = kv[i+1]
		}
	}
}

func withPriority(n int32) func(*v1.Pod) { return func(p *v1.Pod) { p.Spec.Priority = &n } }

func hostPortOf(port int32, ip string, proto v1.Protocol) func(*v1.Pod) {
	return func(p *v1.Pod) {
		p.Spec.Containers[0].Ports = append(p.Spec.Containers[0].Ports, v1.ContainerPort{HostPort: port, HostIP: ip, Protocol: proto})
	}
}

func selectorOf(kv ...string) *metav1.LabelSelector {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return &metav1.LabelSelector{MatchLabels: m}
}

func antiAffinity(key string, sel *metav1.LabelSelector) func(*v1.Pod) {
	return func(p *v1.Pod) {
		affinityOf(p).PodAntiAffinity = &v1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []v1.PodAffinityTerm{{LabelSelector: sel, TopologyKey: key}}}
	}
}

func podAffinity(key string, sel *metav1.LabelSelector) func(*v1.Pod) {
	return func(p *v1.Pod) {
		affinityOf(p).PodAffinity = &v1.PodAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []v1.PodAffinityTerm{{LabelSelector: sel, TopologyKey: key}}}
	}
}

func affinityOf(p *v1.Pod) *v1.Affinity {
	if p.Spec.Affinity == nil {
		p.Spec.Affinity = &v1.Affinity{}
	}
	return p.Spec.Affinity
}

func spreadOver(key string, skew int32, action v1.UnsatisfiableConstraintAction, sel *metav1.LabelSelector) func(*v1.Pod) {
	return func(p *v1.Pod) {
		p.Spec.TopologySpreadConstraints = append(p.Spec.TopologySpreadConstraints, v1.TopologySpreadConstraint{TopologyKey: key, MaxSkew: skew, WhenUnsatisfiable: action, LabelSelector: sel})
	}
}

// cluster makes a snapshot of nodes; placed pods are given as pod, node pairs.
func cluster(nodes []*v1.Node, placed ...any) *Snapshot {
	s := NewSnapshot()
	for _, n := range nodes {
		s.SetNode(n)
	}
	for i := 0; i < len(placed); i += 2 {
		s.SetPod(placed[i].(*v1.Pod), placed[i+1].(string))
	}
	return s
}

func rnd() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

func place(t *testing.T, s *Snapshot, pod *v1.Pod) Decision {
	t.Helper()
	before := describe(s)
	d, err := s.Place(Request{Pod: pod}, rnd())
	if err != nil {
		t.Fatal(err)
	}
	if after := describe(s); after != before {
		t.Errorf("a decision changed the snapshot:\n%s\n%s", before, after)
	}
	if (d.Node == "") != (d.Refusal != nil) {
		t.Fatalf("neither or both: %+v", d)
	}
	return d
}

func names(prefix string, n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf("%s%d", prefix, i))
	}
	return out
}
