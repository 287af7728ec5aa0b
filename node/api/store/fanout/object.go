package fanout

import (
	"bytes"
	"io"
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
	inner runtime.Object // never changed

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
		e.err = encode(o.GetObject(), &b) // some encoders change what they encode
		e.raw = b.Bytes()
	})
	if e.err != nil {
		return e.err
	}
	if s, ok := w.(runtime.Splice); ok {
		s.Splice(e.raw)
		return nil
	}
	_, err := w.Write(e.raw)
	return err
}

// GetObject implements runtime.CacheableObject.
func (o *object) GetObject() runtime.Object { return o.inner.DeepCopyObject() }

// GetObjectKind implements runtime.Object.
func (o *object) GetObjectKind() schema.ObjectKind { return o.inner.GetObjectKind() }

// DeepCopyObject implements runtime.Object.
func (o *object) DeepCopyObject() runtime.Object { return &object{inner: o.inner.DeepCopyObject()} }

// GetObjectMeta lets upstream's helpers read the metadata; what they set is lost.
func (o *object) GetObjectMeta() metav1.Object {
	m, err := meta.Accessor(o.GetObject())
	if err != nil {
		return nil
	}
	return m
}

// selected tells whether the object is among those that p wants. An object whose attributes cannot be told is not.
func (o *object) selected(p *storage.SelectionPredicate, attrs storage.AttrFunc) bool {
	if unfiltered(p) {
		return true
	}
	if attrs == nil {
		ok, err := p.Matches(o.inner)
		return err == nil && ok
	}
	if ok, err := p.MatchesSharding(o.inner); err != nil || !ok {
		return false
	}
	if p.Empty() {
		return true
	}
	o.attrs.Do(func() { o.labels, o.fields, o.failed = attrs(o.inner) })
	return o.failed == nil && p.MatchesObjectAttributes(o.labels, o.fields)
}

func unfiltered(p *storage.SelectionPredicate) bool {
	return p.Empty() && (p.ShardSelector == nil || p.ShardSelector.Empty())
}
