package history

import (
	"cmp"
	"maps"
	"slices"
	"sort"
	"strings"
)

// version of a key: what it was from a revision on. nil: it did not exist.
type version struct {
	rev int64
	kv  *KV
}

// Log is the one order of all writes of a shard, and the states in between.
type Log struct {
	events map[int64][]Event // by revision, in order
	keys   map[string][]version
	names  []string // of keys, sorted
	last   int64
}

// firstRevision is that of an empty store.
const firstRevision = 1

// buildLog replays the events, checking that each continues what was before.
func buildLog(events map[int64][]Event, r *report) *Log {
	l := &Log{events: events, keys: map[string][]version{}, last: firstRevision}
	for rev := range events {
		l.last = max(l.last, rev)
	}
	for rev := int64(firstRevision + 1); rev <= l.last; rev++ {
		es, ok := events[rev]
		if !ok {
			r.add(LogGap, "no watch has seen revision %d of %d", rev, l.last)
			continue
		}
		for _, e := range es {
			l.replay(rev, e, r)
		}
	}
	l.names = slices.Sorted(maps.Keys(l.keys))
	return l
}

func (l *Log) replay(rev int64, e Event, r *report) {
	key := e.KV.Key
	old := l.at(key, rev)
	if e.Delete {
		if old == nil {
			r.add(WatchWrong, "revision %d deletes %q, which does not exist", rev, key)
		}
		l.keys[key] = append(l.keys[key], version{rev, nil})
		return
	}
	want := KV{Key: key, Value: e.KV.Value, Create: rev, Mod: rev, Version: 1, Lease: e.KV.Lease}
	if old != nil {
		want.Create, want.Version = old.Create, old.Version+1
	}
	if e.KV != want {
		r.add(WatchWrong, "revision %d: event %+v, want %+v", rev, e.KV, want)
	}
	l.keys[key] = append(l.keys[key], version{rev, &want})
}

// at returns a key as of a revision.
func (l *Log) at(key string, rev int64) *KV {
	vs := l.keys[key]
	i := sort.Search(len(vs), func(i int) bool { return vs[i].rev > rev })
	if i == 0 {
		return nil
	}
	return vs[i-1].kv
}

// inRange tells whether a key is meant, as etcd's ranges do.
func inRange(k, key, end string) bool {
	switch end {
	case "":
		return k == key
	case "\x00":
		return k >= key
	}
	return k >= key && k < end
}

// view is the state that a transaction works on: that of a revision, and its own
// changes.
type view struct {
	l     *Log
	rev   int64
	own   map[string]*KV
	order []Event
}

func (v *view) get(key string) *KV {
	if kv, ok := v.own[key]; ok {
		return kv
	}
	return v.l.at(key, v.rev)
}

func (v *view) find(key, end string) (out []KV) {
	add := func(k string) {
		if kv := v.get(k); kv != nil && inRange(k, key, end) {
			out = append(out, *kv)
		}
	}
	if end == "" {
		add(key)
		return out
	}
	i, _ := slices.BinarySearch(v.l.names, key)
	for _, k := range v.l.names[i:] {
		if !inRange(k, key, end) {
			break
		}
		add(k)
	}
	for k := range v.own {
		if _, known := v.l.keys[k]; !known {
			add(k)
		}
	}
	slices.SortFunc(out, func(a, b KV) int { return strings.Compare(a.Key, b.Key) })
	return out
}

// execute runs a request on the state of revision rev, as the write that makes
// revision rev+1.
func (l *Log) execute(o *Op, rev int64) (succeeded bool, results []StepResult, events []Event) {
	v := &view{l: l, rev: rev, own: map[string]*KV{}}
	succeeded = true
	for _, c := range o.If {
		if !v.holds(c) {
			succeeded = false
		}
	}
	steps := o.Then
	if !succeeded {
		steps = o.Else
	}
	for _, s := range steps {
		results = append(results, v.step(s))
	}
	return succeeded, results, v.order
}

func (v *view) holds(c Cmp) bool {
	kv := v.get(c.Key)
	if kv == nil {
		if c.Target == Value {
			return false // etcd: a missing key equals no value
		}
		kv = &KV{}
	}
	switch c.Target {
	case ModRevision:
		return kv.Mod == c.Number
	case CreateRevision:
		return kv.Create == c.Number
	case Version:
		return kv.Version == c.Number
	default:
		return kv.Value == c.Text
	}
}

func (v *view) step(s Step) (res StepResult) {
	switch s.Kind {
	case Range:
		from := v
		if s.Rev != 0 {
			from = &view{l: v.l, rev: s.Rev}
		}
		res.KVs = from.find(s.Key, s.End)
	case Put:
		old := v.get(s.Key)
		kv := KV{Key: s.Key, Value: s.Value, Create: v.rev + 1, Mod: v.rev + 1, Version: 1, Lease: s.Lease}
		if old != nil {
			kv.Create, kv.Version = old.Create, old.Version+1
			if s.PrevKV {
				res.KVs = []KV{*old}
			}
		}
		v.own[s.Key] = &kv
		v.order = append(v.order, Event{KV: kv})
	case Delete:
		hit := v.find(s.Key, s.End)
		res.Deleted = int64(len(hit))
		if s.PrevKV {
			res.KVs = hit
		}
		for _, kv := range hit {
			v.own[kv.Key] = nil
			v.order = append(v.order, Event{Delete: true, KV: KV{Key: kv.Key, Mod: v.rev + 1}})
		}
	}
	return res
}

// sameEvents compares without regard to Prev.
func sameEvents(a, b []Event) bool {
	return slices.EqualFunc(a, b, func(x, y Event) bool { return x.Delete == y.Delete && x.KV == y.KV })
}

func sameResults(a, b []StepResult) bool {
	return slices.EqualFunc(a, b, func(x, y StepResult) bool { return x.Deleted == y.Deleted && slices.Equal(x.KVs, y.KVs) })
}

// revisions that the log holds, in order.
func (l *Log) revisions() []int64 {
	return slices.SortedFunc(maps.Keys(l.events), cmp.Compare)
}
