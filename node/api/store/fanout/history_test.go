package fanout

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/apis/example"
	"k8s.io/apiserver/pkg/storage"
)

// history is what really happened, as a plain watch of the store tells it.
type history struct {
	mu      sync.Mutex
	changes []change
}

type change struct {
	rev       int64
	key       string
	cur, prev *example.Pod // nil: not there
}

func record(t *testing.T, s *subject) *history {
	h := &history{}
	w, err := s.raw.Watch(t.Context(), "/pods/", storage.ListOptions{ResourceVersion: "1", Predicate: storage.Everything, Recursive: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Stop)
	go func() {
		state := map[string]*example.Pod{}
		for e := range w.ResultChan() {
			if e.Type == watch.Bookmark { // whoever asks for progress has the store tell all of its client's watches
				continue
			}
			p := e.Object.(*example.Pod)
			key := "/pods/" + p.Namespace + "/" + p.Name
			rev, _ := strconv.ParseInt(p.ResourceVersion, 10, 64)
			c := change{rev: rev, key: key, prev: state[key]}
			delete(state, key)
			if e.Type != watch.Deleted {
				c.cur, state[key] = p, p
			}
			h.mu.Lock()
			h.changes = append(h.changes, c)
			h.mu.Unlock()
		}
	}()
	return h
}

func (h *history) last() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.changes) == 0 {
		return 0
	}
	return h.changes[len(h.changes)-1].rev
}

// told is what a watch of a prefix tells from a revision on: first all that there is then, if initial, and the changes after it.
func (h *history) told(prefix string, p storage.SelectionPredicate, from int64, initial bool) (out []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	selected := func(o *example.Pod) bool {
		if o == nil {
			return false
		}
		ok, err := p.Matches(o)
		return ok && err == nil
	}
	state := map[string]*example.Pod{}
	changes := h.changes
	for len(changes) > 0 && changes[0].rev <= from {
		if state[changes[0].key] = changes[0].cur; changes[0].cur == nil {
			delete(state, changes[0].key)
		}
		changes = changes[1:]
	}
	if initial {
		for _, k := range slices.Sorted(maps.Keys(state)) {
			if strings.HasPrefix(k, prefix) && selected(state[k]) {
				out = append(out, fmt.Sprintf("ADDED %s@%s", state[k].Name, state[k].ResourceVersion))
			}
		}
	}
	for _, c := range changes {
		now, was := selected(c.cur), selected(c.prev)
		if !strings.HasPrefix(c.key, prefix) || !now && !was {
			continue
		}
		kind, o := "MODIFIED", c.cur
		switch {
		case !was:
			kind = "ADDED"
		case !now:
			kind, o = "DELETED", c.prev
		}
		out = append(out, fmt.Sprintf("%s %s@%d", kind, o.Name, c.rev))
	}
	return out
}

// act changes something at random.
func act(t *testing.T, r *rand.Rand, s *subject) {
	ns, name := string('a'+rune(r.IntN(3))), fmt.Sprint("p", r.IntN(12))
	key := keyOf(ns, name)
	if r.IntN(5) == 0 {
		_ = s.Delete(t.Context(), key, &example.Pod{}, nil, storage.ValidateAllObjectFunc, nil, storage.DeleteOptions{}) // it may not be there
		return
	}
	err := s.GuaranteedUpdate(t.Context(), key, &example.Pod{}, true, nil, storage.SimpleUpdate(func(o runtime.Object) (runtime.Object, error) {
		p := o.(*example.Pod).DeepCopy()
		p.Namespace, p.Name = ns, name
		p.Labels = map[string]string{"l": fmt.Sprint(r.IntN(2))}
		p.Spec.NodeName = []string{"", "n1", "n2"}[r.IntN(3)]
		p.Spec.Hostname = fmt.Sprint(r.Int())
		return p, nil
	}), nil)
	if err != nil && t.Context().Err() == nil {
		t.Error(err)
	}
}

// watching is one client: it watches something, is slow at times, leaves and comes back where it was.
type watching struct {
	prefix  string
	pred    storage.SelectionPredicate
	initial bool
	from    int64 // -1: not known yet
	got     []string
	seen    int64
	expired bool
}

