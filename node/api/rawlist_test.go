package api

import (
	"bytes"
	"fmt"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes"
	restclient "k8s.io/client-go/rest"
)

// Lists and reads that are answered with what is stored are upstream's, byte for byte.
func TestRawListsAreUpstreams(t *testing.T) {
	cfg := cluster.as(cluster.servers[0], "admin", "system:masters")
	cfg.ContentType, cfg.AcceptContentTypes = protobuf, protobuf
	k, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, ns := t.Context(), namespace(t, k)
	core := func(k *kubernetes.Clientset) restclient.Interface { return k.CoreV1().RESTClient() }
	must := func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		meta := metav1.ObjectMeta{Name: fmt.Sprint("o", i), Labels: map[string]string{"a": "b", "c": fmt.Sprint(i)}, Annotations: map[string]string{"x": "y"}}
		p := simplePod(meta.Name)
		must(k.CoreV1().Pods(ns).Create(ctx, p, metav1.CreateOptions{}))
		must(k.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: meta, Data: map[string]string{"k": "v"}}, metav1.CreateOptions{}))
		must(k.CoreV1().Secrets(ns).Create(ctx, &corev1.Secret{ObjectMeta: meta, Data: map[string][]byte{"k": []byte("v")}}, metav1.CreateOptions{}))
		must(k.CoreV1().ServiceAccounts(ns).Create(ctx, &corev1.ServiceAccount{ObjectMeta: meta}, metav1.CreateOptions{}))
		must(k.AppsV1().ReplicaSets(ns).Create(ctx, &appsv1.ReplicaSet{ObjectMeta: meta, Spec: appsv1.ReplicaSetSpec{Selector: &metav1.LabelSelector{MatchLabels: p.Labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: p.Labels}, Spec: p.Spec}}}, metav1.CreateOptions{}))
		holder := "h"
		must(k.CoordinationV1().Leases(ns).Create(ctx, &coordinationv1.Lease{ObjectMeta: meta, Spec: coordinationv1.LeaseSpec{HolderIdentity: &holder}}, metav1.CreateOptions{}))
		must(k.DiscoveryV1().EndpointSlices(ns).Create(ctx, &discoveryv1.EndpointSlice{ObjectMeta: meta, AddressType: discoveryv1.AddressTypeIPv4,
			Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"10.0.0.1"}}}}, metav1.CreateOptions{}))
	}
	makeNode(t, k, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: ns}})
	storeOld(t, ns, "o1", "o9")
	for _, c := range []struct {
		client func(*kubernetes.Clientset) restclient.Interface
		gr     schema.GroupResource
		ns     string
		name   string
	}{
		{core, schema.GroupResource{Resource: "pods"}, ns, "o1"},
		{core, schema.GroupResource{Resource: "pods"}, "", ""},
		{core, schema.GroupResource{Resource: "configmaps"}, ns, "o1"},
		{core, schema.GroupResource{Resource: "configmaps"}, "", ""},
		{core, schema.GroupResource{Resource: "secrets"}, ns, "o1"},
		{core, schema.GroupResource{Resource: "serviceaccounts"}, ns, "o1"},
		{core, schema.GroupResource{Resource: "nodes"}, "", ns},
		{func(k *kubernetes.Clientset) restclient.Interface { return k.AppsV1().RESTClient() }, schema.GroupResource{Group: "apps", Resource: "replicasets"}, ns, "o1"},
		{func(k *kubernetes.Clientset) restclient.Interface { return k.CoordinationV1().RESTClient() }, schema.GroupResource{Group: "coordination.k8s.io", Resource: "leases"}, ns, "o1"},
		{func(k *kubernetes.Clientset) restclient.Interface { return k.DiscoveryV1().RESTClient() }, schema.GroupResource{Group: "discovery.k8s.io", Resource: "endpointslices"}, ns, "o1"},
		{core, schema.GroupResource{Resource: "pods"}, ns + "-there-is-nothing", ""},
	} {
		for _, media := range []string{protobuf, runtime.ContentTypeJSON} {
			read := func(name string, params ...string) []byte {
				r := c.client(k).Get().NamespaceIfScoped(c.ns, c.ns != "").Resource(c.gr.Resource).SetHeader("Accept", media)
				if name != "" {
					r = r.Name(name)
				}
				for i := 0; i < len(params); i += 2 {
					r = r.Param(params[i], params[i+1])
				}
				b, err := r.Do(ctx).Raw()
				if err != nil {
					t.Fatalf("%s: %v", c.gr, err)
				}
				return b
			}
			first, err := k.CoreV1().ConfigMaps("default").List(ctx, metav1.ListOptions{Limit: 1})
			if err != nil {
				t.Fatal(err)
			}
			at := []string{"resourceVersion", first.ResourceVersion, "resourceVersionMatch", "Exact"}
			compare := func(what string, got, want []byte) {
				t.Helper()
				if !bytes.Equal(got, want) {
					t.Errorf("%s in %q as %s, %s: %d bytes, upstream's has %d\n%q\n%q", c.gr, c.ns, media, what, len(got), len(want), got[:min(len(got), 300)], want[:min(len(want), 300)])
				}
			}
			// A selector that selects everything leaves the list to upstream, and a parameter the read.
			want := read("", append(at, "labelSelector", "!there-is-no-such-label")...)
			compare("a list that compares", read("", at...), want)
			compare("a list from memory", read("", at...), want)
			if c.name == "o1" && c.gr.Resource == "pods" {
				compare("a read of what an older version stored", read("o9"), read("o9", "resourceVersion", "0"))
				compare("a second one", read("o9"), read("o9", "resourceVersion", "0"))
				if !bytes.Contains(read("o9"), []byte("ClusterFirst")) {
					t.Error("the defaults are missing")
				}
			}
			if c.name != "" {
				compare("a read", read(c.name), read(c.name, "resourceVersion", "0"))
			}
		}
		if l := cluster.servers[0].build.stores.Raw(c.gr); l.Compared() == 0 {
			t.Errorf("%s: upstream made the lists", c.gr)
		}
	}

	// Pages, with what is left to come.
	people := cluster.as(cluster.servers[0], "admin", "system:masters")
	people.UserAgent = "curl/8" // gets indented JSON: upstream's
	j, err := kubernetes.NewForConfig(people)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range []metav1.ListOptions{{Limit: 2}, {Limit: 5}, {Limit: 500}, {}, {ResourceVersion: "0"}, {ResourceVersion: "1", ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan}} {
		for {
			got, err1 := k.CoreV1().Pods(ns).List(ctx, o)
			want, err2 := j.CoreV1().Pods(ns).List(ctx, o)
			if err1 != nil || err2 != nil {
				t.Fatal(err1, err2)
			}
			got.TypeMeta, want.TypeMeta = metav1.TypeMeta{}, metav1.TypeMeta{}
			want.ResourceVersion = got.ResourceVersion // the second list is of a later moment
			if o.Continue == "" {
				want.Continue, got.Continue = fmt.Sprint(want.Continue != ""), fmt.Sprint(got.Continue != "")
			}
			if !equality.Semantic.DeepEqual(got, want) {
				t.Errorf("%v: %v\nis %v\nwant %v", o, len(got.Items), got.ListMeta, want.ListMeta)
			}
			again, err := k.CoreV1().Pods(ns).List(ctx, o)
			if err != nil {
				t.Fatal(err)
			}
			if o.Continue = again.Continue; o.Continue == "" {
				break
			}
		}
	}
	for _, o := range []metav1.ListOptions{{Continue: "x"}, {ResourceVersion: "x"}, {ResourceVersion: "999999999"}} {
		_, err1 := k.CoreV1().Pods(ns).List(ctx, o)
		_, err2 := j.CoreV1().Pods(ns).List(ctx, o)
		if err1 == nil || err2 == nil || err1.Error()[:min(30, len(err1.Error()))] != err2.Error()[:min(30, len(err2.Error()))] {
			t.Errorf("%v: %v, want %v", o, err1, err2)
		}
	}
}

// storeOld stores a copy of a pod as a version without today's defaults might have.
func storeOld(t *testing.T, ns, name, to string) {
	t.Helper()
	key := "/registry/pods/" + ns + "/"
	r, err := cluster.store.KV.Get(t.Context(), key+name)
	if err != nil || len(r.Kvs) != 1 {
		t.Fatal(err, len(r.Kvs))
	}
	magic, p, u := []byte("k8s\x00"), &corev1.Pod{}, &runtime.Unknown{}
	if err := u.Unmarshal(bytes.TrimPrefix(r.Kvs[0].Value, magic)); err != nil {
		t.Fatal(err)
	}
	if err := p.Unmarshal(u.Raw); err != nil {
		t.Fatal(err)
	}
	p.Name, p.Spec.RestartPolicy, p.Spec.DNSPolicy, p.Spec.SecurityContext = to, "", "", nil
	if u.Raw, err = p.Marshal(); err != nil {
		t.Fatal(err)
	}
	b, err := u.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cluster.store.KV.Put(t.Context(), key+to, string(append(magic, b...))); err != nil {
		t.Fatal(err)
	}
}
