package fanout

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"k8s.io/apiserver/pkg/storage/etcd3/metrics"
)

const (
	// retryEvery is the pause between attempts to watch a store that has no leader.
	retryEvery = 200 * time.Millisecond
	// progressWait is how long bookmarks that are due wait for the store to tell its revision.
	progressWait = 100 * time.Millisecond
	// Watchers are woken a few at a time, with a pause after them, breath: a thousand watchers with something to tell are a thousand goroutines in front of each step
	// of anybody's request. For each processor that is rousedAtMost of them while there is one event to tell. While events follow each other closely it is
	// rousedAtOnce, or an eighth of all, if that is more: the others get several events at once then, which costs less.
	rousedAtOnce, rousedAtMost = 16, 64
	breath                     = 2 * time.Millisecond
)

// hub watches all keys of a resource and hands each event to the watchers whom it may concern.
type hub struct {
	f      *Fan
	ctx    context.Context
	stop   context.CancelFunc
	byNode atomic.Int64 // watchers that are found by the index

	mu sync.Mutex // guards the rest
	// pos: everything up to this revision has been handed out. begin: of everything after this revision, history has it.
	pos, begin int64
	history    []*event // the oldest first
	kept       int      // bytes of history
	scopes     map[string]*scope
	asleep     []*watcher  // that have something to tell, and will be woken in this order
	rousing    bool        // soon
	pressed    bool        // another event came before all had been woken
	due        *time.Timer // of the next bookmarks; nil when nobody wants any
	dueAt      time.Time
	ended      bool
}

// scope are the watchers of one key, or of all keys below one that ends in a slash.
type scope struct {
	all   map[*watcher]struct{}
	byVal map[string]map[*watcher]struct{}
}

func newHub(f *Fan, rev int64) *hub {
	h := &hub{f: f, pos: rev, begin: rev, scopes: map[string]*scope{}}
	h.ctx, h.stop = context.WithCancel(f.life)
	return h
}

// over tells whether the hub will not hand out anything more.
func (h *hub) over() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ended || h.ctx.Err() != nil
}

// run watches the store until the hub is stopped or the store is out of reach for too long. Then it ends all watchers.
func (h *hub) run() {
	var lost time.Time
	for h.ctx.Err() == nil {
		err := h.watch(func() { lost = time.Time{} })
		if h.ctx.Err() != nil || h.f.cfg.Client.Ctx().Err() != nil {
			break
		}
		if errors.Is(err, errNoPrevious) {
			h.f.cfg.Logger.Warn("watches end", "resource", h.f.cfg.Resource, "err", err)
			break
		}
		if lost.IsZero() {
			lost = time.Now()
		}
		if time.Since(lost) > h.f.cfg.Patience {
			h.f.cfg.Logger.Warn("watches end: the store cannot be watched", "resource", h.f.cfg.Resource, "err", err)
			break
		}
		select {
		case <-h.ctx.Done():
		case <-time.After(retryEvery):
		}
	}
	h.finish(nil)
}

// finish ends all watchers, with an error for them to see or without.
func (h *hub) finish(err error) {
	h.stop()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ended = true
	if h.due != nil {
		h.due.Stop()
	}
	for w := range h.watchers {
		w.finish(err)
	}
	h.scopes, h.history = nil, nil
}

// watchers goes over all. The caller has the lock.
func (h *hub) watchers(yield func(*watcher) bool) {
	for _, s := range h.scopes {
		for w := range s.all {
			if !yield(w) {
				return
			}
		}
		for _, ws := range s.byVal {
			for w := range ws {
				if !yield(w) {
					return
				}
			}
		}
	}
}

// watch goes on from where the hub is, until the store ends the watch.
func (h *hub) watch(well func()) error {
	ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(h.ctx))
	defer cancel()
	h.mu.Lock()
	from := h.pos + 1
	h.mu.Unlock()
	for r := range h.f.cfg.Client.Watch(ctx, h.f.prefix, clientv3.WithPrefix(), clientv3.WithRev(from), clientv3.WithPrevKV(), clientv3.WithCreatedNotify()) {
		if r.CompactRevision != 0 {
			h.compacted(r.CompactRevision)
			return nil
		}
		if err := r.Err(); err != nil {
			return err
		}
		well()
		if r.IsProgressNotify() {
			h.advance(r.Header.Revision)
			continue
		}
		for _, e := range r.Events {
			metrics.RecordEtcdEvent(h.f.cfg.Resource)
			ev, err := newEvent(e)
			if err != nil {
				return err
			}
			h.dispatch(ev)
		}
	}
	return ctx.Err()
}

