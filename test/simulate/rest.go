package simulate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	autoscalingv1 "k8s.io/api/autoscaling/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
)

const (
	protoType = runtime.ContentTypeProtobuf
	jsonType  = runtime.ContentTypeJSON
)

var (
	protoCodec = protobuf.NewSerializer(scheme.Scheme, scheme.Scheme)
	codecs     = serializer.NewCodecFactory(scheme.Scheme)
)

// door is the API as one client sees it: an http.RoundTripper before the store, with the time that requests take, and with faults.
// Everything that it draws depends on the seed and on how often the same was asked before, not on what else happens.
type door struct {
	s    *store
	who  string
	term uint64 // of the leader that writes; 0 for somebody else
	// fault may answer instead of the API, before the request is carried out or after (then nobody knows what became of it). It is called
	// outside of all locks.
	fault func(r *http.Request, done bool) error
	// misread and miswrite break what a leader reads and writes, to see that it is noticed; nil for none. They may change what they get.
	misread  func(runtime.Object)
	miswrite func(q query, obj runtime.Object)
	// lag is the longest time between a commit and its event at a watch.
	lag time.Duration
	// told is when the leader was told to stop, 0 before; late is told of writes that it makes afterwards.
	told atomic.Int64
	late func(id string)

	mu    sync.Mutex
	asked map[string]int // guarded by mu
}

func (s *store) door(who string, term uint64) *door {
	return &door{s: s, who: who, term: term, lag: 20 * time.Millisecond, asked: map[string]int{}}
}

// config is a client's.
func (d *door) config() *rest.Config {
	return &rest.Config{Host: "http://simulated", Transport: d, QPS: -1, UserAgent: d.who,
		ContentConfig: rest.ContentConfig{ContentType: protoType, AcceptContentTypes: protoType + "," + jsonType}}
}

// errDeposed is what a leader hears whom another has followed.
var errDeposed = errors.New("refused: a leader of a later term has written already")

// RoundTrip carries a request out: a while to the server, the deed at one instant, a while back.
func (d *door) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx := r.Context()
	var body []byte
	if r.Body != nil {
		b, err := io.ReadAll(r.Body)
		r.Body.Close()
		if err != nil {
			return nil, err
		}
		body = b
	}
	d.mu.Lock()
	id := r.Method + " " + r.URL.Path
	d.asked[id]++
	n := d.asked[id]
	d.mu.Unlock()
	roll := draw(d.s.seed, d.who, id, n)
	if !sleep(ctx, between(200*time.Microsecond, 3*time.Millisecond, roll)) {
		return nil, ctx.Err()
	}
	if r.Method != http.MethodGet {
		d.begun(id)
		d.s.mu.Lock()
		d.s.tries[id]++
		d.s.mu.Unlock()
	}
	if d.fault != nil {
		if err := d.fault(r, false); err != nil {
			return nil, err
		}
	}
	q := parse(r)
	if q.verb == "watch" {
		return d.watch(r, q)
	}
	obj, err := d.serve(q, r, body)
	if d.fault != nil {
		if err := d.fault(r, true); err != nil {
			return nil, err
		}
	}
	if !sleep(ctx, between(100*time.Microsecond, time.Millisecond, roll>>32)) {
		return nil, ctx.Err()
	}
	if err != nil {
		return answer(r, status(err))
	}
	return answer(r, obj)
}

// begun notes that a write arrives.
func (d *door) begun(id string) {
	if t := d.told.Load(); t != 0 && time.Now().UnixNano() > t && d.late != nil {
		d.late(id)
	}
}

