package api

import (
	"context"
	"net/http"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Who may get a pod and list nodes may ask why it is where it is.
func TestWhoMayAskWhy(t *testing.T) {
	ctx, k := t.Context(), admin(t)
	ns := namespace(t, k)
	ask := func(ctx context.Context, path, user string, groups ...string) (string, error) {
		result := client(t, cluster.as(cluster.servers[1], user, groups...)).Discovery().RESTClient().Get().AbsPath(path).Do(ctx)
		b, _ := result.Raw()
		return string(b), result.Error() // Raw gives no words of refusals
	}
	path := WhyPath + ns + "/p"
	if got, err := ask(ctx, path, "admin", "system:masters"); err != nil || !strings.Contains(got, `"pod":"p"`) {
		t.Errorf("an administrator: %s, %v", got, err)
	}
	wera := func(ctx context.Context) error { _, err := ask(ctx, path, "wera"); return err }
	if err := wera(ctx); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "cannot get resource \"pods\"") {
		t.Errorf("without any right: %v", err)
	}
	if _, err := k.RbacV1().RoleBindings(ns).Create(ctx, roleBinding("view", "User", "wera"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		if err := wera(ctx); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "cannot list resource \"nodes\"") {
			return err
		}
		return nil
	})
	if _, err := k.RbacV1().ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: ns}, Rules: []rbacv1.PolicyRule{{Verbs: []string{"list"}, APIGroups: []string{""}, Resources: []string{"nodes"}}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.RbacV1().ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: metav1.ObjectMeta{Name: ns}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: ns},
		Subjects: []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: "User", Name: "wera"}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, wera)
	for path, code := range map[string]int32{WhyPath + ns + "/gone": http.StatusNotFound, WhyPath + ns + "/leaderless": http.StatusServiceUnavailable, WhyPath + ns: http.StatusBadRequest} {
		_, err := ask(ctx, path, "admin", "system:masters")
		if status, ok := err.(apierrors.APIStatus); !ok || status.Status().Code != code {
			t.Errorf("%s: %v, want %d", path, err, code)
		}
	}
}
