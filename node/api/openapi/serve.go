package openapi

import (
	"bytes"
	"compress/gzip"
	"crypto/sha512"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/munnerz/goautoneg"
	"k8s.io/kube-openapi/pkg/handler3"
)

// Media types, as upstream's handlers have them: those with an @ are asked for by old clients.
const (
	typeJSON   = "application/json"
	typeV2Wire = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
	typeV3Wire = "application/com.github.proto-openapi.spec.v3.v1.0+protobuf"
	oldV2Wire  = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"
	oldV3Wire  = "application/com.github.proto-openapi.spec.v3@v1.0+protobuf"
)

// document is one embedded file.
type document struct {
	name string // gzip

	once sync.Once // guards the writing of tag
	tag  string
}

// packed opens the file. It needs no closing: it lies in the binary.
func (d *document) packed() (io.ReadSeeker, error) {
	f, err := files.Open(d.name)
	if err != nil {
		return nil, fmt.Errorf("embedded OpenAPI document: %w", err)
	}
	r, ok := f.(io.ReadSeeker)
	if !ok {
		return nil, fmt.Errorf("embedded OpenAPI document %s: a %T", d.name, f)
	}
	return r, nil
}

func (d *document) reader() (io.Reader, error) {
	f, err := d.packed()
	if err != nil {
		return nil, err
	}
	r, err := gzip.NewReader(f)
	if err != nil {
		return nil, fmt.Errorf("embedded OpenAPI document: %w", err)
	}
	return r, nil
}

func (d *document) unpack() ([]byte, error) {
	r, err := d.reader()
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(r)
	if err != nil {
		return nil, fmt.Errorf("embedded OpenAPI document: %w", err)
	}
	return b, nil
}

// etag is upstream's: the SHA-512 of the JSON. Computed when first asked for: all of them take some 50 ms.
func (d *document) etag() string {
	d.once.Do(func() {
		h := sha512.New()
		if r, err := d.reader(); err == nil {
			_, _ = io.Copy(h, r) // an error would come again when the document is sent
		}
		d.tag = fmt.Sprintf("%X", h.Sum(nil))
	})
	return d.tag
}

// form is a document in one encoding.
type form struct {
	accept, contentType string
	packed              func() (io.ReadSeeker, error) // nil: only unpacked
	unpack              func() ([]byte, error)
}

// negotiate gives the first form that the client accepts, by upstream's rules; nil: none.
func negotiate(r *http.Request, forms []form) *form {
	accept := r.Header.Get("Accept")
	if accept == "" {
		accept = "*/*"
	}
	for _, clause := range goautoneg.ParseAccept(accept) {
		for i, f := range forms {
			main, sub, _ := strings.Cut(f.accept, "/")
			if (clause.Type == main || clause.Type == "*") && (clause.SubType == sub || clause.SubType == "*") {
				return &forms[i]
			}
		}
	}
	return nil
}

// send answers with the document, packed as it is kept when the client accepts that. Range and conditions on the tag apply.
func (f *form) send(w http.ResponseWriter, r *http.Request, tag string, since time.Time) {
	h := w.Header()
	h.Set("Content-Type", f.contentType)
	h.Set("Etag", strconv.Quote(tag))
	if f.packed != nil && r.Header.Get("Range") == "" && strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		packed, err := f.packed()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		h.Set("Content-Encoding", "gzip")
		http.ServeContent(w, r, "", since, packed)
		return
	}
	b, err := f.unpack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	http.ServeContent(w, r, "", since, bytes.NewReader(b))
}

// serveV2 answers a request for version 2 of what is built in.
func (d *Documents) serveV2(w http.ResponseWriter, r *http.Request) {
	w.Header().Add("Vary", "Accept-Encoding")
	w.Header().Add("Vary", "Accept")
	wire := form{typeV2Wire, typeV2Wire, d.v2Wire.packed, d.v2Wire.unpack}
	old := wire
	old.accept = oldV2Wire
	f := negotiate(r, []form{{typeJSON, typeJSON, d.v2JSON.packed, d.v2JSON.unpack}, old, wire})
	if f == nil {
		w.WriteHeader(http.StatusNotAcceptable)
		return
	}
	f.send(w, r, d.v2JSON.etag(), d.since) // of the JSON in both: hence Vary
}

// serveV3 answers a request for version 3 of one group version that is built in.
func (d *Documents) serveV3(w http.ResponseWriter, r *http.Request, path string) {
	doc := d.v3[path]
	w.Header().Add("Vary", "Accept")
	wire := form{typeV3Wire, typeV3Wire, nil, func() ([]byte, error) {
		b, err := doc.unpack()
		if err != nil {
			return nil, err
		}
		return handler3.ToV3ProtoBinary(b)
	}}
	old := wire
	old.accept = oldV3Wire
	f := negotiate(r, []form{{typeJSON, typeJSON, doc.packed, doc.unpack}, wire, old})
	if f == nil {
		w.WriteHeader(http.StatusNotAcceptable)
		return
	}
	tag := doc.etag()
	w.Header().Set("Content-Type", f.contentType) // with one set, a redirection has no body
	w.Header().Set("Etag", strconv.Quote(tag))
	if hash := r.URL.Query().Get("hash"); hash != "" {
		if hash != tag {
			http.Redirect(w, r, hashed(path, tag), http.StatusMovedPermanently)
			return
		}
		// The address contains the hash of the content: it never changes.
		w.Header().Set("Cache-Control", "public, immutable")
		w.Header().Set("Expires", time.Now().AddDate(1, 0, 0).UTC().Format(http.TimeFormat))
	}
	f.send(w, r, tag, d.since)
}

// hashed is the address of a document with a given content.
func hashed(path, tag string) string {
	return "/openapi/v3/" + path + "?" + url.Values{"hash": {tag}}.Encode()
}
