package placement

import (
	"strings"

	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// maxScore is the best a node can get from one scoring rule.
const maxScore = 100

// Scores are the weighted scores of one node by rule.
type Scores struct {
	Taints, NodeAffinity, Spread, InterPod, Fit, Balanced, ImageLocality int64
}

// Total is what nodes are ranked by.
func (s *Scores) Total() int64 {
	return s.Taints + s.NodeAffinity + s.Spread + s.InterPod + s.Fit + s.Balanced + s.ImageLocality
}

// score ranks the feasible nodes; the result is parallel to them.
func (p *plan) score(feasible []*node) ([]Scores, error) {
	out := make([]Scores, len(feasible))
	raw := make([]int64, len(feasible))
	w := &p.rules.Weights
	if w.Taints > 0 {
		p.taintScores(feasible, raw)
		for i := range out {
			out[i].Taints = w.Taints * raw[i]
		}
	}
	if w.NodeAffinity > 0 {
		if some, err := p.affinityScores(feasible, raw); err != nil {
			return nil, err
		} else if some {
			for i := range out {
				out[i].NodeAffinity = w.NodeAffinity * raw[i]
			}
		}
	}
	if w.Spread > 0 {
		if some, err := p.spreadScores(feasible, raw); err != nil {
			return nil, err
		} else if some {
			for i := range out {
				out[i].Spread = w.Spread * raw[i]
			}
		}
	}
	if w.InterPod > 0 && p.interPodScores(feasible, raw) {
		for i := range out {
			out[i].InterPod = w.InterPod * raw[i]
		}
	}
	p.resourceScores(feasible, out)
	if w.ImageLocality > 0 {
		for i, n := range feasible {
			out[i].ImageLocality = w.ImageLocality * p.imageLocality(n)
		}
	}
	return out, nil
}

// normalize stretches non-negative scores so that the largest becomes 100,
// or 0 if reverse.
func normalize(scores []int64, reverse bool) {
	var highest int64
	for _, s := range scores {
		highest = max(highest, s)
	}
	for i, s := range scores {
		if highest > 0 {
			s = maxScore * s / highest
		}
		if reverse {
			s = maxScore - s
		}
		scores[i] = s
	}
}

// taintScores prefers nodes with fewer PreferNoSchedule taints that the pod
// does not tolerate.
func (p *plan) taintScores(feasible []*node, scores []int64) {
	for i, n := range feasible {
		scores[i] = 0
		for t := range n.softTaints {
			if !tolerates(p.pod.Spec.Tolerations, &n.softTaints[t]) {
				scores[i]++
			}
		}
	}
	normalize(scores, true)
}

// affinityScores sums the weights of the preferred terms, the pod's and the
// profile's, that a node matches.
func (p *plan) affinityScores(feasible []*node, scores []int64) (bool, error) {
	var own *nodeaffinity.PreferredSchedulingTerms
	if a := p.pod.Spec.Affinity; a != nil && a.NodeAffinity != nil && len(a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution) > 0 {
		var err error
		if own, err = nodeaffinity.NewPreferredSchedulingTerms(a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution); err != nil {
			return false, err
		}
	}
	added := p.rules.addedPreferred
	if own == nil && added == nil {
		return false, nil
	}
	for i, n := range feasible {
		scores[i] = 0
		if own != nil {
			scores[i] += own.Score(n.obj)
		}
		if added != nil {
			scores[i] += added.Score(n.obj)
		}
	}
	normalize(scores, false)
	return true, nil
}

// Image sizes, in bytes, between which locality matters: what registries
// mostly hold (imagelocality plugin).
const (
	smallImage = 23 << 20
	largeImage = 1000 << 20
)

// imageLocality prefers nodes that already hold the pod's images; the size
// counts the more, the more nodes have the image, so that one node with a
// rare image does not draw all pods.
func (p *plan) imageLocality(n *node) int64 {
	if len(n.images) == 0 {
		return 0
	}
	var sum int64
	add := func(image string) {
		if state, ok := n.images[normalizedImage(image)]; ok {
			sum += int64(float64(state.size) * (float64(state.nodes) / float64(len(p.s.order))))
		}
	}
	spec := &p.pod.Spec
	for i := range spec.InitContainers {
		add(spec.InitContainers[i].Image)
	}
	for i := range spec.Containers {
		add(spec.Containers[i].Image)
	}
	for i := range spec.Volumes {
		if image := spec.Volumes[i].Image; image != nil {
			add(image.Reference)
		}
	}
	largest := int64(largeImage * (len(spec.InitContainers) + len(spec.Containers)))
	return maxScore * (min(max(sum, smallImage), largest) - smallImage) / (largest - smallImage)
}

// normalizedImage adds the tag that a bare name means.
func normalizedImage(name string) string {
	if strings.LastIndexByte(name, ':') <= strings.LastIndexByte(name, '/') {
		return name + ":latest"
	}
	return name
}
