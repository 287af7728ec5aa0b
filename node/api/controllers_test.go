package api

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	resourcev1 "k8s.io/api/resource/v1"
	apiextv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	apiregv1 "k8s.io/kube-aggregator/pkg/apis/apiregistration/v1"
	"skein.io/skein/gossip/identity"
	"skein.io/skein/scheduler"
	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/garbage"
	namespaces "skein.io/skein/scheduler/controller/namespace"
	"skein.io/skein/scheduler/controller/quota"
	"skein.io/skein/scheduler/controller/serviceaccount"
)

// nobodyKnown is a failure detector that knows no node.
type nobodyKnown struct{}

func (nobodyKnown) Verdicts() map[string]controller.NodeHealth { return nil }
func (nobodyKnown) Subscribe() (<-chan struct{}, func())       { return make(chan struct{}), func() {} }

// withControllers runs placement and controllers, more beside the usual ones, on the first server until the test ends.
func withControllers(t *testing.T, more ...func(controller.Deps) controller.Controller) {
	t.Helper()
	loop := cluster.servers[0].Loopback("controllers", nil)
	k := client(t, loop)
	meta, err := metadata.NewForConfig(loop)
	if err != nil {
		t.Fatal(err)
	}
	cfg := scheduler.DefaultConfig()
	cfg.Client, cfg.Metadata, cfg.Health, cfg.PodCIDR = k, meta, nobodyKnown{}, netip.MustParsePrefix("10.244.0.0/16")
	cfg.RootCA = identity.EncodeCert(cluster.ca.Cert)
	cfg.Quota = func(f informers.SharedInformerFactory) controller.Quota { return NewQuotaUsage(f, k, meta) }
	for _, mk := range append([]func(controller.Deps) controller.Controller{garbage.New, namespaces.New, quota.New, serviceaccount.New}, more...) {
		cfg.Controllers = append(cfg.Controllers, func(d controller.Deps, _ scheduler.Config) controller.Controller { return mk(d) })
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- scheduler.Run(ctx, cfg) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// freshNamespace makes a namespace and waits for what controllers put into it.
func freshNamespace(t *testing.T, k kubernetes.Interface) string {
	t.Helper()
	ns, err := k.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "c-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		_, err := k.CoreV1().ServiceAccounts(ns.Name).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	return ns.Name
}

func gone(t *testing.T, what string, get func(context.Context) error) {
	t.Helper()
	eventually(t, func(ctx context.Context) error {
		if err := get(ctx); !apierrors.IsNotFound(err) {
			return fmt.Errorf("%s is still there: %v", what, err)
		}
		return nil
	})
}

// crdOf makes a CustomResourceDefinition of a namespaced kind whose objects take anything, and removes it when the test ends.
func crdOf(t *testing.T, plural, kind string, change func(*apiextv1.CustomResourceDefinition)) *apiextv1.CustomResourceDefinition {
	t.Helper()
	crd := &apiextv1.CustomResourceDefinition{ObjectMeta: metav1.ObjectMeta{Name: plural + ".test.skein.io"}, Spec: apiextv1.CustomResourceDefinitionSpec{
		Group: "test.skein.io", Scope: apiextv1.NamespaceScoped, Names: apiextv1.CustomResourceDefinitionNames{Plural: plural, Singular: strings.ToLower(kind), Kind: kind, ListKind: kind + "List"},
		Versions: []apiextv1.CustomResourceDefinitionVersion{{Name: "v1", Served: true, Storage: true, Schema: &apiextv1.CustomResourceValidation{
			OpenAPIV3Schema: &apiextv1.JSONSchemaProps{Type: "object", XPreserveUnknownFields: ptr(true)}}}},
	}}
	if change != nil {
		change(crd)
	}
	crds := definitions(t)
	out, err := crds.Create(t.Context(), crd, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if err := crds.Delete(ctx, crd.Name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
		gone(t, crd.Name, func(context.Context) error { _, err := crds.Get(ctx, crd.Name, metav1.GetOptions{}); return err })
	})
	eventually(t, func(ctx context.Context) error {
		if out, err = crds.Get(ctx, crd.Name, metav1.GetOptions{}); err != nil {
			return err
		}
		if !serves(out, out.Spec.Versions[0].Name) {
			return fmt.Errorf("conditions %+v", out.Status.Conditions)
		}
		return nil
	})
	return out
}

func custom(t *testing.T, s *running, ns, plural string) dynamic.ResourceInterface {
	t.Helper()
	dyn, err := dynamic.NewForConfig(cluster.as(s, "admin", "system:masters"))
	if err != nil {
		t.Fatal(err)
	}
	return dyn.Resource(schema.GroupVersionResource{Group: "test.skein.io", Version: "v1", Resource: plural}).Namespace(ns)
}

func object(kind, name string, fields map[string]any, owners ...metav1.OwnerReference) *unstructured.Unstructured {
	u := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "test.skein.io/v1", "kind": kind, "metadata": map[string]any{"name": name}}}
	for k, v := range fields {
		u.Object[k] = v
	}
	u.SetOwnerReferences(owners)
	return u
}

