package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"skein.io/skein/node/client"
)

// The bound goes along with reads, and an answer that is older fails whoever gave it.
func TestMaxAge(t *testing.T) {
	for _, c := range []struct {
		max, method, asked, age string
		fails                   bool
	}{
		{"30s", "GET", "30", "", false},
		{"30s", "GET", "30", "30", false},
		{"30s", "GET", "30", "31", true},
		{"0s", "GET", "0", "1", true},
		{"90m", "GET", "5400", "1", false},
		{"30s", "POST", "", "", false},
	} {
		var asked string
		s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			asked = r.Header.Get(client.MaxAgeHeader)
			if c.age != "" {
				w.Header().Set(client.AgeHeader, c.age)
			}
		}))
		var a agedAnswers
		if err := a.Set(c.max); err != nil {
			t.Fatal(err)
		}
		r, _ := http.NewRequest(c.method, s.URL, nil)
		resp, err := agedTransport{http.DefaultTransport, *a.max}.RoundTrip(r)
		if err == nil {
			resp.Body.Close()
		}
		if (err != nil) != c.fails || asked != c.asked {
			t.Errorf("%+v: asked for %q, %v", c, asked, err)
		}
		if c.fails && !strings.Contains(err.Error(), "--max-age") {
			t.Errorf("%v", err)
		}
		s.Close()
	}
	for _, bad := range []string{"", "-1s", "30", "x"} {
		if new(agedAnswers).Set(bad) == nil {
			t.Errorf("--max-age=%s was accepted", bad)
		}
	}
}
