package api

import (
	"context"
	"crypto"
	"crypto/sha256"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/cache"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/group"
	"k8s.io/apiserver/pkg/authentication/request/anonymous"
	"k8s.io/apiserver/pkg/authentication/request/union"
	"k8s.io/apiserver/pkg/authentication/request/x509"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	genericoptions "k8s.io/apiserver/pkg/server/options"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corev1client "k8s.io/client-go/kubernetes/typed/core/v1"
	restclient "k8s.io/client-go/rest"
	openapicommon "k8s.io/kube-openapi/pkg/common"
	kubeauthenticator "k8s.io/kubernetes/pkg/kubeapiserver/authenticator"
	"k8s.io/kubernetes/pkg/serviceaccount"
	"k8s.io/kubernetes/plugin/pkg/auth/authenticator/token/bootstrap"

	"skein.io/skein/node/api/lastknown"
)

const (
	// verdictTTL is how long a checked token or certificate is not checked again. A revoked one
	// works that much longer.
	verdictTTL = 10 * time.Second
	// maxCertVerdicts bounds the certificates remembered; a client more costs a verification a request.
	maxCertVerdicts = 1024
)

// tokens makes and verifies ServiceAccount tokens.
type tokens struct {
	serviceaccount.TokenGenerator
	keys serviceaccount.PublicKeysGetter
}

func newTokens(cfg *Config) (tokens, error) {
	g, err := serviceaccount.JWTTokenGenerator(cfg.Issuer, cfg.SAKey)
	if err != nil {
		return tokens{}, fmt.Errorf("ServiceAccount tokens: %w", err)
	}
	public := []any{&cfg.SAKey.PublicKey}
	for _, k := range cfg.OldSAKeys {
		public = append(public, any(crypto.PublicKey(k)))
	}
	keys, err := serviceaccount.StaticPublicKeysGetter(public)
	if err != nil {
		return tokens{}, fmt.Errorf("ServiceAccount tokens: %w", err)
	}
	return tokens{g, keys}, nil
}

// buildAuthentication sets who may be: client certificates, the tokens of ServiceAccounts, of bootstrap Secrets, of the issuers and
// of the webhook that Config.Access names, and anonymous where nothing can be learnt of the cluster's objects.
func (b *build) buildAuthentication(ctx context.Context) error {
	a := &b.generic.Authentication
	issuer := b.cfg.Issuer
	if err := b.buildTokens(ctx); err != nil {
		return fmt.Errorf("authentication: %w", err)
	}
	a.APIAudiences = authenticator.Audiences{issuer}
	byToken := a.Authenticator
	// The file may say it in another way.
	if said, err := b.cfg.Access.SaysAnonymous(issuer); err != nil {
		return fmt.Errorf("authentication: %w", err)
	} else if !said {
		byToken = union.NewFailOnError(byToken, anonymousOutside(anonymous.NewAuthenticator(nil)))
	}
	byCert := rememberCerts(x509.NewDynamic(b.clientCA.VerifyOptions, x509.CommonNameUserConversion))
	a.Authenticator = slowStrangers(union.NewFailOnError(group.NewAuthenticatedGroupAdder(byCert), byToken))
	return nil
}

// buildTokens sets who may be by a token. Without a file it leaves upstream's options aside: they make compilers of its expressions in any case,
// which takes a tenth of a second and some megabytes of garbage at each start.
func (b *build) buildTokens(ctx context.Context) (err error) {
	a, issuer, access := &b.generic.Authentication, b.cfg.Issuer, b.cfg.Access.WithDefaults()
	b.bootstrap = bootstrapSecrets(b.client)
	loop := restclient.CopyConfig(b.generic.LoopbackClientConfig)
	loop.Transport = b.loopback.Decorated(lastknown.AnyAge)
	core, err := corev1client.NewForConfig(loop)
	if err != nil {
		return fmt.Errorf("in-process client: %w", err)
	}
	if access.Authentication == "" {
		a.Authenticator, _, _, b.schemes, err = kubeauthenticator.Config{
			APIAudiences: authenticator.Audiences{issuer}, ServiceAccountIssuers: []string{issuer}, ServiceAccountLookup: true,
			ServiceAccountPublicKeysGetter: b.tokens.keys, ServiceAccountTokenGetter: liveTokenGetter{core}, SecretsWriter: b.client.CoreV1(),
			BootstrapToken:              true,
			BootstrapTokenAuthenticator: bootstrap.NewTokenAuthenticator(b.bootstrap.Core().V1().Secrets().Lister().Secrets(metav1.NamespaceSystem)),
			WebhookTokenAuthnConfigFile: access.TokenWebhook, WebhookTokenAuthnVersion: "v1", WebhookTokenAuthnCacheTTL: access.TokenWebhookTTL,
			WebhookRetryBackoff: genericoptions.DefaultAuthWebhookRetryBackoff(), TokenSuccessCacheTTL: verdictTTL, APIServerID: b.generic.APIServerID,
		}.New(ctx)
		return err
	}
	o := access.AuthenticationOptions(issuer)
	o.TokenSuccessCacheTTL = verdictTTL
	o.ServiceAccounts.ExternalPublicKeysGetter = b.tokens.keys
	o.ServiceAccounts.OptionalTokenGetter = func(informers.SharedInformerFactory) serviceaccount.ServiceAccountTokenGetter {
		return liveTokenGetter{core}
	}
	view := leanInformers{SharedInformerFactory: b.informers, secrets: b.bootstrap}
	described := &openapicommon.OpenAPIV3Config{}
	err = o.ApplyTo(ctx, a, nil, nil, &openapicommon.Config{}, described, b.client, view, b.generic.APIServerID)
	b.schemes = described.SecuritySchemes
	return err
}

