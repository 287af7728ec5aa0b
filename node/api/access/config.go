// Package access reads the files by which an operator says who may use the API and what is recorded of it: upstream's structured
// authentication and authorization, admission, audit policy, and the kubeconfigs of webhooks. Everything in them means what it
// means to kube-apiserver, whose loaders and validation are used; nothing of it is loaded, compiled or kept when no file is named.
//
// The files are the node's own. Every node that may hold a replica of the store should have the same, as with the API
// servers of any other cluster: a request is judged by the node that serves it.
//
// Package node/api builds servers from a Config; node/daemon validates it when a node starts. A Config is a value and is only read.
package access

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/runtime"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/apis/apiserver"
	apiserverinstall "k8s.io/apiserver/pkg/apis/apiserver/install"
	auditpolicy "k8s.io/apiserver/pkg/audit/policy"
	authorizationcel "k8s.io/apiserver/pkg/authorization/cel"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	apiwebhook "k8s.io/apiserver/pkg/util/webhook"
	authzconfig "k8s.io/kubernetes/pkg/kubeapiserver/authorizer"
	"k8s.io/kubernetes/pkg/kubeapiserver/authorizer/modes"
	"k8s.io/kubernetes/pkg/kubeapiserver/options"
	"k8s.io/kubernetes/plugin/pkg/admission/noderestriction"
	podsecurityload "k8s.io/pod-security-admission/admission/api/load"
	podsecurityvalidation "k8s.io/pod-security-admission/admission/api/validation"
)

// DefaultIssuer is the issuer and the audience of the cluster's ServiceAccount tokens. No OpenID Connect issuer may be called so.
const DefaultIssuer = "https://kubernetes.default.svc.cluster.local"

// Config names the files. All paths are absolute; an empty one means that there is none.
type Config struct {
	// Authentication is an AuthenticationConfiguration (apiserver.config.k8s.io/v1): OpenID Connect issuers, and for which
	// paths anonymous requests are let in. It is read again when it changes, but for its part "anonymous"; a faulty new version is
	// reported and the last good one stays.
	Authentication string
	// TokenWebhook is a kubeconfig of a webhook that is asked (TokenReview v1) about bearer tokens that nobody else knows.
	TokenWebhook string
	// TokenWebhookTTL is how long its answers are used again. Default 2 min.
	TokenWebhookTTL time.Duration
	// Authorization is an AuthorizationConfiguration (apiserver.config.k8s.io/v1): the order of the authorizers, which must
	// include Node and RBAC, and webhooks among them. It is read again when it changes, as Authentication.
	Authorization string
	// Admission is an AdmissionConfiguration (apiserver.config.k8s.io/v1) with the settings of admission plugins.
	Admission string
	// EnablePlugins are admission plugins beyond upstream's default set and NodeRestriction. DisablePlugins are not to run.
	EnablePlugins, DisablePlugins []string
	// Audit says what is recorded. Default: nothing.
	Audit Audit
}

// Audit is a record of requests.
type Audit struct {
	// Policy is an audit Policy (audit.k8s.io/v1): which requests are recorded and how much of each. With it goes a Log, a
	// Webhook or both.
	Policy string
	// Log is the file that gets the events, one JSON object a line; "-" is standard output. A directory is made if need be.
	Log string
	// MaxSize is at which size the file is put aside, in MB. Default 100.
	MaxSize int
	// MaxBackups is how many of these are kept. Default 10.
	MaxBackups int
	// MaxAge is how long they are kept, in days. Default 0: until there are too many.
	MaxAge int
	// Webhook is a kubeconfig of where events are sent, in batches.
	Webhook string
}

func (c *Config) setDefaults() {
	if c.TokenWebhookTTL == 0 {
		c.TokenWebhookTTL = 2 * time.Minute
	}
	if c.Audit.MaxSize == 0 {
		c.Audit.MaxSize = 100
	}
	if c.Audit.MaxBackups == 0 {
		c.Audit.MaxBackups = 10
	}
}

// WithDefaults is the configuration with its defaults set.
func (c Config) WithDefaults() Config {
	c.setDefaults()
	return c
}