func ownedBy(u *unstructured.Unstructured, blocks bool) metav1.OwnerReference {
	return metav1.OwnerReference{APIVersion: u.GetAPIVersion(), Kind: u.GetKind(), Name: u.GetName(), UID: u.GetUID(), BlockOwnerDeletion: &blocks}
}

// Objects of kinds that were defined a moment ago own and are owned like any others.
func TestGarbageOfCustomResources(t *testing.T) {
	crdOf(t, "spools", "Spool", nil)
	withControllers(t)
	ctx, k := t.Context(), admin(t)
	ns := freshNamespace(t, k)
	spools := custom(t, cluster.servers[1], ns, "spools")
	create := func(name string, owners ...metav1.OwnerReference) *unstructured.Unstructured {
		t.Helper()
		u, err := spools.Create(ctx, object("Spool", name, nil, owners...), metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	del := func(name string, how metav1.DeletionPropagation) {
		t.Helper()
		if err := spools.Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: &how}); err != nil {
			t.Fatal(err)
		}
	}
	spoolGone := func(name string) {
		t.Helper()
		gone(t, name, func(ctx context.Context) error { _, err := spools.Get(ctx, name, metav1.GetOptions{}); return err })
	}
	config := func(name string, owners ...metav1.OwnerReference) {
		t.Helper()
		if _, err := k.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, OwnerReferences: owners}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	configGone := func(name string) {
		t.Helper()
		gone(t, name, func(ctx context.Context) error {
			_, err := k.CoreV1().ConfigMaps(ns).Get(ctx, name, metav1.GetOptions{})
			return err
		})
	}

	t.Run("background", func(t *testing.T) {
		a := create("back")
		create("back-child", ownedBy(a, false))
		config("back-config", ownedBy(a, true))
		del("back", metav1.DeletePropagationBackground)
		spoolGone("back")
		spoolGone("back-child")
		configGone("back-config")
	})
	t.Run("foreground waits for what blocks", func(t *testing.T) {
		a := create("fore")
		held := object("Spool", "fore-child", nil, ownedBy(a, true))
		held.SetFinalizers([]string{"test.skein.io/hold"})
		if _, err := spools.Create(ctx, held, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		del("fore", metav1.DeletePropagationForeground)
		eventually(t, func(ctx context.Context) error {
			c, err := spools.Get(ctx, "fore-child", metav1.GetOptions{})
			if err == nil && c.GetDeletionTimestamp() == nil {
				err = errors.New("the child is not being deleted")
			}
			return err
		})
		if o, err := spools.Get(ctx, "fore", metav1.GetOptions{}); err != nil || o.GetFinalizers()[0] != metav1.FinalizerDeleteDependents {
			t.Errorf("the owner did not wait: %v", err)
		}
		if _, err := spools.Patch(ctx, "fore-child", "application/merge-patch+json", []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		spoolGone("fore-child")
		spoolGone("fore")
	})
	t.Run("orphan", func(t *testing.T) {
		a := create("orph")
		create("orph-child", ownedBy(a, true))
		del("orph", metav1.DeletePropagationOrphan)
		spoolGone("orph")
		eventually(t, func(ctx context.Context) error {
			c, err := spools.Get(ctx, "orph-child", metav1.GetOptions{})
			if err == nil && (len(c.GetOwnerReferences()) != 0 || c.GetDeletionTimestamp() != nil) {
				err = fmt.Errorf("owners %v", c.GetOwnerReferences())
			}
			return err
		})
	})
	t.Run("a circle of owners", func(t *testing.T) {
		a := create("ring-1")
		b := create("ring-2", ownedBy(a, true))
		c := create("ring-3", ownedBy(b, true))
		a.SetOwnerReferences([]metav1.OwnerReference{ownedBy(c, true)})
		if _, err := spools.Update(ctx, a, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		del("ring-1", metav1.DeletePropagationForeground)
		for _, name := range []string{"ring-1", "ring-2", "ring-3"} {
			spoolGone(name)
		}
	})
	t.Run("an owner that stays and one that waits", func(t *testing.T) {
		a, b := create("two-1"), create("two-2")
		create("two-child", ownedBy(a, true), ownedBy(b, true))
		del("two-1", metav1.DeletePropagationForeground)
		spoolGone("two-1")
		c, err := spools.Get(ctx, "two-child", metav1.GetOptions{})
		if err != nil || len(c.GetOwnerReferences()) != 1 || c.GetOwnerReferences()[0].Name != "two-2" {
			t.Errorf("child %v, %v", c.GetOwnerReferences(), err)
		}
	})
	t.Run("an owner that never was, and one in another namespace", func(t *testing.T) {
		a := create("far")
		config("never", metav1.OwnerReference{APIVersion: "v1", Kind: "Secret", Name: "none", UID: "00000000-0000-4000-8000-000000000001"})
		configGone("never")
		other := freshNamespace(t, k)
		if _, err := k.CoreV1().ConfigMaps(other).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "abroad", OwnerReferences: []metav1.OwnerReference{ownedBy(a, false)}}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		gone(t, "abroad", func(ctx context.Context) error {
			_, err := k.CoreV1().ConfigMaps(other).Get(ctx, "abroad", metav1.GetOptions{})
			return err
		})
		eventually(t, func(ctx context.Context) error {
			l, err := k.CoreV1().Events(other).List(ctx, metav1.ListOptions{FieldSelector: "reason=OwnerRefInvalidNamespace"})
			if err == nil && len(l.Items) == 0 {
				err = errors.New("no event about it")
			}
			return err
		})
		if _, err := spools.Get(ctx, "far", metav1.GetOptions{}); err != nil {
			t.Errorf("the owner: %v", err)
		}
	})
}

// A namespace goes when all is gone that is in it: also of new kinds, and of other servers' kinds; what holds it is told.
func TestNamespaceGoesWithEverythingInIt(t *testing.T) {
	crdOf(t, "reels", "Reel", nil)
	withControllers(t)
	ctx, k := t.Context(), admin(t)
	ns, extNS := freshNamespace(t, k), freshNamespace(t, k)
	ext := startExtension(t, k, extNS)
	service(t, k, extNS, "bolts", ext.addr)
	register(t, extNS, func(s *apiregv1.APIServiceSpec) { s.CABundle = ext.ca })
	awaitAvailable(t, "Passed")
	if _, err := boltsAs(t, cluster.servers[0], ns, "admin", "system:masters").Create(ctx, bolt("b"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	reel := object("Reel", "r", nil)
	reel.SetFinalizers([]string{"test.skein.io/hold"})
	reels := custom(t, cluster.servers[1], ns, "reels")
	if _, err := reels.Create(ctx, reel, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := k.CoreV1().Namespaces().Delete(ctx, ns, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	condition := func(want string, of ...corev1.NamespaceConditionType) {
		t.Helper()
		eventually(t, func(ctx context.Context) error {
			n, err := k.CoreV1().Namespaces().Get(ctx, ns, metav1.GetOptions{})
			if err != nil {
				return err
			}
			for _, have := range n.Status.Conditions {
				if slices.Contains(of, have.Type) && have.Status == corev1.ConditionTrue && strings.Contains(have.Message, want) {
					return nil
				}
			}
			return fmt.Errorf("conditions %+v, want %v %q", n.Status.Conditions, of, want)
		})
	}
	condition("reels.test.skein.io has 1 resource instances", corev1.NamespaceContentRemaining)
	condition("test.skein.io/hold in 1 resource instances", corev1.NamespaceFinalizersRemaining)
	eventually(t, func(context.Context) error {
		ext.storage.mu.Lock()
		defer ext.storage.mu.Unlock()
		if n := len(ext.storage.all); n != 0 {
			return fmt.Errorf("%d bolts are left", n)
		}
		return nil
	})
	if _, err := k.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "late"}}, metav1.CreateOptions{}); !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		t.Errorf("a new object in a namespace that ends: %v", err)
	}
	// While a server of other kinds does not answer, nobody knows whether the namespace is empty.
	if err := k.DiscoveryV1().EndpointSlices(extNS).Delete(ctx, "bolts", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	awaitAvailable(t, "EndpointsNotFound")
	condition(boltGV.Group, corev1.NamespaceDeletionContentFailure, corev1.NamespaceDeletionDiscoveryFailure)
	if _, err := reels.Patch(ctx, "r", "application/merge-patch+json", []byte(`{"metadata":{"finalizers":null}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	gone(t, "r", func(ctx context.Context) error { _, err := reels.Get(ctx, "r", metav1.GetOptions{}); return err })
	if _, err := k.CoreV1().Namespaces().Get(ctx, ns, metav1.GetOptions{}); err != nil {
		t.Errorf("it went though not all kinds were known: %v", err)
	}
	endpoints(t, k, extNS, "bolts")
	gone(t, "the namespace", func(ctx context.Context) error {
		_, err := k.CoreV1().Namespaces().Get(ctx, ns, metav1.GetOptions{})
		return err
	})
}

// Quotas count everything that Kubernetes counts: scopes, objects of new kinds, devices.
func TestQuotas(t *testing.T) {
	crdOf(t, "cones", "Cone", nil)
	withControllers(t)
	ctx, k := t.Context(), admin(t)
	ns := freshNamespace(t, k)
	scope := func(op corev1.ScopeSelectorOperator, s corev1.ResourceQuotaScope, values ...string) *corev1.ScopeSelector {
		return &corev1.ScopeSelector{MatchExpressions: []corev1.ScopedResourceSelectorRequirement{{ScopeName: s, Operator: op, Values: values}}}
	}
	hard := func(of ...string) corev1.ResourceList {
		l := corev1.ResourceList{}
		for _, r := range of {
			l[corev1.ResourceName(r)] = resource.MustParse("10")
		}
		return l
	}
	specs := map[string]corev1.ResourceQuotaSpec{
		"all":         {Hard: hard("pods", "requests.cpu", "limits.memory", "services", "services.nodeports", "configmaps", "secrets", "count/cones.test.skein.io", "count/deployments.apps", "persistentvolumeclaims", "requests.storage", "fast.storageclass.storage.k8s.io/requests.storage", "gpu.deviceclass.resource.k8s.io/devices")},
		"besteffort":  {Hard: hard("pods"), Scopes: []corev1.ResourceQuotaScope{corev1.ResourceQuotaScopeBestEffort}},
		"busy":        {Hard: hard("pods"), Scopes: []corev1.ResourceQuotaScope{corev1.ResourceQuotaScopeNotBestEffort}},
		"terminating": {Hard: hard("pods"), Scopes: []corev1.ResourceQuotaScope{corev1.ResourceQuotaScopeTerminating}},
		"running":     {Hard: hard("pods"), Scopes: []corev1.ResourceQuotaScope{corev1.ResourceQuotaScopeNotTerminating}},
		"critical":    {Hard: hard("pods"), ScopeSelector: scope(corev1.ScopeSelectorOpIn, corev1.ResourceQuotaScopePriorityClass, "system-cluster-critical")},
		"affine":      {Hard: hard("pods"), ScopeSelector: scope(corev1.ScopeSelectorOpExists, corev1.ResourceQuotaScopeCrossNamespacePodAffinity)},
	}
	for name, spec := range specs {
		if _, err := k.CoreV1().ResourceQuotas(ns).Create(ctx, &corev1.ResourceQuota{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	used := func(want map[string]string) {
		t.Helper()
		eventually(t, func(ctx context.Context) error {
			for what, n := range want {
				name, r, _ := strings.Cut(what, " ")
				q, err := k.CoreV1().ResourceQuotas(ns).Get(ctx, name, metav1.GetOptions{})
				if err != nil {
					return err
				}
				have, ok := q.Status.Used[corev1.ResourceName(r)]
				if !ok || have.Cmp(resource.MustParse(n)) != 0 {
					return fmt.Errorf("quota %s: %s of %s used, want %s", name, have.String(), r, n)
				}
			}
			return nil
		})
	}
	none := map[string]string{"all services": "0", "all secrets": "0", "all count/cones.test.skein.io": "0", "all gpu.deviceclass.resource.k8s.io/devices": "0", "all requests.storage": "0"}
	for name := range specs {
		none[name+" pods"] = "0"
	}
	used(none)

	pod := func(name string, change func(*corev1.PodSpec)) {
		t.Helper()
		p := simplePod(name)
		change(&p.Spec)
		if _, err := k.CoreV1().Pods(ns).Create(ctx, p, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	resources := func(s *corev1.PodSpec) {
		s.Containers[0].Resources = corev1.ResourceRequirements{
			Requests: corev1.ResourceList{"cpu": resource.MustParse("500m")}, Limits: corev1.ResourceList{"memory": resource.MustParse("2")}}
	}
	pod("one", resources)
	pod("two", func(s *corev1.PodSpec) { resources(s); s.ActiveDeadlineSeconds = ptr(int64(1000)) })
	pod("three", func(s *corev1.PodSpec) {
		resources(s)
		s.Affinity = &corev1.Affinity{PodAffinity: &corev1.PodAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{{TopologyKey: "zone", Namespaces: []string{"elsewhere"}, LabelSelector: &metav1.LabelSelector{}}}}}
	})
	for i := range 3 {
		if _, err := custom(t, cluster.servers[1], ns, "cones").Create(ctx, object("Cone", fmt.Sprintf("c%d", i), nil), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	class := "fast"
	if _, err := k.CoreV1().PersistentVolumeClaims(ns).Create(ctx, &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Name: "v"}, Spec: corev1.PersistentVolumeClaimSpec{StorageClassName: &class,
		AccessModes: []corev1.PersistentVolumeAccessMode{corev1.ReadWriteOnce}, Resources: corev1.VolumeResourceRequirements{Requests: corev1.ResourceList{"storage": resource.MustParse("7")}}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.ResourceV1().ResourceClaims(ns).Create(ctx, &resourcev1.ResourceClaim{ObjectMeta: metav1.ObjectMeta{Name: "d"}, Spec: resourcev1.ResourceClaimSpec{Devices: resourcev1.DeviceClaim{
		Requests: []resourcev1.DeviceRequest{{Name: "g", Exactly: &resourcev1.ExactDeviceRequest{DeviceClassName: "gpu", AllocationMode: resourcev1.DeviceAllocationModeExactCount, Count: 4}}}}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := k.CoreV1().Services(ns).Create(ctx, &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "s"}, Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeNodePort, Ports: []corev1.ServicePort{{Port: 80}}}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	used(map[string]string{"all pods": "3", "all requests.cpu": "1500m", "all limits.memory": "6", "besteffort pods": "0", "busy pods": "3", "terminating pods": "1", "running pods": "2", "affine pods": "1", "critical pods": "0",
		"all count/cones.test.skein.io": "3", "all requests.storage": "7", "all persistentvolumeclaims": "1", "all fast.storageclass.storage.k8s.io/requests.storage": "7", "all gpu.deviceclass.resource.k8s.io/devices": "4", "all services": "1", "all services.nodeports": "1"})
	over := object("Cone", "", nil)
	over.SetGenerateName("more-")
	for i := range 8 {
		_, err := custom(t, cluster.servers[0], ns, "cones").Create(ctx, over, metav1.CreateOptions{})
		if i < 7 && err != nil || i == 7 && (!apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "exceeded quota: all")) {
			t.Errorf("object %d of a kind of which ten may be: %v", i+4, err)
		}
	}
	// What goes is counted no more.
	if err := custom(t, cluster.servers[0], ns, "cones").DeleteCollection(ctx, metav1.DeleteOptions{}, metav1.ListOptions{}); err != nil {
		t.Fatal(err)
	}
	zero := int64(0)
	if err := k.CoreV1().Pods(ns).Delete(ctx, "two", metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		t.Fatal(err)
	}
	if err := k.ResourceV1().ResourceClaims(ns).Delete(ctx, "d", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	used(map[string]string{"all pods": "2", "terminating pods": "0", "all requests.cpu": "1"})
	t.Logf("a pod that went is taken off after %v", time.Since(began).Round(time.Millisecond))
	used(map[string]string{"all count/cones.test.skein.io": "0", "all gpu.deviceclass.resource.k8s.io/devices": "0"})
	t.Logf("what is not watched after %v", time.Since(began).Round(time.Millisecond))
}

// What each namespace must have comes back when somebody takes it away or changes it.
func TestNamespacesAreFurnished(t *testing.T) {
	withControllers(t)
	ctx, k := t.Context(), admin(t)
	ns := freshNamespace(t, k)
	complete := func(ctx context.Context) error {
		if _, err := k.CoreV1().ServiceAccounts(ns).Get(ctx, "default", metav1.GetOptions{}); err != nil {
			return err
		}
		m, err := k.CoreV1().ConfigMaps(ns).Get(ctx, "kube-root-ca.crt", metav1.GetOptions{})
		if err != nil {
			return err
		}
		if m.Data["ca.crt"] != string(identity.EncodeCert(cluster.ca.Cert)) || len(m.Data) != 1 {
			return fmt.Errorf("kube-root-ca.crt has %v", m.Data)
		}
		return nil
	}
	eventually(t, complete)
	for what, change := range map[string]func() error{
		"ServiceAccount deleted": func() error { return k.CoreV1().ServiceAccounts(ns).Delete(ctx, "default", metav1.DeleteOptions{}) },
		"ConfigMap deleted":      func() error { return k.CoreV1().ConfigMaps(ns).Delete(ctx, "kube-root-ca.crt", metav1.DeleteOptions{}) },
		"ConfigMap changed": func() error {
			_, err := k.CoreV1().ConfigMaps(ns).Patch(ctx, "kube-root-ca.crt", "application/merge-patch+json", []byte(`{"data":{"ca.crt":"wrong","more":"x"}}`), metav1.PatchOptions{})
			return err
		},
	} {
		if err := change(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		eventually(t, complete)
	}
}
