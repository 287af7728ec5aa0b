package fanout

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/apis/example"
	"k8s.io/apiserver/pkg/storage"
)

func pod(ns, name, node string, l map[string]string) *example.Pod {
	return &example.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: l}, Spec: example.PodSpec{NodeName: node}}
}

func keyOf(ns, name string) string { return "/pods/" + ns + "/" + name }

func (s *subject) create(t testing.TB, p *example.Pod) *example.Pod {
	t.Helper()
	out := &example.Pod{}
	if err := s.Create(t.Context(), keyOf(p.Namespace, p.Name), p, out, 0); err != nil {
		t.Fatal(err)
	}
	return out
}

func (s *subject) update(t testing.TB, ns, name string, change func(*example.Pod)) *example.Pod {
	t.Helper()
	out := &example.Pod{}
	if err := s.GuaranteedUpdate(t.Context(), keyOf(ns, name), out, false, nil, storage.SimpleUpdate(func(o runtime.Object) (runtime.Object, error) {
		p := o.(*example.Pod).DeepCopy()
		change(p)
		return p, nil
	}), nil); err != nil {
		t.Fatal(err)
	}
	return out
}

func (s *subject) remove(t testing.TB, ns, name string) {
	t.Helper()
	if err := s.Delete(t.Context(), keyOf(ns, name), &example.Pod{}, nil, storage.ValidateAllObjectFunc, nil, storage.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

func selecting(field, label string) storage.SelectionPredicate {
	f, err := fields.ParseSelector(field)
	if err != nil {
		panic(err)
	}
	l, err := labels.Parse(label)
	if err != nil {
		panic(err)
	}
	return storage.SelectionPredicate{Field: f, Label: l, GetAttrs: podAttrs, IndexFields: []string{"spec.nodeName"}}
}

func (s *subject) open(t testing.TB, key, rev string, p storage.SelectionPredicate) watch.Interface {
	t.Helper()
	w, err := s.Watch(t.Context(), key, storage.ListOptions{ResourceVersion: rev, Predicate: p, Recursive: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Stop)
	return w
}

// next gives the next event in short.
func next(t testing.TB, w watch.Interface) string {
	t.Helper()
	select {
	case e, ok := <-w.ResultChan():
		if !ok {
			return "end"
		}
		return short(e)
	case <-time.After(patience):
		t.Fatal("no event")
		return ""
	}
}

func short(e watch.Event) string {
	if s, ok := e.Object.(*metav1.Status); ok {
		return fmt.Sprintf("%s %d", e.Type, s.Code)
	}
	m, err := meta.Accessor(e.Object)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%s %s@%s", e.Type, m.GetName(), m.GetResourceVersion())
}

func expect(t testing.TB, w watch.Interface, want ...string) {
	t.Helper()
	for _, x := range want {
		if got := next(t, w); got != x {
			t.Fatalf("%s, want %s", got, x)
		}
	}
}

func quiet(t testing.TB, w watch.Interface) {
	t.Helper()
	select {
	case e := <-w.ResultChan():
		t.Fatalf("unexpected %s", short(e))
	default:
	}
}

// However many watch, an event is decoded once and encoded once for each format.
func TestOneDecodeAndOneEncode(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // the collector may take what nobody holds
	s := newSubject(t, func(c *Config) { c.Attrs = podAttrs })
	first := s.create(t, pod("a", "first", "n1", nil))
	var ws []watch.Interface
	for i := range 40 {
		p := storage.Everything
		if i%2 == 0 {
			p = selecting("spec.nodeName=n1", "")
		}
		ws = append(ws, s.open(t, "/pods/", first.ResourceVersion, p))
	}
	other := s.open(t, "/pods/other/", first.ResourceVersion, storage.Everything)
	await(t, func() bool { return subscribed(s) == 41 })
	before := s.transformer.decoded.Load()
	p := s.create(t, pod("a", "x", "n1", nil))
	encodes := map[string]int{}
	for _, w := range ws {
		e := <-w.ResultChan()
		for _, format := range []string{"json", "protobuf"} {
			var b bytes.Buffer
			if err := e.Object.(runtime.CacheableObject).CacheEncode(runtime.Identifier(format), func(o runtime.Object, w io.Writer) error {
				encodes[format]++
				_, err := fmt.Fprint(w, format, o.(*example.Pod).Name)
				return err
			}, &b); err != nil || b.String() != format+"x" {
				t.Fatal(b.String(), err)
			}
		}
	}
	if n := s.transformer.decoded.Load() - before; n != 1 {
		t.Errorf("decoded %d times", n)
	}
	if encodes["json"] != 1 || encodes["protobuf"] != 1 {
		t.Errorf("encoded %v times", encodes)
	}
	// Nobody is concerned: not even decoded.
	before = s.transformer.decoded.Load()
	for _, w := range ws {
		w.Stop()
	}
	await(t, func() bool { return subscribed(s) == 1 })
	s.update(t, "a", "x", func(p *example.Pod) { p.Spec.Hostname = "h" })
	reads := s.transformer.decoded.Load() - before // of the update itself
	y := s.create(t, pod("other", "y", "", nil))
	expect(t, other, "ADDED y@"+y.ResourceVersion)
	if n := s.transformer.decoded.Load() - before - reads; n != 1 {
		t.Errorf("an event that concerns nobody, and one that does, were decoded %d times", n)
	}
	_ = p
}

// subscribed counts the watchers of the hub.
func subscribed(s *subject) (n int) {
	s.mu.Lock()
	h := s.hub
	s.mu.Unlock()
	if h == nil {
		return 0
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for range h.watchers {
		n++
	}
	return n
}

func await(t testing.TB, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("not in time")
		}
	}
}

// An event wakes those alone whom it may concern: pods move between nodes, namespaces are apart.
func TestIndex(t *testing.T) {
	s := newSubject(t, func(c *Config) { c.Attrs = podAttrs })
	rev := s.create(t, pod("z", "zero", "", nil)).ResourceVersion
	n1 := s.open(t, "/pods/", rev, selecting("spec.nodeName=n1", ""))
	n2 := s.open(t, "/pods/", rev, selecting("spec.nodeName=n2", ""))
	none := s.open(t, "/pods/", rev, selecting("spec.nodeName=", ""))
	inA := s.open(t, "/pods/a/", rev, storage.Everything)
	n1inB := s.open(t, "/pods/b/", rev, selecting("spec.nodeName=n1", ""))
	one, err := s.Watch(t.Context(), "/pods/a/x", storage.ListOptions{ResourceVersion: rev, Predicate: selecting("metadata.name=x", "")})
	if err != nil {
		t.Fatal(err)
	}
	defer one.Stop()
	await(t, func() bool { return subscribed(s) == 6 })
	x := s.create(t, pod("a", "x", "", nil)).ResourceVersion
	for _, w := range []watch.Interface{none, inA, one} {
		expect(t, w, "ADDED x@"+x)
	}
	x = s.update(t, "a", "x", func(p *example.Pod) { p.Spec.NodeName = "n1" }).ResourceVersion
	expect(t, none, "DELETED x@"+x)
	expect(t, n1, "ADDED x@"+x)
	expect(t, inA, "MODIFIED x@"+x)
	x = s.update(t, "a", "x", func(p *example.Pod) { p.Spec.NodeName = "n2" }).ResourceVersion
	expect(t, n1, "DELETED x@"+x)
	expect(t, n2, "ADDED x@"+x)
	y := s.create(t, pod("b", "y", "n1", nil)).ResourceVersion
	expect(t, n1, "ADDED y@"+y)
	expect(t, n1inB, "ADDED y@"+y)
	s.remove(t, "a", "x")
	if got := next(t, n2); got[:9] != "DELETED x" {
		t.Error(got)
	}
	for _, w := range []watch.Interface{n1, n2, none, n1inB} {
		quiet(t, w)
	}
	// What is not pushed costs nothing: the queue of a watcher of another node stays empty.
	s.mu.Lock()
	h := s.hub
	s.mu.Unlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := len(h.scopes[s.prefix].byVal); n != 3 || h.byNode.Load() != 4 {
		t.Errorf("%d values, %d watchers in the index", n, h.byNode.Load())
	}
}

// A watcher whose client does not read is ended, and nobody waits for it.
func TestSlowWatcherIsEnded(t *testing.T) {
	s := newSubject(t, nil)
	rev := s.create(t, pod("a", "x", "", nil)).ResourceVersion
	slow := s.open(t, "/pods/", rev, storage.Everything)
	fast := s.open(t, "/pods/", rev, storage.Everything)
	await(t, func() bool { return subscribed(s) == 2 })
	const changes = maxBehind + ahead + 50
	var last string
	for i := range changes {
		last = s.update(t, "a", "x", func(p *example.Pod) { p.Spec.Hostname = fmt.Sprint(i) }).ResourceVersion
		expect(t, fast, "MODIFIED x@"+last)
	}
	await(t, func() bool { return subscribed(s) == 1 })
	n, resume := 0, ""
	for e := range slow.ResultChan() {
		m, _ := meta.Accessor(e.Object)
		n, resume = n+1, m.GetResourceVersion()
	}
	if n == 0 || n > maxBehind+ahead+2 {
		t.Errorf("it got %d events", n)
	}
	// It misses nothing when it comes again, though what it missed is more than is remembered here.
	s.forget(1 << 40)
	again := s.open(t, "/pods/", resume, storage.Everything)
	for range changes - n {
		if got := next(t, again); got[:8] != "MODIFIED" {
			t.Fatal(got)
		}
	}
	quiet(t, again)
}

// One who comes back goes on where it was: from what is remembered, from the store, or not at all if that has forgotten.
func TestResume(t *testing.T) {
	s := newSubject(t, func(c *Config) { c.Linger = time.Hour })
	x := s.create(t, pod("a", "x", "", nil)).ResourceVersion
	w := s.open(t, "/pods/", x, storage.Everything)
	y := s.create(t, pod("a", "y", "", nil)).ResourceVersion
	z := s.create(t, pod("b", "z", "", nil)).ResourceVersion
	expect(t, w, "ADDED y@"+y, "ADDED z@"+z)
	w.Stop()
	s.recorder.GetReadsAndReset()
	expect(t, s.open(t, "/pods/", x, storage.Everything), "ADDED y@"+y, "ADDED z@"+z)
	expect(t, s.open(t, "/pods/b/", x, storage.Everything), "ADDED z@"+z)
	expect(t, s.open(t, "/pods/", y, storage.Everything), "ADDED z@"+z)
	if n := s.recorder.GetReadsAndReset(); n != 0 {
		t.Errorf("%d reads of the store", n)
	}
	s.forget(1 << 40)
	var rev int64
	fmt.Sscan(z, &rev)
	s.mu.Lock()
	s.hub.mu.Lock()
	s.hub.begin = rev
	s.hub.mu.Unlock()
	s.mu.Unlock()
	fromStore := s.open(t, "/pods/", x, storage.Everything)
	ofB := s.open(t, "/pods/b/", x, storage.Everything)
	ofC := s.open(t, "/pods/c/", x, storage.Everything) // nothing tells it that it has caught up but the store's progress
	expect(t, fromStore, "ADDED y@"+y, "ADDED z@"+z)
	expect(t, ofB, "ADDED z@"+z)
	c := s.create(t, pod("c", "c", "", nil)).ResourceVersion
	expect(t, fromStore, "ADDED c@"+c)
	expect(t, ofC, "ADDED c@"+c)
	s.compact(t.Context(), t, z)
	expect(t, s.open(t, "/pods/", x, storage.Everything), "ERROR 410", "end")
	d := s.create(t, pod("c", "d", "", nil)).ResourceVersion
	expect(t, fromStore, "ADDED d@"+d)
	quiet(t, ofB)
}

// Those who list at once share pages; one who does not read loses its page, and gets all the same.
func TestFirstLists(t *testing.T) {
	s := newSubject(t, func(c *Config) { c.Walks = NewWalks(2) })
	const n = 2*pageSize + 7
	for i := range n {
		s.create(t, pod("a", fmt.Sprintf("p%05d", i), fmt.Sprint("n", i%3), nil))
	}
	yes := true
	opts := storage.ListOptions{Predicate: selecting("", ""), Recursive: true, SendInitialEvents: &yes}
	opts.Predicate.AllowWatchBookmarks = true
	var ws []watch.Interface
	for range 6 {
		w, err := s.Watch(t.Context(), "/pods/", opts)
		if err != nil {
			t.Fatal(err)
		}
		defer w.Stop()
		ws = append(ws, w)
	}
	// The first two do not read for a while: the others must not wait for them forever.
	for _, w := range []watch.Interface{ws[2], ws[3], ws[4], ws[5], ws[1], ws[0]} {
		for i := range n {
			e := <-w.ResultChan()
			if m, err := meta.Accessor(e.Object); err != nil || e.Type != watch.Added || m.GetName() != fmt.Sprintf("p%05d", i) {
				t.Fatalf("event %d: %s", i, short(e))
			}
		}
		e := <-w.ResultChan()
		if ok, err := storage.HasInitialEventsEndBookmarkAnnotation(e.Object); err != nil || !ok || e.Type != watch.Bookmark {
			t.Fatalf("no end of the initial events but %s", short(e))
		}
	}
	if len(s.cfg.Walks) != 0 {
		t.Errorf("%d turns are still taken", len(s.cfg.Walks))
	}
	s.lister.mu.Lock()
	defer s.lister.mu.Unlock()
	if s.lister.walkers != 0 || len(s.lister.pages) != 0 || s.lister.recent[0] != nil {
		t.Error("pages are kept after the last list")
	}
}

func TestBookmarks(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct{ deadline, want time.Duration }{
		"no end":         {0, time.Minute},
		"far":            {time.Hour, time.Minute},
		"before the end": {30 * time.Second, 28 * time.Second},
		"too late":       {2 * time.Second, 0},
	} {
		var deadline, want time.Time
		if c.deadline != 0 {
			deadline = now.Add(c.deadline)
		}
		if c.want != 0 {
			want = now.Add(c.want)
		}
		if got := nextBookmark(now, deadline, time.Minute); !got.Equal(want) {
			t.Errorf("%s: in %s", name, got.Sub(now))
		}
	}
	s := newSubject(t, func(c *Config) { c.BookmarkEvery = 300 * time.Millisecond })
	rev := s.create(t, pod("a", "x", "", nil)).ResourceVersion
	p := storage.Everything
	p.AllowWatchBookmarks = true
	w := s.open(t, "/pods/", rev, p)
	// Writes elsewhere move the store on; a bookmark tells, though no event of this resource does.
	put, err := s.client.Put(t.Context(), "/elsewhere", "x")
	if err != nil {
		t.Fatal(err)
	}
	await(t, func() bool { return next(t, w) == fmt.Sprintf("BOOKMARK @%d", put.Header.Revision) })
}

// A Fan that is closed ends its watches; one whose store is lost does after a while, and says nothing wrong before.
func TestEnds(t *testing.T) {
	s := newSubject(t, func(c *Config) { c.Patience = time.Millisecond })
	rev := s.create(t, pod("a", "x", "", nil)).ResourceVersion
	w := s.open(t, "/pods/", rev, storage.Everything)
	await(t, func() bool { return subscribed(s) == 1 })
	s.Close()
	expect(t, w, "end")
	if _, err := s.Watch(t.Context(), "/pods/", storage.ListOptions{ResourceVersion: rev, Predicate: storage.Everything, Recursive: true}); err == nil {
		t.Error("a watch of a closed Fan")
	}
}

func TestConfigReportsAllFaults(t *testing.T) {
	_, err := New(context.Background(), Config{ResourcePrefix: "pods", Linger: -1, Index: storage.IndexerFuncs{"a": nil, "b": nil}})
	var joined interface{ Unwrap() []error }
	if !errors.As(err, &joined) || len(joined.Unwrap()) != 8 {
		t.Error(err)
	}
}

// One event is told to many watchers at once, events that follow each other to a few at a time, and neither to so many that others wait for long.
func TestRoused(t *testing.T) {
	for _, c := range []struct {
		asleep, processors int
		pressed            bool
		want               int
	}{
		{0, 2, false, 0}, {1, 2, false, 1}, {1, 2, true, 1}, {32, 2, true, 32}, {33, 2, false, 33}, {200, 2, false, 128}, {33, 2, true, 32}, {200, 2, true, 32},
		{800, 2, true, 100}, {5000, 2, true, 128}, {5000, 2, false, 128}, {200, 8, true, 128}, {5000, 8, false, 512},
	} {
		if got := roused(c.asleep, c.processors, c.pressed); got != c.want {
			t.Errorf("of %d with %d processors, pressed: %v: %d, want %d", c.asleep, c.processors, c.pressed, got, c.want)
		}
	}
}
