package api

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	jose "github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	restclient "k8s.io/client-go/rest"
	"skein.io/skein/node/api/access"
)

// another starts one more server of the cluster, for this test.
func another(t *testing.T, change func(*Config)) *running {
	t.Helper()
	cfg := cluster.config("n3")
	change(&cfg)
	s, err := cluster.start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// holderOf asks a server who the holder of a token is.
func holderOf(ctx context.Context, t *testing.T, s *running, token string) (authenticationv1.UserInfo, error) {
	t.Helper()
	c := cluster.anonymous(s)
	c.BearerToken = token
	me, err := client(t, c).AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil {
		return authenticationv1.UserInfo{}, err
	}
	return me.Status.UserInfo, nil
}

// get sends a raw request and returns the status and the answer.
func get(t *testing.T, c *restclient.Config, path string) (int, string) {
	t.Helper()
	hc, err := restclient.HTTPClientFor(c)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := hc.Get(c.Host + path)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// Anonymous requests get health, the version and discovery; anything else is not even looked up, whatever a role would allow.
func TestAnonymousOnlyForHealthAndDiscovery(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	nobody := cluster.anonymous(cluster.servers[0])
	ns := namespace(t, k)
	if _, err := k.RbacV1().RoleBindings(ns).Create(ctx, roleBinding("view", "Group", "system:unauthenticated"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]int{
		"/livez": 200, "/livez/ping": 403, "/readyz": 200, "/readyz?verbose": 200, "/healthz": 200, "/version": 200,
		"/api": 200, "/api/v1": 200, "/apis": 200, "/apis/apps/v1": 200, "/apis/apps": 200,
		"/.well-known/openid-configuration": 200, "/openid/v1/jwks": 200,
		"/": 401, "/metrics": 401, "/openapi/v2": 401, "/openapi/v3": 401, "/debug/pprof/": 401, "/debug/api_priority_and_fairness/dump_requests": 401,
		"/api/v1/nodes": 401, "/api/v1/namespaces/" + ns + "/pods": 401, "/apis/apps/v1/deployments": 401, "/api/v1/namespaces/kube-public/configmaps/cluster-info": 401,
		"/apis/apps/v1/nonsense": 401, "/livezz": 401, "/logs/": 401, "/skein/v1/members": 401, "/api/v1/namespaces/x/services/y/proxy/livez": 401,
	} {
		eventually(t, func(context.Context) error { // roles are read by informers
			if got, body := get(t, nobody, path); got != want {
				return fmt.Errorf("%s: %d, want %d: %.200s", path, got, want, body)
			}
			return nil
		})
	}
}

func TestBootstrapTokens(t *testing.T) {
	ctx, k, s := t.Context(), admin(t), cluster.servers[1]
	put := func(id, secret string, more map[string]string) {
		t.Helper()
		data := map[string]string{"token-id": id, "token-secret": secret, "usage-bootstrap-authentication": "true"}
		for key, v := range more {
			data[key] = v
		}
		_, err := k.CoreV1().Secrets("kube-system").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "bootstrap-token-" + id},
			Type: corev1.SecretTypeBootstrapToken, StringData: data}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = k.CoreV1().Secrets("kube-system").Delete(context.WithoutCancel(ctx), "bootstrap-token-"+id, metav1.DeleteOptions{})
		})
	}
	put("aaaaaa", "0123456789abcdef", map[string]string{"auth-extra-groups": "system:bootstrappers:lab"})
	put("bbbbbb", "0123456789abcdef", map[string]string{"expiration": time.Now().Add(-time.Hour).UTC().Format(time.RFC3339)})
	put("cccccc", "0123456789abcdef", map[string]string{"usage-bootstrap-authentication": "false"})
	eventually(t, func(ctx context.Context) error {
		me, err := holderOf(ctx, t, s, "aaaaaa.0123456789abcdef")
		if err != nil {
			return err
		}
		if me.Username != "system:bootstrap:aaaaaa" || !slices.Equal(me.Groups, []string{"system:bootstrappers", "system:bootstrappers:lab", "system:authenticated"}) {
			t.Errorf("the token is %+v", me)
		}
		return nil
	})
	for _, token := range []string{"aaaaaa.0123456789abcdee", "bbbbbb.0123456789abcdef", "cccccc.0123456789abcdef", "dddddd.0123456789abcdef"} {
		if me, err := holderOf(ctx, t, s, token); !apierrors.IsUnauthorized(err) {
			t.Errorf("token %s is %+v, %v", token, me, err)
		}
	}
	if err := k.CoreV1().Secrets("kube-system").Delete(ctx, "bootstrap-token-aaaaaa", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error { // a verdict is remembered for verdictTTL
		if _, err := holderOf(ctx, t, s, "aaaaaa.0123456789abcdef"); !apierrors.IsUnauthorized(err) {
			return fmt.Errorf("a deleted token: %v", err)
		}
		return nil
	})
}

