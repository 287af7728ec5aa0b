package garbage

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	metadatafake "k8s.io/client-go/metadata/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

// world is a fake API of ConfigMaps, Secrets, cluster-wide Things, and
// ReplicaSets, with the rules of deletion: propagation, finalizers, preconditions.
type world struct {
	t       *testing.T
	client  *fake.Clientset
	meta    *metadatafake.FakeMetadataClient
	rec     *record.FakeRecorder
	version int
	// removed is told of each object that is removed for good, under the fake's lock.
	removed func(o *metav1.PartialObjectMetadata)
}

var gvrs = map[string]schema.GroupVersionResource{
	"ConfigMap":  {Version: "v1", Resource: "configmaps"},
	"Secret":     {Version: "v1", Resource: "secrets"},
	"Thing":      {Group: "example.org", Version: "v1", Resource: "things"},
	"ReplicaSet": {Group: "apps", Version: "v1", Resource: "replicasets"},
}

func newWorld(t *testing.T) *world {
	scheme := metadatafake.NewTestScheme()
	if err := metav1.AddMetaToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, client: controllertest.NewClient(), meta: metadatafake.NewSimpleMetadataClient(scheme), version: 100}
	all := metav1.Verbs{"get", "list", "watch", "delete"}
	w.client.Resources = []*metav1.APIResourceList{
		{GroupVersion: "v1", APIResources: []metav1.APIResource{
			{Name: "configmaps", Namespaced: true, Kind: "ConfigMap", Verbs: all}, {Name: "secrets", Namespaced: true, Kind: "Secret", Verbs: all}}},
		{GroupVersion: "apps/v1", APIResources: []metav1.APIResource{{Name: "replicasets", Namespaced: true, Kind: "ReplicaSet", Verbs: all}}},
		{GroupVersion: "example.org/v1", APIResources: []metav1.APIResource{{Name: "things", Kind: "Thing", Verbs: all}}},
	}
	w.meta.PrependReactor("delete", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		d := a.(clienttesting.DeleteActionImpl)
		return true, nil, w.remove(d.Resource, d.Namespace, d.Name, d.DeleteOptions)
	})
	w.meta.PrependReactor("patch", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		return w.patch(a.(clienttesting.PatchActionImpl))
	})
	return w
}

func (w *world) start() {
	w.rec = controllertest.Start(w.t, w.client, func(d *controller.Deps) { d.Metadata = w.meta }, New)
}

func (w *world) get(gvr schema.GroupVersionResource, ns, name string) (*metav1.PartialObjectMetadata, error) {
	o, err := w.meta.Tracker().Get(gvr, ns, name)
	if err != nil {
		return nil, err
	}
	return o.(*metav1.PartialObjectMetadata).DeepCopy(), nil
}

func (w *world) store(gvr schema.GroupVersionResource, o *metav1.PartialObjectMetadata) error {
	w.version++
	o.ResourceVersion = strconv.Itoa(w.version)
	if o.DeletionTimestamp != nil && len(o.Finalizers) == 0 {
		if w.removed != nil {
			w.removed(o)
		}
		return w.meta.Tracker().Delete(gvr, o.Namespace, o.Name)
	}
	return w.meta.Tracker().Update(gvr, o, o.Namespace)
}

func (w *world) remove(gvr schema.GroupVersionResource, ns, name string, opts metav1.DeleteOptions) error {
	o, err := w.get(gvr, ns, name)
	if err != nil {
		return err
	}
	if p := opts.Preconditions; p != nil && (p.UID != nil && *p.UID != o.UID || p.ResourceVersion != nil && *p.ResourceVersion != o.ResourceVersion) {
		return apierrors.NewConflict(gvr.GroupResource(), name, fmt.Errorf("precondition"))
	}
	add := func(f string) {
		if !slices.Contains(o.Finalizers, f) && o.DeletionTimestamp == nil {
			o.Finalizers = append(o.Finalizers, f)
		}
	}
	if opts.PropagationPolicy != nil {
		switch *opts.PropagationPolicy {
		case metav1.DeletePropagationForeground:
			add(metav1.FinalizerDeleteDependents)
		case metav1.DeletePropagationOrphan:
			add(metav1.FinalizerOrphanDependents)
		}
	}
	if o.DeletionTimestamp == nil {
		o.DeletionTimestamp = &metav1.Time{Time: time.Now()}
	}
	return w.store(gvr, o)
}

