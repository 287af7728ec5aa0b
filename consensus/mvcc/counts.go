package mvcc

import (
	"bytes"
	"slices"
	"sort"
	"strings"
	"sync"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/pkg/v3/traceutil"
	"go.etcd.io/etcd/server/v3/lease"
	etcdmvcc "go.etcd.io/etcd/server/v3/storage/mvcc"
)

// The answer to a range with a limit says how many keys there are without it. Etcd visits all of them for that in each page, which of 10,000
// keys takes longer than reading 500; k8s.io/apiserver asks for pages a lot. So what has been counted is remembered with its revision, and so are the
// keys that have come and gone since: their sum is the count at any revision from then on. Where to stop visiting, of which etcd's index has
// no notion but the end of a range, some keys tell that were seen before: fences. These need not exist any more, and whatever they
// are, all between them is visited, so they cannot make an answer wrong.

const (
	// fenceGap is how many keys are between two fences at least when the second one is made.
	fenceGap = 256
	// maxFences of ranges with one end; behind these they are forgotten.
	maxFences = 1024
	// maxEnds bounds the ends of ranges that have fences.
	maxEnds = 64
	// worth is how many keys a range has whose count is remembered.
	worth = 2 * fenceGap
	// maxCounts bounds what is remembered: a list of 50,000 keys in pages of 500.
	maxCounts = 128
	// maxTurnover is how many keys that came and went are remembered at least, once that has begun. 50 bytes each, besides keys that are gone; up to twice as many.
	maxTurnover = 1024
)

// span is a range of keys.
type span struct{ key, end string }

// count is how many keys a span has at a revision.
type count struct {
	rev  int64
	n    int
	used uint64
}

// turn is a key that came (1) or went (-1).
type turn struct {
	rev int64
	key []byte
	by  int
}

// counts is what a store remembers of ranges. Its methods that take an index are called while a transaction of the store is open, which keeps it.
type counts struct {
	mu     sync.Mutex // guards all
	index  keyIndex   // of which the rest is: a store that is restored has another one
	last   int64      // revision of the last transaction that wrote something
	known  map[span]*count
	clock  uint64
	since  int64  // turnover is complete behind this revision
	turns  []turn // by revision
	fences map[string][]string
}

// of makes sure that what is remembered is of an index. The caller has the lock.
func (c *counts) of(index keyIndex) {
	if c.index != index {
		c.index, c.last, c.known, c.since, c.turns, c.fences = index, 0, nil, 0, nil, nil
	}
}

// wrote is told what a transaction has changed, before anybody else sees it.
func (c *counts) wrote(index keyIndex, rev int64, changes []mvccpb.KeyValue) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.of(index)
	c.last = rev
	if c.known == nil {
		return
	}
	for _, kv := range changes {
		switch {
		case kv.CreateRevision == 0: // a tombstone
			c.turns = append(c.turns, turn{rev, kv.Key, -1})
		case kv.Version == 1:
			c.turns = append(c.turns, turn{rev, kv.Key, 1})
		}
	}
	if n := len(c.turns); n >= 2*maxTurnover {
		drop := n - maxTurnover
		c.since = c.turns[drop-1].rev
		c.turns = slices.Delete(c.turns, 0, drop)
	}
}

// at tells how many keys a span has at a revision, if that is known.
func (c *counts) at(index keyIndex, s span, rev int64) (int, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.of(index)
	k := c.known[s]
	if k == nil {
		return 0, false
	}
	c.clock++
	k.used = c.clock
	if k.rev == rev {
		return k.n, true
	}
	from, to, sign := k.rev, rev, 1
	if from > to {
		from, to, sign = to, from, -1
	}
	if from < c.since {
		return 0, false
	}
	n := k.n
	for i := sort.Search(len(c.turns), func(i int) bool { return c.turns[i].rev > from }); i < len(c.turns) && c.turns[i].rev <= to; i++ {
		if t := &c.turns[i]; string(t.key) >= s.key && string(t.key) < s.end {
			n += sign * t.by
		}
	}
	if rev > k.rev {
		k.rev, k.n = rev, n
	}
	return n, true
}

