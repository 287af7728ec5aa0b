package chaos

import (
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"skein.io/skein/test/store/chaos/history"
)

// storeBinary builds the process under test, once.
func storeBinary(t testing.TB) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("namespaces and disks of our own need root")
	}
	bin := filepath.Join(binDir, "skein-store")
	if _, err := os.Stat(bin); err == nil {
		return bin
	}
	args, cgo := []string{"build", "-tags", "grpcnotrace", "-o", bin}, "CGO_ENABLED=0"
	if os.Getenv("CHAOS_RACE") != "" { // a store that ends when it finds a data race
		args, cgo = append(args, "-race"), "CGO_ENABLED=1"
	}
	cmd := exec.Command("go", append(args, "skein.io/skein/test/store/cmd/skein-store")...)
	cmd.Env = append(os.Environ(), cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the store: %v\n%s", err, out)
	}
	return bin
}

var binDir string

func TestMain(m *testing.M) {
	var err error
	if binDir, err = os.MkdirTemp("", "skein-chaos"); err != nil {
		panic(err)
	}
	code := m.Run()
	_ = os.RemoveAll(binDir)
	os.Exit(code)
}

func envInt(name string, def int64) int64 {
	if v, err := strconv.ParseInt(os.Getenv(name), 10, 64); err == nil {
		return v
	}
	return def
}

// tryOne runs a scenario and fails on every violation.
func tryOne(t *testing.T, sc scenario, seed int64) {
	t.Helper()
	name := strings.SplitN(t.Name(), "/", 3)
	t.Logf("seed %d; again: CHAOS_SEED=%d go test -tags grpcnotrace -count=1 -run '^%s$/^%s$' ./test/store/chaos", seed, seed, name[0], name[1])
	v, err := run(t, storeBinary(t), sc, seed)
	if err != nil {
		t.Fatalf("seed %d: %v", seed, err) // see the end of the nodes' logs
	}
	t.Log(v)
	for _, x := range v.violations {
		t.Errorf("seed %d: %v", seed, x)
	}
}

// The slice that runs with all tests: schedules from fixed seeds, and one from a
// seed of today.
func TestSlice(t *testing.T) {
	t.Run("crash", func(t *testing.T) { tryOne(t, named("crash", 6*time.Second), envInt("CHAOS_SEED", 1)) })
	t.Run("power", func(t *testing.T) { tryOne(t, named("power", 6*time.Second), envInt("CHAOS_SEED", 2)) })
	t.Run("all", func(t *testing.T) {
		tryOne(t, named("all", 8*time.Second), envInt("CHAOS_SEED", time.Now().UnixNano()))
	})
}

// Every scenario, CHAOS_ROUNDS times (make chaos-store). Without the variable there is nothing to do.
func TestScenarios(t *testing.T) {
	rounds := envInt("CHAOS_ROUNDS", 0)
	if rounds == 0 && os.Getenv("CHAOS_SEED") == "" {
		t.Skip("make chaos-store")
	}
	length := time.Duration(envInt("CHAOS_SECONDS", 20)) * time.Second
	for round := range max(1, rounds) {
		for _, name := range slices.Sorted(maps.Keys(scenarios)) {
			seed := envInt("CHAOS_SEED", time.Now().UnixNano())
			if round == 0 && os.Getenv("CHAOS_SEED") == "" {
				seed = 1
			}
			t.Run(name, func(t *testing.T) { tryOne(t, named(name, length), seed) })
		}
	}
}

// A store that breaks a promise does not pass.
func TestBroken(t *testing.T) {
	for _, mode := range slices.Sorted(maps.Keys(broken)) {
		t.Run(mode, func(t *testing.T) {
			if mode != "stale-read" && envInt("CHAOS_ROUNDS", 0) == 0 {
				t.Skip("make chaos-store")
			}
			b := broken[mode]
			sc := scenario{members: 3, args: []string{"-broken", mode}, traffic: defaultTraffic(), faults: b.faults, length: 4 * time.Second}
			seed := envInt("CHAOS_SEED", 1)
			v, err := run(t, storeBinary(t), sc, seed)
			t.Logf("seed %d: %v %v", seed, v, err)
			if err != nil && !errors.Is(err, errDiverged) && mode != "watch-drop" {
				t.Fatal(err)
			}
			found := map[history.Class]int{}
			for _, x := range v.violations {
				found[x.Class]++
			}
			t.Logf("found %v", found)
			if !slices.ContainsFunc(b.found, func(c history.Class) bool { return found[c] > 0 }) {
				t.Errorf("none of %v was found, but %v", b.found, found)
			}
		})
	}
}

// A schedule depends on its seed alone, and every fault has a scenario.
func TestSchedule(t *testing.T) {
	used := map[string]bool{}
	for name, sc := range scenarios {
		a, b := schedule(7, sc.faults, time.Minute), schedule(7, sc.faults, time.Minute)
		if !slices.Equal(a, b) || len(a) < len(sc.faults) {
			t.Errorf("%s: %d steps, then %d", name, len(a), len(b))
		}
		if slices.Equal(a, schedule(8, sc.faults, time.Minute)) {
			t.Errorf("%s: two seeds, one schedule", name)
		}
		for _, f := range sc.faults {
			if _, ok := faults[f]; !ok {
				t.Errorf("%s: there is no fault %q", name, f)
			}
			if name != "all" && name != "all-5" {
				used[f] = true
			}
		}
	}
	for f := range faults {
		if !used[f] {
			t.Errorf("no scenario has the fault %q", f)
		}
	}
}
