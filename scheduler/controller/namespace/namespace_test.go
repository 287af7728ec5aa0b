package namespace

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	metadatafake "k8s.io/client-go/metadata/fake"
	clienttesting "k8s.io/client-go/testing"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

var (
	configMaps = schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}
	widgets    = schema.GroupVersionResource{Group: "example.org", Version: "v1", Resource: "widgets"}
)

// world is a fake API: the namespace is in the clientset, its content in the
// metadata client. Deleted pods and objects with finalizers stay.
type world struct {
	t      *testing.T
	client *fake.Clientset
	meta   *metadatafake.FakeMetadataClient
	order  []string
}

func object(gvk schema.GroupVersionKind, name string, finalizers ...string) *metav1.PartialObjectMetadata {
	return &metav1.PartialObjectMetadata{
		TypeMeta:   metav1.TypeMeta{APIVersion: gvk.GroupVersion().String(), Kind: gvk.Kind},
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, Finalizers: finalizers},
	}
}

func newWorld(t *testing.T, objs ...runtime.Object) *world {
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "ns", UID: "u", ResourceVersion: "1", DeletionTimestamp: &metav1.Time{Time: time.Now()}},
		Spec: corev1.NamespaceSpec{Finalizers: []corev1.FinalizerName{corev1.FinalizerKubernetes}}}
	scheme := metadatafake.NewTestScheme()
	if err := metav1.AddMetaToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, client: controllertest.NewClient(ns), meta: metadatafake.NewSimpleMetadataClient(scheme, objs...)}
	w.serve(true)
	w.client.PrependReactor("create", "namespaces", func(a clienttesting.Action) (bool, runtime.Object, error) {
		if a.GetSubresource() != "finalize" {
			return false, nil, nil
		}
		obj := a.(clienttesting.CreateAction).GetObject()
		return true, obj, w.client.Tracker().Update(a.GetResource(), obj, "")
	})
	for _, verb := range []string{"delete-collection", "delete"} {
		w.meta.PrependReactor(verb, "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
			w.order = append(w.order, a.GetVerb()+" "+a.GetResource().Resource)
			name := ""
			if d, ok := a.(clienttesting.DeleteAction); ok {
				name = d.GetName()
			}
			w.remove(a.GetResource(), name, false)
			return true, nil, nil
		})
	}
	return w
}

// serve sets what discovery offers.
func (w *world) serve(withWidgets bool) {
	all := metav1.Verbs{"create", "delete", "deletecollection", "list"}
	w.client.Resources = []*metav1.APIResourceList{{GroupVersion: "v1", APIResources: []metav1.APIResource{
		{Name: "pods", Namespaced: true, Kind: "Pod", Verbs: all},
		{Name: "pods/status", Namespaced: true, Kind: "Pod", Verbs: metav1.Verbs{"get"}},
		{Name: "configmaps", Namespaced: true, Kind: "ConfigMap", Verbs: all},
		{Name: "nodes", Kind: "Node", Verbs: all},
		{Name: "bindings", Namespaced: true, Kind: "Binding", Verbs: metav1.Verbs{"create"}},
	}}}
	if withWidgets {
		w.client.Resources = append(w.client.Resources, &metav1.APIResourceList{GroupVersion: "example.org/v1", APIResources: []metav1.APIResource{
			{Name: "widgets", Namespaced: true, Kind: "Widget", Verbs: metav1.Verbs{"delete", "list"}},
		}})
	}
}

// remove deletes objects as the API does: pods and what has finalizers stay,
// marked, until they are removed with force.
func (w *world) remove(gvr schema.GroupVersionResource, name string, force bool) {
	// Through the tracker: the client's lock may be held.
	list, err := w.meta.Tracker().List(gvr, schema.GroupVersionKind{Group: "fake-metadata-client-group", Version: "v1"}, "ns")
	if err != nil {
		w.t.Error(err)
		return
	}
	items, err := meta.ExtractList(list)
	if err != nil {
		w.t.Error(err)
	}
	for _, item := range items {
		o := *item.(*metav1.PartialObjectMetadata)
		if name != "" && o.Name != name {
			continue
		}
		if !force && (gvr == podsGVR || len(o.Finalizers) > 0) {
			o.DeletionTimestamp = &metav1.Time{Time: time.Now()}
			err = w.meta.Tracker().Update(gvr, &o, "ns")
		} else {
			err = w.meta.Tracker().Delete(gvr, "ns", o.Name)
		}
		if err != nil {
			w.t.Error(err)
		}
	}
}

func (w *world) start() {
	controllertest.Start(w.t, w.client, func(d *controller.Deps) { d.Metadata = w.meta }, New)
}

// after lets time pass and returns the namespace.
func (w *world) after(d time.Duration) *corev1.Namespace {
	w.t.Helper()
	time.Sleep(d)
	synctest.Wait()
	ns, err := w.client.CoreV1().Namespaces().Get(w.t.Context(), "ns", metav1.GetOptions{})
	if err != nil {
		w.t.Fatal(err)
	}
	return ns
}

func condition(ns *corev1.Namespace, t corev1.NamespaceConditionType) string {
	for _, c := range ns.Status.Conditions {
		if c.Type == t {
			return string(c.Status) + " " + c.Message
		}
	}
	return "none"
}

