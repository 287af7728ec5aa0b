package api

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/watch"
	appsapply "k8s.io/client-go/applyconfigurations/apps/v1"
	coreapply "k8s.io/client-go/applyconfigurations/core/v1"
	metaapply "k8s.io/client-go/applyconfigurations/meta/v1"
	restclient "k8s.io/client-go/rest"
)

// Objects written through one server are read and watched through the other.
func TestCreateReadUpdateDeleteWatch(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	other := client(t, cluster.as(cluster.servers[1], "admin", "system:masters"))
	ns := namespace(t, k)
	w, err := other.CoreV1().ConfigMaps(ns).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	made, err := k.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{GenerateName: "a-"}, Data: map[string]string{"k": "1"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	name := made.Name
	if !strings.HasPrefix(name, "a-") || made.UID == "" || made.ResourceVersion == "" {
		t.Fatalf("created %+v", made.ObjectMeta)
	}
	read, err := other.CoreV1().ConfigMaps(ns).Get(ctx, name, metav1.GetOptions{})
	if err != nil || read.Data["k"] != "1" {
		t.Fatalf("read %v, %v", read.Data, err)
	}
	read.Data["k"] = "2"
	if _, err := k.CoreV1().ConfigMaps(ns).Update(ctx, read, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.CoreV1().ConfigMaps(ns).Update(ctx, made, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Fatalf("stale update: %v", err)
	}
	for _, p := range []struct {
		t    types.PatchType
		body string
	}{{types.JSONPatchType, `[{"op":"add","path":"/data/j","value":"x"}]`}, {types.MergePatchType, `{"data":{"m":"x"}}`}, {types.StrategicMergePatchType, `{"data":{"s":"x"}}`}} {
		if _, err := k.CoreV1().ConfigMaps(ns).Patch(ctx, name, p.t, []byte(p.body), metav1.PatchOptions{}); err != nil {
			t.Fatalf("%s: %v", p.t, err)
		}
	}
	if err := k.CoreV1().ConfigMaps(ns).Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	for i, want := range []watch.EventType{watch.Added, watch.Modified, watch.Modified, watch.Modified, watch.Modified, watch.Deleted} {
		e, ok := <-w.ResultChan()
		if !ok || e.Type != want {
			t.Fatalf("event %d: %v %v, want %v", i, ok, e.Type, want)
		}
		if cm := e.Object.(*corev1.ConfigMap); want == watch.Deleted && len(cm.Data) != 4 {
			t.Fatalf("last state %v", cm.Data)
		}
	}
	if _, err := other.CoreV1().ConfigMaps(ns).Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Fatalf("get after delete: %v", err)
	}
}

func TestListPages(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	for i := range 5 {
		if _, err := k.CoreV1().Secrets(ns).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("s", i)}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	var names []string
	o := metav1.ListOptions{Limit: 2}
	for {
		l, err := k.CoreV1().Secrets(ns).List(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range l.Items {
			names = append(names, s.Name)
		}
		if o.Continue = l.Continue; o.Continue == "" {
			break
		}
	}
	if got := strings.Join(names, ","); got != "s0,s1,s2,s3,s4" {
		t.Fatalf("pages gave %s", got)
	}
}

// Informers ask for the initial state as watch events.
func TestWatchListSendsInitialEvents(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	if _, err := k.CoreV1().Secrets(ns).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "first"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	yes := true
	w, err := k.CoreV1().Secrets(ns).Watch(ctx, metav1.ListOptions{SendInitialEvents: &yes, AllowWatchBookmarks: true, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	if e := <-w.ResultChan(); e.Type != watch.Added || e.Object.(*corev1.Secret).Name != "first" {
		t.Fatalf("first event %+v", e)
	}
	e := <-w.ResultChan()
	if e.Type != watch.Bookmark || e.Object.(*corev1.Secret).Annotations[metav1.InitialEventsAnnotationKey] != "true" {
		t.Fatalf("second event %+v", e)
	}
}

func TestServerSideApply(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	labels := map[string]string{"app": "web"}
	deployment := func(replicas int32) *appsapply.DeploymentApplyConfiguration {
		return appsapply.Deployment("web", ns).WithSpec(appsapply.DeploymentSpec().WithReplicas(replicas).
			WithSelector(metaapply.LabelSelector().WithMatchLabels(labels)).
			WithTemplate(coreapply.PodTemplateSpec().WithLabels(labels).WithSpec(coreapply.PodSpec().
				WithContainers(coreapply.Container().WithName("c").WithImage("example/image")))))
	}
	api := k.AppsV1().Deployments(ns)
	if _, err := api.Apply(ctx, deployment(2), metav1.ApplyOptions{FieldManager: "a"}); err != nil {
		t.Fatal(err)
	}
	_, err := api.Apply(ctx, deployment(3), metav1.ApplyOptions{FieldManager: "b"})
	if !apierrors.IsConflict(err) || !strings.Contains(err.Error(), `conflict with "a": .spec.replicas`) {
		t.Fatalf("second manager: %v", err)
	}
	d, err := api.Apply(ctx, deployment(3), metav1.ApplyOptions{FieldManager: "b", Force: true})
	if err != nil || *d.Spec.Replicas != 3 {
		t.Fatalf("forced: %v", err)
	}
	// A list with keys is merged, not replaced; and the subresource's manager is kept apart.
	more := appsapply.Deployment("web", ns).WithSpec(appsapply.DeploymentSpec().WithTemplate(coreapply.PodTemplateSpec().WithSpec(
		coreapply.PodSpec().WithContainers(coreapply.Container().WithName("side").WithImage("example/side")))))
	if d, err = api.Apply(ctx, more, metav1.ApplyOptions{FieldManager: "c"}); err != nil || len(d.Spec.Template.Spec.Containers) != 2 {
		t.Fatalf("merged containers: %v, %v", d.Spec.Template.Spec.Containers, err)
	}
	if _, err := api.ApplyStatus(ctx, appsapply.Deployment("web", ns).WithStatus(appsapply.DeploymentStatus().WithObservedGeneration(1)), metav1.ApplyOptions{FieldManager: "status"}); err != nil {
		t.Fatal(err)
	}
	if d, err = api.Get(ctx, "web", metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	managers := map[string]string{}
	for _, m := range d.ManagedFields {
		managers[m.Manager] = m.Subresource
	}
	if sub, ok := managers["status"]; len(managers) != 4 || !ok || sub != "status" {
		t.Fatalf("managers %v", managers)
	}
}

func TestScale(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	labels := map[string]string{"app": "web"}
	rs := &appsv1.ReplicaSet{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: appsv1.ReplicaSetSpec{Selector: &metav1.LabelSelector{MatchLabels: labels},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: simplePod("x").Spec}}}
	if _, err := k.AppsV1().ReplicaSets(ns).Create(ctx, rs, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s, err := k.AppsV1().ReplicaSets(ns).GetScale(ctx, "web", metav1.GetOptions{})
	if err != nil || s.Spec.Replicas != 1 || s.Status.Selector != "app=web" {
		t.Fatalf("scale %+v, %v", s, err)
	}
	s.Spec.Replicas = 4
	if _, err := k.AppsV1().ReplicaSets(ns).UpdateScale(ctx, "web", s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if got, err := k.AppsV1().ReplicaSets(ns).Get(ctx, "web", metav1.GetOptions{}); err != nil || *got.Spec.Replicas != 4 {
		t.Fatalf("after scaling: %v", err)
	}
}

func TestPodBindingAndDefaults(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	p, err := k.CoreV1().Pods(ns).Create(ctx, simplePod("p"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if p.Spec.ServiceAccountName != "default" || len(p.Spec.Volumes) != 1 || p.Spec.Volumes[0].Projected == nil {
		t.Fatalf("no token was added: %+v", p.Spec)
	}
	for _, tol := range p.Spec.Tolerations {
		if tol.TolerationSeconds == nil || *tol.TolerationSeconds != 10 {
			t.Errorf("toleration %s for %v s, want the eviction grace", tol.Key, tol.TolerationSeconds)
		}
	}
	if len(p.Spec.Tolerations) != 2 {
		t.Errorf("tolerations %v", p.Spec.Tolerations)
	}
	bind := func(node string) error {
		return k.CoreV1().Pods(ns).Bind(ctx, &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: ns}, Target: corev1.ObjectReference{Kind: "Node", Name: node}}, metav1.CreateOptions{})
	}
	if err := bind("n1"); err != nil {
		t.Fatal(err)
	}
	if err := bind("n2"); !apierrors.IsConflict(err) {
		t.Fatalf("second binding: %v", err)
	}
	l, err := k.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=n1"})
	if err != nil || len(l.Items) != 1 {
		t.Fatalf("pods of n1: %d, %v", len(l.Items), err)
	}
}

func TestEvictionHonoursBudget(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	if _, err := k.CoreV1().Pods(ns).Create(ctx, simplePod("p"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	one := intstr.FromInt32(1)
	pdb := &policyv1.PodDisruptionBudget{ObjectMeta: metav1.ObjectMeta{Name: "b"}, Spec: policyv1.PodDisruptionBudgetSpec{MinAvailable: &one, Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "p"}}}}
	pdb, err := k.PolicyV1().PodDisruptionBudgets(ns).Create(ctx, pdb, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	running, err := k.CoreV1().Pods(ns).Get(ctx, "p", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	running.Status.Phase, running.Status.Conditions = corev1.PodRunning, []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	if _, err := k.CoreV1().Pods(ns).UpdateStatus(ctx, running, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	evict := func() error {
		e := &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: "p", Namespace: ns}}
		return k.CoreV1().RESTClient().Post().MaxRetries(0).Namespace(ns).Resource("pods").Name("p").SubResource("eviction").Body(e).Do(ctx).Error()
	}
	if err := evict(); !apierrors.IsTooManyRequests(err) {
		t.Fatalf("eviction against the budget: %v", err)
	}
	if err := k.PolicyV1().PodDisruptionBudgets(ns).Delete(ctx, pdb.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := evict(); err != nil {
		t.Fatal(err)
	}
}

func TestServiceAccountTokens(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	p, err := k.CoreV1().Pods(ns).Create(ctx, simplePod("p"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	tr, err := k.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "default", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		BoundObjectRef: &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: "p", UID: p.UID}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// The other server verifies it, with the same key and a live look at the pod.
	c := cluster.anonymous(cluster.servers[1])
	c.BearerToken = tr.Status.Token
	holder := client(t, c)
	me, err := holder.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil || me.Status.UserInfo.Username != "system:serviceaccount:"+ns+":default" {
		t.Fatalf("token is %q, %v", me.Status.UserInfo.Username, err)
	}
	if _, err := holder.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Fatalf("rights without a role: %v", err)
	}
	review := func(token string) authenticationv1.TokenReviewStatus {
		r, err := k.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return r.Status
	}
	if s := review(tr.Status.Token); !s.Authenticated || s.User.Extra["authentication.kubernetes.io/pod-name"][0] != "p" {
		t.Fatalf("review %+v", s)
	}
	if s := review(tr.Status.Token + "x"); s.Authenticated {
		t.Fatal("a changed token passes")
	}
	for _, path := range []string{"/.well-known/openid-configuration", "/openid/v1/jwks"} {
		b, err := k.Discovery().RESTClient().Get().AbsPath(path).DoRaw(ctx)
		if err != nil || !strings.Contains(string(b), map[bool]string{true: "issuer", false: "ES256"}[strings.Contains(path, "well")]) {
			t.Errorf("%s: %s, %v", path, b, err)
		}
	}
}

func TestWhoMayDoWhat(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	s := cluster.servers[0]
	alice := client(t, cluster.as(s, "alice", "devs"))
	_, err := alice.CoreV1().Secrets(ns).List(ctx, metav1.ListOptions{})
	want := fmt.Sprintf(`secrets is forbidden: User "alice" cannot list resource "secrets" in API group "" in the namespace %q`, ns)
	if !apierrors.IsForbidden(err) || err.Error() != want {
		t.Fatalf("got %v\nwant %s", err, want)
	}
	role, err := k.RbacV1().RoleBindings(ns).Create(ctx, roleBinding("edit", "Group", "devs"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		_, err := alice.CoreV1().Secrets(ns).List(ctx, metav1.ListOptions{})
		return err
	})
	if _, err := alice.CoreV1().Nodes().List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Fatalf("list nodes: %v", err)
	}
	// Nobody gives away what they do not have.
	role.ResourceVersion, role.Name, role.RoleRef.Name = "", "more", "cluster-admin"
	if _, err := alice.RbacV1().RoleBindings(ns).Create(ctx, role, metav1.CreateOptions{}); !apierrors.IsForbidden(err) {
		t.Fatalf("escalation: %v", err)
	}
	nobody := client(t, cluster.anonymous(s))
	if _, err := nobody.CoreV1().Secrets(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsUnauthorized(err) {
		t.Fatalf("anonymous: %v", err)
	}
	if v, err := nobody.Discovery().ServerVersion(); err != nil || v.Major != "1" || v.Minor != "36" {
		t.Fatalf("anonymous version: %+v, %v", v, err)
	}
	c := cluster.anonymous(s)
	c.BearerToken = "nonsense"
	if _, err := client(t, c).CoreV1().Secrets(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsUnauthorized(err) {
		t.Fatalf("bad token: %v", err)
	}
	r, err := k.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{User: "x", Groups: []string{"devs"},
		ResourceAttributes: &authorizationv1.ResourceAttributes{Namespace: ns, Verb: "get", Resource: "secrets"}}}, metav1.CreateOptions{})
	if err != nil || !r.Status.Allowed {
		t.Fatalf("review %+v, %v", r.Status, err)
	}
}

// A certificate of another CA is nobody.
func TestForeignCertificate(t *testing.T) {
	other, err := newFixtureCA()
	if err != nil {
		t.Fatal(err)
	}
	f := *cluster
	f.ca = other
	c := f.as(cluster.servers[0], "admin", "system:masters")
	c.CAData = cluster.anonymous(cluster.servers[0]).CAData
	if _, err := client(t, c).CoreV1().Nodes().List(t.Context(), metav1.ListOptions{}); !apierrors.IsUnauthorized(err) {
		t.Fatalf("got %v", err)
	}
}

func TestBadObjectsAreRefusedByField(t *testing.T) {
	k := admin(t)
	ns := namespace(t, k)
	rest := k.CoreV1().RESTClient()
	for _, tc := range []struct{ name, resource, body, query, want string }{
		{"missing image", "pods", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"x"},"spec":{"containers":[{"name":"c"}]}}`, "",
			`Pod "x" is invalid: spec.containers[0].image: Required value`},
		{"bad name", "configmaps", `{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"A_b"}}`, "", `metadata.name: Invalid value: "A_b"`},
		{"port range", "services", `{"apiVersion":"v1","kind":"Service","metadata":{"name":"x"},"spec":{"ports":[{"port":70000}]}}`, "", `spec.ports[0].port: Invalid value: 70000`},
		{"unknown field, strict", "pods", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"x"},"spec":{"foo":1,"containers":[{"name":"c","image":"i"}]}}`, "Strict",
			`strict decoding error: unknown field "spec.foo"`},
		{"duplicate field, strict", "pods", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"x","name":"y"}}`, "Strict", `duplicate field "metadata.name"`},
		{"wrong type", "pods", `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"x"},"spec":{"containers":"none"}}`, "", "cannot unmarshal string into Go struct field"},
		{"wrong kind", "pods", `{"apiVersion":"v1","kind":"Secret","metadata":{"name":"x"}}`, "", "cannot be handled as a Pod"},
		{"broken JSON", "pods", `{"apiVersion":"v1","kind":`, "", "unexpected end of JSON input"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			r := rest.Post().Namespace(ns).Resource(tc.resource).SetHeader("Content-Type", "application/json").Body([]byte(tc.body))
			if tc.query != "" {
				r = r.Param("fieldValidation", tc.query)
			}
			err := r.Do(t.Context()).Error()
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %v\nwant %s", err, tc.want)
			}
			if code := err.(apierrors.APIStatus).Status().Code; code != 400 && code != 422 {
				t.Fatalf("code %d", code)
			}
		})
	}
}

func TestServiceAddressesAndNodePorts(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	other := client(t, cluster.as(cluster.servers[1], "admin", "system:masters"))
	ns := namespace(t, k)
	svc := func(name string, f func(*corev1.ServiceSpec)) *corev1.Service {
		s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}}
		f(&s.Spec)
		return s
	}
	a, err := k.CoreV1().Services(ns).Create(ctx, svc("a", func(s *corev1.ServiceSpec) { s.Type = corev1.ServiceTypeNodePort }), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	port := a.Spec.Ports[0].NodePort
	if port < 30000 || port > 32767 || !strings.HasPrefix(a.Spec.ClusterIP, "10.96.") {
		t.Fatalf("got %s, node port %d", a.Spec.ClusterIP, port)
	}
	_, err = other.CoreV1().Services(ns).Create(ctx, svc("b", func(s *corev1.ServiceSpec) {
		s.Type, s.Ports[0].NodePort = corev1.ServiceTypeNodePort, port
	}), metav1.CreateOptions{})
	if !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "provided port is already allocated") {
		t.Fatalf("same node port through the other server: %v", err)
	}
	_, err = other.CoreV1().Services(ns).Create(ctx, svc("b", func(s *corev1.ServiceSpec) { s.ClusterIP = a.Spec.ClusterIP }), metav1.CreateOptions{})
	if !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "provided IP is already allocated") {
		t.Fatalf("same address through the other server: %v", err)
	}
	if err := k.CoreV1().Services(ns).Delete(ctx, "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		_, err := other.CoreV1().Services(ns).Create(ctx, svc("b", func(s *corev1.ServiceSpec) {
			s.Type, s.Ports[0].NodePort, s.ClusterIP = corev1.ServiceTypeNodePort, port, a.Spec.ClusterIP
		}), metav1.CreateOptions{})
		return err
	})
}

// A client that asks for too much is told, and the server goes on.
func TestOddRequests(t *testing.T) {
	k := admin(t)
	client := k.CoreV1().RESTClient().(*restclient.RESTClient).Client
	for _, tc := range []struct {
		verb, path string
		code       int
	}{
		{"GET", "/api/v1/nosuch", 404}, {"GET", "/apis/apps/v2", 404}, {"GET", "/api/v1/pods/p", 404}, {"GET", "/nosuch", 404},
		{"GET", "/api/v1/namespaces/default/nodes", 404}, {"GET", "/api/v1/namespaces/default/namespaces", 404},
		{"GET", "/api/v1/configmaps?fieldSelector=metadata.name=x", 200}, {"GET", "/api/v1/namespaces/default/pods?fieldSelector=metadata.name=x", 200},
		{"GET", "/api/v1/pods?watch=1&timeoutSeconds=1&fieldSelector=metadata.name=x", 200}, {"GET", "/api/v1/watch/pods?timeoutSeconds=1", 200},
		{"GET", "/api/v1/nodes?fieldSelector=metadata.name=x", 200}, {"GET", "/api/v1/watch/pods/x", 404},
		{"PUT", "/api/v1/namespaces/default/pods", 405}, {"PATCH", "/api/v1/componentstatuses", 405}, {"POST", "/api/v1/namespaces/default/pods/p", 405},
		{"GET", "/api/v1/pods?fieldSelector=a=b", 400}, {"GET", "/api/v1/pods?continue=abc", 400}, {"GET", "/api/v1/pods?resourceVersion=x", 400},
	} {
		r, err := http.NewRequestWithContext(t.Context(), tc.verb, cluster.servers[0].tls.URL+tc.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != tc.code {
			t.Errorf("%s %s: %s, want %d", tc.verb, tc.path, resp.Status, tc.code)
		}
	}
}
