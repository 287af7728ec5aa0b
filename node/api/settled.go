package api

import (
	"context"
	"fmt"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/component-helpers/auth/rbac/reconciliation"
	schedulingv1 "k8s.io/kubernetes/pkg/apis/scheduling/v1"
	rbacrest "k8s.io/kubernetes/pkg/registry/rbac/rest"
	schedulingrest "k8s.io/kubernetes/pkg/registry/scheduling/rest"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"
)

// settled has, for hooks of upstream's that sleep a second before they look whether there is anything to do, and that the server is not ready
// without, what looks at once: true means that there is nothing.
var settled = map[string]func(context.Context, kubernetes.Interface) (bool, error){
	rbacrest.PostStartHookName:       rolesSettled,
	schedulingrest.PostStartHookName: prioritiesSettled,
}

func prioritiesSettled(ctx context.Context, client kubernetes.Interface) (bool, error) {
	for _, c := range schedulingv1.SystemPriorityClasses() {
		_, err := client.SchedulingV1().PriorityClasses().Get(ctx, c.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("PriorityClass %s: %w", c.Name, err)
		}
	}
	return true, nil
}

// Look-ups in lists. A dry run of upstream's reconciliation does nothing else.
type (
	knownRoles struct {
		reconciliation.RuleOwnerModifier // nil
		known                            map[[2]string]reconciliation.RuleOwner
	}
	knownBindings struct {
		reconciliation.RoleBindingModifier // nil
		known                              map[[2]string]reconciliation.RoleBinding
	}
)

// Get implements reconciliation.RuleOwnerModifier.
func (r knownRoles) Get(namespace, name string) (reconciliation.RuleOwner, error) {
	if o, ok := r.known[[2]string{namespace, name}]; ok {
		return o, nil
	}
	return nil, apierrors.NewNotFound(rbacv1.Resource("roles"), name)
}

// Get implements reconciliation.RoleBindingModifier.
func (r knownBindings) Get(namespace, name string) (reconciliation.RoleBinding, error) {
	if o, ok := r.known[[2]string{namespace, name}]; ok {
		return o, nil
	}
	return nil, apierrors.NewNotFound(rbacv1.Resource("rolebindings"), name)
}

// rolesSettled compares what there is with upstream's policy, by upstream's own rules. It reads lists, where the hook reads each of some 150 objects.
func rolesSettled(ctx context.Context, client kubernetes.Interface) (bool, error) {
	var wanted []reconciliation.RuleOwner
	var bound []reconciliation.RoleBinding
	for _, r := range append(bootstrappolicy.ClusterRoles(), bootstrappolicy.ControllerRoles()...) {
		wanted = append(wanted, reconciliation.ClusterRoleRuleOwner{ClusterRole: &r})
	}
	for _, b := range append(bootstrappolicy.ClusterRoleBindings(), bootstrappolicy.ControllerRoleBindings()...) {
		bound = append(bound, reconciliation.ClusterRoleBindingAdapter{ClusterRoleBinding: &b})
	}
	namespaces := map[string]bool{}
	for ns, list := range bootstrappolicy.NamespaceRoles() {
		namespaces[ns] = true
		for _, r := range list {
			wanted = append(wanted, reconciliation.RoleRuleOwner{Role: &r})
		}
	}
	for ns, list := range bootstrappolicy.NamespaceRoleBindings() {
		namespaces[ns] = true
		for _, b := range list {
			bound = append(bound, reconciliation.RoleBindingAdapter{RoleBinding: &b})
		}
	}
	have, holds, err := listRoles(ctx, client, namespaces)
	if err != nil {
		return false, err
	}
	for _, r := range wanted {
		o := reconciliation.ReconcileRoleOptions{Role: r, Client: have}
		if result, err := o.Run(); err != nil || result.Operation != reconciliation.ReconcileNone {
			return false, err
		}
	}
	for _, b := range bound {
		o := reconciliation.ReconcileRoleBindingOptions{RoleBinding: b, Client: holds}
		if result, err := o.Run(); err != nil || result.Operation != reconciliation.ReconcileNone {
			return false, err
		}
	}
	return true, nil
}

// listRoles reads those of the cluster and of some namespaces.
func listRoles(ctx context.Context, client kubernetes.Interface, namespaces map[string]bool) (knownRoles, knownBindings, error) {
	rs, bs := map[[2]string]reconciliation.RuleOwner{}, map[[2]string]reconciliation.RoleBinding{}
	api := client.RbacV1()
	all, err := api.ClusterRoles().List(ctx, metav1.ListOptions{})
	if err != nil {
		return knownRoles{}, knownBindings{}, fmt.Errorf("ClusterRoles: %w", err)
	}
	for i, r := range all.Items {
		rs[[2]string{"", r.Name}] = reconciliation.ClusterRoleRuleOwner{ClusterRole: &all.Items[i]}
	}
	bound, err := api.ClusterRoleBindings().List(ctx, metav1.ListOptions{})
	if err != nil {
		return knownRoles{}, knownBindings{}, fmt.Errorf("ClusterRoleBindings: %w", err)
	}
	for i, b := range bound.Items {
		bs[[2]string{"", b.Name}] = reconciliation.ClusterRoleBindingAdapter{ClusterRoleBinding: &bound.Items[i]}
	}
	for ns := range namespaces {
		all, err := api.Roles(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return knownRoles{}, knownBindings{}, fmt.Errorf("Roles of %s: %w", ns, err)
		}
		for i, r := range all.Items {
			rs[[2]string{ns, r.Name}] = reconciliation.RoleRuleOwner{Role: &all.Items[i]}
		}
		bound, err := api.RoleBindings(ns).List(ctx, metav1.ListOptions{})
		if err != nil {
			return knownRoles{}, knownBindings{}, fmt.Errorf("RoleBindings of %s: %w", ns, err)
		}
		for i, b := range bound.Items {
			bs[[2]string{ns, b.Name}] = reconciliation.RoleBindingAdapter{RoleBinding: &bound.Items[i]}
		}
	}
	return knownRoles{known: rs}, knownBindings{known: bs}, nil
}
