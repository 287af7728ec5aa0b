package history

import (
	"fmt"
	"math/rand"
	"slices"
	"testing"
	"time"
)

// simulated makes a history as a correct store would: requests of concurrent
// clients take effect at a random moment between call and return; some get no
// answer. Watches see everything, some in parts of the keys.
func simulated(seed int64, n int) *History {
	r := rand.New(rand.NewSource(seed))
	h := New()
	h.Background["/fence"] = true
	l := &Log{events: map[int64][]Event{}, keys: map[string][]version{}, last: firstRevision}
	at := map[int64]time.Duration{}
	var rep report
	apply := func(o *Op, now time.Duration) {
		ok, res, es := l.execute(o, l.last)
		if len(es) > 0 {
			l.last++
			l.events[l.last], at[l.last] = es, now
			for _, e := range es {
				l.replay(l.last, e, &rep)
				if !slices.Contains(l.names, e.KV.Key) {
					l.names = append(l.names, e.KV.Key)
					slices.Sort(l.names)
				}
			}
		}
		o.Succeeded, o.Results, o.Rev, o.Outcome = ok, res, l.last, Done
	}
	var now time.Duration
	h.Leases = append(h.Leases, &Lease{Shard: "system", ID: 77, TTL: 2 * time.Second, Renewed: []time.Duration{1}, Attempted: 1})
	for i := range n {
		now += time.Duration(r.Intn(1000)+10) * time.Microsecond
		o := &Op{Client: i % 5, Node: fmt.Sprintf("n%d", i%3), Shard: "system", Call: now - time.Duration(r.Intn(800))*time.Microsecond}
		key := func() string { return fmt.Sprintf("/chaos/1/%c", 'a'+r.Intn(4)) }
		put := Step{Kind: Put, Key: key(), Value: fmt.Sprintf("u%d", i), PrevKV: r.Intn(2) == 0}
		switch r.Intn(6) {
		case 0:
			o.Then = []Step{{Key: "/chaos/1/", End: "/chaos/10"}}
		case 1:
			o.Then = []Step{{Kind: Delete, Key: key()}}
		case 2, 3:
			if i == 20 {
				put.Lease = 77
			}
			o.Then = []Step{put}
		default:
			cur := l.at(put.Key, l.last)
			c := Cmp{Key: put.Key, Target: CreateRevision}
			if cur != nil && r.Intn(3) > 0 {
				c = Cmp{Key: put.Key, Target: ModRevision, Number: cur.Mod}
				if r.Intn(3) == 0 {
					c = Cmp{Key: put.Key, Target: CreateRevision, Number: cur.Create}
				}
			}
			o.Form, o.If, o.Then = Txn, []Cmp{c}, []Step{put, {Key: "/chaos/1/", End: "/chaos/10"}}
			o.Else = []Step{{Key: put.Key}}
		}
		if i == 20 { // the one with the lease, which ends much later
			o.Form, o.If, o.Else = Single, nil, nil
			o.Then = []Step{{Kind: Put, Key: "/chaos/1/leased", Value: "u20", Lease: 77}}
		}
		apply(o, now)
		o.Return = now + time.Duration(r.Intn(800))*time.Microsecond
		if r.Intn(15) == 0 && o.Then[0].Kind != Range {
			o.Outcome, o.Return, o.Rev, o.Results = Unknown, Never, 0, nil
		}
		h.AddOp(o)
	}
	gone := &Op{Then: []Step{{Kind: Delete, Key: "/chaos/1/leased"}}}
	now = 3 * time.Second
	apply(gone, now)
	for node := range 3 {
		for _, w := range []*Watch{
			{Key: "\x00", End: "\x00", Whole: true, Start: 1, PrevKV: true},
			{Key: "/chaos/1/a", Start: 1, PrevKV: true},
			{Key: "/chaos/1/", End: "/chaos/10", Start: 5, NoDel: true},
		} {
			w.Node, w.Shard, w.Closed = fmt.Sprintf("n%d", node), "system", now+time.Second
			w.Messages = []WatchMessage{{Created: true, Rev: 1}}
			for rev := int64(2); rev <= l.last; rev++ {
				m := WatchMessage{At: at[rev] + time.Duration(r.Intn(900))*time.Microsecond, Rev: rev}
				for _, e := range l.events[rev] {
					if w.wants(e) && rev >= w.Start {
						if w.PrevKV {
							e.Prev = l.at(e.KV.Key, rev-1)
						}
						m.Events = append(m.Events, e)
					}
				}
				if len(m.Events) > 0 {
					w.Messages = append(w.Messages, m)
				}
			}
			w.Messages = append(w.Messages, WatchMessage{At: now, Rev: l.last}) // progress
			h.AddWatch(w)
		}
	}
	return h
}

