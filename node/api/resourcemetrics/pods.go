package resourcemetrics

import (
	"cmp"
	"context"
	"errors"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metainternalversion "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	genericapirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/metrics/pkg/apis/metrics"
	metricsv1beta1 "k8s.io/metrics/pkg/apis/metrics/v1beta1"

	"skein.io/skein/node/agent/usage"
)

// pods is the storage of PodMetrics.
type pods struct {
	*collector
	kind
}

func newPods(c *collector) *pods {
	return &pods{c, kind{name: "PodMetrics", namespaced: true,
		one: func() runtime.Object { return &metrics.PodMetrics{} }, list: func() runtime.Object { return &metrics.PodMetricsList{} }}}
}

// List implements rest.Lister. For one namespace only the nodes are asked on which pods are that the selectors match: that of an autoscaler must not cost a
// question to every node of a large cluster.
func (s *pods) List(ctx context.Context, opts *metainternalversion.ListOptions) (runtime.Object, error) {
	labelSelector, fieldSelector, err := selectors(opts, "pods", "metadata.name", "metadata.namespace")
	if err != nil {
		return nil, err
	}
	namespace := genericapirequest.NamespaceValue(ctx)
	all, err := s.allNodes(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	if namespace != "" {
		on, err := s.nodesOf(ctx, namespace, labelSelector)
		if err != nil {
			return nil, err
		}
		all = slices.DeleteFunc(all, func(n *corev1.Node) bool { return !on[n.Name] })
	}
	list := &metrics.PodMetricsList{Items: []metrics.PodMetrics{}}
	s.collect(ctx, all, func(_ *corev1.Node, r usage.Report) {
		for i := range r.Pods {
			p := &r.Pods[i]
			if (namespace == "" || p.Namespace == namespace) && labelSelector.Matches(labels.Set(p.Labels)) &&
				fieldSelector.Matches(fields.Set{"metadata.name": p.Name, "metadata.namespace": p.Namespace}) {
				list.Items = append(list.Items, podMetrics(p))
			}
		}
	})
	slices.SortFunc(list.Items, func(a, b metrics.PodMetrics) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return list, ctx.Err()
}

// nodesOf finds the nodes of the pods that a selector matches, page by page: no more than one page is in memory.
func (s *pods) nodesOf(ctx context.Context, namespace string, selector labels.Selector) (map[string]bool, error) {
	on := map[string]bool{}
	opts := metav1.ListOptions{LabelSelector: selector.String(), Limit: pageSize}
	for {
		list, err := s.cfg.Client.CoreV1().Pods(namespace).List(ctx, opts)
		if err != nil {
			return nil, err
		}
		for i := range list.Items {
			on[list.Items[i].Spec.NodeName] = true
		}
		if opts.Continue = list.Continue; opts.Continue == "" {
			return on, nil
		}
	}
}

// Get implements rest.Getter.
func (s *pods) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	namespace := genericapirequest.NamespaceValue(ctx)
	m, err := s.get(ctx, namespace, name)
	if apierrors.IsNotFound(err) || errors.Is(err, errNoMetrics) {
		return nil, notFound("pods", namespace+"/"+name)
	}
	return m, err
}

var errNoMetrics = errors.New("no metrics")

func (s *pods) get(ctx context.Context, namespace, name string) (runtime.Object, error) {
	pod, err := s.cfg.Client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	if pod.Spec.NodeName == "" {
		return nil, errNoMetrics
	}
	n, err := s.cfg.Client.CoreV1().Nodes().Get(ctx, pod.Spec.NodeName, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	if !answers(n) {
		return nil, errNoMetrics
	}
	r, err := s.ask(ctx, n)
	if err != nil {
		s.cfg.Logger.Debug("a node does not say what it uses", "node", n.Name, "err", err)
		return nil, errNoMetrics
	}
	i := slices.IndexFunc(r.Pods, func(p metricsv1beta1.PodMetrics) bool { return p.UID == pod.UID })
	if i < 0 {
		return nil, errNoMetrics
	}
	m := podMetrics(&r.Pods[i])
	return &m, nil
}

func podMetrics(p *metricsv1beta1.PodMetrics) metrics.PodMetrics {
	m := metrics.PodMetrics{
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, Labels: p.Labels, CreationTimestamp: metav1.Now()},
		Timestamp:  p.Timestamp, Window: p.Window,
	}
	for _, c := range p.Containers {
		m.Containers = append(m.Containers, metrics.ContainerMetrics{Name: c.Name, Usage: c.Usage})
	}
	return m
}
