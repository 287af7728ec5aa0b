package api

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	resourcev1 "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	quota "k8s.io/apiserver/pkg/quota/v1"
	"k8s.io/apiserver/pkg/quota/v1/generic"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/restmapper"
	"k8s.io/kubernetes/pkg/quota/v1/evaluator/core"
)

// deviceLimit ends the names of limits of devices of a class.
const deviceLimit = ".deviceclass.resource.k8s.io/devices"

// countPage bounds one page of objects that are counted.
const countPage = 500

// QuotaUsage works out how much of a ResourceQuota is used, with Kubernetes' own
// evaluators: of pods, services and claims (of volumes and of devices) from a shared
// view, of everything else by counting names.
type QuotaUsage struct {
	special []quota.Evaluator
	mapper  *restmapper.DeferredDiscoveryRESTMapper
	objects metadata.Interface
}

// NewQuotaUsage asks the view for the kinds that it reads, so it has to be called
// before the view is started.
func NewQuotaUsage(f informers.SharedInformerFactory, client kubernetes.Interface, objects metadata.Interface) *QuotaUsage {
	lister := generic.ListerFuncForResourceFunc(f.ForResource)
	special, err := core.NewEvaluators(lister, f, nil)
	if err != nil {
		panic(fmt.Sprintf("api: quotas are set up twice on one view, or after its start: %v", err))
	}
	// The rest of them count, from informers of all Secrets and the like.
	special = slices.DeleteFunc(special, func(e quota.Evaluator) bool { return viewed[e.GroupResource()] == (schema.GroupVersionResource{}) })
	for _, gvr := range viewed {
		if inf, err := f.ForResource(gvr); err == nil {
			inf.Informer()
		}
	}
	return &QuotaUsage{
		special: special,
		mapper:  restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(client.Discovery())),
		objects: objects,
	}
}

// viewed are the kinds of which more counts than their number. What decides is in the shared view.
var viewed = map[schema.GroupResource]schema.GroupVersionResource{
	{Resource: "pods"}:                                        corev1.SchemeGroupVersion.WithResource("pods"),
	{Resource: "services"}:                                    corev1.SchemeGroupVersion.WithResource("services"),
	{Resource: "persistentvolumeclaims"}:                      corev1.SchemeGroupVersion.WithResource("persistentvolumeclaims"),
	{Group: resourcev1.GroupName, Resource: "resourceclaims"}: resourcev1.SchemeGroupVersion.WithResource("resourceclaims"),
}

// legacyCounts are names from before count/ was there; upstream's.
var legacyCounts = map[corev1.ResourceName]schema.GroupResource{
	corev1.ResourceConfigMaps:             {Resource: "configmaps"},
	corev1.ResourceQuotas:                 {Resource: "resourcequotas"},
	corev1.ResourceReplicationControllers: {Resource: "replicationcontrollers"},
	corev1.ResourceSecrets:                {Resource: "secrets"},
}

// countedBy is the kind whose objects a limit counts, if it does only that.
func countedBy(limit corev1.ResourceName) (schema.GroupResource, bool) {
	if gr, ok := legacyCounts[limit]; ok {
		return gr, true
	}
	name, ok := strings.CutPrefix(string(limit), "count/")
	return schema.ParseGroupResource(name), ok
}

// Usage is how much of the quota's limits is used, as far as that can be told,
// whatever the error. counted says that objects were counted that no watch tells about.
func (u *QuotaUsage) Usage(ctx context.Context, q *corev1.ResourceQuota) (used corev1.ResourceList, counted bool, err error) {
	evaluators := slices.Clone(u.special)
	for limit := range q.Spec.Hard {
		// Of claims of devices no change is announced: few clusters have any.
		counted = counted || strings.HasSuffix(string(limit), deviceLimit) || limit == "count/resourceclaims.resource.k8s.io"
		gr, ok := countedBy(limit)
		if !ok || slices.ContainsFunc(u.special, func(e quota.Evaluator) bool { return e.GroupResource() == gr }) {
			continue
		}
		counted = true
		alias := limit
		if strings.HasPrefix(string(limit), "count/") {
			alias = ""
		}
		list := func(namespace string) ([]runtime.Object, error) { return u.list(ctx, gr, namespace) }
		evaluators = append(evaluators, generic.NewObjectCountEvaluator(gr, list, alias))
	}
	used, err = quota.CalculateUsage(q.Namespace, q.Spec.Scopes, q.Spec.Hard, registry(evaluators), q.Spec.ScopeSelector)
	if err != nil {
		err = fmt.Errorf("usage of ResourceQuota %s/%s: %w", q.Namespace, q.Name, err)
	}
	return used, counted, err
}

// list returns the names of all objects of a kind in a namespace. A kind that does not exist has none.
func (u *QuotaUsage) list(ctx context.Context, gr schema.GroupResource, namespace string) (out []runtime.Object, err error) {
	gvr, err := u.mapper.ResourceFor(gr.WithVersion(""))
	if meta.IsNoMatchError(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("count %s: %w", gr, err)
	}
	opts := metav1.ListOptions{Limit: countPage}
	for {
		page, err := u.objects.Resource(gvr).Namespace(namespace).List(ctx, opts)
		if err != nil {
			return nil, fmt.Errorf("count %s: %w", gr, err)
		}
		for i := range page.Items {
			out = append(out, &page.Items[i])
		}
		if opts.Continue = page.Continue; opts.Continue == "" {
			return out, nil
		}
	}
}

// registry is a fixed list of evaluators.
type registry []quota.Evaluator

func (r registry) Add(quota.Evaluator)     { panic("api: the evaluators of a quota are fixed") }
func (r registry) Remove(quota.Evaluator)  { panic("api: the evaluators of a quota are fixed") }
func (r registry) List() []quota.Evaluator { return r }
func (r registry) Get(gr schema.GroupResource) quota.Evaluator {
	if i := slices.IndexFunc(r, func(e quota.Evaluator) bool { return e.GroupResource() == gr }); i >= 0 {
		return r[i]
	}
	return nil
}
