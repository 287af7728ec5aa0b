package space

import (
	"math/rand"
	"reflect"
	"strings"
	"testing"
	"time"
)

func config(t testing.TB, tune func(*Config)) Config {
	t.Helper()
	c := Config{}
	if tune != nil {
		tune(&c)
	}
	c.SetDefaults()
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestValidate(t *testing.T) {
	c := Config{Quota: 1, Retention: time.Millisecond, MinRetention: time.Hour, MaxRevisions: 1, DefragFree: 1, DefragRatio: 2, DefragInterval: -1}
	err := c.Validate()
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{"Quota", "Retention", "MinRetention", "MaxRevisions", "DefragFree", "DefragRatio", "DefragInterval"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%s is not complained of: %v", want, err)
		}
	}
}

func TestCompact(t *testing.T) {
	c := config(t, nil) // 5 min, 30 s, 250,000
	note := func(h *History, from, to time.Duration, rev *int64, each int64) {
		for at := from; at < to; at += 5 * time.Second {
			*rev += each
			h.Note(c, at, *rev)
		}
	}
	t.Run("age", func(t *testing.T) {
		var h History
		rev := int64(0)
		note(&h, 0, 4*time.Minute, &rev, 10)
		s := State{Rev: rev, Compacted: 0, Since: time.Hour}
		if r, why := h.Compact(c, 4*time.Minute, s); r != 0 {
			t.Errorf("compacted %d (%s) before the retention", r, why)
		}
		note(&h, 4*time.Minute, 6*time.Minute, &rev, 10)
		s.Rev = rev
		// At 6:00 what was the newest at 1:00 may go: 13 notes of 10.
		if r, _ := h.Compact(c, 6*time.Minute, s); r != 130 {
			t.Errorf("compacts to %d, want 130", r)
		}
		s.Since = 10 * time.Second
		if r, _ := h.Compact(c, 6*time.Minute, s); r != 0 {
			t.Errorf("compacts to %d a moment after the last time", r)
		}
		s.Since, s.Compacted = time.Hour, 130
		if r, _ := h.Compact(c, 6*time.Minute, s); r != 0 {
			t.Errorf("compacts to %d again", r)
		}
		if len(h.seen) > 62 {
			t.Errorf("%d samples are kept", len(h.seen))
		}
	})
	t.Run("churn", func(t *testing.T) {
		var h History
		rev := int64(0)
		note(&h, 0, time.Minute, &rev, 25_000) // 5,000 a second
		r, why := h.Compact(c, time.Minute, State{Rev: rev, Since: time.Second})
		if want := rev - c.MaxRevisions; r != 0 && r != want || why == "age" {
			t.Errorf("compacts to %d (%s), want %d", r, why, want)
		}
		if r != 0 && r > 6*25_000+25_000 {
			t.Errorf("%d is younger than MinRetention", r)
		}
		note(&h, time.Minute, 2*time.Minute, &rev, 25_000)
		if r, why := h.Compact(c, 2*time.Minute, State{Rev: rev, Since: time.Second}); r != rev-c.MaxRevisions || why != "number of revisions" {
			t.Errorf("compacts to %d (%s), want %d", r, why, rev-c.MaxRevisions)
		}
	})
	t.Run("space", func(t *testing.T) {
		var h History
		rev := int64(0)
		note(&h, 0, time.Minute, &rev, 10)
		s := State{Rev: rev, InUse: c.Quota / 5 * 4, Since: time.Minute}
		if r, why := h.Compact(c, time.Minute, s); r != 70 || why != "space" {
			t.Errorf("compacts to %d (%s), want 70", r, why)
		}
	})
	t.Run("another store", func(t *testing.T) {
		var h History
		rev := int64(1000)
		note(&h, 0, 10*time.Minute, &rev, 10)
		h.Note(c, 10*time.Minute, 5) // restored from a backup
		if r, _ := h.Compact(c, 11*time.Minute, State{Rev: 5, Since: time.Hour}); r != 0 {
			t.Errorf("compacts to %d", r)
		}
	})
}