// deposed says that another leader has followed.
func (d *door) deposed() bool {
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	return d.term != 0 && d.term < d.s.fence
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// query is a parsed request.
type query struct {
	verb     string // get, list, watch, create, update, patch, delete, deletecollection, discovery
	kind     kind
	known    bool
	at       key
	sub      string
	metaOnly bool
	proto    bool
	opts     url.Values
}

func parse(r *http.Request) query {
	accept := r.Header.Get("Accept")
	q := query{opts: r.URL.Query(), metaOnly: strings.Contains(accept, "as=PartialObjectMetadata"), proto: strings.HasPrefix(accept, protoType)}
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	var gv schema.GroupVersion
	switch {
	case parts[0] == "api" && len(parts) > 2:
		gv.Version, parts = parts[1], parts[2:]
	case parts[0] == "apis" && len(parts) > 3:
		gv.Group, gv.Version, parts = parts[1], parts[2], parts[3:]
	default:
		q.verb = "discovery"
		return q
	}
	if parts[0] == "namespaces" && len(parts) > 2 && parts[2] != "status" && parts[2] != "finalize" {
		q.at.ns, parts = parts[1], parts[2:]
	}
	q.kind.gvr = gv.WithResource(parts[0])
	if len(parts) > 1 {
		q.at.name = parts[1]
	}
	if len(parts) > 2 {
		q.sub = parts[2]
	}
	switch r.Method {
	case http.MethodGet:
		q.verb = "get"
		if q.at.name == "" {
			q.verb = "list"
			if w := q.opts.Get("watch"); w == "true" || w == "1" {
				q.verb = "watch"
			}
		}
	case http.MethodPost:
		q.verb = "create"
	case http.MethodPut:
		q.verb = "update"
	case http.MethodPatch:
		q.verb = "patch"
	case http.MethodDelete:
		q.verb = "delete"
		if q.at.name == "" {
			q.verb = "deletecollection"
		}
	}
	return q
}

// serve answers all but watches.
func (d *door) serve(q query, r *http.Request, body []byte) (runtime.Object, error) {
	if q.verb == "discovery" {
		if v, ok := discovery(d.s.kinds, r.URL.Path); ok {
			return v.(runtime.Object), nil
		}
		return nil, apierrors.NewNotFound(schema.GroupResource{}, r.URL.Path)
	}
	var ok bool
	if q.kind, ok = d.s.kinds[q.kind.gvr]; !ok {
		return nil, apierrors.NewNotFound(q.kind.resource(), q.at.name)
	}
	if q.verb != "get" && q.verb != "list" && d.deposed() {
		return nil, apierrors.NewInternalError(errDeposed)
	}
	e, err := d.carryOut(q, r, body)
	switch {
	case err != nil:
		return nil, err
	case q.verb == "list":
		return d.listed(q)
	case e != nil && d.misread != nil && !q.metaOnly && q.verb == "get":
		obj := e.obj.DeepCopyObject()
		d.misread(obj)
		return obj, nil
	case e == nil:
		return &metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess}, nil
	case q.metaOnly:
		return partial(e), nil
	}
	return e.obj, nil
}

func (d *door) carryOut(q query, r *http.Request, body []byte) (*entry, error) {
	s, k := d.s, q.kind
	switch q.verb {
	case "list":
		return nil, nil
	case "get":
		return s.get(k, q.at)
	case "patch":
		return s.patch(k, q.at, q.sub, d.who, types.PatchType(r.Header.Get("Content-Type")), body)
	case "delete", "deletecollection":
		var opts metav1.DeleteOptions
		if len(body) > 0 {
			if _, _, err := codecs.UniversalDeserializer().Decode(body, nil, &opts); err != nil {
				return nil, apierrors.NewBadRequest(err.Error())
			}
		}
		if d.miswrite != nil {
			d.miswrite(q, &opts)
		}
		if q.verb == "delete" {
			return s.remove(k, q.at, opts, d.who)
		}
		entries, _ := s.list(k, q.at.ns)
		for _, e := range entries {
			if _, err := s.remove(k, keyOf(e.acc), opts, d.who); err != nil && !apierrors.IsNotFound(err) {
				return nil, err
			}
		}
		return nil, nil
	}
	if k.gvr.Resource == "events" {
		s.mu.Lock()
		s.count(q.verb, k, "")
		s.mu.Unlock()
		obj, _, err := codecs.UniversalDeserializer().Decode(body, nil, nil)
		if err != nil {
			return nil, apierrors.NewBadRequest(err.Error())
		}
		acc, err := meta.Accessor(obj)
		return &entry{obj: obj, acc: acc}, err
	}
	obj, _, err := codecs.UniversalDeserializer().Decode(body, nil, nil)
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	if d.miswrite != nil {
		d.miswrite(q, obj)
	}
	switch o := obj.(type) {
	case *corev1.Binding:
		return nil, s.bind(o, q.at, d.who)
	case *autoscalingv1.Scale:
		return nil, s.scale(k, q.at, o.Spec.Replicas, d.who)
	case *corev1.Namespace:
		if q.sub == "finalize" {
			return s.finalizeNamespace(q.at, o, d.who)
		}
	}
	acc, err := meta.Accessor(obj)
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	if k.namespaced && acc.GetNamespace() == "" {
		acc.SetNamespace(q.at.ns)
	}
	if q.verb == "create" {
		return s.create(k, obj, d.who)
	}
	return s.update(k, q.at, q.sub, d.who, obj)
}

