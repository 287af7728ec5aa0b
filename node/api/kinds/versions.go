package kinds

import (
	"fmt"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	admissionregistrationv1alpha1 "k8s.io/api/admissionregistration/v1alpha1"
	admissionregistrationv1beta1 "k8s.io/api/admissionregistration/v1beta1"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authenticationv1alpha1 "k8s.io/api/authentication/v1alpha1"
	authenticationv1beta1 "k8s.io/api/authentication/v1beta1"
	authorizationv1 "k8s.io/api/authorization/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	certificatesv1alpha1 "k8s.io/api/certificates/v1alpha1"
	certificatesv1beta1 "k8s.io/api/certificates/v1beta1"
	coordinationv1 "k8s.io/api/coordination/v1"
	coordinationv1alpha2 "k8s.io/api/coordination/v1alpha2"
	coordinationv1beta1 "k8s.io/api/coordination/v1beta1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	flowcontrolv1beta1 "k8s.io/api/flowcontrol/v1beta1"
	flowcontrolv1beta2 "k8s.io/api/flowcontrol/v1beta2"
	flowcontrolv1beta3 "k8s.io/api/flowcontrol/v1beta3"
	networkingv1 "k8s.io/api/networking/v1"
	networkingv1beta1 "k8s.io/api/networking/v1beta1"
	nodev1 "k8s.io/api/node/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	resourcev1 "k8s.io/api/resource/v1"
	resourcev1alpha3 "k8s.io/api/resource/v1alpha3"
	resourcev1beta1 "k8s.io/api/resource/v1beta1"
	resourcev1beta2 "k8s.io/api/resource/v1beta2"
	schedulingv1 "k8s.io/api/scheduling/v1"
	schedulingv1alpha2 "k8s.io/api/scheduling/v1alpha2"
	storagev1 "k8s.io/api/storage/v1"
	storagev1alpha1 "k8s.io/api/storage/v1alpha1"
	storagev1beta1 "k8s.io/api/storage/v1beta1"
	svmv1beta1 "k8s.io/api/storagemigration/v1beta1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/resourceconfig"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
	cliflag "k8s.io/component-base/cli/flag"
	"k8s.io/kubernetes/pkg/api/legacyscheme"
)

// Resources that the server itself asks the store about.
var (
	Namespaces = corev1.Resource("namespaces")
	Services   = corev1.Resource("services")
)

// Resources says what is served: every stable version, as upstream's pkg/controlplane/instance.go has it by default, and what wanted
// says: upstream's --runtime-config, "GROUP/VERSION", "GROUP/VERSION/RESOURCE", "api/beta", "api/alpha" or "api/all" with "true" or "false". Kinds
// behind a feature gate that is off are not served in any case.
func Resources(wanted map[string]string) (*serverstorage.ResourceConfig, error) {
	r := serverstorage.NewResourceConfig()
	r.EnableVersions(
		admissionregistrationv1.SchemeGroupVersion, corev1.SchemeGroupVersion, authenticationv1.SchemeGroupVersion,
		authorizationv1.SchemeGroupVersion, certificatesv1.SchemeGroupVersion, coordinationv1.SchemeGroupVersion,
		eventsv1.SchemeGroupVersion, rbacv1.SchemeGroupVersion, flowcontrolv1.SchemeGroupVersion, appsv1.SchemeGroupVersion,
		autoscalingv1.SchemeGroupVersion, autoscalingv2.SchemeGroupVersion, batchv1.SchemeGroupVersion, discoveryv1.SchemeGroupVersion,
		networkingv1.SchemeGroupVersion, nodev1.SchemeGroupVersion, policyv1.SchemeGroupVersion, resourcev1.SchemeGroupVersion,
		storagev1.SchemeGroupVersion, schedulingv1.SchemeGroupVersion,
	)
	r.DisableVersions(extraVersions()...) // which can be had
	groups, err := resourceconfig.ParseGroups(wanted)
	if err != nil {
		return nil, fmt.Errorf("versions to serve: %w", err)
	}
	for _, g := range groups {
		if !legacyscheme.Scheme.IsGroupRegistered(g) {
			return nil, fmt.Errorf("versions to serve: there is no group %q", g)
		}
	}
	r, err = resourceconfig.MergeAPIResourceConfigs(r, cliflag.ConfigurationMap(wanted), legacyscheme.Scheme)
	if err != nil {
		return nil, fmt.Errorf("versions to serve: %w", err)
	}
	return r, nil
}

// extraVersions are those that upstream knows and does not serve by default.
func extraVersions() []schema.GroupVersion {
	return []schema.GroupVersion{
		admissionregistrationv1beta1.SchemeGroupVersion, authenticationv1beta1.SchemeGroupVersion, certificatesv1beta1.SchemeGroupVersion,
		coordinationv1beta1.SchemeGroupVersion, flowcontrolv1beta1.SchemeGroupVersion, flowcontrolv1beta2.SchemeGroupVersion,
		flowcontrolv1beta3.SchemeGroupVersion, svmv1beta1.SchemeGroupVersion, storagev1beta1.SchemeGroupVersion, networkingv1beta1.SchemeGroupVersion,
		resourcev1beta1.SchemeGroupVersion, resourcev1beta2.SchemeGroupVersion,
		admissionregistrationv1alpha1.SchemeGroupVersion, authenticationv1alpha1.SchemeGroupVersion, coordinationv1alpha2.SchemeGroupVersion,
		certificatesv1alpha1.SchemeGroupVersion, resourcev1alpha3.SchemeGroupVersion, schedulingv1alpha2.SchemeGroupVersion, storagev1alpha1.SchemeGroupVersion,
	}
}