// Whatever happens, nothing younger than MinRetention is compacted, by age
// nothing younger than Retention, and never a revision that does not exist.
func TestCompactNeverEarly(t *testing.T) {
	seed := time.Now().UnixNano()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewSource(seed))
	for range 200 {
		c := config(t, func(c *Config) {
			c.Quota, c.MaxRevisions = 64<<20, 1000+rnd.Int63n(5000)
			c.Retention = time.Duration(1+rnd.Intn(600)) * time.Second
		})
		var h History
		now, s := time.Duration(0), State{}
		born := map[int64]time.Duration{}
		for range 400 {
			now += time.Duration(rnd.Int63n(int64(2 * c.Tick())))
			s.Since += c.Tick()
			for n := rnd.Int63n(200); n > 0; n-- {
				s.Rev++
				born[s.Rev] = now
			}
			s.InUse = rnd.Int63n(c.Quota)
			if rnd.Intn(100) == 0 {
				h = History{} // restarted
			}
			h.Note(c, now, s.Rev)
			rev, why := h.Compact(c, now, s)
			if rev == 0 {
				continue
			}
			if rev <= s.Compacted || rev > s.Rev {
				t.Fatalf("compacts to %d, which is not in (%d, %d]", rev, s.Compacted, s.Rev)
			}
			least := c.MinRetention
			if why == "age" {
				least = c.Retention
			}
			if age := now - born[rev]; age < least {
				t.Fatalf("%s: compacts revision %d of age %v, retention %v", why, rev, age, c.Retention)
			}
			s.Compacted, s.Since = rev, 0
		}
	}
}

func TestFull(t *testing.T) {
	c := config(t, func(c *Config) { c.Quota = 100 << 20 })
	for _, x := range []struct {
		used, by    int64
		full, roomy bool
	}{
		{0, 1, false, true}, {99 << 20, 1 << 20, false, false}, {99 << 20, 1<<20 + 1, true, false}, {89 << 20, 0, false, true}, {90 << 20, 0, false, false},
	} {
		if c.Full(x.used, x.by) != x.full || c.Roomy(x.used) != x.roomy {
			t.Errorf("%d+%d: full %v, roomy %v", x.used, x.by, c.Full(x.used, x.by), c.Roomy(x.used))
		}
	}
	c.Quota = -1
	if c.Full(1<<60, 1) || !c.Roomy(1<<60) {
		t.Error("no quota, and full")
	}
}

func TestWorthDefrag(t *testing.T) {
	c := config(t, nil)
	for _, x := range []struct {
		size, inUse int64
		since       time.Duration
		want        bool
	}{
		{200 << 20, 80 << 20, time.Hour, true}, {200 << 20, 80 << 20, time.Minute, false},
		{200 << 20, 101 << 20, time.Hour, false}, {100 << 20, 40 << 20, time.Hour, false}, {0, 0, time.Hour, false},
	} {
		if got := c.WorthDefrag(Pages{x.size, x.inUse}, x.since); got != x.want {
			t.Errorf("%d of %d MiB, %v ago: %v", x.inUse>>20, x.size>>20, x.since, got)
		}
	}
}

func TestCorrupt(t *testing.T) {
	h := func(rev, compacted int64, hash uint32) Hash { return Hash{rev, compacted, hash} }
	for name, c := range map[string]struct {
		hashes map[uint64][]Hash
		want   []uint64
	}{
		"equal":          {map[uint64][]Hash{1: {h(9, 5, 7)}, 2: {h(9, 5, 7)}, 3: {h(9, 5, 7)}}, nil},
		"one differs":    {map[uint64][]Hash{1: {h(9, 5, 7)}, 2: {h(9, 5, 8)}, 3: {h(9, 5, 7)}}, []uint64{2}},
		"the leader":     {map[uint64][]Hash{1: {h(9, 5, 6)}, 2: {h(9, 5, 7)}, 3: {h(9, 5, 7)}}, []uint64{1}},
		"two":            {map[uint64][]Hash{1: {h(9, 5, 8)}, 2: {h(9, 5, 7)}}, []uint64{2}},
		"not comparable": {map[uint64][]Hash{1: {h(9, 5, 7)}, 2: {h(9, 4, 8)}, 3: {h(8, 5, 9)}}, nil},
		"an earlier one": {map[uint64][]Hash{1: {h(9, 5, 7), h(12, 9, 1)}, 2: {h(9, 5, 7)}, 3: {h(9, 5, 1)}}, []uint64{3}},
		"nobody":         {nil, nil},
	} {
		if got := Corrupt(1, c.hashes); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
