package garbage

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

var (
	cmKind     = &kind{gvr: schema.GroupVersionResource{Version: "v1", Resource: "configmaps"}, gvk: schema.GroupVersionKind{Version: "v1", Kind: "ConfigMap"}, namespaced: true}
	secretKind = &kind{gvr: schema.GroupVersionResource{Version: "v1", Resource: "secrets"}, gvk: schema.GroupVersionKind{Version: "v1", Kind: "Secret"}, namespaced: true}
)

// obj makes a ConfigMap of that uid and name; owners are written "uid" or "uid!" for one that blocks.
func obj(uid string, finalizers []string, owners ...string) *metav1.PartialObjectMetadata {
	o := &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: uid, UID: types.UID(uid), Finalizers: finalizers}}
	if finalizers != nil {
		o.DeletionTimestamp = &metav1.Time{Time: time.Unix(1, 0)}
	}
	for _, owner := range owners {
		u := strings.TrimSuffix(owner, "!")
		r := metav1.OwnerReference{APIVersion: "v1", Kind: "ConfigMap", Name: u, UID: types.UID(u)}
		if u != owner {
			r.BlockOwnerDeletion = new(true)
		}
		o.OwnerReferences = append(o.OwnerReferences, r)
	}
	return o
}

func ids(look []id) string {
	known := map[id]string{}
	for c := 'a'; c <= 'z'; c++ {
		known[idOf(types.UID(c))] = string(c)
	}
	var out []string
	for _, x := range look {
		out = append(out, known[x])
	}
	slices.Sort(out)
	return strings.Join(slices.Compact(out), " ")
}

func TestGraphSaysWhatToLookAt(t *testing.T) {
	g := newGraph()
	var fg, orph = []string{metav1.FinalizerDeleteDependents}, []string{metav1.FinalizerOrphanDependents}
	elsewhere := obj("f", nil, "a")
	elsewhere.Namespace = "other"
	misnamed := obj("g", nil, "a")
	misnamed.OwnerReferences[0].Name = "wrong"
	for _, step := range []struct {
		what string
		do   func() []id
		want string
	}{
		{"an owner without owners", func() []id { return g.observe(cmKind, obj("a", nil)) }, ""},
		{"a dependent of a living owner", func() []id { return g.observe(cmKind, obj("b", nil, "a!")) }, ""},
		{"again", func() []id { return g.observe(cmKind, obj("b", nil, "a!")) }, ""},
		{"a dependent of an unknown owner", func() []id { return g.observe(cmKind, obj("c", nil, "x")) }, "c"},
		{"that owner comes", func() []id { return g.observe(cmKind, obj("x", nil)) }, ""},
		{"an owner in another namespace", func() []id { return g.observe(cmKind, elsewhere) }, "f"},
		{"an owner of another name", func() []id { return g.observe(cmKind, misnamed) }, "g"},
		{"the owner of an owner", func() []id { return g.observe(cmKind, obj("d", nil, "b")) }, ""},
		{"an owner goes", func() []id { return g.gone("x") }, "c"},
		{"foreground deletion", func() []id { return g.observe(cmKind, obj("a", fg)) }, "a b f g"},
		{"again", func() []id { return g.observe(cmKind, obj("a", fg)) }, ""},
		{"a late dependent", func() []id { return g.observe(cmKind, obj("e", nil, "a!")) }, "a e"},
		{"a dependent that blocks no more", func() []id { return g.observe(cmKind, obj("e", nil, "a")) }, "a e"},
		{"a dependent goes", func() []id { return g.gone("b") }, "a d"},
		{"orphaning", func() []id { return g.observe(cmKind, obj("h", orph)) }, "h"},
		{"a relist without e, f, g: they are gone", func() []id {
			return g.replace(cmKind, []metav1.Object{obj("a", fg), obj("c", nil, "x"), obj("d", nil, "b"), obj("h", orph)})
		}, "a"},
	} {
		if got := ids(step.do()); got != step.want {
			t.Errorf("%s: look at %q, want %q", step.what, got, step.want)
		}
	}
	s, ok := g.look(idOf("a"))
	if !ok || s.state != deleting|foreground || len(s.dependents) != 0 {
		t.Errorf("what is known of a: %+v, %t", s, ok)
	}
	g.observe(secretKind, obj("s", nil, "a!"))
	if s, _ := g.look(idOf("a")); len(s.dependents) != 1 || !s.dependents[0].blocks {
		t.Errorf("dependents of a: %+v", s.dependents)
	}
	g.drop(secretKind)
	for _, uid := range []types.UID{"a", "c", "d", "h"} {
		g.gone(uid)
	}
	if len(g.live)+len(g.nodes)+len(g.dependents) != 0 {
		t.Errorf("left in the graph: %d live, %d nodes, %d owners", len(g.live), len(g.nodes), len(g.dependents))
	}
}

