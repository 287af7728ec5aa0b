package e2e

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// check is one command line and what has to come of it.
type check struct {
	run  string
	code int
	// want are regular expressions that the output has to match, with "!" in front: that it must not. Both streams count.
	want []string
	// wait: try again for a while, the cluster needs a moment.
	wait bool
}

func ok(run string, want ...string) check   { return check{run: run, want: want} }
func soon(run string, want ...string) check { return check{run: run, want: want, wait: true} }
func bad(code int, run string, want ...string) check {
	return check{run: run, code: code, want: want}
}

// soonWithin is how long a check of soon may take, attemptLimit how long one attempt of any.
const (
	soonWithin   = 30 * time.Second
	attemptLimit = 45 * time.Second
)

// session is where the checks of one section run: a directory with their files, and a namespace of its own.
type session struct {
	w    *world
	node string
	dir  string
	env  []string
}

// newSession makes one on a node, with more files than all have.
func (w *world) newSession(t testing.TB, node, namespace string, more map[string]string) *session {
	t.Helper()
	dir := filepath.Join(w.lab.Dir(), "kubectl-"+namespace)
	must(t, os.MkdirAll(dir, 0o755))
	raw := get(os.ReadFile(w.kubeconfig(node)))(t)
	must(t, os.WriteFile(filepath.Join(dir, "kubeconfig"), raw, 0o600))
	files := maps.Clone(kubectlFiles)
	maps.Copy(files, more)
	for name, content := range files {
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, []byte(content), 0o755))
	}
	s := &session{w: w, node: node, dir: dir, env: []string{
		"PATH=" + bin + ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + dir, "KUBECONFIG=" + filepath.Join(dir, "kubeconfig"),
		"NS=" + namespace, "DIR=" + dir, "KUBE_EDITOR=" + filepath.Join(dir, "editor"),
		"SERVER=https://" + w.node(node).IP().String() + ":6443",
	}}
	if out, code, err := s.try(`k config set-context --current --namespace="$NS" && k create namespace "$NS"`); err != nil || code != 0 {
		t.Fatalf("session %s: %v, %d: %s", namespace, err, code, out)
	}
	return s
}

// try runs a command line in the node, with k for kubectl.
func (s *session) try(line string) (out string, code int, err error) {
	ctx, cancel := timeout(attemptLimit)
	defer cancel()
	cmd, err := s.w.node(s.node).Command(ctx, "sh", "-c", `k() { kubectl "$@"; }; cd "$DIR"; `+line)
	if err != nil {
		return "", 0, err
	}
	cmd.Env = s.env
	cmd.WaitDelay = time.Second // what it has left in the background may hold its output
	b, err := cmd.CombinedOutput()
	if ctx.Err() == context.DeadlineExceeded {
		return string(b), -1, fmt.Errorf("not done within %s", attemptLimit)
	}
	if cmd.ProcessState == nil {
		return string(b), -1, err
	}
	return string(b), cmd.ProcessState.ExitCode(), nil
}

// verdict compares what came of a check with what was to come.
func (c check) verdict(out string, code int, err error) error {
	if err != nil {
		return err
	}
	if code != c.code {
		return fmt.Errorf("exit code %d, want %d", code, c.code)
	}
	for _, re := range c.want {
		pattern, not := strings.CutPrefix(re, "!")
		if regexp.MustCompile("(?m)"+pattern).MatchString(out) == not {
			return fmt.Errorf("output and %q", re)
		}
	}
	return nil
}

// run does the checks one after the other. Each stands for itself, so one that fails ends nothing.
func (s *session) run(t *testing.T, checks []check) {
	t.Helper()
	for _, c := range checks {
		began := time.Now()
		for {
			out, code, err := s.try(c.run)
			wrong := c.verdict(out, code, err)
			if wrong == nil {
				break
			}
			if !c.wait || time.Since(began) > soonWithin {
				t.Errorf("%s\n  %v:\n%s", c.run, wrong, indent(out))
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
		if d := time.Since(began); d > 3*time.Second {
			t.Logf("%s: %s", c.run, d.Round(100*time.Millisecond))
		}
	}
}

func indent(s string) string {
	if len(s) > 3000 {
		s = s[:3000] + "..."
	}
	return "    " + strings.ReplaceAll(strings.TrimRight(s, "\n"), "\n", "\n    ")
}

// kubectl runs upstream's kubectl through its commands, in sections side by side, on a node without a replica.
func (w *world) kubectl(t *testing.T, node string) {
	n := 0
	for name := range kubectlSections {
		n += len(kubectlSections[name])
	}
	if n < 150 {
		t.Errorf("only %d checks", n)
	}
	t.Logf("%d checks", n)
	for name, checks := range kubectlSections {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w.newSession(t, node, name, nil).run(t, checks)
		})
	}
}
