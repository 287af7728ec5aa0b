package desired

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

// object is what all stored kinds have in common.
type object interface {
	metav1.Object
	runtime.Object
	Marshal() ([]byte, error)
	Unmarshal([]byte) error
}

// table holds the objects of one kind. It is a cache.ReflectorStore: the reflector calls Replace only after a successful
// list, which is what keeps a failing API from deleting anything.
type table struct {
	s    *Store
	kind Kind
	make func() object
	// items by namespace/name; nil: the API said that there is none. Guarded by s.mu.
	items map[string]held
	// synced: a list succeeded in this process. Guarded by s.mu.
	synced bool
	// open counts watches. Guarded by s.mu.
	open int
}

func newTable(s *Store, kind Kind, mk func() object) *table {
	return &table{s: s, kind: kind, make: mk, items: map[string]held{}}
}

func key(o object) string {
	if ns := o.GetNamespace(); ns != "" {
		return ns + "/" + o.GetName()
	}
	return o.GetName()
}

func same(a, b held) bool {
	return a != nil && b != nil && a.GetUID() == b.GetUID() && a.GetResourceVersion() == b.GetResourceVersion() && a.GetResourceVersion() != ""
}

func (t *table) put(o object) bool {
	k := key(o)
	if same(t.items[k], o) {
		return false
	}
	t.s.strip(o) // a reflector does that with a streamed first list only
	t.items[k] = t.s.keep(o)
	t.s.changed(t.kind, k)
	return true
}

// Add implements cache.ReflectorStore.
func (t *table) Add(v any) error {
	o, ok := v.(object)
	if !ok {
		return fmt.Errorf("%s: unexpected %T", t.kind, v)
	}
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	t.put(o)
	return nil
}

// Update implements cache.ReflectorStore.
func (t *table) Update(v any) error { return t.Add(v) }

// Delete implements cache.ReflectorStore.
func (t *table) Delete(v any) error {
	o, ok := v.(object)
	if !ok {
		return fmt.Errorf("%s: unexpected %T", t.kind, v)
	}
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	k := key(o)
	if t.items[k] != nil {
		delete(t.items, k)
		t.s.changed(t.kind, k)
	}
	return nil
}

// Replace implements cache.ReflectorStore.
func (t *table) Replace(vs []any, _ string) error {
	objs, err := objects(t.kind, vs)
	if err != nil {
		return err
	}
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	for k := range t.items {
		if objs[k] == nil {
			delete(t.items, k)
			t.s.changed(t.kind, k)
		}
	}
	for _, o := range objs {
		t.put(o)
	}
	if !t.synced {
		t.synced = true
		t.s.changed(t.kind)
	}
	return nil
}

// Resync implements cache.ReflectorStore.
func (t *table) Resync() error { return nil }

func objects(kind Kind, vs []any) (map[string]object, error) {
	out := make(map[string]object, len(vs))
	for _, v := range vs {
		o, ok := v.(object)
		if !ok {
			return nil, fmt.Errorf("%s: unexpected %T", kind, v)
		}
		out[key(o)] = o
	}
	return out, nil
}

// single is the part of a table that one single-object watch feeds.
type single struct {
	*table
	key string
}

// Delete notes that the object does not exist.
func (t single) Delete(any) error { return t.Replace(nil, "") }

// Replace notes the object, or that there is none.
func (t single) Replace(vs []any, _ string) error {
	objs, err := objects(t.kind, vs)
	if err != nil {
		return err
	}
	t.s.mu.Lock()
	defer t.s.mu.Unlock()
	if o := objs[t.key]; o != nil {
		t.put(o)
		return nil
	}
	if old, known := t.items[t.key]; old != nil || !known {
		t.items[t.key] = nil
		t.s.changed(t.kind, t.key)
	}
	return nil
}

// Transformer drops what nobody on a node reads, while a first list is collected.
func (t *table) Transformer() cache.TransformFunc {
	return func(v any) (any, error) {
		if o, ok := v.(object); ok {
			t.s.strip(o)
		}
		return v, nil
	}
}

// strip drops it from an object that is the store's alone.
func (s *Store) strip(o object) {
	o.SetManagedFields(nil)
	if n, ok := o.(*corev1.Node); ok {
		s.slim(n)
	}
}

// slim keeps of another node where it is, its labels and its pods' range: a cluster has thousands, and each node holds them all.
func (s *Store) slim(n *corev1.Node) {
	n.Status.Images = nil
	if n.Name == s.self {
		return
	}
	n.Annotations = nil
	n.Spec = corev1.NodeSpec{PodCIDR: n.Spec.PodCIDR}
	n.Status = corev1.NodeStatus{Addresses: n.Status.Addresses}
}

// is says which node this is: its own Node is held as it is.
func (s *Store) is(self string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.self = self
	if h := s.nodes.items[self]; h != nil {
		s.nodes.items[self] = whole(h)
	}
}

// reflectBackoff bounds how long a node takes to notice that the API is back. It asks its own local endpoint, so frequent
// attempts cost nothing elsewhere.
func reflectBackoff() *wait.Backoff {
	return &wait.Backoff{Duration: 200 * time.Millisecond, Cap: 5 * time.Second, Factor: 2, Jitter: 0.2, Steps: 10}
}

