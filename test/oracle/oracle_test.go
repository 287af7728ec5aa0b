package oracle

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"sync"
	"testing"

	"github.com/go-logr/logr"
	"k8s.io/klog/v2"
)

func number(t *testing.T, name string, def uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return def
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

func TestMain(m *testing.M) {
	klog.SetLogger(logr.Discard()) // upstream tells of every plugin that is set up otherwise
	os.Exit(m.Run())
}

// TestSameAsUpstream asks about CASES clusters from SEED on.
func TestSameAsUpstream(t *testing.T) {
	cases, seed := number(t, "CASES", 2000), number(t, "SEED", 1)
	t.Logf("SEED=%d CASES=%d", seed, cases)
	workers := uint64(runtime.GOMAXPROCS(0))
	total := tally{Refusals: map[string]int{}, Scores: map[string]int{}, Accepted: map[string]int{}}
	var mu sync.Mutex // guards total and failures
	failures := 0
	var wg sync.WaitGroup
	for worker := range workers {
		j, err := newJudge(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for i := worker; i < cases; i += workers {
				w := generate(seed+i, len(j.ours))
				err := j.compare(w)
				if err == nil {
					continue
				}
				mu.Lock()
				failures++
				stop := failures > 5
				mu.Unlock()
				report(t, j, w)
				if stop {
					return
				}
			}
			mu.Lock()
			defer mu.Unlock()
			total.add(&j.tally)
		})
	}
	wg.Wait()
	t.Log(total.String())
}

// report makes the world small and writes it down.
func report(t *testing.T, j *judge, w *world) {
	small := shrink(w, func(w *world) bool { return j.compare(w) != nil })
	dir := filepath.Join("..", "..", "out", "oracle")
	file := filepath.Join(dir, fmt.Sprintf("%d.yaml", w.Seed))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(file, []byte(small.String()), 0o644); err != nil {
		t.Error(err)
	}
	t.Errorf("SEED=%d CASES=1: see %s\n%v", w.Seed, file, j.compare(small))
}
