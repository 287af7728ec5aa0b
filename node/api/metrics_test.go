package api

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	apiregv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	metricsv1beta1 "k8s.io/metrics/pkg/apis/metrics/v1beta1"
	metricsclient "k8s.io/metrics/pkg/client/clientset/versioned/typed/metrics/v1beta1"

	agentusage "skein.io/skein/node/agent/usage"
)

// measuringAgent is the agent of a node on which the pods given use milli of CPU each. It counts how often it is asked.
func measuringAgent(t *testing.T, k kubernetes.Interface, node string, milli int64, pods ...*corev1.Pod) *atomic.Int32 {
	t.Helper()
	var asked atomic.Int32
	used := corev1.ResourceList{corev1.ResourceCPU: *resource.NewMilliQuantity(milli, resource.DecimalSI), corev1.ResourceMemory: resource.MustParse("16Mi")}
	report := agentusage.Report{Node: metricsv1beta1.NodeMetrics{Timestamp: metav1.Now(), Window: metav1.Duration{Duration: 15 * time.Second}, Usage: used}}
	for _, p := range pods {
		report.Pods = append(report.Pods, metricsv1beta1.PodMetrics{ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, UID: p.UID, Labels: p.Labels},
			Timestamp: metav1.Now(), Window: metav1.Duration{Duration: 15 * time.Second},
			Containers: []metricsv1beta1.ContainerMetrics{{Name: "c", Usage: used}, {Name: "side", Usage: used}}})
	}
	addr := agent(t, cluster.ca, node, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/stats/usage" {
			http.NotFound(w, r)
			return
		}
		asked.Add(1)
		_ = json.NewEncoder(w).Encode(report)
	}))
	reachable(t, k, node, addr)
	return &asked
}

