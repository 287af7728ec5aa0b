package router

import (
	"bytes"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
)

// pieces notes what is written, and when it is flushed.
type pieces struct {
	*httptest.ResponseRecorder
	said []string
	err  error
}

func (p *pieces) Write(b []byte) (int, error) {
	p.said = append(p.said, string(b))
	return len(b), p.err
}

func (p *pieces) Flush() { p.said = append(p.said, "|") }

// What a watch tells at once is one write, in order, and nothing stays behind.
func TestWatchWritesInOnePiece(t *testing.T) {
	large := string(bytes.Repeat([]byte("x"), batchSize))
	var late http.ResponseWriter
	for name, c := range map[string]struct {
		tells func(http.ResponseWriter, func())
		want  []string
	}{
		"events": {func(w http.ResponseWriter, flush func()) {
			flush()
			say(w, "4", "abcd", "2", "ef")
			flush()
			say(w, "1", "g")
			flush()
		}, []string{"|", "4abcd2ef", "|", "1g", "|"}},
		"not flushed":        {func(w http.ResponseWriter, _ func()) { say(w, "1", "a") }, []string{"1a"}},
		"many":               {func(w http.ResponseWriter, flush func()) { say(w, "a", large, "b"); flush() }, []string{"a" + large, "b", "|"}},
		"after it has ended": {func(w http.ResponseWriter, _ func()) { say(w, "a"); late = w }, []string{"a", "b"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := &pieces{ResponseRecorder: httptest.NewRecorder()}
			batched(func(w http.ResponseWriter, _ *http.Request) { c.tells(w, w.(http.Flusher).Flush) })(p, httptest.NewRequest("GET", "/", nil))
			if late != nil {
				say(late, "b")
				late = nil
			}
			if !slices.Equal(p.said, c.want) {
				t.Errorf("%.100q, want %.100q", p.said, c.want)
			}
		})
	}
	p := &pieces{ResponseRecorder: httptest.NewRecorder(), err: errors.New("gone")}
	batched(func(w http.ResponseWriter, _ *http.Request) {
		say(w, "a")
		w.(http.Flusher).Flush()
		if _, err := w.Write([]byte("b")); !errors.Is(err, p.err) {
			t.Errorf("after a failed write: %v", err)
		}
	})(p, httptest.NewRequest("GET", "/", nil))
}

func say(w http.ResponseWriter, parts ...string) {
	for _, p := range parts {
		_, _ = w.Write([]byte(p))
	}
}