func TestDecide(t *testing.T) {
	u := func(s ...types.UID) []types.UID { return s }
	for _, tc := range []struct {
		what       string
		o          owners
		deps       bool
		cycle      bool
		finalizers []string
		want       string
	}{
		{"nobody owns it", owners{}, true, false, nil, "nothing"},
		{"one owner lives", owners{solid: u("a")}, false, false, nil, "nothing"},
		{"one lives, one is gone, one waits", owners{u("a"), u("b"), u("c")}, true, true, nil, "drop [b c]"},
		{"all are gone", owners{dangling: u("a", "b")}, true, false, nil, "Background"},
		{"all are gone, orphans its own", owners{dangling: u("a")}, true, false, []string{metav1.FinalizerOrphanDependents}, "Orphan"},
		{"all are gone, waits for its own", owners{dangling: u("a")}, true, false, []string{metav1.FinalizerDeleteDependents}, "Foreground"},
		{"the owner waits, no dependents", owners{waiting: u("a")}, false, false, nil, "Background"},
		{"the owner waits, dependents", owners{waiting: u("a")}, true, false, nil, "Foreground"},
		{"the owner waits, in a circle", owners{waiting: u("a")}, true, true, nil, "unblock Foreground"},
	} {
		a := decide(tc.o, tc.deps, tc.cycle, tc.finalizers)
		got := "nothing"
		switch {
		case len(a.drop) > 0:
			got = fmt.Sprint("drop ", a.drop)
		case a.remove != nil && a.unblock:
			got = "unblock " + string(*a.remove)
		case a.remove != nil:
			got = string(*a.remove)
		}
		if got != tc.want {
			t.Errorf("%s: %s, want %s", tc.what, got, tc.want)
		}
	}
}

func TestTableTakesThePreferredVersionOnce(t *testing.T) {
	all := metav1.Verbs{"get", "list", "watch", "delete"}
	groups := []*metav1.APIGroup{{Name: "g", PreferredVersion: metav1.GroupVersionForDiscovery{GroupVersion: "g/v2"},
		Versions: []metav1.GroupVersionForDiscovery{{GroupVersion: "g/v2"}, {GroupVersion: "g/v1"}}},
		{Name: "", PreferredVersion: metav1.GroupVersionForDiscovery{GroupVersion: "v1"}, Versions: []metav1.GroupVersionForDiscovery{{GroupVersion: "v1"}}}}
	lists := []*metav1.APIResourceList{
		{GroupVersion: "g/v1", APIResources: []metav1.APIResource{{Name: "as", Kind: "A", Verbs: all}, {Name: "olds", Kind: "Old", Verbs: all}}},
		{GroupVersion: "g/v2", APIResources: []metav1.APIResource{{Name: "as", Kind: "A", Verbs: all, Namespaced: true}, {Name: "as/status", Kind: "A", Verbs: all}}},
		{GroupVersion: "v1", APIResources: []metav1.APIResource{{Name: "events", Kind: "Event", Verbs: all}, {Name: "readers", Kind: "Reader", Verbs: metav1.Verbs{"get"}}}},
	}
	tab := newTable(groups, lists)
	var got []string
	for gvr := range tab.watched {
		got = append(got, gvr.GroupVersion().String()+"/"+gvr.Resource)
	}
	slices.Sort(got)
	if s := strings.Join(got, " "); s != "g/v1/olds g/v2/as" {
		t.Errorf("watched %s", s)
	}
	for _, gvk := range []schema.GroupVersionKind{{Group: "g", Version: "v1", Kind: "A"}, {Group: "g", Version: "v2", Kind: "A"}, {Version: "v1", Kind: "Event"}, {Version: "v1", Kind: "Reader"}} {
		if _, ok := tab.byKind[gvk]; !ok {
			t.Errorf("%s cannot be found", gvk)
		}
	}
}

// The point of the graph is that it is small.
func TestGraphIsSmall(t *testing.T) {
	const n = 20000
	size := func(owned bool) float64 {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		g := newGraph()
		owner := uuid.NewString()
		for i := range n {
			o := &metav1.PartialObjectMetadata{ObjectMeta: metav1.ObjectMeta{Namespace: "a-namespace", Name: fmt.Sprintf("a-pod-of-some-set-%05d", i), UID: types.UID(uuid.NewString())}}
			if owned {
				o.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "a-pod-of-some-set", UID: types.UID(owner), BlockOwnerDeletion: new(true)}}
			}
			g.observe(cmKind, o)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		runtime.KeepAlive(g)
		return float64(after.HeapAlloc-before.HeapAlloc) / n
	}
	plain, owned := size(false), size(true)
	t.Logf("%.0f bytes for an object without owners, %.0f for one with", plain, owned)
	if plain > 120 || owned > 450 {
		t.Errorf("%.0f and %.0f bytes an object", plain, owned)
	}
}
