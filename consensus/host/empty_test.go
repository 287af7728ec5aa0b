package host_test

import (
	"testing"
	"time"

	"skein.io/skein/consensus/internal/storetest"
)

// Only a host without any replica is empty: one whose replica was stopped and not deleted still has data.
func TestWhenEmpty(t *testing.T) {
	c := storetest.New(t, 1, nil)
	h, bg := c.Nodes[0].Host(), ctx(t, 20*time.Second)
	calls := 0
	is := func(when string, want bool) {
		t.Helper()
		before := calls
		if got := h.WhenEmpty(func() { calls++ }); got != want || calls-before != map[bool]int{true: 1}[want] {
			t.Errorf("%s: empty %v after %d calls, want %v", when, got, calls-before, want)
		}
	}
	is("new", true)
	if err := h.Bootstrap(bg); err != nil {
		t.Fatal(err)
	}
	is("with a replica", false)
	if err := h.StopReplica(bg, storetest.Shard, 1, false); err != nil {
		t.Fatal(err)
	}
	is("with a stopped replica", false)
	for _, s := range h.Shards().Shards() {
		if err := h.StopReplica(bg, s.Name, 1, true); err != nil {
			t.Fatal(err)
		}
	}
	is("with deleted replicas", true)
	if err := h.Close(bg); err != nil {
		t.Fatal(err)
	}
	is("closed", false)
}
