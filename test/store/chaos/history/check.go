package history

import (
	"cmp"
	"maps"
	"slices"
	"sort"
	"time"
)

// Options of Check.
type Options struct {
	// Healed is when the last fault ended; 0: unknown. Leases are judged as late
	// only by what happened after it.
	Healed time.Duration
	// LeaseSlack is how much later than its time a lease may end on a healthy
	// cluster. Default 10 s: a new leader grants every lease its time anew.
	LeaseSlack time.Duration
}

// Check judges a history; the run must be over.
func Check(h *History, o Options) []Violation {
	if o.LeaseSlack == 0 {
		o.LeaseSlack = 10 * time.Second
	}
	var r report
	for _, shard := range h.shards() {
		s := newShardCheck(h, shard, o, &r)
		s.explain()
		s.realTime()
		s.replicas()
		for _, w := range s.watches {
			s.watch(w)
		}
		s.leases()
	}
	return r.all
}

func (h *History) shards() []string {
	set := map[string]bool{}
	for _, o := range h.Ops {
		set[o.Shard] = true
	}
	for _, w := range h.Watches {
		set[w.Shard] = true
	}
	return slices.Sorted(maps.Keys(set))
}

// shardCheck is the judgement of one shard.
type shardCheck struct {
	h       *History
	shard   string
	o       Options
	r       *report
	log     *Log
	ops     []*Op
	watches []*Watch
	// seen: when a client first saw a revision, in a watch.
	seen map[int64]time.Duration
	// claimed revisions, by the operation that made them; took is the inverse.
	claimed map[int64]*Op
	took    map[*Op]int64
	// ended leases, with the revision that deleted their keys.
	ended map[int64]int64
}

func newShardCheck(h *History, shard string, o Options, r *report) *shardCheck {
	s := &shardCheck{h: h, shard: shard, o: o, r: r, seen: map[int64]time.Duration{},
		claimed: map[int64]*Op{}, took: map[*Op]int64{}, ended: map[int64]int64{}}
	for _, op := range h.Ops {
		if op.Shard == shard {
			s.ops = append(s.ops, op)
		}
	}
	for _, w := range h.Watches {
		if w.Shard == shard {
			s.watches = append(s.watches, w)
		}
	}
	s.log = buildLog(s.collect(), r)
	return s
}

// whole tells whether a watch sees all events, each revision in one piece.
func (w *Watch) whole() bool {
	return w.Whole && !w.NoPut && !w.NoDel && !w.Fragment
}

// collect gathers what the whole watches saw, which must be the same.
func (s *shardCheck) collect() map[int64][]Event {
	out := map[int64][]Event{}
	from := map[int64]*Watch{}
	for _, w := range s.watches {
		mine := map[int64]bool{}
		for _, m := range w.Messages {
			for rev, es := range byRevision(m.Events) {
				if at, ok := s.seen[rev]; !ok || m.At < at {
					s.seen[rev] = m.At
				}
				if !w.whole() || mine[rev] {
					continue
				}
				mine[rev] = true
				if known, ok := out[rev]; !ok {
					out[rev], from[rev] = es, w
				} else if !sameEvents(known, es) {
					s.r.add(LogConflict, "shard %s revision %d is %+v for %v but %+v for %v", s.shard, rev, known, from[rev], es, w)
				}
			}
		}
	}
	return out
}

func byRevision(es []Event) map[int64][]Event {
	out := map[int64][]Event{}
	for _, e := range es {
		out[e.KV.Mod] = append(out[e.KV.Mod], e)
	}
	return out
}

// explain finds the request behind each revision, and compares each answer with
// the model's.
func (s *shardCheck) explain() {
	for _, op := range s.ops {
		switch op.Outcome {
		case Done:
			s.answered(op)
		case Compacted:
			s.refusedAsCompacted(op)
		}
	}
	byValue := map[string]*Op{}
	var deletions []*Op
	for _, op := range s.ops {
		puts := false
		for _, steps := range [][]Step{op.Then, op.Else} {
			for _, st := range steps {
				if st.Kind == Put {
					byValue[st.Value], puts = op, true
				}
			}
		}
		if !puts && op.writes() && op.Outcome == Unknown {
			deletions = append(deletions, op)
		}
	}
	for _, rev := range s.log.revisions() {
		if s.claimed[rev] == nil {
			s.unclaimed(rev, byValue, &deletions)
		}
	}
}

