package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const report = `[{"SpecReports": [
 {"LeafNodeType": "ReportAfterSuite", "LeafNodeText": "x", "State": "passed"},
 {"ContainerHierarchyTexts": ["[sig-auth] A"], "LeafNodeType": "It", "LeafNodeText": "one [Conformance]", "State": "passed", "RunTime": 1000000000},
 {"ContainerHierarchyTexts": ["[sig-auth] A"], "LeafNodeType": "It", "LeafNodeText": "two [Serial] [Conformance]", "State": "skipped"},
 {"ContainerHierarchyTexts": ["[sig-cli] B", "c"], "LeafNodeType": "It", "LeafNodeText": "three [Conformance]", "State": "timedout", "Failure": {"Message": "no\nanswer | x"}},
 {"ContainerHierarchyTexts": ["[sig-cli] B"], "LeafNodeType": "It", "LeafNodeText": "no conformance", "State": "failed"}]}]`

func TestRecord(t *testing.T) {
	dir := t.TempDir()
	path, doc := filepath.Join(dir, "r.json"), filepath.Join(dir, "doc.md")
	run := func(report string, day int) *results {
		t.Helper()
		var r results
		if err := os.WriteFile(path, []byte(report), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := r.read(path); err != nil {
			t.Fatal(err)
		}
		if err := record(doc, &r, time.Date(2026, 1, day, 0, 0, 0, 0, time.UTC)); err != nil {
			t.Fatal(err)
		}
		return &r
	}
	lines := func() string {
		t.Helper()
		b, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, l := range strings.Split(string(b), "\n") {
			if strings.HasPrefix(l, "- ") || strings.HasPrefix(l, "| all") {
				out = append(out, l)
			}
		}
		return strings.Join(out, "\n")
	}
	r := run(report, 1)
	if r.good() || !strings.Contains(r.table(), "FAILED [sig-cli] B c three [Conformance]") {
		t.Error(r.table())
	}
	if got, want := lines(), `| all | 1 | 1 | 1 | 3 |
- not run [sig-auth] A two [Serial] [Conformance]
- passed 2026-01-01 [sig-auth] A one [Conformance]
- FAILED 2026-01-01 [sig-cli] B c three [Conformance]: no answer x`; got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
	// What does not run again keeps its line, and a failure that passes loses its message.
	r = run(strings.ReplaceAll(strings.Replace(report, `"passed", "RunTime"`, `"skipped", "RunTime"`, 1), "timedout", "passed"), 2)
	if !r.good() {
		t.Error(r.table())
	}
	if got, want := lines(), `| all | 2 | 0 | 1 | 3 |
- not run [sig-auth] A two [Serial] [Conformance]
- passed 2026-01-01 [sig-auth] A one [Conformance]
- passed 2026-01-02 [sig-cli] B c three [Conformance]`; got != want {
		t.Errorf("%s\nwant\n%s", got, want)
	}
}

func TestReportThatSaysNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r.json")
	for name, text := range map[string]string{
		"no JSON": "x", "no test": "[]", "suite broken": `[{"SpecReports": [{"LeafNodeType": "SynchronizedBeforeSuite", "State": "failed"}]}]`,
	} {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := new(results).read(path); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	if err := new(results).read(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("no file: accepted")
	}
}
