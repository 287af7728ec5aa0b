package server

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	internalapi "k8s.io/cri-api/pkg/apis"
)

// noRuntime panics when it is used: these tests never get that far.
type noRuntime struct{ internalapi.RuntimeService }

func TestParseLogOptions(t *testing.T) {
	o, err := parseLogOptions(url.Values{"follow": {"true"}, "tailLines": {"3"}, "sinceTime": {"2026-01-02T03:04:05Z"}, "timestamps": {"1"}, "previous": {"false"}})
	if err != nil {
		t.Fatal(err)
	}
	if !o.Follow || !o.Timestamps || o.Previous || o.TailLines == nil || *o.TailLines != 3 || o.SinceTime.Year() != 2026 {
		t.Errorf("got %+v", o)
	}
	for query, want := range map[string]string{
		"tailLines=x":         `tailLines "x" is no number`,
		"tailLines=-1":        "must not be negative",
		"limitBytes=0":        "greater than 0",
		"sinceSeconds=0":      "greater than 0",
		"sinceTime=yesterday": "RFC 3339",
		"sinceSeconds=1&sinceTime=2026-01-02T03:04:05Z": "at most one",
		"stream=Both": `stream "Both"`,
	} {
		q, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := parseLogOptions(q); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want an error with %q", query, err, want)
		}
	}
}

func FuzzParseLogOptions(f *testing.F) {
	f.Add("follow=true&tailLines=3&sinceTime=2026-01-02T03:04:05Z")
	f.Add("limitBytes=9223372036854775808&stream=All")
	f.Fuzz(func(t *testing.T, query string) {
		q, err := url.ParseQuery(query)
		if err != nil {
			return
		}
		o, err := parseLogOptions(q)
		if err == nil && o.TailLines != nil && *o.TailLines < 0 {
			t.Errorf("%q: negative tailLines let through", query)
		}
	})
}

// The server refuses callers that show no certificate, and those that the cluster refuses.
func TestGuard(t *testing.T) {
	var asked []Attributes
	s, err := New(Config{NodeName: "n1", Pods: func() []*corev1.Pod { return nil }, Pod: func(string, string) *corev1.Pod { return nil },
		Runtime: noRuntime{}, ReadLog: func(context.Context, string, string, *corev1.PodLogOptions, time.Time, internalapi.RuntimeService, io.Writer, io.Writer) error {
			return nil
		},
		Authorize: func(_ context.Context, u User, a Attributes) (bool, string, error) {
			asked = append(asked, a)
			return u.Name == "api", "no rule", nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	call := func(path, user string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(http.MethodGet, path, nil)
		if user != "" {
			r.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{{Subject: pkix.Name{CommonName: user}}}}
		}
		w := httptest.NewRecorder()
		s.ServeHTTP(w, r)
		return w
	}
	for _, c := range []struct {
		path, user string
		code       int
		text       string
	}{
		{"/healthz", "", 200, "ok"},
		{"/pods", "", 401, "client certificate"},
		{"/pods", "eve", 403, "user=eve, verb=get, resource=nodes, subresource=proxy, node=n1): no rule"},
		{"/pods", "api", 200, `"kind":"PodList"`},
		{"/containerLogs/a/b/c", "api", 404, `pod "a/b" does not exist on node n1`},
		{"/exec/a/b/c", "api", 404, "does not exist"},
		{"/stats/summary", "eve", 403, "subresource=stats"},
		{"/nothing", "api", 404, ""},
	} {
		if w := call(c.path, c.user); w.Code != c.code || !strings.Contains(w.Body.String(), c.text) {
			t.Errorf("%s as %q: got %d %q, want %d with %q", c.path, c.user, w.Code, w.Body, c.code, c.text)
		}
	}
	if len(asked) == 0 {
		t.Error("nobody was asked")
	}
}

func TestNewNamesWhatIsMissing(t *testing.T) {
	_, err := New(Config{})
	if err == nil || strings.Count(err.Error(), "is missing") != 6 {
		t.Errorf("got %v, want six missing fields at once", err)
	}
}
