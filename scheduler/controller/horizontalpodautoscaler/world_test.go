package horizontalpodautoscaler

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	autoscalingv2 "k8s.io/api/autoscaling/v2"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/rest"
)

// fakeAPI is an API server with a custom kind that can be scaled, and adapters of custom and external metrics.
type fakeAPI struct {
	mu       sync.Mutex // guards the rest
	groups   map[string][]metav1.APIResource
	replicas int32
	asked    []string
}

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, r.Method+" "+r.URL.RequestURI())
	answer := func(v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
	path := r.URL.Path
	switch {
	case path == "/api":
		answer(metav1.APIVersions{TypeMeta: metav1.TypeMeta{Kind: "APIVersions"}, Versions: []string{"v1"}})
		return
	case path == "/apis":
		list := metav1.APIGroupList{TypeMeta: metav1.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}}
		for gv := range f.groups {
			if group, version, ok := strings.Cut(gv, "/"); ok {
				v := metav1.GroupVersionForDiscovery{GroupVersion: gv, Version: version}
				list.Groups = append(list.Groups, metav1.APIGroup{Name: group, Versions: []metav1.GroupVersionForDiscovery{v}, PreferredVersion: v})
			}
		}
		answer(list)
		return
	}
	gv := strings.TrimPrefix(strings.TrimPrefix(path, "/apis/"), "/api/")
	if resources, ok := f.groups[gv]; ok {
		answer(metav1.APIResourceList{TypeMeta: metav1.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"}, GroupVersion: gv, APIResources: resources})
		return
	}
	value := func(name string) string {
		return fmt.Sprintf(`{"describedObject":{"kind":"Pod","namespace":"ns","name":%q},"metric":{"name":"qps"},"timestamp":"2026-11-21T12:00:00Z","windowSeconds":30,"value":"1500m"}`, name)
	}
	text := func(s string, a ...any) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, s, a...)
	}
	switch path {
	case "/apis/example.com/v1/namespaces/ns/widgets/w/scale":
		if r.Method == http.MethodPut {
			var in struct{ Spec struct{ Replicas int32 } }
			if json.NewDecoder(r.Body).Decode(&in) == nil {
				f.replicas = in.Spec.Replicas
			}
		}
		text(`{"kind":"Scale","apiVersion":"autoscaling/v1","metadata":{"name":"w","namespace":"ns"},"spec":{"replicas":%d},"status":{"replicas":2,"selector":"app=w"}}`, f.replicas)
	case "/apis/custom.metrics.k8s.io/v1beta2/namespaces/ns/pods/*/qps":
		text(`{"kind":"MetricValueList","apiVersion":"custom.metrics.k8s.io/v1beta2","items":[%s,%s]}`, value("a"), value("b"))
	case "/apis/custom.metrics.k8s.io/v1beta2/namespaces/ns/widgets.example.com/w/qps", "/apis/custom.metrics.k8s.io/v1beta2/namespaces/ns/metrics/qps":
		text(`{"kind":"MetricValueList","apiVersion":"custom.metrics.k8s.io/v1beta2","items":[%s]}`, value("w"))
	case "/apis/external.metrics.k8s.io/v1beta1/namespaces/ns/queue":
		text(`{"kind":"ExternalMetricValueList","apiVersion":"external.metrics.k8s.io/v1beta1","items":[{"metricName":"queue","timestamp":"2026-11-21T12:00:00Z","value":"7"},{"metricName":"queue","timestamp":"2026-11-21T12:00:00Z","value":"500m"}]}`)
	case "/apis/metrics.k8s.io/v1beta1/namespaces/ns/pods":
		text(`{"kind":"PodMetricsList","apiVersion":"metrics.k8s.io/v1beta1","items":[
			{"metadata":{"name":"a","namespace":"ns"},"timestamp":"2026-11-21T12:00:00Z","window":"15s","containers":[{"name":"c","usage":{"cpu":"250m","memory":"1Mi"}},{"name":"d","usage":{"cpu":"50m","memory":"1Mi"}}]},
			{"metadata":{"name":"b","namespace":"ns"},"timestamp":"2026-11-21T12:00:00Z","window":"15s","containers":[{"name":"c","usage":{"memory":"1Mi"}}]}]}`)
	default:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusNotFound)
		_ = json.NewEncoder(w).Encode(apierrors.NewNotFound(autoscalingv2.Resource("things"), path).Status())
	}
}

