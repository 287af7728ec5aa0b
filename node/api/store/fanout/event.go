package fanout

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"weak"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/value"
)

// keyContext authenticates a value by its key, as etcd3 does when it writes.
type keyContext string

// AuthenticatedData implements value.Context.
func (k keyContext) AuthenticatedData() []byte { return []byte(k) }

var _ value.Context = keyContext("")

// coder makes objects of stored values.
type coder struct {
	codec       runtime.Codec
	transformer value.Transformer
	versioner   storage.Versioner
	stored      func([]byte, int64) Stored                                    // nil: none
	pick        func([]byte, *storage.SelectionPredicate) (selected, ok bool) // nil: it cannot
}

// object makes the object of a stored value. An error says that it cannot be decoded.
func (c *coder) object(ctx context.Context, key string, raw []byte, rev int64) (*object, error) {
	data, _, err := c.transformer.TransformFromStorage(ctx, raw, keyContext(key))
	if err != nil {
		return nil, err
	}
	o := &object{source: func() (runtime.Object, error) {
		o, err := runtime.Decode(c.codec, data)
		if err != nil {
			return nil, err
		}
		if err := c.versioner.UpdateObject(o, uint64(rev)); err != nil {
			return nil, fmt.Errorf("revision %d of %s: %w", rev, key, err)
		}
		return o, nil
	}}
	if c.pick != nil {
		o.raw, o.pick = data, c.pick
	}
	if c.stored != nil {
		o.stored = c.stored(data, rev)
	}
	if o.stored != nil && o.stored.Known() {
		return o, nil // whoever has to look at it decodes it
	}
	_, err = o.decoded()
	return o, err
}

// event is one change, or one object of a first list. It is immutable but for what it remembers to have decoded.
type event struct {
	key              string
	rev              int64
	created, deleted bool
	bookmark         bool
	value, previous  []byte

	mu        sync.Mutex // held while decoding, so that it is done once
	cur, prev weak.Pointer[object]
	// held are the same of a page's objects, which live as long as the page.
	held *object
	hold bool
}

var errNoPrevious = errors.New("the store does not tell what was there before the change")

func newEvent(e *clientv3.Event) (*event, error) {
	if !e.IsCreate() && e.PrevKv == nil {
		return nil, fmt.Errorf("%w of %q at revision %d", errNoPrevious, e.Kv.Key, e.Kv.ModRevision)
	}
	out := &event{key: string(e.Kv.Key), rev: e.Kv.ModRevision, value: e.Kv.Value, created: e.IsCreate(), deleted: e.Type == clientv3.EventTypeDelete}
	if e.PrevKv != nil {
		out.previous = e.PrevKv.Value
	}
	return out, nil
}

// listed is an object of a first list.
func listed(kv *mvccpb.KeyValue) *event {
	return &event{key: string(kv.Key), rev: kv.ModRevision, value: kv.Value, created: true, hold: true}
}

func (e *event) size() int { return len(e.key) + len(e.value) + len(e.previous) + 200 }

// current is the object after the change.
func (e *event) current(ctx context.Context, c *coder) (*object, error) {
	return e.load(ctx, c, &e.cur, e.value)
}

// before is the object before the change, with the revision of the change.
func (e *event) before(ctx context.Context, c *coder) (*object, error) {
	return e.load(ctx, c, &e.prev, e.previous)
}

// peek gives the indexed field of a stored value, if it can be told without decoding it.
func (f *Fan) peek(ctx context.Context, key string, stored []byte) (value string, ok bool) {
	if f.cfg.Peek == nil {
		return "", false
	}
	data, _, err := f.cfg.Transformer.TransformFromStorage(ctx, stored, keyContext(key))
	if err != nil {
		return "", false
	}
	return f.cfg.Peek(data)
}

func (e *event) load(ctx context.Context, c *coder, p *weak.Pointer[object], raw []byte) (*object, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if o := p.Value(); o != nil {
		return o, nil
	}
	o, err := c.object(ctx, e.key, raw, e.rev)
	if err != nil {
		return nil, err
	}
	*p = weak.Make(o)
	if e.hold {
		e.held = o
	}
	return o, nil
}

// see gives what a watcher with a predicate is told of a change; nil for nothing.
func (e *event) see(ctx context.Context, c *coder, p *storage.SelectionPredicate, attrs storage.AttrFunc) (*watch.Event, error) {
	var cur, prev *object
	var err error
	if !e.deleted {
		if cur, err = e.current(ctx, c); err != nil {
			return nil, err
		}
	}
	all := unfiltered(p)
	if e.deleted || !e.created && !all { // else nobody asks what was before
		if prev, err = e.before(ctx, c); err != nil {
			return nil, err
		}
	}
	now, was := false, prev == nil && !e.created && all
	if cur != nil {
		if now, err = cur.selected(p, attrs); err != nil {
			return nil, err
		}
	}
	if prev != nil {
		if was, err = prev.selected(p, attrs); err != nil {
			return nil, err
		}
	}
	switch {
	case now && was:
		return &watch.Event{Type: watch.Modified, Object: cur}, nil
	case now:
		return &watch.Event{Type: watch.Added, Object: cur}, nil
	case was:
		return &watch.Event{Type: watch.Deleted, Object: prev}, nil
	}
	return nil, nil
}