// scale sets spec.replicas.
func (s *store) scale(k kind, at key, replicas int32, who string) error {
	_, err := s.change(k, at, "", "update", who, func(obj runtime.Object) (runtime.Object, error) {
		f := field(field(obj, "Spec").Addr().Interface(), "Replicas")
		if !f.IsValid() {
			return nil, apierrors.NewBadRequest("it has no scale")
		}
		f.Set(reflectPtr(replicas))
		return obj, nil
	})
	return err
}

// selector decides by the query's label and field selectors.
func (q query) selector() (func(*entry) bool, error) {
	ls, err := labels.Parse(q.opts.Get("labelSelector"))
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	fs, err := fields.ParseSelector(q.opts.Get("fieldSelector"))
	if err != nil {
		return nil, apierrors.NewBadRequest(err.Error())
	}
	return func(e *entry) bool {
		if q.at.ns != "" && e.acc.GetNamespace() != q.at.ns {
			return false
		}
		if !ls.Empty() && !ls.Matches(labels.Set(e.acc.GetLabels())) {
			return false
		}
		if fs.Empty() {
			return true
		}
		set := fields.Set{"metadata.name": e.acc.GetName(), "metadata.namespace": e.acc.GetNamespace()}
		if pod, ok := e.obj.(*corev1.Pod); ok {
			set["spec.nodeName"], set["status.phase"] = pod.Spec.NodeName, string(pod.Status.Phase)
		}
		return fs.Matches(set)
	}, nil
}

func (d *door) listed(q query) (runtime.Object, error) {
	keep, err := q.selector()
	if err != nil {
		return nil, err
	}
	entries, rev := d.s.list(q.kind, q.at.ns)
	at := metav1.ListMeta{ResourceVersion: strconv.FormatUint(rev, 10)}
	if q.metaOnly {
		list := &metav1.PartialObjectMetadataList{TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadataList", APIVersion: "meta.k8s.io/v1"}, ListMeta: at}
		for _, e := range entries {
			if keep(e) {
				list.Items = append(list.Items, *partial(e))
			}
		}
		return list, nil
	}
	list, err := scheme.Scheme.New(q.kind.gvk.GroupVersion().WithKind(q.kind.gvk.Kind + "List"))
	if err != nil {
		return nil, err
	}
	list.GetObjectKind().SetGroupVersionKind(q.kind.gvk.GroupVersion().WithKind(q.kind.gvk.Kind + "List"))
	var objs []runtime.Object
	for _, e := range entries {
		if keep(e) && d.misread != nil {
			obj := e.obj.DeepCopyObject()
			d.misread(obj)
			objs = append(objs, obj)
		} else if keep(e) {
			objs = append(objs, e.obj)
		}
	}
	if err := meta.SetList(list, objs); err != nil {
		return nil, err
	}
	acc, err := meta.ListAccessor(list)
	if err != nil {
		return nil, err
	}
	acc.SetResourceVersion(at.ResourceVersion)
	return list, nil
}

func partial(e *entry) *metav1.PartialObjectMetadata {
	m := &metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadata", APIVersion: "meta.k8s.io/v1"}}
	m.ObjectMeta = field(e.obj, "ObjectMeta").Interface().(metav1.ObjectMeta)
	return m
}

func status(err error) *metav1.Status {
	var api apierrors.APIStatus
	if !errors.As(err, &api) {
		api = apierrors.NewInternalError(err)
	}
	st := api.Status()
	st.Kind, st.APIVersion = "Status", "v1"
	return &st
}

// answer encodes obj as the request accepts it.
func answer(r *http.Request, obj runtime.Object) (*http.Response, error) {
	resp := &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Request: r, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1}
	typ := jsonType
	var body []byte
	var err error
	st, failed := obj.(*metav1.Status)
	if failed && st.Code != 0 {
		resp.StatusCode = int(st.Code)
	}
	if strings.HasPrefix(r.Header.Get("Accept"), protoType) && !failed {
		typ = protoType
		var b bytes.Buffer
		err = protoCodec.Encode(obj, &b)
		body = b.Bytes()
	} else {
		body, err = json.Marshal(obj)
	}
	if err != nil {
		return nil, fmt.Errorf("the simulated API cannot encode %T: %w", obj, err)
	}
	resp.Header.Set("Content-Type", typ)
	resp.ContentLength = int64(len(body))
	resp.Body = io.NopCloser(bytes.NewReader(body))
	return resp, nil
}
