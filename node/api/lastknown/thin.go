package lastknown

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	apidiscoveryv2 "k8s.io/api/apidiscovery/v2"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metainternalversion "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/sets"
	x509request "k8s.io/apiserver/pkg/authentication/request/x509"
	"k8s.io/apiserver/pkg/authentication/user"
	genericapi "k8s.io/apiserver/pkg/endpoints"
	discoveryendpoint "k8s.io/apiserver/pkg/endpoints/discovery/aggregated"
	"k8s.io/apiserver/pkg/endpoints/handlers"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
	"k8s.io/kubernetes/pkg/printers"
	printersinternal "k8s.io/kubernetes/pkg/printers/internalversion"
	printerstorage "k8s.io/kubernetes/pkg/printers/storage"
	"k8s.io/kubernetes/pkg/registry/core/node"
	"k8s.io/kubernetes/pkg/registry/core/pod"
	"k8s.io/kubernetes/pkg/registry/core/secret"
	"k8s.io/kubernetes/pkg/registry/core/service"

	_ "skein.io/skein/node/api/kinds" // installs the kinds in legacyscheme
)

// Source is what a node knows by itself: node/desired.
type Source interface {
	Pods() []*corev1.Pod
	Services() []*corev1.Service
	EndpointSlices() []*discoveryv1.EndpointSlice
	Nodes() []*corev1.Node
	ConfigMaps() []*corev1.ConfigMap
	Secrets() []*corev1.Secret
}

// Config of a Thin. All fields are required.
type Config struct {
	// NodeName is this node's name.
	NodeName string
	// ClientCA signed the certificates of those who may ask.
	ClientCA *x509.CertPool
	// Source is what the node knows, Age how long ago that was the truth as far as the node can tell.
	// that is false when it knows nothing.
	Source Source
	Age    func() (time.Duration, bool)
}

// listRevision is the resource version of all lists: long compacted in any cluster, so that who goes on to watch from it is told
// to list again.
const listRevision = "1"

// Thin answers reads from what one node knows. It is made at the first request and costs nothing before.
type Thin struct {
	cfg  Config
	once sync.Once
	made *thin
}

// New makes one.
func New(cfg Config) *Thin { return &Thin{cfg: cfg} }

// ErrCannot wraps the reasons for which a request cannot be answered from what the node knows.
var ErrCannot = errors.New("not to be answered from the last known state")

// Answer answers a request of whoever its client certificate says, or returns an error that says why not, with nothing written.
// reason says what keeps the node from the present.
func (t *Thin) Answer(w http.ResponseWriter, r *http.Request, reason string) error {
	t.once.Do(func() { t.made = newThin(t.cfg) })
	return t.made.answer(w, r, reason, t.made.who)
}

// AnswerRoot is Answer for a request that has been found to be this machine's administrator's.
func (t *Thin) AnswerRoot(w http.ResponseWriter, r *http.Request, reason string) error {
	t.once.Do(func() { t.made = newThin(t.cfg) })
	root := &user.DefaultInfo{Name: "root", Groups: []string{user.SystemPrivilegedGroup, user.AllAuthenticated}}
	return t.made.answer(w, r, reason, func(*http.Request) (user.Info, error) { return root, nil })
}

type thin struct {
	cfg       Config
	certs     *x509request.Authenticator
	infos     *apirequest.RequestInfoFactory
	resources map[schema.GroupVersionResource]*resource
	discovery map[string]http.Handler // by path
}

func newThin(cfg Config) *thin {
	verify := x509request.DefaultVerifyOptions()
	verify.Roots = cfg.ClientCA
	t := &thin{
		cfg: cfg, certs: x509request.New(verify, x509request.CommonNameUserConversion),
		infos:     &apirequest.RequestInfoFactory{APIPrefixes: sets.NewString("api", "apis"), GrouplessAPIPrefixes: sets.NewString("api")},
		resources: map[schema.GroupVersionResource]*resource{},
	}
	table := printerstorage.TableConvertor{TableGenerator: printers.NewTableGenerator().With(printersinternal.AddHandlers)}
	legacy, grouped := discoveryendpoint.NewResourceManager("api"), discoveryendpoint.NewResourceManager("apis")
	listed := map[schema.GroupVersion][]metav1.APIResource{}
	for _, k := range known(cfg.Source) {
		gv := k.gvk.GroupVersion()
		k.scope = scopeOf(k, table)
		t.resources[gv.WithResource(k.name)] = k
		listed[gv] = append(listed[gv], metav1.APIResource{Name: k.name, SingularName: k.singular, Namespaced: k.namespaced, Kind: k.gvk.Kind,
			Verbs: metav1.Verbs{"get", "list"}, ShortNames: k.short, Categories: k.categories})
	}
	for gv, rs := range listed {
		d, err := genericapi.ConvertGroupVersionIntoToDiscovery(rs)
		if err != nil {
			panic(err) // the table above is wrong: our own bug
		}
		m := grouped
		if gv.Group == "" {
			m = legacy
		}
		// Current, though it lacks most: clients drop what is called stale. They ask again for what they do not find.
		m.AddGroupVersion(gv.Group, apidiscoveryv2.APIVersionDiscovery{Freshness: apidiscoveryv2.DiscoveryFreshnessCurrent, Version: gv.Version, Resources: d})
	}
	t.discovery = map[string]http.Handler{"/api": legacy, "/apis": grouped}
	return t
}

