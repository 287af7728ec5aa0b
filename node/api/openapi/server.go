package openapi

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"k8s.io/apiextensions-apiserver/pkg/apihelpers"
	apiextv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensionsapi "k8s.io/apiextensions-apiserver/pkg/apiserver"
	apiextlisters "k8s.io/apiextensions-apiserver/pkg/client/listers/apiextensions/v1"
	"k8s.io/apiextensions-apiserver/pkg/controller/openapi/builder"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apiserver/pkg/server/mux"
	"k8s.io/kube-openapi/pkg/aggregator"
	"k8s.io/kube-openapi/pkg/handler"
	"k8s.io/kube-openapi/pkg/handler3"
	"k8s.io/kube-openapi/pkg/validation/spec"
)

const (
	// keepMerged is how long a document with custom resources is kept after its last use: it costs
	// some 40 MB while it exists.
	keepMerged = time.Minute
	// remoteAge is how old the parts of other servers may become, which change without notice. Upstream's.
	remoteAge = time.Minute
	// remoteRetry is the same if one of them could not be had: the next who asks after that tries again.
	remoteRetry = 5 * time.Second
)

// Remote is a group version that another server serves (an APIService), and where its document is got.
type Remote struct {
	Group, Version string
	// Key changes when the document is at another place, or may be another one.
	Key string
	// Fetch gets that server's document of version 2, in JSON.
	Fetch func() ([]byte, error)
}

// Server answers /openapi/v2 and /openapi/v3.
type Server struct {
	docs *Documents
	// crdV3 renders the version 3 documents of custom resources.
	crdV3 http.Handler
	crds  apiextlisters.CustomResourceDefinitionLister
	// remotes gives those that are available, in the order in which they are merged.
	remotes func() []Remote

	mu        sync.Mutex // guards what follows
	merged    http.Handler
	mergedKey string
	mergedTo  time.Time // until when it is good, if others serve a part of it
	forget    *time.Timer
}

// NewServer prepares to serve docs with the custom resources of crds merged in, and in version 2 what remotes serve. (Their documents of version 3
// stay with their servers; the aggregator leads to them.)
func NewServer(docs *Documents, crds *apiextensionsapi.CustomResourceDefinitions, remotes func() []Remote) *Server {
	g := crds.GenericAPIServer
	g.StaticOpenAPISpec = &spec.Swagger{} // not nil: start the CRD server's controller of version 3 ...
	g.OpenAPIVersionedService = nil       // ... but not that of version 2
	return &Server{docs: docs, remotes: remotes, crdV3: g.Handler.NonGoRestfulMux, crds: crds.Informers.Apiextensions().V1().CustomResourceDefinitions().Lister()}
}

// Install registers the handlers. That must happen before the aggregator's PrepareRun, which asks
// its delegates once: a server that then answers 404 to /openapi/v3 counts as an old one for ever.
func (s *Server) Install(m *mux.PathRecorderMux) {
	m.HandleFunc("/openapi/v2", s.serveV2)
	m.HandleFunc("/openapi/v3", s.serveV3Index)
	m.HandlePrefix("/openapi/v3/", http.HandlerFunc(s.serveV3))
}

func (s *Server) serveV3(w http.ResponseWriter, r *http.Request) {
	path := strings.TrimPrefix(r.URL.Path, "/openapi/v3/")
	if _, ok := s.docs.v3[path]; ok {
		s.docs.serveV3(w, r, path)
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
		index.Paths[path] = handler3.OpenAPIV3DiscoveryGroupVersion{ServerRelativeURL: hashed(path, d.etag())}
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
	// Others are not served, or not yet: their names may be another one's.
	crds = slices.DeleteFunc(crds, func(c *apiextv1.CustomResourceDefinition) bool {
		return !apihelpers.IsCRDConditionTrue(c, apiextv1.Established)
	})
	if remotes := s.remotes(); len(crds)+len(remotes) > 0 || s.docs.v2All != nil {
		h, err := s.withCustom(crds, remotes)
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		h.ServeHTTP(w, r)
		return
	}
	s.docs.serveV2(w, r)
}

// withCustom gives a handler of the version 2 document with crds and remotes in it, built on demand.
func (s *Server) withCustom(crds []*apiextv1.CustomResourceDefinition, remotes []Remote) (http.Handler, error) {
	slices.SortFunc(crds, func(a, b *apiextv1.CustomResourceDefinition) int { return strings.Compare(a.Name, b.Name) })
	var key strings.Builder
	for _, c := range crds {
		fmt.Fprintf(&key, "%s@%s ", c.Name, c.ResourceVersion)
	}
	for _, r := range remotes {
		fmt.Fprintf(&key, "%s ", r.Key)
	}
	if h := s.still(key.String(), len(remotes) > 0); h != nil {
		return h, nil
	}
	doc, err := s.merge(crds)
	if err != nil {
		return nil, err
	}
	good := remoteAge
	if !addRemotes(doc, remotes) {
		good = remoteRetry
	}
	m := mux.NewPathRecorderMux("openapi-v2")
	handler.NewOpenAPIService(doc).RegisterOpenAPIVersionedService("/openapi/v2", m)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.merged, s.mergedKey, s.mergedTo = m, key.String(), time.Now().Add(good)
	s.keepLocked()
	return m, nil
}

// still gives the handler that was made for the same before, if it is good enough.
func (s *Server) still(key string, remote bool) http.Handler {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.merged == nil || s.mergedKey != key || remote && time.Now().After(s.mergedTo) {
		return nil
	}
	s.keepLocked()
	return s.merged
}

func (s *Server) keepLocked() {
	if s.forget != nil {
		s.forget.Stop()
	}
	s.forget = time.AfterFunc(keepMerged, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.merged = nil
	})
}

// addRemotes merges in what other servers serve, and says whether all could be had. One that does not answer, or not with a document, is left out.
func addRemotes(doc *spec.Swagger, remotes []Remote) (all bool) {
	all = true
	for _, r := range remotes {
		theirs := &spec.Swagger{}
		b, err := r.Fetch()
		if err == nil {
			err = theirs.UnmarshalJSON(b)
		}
		if err != nil || theirs.Paths == nil {
			all = false
			continue
		}
		// What they serve beside their group version is not theirs here. Definitions of the same name get another one.
		theirs = aggregator.FilterSpecByPathsWithoutSideEffects(theirs, []string{"/apis/" + r.Group + "/" + r.Version + "/"})
		if aggregator.MergeSpecsIgnorePathConflictRenamingDefinitionsAndParameters(doc, theirs) != nil {
			all = false
		}
	}
	return all
}

func (s *Server) merge(crds []*apiextv1.CustomResourceDefinition) (*spec.Swagger, error) {
	base, err := s.docs.base()
	if err != nil {
		return nil, err
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
