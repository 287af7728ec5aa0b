package lastknown

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/authentication/user"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"

	"skein.io/skein/gossip/identity"
	"skein.io/skein/node/client"
)

// TestFilter asks a handler that uses a state of ten seconds ago where it may.
func TestFilter(t *testing.T) {
	person := &user.DefaultInfo{Name: "somebody"}
	agent := &user.DefaultInfo{Name: "system:node:n1", Groups: []string{user.NodesGroup}}
	read := apirequest.RequestInfo{IsResourceRequest: true, Verb: "get"}
	sub := func(verb, subresource string) apirequest.RequestInfo {
		return apirequest.RequestInfo{IsResourceRequest: true, Verb: verb, Subresource: subresource}
	}
	for _, c := range []struct {
		name, method, max string
		user              user.Info
		info              apirequest.RequestInfo
		code              int
		age               string
	}{
		{"a read", "GET", "", person, read, 200, "10"},
		{"a list", "GET", "", person, sub("list", ""), 200, "10"},
		{"a log", "GET", "", person, sub("get", "log"), 200, "10"},
		{"old enough", "GET", "10", person, read, 200, "10"},
		{"too old", "GET", "9", person, read, 503, ""},
		{"only the present", "GET", "0", person, read, 502, ""},
		{"a bad bound", "GET", "-1", person, read, 400, ""},
		{"not a number", "GET", "10s", person, read, 400, ""},
		{"a watch", "GET", "", person, sub("watch", ""), 502, ""},
		{"exec", "GET", "", person, sub("get", "exec"), 502, ""},
		{"a write", "POST", "", person, sub("create", ""), 502, ""},
		{"a deletion of many, which lists", "DELETE", "", person, sub("deletecollection", ""), 502, ""},
		{"a node", "GET", "", agent, read, 502, ""},
		{"a node that asks for it", "GET", "60", agent, read, 200, "10"},
		{"nobody", "GET", "", nil, read, 502, ""},
		{"no object", "GET", "", person, apirequest.RequestInfo{Verb: "get"}, 502, ""},
	} {
		h := Filter(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			ctx := apirequest.WithRequestInfo(r.Context(), &c.info)
			if c.user != nil {
				ctx = apirequest.WithUser(ctx, c.user)
			}
			ok, err := Use(ctx, 9100*time.Millisecond, "the cable is out")
			switch {
			case err != nil:
				refuse(w, err)
			case !ok:
				w.WriteHeader(http.StatusBadGateway) // stands for what the store says without a leader
			default:
				_, _ = io.WriteString(w, "old")
			}
		}))
		r := httptest.NewRequest(c.method, "/", nil)
		if c.max != "" {
			r.Header.Set(client.MaxAgeHeader, c.max)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if w.Code != c.code || w.Header().Get(client.AgeHeader) != c.age {
			t.Errorf("%s: %d, age %q, want %d, %q: %s", c.name, w.Code, w.Header().Get(client.AgeHeader), c.code, c.age, w.Body)
		}
		warned := w.Header().Get("Warning") == `299 - "last known state, 10s old: the cable is out"`
		if warned != (c.age != "") {
			t.Errorf("%s: Warning %q", c.name, w.Header().Get("Warning"))
		}
		if c.code == 503 && (w.Header().Get("Retry-After") != "1" || !strings.Contains(w.Body.String(), "at most 9s was asked for")) {
			t.Errorf("%s: %v %s", c.name, w.Header(), w.Body)
		}
	}
}

type source struct{}

func object(namespace, name string) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{"app": name}, ResourceVersion: "7"}
}

