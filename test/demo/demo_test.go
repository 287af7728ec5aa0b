package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"reflect"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func ms(n int) time.Duration { return time.Duration(n) * time.Millisecond }

func TestJudge(t *testing.T) {
	fault := ms(10_000)
	for _, c := range []struct {
		name string
		in   []sample
		want outage
	}{
		{"nothing", nil, outage{Causes: map[string]int{}}},
		{"ended before", []sample{{Start: ms(9000), End: ms(9999), Err: "timeout"}, {Start: ms(9000), End: ms(9001)}}, outage{Before: 1, Causes: map[string]int{}}},
		{"under way at the fault", []sample{{Start: ms(9900), End: ms(10_900), Err: "timeout"}}, outage{Sent: 1, Failed: 1, Causes: map[string]int{"timeout": 1}}},
		{"last by sending, not by ending", []sample{
			{Start: ms(10_100), End: ms(11_100), Err: "timeout"}, {Start: ms(10_500), End: ms(10_501), Err: "refused"},
			{Start: ms(10_300), End: ms(11_300), Err: "timeout"}, {Start: ms(12_000), End: ms(12_001)},
		}, outage{Sent: 4, Failed: 3, First: 0.1, Last: 0.5, Causes: map[string]int{"timeout": 2, "refused": 1}}},
	} {
		if got := judge(c.in, fault); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %+v, want %+v", c.name, got, c.want)
		}
	}
}

func TestFirstSuccess(t *testing.T) {
	s := []sample{
		{Start: ms(10), End: ms(20)},                 // before the death
		{Start: ms(110), End: ms(5000), Err: "lost"}, // failed
		{Start: ms(120), End: ms(700)},
		{Start: ms(300), End: ms(650)}, // began later, ended sooner
	}
	if got, ok := firstSuccess(s, ms(100), ms(50)); !ok || got != 0.6 {
		t.Errorf("%v %t, want 0.6", got, ok)
	}
	if _, ok := firstSuccess(s[:2], ms(100), ms(50)); ok {
		t.Error("a success was found where there is none")
	}
}

func TestSpread(t *testing.T) {
	s := []sample{{Pod: "b", Node: "n1"}, {Pod: "a", Node: "n1"}, {Pod: "a", Node: "n1"}, {Pod: "c", Node: "n2"}, {Err: "timeout"}}
	if got := spread(s); got != "n1 2 1 | n2 1" {
		t.Errorf("%q", got)
	}
	if p, n := who("pod=x node=y ip=1.2.3.4 peer=z path=/\n"); p != "x" || n != "y" {
		t.Errorf("pod %q node %q", p, n)
	}
	if failed(s) != 1 {
		t.Errorf("%d failed, want 1", failed(s))
	}
}

func TestParseCPU(t *testing.T) {
	got, err := parseCPU("42 (a) b) c) S 1 42 42 0 -1 4194560 1 2 3 4 150 50 7 8 20 0")
	if err != nil || got != 2*time.Second {
		t.Errorf("%s, %v; want 2s", got, err)
	}
	for _, bad := range []string{"", "1 (x) S 1", "1 (x) S 1 42 42 0 -1 4194560 1 2 3 4 a b"} {
		if _, err := parseCPU(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

// A probe keeps its rate while attempts hang, and counts what it could not send.
func TestProbeKeepsItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second+time.Millisecond)
		defer cancel()
		var mu sync.Mutex
		count := map[string]int{}
		probe(ctx, 10, time.Second, func(ctx context.Context) (string, string, error) {
			<-ctx.Done() // nobody answers
			return "", "", ctx.Err()
		}, func(s sample) {
			mu.Lock()
			defer mu.Unlock()
			count[s.Err]++
		})
		if len(count) != 1 || count["timeout"] != 40 {
			t.Errorf("%v, want 40 timeouts", count)
		}
	})
}

func TestFetch(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/sick" {
			http.Error(w, "no", http.StatusInternalServerError)
			return
		}
		fmt.Fprintln(w, "pod=p node=n")
	}))
	if pod, node, err := fetch(srv.URL)(t.Context()); pod != "p" || node != "n" || err != nil {
		t.Errorf("%q %q %v", pod, node, err)
	}
	if _, _, err := fetch(srv.URL + "/sick")(t.Context()); err == nil || err.Error() != "status 500" {
		t.Errorf("error %v, want status 500", err)
	}
	srv.Close()
	if _, _, err := fetch(srv.URL)(t.Context()); err == nil || cause(err) != "refused" {
		t.Errorf("error %v, want a refusal", err)
	}
}

func TestCause(t *testing.T) {
	for want, err := range map[string]error{
		"timeout": fmt.Errorf("x: %w", context.DeadlineExceeded), "no route": fmt.Errorf("x: %w", syscall.EHOSTUNREACH),
		"reset": fmt.Errorf("x: %w", syscall.ECONNRESET), "odd": errors.New("odd"),
	} {
		if got := cause(err); got != want {
			t.Errorf("%v: %q, want %q", err, got, want)
		}
	}
}
