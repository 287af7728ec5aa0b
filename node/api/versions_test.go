package api

import (
	"slices"
	"strings"
	"testing"

	resourcev1beta1 "k8s.io/api/resource/v1beta1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	resourceapply "k8s.io/client-go/applyconfigurations/resource/v1beta1"
)

// Versions that upstream does not serve by default come with RuntimeConfig: discovery, OpenAPI, conversion and apply.
func TestMoreVersions(t *testing.T) {
	ctx := t.Context()
	cfg := cluster.config("beta")
	cfg.StorePrefix = "/beta" // a cluster of its own: all its servers serve the same
	cfg.RuntimeConfig = map[string]string{"api/beta": "true", "storage.k8s.io/v1beta1": "false", "resource.k8s.io/v1beta2": "false", "batch/v1/cronjobs": "false"}
	s, err := cluster.start(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.stop(); err != nil {
			t.Error(err)
		}
	}()
	k := client(t, cluster.as(s, "admin", "system:masters"))
	var served []string
	_, lists, err := k.Discovery().ServerGroupsAndResources()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range lists {
		served = append(served, l.GroupVersion)
		if l.GroupVersion == "batch/v1" && slices.ContainsFunc(l.APIResources, func(r metav1.APIResource) bool { return r.Name == "cronjobs" }) {
			t.Error("CronJobs are served")
		}
	}
	for gv, want := range map[string]bool{"resource.k8s.io/v1": true, "resource.k8s.io/v1beta1": true, "networking.k8s.io/v1beta1": true, "coordination.k8s.io/v1beta1": false,
		"storage.k8s.io/v1beta1": false, "resource.k8s.io/v1beta2": false, "resource.k8s.io/v1alpha3": false} {
		if got := slices.Contains(served, gv); got != want && gv != "coordination.k8s.io/v1beta1" {
			t.Errorf("%s served: %v, want %v", gv, got, want)
		}
		b, err := k.Discovery().RESTClient().Get().AbsPath("/openapi/v3/apis/" + gv).DoRaw(ctx)
		if want && (err != nil || !strings.Contains(string(b), "/apis/"+gv+"/")) || !want && gv[:7] != "coordin" && err == nil {
			t.Errorf("OpenAPI of %s: %d bytes, %v", gv, len(b), err)
		}
	}
	b, err := k.Discovery().RESTClient().Get().AbsPath("/openapi/v2").SetHeader("Accept", "application/json").DoRaw(ctx)
	if err != nil || !strings.Contains(string(b), `"/apis/resource.k8s.io/v1beta1/`) || strings.Contains(string(b), `"/apis/resource.k8s.io/v1beta2/`) || strings.Contains(string(b), `"/apis/internal.apiserver.k8s.io/`) {
		t.Errorf("OpenAPI version 2: %d bytes, %v", len(b), err)
	}
	class := resourceapply.DeviceClass("x").WithSpec(resourceapply.DeviceClassSpec().WithSelectors(resourceapply.DeviceSelector().WithCEL(resourceapply.CELDeviceSelector().WithExpression("true"))))
	if _, err := k.ResourceV1beta1().DeviceClasses().Apply(ctx, class, metav1.ApplyOptions{FieldManager: "one"}); err != nil {
		t.Fatal(err)
	}
	if c, err := k.ResourceV1().DeviceClasses().Get(ctx, "x", metav1.GetOptions{}); err != nil || len(c.Spec.Selectors) != 1 || c.Spec.Selectors[0].CEL.Expression != "true" {
		t.Errorf("as v1: %+v, %v", c, err)
	}
	if _, err := k.ResourceV1beta1().DeviceClasses().Create(ctx, &resourcev1beta1.DeviceClass{ObjectMeta: metav1.ObjectMeta{Name: "A_b"}}, metav1.CreateOptions{}); !apierrors.IsInvalid(err) {
		t.Errorf("bad name: %v", err)
	}
}

func TestBadRuntimeConfig(t *testing.T) {
	for _, bad := range []map[string]string{{"nosuch/v1": "true"}, {"apps/v9": "true"}, {"api/all": "perhaps"}, {"apps/v1": "x"}} {
		cfg := cluster.config("x")
		cfg.RuntimeConfig = bad
		cfg.setDefaults()
		if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "RuntimeConfig") {
			t.Errorf("%v: %v", bad, err)
		}
	}
}
