package api

import (
	"context"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	pluginpolicy "k8s.io/apiserver/pkg/admission/plugin/policy/validating"
	"k8s.io/apiserver/pkg/cel/openapi/resolver"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/informers"
	informerscorev1 "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	listersv1 "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
	"k8s.io/kubernetes/pkg/controller/bootstrap"
	serviceaccountcontroller "k8s.io/kubernetes/pkg/controller/serviceaccount"
	policystatus "k8s.io/kubernetes/pkg/controller/validatingadmissionpolicystatus"
	"k8s.io/kubernetes/pkg/serviceaccount"
	"k8s.io/utils/clock"
)

// Controllers of upstream's that need more of Kubernetes than scheduler/controller may import. The leader runs them, each with informers of
// its own, so that nothing of them is left when it leads no more.

const (
	// tokenWorkers is how many Secrets are filled at once, and policyWorkers how many policies are checked; upstream's.
	tokenWorkers  = 5
	policyWorkers = 5
	// unusedTokenLife is how long a token Secret that was made for a ServiceAccount may go unused before it is invalid, and as
	// long again before it is deleted; upstream's.
	unusedTokenLife = 365 * 24 * time.Hour
)

// keepTokens fills Secrets of type kubernetes.io/service-account-token, deletes those whose ServiceAccount is gone, and those that nobody has
// used for a year by clk.
func (s *Server) keepTokens(ctx context.Context, client kubernetes.Interface, clk clock.Clock) error {
	// Of Secrets, only those; of pods, none: the cleaner asks once a day.
	f := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(dropManagedFields))
	secrets := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(dropManagedFields), informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.FieldSelector = fields.OneTermEqualSelector("type", string(corev1.SecretTypeServiceAccountToken)).String()
	})).Core().V1().Secrets()
	generator, err := serviceaccount.JWTTokenGenerator(serviceaccount.LegacyIssuer, s.cfg.SAKey)
	if err != nil {
		return fmt.Errorf("token Secrets: %w", err)
	}
	c, err := serviceaccountcontroller.NewTokensController(klog.FromContext(ctx), f.Core().V1().ServiceAccounts(), secrets, client,
		serviceaccountcontroller.TokensControllerOptions{TokenGenerator: generator, RootCA: s.cfg.ClientCA})
	if err != nil {
		return fmt.Errorf("token Secrets: %w", err)
	}
	cleaner, err := serviceaccountcontroller.NewLegacySATokenCleaner(f.Core().V1().ServiceAccounts(), secrets, livePodsOnly{client}, client, clk,
		serviceaccountcontroller.LegacySATokenCleanerOptions{CleanUpPeriod: unusedTokenLife, SyncInterval: serviceaccountcontroller.DefaultCleanerSyncInterval})
	if err != nil {
		return fmt.Errorf("token Secrets: %w", err)
	}
	done := make(chan struct{}, 2)
	go func() { secrets.Informer().RunWithContext(ctx); done <- struct{}{} }()
	go func() { cleaner.Run(ctx); done <- struct{}{} }()
	f.StartWithContext(ctx)
	c.Run(ctx, tokenWorkers)
	f.Shutdown()
	<-done
	<-done
	return nil
}

// dropBootstrapTokens deletes bootstrap tokens that are over. (They are refused before that.)
func (s *Server) dropBootstrapTokens(ctx context.Context, client kubernetes.Interface) error {
	f := bootstrapSecrets(client)
	c, err := bootstrap.NewTokenCleaner(client, f.Core().V1().Secrets(), bootstrap.DefaultTokenCleanerOptions())
	if err != nil {
		return fmt.Errorf("bootstrap tokens: %w", err)
	}
	f.StartWithContext(ctx)
	c.Run(ctx)
	f.Shutdown()
	return nil
}

// livePodsOnly lists pods when asked, and watches none.
type livePodsOnly struct{ client kubernetes.Interface }

func (p livePodsOnly) Lister() listersv1.PodLister {
	return livePodLister{p.client, metav1.NamespaceAll}
}

func (p livePodsOnly) Informer() cache.SharedIndexInformer { return synced{} }

var _ informerscorev1.PodInformer = livePodsOnly{}

// synced is an informer that nobody may ask for more than whether it is ready.
type synced struct{ cache.SharedIndexInformer }

func (synced) HasSynced() bool { return true }

// checkPolicies writes into the status of ValidatingAdmissionPolicies what is wrong with the types in their expressions.
func (s *Server) checkPolicies(ctx context.Context, client kubernetes.Interface) error {
	f := informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(dropManagedFields))
	c, err := policystatus.NewController(f.Admissionregistration().V1().ValidatingAdmissionPolicies(), client.AdmissionregistrationV1().ValidatingAdmissionPolicies(),
		&pluginpolicy.TypeChecker{
			SchemaResolver: &resolver.ClientDiscoveryResolver{Discovery: client.Discovery()},
			RestMapper:     restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(client.Discovery())),
		})
	if err != nil {
		return fmt.Errorf("types in policies: %w", err)
	}
	f.StartWithContext(ctx)
	c.Run(ctx, policyWorkers)
	f.Shutdown()
	return nil
}
