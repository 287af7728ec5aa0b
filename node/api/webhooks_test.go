package api

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	admissionreviewv1 "k8s.io/api/admission/v1"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	apiregv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	"skein.io/skein/gossip/identity"
)

// hooks is an HTTPS server of webhooks, one a path.
type hooks struct {
	*httptest.Server
	ca []byte

	mu      sync.Mutex
	answers map[string]func(*admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse
	calls   map[string][]string // what was asked of each path: operation and name
}

// startHooks serves for Service ns/hook, and for its own address.
func startHooks(t *testing.T, ns string) *hooks {
	t.Helper()
	ca, err := identity.NewAuthority("hooks", time.Now(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	crt, err := ca.IssueServer("hook", []string{"hook." + ns + ".svc"}, []netip.Addr{netip.MustParseAddr("127.0.0.1")}, time.Hour, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	h := &hooks{ca: ca.CertPEM(), answers: map[string]func(*admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse{}, calls: map[string][]string{}}
	h.Server = httptest.NewUnstartedServer(h)
	h.TLS = &tls.Config{Certificates: []tls.Certificate{crt}}
	h.Config.ErrorLog = log.New(io.Discard, "", 0) // of handshakes that a test means to fail
	h.StartTLS()
	t.Cleanup(h.Close)
	return h
}

func (h *hooks) addr() string { return strings.TrimPrefix(h.URL, "https://") }

func (h *hooks) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var review admissionreviewv1.AdmissionReview
	if err := json.NewDecoder(r.Body).Decode(&review); err != nil || review.Request == nil {
		http.Error(w, fmt.Sprintf("not a review: %v", err), http.StatusBadRequest)
		return
	}
	h.mu.Lock()
	answer := h.answers[r.URL.Path]
	call := fmt.Sprintf("%s %s", review.Request.Operation, review.Request.Name)
	if *review.Request.DryRun {
		call += " dry"
	}
	h.calls[r.URL.Path] = append(h.calls[r.URL.Path], call)
	h.mu.Unlock()
	if answer == nil {
		http.NotFound(w, r)
		return
	}
	review.Response = answer(review.Request)
	if review.Response == nil { // as long as the caller waits, and longer
		select {
		case <-r.Context().Done():
		case <-time.After(20 * time.Second):
		}
		return
	}
	review.Response.UID, review.Request = review.Request.UID, nil
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(review) // fails when the caller has gone
}

func (h *hooks) asked(path string) []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]string(nil), h.calls[path]...)
}

func (h *hooks) forget() {
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.calls)
}

