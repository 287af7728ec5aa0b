package api

import (
	"context"
	"net/http"
	"slices"
	"time"

	"k8s.io/apiextensions-apiserver/pkg/apihelpers"
	apiextv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	apiextclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset/typed/apiextensions/v1"
	apiextlisters "k8s.io/apiextensions-apiserver/pkg/client/listers/apiextensions/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
)

const (
	// definitionWait is how long a request waits for a definition to be seen here that exists. Replicas are some milliseconds apart.
	definitionWait = 3 * time.Second
	// definitionPoll is how often that is looked at, in memory.
	definitionPoll = 5 * time.Millisecond
)

// newDefinitions stands at the end of the chain, where requests come for resources that this server does not know. With several
// servers, that of a CustomResourceDefinition which another one has just established may be among them. Upstream makes everybody wait
// for five seconds before a definition counts as established; here such a request, and only it, waits until its server has seen it too.
//
// What it costs is one read of the store for each request that ends in 404 for its resource.
type newDefinitions struct {
	next  http.Handler
	defs  apiextclient.CustomResourceDefinitionInterface
	known apiextlisters.CustomResourceDefinitionLister // set when the CRD server is built
	serve http.Handler                                 // of that server
}

type secondLook struct{}

func (n *newDefinitions) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	info, ok := apirequest.RequestInfoFrom(r.Context())
	if !ok || !info.IsResourceRequest || info.APIGroup == "" || r.Context().Value(secondLook{}) != nil {
		n.next.ServeHTTP(w, r)
		return
	}
	name := info.Resource + "." + info.APIGroup
	crd, err := n.defs.Get(r.Context(), name, metav1.GetOptions{})
	if err != nil || !serves(crd, info.APIVersion) {
		n.next.ServeHTTP(w, r)
		return
	}
	n.await(r.Context(), name, info.APIVersion)
	n.serve.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), secondLook{}, true)))
}

func serves(crd *apiextv1.CustomResourceDefinition, v string) bool {
	return apihelpers.IsCRDConditionTrue(crd, apiextv1.Established) &&
		slices.ContainsFunc(crd.Spec.Versions, func(x apiextv1.CustomResourceDefinitionVersion) bool { return x.Name == v && x.Served })
}

func (n *newDefinitions) await(ctx context.Context, name, v string) {
	ctx, cancel := context.WithTimeout(ctx, definitionWait)
	defer cancel()
	tick := time.NewTicker(definitionPoll)
	defer tick.Stop()
	for {
		if crd, err := n.known.Get(name); err == nil && serves(crd, v) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
