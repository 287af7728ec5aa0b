package api

import (
	"context"
	"crypto/sha256"
	"fmt"
	"slices"
	"strconv"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/component-helpers/storage/ephemeral"
	"k8s.io/dynamic-resource-allocation/resourceclaim"
	podutil "k8s.io/kubernetes/pkg/api/v1/pod"
	"k8s.io/kubernetes/pkg/auth/nodeidentifier"
)

// podFeed tells the node authorizer's graph about bound pods without keeping them, as the informer that it stands in for would do (4 to 6 KB
// a pod). To the graph pods are alike that are on one node and refer to the same objects, such as the replicas of a workload: it is told of
// one that stands for all of them, by a name that no pod can have. In the graph a pod takes half a KB, here some 30 bytes. Whether a pod
// is on a node, the only thing that the graph would be asked about a pod by name, is answered by authorize.
//
// It is a coreinformers.PodInformer for node.AddGraphEventHandlers and the store of the reflector that Feed drives.
type podFeed struct {
	cache.SharedIndexInformer // nil: the graph calls AddEventHandler only

	client  kubernetes.Interface
	named   bool                       // the graph is told of all pods, by their names: authorize is not asked
	handler cache.ResourceEventHandler // set before Feed
	synced  chan struct{}              // closed after the first complete list

	buf []byte // of the only goroutine that feeds

	mu     sync.RWMutex      // guards the rest
	seen   map[podID]uint32  // index in groups
	groups []podGroup        // those without pods are free
	free   []uint32          // indices of such
	byRefs map[string]uint32 // see refsOf
}

// podID stands for namespace and name.
type podID [16]byte

func podIDOf(namespace, name string) podID {
	sum := sha256.Sum256([]byte(namespace + "/" + name))
	return podID(sum[:16])
}

// podGroup is pods that are alike to the graph.
type podGroup struct {
	namespace, node string
	name            string // of the pod that stands for it
	refs            string
	pods            int
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

func newPodFeed(client kubernetes.Interface, named bool) *podFeed {
	return &podFeed{client: client, named: named, synced: make(chan struct{}), seen: map[podID]uint32{}, byRefs: map[string]uint32{}}
}

// authorize allows nodes to read, one at a time, the pods that are on them; next decides all else.
func (f *podFeed) authorize(next authorizer.Authorizer) authorizer.Authorizer {
	nodes := nodeidentifier.NewDefaultNodeIdentifier()
	return authorizer.AuthorizerFunc(func(ctx context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
		if node, ok := readsPod(nodes, a); ok && f.on(node, a.GetNamespace(), a.GetName()) {
			return authorizer.DecisionAllow, "", nil
		}
		return next.Authorize(ctx, a)
	})
}

// readsPod tells which node it is that asks for one pod by name, as upstream's node authorizer finds out.
func readsPod(nodes nodeidentifier.NodeIdentifier, a authorizer.Attributes) (node string, ok bool) {
	if !a.IsResourceRequest() || a.GetResource() != "pods" || a.GetAPIGroup() != "" || a.GetSubresource() != "" || a.GetName() == "" ||
		!slices.Contains([]string{"get", "list", "watch"}, a.GetVerb()) {
		return "", false
	}
	var u user.Info = a.GetUser()
	if u == nil {
		return "", false
	}
	node, ok = nodes.NodeIdentity(u)
	return node, ok && node != ""
}

// on tells whether a pod is on a node.
func (f *podFeed) on(node, namespace, name string) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	i, ok := f.seen[podIDOf(namespace, name)]
	return ok && f.groups[i].node == node
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

// refsOf is all that the graph reads of a pod, but its name unless that counts: see AddPod of upstream's graph. It is good until the next call.
func (f *podFeed) refsOf(p *corev1.Pod) []byte {
	b := f.buf[:0]
	add := func(kind byte, name string) bool {
		b = append(append(append(b, kind), name...), 0) // no name has a zero byte
		return true
	}
	add('n', p.Spec.NodeName)
	add('i', p.Namespace)
	if f.named {
		add('p', p.Name)
	}
	if _, mirror := p.Annotations[corev1.MirrorPodAnnotationKey]; mirror {
		add('m', "")
	}
	add('a', p.Spec.ServiceAccountName)
	podutil.VisitPodSecretNames(p, func(name string) bool { return add('s', name) })
	podutil.VisitPodConfigmapNames(p, func(name string) bool { return add('c', name) })
	for i := range p.Spec.Volumes {
		switch v := &p.Spec.Volumes[i]; {
		case v.PersistentVolumeClaim != nil:
			add('v', v.PersistentVolumeClaim.ClaimName)
		case v.Ephemeral != nil:
			add('v', ephemeral.VolumeClaimName(p, v))
		}
	}
	for i := range p.Spec.ResourceClaims {
		if name, _, err := resourceclaim.Name(p, &p.Spec.ResourceClaims[i]); err == nil && name != nil {
			add('r', *name)
		}
	}
	if e := p.Status.ExtendedResourceClaimStatus; e != nil {
		add('r', e.ResourceClaimName)
	}
	f.buf = b
	return b
}

// standIn is the name of the pod that stands for a group: no pod has such a one.
func standIn(i uint32) string { return "#" + strconv.FormatUint(uint64(i), 10) }

// Add implements cache.ReflectorStore.
func (f *podFeed) Add(o any) error {
	p, ok := o.(*corev1.Pod)
	if !ok {
		return fmt.Errorf("a %T among the pods", o)
	}
	id, refs := podIDOf(p.Namespace, p.Name), f.refsOf(p)
	f.mu.Lock()
	before, known := f.seen[id]
	now, exists := f.byRefs[string(refs)]
	if known && exists && before == now {
		f.mu.Unlock()
		return nil
	}
	if !exists {
		now = f.newGroup(p, string(refs))
	}
	f.groups[now].pods++
	name := f.groups[now].name
	f.seen[id] = now
	f.mu.Unlock()
	if !exists {
		f.handler.OnAdd(asStandIn(p, name), false)
	}
	if known {
		f.leave(before, !f.named) // the graph has replaced one of the same name
	}
	return nil
}

// asStandIn makes of the first pod of a group, which nobody else has, the one that stands for it.
func asStandIn(p *corev1.Pod, name string) *corev1.Pod {
	for i := range p.Spec.Volumes {
		v := &p.Spec.Volumes[i]
		if v.PersistentVolumeClaim == nil && v.Ephemeral != nil { // its claim is named after the pod
			v.VolumeSource = corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: ephemeral.VolumeClaimName(p, v)}}
		}
	}
	p.Name = name
	return p
}

