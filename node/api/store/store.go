// Package store puts Kubernetes objects into an in-process etcd client: upstream's etcd3 storage,
// unmodified, over whatever client the caller gives for a resource.
//
// Nothing in it opens a network connection. Upstream dials from inside its storage factory, which
// takes no client; so resources get a storage decorator of ours, and the one allocator that asks
// the factory itself reaches the same client over an in-memory pipe (see Bridge).
//
// There is no watch cache: a list or a watch reads the store. Upstream's cache holds every object
// decoded (some 13 KB a pod), which a small cluster has no use for.
//
// Storages made here are as safe for concurrent use as the clients below them. Revisions are
// comparable within one resource only, as Kubernetes promises no more.
package store

import (
	"fmt"
	"path"
	"slices"
	"sync"

	clientv3 "go.etcd.io/etcd/client/v3"
	etcdclient "go.etcd.io/etcd/client/v3/kubernetes"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/registry/generic"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/etcd3"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/apiserver/pkg/storage/storagebackend/factory"
	"k8s.io/apiserver/pkg/storage/value/encrypt/identity"
	flowcontrolrequest "k8s.io/apiserver/pkg/util/flowcontrol/request"
	"k8s.io/client-go/tools/cache"
	basecompatibility "k8s.io/component-base/compatibility"
	"k8s.io/kubernetes/pkg/kubeapiserver"
)

// mediaType is what built-in objects are stored as, like upstream's default.
const mediaType = "application/vnd.kubernetes.protobuf"

// Clients gives the client that holds a resource. It must give the same one for a resource each
// time and never nil.
type Clients func(schema.GroupResource) *etcdclient.Client

// Factory makes storages of every kind.
type Factory struct {
	// Storage knows the version that each built-in resource is stored in.
	Storage *serverstorage.DefaultStorageFactory

	clients Clients
	options *genericoptions.EtcdOptions

	mu     sync.Mutex // guards opened
	opened []*clientv3.Client
}

// New prepares a factory for keys below prefix ("/registry"). dial is what the components get
// that insist on dialling; see Bridge.Dial.
func New(clients Clients, prefix string, version basecompatibility.EffectiveVersion, resources *serverstorage.ResourceConfig,
	count flowcontrolrequest.StorageObjectCountTracker, bridge *Bridge) (*Factory, error) {
	o := genericoptions.NewEtcdOptions(storagebackend.NewDefaultConfig(prefix, nil))
	o.DefaultStorageMediaType = mediaType
	o.EnableWatchCache = false
	o.StorageConfig.StorageObjectCountTracker = count
	o.StorageConfig.Transport = bridge.transport()
	// Compact does it once for the cluster; counting objects by polling would read it all.
	o.StorageConfig.CompactionInterval = 0
	o.StorageConfig.CountMetricPollPeriod = 0
	o.StorageConfig.DBMetricPollInterval = 0

	c := kubeapiserver.NewStorageFactoryConfigEffectiveVersion(version)
	c.APIResourceConfig = resources
	c.DefaultResourceEncoding.SetEffectiveVersion(version)
	f, err := c.Complete(o).New()
	if err != nil {
		return nil, fmt.Errorf("storage versions: %w", err)
	}
	f.StorageConfig.StorageObjectCountTracker = count
	return &Factory{Storage: f, clients: clients, options: o}, nil
}

// BuiltIn gives the storages of the built-in resources.
func (f *Factory) BuiltIn() generic.RESTOptionsGetter {
	return f.decorated(f.options.CreateRESTOptionsGetter(f.Storage, nil))
}

// Extension gives storages whose objects are all encoded by one codec: those of the CRD server
// and of the aggregator. version may be nil (custom resources are stored as they come).
func (f *Factory) Extension(codec runtime.Codec, version runtime.GroupVersioner) generic.RESTOptionsGetter {
	c := f.options.StorageConfig
	c.Codec, c.EncodeVersioner = codec, version
	return f.decorated(f.options.CreateRESTOptionsGetter(&genericoptions.SimpleStorageFactory{StorageConfig: c}, nil))
}

func (f *Factory) decorated(g generic.RESTOptionsGetter) generic.RESTOptionsGetter {
	return getter(func(gr schema.GroupResource, example runtime.Object) (generic.RESTOptions, error) {
		o, err := g.GetRESTOptions(gr, example)
		if err != nil {
			return o, fmt.Errorf("storage of %s: %w", gr, err)
		}
		o.Decorator = f.open
		return o, nil
	})
}

// open has the signature of generic.StorageDecorator.
func (f *Factory) open(c *storagebackend.ConfigForResource, resourcePrefix string, _ func(runtime.Object) (string, error),
	newFunc, newListFunc func() runtime.Object, _ storage.AttrFunc, _ storage.IndexerFuncs, _ *cache.Indexers,
) (storage.Interface, factory.DestroyFunc, error) {
	client := f.clients(c.GroupResource)
	if client == nil {
		return nil, nil, fmt.Errorf("no store for %s", c.GroupResource)
	}
	f.mu.Lock()
	if !slices.Contains(f.opened, client.Client) {
		f.opened = append(f.opened, client.Client)
	}
	f.mu.Unlock()
	transformer := c.Transformer
	if transformer == nil {
		transformer = identity.NewEncryptCheckTransformer()
	}
	v := storage.APIObjectVersioner{}
	s, err := etcd3.New(client, nil, c.Codec, newFunc, newListFunc, path.Join("/", c.Prefix), resourcePrefix,
		c.GroupResource, transformer, c.LeaseManagerConfig, etcd3.NewDefaultDecoder(c.Codec, v), v)
	if err != nil {
		return nil, nil, fmt.Errorf("storage of %s: %w", c.GroupResource, err)
	}
	return s, s.Close, nil
}

type getter func(schema.GroupResource, runtime.Object) (generic.RESTOptions, error)

func (g getter) GetRESTOptions(gr schema.GroupResource, example runtime.Object) (generic.RESTOptions, error) {
	return g(gr, example)
}
