package e2e

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"testing"
	"time"
)

var joinLine = regexp.MustCompile(`skein join (\S+) --token (\S+)`)

// form makes the cluster: n1 founds it, n2 joins through n1, n3 through n2, n4 (which may not vote) through n3, n5 through n4, which
// holds no replica. Three voters appear by themselves.
func (w *world) form(t *testing.T) {
	w.start(t, "n1", "")
	took := eventually(t, 30*time.Second, "the first node prints its join line", func() error {
		var err error
		w.token, err = w.joinToken("n1")
		return err
	})
	t.Logf("one node Ready after %s", took)
	w.fetchAdmin(t, "n1")
	must(t, w.nodeReady("n1", "n1", true))
	w.loadImages(t, "n1")

	began := time.Now()
	for _, j := range []struct{ node, via string }{{"n2", "n1"}, {"n3", "n2"}} {
		w.start(t, j.node, j.via)
		took := w.awaitReady(t, j.node, j.via, 30*time.Second)
		t.Logf("%s joined through %s and is Ready after %s", j.node, j.via, took)
	}
	eventually(t, 30*time.Second, "three voters", func() error {
		v, err := w.voters("n1")
		if err == nil && !slices.Equal(v, []string{"n1", "n2", "n3"}) {
			err = fmt.Errorf("voters are %v", v)
		}
		return err
	})
	t.Logf("three voters %s after the second node started", time.Since(began))

	w.start(t, "n4", "n3", "--voter=never")
	t.Logf("n4 joined through n3 and is Ready after %s", w.awaitReady(t, "n4", "n4", 30*time.Second))
	if out := w.do(t, "n4", "members"); !regexp.MustCompile(`(?m)^n4 \(here\) .* alive .* none `).MatchString(out) {
		t.Errorf("n4 should hold no replica:\n%s", out)
	}
	refused(t, errOf(w.cli("n4", "kubeconfig")), "n4 holds no replica", "n1")
	conf := w.do(t, "n1", "kubeconfig", "--server", "https://"+w.node("n4").IP().String()+":6443")
	must(t, os.WriteFile(w.kubeconfig("n4"), []byte(conf), 0o600))
	w.start(t, "n5", "n4")
	t.Logf("n5 joined through n4 and is Ready after %s", w.awaitReady(t, "n5", "n4", 30*time.Second))
	for _, n := range []string{"n2", "n3", "n4", "n5"} {
		w.loadImages(t, n)
	}
	if v, err := w.voters("n1"); err != nil || !slices.Equal(v, []string{"n1", "n2", "n3"}) {
		t.Errorf("voters are %v, %v", v, err)
	}
}

// joinToken is the token in the join line that a node has printed.
func (w *world) joinToken(node string) (string, error) {
	log, err := os.ReadFile(w.node(node).LogFile())
	if err != nil {
		return "", err
	}
	m := joinLine.FindSubmatch(log)
	if m == nil {
		return "", fmt.Errorf("no join line in %q", log)
	}
	if string(m[1]) != w.node(node).IP().String() {
		return "", fmt.Errorf("join line names %s", m[1])
	}
	return string(m[2]), nil
}

func errOf[T any](_ T, err error) error { return err }
