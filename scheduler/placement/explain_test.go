package placement

import (
	"fmt"
	"strings"
	"testing"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// said is what one node answered, as a person would read it.
func said(r NodeReport) string {
	var out []string
	for _, f := range r.Refusals {
		out = append(out, fmt.Sprintf("%s: %s (%s) -> %s", f.Filter, strings.Join(f.Reasons, ", "), strings.Join(f.Details, "; "), strings.Join(f.Help, "; or ")))
	}
	if len(r.Evict) > 0 {
		out = append(out, fmt.Sprintf("evict %s", strings.Join(r.Evict, ", ")))
	}
	return strings.Join(out, " | ")
}

func TestReport(t *testing.T) {
	cordoned := func(n *v1.Node) { n.Spec.Unschedulable = true }
	labelNode := func(key, value string) func(*v1.Node) { return func(n *v1.Node) { n.Labels[key] = value } }
	selects := func(key, value string) func(*v1.Pod) {
		return func(p *v1.Pod) { p.Spec.NodeSelector = map[string]string{key: value} }
	}
	s := NewSnapshot()
	s.SetNode(mkNode("a", "2", "4Gi", zone("z1")))
	s.SetNode(mkNode("b", "2", "4Gi", zone("z2"), cordoned, taint("special", v1.TaintEffectNoSchedule)))
	s.SetNode(mkNode("c", "2", "4Gi", zone("z2"), labelNode("disk", "hdd")))
	s.SetPod(mkPod("old", "1500m", "1Gi", withPriority(5), labelled("app", "old"), hostPortOf(80, "", v1.ProtocolTCP)), "a")
	s.SetPod(mkPod("shy", "100m", "1Gi", antiAffinity(v1.LabelTopologyZone, selectorOf("app", "loud"))), "c")
	before := fmt.Sprint(s.NumPods(), s.nodes["a"].used, s.nodes["c"].used, len(s.classes.byKey))
	for name, c := range map[string]struct {
		pod  *v1.Pod
		want map[string]string
	}{
		"fits": {mkPod("p", "100m", "1Gi"), map[string]string{
			"a": "", "b": "NodeUnschedulable: node(s) were unschedulable (it is cordoned) -> kubectl uncordon b | TaintToleration: node(s) had untolerated taint(s) (taint special:NoSchedule) -> a toleration for special:NoSchedule; or kubectl taint node b special:NoSchedule-", "c": ""}},
		"short of everything": {mkPod("p", "3", "8Gi"), map[string]string{
			"b": "NodeUnschedulable: node(s) were unschedulable (it is cordoned) -> kubectl uncordon b | TaintToleration: node(s) had untolerated taint(s) (taint special:NoSchedule) -> a toleration for special:NoSchedule; or kubectl taint node b special:NoSchedule- | NodeResourcesFit: Insufficient cpu, Insufficient memory (cpu: wants 3, 2 of 2 free; memory: wants 8Gi, 4Gi of 4Gi free) -> a request of at most 2 of cpu (the whole node has 2); and a request of at most 4Gi of memory (the whole node has 4Gi)",
			"a": "NodeResourcesFit: Insufficient cpu, Insufficient memory (cpu: wants 3, 500m of 2 free; memory: wants 8Gi, 3Gi of 4Gi free) -> a request of at most 500m of cpu (the whole node has 2); and a request of at most 3Gi of memory (the whole node has 4Gi)"}},
		"room by eviction": {mkPod("p", "1", "1Gi", withPriority(10), selects(v1.LabelHostname, "a")), map[string]string{
			"a": "NodeResourcesFit: Insufficient cpu (cpu: wants 1, 500m of 2 free) -> 500m more of cpu free, or a request of at most 500m | evict default/old",
			"c": "NodeAffinity: node(s) didn't match Pod's node affinity/selector (the node selector wants kubernetes.io/hostname=a, it has c) -> kubectl label node c kubernetes.io/hostname=a --overwrite"}},
		"label": {mkPod("p", "100m", "1Gi", selects("disk", "ssd")), map[string]string{
			"a": "NodeAffinity: node(s) didn't match Pod's node affinity/selector (the node selector wants disk=ssd, it has none) -> kubectl label node a disk=ssd",
			"c": "NodeAffinity: node(s) didn't match Pod's node affinity/selector (the node selector wants disk=ssd, it has hdd) -> kubectl label node c disk=ssd --overwrite"}},
		"port": {mkPod("p", "100m", "1Gi", hostPortOf(80, "", v1.ProtocolTCP)), map[string]string{
			"a": "NodePorts: node(s) didn't have free ports for the requested pod ports (host port 80/TCP is default/old's) -> another host port than 80", "c": ""}},
		"unloved": {mkPod("p", "100m", "1Gi", labelled("app", "loud")), map[string]string{
			"a": "", "c": "InterPodAffinity: node(s) didn't satisfy existing pods anti-affinity rules (default/shy in topology.kubernetes.io/zone=z2 does not want to be near the pod) -> "}},
		"keeps away": {mkPod("p", "100m", "1Gi", antiAffinity(v1.LabelTopologyZone, selectorOf("app", "old"))), map[string]string{
			"a": "InterPodAffinity: node(s) didn't match pod anti-affinity rules (in topology.kubernetes.io/zone=z1 there is default/old, which the pod does not want to be near) -> ", "c": ""}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := s.Report(Request{Pod: c.pod})
			if err != nil || len(got) != 3 {
				t.Fatalf("%v, %v", got, err)
			}
			for _, r := range got {
				if want, ok := c.want[r.Node]; ok && said(r) != want {
					t.Errorf("%s says\n     %s\nwant %s", r.Node, said(r), want)
				}
				if fits := len(r.Refusals) == 0; fits != (len(r.Scores) > 0) {
					t.Errorf("%s: %d refusals and %d scores", r.Node, len(r.Refusals), len(r.Scores))
				}
				var sum int64
				for _, p := range r.Scores {
					sum += p.Points
				}
				if sum != r.Total {
					t.Errorf("%s: points add up to %d, not %d", r.Node, sum, r.Total)
				}
			}
		})
	}
	if after := fmt.Sprint(s.NumPods(), s.nodes["a"].used, s.nodes["c"].used, len(s.classes.byKey)); after != before {
		t.Errorf("the snapshot was changed: %s, was %s", after, before)
	}
}

