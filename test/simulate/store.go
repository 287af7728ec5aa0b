package simulate

import (
	"fmt"
	"hash/fnv"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes/scheme"
)

// keptChanges is how many changes of one kind a watch can go back.
const keptChanges = 20000

type key struct{ ns, name string }

func (k key) String() string { return k.ns + "/" + k.name }

// entry is one version of an object; it never changes.
type entry struct {
	obj runtime.Object
	acc metav1.Object
	rev uint64

	once sync.Once
	raw  []byte // protobuf
}

// change is a commit as a watch shows it.
type change struct {
	typ watch.EventType
	e   *entry // of a deletion the last version, at the revision of the deletion
	old *entry // nil for what is new
}

// table holds the objects of one kind and what happened to them lately.
type table struct {
	kind  kind
	objs  map[key]*entry
	log   []change
	first int // sequence number of log[0]
	gone  uint64
	wake  map[chan struct{}]bool
}

// commit is told to those who look on: invariants and agents.
type commit struct {
	kind     kind
	old, cur runtime.Object // nil for what was not, or is no longer
	who      string
}

// store is an API server's objects: revisions, conflicts, generations, finalizers, graceful deletion. All is done under one lock, so
// its revisions are the order of the world.
type store struct {
	mu     sync.Mutex // guards all below
	rev    uint64
	kinds  map[schema.GroupVersionResource]kind
	tables map[schema.GroupVersionResource]*table
	fence  uint64 // writes of leaders of lower terms are refused
	writes map[string]int
	noops  map[string]int
	tries  map[string]int             // writing requests by method and path, refused ones too
	admit  func(runtime.Object) error // may refuse what is created
	keep   func(runtime.Object) error // may refuse what is deleted
	// onCommit is called under the lock, after the commit.
	onCommit []func(commit)
	onEvict  func(*corev1.Pod) // under the lock, after an eviction was granted
	seed     uint64
}

func newStore(seed uint64) *store {
	s := &store{rev: 1, kinds: allKinds(), tables: map[schema.GroupVersionResource]*table{}, writes: map[string]int{}, noops: map[string]int{}, tries: map[string]int{}, seed: seed}
	for gvr, k := range s.kinds {
		s.tables[gvr] = &table{kind: k, objs: map[key]*entry{}, wake: map[chan struct{}]bool{}}
	}
	return s
}

// draw is a number that depends on the seed and on what it is for, and on nothing else.
func draw(seed uint64, what ...any) uint64 {
	h := fnv.New64a()
	fmt.Fprintln(h, seed)
	fmt.Fprintln(h, what...)
	x := h.Sum64() // FNV alone is poor in its high bits
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}

// between is a duration drawn from a range.
func between(lo, hi time.Duration, n uint64) time.Duration {
	return lo + time.Duration(n%uint64(hi-lo))
}

func keyOf(acc metav1.Object) key { return key{acc.GetNamespace(), acc.GetName()} }

// put commits a version. The lock is held.
func (s *store) put(t *table, typ watch.EventType, obj runtime.Object, who string) *entry {
	acc, err := meta.Accessor(obj)
	if err != nil {
		panic(err)
	}
	s.rev++
	acc.SetResourceVersion(strconv.FormatUint(s.rev, 10))
	obj.GetObjectKind().SetGroupVersionKind(t.kind.gvk)
	e := &entry{obj: obj, acc: acc, rev: s.rev}
	k := keyOf(acc)
	c := change{typ: typ, e: e, old: t.objs[k]}
	cm := commit{kind: t.kind, cur: obj, who: who}
	if c.old != nil {
		cm.old = c.old.obj
	}
	if typ == watch.Deleted {
		delete(t.objs, k)
		cm.cur = nil
	} else {
		t.objs[k] = e
	}
	t.log = append(t.log, c)
	if len(t.log) > keptChanges+keptChanges/4 {
		cut := len(t.log) - keptChanges
		t.gone = t.log[cut-1].e.rev
		t.first += cut
		t.log = append([]change(nil), t.log[cut:]...)
	}
	for ch := range t.wake {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
	for _, fn := range s.onCommit {
		fn(cm)
	}
	return e
}

func (s *store) create(k kind, obj runtime.Object, who string) (*entry, error) {
	acc, err := meta.Accessor(obj)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.tables[k.gvr]
	if k.namespaced {
		ns := s.tables[schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}].objs[key{"", acc.GetNamespace()}]
		switch {
		case ns == nil:
			return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "namespaces"}, acc.GetNamespace())
		case ns.acc.GetDeletionTimestamp() != nil:
			err := apierrors.NewForbidden(k.resource(), acc.GetName(), fmt.Errorf("unable to create new content in namespace %s because it is being terminated", acc.GetNamespace()))
			err.ErrStatus.Details.Causes = append(err.ErrStatus.Details.Causes, metav1.StatusCause{Type: corev1.NamespaceTerminatingCause})
			return nil, err
		}
	}
	if s.admit != nil {
		if err := s.admit(obj); err != nil {
			return nil, err
		}
	}
	if acc.GetName() == "" {
		for i := 0; ; i++ {
			acc.SetName(fmt.Sprintf("%s%s", acc.GetGenerateName(), suffix(draw(s.seed, acc.GetGenerateName(), s.rev, i))))
			if t.objs[keyOf(acc)] == nil {
				break
			}
		}
	}
	if t.objs[keyOf(acc)] != nil {
		return nil, apierrors.NewAlreadyExists(k.resource(), acc.GetName())
	}
	if pod, ok := obj.(*corev1.Pod); ok {
		if err := s.charge(pod, who); err != nil {
			return nil, err
		}
	}
	acc.SetUID(types.UID(fmt.Sprintf("%08x-%s", s.rev+1, k.gvk.Kind)))
	acc.SetCreationTimestamp(metav1.NewTime(time.Now().Truncate(time.Second)))
	acc.SetDeletionTimestamp(nil)
	acc.SetDeletionGracePeriodSeconds(nil)
	acc.SetGeneration(1)
	switch o := obj.(type) {
	case *corev1.Pod:
		defaultPod(o)
	case *corev1.Namespace:
		o.Status.Phase = corev1.NamespaceActive
		o.Spec.Finalizers = []corev1.FinalizerName{corev1.FinalizerKubernetes}
	default:
		defaultVolume(obj, acc)
	}
	s.count("create", k, "")
	return s.put(t, watch.Added, obj, who), nil
}

