package router

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	apidiscoveryv2 "k8s.io/api/apidiscovery/v2"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/managedfields"
	genericapi "k8s.io/apiserver/pkg/endpoints"
	"k8s.io/apiserver/pkg/endpoints/deprecation"
	"k8s.io/apiserver/pkg/endpoints/discovery"
	discoveryendpoint "k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	"k8s.io/apiserver/pkg/endpoints/handlers"
	"k8s.io/apiserver/pkg/endpoints/handlers/negotiation"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	versioninfo "k8s.io/component-base/version"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"

	"skein.io/skein/node/api/store/transcode"
)

// TypeConverters gives the merge schema that endpoints of a group version use for apply.
type TypeConverters func(schema.GroupVersion) managedfields.TypeConverter

// Install serves the groups on s and shows them in its discovery documents.
func Install(s *genericapiserver.GenericAPIServer, cfg genericapiserver.CompletedConfig, groups []*genericapiserver.APIGroupInfo, types TypeConverters, raw RawListers) error {
	rt := &Router{endpoints: map[key]*endpoint{}, admit: cfg.AdmissionControl, codecs: s.Serializer,
		minWatch: time.Duration(cfg.MinRequestTimeout) * time.Second}
	var streams []string
	plans := &transcode.Planner{}
	rt.media, streams = negotiation.MediaTypesForSerializer(s.Serializer)
	rt.mediaAndStreams = slices.Concat(rt.media, streams)
	for _, g := range groups {
		var served []metav1.GroupVersionForDiscovery
		for _, gv := range g.PrioritizedVersions {
			// The scheme knows versions that are not served.
			if len(g.VersionedResourcesStorageMap[gv.Version]) == 0 {
				continue
			}
			if err := rt.installVersion(s, cfg, g, gv, types(gv), raw, plans); err != nil {
				return fmt.Errorf("install %s: %w", gv, err)
			}
			served = append(served, metav1.GroupVersionForDiscovery{GroupVersion: gv.String(), Version: gv.Version})
		}
		if len(served) == 0 {
			return fmt.Errorf("install group %q: no version has storages", g.PrioritizedVersions[0].Group)
		}
		rt.installGroup(s, cfg, g.PrioritizedVersions[0].Group, served)
	}
	return nil
}

func (rt *Router) installVersion(s *genericapiserver.GenericAPIServer, cfg genericapiserver.CompletedConfig, g *genericapiserver.APIGroupInfo, gv schema.GroupVersion, types managedfields.TypeConverter, raw RawListers, plans *transcode.Planner) error {
	storages := g.VersionedResourcesStorageMap[gv.Version]
	paths := make([]string, 0, len(storages))
	for p := range storages {
		paths = append(paths, p)
	}
	slices.Sort(paths)
	var list []metav1.APIResource
	for _, path := range paths {
		b := builder{s: s, cfg: cfg, group: g, gv: gv, types: types}
		e, err := b.endpoint(path)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		ar, err := b.discovery(e)
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if gr := e.scope.Resource.GroupResource(); e.scope.Subresource == "" && listedRaw[gr] {
			if err := e.answerRaw(raw(gr), b.group.Scheme, plans); err != nil {
				return fmt.Errorf("%s: %w", path, err)
			}
		}
		rt.endpoints[key{gv.Group, gv.Version, e.scope.Resource.Resource, e.scope.Subresource}] = e
		list = append(list, ar)
		if r, ok := e.storage.(rest.StorageWithReadiness); ok {
			s.StorageReadinessHook.RegisterStorage(metav1.GroupVersionResource{Group: gv.Group, Version: gv.Version, Resource: path}, r)
		}
	}
	disco, err := genericapi.ConvertGroupVersionIntoToDiscovery(list)
	if err != nil {
		return err
	}
	prefix, manager := genericapiserver.APIGroupPrefix+"/"+gv.String(), s.AggregatedDiscoveryGroupManager
	if gv.Group == "" {
		prefix, manager = genericapiserver.DefaultLegacyAPIPrefix+"/"+gv.Version, s.AggregatedLegacyDiscoveryGroupManager
	}
	manager.AddGroupVersion(gv.Group, apidiscoveryv2.APIVersionDiscovery{Freshness: apidiscoveryv2.DiscoveryFreshnessCurrent, Version: gv.Version, Resources: disco})
	mux := s.Handler.NonGoRestfulMux
	document := rt.discovery(discovery.NewAPIVersionHandler(s.Serializer, gv, discovery.APIResourceListerFunc(func() []metav1.APIResource { return list })))
	mux.Handle(prefix, document)
	mux.UnlistedHandlePrefix(prefix+"/", exactly(prefix+"/", document, rt))
	return nil
}

func (rt *Router) installGroup(s *genericapiserver.GenericAPIServer, cfg genericapiserver.CompletedConfig, name string, served []metav1.GroupVersionForDiscovery) {
	mux := s.Handler.NonGoRestfulMux
	notFound := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { rt.refuse(w, r, http.StatusNotFound) })
	if name == "" {
		// As a plain handler: upstream's director would send all of /api/ to a web service of that root.
		root := discovery.NewLegacyRootAPIHandler(cfg.DiscoveryAddresses, s.Serializer, genericapiserver.DefaultLegacyAPIPrefix)
		document := rt.discovery(discoveryendpoint.WrapAggregatedDiscoveryToHandler(root, s.AggregatedLegacyDiscoveryGroupManager, s.AggregatedLegacyDiscoveryGroupManager))
		mux.Handle(genericapiserver.DefaultLegacyAPIPrefix, document)
		mux.UnlistedHandlePrefix(genericapiserver.DefaultLegacyAPIPrefix+"/", exactly(genericapiserver.DefaultLegacyAPIPrefix+"/", document, notFound))
		return
	}
	g := metav1.APIGroup{Name: name, Versions: served, PreferredVersion: served[0]}
	s.DiscoveryGroupManager.AddGroup(g)
	prefix := genericapiserver.APIGroupPrefix + "/" + name
	document := rt.discovery(discovery.NewAPIGroupHandler(s.Serializer, g))
	mux.Handle(prefix, document)
	mux.UnlistedHandlePrefix(prefix+"/", exactly(prefix+"/", document, notFound))
}

