// Package store puts Kubernetes objects into an in-process etcd client: upstream's etcd3 storage,
// unmodified, over whatever client the caller gives for a resource.
//
// Nothing in it opens a network connection. Upstream dials from inside its storage factory, which
// takes no client; so resources get a storage decorator of ours, and the one allocator that asks
// the factory itself reaches the same client over an in-memory pipe (see Bridge).
//
// There is no watch cache: a list reads the store, and all watches of a resource share one of the store (see package fanout).
// Upstream's cache holds every object decoded (some 13 KB a pod), which a small cluster has no use for.
//
// Storages made here are as safe for concurrent use as the clients below them. Revisions are
// comparable within one resource only, as Kubernetes promises no more.
package store

import (
	"context"
	"errors"
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
	"k8s.io/apiserver/pkg/storage/feature"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/apiserver/pkg/storage/storagebackend/factory"
	flowcontrolrequest "k8s.io/apiserver/pkg/util/flowcontrol/request"
	"k8s.io/client-go/tools/cache"
	basecompatibility "k8s.io/component-base/compatibility"
	"k8s.io/kubernetes/pkg/kubeapiserver"

	"skein.io/skein/node/api/encrypt"
	"skein.io/skein/node/api/store/fanout"
	"skein.io/skein/node/api/store/rawlist"
)

// mediaType is what built-in objects are stored as, like upstream's default.
const mediaType = "application/vnd.kubernetes.protobuf"

// Clients gives the client of the shard that holds a key. It is asked for whole resources, by the
// prefix of all their keys, with a slash at its end ("/registry/pods/"): resources of one name may
// share a prefix (events of both groups do), so it is the prefix that tells. It must give the same
// client for a key each time, one a shard, and never nil.
type Clients func(key string) *etcdclient.Client

// Factory makes storages of every kind.
type Factory struct {
	// Storage knows the version that each built-in resource is stored in.
	Storage *serverstorage.DefaultStorageFactory
	// LastKnown lets reads be answered from the local copy of a store. Set it before the first storage is made; nil: never.
	LastKnown LastKnown

	clients Clients
	life    context.Context // bounds what a new client is asked
	options *genericoptions.EtcdOptions

	transformers *encrypt.Transformers
	walks        fanout.Walks // bounds the first lists of all resources together

	mu        sync.Mutex // guards the rest
	opened    []opened
	resources []opening
	raw       map[schema.GroupResource]*rawlist.Lister
}

// opened is a client in use. There is nothing under key, and it is one of this client's: good to
// ask how the store is.
type opened struct {
	*clientv3.Client
	key string
}

// New prepares a factory for keys below prefix ("/registry"). ctx is the life of the stores made
// here; bridge is what the components get that insist on dialling; transformers says what is sealed
// in the store.
func New(ctx context.Context, clients Clients, prefix string, version basecompatibility.EffectiveVersion, resources *serverstorage.ResourceConfig,
	count flowcontrolrequest.StorageObjectCountTracker, bridge *Bridge, transformers *encrypt.Transformers) (*Factory, error) {
	o := genericoptions.NewEtcdOptions(storagebackend.NewDefaultConfig(prefix, nil))
	o.DefaultStorageMediaType = mediaType
	o.EnableWatchCache = false
	o.StorageConfig.StorageObjectCountTracker = count
	o.StorageConfig.Transport = bridge.transport()
	// Each shard's leader compacts it; counting objects by polling would read it all.
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
	return &Factory{Storage: f, clients: clients, life: ctx, options: o, transformers: transformers,
		walks: fanout.NewWalks(fanout.DefaultWalks), raw: map[schema.GroupResource]*rawlist.Lister{}}, nil
}

// BuiltIn gives the storages of the built-in resources.
func (f *Factory) BuiltIn() generic.RESTOptionsGetter {
	return f.decorated(f.options.CreateRESTOptionsGetter(f.Storage, f.transformers))
}

