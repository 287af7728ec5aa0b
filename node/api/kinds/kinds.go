// Package kinds composes upstream's contract packages: which group versions are served, and the
// REST storages (strategies, validation, tables, address and port allocation) that serve them.
// Nothing about a kind is decided here.
package kinds

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/registry/generic"
	genericapiserver "k8s.io/apiserver/pkg/server"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	restclient "k8s.io/client-go/rest"
	basecompatibility "k8s.io/component-base/compatibility"
	"k8s.io/kubernetes/pkg/cluster/ports"
	kubeletclient "k8s.io/kubernetes/pkg/kubelet/client"
	admissionregistrationrest "k8s.io/kubernetes/pkg/registry/admissionregistration/rest"
	appsrest "k8s.io/kubernetes/pkg/registry/apps/rest"
	authenticationrest "k8s.io/kubernetes/pkg/registry/authentication/rest"
	authorizationrest "k8s.io/kubernetes/pkg/registry/authorization/rest"
	autoscalingrest "k8s.io/kubernetes/pkg/registry/autoscaling/rest"
	batchrest "k8s.io/kubernetes/pkg/registry/batch/rest"
	certificatesrest "k8s.io/kubernetes/pkg/registry/certificates/rest"
	coordinationrest "k8s.io/kubernetes/pkg/registry/coordination/rest"
	"k8s.io/kubernetes/pkg/registry/core/componentstatus"
	nodecorerest "k8s.io/kubernetes/pkg/registry/core/node/rest"
	podrest "k8s.io/kubernetes/pkg/registry/core/pod/rest"
	corerest "k8s.io/kubernetes/pkg/registry/core/rest"
	discoveryrest "k8s.io/kubernetes/pkg/registry/discovery/rest"
	eventsrest "k8s.io/kubernetes/pkg/registry/events/rest"
	flowcontrolrest "k8s.io/kubernetes/pkg/registry/flowcontrol/rest"
	networkingrest "k8s.io/kubernetes/pkg/registry/networking/rest"
	noderest "k8s.io/kubernetes/pkg/registry/node/rest"
	policyrest "k8s.io/kubernetes/pkg/registry/policy/rest"
	rbacrest "k8s.io/kubernetes/pkg/registry/rbac/rest"
	resourcerest "k8s.io/kubernetes/pkg/registry/resource/rest"
	schedulingrest "k8s.io/kubernetes/pkg/registry/scheduling/rest"
	storagerest "k8s.io/kubernetes/pkg/registry/storage/rest"
	svmrest "k8s.io/kubernetes/pkg/registry/storagemigration/rest"
	"k8s.io/kubernetes/pkg/serviceaccount"
)

// repairInterval is how often leaked Service addresses and node ports are looked for; upstream's.
const repairInterval = 3 * time.Minute

// extendedTokenLife is the longest life of a pod's token whose client does not reload it;
// upstream's default.
const extendedTokenLife = 365 * 24 * time.Hour

// Deps is what the storages need of the server around them. All fields are required.
type Deps struct {
	Resources *serverstorage.ResourceConfig
	Version   basecompatibility.EffectiveVersion
	Storage   *serverstorage.DefaultStorageFactory
	Options   generic.RESTOptionsGetter

	// The final ones, after Config.Complete added the loopback identity.
	Authenticator authenticator.Request
	Authorizer    authorizer.Authorizer
	Rules         authorizer.RuleResolver

	Loopback  *restclient.Config
	Client    kubernetes.Interface
	Informers informers.SharedInformerFactory

	Tokens    serviceaccount.TokenGenerator
	Audiences authenticator.Audiences

	ServiceCIDR netip.Prefix
	// SecondServiceCIDR is of the other family; not valid for none.
	SecondServiceCIDR netip.Prefix
	NodePorts         utilnet.PortRange
	EventTTL          time.Duration // how long an Event is kept

	// ProxyTransport reaches pods and Services for the proxy subresources.
	ProxyTransport *http.Transport
	// Nodes gives, over what it is handed (upstream's look-up of a node's address), how to reach
	// the agent of a node: logs, exec, attach, port-forward and the nodes' proxy.
	Nodes func(kubeletclient.ConnectionInfoGetter) kubeletclient.ConnectionInfoGetter
	// Components are shown as componentstatuses.
	Components func() map[string]componentstatus.Server
}

// RepairHookName is the hook that starts the repair of Service addresses and node ports. Unlike the
// others it must be called once: what it started goes on when it fails.
const RepairHookName = "start-service-ip-repair-controllers"

// Group is an API group ready to be served, and the hook that must run when it is.
type Group struct {
	genericapiserver.APIGroupInfo
	HookName string // empty: none
	Hook     genericapiserver.PostStartHookFunc
}

// Destroy stops what the group's storages run.
func (g *Group) Destroy() {
	for _, version := range g.VersionedResourcesStorageMap {
		for _, s := range version {
			s.Destroy()
		}
	}
}

type provider interface {
	GroupName() string
	NewRESTStorage(serverstorage.APIResourceConfigSource, generic.RESTOptionsGetter) (genericapiserver.APIGroupInfo, error)
}