// exactly sends a path to one handler and those below it to another. Upstream's mux could as well, but logs a path that is
// registered both ways as an error, with two stacks.
func exactly(path string, at, below http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == path {
			at.ServeHTTP(w, r)
			return
		}
		below.ServeHTTP(w, r)
	})
}

// builder makes the endpoints of one group version.
type builder struct {
	s     *genericapiserver.GenericAPIServer
	cfg   genericapiserver.CompletedConfig
	group *genericapiserver.APIGroupInfo
	gv    schema.GroupVersion
	types managedfields.TypeConverter
}

func (b builder) endpoint(path string) (*endpoint, error) {
	storages := b.group.VersionedResourcesStorageMap[b.gv.Version]
	storage := storages[path]
	resource, sub, _ := strings.Cut(path, "/")
	scoper, ok := storages[resource].(rest.Scoper)
	if !ok {
		return nil, fmt.Errorf("storage of %s does not tell whether it is namespaced", resource)
	}
	scheme := b.group.Scheme
	kind, err := genericapi.GetResourceKind(b.gv, storage, scheme)
	if err != nil {
		return nil, err
	}
	e := &endpoint{storage: storage, namespaced: scoper.NamespaceScoped(), path: path}
	e.capabilities()
	table, _ := storage.(rest.TableConvertor)
	accepts, _ := storage.(rest.GroupVersionAcceptor)
	e.scope = handlers.RequestScope{
		Serializer: b.group.NegotiatedSerializer, ParameterCodec: b.group.ParameterCodec,
		Creater: scheme, Convertor: scheme, Defaulter: scheme, Typer: scheme, UnsafeConvertor: runtime.UnsafeObjectConvertor(scheme),
		Authorizer: b.s.Authorizer, EquivalentResourceMapper: b.s.EquivalentResourceRegistry, TableConvertor: table,
		Resource: b.gv.WithResource(resource), Subresource: sub, Kind: kind, AcceptsGroupVersionDelegate: accepts,
		HubGroupVersion: schema.GroupVersion{Group: kind.Group, Version: runtime.APIVersionInternal}, MetaGroupVersion: metav1.SchemeGroupVersion,
		MaxRequestBodyBytes: b.cfg.MaxRequestBodyBytes,
		Namer:               handlers.ContextBasedNaming{Namer: runtime.Namer(meta.NewAccessor()), ClusterScoped: !e.namespaced},
	}
	var reset map[fieldpath.APIVersion]fieldpath.Filter
	if r, ok := storage.(rest.ResetFieldsStrategy); ok {
		reset = fieldpath.NewExcludeFilterSetMap(r.GetResetFields())
	}
	if r, ok := storage.(rest.ResetFieldsFilterStrategy); ok {
		reset = r.GetResetFieldsFilter()
	}
	if e.scope.FieldManager, err = managedfields.NewDefaultFieldManager(b.types, e.scope.UnsafeConvertor, e.scope.Defaulter, e.scope.Creater,
		kind, e.scope.HubGroupVersion, sub, reset); err != nil {
		return nil, fmt.Errorf("field manager: %w", err)
	}
	e.createScope = e.scope
	e.createScope.Creater = deepCreater{scheme}
	if example, err := scheme.New(kind); err == nil && sub == "status" && hasLeanStatus(example) {
		lean := e.scope
		if lean.FieldManager, err = managedfields.NewDefaultFieldManager(statusTypes{b.types}, e.scope.UnsafeConvertor, e.scope.Defaulter, e.scope.Creater,
			kind, e.scope.HubGroupVersion, sub, reset); err != nil {
			return nil, fmt.Errorf("field manager: %w", err)
		}
		e.statusScope = &lean
	}
	if o, err := scheme.New(kind); err == nil {
		o.GetObjectKind().SetGroupVersionKind(kind)
		major, minor, err := deprecation.MajorMinor(versioninfo.Get())
		if err == nil && deprecation.IsDeprecated(o, major, minor) {
			e.removed, e.warnings = deprecation.RemovedRelease(o), []string{deprecation.WarningMessage(o)}
		}
	}
	b.s.EquivalentResourceRegistry.RegisterKindFor(e.scope.Resource, sub, kind)
	return e, nil
}

// capabilities notes which paths upstream would register for the storage.
func (e *endpoint) capabilities() {
	_, e.lists = e.storage.(rest.Lister)
	_, e.watches = e.storage.(rest.Watcher)
	_, creates := e.storage.(rest.NamedCreater)
	_, gets := e.storage.(rest.Getter)
	_, getsWith := e.storage.(rest.GetterWithOptions)
	_, updates := e.storage.(rest.Updater)
	_, deletes := e.storage.(rest.GracefulDeleter)
	c, connects := e.storage.(rest.Connecter)
	sub := strings.Contains(e.path, "/") // whatever a subresource can do, it can do to one object
	e.namedOnes = creates || gets || getsWith || updates || deletes || connects || sub
	if connects {
		_, e.subpath, _ = c.NewConnectOptions()
	}
}
