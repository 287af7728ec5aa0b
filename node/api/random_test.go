package api

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/cbor/direct"
	wire "k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes/scheme"
	restclient "k8s.io/client-go/rest"
)

// Whatever comes in, the answer is the client's fault or a result: never a failure of the server, which is what a panic becomes.
// SKEIN_SEED repeats a run, SKEIN_REQUESTS makes it longer.
func TestRandomRequests(t *testing.T) {
	seed, n := uint64(time.Now().UnixNano()), 1500
	if v, err := strconv.ParseUint(os.Getenv("SKEIN_SEED"), 10, 64); err == nil {
		seed = v
	}
	if v, err := strconv.Atoi(os.Getenv("SKEIN_REQUESTS")); err == nil {
		n = v
	}
	t.Logf("SKEIN_SEED=%d", seed)
	k := admin(t)
	g := &requestMaker{Rand: rand.New(rand.NewPCG(seed, 0)), namespace: namespace(t, k)}
	lists, err := k.Discovery().ServerPreferredResources()
	if err != nil {
		t.Fatal(err)
	}
	before := clusterWide(t, lists)
	t.Cleanup(func() {
		eventually(t, func(ctx context.Context) (err error) { // a webhook among them may hold the others
			for uid, o := range clusterWide(t, lists) {
				if before[uid] == (clusterObject{}) {
					err = fmt.Errorf("%s is left: %v", o.name, o.remove(ctx))
				}
			}
			return err
		})
	})
	for _, l := range lists {
		for _, r := range l.APIResources {
			if r.Name != "namespaces" && r.Name != "customresourcedefinitions" && r.Name != "apiservices" { // would take others' away
				g.resources = append(g.resources, someResource{l.GroupVersion, r.Name, r.Kind, r.Namespaced})
			}
		}
	}
	client := k.CoreV1().RESTClient().(*restclient.RESTClient).Client
	codes := map[int]int{}
	for i := range n {
		method, path, body, header := g.request()
		r, err := http.NewRequestWithContext(t.Context(), method, cluster.servers[0].tls.URL, bytes.NewReader(body))
		if err != nil {
			continue // not one that can be sent
		}
		if r.URL, err = url.Parse(cluster.servers[0].tls.URL + path); err != nil {
			continue
		}
		r.Header = header
		resp, err := client.Do(r)
		if err != nil {
			t.Fatalf("request %d: %s %s %v %q: no answer: %v", i, method, path, header, body[:min(len(body), 500)], err)
		}
		answer, _ := io.ReadAll(io.LimitReader(resp.Body, 1000)) // a watch may be cut
		resp.Body.Close()
		codes[resp.StatusCode]++
		// 501 to 504: what is not there, an agent that cannot be reached, too much at once, a revision of the future.
		if resp.StatusCode == http.StatusInternalServerError && !slices.ContainsFunc(upstreams500, func(m string) bool { return bytes.Contains(answer, []byte(m)) }) {
			t.Errorf("request %d: %s %s %v\n%q\n%s", i, method, path, header, body[:min(len(body), 2000)], answer)
		}
	}
	t.Log("answers by code: ", codes)
	if codes[200]+codes[201] == 0 || codes[400] == 0 || codes[422] == 0 {
		t.Errorf("the requests are all alike: %v", codes)
	}
}

// clusterObject is an object of no namespace.
type clusterObject struct {
	api  dynamic.ResourceInterface
	name string
}

// clusterWide lists them, but addresses, which go with Services. What is good among random requests makes nodes and webhooks like any other,
// and those are there for all tests that follow.
func clusterWide(t *testing.T, lists []*metav1.APIResourceList) map[types.UID]clusterObject {
	t.Helper()
	all := map[types.UID]clusterObject{}
	dyn, err := dynamic.NewForConfig(cluster.as(cluster.servers[0], "admin", "system:masters"))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lists {
		for _, r := range l.APIResources {
			if r.Namespaced || r.Name == "ipaddresses" || !slices.Contains(r.Verbs, "list") || !slices.Contains(r.Verbs, "delete") {
				continue
			}
			gv, err := schema.ParseGroupVersion(l.GroupVersion)
			if err != nil {
				t.Fatal(err)
			}
			api := dyn.Resource(gv.WithResource(r.Name))
			have, err := api.List(context.Background(), metav1.ListOptions{})
			if err != nil {
				t.Fatalf("%s: %v", r.Name, err)
			}
			for _, o := range have.Items {
				all[o.GetUID()] = clusterObject{api, o.GetName()}
			}
		}
	}
	return all
}

func (o clusterObject) remove(ctx context.Context) error {
	if err := o.api.Delete(ctx, o.name, metav1.DeleteOptions{}); err != nil {
		return err
	}
	_, err := o.api.Patch(ctx, o.name, types.MergePatchType, []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{})
	return err
}

// upstreams500 are words of refusals that say what is wrong with a request, and to which upstream gives the code 500. So does Skein: clients
// cannot tell them apart (test/diffapi).
var upstreams500 = []string{"failed to create typed patch object", "target.name: Required value", "unable to find api field in struct"}

type someResource struct {
	groupVersion, name, kind string
	namespaced               bool
}

// requestMaker makes requests that are a little wrong.
type requestMaker struct {
	*rand.Rand
	resources []someResource
	namespace string
}

func pick[T any](g *requestMaker, of ...T) T { return of[g.IntN(len(of))] }

