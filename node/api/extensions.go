package api

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	apiextv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextv1beta1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1beta1"
	apiextensionsapi "k8s.io/apiextensions-apiserver/pkg/apiserver"
	apiextclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset/typed/apiextensions/v1"
	apiextopenapi "k8s.io/apiextensions-apiserver/pkg/generated/openapi"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/util/sets"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/healthz"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	"k8s.io/client-go/transport"
	apiregv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	aggregatorhelper "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1/helper"
	aggregatorapi "k8s.io/kube-aggregator/pkg/apiserver"
	aggregatorscheme "k8s.io/kube-aggregator/pkg/apiserver/scheme"
	apiregclient "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset/typed/apiregistration/v1"
	apireglisters "k8s.io/kube-aggregator/pkg/client/listers/apiregistration/v1"
	"k8s.io/kube-aggregator/pkg/controllers/autoregister"
	remoteavailability "k8s.io/kube-aggregator/pkg/controllers/status/remote"
	aggopenapi "k8s.io/kube-aggregator/pkg/generated/openapi"
	"k8s.io/kube-openapi/pkg/common"
	"k8s.io/kubernetes/pkg/controlplane/controller/crdregistration"
	"skein.io/skein/node/api/kinds"
	"skein.io/skein/node/api/openapi"
)

const (
	// remoteTimeout is how long an aggregated API server may take to give its OpenAPI document.
	remoteTimeout = 10 * time.Second
	// maxRemoteDocument bounds that document; that of all of Kubernetes has 4 MB.
	maxRemoteDocument = 32 << 20
)

// openAPIV3 says how the servers around the main one describe themselves.
func (b *build) openAPIV3(definitions common.GetOpenAPIDefinitions, scheme *runtime.Scheme) *common.OpenAPIV3Config {
	c := genericapiserver.DefaultOpenAPIV3Config(definitions, openapinamer.NewDefinitionNamer(scheme))
	c.Info.Title = "Kubernetes"
	c.SecuritySchemes = b.schemes
	return c
}

// buildCustom makes the server of custom resources, which answers what the main one does not know.
func (b *build) buildCustom(base genericapiserver.Config, notFound http.Handler) (*apiextensionsapi.CustomResourceDefinitions, error) {
	defs, err := apiextclient.NewForConfig(base.LoopbackClientConfig)
	if err != nil {
		return nil, fmt.Errorf("custom resources: %w", err)
	}
	end := &newDefinitions{next: notFound, defs: defs.CustomResourceDefinitions()}
	// As upstream stores them: in version v1beta1 a definition takes less room, so that larger ones fit.
	older := runtime.NewMultiGroupVersioner(apiextv1beta1.SchemeGroupVersion, schema.GroupKind{Group: apiextv1beta1.GroupName})
	base.RESTOptionsGetter = b.stores.Extension(apiextensionsapi.Codecs.LegacyCodec(apiextv1beta1.SchemeGroupVersion, apiextv1.SchemeGroupVersion), older)
	base.MergedResourceConfig = serverstorage.NewResourceConfig()
	base.MergedResourceConfig.EnableVersions(apiextv1.SchemeGroupVersion)
	base.SkipOpenAPIInstallation = false
	base.OpenAPIConfig = nil // package openapi merges version 2
	base.OpenAPIV3Config = b.openAPIV3(apiextopenapi.GetOpenAPIDefinitions, apiextensionsapi.Scheme)
	cfg := apiextensionsapi.Config{
		GenericConfig: &genericapiserver.RecommendedConfig{Config: base, SharedInformerFactory: b.informers},
		ExtraConfig: apiextensionsapi.ExtraConfig{
			CRDRESTOptionsGetter: b.stores.Extension(unstructured.UnstructuredJSONScheme, nil),
			MasterCount:          1, // however many there are: see newDefinitions
			AuthResolverWrapper:  b.webhookAuth(),
			ServiceResolver:      b.services,
		},
	}
	crds, err := cfg.Complete().New(genericapiserver.NewEmptyDelegateWithCustomHandler(end))
	if err != nil {
		return nil, fmt.Errorf("custom resources: %w", err)
	}
	end.known, end.serve = crds.Informers.Apiextensions().V1().CustomResourceDefinitions().Lister(), crds.GenericAPIServer.Handler.NonGoRestfulMux
	return crds, nil
}