// follow watches until ctx ends, and again from where it was when the watch is ended.
func (c *watching) follow(ctx context.Context, r *rand.Rand, s *subject) error {
	yes := true
	for first := true; ctx.Err() == nil; first = false {
		o := storage.ListOptions{Predicate: c.pred, Recursive: true, ResourceVersion: fmt.Sprint(c.seen)}
		if first && c.initial {
			o.ResourceVersion, o.SendInitialEvents = "", &yes
		}
		stay, leave := context.WithTimeout(ctx, time.Duration(50+r.IntN(400))*time.Millisecond)
		if first && c.initial { // a list that is left in its middle cannot be gone on with
			leave()
			stay, leave = context.WithCancel(ctx)
		}
		w, err := s.Fan.Watch(stay, c.prefix, o)
		if err != nil {
			leave()
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		err = c.read(stay, r, w, leave)
		w.Stop()
		leave()
		if err != nil || c.expired {
			return err
		}
	}
	return nil
}

func (c *watching) read(ctx context.Context, r *rand.Rand, w watch.Interface, leave func()) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case e, ok := <-w.ResultChan():
			if !ok {
				return nil
			}
			if e.Type == watch.Error {
				if got := short(e); got != "ERROR 410" {
					return fmt.Errorf("after %d: %s: %v", c.seen, got, e.Object)
				}
				c.expired = true
				return nil
			}
			m, err := meta.Accessor(e.Object)
			if err != nil {
				return err
			}
			rev, _ := strconv.ParseInt(m.GetResourceVersion(), 10, 64)
			if e.Type == watch.Bookmark {
				if c.from < 0 {
					c.from = rev
					time.AfterFunc(time.Duration(r.IntN(200))*time.Millisecond, leave)
				}
				if rev < c.seen && c.initial == false {
					return fmt.Errorf("a bookmark goes back from %d to %d", c.seen, rev)
				}
				c.seen = max(c.seen, rev)
				continue
			}
			c.got = append(c.got, short(e))
			if c.from >= 0 && rev <= c.seen {
				return fmt.Errorf("%s came after %d", short(e), c.seen)
			}
			if c.from >= 0 {
				c.seen = rev
			}
			if r.IntN(50) == 0 {
				time.Sleep(time.Duration(r.IntN(20)) * time.Millisecond)
			}
		}
	}
}

// Whatever clients do, each is told exactly what happened to what it watches.
func TestRandomHistories(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	for round := range 3 {
		t.Run(fmt.Sprint("seed=", seed+uint64(round)), func(t *testing.T) { randomHistory(t, seed+uint64(round)) })
	}
}

func randomHistory(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 1))
	s := newSubject(t, func(c *Config) {
		c.BookmarkEvery, c.Linger = 100*time.Millisecond, time.Duration(r.IntN(200))*time.Millisecond
		c.History = 1 + r.IntN(20000)
		if r.IntN(2) == 0 {
			c.Attrs = podAttrs
		}
	})
	h := record(t, s)
	for range 30 {
		act(t, r, s)
	}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var wg sync.WaitGroup
	var clients []*watching
	errs := make(chan error, 100)
	join := func() {
		p := selecting([]string{"", "", "spec.nodeName=n1", "spec.nodeName=", "spec.nodeName!=n2"}[r.IntN(5)], []string{"", "", "l=1"}[r.IntN(3)])
		if p.Field.String() == "" {
			p.Field = fields.Everything()
		}
		p.AllowWatchBookmarks = true
		c := &watching{prefix: []string{"/pods/", "/pods/a/", "/pods/b/"}[r.IntN(3)], pred: p, initial: r.IntN(2) == 0, from: -1}
		if !c.initial {
			c.from = max(2, h.last()-int64(r.IntN(60)))
			c.seen = c.from
		}
		clients = append(clients, c)
		own := rand.New(rand.NewPCG(seed, uint64(len(clients))+1))
		wg.Go(func() {
			if err := c.follow(ctx, own, s); err != nil {
				errs <- fmt.Errorf("client of %s, %v: %w", c.prefix, c.pred, err)
			}
		})
	}
	compacted := int64(0)
	for i := range 600 {
		if i%20 == 0 {
			join()
		}
		if i == 300 {
			compacted = h.last() - 20
			if _, err := s.client.Compact(t.Context(), compacted); err != nil {
				t.Fatal(err)
			}
		}
		act(t, r, s)
	}
	final, err := s.client.KV.Get(t.Context(), "x")
	if err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { return h.last() == final.Header.Revision })
	time.Sleep(500 * time.Millisecond) // what comes now comes too late, or twice
	stop()
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	complete := 0
	for i, c := range clients {
		if c.from < 0 {
			t.Errorf("client %d never got its list", i)
			continue
		}
		want := h.told(c.prefix, c.pred, c.from, c.initial)
		if c.expired {
			if c.seen >= compacted {
				t.Errorf("client %d was told that %d is forgotten; compacted was %d", i, c.seen, compacted)
			}
			want = want[:min(len(want), len(c.got))]
		} else {
			complete++
		}
		if !slices.Equal(c.got, want) {
			n := 0
			for n < min(len(c.got), len(want)) && c.got[n] == want[n] {
				n++
			}
			t.Errorf("client %d (%s, %v %v, initial %v, from %d): %d events, want %d; different from the %dth on: %q, want %q",
				i, c.prefix, c.pred.Field, c.pred.Label, c.initial, c.from, len(c.got), len(want), n, c.got[n:min(n+3, len(c.got))], want[n:min(n+3, len(want))])
		}
	}
	if complete < 20 {
		t.Errorf("only %d clients came to the end", complete)
	}
}
