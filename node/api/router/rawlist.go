package router

import (
	"bytes"
	"context"
	"io"
	"net/http"

	"k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metainternalversionscheme "k8s.io/apimachinery/pkg/apis/meta/internalversion/scheme"
	"k8s.io/apimachinery/pkg/apis/meta/internalversion/validation"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	auditinternal "k8s.io/apiserver/pkg/apis/audit"
	"k8s.io/apiserver/pkg/audit"
	"k8s.io/apiserver/pkg/endpoints/handlers/negotiation"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	"k8s.io/apiserver/pkg/storage"
)

// RawLister answers lists with what is stored; see package rawlist.
type RawLister interface {
	List(ctx context.Context, namespace string, o storage.ListOptions, kind schema.GroupVersionKind, encode func(runtime.Object) ([]byte, error)) (parts [][]byte, ok bool)
}

// RawListers gives the lister of a resource; nil when there is none.
type RawListers func(schema.GroupResource) RawLister

// listedRaw are the resources of which there are many, and whose storages are upstream's generic one as it is: nothing is
// done to what has been read. A test compares the answers.
var listedRaw = map[schema.GroupResource]bool{
	{Resource: "pods"}: true, {Resource: "nodes"}: true, {Resource: "configmaps"}: true, {Resource: "secrets"}: true, {Resource: "serviceaccounts"}: true,
	{Group: "apps", Resource: "replicasets"}: true, {Group: "coordination.k8s.io", Resource: "leases"}: true,
	{Group: "discovery.k8s.io", Resource: "endpointslices"}: true,
}

const protobufMedia = "application/vnd.kubernetes.protobuf"

// raw answers a plain list in protobuf with what is stored, and leaves all else to next.
func (e *endpoint) raw(next http.HandlerFunc) http.HandlerFunc {
	if e.rawLister == nil {
		return next
	}
	return func(w http.ResponseWriter, r *http.Request) {
		o, namespace, ok := e.plainList(r)
		if !ok {
			next(w, r)
			return
		}
		media, info, err := negotiation.NegotiateOutputMediaType(r, e.scope.Serializer, &e.scope)
		if err != nil || media.Convert != nil || info.MediaType != protobufMedia {
			next(w, r)
			return
		}
		encoder := e.scope.Serializer.EncoderForVersion(info.Serializer, e.scope.Kind.GroupVersion())
		parts, ok := e.rawLister.List(r.Context(), namespace, o, e.scope.Kind, func(o runtime.Object) ([]byte, error) {
			var b bytes.Buffer
			err := encoder.Encode(o, &b)
			return b.Bytes(), err
		})
		if !ok {
			next(w, r)
			return
		}
		audit.LogResponseObject(r.Context(), e.storage.(rest.Lister).NewList(), e.scope.Kind.GroupVersion(), e.scope.Serializer)
		responsewriters.SerializeObject(info.MediaType, stored{encoder, parts}, w, r, http.StatusOK, nil)
	}
}

// plainList gives the options and the namespace ("" = all) of a list without selectors whose answer nobody else wants to see; false for any other request, a bad one too.
func (e *endpoint) plainList(r *http.Request) (_ storage.ListOptions, namespace string, _ bool) {
	none := storage.ListOptions{}
	info, ok := apirequest.RequestInfoFrom(r.Context())
	if !ok || info.Verb != "list" || info.Name != "" || r.Method != http.MethodGet || !audit.AuditContextFrom(r.Context()).GetEventLevel().Less(auditinternal.LevelRequestResponse) {
		return none, "", false
	}
	o := internalversion.ListOptions{}
	if err := metainternalversionscheme.ParameterCodec.DecodeParameters(r.URL.Query(), e.scope.MetaGroupVersion, &o); err != nil {
		return none, "", false
	}
	internalversion.SetListOptionsDefaults(&o, true)
	if len(validation.ValidateListOptions(&o, true)) > 0 || o.Watch || o.SendInitialEvents != nil || o.ShardSelector != "" ||
		o.LabelSelector != nil && !o.LabelSelector.Empty() || o.FieldSelector != nil && !o.FieldSelector.Empty() {
		return none, "", false
	}
	return storage.ListOptions{ResourceVersion: o.ResourceVersion, ResourceVersionMatch: o.ResourceVersionMatch, Recursive: true,
		Predicate: storage.SelectionPredicate{Label: labels.Everything(), Field: fields.Everything(), Limit: o.Limit, Continue: o.Continue}}, info.Namespace, true
}

// stored is an encoder whose answer is there already. The beginning is written alone, as upstream's encoder does it: the writer takes a list by
// that.
type stored struct {
	runtime.Encoder
	parts [][]byte
}

func (s stored) Encode(_ runtime.Object, w io.Writer) error {
	for _, p := range s.parts {
		if _, err := w.Write(p); err != nil {
			return err
		}
	}
	return nil
}
