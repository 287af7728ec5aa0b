package kinds

import (
	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	autoscalingv1 "k8s.io/api/autoscaling/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	batchv1 "k8s.io/api/batch/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	eventsv1 "k8s.io/api/events/v1"
	flowcontrolv1 "k8s.io/api/flowcontrol/v1"
	networkingv1 "k8s.io/api/networking/v1"
	nodev1 "k8s.io/api/node/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	resourcev1 "k8s.io/api/resource/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	serverstorage "k8s.io/apiserver/pkg/server/storage"
)

// Resources that the server itself asks the store about.
var (
	Namespaces = corev1.Resource("namespaces")
	Services   = corev1.Resource("services")
)

// Resources says what is served: every stable version, as upstream's pkg/controlplane/instance.go
// has it by default.
func Resources() *serverstorage.ResourceConfig {
	r := serverstorage.NewResourceConfig()
	r.EnableVersions(
		admissionregistrationv1.SchemeGroupVersion, corev1.SchemeGroupVersion, authenticationv1.SchemeGroupVersion,
		authorizationv1.SchemeGroupVersion, certificatesv1.SchemeGroupVersion, coordinationv1.SchemeGroupVersion,
		eventsv1.SchemeGroupVersion, rbacv1.SchemeGroupVersion, flowcontrolv1.SchemeGroupVersion, appsv1.SchemeGroupVersion,
		autoscalingv1.SchemeGroupVersion, autoscalingv2.SchemeGroupVersion, batchv1.SchemeGroupVersion, discoveryv1.SchemeGroupVersion,
		networkingv1.SchemeGroupVersion, nodev1.SchemeGroupVersion, policyv1.SchemeGroupVersion, resourcev1.SchemeGroupVersion,
		storagev1.SchemeGroupVersion, schedulingv1.SchemeGroupVersion,
	)
	return r
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
	}
}