func (s *shardCheck) claim(op *Op, rev int64) {
	if other := s.claimed[rev]; other != nil {
		s.r.add(LostWrite, "revision %d was given to two requests: %v and %v", rev, other, op)
		return
	}
	s.claimed[rev], s.took[op] = op, rev
}

func (s *shardCheck) answered(op *Op) {
	if op.Rev > s.log.last {
		s.r.add(lostOr(op, TimeTravel), "the answer is of revision %d, the log ends with %d: %v", op.Rev, s.log.last, op)
		return
	}
	made, results, events := s.log.execute(op, op.Rev-1) // it made the revision
	effect := len(events) > 0 && sameEvents(events, s.log.events[op.Rev])
	if effect && made == op.Succeeded && sameResults(results, op.Results) {
		s.claim(op, op.Rev)
		return
	}
	saw, seen, changes := s.log.execute(op, op.Rev) // or it only saw it
	switch {
	case len(changes) == 0 && saw == op.Succeeded && sameResults(seen, op.Results):
	case effect:
		s.claim(op, op.Rev)
		s.r.add(WrongResult, "want %v %v: %v", made, results, op)
	case len(changes) > 0:
		s.r.add(LostWrite, "revision %d has %+v: %v", op.Rev, s.log.events[op.Rev], op)
	default:
		s.r.add(WrongResult, "want %v %v: %v", saw, seen, op)
	}
}

func lostOr(op *Op, c Class) Class {
	if op.writes() {
		return LostWrite
	}
	return c
}

// refusedAsCompacted: some revision asked for must have been given up by then.
func (s *shardCheck) refusedAsCompacted(op *Op) {
	for _, steps := range [][]Step{op.Then, op.Else} {
		for _, st := range steps {
			if st.Rev != 0 && s.compactedBy(op.Return) > st.Rev {
				return
			}
		}
	}
	s.r.add(WrongResult, "nothing of it was compacted: %v", op)
}

// compactedBy is the highest revision whose compaction had been asked for.
func (s *shardCheck) compactedBy(t time.Duration) (rev int64) {
	for _, c := range s.h.Compactions {
		if c.Shard == s.shard && c.Call < t {
			rev = max(rev, c.Rev)
		}
	}
	return rev
}

// unclaimed: no answered request made this revision.
func (s *shardCheck) unclaimed(rev int64, byValue map[string]*Op, deletions *[]*Op) {
	es := s.log.events[rev]
	for _, e := range es {
		if e.Delete {
			continue
		}
		op := byValue[e.KV.Value]
		switch {
		case op == nil && s.h.Background[e.KV.Key]:
		case op == nil:
			s.r.add(Unexplained, "shard %s revision %d: %+v", s.shard, rev, es)
		case op.Outcome != Unknown:
			s.r.add(DoubleApply, "revision %d %+v is of a request that was answered otherwise: %v", rev, es, op)
		case s.took[op] != 0:
			s.r.add(DoubleApply, "revisions %d and %d are of one request: %v", s.took[op], rev, op)
		case !s.matches(op, rev):
			s.r.add(Unexplained, "revision %d has %+v, not what was asked for: %v", rev, es, op)
		default:
			s.claim(op, rev)
		}
		return
	}
	if s.leaseEnded(rev, es) {
		return
	}
	for i, op := range *deletions {
		if op.Call < s.seen[rev] && s.matches(op, rev) {
			s.claim(op, rev)
			*deletions = slices.Delete(*deletions, i, i+1)
			return
		}
	}
	if len(es) > 0 && s.h.Background[es[0].KV.Key] {
		return
	}
	if kv := s.log.at(es[0].KV.Key, rev-1); kv != nil && kv.Lease != 0 {
		s.r.add(LeaseTorn, "revision %d deletes %+v, not all keys of lease %x", rev, es, kv.Lease)
		return
	}
	s.r.add(Unexplained, "shard %s revision %d: %+v", s.shard, rev, es)
}

func (s *shardCheck) matches(op *Op, rev int64) bool {
	_, _, events := s.log.execute(op, rev-1)
	return sameEvents(events, s.log.events[rev])
}

