package horizontalpodautoscaler

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	scaleclient "k8s.io/client-go/scale"
	metricsv1beta1 "k8s.io/metrics/pkg/apis/metrics/v1beta1"
	metricsclient "k8s.io/metrics/pkg/client/clientset/versioned/typed/metrics/v1beta1"
	customclient "k8s.io/metrics/pkg/client/custom_metrics"
	externalclient "k8s.io/metrics/pkg/client/external_metrics"
)

// rediscover is how often at most the API is asked which kinds it has, because one is not known. Upstream asks every 30 s in any case.
const rediscover = 30 * time.Second

// defaultWindow is the window of a custom metric that does not tell it.
const defaultWindow = time.Minute

// apiWorld is the World behind an API server. Its clients are made, and discovery is read, when the first autoscaler needs them.
type apiWorld struct {
	cfg *rest.Config

	mu      sync.Mutex // guards the rest
	clients *clients
	reset   time.Time // when mapper forgot what it knew
}

type clients struct {
	mapper   *restmapper.DeferredDiscoveryRESTMapper
	scales   scaleclient.ScalesGetter
	metrics  metricsclient.PodMetricsesGetter
	custom   customclient.CustomMetricsClient
	versions customclient.AvailableAPIsGetter
	external externalclient.ExternalMetricsClient
}

// NewWorld reads and scales through the API that cfg leads to.
func NewWorld(cfg *rest.Config) World { return &apiWorld{cfg: cfg} }

// get makes the clients at first use.
func (w *apiWorld) get() (*clients, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.clients != nil {
		return w.clients, nil
	}
	disco, err := discovery.NewDiscoveryClientForConfig(w.cfg)
	if err != nil {
		return nil, fmt.Errorf("discovery for autoscalers: %w", err)
	}
	mapper := restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(disco))
	scales, err := scaleclient.NewForConfig(w.cfg, mapper, dynamic.LegacyAPIPathResolverFunc, scaleclient.NewDiscoveryScaleKindResolver(disco))
	if err != nil {
		return nil, fmt.Errorf("client of scales: %w", err)
	}
	metrics, err := metricsclient.NewForConfig(w.cfg)
	if err != nil {
		return nil, fmt.Errorf("client of metrics: %w", err)
	}
	plain := rest.CopyConfig(w.cfg) // adapters of other makers need not know protobuf
	plain.ContentConfig = rest.ContentConfig{}
	external, err := externalclient.NewForConfig(plain)
	if err != nil {
		return nil, fmt.Errorf("client of external metrics: %w", err)
	}
	versions := customclient.NewAvailableAPIsGetter(disco)
	w.clients = &clients{mapper: mapper, scales: scales, metrics: metrics, external: external, versions: versions,
		custom: customclient.NewForConfig(plain, mapper, versions)}
	w.reset = time.Now()
	return w.clients, nil
}

// mappings finds the resources of a kind; one that is not known may be new.
func (w *apiWorld) mappings(c *clients, kind schema.GroupKind) ([]*meta.RESTMapping, error) {
	found, err := c.mapper.RESTMappings(kind)
	if !meta.IsNoMatchError(err) {
		return found, err
	}
	w.mu.Lock()
	again := time.Since(w.reset) >= rediscover
	if again {
		w.reset = time.Now()
	}
	w.mu.Unlock()
	if !again {
		return nil, err
	}
	c.mapper.Reset()
	return c.mapper.RESTMappings(kind)
}

// Scale implements World.
func (w *apiWorld) Scale(ctx context.Context, namespace string, ref autoscalingv2.CrossVersionObjectReference) (*autoscalingv1.Scale, schema.GroupResource, error) {
	var none schema.GroupResource
	gv, err := schema.ParseGroupVersion(ref.APIVersion)
	if err != nil {
		return nil, none, err
	}
	c, err := w.get()
	if err != nil {
		return nil, none, err
	}
	mappings, err := w.mappings(c, schema.GroupKind{Group: gv.Group, Kind: ref.Kind})
	if err != nil {
		return nil, none, err
	}
	first := errors.New("unrecognized resource")
	for i, m := range mappings {
		of := m.Resource.GroupResource()
		scale, err := c.scales.Scales(namespace).Get(ctx, of, ref.Name, metav1.GetOptions{})
		if err == nil {
			return scale, of, nil
		}
		if i == 0 {
			first = err
		}
	}
	return nil, none, first
}

