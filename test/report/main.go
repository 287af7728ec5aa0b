// Command report reads the output of "go test -json" and writes what a person wants of it: a line for each package, the whole
// output of each test that failed, and the counts. It ends with 1 if a test or a package failed, or if no test ran at all.
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
)

// event is one line of test2json (cmd/test2json of Go).
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build output
	Test        string
	Output      string
	Elapsed     float64
	FailedBuild string
}

type counts struct {
	passed, failed, skipped, packages int
	failedPackages                    []string
}

func main() {
	failed := flag.String("failed", "", "write the packages that failed to this `file`, one a line")
	flag.Parse()
	c, err := report(os.Stdin, os.Stdout)
	if err == nil && *failed != "" {
		err = os.WriteFile(*failed, []byte(strings.Join(append(c.failedPackages, ""), "\n")), 0o644)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "report:", err)
		os.Exit(1)
	}
	fmt.Printf("\n%d passed, %d failed, %d skipped\n", c.passed, c.failed, c.skipped)
	if c.failed > 0 || c.passed == 0 {
		os.Exit(1)
	}
}

func report(in io.Reader, out io.Writer) (c counts, err error) {
	type key struct{ pkg, test string }
	output := map[key][]string{}
	failedIn := map[string]int{} // tests that failed, by package
	sc := bufio.NewScanner(in)
	sc.Buffer(make([]byte, 1<<20), 64<<20)
	for sc.Scan() {
		var e event
		if json.Unmarshal(sc.Bytes(), &e) != nil {
			fmt.Fprintln(out, sc.Text()) // not of the tests: the go command itself speaks
			continue
		}
		k := key{e.Package, e.Test}
		switch e.Action {
		case "output", "build-output":
			if e.Action == "build-output" {
				k = key{e.ImportPath, ""}
			}
			output[k] = append(output[k], e.Output)
		case "pass", "fail", "skip":
			if e.Test == "" {
				c.packages++
				if e.Action == "fail" {
					c.failedPackages = append(c.failedPackages, e.Package)
					if failedIn[e.Package] == 0 {
						c.failed++ // the package itself: it does not build, panicked or ran out of time
					}
					fmt.Fprintf(out, "FAIL %s (%.1f s)\n%s%s", e.Package, e.Elapsed, strings.Join(output[key{e.FailedBuild, ""}], ""), strings.Join(output[k], ""))
				} else if e.Action == "pass" {
					fmt.Fprintf(out, "ok   %s (%.1f s)\n", e.Package, e.Elapsed)
				}
				delete(output, k)
				continue
			}
			switch e.Action {
			case "pass":
				c.passed++
			case "skip":
				c.skipped++
				fmt.Fprintf(out, "skip %s %s\n%s", e.Package, e.Test, strings.Join(output[k], ""))
			case "fail":
				c.failed++
				failedIn[e.Package]++
				fmt.Fprintf(out, "FAIL %s %s (%.1f s)\n%s", e.Package, e.Test, e.Elapsed, strings.Join(output[k], ""))
			}
			delete(output, k)
		}
	}
	return c, sc.Err()
}
