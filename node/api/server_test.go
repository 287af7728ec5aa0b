package api

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	etcdclient "go.etcd.io/etcd/client/v3/kubernetes"
	corev1 "k8s.io/api/core/v1"
	apiextv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"
	"skein.io/skein/node/api/kinds"
	"skein.io/skein/node/api/openapi"
)

// Two servers that start at the same moment on an empty store leave one of everything.
func TestBootstrap(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	for _, ns := range []string{"default", "kube-system", "kube-public", "kube-node-lease"} {
		if _, err := k.CoreV1().Namespaces().Get(ctx, ns, metav1.GetOptions{}); err != nil {
			t.Error(err)
		}
	}
	eventually(t, func(ctx context.Context) error {
		for name, ip := range map[string]string{"default/kubernetes": "10.96.0.1", "kube-system/kube-dns": "10.96.0.10"} {
			ns, n, _ := strings.Cut(name, "/")
			s, err := k.CoreV1().Services(ns).Get(ctx, n, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if s.Spec.ClusterIP != ip || len(s.Spec.Selector) != 0 {
				return fmt.Errorf("%s has %s, selector %v", name, s.Spec.ClusterIP, s.Spec.Selector)
			}
		}
		s, err := k.DiscoveryV1().EndpointSlices("default").Get(ctx, "kubernetes", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(s.Endpoints) != 1 || s.Endpoints[0].Addresses[0] != "192.0.2.10" || *s.Ports[0].Port != 6443 {
			return fmt.Errorf("slice %v %v", s.Endpoints, s.Ports)
		}
		_, err = k.CoreV1().ConfigMaps("kube-system").Get(ctx, "extension-apiserver-authentication", metav1.GetOptions{})
		return err
	})
	dns, err := k.CoreV1().Services("kube-system").Get(ctx, "kube-dns", metav1.GetOptions{})
	if err != nil || len(dns.Spec.Ports) != 2 || dns.Spec.Ports[0].Protocol == dns.Spec.Ports[1].Protocol || dns.Spec.Ports[0].Port != 53 || dns.Spec.Ports[1].Port != 53 {
		t.Errorf("kube-dns: %v, %v", dns.Spec.Ports, err)
	}
	for _, name := range []string{"system-node-critical", "system-cluster-critical"} {
		if _, err := k.SchedulingV1().PriorityClasses().Get(ctx, name, metav1.GetOptions{}); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"cluster-admin", "skein:node-proxier", "skein:agent-client"} {
		if _, err := k.RbacV1().ClusterRoleBindings().Get(ctx, name, metav1.GetOptions{}); err != nil {
			t.Error(err)
		}
	}
	if _, err := k.NetworkingV1().ServiceCIDRs().Get(ctx, "kubernetes", metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
}

// Nobody writes when nothing happens.
func TestIdleServersDoNotWrite(t *testing.T) {
	revision := func() int64 {
		r, err := cluster.store.KV.Get(t.Context(), "x")
		if err != nil {
			t.Fatal(err)
		}
		return r.Header.Revision
	}
	// What other tests set off may still be settling.
	before := revision()
	for quiet := time.Now(); time.Since(quiet) < 3*time.Second; time.Sleep(50 * time.Millisecond) {
		if now := revision(); now != before {
			before, quiet = now, time.Now()
		}
	}
	w := cluster.store.Watch(t.Context(), "", clientv3.WithPrefix(), clientv3.WithRev(before+1))
	select {
	case r := <-w:
		for _, e := range r.Events {
			t.Errorf("%s %s", e.Type, e.Kv.Key)
		}
	case <-time.After(20 * time.Second):
	}
}

func TestDiscoveryMatchesDocuments(t *testing.T) {
	k := admin(t)
	_, lists, err := k.Discovery().ServerGroupsAndResources()
	if err != nil {
		t.Fatal(err)
	}
	docs, err := openapi.Load(nil)
	if err != nil {
		t.Fatal(err)
	}
	var served []string
	for _, l := range lists {
		served = append(served, l.GroupVersion)
		path := "apis/" + l.GroupVersion
		if l.GroupVersion == "v1" {
			path = "api/v1"
		}
		if strings.HasSuffix(strings.Split(l.GroupVersion, "/")[0], "test.skein.io") {
			continue
		}
		doc, ok, err := docs.V3(path)
		if own := strings.HasPrefix(l.GroupVersion, "apiextensions.k8s.io/") || strings.HasPrefix(l.GroupVersion, "apiregistration.k8s.io/"); own {
			doc, err = k.Discovery().RESTClient().Get().AbsPath("/openapi/v3/" + path).DoRaw(t.Context())
			ok = err == nil
		}
		if err != nil || !ok {
			t.Errorf("%s has no document: %v", l.GroupVersion, err)
			continue
		}
		for _, r := range l.APIResources {
			name, sub, _ := strings.Cut(r.Name, "/")
			want := "/" + name + "/{name}/" + sub + `"`
			if sub == "" {
				want = "/" + name + `"`
			}
			if !strings.Contains(string(doc), want) {
				t.Errorf("document of %s lacks %s", l.GroupVersion, want)
			}
		}
	}
	all, err := kinds.Resources(map[string]string{"api/all": "true"})
	if err != nil {
		t.Fatal(err)
	}
	for gv := range kinds.Priorities() {
		if want := !slices.Contains(kinds.Extra(all), gv); want != slices.Contains(served, gv.String()) {
			t.Errorf("%s is served: %v", gv, !want)
		}
	}
	schema, err := k.Discovery().OpenAPISchema()
	if err != nil || len(schema.GetDefinitions().GetAdditionalProperties()) < 500 {
		t.Errorf("version 2 document: %d definitions, %v", len(schema.GetDefinitions().GetAdditionalProperties()), err)
	}
	paths, err := k.Discovery().OpenAPIV3().Paths()
	if err != nil || paths["apis/apps/v1"] == nil {
		t.Errorf("version 3 index: %d paths, %v", len(paths), err)
	}
}

func TestCustomResources(t *testing.T) {
	ctx, cfg := t.Context(), cluster.as(cluster.servers[0], "admin", "system:masters")
	crds, err := apiextclient.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	one := 1.0
	crd := &apiextv1.CustomResourceDefinition{ObjectMeta: metav1.ObjectMeta{Name: "looms.test.skein.io"}, Spec: apiextv1.CustomResourceDefinitionSpec{
		Group: "test.skein.io", Scope: apiextv1.NamespaceScoped, Names: apiextv1.CustomResourceDefinitionNames{Plural: "looms", Singular: "loom", Kind: "Loom", ListKind: "LoomList"},
		Versions: []apiextv1.CustomResourceDefinitionVersion{{Name: "v1", Served: true, Storage: true, Schema: &apiextv1.CustomResourceValidation{OpenAPIV3Schema: &apiextv1.JSONSchemaProps{
			Type: "object", Properties: map[string]apiextv1.JSONSchemaProps{"spec": {Type: "object", Properties: map[string]apiextv1.JSONSchemaProps{"threads": {Type: "integer", Minimum: &one}}}}}}}},
	}}
	if _, err := crds.ApiextensionsV1().CustomResourceDefinitions().Create(ctx, crd, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if err := crds.ApiextensionsV1().CustomResourceDefinitions().Delete(ctx, crd.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		eventually(t, func(context.Context) error {
			if _, err := crds.ApiextensionsV1().CustomResourceDefinitions().Get(ctx, crd.Name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
				return fmt.Errorf("still there: %v", err)
			}
			return nil
		})
	})
	k := admin(t)
	dyn, err := dynamic.NewForConfig(cluster.as(cluster.servers[1], "admin", "system:masters"))
	if err != nil {
		t.Fatal(err)
	}
	looms := dyn.Resource(schema.GroupVersionResource{Group: "test.skein.io", Version: "v1", Resource: "looms"}).Namespace(namespace(t, k))
	loom := func(threads int64) *unstructured.Unstructured {
		return &unstructured.Unstructured{Object: map[string]any{"apiVersion": "test.skein.io/v1", "kind": "Loom",
			"metadata": map[string]any{"name": "x"}, "spec": map[string]any{"threads": threads}}}
	}
	eventually(t, func(ctx context.Context) error {
		_, err := looms.Create(ctx, loom(3), metav1.CreateOptions{})
		return err
	})
	if _, err := looms.Update(ctx, loom(0), metav1.UpdateOptions{}); err == nil || !strings.Contains(err.Error(), "metadata.resourceVersion") {
		t.Errorf("update without a revision: %v", err)
	}
	if _, err := looms.Patch(ctx, "x", "application/merge-patch+json", []byte(`{"spec":{"threads":0}}`), metav1.PatchOptions{}); !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "spec.threads") {
		t.Errorf("value below the minimum: %v", err)
	}
	eventually(t, func(ctx context.Context) error {
		doc, err := k.Discovery().OpenAPISchema()
		if err != nil {
			return err
		}
		if !strings.Contains(doc.String(), "io.skein.test.v1.Loom") {
			return errors.New("version 2 document lacks Loom")
		}
		b, err := k.Discovery().RESTClient().Get().AbsPath("/openapi/v3/apis/test.skein.io/v1").DoRaw(ctx)
		if err != nil || !strings.Contains(string(b), "threads") {
			return fmt.Errorf("version 3 document: %v", err)
		}
		return nil
	})
}

func TestExtraAndPublicPaths(t *testing.T) {
	s := cluster.servers[0]
	get := func(k kubernetes.Interface, path string) (string, error) {
		b, err := k.Discovery().RESTClient().Get().AbsPath(path).DoRaw(t.Context())
		return string(b), err
	}
	nobody, alice := client(t, cluster.anonymous(s)), client(t, cluster.as(s, "alice"))
	if b, err := get(nobody, "/skein/v1/join"); b != "public /skein/v1/join" {
		t.Errorf("public path: %q, %v", b, err)
	}
	if _, err := get(alice, "/skein/v1/members"); !apierrors.IsForbidden(err) {
		t.Errorf("extra path as alice: %v", err)
	}
	if _, err := get(nobody, "/skein/v1/members"); !apierrors.IsUnauthorized(err) {
		t.Errorf("extra path as nobody: %v", err)
	}
	if b, err := get(admin(t), "/skein/v1/members"); b != "extra /skein/v1/members" {
		t.Errorf("extra path as admin: %q, %v", b, err)
	}
}

type termKey struct{}

// spy counts the writes whose context carries a term.
type spy struct {
	etcdclient.Interface
	seen chan any
}

func (s spy) OptimisticPut(ctx context.Context, key string, value []byte, rev int64, o etcdclient.PutOptions) (etcdclient.PutResponse, error) {
	if strings.Contains(key, "fenced") {
		s.seen <- ctx.Value(termKey{})
	}
	return s.Interface.OptimisticPut(ctx, key, value, rev, o)
}

func (s spy) OptimisticDelete(ctx context.Context, key string, rev int64, o etcdclient.DeleteOptions) (etcdclient.DeleteResponse, error) {
	if strings.Contains(key, "fenced") {
		s.seen <- ctx.Value(termKey{})
	}
	return s.Interface.OptimisticDelete(ctx, key, rev, o)
}

// What the leader puts into the context of its requests arrives at the store, for each kind of write;
// and a server can be started and stopped while the process goes on.
func TestLoopbackCarriesContext(t *testing.T) {
	cfg := cluster.config("n3")
	seen := make(chan any, 10)
	watched := &etcdclient.Client{Client: cluster.store.Client, Kubernetes: spy{cluster.store.Kubernetes, seen}}
	cfg.Store = func(string) *etcdclient.Client { return watched }
	s, err := cluster.start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.stop(); err != nil {
			t.Error(err)
		}
	}()
	k := client(t, s.Loopback("weaver/1", func(ctx context.Context) context.Context { return context.WithValue(ctx, termKey{}, 7) }))
	ctx := t.Context()
	expect := func(what string, want any) {
		t.Helper()
		select {
		case got := <-seen:
			if got != want {
				t.Errorf("%s carried %v, want %v", what, got, want)
			}
		case <-time.After(patience):
			t.Fatalf("%s did not reach the store", what)
		}
	}
	api := k.CoreV1().ConfigMaps(namespace(t, k))
	cm, err := api.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "fenced"}, Data: map[string]string{"a": "a"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if cm.ManagedFields[0].Manager != "weaver" {
		t.Errorf("manager %q", cm.ManagedFields[0].Manager)
	}
	expect("create", 7)
	cm.Data = map[string]string{"a": "b"}
	if _, err := api.Update(ctx, cm, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	expect("update", 7)
	if _, err := api.Patch(ctx, "fenced", "application/merge-patch+json", []byte(`{"data":{"a":"c"}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	expect("patch", 7)
	if err := api.Delete(ctx, "fenced", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	expect("delete", 7)
	plain := client(t, s.Loopback("weaver", nil))
	if _, err := plain.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "fenced-"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	expect("create without decoration", nil)
}

// A server that stops ends its watches, and its clients' requests fail instead of hanging.
func TestStopEndsWatches(t *testing.T) {
	s, err := cluster.start(cluster.config("n4"))
	if err != nil {
		t.Fatal(err)
	}
	k := client(t, cluster.as(s, "admin", "system:masters"))
	near := client(t, s.Loopback("test", nil))
	ended := make(chan error, 2)
	for _, c := range []kubernetes.Interface{k, near} {
		w, err := c.CoreV1().ConfigMaps("default").Watch(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for range w.ResultChan() {
			}
			ended <- nil
		}()
	}
	began := time.Now()
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		select {
		case <-ended:
		case <-time.After(patience):
			t.Fatal("a watch outlives its server")
		}
	}
	t.Logf("stopped in %s", time.Since(began))
}

// stuck is a store whose lists and watches wait for a leader until their context ends.
type stuck struct{ etcdclient.Interface }

func (stuck) List(ctx context.Context, _ string, _ etcdclient.ListOptions) (etcdclient.ListResponse, error) {
	<-ctx.Done()
	return etcdclient.ListResponse{}, ctx.Err()
}

type stuckWatcher struct{ clientv3.Watcher }

func (stuckWatcher) Watch(ctx context.Context, _ string, _ ...clientv3.OpOption) clientv3.WatchChan {
	c := make(chan clientv3.WatchResponse)
	context.AfterFunc(ctx, func() { close(c) })
	return c
}

// probed answers probes and nothing else.
type probed struct{ clientv3.KV }

func (p probed) Get(ctx context.Context, key string, o ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	if strings.HasSuffix(key, "/health") {
		return p.KV.Get(ctx, key, o...)
	}
	return deaf{}.Get(ctx, key, o...)
}

// deaf does not even answer probes.
type deaf struct{ clientv3.KV }

func (deaf) Get(ctx context.Context, _ string, _ ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// A server that is stopped before it ever got ready must not take the process with it.
func TestStopWithoutStore(t *testing.T) {
	exits := make(chan int, 10)
	before := klog.OsExit
	klog.OsExit = func(code int) {
		exits <- code
		runtime.Goexit()
	}
	defer func() { klog.OsExit = before }()
	for _, tc := range []struct {
		name string
		kv   clientv3.KV
	}{{"store answers watches at first", cluster.store.KV}, {"store answers probes only", probed{cluster.store.KV}}, {"store answers nothing", deaf{cluster.store.KV}}} {
		t.Run(tc.name, func(t *testing.T) {
			c := clientv3.NewCtxClient(t.Context())
			c.KV, c.Lease, c.Watcher = tc.kv, cluster.store.Lease, stuckWatcher{cluster.store.Watcher}
			k := &etcdclient.Client{Client: c, Kubernetes: stuck{cluster.store.Kubernetes}}
			cfg := cluster.config("n5")
			cfg.Store = func(string) *etcdclient.Client { return k }
			s, err := New(t.Context(), cfg)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- s.Run(ctx) }()
			select {
			case <-s.Ready():
				t.Fatal("ready without a store")
			case <-time.After(2 * time.Second): // long enough for its hooks to wait in vain
			}
			began := time.Now()
			cancel()
			select {
			case err := <-done:
				t.Logf("stopped after %s: %v", time.Since(began), err)
			case <-time.After(patience):
				t.Fatal("does not stop")
			}
			select {
			case code := <-exits:
				t.Fatalf("the process was ended with code %d", code)
			case <-time.After(500 * time.Millisecond):
			}
		})
	}
}

// Hooks that fail are called again, or left to themselves, but never reported to upstream.
func TestPatientHooks(t *testing.T) {
	b := &build{cfg: &Config{}}
	b.cfg.setDefaults()
	h := genericapiserver.PostStartHookContext{Context: t.Context()}
	for _, again := range []bool{true, false} {
		calls := 0
		hook := b.patient("x", func(genericapiserver.PostStartHookContext) error {
			if calls++; calls < 3 {
				return errors.New("no quorum")
			}
			return nil
		}, again)
		if err := hook(h); err != nil || calls != map[bool]int{true: 3, false: 1}[again] {
			t.Errorf("again %v: %d calls, %v", again, calls, err)
		}
	}
}

func TestHealth(t *testing.T) {
	k := admin(t)
	for _, path := range []string{"/livez", "/readyz", "/healthz"} {
		b, err := k.Discovery().RESTClient().Get().AbsPath(path).Param("verbose", "").DoRaw(t.Context())
		if err != nil || !strings.Contains(string(b), "[+]etcd ok") || !strings.Contains(string(b), "[+]poststarthook/rbac/bootstrap-roles ok") {
			t.Errorf("%s: %v\n%s", path, err, b)
		}
	}
	b, err := k.Discovery().RESTClient().Get().AbsPath("/metrics").DoRaw(t.Context())
	if err != nil || !strings.Contains(string(b), "apiserver_request_total") {
		t.Errorf("/metrics: %d bytes, %v", len(b), err)
	}
	cs, err := k.CoreV1().ComponentStatuses().List(t.Context(), metav1.ListOptions{})
	if err != nil || len(cs.Items) != 1 || cs.Items[0].Conditions[0].Status != corev1.ConditionTrue {
		t.Errorf("component statuses %v, %v", cs.Items, err)
	}
}

func TestValidateReportsAllFaults(t *testing.T) {
	_, err := New(t.Context(), Config{ServiceCIDR: netip.MustParsePrefix("10.96.0.1/30"), EvictionGrace: time.Millisecond, EventTTL: time.Millisecond, Issuer: "http://x", StorePrefix: "x",
		Extra: map[string]http.Handler{"/apis/x": nil}})
	if err == nil {
		t.Fatal("accepted")
	}
	for _, part := range []string{"NodeName", "AdvertiseIP", "Store ", "StorePrefix", "ClientCA", "SAKey", "Issuer", "KubeletClientCert", "ServiceCIDR", "DNSServiceIP", "EvictionGrace", "EventTTL", "Replicas", `Extra["/apis/x"]`} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%v\nlacks %s", err, part)
		}
	}
}

// A node may gain and lose its replica any number of times.
func TestStoppedServersLeaveNothingBehind(t *testing.T) {
	cycle := func() {
		t.Helper()
		s, err := cluster.start(cluster.config("n6"))
		if err != nil {
			t.Fatal(err)
		}
		if err := s.stop(); err != nil {
			t.Fatal(err)
		}
	}
	cycle() // what upstream makes once in a process
	settled := func() int {
		least, since := runtime.NumGoroutine(), time.Now()
		for time.Since(since) < 2*time.Second {
			time.Sleep(50 * time.Millisecond)
			if n := runtime.NumGoroutine(); n < least {
				least, since = n, time.Now()
			}
		}
		return least
	}
	before := settled()
	cycle()
	cycle()
	// One server runs some 700 goroutines.
	if after := settled(); after > before+50 {
		t.Errorf("%d goroutines before and %d after two more servers", before, after)
	}
}