// buildAggregator makes the outermost server, which sends requests for APIServices to those.
func (b *build) buildAggregator(base genericapiserver.Config, main *genericapiserver.GenericAPIServer, crds *apiextensionsapi.CustomResourceDefinitions) (*aggregatorapi.APIAggregator, error) {
	base.RESTOptionsGetter = b.stores.Extension(aggregatorscheme.Codecs.LegacyCodec(apiregv1.SchemeGroupVersion), apiregv1.SchemeGroupVersion)
	base.SkipOpenAPIInstallation = true
	base.OpenAPIConfig = nil
	base.OpenAPIV3Config = b.openAPIV3(aggopenapi.GetOpenAPIDefinitions, aggregatorscheme.Scheme)
	base.MergedResourceConfig = serverstorage.NewResourceConfig()
	base.MergedResourceConfig.EnableVersions(apiregv1.SchemeGroupVersion)
	base.AggregatedDiscoveryGroupManager = main.AggregatedDiscoveryGroupManager
	base.DisabledPostStartHooks = sets.NewString("aggregator-reload-proxy-client-cert") // it lives as long as the server
	var a *aggregatorapi.APIAggregator
	err := b.proxy.asFiles(func(cert, key string) (err error) {
		cfg := aggregatorapi.Config{
			GenericConfig: &genericapiserver.RecommendedConfig{Config: base, SharedInformerFactory: b.informers},
			ExtraConfig: aggregatorapi.ExtraConfig{ServiceResolver: b.services, ProxyTransport: b.outward(), ProxyClientCertFile: cert, ProxyClientKeyFile: key,
				DisableRemoteAvailableConditionController: true}, // see watchAvailability
		}
		a, err = cfg.Complete().NewWithDelegate(main)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("aggregator: %w", err)
	}
	client, err := apiregclient.NewForConfig(base.LoopbackClientConfig)
	if err != nil {
		return nil, fmt.Errorf("aggregator: %w", err)
	}
	auto := autoregister.NewAutoRegisterController(a.APIRegistrationInformers.Apiregistration().V1().APIServices(), client)
	var names []string
	for gv, p := range served(main) {
		names = append(names, gv.Version+"."+gv.Group)
		base.AggregatedDiscoveryGroupManager.SetGroupVersionPriority(metav1.GroupVersion(gv), int(p.Group), int(p.Version))
		auto.AddAPIServiceToSyncOnStart(&apiregv1.APIService{
			ObjectMeta: metav1.ObjectMeta{Name: gv.Version + "." + gv.Group},
			Spec:       apiregv1.APIServiceSpec{Group: gv.Group, Version: gv.Version, GroupPriorityMinimum: p.Group, VersionPriority: p.Version},
		})
	}
	custom := crdregistration.NewCRDRegistrationController(crds.Informers.Apiextensions().V1().CustomResourceDefinitions(), auto)
	err = a.GenericAPIServer.AddPostStartHook("kube-apiserver-autoregistration", func(h genericapiserver.PostStartHookContext) error {
		go custom.Run(1, h.Done())
		go func() {
			custom.WaitForInitialSync() // else groups of custom resources would be unregistered first
			auto.Run(1, h.Done())
		}()
		return nil
	})
	if err == nil {
		err = a.GenericAPIServer.AddBootSequenceHealthChecks(registered(names, a.APIRegistrationInformers.Apiregistration().V1().APIServices().Lister()))
	}
	if err != nil {
		return nil, fmt.Errorf("aggregator: %w", err)
	}
	return a, nil
}

// registered is upstream's check that all built-in group versions have been available once: before that, discovery is not complete.
func registered(names []string, known apireglisters.APIServiceLister) healthz.HealthChecker {
	var done atomic.Bool
	slices.Sort(names)
	return healthz.NamedCheck("autoregister-completion", func(*http.Request) error {
		if done.Load() {
			return nil
		}
		var missing []string
		for _, n := range names {
			if a, err := known.Get(n); err != nil || !aggregatorhelper.IsAPIServiceConditionTrue(a, apiregv1.Available) {
				missing = append(missing, n)
			}
		}
		if len(missing) > 0 {
			return fmt.Errorf("missing APIService: %v", missing)
		}
		done.Store(true)
		return nil
	})
}

// served gives the built-in group versions that main serves, with their order.
func served(main *genericapiserver.GenericAPIServer) map[schema.GroupVersion]kinds.Priority {
	all, found := kinds.Priorities(), map[schema.GroupVersion]kinds.Priority{}
	for _, path := range main.ListedPaths() {
		var gv schema.GroupVersion
		switch parts := strings.Split(path, "/"); {
		case path == "/api/v1":
			gv = schema.GroupVersion{Version: "v1"}
		case len(parts) == 4 && parts[1] == "apis":
			gv = schema.GroupVersion{Group: parts[2], Version: parts[3]}
		}
		if p, ok := all[gv]; ok { // the rest are custom resources', which register themselves
			found[gv] = p
		}
	}
	return found
}

// remoteDocuments lists where the OpenAPI documents of available aggregated API servers are.
func (b *build) remoteDocuments(a *aggregatorapi.APIAggregator) func() []openapi.Remote {
	lister := a.APIRegistrationInformers.Apiregistration().V1().APIServices().Lister()
	return func() (out []openapi.Remote) {
		all, err := lister.List(labels.Everything())
		if err != nil {
			return nil // a lister of a cache has no errors
		}
		for _, s := range slices.Concat(aggregatorhelper.SortedByGroupAndVersion(all)...) {
			if s.Spec.Service == nil || !aggregatorhelper.IsAPIServiceConditionTrue(s, apiregv1.Available) {
				continue
			}
			out = append(out, openapi.Remote{Group: s.Spec.Group, Version: s.Spec.Version, Key: s.Name + "@" + s.ResourceVersion,
				Fetch: func() ([]byte, error) { return b.fetchRemote(s, "/openapi/v2") }})
		}
		return out
	}
}

// fetchRemote gets a document from an aggregated API server, in the name of the aggregator.
func (b *build) fetchRemote(s *apiregv1.APIService, path string) ([]byte, error) {
	cert, key := b.proxy.pair()
	rt, err := transport.New(remoteavailability.BuildTransportConfig(b.dialer, cert, key, s))
	if err != nil {
		return nil, fmt.Errorf("APIService %s: %w", s.Name, err)
	}
	defer utilnet.CloseIdleConnectionsFor(rt)
	u, err := b.services.ResolveEndpoint(s.Spec.Service.Namespace, s.Spec.Service.Name, *s.Spec.Service.Port)
	if err != nil {
		return nil, fmt.Errorf("APIService %s: %w", s.Name, err)
	}
	u.Scheme, u.Path = "https", path
	r, err := http.NewRequest(http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("APIService %s: %w", s.Name, err)
	}
	r.Header.Set("Accept", "application/json")
	transport.SetAuthProxyHeaders(r, "system:aggregator", "", nil, nil)
	resp, err := (&http.Client{Transport: rt, Timeout: remoteTimeout}).Do(r)
	if err != nil {
		return nil, fmt.Errorf("APIService %s: %w", s.Name, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("APIService %s: %s: %s", s.Name, path, resp.Status)
	}
	doc, err := io.ReadAll(io.LimitReader(resp.Body, maxRemoteDocument+1))
	if err == nil && len(doc) > maxRemoteDocument {
		err = fmt.Errorf("over %d bytes", maxRemoteDocument)
	}
	if err != nil {
		return nil, fmt.Errorf("APIService %s: %s: %w", s.Name, path, err)
	}
	return doc, nil
}