func allow(*admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse {
	return &admissionreviewv1.AdmissionResponse{Allowed: true}
}

// labelled gives a webhook that sets a label to "yes", unless it is set, once those in need are.
func labelled(name string, need ...string) func(*admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse {
	return func(r *admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse {
		var o metav1.PartialObjectMetadata
		if err := json.Unmarshal(r.Object.Raw, &o); err != nil {
			return &admissionreviewv1.AdmissionResponse{Result: &metav1.Status{Message: err.Error()}}
		}
		resp := &admissionreviewv1.AdmissionResponse{Allowed: true}
		for _, n := range need {
			if o.Labels[n] == "" {
				return resp
			}
		}
		if o.Labels[name] == "" {
			how := admissionreviewv1.PatchTypeJSONPatch
			resp.PatchType, resp.Patch = &how, []byte(fmt.Sprintf(`[{"op":"add","path":"/metadata/labels/%s","value":"yes"}]`, name))
		}
		return resp
	}
}

// hookSpec is what all webhooks of the tests have in common: ConfigMaps with the label "hooked" in one namespace.
type hookSpec struct {
	name, path string
	change     func(*admissionv1.ValidatingWebhook)
}

func (h *hooks) webhook(ns string, s hookSpec) admissionv1.ValidatingWebhook {
	none, fail, exact := admissionv1.SideEffectClassNone, admissionv1.Fail, admissionv1.Exact
	w := admissionv1.ValidatingWebhook{Name: s.name + ".test.skein.io", AdmissionReviewVersions: []string{"v1"}, SideEffects: &none, FailurePolicy: &fail, MatchPolicy: &exact,
		ClientConfig:      admissionv1.WebhookClientConfig{Service: &admissionv1.ServiceReference{Namespace: ns, Name: "hook", Path: &s.path}, CABundle: h.ca},
		NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": ns}},
		ObjectSelector:    &metav1.LabelSelector{MatchLabels: map[string]string{"hooked": "yes"}},
		Rules: []admissionv1.RuleWithOperations{{Operations: []admissionv1.OperationType{admissionv1.OperationAll},
			Rule: admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"configmaps"}}}}}
	if s.change != nil {
		s.change(&w)
	}
	return w
}

// validating registers webhooks that judge and waits until both servers ask them; probe is a name of a ConfigMap that they refuse or allow.
func (h *hooks) validating(t *testing.T, k kubernetes.Interface, ns, name string, specs ...hookSpec) {
	t.Helper()
	c := &admissionv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, s := range specs {
		c.Webhooks = append(c.Webhooks, h.webhook(ns, s))
	}
	if _, err := k.AdmissionregistrationV1().ValidatingWebhookConfigurations().Create(t.Context(), c, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.AdmissionregistrationV1().ValidatingWebhookConfigurations().Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	h.settle(t, ns, specs[0].path)
}

func (h *hooks) mutating(t *testing.T, k kubernetes.Interface, ns, name string, reinvoke admissionv1.ReinvocationPolicyType, specs ...hookSpec) {
	t.Helper()
	c := &admissionv1.MutatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, s := range specs {
		v := h.webhook(ns, s)
		c.Webhooks = append(c.Webhooks, admissionv1.MutatingWebhook{Name: v.Name, ClientConfig: v.ClientConfig, Rules: v.Rules, FailurePolicy: v.FailurePolicy, MatchPolicy: v.MatchPolicy,
			NamespaceSelector: v.NamespaceSelector, ObjectSelector: v.ObjectSelector, SideEffects: v.SideEffects, TimeoutSeconds: v.TimeoutSeconds,
			AdmissionReviewVersions: v.AdmissionReviewVersions, MatchConditions: v.MatchConditions, ReinvocationPolicy: &reinvoke})
	}
	if _, err := k.AdmissionregistrationV1().MutatingWebhookConfigurations().Create(t.Context(), c, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.AdmissionregistrationV1().MutatingWebhookConfigurations().Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	h.settle(t, ns, specs[0].path)
}

// settle waits until both servers have seen a registration: they ask, whatever the answer.
func (h *hooks) settle(t *testing.T, ns, path string) {
	t.Helper()
	for _, s := range cluster.servers {
		h.forget()
		k := client(t, cluster.as(s, "admin", "system:masters"))
		eventually(t, func(ctx context.Context) error {
			_, _ = k.CoreV1().ConfigMaps(ns).Create(ctx, hooked("probe"), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}) // refused, or not
			if len(h.asked(path)) == 0 {
				return fmt.Errorf("%s is not asked", path)
			}
			return nil
		})
	}
	h.forget()
}

func hooked(name string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"hooked": "yes"}}}
}

// warned collects warnings.
type warned struct {
	mu  sync.Mutex
	got []string
}

func (w *warned) HandleWarningHeader(_ int, _, text string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.got = append(w.got, text)
}

