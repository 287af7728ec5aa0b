package health

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestVerdictStrings(t *testing.T) {
	for v, want := range map[Verdict]string{Unknown: "unknown", Alive: "alive", Suspect: "suspect", Dead: "dead", Left: "left", 9: "verdict(9)"} {
		if v.String() != want {
			t.Errorf("%d is called %q, want %q", v, v, want)
		}
	}
	for v, want := range map[Verdict]bool{Unknown: true, Alive: true, Suspect: true, Dead: false, Left: false} {
		if v.Usable() != want {
			t.Errorf("%s usable: %t, want %t", v, v.Usable(), want)
		}
	}
}

// verdicts reads "a+ b? c- d< e." : alive, suspect, dead, left, unknown.
func verdicts(s string) map[string]Verdict {
	m := map[string]Verdict{}
	for _, w := range strings.Fields(s) {
		m[w[:1]] = map[byte]Verdict{'+': Alive, '?': Suspect, '-': Dead, '<': Left, '.': Unknown}[w[1]]
	}
	return m
}

func TestDecide(t *testing.T) {
	for _, c := range []struct {
		name, view, self string
		fraction         float64
		dropped          string
		panics           bool
		dead, total      int
	}{
		{"alone", "a+", "a", 0, "", false, 0, 1},
		{"nothing known", "", "a", 0, "", false, 0, 0},
		{"one of three dead", "a+ b+ c-", "a", 0, "c", false, 1, 3},
		{"one of two dead: exactly half", "a+ b-", "a", 0, "b", false, 1, 2},
		{"two of three dead: isolated", "a+ b- c-", "a", 0, "", true, 2, 3},
		{"two of four dead", "a+ b+ c- d-", "a", 0, "c d", false, 2, 4},
		{"suspects stay", "a+ b? c?", "a", 0, "", false, 0, 3},
		{"suspects count as nodes", "a+ b? c-", "a", 0, "c", false, 1, 3},
		{"the left go and do not count", "a+ b- c< d<", "a", 0, "b c d", false, 1, 2},
		{"the left go even in a panic", "a+ b- c- d<", "a", 0, "d", true, 2, 3},
		{"unknown stay and do not count", "a+ b- c. d. e.", "a", 0, "b", false, 1, 2},
		{"self is alive whatever is said", "a- b+ c+", "a", 0, "", false, 0, 3},
		{"self never left", "a< b+", "a", 0, "", false, 0, 2},
		{"own threshold", "a+ b- c- d-", "a", 0.75, "b c d", false, 3, 4},
		{"strict threshold", "a+ b+ c+ d-", "a", 0.2, "", true, 1, 4},
		{"no threshold", "a+ b- c- d-", "a", 1, "b c d", false, 3, 4},
		{"no threshold, all dead", "b- c- d-", "", 1, "b c d", false, 3, 3},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := PanicThreshold{MaxDeadFraction: c.fraction}.Decide(c.self, verdicts(c.view))
			if got := strings.Join(d.Dropped(), " "); got != c.dropped || d.Panic != c.panics || d.Dead != c.dead || d.Total != c.total {
				t.Errorf("drops %q panic %t (%d/%d), want %q %t (%d/%d)", got, d.Panic, d.Dead, d.Total, c.dropped, c.panics, c.dead, c.total)
			}
			if s := d.String(); !strings.Contains(s, fmt.Sprintf("%d of %d nodes", c.dead, c.total)) || strings.Contains(s, "panic") != c.panics {
				t.Errorf("explained as %q", s)
			}
		})
	}
}

func TestKeep(t *testing.T) {
	d := PanicThreshold{}.Decide("a", verdicts("a+ b+ c+ e+ f+ x- y- l<"))
	panicking := PanicThreshold{}.Decide("a", verdicts("a+ x- y- l<"))
	for _, c := range []struct {
		name, nodes, keep string
		d                 Decision
	}{
		{"all well", "a b c", "111", d},
		{"no endpoints", "", "", d},
		{"dead one goes", "a x b", "101", d},
		{"left one goes", "a l", "10", d},
		{"only dead ones: all stay", "x y x", "111", d},
		{"only left ones: all go", "l l", "00", d},
		{"dead and left: the dead stay", "x l", "10", d},
		{"unheard of stays", "x q", "01", d},
		{"outside the nodes stays", "x _", "01", d},
		{"panic keeps the dead", "a x y", "111", panicking},
		{"panic does not keep the left", "a x l", "110", panicking},
	} {
		t.Run(c.name, func(t *testing.T) {
			nodes := strings.Fields(c.nodes)
			for i := range nodes {
				nodes[i] = strings.Trim(nodes[i], "_")
			}
			got := ""
			for _, k := range c.d.Keep(nodes) {
				got += map[bool]string{true: "1", false: "0"}[k]
			}
			if got != c.keep {
				t.Errorf("keep %q, want %q", got, c.keep)
			}
		})
	}
	if keep := (Decision{}).Keep([]string{"a"}); !keep[0] {
		t.Error("the zero decision drops something")
	}
}