// SetScale implements World.
func (w *apiWorld) SetScale(ctx context.Context, namespace string, of schema.GroupResource, scale *autoscalingv1.Scale) error {
	c, err := w.get()
	if err != nil {
		return err
	}
	_, err = c.scales.Scales(namespace).Update(ctx, of, scale, metav1.UpdateOptions{})
	return err
}

// Resource implements World.
func (w *apiWorld) Resource(ctx context.Context, namespace string, resource corev1.ResourceName, container string, pods labels.Selector) (map[string]Sample, error) {
	c, err := w.get()
	if err != nil {
		return nil, err
	}
	list, err := c.metrics.PodMetricses(namespace).List(ctx, metav1.ListOptions{LabelSelector: pods.String()})
	if err != nil {
		return nil, fmt.Errorf("unable to fetch metrics from resource metrics API: %w", err)
	}
	if len(list.Items) == 0 {
		return nil, errors.New("no metrics returned from resource metrics API")
	}
	out := map[string]Sample{}
	for i := range list.Items {
		if used, ok := use(&list.Items[i], resource, container); ok {
			out[list.Items[i].Name] = Sample{Value: used, At: list.Items[i].Timestamp.Time, Window: list.Items[i].Window.Duration}
		}
	}
	return out, nil
}

// use is what one container of a pod uses, or all; of all if it is known of each.
func use(m *metricsv1beta1.PodMetrics, resource corev1.ResourceName, container string) (sum int64, ok bool) {
	for i := range m.Containers {
		c := &m.Containers[i]
		if container != "" && c.Name != container {
			continue
		}
		q, known := c.Usage[resource]
		if !known {
			return 0, false
		}
		sum, ok = sum+q.MilliValue(), true
	}
	return sum, ok
}

// Pods implements World.
func (w *apiWorld) Pods(_ context.Context, namespace, metric string, pods, metrics labels.Selector) (map[string]Sample, error) {
	c, err := w.get()
	if err != nil {
		return nil, err
	}
	list, err := c.custom.NamespacedMetrics(namespace).GetForObjects(schema.GroupKind{Kind: "Pod"}, pods, metric, metrics)
	if err != nil {
		c.versions.Invalidate() // it may be served in another version now
		return nil, fmt.Errorf("unable to fetch metrics from custom metrics API: %w", err)
	}
	if len(list.Items) == 0 {
		return nil, errors.New("no metrics returned from custom metrics API")
	}
	out := map[string]Sample{}
	for _, m := range list.Items {
		s := Sample{Value: m.Value.MilliValue(), At: m.Timestamp.Time, Window: defaultWindow}
		if m.WindowSeconds != nil {
			s.Window = time.Duration(*m.WindowSeconds) * time.Second
		}
		out[m.DescribedObject.Name] = s
	}
	return out, nil
}

// Object implements World.
func (w *apiWorld) Object(_ context.Context, namespace, metric string, ref autoscalingv2.CrossVersionObjectReference, metrics labels.Selector) (int64, error) {
	c, err := w.get()
	if err != nil {
		return 0, err
	}
	kind := schema.FromAPIVersionAndKind(ref.APIVersion, ref.Kind).GroupKind()
	from, object := c.custom.NamespacedMetrics(namespace), ref.Name
	if kind == (schema.GroupKind{Kind: "Namespace"}) {
		from, object = c.custom.RootScopedMetrics(), namespace // its own, whatever it names
	}
	value, err := from.GetForObject(kind, object, metric, metrics)
	if err != nil {
		c.versions.Invalidate()
		return 0, fmt.Errorf("unable to fetch metrics from custom metrics API: %w", err)
	}
	return value.Value.MilliValue(), nil
}

// External implements World.
func (w *apiWorld) External(_ context.Context, namespace, metric string, metrics labels.Selector) ([]int64, error) {
	c, err := w.get()
	if err != nil {
		return nil, err
	}
	list, err := c.external.NamespacedMetrics(namespace).List(metric, metrics)
	if err != nil {
		return nil, fmt.Errorf("unable to fetch metrics from external metrics API: %w", err)
	}
	if len(list.Items) == 0 {
		return nil, errors.New("no metrics returned from external metrics API")
	}
	var out []int64
	for _, m := range list.Items {
		out = append(out, m.Value.MilliValue())
	}
	return out, nil
}
