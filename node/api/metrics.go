package api

import (
	"bytes"
	"net/http"
	"slices"
	"strings"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/endpoints/handlers/negotiation"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	genericapiserver "k8s.io/apiserver/pkg/server"

	"skein.io/skein/node/api/resourcemetrics"
)

// metrics.k8s.io is built in, but no APIService says so, unlike of all other groups: where that is one of metrics-server, or of
// whoever takes its place, the aggregator sends requests there, and without one they come here. So `kubectl apply` and Helm install it as on
// any cluster, and when it is removed the built-in one answers again.

func (b *build) resourceMetrics() genericapiserver.APIGroupInfo {
	b.generic.AggregatedDiscoveryGroupManager.SetGroupVersionPriority(metav1.GroupVersion(resourcemetrics.GroupVersion), resourcemetrics.Priority, resourcemetrics.Priority)
	return resourcemetrics.Group(resourcemetrics.Config{Client: b.client, Logger: b.cfg.Logger,
		Transport: func(node string) http.RoundTripper { return b.agents.transport(node) }})
}

// metricsReader is the role that metrics-server brings: who may view a namespace may see what its pods use.
func metricsReader() rbacv1.ClusterRole {
	const aggregate = "rbac.authorization.k8s.io/aggregate-to-"
	return rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: "system:aggregated-metrics-reader",
			Labels: map[string]string{aggregate + "admin": "true", aggregate + "edit": "true", aggregate + "view": "true"}},
		Rules: []rbacv1.PolicyRule{{APIGroups: []string{resourcemetrics.GroupVersion.Group}, Resources: []string{"pods", "nodes"}, Verbs: []string{"get", "list", "watch"}}},
	}
}

// listMetrics adds the group to the list of groups that clients read which do not know aggregated discovery: upstream makes that one of APIServices alone.
func listMetrics(h http.Handler, codecs runtime.NegotiatedSerializer, decoder runtime.Decoder) http.Handler {
	gv := resourcemetrics.GroupVersion
	version := metav1.GroupVersionForDiscovery{GroupVersion: gv.String(), Version: gv.Version}
	group := metav1.APIGroup{Name: gv.Group, Versions: []metav1.GroupVersionForDiscovery{version}, PreferredVersion: version}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.URL.Path != genericapiserver.APIGroupPrefix && r.URL.Path != genericapiserver.APIGroupPrefix+"/" {
			h.ServeHTTP(w, r)
			return
		}
		held := &heldAnswer{header: http.Header{}, code: http.StatusOK}
		h.ServeHTTP(held, r)
		if held.code == http.StatusOK && held.header.Get("Content-Encoding") == "" && !strings.Contains(held.header.Get("Content-Type"), "as=") {
			if o, _, err := decoder.Decode(held.body.Bytes(), nil, nil); err == nil {
				list, ok := o.(*metav1.APIGroupList)
				if ok && !slices.ContainsFunc(list.Groups, func(g metav1.APIGroup) bool { return g.Name == gv.Group }) {
					list.Groups = append(list.Groups, group)
					held.copyHeader(w, "Content-Type", "Content-Length")
					responsewriters.WriteObjectNegotiated(codecs, negotiation.DefaultEndpointRestrictions, schema.GroupVersion{}, w, r, http.StatusOK, list, false)
					return
				}
			}
		}
		held.copyHeader(w)
		w.WriteHeader(held.code)
		_, _ = w.Write(held.body.Bytes()) // the client went away
	})
}

// heldAnswer keeps an answer back.
type heldAnswer struct {
	header http.Header
	code   int
	body   bytes.Buffer
}

func (a *heldAnswer) Header() http.Header         { return a.header }
func (a *heldAnswer) WriteHeader(code int)        { a.code = code }
func (a *heldAnswer) Write(b []byte) (int, error) { return a.body.Write(b) }

func (a *heldAnswer) copyHeader(w http.ResponseWriter, but ...string) {
	for k, v := range a.header {
		if !slices.Contains(but, k) {
			w.Header()[k] = v
		}
	}
}
