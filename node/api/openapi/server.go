package openapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	apiextv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensionsapi "k8s.io/apiextensions-apiserver/pkg/apiserver"
	apiextlisters "k8s.io/apiextensions-apiserver/pkg/client/listers/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/controller/openapi/builder"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apiserver/pkg/server/mux"
	"k8s.io/kube-openapi/pkg/handler"
	"k8s.io/kube-openapi/pkg/handler3"
	"k8s.io/kube-openapi/pkg/validation/spec"
)

const (
	typeJSON   = "application/json"
	typeV2Wire = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
	// keepMerged is how long a document with custom resources is kept after its last use: it costs
	// some 40 MB while it exists.
	keepMerged = time.Minute
)

// Server answers /openapi/v2 and /openapi/v3.
type Server struct {
	docs *Documents
	// crdV3 renders the version 3 documents of custom resources.
	crdV3 http.Handler
	crds  apiextlisters.CustomResourceDefinitionLister

	mu        sync.Mutex // guards what follows
	merged    http.Handler
	mergedKey string
	forget    *time.Timer
}

// NewServer prepares to serve docs with the custom resources of crds merged in.
func NewServer(docs *Documents, crds *apiextensionsapi.CustomResourceDefinitions) *Server {
	g := crds.GenericAPIServer
	g.StaticOpenAPISpec = &spec.Swagger{} // not nil: start the CRD server's controller of version 3 ...
	g.OpenAPIVersionedService = nil       // ... but not that of version 2
	return &Server{docs: docs, crdV3: g.Handler.NonGoRestfulMux, crds: crds.Informers.Apiextensions().V1().CustomResourceDefinitions().Lister()}
}

// Install registers the handlers. That must happen before the aggregator's PrepareRun, which asks
// its delegates once: a server that then answers 404 to /openapi/v3 counts as an old one for ever.
func (s *Server) Install(m *mux.PathRecorderMux) {
	m.HandleFunc("/openapi/v2", s.serveV2)
	m.HandleFunc("/openapi/v3", s.serveV3Index)
	m.HandlePrefix("/openapi/v3/", http.HandlerFunc(s.serveV3))
}

func (s *Server) serveV3(w http.ResponseWriter, r *http.Request) {
	if d, ok := s.docs.v3[strings.TrimPrefix(r.URL.Path, "/openapi/v3/")]; ok {
		d.serve(w, r, typeJSON)
		return
	}
	s.crdV3.ServeHTTP(w, r)
}

func (s *Server) serveV3Index(w http.ResponseWriter, r *http.Request) {
	index := handler3.OpenAPIV3Discovery{Paths: map[string]handler3.OpenAPIV3DiscoveryGroupVersion{}}
	custom := &buffer{header: http.Header{}}
	s.crdV3.ServeHTTP(custom, r)
	if custom.code == http.StatusOK {
		if err := json.Unmarshal(custom.Bytes(), &index); err != nil {
			http.Error(w, fmt.Sprintf("documents of custom resources: %v", err), http.StatusInternalServerError)
			return
		}
	}
	for path, d := range s.docs.v3 {
		index.Paths[path] = handler3.OpenAPIV3DiscoveryGroupVersion{ServerRelativeURL: "/openapi/v3/" + path + "?" + url.Values{"hash": {d.etag}}.Encode()}
	}
	w.Header().Set("Content-Type", typeJSON)
	_ = json.NewEncoder(w).Encode(index) // fails when the client has gone
}

func (s *Server) serveV2(w http.ResponseWriter, r *http.Request) {
	crds, err := s.crds.List(labels.Everything())
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if len(crds) > 0 {
		h, err := s.withCustom(crds)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		h.ServeHTTP(w, r)
		return
	}
	if strings.Contains(r.Header.Get("Accept"), "com.github.proto-openapi.spec.v2") {
		s.docs.v2Wire.serve(w, r, typeV2Wire)
		return
	}
	s.docs.v2JSON.serve(w, r, typeJSON)
}

// withCustom gives a handler of the version 2 document with crds in it, built on demand.
func (s *Server) withCustom(crds []*apiextv1.CustomResourceDefinition) (http.Handler, error) {
	slices.SortFunc(crds, func(a, b *apiextv1.CustomResourceDefinition) int { return strings.Compare(a.Name, b.Name) })
	var key strings.Builder
	for _, c := range crds {
		fmt.Fprintf(&key, "%s@%s ", c.Name, c.ResourceVersion)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.merged == nil || s.mergedKey != key.String() {
		doc, err := s.merge(crds)
		if err != nil {
			return nil, err
		}
		m := mux.NewPathRecorderMux("openapi-v2")
		handler.NewOpenAPIService(doc).RegisterOpenAPIVersionedService("/openapi/v2", m)
		s.merged, s.mergedKey = m, key.String()
	}
	if s.forget != nil {
		s.forget.Stop()
	}
	s.forget = time.AfterFunc(keepMerged, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.merged = nil
	})
	return s.merged, nil
}

func (s *Server) merge(crds []*apiextv1.CustomResourceDefinition) (*spec.Swagger, error) {
	b, err := s.docs.v2JSON.unpack()
	if err != nil {
		return nil, err
	}
	base := &spec.Swagger{}
	if err := base.UnmarshalJSON(b); err != nil {
		return nil, fmt.Errorf("embedded OpenAPI document: %w", err)
	}
	var custom []*spec.Swagger
	for _, c := range crds {
		for _, v := range c.Spec.Versions {
			if !v.Served {
				continue
			}
			doc, err := builder.BuildOpenAPIV2(c, v.Name, builder.Options{V2: true})
			if err != nil {
				return nil, fmt.Errorf("OpenAPI of %s %s: %w", c.Name, v.Name, err)
			}
			custom = append(custom, doc)
		}
	}
	return builder.MergeSpecs(base, custom...)
}

// buffer keeps a response.
type buffer struct {
	bytes.Buffer
	header http.Header
	code   int
}

func (b *buffer) Header() http.Header { return b.header }

func (b *buffer) WriteHeader(code int) {
	if b.code == 0 {
		b.code = code
	}
}

func (b *buffer) Write(p []byte) (int, error) {
	b.WriteHeader(http.StatusOK)
	return b.Buffer.Write(p)
}