func TestSoundHistoriesPass(t *testing.T) {
	for seed := range int64(30) {
		h := simulated(seed, 300)
		if v := Check(h, Options{Healed: 1}); len(v) > 0 {
			t.Fatalf("seed %d: %v", seed, v)
		}
		if _, ops, v := Linearizable(h, 10*time.Second); len(v) > 0 || ops < 100 {
			t.Fatalf("seed %d: %d operations, %v", seed, ops, v)
		}
	}
}

// done finds an answered operation with an effect.
func done(h *History, match func(*Op) bool) *Op {
	for _, o := range h.Ops[len(h.Ops)/2:] {
		if o.Outcome == Done && match(o) {
			return o
		}
	}
	panic("no such operation")
}

// drop removes a revision from all watches.
func drop(h *History, rev int64) {
	for _, w := range h.Watches {
		w.Messages = slices.DeleteFunc(w.Messages, func(m WatchMessage) bool { return len(m.Events) > 0 && m.Rev == rev })
	}
}

func isPut(o *Op) bool  { return o.Form == Single && o.Then[0].Kind == Put }
func isRead(o *Op) bool { return o.Form == Single && o.Then[0].Kind == Range }

// lastOf is the last message with events of the first watch that matches.
func lastOf(h *History, match func(*Watch) bool, back int) (*Watch, int) {
	for _, w := range h.Watches {
		if match(w) {
			return w, len(w.Messages) - 2 - back
		}
	}
	panic("no such watch")
}

