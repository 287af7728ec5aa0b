package api

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	restclient "k8s.io/client-go/rest"
)

func rule(verb, group string, resources ...string) rbacv1.PolicyRule {
	return rbacv1.PolicyRule{Verbs: strings.Split(verb, ","), APIGroups: []string{group}, Resources: resources}
}

func clusterRole(name string, rules ...rbacv1.PolicyRule) *rbacv1.ClusterRole {
	return &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: name}, Rules: rules}
}

func clusterRoleBinding(name, role, kind, subject string) *rbacv1.ClusterRoleBinding {
	return &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: name},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: role},
		Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: kind, Name: subject}}}
}

// allowed asks as the client itself.
func allowed(ctx context.Context, k kubernetes.Interface, verb, group, resource string) error {
	resource, sub, _ := strings.Cut(resource, "/")
	r, err := k.AuthorizationV1().SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{
		ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: verb, Group: group, Resource: resource, Subresource: sub}}}, metav1.CreateOptions{})
	if err == nil && !r.Status.Allowed {
		err = fmt.Errorf("%s %s.%s: not allowed: %s", verb, resource, group, r.Status.Reason)
	}
	return err
}

// grant gives a user rules in the whole cluster, and waits until they count.
func grant(t *testing.T, k kubernetes.Interface, as kubernetes.Interface, user string, rules ...rbacv1.PolicyRule) {
	t.Helper()
	name := "grant-" + user
	if _, err := k.RbacV1().ClusterRoles().Create(t.Context(), clusterRole(name, rules...), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.RbacV1().ClusterRoleBindings().Create(t.Context(), clusterRoleBinding(name, name, "User", user), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	ctx := context.WithoutCancel(t.Context())
	t.Cleanup(func() {
		_ = k.RbacV1().ClusterRoleBindings().Delete(ctx, name, metav1.DeleteOptions{})
		_ = k.RbacV1().ClusterRoles().Delete(ctx, name, metav1.DeleteOptions{})
	})
	for _, r := range rules {
		if len(r.ResourceNames) == 0 && len(r.Resources) > 0 {
			eventually(t, func(ctx context.Context) error { return allowed(ctx, as, r.Verbs[0], r.APIGroups[0], r.Resources[0]) })
		}
	}
}

// Who reaches what by a detour: each line is one right, and what it must not, or does, lead to.
func TestEscalationMatrix(t *testing.T) {
	ctx, k, s := t.Context(), admin(t), cluster.servers[0]
	ns := namespace(t, k)
	if _, err := k.CoreV1().Pods(ns).Create(ctx, simplePod("p"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	raw := func(k kubernetes.Interface, path string) error {
		return k.CoreV1().RESTClient().Get().AbsPath(path).Do(ctx).Error()
	}
	bind := func(k kubernetes.Interface, name, role string) error {
		_, err := k.RbacV1().ClusterRoleBindings().Create(ctx, clusterRoleBinding(name, role, "User", name), metav1.CreateOptions{DryRun: []string{"All"}})
		return err
	}
	makeRole := func(k kubernetes.Interface, rules ...rbacv1.PolicyRule) error {
		_, err := k.RbacV1().ClusterRoles().Create(ctx, clusterRole("made", rules...), metav1.CreateOptions{DryRun: []string{"All"}})
		return err
	}
	token := func(k kubernetes.Interface) error {
		_, err := k.CoreV1().ServiceAccounts(ns).CreateToken(ctx, "default", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
		return err
	}
	impersonate := func(c *restclient.Config, i restclient.ImpersonationConfig) error {
		c = restclient.CopyConfig(c)
		c.Impersonate = i
		_, err := client(t, c).CoreV1().Secrets(ns).List(ctx, metav1.ListOptions{})
		return err
	}
	named := func(r rbacv1.PolicyRule, names ...string) rbacv1.PolicyRule { r.ResourceNames = names; return r }
	const rbac, auth, certs = "rbac.authorization.k8s.io", "authentication.k8s.io", "certificates.k8s.io"
	for i, c := range []struct {
		what    string
		rules   []rbacv1.PolicyRule
		act     func(c *restclient.Config, k kubernetes.Interface) error
		allowed bool
	}{
		{"create bindings: not of what one does not have", []rbacv1.PolicyRule{rule("create", rbac, "clusterrolebindings")}, func(_ *restclient.Config, k kubernetes.Interface) error { return bind(k, "x", "cluster-admin") }, false},
		{"create bindings and bind one role: that role", []rbacv1.PolicyRule{rule("create", rbac, "clusterrolebindings"), named(rule("bind", rbac, "clusterroles"), "view")}, func(_ *restclient.Config, k kubernetes.Interface) error { return bind(k, "x", "view") }, true},
		{"create bindings and bind one role: no other", []rbacv1.PolicyRule{rule("create", rbac, "clusterrolebindings"), named(rule("bind", rbac, "clusterroles"), "view")}, func(_ *restclient.Config, k kubernetes.Interface) error { return bind(k, "x", "edit") }, false},
		{"create bindings of what one has", []rbacv1.PolicyRule{rule("create", rbac, "clusterrolebindings"), rule("list", "", "nodes")}, func(_ *restclient.Config, k kubernetes.Interface) error {
			_, err := admin(t).RbacV1().ClusterRoles().Create(ctx, clusterRole("nodes-only", rule("list", "", "nodes")), metav1.CreateOptions{})
			if err != nil {
				return err
			}
			eventually(t, func(context.Context) error { return bind(k, "x", "nodes-only") })
			return bind(k, "x", "nodes-only")
		}, true},
		{"create roles: not with more than one has", []rbacv1.PolicyRule{rule("create", rbac, "clusterroles")}, func(_ *restclient.Config, k kubernetes.Interface) error {
			return makeRole(k, rule("get", "", "secrets"))
		}, false},
		{"create roles: with what one has", []rbacv1.PolicyRule{rule("create", rbac, "clusterroles"), rule("get", "", "secrets")}, func(_ *restclient.Config, k kubernetes.Interface) error {
			return makeRole(k, rule("get", "", "secrets"))
		}, true},
		{"create roles: not with a star", []rbacv1.PolicyRule{rule("create", rbac, "clusterroles"), rule("get", "", "secrets")}, func(_ *restclient.Config, k kubernetes.Interface) error { return makeRole(k, rule("*", "", "secrets")) }, false},
		{"create roles and escalate: anything", []rbacv1.PolicyRule{rule("create,escalate", rbac, "clusterroles")}, func(_ *restclient.Config, k kubernetes.Interface) error { return makeRole(k, rule("*", "*", "*")) }, true},
		{"get Secrets: no tokens by request", []rbacv1.PolicyRule{rule("get", "", "serviceaccounts")}, func(_ *restclient.Config, k kubernetes.Interface) error { return token(k) }, false},
		{"create tokens", []rbacv1.PolicyRule{rule("create", "", "serviceaccounts/token")}, func(_ *restclient.Config, k kubernetes.Interface) error { return token(k) }, true},
		{"impersonate nobody", nil, func(c *restclient.Config, _ kubernetes.Interface) error {
			return impersonate(c, restclient.ImpersonationConfig{UserName: "admin", Groups: []string{"system:masters"}})
		}, false},
		{"impersonate users: not in groups", []rbacv1.PolicyRule{rule("impersonate", "", "users")}, func(c *restclient.Config, _ kubernetes.Interface) error {
			return impersonate(c, restclient.ImpersonationConfig{UserName: "admin", Groups: []string{"system:masters"}})
		}, false},
		{"impersonate users: with their rights only", []rbacv1.PolicyRule{rule("impersonate", "", "users")}, func(c *restclient.Config, _ kubernetes.Interface) error {
			return impersonate(c, restclient.ImpersonationConfig{UserName: "admin"})
		}, false},
		{"impersonate users and groups: anybody", []rbacv1.PolicyRule{rule("impersonate", "", "users"), rule("impersonate", "", "groups")}, func(c *restclient.Config, _ kubernetes.Interface) error {
			return impersonate(c, restclient.ImpersonationConfig{UserName: "admin", Groups: []string{"system:masters"}})
		}, true},
		{"impersonate users: not with extra fields", []rbacv1.PolicyRule{rule("impersonate", "", "users"), rule("impersonate", "", "groups")}, func(c *restclient.Config, _ kubernetes.Interface) error {
			return impersonate(c, restclient.ImpersonationConfig{UserName: "admin", Groups: []string{"system:masters"}, Extra: map[string][]string{"scopes": {"all"}}})
		}, false},
		{"impersonate in part: for an action that is named", []rbacv1.PolicyRule{rule("impersonate:user-info", auth, "users"), rule("impersonate:user-info", auth, "groups"), rule("impersonate-on:user-info:list", "", "secrets")}, func(c *restclient.Config, _ kubernetes.Interface) error {
			return impersonate(c, restclient.ImpersonationConfig{UserName: "admin", Groups: []string{"lister"}})
		}, true},
		{"impersonate in part: for no other", []rbacv1.PolicyRule{rule("impersonate:user-info", auth, "users"), rule("impersonate:user-info", auth, "groups"), rule("impersonate-on:user-info:list", "", "configmaps")}, func(c *restclient.Config, _ kubernetes.Interface) error {
			return impersonate(c, restclient.ImpersonationConfig{UserName: "admin", Groups: []string{"lister"}})
		}, false},
		{"read CSRs: do not approve them", []rbacv1.PolicyRule{rule("update", certs, "certificatesigningrequests/approval")}, func(_ *restclient.Config, k kubernetes.Interface) error { return approveAny(ctx, t, k) }, false},
		{"approve for a signer", []rbacv1.PolicyRule{rule("update", certs, "certificatesigningrequests/approval"), named(rule("approve", certs, "signers"), certificatesv1.KubeAPIServerClientSignerName)}, func(_ *restclient.Config, k kubernetes.Interface) error { return approveAny(ctx, t, k) }, true},
		{"approve for another signer", []rbacv1.PolicyRule{rule("update", certs, "certificatesigningrequests/approval"), named(rule("approve", certs, "signers"), "example.com/x")}, func(_ *restclient.Config, k kubernetes.Interface) error { return approveAny(ctx, t, k) }, false},
		{"get nodes: not through them", []rbacv1.PolicyRule{rule("get", "", "nodes")}, func(_ *restclient.Config, k kubernetes.Interface) error { return raw(k, "/api/v1/nodes/n1/proxy/pods") }, false},
		{"get pods: no exec by GET", []rbacv1.PolicyRule{rule("get,list", "", "pods")}, func(_ *restclient.Config, k kubernetes.Interface) error {
			return raw(k, "/api/v1/namespaces/"+ns+"/pods/p/exec")
		}, false},
		{"get pods: no logs", []rbacv1.PolicyRule{rule("get,list", "", "pods")}, func(_ *restclient.Config, k kubernetes.Interface) error {
			return raw(k, "/api/v1/namespaces/"+ns+"/pods/p/log")
		}, false},
		{"patch pods: not their status, size or containers", []rbacv1.PolicyRule{rule("get,patch,update", "", "pods")}, func(_ *restclient.Config, k kubernetes.Interface) error {
			_, err := k.CoreV1().Pods(ns).Patch(ctx, "p", "application/merge-patch+json", []byte(`{"metadata":{"labels":{"a":"b"}}}`), metav1.PatchOptions{DryRun: []string{"All"}}, "status")
			return err
		}, false},
		{"update finalizers is asked for owners that block", []rbacv1.PolicyRule{rule("create", "", "configmaps")}, func(_ *restclient.Config, k kubernetes.Interface) error {
			p, err := admin(t).CoreV1().Pods(ns).Get(ctx, "p", metav1.GetOptions{})
			if err != nil {
				return err
			}
			_, err = k.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "c", OwnerReferences: []metav1.OwnerReference{
				{APIVersion: "v1", Kind: "Pod", Name: "p", UID: p.UID, BlockOwnerDeletion: ptr(true)}}}}, metav1.CreateOptions{DryRun: []string{"All"}})
			return err
		}, true}, // OwnerReferencesPermissionEnforcement is off by default, as upstream
		{"debug and metrics are for those who may", nil, func(_ *restclient.Config, k kubernetes.Interface) error {
			return raw(k, "/debug/api_priority_and_fairness/dump_requests")
		}, false},
		{"the operator's own paths too", nil, func(_ *restclient.Config, k kubernetes.Interface) error { return raw(k, "/skein/v1/members") }, false},
	} {
		t.Run(c.what, func(t *testing.T) {
			user := fmt.Sprintf("mallory-%d", i)
			cfg := cluster.as(s, user)
			me := client(t, cfg)
			grant(t, k, me, user, c.rules...)
			if strings.HasPrefix(c.what, "impersonate in part") {
				// The impersonated has to have the right as well.
				name := fmt.Sprintf("lister-%d", i)
				if _, err := k.RbacV1().ClusterRoles().Create(ctx, clusterRole(name, rule("list", "", "secrets")), metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
				if _, err := k.RbacV1().ClusterRoleBindings().Create(ctx, clusterRoleBinding(name, name, "Group", "lister"), metav1.CreateOptions{}); err != nil {
					t.Fatal(err)
				}
				eventually(t, func(ctx context.Context) error {
					return allowed(ctx, client(t, cluster.as(s, "x", "lister")), "list", "", "secrets")
				})
			}
			err := c.act(cfg, me)
			if c.allowed && err != nil || !c.allowed && !apierrors.IsForbidden(err) {
				t.Errorf("allowed: want %v, got %v", c.allowed, err)
			}
		})
	}
}

// approveAny tries to approve a request for a user's certificate, without consequences.
func approveAny(ctx context.Context, t *testing.T, k kubernetes.Interface) error {
	t.Helper()
	name := "approve-any"
	api := admin(t).CertificatesV1().CertificateSigningRequests()
	csr, err := api.Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		request(t, admin(t), name, certificatesv1.KubeAPIServerClientSignerName, subject("x"), nil, certificatesv1.UsageClientAuth)
		csr, err = api.Get(ctx, name, metav1.GetOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	csr.Status.Conditions = []certificatesv1.CertificateSigningRequestCondition{{Type: certificatesv1.CertificateApproved, Status: corev1.ConditionTrue}}
	var last error
	for range 50 { // resource names cannot be waited for beforehand
		if _, last = k.CertificatesV1().CertificateSigningRequests().UpdateApproval(ctx, name, csr, metav1.UpdateOptions{DryRun: []string{"All"}}); last == nil {
			break
		}
	}
	return last
}

// What one may do is told by reviews and by lists of rules alike.
func TestReviewsOfOneself(t *testing.T) {
	ctx, k, s := t.Context(), admin(t), cluster.servers[0]
	ns := namespace(t, k)
	if _, err := k.RbacV1().RoleBindings(ns).Create(ctx, roleBinding("view", "User", "vera"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	vera := client(t, cluster.as(s, "vera", "g1"))
	eventually(t, func(ctx context.Context) error {
		r, err := vera.AuthorizationV1().SelfSubjectRulesReviews().Create(ctx, &authorizationv1.SelfSubjectRulesReview{Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: ns}}, metav1.CreateOptions{})
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(r.Status.ResourceRules, func(r authorizationv1.ResourceRule) bool {
			return slices.Contains(r.Resources, "pods") && slices.Contains(r.Verbs, "list")
		}) {
			return fmt.Errorf("the rules are %+v", r.Status)
		}
		return nil
	})
	local, err := k.AuthorizationV1().LocalSubjectAccessReviews(ns).Create(ctx, &authorizationv1.LocalSubjectAccessReview{ObjectMeta: metav1.ObjectMeta{Namespace: ns},
		Spec: authorizationv1.SubjectAccessReviewSpec{User: "vera", ResourceAttributes: &authorizationv1.ResourceAttributes{Namespace: ns, Verb: "delete", Resource: "pods"}}}, metav1.CreateOptions{})
	if err != nil || local.Status.Allowed {
		t.Errorf("may delete: %+v, %v", local.Status, err)
	}
	me, err := vera.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil || me.Status.UserInfo.Username != "vera" || !slices.Equal(me.Status.UserInfo.Groups, []string{"g1", "system:authenticated"}) {
		t.Errorf("she is %+v, %v", me.Status, err)
	}
}

// An authorization webhook between Node and RBAC: asked where its condition says so, its no counts, its silence does not; and the file is read again.
func TestAuthorizationWebhook(t *testing.T) {
	ctx := t.Context()
	h := newHook(t, func(body []byte) any {
		var r authorizationv1.SubjectAccessReview
		_ = json.Unmarshal(body, &r)
		a := r.Spec.ResourceAttributes
		r.Status = authorizationv1.SubjectAccessReviewStatus{Allowed: a != nil && a.Resource == "configmaps", Denied: a != nil && a.Resource == "secrets", Reason: "the webhook said so"}
		return r
	})
	text := func(condition string) string {
		b, err := json.Marshal(map[string]any{"apiVersion": "apiserver.config.k8s.io/v1", "kind": "AuthorizationConfiguration", "authorizers": []any{
			map[string]any{"type": "Node", "name": "node"},
			map[string]any{"type": "Webhook", "name": "hook", "webhook": map[string]any{
				"timeout": "3s", "subjectAccessReviewVersion": "v1", "matchConditionSubjectAccessReviewVersion": "v1", "failurePolicy": "Deny",
				"authorizedTTL": "1s", "unauthorizedTTL": "1s", "connectionInfo": map[string]any{"type": "KubeConfigFile", "kubeConfigFile": h.kubeconfig(t)},
				"matchConditions": []any{map[string]any{"expression": "has(request.resourceAttributes)"}, map[string]any{"expression": condition}}}},
			map[string]any{"type": "RBAC", "name": "rbac"}}})
		if err != nil {
			panic(err)
		}
		return string(b)
	}
	path := file(t, "authz.json", text("request.user == 'wendy'"))
	s := another(t, func(c *Config) { c.Access.Authorization = path })
	k := client(t, cluster.as(s, "admin", "system:masters"))
	ns := namespace(t, k)
	for _, user := range []string{"wendy", "will"} {
		b := roleBinding("edit", "User", user)
		b.Name = user
		if _, err := k.RbacV1().RoleBindings(ns).Create(ctx, b, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	wendy, will := client(t, cluster.as(s, "wendy")), client(t, cluster.as(s, "will"))
	may := func(k kubernetes.Interface, resource string) error {
		return k.CoreV1().RESTClient().Get().AbsPath("/api/v1/namespaces/"+ns, resource).Do(ctx).Error()
	}
	eventually(t, func(context.Context) error { return may(will, "secrets") })
	eventually(t, func(context.Context) error { return may(wendy, "services") }) // no opinion: RBAC decides
	if err := may(wendy, "secrets"); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "the webhook said so") {
		t.Errorf("denied by the webhook, allowed by RBAC: %v", err)
	}
	if err := wendy.CoreV1().RESTClient().Get().AbsPath("/api/v1/configmaps").Do(ctx).Error(); err != nil {
		t.Errorf("allowed by the webhook, not by RBAC: %v", err)
	}
	for _, b := range h.seen() {
		if !strings.Contains(b, `"user":"wendy"`) {
			t.Errorf("asked about %s", b)
		}
	}
	// Broken, then good: asked about will now, and no more about wendy.
	replace(t, path, strings.Replace(text("true"), `"Node"`, `"Nod"`, 1))
	replace(t, path, text("request.user == 'will'"))
	eventually(t, func(context.Context) error {
		if err := may(will, "secrets"); !apierrors.IsForbidden(err) {
			return fmt.Errorf("will, who is denied now: %v", err)
		}
		return nil
	})
	if err := may(wendy, "secrets"); err != nil {
		t.Errorf("wendy, who is not any more: %v", err)
	}
	// Who cannot be asked says no, as the file has it.
	h.Close()
	eventually(t, func(context.Context) error { // its last answers are used for a second
		if err := may(will, "services"); err == nil {
			return fmt.Errorf("without the webhook: %v", err)
		}
		return nil
	})
	if err := k.CoreV1().RESTClient().Get().AbsPath("/api/v1/nodes").Do(ctx).Error(); err != nil {
		t.Errorf("administrators are locked out: %v", err)
	}
}
