package router

import (
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/klauspost/compress/gzip"
	"k8s.io/apiserver/pkg/features"
	utilfeature "k8s.io/apiserver/pkg/util/feature"

	"skein.io/skein/node/api/internal/pause"
)

// Upstream compresses large answers with the standard library. Here another library does it, in the same cases (see deferredResponseWriter in
// k8s.io/apiserver/pkg/endpoints/handlers/responsewriters): 500 pods take it half of the time or less, and get no larger.

const (
	// compressFrom is how long an answer must be, in bytes; upstream's.
	compressFrom = 128 << 10
	// firstOfStream is how long the first write is at most of those who write an answer in parts; upstream's. Others have said all with their first.
	firstOfStream = 4
	// pauseEvery is after how much that has been compressed others may need the processor, in bytes.
	pauseEvery = 64 << 10
)

var gzips = sync.Pool{New: func() any {
	z, err := gzip.NewWriterLevel(nil, gzip.BestSpeed)
	if err != nil {
		panic("router: " + err.Error()) // the level is a constant
	}
	return z
}}

// helds are the beginnings of answers: each list has one, of some 150 KB before it is clear how long it is.
var helds = sync.Pool{New: func() any { return new([]byte) }}

// compressed does what upstream would: next is not told that the client takes compressed answers.
func compressed(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !takesGzip(r.Header.Get("Accept-Encoding")) || !utilfeature.DefaultFeatureGate.Enabled(features.APIResponseCompression) {
			next(w, r)
			return
		}
		r = r.WithContext(r.Context())
		r.Header = r.Header.Clone()
		r.Header.Del("Accept-Encoding")
		z := &zipWriter{ResponseWriter: w, work: pause.Begin(r.Context())}
		next(z, r)
		z.end()
	}
}

func takesGzip(accept string) bool {
	for t := range strings.SplitSeq(accept, ",") {
		if strings.TrimSpace(t) == "gzip" {
			return true
		}
	}
	return false
}

// zipWriter holds the beginning of an answer until it is clear whether it is worth compressing.
type zipWriter struct {
	http.ResponseWriter
	code  int     // 0: not known yet
	held  *[]byte // nil: nothing
	begun bool
	zip   *gzip.Writer // nil: not compressed
	work  *pause.Work
}

// WriteHeader implements http.ResponseWriter.
func (w *zipWriter) WriteHeader(code int) {
	if code < http.StatusOK {
		w.ResponseWriter.WriteHeader(code)
		return
	}
	if w.code == 0 {
		w.code = code
	}
}

// Write implements http.ResponseWriter.
func (w *zipWriter) Write(b []byte) (int, error) {
	switch {
	case w.begun:
		return w.pass(b)
	case w.held == nil && (len(b) > compressFrom || len(b) > firstOfStream):
		w.begin(len(b) > compressFrom)
		return w.pass(b)
	}
	if w.held == nil {
		w.held = helds.Get().(*[]byte)
	}
	if *w.held = append(*w.held, b...); len(*w.held) <= compressFrom {
		return len(b), nil
	}
	w.begin(true)
	if err := w.release(); err != nil {
		return 0, err
	}
	return len(b), nil
}

// release passes on what is held.
func (w *zipWriter) release() error {
	held := w.held
	w.held = nil
	_, err := w.pass(*held)
	if cap(*held) <= 2*compressFrom {
		*held = (*held)[:0]
		helds.Put(held)
	}
	return err
}

func (w *zipWriter) begin(compress bool) {
	w.begun = true
	if compress {
		w.Header().Set("Content-Encoding", "gzip")
		w.Header().Add("Vary", "Accept-Encoding")
		w.zip = gzips.Get().(*gzip.Writer)
		w.zip.Reset(w.ResponseWriter)
	}
	if w.code != 0 {
		w.ResponseWriter.WriteHeader(w.code)
	}
}

func (w *zipWriter) pass(b []byte) (n int, err error) {
	if w.zip != nil {
		for c := range slices.Chunk(b, pauseEvery) {
			if m, err := w.zip.Write(c); err != nil {
				return n + m, err
			}
			n += len(c)
			w.work.Pause()
		}
		return n, nil
	}
	return w.ResponseWriter.Write(b)
}

// end sends what is left. A handler that breaks off does not get here: its client must not take the answer for a whole one.
func (w *zipWriter) end() {
	if !w.begun && (w.code != 0 || w.held != nil) {
		w.begin(false)
		if w.held != nil {
			_ = w.release() // the client is gone
		}
	}
	if w.zip != nil {
		_ = w.zip.Close() // the same
		w.zip.Reset(nil)
		gzips.Put(w.zip)
	}
}