// Groups builds the storages of all groups, in the order of discovery.
func Groups(d Deps) ([]*Group, error) {
	providers, err := providers(d)
	if err != nil {
		return nil, err
	}
	expired, err := genericapiserver.NewResourceExpirationEvaluatorFromOptions(genericapiserver.ResourceExpirationEvaluatorOptions{
		CurrentVersion: d.Version.EmulationVersion(), Prerelease: d.Version.BinaryVersion().PreRelease()})
	if err != nil {
		return nil, err
	}
	var groups []*Group
	for _, p := range providers {
		info, err := p.NewRESTStorage(d.Resources, d.Options)
		if err != nil {
			return nil, fmt.Errorf("storages of group %q: %w", p.GroupName(), err)
		}
		if err := expired.RemoveUnavailableKinds(p.GroupName(), info.Scheme, info.VersionedResourcesStorageMap, d.Resources); err != nil {
			return nil, fmt.Errorf("kinds of group %q: %w", p.GroupName(), err)
		}
		if len(info.VersionedResourcesStorageMap) == 0 {
			continue
		}
		g := &Group{APIGroupInfo: info}
		if h, ok := p.(genericapiserver.PostStartHookProvider); ok {
			if g.HookName, g.Hook, err = h.PostStartHook(); err != nil {
				return nil, fmt.Errorf("hook of group %q: %w", p.GroupName(), err)
			}
		}
		if p.GroupName() == "" {
			if err := adaptCore(g, d); err != nil {
				return nil, err
			}
		}
		groups = append(groups, g)
	}
	named := func(name string) *Group {
		return groups[slices.IndexFunc(groups, func(g *Group) bool { return g.PrioritizedVersions[0].Group == name })]
	}
	return groups, guardAddresses(named(""), named("networking.k8s.io"))
}

// IPNet is a network as upstream takes it; of one that is not valid, none.
func IPNet(p netip.Prefix) net.IPNet {
	if !p.IsValid() {
		return net.IPNet{}
	}
	return net.IPNet{IP: p.Masked().Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func providers(d Deps) ([]provider, error) {
	core, err := corerest.New(corerest.Config{
		GenericConfig: corerest.GenericConfig{
			StorageFactory: d.Storage, EventTTL: d.EventTTL, LoopbackClientConfig: d.Loopback, Informers: d.Informers,
			ServiceAccountIssuer: d.Tokens, ExtendExpiration: true, MaxExtendedExpiration: extendedTokenLife, APIAudiences: d.Audiences,
		},
		Proxy:    corerest.ProxyConfig{Transport: d.ProxyTransport, KubeletClientConfig: kubeletConfig()},
		Services: corerest.ServicesConfig{ClusterIPRange: IPNet(d.ServiceCIDR), SecondaryClusterIPRange: IPNet(d.SecondServiceCIDR), NodePortRange: d.NodePorts, IPRepairInterval: repairInterval},
	}, d.Authorizer)
	if err != nil {
		return nil, fmt.Errorf("core group: %w", err)
	}
	return []provider{
		core,
		authenticationrest.RESTStorageProvider{Authenticator: d.Authenticator, APIAudiences: d.Audiences},
		authorizationrest.RESTStorageProvider{Authorizer: d.Authorizer, RuleResolver: d.Rules},
		autoscalingrest.RESTStorageProvider{},
		batchrest.RESTStorageProvider{},
		certificatesrest.RESTStorageProvider{Authorizer: d.Authorizer},
		coordinationrest.RESTStorageProvider{},
		discoveryrest.StorageProvider{},
		networkingrest.RESTStorageProvider{},
		noderest.RESTStorageProvider{},
		policyrest.RESTStorageProvider{},
		rbacrest.RESTStorageProvider{Authorizer: d.Authorizer},
		svmrest.RESTStorageProvider{},
		schedulingrest.RESTStorageProvider{},
		storagerest.RESTStorageProvider{},
		flowcontrolrest.RESTStorageProvider{InformerFactory: d.Informers},
		appsrest.StorageProvider{},
		admissionregistrationrest.RESTStorageProvider{Authorizer: d.Authorizer, DiscoveryClient: d.Client.Discovery()},
		eventsrest.RESTStorageProvider{TTL: d.EventTTL},
		resourcerest.RESTStorageProvider{NamespaceClient: d.Client.CoreV1().Namespaces(), Authorizer: d.Authorizer},
	}, nil
}

// kubeletConfig says which of a node's addresses is dialled, and the port if the node names none.
// How it is dialled is replaced by Deps.Nodes.
func kubeletConfig() kubeletclient.KubeletClientConfig {
	return kubeletclient.KubeletClientConfig{
		Port: ports.KubeletPort, ReadOnlyPort: ports.KubeletReadOnlyPort, HTTPTimeout: 5 * time.Second,
		// Names come last: nothing resolves node names here.
		PreferredAddressTypes: []string{string(corev1.NodeInternalIP), string(corev1.NodeExternalIP), string(corev1.NodeHostName)},
	}
}

// adaptCore replaces what upstream's core storages would do over connections of their own.
func adaptCore(g *Group, d Deps) error {
	all := g.VersionedResourcesStorageMap["v1"]
	wrap := func(c *kubeletclient.ConnectionInfoGetter) { *c = d.Nodes(*c) }
	for _, path := range []string{"pods/log", "pods/exec", "pods/attach", "pods/portforward", "nodes/proxy"} {
		switch s := all[path].(type) {
		case *podrest.LogREST:
			wrap(&s.KubeletConn)
		case *podrest.ExecREST:
			wrap(&s.KubeletConn)
		case *podrest.AttachREST:
			wrap(&s.KubeletConn)
		case *podrest.PortForwardREST:
			wrap(&s.KubeletConn)
		case *nodecorerest.ProxyREST:
			wrap(&s.Connection)
		default:
			return fmt.Errorf("storage of %s is a %T, which this version of Skein does not know", path, s)
		}
	}
	all["componentstatuses"] = componentstatus.NewStorage(d.Components)
	return nil
}
