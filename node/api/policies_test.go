package api

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	admissionreviewv1 "k8s.io/api/admission/v1"
	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"skein.io/skein/node/api/access"
)

// onConfigMaps matches ConfigMaps of one namespace that carry the label "ruled".
func onConfigMaps(ns string, ops ...admissionv1.OperationType) *admissionv1.MatchResources {
	return &admissionv1.MatchResources{
		NamespaceSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"kubernetes.io/metadata.name": ns}},
		ObjectSelector:    &metav1.LabelSelector{MatchLabels: map[string]string{"ruled": "yes"}},
		ResourceRules: []admissionv1.NamedRuleWithOperations{{RuleWithOperations: admissionv1.RuleWithOperations{Operations: ops,
			Rule: admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"configmaps"}}}}},
	}
}

func ruled(name string, data map[string]string) *corev1.ConfigMap {
	return &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"ruled": "yes"}}, Data: data}
}

// policy makes a ValidatingAdmissionPolicy and its bindings, and removes them when the test ends.
func policy(t *testing.T, k kubernetes.Interface, name string, spec admissionv1.ValidatingAdmissionPolicySpec, bindings ...admissionv1.ValidatingAdmissionPolicyBindingSpec) {
	t.Helper()
	p := &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
	if _, err := k.AdmissionregistrationV1().ValidatingAdmissionPolicies().Create(t.Context(), p, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.AdmissionregistrationV1().ValidatingAdmissionPolicies().Delete(context.Background(), name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	for i, spec := range bindings {
		spec.PolicyName = name
		b := &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("%s-%d", name, i)}, Spec: spec}
		if _, err := k.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().Create(t.Context(), b, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := k.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings().Delete(context.Background(), b.Name, metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
}

// tried says what happens to a ConfigMap on each server, once it is what is wanted.
func tried(t *testing.T, ns string, m *corev1.ConfigMap, want string) {
	t.Helper()
	for i, s := range cluster.servers {
		k := client(t, cluster.as(s, "admin", "system:masters"))
		eventually(t, func(ctx context.Context) error {
			_, err := k.CoreV1().ConfigMaps(ns).Create(ctx, m, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
				return fmt.Errorf("server %d: %s: %v, want %q", i+1, m.Name, err, want)
			}
			return nil
		})
	}
}

func TestValidatingPolicies(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	if _, err := k.CoreV1().Namespaces().Patch(ctx, ns, "application/merge-patch+json", []byte(`{"metadata":{"labels":{"env":"prod"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	forbidden := metav1.StatusReasonForbidden
	policy(t, k, "rules", admissionv1.ValidatingAdmissionPolicySpec{
		MatchConstraints: onConfigMaps(ns, admissionv1.Create, admissionv1.Update),
		MatchConditions:  []admissionv1.MatchCondition{{Name: "not-exempt", Expression: `!object.metadata.name.startsWith("exempt")`}},
		Variables:        []admissionv1.Variable{{Name: "size", Expression: `has(object.data) ? object.data.size() : 0`}, {Name: "double", Expression: `variables.size * 2`}},
		Validations: []admissionv1.Validation{
			{Expression: "variables.double <= 4", MessageExpression: `"%d keys in %s of %s".format([variables.size, object.metadata.name, namespaceObject.metadata.labels.env])`, Reason: &forbidden},
			{Expression: `!("root" in object.metadata.labels) || authorizer.group("").resource("secrets").namespace(request.namespace).check("delete").allowed()`, Message: "only for those who may delete secrets"},
		},
		AuditAnnotations: []admissionv1.AuditAnnotation{{Key: "size", ValueExpression: `"has %d".format([variables.size])`}},
	}, admissionv1.ValidatingAdmissionPolicyBindingSpec{ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny, admissionv1.Audit}})
	tried(t, ns, ruled("full", map[string]string{"a": "", "b": "", "c": ""}), "ValidatingAdmissionPolicy 'rules' with binding 'rules-0' denied request: 3 keys in full of prod")
	tried(t, ns, ruled("fine", map[string]string{"a": "", "b": ""}), "")
	tried(t, ns, ruled("exempt", map[string]string{"a": "", "b": "", "c": ""}), "")
	root := ruled("root", nil)
	root.Labels["root"] = "yes"
	tried(t, ns, root, "")
	if _, err := k.RbacV1().RoleBindings(ns).Create(ctx, roleBinding("edit-maps", "User", "eve"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.RbacV1().ClusterRoles().Create(ctx, mapsRole(), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.RbacV1().ClusterRoles().Delete(context.Background(), "edit-maps", metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	eve := client(t, cluster.as(cluster.servers[1], "eve"))
	eventually(t, func(ctx context.Context) error {
		_, err := eve.CoreV1().ConfigMaps(ns).Create(ctx, root, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		if !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "only for those who may delete secrets") {
			return fmt.Errorf("eve: %v", err)
		}
		return nil
	})

	t.Run("warnings", func(t *testing.T) {
		policy(t, k, "warns", admissionv1.ValidatingAdmissionPolicySpec{MatchConstraints: onConfigMaps(ns, admissionv1.Create),
			Validations: []admissionv1.Validation{{Expression: "false", Message: "no good"}}}, admissionv1.ValidatingAdmissionPolicyBindingSpec{ValidationActions: []admissionv1.ValidationAction{admissionv1.Warn}})
		w := &warned{}
		cfg := cluster.as(cluster.servers[0], "admin", "system:masters")
		cfg.WarningHandler = w
		eventually(t, func(ctx context.Context) error {
			if _, err := client(t, cfg).CoreV1().ConfigMaps(ns).Create(ctx, ruled("w", nil), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
				return err
			}
			if got := fmt.Sprint(w.got); !strings.Contains(got, "Validation failed for ValidatingAdmissionPolicy 'warns' with binding 'warns-0': no good") {
				return fmt.Errorf("warnings %s", got)
			}
			return nil
		})
	})
	t.Run("an expression that fails", func(t *testing.T) {
		ignore := admissionv1.Ignore
		for name, p := range map[string]*admissionv1.FailurePolicyType{"fails": nil, "fails-softly": &ignore} {
			policy(t, k, name, admissionv1.ValidatingAdmissionPolicySpec{MatchConstraints: onConfigMaps(ns, admissionv1.Create), FailurePolicy: p,
				Validations: []admissionv1.Validation{{Expression: "object.data.none == 'x'"}}}, admissionv1.ValidatingAdmissionPolicyBindingSpec{ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny}})
		}
		tried(t, ns, ruled("m", map[string]string{"a": ""}), "ValidatingAdmissionPolicy 'fails' with binding 'fails-0' denied request: expression 'object.data.none == 'x'' resulted in error: no such key: none")
	})
}

// Policies take parameters from objects: ConfigMaps, and kinds of one's own.
func TestPolicyParameters(t *testing.T) {
	crdOf(t, "limits", "Limit", nil)
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	limits := custom(t, cluster.servers[0], ns, "limits")
	deny, allowMissing, denyMissing := []admissionv1.ValidationAction{admissionv1.Deny}, admissionv1.AllowAction, admissionv1.DenyAction
	policy(t, k, "limited", admissionv1.ValidatingAdmissionPolicySpec{
		MatchConstraints: onConfigMaps(ns, admissionv1.Create), ParamKind: &admissionv1.ParamKind{APIVersion: "test.skein.io/v1", Kind: "Limit"},
		Validations: []admissionv1.Validation{{Expression: "!has(object.data) || object.data.size() <= params.spec.max", MessageExpression: `"more than %d of %s".format([params.spec.max, params.metadata.name])`}},
	}, admissionv1.ValidatingAdmissionPolicyBindingSpec{ValidationActions: deny, ParamRef: &admissionv1.ParamRef{Name: "one", ParameterNotFoundAction: &denyMissing}},
		admissionv1.ValidatingAdmissionPolicyBindingSpec{ValidationActions: deny, ParamRef: &admissionv1.ParamRef{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"tight": "yes"}}, ParameterNotFoundAction: &allowMissing}})
	two := ruled("two", map[string]string{"a": "", "b": ""})
	tried(t, ns, two, "no params found for policy binding with `Deny` parameterNotFoundAction")
	if _, err := limits.Create(ctx, object("Limit", "one", map[string]any{"spec": map[string]any{"max": int64(1)}}), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	tried(t, ns, two, "more than 1 of one")
	if _, err := limits.Patch(ctx, "one", "application/merge-patch+json", []byte(`{"spec":{"max":2}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	tried(t, ns, two, "")
	tight := object("Limit", "tight", map[string]any{"spec": map[string]any{"max": int64(0)}})
	tight.SetLabels(map[string]string{"tight": "yes"})
	if _, err := limits.Create(ctx, tight, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	tried(t, ns, two, "more than 0 of tight")
	tried(t, ns, ruled("none", nil), "")
}

// Policies change objects: by what should be there, and by patches, in no certain order; those that want to look again when another changed something.
func TestMutatingPolicies(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	api := k.AdmissionregistrationV1()
	match := func() *admissionv1.MatchResources { return onConfigMaps(ns, admissionv1.Create) }
	for name, spec := range map[string]admissionv1.MutatingAdmissionPolicySpec{
		"m-apply": {MatchConstraints: match(), ReinvocationPolicy: admissionv1.IfNeededReinvocationPolicy,
			Variables: []admissionv1.Variable{{Name: "patched", Expression: `"patched" in object.metadata.labels`}},
			Mutations: []admissionv1.Mutation{{PatchType: admissionv1.PatchTypeApplyConfiguration, ApplyConfiguration: &admissionv1.ApplyConfiguration{
				Expression: `Object{metadata: Object.metadata{labels: {"applied": variables.patched ? "after" : "before"}}, data: {"from": request.namespace}}`}}}},
		"m-patch": {MatchConstraints: match(), ReinvocationPolicy: admissionv1.NeverReinvocationPolicy,
			Mutations: []admissionv1.Mutation{{PatchType: admissionv1.PatchTypeJSONPatch, JSONPatch: &admissionv1.JSONPatch{
				Expression: `[JSONPatch{op: "add", path: "/metadata/labels/patched", value: "yes"}, JSONPatch{op: "add", path: "/metadata/labels/" + jsonpatch.escapeKey("test.skein.io/was"), value: "applied" in object.metadata.labels ? object.metadata.labels.applied : "before"}]`}}}},
	} {
		if _, err := api.MutatingAdmissionPolicies().Create(ctx, &admissionv1.MutatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := api.MutatingAdmissionPolicyBindings().Create(ctx, &admissionv1.MutatingAdmissionPolicyBinding{ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: admissionv1.MutatingAdmissionPolicyBindingSpec{PolicyName: name}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx := context.Background()
			if err := api.MutatingAdmissionPolicyBindings().Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
			if err := api.MutatingAdmissionPolicies().Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
				t.Error(err)
			}
		})
	}
	for i, s := range cluster.servers {
		k := client(t, cluster.as(s, "admin", "system:masters"))
		eventually(t, func(ctx context.Context) error {
			m, err := k.CoreV1().ConfigMaps(ns).Create(ctx, ruled("m", map[string]string{"own": "x"}), metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			if err != nil {
				return err
			}
			if m.Labels["applied"] != "after" || m.Labels["patched"] != "yes" || m.Data["from"] != ns || m.Labels["test.skein.io/was"] != "before" || m.Data["own"] != "x" {
				return fmt.Errorf("server %d: labels %v, data %v", i+1, m.Labels, m.Data)
			}
			return nil
		})
	}
}

func mapsRole() *rbacv1.ClusterRole {
	return &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: "edit-maps"}, Rules: []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"configmaps"}, Verbs: []string{"*"}}}}
}

// What webhooks and policies have to say to auditors is in the audit log.
func TestAdmissionIsAudited(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	path := filepath.Join(t.TempDir(), "audit.log")
	rules := file(t, "policy.yaml", `
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
- level: Metadata
  verbs: [create]
  resources: [{group: "", resources: [configmaps]}]
- level: None
`)
	s := another(t, func(c *Config) { c.Access.Audit = access.Audit{Policy: rules, Log: path} })
	h := startHooks(t, ns)
	service(t, k, ns, "hook", h.addr())
	h.answers["/judge"] = func(*admissionreviewv1.AdmissionRequest) *admissionreviewv1.AdmissionResponse {
		return &admissionreviewv1.AdmissionResponse{Allowed: true, AuditAnnotations: map[string]string{"why": "it may"}}
	}
	h.answers["/label"] = labelled("seen")
	h.validating(t, k, ns, "judge", hookSpec{"judge", "/judge", nil})
	h.mutating(t, k, ns, "marker", admissionv1.NeverReinvocationPolicy, hookSpec{"marker", "/label", nil})
	policy(t, k, "counted", admissionv1.ValidatingAdmissionPolicySpec{
		MatchConstraints: onConfigMaps(ns, admissionv1.Create),
		Validations:      []admissionv1.Validation{{Expression: "false", Message: "noted, not refused"}},
		AuditAnnotations: []admissionv1.AuditAnnotation{{Key: "name", ValueExpression: "'it is ' + object.metadata.name"}},
	}, admissionv1.ValidatingAdmissionPolicyBindingSpec{ValidationActions: []admissionv1.ValidationAction{admissionv1.Audit}})
	m := ruled("m", nil)
	m.Labels["hooked"] = "yes"
	third := client(t, cluster.as(s, "admin", "system:masters"))
	eventually(t, func(context.Context) error {
		if _, err := third.CoreV1().ConfigMaps(ns).Create(ctx, m, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}); err != nil {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		lines := strings.Split(strings.TrimSpace(string(b)), "\n")
		last := lines[len(lines)-1]
		for _, want := range []string{`"judge.test.skein.io/why":"it may"`, `"counted/name":"it is m"`, `"validation.policy.admission.k8s.io/validation_failure"`, "noted, not refused",
			`"mutation.webhook.admission.k8s.io/round_0_index_`} {
			if !strings.Contains(last, want) {
				return fmt.Errorf("the log lacks %s: %s", want, last)
			}
		}
		return nil
	})
}
