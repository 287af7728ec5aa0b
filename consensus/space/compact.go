package space

import (
	"slices"
	"time"
)

// History is what a replica remembers of its own revisions: at which time which
// was the newest. It never claims more than it has seen, so a replica that has
// just started keeps everything for a whole retention. Times are of one
// process's monotonic clock. The zero value is empty; it is not safe for
// concurrent use.
type History struct {
	seen []sample // by time; revisions do not fall
}

type sample struct {
	at  time.Duration
	rev int64
}

// Note records the newest revision at a time. Only what c needs is kept.
func (h *History) Note(c Config, now time.Duration, rev int64) {
	if n := len(h.seen); n > 0 && (rev < h.seen[n-1].rev || now < h.seen[n-1].at) {
		h.seen = h.seen[:0] // another store, or another clock: what was seen says nothing
	}
	h.seen = append(h.seen, sample{now, rev})
	// The newest one that is old enough is needed, no older ones.
	if i := h.newest(now - c.Retention); i > 0 {
		h.seen = slices.Delete(h.seen, 0, i)
	}
}

// newest returns the index of the newest sample that is not younger than at, -1
// if there is none.
func (h *History) newest(at time.Duration) int {
	for i := len(h.seen) - 1; i >= 0; i-- {
		if h.seen[i].at <= at {
			return i
		}
	}
	return -1
}

func (h *History) revAt(at time.Duration) int64 {
	if i := h.newest(at); i >= 0 {
		return h.seen[i].rev
	}
	return 0
}

// State of a shard, for Compact.
type State struct {
	// Rev is the newest revision, Compacted up to which it has been compacted.
	Rev, Compacted int64
	InUse          int64
	// Since is the time since this replica last compacted.
	Since time.Duration
}

// Compact returns the revision to compact to, 0 for none, and why. Time decides,
// a fifth of the retention after the last time; a shard with too many revisions,
// or little space left, forgets earlier. Nothing younger than MinRetention is
// ever compacted.
func (h *History) Compact(c Config, now time.Duration, s State) (rev int64, reason string) {
	consider := func(r int64, why string) {
		if r > rev && r > s.Compacted && r <= s.Rev {
			rev, reason = r, why
		}
	}
	if s.Since >= c.Retention/5 {
		consider(h.revAt(now-c.Retention), "age")
	}
	young := h.revAt(now - c.MinRetention)
	// A tenth above, so that one compaction lasts for a while.
	if s.Rev-s.Compacted > c.MaxRevisions+c.MaxRevisions/10 {
		consider(min(s.Rev-c.MaxRevisions, young), "number of revisions")
	}
	if c.Quota > 0 && s.InUse > c.Quota/4*3 && s.Since >= c.MinRetention/5 {
		consider(young, "space")
	}
	return rev, reason
}