func (w *world) patch(a clienttesting.PatchActionImpl) (bool, runtime.Object, error) {
	o, err := w.get(a.Resource, a.Namespace, a.Name)
	if err != nil {
		return true, nil, err
	}
	var p struct {
		Metadata struct {
			UID             string                  `json:"uid"`
			ResourceVersion string                  `json:"resourceVersion"`
			Finalizers      []string                `json:"finalizers"`
			OwnerReferences []metav1.OwnerReference `json:"ownerReferences"`
		} `json:"metadata"`
	}
	if err := json.Unmarshal(a.Patch, &p); err != nil {
		return true, nil, err
	}
	if p.Metadata.ResourceVersion != o.ResourceVersion || p.Metadata.UID != string(o.UID) {
		return true, nil, apierrors.NewConflict(a.Resource.GroupResource(), a.Name, fmt.Errorf("version"))
	}
	if p.Metadata.Finalizers != nil {
		o.Finalizers = p.Metadata.Finalizers
	}
	if p.Metadata.OwnerReferences != nil {
		o.OwnerReferences = p.Metadata.OwnerReferences
	}
	return true, o, w.store(a.Resource, o)
}

// put makes an object "Kind/name", in namespace "ns" unless it is a Thing;
// owners likewise, with "!" for those that it blocks. Its uid is its name.
func (w *world) put(what string, owners ...string) {
	w.t.Helper()
	kind, name, _ := strings.Cut(what, "/")
	o := obj(name, nil)
	o.TypeMeta = metav1.TypeMeta{APIVersion: gvrs[kind].GroupVersion().String(), Kind: kind}
	if kind == "Thing" {
		o.Namespace = ""
	}
	for _, owner := range owners {
		k, n, _ := strings.Cut(strings.TrimSuffix(owner, "!"), "/")
		o.OwnerReferences = append(o.OwnerReferences, obj("", nil, n).OwnerReferences...)
		r := &o.OwnerReferences[len(o.OwnerReferences)-1]
		r.APIVersion, r.Kind = gvrs[k].GroupVersion().String(), k
		if strings.HasSuffix(owner, "!") {
			r.BlockOwnerDeletion = new(true)
		}
	}
	w.version++
	o.ResourceVersion = strconv.Itoa(w.version)
	if err := w.meta.Tracker().Create(gvrs[kind], o, o.Namespace); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) delete(what string, policy metav1.DeletionPropagation) {
	w.t.Helper()
	kind, name, _ := strings.Cut(what, "/")
	err := w.meta.Resource(gvrs[kind]).Namespace(map[bool]string{true: "", false: "ns"}[kind == "Thing"]).Delete(w.t.Context(), name, metav1.DeleteOptions{PropagationPolicy: &policy})
	if err != nil && !apierrors.IsNotFound(err) {
		w.t.Fatal(err)
	}
}

