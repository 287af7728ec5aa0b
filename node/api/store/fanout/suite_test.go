package fanout

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	etcdclient "go.etcd.io/etcd/client/v3/kubernetes"
	"k8s.io/apimachinery/pkg/api/apitesting"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/apis/example"
	examplev1 "k8s.io/apiserver/pkg/apis/example/v1"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/etcd3"
	"k8s.io/apiserver/pkg/storage/feature"
	storagetesting "k8s.io/apiserver/pkg/storage/testing"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/utils/clock"

	"skein.io/skein/node/api/internal/testetcd"
)

// Upstream's acceptance suite of storages, as it runs it on its watch cache and on the plain store.

const valuePrefix = "test!"

// swap lets a test replace the transformer of a running store.
type swap struct {
	t       atomic.Pointer[value.Transformer]
	decoded atomic.Int64
}

func (s *swap) TransformFromStorage(ctx context.Context, b []byte, d value.Context) ([]byte, bool, error) {
	s.decoded.Add(1)
	return (*s.t.Load()).TransformFromStorage(ctx, b, d)
}

func (s *swap) TransformToStorage(ctx context.Context, b []byte, d value.Context) ([]byte, error) {
	return (*s.t.Load()).TransformToStorage(ctx, b, d)
}

// subject is a Fan on a store of its own.
type subject struct {
	*Fan
	raw         storage.Interface // the plain storage
	client      *etcdclient.Client
	recorder    *storagetesting.KVRecorder
	kube        *storagetesting.KubernetesRecorder
	codec       runtime.Codec
	transformer *swap
	original    *storagetesting.PrefixTransformer
}

func (s *subject) UpdatePrefixTransformer(modify storagetesting.PrefixTransformerModifier) func() {
	old := s.transformer.t.Load()
	c := *s.original
	t := modify(&c)
	s.transformer.t.Store(&t)
	return func() { s.transformer.t.Store(old) }
}

