package api

import (
	"context"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	admissionreviewv1 "k8s.io/api/admission/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apiextclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset/typed/apiextensions/v1"
	apiextopenapi "k8s.io/apiextensions-apiserver/pkg/generated/openapi"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metainternal "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	openapinamer "k8s.io/apiserver/pkg/endpoints/openapi"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/dynamiccertificates"
	"k8s.io/apiserver/pkg/server/options"
	"k8s.io/apiserver/pkg/util/compatibility"
	"k8s.io/client-go/kubernetes"
	restclient "k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	openapicommon "k8s.io/kube-openapi/pkg/common"
	"k8s.io/kube-openapi/pkg/validation/spec"
	"skein.io/skein/gossip/identity"
)

// An API server of another group, as real ones are: of upstream's library, with authentication and authorization delegated to this API.

var boltGV = schema.GroupVersion{Group: "agg.test.skein.io", Version: "v1"}

type Bolt struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	// By is who made it, as this server was told.
	By   string `json:"by,omitempty"`
	Size int64  `json:"size,omitempty"`
}

type BoltList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`
	Items           []Bolt `json:"items"`
}

func (b *Bolt) DeepCopyObject() runtime.Object {
	c := *b
	b.ObjectMeta.DeepCopyInto(&c.ObjectMeta)
	return &c
}

func (b *BoltList) DeepCopyObject() runtime.Object {
	c := *b
	c.Items = make([]Bolt, len(b.Items))
	for i := range b.Items {
		c.Items[i] = *b.Items[i].DeepCopyObject().(*Bolt)
	}
	return &c
}

// bolts keeps them in memory.
type bolts struct {
	rest.TableConvertor
	events *watch.Broadcaster

	mu  sync.Mutex
	all map[string]*Bolt
	rv  int
}

func (s *bolts) New() runtime.Object     { return &Bolt{} }
func (s *bolts) NewList() runtime.Object { return &BoltList{} }
func (s *bolts) Destroy()                {}
func (s *bolts) NamespaceScoped() bool   { return true }
func (s *bolts) GetSingularName() string { return "bolt" }

func (s *bolts) Get(ctx context.Context, name string, _ *metav1.GetOptions) (runtime.Object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.all[apirequest.NamespaceValue(ctx)+"/"+name]; b != nil {
		return b.DeepCopyObject(), nil
	}
	return nil, apierrors.NewNotFound(boltGV.WithResource("bolts").GroupResource(), name)
}

func (s *bolts) List(ctx context.Context, _ *metainternal.ListOptions) (runtime.Object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	l := &BoltList{ListMeta: metav1.ListMeta{ResourceVersion: strconv.Itoa(s.rv)}}
	for _, key := range slices.Sorted(maps.Keys(s.all)) {
		if ns := apirequest.NamespaceValue(ctx); ns == "" || strings.HasPrefix(key, ns+"/") {
			l.Items = append(l.Items, *s.all[key].DeepCopyObject().(*Bolt))
		}
	}
	return l, nil
}

func (s *bolts) Watch(context.Context, *metainternal.ListOptions) (watch.Interface, error) {
	return s.events.Watch()
}

func (s *bolts) Create(ctx context.Context, o runtime.Object, _ rest.ValidateObjectFunc, _ *metav1.CreateOptions) (runtime.Object, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rv++
	b := o.DeepCopyObject().(*Bolt)
	user, _ := apirequest.UserFrom(ctx)
	b.Namespace, b.By, b.ResourceVersion = apirequest.NamespaceValue(ctx), fmt.Sprint(user.GetName(), user.GetGroups()), strconv.Itoa(s.rv)
	b.UID = types.UID(fmt.Sprintf("00000000-0000-4000-8000-%012d", s.rv))
	s.all[b.Namespace+"/"+b.Name] = b
	_ = s.events.Action(watch.Added, b.DeepCopyObject())
	return b.DeepCopyObject(), nil
}

func (s *bolts) Delete(ctx context.Context, name string, _ rest.ValidateObjectFunc, _ *metav1.DeleteOptions) (runtime.Object, bool, error) {
	o, err := s.Get(ctx, name, nil)
	if err != nil {
		return nil, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.all, apirequest.NamespaceValue(ctx)+"/"+name)
	_ = s.events.Action(watch.Deleted, o)
	return o, true, nil
}

// echo is a subresource that upgrades the connection.
type echo struct{}

func (echo) New() runtime.Object                               { return &Bolt{} }
func (echo) Destroy()                                          {}
func (echo) ConnectMethods() []string                          { return []string{http.MethodGet, http.MethodPost} }
func (echo) NewConnectOptions() (runtime.Object, bool, string) { return nil, false, "" }
func (echo) Connect(context.Context, string, runtime.Object, rest.Responder) (http.Handler, error) {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		defer conn.Close()
		user, _ := apirequest.UserFrom(r.Context())
		fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\nX-Seen: %s\r\n\r\n", user.GetName())
		_, _ = io.Copy(conn, rw)
	}), nil
}

// review is a subresource that answers as a webhook, always with no.
type review struct{ echo }

func (review) Connect(context.Context, string, runtime.Object, rest.Responder) (http.Handler, error) {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var a admissionreviewv1.AdmissionReview
		if err := json.NewDecoder(r.Body).Decode(&a); err != nil || a.Request == nil {
			http.Error(w, fmt.Sprintf("not a review: %v", err), http.StatusBadRequest)
			return
		}
		user, _ := apirequest.UserFrom(r.Context())
		a.Response = &admissionreviewv1.AdmissionResponse{UID: a.Request.UID, Result: &metav1.Status{Message: "the bolts of " + user.GetName() + " say no"}}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(a) // fails when the caller has gone
	}), nil
}

// extension is a running one.
type extension struct {
	addr    string // where it listens
	ca      []byte
	storage *bolts
}

// startExtension runs an extension API server in the name of a ServiceAccount of namespace ns.
func startExtension(t *testing.T, k kubernetes.Interface, ns string, change ...func(*options.DelegatingAuthenticationOptions)) *extension {
	t.Helper()
	scheme := runtime.NewScheme()
	internal := schema.GroupVersion{Group: boltGV.Group, Version: runtime.APIVersionInternal}
	for _, gv := range []schema.GroupVersion{boltGV, internal} {
		scheme.AddKnownTypes(gv, &Bolt{}, &BoltList{})
	}
	metav1.AddToGroupVersion(scheme, boltGV)
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	scheme.AddUnversionedTypes(schema.GroupVersion{Version: "v1"}, &metav1.Status{}, &metav1.APIVersions{}, &metav1.APIGroupList{}, &metav1.APIGroup{}, &metav1.APIResourceList{})
	if err := scheme.SetVersionPriority(boltGV); err != nil {
		t.Fatal(err)
	}
	codecs := serializer.NewCodecFactory(scheme)
	c := genericapiserver.NewRecommendedConfig(codecs)
	c.EffectiveVersion = compatibility.DefaultBuildEffectiveVersion()
	defs := func(ref openapicommon.ReferenceCallback) map[string]openapicommon.OpenAPIDefinition {
		m := apiextopenapi.GetOpenAPIDefinitions(ref)
		maps.Copy(m, boltDefinitions(ref))
		return m
	}
	c.OpenAPIConfig = genericapiserver.DefaultOpenAPIConfig(defs, openapinamer.NewDefinitionNamer(scheme))
	c.OpenAPIV3Config = genericapiserver.DefaultOpenAPIV3Config(defs, openapinamer.NewDefinitionNamer(scheme))
	c.OpenAPIConfig.Info.Title, c.OpenAPIV3Config.Info.Title = "bolts", "bolts"

	ca, err := identity.NewAuthority("extension", time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	crt, err := ca.IssueServer("bolts", []string{"bolts." + ns + ".svc"}, nil, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalECPrivateKey(crt.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	pair, err := dynamiccertificates.NewStaticCertKeyContent("bolts", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: crt.Certificate[0]}),
		pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: key}))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.SecureServing = &genericapiserver.SecureServingInfo{Listener: l, Cert: pair}
	c.ExternalAddress = l.Addr().String()
	c.LoopbackClientConfig = &restclient.Config{Host: "https://" + c.ExternalAddress, BearerToken: "loopback", TLSClientConfig: restclient.TLSClientConfig{Insecure: true}}
	file := delegateRights(t, k, ns)
	authn, authz := options.NewDelegatingAuthenticationOptions(), options.NewDelegatingAuthorizationOptions()
	authn.RemoteKubeConfigFile, authz.RemoteKubeConfigFile = file, file
	authz.WithAlwaysAllowPaths("/livez", "/healthz")
	for _, f := range change {
		f(authn)
	}
	if err := authn.ApplyTo(&c.Authentication, c.SecureServing, c.OpenAPIConfig); err != nil {
		t.Fatal(err)
	}
	if err := authz.ApplyTo(&c.Authorization); err != nil {
		t.Fatal(err)
	}
	s, err := c.Complete().New("bolts", genericapiserver.NewEmptyDelegate())
	if err != nil {
		t.Fatal(err)
	}
	storage := &bolts{TableConvertor: rest.NewDefaultTableConvertor(boltGV.WithResource("bolts").GroupResource()), events: watch.NewBroadcaster(10, watch.WaitIfChannelFull), all: map[string]*Bolt{}}
	g := genericapiserver.NewDefaultAPIGroupInfo(boltGV.Group, scheme, runtime.NewParameterCodec(scheme), codecs)
	g.VersionedResourcesStorageMap["v1"] = map[string]rest.Storage{"bolts": storage, "bolts/echo": echo{}, "bolts/review": review{}}
	if err := s.InstallAPIGroup(&g); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	prepared := s.PrepareRun()
	go func() { done <- prepared.RunWithContext(ctx) }()
	t.Cleanup(func() {
		storage.events.Shutdown() // ends watches
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return &extension{addr: l.Addr().String(), ca: ca.CertPEM(), storage: storage}
}

// delegateRights makes the ServiceAccount and the bindings that every extension API server's manual asks for, and gives a kubeconfig.
func delegateRights(t *testing.T, k kubernetes.Interface, ns string) string {
	t.Helper()
	ctx := t.Context()
	subject := []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: ns, Name: "default"}}
	reader := &rbacv1.RoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "bolts-" + ns}, Subjects: subject,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: "extension-apiserver-authentication-reader"}}
	if _, err := k.RbacV1().RoleBindings("kube-system").Create(ctx, reader, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	delegator := &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: "bolts-" + ns}, Subjects: subject,
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "system:auth-delegator"}}
	if _, err := k.RbacV1().ClusterRoleBindings().Create(ctx, delegator, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if err := k.RbacV1().RoleBindings("kube-system").Delete(ctx, reader.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		if err := k.RbacV1().ClusterRoleBindings().Delete(ctx, delegator.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	token, err := k.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "default", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	cfg := clientcmdapi.NewConfig()
	cfg.Clusters["c"] = &clientcmdapi.Cluster{Server: cluster.servers[1].tls.URL, CertificateAuthorityData: identity.EncodeCert(cluster.ca.Cert)}
	cfg.AuthInfos["u"] = &clientcmdapi.AuthInfo{Token: token.Status.Token}
	cfg.Contexts["x"] = &clientcmdapi.Context{Cluster: "c", AuthInfo: "u"}
	cfg.CurrentContext = "x"
	file := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*cfg, file); err != nil {
		t.Fatal(err)
	}
	// Rights come to servers through watches.
	sa, err := clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		_, err := client(t, sa).CoreV1().ConfigMaps("kube-system").Get(ctx, "extension-apiserver-authentication", metav1.GetOptions{})
		return err
	})
	return file
}

// service makes a Service whose address leads to where something listens, with an EndpointSlice that a controller would make.
func service(t *testing.T, k kubernetes.Interface, ns, name, addr string) {
	t.Helper()
	svc, err := k.CoreV1().Services(ns).Create(t.Context(), &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "https", Port: 443}}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	key := net.JoinHostPort(svc.Spec.ClusterIP, "443")
	cluster.routes.Store(key, addr)
	t.Cleanup(func() {
		cluster.routes.Delete(key)
		_ = k.CoreV1().Services(ns).Delete(context.Background(), name, metav1.DeleteOptions{}) // its address is of use to others
	})
	endpoints(t, k, ns, name)
}

func endpoints(t *testing.T, k kubernetes.Interface, ns, name string) {
	t.Helper()
	if _, err := k.DiscoveryV1().EndpointSlices(ns).Create(t.Context(), &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}}, AddressType: discoveryv1.AddressTypeIPv4,
		Ports:     []discoveryv1.EndpointPort{{Name: ptr("https"), Port: ptr(int32(8443)), Protocol: ptr(corev1.ProtocolTCP)}},
		Endpoints: []discoveryv1.Endpoint{{Addresses: []string{"192.0.2.20"}, Conditions: discoveryv1.EndpointConditions{Ready: ptr(true)}}},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func boltDefinitions(ref openapicommon.ReferenceCallback) map[string]openapicommon.OpenAPIDefinition {
	pkg := "skein.io/skein/node/api."
	str := spec.Schema{SchemaProps: spec.SchemaProps{Type: []string{"string"}}}
	meta := func(name string) spec.Schema {
		return spec.Schema{SchemaProps: spec.SchemaProps{Default: map[string]any{}, Ref: ref(name)}}
	}
	object, list := metav1.ObjectMeta{}.OpenAPIModelName(), metav1.ListMeta{}.OpenAPIModelName()
	num := spec.Schema{SchemaProps: spec.SchemaProps{Type: []string{"integer"}, Format: "int64", Description: "Size of a bolt in millimetres."}}
	return map[string]openapicommon.OpenAPIDefinition{
		pkg + "Bolt": {
			Schema: spec.Schema{SchemaProps: spec.SchemaProps{Type: []string{"object"}, Description: "Bolt holds things together.", Properties: map[string]spec.Schema{
				"apiVersion": str, "kind": str, "metadata": meta(object), "by": str, "size": num}}},
			Dependencies: []string{object},
		},
		pkg + "BoltList": {
			Schema: spec.Schema{SchemaProps: spec.SchemaProps{Type: []string{"object"}, Properties: map[string]spec.Schema{
				"apiVersion": str, "kind": str, "metadata": meta(list),
				"items": {SchemaProps: spec.SchemaProps{Type: []string{"array"}, Items: &spec.SchemaOrArray{Schema: &spec.Schema{SchemaProps: spec.SchemaProps{Ref: ref(pkg + "Bolt")}}}}}}}},
			Dependencies: []string{list, pkg + "Bolt"},
		},
	}
}

func base64Of(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

func definitions(t *testing.T) apiextclient.CustomResourceDefinitionInterface {
	t.Helper()
	c, err := apiextclient.NewForConfig(cluster.as(cluster.servers[0], "admin", "system:masters"))
	if err != nil {
		t.Fatal(err)
	}
	return c.CustomResourceDefinitions()
}