func (g *requestMaker) request() (method, path string, body []byte, header http.Header) {
	r := pick(g, g.resources...)
	method = pick(g, "GET", "POST", "POST", "POST", "PUT", "PATCH", "PATCH", "DELETE", "HEAD", "OPTIONS", "X")
	path = "/apis/" + r.groupVersion
	if !strings.Contains(r.groupVersion, "/") {
		path = "/api/" + r.groupVersion
	}
	if r.namespaced {
		path += "/namespaces/" + g.namespace
	}
	path += "/" + r.name
	name := pick(g, "a", "b", "A_b", "x%2Fy", "%00", strings.Repeat("n", 300))
	if method != "POST" || g.IntN(8) == 0 {
		path += "/" + name
	}
	if g.IntN(6) == 0 {
		path += "/" + pick(g, "status", "scale", "log", "nosuch", "token", "eviction", "binding", "approval", "resize", "ephemeralcontainers")
	}
	if g.IntN(12) == 0 {
		b := []byte(path)
		b[g.IntN(len(b))] = byte(g.IntN(256))
		path = string(b)
	}
	q := url.Values{"timeoutSeconds": {"1"}, "timeout": {"5s"}}
	for range g.IntN(3) {
		q.Set(pick(g, "watch", "limit", "continue", "resourceVersion", "resourceVersionMatch", "sendInitialEvents", "allowWatchBookmarks", "labelSelector", "fieldSelector",
			"dryRun", "fieldManager", "fieldValidation", "force", "propagationPolicy", "gracePeriodSeconds", "orphanDependents", "includeObject", "pretty", "container", "follow"),
			pick(g, "", "0", "1", "-1", "true", "All", "x", "metadata.name=a", "a in (b", "Strict", "NotOlderThan", "Exact", "99999999999999999999", "\x00\xff", "eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6NSwic3RhcnQiOiJhIn0"))
	}
	path += "?" + q.Encode()
	body, kind := g.body(r)
	header = http.Header{"Content-Type": {kind}}
	if method == "PATCH" {
		header.Set("Content-Type", pick(g, "application/json-patch+json", "application/merge-patch+json", "application/strategic-merge-patch+json", "application/apply-patch+yaml", "x"))
	}
	header.Set("Accept", pick(g, "application/json", "application/json", "application/yaml", "application/vnd.kubernetes.protobuf", "*/*", "x",
		"application/json;as=Table;v=v1;g=meta.k8s.io", "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io"))
	return method, path, body, header
}

// body gives an object of the kind, often damaged, in one of the encodings.
func (g *requestMaker) body(r someResource) ([]byte, string) {
	o := map[string]any{"apiVersion": r.groupVersion, "kind": r.kind, "metadata": map[string]any{"name": pick(g, "a", "b", "", "A_b"), "namespace": pick(g, g.namespace, "", "x")}}
	for range g.IntN(4) {
		o[pick(g, "spec", "status", "data", "rules", "subjects", "webhooks", "metadata", "template", "items", "value", "roleRef", "endpoints", "ports")] = g.value(4)
	}
	b, err := (&unstructured.Unstructured{Object: o}).MarshalJSON()
	if err != nil {
		b = []byte("{}")
	}
	kind := "application/json"
	switch g.IntN(8) {
	case 0:
		if typed, _, err := scheme.Codecs.UniversalDeserializer().Decode(b, nil, nil); err == nil {
			if p, err := runtime.Encode(wire.NewSerializer(scheme.Scheme, scheme.Scheme), typed); err == nil {
				b, kind = p, "application/vnd.kubernetes.protobuf"
			}
		}
	case 1:
		if c, err := direct.Marshal(o); err == nil {
			b, kind = c, "application/cbor"
		}
	case 2:
		kind = "application/yaml"
	case 3:
		b, kind = []byte("k8s\x00"), "application/vnd.kubernetes.protobuf"
		for range g.IntN(200) {
			b = append(b, byte(g.IntN(256)))
		}
	case 4:
		b = []byte(pick(g, `[{"op":"add","path":"/metadata/labels","value":{"a":"b"}},{"op":"remove","path":"/spec/x/0"}]`, `[{"op":"copy","from":"","path":"/metadata/annotations"}]`,
			`{"metadata":{"labels":null,"ownerReferences":[{}],"managedFields":[{"fieldsV1":5}]}}`, `{"spec":{"$patch":"replace","containers":[{"$patch":"delete"}]}}`, `[`, `{"$setElementOrder/spec":[1]}`))
	}
	for g.IntN(3) == 0 && len(b) > 0 {
		switch i := g.IntN(len(b)); g.IntN(3) {
		case 0:
			b[i] = byte(g.IntN(256))
		case 1:
			b = b[:i]
		default:
			b = append(b[:i:i], append([]byte(pick(g, "{", "]", "null", `"x":`, "\xff")), b[i:]...)...)
		}
	}
	return b, kind
}

// value is any value, with names that kinds use.
func (g *requestMaker) value(depth int) any {
	if depth == 0 {
		return pick[any](g, nil, true, int64(-1), int64(0), int64(1)<<62, 1.5, "", "x", "A b", "10.0.0.1", "1Gi", "2026-01-01T00:00:00Z", strings.Repeat("long", 80))
	}
	if g.IntN(3) == 0 {
		return []any{g.value(depth - 1), g.value(depth - 1)}
	}
	m := map[string]any{}
	for range g.IntN(5) {
		m[pick(g, "containers", "name", "image", "selector", "matchLabels", "matchExpressions", "template", "metadata", "spec", "replicas", "ports", "port", "type", "clusterIP", "rules", "verbs",
			"resources", "limits", "cpu", "volumes", "schedule", "jobTemplate", "labels", "expression", "validations", "metrics", "minAvailable", "hard", "scopes", "devices", "requests", "nodeName",
			"key", "operator", "values", fmt.Sprint("f", g.IntN(100)))] = g.value(depth - 1)
	}
	return m
}
