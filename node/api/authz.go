package api

import (
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizerfactory"
	authzunion "k8s.io/apiserver/pkg/authorization/union"
	"k8s.io/kubernetes/pkg/auth/nodeidentifier"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/node"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"
)

// buildAuthorization sets who may do what: system:masters all, nodes what their pods need, the rest
// by RBAC.
func (b *build) buildAuthorization() {
	r := b.informers.Rbac().V1()
	byRole := rbac.New(&rbac.RoleGetter{Lister: r.Roles().Lister()}, &rbac.RoleBindingLister{Lister: r.RoleBindings().Lister()},
		&rbac.ClusterRoleGetter{Lister: r.ClusterRoles().Lister()}, &rbac.ClusterRoleBindingLister{Lister: r.ClusterRoleBindings().Lister()})

	node.RegisterMetrics()
	graph := node.NewGraph()
	b.nodePods = newPodFeed(b.client)
	i := b.informers
	node.AddGraphEventHandlers(graph, i.Core().V1().Nodes(), podInformer{feed: b.nodePods}, i.Core().V1().PersistentVolumes(),
		i.Storage().V1().VolumeAttachments(), i.Resource().V1().ResourceSlices(), nil)
	forNodes := node.NewAuthorizer(graph, nodeidentifier.NewDefaultNodeIdentifier(), bootstrappolicy.NodeRules())

	b.generic.Authorization.Authorizer = authzunion.New(authorizerfactory.NewPrivilegedGroups(user.SystemPrivilegedGroup), forNodes, byRole)
	b.generic.RuleResolver = authzunion.NewRuleResolvers(forNodes, byRole)
}
