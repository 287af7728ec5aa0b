package api

import (
	"context"
	"fmt"

	genericoptions "k8s.io/apiserver/pkg/server/options"
	authzconfig "k8s.io/kubernetes/pkg/kubeapiserver/authorizer"
)

// buildAuthorization sets who may do what: system:masters all, nodes what their pods need, the rest by RBAC, or as the
// file in Config.Access says.
func (b *build) buildAuthorization(ctx context.Context) error {
	chain, text, err := b.cfg.Access.LoadAuthorization()
	if err != nil {
		return fmt.Errorf("authorization: %w", err)
	}
	b.nodePods = newPodFeed(b.client)
	c := authzconfig.Config{
		// The graph of the Node authorizer would keep all pods.
		VersionedInformerFactory:   leanInformers{SharedInformerFactory: b.informers, pods: podInformer{feed: b.nodePods}},
		WebhookRetryBackoff:        genericoptions.DefaultAuthWebhookRetryBackoff(),
		AuthorizationConfiguration: chain, InitialAuthorizationConfigurationData: text, ReloadFile: b.cfg.Access.Authorization,
	}
	if b.generic.Authorization.Authorizer, b.generic.RuleResolver, err = c.New(ctx, b.generic.APIServerID); err != nil {
		return fmt.Errorf("authorization: %w", err)
	}
	return nil
}
