package router

import (
	"bytes"
	"compress/gzip"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"testing"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/endpoints/handlers/responsewriters"

	"skein.io/skein/node/api/store/rawlist"
)

type silent struct{ runtime.Encoder }

func (silent) Identifier() runtime.Identifier { return "" }

// What is compressed, and what the answer says about it, is as with upstream.
func TestCompressesAsUpstream(t *testing.T) {
	large := make([]byte, 300<<10)
	for i := range large {
		large[i] = "abcdefgh"[rand.IntN(8)]
	}
	for name, c := range map[string]struct {
		accept string
		parts  [][]byte
		want   bool
	}{
		"at once":                     {"gzip", [][]byte{large}, true},
		"a stream":                    {"gzip, deflate", [][]byte{[]byte("{"), large[:1000], large[1000:]}, true},
		"a stream in small parts":     {"gzip", append([][]byte{[]byte("k8s\x00")}, split(large, 5000)...), true},
		"a short stream":              {"gzip", [][]byte{[]byte("{"), large[:1000]}, false},
		"just not long enough":        {"gzip", [][]byte{[]byte("{"), large[:compressFrom-1]}, false},
		"just long enough":            {"gzip", [][]byte{[]byte("{"), large[:compressFrom]}, true},
		"short":                       {"gzip", [][]byte{large[:1000]}, false},
		"parts, but not as a stream":  {"gzip", [][]byte{large[:1000], large}, false},
		"not wanted":                  {"deflate", [][]byte{large}, false},
		"nothing said":                {"", [][]byte{large}, false},
		"nothing":                     {"gzip", nil, false},
		"one byte":                    {"gzip", [][]byte{[]byte("{")}, false},
		"refused by a weight, not us": {"gzip;q=0", [][]byte{large}, false},
	} {
		h := func(w http.ResponseWriter, r *http.Request) {
			a := rawlist.Answer(func(w io.Writer) error {
				for _, p := range c.parts {
					if _, err := w.Write(p); err != nil {
						return err
					}
				}
				return nil
			})
			responsewriters.SerializeObject("application/json", stored{silent{}, a}, w, r, http.StatusAccepted, nil)
		}
		ask := func(h http.HandlerFunc) (*http.Response, []byte) {
			w, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/", nil)
			if c.accept != "" {
				r.Header.Set("Accept-Encoding", c.accept)
			}
			h(w, r)
			resp := w.Result()
			body := w.Body.Bytes()
			if resp.Header.Get("Content-Encoding") == "gzip" {
				z, err := gzip.NewReader(bytes.NewReader(body))
				if err == nil {
					body, err = io.ReadAll(z)
				}
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
			return resp, body
		}
		got, body := ask(compressed(h))
		want, wantBody := ask(h)
		if got.StatusCode != want.StatusCode || got.Header.Get("Content-Encoding") != want.Header.Get("Content-Encoding") || got.Header.Get("Vary") != want.Header.Get("Vary") ||
			got.Header.Get("Content-Type") != want.Header.Get("Content-Type") || !bytes.Equal(body, wantBody) {
			t.Errorf("%s: %d %v with %d bytes, want %d %v with %d", name, got.StatusCode, got.Header, len(body), want.StatusCode, want.Header, len(wantBody))
		}
		if zipped := got.Header.Get("Content-Encoding") == "gzip"; zipped != c.want {
			t.Errorf("%s: compressed %v", name, zipped)
		}
	}
}

func split(b []byte, n int) (parts [][]byte) {
	for len(b) > 0 {
		n := min(n, len(b))
		parts, b = append(parts, b[:n]), b[n:]
	}
	return parts
}
