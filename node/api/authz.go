package api

import (
	"context"
	"fmt"
	"strings"

	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
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
	// With a file, others may have a say before the node authorizer.
	alone := b.cfg.Access.Authorization == ""
	b.nodePods = newPodFeed(b.client, !alone)
	c := authzconfig.Config{
		// The graph of the Node authorizer would keep all pods.
		VersionedInformerFactory:   leanInformers{SharedInformerFactory: b.informers, pods: podInformer{feed: b.nodePods}},
		WebhookRetryBackoff:        genericoptions.DefaultAuthWebhookRetryBackoff(),
		AuthorizationConfiguration: chain, InitialAuthorizationConfigurationData: text, ReloadFile: b.cfg.Access.Authorization,
	}
	if b.generic.Authorization.Authorizer, b.generic.RuleResolver, err = c.New(ctx, b.generic.APIServerID); err != nil {
		return fmt.Errorf("authorization: %w", err)
	}
	if alone {
		b.generic.Authorization.Authorizer = b.nodePods.authorize(b.generic.Authorization.Authorizer)
	}
	b.generic.Authorization.Authorizer = openDiscovery(b.generic.Authorization.Authorizer)
	return nil
}

// openDiscovery allows anonymous requests to discover groups at this server, if next has no opinion. A role that says so would speak for
// aggregated API servers as well, which ask here who may what: one that has started a moment ago and does not know the front proxy yet takes
// everybody as anonymous, and would pass for available when it answers discovery, while each request of a user is forbidden.
func openDiscovery(next authorizer.Authorizer) authorizer.Authorizer {
	return authorizer.AuthorizerFunc(func(ctx context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
		decision, reason, err := next.Authorize(ctx, a)
		if decision != authorizer.DecisionNoOpinion || a.IsResourceRequest() || a.GetVerb() != "get" || !strings.HasPrefix(a.GetPath(), "/apis/") {
			return decision, reason, err
		}
		if u := a.GetUser(); u == nil || u.GetName() != user.Anonymous {
			return decision, reason, err
		}
		// A review is about a path, too, but it is not the request for that path.
		if asked, ok := apirequest.RequestInfoFrom(ctx); !ok || asked.IsResourceRequest || asked.Path != a.GetPath() {
			return decision, reason, err
		}
		return authorizer.DecisionAllow, "discovery is open", nil
	})
}
