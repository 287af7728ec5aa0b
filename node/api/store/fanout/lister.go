package fanout

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/storage/etcd3/metrics"
)

const (
	// pageSize is how many objects of a first list are read at once: some 2 MB of pods, decoded and encoded.
	pageSize = 125
	// keepPages is how many pages are kept for those who are a little behind, while anybody walks.
	keepPages = 3
	// stalled is how long a client may leave its list unread before it loses its page and its turn.
	stalled = time.Second
	// readWithin bounds the first read of a list, which several may wait for.
	readWithin = 30 * time.Second
	// DefaultWalks is how many first lists read at once.
	DefaultWalks = 16
)

// Walks bounds how many first lists are under way.
type Walks chan struct{}

// NewWalks allows n.
func NewWalks(n int) Walks { return make(Walks, n) }

// walking counts those of all Walks.
var walking atomic.Int64

// Walking is how many first lists read in this process at the moment, which has one heap for all of them.
func Walking() int { return int(walking.Load()) }

func (w Walks) take(ctx context.Context) error {
	select {
	case w <- struct{}{}:
		walking.Add(1)
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w Walks) give() {
	walking.Add(-1)
	<-w
}

// lister reads first lists, and shares what it reads.
type lister struct {
	f *Fan

	mu      sync.Mutex // guards the rest
	walkers int
	pages   map[pageID]weak.Pointer[page]
	recent  [keepPages]*page
	next    int                 // of recent
	waiting map[string]*reading // first pages whose reading has not begun, by key
	reading map[string]bool     // keys whose first page is being read
}

// pageID names a page: what is below (or at) key, from a key on, at a revision.
type pageID struct {
	key, from string
	rev       int64
}

// page is a part of a list. It is read once, by the first who needs it.
type page struct {
	id   pageID
	once sync.Once
	err  error

	items []*event
	rev   int64
	more  bool
}

// reading is a first page that several wait for.
type reading struct {
	done chan struct{}
	page *page
}

func newLister(f *Fan) *lister {
	return &lister{f: f, pages: map[pageID]weak.Pointer[page]{}, waiting: map[string]*reading{}, reading: map[string]bool{}}
}

// read fills the page.
func (p *page) read(ctx context.Context, f *Fan) {
	opts := []clientv3.OpOption{clientv3.WithRev(p.id.rev)}
	if strings.HasSuffix(p.id.key, "/") {
		opts = append(opts, clientv3.WithRange(clientv3.GetPrefixRangeEnd(p.id.key)), clientv3.WithLimit(pageSize))
	}
	began := time.Now()
	r, err := f.cfg.Client.KV.Get(ctx, p.id.from, opts...)
	metrics.RecordEtcdRequest("list", f.cfg.Resource, err, began)
	if err != nil {
		p.err = err
		return
	}
	p.rev, p.more = r.Header.Revision, r.More
	if p.id.rev != 0 {
		p.rev = p.id.rev
	}
	p.items = make([]*event, len(r.Kvs))
	for i, kv := range r.Kvs {
		p.items[i] = listed(kv)
	}
}

// first gives the first page at a revision that is current at some moment during the call.
func (l *lister) first(ctx context.Context, key string) (*page, error) {
	l.mu.Lock()
	r := l.waiting[key]
	if r == nil {
		r = &reading{done: make(chan struct{})}
		l.waiting[key] = r
		if !l.reading[key] {
			l.reading[key] = true
			if !l.f.begin(func() { l.readFirst(key) }) {
				delete(l.waiting, key)
				l.reading[key] = false
				l.mu.Unlock()
				return nil, errEnded
			}
		}
	}
	l.mu.Unlock()
	select {
	case <-r.done:
		return r.page, r.page.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// readFirst reads the first page for all who wait, again and again until nobody does.
func (l *lister) readFirst(key string) {
	for {
		l.mu.Lock()
		r := l.waiting[key]
		if r == nil {
			delete(l.reading, key)
			l.mu.Unlock()
			return
		}
		delete(l.waiting, key)
		l.mu.Unlock()
		ctx, cancel := context.WithTimeout(l.f.life, readWithin)
		r.page = &page{id: pageID{key: key, from: key}}
		r.page.once.Do(func() { r.page.read(ctx, l.f) })
		cancel()
		if r.page.err == nil {
			r.page.id.rev = r.page.rev
			r.page = l.share(r.page)
		}
		close(r.done)
	}
}

// share remembers a page, or gives the one that is known already.
func (l *lister) share(p *page) *page {
	l.mu.Lock()
	defer l.mu.Unlock()
	if known := l.pages[p.id].Value(); known != nil {
		return known
	}
	for id, w := range l.pages {
		if w.Value() == nil {
			delete(l.pages, id)
		}
	}
	l.pages[p.id] = weak.Make(p)
	if l.walkers > 0 {
		l.recent[l.next] = p
		l.next = (l.next + 1) % keepPages
	}
	return p
}

// page gives a page at a revision.
func (l *lister) page(ctx context.Context, id pageID) (*page, error) {
	p := l.share(&page{id: id})
	p.once.Do(func() { p.read(ctx, l.f) })
	if p.err != nil && ctx.Err() == nil && errors.Is(p.err, context.Canceled) { // he who read it left
		p = &page{id: id}
		p.read(ctx, l.f)
	}
	return p, p.err
}

func (l *lister) enter() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.walkers++
}

func (l *lister) exit() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.walkers--; l.walkers == 0 {
		l.recent, l.next = [keepPages]*page{}, 0
		clear(l.pages)
	}
}

// current is the revision of the store.
func (l *lister) current(ctx context.Context) (int64, error) {
	r, err := l.f.cfg.Client.KV.Get(ctx, l.f.prefix, clientv3.WithCountOnly())
	if err != nil {
		return 0, err
	}
	return r.Header.Revision, nil
}

// walk tells a watcher all that it wants of what there is, and gives the revision of that. at is called with it first.
func (l *lister) walk(w *watcher, at func(rev int64) error) (int64, error) {
	walks := l.f.cfg.Walks
	if err := walks.take(w.ctx); err != nil {
		return 0, err
	}
	mine := true
	l.enter()
	defer func() {
		l.exit()
		if mine {
			walks.give()
		}
	}()
	p, err := l.first(w.ctx, w.key)
	if err != nil {
		return 0, err
	}
	rev := p.rev
	if err := at(rev); err != nil {
		return 0, err
	}
	id, told := pageID{w.key, w.key, rev}, 0 // of the page
	for {
		if !mine {
			if err := walks.take(w.ctx); err != nil {
				return 0, err
			}
			mine = true
		}
		if p == nil {
			if p, err = l.page(w.ctx, id); err != nil {
				return 0, listError(err)
			}
		}
		for mine && told < len(p.items) {
			if w.unwanted(p.items[told]) {
				told++
				continue
			}
			out, err := p.items[told].see(w.ctx, &w.f.coder, &w.pred, w.f.cfg.Attrs)
			if err != nil {
				return 0, err
			}
			told++
			if out == nil || w.offer(out) {
				continue
			}
			// Its client does not read: the turn and the page are others' until it does. The page is the same then, so that it is shared again.
			last := told == len(p.items) && !p.more
			p, mine = nil, false
			walks.give()
			if err := w.send(out); err != nil || last {
				return rev, err
			}
		}
		if !mine {
			continue
		}
		if !p.more {
			return rev, nil
		}
		id.from, told, p = p.items[len(p.items)-1].key+"\x00", 0, nil
	}
}

// offer sends an object of the first list, if its client takes it soon.
func (w *watcher) offer(e *watch.Event) bool {
	select {
	case w.result <- *e:
		return true
	default:
	}
	patience := time.NewTimer(stalled)
	defer patience.Stop()
	select {
	case w.result <- *e:
		return true
	case <-w.ctx.Done():
		return false // send tells why
	case <-patience.C:
		return false
	}
}

// listError tells a client whose list took too long to begin anew.
func listError(err error) error {
	if errors.Is(err, rpctypes.ErrCompacted) {
		return apierrors.NewResourceExpired(fmt.Sprintf("The list took so long that the store has forgotten the revision that it began with: %v", err))
	}
	return err
}