// What goes wrong in a store, done to a sound history, is found each time.
func TestBrokenHistoriesAreCaught(t *testing.T) {
	part := func(w *Watch) bool { return !w.whole() }
	for name, c := range map[string]struct {
		class Class
		spoil func(*History)
	}{
		"acknowledged write lost": {LogGap, func(h *History) { drop(h, done(h, isPut).Rev) }},
		"acknowledged last write lost": {LostWrite, func(h *History) {
			h.AddOp(&Op{Node: "n1", Shard: "system", Then: []Step{{Kind: Put, Key: "/chaos/1/a", Value: "lost"}}, Call: 4 * time.Second,
				Return: 5 * time.Second, Outcome: Done, Rev: 1 << 40, Succeeded: true, Results: []StepResult{{}}})
		}},
		"acknowledged, but revision is another's": {LostWrite, func(h *History) { o := done(h, isPut); o.Then[0].Value = "other" }},
		"written twice": {DoubleApply, func(h *History) {
			o := done(h, isPut)
			var last int64
			for _, m := range h.Watches[0].Messages {
				last = max(last, m.Rev)
			}
			for _, w := range h.Watches {
				e := Event{KV: KV{Key: o.Then[0].Key, Value: o.Then[0].Value, Create: last + 1, Mod: last + 1, Version: 1}}
				if w.wants(e) {
					w.Messages = append(w.Messages, WatchMessage{At: 4 * time.Second, Rev: last + 1, Events: []Event{e}})
				}
			}
		}},
		"refused and yet written": {DoubleApply, func(h *History) { done(h, isPut).Outcome = Refused }},
		"stale read": {StaleRead, func(h *History) {
			o := done(h, isRead)
			var rep report
			l := newShardCheck(h, "system", Options{}, &rep).log
			o.Rev -= 30
			_, o.Results, _ = l.execute(o, o.Rev)
		}},
		"read of what never was": {WrongResult, func(h *History) { done(h, isRead).Results[0].KVs = []KV{{Key: "/chaos/1/a"}} }},
		"answer from the future": {TimeTravel, func(h *History) { done(h, isRead).Rev += 1 << 40 }},
		"replica goes back":      {TimeTravel, func(h *History) { goBack(h) }},
		"compare of the past": {WrongResult, func(h *History) {
			o := done(h, func(o *Op) bool { return o.Form == Txn && o.Succeeded })
			o.Succeeded = false
		}},
		"replicas disagree":      {LogConflict, func(h *History) { w, i := lastOf(h, (*Watch).whole, 9); spoilEvent(w, i) }},
		"watch misses an event":  {WatchGap, func(h *History) { w, i := lastOf(h, part, 3); w.Messages = slices.Delete(w.Messages, i, i+1) }},
		"watch repeats an event": {WatchDouble, func(h *History) { w, i := lastOf(h, part, 3); w.Messages = slices.Insert(w.Messages, i, w.Messages[i]) }},
		"watch swaps events": {WatchDouble, func(h *History) {
			w, i := lastOf(h, part, 3)
			w.Messages[i], w.Messages[i-1] = w.Messages[i-1], w.Messages[i]
		}},
		"watch with wrong value":  {WatchWrong, func(h *History) { w, i := lastOf(h, part, 3); spoilEvent(w, i) }},
		"watch with wrong prevKV": {WatchWrong, func(h *History) { spoilPrev(h) }},
		"watch begins too early":  {WatchDouble, func(h *History) { w, _ := lastOf(h, part, 0); w.Start = 40; w.Messages[0].Rev = 40 }},
		"progress before events":  {WatchProgress, func(h *History) { early(h) }},
		"progress before the start": {WatchProgress, func(h *History) {
			w, _ := lastOf(h, part, 0)
			w.Start, w.Messages = 1<<40, []WatchMessage{{Created: true, Rev: 5}, {Rev: 100}}
		}},
		"cancelled for no compaction": {WatchEnd, func(h *History) {
			w, _ := lastOf(h, part, 0)
			w.Messages = append(w.Messages, WatchMessage{Canceled: true, CompactRevision: 9})
		}},
		"compacted without compaction": {WrongResult, func(h *History) { o := done(h, isRead); o.Then[0].Rev = 3; o.Outcome = Compacted }},
		"lease ends early":             {LeaseEarly, func(h *History) { l := h.Leases[0]; l.Renewed = append(l.Renewed, 2*time.Second) }},
		"lease never ends": {LeaseLate, func(h *History) {
			for _, w := range h.Watches { // the last event is the lease's end
				w.Messages = slices.DeleteFunc(w.Messages, func(m WatchMessage) bool {
					return slices.ContainsFunc(m.Events, func(e Event) bool { return e.Delete && e.KV.Key == "/chaos/1/leased" }) || m.At == 3*time.Second
				})
				w.Closed = time.Minute
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			for seed := range int64(5) {
				h := simulated(seed, 300)
				c.spoil(h)
				v := Check(h, Options{Healed: 1})
				if !slices.ContainsFunc(v, func(v Violation) bool { return v.Class == c.class }) {
					t.Errorf("seed %d: no %s among %v", seed, c.class, v)
				}
			}
		})
	}
}

func spoilEvent(w *Watch, i int) {
	es := slices.Clone(w.Messages[i].Events)
	es[0].KV.Value += "x"
	es[0].KV.Version++
	w.Messages[i].Events = es
}

func spoilPrev(h *History) {
	for _, w := range h.Watches {
		for _, m := range w.Messages[len(w.Messages)/2:] {
			if w.PrevKV && len(m.Events) > 0 && m.Events[0].Prev != nil {
				other := *m.Events[0].Prev
				other.Version++
				m.Events[0].Prev = &other
				return
			}
		}
	}
}

func goBack(h *History) {
	for _, o := range h.Ops {
		o.Serializable = isRead(o)
	}
	o := done(h, isRead)
	var rep report
	l := newShardCheck(h, "system", Options{}, &rep).log
	o.Rev -= 60
	_, o.Results, _ = l.execute(o, o.Rev)
}

// early moves the notification at the end before the last event.
func early(h *History) {
	w, i := lastOf(h, func(w *Watch) bool { return !w.whole() }, 0)
	w.Messages[i], w.Messages[i+1] = w.Messages[i+1], w.Messages[i]
}

// Porcupine by itself, on the same histories.
func TestPorcupineIsNotBlind(t *testing.T) {
	for seed := range int64(5) {
		h := simulated(seed, 300)
		o := done(h, func(o *Op) bool { return isRead(o) && len(o.Results[0].KVs) > 0 })
		o.Results[0].KVs = nil // all keys forgotten
		if _, _, v := Linearizable(h, 10*time.Second); len(v) == 0 {
			t.Errorf("seed %d: a read that lost every key passed", seed)
		}
	}
}