// Validate reports every fault of all files at once, each with the file and, where there is one, the field.
func (c Config) Validate() error {
	c.setDefaults()
	var errs []error
	for _, f := range []struct {
		what, path string
		check      func() error
	}{
		{"authentication configuration", c.Authentication, func() error { _, err := c.authentication(DefaultIssuer); return err }},
		{"kubeconfig of the token webhook", c.TokenWebhook, func() error { return kubeconfig(c.TokenWebhook) }},
		{"authorization configuration", c.Authorization, func() error { _, _, err := c.LoadAuthorization(); return err }},
		{"admission configuration", c.Admission, c.admission},
		{"audit policy", c.Audit.Policy, func() error { _, err := auditpolicy.LoadPolicyFromFile(c.Audit.Policy); return err }},
		{"kubeconfig of the audit webhook", c.Audit.Webhook, func() error { return kubeconfig(c.Audit.Webhook) }},
	} {
		switch {
		case f.path == "":
		case !filepath.IsAbs(f.path):
			errs = append(errs, fmt.Errorf("%s %q: want an absolute path", f.what, f.path))
		default:
			for _, err := range flat(f.check()) {
				errs = append(errs, fmt.Errorf("%s %s: %w", f.what, f.path, err))
			}
		}
	}
	if len(c.EnablePlugins)+len(c.DisablePlugins) > 0 { // else there is nothing to be wrong, and the list of all plugins is long
		for _, err := range c.AdmissionOptions().Validate() {
			errs = append(errs, fmt.Errorf("admission plugins: %w", err))
		}
	}
	errs = append(errs, c.Audit.validate()...)
	if c.TokenWebhookTTL < 0 {
		errs = append(errs, fmt.Errorf("life of the token webhook's answers %s: want zero or more", c.TokenWebhookTTL))
	}
	return errors.Join(errs...)
}

func (a Audit) validate() (errs []error) {
	switch {
	case a.Policy == "" && (a.Log != "" || a.Webhook != ""):
		errs = append(errs, errors.New("audit: a log or a webhook without a policy would get nothing: name a policy file"))
	case a.Policy != "" && a.Log == "" && a.Webhook == "":
		errs = append(errs, errors.New("audit: a policy without a log and without a webhook records nothing: name one of them"))
	}
	if a.Log != "" && a.Log != "-" && !filepath.IsAbs(a.Log) {
		errs = append(errs, fmt.Errorf("audit log %q: want an absolute path, or -", a.Log))
	}
	for _, n := range []struct {
		what string
		v    int
	}{{"size", a.MaxSize}, {"number of old files", a.MaxBackups}, {"age", a.MaxAge}} {
		if n.v < 0 {
			errs = append(errs, fmt.Errorf("audit log: a %s of %d: want zero or more", n.what, n.v))
		}
	}
	return errs
}

// flat takes upstream's aggregates, and joined errors, apart.
func flat(err error) (out []error) {
	var all utilerrors.Aggregate
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range joined.Unwrap() {
			out = append(out, flat(e)...)
		}
		return out
	}
	switch {
	case err == nil:
	case errors.As(err, &all):
		out = utilerrors.Flatten(all).Errors()
	default:
		out = []error{err}
	}
	return out
}

// AuthenticationOptions are upstream's, for a server with this issuer of ServiceAccount tokens. Client certificates and anonymous
// requests are the caller's.
func (c Config) AuthenticationOptions(issuer string) *options.BuiltInAuthenticationOptions {
	c.setDefaults()
	return &options.BuiltInAuthenticationOptions{
		Anonymous:      &options.AnonymousAuthenticationOptions{},
		BootstrapToken: &options.BootstrapTokenAuthenticationOptions{Enable: true},
		ServiceAccounts: &options.ServiceAccountAuthenticationOptions{
			Lookup: true, Issuers: []string{issuer},
		},
		WebHook: &options.WebHookAuthenticationOptions{ConfigFile: c.TokenWebhook, Version: "v1", CacheTTL: c.TokenWebhookTTL,
			RetryBackoff: genericoptions.DefaultAuthWebhookRetryBackoff()},
		AuthenticationConfigFile: c.Authentication,
	}
}

func (c Config) authentication(issuer string) (*apiserver.AuthenticationConfiguration, error) {
	only := Config{Authentication: c.Authentication}
	loaded, err := only.AuthenticationOptions(issuer).ToAuthenticationConfig()
	if err != nil {
		return nil, err
	}
	return loaded.AuthenticationConfig, nil
}

// SaysAnonymous tells whether the authentication file itself says which anonymous requests are let in.
func (c Config) SaysAnonymous(issuer string) (bool, error) {
	if c.Authentication == "" {
		return false, nil
	}
	loaded, err := c.authentication(issuer)
	return err == nil && loaded.Anonymous != nil, err
}

