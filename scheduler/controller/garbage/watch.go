package garbage

import (
	"context"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/tools/cache"
)

const (
	// rediscover is how often discovery is asked though nothing announced a change.
	rediscover = 5 * time.Minute
	// patience is how long a kind that does not answer holds up those that do.
	patience = 30 * time.Second
)

// afterChange is when discovery is asked after a change of a definition: it
// takes a while until a new kind is served.
var afterChange = []time.Duration{time.Second, 4 * time.Second, 15 * time.Second}

// sharedKinds are the kinds that the shared view holds for others already: their
// events are taken from there, which costs no further watch.
var sharedKinds = []schema.GroupVersionResource{
	{Version: "v1", Resource: "pods"},
	{Version: "v1", Resource: "services"},
	{Version: "v1", Resource: "nodes"},
	{Version: "v1", Resource: "namespaces"},
	{Group: "apps", Version: "v1", Resource: "replicasets"},
	{Group: "apps", Version: "v1", Resource: "deployments"},
	{Group: "discovery.k8s.io", Version: "v1", Resource: "endpointslices"},
}

// definitions are the kinds whose objects add and remove kinds.
var definitions = map[schema.GroupResource]bool{
	{Group: "apiextensions.k8s.io", Resource: "customresourcedefinitions"}: true,
	{Group: "apiregistration.k8s.io", Resource: "apiservices"}:             true,
}

// monitor watches one kind.
type monitor struct {
	kind   *kind
	since  time.Time
	synced func() bool
	stop   func()
}

// watches keeps one monitor for each kind that discovery offers. Only its own
// goroutine (follow) changes it; ready and mapped may be called by anybody.
type watches struct {
	c      *collector
	wg     sync.WaitGroup // of the monitors
	change chan struct{}  // a definition changed

	mu       sync.Mutex
	kinds    table                                    // guarded by mu
	monitors map[schema.GroupVersionResource]*monitor // guarded by mu
}

func newWatches(c *collector) *watches {
	return &watches{c: c, change: make(chan struct{}, 1), monitors: map[schema.GroupVersionResource]*monitor{}}
}

// follow keeps the monitors in step with discovery until ctx ends and all of
// them have ended.
func (w *watches) follow(ctx context.Context) {
	defer w.wg.Wait()
	defer w.stopAll()
	var soon []time.Duration // further questions after a change
	failures := 0
	for {
		wait := rediscover
		if w.discover(ctx) {
			failures = 0
		} else {
			wait = min(patience, time.Second<<min(failures, 5))
			failures++
		}
		if len(soon) > 0 {
			wait, soon = min(wait, soon[0]), soon[1:]
		}
		if changed := w.pause(ctx, wait); changed {
			soon = slices.Clone(afterChange[1:])
			for end := w.c.Clock.Now().Add(afterChange[0]); ctx.Err() == nil && w.pause(ctx, end.Sub(w.c.Clock.Now())); {
				continue // several changes come together
			}
		}
		if ctx.Err() != nil {
			return
		}
	}
}

// pause waits for d, for the end of ctx, or for a change, which it reports.
func (w *watches) pause(ctx context.Context, d time.Duration) bool {
	timer := w.c.Clock.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C():
		return false
	case <-w.change:
		return true
	}
}

func (w *watches) stopAll() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, m := range w.monitors {
		m.stop()
	}
}

// discover asks which kinds there are, and starts and stops monitors. It
// reports whether the answer was complete.
func (w *watches) discover(ctx context.Context) bool {
	groups, lists, err := w.c.Client.Discovery().ServerGroupsAndResources()
	if err != nil {
		w.c.Logger.Warn("discovery is incomplete; owners of unknown kinds wait", "controller", name, "err", err)
	}
	if len(lists) == 0 {
		return false
	}
	t := newTable(groups, lists)
	failed, _ := discovery.GroupDiscoveryFailedErrorGroups(err)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.kinds = t
	for gvr, m := range w.monitors {
		_, wanted := t.watched[gvr]
		if _, unknown := failed[gvr.GroupVersion()]; wanted || unknown {
			continue
		}
		m.stop()
		delete(w.monitors, gvr)
		w.c.graph.drop(m.kind)
	}
	for gvr, k := range t.watched {
		if w.monitors[gvr] == nil {
			w.monitors[gvr] = w.start(ctx, &k)
		}
	}
	return err == nil
}