// who recognises a client. Only a certificate can be checked here.
func (t *thin) who(r *http.Request) (user.Info, error) {
	if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
		return nil, fmt.Errorf("%w: node %s by itself recognises client certificates only", ErrCannot, t.cfg.NodeName)
	}
	resp, ok, err := t.certs.AuthenticateRequest(r)
	if err != nil || !ok {
		return nil, fmt.Errorf("%w: the client certificate is not valid here: %v", ErrCannot, err)
	}
	return resp.User, nil
}

// allowed decides without RBAC, which only replicas know: administrators may read everything, the node what it has.
func (t *thin) allowed(u user.Info, a *answer) error {
	for _, g := range u.GetGroups() {
		if g == user.SystemPrivilegedGroup {
			return nil
		}
	}
	if u.GetName() == "system:node:"+t.cfg.NodeName && isNode(u) && a.bounded {
		return nil
	}
	return fmt.Errorf("%w: node %s knows no roles by itself, so it cannot tell what %q may read", ErrCannot, t.cfg.NodeName, u.GetName())
}

func (t *thin) answer(w http.ResponseWriter, r *http.Request, reason string, who func(*http.Request) (user.Info, error)) error {
	info, err := t.infos.NewRequestInfo(r)
	if err != nil || r.Method != http.MethodGet || info.Verb == "watch" {
		return fmt.Errorf("%w: reads are, but neither writes nor watches", ErrCannot)
	}
	if len(r.Header["Impersonate-User"])+len(r.Header["Impersonate-Group"])+len(r.Header["Impersonate-Uid"]) > 0 {
		return fmt.Errorf("%w: whom one may impersonate is known to replicas only", ErrCannot)
	}
	a, err := readAsked(r.Header)
	if err != nil {
		refuse(w, err)
		return nil
	}
	u, err := who(r)
	if err == nil {
		err = t.allowed(u, a)
	}
	if err != nil {
		return err
	}
	if h := t.discovery[r.URL.Path]; h != nil {
		h.ServeHTTP(w, r)
		return nil
	}
	k := t.resources[schema.GroupVersionResource{Group: info.APIGroup, Version: info.APIVersion, Resource: info.Resource}]
	if k == nil || info.Subresource != "" || !info.IsResourceRequest {
		return fmt.Errorf("%w: node %s keeps its own pods with their ConfigMaps and Secrets, and all Services, EndpointSlices and Nodes; nothing of %s", ErrCannot, t.cfg.NodeName, r.URL.Path)
	}
	if k.partial != "" {
		reason += "; " + k.partial
	}
	age, ok := t.cfg.Age()
	if !ok {
		return fmt.Errorf("%w: node %s has not heard the API yet", ErrCannot, t.cfg.NodeName)
	}
	if err := a.use(age, reason); err != nil {
		refuse(w, err)
		return nil
	}
	ctx := apirequest.WithUser(apirequest.WithRequestInfo(r.Context(), info), u)
	if info.Namespace != "" {
		ctx = apirequest.WithNamespace(ctx, info.Namespace)
	}
	h := handlers.ListResource(k, nil, k.scope, false, 0)
	if info.Verb == "get" {
		h = handlers.GetResource(k, k.scope)
	}
	h(&marker{ResponseWriter: w, answer: a}, r.WithContext(ctx))
	return nil
}

// resource is a kind that a node knows something of. It is a rest.Getter and a rest.Lister.
type resource struct {
	rest.TableConvertor
	gvk        schema.GroupVersionKind
	name       string
	singular   string
	short      []string
	categories []string
	namespaced bool
	// partial says what of the kind the node knows; empty: all.
	partial string
	objects func() []runtime.Object
	attrs   storage.AttrFunc
	scope   *handlers.RequestScope
}

func objects[T runtime.Object](list func() []T) func() []runtime.Object {
	return func() []runtime.Object {
		in := list()
		out := make([]runtime.Object, len(in))
		for i, o := range in {
			out[i] = o
		}
		return out
	}
}