// What a ServiceAccount token is bound to, for whom it is and until when, each counts.
func TestTokensAreBound(t *testing.T) {
	ctx, k, s := t.Context(), admin(t), cluster.servers[1]
	ns := namespace(t, k)
	secret, err := k.CoreV1().Secrets(ns).Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "s"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	node := makeNode(t, k, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "bound"}})
	pod, err := k.CoreV1().Pods(ns).Create(ctx, simplePod("p"), metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ask := func(spec authenticationv1.TokenRequestSpec) string {
		t.Helper()
		tr, err := k.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "default", &authenticationv1.TokenRequest{Spec: spec}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return tr.Status.Token
	}
	now := int64(0)
	for kind, c := range map[string]struct {
		ref    authenticationv1.BoundObjectReference
		remove func() error
	}{
		"Secret": {authenticationv1.BoundObjectReference{Name: "s", UID: secret.UID}, func() error { return k.CoreV1().Secrets(ns).Delete(ctx, "s", metav1.DeleteOptions{}) }},
		"Node":   {authenticationv1.BoundObjectReference{Name: "bound", UID: node.UID}, func() error { return k.CoreV1().Nodes().Delete(ctx, "bound", metav1.DeleteOptions{}) }},
		"Pod": {authenticationv1.BoundObjectReference{Name: "p", UID: pod.UID}, func() error {
			return k.CoreV1().Pods(ns).Delete(ctx, "p", metav1.DeleteOptions{GracePeriodSeconds: &now})
		}},
	} {
		c.ref.APIVersion, c.ref.Kind = "v1", kind
		// Two tokens: the verdict about the first is remembered for a while.
		before, after := ask(authenticationv1.TokenRequestSpec{BoundObjectRef: &c.ref}), ask(authenticationv1.TokenRequestSpec{BoundObjectRef: &c.ref, ExpirationSeconds: ptr(int64(4000))})
		if me, err := holderOf(ctx, t, s, before); err != nil || me.Username != "system:serviceaccount:"+ns+":default" || len(me.Extra) == 0 {
			t.Errorf("bound to a %s: %+v, %v", kind, me, err)
		}
		if err := c.remove(); err != nil {
			t.Fatal(err)
		}
		if me, err := holderOf(ctx, t, s, after); !apierrors.IsUnauthorized(err) {
			t.Errorf("bound to a %s that is gone: %+v, %v", kind, me, err)
		}
	}
	// For somebody else: not for the API, but a review that names the audience finds it good.
	vault := ask(authenticationv1.TokenRequestSpec{Audiences: []string{"vault"}})
	if me, err := holderOf(ctx, t, s, vault); !apierrors.IsUnauthorized(err) {
		t.Errorf("another's token: %+v, %v", me, err)
	}
	r, err := k.AuthenticationV1().TokenReviews().Create(ctx, &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: vault, Audiences: []string{"vault", "x"}}}, metav1.CreateOptions{})
	if err != nil || !r.Status.Authenticated || !slices.Equal(r.Status.Audiences, []string{"vault"}) {
		t.Errorf("review for its audience: %+v, %v", r, err)
	}
	// Expired, by the cluster's own key.
	sa, err := k.CoreV1().ServiceAccounts(ns).Get(ctx, "default", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	claims := func(exp time.Time) map[string]any {
		return map[string]any{"iss": access.DefaultIssuer, "aud": []string{access.DefaultIssuer}, "sub": "system:serviceaccount:" + ns + ":default",
			"iat": exp.Add(-time.Hour).Unix(), "nbf": exp.Add(-time.Hour).Unix(), "exp": exp.Unix(),
			"kubernetes.io": map[string]any{"namespace": ns, "serviceaccount": map[string]any{"name": "default", "uid": string(sa.UID)}}}
	}
	if me, err := holderOf(ctx, t, s, sign(t, cluster.saKey, "", claims(time.Now().Add(time.Hour)))); err != nil {
		t.Errorf("a token of now: %+v, %v", me, err)
	}
	if me, err := holderOf(ctx, t, s, sign(t, cluster.saKey, "", claims(time.Now().Add(-time.Minute)))); !apierrors.IsUnauthorized(err) {
		t.Errorf("an expired token: %+v, %v", me, err)
	}
	if _, err := k.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "default", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{ExpirationSeconds: ptr(int64(60))}}, metav1.CreateOptions{}); !apierrors.IsInvalid(err) {
		t.Errorf("a life of a minute: %v", err)
	}
}

