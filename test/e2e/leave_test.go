package e2e

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// leave takes the leader out of the cluster: the spare gets its vote, its Node object and its state go, its pods run elsewhere. Then a
// voter that cannot be spared is refused. The one that left joins again.
func (w *world) leave(t *testing.T) {
	leaver := get(w.leader("n1"))(t)
	rest := w.others(leaver)
	asks := rest[0]
	probers := w.probeAll(t, webURL, rest...)
	began := time.Now()
	w.do(t, leaver, "leave")
	ctx, cancel := timeout(60 * time.Second)
	defer cancel()
	must(t, w.node(leaver).Wait(ctx))
	w.hangUp(leaver)
	t.Logf("the leader %s left within %s", leaver, time.Since(began))
	for _, f := range []string{"identity", "raft", "gossip", "desired.db", "pods"} {
		if exists(filepath.Join(w.node(leaver).StateDir(), f)) {
			t.Errorf("%s is left on the node that left", f)
		}
	}
	if n := w.processes(t, leaver, "app"); len(n) > 0 {
		t.Errorf("pods run on there: processes %v", n)
	}
	eventually(t, 20*time.Second, "its Node object goes", func() error { return w.gone(asks, leaver) })
	eventually(t, 30*time.Second, "three voters without it", func() error {
		v, err := w.voters(asks)
		if err == nil && (len(v) != 3 || slices.Contains(v, leaver) || slices.Contains(v, "n4")) {
			err = fmt.Errorf("voters are %v", v)
		}
		return err
	})
	_, took := w.awaitPods(t, asks, "app=web", 6, 60*time.Second)
	t.Logf("6 pods Ready %s after that", took)
	if h := healAll(t, probers, began, healLimit+took); h > 0 {
		t.Logf("requests failed for %s", h)
	}

	t.Run("refused when unsafe", func(t *testing.T) {
		voters := get(w.voters(asks))(t)
		leader := get(w.leader(asks))(t)
		var down, stays string
		for _, v := range voters {
			switch {
			case v == leader:
			case down == "":
				down = v
			default:
				stays = v
			}
		}
		must(t, w.node(down).KillDaemon(background))
		w.hangUp(down)
		eventually(t, 20*time.Second, down+" is known to be dead", func() error {
			out, err := w.cli(stays, "members")
			if err == nil && !strings.Contains(out, " dead ") {
				err = fmt.Errorf("%s", out)
			}
			return err
		})
		t.Log(refused(t, errOf(w.cli(stays, "leave")), "cannot leave"))
		if !w.node(stays).Running() || !exists(filepath.Join(w.node(stays).StateDir(), "identity")) {
			t.Errorf("a refused leave did something")
		}
		w.powerOn(t, down, leader)
	})
	w.start(t, leaver, "n4")
	t.Logf("%s joined again and is Ready after %s", leaver, w.awaitReady(t, leaver, "n4", 30*time.Second))
}
