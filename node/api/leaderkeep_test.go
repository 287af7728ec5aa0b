package api

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	restclient "k8s.io/client-go/rest"
	clocktesting "k8s.io/utils/clock/testing"
)

// A Secret of the type gets a token that works, names its ServiceAccount, heals, and goes with it.
func TestTokenSecrets(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	sa, err := k.CoreV1().ServiceAccounts(ns).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "bot"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "bot-token", Annotations: map[string]string{corev1.ServiceAccountNameKey: "bot"}}, Type: corev1.SecretTypeServiceAccountToken}
	if _, err := k.CoreV1().Secrets(ns).Create(ctx, secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	filled := func(ctx context.Context) (err error) {
		if secret, err = k.CoreV1().Secrets(ns).Get(ctx, "bot-token", metav1.GetOptions{}); err != nil {
			return err
		}
		if len(secret.Data[corev1.ServiceAccountTokenKey]) == 0 || string(secret.Data[corev1.ServiceAccountNamespaceKey]) != ns ||
			!bytes.Contains(secret.Data[corev1.ServiceAccountRootCAKey], []byte("BEGIN CERTIFICATE")) || secret.Annotations[corev1.ServiceAccountUIDKey] != string(sa.UID) {
			return fmt.Errorf("annotations %v, %d keys", secret.Annotations, len(secret.Data))
		}
		return nil
	}
	eventually(t, filled)
	cfg := cluster.anonymous(cluster.servers[1])
	cfg.BearerToken = string(secret.Data[corev1.ServiceAccountTokenKey])
	whoami(t, cfg, "system:serviceaccount:"+ns+":bot")
	eventually(t, func(ctx context.Context) (err error) { // its use is remembered
		s, err := k.CoreV1().Secrets(ns).Get(ctx, "bot-token", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if s.Labels["kubernetes.io/legacy-token-last-used"] != time.Now().UTC().Format(time.DateOnly) {
			return fmt.Errorf("labels %v", s.Labels)
		}
		return nil
	})
	if m, err := k.CoreV1().ConfigMaps("kube-system").Get(ctx, "kube-apiserver-legacy-service-account-token-tracking", metav1.GetOptions{}); err != nil || m.Data["since"] == "" {
		t.Errorf("since when use is remembered: %v, %v", m.Data, err)
	}
	if _, err := k.CoreV1().Secrets(ns).Patch(ctx, "bot-token", "application/merge-patch+json", []byte(`{"data":{"ca.crt":"eA==","token":null}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, filled)
	if err := k.CoreV1().ServiceAccounts(ns).Delete(ctx, "bot", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		if _, err := k.CoreV1().Secrets(ns).Get(ctx, "bot-token", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("the Secret after its ServiceAccount: %v", err)
		}
		return nil
	})
	secret = &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "nobody", Annotations: map[string]string{corev1.ServiceAccountNameKey: "nobody"}}, Type: corev1.SecretTypeServiceAccountToken}
	if _, err := k.CoreV1().Secrets(ns).Create(ctx, secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		if _, err := k.CoreV1().Secrets(ns).Get(ctx, "nobody", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			return fmt.Errorf("a token Secret of no ServiceAccount: %v", err)
		}
		return nil
	})
}

func whoami(t *testing.T, cfg *restclient.Config, want string) {
	t.Helper()
	_, err := client(t, cfg).CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), `User "`+want+`"`) {
		t.Errorf("as %s: %v", want, err)
	}
}

// A policy whose expressions do not fit the types of what it matches says so in its status.
func TestTypesInPolicies(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	p := &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: metav1.ObjectMeta{Name: "typed"}, Spec: admissionv1.ValidatingAdmissionPolicySpec{
		MatchConstraints: &admissionv1.MatchResources{ResourceRules: []admissionv1.NamedRuleWithOperations{{RuleWithOperations: admissionv1.RuleWithOperations{
			Operations: []admissionv1.OperationType{admissionv1.Create}, Rule: admissionv1.Rule{APIGroups: []string{"apps"}, APIVersions: []string{"v1"}, Resources: []string{"deployments"}}}}}},
		Validations: []admissionv1.Validation{{Expression: "object.spec.replicas > '1'"}, {Expression: "object.spec.replicas > 1"}, {Expression: "object.spec.nonsense == 1"}},
	}}
	if _, err := k.AdmissionregistrationV1().ValidatingAdmissionPolicies().Create(ctx, p, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.AdmissionregistrationV1().ValidatingAdmissionPolicies().Delete(context.Background(), "typed", metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	eventually(t, func(ctx context.Context) error {
		p, err := k.AdmissionregistrationV1().ValidatingAdmissionPolicies().Get(ctx, "typed", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if p.Status.ObservedGeneration != p.Generation || p.Status.TypeChecking == nil {
			return fmt.Errorf("status %+v", p.Status)
		}
		w := p.Status.TypeChecking.ExpressionWarnings
		if len(w) != 2 || w[0].FieldRef != "spec.validations[0].expression" || !strings.Contains(w[0].Warning, "no matching overload") || !strings.Contains(w[1].Warning, "undefined field 'nonsense'") {
			return fmt.Errorf("warnings %+v", w)
		}
		return nil
	})
}

// A token Secret of a ServiceAccount that nobody uses is invalid after a year and gone after another; one that a pod mounts stays.
func TestUnusedTokenSecrets(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	names := []string{"idle", "mounted"}
	if _, err := k.CoreV1().ServiceAccounts(ns).Create(ctx, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "bot"}, Secrets: []corev1.ObjectReference{{Name: "idle"}, {Name: "mounted"}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{corev1.ServiceAccountNameKey: "bot"}}, Type: corev1.SecretTypeServiceAccountToken}
		if _, err := k.CoreV1().Secrets(ns).Create(ctx, secret, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually(t, func(ctx context.Context) error {
			s, err := k.CoreV1().Secrets(ns).Get(ctx, name, metav1.GetOptions{})
			if err == nil && len(s.Data[corev1.ServiceAccountTokenKey]) == 0 {
				err = errors.New("no token yet")
			}
			return err
		})
	}
	pod := simplePod("p")
	pod.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "mounted"}}}}
	if _, err := k.CoreV1().Pods(ns).Create(ctx, pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	after := func(d time.Duration, check func(context.Context) error) {
		t.Helper()
		ctx, cancel := context.WithCancel(ctx)
		done := make(chan error, 1)
		go func() { done <- cluster.servers[0].keepTokens(ctx, k, clocktesting.NewFakeClock(time.Now().Add(d))) }()
		eventually(t, check)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	invalid := func(ctx context.Context, name string) (string, error) {
		s, err := k.CoreV1().Secrets(ns).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return "", err
		}
		return s.Labels["kubernetes.io/legacy-token-invalid-since"], nil
	}
	after(400*24*time.Hour, func(ctx context.Context) error {
		since, err := invalid(ctx, "idle")
		if err == nil && since == "" {
			err = errors.New("not invalid yet")
		}
		return err
	})
	after(800*24*time.Hour, func(ctx context.Context) error {
		if _, err := invalid(ctx, "idle"); !apierrors.IsNotFound(err) {
			return fmt.Errorf("still there: %v", err)
		}
		return nil
	})
	if since, err := invalid(ctx, "mounted"); err != nil || since != "" {
		t.Errorf("the one that a pod mounts: invalid since %q, %v", since, err)
	}
}

func TestBootstrapTokensThatAreOver(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	for id, left := range map[string]time.Duration{"eeeeee": 2 * time.Second, "ffffff": time.Hour} {
		_, err := k.CoreV1().Secrets("kube-system").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "bootstrap-token-" + id}, Type: corev1.SecretTypeBootstrapToken,
			StringData: map[string]string{"token-id": id, "token-secret": "0123456789abcdef", "expiration": time.Now().Add(left).UTC().Format(time.RFC3339)}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	gone(t, "a token that is over", func(ctx context.Context) error {
		_, err := k.CoreV1().Secrets("kube-system").Get(ctx, "bootstrap-token-eeeeee", metav1.GetOptions{})
		return err
	})
	if err := k.CoreV1().Secrets("kube-system").Delete(ctx, "bootstrap-token-ffffff", metav1.DeleteOptions{}); err != nil {
		t.Errorf("a token that is not over: %v", err)
	}
}
