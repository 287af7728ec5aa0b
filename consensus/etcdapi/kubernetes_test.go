package etcdapi_test

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.uber.org/zap"
	"k8s.io/apimachinery/pkg/api/apitesting"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apiserver/pkg/apis/example"
	examplev1 "k8s.io/apiserver/pkg/apis/example/v1"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/etcd3"
	storagetesting "k8s.io/apiserver/pkg/storage/testing"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/utils/clock"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/internal/storetest"
)

// Upstream's acceptance suite of the storage path, on the unmodified etcd3 store
// over the in-process client.

const valuePrefix = "test!"

// swap lets a test replace the transformer of a running store.
type swap struct {
	t atomic.Pointer[value.Transformer]
}

func newSwap(t value.Transformer) *swap {
	s := &swap{}
	s.t.Store(&t)
	return s
}

func (s *swap) TransformFromStorage(ctx context.Context, b []byte, d value.Context) ([]byte, bool, error) {
	return (*s.t.Load()).TransformFromStorage(ctx, b, d)
}

func (s *swap) TransformToStorage(ctx context.Context, b []byte, d value.Context) ([]byte, error) {
	return (*s.t.Load()).TransformToStorage(ctx, b, d)
}

// subject is a store under test.
type subject struct {
	storage.Interface
	client      *kubernetes.Client
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

func newSubject(t *testing.T, client *kubernetes.Client) *subject {
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, metav1.SchemeGroupVersion)
	for _, add := range []func(*runtime.Scheme) error{example.AddToScheme, examplev1.AddToScheme} {
		if err := add(scheme); err != nil {
			t.Fatal(err)
		}
	}
	codecs := serializer.NewCodecFactory(scheme)
	s := &subject{codec: apitesting.TestCodec(codecs, examplev1.SchemeGroupVersion)}
	// A shallow copy with recorders, as upstream's own test server makes it.
	c := *client.Client
	s.recorder = storagetesting.NewKVRecorder(client.KV)
	c.KV = s.recorder
	s.client = &kubernetes.Client{Client: &c}
	s.kube = storagetesting.NewKubernetesRecorder(s.client)
	s.client.Kubernetes = s.kube
	s.original = storagetesting.NewPrefixTransformer([]byte(valuePrefix), false)
	s.transformer = newSwap(s.original)
	lease := etcd3.NewDefaultLeaseManagerConfig()
	lease.ReuseDurationSeconds = 1 // as upstream's tests, which cannot wait longer
	versioner := storage.APIObjectVersioner{}
	compactor := etcd3.NewCompactor(s.client.Client, 0, clock.RealClock{}, nil)
	t.Cleanup(compactor.Stop)
	store, err := etcd3.New(s.client, compactor, s.codec, func() runtime.Object { return &example.Pod{} }, func() runtime.Object { return &example.PodList{} },
		"", "/pods/", schema.GroupResource{Resource: "pods"}, s.transformer, lease, etcd3.NewDefaultDecoder(s.codec, versioner), versioner)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	s.Interface = store
	return s
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
	for s.CompactRevision() != int64(rv) { // the store learns it by a watch
		select {
		case <-ctx.Done():
			t.Fatal(ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func (s *subject) CompactRevision() int64 {
	return s.Interface.(interface{ CompactRevision() int64 }).CompactRevision()
}

func (s *subject) increaseRV(ctx context.Context, t *testing.T) int64 {
	resp, err := s.client.KV.Put(ctx, "increaseRV", "ok")
	if err != nil {
		t.Fatal(err)
	}
	return resp.Header.Revision
}

func (s *subject) stored(ctx context.Context, t *testing.T, key string) {
	resp, err := s.client.KV.Get(ctx, key)
	if err != nil || len(resp.Kvs) != 1 {
		t.Fatalf("get %s: %v, %v", key, resp, err)
	}
	obj, err := runtime.Decode(s.codec, resp.Kvs[0].Value[len(valuePrefix):])
	if err != nil {
		t.Fatalf("decode %s: %v", key, err)
	}
	if pod := obj.(*example.Pod); pod.ResourceVersion != "" || pod.SelfLink != "" {
		t.Errorf("%s is stored with a resource version or a link to itself", key)
	}
}

// calls checks that a paged list reads each object once and asks the store for
// doubling pages.
func (s *subject) calls(t *testing.T, pageSize, objects uint64) {
	if reads := s.original.GetReadsAndReset(); reads != objects {
		t.Errorf("%d objects were read, want %d", reads, objects)
	}
	const maxLimit = 10000
	want := uint64(1)
	if pageSize != 0 {
		limit := pageSize
		for sum := uint64(1); sum < objects; want++ {
			limit = min(2*limit, maxLimit)
			sum += limit
		}
	}
	if reads := s.recorder.GetReadsAndReset(); reads != want {
		t.Errorf("%d calls were made, want %d", reads, want)
	}
}

type suiteTest struct {
	name string
	// everywhere: run it on a follower of three, too.
	everywhere bool
	run        func(context.Context, *testing.T, *subject)
}

func plain(f func(context.Context, *testing.T, storage.Interface)) func(context.Context, *testing.T, *subject) {
	return func(ctx context.Context, t *testing.T, s *subject) { f(ctx, t, s) }
}

func swapping(f func(context.Context, *testing.T, storagetesting.InterfaceWithPrefixTransformer)) func(context.Context, *testing.T, *subject) {
	return func(ctx context.Context, t *testing.T, s *subject) { f(ctx, t, s) }
}

var suite = []suiteTest{
	{"Create", true, func(ctx context.Context, t *testing.T, s *subject) { storagetesting.RunTestCreate(ctx, t, s, s.stored) }},
	{"CreateWithTTL", true, plain(storagetesting.RunTestCreateWithTTL)},
	{"CreateWithKeyExist", false, plain(storagetesting.RunTestCreateWithKeyExist)},
	{"Get", true, plain(storagetesting.RunTestGet)},
	{"UnconditionalDelete", false, plain(storagetesting.RunTestUnconditionalDelete)},
	{"ConditionalDelete", false, plain(storagetesting.RunTestConditionalDelete)},
	{"DeleteWithSuggestion", false, plain(storagetesting.RunTestDeleteWithSuggestion)},
	{"DeleteWithSuggestionAndConflict", false, plain(storagetesting.RunTestDeleteWithSuggestionAndConflict)},
	{"DeleteWithConflict", false, plain(storagetesting.RunTestDeleteWithConflict)},
	{"DeleteWithSuggestionOfDeletedObject", false, plain(storagetesting.RunTestDeleteWithSuggestionOfDeletedObject)},
	{"ValidateDeletionWithSuggestion", false, plain(storagetesting.RunTestValidateDeletionWithSuggestion)},
	{"ValidateDeletionWithOnlySuggestionValid", false, plain(storagetesting.RunTestValidateDeletionWithOnlySuggestionValid)},
	{"PreconditionalDeleteWithSuggestion", false, plain(storagetesting.RunTestPreconditionalDeleteWithSuggestion)},
	{"PreconditionalDeleteWithOnlySuggestionPass", false, plain(storagetesting.RunTestPreconditionalDeleteWithOnlySuggestionPass)},
	{"List", true, func(ctx context.Context, t *testing.T, s *subject) {
		storagetesting.RunTestList(ctx, t, s, s.compact, false, s.kube)
	}},
	{"ConsistentList", true, func(ctx context.Context, t *testing.T, s *subject) {
		storagetesting.RunTestConsistentList(ctx, t, s, s.increaseRV, false, true, false)
	}},
	{"GetListNonRecursive", false, func(ctx context.Context, t *testing.T, s *subject) {
		storagetesting.RunTestGetListNonRecursive(ctx, t, s.increaseRV, s)
	}},
	{"GetListRecursivePrefix", false, plain(storagetesting.RunTestGetListRecursivePrefix)},
	{"ListContinuation", false, func(ctx context.Context, t *testing.T, s *subject) {
		storagetesting.RunTestListContinuation(ctx, t, s, s.calls)
	}},
	{"ListContinuationWithFilter", false, func(ctx context.Context, t *testing.T, s *subject) {
		storagetesting.RunTestListContinuationWithFilter(ctx, t, s, s.calls)
	}},
	{"ListInconsistentContinuation", true, func(ctx context.Context, t *testing.T, s *subject) {
		storagetesting.RunTestListInconsistentContinuation(ctx, t, s, s.compact)
	}},
	{"ListResourceVersionMatch", false, swapping(storagetesting.RunTestListResourceVersionMatch)},
	{"ListPaging", false, plain(storagetesting.RunTestListPaging)},
	{"NamespaceScopedList", false, plain(storagetesting.RunTestNamespaceScopedList)},
	{"CompactRevision", true, func(ctx context.Context, t *testing.T, s *subject) {
		storagetesting.RunTestCompactRevision(ctx, t, s, s.increaseRV, s.compact)
	}},
	{"KeySchema", false, plain(storagetesting.RunTestKeySchema)},
	{"GuaranteedUpdate", true, func(ctx context.Context, t *testing.T, s *subject) {
		storagetesting.RunTestGuaranteedUpdate(ctx, t, s, s.stored)
	}},
	{"GuaranteedUpdateWithTTL", false, plain(storagetesting.RunTestGuaranteedUpdateWithTTL)},
	{"GuaranteedUpdateChecksStoredData", false, swapping(storagetesting.RunTestGuaranteedUpdateChecksStoredData)},
	{"GuaranteedUpdateWithConflict", true, plain(storagetesting.RunTestGuaranteedUpdateWithConflict)},
	{"GuaranteedUpdateWithSuggestionAndConflict", false, plain(storagetesting.RunTestGuaranteedUpdateWithSuggestionAndConflict)},
	{"TransformationFailure", false, swapping(storagetesting.RunTestTransformationFailure)},
	{"Stats", false, func(ctx context.Context, t *testing.T, s *subject) {
		storagetesting.RunTestStats(ctx, t, s, s.codec, s.transformer, false)
	}},

	{"Watch", true, plain(storagetesting.RunTestWatch)},
	{"ClusterScopedWatch", false, plain(storagetesting.RunTestClusterScopedWatch)},
	{"NamespaceScopedWatch", false, plain(storagetesting.RunTestNamespaceScopedWatch)},
	{"DeleteTriggerWatch", true, plain(storagetesting.RunTestDeleteTriggerWatch)},
	{"WatchFromZero", true, func(ctx context.Context, t *testing.T, s *subject) {
		storagetesting.RunTestWatchFromZero(ctx, t, s, s.compact)
	}},
	{"WatchFromNonZero", true, plain(storagetesting.RunTestWatchFromNonZero)},
	{"DelayedWatchDelivery", false, plain(storagetesting.RunTestDelayedWatchDelivery)},
	{"WatchError", false, swapping(storagetesting.RunTestWatchError)},
	{"WatchContextCancel", false, plain(storagetesting.RunTestWatchContextCancel)},
	{"WatcherTimeout", false, plain(storagetesting.RunTestWatcherTimeout)},
	{"WatchDeleteEventObjectHaveLatestRV", false, plain(storagetesting.RunTestWatchDeleteEventObjectHaveLatestRV)},
	{"WatchInitializationSignal", false, plain(storagetesting.RunTestWatchInitializationSignal)},
	{"OptionalProgressNotify", true, func(ctx context.Context, t *testing.T, s *subject) {
		storagetesting.RunOptionalTestProgressNotify(ctx, t, s, s.increaseRV)
	}},
	{"WatchDispatchBookmarkEvents", false, func(ctx context.Context, t *testing.T, s *subject) {
		storagetesting.RunTestWatchDispatchBookmarkEvents(ctx, t, s, false)
	}},
	{"SendInitialEventsBackwardCompatibility", false, plain(storagetesting.RunSendInitialEventsBackwardCompatibility)},
	{"WatchSemantics", true, plain(storagetesting.RunWatchSemantics)},
	{"WatchSemanticInitialEventsExtended", true, plain(storagetesting.RunWatchSemanticInitialEventsExtended)},
	{"WatchListMatchSingle", false, plain(storagetesting.RunWatchListMatchSingle)},
	{"WatchErrorIsBlockingFurtherEvents", false, swapping(storagetesting.RunWatchErrorIsBlockingFurtherEvents)},
}

func fast(_ int, c *host.Config) {
	c.RTT = 10 * time.Millisecond
	c.WatchProgress = time.Second
}

// The tests are not parallel: upstream's set process-wide feature gates.
func TestKubernetesStorageSuite(t *testing.T) {
	for _, s := range suite {
		t.Run(s.name, func(t *testing.T) {
			c := storetest.New(t, 1, fast)
			c.Voters(1)
			s.run(context.Background(), t, newSubject(t, c.Nodes[0].Client()))
		})
	}
}

// Over the network, with mutual TLS, as a plain kube-apiserver speaks to it.
func TestKubernetesStorageSuiteOverGRPC(t *testing.T) {
	if testing.Short() {
		t.Skip("short")
	}
	for _, s := range suite {
		t.Run(s.name, func(t *testing.T) {
			c := storetest.New(t, 1, secured)
			c.Voters(1)
			k, err := kubernetes.New(clientv3.Config{Endpoints: []string{endpointOf(t, c.Nodes[0], storetest.Shard)}, Logger: zap.NewNop(),
				TLS: c.ClientTLS(c.Nodes[0], "kube-apiserver", "system:masters")})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { k.Close() })
			s.run(context.Background(), t, newSubject(t, k))
		})
	}
}

func TestKubernetesStorageSuiteOnFollower(t *testing.T) {
	if testing.Short() {
		t.Skip("short")
	}
	for _, s := range suite {
		if !s.everywhere {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			c := storetest.New(t, 3, func(n int, cfg *host.Config) {
				fast(n, cfg)
				cfg.RTT = 20 * time.Millisecond
			})
			c.Voters(3)
			s.run(context.Background(), t, newSubject(t, c.Nodes[(c.Leader()+1)%3].Client()))
		})
	}
}