// compacted goes on behind a gap: the store has forgotten the changes before rev. Who needs them is told so.
func (h *hub) compacted(rev int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if rev-1 <= h.pos {
		return
	}
	for w := range h.watchers {
		if w.after < rev-1 {
			w.finish(rpctypes.ErrCompacted)
		}
	}
	h.pos, h.begin, h.history, h.kept = rev-1, rev-1, nil, 0
}

func (h *hub) advance(rev int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pos = max(h.pos, rev)
}

// values are those of the indexed field before and after a change; all = they cannot be told, so it may concern everybody.
func (h *hub) values(e *event) (vals []string, objects [2]*object, all bool) {
	if h.byNode.Load() == 0 || !h.concerns(e.key) {
		return nil, objects, true
	}
	for i, load := range []func(context.Context, *coder) (*object, error){e.current, e.before} {
		if i == 0 && e.deleted || i == 1 && e.created {
			continue
		}
		v, ok := h.f.peek(h.ctx, e.key, [][]byte{e.value, e.previous}[i])
		if !ok {
			o, err := load(h.ctx, &h.f.coder)
			if err != nil {
				return nil, objects, true // each of them finds out
			}
			inner, err := o.decoded()
			if err != nil {
				return nil, objects, true
			}
			objects[i] = o
			v = h.f.index(inner)
		}
		if len(vals) == 0 || vals[0] != v {
			vals = append(vals, v)
		}
	}
	return vals, objects, false
}

// concerns tells whether anybody watches the key.
func (h *hub) concerns(key string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	for range h.of(key) {
		return true
	}
	return false
}

// of gives the scopes that a key is in. The caller has the lock.
func (h *hub) of(key string) func(func(*scope) bool) {
	return func(yield func(*scope) bool) {
		if s := h.scopes[key]; s != nil && !yield(s) {
			return
		}
		for i := len(h.f.prefix) - 1; i < len(key); i++ {
			if key[i] != '/' {
				continue
			}
			if s := h.scopes[key[:i+1]]; s != nil && !yield(s) {
				return
			}
		}
	}
}

// dispatch hands an event out. Events come one after the other.
func (h *hub) dispatch(e *event) {
	vals, objects, all := h.values(e)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.pos = e.rev
	h.pressed = h.pressed || h.rousing
	h.remember(e)
	for s := range h.of(e.key) {
		for w := range s.all {
			h.push(w, e)
		}
		if all {
			for _, ws := range s.byVal {
				for w := range ws {
					h.push(w, e)
				}
			}
			continue
		}
		for _, v := range vals {
			for w := range s.byVal[v] {
				h.push(w, e)
			}
		}
	}
	h.rouse()
	_ = objects // decoded objects stay until here, for the first who gets the event
}

// push queues an event for a watcher; rouse wakes it. The caller has the lock.
func (h *hub) push(w *watcher, e *event) {
	first, ok := w.push(e)
	switch {
	case !ok:
		h.drop(w)
	case first:
		h.asleep = append(h.asleep, w)
	}
}

// roused is how many of those who are asleep are woken at once.
func roused(asleep, processors int, pressed bool) int {
	n := rousedAtMost * processors
	if pressed {
		n = min(n, max(rousedAtOnce*processors, asleep/8))
	}
	return min(asleep, n)
}

// rouse wakes those who have something to tell, a few at a time. The caller has the lock.
func (h *hub) rouse() {
	if h.rousing {
		return
	}
	n := roused(len(h.asleep), runtime.GOMAXPROCS(0), h.pressed)
	for i, w := range h.asleep[:n] {
		h.asleep[i] = nil
		w.notify()
	}
	if h.asleep = h.asleep[n:]; len(h.asleep) == 0 {
		h.asleep, h.pressed = nil, false
		return
	}
	h.rousing = true
	time.AfterFunc(breath, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.rousing = false
		h.rouse()
	})
}

