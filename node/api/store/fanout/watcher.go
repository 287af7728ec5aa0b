package fanout

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/storage"
	utilflowcontrol "k8s.io/apiserver/pkg/util/flowcontrol"
)

const (
	// maxBehind is how many events a watcher may leave unread before it is ended: more than the deletion of a large collection
	// makes while its client is busy for a second.
	maxBehind = 2000
	// ahead is how many results wait for the one who reads them.
	ahead = 16
)

// watcher is one watch.
type watcher struct {
	f         *Fan
	ctx       context.Context
	cancel    context.CancelFunc
	key       string // or prefix, with a slash at its end
	start     int64  // resourceVersion asked for
	initial   bool   // begin with what there is
	mark      bool   // say so when that is over
	pred      storage.SelectionPredicate
	indexed   bool // found by
	value     string
	wanted    []fields.Requirement // of the indexed field
	bookmarks bool
	deadline  time.Time
	result    chan watch.Event

	// after is the revision up to which everything had been told when it subscribed. The hub's lock guards it and nextBookmark.
	after        int64
	nextBookmark time.Time

	mu    sync.Mutex // guards the rest
	queue []*event
	over  bool // nothing more will be queued
	err   error
	wake  chan struct{}
}

func newWatcher(ctx context.Context, f *Fan, key string, rev int64, o storage.ListOptions) *watcher {
	w := &watcher{f: f, key: key, start: rev, pred: o.Predicate, result: make(chan watch.Event, ahead), wake: make(chan struct{}, 1)}
	w.initial = rev == 0 && o.SendInitialEvents == nil || o.SendInitialEvents != nil && *o.SendInitialEvents
	w.bookmarks = o.Predicate.AllowWatchBookmarks
	w.mark = o.SendInitialEvents != nil && *o.SendInitialEvents && w.bookmarks
	w.deadline, _ = ctx.Deadline()
	w.ctx, w.cancel = context.WithCancel(ctx)
	if f.index != nil && o.Recursive && o.Predicate.Field != nil {
		w.value, w.indexed = o.Predicate.Field.RequiresExactMatch(f.field)
		for _, r := range o.Predicate.Field.Requirements() {
			if r.Field == f.field {
				w.wanted = append(w.wanted, r)
			}
		}
	}
	return w
}

// ResultChan implements watch.Interface.
func (w *watcher) ResultChan() <-chan watch.Event { return w.result }

// Stop implements watch.Interface.
func (w *watcher) Stop() { w.cancel() }

// covers tells whether a key is watched.
func (w *watcher) covers(key string) bool {
	return key == w.key || strings.HasSuffix(w.key, "/") && strings.HasPrefix(key, w.key)
}

// unwanted tells whether an object that there is can be seen not to be selected without decoding it.
func (w *watcher) unwanted(e *event) bool {
	if len(w.wanted) == 0 {
		return false
	}
	v, ok := w.f.peek(w.ctx, e.key, e.value)
	return ok && slices.ContainsFunc(w.wanted, func(r fields.Requirement) bool {
		return r.Operator == selection.NotEquals && v == r.Value || (r.Operator == selection.Equals || r.Operator == selection.DoubleEquals) && v != r.Value
	})
}

// push queues an event; first = there was none, so the watcher has to be woken. ok = false when it is so far behind that it ends.
func (w *watcher) push(e *event) (first, ok bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.over:
		return false, false
	case len(w.queue) >= maxBehind:
		w.over, w.queue = true, nil
		w.f.cfg.Logger.Info("a watch ends: its client does not read", "resource", w.f.cfg.Resource, "key", w.key, "behind", maxBehind)
		w.notify()
		return false, false
	}
	w.queue = append(w.queue, e)
	return len(w.queue) == 1, true
}

// finish ends the watcher when it has told what is queued.
func (w *watcher) finish(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.over {
		w.over, w.err = true, err
	}
	w.notify()
}

