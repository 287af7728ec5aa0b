package api

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"go.opentelemetry.io/otel/trace"
	noopoteltrace "go.opentelemetry.io/otel/trace/noop"
	corev1 "k8s.io/api/core/v1"
	apiextensionsapi "k8s.io/apiextensions-apiserver/pkg/apiserver"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	genericapifilters "k8s.io/apiserver/pkg/endpoints/filters"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	genericfeatures "k8s.io/apiserver/pkg/features"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	genericfilters "k8s.io/apiserver/pkg/server/filters"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	"k8s.io/apiserver/pkg/util/compatibility"
	utilflowcontrol "k8s.io/apiserver/pkg/util/flowcontrol"
	"k8s.io/apiserver/pkg/util/notfoundhandler"
	apiwebhook "k8s.io/apiserver/pkg/util/webhook"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/transport"
	basecompatibility "k8s.io/component-base/compatibility"
	"k8s.io/component-base/featuregate"
	versioninfo "k8s.io/component-base/version"
	aggregatorapi "k8s.io/kube-aggregator/pkg/apiserver"
	"k8s.io/kube-openapi/pkg/spec3"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/capabilities"
	"k8s.io/kubernetes/pkg/routes"
	"k8s.io/kubernetes/pkg/serviceaccount"
	"skein.io/skein/node/api/encrypt"
	"skein.io/skein/node/api/kinds"
	"skein.io/skein/node/api/loopback"
	"skein.io/skein/node/api/openapi"
	"skein.io/skein/node/api/router"
	"skein.io/skein/node/api/store"
)

const (
	protobuf = "application/vnd.kubernetes.protobuf"
	// watchGrace is how long open watches may take to end, each with a clean end of the stream, when
	// the server stops.
	watchGrace = 2 * time.Second
	// inProcess is the host in requests of in-process clients. Nothing resolves it.
	inProcess = "http://in-process"
)

// build carries what the parts of one server share while it is put together.
type build struct {
	cfg       *Config
	generic   *genericapiserver.Config
	resources *serverstorage.ResourceConfig
	clientCA  dynamiccertificates.CAContentProvider
	tokens    tokens
	docs      *openapi.Documents
	stores    *store.Factory
	agents    *agentDialer
	nodePods  *podFeed
	bootstrap informers.SharedInformerFactory // of bootstrap tokens
	loopback  *loopback.Transport
	client    kubernetes.Interface
	informers informers.SharedInformerFactory
	services  apiwebhook.ServiceResolver
	tracer    trace.TracerProvider
	proxy     *frontProxy
	dialer    *transport.DialHolder // of Config.Dial; one, as connections are kept by it
	self      *selfDoor
	schemes   spec3.SecuritySchemes // ways to authenticate, as OpenAPI tells them
	listener  *idleListener
	log       requestLog
	probe     *storeProbe
	bindings  rest.Storage // of pods
	events    rest.Storage // of the core group
}

// newBuild makes what does not depend on the rest.
func newBuild(ctx context.Context, cfg *Config, bridge *store.Bridge) (*build, error) {
	capabilities.Setup(true, 0) // privileged pods are refused otherwise
	b := &build{cfg: cfg, log: requestLog{cfg.Logger, *cfg.RequestLog}, loopback: &loopback.Transport{}, tracer: noopoteltrace.NewTracerProvider()}
	var err error
	if b.resources, err = kinds.Resources(cfg.RuntimeConfig); err != nil {
		return nil, err
	}
	if b.clientCA, err = dynamiccertificates.NewStaticCAContent("client-ca", cfg.ClientCA); err != nil {
		return nil, fmt.Errorf("client CA: %w", err)
	}
	if b.tokens, err = newTokens(cfg); err != nil {
		return nil, err
	}
	if b.docs, err = openapi.Load(kinds.Extra(b.resources)); err != nil {
		return nil, err
	}
	if b.proxy, err = newFrontProxy(cfg); err != nil {
		return nil, err
	}
	b.self, b.dialer = newSelfDoor(cfg), &transport.DialHolder{Dial: cfg.Dial}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(cfg.ClientCA) // Validate made sure that there is one
	b.agents = newAgentDialer(pool, cfg.KubeletClientCert)
	b.generic = b.genericConfig()
	if b.client, err = kubernetes.NewForConfig(b.generic.LoopbackClientConfig); err != nil {
		return nil, fmt.Errorf("in-process client: %w", err)
	}
	b.informers = encodedNodes{informers.NewSharedInformerFactoryWithOptions(b.client, 0, informers.WithTransform(slim))}
	b.services = aggregatorapi.NewClusterIPServiceResolver(b.informers.Core().V1().Services().Lister())
	b.generic.FlowControl = utilflowcontrol.New(b.informers, b.client.FlowcontrolV1(), b.generic.MaxRequestsInFlight+b.generic.MaxMutatingRequestsInFlight)
	b.generic.FlowControl = newTurns(b.generic.FlowControl)
	if b.log.enabled() {
		b.generic.FlowControl = notedFlow{b.generic.FlowControl}
	}
	b.stores, err = store.New(ctx, cfg.Store, cfg.StorePrefix, b.generic.EffectiveVersion, b.resources, b.generic.StorageObjectCountTracker, bridge,
		encrypt.New(cfg.Keys, cfg.Sealed...))
	if err != nil {
		return nil, err
	}
	b.stores.LastKnown = cfg.LastKnown
	b.generic.RESTOptionsGetter = b.stores.BuiltIn()
	return b, nil
}

