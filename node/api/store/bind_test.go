package store

import (
	"bytes"
	"context"
	"math/rand"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/apitesting/fuzzer"
	metafuzzer "k8s.io/apimachinery/pkg/apis/meta/fuzzer"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/types"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/generic"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/apiserver/pkg/storage/storagebackend/factory"
	"k8s.io/client-go/tools/cache"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/apis/core"
	corefuzzer "k8s.io/kubernetes/pkg/apis/core/fuzzer"
	_ "k8s.io/kubernetes/pkg/apis/core/install"
	podstorage "k8s.io/kubernetes/pkg/registry/core/pod/storage"

	"skein.io/skein/node/api/store/rawlist"
)

// podCodec is the one of stored pods.
func podCodec() runtime.Codec {
	s := protobuf.NewSerializer(legacyscheme.Scheme, legacyscheme.Scheme)
	return legacyscheme.Codecs.CodecForVersions(s, legacyscheme.Codecs.UniversalDeserializer(), corev1.SchemeGroupVersion, schema.GroupVersions{{Version: runtime.APIVersionInternal}})
}

// onePod is a storage with one stored pod, for upstream's storage of bindings.
type onePod struct {
	storage.Interface // nil
	codec             runtime.Codec
	stored            []byte
}

func (s *onePod) GuaranteedUpdate(_ context.Context, key string, _ runtime.Object, _ bool, p *storage.Preconditions, update storage.UpdateFunc, _ runtime.Object) error {
	o, err := runtime.Decode(s.codec, s.stored)
	if err == nil {
		err = p.Check(key, o)
	}
	if err == nil {
		o, _, err = update(o, storage.ResponseMeta{})
	}
	if err == nil {
		s.stored, err = runtime.Encode(s.codec, o)
	}
	return err
}

// upstreamBindings is upstream's storage of bindings over that.
func upstreamBindings(t *testing.T, s *onePod) *podstorage.BindingREST {
	t.Helper()
	pods, err := podstorage.NewStorage(getter(func(gr schema.GroupResource, _ runtime.Object) (generic.RESTOptions, error) {
		return generic.RESTOptions{ResourcePrefix: "/pods", StorageConfig: &storagebackend.ConfigForResource{Config: storagebackend.Config{Codec: s.codec}, GroupResource: gr},
			Decorator: func(*storagebackend.ConfigForResource, string, func(runtime.Object) (string, error), func() runtime.Object, func() runtime.Object,
				storage.AttrFunc, storage.IndexerFuncs, *cache.Indexers) (storage.Interface, factory.DestroyFunc, error) {
				return s, func() {}, nil
			}}, nil
	}), nil, nil, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	return pods.Binding
}

// randomPods is what somePod needs, and says its seed.
func randomPods(t *testing.T) (fill interface{ Fill(any) }, rnd *rand.Rand) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	return fuzzer.FuzzerFor(fuzzer.MergeFuzzerFuncs(metafuzzer.Funcs, corefuzzer.Funcs), rand.NewSource(seed), legacyscheme.Codecs), rand.New(rand.NewSource(seed))
}

// somePod makes a pod of all kinds of things, mostly one that may be bound.
func somePod(fill interface{ Fill(any) }, rnd *rand.Rand) *core.Pod {
	p := &core.Pod{}
	fill.Fill(p)
	p.Name, p.Namespace, p.ResourceVersion = "p", "ns", ""
	if p.UID == "" {
		p.UID = "u"
	}
	rarely := func(do func()) {
		if rnd.Intn(10) > 0 {
			do()
		}
	}
	rarely(func() { p.DeletionTimestamp = nil })
	rarely(func() { p.Spec.SchedulingGates = nil })
	rarely(func() { p.Spec.NodeName = "" })
	for _, k := range []string{corev1.LabelTopologyZone, corev1.LabelTopologyRegion, "a", "zz", "topology.kubernetes.io/o"} {
		if rnd.Intn(3) == 0 {
			if p.Labels == nil {
				p.Labels = map[string]string{}
			}
			p.Labels[k] = "before"
		}
	}
	for _, status := range []core.ConditionStatus{core.ConditionFalse, core.ConditionTrue} {
		if n := len(p.Status.Conditions); rnd.Intn(4) == 0 {
			c := core.PodCondition{Type: core.PodScheduled, Status: status, Reason: "Unschedulable", Message: "because", LastTransitionTime: metav1.Unix(1e9, 0), ObservedGeneration: 3}
			at := rnd.Intn(n + 1)
			p.Status.Conditions = append(append(append([]core.PodCondition{}, p.Status.Conditions[:at]...), c), p.Status.Conditions[at:]...)
		}
	}
	return p
}

// What is done to the stored bytes of a pod is what upstream makes of them, byte for byte, and what upstream refuses is left to it.
func TestBindIsUpstreams(t *testing.T) {
	fill, rnd := randomPods(t)
	codec := podCodec()
	one := &onePod{codec: codec}
	upstream := upstreamBindings(t, one)
	ctx := apirequest.WithNamespace(t.Context(), "ns")
	bound, left := 0, 0
	for i := range 5000 {
		p := somePod(fill, rnd)
		before, err := runtime.Encode(codec, p)
		if err != nil {
			t.Fatal(err)
		}
		// As it is stored: what is left out has been filled in.
		again, err := runtime.Decode(codec, before)
		if err != nil {
			t.Fatal(err)
		}
		if before, err = runtime.Encode(codec, again); err != nil {
			t.Fatal(err)
		}
		b := &core.Binding{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: "ns", UID: p.UID}, Target: core.ObjectReference{Kind: "Node", Name: "node-1"}}
		if rnd.Intn(20) == 0 {
			b.UID = types.UID("another")
		}
		for _, k := range []string{corev1.LabelTopologyZone, corev1.LabelTopologyRegion} {
			if rnd.Intn(2) == 0 {
				b.Labels = map[string]string{k: "z1"}
			}
		}
		var ours [2][]byte
		var ok bool
		one.stored = bytes.Clone(before)
		at := time.Now()
		_, refused := upstream.Create(ctx, "p", b.DeepCopy(), rest.ValidateAllObjectFunc, &metav1.CreateOptions{})
		for i, at := range []time.Time{at, time.Now()} { // the second may have changed meanwhile
			ours[i], ok = rawlist.Bind(before, rawlist.Binding{UID: string(b.UID), Node: b.Target.Name, Labels: b.Labels, At: metav1.NewTime(at)})
		}
		switch {
		case !ok:
			left++
			said := false
			for _, c := range p.Status.Conditions {
				said = said || c.Type == core.PodScheduled && c.Status == core.ConditionTrue
			}
			if refused == nil && !said {
				t.Fatalf("pod %d is left to upstream, which binds it: %+v", i, p)
			}
		case refused != nil:
			t.Fatalf("pod %d is bound, upstream says: %v", i, refused)
		case !bytes.Equal(ours[0], one.stored) && !bytes.Equal(ours[1], one.stored):
			t.Fatalf("pod %d differs:\n%q\nupstream:\n%q\nbefore:\n%q", i, ours[1], one.stored, before)
		default:
			bound++
		}
	}
	if bound < 2000 || left < 200 {
		t.Errorf("%d pods bound, %d left to upstream: both ways are to be seen often", bound, left)
	}
}
