package diffapi

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
)

// acceptance is an entry of the list of accepted differences.
type acceptance struct {
	reason string
	line   int
	cases  *regexp.Regexp
	rules  []*rule
}

// rule accepts lines of a difference: those of upstream (-) or of Skein (+) that match.
type rule struct {
	sign  byte
	match *regexp.Regexp
	line  int
	used  bool
}

// loadAccepted reads the list: "## reason", "case REGEXP", then "- REGEXP" and "+ REGEXP" lines. An expression must match the whole line.
func loadAccepted(file string) ([]*acceptance, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	return parseAccepted(string(b))
}

func parseAccepted(text string) ([]*acceptance, error) {
	var out []*acceptance
	var errs []error
	var reason []string
	for i, l := range strings.Split(text, "\n") {
		bad := func(format string, args ...any) {
			errs = append(errs, fmt.Errorf("accepted differences, line %d: %s", i+1, fmt.Sprintf(format, args...)))
		}
		compile := func(s string) *regexp.Regexp {
			re, err := regexp.Compile("^(?:" + s + ")$")
			if err != nil {
				bad("%v", err)
			}
			return re
		}
		switch {
		case l == "":
			reason = nil
		case strings.HasPrefix(l, "## "):
			reason = append(reason, l[3:])
		case strings.HasPrefix(l, "case "):
			if len(reason) == 0 {
				bad("no reason is given")
			}
			out = append(out, &acceptance{reason: strings.Join(reason, " "), line: i + 1, cases: compile(l[5:])})
		case strings.HasPrefix(l, "- "), strings.HasPrefix(l, "+ "):
			if len(out) == 0 {
				bad("a rule before the first case")
				continue
			}
			a := out[len(out)-1]
			a.rules = append(a.rules, &rule{sign: l[0], match: compile(l[2:]), line: i + 1})
		default:
			bad("%q", l)
		}
	}
	return out, errors.Join(errs...)
}

// unexplained gives the lines of the difference between two outputs that nothing accepts, and marks the rules that were used.
func unexplained(id, upstream, skein string, list []*acceptance) (lines []string, accepted int) {
	for _, l := range diff(strings.Split(upstream, "\n"), strings.Split(skein, "\n")) {
		ok := false
		for _, a := range list {
			if !a.cases.MatchString(id) {
				continue
			}
			for _, r := range a.rules {
				if r.sign == l[0] && r.match.MatchString(l[2:]) {
					r.used, ok = true, true
				}
			}
		}
		if ok {
			accepted++
			continue
		}
		lines = append(lines, l)
	}
	return lines, accepted
}

// unused reports rules that matched nothing among the cases that ran.
func unused(list []*acceptance) error {
	var errs []error
	for _, a := range list {
		for _, r := range a.rules {
			if !r.used {
				errs = append(errs, fmt.Errorf("accepted differences, line %d: %c %s: nothing differs like this any more (%s)", r.line, r.sign, r.match, a.reason))
			}
		}
	}
	return errors.Join(errs...)
}

// diff gives the lines that only one of two texts has, "- " those of a and "+ " those of b, by their longest common subsequence.
func diff(a, b []string) (out []string) {
	for len(a) > 0 && len(b) > 0 && a[0] == b[0] {
		a, b = a[1:], b[1:]
	}
	for len(a) > 0 && len(b) > 0 && a[len(a)-1] == b[len(b)-1] {
		a, b = a[:len(a)-1], b[:len(b)-1]
	}
	common := make([][]int32, len(a)+1)
	for i := range common {
		common[i] = make([]int32, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			i, j = i+1, j+1
		case j == len(b) || i < len(a) && common[i+1][j] >= common[i][j+1]:
			out = append(out, "- "+a[i])
			i++
		default:
			out = append(out, "+ "+b[j])
			j++
		}
	}
	return out
}
