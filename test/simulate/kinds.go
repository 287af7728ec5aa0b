package simulate

import (
	"reflect"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/scheme"
)

// kind is one resource of the simulated API.
type kind struct {
	gvr        schema.GroupVersionResource
	gvk        schema.GroupVersionKind
	namespaced bool
	status     bool // it has a status of its own
}

func (k kind) resource() schema.GroupResource { return k.gvr.GroupResource() }

// clusterScoped are the kinds that have no namespace.
var clusterScoped = map[string]bool{
	"Node": true, "Namespace": true, "PersistentVolume": true, "StorageClass": true, "CSINode": true, "CSIDriver": true,
	"VolumeAttachment": true, "VolumeAttributesClass": true, "PriorityClass": true, "ClusterRole": true, "ClusterRoleBinding": true,
	"ResourceSlice": true, "DeviceClass": true, "DeviceTaintRule": true, "ResourcePoolStatusRequest": true, "IngressClass": true, "RuntimeClass": true,
	"CertificateSigningRequest": true, "ClusterTrustBundle": true, "ServiceCIDR": true, "IPAddress": true, "ComponentStatus": true,
	"ValidatingWebhookConfiguration": true, "MutatingWebhookConfiguration": true, "ValidatingAdmissionPolicy": true,
	"ValidatingAdmissionPolicyBinding": true, "MutatingAdmissionPolicy": true, "MutatingAdmissionPolicyBinding": true,
	"FlowSchema": true, "PriorityLevelConfiguration": true, "StorageVersion": true, "StorageVersionMigration": true,
}

// allKinds are the resources of every group and version that client-go knows.
func allKinds() map[schema.GroupVersionResource]kind {
	out := map[schema.GroupVersionResource]kind{}
	for gvk, typ := range scheme.Scheme.AllKnownTypes() {
		if _, ok := typ.FieldByName("ObjectMeta"); !ok || gvk.Version == "__internal" {
			continue
		}
		if !scheme.Scheme.Recognizes(gvk.GroupVersion().WithKind(gvk.Kind + "List")) {
			continue
		}
		gvr, _ := meta.UnsafeGuessKindToResource(gvk)
		_, status := typ.FieldByName("Status")
		out[gvr] = kind{gvr: gvr, gvk: gvk, namespaced: !clusterScoped[gvk.Kind], status: status}
	}
	return out
}

// versionOrder sorts v1 before v2, and both before betas and alphas: what discovery prefers is what the controllers use.
func versionOrder(a, b string) int {
	rank := func(v string) string {
		switch {
		case strings.Contains(v, "alpha"):
			return "2" + v
		case strings.Contains(v, "beta"):
			return "1" + v
		}
		return "0" + v
	}
	return strings.Compare(rank(a), rank(b))
}

// discovery answers /api, /apis and the lists of each group and version. Only the best version of a group is told of.
func discovery(kinds map[schema.GroupVersionResource]kind, path string) (any, bool) {
	versions := map[string][]string{}
	for gvr := range kinds {
		if !slices.Contains(versions[gvr.Group], gvr.Version) {
			versions[gvr.Group] = append(versions[gvr.Group], gvr.Version)
		}
	}
	best := map[string]string{}
	for g, vs := range versions {
		slices.SortFunc(vs, versionOrder)
		best[g] = vs[0]
	}
	parts := strings.Split(strings.Trim(path, "/"), "/")
	var gv schema.GroupVersion
	switch {
	case len(parts) == 1 && parts[0] == "api":
		return &metav1.APIVersions{TypeMeta: metav1.TypeMeta{Kind: "APIVersions", APIVersion: "v1"}, Versions: []string{"v1"}}, true
	case len(parts) == 1 && parts[0] == "apis":
		list := &metav1.APIGroupList{TypeMeta: metav1.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}}
		for g, v := range best {
			if g == "" {
				continue
			}
			gv := metav1.GroupVersionForDiscovery{GroupVersion: g + "/" + v, Version: v}
			list.Groups = append(list.Groups, metav1.APIGroup{Name: g, Versions: []metav1.GroupVersionForDiscovery{gv}, PreferredVersion: gv})
		}
		slices.SortFunc(list.Groups, func(a, b metav1.APIGroup) int { return strings.Compare(a.Name, b.Name) })
		return list, true
	case len(parts) == 2 && parts[0] == "api":
		gv = schema.GroupVersion{Version: parts[1]}
	case len(parts) == 3 && parts[0] == "apis":
		gv = schema.GroupVersion{Group: parts[1], Version: parts[2]}
	default:
		return nil, false
	}
	list := &metav1.APIResourceList{TypeMeta: metav1.TypeMeta{Kind: "APIResourceList", APIVersion: "v1"}, GroupVersion: gv.String()}
	for gvr, k := range kinds {
		if gvr.GroupVersion() == gv {
			list.APIResources = append(list.APIResources, metav1.APIResource{Name: gvr.Resource, Kind: k.gvk.Kind, Namespaced: k.namespaced,
				Verbs: metav1.Verbs{"create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"}})
		}
	}
	slices.SortFunc(list.APIResources, func(a, b metav1.APIResource) int { return strings.Compare(a.Name, b.Name) })
	return list, true
}

// field returns a settable field of an object, invalid if it has none of that name.
func field(obj any, name string) reflect.Value { return reflect.ValueOf(obj).Elem().FieldByName(name) }