func TestPodsFirstThenTheRestThenTheNamespace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pod := schema.GroupVersionKind{Version: "v1", Kind: "Pod"}
		w := newWorld(t, object(pod, "a"), object(pod, "b"),
			object(schema.GroupVersionKind{Version: "v1", Kind: "ConfigMap"}, "c"),
			object(schema.GroupVersionKind{Group: "example.org", Version: "v1", Kind: "Widget"}, "w"))
		w.start()
		ns := w.after(time.Second)
		if ns.Status.Phase != corev1.NamespaceTerminating || condition(ns, corev1.NamespaceContentRemaining) != "True Some resources are remaining: pods. has 2 resource instances" {
			t.Errorf("while pods end: %+v", ns.Status)
		}
		if got := strings.Join(w.order, ", "); got != "delete-collection pods" {
			t.Errorf("deleted so far: %s; want pods, once", got)
		}
		w.remove(podsGVR, "", true)
		ns = w.after(time.Minute)
		if len(ns.Spec.Finalizers) != 0 {
			t.Errorf("not finalized: %+v", ns.Status)
		}
		slices.Sort(w.order[1:]) // the kinds besides pods come in any order
		if got := strings.Join(w.order, ", "); got != "delete-collection pods, delete widgets, delete-collection configmaps" {
			t.Errorf("deleted: %s", got)
		}
		for _, ct := range good {
			if got := condition(ns, ct.Type); got != "False "+ct.Message {
				t.Errorf("condition %s: %s", ct.Type, got)
			}
		}
		if n := controllertest.Writes(w.client, "create", "namespaces/finalize"); n != 1 {
			t.Errorf("finalized %d times", n)
		}
	})
}

func TestAnEmptyNamespaceWaitsOnlyToSettle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		if ns := w.after(settle - 100*time.Millisecond); len(ns.Spec.Finalizers) != 1 {
			t.Error("let go before others can know of the deletion")
		}
		if ns := w.after(time.Second); len(ns.Spec.Finalizers) != 0 {
			t.Error("not let go")
		}
	})
}

func TestFinalizersHoldIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, object(schema.GroupVersionKind{Version: "v1", Kind: "ConfigMap"}, "c", "example.org/hold"))
		w.start()
		ns := w.after(time.Hour)
		if got := condition(ns, corev1.NamespaceFinalizersRemaining); got != "True Some content in the namespace has finalizers remaining: example.org/hold in 1 resource instances" {
			t.Errorf("finalizers: %s", got)
		}
		w.client.ClearActions()
		w.meta.ClearActions()
		w.after(time.Hour)
		if n := controllertest.Writes(w.client, "update", "namespaces/status"); n != 0 {
			t.Errorf("%d status updates in an hour in which nothing changed", n)
		}
		if n := len(w.meta.Actions()); n > 5*3600/8 {
			t.Errorf("%d requests in an hour in which nothing changed", n)
		}
		w.remove(configMaps, "", true)
		if ns := w.after(longestWait + time.Second); len(ns.Spec.Finalizers) != 0 {
			t.Errorf("not let go after the finalizer: %+v", ns.Status)
		}
	})
}

func TestItStaysWhileDiscoveryIsIncomplete(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, object(schema.GroupVersionKind{Version: "v1", Kind: "ConfigMap"}, "c"))
		w.client.PrependReactor("get", "resource", func(a clienttesting.Action) (bool, runtime.Object, error) {
			return true, nil, errors.New("no such server")
		})
		w.start()
		ns := w.after(time.Minute)
		if got := condition(ns, corev1.NamespaceDeletionDiscoveryFailure); len(ns.Spec.Finalizers) != 1 || !strings.HasPrefix(got, "True ") {
			t.Errorf("finalizers %v, discovery %s", ns.Spec.Finalizers, got)
		}
	})
}

func TestALivingNamespaceIsLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, object(schema.GroupVersionKind{Version: "v1", Kind: "ConfigMap"}, "c"))
		ns := w.after(0)
		ns.DeletionTimestamp = nil
		if err := w.client.Tracker().Update(corev1.SchemeGroupVersion.WithResource("namespaces"), ns, ""); err != nil {
			t.Fatal(err)
		}
		w.start()
		w.after(time.Hour)
		if len(w.order) != 0 {
			t.Errorf("deleted %v", w.order)
		}
	})
}

func TestJudge(t *testing.T) {
	now := time.Unix(1000, 0)
	s := sweep{deleteErrs: []error{errors.New("b"), errors.New("a")}, left: []leftover{
		{resource: widgets, count: 2, finalizers: map[string]int{"f": 2}}, {resource: configMaps, count: 1, finalizers: map[string]int{"f": 1, "e": 1}}}}
	got, changed := judge(nil, s, now)
	ns := &corev1.Namespace{Status: corev1.NamespaceStatus{Conditions: got}}
	for ct, want := range map[corev1.NamespaceConditionType]string{
		corev1.NamespaceDeletionContentFailure:   "True Failed to delete all resource types, 2 remaining: a, b",
		corev1.NamespaceContentRemaining:         "True Some resources are remaining: configmaps. has 1 resource instances, widgets.example.org has 2 resource instances",
		corev1.NamespaceFinalizersRemaining:      "True Some content in the namespace has finalizers remaining: e in 1 resource instances, f in 3 resource instances",
		corev1.NamespaceDeletionDiscoveryFailure: "False All resources successfully discovered",
	} {
		if c := condition(ns, ct); c != want {
			t.Errorf("%s: %s, want %s", ct, c, want)
		}
	}
	if !changed {
		t.Error("no change is reported")
	}
	if _, changed := judge(got, s, now.Add(time.Hour)); changed {
		t.Error("a change is reported where there is none")
	}
	after, _ := judge(got, sweep{}, now.Add(time.Hour))
	for _, c := range after {
		moved := c.Type != corev1.NamespaceDeletionDiscoveryFailure && c.Type != corev1.NamespaceDeletionGVParsingFailure
		if got := !c.LastTransitionTime.Time.Equal(now); got != moved {
			t.Errorf("%s: transition at %v", c.Type, c.LastTransitionTime)
		}
	}
}
