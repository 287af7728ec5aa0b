package history

import (
	"slices"
)

// watch judges one watch against the log.
func (s *shardCheck) watch(w *Watch) {
	c := &watchCheck{s: s, w: w}
	// A watch of "now" begins behind what its creation announces.
	c.at = w.Start - 1
	for i := range w.Messages {
		c.message(&w.Messages[i])
		if c.over && i+1 < len(w.Messages) {
			s.r.add(WatchEnd, "it goes on after its end: %v", w)
			return
		}
	}
}

type watchCheck struct {
	s *shardCheck
	w *Watch
	// at is the revision up to which everything was delivered or promised not to
	// come.
	at    int64
	parts []Event // of a fragmented response
	over  bool
	// created: its creation was answered.
	created bool
	// last revision delivered, to recognise one that comes in parts.
	last int64
}

// wants tells whether the watch asked for an event.
func (w *Watch) wants(e Event) bool {
	if (w.NoPut && !e.Delete) || (w.NoDel && e.Delete) {
		return false
	}
	return inRange(e.KV.Key, w.Key, w.End)
}

func (c *watchCheck) message(m *WatchMessage) {
	w, r := c.w, c.s.r
	switch {
	case m.Created && !m.Canceled:
		c.created = true
		if w.Start == 0 {
			c.at = m.Rev
		}
	case m.Canceled:
		c.over = true
		switch {
		case m.CompactRevision == 0:
			r.add(WatchEnd, "cancelled (%s) at revision %d: %v", m.Reason, c.at, w)
		case m.CompactRevision > c.s.compactedBy(m.At):
			r.add(WatchEnd, "cancelled by a compaction to %d, which nobody asked for: %v", m.CompactRevision, w)
		case m.CompactRevision <= c.at+1:
			r.add(WatchEnd, "cancelled by a compaction to %d, but it was at %d: %v", m.CompactRevision, c.at, w)
		}
	case m.All && !c.created:
	case !c.created:
		r.add(WatchWrong, "a response before its creation: %v", w)
	case len(m.Events) == 0 && !m.Fragment && len(c.parts) == 0:
		c.progress(m)
	default:
		c.parts = append(c.parts, m.Events...)
		if m.Fragment {
			if !w.Fragment {
				r.add(WatchSplit, "a part that was not asked for: %v", w)
			}
			return
		}
		c.deliver(c.parts, m)
		c.parts = nil
	}
}

// progress: everything up to the announced revision has been delivered.
func (c *watchCheck) progress(m *WatchMessage) {
	if m.Rev < c.w.Start-1 {
		c.s.r.add(WatchProgress, "told of revision %d before its start: %v", m.Rev, c.w)
	}
	if rev, es := c.next(m.Rev); rev != 0 {
		c.s.r.add(WatchProgress, "told that it is at %d, but revision %d (%+v) has not come: %v", m.Rev, rev, es, c.w)
	}
	c.at = max(c.at, m.Rev)
}

// next is the first revision after c.at, up to a limit, with events for the watch.
func (c *watchCheck) next(limit int64) (int64, []Event) {
	for rev := c.at + 1; rev <= min(limit, c.s.log.last); rev++ {
		if es := c.wanted(rev); len(es) > 0 {
			return rev, es
		}
	}
	return 0, nil
}

func (c *watchCheck) wanted(rev int64) (out []Event) {
	for _, e := range c.s.log.events[rev] {
		if c.w.wants(e) {
			out = append(out, e)
		}
	}
	return out
}

func (c *watchCheck) deliver(es []Event, m *WatchMessage) {
	r := c.s.r
	if last := es[len(es)-1].KV.Mod; m.Rev < last {
		r.add(WatchWrong, "the header says revision %d, the events %d: %v", m.Rev, last, c.w)
	}
	for len(es) > 0 {
		rev := es[0].KV.Mod
		n := slices.IndexFunc(es, func(e Event) bool { return e.KV.Mod != rev })
		if n < 0 {
			n = len(es)
		}
		c.group(rev, es[:n], m)
		es = es[n:]
	}
}

// group judges the events of one revision.
func (c *watchCheck) group(rev int64, es []Event, m *WatchMessage) {
	r := c.s.r
	switch {
	case c.w.Start == 0 && c.last == 0 && rev <= c.at:
		// The watch is older than the header that announces it, as in etcd.
		c.at = rev - 1
	case rev == c.last && len(c.wanted(rev)) > len(es):
		r.add(WatchSplit, "revision %d comes in parts: %v", rev, c.w)
		return
	case rev <= c.at:
		r.add(WatchDouble, "revision %d comes after %d: %v", rev, c.at, c.w)
		return
	}
	if missing, gone := c.next(rev - 1); missing != 0 {
		r.add(WatchGap, "revision %d (%+v) is missing before %d: %v", missing, gone, rev, c.w)
	}
	want := c.wanted(rev)
	switch {
	case sameEvents(want, es):
	case len(es) < len(want):
		r.add(WatchGap, "revision %d has %+v, got %+v: %v", rev, want, es, c.w)
	default:
		r.add(WatchWrong, "revision %d has %+v, got %+v: %v", rev, want, es, c.w)
	}
	c.at, c.last = rev, rev
	for _, e := range es {
		c.prev(rev, e, m)
	}
}

// prev: what was there before, unless it may be compacted.
func (c *watchCheck) prev(rev int64, e Event, m *WatchMessage) {
	want := c.s.log.at(e.KV.Key, rev-1)
	switch {
	case !c.w.PrevKV || want == nil:
		if e.Prev != nil {
			c.s.r.add(WatchWrong, "revision %d: %q had nothing before, or it was not asked for, got %+v: %v", rev, e.KV.Key, *e.Prev, c.w)
		}
	case e.Prev == nil:
		if c.s.compactedBy(m.At) < rev-1 {
			c.s.r.add(WatchWrong, "revision %d: what %q was before is missing: %v", rev, e.KV.Key, c.w)
		}
	case *e.Prev != *want:
		c.s.r.add(WatchWrong, "revision %d: %q was %+v before, got %+v: %v", rev, e.KV.Key, *want, *e.Prev, c.w)
	}
}
