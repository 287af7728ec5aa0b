package resourcemetrics

import (
	"cmp"
	"context"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metainternalversion "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/metrics/pkg/apis/metrics"

	"skein.io/skein/node/agent/usage"
)

// nodes is the storage of NodeMetrics.
type nodes struct {
	*collector
	kind
}

func newNodes(c *collector) *nodes {
	return &nodes{c, kind{name: "NodeMetrics",
		one: func() runtime.Object { return &metrics.NodeMetrics{} }, list: func() runtime.Object { return &metrics.NodeMetricsList{} }}}
}

// List implements rest.Lister.
func (s *nodes) List(ctx context.Context, opts *metainternalversion.ListOptions) (runtime.Object, error) {
	labelSelector, fieldSelector, err := selectors(opts, "nodes", "metadata.name")
	if err != nil {
		return nil, err
	}
	all, err := s.allNodes(ctx, metav1.ListOptions{LabelSelector: labelSelector.String()})
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(n *corev1.Node) bool { return !fieldSelector.Matches(fields.Set{"metadata.name": n.Name}) })
	list := &metrics.NodeMetricsList{Items: []metrics.NodeMetrics{}}
	s.collect(ctx, all, func(n *corev1.Node, r usage.Report) { list.Items = append(list.Items, nodeMetrics(n, r)) })
	slices.SortFunc(list.Items, func(a, b metrics.NodeMetrics) int { return cmp.Compare(a.Name, b.Name) })
	return list, ctx.Err()
}

// Get implements rest.Getter.
func (s *nodes) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	n, err := s.cfg.Client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) || err == nil && !answers(n) {
		return nil, notFound("nodes", name)
	}
	if err != nil {
		return nil, err
	}
	r, err := s.ask(ctx, n)
	if err != nil {
		s.cfg.Logger.Debug("a node does not say what it uses", "node", name, "err", err)
		return nil, notFound("nodes", name)
	}
	m := nodeMetrics(n, r)
	return &m, nil
}

// nodeMetrics puts what the API knows of a node to what its agent says.
func nodeMetrics(n *corev1.Node, r usage.Report) metrics.NodeMetrics {
	return metrics.NodeMetrics{
		ObjectMeta: metav1.ObjectMeta{Name: n.Name, Labels: n.Labels, CreationTimestamp: metav1.Now()},
		Timestamp:  r.Node.Timestamp, Window: r.Node.Window, Usage: r.Node.Usage,
	}
}
