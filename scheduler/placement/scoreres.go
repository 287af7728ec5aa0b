package placement

import (
	"math"
	"slices"

	v1 "k8s.io/api/core/v1"
)

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
	return betterBy(with - without)
}

func betterBy(difference int64) int64 { return maxScore/2 + (maxScore/2+difference)/2 }

// balance is 100 less the standard deviation, in percent, of the used shares.
func balance(usedCPU, allocCPU, usedMemory, allocMemory int64) int64 {
	if allocCPU == 0 || allocMemory == 0 {
		return maxScore // one resource alone cannot be out of balance
	}
	cpu := min(float64(usedCPU)/float64(allocCPU), 1)
	memory := min(float64(usedMemory)/float64(allocMemory), 1)
	return int64((1 - math.Abs((cpu-memory)/2)) * maxScore)
}

// nothingToBalance is true of pods that request none of the balanced
// resources: drawn to the same nodes by their balance, many of them would go
// there (kubernetes issue 129138).
func (p *plan) nothingToBalance() bool {
	for _, name := range p.rules.Balanced {
		if p.info.request.of(name) != 0 {
			return false
		}
	}
	return true
}

// fitScorer scores by any resources and strategy.
type fitScorer struct {
	own []int64 // what the pod requests, parallel to the profile's Resources
}

func newFitScorer(rules *Profile, info *podInfo) fitScorer {
	var f fitScorer
	if rules.plainFit {
		return f
	}
	for _, r := range rules.Resources {
		f.own = append(f.own, info.scoredRequest(r.Name))
	}
	return f
}

// scoredRequest is what the pod to be placed counts with in scores of
// NodeResourcesFit.
func (info *podInfo) scoredRequest(name v1.ResourceName) int64 {
	switch name {
	case v1.ResourceCPU:
		return info.scoreCPU
	case v1.ResourceMemory:
		return info.scoreMemory
	}
	return info.scoreOther.of(name)
}

// scoredUse is what the node's pods count with likewise.
func (n *node) scoredUse(name v1.ResourceName) int64 {
	switch name {
	case v1.ResourceCPU:
		return n.scoreCPU
	case v1.ResourceMemory:
		return n.scoreMemory
	}
	return n.used.of(name)
}

func (f *fitScorer) score(p *plan, n *node) int64 {
	var sum, weights int64
	for i, r := range p.rules.Resources {
		if f.own[i] == 0 && isScalar(r.Name) {
			continue // a node is not judged by extended resources that the pod does not want
		}
		alloc, used := p.offered(n, r.Name, n.scoredUse(r.Name))
		if alloc == 0 {
			continue
		}
		used += f.own[i]
		var score int64
		switch p.rules.Strategy {
		case LeastAllocated:
			if used <= alloc {
				score = (alloc - used) * maxScore / alloc
			}
		case MostAllocated:
			score = min(used, alloc) * maxScore / alloc
		case RequestedToCapacityRatio:
			if score = p.rules.onCurve(used, alloc); score <= 0 {
				continue
			}
		}
		sum += score * r.Weight
		weights += r.Weight
	}
	switch {
	case weights == 0:
		return 0
	case p.rules.Strategy == RequestedToCapacityRatio:
		return int64(math.Round(float64(sum) / float64(weights)))
	}
	return sum / weights
}

// onCurve reads the score of a utilisation off the profile's shape.
func (r *Profile) onCurve(used, alloc int64) int64 {
	at := int64(100)
	if used <= alloc {
		at = used * 100 / alloc
	}
	for i, point := range r.curve {
		if at > point.Utilization {
			continue
		}
		if i == 0 {
			return point.Score
		}
		left := r.curve[i-1]
		return left.Score + (point.Score-left.Score)*(at-left.Utilization)/(point.Utilization-left.Utilization)
	}
	return r.curve[len(r.curve)-1].Score
}

// balancer compares the shares of any resources.
type balancer struct{ with, without []float64 }

func newBalancer(rules *Profile) balancer {
	if rules.plainBalanced {
		return balancer{}
	}
	return balancer{make([]float64, 0, len(rules.Balanced)), make([]float64, 0, len(rules.Balanced))}
}

func (b *balancer) score(p *plan, n *node) int64 {
	b.with, b.without = b.with[:0], b.without[:0]
	for _, name := range p.rules.Balanced {
		own := p.info.request.of(name)
		if own == 0 && isScalar(name) {
			continue
		}
		alloc, used := p.offered(n, name, n.used.of(name))
		if alloc == 0 {
			continue
		}
		b.with = append(b.with, min(float64(used+own)/float64(alloc), 1))
		b.without = append(b.without, min(float64(used)/float64(alloc), 1))
	}
	return betterBy(evenness(b.with) - evenness(b.without))
}

// weighsScalars reports whether the profile scores nodes by a resource, counted
// by name, that the pod requests: devices may stand for it.
func weighsScalars(rules *Profile, info *podInfo) bool {
	for _, r := range rules.Resources {
		if isScalar(r.Name) && info.scoredRequest(r.Name) != 0 {
			return true
		}
	}
	return slices.ContainsFunc(rules.Balanced, func(name v1.ResourceName) bool {
		return isScalar(name) && info.request.of(name) != 0
	})
}

// evenness is 100 less the standard deviation, in percent.
func evenness(shares []float64) int64 {
	var deviation float64
	switch len(shares) {
	case 0, 1:
	case 2:
		deviation = math.Abs((shares[0] - shares[1]) / 2)
	default:
		var total, squares float64
		for _, s := range shares {
			total += s
		}
		mean := total / float64(len(shares))
		for _, s := range shares {
			squares += (s - mean) * (s - mean)
		}
		deviation = math.Sqrt(squares / float64(len(shares)))
	}
	return int64((1 - deviation) * maxScore)
}