func TestValidatingWebhooks(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	h := startHooks(t, ns)
	service(t, k, ns, "hook", h.addr())
	h.answers["/judge"] = func(r *admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse {
		if strings.HasPrefix(r.Name, "bad") {
			return &admissionreviewv1.AdmissionResponse{Result: &metav1.Status{Message: "no " + r.Name + " here", Code: http.StatusTeapot, Reason: "Teapot"}, Warnings: []string{"it is bad"}}
		}
		return &admissionreviewv1.AdmissionResponse{Allowed: true, Warnings: []string{"it is good"}}
	}
	h.answers["/url"] = allow
	url := h.URL + "/url"
	h.validating(t, k, ns, "judge", hookSpec{"judge", "/judge", func(w *admissionv1.ValidatingWebhook) {
		w.MatchConditions = []admissionv1.MatchCondition{{Name: "not-exempt", Expression: `request.operation == "DELETE" || !object.metadata.name.startsWith("exempt")`}}
	}}, hookSpec{"url", "/url", func(w *admissionv1.ValidatingWebhook) {
		w.ClientConfig.Service, w.ClientConfig.URL = nil, &url
	}})
	for i, s := range cluster.servers {
		warnings := &warned{}
		cfg := cluster.as(s, "admin", "system:masters")
		cfg.WarningHandler = warnings
		k := client(t, cfg)
		maps := k.CoreV1().ConfigMaps(ns)
		create := func(m *corev1.ConfigMap, o metav1.CreateOptions) error {
			_, err := maps.Create(ctx, m, o)
			return err
		}
		h.forget()
		if err := create(hooked("bad"), metav1.CreateOptions{}); err == nil || !strings.Contains(err.Error(), `admission webhook "judge.test.skein.io" denied the request: no bad here`) {
			t.Errorf("server %d: refusal: %v", i+1, err)
		} else if status := err.(apierrors.APIStatus).Status(); status.Code != http.StatusTeapot {
			t.Errorf("server %d: refusal with %d", i+1, status.Code)
		}
		if err := create(hooked("good"), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
			t.Errorf("server %d: dry run: %v", i+1, err)
		}
		for _, m := range []*corev1.ConfigMap{hooked("good"), hooked("exempt"), {ObjectMeta: metav1.ObjectMeta{Name: "plain"}}} {
			if err := create(m, metav1.CreateOptions{}); err != nil {
				t.Errorf("server %d: %s: %v", i+1, m.Name, err)
			}
		}
		if _, err := maps.Patch(ctx, "good", "application/merge-patch+json", []byte(`{"data":{"a":"b"}}`), metav1.PatchOptions{}); err != nil {
			t.Errorf("server %d: patch: %v", i+1, err)
		}
		for _, name := range []string{"good", "exempt", "plain"} {
			if err := maps.Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		}
		if got, want := fmt.Sprint(h.asked("/judge")), "[CREATE bad CREATE good dry CREATE good UPDATE good DELETE good DELETE exempt]"; got != want {
			t.Errorf("server %d: asked %s, want %s", i+1, got, want)
		}
		if n := len(h.asked("/url")); n < 5 {
			t.Errorf("server %d: the webhook with a URL was asked %d times", i+1, n)
		}
		if got := fmt.Sprint(warnings.got); !strings.Contains(got, "it is bad") || !strings.Contains(got, "it is good") {
			t.Errorf("server %d: warnings %s", i+1, got)
		}
	}
}

// A webhook that cannot be asked is as bad as its policy says, and no worse.
func TestWebhooksThatFail(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	h := startHooks(t, ns)
	service(t, k, ns, "hook", h.addr())
	h.answers["/slow"] = func(*admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse { return nil }
	h.answers["/bad"] = func(*admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse {
		return &admissionreviewv1.AdmissionResponse{}
	}
	h.answers["/fine"] = allow
	other, err := newFixtureCA()
	if err != nil {
		t.Fatal(err)
	}
	ignore := admissionv1.Ignore
	for _, tc := range []struct {
		name, path string
		change     func(*admissionv1.ValidatingWebhook)
		want       string // in the error; empty: let in
	}{
		{"slow, fail", "/slow", func(w *admissionv1.ValidatingWebhook) { w.TimeoutSeconds = ptr(int32(1)) }, "context deadline exceeded"},
		{"slow, ignore", "/slow", func(w *admissionv1.ValidatingWebhook) { w.TimeoutSeconds, w.FailurePolicy = ptr(int32(1)), &ignore }, ""},
		{"no such path, fail", "/none", nil, "could not find the requested resource"},
		{"no such path, ignore", "/none", func(w *admissionv1.ValidatingWebhook) { w.FailurePolicy = &ignore }, ""},
		{"refuses without a reason, ignore", "/bad", func(w *admissionv1.ValidatingWebhook) { w.FailurePolicy = &ignore }, "denied the request without explanation"},
		{"condition that fails", "/fine", func(w *admissionv1.ValidatingWebhook) {
			w.MatchConditions = []admissionv1.MatchCondition{{Name: "none", Expression: `object.metadata.name == "probe" || object.data.none == "x"`}}
		}, "no such key: none"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h.validating(t, k, ns, "fails", hookSpec{"fails", tc.path, tc.change})
			m, err := k.CoreV1().ConfigMaps(ns).Create(ctx, func() *corev1.ConfigMap { m := hooked("m"); m.Data = map[string]string{"a": "b"}; return m }(), metav1.CreateOptions{})
			if err == nil {
				defer func() {
					// The webhook is asked for this, too.
					_, _ = k.CoreV1().ConfigMaps(ns).Patch(ctx, m.Name, "application/merge-patch+json", []byte(`{"metadata":{"labels":null}}`), metav1.PatchOptions{})
					if err := k.CoreV1().ConfigMaps(ns).Delete(ctx, m.Name, metav1.DeleteOptions{}); err != nil {
						t.Error(err)
					}
				}()
			}
			if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q", err, tc.want)
			}
		})
	}
	t.Run("a certificate of another CA", func(t *testing.T) {
		w := h.webhook(ns, hookSpec{"foreign", "/fine", func(w *admissionv1.ValidatingWebhook) { w.ClientConfig.CABundle = other.CertPEM() }})
		c := &admissionv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "foreign"}, Webhooks: []admissionv1.ValidatingWebhook{w}}
		if _, err := k.AdmissionregistrationV1().ValidatingWebhookConfigurations().Create(ctx, c, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := k.AdmissionregistrationV1().ValidatingWebhookConfigurations().Delete(ctx, "foreign", metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		}()
		eventually(t, func(ctx context.Context) error {
			_, err := k.CoreV1().ConfigMaps(ns).Create(ctx, hooked("x"), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			if err == nil || !strings.Contains(err.Error(), "certificate signed by unknown authority") {
				return fmt.Errorf("got %v", err)
			}
			return nil
		})
	})
}

// Webhooks that change objects act in the order of their names, see what those before them did, and are asked again if they want to be.
func TestMutatingWebhooks(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	h := startHooks(t, ns)
	service(t, k, ns, "hook", h.addr())
	h.answers["/a"], h.answers["/b"] = labelled("a", "b"), labelled("b")
	h.answers["/after"] = func(r *admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse {
		return &admissionreviewv1.AdmissionResponse{Allowed: strings.Contains(string(r.Object.Raw), `"a":"yes"`) || r.Name == "probe", Result: &metav1.Status{Message: "the judge saw it before the others changed it"}}
	}
	h.mutating(t, k, ns, "m1", admissionv1.IfNeededReinvocationPolicy, hookSpec{"a", "/a", nil})
	h.mutating(t, k, ns, "m2", admissionv1.NeverReinvocationPolicy, hookSpec{"b", "/b", nil})
	h.validating(t, k, ns, "v", hookSpec{"after", "/after", nil})
	m, err := k.CoreV1().ConfigMaps(ns).Create(ctx, hooked("m"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if m.Labels["a"] != "yes" || m.Labels["b"] != "yes" {
		t.Errorf("labels %v", m.Labels)
	}
	if a, b := len(h.asked("/a")), len(h.asked("/b")); a != 2 || b != 1 {
		t.Errorf("asked %d and %d times, want 2 and 1", a, b)
	}
	h.answers["/b"] = func(*admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse {
		how := admissionreviewv1.PatchTypeJSONPatch
		return &admissionreviewv1.AdmissionResponse{Allowed: true, PatchType: &how, Patch: []byte(`[{"op":"remove","path":"/nothing"}]`)}
	}
	if _, err := k.CoreV1().ConfigMaps(ns).Create(ctx, hooked("n"), metav1.CreateOptions{}); !apierrors.IsInternalError(err) {
		t.Errorf("a patch that does not apply: %v", err)
	}
}

// A webhook may be served by an aggregated API server, and so be called by way of this API itself.
func TestWebhookOfAnAggregatedServer(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	ext := startExtension(t, k, ns)
	service(t, k, ns, "bolts", ext.addr)
	register(t, ns, func(s *apiregv1.APIServiceSpec) { s.CABundle = ext.ca })
	awaitAvailable(t, "Passed")
	path := "/apis/" + boltGV.String() + "/namespaces/" + ns + "/bolts/x/review"
	c := &admissionv1.ValidatingWebhookConfiguration{ObjectMeta: metav1.ObjectMeta{Name: "aggregated"}, Webhooks: []admissionv1.ValidatingWebhook{
		(&hooks{}).webhook(ns, hookSpec{"aggregated", path, func(w *admissionv1.ValidatingWebhook) {
			w.ClientConfig = admissionv1.WebhookClientConfig{Service: &admissionv1.ServiceReference{Namespace: "default", Name: "kubernetes", Path: &path}, CABundle: identity.EncodeCert(cluster.ca.Cert)}
		}})}}
	if _, err := k.AdmissionregistrationV1().ValidatingWebhookConfigurations().Create(ctx, c, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := k.AdmissionregistrationV1().ValidatingWebhookConfigurations().Delete(ctx, c.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	}()
	for i, s := range cluster.servers {
		k := client(t, cluster.as(s, "admin", "system:masters"))
		eventually(t, func(ctx context.Context) error {
			_, err := k.CoreV1().ConfigMaps(ns).Create(ctx, hooked("refused"), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			if err == nil || !strings.Contains(err.Error(), "denied the request: the bolts of system:apiserver say no") {
				return fmt.Errorf("server %d: %v", i+1, err)
			}
			return nil
		})
	}
}

// Rules of one version of a group catch requests of all (matchPolicy Equivalent), and those of a subresource only it.
func TestWebhookRules(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	h := startHooks(t, ns)
	service(t, k, ns, "hook", h.addr())
	var mu sync.Mutex
	var seen []string
	h.answers["/see"] = func(r *admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse {
		mu.Lock()
		defer mu.Unlock()
		seen = append(seen, fmt.Sprintf("%s %s/%s asked as %s", r.Operation, r.Resource.Resource, r.SubResource, r.RequestKind.Kind))
		return &admissionreviewv1.AdmissionResponse{Allowed: true}
	}
	h.answers["/probe"] = allow
	h.validating(t, k, ns, "rules", hookSpec{"probe", "/probe", nil}, hookSpec{"rules", "/see", func(w *admissionv1.ValidatingWebhook) {
		equivalent := admissionv1.Equivalent
		w.MatchPolicy, w.ObjectSelector = &equivalent, nil
		w.Rules = []admissionv1.RuleWithOperations{
			{Operations: []admissionv1.OperationType{admissionv1.Update}, Rule: admissionv1.Rule{APIGroups: []string{"apps"}, APIVersions: []string{"v1"}, Resources: []string{"deployments/scale"}}},
			{Operations: []admissionv1.OperationType{admissionv1.Connect}, Rule: admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"pods/*"}}},
			{Operations: []admissionv1.OperationType{admissionv1.Create}, Rule: admissionv1.Rule{APIGroups: []string{"events.k8s.io"}, APIVersions: []string{"v1"}, Resources: []string{"events"}}},
		}
	}})
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "d"}, Spec: appsv1.DeploymentSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}},
		Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"a": "b"}}, Spec: simplePod("x").Spec}}}
	if _, err := k.AppsV1().Deployments(ns).Create(ctx, d, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.AppsV1().Deployments(ns).Patch(ctx, "d", "application/merge-patch+json", []byte(`{"spec":{"replicas":3}}`), metav1.PatchOptions{}, "scale"); err != nil {
		t.Fatal(err)
	}
	bound(t, k, ns, "p", "nowhere", nil)
	err := k.CoreV1().RESTClient().Post().Namespace(ns).Resource("pods").Name("p").SubResource("exec").Param("command", "ls").Do(ctx).Error()
	if err == nil {
		t.Error("exec in a pod of no node")
	}
	if _, err := k.CoreV1().Events(ns).Create(ctx, &corev1.Event{ObjectMeta: metav1.ObjectMeta{Name: "e"}, InvolvedObject: corev1.ObjectReference{Namespace: ns}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if got, want := fmt.Sprint(seen), "[UPDATE deployments/scale asked as Scale CONNECT pods/exec asked as PodExecOptions CREATE events/ asked as Event]"; got != want {
		t.Errorf("asked %s\nwant %s", got, want)
	}
}
