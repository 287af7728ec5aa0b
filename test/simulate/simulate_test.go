package simulate

import (
	"fmt"
	"io"
	"maps"
	"os"
	"runtime"
	"strconv"
	"testing"
	"testing/synctest"
	"time"
)

// result is what became of a scenario.
type result struct {
	violations []string
	report     string
}

// play runs a scenario: populate, torment, converge, rest.
// It ends early when noticed says that what is found so far is enough.
func play(t *testing.T, seed uint64, sc scenario, f fault, logs io.Writer, noticed func([]string) bool) (res result) {
	t.Helper()
	synctest.Test(t, func(*testing.T) {
		w := newWorld(seed, logs)
		w.fault, w.enough = f, func() bool { return noticed != nil && noticed(w.inv.found()) }
		defer w.stop()
		start := time.Now()
		u := newUser(w, sc)
		w.elect(0)
		u.populate()
		at := w.await30(10*time.Minute, &res, "after the start")
		born := time.Since(start)
		if at && !w.enough() {
			u.torment()
			healed := time.Now()
			if !w.enough() && w.await30(40*time.Minute, &res, "after the troubles") {
				res.report = fmt.Sprintf("populated in %v, converged %v after the last trouble", born.Round(time.Second), time.Since(healed).Round(time.Second))
				w.idle(&res)
			}
		}
		res.violations = append(res.violations, w.inv.found()...)
		writes := 0
		w.s.mu.Lock()
		for _, n := range w.s.writes {
			writes += n
		}
		w.s.mu.Unlock()
		res.report += fmt.Sprintf("\n%d nodes, %d pods and more made; %v virtual, %d writes, %d terms, the slowest end of a leadership %v\ntroubles %v\nchecks %v\nwrites without effect %v",
			len(u.nodes), w.s.writes["create pods"], time.Since(start).Round(time.Second), writes, w.term, w.slow, u.did, w.inv.checks, w.s.noops)
	})
	return res
}

// await30 waits until nothing is unfinished for half a minute; false, with what is, after limit.
func (w *world) await30(limit time.Duration, res *result, when string) bool {
	calm := 0
	for end := time.Now().Add(limit); ; time.Sleep(5 * time.Second) {
		if w.enough() {
			return false
		}
		left := w.unfinished()
		if len(left) == 0 {
			if calm++; calm > 6 {
				return true
			}
			continue
		}
		calm = 0
		if time.Now().After(end) {
			for _, l := range left {
				res.violations = append(res.violations, fmt.Sprintf("%s, not converged in %v: %s", when, limit, l))
			}
			return false
		}
	}
}

// idle lets ten minutes pass in which nothing happens, and wants no write at all.
func (w *world) idle(res *result) {
	time.Sleep(10 * time.Minute) // what is due within a fixed time is done
	w.s.mu.Lock()
	before := maps.Clone(w.s.writes)
	w.s.mu.Unlock()
	time.Sleep(10 * time.Minute)
	w.s.mu.Lock()
	defer w.s.mu.Unlock()
	for what, n := range w.s.writes {
		if n -= before[what]; n > 0 {
			res.violations = append(res.violations, fmt.Sprintf("10 idle minutes made %d times %s", n, what))
		}
	}
}

func seeds(t *testing.T, n int) []uint64 {
	if s := os.Getenv("SKEIN_SEED"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return []uint64{seed}
	}
	var out []uint64
	for i := range n {
		out = append(out, uint64(i+1))
	}
	return out
}

func logs() io.Writer {
	if os.Getenv("SKEIN_LOG") != "" {
		return os.Stderr
	}
	return nil
}

func env(name string, def int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil {
		return n
	}
	return def
}

func run(t *testing.T, seed uint64, sc scenario) {
	t.Helper()
	start := time.Now()
	res := play(t, seed, sc, fault{}, logs(), nil)
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	t.Logf("seed %d (%v, %d MB): %s", seed, time.Since(start).Round(time.Millisecond), m.Sys>>20, res.report)
	for _, v := range res.violations {
		t.Errorf("seed %d: %s", seed, v)
	}
}

// TestSimulated is a slice of the large one: several small clusters in a hurry, and one that is not so small.
func TestSimulated(t *testing.T) {
	if s := os.Getenv("SKEIN_SEED"); s != "" || os.Getenv("SKEIN_NODES") != "" {
		for _, seed := range seeds(t, env("SKEIN_SEEDS", 1)) {
			run(t, seed, scenario{nodes: env("SKEIN_NODES", 100), pods: env("SKEIN_PODS", 2000), chaos: time.Duration(env("SKEIN_SECONDS", 600)) * time.Second, every: time.Duration(env("SKEIN_EVERY", 3000)) * time.Millisecond})
		}
		return
	}
	for _, seed := range []uint64{1, 2} {
		run(t, seed, scenario{nodes: 9, pods: 90, chaos: 90 * time.Second, every: time.Second})
	}
	run(t, 3, scenario{nodes: 100, pods: 2000, chaos: time.Minute, every: 2 * time.Second})
}