func measured(t *testing.T, s *running, user string, groups ...string) *metricsclient.MetricsV1beta1Client {
	t.Helper()
	c, err := metricsclient.NewForConfig(cluster.as(s, user, groups...))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestResourceMetrics(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	joined(t, "measured-silent")
	a, b := bound(t, k, ns, "a", "measured-1", nil), bound(t, k, ns, "b", "measured-2", nil)
	bound(t, k, ns, "new", "measured-2", nil)
	one, two := measuringAgent(t, k, "measured-1", 250, a), measuringAgent(t, k, "measured-2", 1500, b)
	m := measured(t, cluster.servers[1], "admin", "system:masters")

	nodes, err := m.NodeMetricses().List(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range nodes.Items {
		got = append(got, fmt.Sprintf("%s %s %s", n.Name, n.Usage.Cpu(), n.Usage.Memory()))
	}
	if want := "measured-1 250m 16Mi, measured-2 1500m 16Mi"; strings.Join(got, ", ") != want {
		t.Errorf("nodes %q, want %s", got, want)
	}
	pods, err := m.PodMetricses(ns).List(ctx, metav1.ListOptions{})
	if err != nil || len(pods.Items) != 2 || pods.Items[0].Name != "a" || len(pods.Items[0].Containers) != 2 || pods.Items[1].Containers[1].Usage.Cpu().MilliValue() != 1500 ||
		pods.Items[0].Window.Duration != 15*time.Second || pods.Items[0].Labels["app"] != "a" {
		t.Errorf("pods %+v, %v", pods, err)
	}
	// Only the agents concerned are asked, and not again within moments.
	if _, err := m.PodMetricses(ns).List(ctx, metav1.ListOptions{}); err != nil || one.Load() != 1 || two.Load() != 1 {
		t.Errorf("asked %d and %d times, %v", one.Load(), two.Load(), err)
	}
	time.Sleep(3100 * time.Millisecond) // until those answers serve nobody any more
	if l, err := m.PodMetricses(ns).List(ctx, metav1.ListOptions{LabelSelector: "app=b"}); err != nil || len(l.Items) != 1 || one.Load() != 1 || two.Load() != 2 {
		t.Errorf("by label: %+v, %v; asked %d and %d times", l, err, one.Load(), two.Load())
	}
	if l, err := m.PodMetricses("").List(ctx, metav1.ListOptions{FieldSelector: "metadata.namespace=" + ns + ",metadata.name!=a"}); err != nil || len(l.Items) != 1 || l.Items[0].Name != "b" {
		t.Errorf("by field: %+v, %v", l, err)
	}
	if _, err := m.PodMetricses(ns).List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=x"}); !apierrors.IsBadRequest(err) {
		t.Errorf("by a field that metrics do not have: %v", err)
	}
	if p, err := m.PodMetricses(ns).Get(ctx, "b", metav1.GetOptions{}); err != nil || p.Name != "b" {
		t.Errorf("one pod: %+v, %v", p, err)
	}
	if n, err := m.NodeMetricses().Get(ctx, "measured-2", metav1.GetOptions{}); err != nil || n.Name != "measured-2" {
		t.Errorf("one node: %+v, %v", n, err)
	}
	for what, get := range map[string]func() error{
		"pod without a measurement yet": func() error { _, err := m.PodMetricses(ns).Get(ctx, "new", metav1.GetOptions{}); return err },
		"pod that is not":               func() error { _, err := m.PodMetricses(ns).Get(ctx, "none", metav1.GetOptions{}); return err },
		"node that does not answer":     func() error { _, err := m.NodeMetricses().Get(ctx, "measured-silent", metav1.GetOptions{}); return err },
	} {
		if err := get(); !apierrors.IsNotFound(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := k.CoreV1().RESTClient().Post().AbsPath("/apis/metrics.k8s.io/v1beta1/nodes").Body([]byte(`{}`)).Do(ctx).Error(); !apierrors.IsMethodNotSupported(err) {
		t.Errorf("create: %v", err)
	}
	table := &metav1.Table{}
	raw, err := k.CoreV1().RESTClient().Get().AbsPath("/apis/metrics.k8s.io/v1beta1/namespaces/"+ns+"/pods").SetHeader("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io").DoRaw(ctx)
	if err == nil {
		err = json.Unmarshal(raw, table)
	}
	if err != nil || len(table.Rows) != 2 || fmt.Sprint(table.Rows[1].Cells) != "[b 3 32Mi 15s]" {
		t.Errorf("table %s, %v", raw, err)
	}
}

// Who may view a namespace may see what its pods use, and nothing of others.
func TestWhoMaySeeMetrics(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	vera := measured(t, cluster.servers[0], "vera")
	if _, err := vera.PodMetricses(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("without any right: %v", err)
	}
	if _, err := k.RbacV1().RoleBindings(ns).Create(ctx, roleBinding("view", "User", "vera"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		_, err := vera.PodMetricses(ns).List(ctx, metav1.ListOptions{})
		return err
	})
	for what, list := range map[string]func() error{
		"all pods": func() error { _, err := vera.PodMetricses("").List(ctx, metav1.ListOptions{}); return err },
		"nodes":    func() error { _, err := vera.NodeMetricses().List(ctx, metav1.ListOptions{}); return err },
	} {
		if err := list(); !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	role, err := k.RbacV1().ClusterRoles().Get(ctx, "system:aggregated-metrics-reader", metav1.GetOptions{})
	if err != nil || !slices.ContainsFunc(role.Rules, func(r rbacv1.PolicyRule) bool { return slices.Contains(r.APIGroups, "metrics.k8s.io") }) {
		t.Errorf("%+v, %v", role, err)
	}
}

// An APIService of the user's takes the place of the built-in one, and gives it back.
func TestOwnMetricsServer(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	service(t, k, ns, "metrics-server", "127.0.0.1:1")
	m := measured(t, cluster.servers[0], "admin", "system:masters")
	if _, err := m.NodeMetricses().List(ctx, metav1.ListOptions{}); err != nil {
		t.Fatal(err)
	}
	r := registrations(t).ApiregistrationV1().APIServices()
	const name = "v1beta1.metrics.k8s.io"
	if _, err := r.Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Fatalf("there is one already, with which Helm would quarrel: %v", err)
	}
	_, err := r.Create(ctx, &apiregv1.APIService{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: apiregv1.APIServiceSpec{
		Service: &apiregv1.ServiceReference{Namespace: ns, Name: "metrics-server", Port: ptr(int32(443))}, Group: "metrics.k8s.io", Version: "v1beta1",
		InsecureSkipTLSVerify: true, GroupPriorityMinimum: 100, VersionPriority: 100}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		if _, err := m.NodeMetricses().List(ctx, metav1.ListOptions{}); !apierrors.IsServiceUnavailable(err) {
			return fmt.Errorf("it is not that one which answers: %v", err)
		}
		return nil
	})
	if err := r.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		_, err := m.NodeMetricses().List(ctx, metav1.ListOptions{})
		return err
	})
	eventually(t, func(ctx context.Context) error { return discovered(k) })
}

// discovered says whether clients old and new find the group, once.
func discovered(k kubernetes.Interface) error {
	for _, accept := range []string{"application/json", "application/vnd.kubernetes.protobuf", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"} {
		raw, err := k.CoreV1().RESTClient().Get().AbsPath("/apis").SetHeader("Accept", accept).DoRaw(context.Background())
		if err != nil {
			return err
		}
		if n := strings.Count(string(raw), "metrics.k8s.io/v1beta1") + strings.Count(string(raw), `"name":"metrics.k8s.io"`); n == 0 {
			return fmt.Errorf("%s: the group is not shown: %.300s", accept, raw)
		}
	}
	groups, lists, err := k.Discovery().ServerGroupsAndResources()
	if err != nil {
		return err
	}
	n := 0
	for _, g := range groups {
		if g.Name == "metrics.k8s.io" {
			n++
		}
	}
	i := slices.IndexFunc(lists, func(l *metav1.APIResourceList) bool { return l.GroupVersion == "metrics.k8s.io/v1beta1" })
	if n != 1 || i < 0 || len(lists[i].APIResources) != 2 || lists[i].APIResources[0].Kind != "NodeMetrics" || !lists[i].APIResources[1].Namespaced {
		return fmt.Errorf("%d groups, %+v", n, lists)
	}
	return nil
}

func TestMetricsAreDiscovered(t *testing.T) {
	if err := discovered(admin(t)); err != nil {
		t.Error(err)
	}
}
