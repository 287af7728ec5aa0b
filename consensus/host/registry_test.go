package host

import (
	"errors"
	"fmt"
	"testing"
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