func TestValidate(t *testing.T) {
	for _, f := range []float64{0, 0.5, 1} {
		if err := (PanicThreshold{f}).Validate(); err != nil {
			t.Errorf("%v: %v", f, err)
		}
	}
	for _, f := range []float64{-0.1, 1.1, math.NaN(), math.Inf(1)} {
		if err := (PanicThreshold{f}).Validate(); err == nil {
			t.Errorf("%v was accepted", f)
		}
	}
}

// The promises that the datapath rests on, over random clusters and Services.
func TestPromises(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	panics := 0
	for round := range 20000 {
		view, names := map[string]Verdict{}, []string{""}
		for n := range rng.IntN(12) {
			name := fmt.Sprintf("n%d", n)
			names = append(names, name)
			if v := Verdict(rng.IntN(5)); v != Unknown || rng.IntN(2) == 0 {
				view[name] = v
			}
		}
		self := names[rng.IntN(len(names))]
		p := PanicThreshold{MaxDeadFraction: float64(rng.IntN(11)) / 10}
		d := p.Decide(self, view)
		fail := func(format string, args ...any) {
			t.Fatalf("seed %d round %d self %q view %v policy %v decision %v: %s", seed, round, self, view, p, d, fmt.Sprintf(format, args...))
		}
		if d.Panic {
			panics++
		}
		for _, name := range names {
			v := view[name]
			if d.Drops(name) && (name == self || v.Usable()) {
				fail("%q (%s) is dropped", name, v)
			}
			if v == Left && name != self && !d.Drops(name) {
				fail("%q left and is kept", name)
			}
			if v == Dead && name != self && d.Drops(name) == d.Panic {
				fail("%q is dead; dropped %t", name, d.Drops(name))
			}
		}
		var endpoints []string
		for range rng.IntN(6) {
			endpoints = append(endpoints, names[rng.IntN(len(names))])
		}
		keep := d.Keep(endpoints)
		gone := slices.IndexFunc(keep, func(k bool) bool { return k }) < 0
		for i, node := range endpoints {
			left := view[node] == Left && node != self
			switch {
			case left && keep[i]:
				fail("endpoint %d of %q stays on a node that left", i, endpoints)
			case !left && gone:
				fail("all of %q go, and %q did not leave", endpoints, node)
			case !left && !keep[i] && (view[node] != Dead || node == self || d.Panic):
				fail("endpoint %d of %q goes", i, endpoints)
			}
		}
	}
	if panics == 0 || panics == 20000 {
		t.Errorf("seed %d: %d of 20000 rounds were panics: the test does not see both sides", seed, panics)
	}
}

// A node that comes back must never make another node's endpoints go, other than by ending a panic.
func TestMoreLifeNeverDropsMore(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 2))
	for round := range 5000 {
		view := map[string]Verdict{}
		for n := range 1 + rng.IntN(10) {
			view[fmt.Sprintf("n%d", n)] = []Verdict{Alive, Suspect, Dead}[rng.IntN(3)]
		}
		before := PanicThreshold{}.Decide("n0", view)
		for name, v := range view {
			if v != Dead {
				continue
			}
			view[name] = Alive
			after := PanicThreshold{}.Decide("n0", view)
			view[name] = Dead
			if after.Panic && !before.Panic {
				t.Fatalf("seed %d round %d: %s came back and caused a panic: %v -> %v", seed, round, name, before, after)
			}
			for _, dropped := range after.Dropped() {
				if !before.Panic && !before.Drops(dropped) {
					t.Fatalf("seed %d round %d: %s came back and %s was dropped", seed, round, name, dropped)
				}
			}
		}
	}
}
