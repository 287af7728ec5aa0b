package router

import (
	"fmt"
	"net/http"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apiserver/pkg/endpoints/discovery"
	"k8s.io/apiserver/pkg/registry/rest"
)

// discovery gives the entry that clients see for an endpoint.
func (b builder) discovery(e *endpoint) (metav1.APIResource, error) {
	st, kind := e.storage, e.scope.Kind
	ar := metav1.APIResource{Name: e.path, Namespaced: e.namespaced, Kind: kind.Kind, Verbs: verbs(st)}
	if p, ok := st.(rest.GroupVersionKindProvider); ok {
		k := p.GroupVersionKind(b.gv)
		ar.Group, ar.Version, ar.Kind = k.Group, k.Version, k.Kind
	}
	if p, ok := st.(rest.ShortNamesProvider); ok {
		ar.ShortNames = p.ShortNames()
	}
	if p, ok := st.(rest.CategoriesProvider); ok {
		ar.Categories = p.Categories()
	}
	if p, ok := st.(rest.SingularNameProvider); ok && e.scope.Subresource == "" {
		ar.SingularName = p.GetSingularName()
	}
	p, ok := st.(rest.StorageVersionProvider)
	if !ok || p.StorageVersion() == nil {
		return ar, nil
	}
	kinds, _, err := b.group.Scheme.ObjectKinds(st.New())
	if err != nil {
		return ar, err
	}
	k, ok := p.StorageVersion().KindForGroupVersionKinds(kinds)
	if !ok {
		return ar, fmt.Errorf("no version of %s is stored", kind.Kind)
	}
	ar.StorageVersionHash = discovery.StorageVersionHash(k.Group, k.Version, k.Kind)
	return ar, nil
}

// verbs gives what a storage can do, in the order of upstream's installer.
func verbs(s rest.Storage) metav1.Verbs {
	_, creates := s.(rest.Creater)
	_, createsNamed := s.(rest.NamedCreater)
	_, deletes := s.(rest.GracefulDeleter)
	_, deletesAll := s.(rest.CollectionDeleter)
	_, gets := s.(rest.Getter)
	_, getsWith := s.(rest.GetterWithOptions)
	_, lists := s.(rest.Lister)
	_, patches := s.(rest.Patcher)
	_, updates := s.(rest.Updater)
	_, watches := s.(rest.Watcher)
	has := map[string]bool{
		"create": creates || createsNamed, "delete": deletes, "deletecollection": deletesAll, "get": gets || getsWith,
		"list": lists, "patch": patches, "update": updates, "watch": watches,
	}
	if c, ok := s.(rest.Connecter); ok {
		byMethod := map[string]string{http.MethodPost: "create", http.MethodGet: "get", http.MethodPut: "update",
			http.MethodPatch: "patch", http.MethodDelete: "delete"}
		for _, m := range c.ConnectMethods() {
			if v := byMethod[m]; v != "" {
				has[v] = true
			}
		}
	}
	v := metav1.Verbs{}
	for _, name := range []string{"create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"} {
		if has[name] {
			v = append(v, name)
		}
	}
	return v
}
