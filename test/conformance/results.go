package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"
)

// outcome of one test.
type outcome struct {
	State   string // "passed", "FAILED" or "not run"
	Date    string // of the run, 2006-01-02; empty if it was not run
	Message string // of a failure, one line
	took    time.Duration
}

const (
	passed = "passed"
	failed = "FAILED"
	notRun = "not run"
)

// results are outcomes by the tests' names.
type results struct {
	tests map[string]outcome
}

// spec is what is read of ginkgo's report (types.SpecReport).
type spec struct {
	ContainerHierarchyTexts []string
	LeafNodeType            string
	LeafNodeText            string
	State                   string
	RunTime                 time.Duration
	Failure                 struct{ Message string }
}

func (s *spec) name() string {
	return strings.Join(append(slices.Clone(s.ContainerHierarchyTexts), s.LeafNodeText), " ")
}

// read adds a report of ginkgo. A test that an earlier one ran and this one skipped keeps its outcome.
func (r *results) read(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var suites []struct{ SpecReports []spec }
	if err := json.Unmarshal(b, &suites); err != nil {
		return fmt.Errorf("report %s: %w", path, err)
	}
	if r.tests == nil {
		r.tests = map[string]outcome{}
	}
	for _, suite := range suites {
		for _, s := range suite.SpecReports {
			name := s.name()
			if s.LeafNodeType != "It" {
				if s.State != "passed" && s.State != "skipped" { // the suite itself could not begin or end
					return fmt.Errorf("report %s: %s %s: %s", path, s.LeafNodeType, s.State, firstLine(s.Failure.Message))
				}
				continue
			}
			if !strings.Contains(name, "[Conformance]") {
				continue
			}
			switch s.State {
			case "passed":
				r.tests[name] = outcome{State: passed, took: s.RunTime}
			case "skipped", "pending":
				// Also one that looks at the cluster and then skips itself: that it does not pass.
				if _, ok := r.tests[name]; !ok {
					r.tests[name] = outcome{State: notRun}
				}
			default:
				r.tests[name] = outcome{State: failed, Message: firstLine(s.Failure.Message), took: s.RunTime}
			}
		}
	}
	if len(r.tests) == 0 {
		return fmt.Errorf("report %s: it has no conformance test", path)
	}
	return nil
}

var odd = regexp.MustCompile(`[\x00-\x20` + "`" + `|]+`)

func firstLine(s string) string {
	s = strings.TrimSpace(odd.ReplaceAllString(s, " "))
	if len(s) > 240 {
		s = strings.ToValidUTF8(s[:240], "") + "..."
	}
	return s
}

// good: something ran, and nothing failed.
func (r *results) good() bool {
	ran := 0
	for _, o := range r.tests {
		if o.State == failed {
			return false
		}
		if o.State == passed {
			ran++
		}
	}
	return ran > 0
}

var sigName = regexp.MustCompile(`^\[(sig-[a-z-]+)\]`)

func sigOf(test string) string {
	if m := sigName.FindStringSubmatch(test); m != nil {
		return m[1]
	}
	return "other"
}

// bySig groups the names, sorted.
func (r *results) bySig() (sigs []string, tests map[string][]string) {
	tests = map[string][]string{}
	for _, name := range slices.Sorted(maps.Keys(r.tests)) {
		tests[sigOf(name)] = append(tests[sigOf(name)], name)
	}
	sigs = slices.SortedFunc(maps.Keys(tests), func(a, b string) int {
		return cmp.Or(len(tests[b])-len(tests[a]), strings.Compare(a, b))
	})
	return sigs, tests
}

func (r *results) count(names []string, state string) (n int) {
	for _, t := range names {
		if r.tests[t].State == state {
			n++
		}
	}
	return n
}

// rows are the table by SIG, with the sums.
func (r *results) rows() (out [][]any) {
	sigs, tests := r.bySig()
	var all []string
	row := func(title string, names []string) []any {
		return []any{title, r.count(names, passed), r.count(names, failed), r.count(names, notRun), len(names)}
	}
	for _, s := range sigs {
		out = append(out, row(s, tests[s]))
		all = append(all, tests[s]...)
	}
	return append(out, row("all", all))
}

// table is for the terminal: failures first, then the counts.
func (r *results) table() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(r.tests)) {
		if o := r.tests[name]; o.State == failed {
			fmt.Fprintf(&b, "FAILED %s (%s)\n       %s\n", name, o.took.Round(time.Second), o.Message)
		}
	}
	fmt.Fprintf(&b, "%-22s %7s %7s %8s %6s\n", "", passed, "failed", notRun, "tests")
	for _, x := range r.rows() {
		fmt.Fprintf(&b, "%-22s %7d %7d %8d %6d\n", x...)
	}
	return b.String()
}

// record brings a run into the document, which keeps the last outcome of each test.
func record(path string, run *results, now time.Time) error {
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	all := parse(b)
	for name, o := range run.tests {
		if o.State != notRun {
			o.Date = now.UTC().Format(time.DateOnly)
		} else if _, ok := all.tests[name]; ok {
			continue
		}
		all.tests[name] = o
	}
	for name := range all.tests {
		if _, ok := run.tests[name]; !ok {
			delete(all.tests, name) // the suite has it no more
		}
	}
	return os.WriteFile(path, all.document(), 0o644)
}

var line = regexp.MustCompile(`^- (passed|FAILED|not run)(?: (\d{4}-\d\d-\d\d))? (\[sig-.*\[Conformance\])(?:: (.*))?$`)

// parse reads what document wrote.
func parse(doc []byte) *results {
	r := &results{tests: map[string]outcome{}}
	for l := range bytes.Lines(doc) {
		if m := line.FindStringSubmatch(strings.TrimRight(string(l), "\n")); m != nil {
			r.tests[m[3]] = outcome{State: m[1], Date: m[2], Message: m[4]}
		}
	}
	return r
}

const preface = `# Conformance

The upstream Kubernetes v1.36.3 conformance suite, unmodified, against a Skein cluster of three nodes in namespaces of one machine. ` + "`make conformance`" + `
builds it, runs it and writes this page; ` + "`make conformance FOCUS='\\[sig-auth\\]'`" + ` runs the tests whose names match and leaves the other lines. Each line
says what became of a test when it was run last.

`

func (r *results) document() []byte {
	var b bytes.Buffer
	b.WriteString(preface)
	rows := r.rows()
	fmt.Fprintf(&b, "**%d passed of %d.**\n\n| | passed | failed | not run | tests |\n|---|---|---|---|---|\n", rows[len(rows)-1][1], rows[len(rows)-1][4])
	for _, x := range rows {
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d |\n", x...)
	}
	sigs, tests := r.bySig()
	for _, s := range sigs {
		fmt.Fprintf(&b, "\n## %s\n\n", s)
		for _, state := range []string{failed, notRun, passed} {
			for _, name := range tests[s] {
				o := r.tests[name]
				if o.State != state {
					continue
				}
				fmt.Fprintf(&b, "- %s", o.State)
				if o.Date != "" {
					fmt.Fprintf(&b, " %s", o.Date)
				}
				fmt.Fprintf(&b, " %s", name)
				if o.Message != "" {
					fmt.Fprintf(&b, ": %s", o.Message)
				}
				b.WriteByte('\n')
			}
		}
	}
	return b.Bytes()
}
