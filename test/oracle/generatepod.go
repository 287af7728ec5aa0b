package oracle

import (
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/utils/ptr"
)

// requests are what one container wants.
func (g *gen) requests(percent int) v1.ResourceList {
	out := v1.ResourceList{}
	set := func(percent int, name v1.ResourceName, amounts ...string) {
		if g.chance(percent) {
			out[name] = resource.MustParse(pick(g, amounts...))
		}
	}
	set(percent, v1.ResourceCPU, "100m", "500m", "1", "1500m", "2", "0", "1u")
	set(percent, v1.ResourceMemory, "128Mi", "1Gi", "2Gi", "500M", "0")
	set(percent/4, v1.ResourceEphemeralStorage, "1Gi", "9Gi")
	return out
}

func (g *gen) containers(p *v1.Pod) {
	for range pick(g, 1, 1, 1, 2, 3) {
		c := v1.Container{Name: g.name("c"), Image: pick(g, "registry.test/web", "registry.test/db:v1", "registry.test:5000/tool", "plain", "unknown:1", "registry.test/web@sha256:1111")}
		c.Resources.Requests = g.requests(60)
		if g.chance(10) {
			c.Resources.Requests[gpu] = resource.MustParse(pick(g, "1", "2", "0"))
		}
		if g.chance(4) {
			c.Resources.Requests[fpga] = resource.MustParse("1")
		}
		if g.chance(4) {
			c.Resources.Requests["hugepages-2Mi"] = resource.MustParse(pick(g, "32Mi", "128Mi"))
		}
		if g.chance(12) {
			c.Ports = append(c.Ports, v1.ContainerPort{ContainerPort: 80, HostPort: pick[int32](g, 80, 443, 8080), HostIP: pick(g, "", "0.0.0.0", "10.0.0.1", "10.0.0.2"), Protocol: pick(g, v1.ProtocolTCP, v1.ProtocolUDP)})
		}
		if g.chance(2) {
			c.RestartPolicy = ptr.To(v1.ContainerRestartPolicyNever)
			c.RestartPolicyRules = []v1.ContainerRestartRule{{Action: v1.ContainerRestartRuleActionRestartAllContainers}}
		}
		p.Spec.Containers = append(p.Spec.Containers, c)
	}
	for range pick(g, 0, 0, 0, 1, 2) {
		c := v1.Container{Name: g.name("init"), Image: pick(g, "registry.test/db:v1", "plain")}
		c.Resources.Requests = g.requests(60)
		if g.chance(50) {
			c.RestartPolicy = ptr.To(v1.ContainerRestartPolicyAlways)
		}
		if g.chance(10) {
			c.Ports = append(c.Ports, v1.ContainerPort{HostPort: pick[int32](g, 80, 9000), Protocol: v1.ProtocolTCP})
		}
		p.Spec.InitContainers = append(p.Spec.InitContainers, c)
	}
	if g.chance(10) {
		p.Spec.Overhead = v1.ResourceList{v1.ResourceCPU: resource.MustParse("250m"), v1.ResourceMemory: resource.MustParse("64Mi")}
	}
	if g.chance(10) {
		p.Spec.Resources = &v1.ResourceRequirements{Requests: v1.ResourceList{}}
		if g.chance(80) {
			p.Spec.Resources.Requests[v1.ResourceCPU] = resource.MustParse(pick(g, "2", "3", "0"))
		}
		if g.chance(60) {
			p.Spec.Resources.Requests[v1.ResourceMemory] = resource.MustParse(pick(g, "1Gi", "3Gi"))
		}
	}
	if g.chance(5) {
		p.Spec.Volumes = append(p.Spec.Volumes, v1.Volume{Name: "image", VolumeSource: v1.VolumeSource{Image: &v1.ImageVolumeSource{Reference: "registry.test/db:v1"}}})
	}
}

func (g *gen) affinity(p *v1.Pod) {
	if !g.chance(55) {
		return
	}
	a := &v1.Affinity{}
	if g.chance(40) {
		a.NodeAffinity = g.nodeAffinity()
	}
	if g.chance(35) {
		a.PodAffinity = &v1.PodAffinity{}
		if g.chance(50) {
			a.PodAffinity.RequiredDuringSchedulingIgnoredDuringExecution = g.podTerms(p)
		}
		if g.chance(60) {
			a.PodAffinity.PreferredDuringSchedulingIgnoredDuringExecution = g.weighted(p)
		}
	}
	if g.chance(35) {
		a.PodAntiAffinity = &v1.PodAntiAffinity{}
		if g.chance(50) {
			a.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution = g.podTerms(p)
		}
		if g.chance(60) {
			a.PodAntiAffinity.PreferredDuringSchedulingIgnoredDuringExecution = g.weighted(p)
		}
	}
	p.Spec.Affinity = a
}