// openPaths are what anonymous requests may name: health, the version, and discovery of the API and of the issuer of tokens. A path that ends
// in a slash stands for all below it. Authorization has its say as well: see bindings.
var openPaths = []string{"/livez", "/livez/", "/readyz", "/readyz/", "/healthz", "/healthz/", "/version", "/version/",
	"/api", "/api/", "/apis", "/apis/", serviceaccount.OpenIDConfigPath, serviceaccount.JWKSPath}

// anonymousOutside lets requests be anonymous for openPaths, and never for a resource.
func anonymousOutside(a authenticator.Request) authenticator.Request {
	return authenticator.RequestFunc(func(r *http.Request) (*authenticator.Response, bool, error) {
		if i, ok := apirequest.RequestInfoFrom(r.Context()); !ok || i.IsResourceRequest {
			return nil, false, nil
		}
		if !slices.ContainsFunc(openPaths, func(p string) bool {
			return r.URL.Path == p || p[len(p)-1] == '/' && strings.HasPrefix(r.URL.Path, p)
		}) {
			return nil, false, nil
		}
		return a.AuthenticateRequest(r)
	})
}

// bootstrapSecrets is a view of the Secrets that are bootstrap tokens, and of no others.
func bootstrapSecrets(client kubernetes.Interface) informers.SharedInformerFactory {
	return informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(metav1.NamespaceSystem), informers.WithTransform(dropManagedFields),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) {
			o.FieldSelector = "type=" + string(corev1.SecretTypeBootstrapToken)
		}))
}

// rememberCerts remembers successful checks of client certificates for a short time. Upstream
// verifies the whole chain at every request: a tenth of what a small create costs.
func rememberCerts(a authenticator.Request) authenticator.Request {
	verdicts := cache.NewLRUExpireCache(maxCertVerdicts)
	return authenticator.RequestFunc(func(r *http.Request) (*authenticator.Response, bool, error) {
		if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
			return nil, false, nil
		}
		leaf := r.TLS.PeerCertificates[0]
		// The verdict may depend on what the client sent along with its certificate.
		h := sha256.New()
		for _, c := range r.TLS.PeerCertificates {
			h.Write(c.Raw)
		}
		key := [sha256.Size]byte(h.Sum(nil))
		if v, ok := verdicts.Get(key); ok {
			resp := *v.(*authenticator.Response)
			return &resp, true, nil
		}
		resp, ok, err := a.AuthenticateRequest(r)
		if ok && err == nil {
			saved := *resp
			verdicts.Add(key, &saved, min(verdictTTL, time.Until(leaf.NotAfter)))
		}
		return resp, ok, err
	})
}

// liveTokenGetter looks up through the API what a token is bound to. Upstream's keeps all pods,
// secrets and nodes in memory for it.
type liveTokenGetter struct{ client corev1client.CoreV1Interface }

func (g liveTokenGetter) GetServiceAccount(ctx context.Context, namespace, name string) (*corev1.ServiceAccount, error) {
	return g.client.ServiceAccounts(namespace).Get(ctx, name, metav1.GetOptions{})
}

func (g liveTokenGetter) GetPod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	return g.client.Pods(namespace).Get(ctx, name, metav1.GetOptions{})
}

func (g liveTokenGetter) GetSecret(ctx context.Context, namespace, name string) (*corev1.Secret, error) {
	return g.client.Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
}

func (g liveTokenGetter) GetNode(ctx context.Context, name string) (*corev1.Node, error) {
	return g.client.Nodes().Get(ctx, name, metav1.GetOptions{})
}
