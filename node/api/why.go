package api

import (
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"

	skeinclient "skein.io/skein/node/client"
)

// WhyPath is where the placement of a pod is explained: WhyPath + NAMESPACE/POD.
const WhyPath = "/skein/v1/why/"

// whyRole lets the authenticated ask; serveWhy decides about whom.
const whyRole = "skein:why"

func whoMayAsk() rbacv1.ClusterRole {
	return rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: whyRole, Labels: map[string]string{"kubernetes.io/bootstrapping": "rbac-defaults"}},
		Rules:      []rbacv1.PolicyRule{{Verbs: []string{"get"}, NonResourceURLs: []string{WhyPath + "*"}}},
	}
}

// serveWhy answers those who may get the pod and list nodes: the answer names both, and pods of others that are in the way.
func (b *build) serveWhy(w http.ResponseWriter, r *http.Request) {
	fail := func(err error) {
		responsewriters.ErrorNegotiated(err, b.generic.Serializer, schema.GroupVersion{Version: "v1"}, w, r)
	}
	namespace, pod, ok := strings.Cut(strings.TrimPrefix(r.URL.Path, WhyPath), "/")
	if !ok || namespace == "" || pod == "" || strings.Contains(pod, "/") {
		fail(apierrors.NewBadRequest("want " + WhyPath + "NAMESPACE/POD"))
		return
	}
	if r.Method != http.MethodGet {
		fail(apierrors.NewMethodNotSupported(corev1.Resource("pods"), r.Method))
		return
	}
	user, ok := apirequest.UserFrom(r.Context())
	if !ok {
		fail(apierrors.NewUnauthorized("nobody is known to ask"))
		return
	}
	for _, a := range []authorizer.AttributesRecord{
		{User: user, Verb: "get", Namespace: namespace, APIVersion: "v1", Resource: "pods", Name: pod, ResourceRequest: true},
		{User: user, Verb: "list", APIVersion: "v1", Resource: "nodes", ResourceRequest: true},
	} {
		decision, reason, err := b.generic.Authorization.Authorizer.Authorize(r.Context(), a)
		if err != nil && decision != authorizer.DecisionAllow {
			fail(apierrors.NewInternalError(err))
			return
		}
		if decision != authorizer.DecisionAllow {
			responsewriters.Forbidden(a, w, r, reason, b.generic.Serializer)
			return
		}
	}
	answer, err := b.cfg.Why(r.Context(), namespace, pod)
	if err != nil {
		var refused *skeinclient.Error
		if errors.As(err, &refused) {
			resource := corev1.Resource("pods")
			err = apierrors.NewGenericServerResponse(refused.Code, "get", resource, pod, refused.Message, 0, true)
			if refused.Code == http.StatusNotFound {
				err = apierrors.NewNotFound(resource, pod)
			}
		}
		fail(err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer) // the client went away
}