// LoadAuthorization gives the chain of authorizers, and the file as it was read: Node and RBAC when there is none.
func (c Config) LoadAuthorization() (*apiserver.AuthorizationConfiguration, string, error) {
	if c.Authorization == "" {
		return &apiserver.AuthorizationConfiguration{Authorizers: []apiserver.AuthorizerConfiguration{
			{Type: apiserver.AuthorizerType(modes.ModeNode), Name: authzconfig.GetNameForAuthorizerMode(modes.ModeNode)},
			{Type: apiserver.AuthorizerType(modes.ModeRBAC), Name: authzconfig.GetNameForAuthorizerMode(modes.ModeRBAC)},
		}}, "", nil
	}
	// Nodes could do nothing without the first, and nobody but system:masters without the second.
	required := sets.New(apiserver.AuthorizerType(modes.ModeNode), apiserver.AuthorizerType(modes.ModeRBAC))
	loaded, text, err := authzconfig.LoadAndValidateFile(c.Authorization, authorizationcel.NewDefaultCompiler(), required)
	if err != nil {
		return nil, "", err
	}
	var errs []error
	for i, a := range loaded.Authorizers {
		if a.Webhook != nil && a.Webhook.ConnectionInfo.KubeConfigFile != nil {
			if err := kubeconfig(*a.Webhook.ConnectionInfo.KubeConfigFile); err != nil {
				errs = append(errs, fmt.Errorf("authorizers[%d].webhook.connectionInfo.kubeConfigFile %s: %w", i, *a.Webhook.ConnectionInfo.KubeConfigFile, err))
			}
		}
	}
	return loaded, text, errors.Join(errs...)
}

// kubeconfig checks a file that says how to reach a webhook.
func kubeconfig(path string) error {
	_, err := apiwebhook.LoadKubeconfig(path, nil)
	return err
}

// AdmissionOptions are upstream's, with NodeRestriction.
func (c Config) AdmissionOptions() *options.AdmissionOptions {
	o := options.NewAdmissionOptions()
	o.GenericAdmission.ConfigFile = c.Admission
	o.GenericAdmission.EnablePlugins, o.GenericAdmission.DisablePlugins = slices.Clone(c.EnablePlugins), slices.Clone(c.DisablePlugins)
	if !slices.Contains(c.EnablePlugins, noderestriction.PluginName) && !slices.Contains(c.DisablePlugins, noderestriction.PluginName) {
		o.GenericAdmission.EnablePlugins = append(o.GenericAdmission.EnablePlugins, noderestriction.PluginName)
	}
	return o
}

// admission checks the file and what it says to each plugin.
func (c Config) admission() error {
	scheme := runtime.NewScheme()
	apiserverinstall.Install(scheme)
	o := c.AdmissionOptions().GenericAdmission
	names := o.Plugins.Registered()
	loaded, err := admission.ReadAdmissionConfiguration(names, c.Admission, scheme)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		r, err := loaded.ConfigFor(name)
		if err == nil && r == nil {
			continue // it says nothing about this one
		}
		if err == nil && name == podSecurity {
			err = podSecurityConfig(loaded)
		}
		if err == nil {
			// The plugin's maker reads its settings. What comes after it, here, is a plugin without a server.
			made := false
			if _, ierr := o.Plugins.InitPlugin(name, r, initializer(func(admission.Interface) { made = true })); !made {
				err = ierr
			}
		}
		for _, e := range flat(err) {
			errs = append(errs, fmt.Errorf("plugins[%s]: %s", name, e)) // nothing to take apart any more
		}
	}
	return errors.Join(errs...)
}

const podSecurity = "PodSecurity"

// podSecurityConfig checks what the plugin itself checks only when it is put into a server.
func podSecurityConfig(c admission.ConfigProvider) error {
	r, err := c.ConfigFor(podSecurity)
	if err != nil {
		return err
	}
	loaded, err := podsecurityload.LoadFromReader(r)
	if err != nil {
		return err
	}
	return podsecurityvalidation.ValidatePodSecurityConfiguration(loaded).ToAggregate()
}

type initializer func(admission.Interface)

// Initialize implements admission.PluginInitializer.
func (f initializer) Initialize(p admission.Interface) { f(p) }

// AuditOptions are upstream's.
func (c Config) AuditOptions() *genericoptions.AuditOptions {
	c.setDefaults()
	o := genericoptions.NewAuditOptions()
	o.PolicyFile = c.Audit.Policy
	o.LogOptions.Path, o.LogOptions.MaxSize, o.LogOptions.MaxBackups, o.LogOptions.MaxAge = c.Audit.Log, c.Audit.MaxSize, c.Audit.MaxBackups, c.Audit.MaxAge
	o.WebhookOptions.ConfigFile = c.Audit.Webhook
	return o
}
