package garbage

import (
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

// table is what discovery says of the API's kinds.
type table struct {
	// watched are the kinds that can be owned and deleted, each in the version
	// that its group prefers.
	watched map[schema.GroupVersionResource]kind
	// byKind finds any version of any kind that has objects.
	byKind map[schema.GroupVersionKind]kind
}

// ignored are kinds that come in floods, that nothing owns for long, and whose
// lifetime bounds itself. Upstream ignores the same.
var ignored = map[schema.GroupResource]bool{
	{Resource: "events"}:                         true,
	{Group: "events.k8s.io", Resource: "events"}: true,
}

// newTable reads discovery's answer.
func newTable(groups []*metav1.APIGroup, lists []*metav1.APIResourceList) table {
	t := table{watched: map[schema.GroupVersionResource]kind{}, byKind: map[schema.GroupVersionKind]kind{}}
	byGV := map[string][]metav1.APIResource{}
	for _, l := range lists {
		byGV[l.GroupVersion] = l.APIResources
	}
	for _, g := range groups {
		// The preferred version first, so that others only add kinds that it lacks.
		versions := []string{g.PreferredVersion.GroupVersion}
		for _, v := range g.Versions {
			versions = append(versions, v.GroupVersion)
		}
		seen := map[string]bool{}
		for _, v := range versions {
			gv, err := schema.ParseGroupVersion(v)
			if err != nil {
				continue
			}
			for _, r := range byGV[v] {
				k := kind{gvr: gv.WithResource(r.Name), gvk: gv.WithKind(r.Kind), namespaced: r.Namespaced}
				if strings.Contains(r.Name, "/") || !slices.Contains(r.Verbs, "get") {
					continue
				}
				if _, ok := t.byKind[k.gvk]; !ok {
					t.byKind[k.gvk] = k
				}
				if !seen[r.Name] && hasAll(r.Verbs, "delete", "list", "watch") && !ignored[k.gvr.GroupResource()] {
					seen[r.Name] = true
					t.watched[k.gvr] = k
				}
			}
		}
	}
	return t
}

func hasAll(verbs []string, want ...string) bool {
	for _, w := range want {
		if !slices.Contains(verbs, w) {
			return false
		}
	}
	return true
}