func known(s Source) []*resource {
	v1, disc := corev1.SchemeGroupVersion, discoveryv1.SchemeGroupVersion
	return []*resource{
		{gvk: v1.WithKind("Pod"), name: "pods", singular: "pod", short: []string{"po"}, categories: []string{"all"}, namespaced: true,
			partial: "of pods it knows its own", objects: objects(s.Pods), attrs: pod.GetAttrs},
		{gvk: v1.WithKind("Service"), name: "services", singular: "service", short: []string{"svc"}, categories: []string{"all"}, namespaced: true,
			objects: objects(s.Services), attrs: service.GetAttrs},
		{gvk: v1.WithKind("Node"), name: "nodes", singular: "node", short: []string{"no"}, objects: objects(s.Nodes), attrs: node.GetAttrs},
		{gvk: v1.WithKind("ConfigMap"), name: "configmaps", singular: "configmap", short: []string{"cm"}, namespaced: true,
			partial: "of ConfigMaps it knows those of its own pods", objects: objects(s.ConfigMaps), attrs: storage.DefaultNamespaceScopedAttr},
		{gvk: v1.WithKind("Secret"), name: "secrets", singular: "secret", namespaced: true,
			partial: "of Secrets it knows those of its own pods", objects: objects(s.Secrets), attrs: secret.GetAttrs},
		{gvk: disc.WithKind("EndpointSlice"), name: "endpointslices", singular: "endpointslice", namespaced: true,
			objects: objects(s.EndpointSlices), attrs: storage.DefaultNamespaceScopedAttr},
	}
}

func scopeOf(k *resource, table rest.TableConvertor) *handlers.RequestScope {
	s := legacyscheme.Scheme
	k.TableConvertor = table
	return &handlers.RequestScope{
		Serializer: legacyscheme.Codecs, ParameterCodec: legacyscheme.ParameterCodec,
		Creater: s, Convertor: s, Defaulter: s, Typer: s, UnsafeConvertor: runtime.UnsafeObjectConvertor(s), TableConvertor: table,
		Resource: k.gvk.GroupVersion().WithResource(k.name), Kind: k.gvk,
		HubGroupVersion: schema.GroupVersion{Group: k.gvk.Group, Version: runtime.APIVersionInternal}, MetaGroupVersion: metav1.SchemeGroupVersion,
		Namer: handlers.ContextBasedNaming{Namer: runtime.Namer(meta.NewAccessor()), ClusterScoped: !k.namespaced},
	}
}

// Get implements rest.Getter.
func (k *resource) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	for _, o := range k.objects() {
		if m := o.(metav1.Object); m.GetName() == name && m.GetNamespace() == apirequest.NamespaceValue(ctx) {
			return k.internal(o)
		}
	}
	if k.partial != "" { // it may well exist
		return nil, Unavailable(fmt.Sprintf("whether %s %q exists cannot be found out now: this node reaches no API replica, and %s", k.singular, name, k.partial))
	}
	return nil, apierrors.NewNotFound(k.gvk.GroupVersion().WithResource(k.name).GroupResource(), name)
}

// NewList implements rest.Lister.
func (k *resource) NewList() runtime.Object {
	l, err := legacyscheme.Scheme.New(k.hub("List"))
	if err != nil {
		panic(err) // a kind that is not installed: our own bug
	}
	return l
}

func (k *resource) hub(suffix string) schema.GroupVersionKind {
	return schema.GroupVersionKind{Group: k.gvk.Group, Version: runtime.APIVersionInternal, Kind: k.gvk.Kind + suffix}
}

// List implements rest.Lister. Pages are not cut: what one node knows is little.
func (k *resource) List(ctx context.Context, o *metainternalversion.ListOptions) (runtime.Object, error) {
	p := storage.SelectionPredicate{Label: labels.Everything(), Field: fields.Everything(), GetAttrs: k.attrs}
	if o != nil && o.LabelSelector != nil {
		p.Label = o.LabelSelector
	}
	if o != nil && o.FieldSelector != nil {
		p.Field = o.FieldSelector
	}
	var found []runtime.Object
	namespace := apirequest.NamespaceValue(ctx)
	for _, v := range k.objects() {
		if namespace != "" && v.(metav1.Object).GetNamespace() != namespace {
			continue
		}
		in, err := k.internal(v)
		if err != nil {
			return nil, err
		}
		if ok, err := p.Matches(in); err != nil {
			return nil, err
		} else if ok {
			found = append(found, in)
		}
	}
	list := k.NewList()
	if err := meta.SetList(list, found); err != nil {
		return nil, err
	}
	m, err := meta.ListAccessor(list)
	if err != nil {
		return nil, err
	}
	m.SetResourceVersion(listRevision)
	return list, nil
}

// internal makes the form that handlers and printers work on; the shared object is copied by the conversion where it is changed.
func (k *resource) internal(o runtime.Object) (runtime.Object, error) {
	in, err := legacyscheme.Scheme.New(k.hub(""))
	if err != nil {
		return nil, err
	}
	return in, legacyscheme.Scheme.Convert(o.DeepCopyObject(), in, nil)
}
