package api

import (
	"slices"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	rbacrest "k8s.io/kubernetes/pkg/registry/rbac/rest"
	schedulingrest "k8s.io/kubernetes/pkg/registry/scheduling/rest"
)

// What a server that starts finds settled is so; what is missing is seen, and made by the next one that starts.
func TestSettled(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	missing := func() (hooks []string) {
		t.Helper()
		for name, look := range settled {
			ok, err := look(ctx, k)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if !ok {
				hooks = append(hooks, name)
			}
		}
		slices.Sort(hooks)
		return hooks
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check := func(what string, want ...string) {
		t.Helper()
		if got := missing(); !slices.Equal(got, want) {
			t.Errorf("%s: something is to be done by %v, want %v", what, got, want)
		}
	}
	check("on a server that is ready")
	roles := k.RbacV1().ClusterRoles()
	_, err := cluster.store.KV.Delete(ctx, "/registry/priorityclasses/system-node-critical") // the API does not let go of it
	must(err)
	check("without a PriorityClass", schedulingrest.PostStartHookName)
	must(k.RbacV1().ClusterRoleBindings().Delete(ctx, "system:kube-dns", metav1.DeleteOptions{}))
	check("without a binding", rbacrest.PostStartHookName, schedulingrest.PostStartHookName)
	must(another(t, func(*Config) {}).stop())
	check("after the start of a server")
	must(k.RbacV1().RoleBindings(metav1.NamespaceSystem).Delete(ctx, "system::leader-locking-kube-scheduler", metav1.DeleteOptions{}))
	check("without a binding in a namespace", rbacrest.PostStartHookName)
	must(another(t, func(*Config) {}).stop())
	check("after the start of one more")
	r, err := roles.Get(ctx, "system:basic-user", metav1.GetOptions{})
	must(err)
	rules := r.Rules
	r.Rules = nil
	r, err = roles.Update(ctx, r, metav1.UpdateOptions{})
	must(err)
	check("without a rule", rbacrest.PostStartHookName)
	r.Rules = rules
	_, err = roles.Update(ctx, r, metav1.UpdateOptions{})
	must(err)
	check("with it")
}