// Extra gives the versions that r serves something of beside upstream's default ones.
func Extra(r *serverstorage.ResourceConfig) (out []schema.GroupVersion) {
	for _, gv := range extraVersions() {
		some := r.GroupVersionConfigs[gv]
		for resource, on := range r.ResourceConfigs {
			some = some || on && resource.GroupVersion() == gv
		}
		if some {
			out = append(out, gv)
		}
	}
	return out
}

// Priority orders a group version in discovery.
type Priority struct {
	Group   int32 // higher comes first
	Version int32 // within the group, higher comes first
}

// Priorities gives the order of every built-in group version, from upstream's
// cmd/kube-apiserver/app/aggregator.go and pkg/controlplane/apiserver/aggregator.go.
func Priorities() map[schema.GroupVersion]Priority {
	return map[schema.GroupVersion]Priority{
		{Group: "", Version: "v1"}:                             {18000, 1},
		{Group: "apps", Version: "v1"}:                         {17800, 15},
		{Group: "events.k8s.io", Version: "v1"}:                {17750, 15},
		{Group: "authentication.k8s.io", Version: "v1"}:        {17700, 15},
		{Group: "authorization.k8s.io", Version: "v1"}:         {17600, 15},
		{Group: "autoscaling", Version: "v1"}:                  {17500, 15},
		{Group: "autoscaling", Version: "v2"}:                  {17500, 30},
		{Group: "batch", Version: "v1"}:                        {17400, 15},
		{Group: "certificates.k8s.io", Version: "v1"}:          {17300, 15},
		{Group: "networking.k8s.io", Version: "v1"}:            {17200, 15},
		{Group: "policy", Version: "v1"}:                       {17100, 15},
		{Group: "rbac.authorization.k8s.io", Version: "v1"}:    {17000, 15},
		{Group: "storage.k8s.io", Version: "v1"}:               {16800, 15},
		{Group: "apiextensions.k8s.io", Version: "v1"}:         {16700, 15},
		{Group: "admissionregistration.k8s.io", Version: "v1"}: {16700, 15},
		{Group: "scheduling.k8s.io", Version: "v1"}:            {16600, 15},
		{Group: "coordination.k8s.io", Version: "v1"}:          {16500, 15},
		{Group: "node.k8s.io", Version: "v1"}:                  {16300, 15},
		{Group: "discovery.k8s.io", Version: "v1"}:             {16200, 15},
		{Group: "resource.k8s.io", Version: "v1"}:              {16200, 21},
		{Group: "flowcontrol.apiserver.k8s.io", Version: "v1"}: {16100, 21},
		// Served only when asked for.
		{Group: "authentication.k8s.io", Version: "v1beta1"}:         {17700, 9},
		{Group: "authentication.k8s.io", Version: "v1alpha1"}:        {17700, 1},
		{Group: "certificates.k8s.io", Version: "v1beta1"}:           {17300, 9},
		{Group: "certificates.k8s.io", Version: "v1alpha1"}:          {17300, 1},
		{Group: "networking.k8s.io", Version: "v1beta1"}:             {17200, 9},
		{Group: "storage.k8s.io", Version: "v1beta1"}:                {16800, 9},
		{Group: "storage.k8s.io", Version: "v1alpha1"}:               {16800, 1},
		{Group: "admissionregistration.k8s.io", Version: "v1beta1"}:  {16700, 12},
		{Group: "admissionregistration.k8s.io", Version: "v1alpha1"}: {16700, 9},
		{Group: "scheduling.k8s.io", Version: "v1alpha2"}:            {16600, 2},
		{Group: "coordination.k8s.io", Version: "v1beta1"}:           {16500, 13},
		{Group: "coordination.k8s.io", Version: "v1alpha2"}:          {16500, 12},
		{Group: "resource.k8s.io", Version: "v1beta2"}:               {16200, 15},
		{Group: "resource.k8s.io", Version: "v1beta1"}:               {16200, 9},
		{Group: "resource.k8s.io", Version: "v1alpha3"}:              {16200, 1},
		{Group: "flowcontrol.apiserver.k8s.io", Version: "v1beta3"}:  {16100, 18},
		{Group: "flowcontrol.apiserver.k8s.io", Version: "v1beta2"}:  {16100, 15},
		{Group: "flowcontrol.apiserver.k8s.io", Version: "v1beta1"}:  {16100, 12},
		{Group: "storagemigration.k8s.io", Version: "v1beta1"}:       {15800, 9},
	}
}
