package router

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"reflect"
	"sync"

	"k8s.io/apimachinery/pkg/api/validation/path"
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
	"k8s.io/apiserver/pkg/storage"

	"skein.io/skein/node/api/store/rawlist"
	"skein.io/skein/node/api/store/transcode"
)

// RawLister answers lists and reads with what is stored; see package rawlist.
type RawLister interface {
	List(ctx context.Context, namespace string, o storage.ListOptions, f rawlist.Form) (rawlist.Answer, bool)
	Get(ctx context.Context, namespace, name string, f rawlist.Form) (rawlist.Answer, bool)
	// Watch has it do the same with objects of events.
	Watch(kind schema.GroupVersionKind, plan func() *transcode.Plan)
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

// answerRaw has l answer from now on.
func (e *endpoint) answerRaw(l RawLister, s *runtime.Scheme, plans *transcode.Planner) error {
	example, err := s.New(e.scope.Kind)
	if err != nil {
		return err
	}
	e.rawLister = l
	e.plan = sync.OnceValue(func() *transcode.Plan { // when it is asked for: it takes some 100 KB
		p, err := plans.Plan(reflect.TypeOf(example).Elem())
		if err != nil {
			return nil // a test knows that there is none
		}
		return p
	})
	l.Watch(e.scope.Kind, e.plan)
	return nil
}

// form gives what the answer to a request looks like; false when it is one that only upstream can make.
func (e *endpoint) form(r *http.Request) (_ rawlist.Form, encoder runtime.Encoder, mediaType string, _ bool) {
	f := rawlist.Form{Kind: e.scope.Kind}
	if !audit.AuditContextFrom(r.Context()).GetEventLevel().Less(auditinternal.LevelRequestResponse) {
		return f, nil, "", false // somebody else wants to see the answer
	}
	media, info, err := negotiation.NegotiateOutputMediaType(r, e.scope.Serializer, &e.scope)
	if err != nil || media.Convert != nil || info.Serializer != media.Accepted.Serializer { // the last: indented, for people
		return f, nil, "", false
	}
	f.JSON = info.MediaType == runtime.ContentTypeJSON
	if !f.JSON && info.MediaType != protobufMedia {
		return f, nil, "", false
	}
	if f.Plan = e.plan(); f.Plan == nil {
		return f, nil, "", false
	}
	encoder = e.scope.Serializer.EncoderForVersion(info.Serializer, e.scope.Kind.GroupVersion())
	f.Encode = func(o runtime.Object) ([]byte, error) {
		var b bytes.Buffer
		err := encoder.Encode(o, &b)
		return b.Bytes(), err
	}
	return f, encoder, info.MediaType, true
}

// raw answers a plain list with what is stored, and leaves all else to next.
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
		f, encoder, media, ok := e.form(r)
		if !ok {
			next(w, r)
			return
		}
		a, ok := e.rawLister.List(r.Context(), namespace, o, f)
		if !ok {
			next(w, r)
			return
		}
		send(w, r, media, encoder, a)
	}
}

// rawGet does the same with a plain read of one object.
func (e *endpoint) rawGet(next http.HandlerFunc) http.HandlerFunc {
	if e.rawLister == nil {
		return next
	}
	return func(w http.ResponseWriter, r *http.Request) {
		info, ok := apirequest.RequestInfoFrom(r.Context())
		if !ok || info.Verb != "get" || r.Method != http.MethodGet || r.URL.RawQuery != "" || info.Name == "" || len(info.Parts) != 2 ||
			e.namespaced == (info.Namespace == "") || len(path.IsValidPathSegmentName(info.Name)) > 0 {
			next(w, r)
			return
		}
		f, encoder, media, ok := e.form(r)
		if !ok {
			next(w, r)
			return
		}
		a, ok := e.rawLister.Get(r.Context(), info.Namespace, info.Name, f)
		if !ok {
			next(w, r)
			return
		}
		send(w, r, media, encoder, a)
	}
}

func send(w http.ResponseWriter, r *http.Request, media string, encoder runtime.Encoder, a rawlist.Answer) {
	apirequest.TrackSerializeResponseObjectLatency(r.Context(), func() {
		responsewriters.SerializeObject(media, stored{encoder, a}, w, r, http.StatusOK, nil)
	})
}

// plainList gives the options and the namespace ("" = all) of a list without selectors; false for any other request, a bad one too.
func (e *endpoint) plainList(r *http.Request) (_ storage.ListOptions, namespace string, _ bool) {
	none := storage.ListOptions{}
	info, ok := apirequest.RequestInfoFrom(r.Context())
	if !ok || info.Verb != "list" || info.Name != "" || r.Method != http.MethodGet {
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

// stored is an encoder whose answer is there already.
type stored struct {
	runtime.Encoder
	answer rawlist.Answer
}

// Encode implements runtime.Encoder. What is there already is asked for as nil; when it cannot be sent, upstream asks for a Status.
func (s stored) Encode(o runtime.Object, w io.Writer) error {
	if o != nil {
		return s.Encoder.Encode(o, w)
	}
	return s.answer(w)
}