// learn remembers how many keys a span has at a revision, which is not newer than the store's, current.
func (c *counts) learn(index keyIndex, s span, rev, current int64, n int) {
	if n < worth {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.of(index)
	if c.known == nil {
		// The transaction under way may have told of itself already.
		c.known, c.since = map[span]*count{}, max(current, c.last)
	}
	c.clock++
	if k := c.known[s]; k != nil && k.rev > rev && k.rev >= c.since {
		k.used = c.clock
		return
	}
	if len(c.known) >= maxCounts && c.known[s] == nil {
		var oldest span
		least := c.clock
		for s, k := range c.known {
			if k.used < least {
				oldest, least = s, k.used
			}
		}
		delete(c.known, oldest)
	}
	c.known[s] = &count{rev, n, c.clock}
}

// fence gives the next one behind a key in ranges with an end; the end if there is none.
func (c *counts) fence(index keyIndex, key, end []byte) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.of(index)
	f := c.fences[string(end)]
	if i := sort.Search(len(f), func(i int) bool { return f[i] > string(key) }); i < len(f) {
		return []byte(f[i])
	}
	return end
}

// putFence makes a key one.
func (c *counts) putFence(index keyIndex, key, end []byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.of(index)
	if c.fences == nil || c.fences[string(end)] == nil && len(c.fences) >= maxEnds {
		c.fences = map[string][]string{}
	}
	f := c.fences[string(end)]
	if len(f) >= maxFences {
		f = nil
	}
	if i, there := slices.BinarySearchFunc(f, key, func(s string, k []byte) int { return strings.Compare(s, string(k)) }); !there {
		f = slices.Insert(f, i, string(key))
	}
	c.fences[string(end)] = f
}

// visited is what a visit of the index has seen of a range.
type visited struct {
	revs []etcdmvcc.Revision // of the first keys, as many as were asked for
	// total is how many keys there are, negative if not all have been seen: those up to stop, and how many these are.
	total, seen int
	stop        []byte
	// posts are revisions of keys that would be good fences.
	posts []etcdmvcc.Revision
}

// visit sees at least the first limit keys of a range, of those at a revision.
func (c *counts) visit(index keyIndex, key, end []byte, rev int64, limit int) (v visited) {
	v.total = -1
	for at := key; ; at = v.stop {
		v.stop = c.fence(index, at, end)
		want := limit - len(v.revs)
		found, n := index.Revisions(at, v.stop, rev, max(want, fenceGap))
		if n > 3*fenceGap {
			v.posts = append(v.posts, found[len(found)-1])
		}
		v.seen += n
		if found = found[:min(want, len(found))]; v.revs == nil {
			v.revs = found
		} else {
			v.revs = append(v.revs, found...)
		}
		if bytes.Equal(v.stop, end) {
			v.total = v.seen
			return v
		}
		if len(v.revs) == limit {
			return v
		}
	}
}

// counted is the store, whose writes the counts are told of.
type counted struct {
	etcdmvcc.WatchableKV
	counts *counts
	index  func() keyIndex
}

// Write implements mvcc.KV.
func (k counted) Write(trace *traceutil.Trace) etcdmvcc.TxnWrite {
	return &countedWrite{k.WatchableKV.Write(trace), k}
}

// Put implements mvcc.WriteView.
func (k counted) Put(key, value []byte, l lease.LeaseID) int64 {
	w := k.Write(traceutil.TODO())
	defer w.End()
	return w.Put(key, value, l)
}

// DeleteRange implements mvcc.WriteView.
func (k counted) DeleteRange(key, end []byte) (n, rev int64) {
	w := k.Write(traceutil.TODO())
	defer w.End()
	return w.DeleteRange(key, end)
}

type countedWrite struct {
	etcdmvcc.TxnWrite
	k counted
}

// End implements mvcc.TxnRead.
func (w *countedWrite) End() {
	if changes := w.Changes(); len(changes) > 0 {
		w.k.counts.wrote(w.k.index(), w.Rev()+1, changes)
	}
	w.TxnWrite.End()
}
