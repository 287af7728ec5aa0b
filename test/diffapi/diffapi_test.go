//go:build diffapi

package diffapi

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"
)

// areas gives those whose name matches AREA.
func areas(t *testing.T) []*Area {
	t.Helper()
	all, err := loadAreas("cases")
	must(t, err)
	want, err := regexp.Compile(os.Getenv("AREA"))
	must(t, err)
	var out []*Area
	for _, a := range all {
		if want.MatchString(a.Name) {
			out = append(out, a)
		}
	}
	return out
}

// TestSameAsUpstream runs all cases against both servers and keeps upstream's answers.
func TestSameAsUpstream(t *testing.T) {
	accepted, err := loadAccepted("accepted.txt")
	must(t, err)
	p, err := newPKI(t.TempDir())
	must(t, err)
	upstream, skein := startUpstream(t, p), startSkein(t, p)
	s := summary{accepted: accepted}
	for _, a := range areas(t) {
		var outputs [2][]string
		var errs [2]error
		var wg sync.WaitGroup
		began := time.Now()
		for i, tg := range []*target{upstream, skein} {
			wg.Go(func() { outputs[i], errs[i] = tg.run(t.Context(), a) })
		}
		wg.Wait()
		for _, err := range errs {
			must(t, err)
		}
		must(t, writeGolden(a, outputs[0]))
		for i, c := range a.Cases {
			if !c.Setup {
				s.compare(t, a, c, outputs[0][i], outputs[1][i])
			}
		}
		t.Logf("%-20s %3d cases in %s", a.Name, len(a.Cases), time.Since(began).Round(100*time.Millisecond))
	}
	s.report(t)
}

// TestSameAsRecorded compares Skein with the kept answers of upstream.
func TestSameAsRecorded(t *testing.T) {
	accepted, err := loadAccepted("accepted.txt")
	must(t, err)
	p, err := newPKI(t.TempDir())
	must(t, err)
	skein := startSkein(t, p)
	s := summary{accepted: accepted}
	for _, a := range areas(t) {
		began := time.Now()
		outputs, err := skein.run(t.Context(), a)
		must(t, err)
		want, err := readGolden(a.Name)
		must(t, err)
		for i, c := range a.Cases {
			if c.Setup {
				continue
			}
			kept, ok := want[c.ID]
			if !ok {
				t.Errorf("%s has no kept answer: run make diff-api", c.ID)
				continue
			}
			got := outputs[i]
			if c.Digest {
				got = digestOf(got)
			}
			s.compare(t, a, c, kept, got)
		}
		t.Logf("%-20s %3d cases in %s", a.Name, len(a.Cases), time.Since(began).Round(100*time.Millisecond))
	}
	s.report(t)
}

// summary counts.
type summary struct {
	accepted               []*acceptance
	cases, same, explained int
	different              []string
}

func (s *summary) compare(t *testing.T, a *Area, c *Case, upstream, skein string) {
	s.cases++
	if upstream == skein {
		s.same++
		return
	}
	lines, _ := unexplained(c.ID, upstream, skein, s.accepted)
	if len(lines) == 0 {
		s.explained++
		return
	}
	s.different = append(s.different, c.ID)
	for i, l := range lines {
		lines[i] = l[:min(len(l), 300)]
	}
	const most = 40
	more := ""
	if len(lines) > most {
		lines, more = lines[:most], fmt.Sprintf("\n... and %d lines more", len(lines)-most)
	}
	t.Errorf("cases/%s.txt:%d: %s (- upstream, + Skein)\n%s%s", a.Name, c.Line, c.ID, strings.Join(lines, "\n"), more)
}

func (s *summary) report(t *testing.T) {
	fmt.Printf("%d cases: %d with the same answer, %d with accepted differences, %d different\n", s.cases, s.same, s.explained, len(s.different))
	if os.Getenv("AREA") == "" {
		if err := unused(s.accepted); err != nil {
			t.Error(err)
		}
	}
}
