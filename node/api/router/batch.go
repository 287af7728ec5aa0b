package router

import (
	"net/http"
	"sync"

	"k8s.io/streaming/pkg/httpstream/wsstream"

	"skein.io/skein/node/api/internal/linger"
)

// Upstream writes an event of a watch in two parts, its length and itself, through all that its filters have put around the answer, and the
// HTTP/2 server has three goroutines pass on each 4 KB. Here all that a watch has to tell when it is woken goes through them in one piece.

const (
	// batchSize is how much of a watch's answer waits at most until upstream flushes it: as much as the largest frame that clients take unless they say so.
	batchSize = 16 << 10
	// batchKept is how large a buffer may have grown to be used again.
	batchKept = 2 * batchSize
)

var batches = sync.Pool{New: func() any { return new([]byte) }}

// batched serves a watch.
func batched(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		f, ok := w.(http.Flusher)
		if !ok || wsstream.IsWebSocketRequest(r) { // that takes the connection over
			next(w, r)
			return
		}
		b := &batch{ResponseWriter: w, flusher: f, conn: linger.From(r.Context())}
		defer b.end()
		next(b, r)
	}
}

// batch holds what is written until it is flushed. An idle one holds nothing. It is used by one goroutine at a time.
type batch struct {
	http.ResponseWriter
	flusher http.Flusher
	conn    linger.Conn // may be nil
	held    *[]byte     // nil: nothing
	err     error       // of a write; what follows is dropped
	over    bool        // the handler has returned
}

// Unwrap tells http.ResponseController, and upstream, what is inside.
func (b *batch) Unwrap() http.ResponseWriter { return b.ResponseWriter }

// Write implements http.ResponseWriter.
func (b *batch) Write(p []byte) (int, error) {
	if b.over {
		return b.ResponseWriter.Write(p)
	}
	if b.held == nil {
		b.held = batches.Get().(*[]byte)
	}
	if *b.held = append(*b.held, p...); len(*b.held) >= batchSize {
		b.pass()
	}
	if b.err != nil {
		return 0, b.err
	}
	return len(p), nil
}

// Flush implements http.Flusher.
func (b *batch) Flush() {
	if b.conn != nil {
		b.conn.Linger()
	}
	b.pass()
	b.flusher.Flush()
}

// pass writes what is held.
func (b *batch) pass() {
	if b.held == nil {
		return
	}
	if b.err == nil {
		_, b.err = b.ResponseWriter.Write(*b.held)
	}
	if cap(*b.held) <= batchKept {
		*b.held = (*b.held)[:0]
		batches.Put(b.held)
	}
	b.held = nil
}

// end sends what was written last; a watch may end behind an event that it did not flush.
func (b *batch) end() {
	b.pass()
	b.over = true
}