func TestWorldOfAnAPI(t *testing.T) {
	api := &fakeAPI{replicas: 2, groups: map[string][]metav1.APIResource{
		"v1":                              {{Name: "pods", Kind: "Pod", Namespaced: true}, {Name: "namespaces", Kind: "Namespace"}},
		"custom.metrics.k8s.io/v1beta2":   {},
		"external.metrics.k8s.io/v1beta1": {},
		"metrics.k8s.io/v1beta1":          {{Name: "pods", Kind: "PodMetrics", Namespaced: true}},
	}}
	srv := httptest.NewServer(api)
	defer srv.Close()
	w := NewWorld(&rest.Config{Host: srv.URL, QPS: -1, ContentConfig: rest.ContentConfig{ContentType: "application/vnd.kubernetes.protobuf", AcceptContentTypes: "application/vnd.kubernetes.protobuf,application/json"}}).(*apiWorld)
	ctx, all := t.Context(), labels.Everything()
	widget := autoscalingv2.CrossVersionObjectReference{Kind: "Widget", Name: "w", APIVersion: "example.com/v1"}

	// A kind that nobody knows does not make each look a discovery; one that is defined later is found.
	for range 5 {
		if _, _, err := w.Scale(ctx, "ns", widget); !meta.IsNoMatchError(err) {
			t.Fatalf("an unknown kind: %v", err)
		}
	}
	api.mu.Lock()
	discoveries := len(slices.DeleteFunc(slices.Clone(api.asked), func(s string) bool { return s != "GET /apis" && !strings.HasPrefix(s, "GET /apis?") }))
	api.groups["example.com/v1"] = []metav1.APIResource{{Name: "widgets", Kind: "Widget", Namespaced: true}, {Name: "widgets/scale", Kind: "Scale", Group: "autoscaling", Version: "v1", Namespaced: true}}
	api.mu.Unlock()
	if discoveries > 2 {
		t.Errorf("%d discoveries for five looks", discoveries)
	}
	w.mu.Lock()
	w.reset = time.Now().Add(-rediscover)
	w.mu.Unlock()
	scale, of, err := w.Scale(ctx, "ns", widget)
	if err != nil || scale.Spec.Replicas != 2 || scale.Status.Selector != "app=w" || of.String() != "widgets.example.com" {
		t.Fatalf("%+v of %s, %v", scale, of, err)
	}
	scale.Spec.Replicas = 5
	err = w.SetScale(ctx, "ns", of, scale)
	api.mu.Lock()
	if err != nil || api.replicas != 5 {
		t.Errorf("%d replicas, %v", api.replicas, err)
	}
	api.mu.Unlock()
	if _, _, err := w.Scale(ctx, "ns", autoscalingv2.CrossVersionObjectReference{Kind: "Widget", Name: "none", APIVersion: "example.com/v1"}); !apierrors.IsNotFound(err) {
		t.Errorf("a target that is not: %v", err)
	}
	if _, _, err := w.Scale(ctx, "ns", autoscalingv2.CrossVersionObjectReference{Kind: "Widget", Name: "w", APIVersion: "a/b/c"}); err == nil {
		t.Error("an impossible version")
	}

	used, err := w.Resource(ctx, "ns", "cpu", "", all)
	if err != nil || len(used) != 1 || used["a"].Value != 300 || used["a"].Window != 15*time.Second {
		t.Errorf("resource: %+v, %v", used, err)
	}
	if used, err = w.Resource(ctx, "ns", "cpu", "c", all); err != nil || len(used) != 1 || used["a"].Value != 250 {
		t.Errorf("of a container: %+v, %v", used, err)
	}
	pods, err := w.Pods(ctx, "ns", "qps", all, all)
	if err != nil || len(pods) != 2 || pods["b"].Value != 1500 || pods["b"].Window != 30*time.Second {
		t.Errorf("pods: %+v, %v", pods, err)
	}
	for _, ref := range []autoscalingv2.CrossVersionObjectReference{widget, {Kind: "Namespace", Name: "another", APIVersion: "v1"}} {
		if v, err := w.Object(ctx, "ns", "qps", ref, all); err != nil || v != 1500 {
			t.Errorf("object %s: %d, %v", ref.Kind, v, err)
		}
	}
	if v, err := w.External(ctx, "ns", "queue", all); err != nil || fmt.Sprint(v) != "[7000 500]" {
		t.Errorf("external: %v, %v", v, err)
	}
	if _, err := w.External(ctx, "ns", "nope", all); err == nil || !strings.Contains(err.Error(), "unable to fetch metrics from external metrics API") {
		t.Errorf("an external metric that is not: %v", err)
	}
}
