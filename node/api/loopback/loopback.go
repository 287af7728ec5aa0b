// Package loopback carries requests of clients inside this process to the API's handler: no TCP,
// no TLS, no HTTP/2 frames, and the values in the request's context reach the store.
//
// A Transport may be used by any number of clients at once. Requests wait a moment for Serve, as clients start while the API is
// assembled, and fail then.
// Closing a response body, or the end of the request's context, ends the handler's context.
package loopback

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// startWait bounds how long a request waits for Serve. To assemble an API takes some tens of milliseconds.
const startWait = 3 * time.Second

// ErrNotServing is returned for requests when Serve was not called.
var ErrNotServing = errors.New("the API of this node is not serving yet")

// remoteAddr is what handlers see as the caller. Upstream parses it.
const remoteAddr = "127.0.0.1:0"

// Transport is an http.RoundTripper whose other end is a handler. The zero value works.
type Transport struct {
	handler atomic.Pointer[http.Handler]
	made    sync.Once     // makes served
	ended   sync.Once     // closes it
	served  chan struct{} // closed when there is a handler
}

// Serve sets the handler that answers from now on.
func (t *Transport) Serve(h http.Handler) {
	t.handler.Store(&h)
	t.ended.Do(func() { close(t.first()) })
}

func (t *Transport) first() chan struct{} {
	t.made.Do(func() { t.served = make(chan struct{}) })
	return t.served
}

// await gives the handler; nil when there was none in time.
func (t *Transport) await(ctx context.Context) *http.Handler {
	if h := t.handler.Load(); h != nil {
		return h
	}
	enough := time.NewTimer(startWait)
	defer enough.Stop()
	select {
	case <-t.first():
	case <-ctx.Done():
	case <-enough.C:
	}
	return t.handler.Load()
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	h := t.await(r.Context())
	if h == nil {
		if r.Body != nil {
			r.Body.Close()
		}
		if err := r.Context().Err(); err != nil {
			return nil, err
		}
		return nil, ErrNotServing
	}
	ctx, cancel := context.WithCancel(r.Context())
	req := r.Clone(ctx)
	req.RequestURI = req.URL.RequestURI()
	req.RemoteAddr = remoteAddr
	req.Proto, req.ProtoMajor, req.ProtoMinor = "HTTP/2.0", 2, 0
	if req.Host == "" {
		req.Host = req.URL.Host
	}
	if req.Body == nil {
		req.Body = http.NoBody
	}
	pr, pw := io.Pipe()
	w := &writer{ctx: ctx, pipe: pw, header: http.Header{}, ready: make(chan struct{})}
	go func() {
		defer cancel()
		defer req.Body.Close()
		defer func() {
			if p := recover(); p != nil {
				// As net/http does with a panicking handler: the connection breaks.
				w.abort(fmt.Errorf("handler of %s %s broke off: %w", r.Method, r.URL.Path, io.ErrUnexpectedEOF))
				return
			}
			w.WriteHeader(http.StatusOK)
			pw.Close()
		}()
		(*h).ServeHTTP(w, req)
	}()
	select {
	case <-w.ready:
	case <-ctx.Done():
		if r.Context().Err() != nil {
			pr.Close()
			return nil, r.Context().Err()
		}
		<-w.ready // the handler ended at this very moment, after it had answered
	}
	if w.failed != nil {
		return nil, w.failed
	}
	return &http.Response{
		StatusCode: w.code, Status: fmt.Sprintf("%d %s", w.code, http.StatusText(w.code)), Header: w.sent,
		Body: &body{PipeReader: pr, cancel: cancel}, Request: r,
		Proto: "HTTP/2.0", ProtoMajor: 2, ContentLength: -1,
	}, nil
}

// body ends the handler's context when the client has read enough.
type body struct {
	*io.PipeReader
	cancel context.CancelFunc
}

func (b *body) Close() error {
	b.cancel()
	return b.PipeReader.Close()
}

// writer is the handler's end of one response.
type writer struct {
	ctx    context.Context
	pipe   *io.PipeWriter
	header http.Header

	once   sync.Once
	ready  chan struct{} // closed when the fields below are set
	code   int
	sent   http.Header
	failed error
}

func (w *writer) Header() http.Header { return w.header }

func (w *writer) WriteHeader(code int) {
	if code >= 100 && code < 200 {
		return // informational, nothing here waits for one
	}
	w.once.Do(func() {
		w.code, w.sent = code, w.header.Clone()
		close(w.ready)
	})
}

func (w *writer) abort(err error) {
	w.once.Do(func() {
		w.failed = err
		close(w.ready)
	})
	w.pipe.CloseWithError(err)
}

func (w *writer) Write(b []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	return w.pipe.Write(b)
}

// Flush implements http.Flusher; nothing is held back.
func (w *writer) Flush() { w.WriteHeader(http.StatusOK) }

// CloseNotify implements the interface by which upstream tells HTTP/2 from HTTP/1 writers.
func (w *writer) CloseNotify() <-chan bool {
	c := make(chan bool, 1)
	context.AfterFunc(w.ctx, func() { c <- true })
	return c
}

// Decorated gives a transport that changes each request's context first. A nil decorate changes
// nothing.
func (t *Transport) Decorated(decorate func(context.Context) context.Context) http.RoundTripper {
	if decorate == nil {
		return t
	}
	return decorated{t, decorate}
}

type decorated struct {
	next     http.RoundTripper
	decorate func(context.Context) context.Context
}

func (d decorated) RoundTrip(r *http.Request) (*http.Response, error) {
	return d.next.RoundTrip(r.WithContext(d.decorate(r.Context())))
}