func (source) Pods() []*corev1.Pod {
	spec := corev1.PodSpec{NodeName: "n4", Containers: []corev1.Container{{Name: "c", Image: "i"}}}
	return []*corev1.Pod{
		{ObjectMeta: object("default", "a"), Spec: spec, Status: corev1.PodStatus{Phase: corev1.PodRunning}},
		{ObjectMeta: object("default", "b"), Spec: spec, Status: corev1.PodStatus{Phase: corev1.PodPending}},
		{ObjectMeta: object("other", "a"), Spec: spec, Status: corev1.PodStatus{Phase: corev1.PodRunning}},
	}
}
func (source) Services() []*corev1.Service {
	return []*corev1.Service{{ObjectMeta: object("default", "web"), Spec: corev1.ServiceSpec{ClusterIP: "10.96.0.7", Type: corev1.ServiceTypeClusterIP}}}
}
func (source) EndpointSlices() []*discoveryv1.EndpointSlice {
	return []*discoveryv1.EndpointSlice{{ObjectMeta: object("default", "web-1"), AddressType: discoveryv1.AddressTypeIPv4}}
}
func (source) Nodes() []*corev1.Node { return []*corev1.Node{{ObjectMeta: object("", "n4")}} }
func (source) ConfigMaps() []*corev1.ConfigMap {
	return []*corev1.ConfigMap{{ObjectMeta: object("default", "conf"), Data: map[string]string{"k": "v"}}}
}
func (source) Secrets() []*corev1.Secret {
	return []*corev1.Secret{{ObjectMeta: object("default", "hush"), Data: map[string][]byte{"k": []byte("v")}}}
}

// caller makes requests with a certificate of a CA.
type caller struct {
	t    *testing.T
	thin *Thin
	ca   *identity.Authority
}

