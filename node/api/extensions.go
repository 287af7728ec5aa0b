package api

import (
	"fmt"
	"net/http"
	"strings"

	apiextv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextensionsapi "k8s.io/apiextensions-apiserver/pkg/apiserver"
	apiextopenapi "k8s.io/apiextensions-apiserver/pkg/generated/openapi"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	genericapiserver "k8s.io/apiserver/pkg/server"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	apiwebhook "k8s.io/apiserver/pkg/util/webhook"
	apiregv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	aggregatorapi "k8s.io/kube-aggregator/pkg/apiserver"
	aggregatorscheme "k8s.io/kube-aggregator/pkg/apiserver/scheme"
	apiregclient "k8s.io/kube-aggregator/pkg/client/clientset_generated/clientset/typed/apiregistration/v1"
	"k8s.io/kube-aggregator/pkg/controllers/autoregister"
	aggopenapi "k8s.io/kube-aggregator/pkg/generated/openapi"
	"k8s.io/kubernetes/pkg/controlplane/controller/crdregistration"
	"skein.io/skein/node/api/kinds"
)

// buildCustom makes the server of custom resources, which answers what the main one does not know.
func (b *build) buildCustom(base genericapiserver.Config, next genericapiserver.DelegationTarget) (*apiextensionsapi.CustomResourceDefinitions, error) {
	base.RESTOptionsGetter = b.stores.Extension(apiextensionsapi.Codecs.LegacyCodec(apiextv1.SchemeGroupVersion), apiextv1.SchemeGroupVersion)
	base.MergedResourceConfig = serverstorage.NewResourceConfig()
	base.MergedResourceConfig.EnableVersions(apiextv1.SchemeGroupVersion)
	base.SkipOpenAPIInstallation = false
	base.OpenAPIConfig = nil // package openapi merges version 2
	base.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(apiextopenapi.GetOpenAPIDefinitions, openapinamer.NewDefinitionNamer(apiextensionsapi.Scheme))
	cfg := apiextensionsapi.Config{
		GenericConfig: &genericapiserver.RecommendedConfig{Config: base, SharedInformerFactory: b.informers},
		ExtraConfig: apiextensionsapi.ExtraConfig{
			CRDRESTOptionsGetter: b.stores.Extension(unstructured.UnstructuredJSONScheme, nil),
			MasterCount:          1,
			AuthResolverWrapper:  apiwebhook.NewDefaultAuthenticationInfoResolverWrapper(nil, nil, base.LoopbackClientConfig, b.tracer),
			ServiceResolver:      b.services,
		},
	}
	crds, err := cfg.Complete().New(next)
	if err != nil {
		return nil, fmt.Errorf("custom resources: %w", err)
	}
	return crds, nil
}

// buildAggregator makes the outermost server, which sends requests for APIServices to those.
func (b *build) buildAggregator(base genericapiserver.Config, main *genericapiserver.GenericAPIServer, crds *apiextensionsapi.CustomResourceDefinitions) (*aggregatorapi.APIAggregator, error) {
	base.RESTOptionsGetter = b.stores.Extension(aggregatorscheme.Codecs.LegacyCodec(apiregv1.SchemeGroupVersion), apiregv1.SchemeGroupVersion)
	base.SkipOpenAPIInstallation = true
	base.OpenAPIConfig = nil
	base.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(aggopenapi.GetOpenAPIDefinitions, openapinamer.NewDefinitionNamer(aggregatorscheme.Scheme))
	base.MergedResourceConfig = serverstorage.NewResourceConfig()
	base.MergedResourceConfig.EnableVersions(apiregv1.SchemeGroupVersion)
	base.AggregatedDiscoveryGroupManager = main.AggregatedDiscoveryGroupManager
	cfg := aggregatorapi.Config{
		GenericConfig: &genericapiserver.RecommendedConfig{Config: base, SharedInformerFactory: b.informers},
		ExtraConfig:   aggregatorapi.ExtraConfig{ServiceResolver: b.services, ProxyTransport: &http.Transport{}},
	}
	a, err := cfg.Complete().NewWithDelegate(main)
	if err != nil {
		return nil, fmt.Errorf("aggregator: %w", err)
	}
	client, err := apiregclient.NewForConfig(base.LoopbackClientConfig)
	if err != nil {
		return nil, fmt.Errorf("aggregator: %w", err)
	}
	auto := autoregister.NewAutoRegisterController(a.APIRegistrationInformers.Apiregistration().V1().APIServices(), client)
	for gv, p := range served(main) {
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
	if err != nil {
		return nil, fmt.Errorf("aggregator: %w", err)
	}
	return a, nil
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