func (g *gen) nodeAffinity() *v1.NodeAffinity {
	out := &v1.NodeAffinity{}
	if g.chance(60) {
		out.RequiredDuringSchedulingIgnoredDuringExecution = &v1.NodeSelector{}
		for range 1 + g.IntN(2) {
			term := g.nodeTerm()
			if g.chance(15) {
				term.MatchFields = append(term.MatchFields, v1.NodeSelectorRequirement{Key: "metadata.name", Operator: pick(g, v1.NodeSelectorOpIn, v1.NodeSelectorOpIn, v1.NodeSelectorOpNotIn), Values: []string{pick(g, "node-01", "node-02", "node-99")}})
			}
			if g.chance(4) {
				term.MatchFields = append(term.MatchFields, v1.NodeSelectorRequirement{Key: "metadata.name", Operator: v1.NodeSelectorOpIn, Values: []string{pick(g, "node-01", "node-03")}})
			}
			if g.chance(4) {
				term = v1.NodeSelectorTerm{} // matches nothing
			}
			out.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms = append(out.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms, term)
		}
	}
	for range g.IntN(3) {
		out.PreferredDuringSchedulingIgnoredDuringExecution = append(out.PreferredDuringSchedulingIgnoredDuringExecution, v1.PreferredSchedulingTerm{Weight: int32(1 + g.IntN(100)), Preference: g.nodeTerm()})
	}
	return out
}

func (g *gen) nodeTerm() v1.NodeSelectorTerm {
	var out v1.NodeSelectorTerm
	for range 1 + g.IntN(2) {
		r := v1.NodeSelectorRequirement{Key: pick(g, v1.LabelTopologyZone, "disk", "absent"), Operator: pick(g, v1.NodeSelectorOpIn, v1.NodeSelectorOpNotIn, v1.NodeSelectorOpExists, v1.NodeSelectorOpDoesNotExist)}
		if r.Operator == v1.NodeSelectorOpIn || r.Operator == v1.NodeSelectorOpNotIn {
			r.Values = pick(g, []string{"east", "ssd"}, []string{"west", "north", "hdd"})
		}
		if g.chance(10) {
			r = v1.NodeSelectorRequirement{Key: "cores", Operator: pick(g, v1.NodeSelectorOpGt, v1.NodeSelectorOpLt), Values: []string{"6"}}
		}
		out.MatchExpressions = append(out.MatchExpressions, r)
	}
	return out
}

func (g *gen) podTerms(p *v1.Pod) (out []v1.PodAffinityTerm) {
	for range 1 + g.IntN(2) {
		out = append(out, g.podTerm(p))
	}
	return out
}

func (g *gen) weighted(p *v1.Pod) (out []v1.WeightedPodAffinityTerm) {
	for range 1 + g.IntN(2) {
		out = append(out, v1.WeightedPodAffinityTerm{Weight: int32(1 + g.IntN(100)), PodAffinityTerm: g.podTerm(p)})
	}
	return out
}

func (g *gen) podTerm(p *v1.Pod) v1.PodAffinityTerm {
	t := v1.PodAffinityTerm{TopologyKey: pick(g, v1.LabelHostname, v1.LabelTopologyZone, v1.LabelTopologyZone, "disk"), LabelSelector: g.selector()}
	switch g.IntN(8) {
	case 0:
		t.NamespaceSelector = &metav1.LabelSelector{}
	case 1:
		t.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"team": pick(g, "red", "blue")}}
	case 2:
		t.Namespaces = []string{pick(g, namespaces...)}
	case 3:
		t.Namespaces = []string{"beta"}
		t.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"team": "red"}}
	}
	if version, ok := p.Labels["version"]; ok && t.LabelSelector != nil && g.chance(25) {
		// As the API server stores it: the keys, and what they stand for merged into the selector.
		t.MatchLabelKeys = []string{"version"}
		t.LabelSelector = t.LabelSelector.DeepCopy()
		t.LabelSelector.MatchExpressions = append(t.LabelSelector.MatchExpressions, metav1.LabelSelectorRequirement{Key: "version", Operator: metav1.LabelSelectorOpIn, Values: []string{version}})
	}
	return t
}