func (h *hub) remember(e *event) {
	h.history = append(h.history, e)
	h.kept += e.size()
	n := 0
	for h.kept > h.f.cfg.History && n < len(h.history) {
		h.kept -= h.history[n].size()
		h.begin = h.history[n].rev
		h.history[n] = nil
		n++
	}
	h.history = h.history[n:]
}

// subscribe begins to hand events after a revision to a watcher, first those of the history; false when that does not reach back far enough.
func (h *hub) subscribe(w *watcher, after int64) (ok, alive bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended {
		return false, false
	}
	if after < h.begin {
		return false, true
	}
	w.after = after
	for _, e := range h.history {
		if e.rev <= after || !w.covers(e.key) {
			continue
		}
		if _, ok := w.push(e); !ok {
			return true, true // it has been ended
		}
		w.notify()
	}
	s := h.scopes[w.key]
	if s == nil {
		s = &scope{all: map[*watcher]struct{}{}, byVal: map[string]map[*watcher]struct{}{}}
		h.scopes[w.key] = s
	}
	if !w.indexed {
		s.all[w] = struct{}{}
	} else {
		if s.byVal[w.value] == nil {
			s.byVal[w.value] = map[*watcher]struct{}{}
		}
		s.byVal[w.value][w] = struct{}{}
		h.byNode.Add(1)
	}
	h.schedule(w, time.Now())
	return true, true
}

func (h *hub) unsubscribe(w *watcher) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.drop(w)
}

// drop forgets a watcher. The caller has the lock.
func (h *hub) drop(w *watcher) {
	s := h.scopes[w.key]
	if s == nil {
		return
	}
	if !w.indexed {
		delete(s.all, w)
	} else if _, there := s.byVal[w.value][w]; there {
		h.byNode.Add(-1)
		delete(s.byVal[w.value], w)
		if len(s.byVal[w.value]) == 0 {
			delete(s.byVal, w.value)
		}
	}
	if len(s.all) == 0 && len(s.byVal) == 0 {
		delete(h.scopes, w.key)
	}
}

// schedule sets when a watcher gets its next bookmark. The caller has the lock.
func (h *hub) schedule(w *watcher, now time.Time) {
	if !w.bookmarks {
		return
	}
	w.nextBookmark = nextBookmark(now, w.deadline, h.f.cfg.BookmarkEvery)
	if !w.nextBookmark.IsZero() {
		h.wake(w.nextBookmark, now)
	}
}

// wake makes the timer fire at t at the latest. The caller has the lock.
func (h *hub) wake(t, now time.Time) {
	switch {
	case h.due == nil:
		h.due = time.AfterFunc(t.Sub(now), h.progress)
	case h.dueAt.IsZero() || t.Before(h.dueAt):
		h.due.Reset(t.Sub(now))
	default:
		return
	}
	h.dueAt = t
}

// beforeEnd is how long before the end of a watch its last bookmark is sent; upstream's.
const beforeEnd = 2 * time.Second

// nextBookmark is when a bookmark is due after now; zero for never again.
func nextBookmark(now, deadline time.Time, every time.Duration) time.Time {
	next := now.Add(every)
	if last := deadline.Add(-beforeEnd); !deadline.IsZero() && last.Before(next) {
		next = last
	}
	if !next.After(now) {
		return time.Time{}
	}
	return next
}

// progress runs when bookmarks are due: it has the store tell its revision, which the events of this resource alone may not show, and
// sends them a moment later.
func (h *hub) progress() {
	h.f.begin(func() {
		_ = h.f.cfg.Client.RequestProgress(clientv3.WithRequireLeader(h.ctx)) // without an answer the bookmark tells an older revision
		select {
		case <-h.ctx.Done():
			return
		case <-time.After(progressWait):
		}
		h.bookmark(time.Now())
	})
}

// bookmark sends those that are due. Some that are due very soon go with them, so that the timer does not fire for each.
func (h *hub) bookmark(now time.Time) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended {
		return
	}
	h.dueAt = time.Time{}
	soon := now.Add(h.f.cfg.BookmarkEvery / 60)
	for w := range h.watchers {
		if !w.bookmarks || w.nextBookmark.IsZero() {
			continue
		}
		if w.nextBookmark.Before(soon) {
			h.push(w, &event{bookmark: true, rev: max(h.pos, w.after)})
			h.schedule(w, now)
			continue
		}
		h.wake(w.nextBookmark, now)
	}
	h.rouse()
}
