package rawlist

import (
	"bytes"
	"hash/maphash"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"skein.io/skein/node/api/store/transcode"
)

const (
	// watchedFor is how many objects of events upstream encodes before it is worth a plan of their kind: those of an idle cluster are few.
	watchedFor = 64
	// maxEncoders bounds the encoders that are told apart; there is one a format.
	maxEncoders = 64
)

// watched is what a Lister knows of the encoders of events. The Lister's lock guards encoders.
type watched struct {
	kind     schema.GroupVersionKind
	plan     func() *transcode.Plan
	form     *form  // what all encoders have in common
	readable uint64 // goes into what is remembered of shapes that have been decoded
	encoders map[runtime.Identifier]*form
}

// Watch lets objects of events be encoded with what is stored, too: those that are stored as a kind, to the kind. Call it before the Lister is used.
func (l *Lister) Watch(kind schema.GroupVersionKind, plan func() *transcode.Plan) {
	l.watched = &watched{kind: kind, plan: plan, readable: maphash.String(l.seed, "readable"), encoders: map[runtime.Identifier]*form{}}
}

// Object is an object of an event.
type Object struct {
	l     *Lister
	item  item
	shape uint64
}

// Object looks at a stored value, opened; nil when only upstream can encode it.
func (l *Lister) Object(data []byte, rev int64) *Object {
	if l.watched == nil || l.events.Load() < watchedFor && l.events.Add(1) < watchedFor {
		return nil
	}
	w := l.watched
	l.mu.Lock()
	f := w.form
	l.mu.Unlock()
	if f == nil {
		f = l.form(Form{Kind: w.kind, Plan: w.plan()})
		l.mu.Lock()
		w.form = f
		l.mu.Unlock()
	}
	if f.Plan == nil {
		return nil
	}
	s, ok := parse(data, f.typeMeta)
	if !ok {
		return nil
	}
	shape, err := f.Plan.Shape(l.seed, s.raw)
	if err != nil {
		return nil
	}
	return &Object{l: l, item: item{stored: s, version: rev}, shape: shape}
}

// Known tells whether an object of this shape has been decoded.
func (o *Object) Known() bool {
	ok, _ := o.l.known(o.shape ^ o.l.watched.readable)
	return ok
}

// Encode gives what an encoder makes of the object. upstream has it do so.
func (o *Object) Encode(id runtime.Identifier, upstream func() ([]byte, error)) ([]byte, error) {
	l := o.l
	l.mu.Lock()
	f := l.watched.encoders[id]
	l.mu.Unlock()
	if f != nil {
		same, known := l.known(o.shape ^ f.id)
		if known && !same {
			return upstream()
		}
		if same && !l.again() {
			one := *f
			return one.one(o.item)
		}
	}
	sent, err := upstream()
	if err != nil {
		return nil, err
	}
	l.remember(o.shape^l.watched.readable, true)
	if f == nil {
		f = l.learn(id, sent)
	}
	if f.id == 0 {
		return sent, nil
	}
	one := *f
	ours, err := one.one(o.item)
	l.remember(o.shape^f.id, err == nil && bytes.Equal(ours, sent))
	return sent, nil
}

// learn finds out what an encoder makes, by an example. Its id is 0 when that is something else.
func (l *Lister) learn(id runtime.Identifier, sent []byte) *form {
	w := l.watched
	f := *w.form
	f.id = 0
	_, err := unwrap(sent, f.typeMeta)
	f.JSON = bytes.HasPrefix(sent, append(append([]byte("{"), jsonTypeMeta(f.Kind)...), ','))
	if err == nil || f.JSON {
		f.id = maphash.String(l.seed, string(id)) | 1
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(w.encoders) < maxEncoders {
		w.encoders[id] = &f
	}
	return &f
}
