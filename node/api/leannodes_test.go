package api

import (
	"fmt"
	"math/rand"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/apitesting/fuzzer"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metafuzzer "k8s.io/apimachinery/pkg/apis/meta/fuzzer"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/cache"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
)

// Nodes that admission looks up are what slim leaves of those that there are, in whatever they have.
func TestEncodedNodes(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	fill := fuzzer.FuzzerFor(metafuzzer.Funcs, rand.NewSource(seed), legacyscheme.Codecs)
	var there []runtime.Object
	want := map[string]*corev1.Node{}
	for i := range 100 {
		n := &corev1.Node{}
		fill.Fill(n)
		n.TypeMeta, n.Namespace, n.Name = metav1.TypeMeta{}, "", fmt.Sprint("n", i)
		there = append(there, n)
		w := n.DeepCopy()
		w.Annotations, w.ManagedFields, w.Spec = nil, nil, corev1.NodeSpec{}
		w.Status = corev1.NodeStatus{Allocatable: w.Status.Allocatable, DeclaredFeatures: w.Status.DeclaredFeatures}
		want[n.Name] = w
	}
	f := encodedNodes{informers.NewSharedInformerFactoryWithOptions(fake.NewClientset(there...), 0, informers.WithTransform(slim))}
	nodes := f.Core().V1().Nodes()
	lister, synced := nodes.Lister(), nodes.Informer().HasSynced
	f.Start(t.Context().Done())
	if !cache.WaitForCacheSync(t.Context().Done(), synced) {
		t.Fatal("no Nodes came")
	}
	for name, w := range want {
		n, err := lister.Get(name)
		if err != nil || !equality.Semantic.DeepEqual(n, w) {
			t.Fatalf("%s is\n%#v (%v)\nwant\n%#v", name, n, err, w)
		}
	}
	if all, err := lister.List(labels.Everything()); err != nil || len(all) != len(want) {
		t.Errorf("%d of %d Nodes are listed: %v", len(all), len(want), err)
	}
	if _, err := lister.Get("gone"); !apierrors.IsNotFound(err) {
		t.Errorf("a Node that is not there: %v", err)
	}
	if _, err := nodes.Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{}); err == nil {
		t.Error("a handler is taken that would get what it does not know")
	}
}
