package host

import (
	"errors"
	"fmt"
	"testing"
	"time"
)

// The target of a node follows its address, and what is remembered is bounded.
func TestTargetFollowsTheAddress(t *testing.T) {
	addrs := map[string]string{"a": "10.0.0.1:1"}
	r := newRegistry(func(id string) (string, bool) { a, ok := addrs[id]; return a, ok })
	r.Add(1, 2, "a")
	for _, addr := range []string{"10.0.0.1:1", "10.0.0.2:1", "0.0.0.2:1", "110.0.0.2:1"} {
		addrs["a"] = addr
		for range 2 {
			if got, _, err := r.Resolve(1, 2); err != nil || got != "a@"+addr {
				t.Errorf("%s: %s, %v", addr, got, err)
			}
		}
	}
	r.Add(1, 2, "b") // a replica's node never changes, but what is told last counts
	if _, _, err := r.Resolve(1, 2); !errors.Is(err, errUnknownTarget) {
		t.Errorf("an unknown node: %v", err)
	}
	for i := range 3 * maxTargets {
		id := fmt.Sprint(i)
		addrs[id] = "10.0.0.3:1"
		if got, err := r.target(id); err != nil || got != id+"@10.0.0.3:1" {
			t.Errorf("%s: %s, %v", id, got, err)
		}
	}
	if len(r.targets) > maxTargets {
		t.Errorf("%d targets are remembered", len(r.targets))
	}
}

// A node that could not be reached while the wall clock was ahead is tried again when it has
// been set back: by the library's account it has another target then.
func TestTargetsWhenTheClockIsSetBack(t *testing.T) {
	wall, mono := 1000*time.Hour, time.Duration(0)
	r := newRegistry(func(string) (string, bool) { return "[::1]:7", true })
	r.now = func() (time.Duration, time.Duration) { return wall, mono }
	r.lead = wall
	for _, c := range []struct {
		name       string
		jump, pass time.Duration
		want       string
	}{
		{"an hour passes", 0, time.Hour, "a@[::1]:7"},
		{"a leap second, smeared", -400 * time.Millisecond, time.Hour, "a@[::1]:7"},
		{"ahead", 9600 * time.Hour, time.Second, "a@[::1]:7"},
		{"and back", -9600 * time.Hour, time.Second, "a@[::1]:7#1"},
		{"nothing", 0, time.Second, "a@[::1]:7#1"},
		{"in the past", -time.Minute, time.Second, "a@[::1]:7#2"},
		{"and as it was", time.Minute, time.Second, "a@[::1]:7#2"},
	} {
		wall, mono = wall+c.jump+c.pass, mono+c.pass
		got, err := r.target("a")
		if err != nil || got != c.want {
			t.Errorf("%s: %s, %v; want %s", c.name, got, err, c.want)
		}
		if id, addr := splitTarget(got); id != "a" || addr != "[::1]:7" {
			t.Errorf("%s: %s, %s", c.name, id, addr)
		}
	}
}