func (w *watches) start(ctx context.Context, k *kind) *monitor {
	m := &monitor{kind: k, since: w.c.Clock.Now()}
	if inf := w.c.shared[k.gvr]; inf != nil {
		reg, err := inf.AddEventHandler(w.handler(k))
		if err == nil {
			// An error on removal means that the informer has stopped, with its handlers.
			m.stop = func() { _ = inf.RemoveEventHandler(reg) }
			m.synced = reg.HasSynced
			return m
		}
	}
	ctx, m.stop = context.WithCancel(ctx)
	s := &sink{w: w, kind: k}
	m.synced = s.synced.Load
	api := w.c.Metadata.Resource(k.gvr)
	lw := cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc:  func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) { return api.List(ctx, o) },
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) { return api.Watch(ctx, o) },
	}, w.c.Metadata)
	r := cache.NewReflectorWithOptions(lw, &metav1.PartialObjectMetadata{}, s, cache.ReflectorOptions{Name: "garbage/" + k.gvr.Resource})
	w.wg.Go(func() { r.RunWithContext(ctx) })
	return m
}

func (w *watches) handler(k *kind) cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc: func(obj any) {
			if o, ok := obj.(metav1.Object); ok {
				w.c.wake(w.c.graph.observe(k, o))
			}
		},
		UpdateFunc: func(old, cur any) {
			was, ok1 := old.(metav1.Object)
			is, ok2 := cur.(metav1.Object)
			if ok1 && ok2 && was.GetUID() != is.GetUID() {
				w.c.gone(was)
			}
			if ok2 {
				w.c.wake(w.c.graph.observe(k, is))
			}
		},
		DeleteFunc: func(obj any) {
			if t, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = t.Obj
			}
			if o, ok := obj.(metav1.Object); ok {
				w.c.gone(o)
			}
		},
	}
}

// ready says that every kind has been listed, or has had its time.
func (w *watches) ready() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.monitors) == 0 {
		return false
	}
	for m := range maps.Values(w.monitors) {
		if !m.synced() && w.c.Clock.Since(m.since) < patience {
			return false
		}
	}
	return true
}

// mapped finds a kind by what a reference calls it.
func (w *watches) mapped(gvk schema.GroupVersionKind) (kind, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	k, ok := w.kinds.byKind[gvk]
	return k, ok
}

func (w *watches) definitionChanged() {
	select {
	case w.change <- struct{}{}:
	default:
	}
}

// sink takes what a reflector brings into the graph, and keeps nothing itself.
type sink struct {
	w      *watches
	kind   *kind
	synced atomic.Bool
}

func (s *sink) Add(obj any) error { return s.Update(obj) }

func (s *sink) Update(obj any) error {
	if o, ok := obj.(metav1.Object); ok {
		s.w.c.wake(s.w.c.graph.observe(s.kind, o))
	}
	s.announce()
	return nil
}

func (s *sink) Delete(obj any) error {
	if o, ok := obj.(metav1.Object); ok {
		s.w.c.gone(o)
	}
	s.announce()
	return nil
}

func (s *sink) Replace(list []any, _ string) error {
	objs := make([]metav1.Object, 0, len(list))
	for _, item := range list {
		if o, ok := item.(metav1.Object); ok {
			objs = append(objs, o)
		}
	}
	s.w.c.wake(s.w.c.graph.replace(s.kind, objs))
	s.synced.Store(true)
	return nil
}

func (s *sink) Resync() error { return nil }

func (s *sink) announce() {
	if definitions[s.kind.gvr.GroupResource()] {
		s.w.definitionChanged()
	}
}
