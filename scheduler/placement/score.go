package placement

import (
	"math"
	"strings"
)

// maxScore is the best a node can get from one scoring rule.
const maxScore = 100

// Scores are the weighted scores of one node by rule.
type Scores struct {
	Taints, NodeAffinity, Spread, InterPod, Fit, Balanced, ImageLocality, Devices int64
}

// Total is what nodes are ranked by.
func (s *Scores) Total() int64 {
	return s.Taints + s.NodeAffinity + s.Spread + s.InterPod + s.Fit + s.Balanced + s.ImageLocality + s.Devices
}

// score returns the totals of the feasible nodes, parallel to them and without
// what is the same for all; if details is not nil it is parallel to them, too,
// and gets the single scores.
func (p *plan) score(found []option, details []Scores) ([]int64, error) {
	totals, raw := p.s.buffers.zeroed(len(found)), p.s.buffers.zeroed(len(found))
	for i := range found {
		totals[i] = found[i].total
	}
	add := func(weight int64, detail func(*Scores) *int64) {
		for i := range raw {
			totals[i] += weight * raw[i]
		}
		for i := range details {
			*detail(&details[i]) = weight * raw[i]
		}
	}
	w := &p.rules.Weights
	tainted := details != nil // without a soft taint all nodes are equal in that, which decides nothing
	for i := range found {
		tainted = tainted || found[i].taints > 0
	}
	if w.Taints > 0 && tainted {
		for i := range found {
			raw[i] = int64(found[i].taints)
		}
		normalize(raw, true)
		add(w.Taints, func(s *Scores) *int64 { return &s.Taints })
	}
	if w.NodeAffinity > 0 {
		if p.class.unparsed != nil {
			return nil, p.class.unparsed
		}
		if p.class.preferred != nil || p.rules.addedPreferred != nil {
			for i := range found {
				raw[i] = int64(found[i].preferred)
			}
			normalize(raw, false)
			add(w.NodeAffinity, func(s *Scores) *int64 { return &s.NodeAffinity })
		}
	}
	if w.Spread > 0 {
		if some, err := p.spreadScores(found, raw); err != nil {
			return nil, err
		} else if some {
			add(w.Spread, func(s *Scores) *int64 { return &s.Spread })
		}
	}
	if w.InterPod > 0 && p.interPodScores(found, raw) {
		add(w.InterPod, func(s *Scores) *int64 { return &s.InterPod })
	}
	if w.Devices > 0 && p.devices != nil && p.devices.allocator != nil {
		for i := range found {
			raw[i] = p.devices.score(found[i].node)
		}
		normalize(raw, false)
		add(w.Devices, func(s *Scores) *int64 { return &s.Devices })
	}
	for i := range details {
		s := &details[i]
		s.Fit, s.Balanced, s.ImageLocality = p.absoluteScores(found[i].node)
	}
	return totals, nil
}

// absoluteScores are the weighted scores that are not relative to other nodes.
func (p *plan) absoluteScores(n *node) (fit, balanced, images int64) {
	w, r := &p.rules.Weights, p.rules
	if w.Fit > 0 {
		if r.plainFit {
			fit = w.Fit * p.leastAllocated(n)
		} else {
			fit = w.Fit * p.class.fit.score(p, n)
		}
	}
	if w.Balanced > 0 && !p.nothingToBalance() {
		if r.plainBalanced {
			balanced = w.Balanced * p.balanced(n)
		} else {
			balanced = w.Balanced * p.class.balance.score(p, n)
		}
	}
	if w.ImageLocality > 0 {
		images = w.ImageLocality * p.imageLocality(n)
	}
	return fit, balanced, images
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

// softTaints counts the PreferNoSchedule taints that the pod does not
// tolerate: the fewer, the better.
func (p *plan) softTaints(n *node) (count int16) {
	for i := range n.softTaints {
		if !tolerates(p.pod.Spec.Tolerations, &n.softTaints[i]) && count < math.MaxInt16 {
			count++
		}
	}
	return count
}

// preferredWeight sums the weights of the preferred terms, the pod's and the
// profile's, that a node matches.
func (p *plan) preferredWeight(n *node) int32 {
	var sum int64
	if own := p.class.preferred; own != nil {
		sum += own.Score(n.obj)
	}
	if added := p.rules.addedPreferred; added != nil {
		sum += added.Score(n.obj)
	}
	return int32(sum)
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
