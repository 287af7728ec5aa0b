package main

import (
	"reflect"
	"strings"
	"testing"
)

func TestReport(t *testing.T) {
	in := `{"Action":"output","Package":"p","Test":"A","Output":"why\n"}
{"Action":"fail","Package":"p","Test":"A","Elapsed":1}
{"Action":"pass","Package":"p","Test":"B"}
{"Action":"skip","Package":"p","Test":"C"}
{"Action":"fail","Package":"p","Elapsed":2}
{"Action":"build-output","ImportPath":"q [q.test]","Output":"does not build\n"}
{"Action":"fail","Package":"q","FailedBuild":"q [q.test]"}
{"Action":"pass","Package":"r","Elapsed":3}
go: something else
`
	var out strings.Builder
	c, err := report(strings.NewReader(in), &out)
	if err != nil {
		t.Fatal(err)
	}
	if want := (counts{passed: 1, failed: 2, skipped: 1, packages: 3, failedPackages: []string{"p", "q"}}); !reflect.DeepEqual(c, want) {
		t.Errorf("got %+v, want %+v", c, want)
	}
	for _, want := range []string{"why", "does not build", "ok   r (3.0 s)", "go: something else"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the report lacks %q:\n%s", want, out.String())
		}
	}
}
