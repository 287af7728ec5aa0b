// Package router serves built-in resources the way upstream's apiextensions-apiserver serves
// custom ones: one map look-up by the request's resource, then the exported functions of
// k8s.io/apiserver/pkg/endpoints/handlers. Upstream's go-restful containers keep some 900 routes
// with compiled expressions and documentation for the same (25 MB of memory).
//
// A Router is built once, by Install, and then only read; it may serve any number of requests at
// once. It expects upstream's filters before it (request info, user, audit).
package router

import (
	"net/http"
	"slices"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apiserver/pkg/admission"
	genericapi "k8s.io/apiserver/pkg/endpoints"
	"k8s.io/apiserver/pkg/endpoints/handlers"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	"k8s.io/apiserver/pkg/endpoints/metrics"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/warning"
)

// Router is an http.Handler for all resources of the groups installed in it.
type Router struct {
	endpoints map[key]*endpoint
	admit     admission.Interface
	minWatch  time.Duration // watches last at least this long, and less than twice it
	codecs    runtime.NegotiatedSerializer
}

type key struct{ group, version, resource, subresource string }

// endpoint is one resource or subresource of one version.
type endpoint struct {
	scope      handlers.RequestScope
	storage    rest.Storage
	path       string // "pods/log"
	namespaced bool
	warnings   []string  // sent with every answer: the version is deprecated
	removed    string    // the release in which it goes
	rawLister  RawLister // nil: upstream lists
}

func patchTypes() []string {
	return []string{string(types.JSONPatchType), string(types.MergePatchType), string(types.StrategicMergePatchType), string(types.ApplyYAMLPatchType)}
}

// ServeHTTP implements http.Handler.
func (rt *Router) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	info, ok := apirequest.RequestInfoFrom(r.Context())
	if !ok || !info.IsResourceRequest {
		rt.refuse(w, r, http.StatusNotFound)
		return
	}
	e := rt.endpoints[key{info.APIGroup, info.APIVersion, info.Resource, info.Subresource}]
	if e == nil || !e.scoped(info) {
		rt.refuse(w, r, http.StatusNotFound)
		return
	}
	h := rt.handler(e, info, r)
	if h == nil {
		rt.refuse(w, r, http.StatusMethodNotAllowed)
		return
	}
	verb := strings.ToUpper(info.Verb)
	if o, ok := e.storage.(genericapi.StorageMetricsOverride); ok {
		verb = o.OverrideMetricsVerb(verb)
	}
	for _, m := range e.warnings {
		warning.AddWarning(r.Context(), "", m)
	}
	metrics.InstrumentHandlerFunc(verb, info.APIGroup, info.APIVersion, info.Resource, info.Subresource, metrics.CleanScope(info),
		metrics.APIServerComponent, len(e.warnings) > 0, e.removed, h)(w, r)
}

// scoped tells whether the path names a namespace where the resource has one, and only there.
func (e *endpoint) scoped(info *apirequest.RequestInfo) bool {
	// A request for the namespace x is reported with Namespace x as well.
	inNamespace := info.Namespace != "" && (info.Resource != "namespaces" || info.Name != info.Namespace)
	if inNamespace {
		return e.namespaced
	}
	// All namespaces at once: lists and watches only, never one object. A field selector metadata.name=x is reported as the
	// name x, so the path decides.
	acrossNamespaces := len(info.Parts) < 2 && (info.Verb == "list" || info.Verb == "watch")
	return !e.namespaced || acrossNamespaces || info.Subresource != ""
}

func (rt *Router) refuse(w http.ResponseWriter, r *http.Request, code int) {
	err := apierrors.NewGenericServerResponse(code, "", schema.GroupResource{}, "", "", 0, false)
	responsewriters.ErrorNegotiated(err, rt.codecs, schema.GroupVersion{}, w, r)
}

// handler gives what serves the request, or nil when the resource has no such verb.
func (rt *Router) handler(e *endpoint, info *apirequest.RequestInfo, r *http.Request) http.HandlerFunc {
	if c, ok := e.storage.(rest.Connecter); ok && slices.Contains(c.ConnectMethods(), r.Method) {
		return handlers.ConnectResource(c, &e.scope, rt.admit, e.path, e.scope.Subresource != "")
	}
	if r.Method == http.MethodHead || r.Method == http.MethodOptions {
		return nil
	}
	named := info.Name != ""
	switch info.Verb {
	case "get", "list", "watch":
		return rt.read(e, info)
	case "create":
		if c, ok := e.storage.(rest.NamedCreater); ok {
			return handlers.CreateNamedResource(c, &e.scope, rt.admit)
		}
		if c, ok := e.storage.(rest.Creater); ok && (!named || e.scope.Subresource != "") {
			return handlers.CreateResource(c, &e.scope, rt.admit)
		}
	case "update":
		if u, ok := e.storage.(rest.Updater); ok && named {
			return handlers.UpdateResource(u, &e.scope, rt.admit)
		}
	case "patch":
		if p, ok := e.storage.(rest.Patcher); ok && named {
			return handlers.PatchResource(p, &e.scope, rt.admit, patchTypes())
		}
	case "delete":
		if d, ok := e.storage.(rest.GracefulDeleter); ok && named {
			return handlers.DeleteResource(d, true, &e.scope, rt.admit)
		}
	case "deletecollection":
		if d, ok := e.storage.(rest.CollectionDeleter); ok {
			return handlers.DeleteCollection(d, true, &e.scope, rt.admit)
		}
	}
	return nil
}

func (rt *Router) read(e *endpoint, info *apirequest.RequestInfo) http.HandlerFunc {
	if info.Verb == "get" {
		if g, ok := e.storage.(rest.GetterWithOptions); ok {
			return handlers.GetResourceWithOptions(g, &e.scope, e.scope.Subresource != "")
		}
		if g, ok := e.storage.(rest.Getter); ok {
			return handlers.GetResource(g, &e.scope)
		}
		return nil
	}
	l, ok := e.storage.(rest.Lister)
	if !ok {
		return nil
	}
	w, _ := e.storage.(rest.Watcher)
	list := handlers.ListResource(l, w, &e.scope, info.Verb == "watch", rt.minWatch)
	if info.Verb == "list" {
		return e.raw(list)
	}
	return list
}
