package access

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// All faults of all files are told at once, each with its file, and its field where there is one.
func TestAllFaultsAtOnce(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	const head = "apiVersion: apiserver.config.k8s.io/v1\n"
	c := Config{
		Authentication: write("authn.yaml", head+"kind: AuthenticationConfiguration\njwt:\n- issuer: {url: 'http://plain', audiences: []}\n  claimMappings: {username: {expression: 'claims.'}}\n"),
		TokenWebhook:   write("token.kubeconfig", "not: [a kubeconfig"),
		Authorization:  write("authz.yaml", head+"kind: AuthorizationConfiguration\nauthorizers:\n- {type: RBAC, name: rbac}\n- {type: Webhook, name: w}\n"),
		Admission:      write("admission.yaml", head+"kind: AdmissionConfiguration\nplugins:\n- name: PodSecurity\n  configuration: {apiVersion: pod-security.admission.config.k8s.io/v1, kind: PodSecurityConfiguration, defaults: {enforce: lax}}\n- name: EventRateLimit\n  configuration: {apiVersion: eventratelimit.admission.k8s.io/v1alpha1, kind: Configuration, limits: [{type: Nobody, qps: 1, burst: 1}]}\n"),
		EnablePlugins:  []string{"NoSuchPlugin"}, DisablePlugins: []string{"Priority", "NoOther"},
		Audit: Audit{Policy: write("policy.yaml", "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules:\n- level: Everything\n"), Log: "relative.log", MaxSize: -1, Webhook: filepath.Join(dir, "missing")},
	}
	err := c.Validate()
	if err == nil {
		t.Fatal("no fault found")
	}
	for _, want := range []string{
		"authn.yaml: jwt[0].issuer.url", "authn.yaml", "jwt[0].issuer.audiences", "jwt[0].claimMappings.username.expression",
		"token.kubeconfig", "authz.yaml", "authorizers[1].webhook",
		"admission.yaml: plugins[EventRateLimit]", "plugins[PodSecurity]: defaults.enforce",
		`"NoSuchPlugin" is unknown`, `"NoOther" is unknown`, "policy.yaml", "rules[0].level", `"relative.log"`, "size of -1", "missing",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("nothing of %q in:\n%v", want, err)
		}
	}
	if err := (Config{Audit: Audit{Log: "/var/log/x"}}).Validate(); err == nil || !strings.Contains(err.Error(), "without a policy") {
		t.Errorf("a log without a policy: %v", err)
	}
	if err := (Config{Authentication: "here.yaml"}).Validate(); err == nil || !strings.Contains(err.Error(), `"here.yaml": want an absolute path`) {
		t.Errorf("a relative path: %v", err)
	}
	if err := (Config{}).Validate(); err != nil {
		t.Errorf("nothing at all: %v", err)
	}
}

// Files that come from anywhere are refused or taken, never a panic.
func FuzzFiles(f *testing.F) {
	for _, s := range []string{"", "{}", "[", "apiVersion: apiserver.config.k8s.io/v1\nkind: AuthenticationConfiguration\njwt: [{issuer: {url: https://x, audiences: [a]}, claimMappings: {username: {claim: sub, prefix: ''}}}]",
		"apiVersion: apiserver.config.k8s.io/v1\nkind: AuthorizationConfiguration\nauthorizers: [{type: Node, name: node}, {type: RBAC, name: rbac}]",
		"apiVersion: apiserver.config.k8s.io/v1\nkind: AdmissionConfiguration\nplugins: [{name: PodSecurity}]", "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: None}]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		path := filepath.Join(t.TempDir(), "f")
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		_ = Config{Authentication: path, TokenWebhook: path, Authorization: path, Admission: path, Audit: Audit{Policy: path, Log: "-", Webhook: path}}.Validate()
	})
}