// sign makes a JSON web token.
func sign(t *testing.T, key *ecdsa.PrivateKey, kid string, claims map[string]any) string {
	t.Helper()
	o := &jose.SignerOptions{}
	if kid != "" {
		o = o.WithHeader("kid", kid)
	}
	s, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: key}, o)
	if err != nil {
		t.Fatal(err)
	}
	token, err := jwt.Signed(s).Claims(claims).Serialize()
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// issuer is an OpenID Connect provider, as far as API servers ask it.
type issuer struct {
	*httptest.Server
	key *ecdsa.PrivateKey
	ca  string // PEM
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{key: key}
	mux := http.NewServeMux()
	answer := func(v any) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(v)
		}
	}
	mux.HandleFunc("/keys", answer(jose.JSONWebKeySet{Keys: []jose.JSONWebKey{{Key: key.Public(), KeyID: "k1", Algorithm: "ES256", Use: "sig"}}}))
	mux.HandleFunc("/.well-known/openid-configuration", func(w http.ResponseWriter, r *http.Request) {
		answer(map[string]any{"issuer": i.URL, "jwks_uri": i.URL + "/keys", "id_token_signing_alg_values_supported": []string{"ES256"}})(w, r)
	})
	i.Server = httptest.NewTLSServer(mux)
	t.Cleanup(i.Close)
	i.ca = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw}))
	return i
}

// configuration is an AuthenticationConfiguration that trusts it; prefix begins the names of its users.
func (i *issuer) configuration(prefix string) string {
	b, err := json.Marshal(map[string]any{
		"apiVersion": "apiserver.config.k8s.io/v1", "kind": "AuthenticationConfiguration",
		"jwt": []any{map[string]any{
			"issuer": map[string]any{"url": i.URL, "audiences": []string{"skein", "other"}, "audienceMatchPolicy": "MatchAny", "certificateAuthority": i.ca},
			"claimValidationRules": []any{map[string]any{"expression": "claims.hd == 'example.com'", "message": "only of example.com"},
				map[string]any{"expression": "claims.email_verified == true", "message": "not verified"}},
			"claimMappings": map[string]any{
				"username": map[string]any{"expression": fmt.Sprintf("%q + claims.email.split('@')[0]", prefix)},
				"groups":   map[string]any{"expression": "claims.roles"},
				"uid":      map[string]any{"claim": "sub"},
				"extra":    []any{map[string]any{"key": "example.com/tenant", "valueExpression": "claims.tenant"}},
			},
			"userValidationRules": []any{map[string]any{"expression": "!user.username.startsWith('system:')", "message": "reserved"}},
		}},
	})
	if err != nil {
		panic(err)
	}
	return string(b)
}