// Run feeds the store from the API until ctx ends, and writes changes to the disk. An unreachable API is no error: Run goes
// on trying. It returns when all its goroutines have ended; the last changes are then on the disk.
func (s *Store) Run(ctx context.Context, client kubernetes.Interface, nodeName string) error {
	if err := s.claim(nodeName); err != nil {
		return fmt.Errorf("desired state of node %s: %w", nodeName, err)
	}
	s.is(nodeName)
	var wg sync.WaitGroup
	log := logr.FromSlogHandler(demoted{s.log.Handler()})
	ctx = klog.NewContext(ctx, log)
	reflect := func(ctx context.Context, name string, store cache.ReflectorStore, expected runtime.Object, lw *cache.ListWatch) {
		r := cache.NewReflectorWithOptions(cache.ToListWatcherWithWatchListSemantics(lw, client), expected, store,
			cache.ReflectorOptions{Name: name, Backoff: reflectBackoff(), Logger: &log})
		r.RunWithContext(ctx)
	}
	own := fields.OneTermEqualSelector("spec.nodeName", nodeName).String()
	core, disc := client.CoreV1(), client.DiscoveryV1()
	wg.Go(func() { s.runFlusher(ctx) })
	wg.Go(func() {
		reflect(ctx, "pods", s.pods, &corev1.Pod{}, listWatch(s.pods, own, core.Pods("").List, core.Pods("").Watch))
	})
	wg.Go(func() {
		reflect(ctx, "services", s.services, &corev1.Service{}, listWatch(s.services, "", core.Services("").List, core.Services("").Watch))
	})
	wg.Go(func() {
		reflect(ctx, "endpointslices", s.slices, &discoveryv1.EndpointSlice{}, listWatch(s.slices, "", disc.EndpointSlices("").List, disc.EndpointSlices("").Watch))
	})
	wg.Go(func() {
		reflect(ctx, "nodes", s.nodes, &corev1.Node{}, listWatch(s.nodes, "", core.Nodes().List, core.Nodes().Watch))
	})
	wg.Go(func() { s.followClaims(ctx, client) })
	wg.Go(func() {
		s.followRefs(ctx, func(ctx context.Context, r Ref) {
			sel := fields.OneTermEqualSelector("metadata.name", r.Name).String()
			k := r.Namespace + "/" + r.Name
			if r.Kind == Secrets {
				c := core.Secrets(r.Namespace)
				reflect(ctx, "secret "+k, single{s.secrets, k}, &corev1.Secret{}, listWatch(s.secrets, sel, c.List, c.Watch))
				return
			}
			c := core.ConfigMaps(r.Namespace)
			reflect(ctx, "configmap "+k, single{s.configmaps, k}, &corev1.ConfigMap{}, listWatch(s.configmaps, sel, c.List, c.Watch))
		})
	})
	wg.Wait()
	return s.Flush()
}

// demoted makes debug output of all that the reflectors report: an error at every attempt while the API is unreachable.
type demoted struct{ slog.Handler }

func (d demoted) Enabled(ctx context.Context, _ slog.Level) bool {
	return d.Handler.Enabled(ctx, slog.LevelDebug)
}

func (d demoted) Handle(ctx context.Context, r slog.Record) error {
	r.Level = slog.LevelDebug
	return d.Handler.Handle(ctx, r)
}

func (d demoted) WithAttrs(as []slog.Attr) slog.Handler { return demoted{d.Handler.WithAttrs(as)} }
func (d demoted) WithGroup(name string) slog.Handler    { return demoted{d.Handler.WithGroup(name)} }

func listWatch[L runtime.Object](t *table, selector string, list func(context.Context, metav1.ListOptions) (L, error),
	start func(context.Context, metav1.ListOptions) (watch.Interface, error)) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			o.FieldSelector = selector
			return list(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			o.FieldSelector = selector
			w, err := start(ctx, o)
			if err != nil {
				return nil, err
			}
			return t.counted(w), nil
		},
	}
}

// followRefs keeps one watch for every ConfigMap and Secret that this node's pods refer to, and forgets those that no pod
// refers to any longer.
func (s *Store) followRefs(ctx context.Context, follow func(context.Context, Ref)) {
	changes, cancel := s.Subscribe(Pods)
	defer cancel()
	var watches followers[Ref]
	defer watches.end()
	for {
		want := map[Ref]bool{}
		for _, p := range s.Pods() {
			for _, r := range Refs(p) {
				want[r] = true
			}
		}
		watches.keep(func(r Ref) bool { return want[r] })
		for r := range want {
			watches.start(ctx, r, func(ctx context.Context) { follow(ctx, r) })
		}
		s.forgetUnwanted(want)
		select {
		case <-ctx.Done():
			return
		case <-changes:
		}
	}
}

// forgetUnwanted drops objects that no pod refers to. Before the pods' first list the store is as the last run left it, so
// nothing that is still needed goes.
func (s *Store) forgetUnwanted(want map[Ref]bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range []*table{s.configmaps, s.secrets} {
		for k := range t.items {
			if !want[refOf(t.kind, k)] {
				delete(t.items, k)
				s.changed(t.kind, k)
			}
		}
	}
}