// after lets time pass and lists what there is, with the owners that are named.
func (w *world) after(d time.Duration) string {
	w.t.Helper()
	time.Sleep(d)
	synctest.Wait()
	var out []string
	for _, o := range w.all() {
		s := o.Kind + "/" + o.Name
		for _, r := range o.OwnerReferences {
			s += "<" + r.Name
		}
		if o.DeletionTimestamp != nil {
			s += "*"
		}
		out = append(out, s)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func (w *world) all() []metav1.PartialObjectMetadata {
	var out []metav1.PartialObjectMetadata
	for kind, gvr := range gvrs {
		l, err := w.meta.Resource(gvr).List(w.t.Context(), metav1.ListOptions{})
		if err != nil {
			w.t.Fatal(err)
		}
		for _, o := range l.Items {
			o.Kind = kind
			out = append(out, o)
		}
	}
	return out
}

func expect(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

func TestBackgroundForegroundOrphan(t *testing.T) {
	family := func(w *world) {
		w.put("ConfigMap/a")
		w.put("Secret/b", "ConfigMap/a!")
		w.put("Secret/c", "ConfigMap/a")
		w.put("ConfigMap/d", "Secret/b!")
		w.put("ConfigMap/e", "ConfigMap/a", "ConfigMap/z")
		w.put("ConfigMap/z")
	}
	for _, tc := range []struct {
		policy metav1.DeletionPropagation
		want   string
	}{
		{metav1.DeletePropagationBackground, "ConfigMap/e<z ConfigMap/z"},
		{metav1.DeletePropagationForeground, "ConfigMap/e<z ConfigMap/z"},
		{metav1.DeletePropagationOrphan, "ConfigMap/d<b ConfigMap/e<z ConfigMap/z Secret/b Secret/c"},
	} {
		t.Run(string(tc.policy), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(t)
				family(w)
				var order []string
				w.removed = func(o *metav1.PartialObjectMetadata) { order = append(order, o.Name) }
				w.start()
				expect(t, "before", w.after(5*time.Second), "ConfigMap/a ConfigMap/d<b ConfigMap/e<a<z ConfigMap/z Secret/b<a Secret/c<a")
				w.delete("ConfigMap/a", tc.policy)
				expect(t, "after", w.after(5*time.Second), tc.want)
				if tc.policy == metav1.DeletePropagationForeground && (slices.Index(order, "a") < slices.Index(order, "b") || slices.Index(order, "b") < slices.Index(order, "d")) {
					t.Errorf("removed in the order %v", order)
				}
				w.meta.ClearActions()
				w.after(time.Hour)
				for _, a := range w.meta.Actions() {
					if a.GetVerb() != "list" { // the test's own
						t.Errorf("request while nothing changes: %v", a)
					}
				}
			})
		})
	}
}

func TestWhatWasLeftBehindBeforeTheStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.put("ConfigMap/child", "ConfigMap/gone")
		w.put("ConfigMap/grandchild", "ConfigMap/child")
		w.put("ConfigMap/other")
		w.start()
		expect(t, "after", w.after(5*time.Second), "ConfigMap/other")
	})
}

func TestForeignNamesake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.start()
		w.after(5 * time.Second)
		w.put("Thing/t")
		w.put("ConfigMap/under-cluster", "Thing/t")
		w.put("ConfigMap/n")
		w.put("Thing/bad", "ConfigMap/n") // cannot be: an owner in a namespace
		w.put("Secret/bad-kind", "Secret/n")
		expect(t, "after", w.after(time.Hour), "ConfigMap/n ConfigMap/under-cluster<t Thing/bad<n Thing/t")
		if ev := controllertest.Events(w.rec); len(ev) == 0 || !strings.Contains(ev[0], "OwnerRefInvalidNamespace") {
			t.Errorf("events %q", ev)
		}
		w.delete("Thing/t", metav1.DeletePropagationBackground)
		expect(t, "after the cluster-wide owner", w.after(5*time.Second), "ConfigMap/n Thing/bad<n")
	})
}

func TestCircleEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.put("ConfigMap/a", "ConfigMap/c!")
		w.put("ConfigMap/b", "ConfigMap/a!")
		w.put("ConfigMap/c", "ConfigMap/b!")
		w.start()
		expect(t, "before", w.after(5*time.Second), "ConfigMap/a<c ConfigMap/b<a ConfigMap/c<b")
		w.delete("ConfigMap/a", metav1.DeletePropagationForeground)
		expect(t, "after", w.after(time.Minute), "")
	})
}

func TestAKindThatComesLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		all := w.client.Resources
		w.client.Resources = all[:2]
		w.put("ConfigMap/a", "Thing/t")
		w.put("Thing/t")
		w.start()
		expect(t, "its owner's kind is unknown", w.after(time.Minute), "ConfigMap/a<t Thing/t")
		w.client.Resources = all
		w.client.ClearActions() // takes the lock that discovery takes before it reads them
		w.after(rediscover)
		w.delete("Thing/t", metav1.DeletePropagationBackground)
		expect(t, "after", w.after(controller.RetryLongest), "")
	})
}

// ReplicaSets are read from the shared view.
func TestOwnersInTheSharedView(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		rs := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "r", UID: "r"}}
		if err := w.client.Tracker().Add(rs); err != nil {
			t.Fatal(err)
		}
		w.put("ReplicaSet/r")
		w.put("ConfigMap/a", "ReplicaSet/r!")
		w.start()
		expect(t, "before", w.after(5*time.Second), "ConfigMap/a<r ReplicaSet/r")
		w.delete("ReplicaSet/r", metav1.DeletePropagationBackground)
		if err := w.client.AppsV1().ReplicaSets("ns").Delete(t.Context(), "r", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		expect(t, "after", w.after(5*time.Second), "")
	})
}

// Random families, random deletions: what has no living owner goes, what has
// one or never had any stays, and in the foreground nobody goes before those
// that block it.
func TestRandomFamilies(t *testing.T) {
	for seed := range uint64(60) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 3))
			w := newWorld(t)
			var asked sync.Map
			w.removed = func(o *metav1.PartialObjectMetadata) {
				if _, ok := asked.Load(o.Name); ok {
					return
				}
				for _, p := range w.solid(o) {
					t.Errorf("seed %d: %s was removed while its owner %s lives", seed, o.Name, p)
				}
				if len(o.OwnerReferences) == 0 {
					t.Errorf("seed %d: %s was removed though nobody owned it", seed, o.Name)
				}
			}
			w.start()
			w.after(5 * time.Second)
			const n = 30
			var names []string
			for i := range n {
				what := fmt.Sprintf("%s/o%02d", []string{"ConfigMap", "Secret"}[rng.IntN(2)], i)
				var owners []string
				for range rng.IntN(3) {
					if i > 0 {
						owner := names[rng.IntN(i)] + []string{"", "!"}[rng.IntN(2)]
						if !slices.Contains(owners, owner) && !slices.Contains(owners, owner+"!") && !slices.Contains(owners, strings.TrimSuffix(owner, "!")) {
							owners = append(owners, owner)
						}
					}
				}
				w.put(what, owners...)
				names = append(names, what)
			}
			policies := []metav1.DeletionPropagation{metav1.DeletePropagationBackground, metav1.DeletePropagationForeground, metav1.DeletePropagationOrphan}
			for range 6 {
				what := names[rng.IntN(n)]
				_, name, _ := strings.Cut(what, "/")
				asked.Store(name, true)
				w.delete(what, policies[rng.IntN(3)])
				time.Sleep(time.Duration(rng.IntN(30)) * time.Millisecond)
			}
			w.after(5 * time.Minute)
			for _, o := range w.all() {
				if o.DeletionTimestamp != nil {
					t.Errorf("seed %d: %s is stuck in its deletion: %v", seed, o.Name, o.Finalizers)
				}
				if len(o.OwnerReferences) > 0 && len(w.solid(&o)) == 0 {
					t.Errorf("seed %d: %s is left, all its owners are gone", seed, o.Name)
				}
			}
		})
	}
}

// solid returns the owners of o that exist and are not waiting for it to go.
func (w *world) solid(o *metav1.PartialObjectMetadata) (out []string) {
	for _, r := range o.OwnerReferences {
		owner, err := w.get(gvrs[r.Kind], "ns", r.Name)
		if err == nil && owner.UID == r.UID && stateOf(owner)&foreground == 0 {
			out = append(out, r.Name)
		}
	}
	return out
}