// dropManagedFields keeps them out of the informers of this process: nobody here reads them.
func dropManagedFields(o any) (any, error) {
	if a, err := meta.Accessor(o); err == nil && a.GetManagedFields() != nil {
		a.SetManagedFields(nil)
	}
	return o, nil
}

// slim keeps in the server's own informers what admission and the checks of tokens read: of a Node its identity, labels, room and declared
// features, which is a third of it, and that encoded.
func slim(o any) (any, error) {
	if n, ok := o.(*corev1.Node); ok {
		n.Annotations, n.Spec = nil, corev1.NodeSpec{}
		n.Status = corev1.NodeStatus{Allocatable: roomOf(n.Status.Allocatable), DeclaredFeatures: n.Status.DeclaredFeatures}
		n.ManagedFields = nil
		return encodeNode(n)
	}
	return dropManagedFields(o)
}

// rooms are those of Nodes, by what they are encoded to: machines of a type have the same, and a map of it takes nearly a KB.
var rooms = struct {
	sync.Mutex // guards the rest
	known      map[string]corev1.ResourceList
}{known: map[string]corev1.ResourceList{}}

// maxRooms bounds those that are remembered: when there are more, it begins anew.
const maxRooms = 1024

// roomOf gives an equal list, which nobody may change.
func roomOf(l corev1.ResourceList) corev1.ResourceList {
	key, err := (&corev1.NodeStatus{Allocatable: l}).Marshal()
	if err != nil || len(l) == 0 {
		return l
	}
	rooms.Lock()
	defer rooms.Unlock()
	if known, ok := rooms.known[string(key)]; ok {
		return known
	}
	if len(rooms.known) >= maxRooms {
		clear(rooms.known)
	}
	rooms.known[string(key)] = l
	return l
}

// without hides a feature from a part of upstream's: nobody traces requests here, and preparing each for it costs a tenth of a small one.
type without struct {
	featuregate.FeatureGate
	feature featuregate.Feature
}

func (w without) Enabled(f featuregate.Feature) bool {
	return f != w.feature && w.FeatureGate.Enabled(f)
}

func (b *build) genericConfig() *genericapiserver.Config {
	c := genericapiserver.NewConfig(legacyscheme.Codecs)
	c.EffectiveVersion = compatibility.DefaultComponentGlobalsRegistry.EffectiveVersionFor(basecompatibility.DefaultKubeComponent)
	upstream := genericfilters.BasicLongRunningRequestCheck(
		sets.NewString("watch", "proxy"), sets.NewString("attach", "exec", "proxy", "log", "portforward"))
	c.LongRunningFunc = func(r *http.Request, i *apirequest.RequestInfo) bool {
		return upstream(r, i) || slices.Contains(b.cfg.LongRunning, r.URL.Path)
	}
	c.MaxRequestsInFlight, c.MaxMutatingRequestsInFlight = b.cfg.Limits.Reads, b.cfg.Limits.Writes
	c.MaxRequestBodyBytes = b.cfg.Limits.Body
	watches := newWatchLimit(b.cfg.Limits, c.Serializer)
	c.BuildHandlerChainFunc = func(h http.Handler, c *genericapiserver.Config) http.Handler {
		h = refuse(watches.bound(listMetrics(h, c.Serializer, legacyscheme.Codecs.UniversalDeserializer())), c.Serializer)
		if b.log.enabled() {
			h = known(h)
		}
		untraced := *c
		untraced.FeatureGate = without{c.FeatureGate, genericfeatures.APIServerTracing}
		return genericapiserver.DefaultBuildHandlerChain(h, &untraced)
	}
	c.PublicAddress = b.cfg.AdvertiseIP.AsSlice()
	c.ExternalAddress = netip.AddrPortFrom(b.cfg.AdvertiseIP, b.cfg.AdvertisePort).String()
	c.MergedResourceConfig = b.resources
	c.AggregatedDiscoveryGroupManager = aggregated.NewResourceManager("apis")
	c.SkipOpenAPIInstallation = true
	c.ShutdownWatchTerminationGracePeriod = watchGrace
	// The front serves TLS. Upstream's life cycle still waits for a listener to stop: this one.
	b.listener = newIdleListener()
	c.SecureServing = &genericapiserver.SecureServingInfo{Listener: b.listener}
	c.LoopbackClientConfig = &restclient.Config{
		Host: inProcess, Transport: b.loopback, BearerToken: uuid.NewString(), QPS: -1, DisableCompression: true,
		ContentConfig: restclient.ContentConfig{ContentType: protobuf}, WarningHandler: restclient.NoWarnings{},
		UserAgent: "kube-apiserver/" + versioninfo.Get().GitVersion, // its first word shows up in managedFields
	}
	b.addHealth(c)
	return c
}

