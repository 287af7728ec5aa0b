package api

import (
	"context"
	"fmt"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// podFeed tells the node authorizer's graph about bound pods without keeping them, as the informer
// that it stands in for would do (4 to 6 KB a pod). What it keeps is a fingerprint of each.
//
// It is a coreinformers.PodInformer for node.AddGraphEventHandlers and the store of the reflector
// that Feed drives.
type podFeed struct {
	cache.SharedIndexInformer // nil: the graph calls AddEventHandler only

	client  kubernetes.Interface
	handler cache.ResourceEventHandler // set before Feed
	synced  chan struct{}              // closed after the first complete list

	mu   sync.Mutex // guards seen
	seen map[types.NamespacedName]fingerprint
}

// fingerprint tells whether the graph has to look at a pod again: all else that it reads of a pod
// cannot change.
type fingerprint struct {
	uid       types.UID
	node      string
	ephemeral int
	claims    string
}

var (
	_ coreinformers.PodInformer              = podInformer{}
	_ cache.ReflectorStore                   = (*podFeed)(nil)
	_ cache.TransformingStore                = (*podFeed)(nil)
	_ cache.ResourceEventHandlerRegistration = (*podFeed)(nil)
)

// podInformer has the one method of a pod informer that the graph calls.
type podInformer struct {
	coreinformers.PodInformer // nil
	feed                      *podFeed
}

func (i podInformer) Informer() cache.SharedIndexInformer { return i.feed }

func newPodFeed(client kubernetes.Interface) *podFeed {
	return &podFeed{client: client, synced: make(chan struct{}), seen: map[types.NamespacedName]fingerprint{}}
}

// AddEventHandler is called once, by the graph.
func (f *podFeed) AddEventHandler(h cache.ResourceEventHandler) (cache.ResourceEventHandlerRegistration, error) {
	f.handler = h
	return f, nil
}

// HasSynced tells whether the graph knows all pods that were there at the start.
func (f *podFeed) HasSynced() bool {
	select {
	case <-f.synced:
		return true
	default:
		return false
	}
}

// HasSyncedChecker is HasSynced as a channel.
func (f *podFeed) HasSyncedChecker() cache.DoneChecker { return feedSynced{f} }

type feedSynced struct{ feed *podFeed }

func (feedSynced) Name() string            { return "node-authorizer-pods" }
func (s feedSynced) Done() <-chan struct{} { return s.feed.synced }

// Feed tells the graph about pods until ctx ends.
func (f *podFeed) Feed(ctx context.Context) {
	bound := func(o *metav1.ListOptions) { o.FieldSelector = "spec.nodeName!=" }
	lw := cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			bound(&o)
			return f.client.CoreV1().Pods("").List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			bound(&o)
			return f.client.CoreV1().Pods("").Watch(ctx, o)
		},
	}, f.client)
	cache.NewNamedReflector("node-authorizer-pods", lw, &corev1.Pod{}, f, 0).RunWithContext(ctx)
}

// Transformer drops what the graph does not read while a list is being collected.
func (f *podFeed) Transformer() cache.TransformFunc {
	return func(o any) (any, error) {
		if p, ok := o.(*corev1.Pod); ok {
			p.ManagedFields, p.Labels = nil, nil
			p.Status = corev1.PodStatus{ResourceClaimStatuses: p.Status.ResourceClaimStatuses, ExtendedResourceClaimStatus: p.Status.ExtendedResourceClaimStatus}
		}
		return o, nil
	}
}

func fingerprintOf(p *corev1.Pod) fingerprint {
	f := fingerprint{uid: p.UID, node: p.Spec.NodeName, ephemeral: len(p.Spec.EphemeralContainers)}
	for _, s := range p.Status.ResourceClaimStatuses {
		f.claims += s.Name + "="
		if s.ResourceClaimName != nil {
			f.claims += *s.ResourceClaimName
		}
		f.claims += ","
	}
	if e := p.Status.ExtendedResourceClaimStatus; e != nil {
		f.claims += e.ResourceClaimName
	}
	return f
}

// Add implements cache.ReflectorStore.
func (f *podFeed) Add(o any) error {
	p, ok := o.(*corev1.Pod)
	if !ok {
		return fmt.Errorf("a %T among the pods", o)
	}
	key, now := types.NamespacedName{Namespace: p.Namespace, Name: p.Name}, fingerprintOf(p)
	f.mu.Lock()
	before, known := f.seen[key]
	f.seen[key] = now
	f.mu.Unlock()
	if !known || before != now {
		f.handler.OnAdd(p, false)
	}
	return nil
}

// Update implements cache.ReflectorStore.
func (f *podFeed) Update(o any) error { return f.Add(o) }

// Delete implements cache.ReflectorStore.
func (f *podFeed) Delete(o any) error {
	p, ok := o.(*corev1.Pod)
	if !ok {
		return fmt.Errorf("a %T among the pods", o)
	}
	f.drop(types.NamespacedName{Namespace: p.Namespace, Name: p.Name})
	return nil
}

func (f *podFeed) drop(key types.NamespacedName) {
	f.mu.Lock()
	before := f.seen[key]
	delete(f.seen, key)
	f.mu.Unlock()
	// The graph needs no more than this of a pod that has gone.
	gone := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: key.Namespace, Name: key.Name}, Spec: corev1.PodSpec{NodeName: before.node}}
	f.handler.OnDelete(gone)
}

// Replace implements cache.ReflectorStore.
func (f *podFeed) Replace(list []any, _ string) error {
	now := make(map[types.NamespacedName]bool, len(list))
	for _, o := range list {
		if p, ok := o.(*corev1.Pod); ok {
			now[types.NamespacedName{Namespace: p.Namespace, Name: p.Name}] = true
		}
		if err := f.Add(o); err != nil {
			return err
		}
	}
	f.mu.Lock()
	var gone []types.NamespacedName
	for key := range f.seen {
		if !now[key] {
			gone = append(gone, key)
		}
	}
	f.mu.Unlock()
	for _, key := range gone {
		f.drop(key)
	}
	if !f.HasSynced() {
		close(f.synced) // the reflector is the only caller
	}
	return nil
}

// Resync implements cache.ReflectorStore.
func (f *podFeed) Resync() error { return nil }