func TestOpenIDConnect(t *testing.T) {
	ctx, i := t.Context(), newIssuer(t)
	path := file(t, "authn.json", i.configuration("oidc:"))
	s := another(t, func(c *Config) { c.Access.Authentication = path })
	claims := func(change map[string]any) map[string]any {
		c := map[string]any{"iss": i.URL, "aud": "skein", "sub": "u-1", "exp": time.Now().Add(time.Hour).Unix(), "iat": time.Now().Unix(),
			"email": "jane@example.com", "email_verified": true, "hd": "example.com", "roles": []string{"dev", "ops"}, "tenant": "t1"}
		for k, v := range change {
			c[k] = v
		}
		return c
	}
	eventually(t, func(ctx context.Context) error { // the keys are fetched behind the scenes
		me, err := holderOf(ctx, t, s, sign(t, i.key, "k1", claims(nil)))
		if err != nil {
			return err
		}
		if me.Username != "oidc:jane" || me.UID != "u-1" || !slices.Equal(me.Groups, []string{"dev", "ops", "system:authenticated"}) || me.Extra["example.com/tenant"][0] != "t1" {
			t.Errorf("the token is %+v", me)
		}
		return nil
	})
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for what, token := range map[string]string{
		"another audience":        sign(t, i.key, "k1", claims(map[string]any{"aud": "nobody"})),
		"expired":                 sign(t, i.key, "k1", claims(map[string]any{"exp": time.Now().Add(-time.Minute).Unix()})),
		"another key":             sign(t, stranger, "k1", claims(nil)),
		"another issuer":          sign(t, i.key, "k1", claims(map[string]any{"iss": "https://other.example.com"})),
		"a claim that is refused": sign(t, i.key, "k1", claims(map[string]any{"hd": "example.org"})),
		"no such claim":           sign(t, i.key, "k1", map[string]any{"iss": i.URL, "aud": "skein", "exp": time.Now().Add(time.Hour).Unix()}),
	} {
		if me, err := holderOf(ctx, t, s, token); !apierrors.IsUnauthorized(err) {
			t.Errorf("%s: %+v, %v", what, me, err)
		}
	}
	// Everything else goes on as before: certificates, ServiceAccounts, and who is anonymous.
	if _, err := client(t, cluster.as(s, "admin", "system:masters")).CoreV1().Nodes().List(ctx, metav1.ListOptions{}); err != nil {
		t.Error(err)
	}
	if code, _ := get(t, cluster.anonymous(s), "/livez"); code != http.StatusOK {
		t.Errorf("anonymous /livez: %d", code)
	}
	if code, _ := get(t, cluster.anonymous(s), "/api/v1/nodes"); code != http.StatusUnauthorized {
		t.Errorf("anonymous nodes: %d", code)
	}

	// A faulty version is not taken over, a good one is, without a restart.
	for _, text := range []string{strings.Replace(i.configuration("broken:"), "claims.email", "claims.email.nonsense(", 1), i.configuration("new:")} {
		replace(t, path, text)
		if strings.Contains(text, "broken") {
			continue
		}
		n := 0
		eventually(t, func(ctx context.Context) error {
			n++ // a token that no verdict is remembered of
			me, err := holderOf(ctx, t, s, sign(t, i.key, "k1", claims(map[string]any{"n": n})))
			if err == nil && me.Username != "new:jane" {
				if me.Username != "oidc:jane" {
					t.Errorf("the token is %+v", me)
				}
				err = fmt.Errorf("still %s", me.Username)
			}
			return err
		})
	}
}

// replace puts another text in place of a file, as configuration management does.
func replace(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// hook is a webhook with TLS that sees who calls it.
type hook struct {
	*httptest.Server
	mu     sync.Mutex // guards bodies
	bodies []string
}

func newHook(t *testing.T, answer func(body []byte) any) *hook {
	t.Helper()
	h := &hook{}
	h.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		h.mu.Lock()
		h.bodies = append(h.bodies, string(b))
		h.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(answer(b))
	}))
	t.Cleanup(h.Close)
	return h
}

func (h *hook) seen() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.bodies)
}

// kubeconfig is a file that says how to reach it.
func (h *hook) kubeconfig(t *testing.T) string {
	t.Helper()
	ca := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(ca, pemOf(h.Certificate()), 0o600); err != nil {
		t.Fatal(err)
	}
	return file(t, "hook.kubeconfig", fmt.Sprintf(`{"apiVersion":"v1","kind":"Config","current-context":"c","contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],
"clusters":[{"name":"c","cluster":{"server":%q,"certificate-authority":%q}}],"users":[{"name":"u","user":{}}]}`, h.URL, ca))
}

func pemOf(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

func TestTokenWebhook(t *testing.T) {
	h := newHook(t, func(body []byte) any {
		var r authenticationv1.TokenReview
		_ = json.Unmarshal(body, &r)
		r.Status = authenticationv1.TokenReviewStatus{}
		if name, ok := strings.CutPrefix(r.Spec.Token, "card-"); ok {
			r.Status = authenticationv1.TokenReviewStatus{Authenticated: true, User: authenticationv1.UserInfo{Username: name, UID: "7", Groups: []string{"cards"}}}
		}
		return r
	})
	s := another(t, func(c *Config) { c.Access.TokenWebhook = h.kubeconfig(t) })
	for range 3 { // asked once
		if me, err := holderOf(t.Context(), t, s, "card-jim"); err != nil || me.Username != "jim" || me.UID != "7" || !slices.Equal(me.Groups, []string{"cards", "system:authenticated"}) {
			t.Fatalf("the token is %+v, %v", me, err)
		}
	}
	if _, err := holderOf(t.Context(), t, s, "coin-jim"); !apierrors.IsUnauthorized(err) {
		t.Errorf("a token that the webhook does not know: %v", err)
	}
	if n := len(h.seen()); n != 2 {
		t.Errorf("the webhook was asked %d times: %v", n, h.seen())
	}
	h.Close()
	if _, err := holderOf(t.Context(), t, s, "card-joe"); !apierrors.IsUnauthorized(err) {
		t.Errorf("a webhook that does not answer: %v", err)
	}
	if me, err := holderOf(t.Context(), t, s, "card-jim"); err != nil {
		t.Errorf("an answer that is remembered: %+v, %v", me, err)
	}
}