func (w *watcher) notify() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// take gives what is queued; over = nothing comes after it.
func (w *watcher) take() (queue []*event, over bool, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	queue, w.queue = w.queue, nil
	return queue, w.over, w.err
}

// errEnded ends a watch without a word.
var errEnded = errors.New("the watch has ended")

func (w *watcher) run() {
	defer close(w.result)
	defer w.cancel()
	defer context.AfterFunc(w.f.life, w.cancel)()
	if err := w.serve(); err != nil && !errors.Is(err, errEnded) && w.ctx.Err() == nil {
		w.send(&watch.Event{Type: watch.Error, Object: status(w.f.cfg.Explain(err))})
	}
}

func (w *watcher) serve() error {
	after := w.start
	var h *hub
	join := func(rev int64) bool {
		ok := true
		if h == nil {
			h, ok = w.f.join(rev)
		}
		return ok
	}
	defer func() {
		if h != nil {
			w.f.leave(h)
		}
	}()
	if w.initial {
		// The hub's history begins with the list at the latest.
		rev, err := w.f.lister.walk(w, func(rev int64) error {
			if rev < w.start {
				return storage.NewTooLargeResourceVersionError(uint64(w.start), uint64(rev), int(wait.Jitter(time.Second, 3).Seconds()))
			}
			if !join(rev) {
				return errEnded
			}
			return nil
		})
		if err != nil {
			return err
		}
		after = rev
		if w.mark {
			if err := w.sendBookmark(rev, true); err != nil {
				return err
			}
		}
	}
	utilflowcontrol.WatchInitialized(w.ctx)
	if !join(after) {
		return errEnded
	}
	if err := w.subscribe(h, after); err != nil {
		return err
	}
	defer h.unsubscribe(w)
	return w.follow()
}

// follow tells what the hub hands out.
func (w *watcher) follow() error {
	for {
		select {
		case <-w.ctx.Done():
			return w.ctx.Err()
		case <-w.wake:
		}
		queue, over, err := w.take()
		for i, e := range queue {
			queue[i] = nil
			if err := w.tell(e); err != nil {
				return err
			}
		}
		if over && err == nil {
			err = errEnded
		}
		if over {
			return err
		}
	}
}

// tell sends what an event means for this watch, if anything.
func (w *watcher) tell(e *event) error {
	if e.bookmark {
		return w.sendBookmark(e.rev, false)
	}
	if e.rev <= w.after {
		return nil
	}
	out, err := e.see(w.ctx, &w.f.coder, &w.pred, w.f.cfg.Attrs)
	if err != nil || out == nil {
		return err
	}
	return w.send(out)
}

func (w *watcher) send(e *watch.Event) error {
	select {
	case w.result <- *e:
		return nil
	case <-w.ctx.Done():
		return w.ctx.Err()
	}
}

func (w *watcher) sendBookmark(rev int64, initial bool) error {
	o := w.f.cfg.New()
	if err := w.f.Versioner().UpdateObject(o, uint64(rev)); err != nil {
		return err
	}
	if initial {
		if err := storage.AnnotateInitialEventsEndBookmark(o); err != nil {
			return err
		}
	}
	return w.send(&watch.Event{Type: watch.Bookmark, Object: o})
}

// status is what the client sees of an error; the texts are upstream's.
func status(err error) *metav1.Status {
	var known apierrors.APIStatus
	switch {
	case errors.Is(err, rpctypes.ErrCompacted):
		err = apierrors.NewResourceExpired("The resourceVersion for the provided watch is too old.")
	case errors.As(err, &known):
		s := known.Status()
		return &s
	default:
		err = apierrors.NewInternalError(err)
	}
	if errors.As(err, &known) {
		s := known.Status()
		return &s
	}
	return &metav1.Status{Status: metav1.StatusFailure, Code: http.StatusInternalServerError, Message: err.Error()}
}
