package openapi

import (
	"errors"
	"testing"

	"k8s.io/kube-openapi/pkg/validation/spec"
)

// What one server cannot or should not say does not keep out what others say.
func TestDocumentsOfOtherServers(t *testing.T) {
	const theirs = `{"swagger":"2.0","info":{"title":"x","version":"1"},"paths":{
	 "/apis/a.example.org/v1/things":{"get":{"responses":{"200":{"description":"OK","schema":{"$ref":"#/definitions/Thing"}}}}},
	 "/apis/apps/v1/deployments":{"get":{"responses":{"200":{"description":"not theirs"}}}}},
	 "definitions":{"Thing":{"type":"object","description":"theirs"}}}`
	give := func(s string, err error) func() ([]byte, error) {
		return func() ([]byte, error) { return []byte(s), err }
	}
	a := Remote{Group: "a.example.org", Version: "v1", Fetch: give(theirs, nil)}
	for name, tc := range map[string]struct {
		remotes []Remote
		all     bool
	}{
		"one":                      {[]Remote{a}, true},
		"one that does not answer": {[]Remote{{Fetch: give("", errors.New("gone"))}, a}, false},
		"one that answers rubbish": {[]Remote{{Fetch: give("<html>", nil)}, a}, false},
		"one without paths":        {[]Remote{{Fetch: give("{}", nil)}, a}, false},
	} {
		doc := &spec.Swagger{SwaggerProps: spec.SwaggerProps{Paths: &spec.Paths{Paths: map[string]spec.PathItem{"/own": {}}},
			Definitions: spec.Definitions{"Thing": {SchemaProps: spec.SchemaProps{Description: "own"}}}}}
		if all := addRemotes(doc, tc.remotes); all != tc.all {
			t.Errorf("%s: complete is %t", name, all)
		}
		if p := doc.Paths.Paths; len(p) != 2 || p["/apis/a.example.org/v1/things"].Get == nil {
			t.Errorf("%s: paths %v", name, p)
		}
		if d := doc.Definitions; len(d) != 2 || d["Thing"].Description != "own" || d["Thing_v2"].Description != "theirs" {
			t.Errorf("%s: definitions %v", name, d)
		}
	}
}
