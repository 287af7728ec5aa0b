package diffapi

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Case is one command or request.
type Case struct {
	ID      string // area, command, and a number when that is not unique
	Line    int
	Kubectl []string // its arguments, or
	Method  string   // a raw request
	Path    string
	Header  http.Header
	Body    string
	Text    bool // kubectl prints a table or words

	Anonymous, Sort, Digest, Setup bool
	Until, Encode                  string
	Save                           map[string]string // path by name
	Only, Drop, Cut                *regexp.Regexp
}

// Area is one file of cases.
type Area struct {
	Name  string
	Cases []*Case
}

// loadAreas reads all files of a directory and reports every fault.
func loadAreas(dir string) ([]*Area, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.txt"))
	if err != nil {
		return nil, err
	}
	var areas []*Area
	var errs []error
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		// A number before the name says what comes first.
		name := strings.TrimLeft(strings.TrimSuffix(filepath.Base(f), ".txt"), "0123456789-")
		a, err := parseArea(name, string(b))
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f, err))
		}
		areas = append(areas, a)
	}
	return areas, errors.Join(errs...)
}

// parseArea reads one file.
func parseArea(name, text string) (*Area, error) {
	a := &Area{Name: name}
	seen := map[string]int{}
	var errs []error
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		switch l := lines[i]; {
		case l == "" || strings.HasPrefix(l, "#"):
		case strings.HasPrefix(l, "> "):
			end := i + 1
			for end < len(lines) && lines[end] != "" {
				end++
			}
			c, err := parseCase(lines[i:end])
			if err != nil {
				errs = append(errs, fmt.Errorf("line %d: %w", i+1, err))
				i = end
				continue
			}
			c.Line, c.ID = i+1, name+": "+strings.TrimPrefix(l, "> ")
			if seen[c.ID]++; seen[c.ID] > 1 {
				c.ID += fmt.Sprintf(" #%d", seen[c.ID])
			}
			a.Cases = append(a.Cases, c)
			i = end
		default:
			errs = append(errs, fmt.Errorf("line %d: %q is outside a case", i+1, l))
		}
	}
	return a, errors.Join(errs...)
}

var methods = []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW", "get"}

func parseCase(lines []string) (*Case, error) {
	c := &Case{Header: http.Header{}, Save: map[string]string{}}
	first, rest, _ := strings.Cut(strings.TrimPrefix(lines[0], "> "), " ")
	var err error
	switch {
	case first == "kubectl":
		if c.Kubectl, err = words(rest); err != nil {
			return nil, err
		}
		c.Text = !regexp.MustCompile(`-o ?=?(yaml|json\b)|--raw|jsonpath|create token`).MatchString(rest)
	case slices.Contains(methods, first):
		c.Method, c.Path = first, rest
	default:
		return nil, fmt.Errorf("%q is neither kubectl nor a method", first)
	}
	var body []string
	for _, l := range lines[1:] {
		if d, ok := strings.CutPrefix(l, "@ "); ok {
			if err := c.directive(d); err != nil {
				return nil, err
			}
			continue
		}
		if l == "." {
			l = ""
		}
		body = append(body, l)
	}
	c.Body = strings.Join(body, "\n") + c.Body
	return c, nil
}

var header = regexp.MustCompile(`^([A-Z][A-Za-z0-9-]*): ?(.*)$`)

func (c *Case) directive(d string) (err error) {
	if m := header.FindStringSubmatch(d); m != nil {
		c.Header.Add(m[1], m[2])
		return nil
	}
	name, arg, _ := strings.Cut(d, " ")
	switch name {
	case "anonymous":
		c.Anonymous = true
	case "sort":
		c.Sort = true
	case "digest":
		c.Digest = true
	case "setup":
		c.Setup = true
	case "until":
		c.Until = arg
	case "encode":
		c.Encode = arg
	case "only":
		c.Only, err = regexp.Compile(arg)
	case "drop":
		c.Drop, err = regexp.Compile(arg)
	case "cut":
		c.Cut, err = regexp.Compile(arg)
	case "save":
		key, path, _ := strings.Cut(arg, " ")
		c.Save[key] = path
	case "repeat":
		n, text, _ := strings.Cut(arg, " ")
		var times int
		times, err = strconv.Atoi(n)
		c.Body += strings.Repeat(text, max(times, 0))
	default:
		err = fmt.Errorf("unknown directive %q", d)
	}
	return err
}

// words splits a command line as a shell does: blanks, single and double quotes.
func words(s string) ([]string, error) {
	var out []string
	var word strings.Builder
	open, quote := false, rune(0)
	for _, r := range s {
		switch {
		case quote != 0 && r == quote:
			quote = 0
		case quote == 0 && (r == '\'' || r == '"'):
			quote, open = r, true
		case quote == 0 && r == ' ':
			if open {
				out = append(out, word.String())
			}
			word.Reset()
			open = false
		default:
			word.WriteRune(r)
			open = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("a quote is not closed in %q", s)
	}
	if open {
		out = append(out, word.String())
	}
	return out, nil
}