// leaseEnded tells whether a revision deletes exactly the keys of a lease.
func (s *shardCheck) leaseEnded(rev int64, es []Event) bool {
	var id int64
	gone := map[string]bool{}
	for _, e := range es {
		kv := s.log.at(e.KV.Key, rev-1)
		if kv == nil || kv.Lease == 0 || (id != 0 && kv.Lease != id) {
			return false
		}
		id = kv.Lease
		gone[e.KV.Key] = true
	}
	for _, name := range s.log.names {
		if kv := s.log.at(name, rev-1); kv != nil && kv.Lease == id && !gone[name] {
			return false
		}
	}
	s.ended[id] = rev
	return true
}

// seenAt is a revision and when somebody knew of it.
type seenAt struct {
	at  time.Duration
	rev int64
}

// horizon answers: which revision was known to anybody before a moment?
type horizon []seenAt

func newHorizon(all []seenAt) horizon {
	slices.SortFunc(all, func(a, b seenAt) int { return cmp.Compare(a.at, b.at) })
	for i := 1; i < len(all); i++ {
		all[i].rev = max(all[i].rev, all[i-1].rev)
	}
	return all
}

func (h horizon) before(t time.Duration) int64 {
	i := sort.Search(len(h), func(i int) bool { return h[i].at >= t })
	if i == 0 {
		return 0
	}
	return h[i-1].rev
}

// realTime: what was known before a request began is in its past.
func (s *shardCheck) realTime() {
	var known []seenAt
	for _, op := range s.ops {
		if op.Outcome == Done {
			known = append(known, seenAt{op.Return, op.Rev})
		}
	}
	for rev, at := range s.seen {
		known = append(known, seenAt{at, rev})
	}
	past := newHorizon(known)
	for _, op := range s.ops {
		rev, wrote := s.took[op]
		if !wrote {
			rev = op.Rev
		}
		was := past.before(op.Call)
		switch {
		case wrote && rev <= was:
			s.r.add(StaleRead, "revision %d was known before, yet it wrote %d: %v", was, rev, op)
		case op.Outcome == Done && !op.Serializable && rev < was:
			s.r.add(StaleRead, "revision %d was known before, it saw %d: %v", was, rev, op)
		}
	}
}

// replicas: as long as its process lives, a replica does not go back.
func (s *shardCheck) replicas() {
	type replica struct {
		node string
		life int
	}
	known := map[replica][]seenAt{}
	for _, op := range s.ops {
		if op.Outcome == Done {
			k := replica{op.Node, op.Life}
			known[k] = append(known[k], seenAt{op.Return, op.Rev})
		}
	}
	past := map[replica]horizon{}
	for k, v := range known {
		past[k] = newHorizon(v)
	}
	for _, op := range s.ops {
		if op.Outcome != Done {
			continue
		}
		if was := past[replica{op.Node, op.Life}].before(op.Call); op.Rev < was {
			s.r.add(TimeTravel, "this replica had shown revision %d before: %v", was, op)
		}
	}
}

// leases end after their time, whole, and not much later.
func (s *shardCheck) leases() {
	end := s.h.lastMoment()
	for _, l := range s.h.Leases {
		if l.Shard != s.shard {
			continue
		}
		due := slices.Max(l.Renewed) + l.TTL
		if rev, ok := s.ended[l.ID]; ok {
			if at := s.seen[rev]; at < due && (l.Revoked == 0 || l.Revoked > at) {
				s.r.add(LeaseEarly, "lease %x of %v was renewed at %v, its keys were gone at %v (revision %d)", l.ID, l.TTL, due-l.TTL, at, rev)
			}
			continue
		}
		latest := max(max(due, l.Attempted+l.TTL), s.o.Healed+l.TTL) + s.o.LeaseSlack
		if s.o.Healed == 0 || latest > end {
			continue
		}
		for _, name := range s.log.names {
			if kv := s.log.at(name, s.log.last); kv != nil && kv.Lease == l.ID {
				s.r.add(LeaseLate, "lease %x of %v was due at %v, %q is there at %v", l.ID, l.TTL, due, name, end)
				break
			}
		}
	}
}

func (h *History) lastMoment() (t time.Duration) {
	for _, o := range h.Ops {
		if o.Return != Never {
			t = max(t, o.Return)
		}
	}
	for _, w := range h.Watches {
		t = max(t, w.Closed)
	}
	return t
}