func (b *build) rawLister(r schema.GroupResource) router.RawLister {
	if l := b.stores.Raw(r); l != nil {
		return l
	}
	return nil
}

// chain is the finished server: aggregator, then built-in kinds, then custom resources.
type chain struct {
	outer *aggregatorapi.APIAggregator
	// customKnown is closed when all CustomResourceDefinitions have been read.
	customKnown <-chan struct{}
}

func (b *build) chain(ctx context.Context) (*chain, error) {
	if err := b.buildAuthentication(ctx); err != nil {
		return nil, err
	}
	if err := b.buildAuthorization(ctx); err != nil {
		return nil, err
	}
	if err := b.cfg.Access.AuditOptions().ApplyTo(b.generic); err != nil {
		return nil, fmt.Errorf("audit: %w", err)
	}
	if err := b.buildAdmission(); err != nil {
		return nil, err
	}
	base := *b.generic // for the servers around the main one
	base.PostStartHooks = map[string]genericapiserver.PostStartHookConfigEntry{}
	notFound := notfoundhandler.New(b.generic.Serializer, genericapifilters.NoMuxAndDiscoveryIncompleteKey)
	crds, err := b.buildCustom(base, notFound)
	if err != nil {
		return nil, err
	}
	main, err := b.buildMain(crds)
	if err != nil {
		return nil, err
	}
	outer, err := b.buildAggregator(base, main, crds)
	if err != nil {
		return nil, err
	}
	openapi.NewServer(b.docs, crds, b.remoteDocuments(outer)).Install(main.Handler.NonGoRestfulMux)
	if b.cfg.Why != nil {
		handle(outer.GenericAPIServer, WhyPath, http.HandlerFunc(b.serveWhy))
	}
	for path, h := range b.cfg.Extra {
		handle(outer.GenericAPIServer, path, h)
	}
	known, ok := crds.GenericAPIServer.MuxAndDiscoveryCompleteSignals()["CRDInformerHasNotSynced"]
	if !ok {
		return nil, errors.New("this version of the CRD server does not tell when it knows all definitions")
	}
	return &chain{outer, known}, nil
}

func handle(s *genericapiserver.GenericAPIServer, path string, h http.Handler) {
	if path[len(path)-1] == '/' {
		s.Handler.NonGoRestfulMux.HandlePrefix(path, h)
		return
	}
	s.Handler.NonGoRestfulMux.Handle(path, h)
}

// buildMain makes the server of the built-in kinds.
func (b *build) buildMain(crds *apiextensionsapi.CustomResourceDefinitions) (*genericapiserver.GenericAPIServer, error) {
	completed := b.generic.Complete(b.informers) // wraps authentication and authorization with the loopback identity
	main, err := completed.New("kube-apiserver", crds.GenericAPIServer)
	if err != nil {
		return nil, err
	}
	groups, err := kinds.Groups(kinds.Deps{
		Resources: b.resources, Version: b.generic.EffectiveVersion, Storage: b.stores.Storage, Options: b.generic.RESTOptionsGetter,
		Authenticator: b.generic.Authentication.Authenticator, Authorizer: b.generic.Authorization.Authorizer, Rules: b.generic.RuleResolver,
		Loopback: b.generic.LoopbackClientConfig, Client: b.client, Informers: b.informers,
		Tokens: b.tokens, Audiences: b.generic.Authentication.APIAudiences,
		ServiceCIDR: b.cfg.ServiceCIDR, SecondServiceCIDR: b.cfg.SecondServiceCIDR, NodePorts: b.cfg.NodePorts, EventTTL: b.cfg.EventTTL,
		ProxyTransport: b.podTransport(),
		Nodes:          b.agents.wrap, Components: b.components,
	})
	if err != nil {
		return nil, err
	}
	infos := make([]*genericapiserver.APIGroupInfo, len(groups))
	for i, g := range groups {
		infos[i] = &g.APIGroupInfo
		if g.PrioritizedVersions[0].Group == "" {
			core := g.VersionedResourcesStorageMap["v1"]
			b.bindings, b.events = core["pods/binding"], core["events"]
		}
		main.RegisterDestroyFunc(g.Destroy)
		if g.Hook != nil {
			again := g.HookName != kinds.RepairHookName
			if err := main.AddPostStartHook(g.HookName, b.patient(g.HookName, g.Hook, again)); err != nil {
				return nil, err
			}
		}
	}
	measured := b.resourceMetrics()
	infos = append(infos, &measured)
	types := openapi.NewTypes(b.docs)
	if err := router.Install(main, completed, infos, types.For, b.rawLister); err != nil {
		return nil, err
	}
	metadata, err := serviceaccount.NewOpenIDMetadataProvider(b.cfg.Issuer, "", b.generic.ExternalAddress, b.tokens.keys)
	if err != nil {
		return nil, fmt.Errorf("token discovery: %w", err)
	}
	routes.NewOpenIDMetadataServer(metadata).Install(main.Handler.GoRestfulContainer)
	return main, b.addHooks(main)
}
