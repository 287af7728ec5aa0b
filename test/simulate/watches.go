package simulate

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
)

// watch answers with a stream.
func (d *door) watch(r *http.Request, q query) (*http.Response, error) {
	t := d.s.tables[q.kind.gvr]
	if t == nil {
		return answer(r, status(apierrors.NewNotFound(q.kind.resource(), "")))
	}
	q.kind = t.kind
	keep, err := q.selector()
	if err != nil {
		return answer(r, status(err))
	}
	from, err := parseRev(q.opts.Get("resourceVersion"))
	if err != nil {
		return answer(r, status(apierrors.NewBadRequest(err.Error())))
	}
	typ := jsonType
	if q.proto {
		typ = protoType
	}
	info, ok := runtime.SerializerInfoForMediaType(codecs.SupportedMediaTypes(), typ)
	if !ok {
		panic("no serializer for " + typ)
	}
	out, in := io.Pipe()
	st := &stream{d: d, q: q, t: t, keep: keep, out: in, info: info, wake: make(chan struct{}, 1)}
	ctx := r.Context()
	limit := 10 * time.Minute
	if secs, err := strconv.Atoi(q.opts.Get("timeoutSeconds")); err == nil {
		limit = time.Duration(secs) * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	go func() {
		defer cancel()
		in.CloseWithError(st.run(ctx, from))
	}()
	resp := &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Request: r, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Body: &closer{out, cancel}}
	resp.Header.Set("Content-Type", typ+";stream=watch")
	return resp, nil
}

// closer ends a stream with its reader.
type closer struct {
	io.ReadCloser
	end func()
}

func (c *closer) Close() error {
	c.end()
	return c.ReadCloser.Close()
}

// stream is one watch.
type stream struct {
	d    *door
	q    query
	t    *table
	keep func(*entry) bool
	out  io.Writer
	info runtime.SerializerInfo
	wake chan struct{}
}

// run sends what happened after a revision until ctx ends.
func (st *stream) run(ctx context.Context, from uint64) error {
	s := st.d.s
	frames := st.info.StreamSerializer.Framer.NewFrameWriter(st.out)
	s.mu.Lock()
	st.t.wake[st.wake] = true
	var first []*entry
	initial := st.q.opts.Get("sendInitialEvents") == "true"
	if initial || from == 0 {
		for _, e := range st.t.objs {
			first = append(first, e)
		}
		from = s.rev
	}
	gone := from < st.t.gone
	next := st.t.first
	for i := range st.t.log {
		if st.t.log[i].e.rev > from {
			break
		}
		next = st.t.first + i + 1
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(st.t.wake, st.wake)
		s.mu.Unlock()
	}()
	if gone {
		expired := apierrors.NewResourceExpired("too old resource version: " + strconv.FormatUint(from, 10)).Status()
		return st.send(frames, watch.Error, &expired)
	}
	for _, e := range first {
		if st.keep(e) {
			if err := st.sendEntry(frames, watch.Added, e); err != nil {
				return err
			}
		}
	}
	if initial {
		if err := st.bookmark(frames, from); err != nil {
			return err
		}
	}
	for n := 0; ; n++ {
		s.mu.Lock()
		if next < st.t.first {
			s.mu.Unlock()
			return io.EOF // it reads too slowly: its next watch will be told
		}
		news := append([]change(nil), st.t.log[next-st.t.first:]...)
		s.mu.Unlock()
		if len(news) == 0 {
			select {
			case <-ctx.Done():
				return io.EOF
			case <-st.wake:
				// The event is on its way for a while, and what happens meanwhile comes with it.
				if !sleep(ctx, between(time.Millisecond, st.d.lag, draw(s.seed, st.d.who, st.q.kind.gvr.Resource, n))) {
					return io.EOF
				}
			}
			continue
		}
		next += len(news)
		for _, c := range news {
			if err := st.tell(frames, c); err != nil {
				return err
			}
		}
	}
}

// tell sends a change as the watch's selector sees it.
func (st *stream) tell(w io.Writer, c change) error {
	now := c.typ != watch.Deleted && st.keep(c.e)
	before := c.old != nil && st.keep(c.old)
	switch {
	case now && before:
		return st.sendEntry(w, watch.Modified, c.e)
	case now:
		return st.sendEntry(w, watch.Added, c.e)
	case before:
		return st.sendEntry(w, watch.Deleted, c.e)
	}
	return nil
}

func (st *stream) bookmark(w io.Writer, rev uint64) error {
	note := metav1.ObjectMeta{ResourceVersion: strconv.FormatUint(rev, 10), Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"}}
	if st.q.metaOnly {
		return st.send(w, watch.Bookmark, &metav1.PartialObjectMetadata{TypeMeta: metav1.TypeMeta{Kind: "PartialObjectMetadata", APIVersion: "meta.k8s.io/v1"}, ObjectMeta: note})
	}
	obj := newOf(st.q.kind)
	obj.GetObjectKind().SetGroupVersionKind(st.q.kind.gvk)
	acc, _ := meta.Accessor(obj)
	acc.SetResourceVersion(note.ResourceVersion)
	acc.SetAnnotations(note.Annotations)
	return st.send(w, watch.Bookmark, obj)
}

func (st *stream) sendEntry(w io.Writer, typ watch.EventType, e *entry) error {
	if st.q.metaOnly {
		return st.send(w, typ, partial(e))
	}
	if st.d.misread != nil {
		obj := e.obj.DeepCopyObject()
		st.d.misread(obj)
		return st.send(w, typ, obj)
	}
	if !st.q.proto {
		return st.send(w, typ, e.obj)
	}
	e.once.Do(func() {
		var b bytes.Buffer
		if err := protoCodec.Encode(e.obj, &b); err != nil {
			panic(err)
		}
		e.raw = b.Bytes()
	})
	return st.frame(w, typ, e.raw)
}

func (st *stream) send(w io.Writer, typ watch.EventType, obj runtime.Object) error {
	if s, ok := obj.(*metav1.Status); ok {
		s.Kind, s.APIVersion = "Status", "v1"
	}
	if st.q.proto {
		var b bytes.Buffer
		if err := protoCodec.Encode(obj, &b); err != nil {
			return err
		}
		return st.frame(w, typ, b.Bytes())
	}
	raw, err := json.Marshal(obj)
	if err != nil {
		return err
	}
	return st.frame(w, typ, raw)
}

func (st *stream) frame(w io.Writer, typ watch.EventType, raw []byte) error {
	ev := &metav1.WatchEvent{Type: string(typ), Object: runtime.RawExtension{Raw: raw}}
	ev.GetObjectKind().SetGroupVersionKind(schema.GroupVersionKind{Version: "v1", Kind: "WatchEvent"})
	var b bytes.Buffer
	if err := st.info.StreamSerializer.Serializer.Encode(ev, &b); err != nil {
		return err
	}
	_, err := w.Write(b.Bytes())
	return err
}
