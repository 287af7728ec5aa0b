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

	"skein.io/skein/node/api/store/transcode"
)

// Router is an http.Handler for all resources of the groups installed in it.
type Router struct {
	endpoints map[key]*endpoint
	admit     admission.Interface
	minWatch  time.Duration // watches last at least this long, and less than twice it
	codecs    runtime.NegotiatedSerializer
	// The types that answers come in, and those with the types of watch streams.
	media, mediaAndStreams []string
}

type key struct{ group, version, resource, subresource string }

// endpoint is one resource or subresource of one version.
type endpoint struct {
	scope handlers.RequestScope
	// createScope is scope, for creates.
	createScope handlers.RequestScope
	// statusScope is scope, for writes of a status that can be done with less work; nil: scope.
	statusScope *handlers.RequestScope
	storage     rest.Storage
	path        string // "pods/log"
	namespaced  bool
	// What the storage can do: list and watch; something with one object; be connected to, with a path behind.
	lists, watches, namedOnes, subpath bool
	warnings                           []string  // sent with every answer: the version is deprecated
	removed                            string    // the release in which it goes
	rawLister                          RawLister // nil: upstream lists
	plan                               func() *transcode.Plan
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
	if e == nil || !e.has(info, oldWatch(r.URL.Path)) {
		rt.refuse(w, r, http.StatusNotFound)
		return
	}
	h := rt.handler(e, info, r)
	if h == nil {
		rt.refuse(w, r, http.StatusMethodNotAllowed)
		return
	}
	if code, message := rt.mismatch(e, info, r); code != 0 {
		rt.refuseWith(w, r, code, message)
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

// has tells whether the endpoint has this path for any method: namespaced where the resource is and only there, with a name where something
// can be done to one object, and with more behind it only where a connection goes on from there.
func (e *endpoint) has(info *apirequest.RequestInfo, old bool) bool {
	if len(info.Parts) > 3 && !e.subpath || info.Verb == "proxy" { // the verb: what a path was called before there were subresources
		return false
	}
	// A request for the namespace x is reported with Namespace x as well.
	inNamespace := info.Namespace != "" && (info.Resource != "namespaces" || info.Name != info.Namespace)
	// A field selector metadata.name=x is reported as the name x, so the path decides.
	named := len(info.Parts) > 1
	if inNamespace && !e.namespaced || old && (!e.watches || info.Subresource != "") {
		return false
	}
	if e.namespaced && !inNamespace {
		return e.lists && !named
	}
	return !named || e.namedOnes
}

func (rt *Router) refuse(w http.ResponseWriter, r *http.Request, code int) {
	rt.refuseWith(w, r, code, "")
}

func (rt *Router) refuseWith(w http.ResponseWriter, r *http.Request, code int, message string) {
	err := apierrors.NewGenericServerResponse(code, "", schema.GroupResource{}, "", message, 0, false)
	responsewriters.ErrorNegotiated(err, rt.codecs, schema.GroupVersion{}, w, r)
}

// handler gives what serves the request, or nil when the resource has no such verb.
func (rt *Router) handler(e *endpoint, info *apirequest.RequestInfo, r *http.Request) http.HandlerFunc {
	if c, ok := e.storage.(rest.Connecter); ok && slices.Contains(c.ConnectMethods(), r.Method) {
		return handlers.ConnectResource(c, &e.scope, rt.admit, e.path, e.scope.Subresource != "")
	}
	// The verb of an old watch path, and of a read with ?watch, does not depend on the method.
	reads := info.Verb == "get" || info.Verb == "list" || info.Verb == "watch"
	if reads != (r.Method == http.MethodGet) {
		return nil
	}
	named := info.Name != ""
	if e.namespaced && info.Namespace == "" && !reads {
		return nil // of all namespaces at once
	}
	switch info.Verb {
	case "get", "list", "watch":
		return rt.read(e, info)
	case "create":
		if c, ok := e.storage.(rest.NamedCreater); ok {
			return handlers.CreateNamedResource(c, &e.createScope, rt.admit)
		}
		if c, ok := e.storage.(rest.Creater); ok && (!named || e.scope.Subresource != "") {
			return handlers.CreateResource(c, &e.createScope, rt.admit)
		}
	case "update":
		if u, ok := e.storage.(rest.Updater); ok && named {
			scope := &e.scope
			if e.statusScope != nil {
				scope = e.statusScope
			}
			return handlers.UpdateResource(deepUpdater{u}, scope, rt.admit)
		}
	case "patch":
		if p, ok := e.storage.(rest.Patcher); ok && named {
			return handlers.PatchResource(deepPatcher{p}, e.patchScope(r), rt.admit, patchTypes())
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
			return e.rawGet(handlers.GetResource(g, &e.scope))
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
		return compressed(e.raw(list))
	}
	return batched(list)
}

// oldWatch tells a path of the form that watches had before there was ?watch: /api/v1/watch/pods.
func oldWatch(path string) bool {
	parts := strings.SplitN(strings.TrimPrefix(path, "/"), "/", 5)
	return len(parts) > 2 && parts[0] == "api" && parts[2] == "watch" || len(parts) > 3 && parts[0] == "apis" && parts[3] == "watch"
}

// mismatch applies upstream's media types of the route that leads to an endpoint.
func (rt *Router) mismatch(e *endpoint, info *apirequest.RequestInfo, r *http.Request) (code int, message string) {
	if c, ok := e.storage.(rest.Connecter); ok && slices.Contains(c.ConnectMethods(), r.Method) {
		return 0, "" // connections choose for themselves
	}
	consumes, produces := []string{anyMedia}, rt.media
	switch info.Verb {
	case "patch":
		consumes = patchTypes()
	case "list", "watch":
		produces = rt.mediaAndStreams
	}
	if m, ok := e.storage.(rest.StorageMetadata); ok && !oldWatch(r.URL.Path) {
		produces = append(slices.Clone(m.ProducesMIMETypes(strings.ToUpper(info.Verb))), produces...)
	}
	return mismatch(r, consumes, produces)
}

// discovery is the route of a discovery document: it is only read.
func (rt *Router) discovery(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet {
			rt.refuse(w, r, http.StatusMethodNotAllowed)
			return
		}
		if code, message := mismatch(r, rt.media, rt.media); code != 0 {
			rt.refuseWith(w, r, code, message)
			return
		}
		h.ServeHTTP(w, r)
	})
}