// newGroup makes the group of a pod. The caller has the lock.
func (f *podFeed) newGroup(p *corev1.Pod, refs string) (i uint32) {
	if n := len(f.free); n > 0 {
		i, f.free = f.free[n-1], f.free[:n-1]
	} else {
		i = uint32(len(f.groups))
		f.groups = append(f.groups, podGroup{})
	}
	g := podGroup{namespace: p.Namespace, node: p.Spec.NodeName, name: standIn(i), refs: refs}
	if f.named {
		g.name = p.Name
	}
	f.groups[i], f.byRefs[refs] = g, i
	return i
}

// leave takes a pod out of a group; with the last one the graph forgets it, if it is told.
func (f *podFeed) leave(i uint32, tell bool) {
	f.mu.Lock()
	g := &f.groups[i]
	g.pods--
	gone, last := *g, g.pods == 0
	if last {
		delete(f.byRefs, g.refs)
		*g = podGroup{}
		f.free = append(f.free, i)
	}
	f.mu.Unlock()
	if last && tell { // the graph needs no more than this of a pod that has gone
		f.handler.OnDelete(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: gone.namespace, Name: gone.name}, Spec: corev1.PodSpec{NodeName: gone.node}})
	}
}

// Update implements cache.ReflectorStore.
func (f *podFeed) Update(o any) error { return f.Add(o) }

// Delete implements cache.ReflectorStore.
func (f *podFeed) Delete(o any) error {
	p, ok := o.(*corev1.Pod)
	if !ok {
		return fmt.Errorf("a %T among the pods", o)
	}
	f.drop(podIDOf(p.Namespace, p.Name))
	return nil
}

func (f *podFeed) drop(id podID) {
	f.mu.Lock()
	before, known := f.seen[id]
	delete(f.seen, id)
	f.mu.Unlock()
	if known {
		f.leave(before, true)
	}
}

// Replace implements cache.ReflectorStore.
func (f *podFeed) Replace(list []any, _ string) error {
	now := make(map[podID]bool, len(list))
	for _, o := range list {
		if p, ok := o.(*corev1.Pod); ok {
			now[podIDOf(p.Namespace, p.Name)] = true
		}
		if err := f.Add(o); err != nil {
			return err
		}
	}
	var gone []podID
	for id := range f.seen { // nobody else changes it
		if !now[id] {
			gone = append(gone, id)
		}
	}
	for _, id := range gone {
		f.drop(id)
	}
	if !f.HasSynced() {
		close(f.synced) // the reflector is the only caller
	}
	return nil
}

// Resync implements cache.ReflectorStore.
func (f *podFeed) Resync() error { return nil }