// Extension gives storages whose objects are all encoded by one codec: those of the CRD server
// and of the aggregator. version may be nil (custom resources are stored as they come).
func (f *Factory) Extension(codec runtime.Codec, version runtime.GroupVersioner) generic.RESTOptionsGetter {
	c := f.options.StorageConfig
	c.Codec, c.EncodeVersioner = codec, version
	return f.decorated(f.options.CreateRESTOptionsGetter(&genericoptions.SimpleStorageFactory{StorageConfig: c}, f.transformers))
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
	newFunc, newListFunc func() runtime.Object, attrs storage.AttrFunc, index storage.IndexerFuncs, _ *cache.Indexers,
) (storage.Interface, factory.DestroyFunc, error) {
	key := path.Join("/", c.Prefix, resourcePrefix) + "/"
	client := f.clients(key)
	if client == nil {
		return nil, nil, fmt.Errorf("no store for %s, whose keys begin with %s", c.GroupResource, key)
	}
	f.note(client.Client, key)
	o := opening{area{client.Client, key}, c.GroupResource}
	f.mu.Lock()
	if !slices.Contains(f.resources, o) {
		f.resources = append(f.resources, o)
	}
	f.mu.Unlock()
	v := storage.APIObjectVersioner{}
	s, err := etcd3.New(client, nil, c.Codec, newFunc, newListFunc, path.Join("/", c.Prefix), resourcePrefix,
		c.GroupResource, c.Transformer, c.LeaseManagerConfig, etcd3.NewDefaultDecoder(c.Codec, v), v)
	if err != nil {
		return nil, nil, fmt.Errorf("storage of %s: %w", c.GroupResource, err)
	}
	var inner storage.Interface = s
	var peek func([]byte) (string, bool)
	var pick func([]byte, *storage.SelectionPredicate) (bool, bool)
	if c.GroupResource == (schema.GroupResource{Resource: "pods"}) {
		inner, peek = binds{s, client, c, path.Join("/", c.Prefix), resourcePrefix}, rawlist.PodNode
		pick = rawlist.PodSelected
	}
	reads := refusing{inner, key, c.GroupResource.String(), f.LastKnown}
	var raw *rawlist.Lister
	var stored func([]byte, int64) fanout.Stored
	if c.EncodeVersioner != nil { // custom resources are kept as JSON
		raw = rawlist.New(rawlist.Config{Client: client, Codec: c.Codec, Transformer: c.Transformer, Versioner: v, Resource: c.GroupResource,
			PathPrefix: path.Join("/", c.Prefix), ResourcePrefix: resourcePrefix})
		stored = func(data []byte, rev int64) fanout.Stored {
			if o := raw.Object(data, rev); o != nil {
				return o
			}
			return nil
		}
	}
	fan, err := fanout.New(f.life, fanout.Config{
		Storage: reads, Refuse: reads.refuse, Explain: refusedRead, Client: client.Client, Codec: c.Codec, Transformer: c.Transformer, Resource: c.GroupResource,
		PathPrefix: path.Join("/", c.Prefix), ResourcePrefix: resourcePrefix, New: newFunc, Attrs: attrs, Index: index, Peek: peek, Select: pick, Stored: stored, Walks: f.walks,
	})
	if err != nil {
		s.Close()
		return nil, nil, err
	}
	if raw != nil {
		f.mu.Lock()
		f.raw[c.GroupResource] = raw
		f.mu.Unlock()
	}
	return fan, func() { fan.Close(); s.Close() }, nil
}

// Raw gives what answers lists of a built-in resource with what is stored; nil when it has no storage.
func (f *Factory) Raw(r schema.GroupResource) *rawlist.Lister {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.raw[r]
}

// Check asks all stores in use for a key, through their quorums, and names those that fail.
func (f *Factory) Check(ctx context.Context) error {
	f.mu.Lock()
	stores := slices.Clone(f.opened)
	f.mu.Unlock()
	errs := make([]error, len(stores))
	var wg sync.WaitGroup
	for i, o := range stores {
		wg.Go(func() {
			if _, err := o.KV.Get(ctx, o.key, clientv3.WithCountOnly()); err != nil {
				errs[i] = fmt.Errorf("the store of %s does not answer: %w", o.key, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// note remembers a client that is used. Upstream's storages ask a store for the progress of their
// watches only where they know that it can tell; they learn it from a client that they dial, which
// ours is not.
func (f *Factory) note(c *clientv3.Client, key string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.ContainsFunc(f.opened, func(o opened) bool { return o.Client == c }) {
		f.opened = append(f.opened, opened{c, key})
		if c.Maintenance != nil { // clients of tests may have none
			feature.DefaultFeatureSupportChecker.CheckClient(f.life, endpoint{c.Maintenance, inProcess(fmt.Sprintf("in-process:%p", c))}, storage.RequestWatchProgress)
		}
	}
}

// endpoint makes a client in process look like one with an address.
type endpoint struct {
	clientv3.Maintenance
	inProcess
}

type inProcess string

// Endpoints is asked by upstream's check of what a store can do.
func (e inProcess) Endpoints() []string { return []string{string(e)} }

type getter func(schema.GroupResource, runtime.Object) (generic.RESTOptions, error)

func (g getter) GetRESTOptions(gr schema.GroupResource, example runtime.Object) (generic.RESTOptions, error) {
	return g(gr, example)
}