const letters = "bcdfghjklmnpqrstvwxz2456789"

func suffix(n uint64) string {
	out := make([]byte, 5)
	for i := range out {
		out[i] = letters[n%uint64(len(letters))]
		n /= uint64(len(letters))
	}
	return string(out)
}

// tolerated is how long pods stay on lost nodes: the API's admission writes it into those that say nothing.
const tolerated = 10

// defaultPod does what the API's defaulting and admission do that matters here.
func defaultPod(p *corev1.Pod) {
	if p.Status.Phase == "" {
		p.Status.Phase = corev1.PodPending
	}
	if p.Spec.SchedulerName == "" {
		p.Spec.SchedulerName = corev1.DefaultSchedulerName
	}
	if p.Spec.RestartPolicy == "" {
		p.Spec.RestartPolicy = corev1.RestartPolicyAlways
	}
	if p.Spec.TerminationGracePeriodSeconds == nil {
		grace := int64(corev1.DefaultTerminationGracePeriodSeconds)
		p.Spec.TerminationGracePeriodSeconds = &grace
	}
	if p.Spec.Priority == nil {
		p.Spec.Priority = new(int32)
	}
	for _, taint := range []string{corev1.TaintNodeNotReady, corev1.TaintNodeUnreachable} {
		has := false
		for _, t := range p.Spec.Tolerations {
			has = has || (t.Key == taint || t.Key == "") && (t.Effect == "" || t.Effect == corev1.TaintEffectNoExecute)
		}
		if !has {
			secs := int64(tolerated)
			p.Spec.Tolerations = append(p.Spec.Tolerations, corev1.Toleration{Key: taint, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: &secs})
		}
	}
}

// count notes a write. The lock is held.
func (s *store) count(verb string, k kind, sub string) {
	res := k.gvr.Resource
	if sub != "" {
		res += "/" + sub
	}
	s.writes[verb+" "+res]++
}

// total is how many writes there have been.
func (s *store) total() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, c := range s.writes {
		n += c
	}
	return n
}

func (s *store) get(k kind, at key) (*entry, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.tables[k.gvr].objs[at]; e != nil {
		return e, nil
	}
	return nil, apierrors.NewNotFound(k.resource(), at.name)
}

// list returns the versions of a kind and the revision of the whole.
func (s *store) list(k kind, ns string) ([]*entry, uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*entry
	for at, e := range s.tables[k.gvr].objs {
		if ns == "" || at.ns == ns {
			out = append(out, e)
		}
	}
	return out, s.rev
}

func newOf(k kind) runtime.Object {
	obj, err := scheme.Scheme.New(k.gvk)
	if err != nil {
		panic(err)
	}
	return obj
}

// expire ends every watch and forgets what happened, so that their next try is told that it is too late.
func (s *store) expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tables {
		if len(t.log) == 0 {
			continue
		}
		t.gone = t.log[len(t.log)-1].e.rev
		t.first += len(t.log) + 1 // further than any watch is
		t.log = nil
		for ch := range t.wake {
			select {
			case ch <- struct{}{}:
			default:
			}
		}
	}
}