// Whatever refuses a pod on all nodes alike does not make a report endless, nor do lost nodes, which no profile lets pass.
func TestReportEnds(t *testing.T) {
	s := NewSnapshot()
	s.SetNode(mkNode("a", "2", "4Gi"))
	s.SetNode(mkNode("b", "2", "4Gi"))
	s.SetLost(map[string]bool{"b": true})
	field := func(value string) v1.NodeSelectorRequirement {
		return v1.NodeSelectorRequirement{Key: metav1.ObjectNameField, Operator: v1.NodeSelectorOpIn, Values: []string{value}}
	}
	nowhere := mkPod("p", "1", "1Gi", func(p *v1.Pod) {
		p.Spec.Affinity = &v1.Affinity{NodeAffinity: &v1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &v1.NodeSelector{
			NodeSelectorTerms: []v1.NodeSelectorTerm{{MatchFields: []v1.NodeSelectorRequirement{field("a"), field("b")}}}}}}
	})
	got, err := s.Report(Request{Pod: nowhere})
	if err != nil || len(got[0].Refusals) != 1 || got[0].Refusals[0].Filter != NodeAffinity {
		t.Errorf("%+v, %v", got, err)
	}
	got, err = s.Report(Request{Pod: mkPod("p", "1", "1Gi")})
	if err != nil || said(got[1]) != "TaintToleration: node(s) had untolerated taint(s) (nobody hears of it) -> node b comes back" {
		t.Errorf("%+v, %v", got, err)
	}
}
