package placement

import (
	"math"
	"strings"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
)

// maxScore is the best a node can get from one scoring rule.
const maxScore = 100

// Weights of the default profile.
const (
	weightTaints   = 3
	weightAffinity = 2
	weightSpread   = 2
	weightInterPod = 2
	weightLeast    = 1
	weightBalanced = 1
	weightImages   = 1
)

// hardPodAffinityWeight is how much a node gains when a pod there requires to
// be near the planned one (InterPodAffinityArgs' default).
const hardPodAffinityWeight = 1

// Scores are the weighted scores of one node by rule.
type Scores struct {
	Taints, NodeAffinity, Spread, InterPod, LeastAllocated, Balanced, ImageLocality int64
}

// Total is what nodes are ranked by.
func (s *Scores) Total() int64 {
	return s.Taints + s.NodeAffinity + s.Spread + s.InterPod + s.LeastAllocated + s.Balanced + s.ImageLocality
}

// score ranks the feasible nodes; the result is parallel to them.
func (p *plan) score(feasible []*node, defaultSelector labels.Selector) ([]Scores, error) {
	out := make([]Scores, len(feasible))
	raw := make([]int64, len(feasible))
	p.taintScores(feasible, raw)
	for i := range out {
		out[i].Taints = weightTaints * raw[i]
	}
	if some, err := p.affinityScores(feasible, raw); err != nil {
		return nil, err
	} else if some {
		for i := range out {
			out[i].NodeAffinity = weightAffinity * raw[i]
		}
	}
	if some, err := p.spreadScores(feasible, defaultSelector, raw); err != nil {
		return nil, err
	} else if some {
		for i := range out {
			out[i].Spread = weightSpread * raw[i]
		}
	}
	if p.interPodScores(feasible, raw) {
		for i := range out {
			out[i].InterPod = weightInterPod * raw[i]
		}
	}
	bestEffort := p.info.request.MilliCPU == 0 && p.info.request.Memory == 0
	for i, n := range feasible {
		out[i].LeastAllocated = weightLeast * p.leastAllocated(n)
		if !bestEffort {
			out[i].Balanced = weightBalanced * p.balanced(n)
		}
		out[i].ImageLocality = weightImages * p.imageLocality(n)
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

// affinityScores sums the weights of the preferred terms that a node matches.
func (p *plan) affinityScores(feasible []*node, scores []int64) (bool, error) {
	a := p.pod.Spec.Affinity
	if a == nil || a.NodeAffinity == nil || len(a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution) == 0 {
		return false, nil
	}
	preferred, err := nodeaffinity.NewPreferredSchedulingTerms(a.NodeAffinity.PreferredDuringSchedulingIgnoredDuringExecution)
	if err != nil {
		return false, err
	}
	for i, n := range feasible {
		scores[i] = preferred.Score(n.obj)
	}
	normalize(scores, false)
	return true, nil
}

// interPodScores adds up, per domain, the weights of the soft terms between
// the planned pod and those that are there, in both directions.
func (p *plan) interPodScores(feasible []*node, scores []int64) bool {
	domains := map[topologyPair]int64{}
	add := func(n *node, t *affinityTerm, weight int64, pod *v1.Pod, namespace labels.Set) {
		if value, ok := n.obj.Labels[t.topologyKey]; ok && t.matches(pod, namespace) {
			domains[topologyPair{t.topologyKey, value}] += weight
		}
	}
	own := &p.info.terms
	hasOwn := len(own.preferred)+len(own.preferredAnti) > 0
	for _, n := range p.s.order {
		if hasOwn {
			for _, existing := range n.pods {
				ns := p.s.namespaces[existing.pod.Namespace]
				for i := range own.preferred {
					add(n, &own.preferred[i], own.preferred[i].weight, existing.pod, ns)
				}
				for i := range own.preferredAnti {
					add(n, &own.preferredAnti[i], -own.preferredAnti[i].weight, existing.pod, ns)
				}
			}
		}
		for _, existing := range n.affine {
			theirs := &existing.terms
			for i := range theirs.required {
				add(n, &theirs.required[i], hardPodAffinityWeight, p.pod, p.namespace)
			}
			for i := range theirs.preferred {
				add(n, &theirs.preferred[i], theirs.preferred[i].weight, p.pod, p.namespace)
			}
			for i := range theirs.preferredAnti {
				add(n, &theirs.preferredAnti[i], -theirs.preferredAnti[i].weight, p.pod, p.namespace)
			}
		}
	}
	if len(domains) == 0 {
		return false
	}
	lowest, highest := int64(math.MaxInt64), int64(math.MinInt64)
	for i, n := range feasible {
		scores[i] = 0
		for pair, weight := range domains {
			if value, ok := n.obj.Labels[pair.key]; ok && value == pair.value {
				scores[i] += weight
			}
		}
		lowest, highest = min(lowest, scores[i]), max(highest, scores[i])
	}
	for i := range scores {
		if highest > lowest {
			scores[i] = int64(maxScore * (float64(scores[i]-lowest) / float64(highest-lowest)))
		} else {
			scores[i] = 0
		}
	}
	return true
}

// leastAllocated prefers nodes with much free CPU and memory.
func (p *plan) leastAllocated(n *node) int64 {
	var sum, resources int64
	one := func(used, alloc int64) {
		if alloc == 0 {
			return
		}
		resources++
		if used <= alloc {
			sum += (alloc - used) * maxScore / alloc
		}
	}
	one(n.scoreCPU+p.info.scoreCPU, n.alloc.MilliCPU)
	one(n.scoreMemory+p.info.scoreMemory, n.alloc.Memory)
	if resources == 0 {
		return 0
	}
	return sum / resources
}

// balanced prefers nodes whose shares of used CPU and memory come closer to
// each other by the pod: 75 if nothing changes, from 50 (worse) to 100.
func (p *plan) balanced(n *node) int64 {
	with := balance(n.used.MilliCPU+p.info.request.MilliCPU, n.alloc.MilliCPU, n.used.Memory+p.info.request.Memory, n.alloc.Memory)
	without := balance(n.used.MilliCPU, n.alloc.MilliCPU, n.used.Memory, n.alloc.Memory)
	return maxScore/2 + (maxScore/2+with-without)/2
}

// balance is 100 less the standard deviation, in percent, of the used shares.
func balance(usedCPU, allocCPU, usedMemory, allocMemory int64) int64 {
	if allocCPU == 0 || allocMemory == 0 {
		return maxScore // one resource alone cannot be out of balance
	}
	cpu := min(float64(usedCPU)/float64(allocCPU), 1)
	memory := min(float64(usedMemory)/float64(allocMemory), 1)
	return int64((1 - math.Abs((cpu-memory)/2)) * maxScore)
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