func (c caller) certificate(name string, groups ...string) *x509.Certificate {
	c.t.Helper()
	cert, err := c.ca.IssueClient(name, groups, time.Hour, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	return cert.Leaf
}

func (c caller) get(cert *x509.Certificate, method, path, accept, max string) (*httptest.ResponseRecorder, error) {
	r := httptest.NewRequest(method, path, nil)
	r.TLS = &tls.ConnectionState{}
	if cert != nil {
		r.TLS.PeerCertificates = []*x509.Certificate{cert}
	}
	if accept != "" {
		r.Header.Set("Accept", accept)
	}
	if max != "" {
		r.Header.Set(client.MaxAgeHeader, max)
	}
	w := httptest.NewRecorder()
	return w, c.thin.Answer(w, r.WithContext(context.Background()), "no replica in reach")
}

func TestThin(t *testing.T) {
	ca, err := identity.NewAuthority("test", time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := identity.NewAuthority("foreign", time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca.Cert)
	known := true
	c := caller{t, New(Config{NodeName: "n4", ClientCA: pool, Source: source{}, Age: func() (time.Duration, bool) { return 5 * time.Second, known }}), ca}
	admin := c.certificate("admin", user.SystemPrivilegedGroup)
	const table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
	const all = "/api/v1/pods"
	for _, x := range []struct {
		name, method, path, accept, max string
		cert                            *x509.Certificate
		code                            int // 0: an error, with the words
		words                           []string
		aged                            bool
	}{
		{"pods everywhere", "GET", all, "", "", admin, 200, []string{`"kind":"PodList"`, `"namespace":"other"`, `"resourceVersion":"1"`, `"apiVersion":"v1"`}, true},
		{"pods of a namespace", "GET", "/api/v1/namespaces/other/pods", "", "", admin, 200, []string{`"namespace":"other"`, "!default"}, true},
		{"a label", "GET", all + "?labelSelector=app%3Db", "", "", admin, 200, []string{`"name":"b"`, `!"name":"a"`}, true},
		{"a field", "GET", all + "?fieldSelector=status.phase%3DPending,spec.nodeName%3Dn4", "", "", admin, 200, []string{`"name":"b"`, `!"name":"a"`}, true},
		{"a bad field", "GET", all + "?fieldSelector=spec.foo%3D1", "", "", admin, 400, []string{"field label not supported"}, true},
		{"a table", "GET", all, table, "", admin, 200, []string{`"kind":"Table"`, `"name":"Restarts"`, `"Running"`}, true},
		{"yaml", "GET", "/api/v1/nodes/n4", "application/yaml", "", admin, 200, []string{"kind: Node\n", "name: n4\n"}, true},
		{"metadata", "GET", all, "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io", "", admin, 200, []string{"PartialObjectMetadataList", "!containers"}, true},
		{"one", "GET", "/api/v1/namespaces/default/secrets/hush", "", "", admin, 200, []string{`"k":"dg=="`}, true},
		{"of another group", "GET", "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", "", "", admin, 200, []string{`"kind":"EndpointSliceList"`, "web-1"}, true},
		{"what there is none of", "GET", "/api/v1/namespaces/default/services/nope", "", "", admin, 404, []string{`services \"nope\" not found`}, true},
		{"what there may be", "GET", "/api/v1/namespaces/default/pods/nope", "", "", admin, 503, []string{"cannot be found out now"}, true},
		{"old enough", "GET", all, "", "5", admin, 200, nil, true},
		{"too old", "GET", all, "", "4", admin, 503, []string{"5s old, and at most 4s"}, false},
		{"only the present", "GET", all, "", "0", admin, 503, nil, false},
		{"a bad bound", "GET", all, "", "x", admin, 400, nil, false},
		{"discovery", "GET", "/api", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList", "", admin, 200, []string{`"pods"`, `"po"`}, false},
		{"groups", "GET", "/apis", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList", "", admin, 200, []string{"endpointslices"}, false},
		{"a kind that it does not keep", "GET", "/apis/apps/v1/deployments", "", "", admin, 0, []string{"nothing of /apis/apps/v1/deployments"}, false},
		{"a subresource", "GET", "/api/v1/namespaces/default/pods/a/log", "", "", admin, 0, []string{"nothing of"}, false},
		{"a write", "POST", "/api/v1/namespaces/default/pods", "", "", admin, 0, []string{"neither writes nor watches"}, false},
		{"a watch", "GET", all + "?watch=1", "", "", admin, 0, []string{"neither writes nor watches"}, false},
		{"nobody", "GET", all, "", "", nil, 0, []string{"client certificates only"}, false},
		{"somebody without a known role", "GET", all, "", "", c.certificate("eve", "dev"), 0, []string{`cannot tell what "eve" may read`}, false},
		{"a foreign administrator", "GET", all, "", "", caller{t, nil, foreign}.certificate("admin", user.SystemPrivilegedGroup), 0, []string{"not valid here"}, false},
		{"the node, for which old is not good enough", "GET", all, "", "", c.certificate("system:node:n4", user.NodesGroup), 0, nil, false},
		{"the node, which says that it is", "GET", all, "", "60", c.certificate("system:node:n4", user.NodesGroup), 200, nil, true},
		{"another node", "GET", all, "", "60", c.certificate("system:node:n5", user.NodesGroup), 0, []string{"n5"}, false},
	} {
		w, err := c.get(x.cert, x.method, x.path, x.accept, x.max)
		text := w.Body.String()
		if x.code == 0 {
			if err == nil || !errors.Is(err, ErrCannot) || len(text) > 0 {
				t.Errorf("%s: answered: %v, %d %s", x.name, err, w.Code, text)
				continue
			}
			text = err.Error()
		} else if err != nil || w.Code != x.code {
			t.Errorf("%s: %v, %d, want %d: %s", x.name, err, w.Code, x.code, text)
		}
		for _, word := range x.words {
			if not, is := strings.CutPrefix(word, "!"); is && strings.Contains(text, not) || !is && !strings.Contains(text, word) {
				t.Errorf("%s: %q in %s", x.name, word, text)
			}
		}
		if (w.Header().Get(client.AgeHeader) == "5") != x.aged || strings.Contains(w.Header().Get("Warning"), "5s old: no replica in reach") != x.aged {
			t.Errorf("%s: headers %v", x.name, w.Header())
		}
	}
	if p := (source{}).Pods()[0]; p.ResourceVersion != "7" {
		t.Errorf("the source's objects were changed: %v", p)
	}
	r := httptest.NewRequest("GET", all, nil)
	r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{admin}}
	r.Header.Set("Impersonate-User", "bob")
	if err := c.thin.Answer(httptest.NewRecorder(), r, ""); !errors.Is(err, ErrCannot) {
		t.Errorf("impersonation: %v", err)
	}
	w := httptest.NewRecorder()
	if err := c.thin.AnswerRoot(w, httptest.NewRequest("GET", all, nil), "x"); err != nil || w.Code != 200 {
		t.Errorf("root: %v, %d", err, w.Code)
	}
	var list corev1.PodList
	if err := json.Unmarshal(w.Body.Bytes(), &list); err != nil || len(list.Items) != 3 || list.Items[0].Spec.NodeName != "n4" {
		t.Errorf("%v: %v", err, list)
	}
	known = false
	if _, err := c.get(admin, "GET", all, "", ""); !errors.Is(err, ErrCannot) {
		t.Errorf("a node that knows nothing: %v", err)
	}
}