func newSubject(t testing.TB, set func(*Config)) *subject {
	t.Helper()
	etcd, err := testetcd.Start(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(etcd.Close)
	client, err := etcd.Client()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return subjectOn(t, client, set)
}

func subjectOn(t testing.TB, client *etcdclient.Client, set func(*Config)) *subject {
	t.Helper()
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, metav1.SchemeGroupVersion)
	for _, add := range []func(*runtime.Scheme) error{example.AddToScheme, examplev1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	s := &subject{codec: apitesting.TestCodec(serializer.NewCodecFactory(scheme), examplev1.SchemeGroupVersion)}
	c := *client.Client // with recorders, as upstream's own test server has it
	s.recorder = storagetesting.NewKVRecorder(client.KV)
	c.KV = s.recorder
	s.client = &etcdclient.Client{Client: &c}
	s.kube = storagetesting.NewKubernetesRecorder(s.client)
	s.client.Kubernetes = s.kube
	s.original = storagetesting.NewPrefixTransformer([]byte(valuePrefix), false)
	s.transformer = &swap{}
	var tr value.Transformer = s.original
	s.transformer.t.Store(&tr)
	lease := etcd3.NewDefaultLeaseManagerConfig()
	lease.ReuseDurationSeconds = 1 // as upstream's tests, which cannot wait longer
	versioner := storage.APIObjectVersioner{}
	compactor := etcd3.NewCompactor(s.client.Client, 0, clock.RealClock{}, nil)
	t.Cleanup(compactor.Stop)
	newPod := func() runtime.Object { return &example.Pod{} }
	gr := schema.GroupResource{Resource: "pods"}
	store, err := etcd3.New(s.client, compactor, s.codec, newPod, func() runtime.Object { return &example.PodList{} },
		"", "/pods/", gr, s.transformer, lease, etcd3.NewDefaultDecoder(s.codec, versioner), versioner)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	feature.DefaultFeatureSupportChecker.CheckClient(t.Context(), s.client, storage.RequestWatchProgress)
	s.raw = store
	cfg := Config{Storage: store, Client: s.client.Client, Codec: s.codec, Transformer: s.transformer, Resource: gr, PathPrefix: "/", ResourcePrefix: "/pods/", New: newPod,
		Index: storage.IndexerFuncs{"spec.nodeName": func(o runtime.Object) string { return o.(*example.Pod).Spec.NodeName }}}
	if set != nil {
		set(&cfg)
	}
	if s.Fan, err = New(context.Background(), cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Fan.Close)
	return s
}

// podAttrs are what the suite's selectors select by.
func podAttrs(o runtime.Object) (labels.Set, fields.Set, error) {
	p := o.(*example.Pod)
	return labels.Set(p.Labels), fields.Set{"metadata.name": p.Name, "metadata.namespace": p.Namespace, "spec.nodeName": p.Spec.NodeName}, nil
}

func (s *subject) compact(ctx context.Context, t *testing.T, resourceVersion string) {
	rv, err := storage.APIObjectVersioner{}.ParseResourceVersion(resourceVersion)
	if err != nil {
		t.Fatal(err)
	}
	version, _, _, err := etcd3.Compact(ctx, s.client.Client, 0, int64(rv))
	if err != nil {
		_, _, _, err = etcd3.Compact(ctx, s.client.Client, version, int64(rv))
	}
	if err != nil {
		t.Fatal(err)
	}
	s.forget(int64(rv))
}

// forget drops the history up to a revision, which may reach back further than the store does.
func (s *subject) forget(rev int64) {
	s.mu.Lock()
	h := s.hub
	s.mu.Unlock()
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for len(h.history) > 0 && h.history[0].rev <= rev {
		h.kept -= h.history[0].size()
		h.history = h.history[1:]
	}
	h.begin = max(h.begin, rev)
}

func plain(f func(context.Context, *testing.T, storage.Interface)) func(context.Context, *testing.T, *subject) {
	return func(ctx context.Context, t *testing.T, s *subject) { f(ctx, t, s.Fan) }
}

// withTransformer is what some tests of the suite want.
type withTransformer struct {
	*Fan
	s *subject
}

func (w withTransformer) UpdatePrefixTransformer(m storagetesting.PrefixTransformerModifier) func() {
	return w.s.UpdatePrefixTransformer(m)
}

func swapping(f func(context.Context, *testing.T, storagetesting.InterfaceWithPrefixTransformer)) func(context.Context, *testing.T, *subject) {
	return func(ctx context.Context, t *testing.T, s *subject) { f(ctx, t, withTransformer{s.Fan, s}) }
}

// The tests are not parallel: upstream's set process-wide feature gates.
func TestKubernetesStorageSuite(t *testing.T) {
	for name, run := range map[string]func(context.Context, *testing.T, *subject){
		"CreateWithKeyExist": plain(storagetesting.RunTestCreateWithKeyExist),
		"Get":                plain(storagetesting.RunTestGet),
		"ListPaging":         plain(storagetesting.RunTestListPaging),
		"List": func(ctx context.Context, t *testing.T, s *subject) {
			storagetesting.RunTestList(ctx, t, s.Fan, s.compact, false, s.kube)
		},
		"NamespaceScopedList":          plain(storagetesting.RunTestNamespaceScopedList),
		"GuaranteedUpdateWithConflict": plain(storagetesting.RunTestGuaranteedUpdateWithConflict),
		"Watch":                        plain(storagetesting.RunTestWatch),
		"ClusterScopedWatch":           plain(storagetesting.RunTestClusterScopedWatch),
		"NamespaceScopedWatch":         plain(storagetesting.RunTestNamespaceScopedWatch),
		"DeleteTriggerWatch":           plain(storagetesting.RunTestDeleteTriggerWatch),
		"WatchFromZero": func(ctx context.Context, t *testing.T, s *subject) {
			storagetesting.RunTestWatchFromZero(ctx, t, s.Fan, s.compact)
		},
		"WatchFromNonZero":                       plain(storagetesting.RunTestWatchFromNonZero),
		"DelayedWatchDelivery":                   plain(storagetesting.RunTestDelayedWatchDelivery),
		"WatchError":                             swapping(storagetesting.RunTestWatchError),
		"WatchContextCancel":                     plain(storagetesting.RunTestWatchContextCancel),
		"WatcherTimeout":                         plain(storagetesting.RunTestWatcherTimeout),
		"WatchDeleteEventObjectHaveLatestRV":     plain(storagetesting.RunTestWatchDeleteEventObjectHaveLatestRV),
		"WatchInitializationSignal":              plain(storagetesting.RunTestWatchInitializationSignal),
		"WatchBookmarksWithCorrectRevision":      plain(storagetesting.RunTestOptionalWatchBookmarksWithCorrectResourceVersion),
		"SendInitialEventsBackwardCompatibility": plain(storagetesting.RunSendInitialEventsBackwardCompatibility),
		"WatchSemantics":                         plain(storagetesting.RunWatchSemantics),
		"WatchSemanticInitialEventsExtended":     plain(storagetesting.RunWatchSemanticInitialEventsExtended),
		"WatchListMatchSingle":                   plain(storagetesting.RunWatchListMatchSingle),
		"WatchErrorIsBlockingFurtherEvents":      swapping(storagetesting.RunWatchErrorIsBlockingFurtherEvents),
		"WatchDispatchBookmarkEvents": func(ctx context.Context, t *testing.T, s *subject) {
			storagetesting.RunTestWatchDispatchBookmarkEvents(ctx, t, s.Fan, true)
		},
	} {
		t.Run(name, func(t *testing.T) {
			run(context.Background(), t, newSubject(t, nil))
		})
	}
}

// patience is how long anything may take on a slow machine.
const patience = 30 * time.Second
