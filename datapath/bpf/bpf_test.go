package bpf

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestDrift: the committed object was made from the sources beside it. "generate.sh check" shows it by compiling, this
// test on machines without the compiler too: the list of hashes is written together with the object.
func TestDrift(t *testing.T) {
	files, err := filepath.Glob("*.[ch]")
	if err != nil {
		t.Fatal(err)
	}
	// skein.c first, then the headers, as generate.sh lists them
	slices.SortFunc(files, func(a, b string) int {
		return strings.Compare(filepath.Ext(a)+a, filepath.Ext(b)+b)
	})
	var want strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&want, "%x  %s\n", sha256.Sum256(b), f)
	}
	got, err := os.ReadFile("sources.sha256")
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != want.String() {
		t.Errorf("the sources changed, the object did not: run generate.sh\n%s\nwant\n%s", got, want.String())
	}
}

// TestNames: every program and table that the generated code names is in the object.
func TestNames(t *testing.T) {
	spec, err := LoadSkein()
	if err != nil {
		t.Fatal(err)
	}
	var objs SkeinSpecs
	if err := spec.Assign(&objs); err != nil {
		t.Error(err)
	}
}
