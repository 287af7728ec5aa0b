package shard

import (
	"errors"
	"math/rand"
	"testing"
	"time"
)

func TestRouting(t *testing.T) {
	tab := Default()
	for key, want := range map[string]string{
		"/registry/pods/a/b": "pods", "/registry/pods": "system", "/registry/podsecurity/x": "system",
		"/registry/events/default/e": "events", "/registry/leases/x": "events", "/skein/ca": "system", "": "system",
	} {
		if got := tab.ForKey(key).Name; got != want {
			t.Errorf("ForKey(%q) = %s, want %s", key, got, want)
		}
	}
	for _, c := range []struct {
		key, end, want string
	}{
		{"/registry/pods/", "/registry/pods0", "pods"},
		{"/registry/pods/a", "", "pods"},
		{"/registry/pods/a/", "/registry/pods/a0", "pods"},
		{"/registry/services/", "/registry/services0", "system"},
		{"/registry/", "/registry0", ""},
		{"\x00", "\x00", ""},
		{"/registry/zzz", "\x00", "system"},
		{"/registry/events/", "/registry/leases0", ""},
		{"/registry/pods/x", "/registry/poe", ""},
	} {
		s, err := tab.ForRange(c.key, c.end)
		if (err == nil) != (c.want != "") || s.Name != c.want || (err != nil && !errors.Is(err, ErrCrossShard)) {
			t.Errorf("ForRange(%q, %q) = %q, %v; want %q", c.key, c.end, s.Name, err, c.want)
		}
	}
	one, err := New(Shard{ID: System, Name: "system"})
	if err != nil {
		t.Fatal(err)
	}
	if s, err := one.ForRange("\x00", "\x00"); err != nil || s.ID != System {
		t.Errorf("one shard keeps everything: %v %v", s, err)
	}
}

// A range has one shard exactly when every key in it has that one.
func TestForRangeAgreesWithForKey(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewSource(seed))
	tab, err := New(Shard{ID: 1, Name: "rest"}, Shard{ID: 2, Name: "b", Prefixes: []string{"b"}}, Shard{ID: 3, Name: "bb", Prefixes: []string{"bb", "d"}})
	if err != nil {
		t.Fatal(err)
	}
	var keys []string // every key of up to three letters
	for _, a := range "abcde" {
		keys = append(keys, string(a))
		for _, b := range "abcde" {
			keys = append(keys, string([]rune{a, b}))
			for _, c := range "abcde" {
				keys = append(keys, string([]rune{a, b, c}))
			}
		}
	}
	for range 20000 {
		key, end := keys[r.Intn(len(keys))], keys[r.Intn(len(keys))]
		if key >= end {
			continue
		}
		got, err := tab.ForRange(key, end)
		seen := map[ID]bool{}
		for _, k := range keys {
			if k >= key && k < end {
				seen[tab.ForKey(k).ID] = true
			}
		}
		if err == nil && (len(seen) != 1 || !seen[got.ID]) {
			t.Fatalf("ForRange(%q, %q) = %s but the keys are in %v", key, end, got.Name, seen)
		}
		if err != nil && len(seen) == 1 {
			// Only legal when a boundary lies between the sampled keys.
			if s := tab.ForKey(key); s.ID != tab.ForKey(end).ID || !boundaryWithin(tab, key, end) {
				t.Fatalf("ForRange(%q, %q) refused but all keys are in %v", key, end, seen)
			}
		}
	}
}

func boundaryWithin(tab Table, key, end string) bool {
	for _, s := range tab.Shards() {
		for _, p := range s.Prefixes {
			for _, b := range []string{p, prefixEnd(p)} {
				if b > key && b < end {
					return true
				}
			}
		}
	}
	return false
}

func TestNewReportsAllFaults(t *testing.T) {
	_, err := New(Shard{ID: 1, Name: "a", Prefixes: []string{"x"}}, Shard{ID: 1, Name: "a", Prefixes: []string{"x", ""}})
	if err == nil {
		t.Fatal("accepted")
	}
	if n := len(errors.Unwrap(err).(interface{ Unwrap() []error }).Unwrap()); n < 4 {
		t.Errorf("only %d faults reported: %v", n, err)
	}
}
