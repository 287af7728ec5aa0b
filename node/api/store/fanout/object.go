package fanout

import (
	"bytes"
	"io"
	"strings"
	"sync"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/storage"
)

// object is one that all watchers share, with what it was encoded to.
type object struct {
	once   sync.Once
	source func() (runtime.Object, error) // gives inner, once
	inner  runtime.Object                 // never changed; see decoded
	err    error
	stored Stored                                                        // nil: it cannot be encoded without decoding it
	raw    []byte                                                        // what pick looks at
	pick   func([]byte, *storage.SelectionPredicate) (selected, ok bool) // nil: who selects decodes

	attrs  sync.Once
	labels labels.Set
	fields fields.Set
	failed error

	mu      sync.Mutex // guards encoded
	encoded map[runtime.Identifier]*encoding
}

type encoding struct {
	once sync.Once
	raw  []byte
	err  error
}

var _ runtime.CacheableObject = (*object)(nil)

// decoded is the object itself.
func (o *object) decoded() (runtime.Object, error) {
	o.once.Do(func() {
		o.inner, o.err = o.source()
		o.source = nil
	})
	return o.inner, o.err
}

func (o *object) encoding(id runtime.Identifier) *encoding {
	o.mu.Lock()
	defer o.mu.Unlock()
	e := o.encoded[id]
	if e == nil {
		if o.encoded == nil {
			o.encoded = map[runtime.Identifier]*encoding{}
		}
		e = &encoding{}
		o.encoded[id] = e
	}
	return e
}

// CacheEncode implements runtime.CacheableObject.
func (o *object) CacheEncode(id runtime.Identifier, encode func(runtime.Object, io.Writer) error, w io.Writer) error {
	e := o.encoding(id)
	e.once.Do(func() {
		var b bytes.Buffer
		if strings.HasPrefix(string(id), watchEncoder) {
			e.err = encode(embedded{o}, &b)
		} else {
			e.err = encode(o.GetObject(), &b) // some encoders change what they encode
		}
		e.raw = b.Bytes()
	})
	if e.err != nil {
		return e.err
	}
	return splice(w, e.raw)
}

// watchEncoder begins the identifiers of upstream's encoders of events, which have another encoder encode the object (watchEncoder in
// k8s.io/apiserver/pkg/endpoints/handlers/response.go).
const watchEncoder = `{"name":"watch",`

// embedded is the object for the encoder of what is in an event.
type embedded struct{ *object }

// CacheEncode implements runtime.CacheableObject.
func (o embedded) CacheEncode(id runtime.Identifier, encode func(runtime.Object, io.Writer) error, w io.Writer) error {
	inner := func(w io.Writer) error {
		v, err := o.decoded()
		if err != nil {
			return err
		}
		return encode(v.DeepCopyObject(), w) // some encoders change what they encode
	}
	if o.stored == nil {
		return inner(w)
	}
	b, err := o.stored.Encode(id, func() ([]byte, error) {
		var b bytes.Buffer
		err := inner(&b)
		return b.Bytes(), err
	})
	if err != nil {
		return err
	}
	return splice(w, b)
}

func splice(w io.Writer, b []byte) error {
	if s, ok := w.(runtime.Splice); ok {
		s.Splice(b)
		return nil
	}
	_, err := w.Write(b)
	return err
}

// GetObject implements runtime.CacheableObject.
func (o *object) GetObject() runtime.Object {
	v, err := o.decoded()
	if err != nil { // one alike could be: somebody wrote something else into the store
		return status(err)
	}
	return v.DeepCopyObject()
}

// GetObjectKind implements runtime.Object.
func (o *object) GetObjectKind() schema.ObjectKind {
	v, err := o.decoded()
	if err != nil {
		return schema.EmptyObjectKind
	}
	return v.GetObjectKind()
}

// DeepCopyObject implements runtime.Object.
func (o *object) DeepCopyObject() runtime.Object {
	v := o.GetObject()
	return &object{source: func() (runtime.Object, error) { return v, nil }}
}

// GetObjectMeta lets upstream's helpers read the metadata; what they set is lost.
func (o *object) GetObjectMeta() metav1.Object {
	m, err := meta.Accessor(o.GetObject())
	if err != nil {
		return nil
	}
	return m
}

// selected tells whether the object is among those that p wants. An error says that it cannot be decoded; one whose attributes cannot be told is not among them.
func (o *object) selected(p *storage.SelectionPredicate, attrs storage.AttrFunc) (bool, error) {
	if unfiltered(p) {
		return true, nil
	}
	if o.pick != nil && unsharded(p) {
		if selected, ok := o.pick(o.raw, p); ok {
			return selected, nil
		}
	}
	inner, err := o.decoded()
	if err != nil {
		return false, err
	}
	if attrs == nil {
		ok, err := p.Matches(inner)
		return err == nil && ok, nil
	}
	if ok, err := p.MatchesSharding(inner); err != nil || !ok {
		return false, nil
	}
	if p.Empty() {
		return true, nil
	}
	o.attrs.Do(func() { o.labels, o.fields, o.failed = attrs(inner) })
	return o.failed == nil && p.MatchesObjectAttributes(o.labels, o.fields), nil
}

func unfiltered(p *storage.SelectionPredicate) bool { return p.Empty() && unsharded(p) }

func unsharded(p *storage.SelectionPredicate) bool {
	return p.ShardSelector == nil || p.ShardSelector.Empty()
}
