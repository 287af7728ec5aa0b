package podgc

import (
	"cmp"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// surplus returns the ended pods beyond keep: evicted ones first, then the oldest.
func surplus(ended []*corev1.Pod, keep int) []*corev1.Pod {
	if len(ended) <= keep {
		return nil
	}
	sorted := slices.SortedFunc(slices.Values(ended), func(a, b *corev1.Pod) int {
		if ea, eb := evicted(a), evicted(b); ea != eb {
			if ea {
				return -1
			}
			return 1
		}
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	return sorted[:len(ended)-keep]
}

func evicted(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodFailed && p.Status.Reason == "Evicted"
}

// ending returns the pods that are being deleted on a node that is out of
// service: nobody there will report their end.
func ending(node *corev1.Node, pods []*corev1.Pod) []*corev1.Pod {
	if !outOfService(node) {
		return nil
	}
	var out []*corev1.Pod
	for _, p := range pods {
		if p.DeletionTimestamp != nil {
			out = append(out, p)
		}
	}
	return out
}

// outOfService says that an administrator vouches, by a taint, that nothing
// runs on the node any more, and that it does not report otherwise.
func outOfService(node *corev1.Node) bool {
	ready := slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	})
	return !ready && slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == corev1.TaintNodeOutOfService })
}
