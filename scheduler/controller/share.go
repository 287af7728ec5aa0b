package controller

import (
	"crypto/sha256"
	"encoding/binary"
	"sync"
	"unique"
	"weak"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// shares lets the objects of the view have one copy of what is equal in many of them: pods of a template differ in names and a few
// fields (see packed). Nobody may change objects from the view in any case.
type shares struct {
	mu     sync.Mutex // guards the rest; held for a look-up
	specs  pool[corev1.PodSpec]
	metas  pool[metav1.ObjectMeta]
	states pool[corev1.PodStatus]
	nodes  generations[corev1.Node]
	buf    []byte // for encoding
}

// encoded is what the API's types can do.
type encoded interface {
	Size() int
	MarshalToSizedBuffer([]byte) (int, error)
}

// pool knows values that are in use, by the hash of what they are encoded to. It holds none of them.
type pool[T any] struct {
	known map[[sha256.Size]byte]weak.Pointer[T]
	clean int // how many there may be before those are forgotten that are not in use any more
}

// minClean is the least number of values after which a pool looks for those that are not in use any more.
const minClean = 1024

// of gives the value that is known for this key, which becomes v if there is none.
func (p *pool[T]) of(key [sha256.Size]byte, v *T) *T {
	if known := p.known[key].Value(); known != nil {
		return known
	}
	if len(p.known) >= p.clean {
		for k, w := range p.known {
			if w.Value() == nil {
				delete(p.known, k)
			}
		}
		p.clean = max(minClean, 2*len(p.known))
	}
	if p.known == nil {
		p.known = map[[sha256.Size]byte]weak.Pointer[T]{}
	}
	p.known[key] = weak.Make(v)
	return v
}

// key encodes v and hashes that; ok is false if it does not encode. s.mu is held.
func (s *shares) key(v encoded) (key [sha256.Size]byte, ok bool) {
	n := v.Size()
	if cap(s.buf) < n {
		s.buf = make([]byte, 2*n)
	}
	if _, err := v.MarshalToSizedBuffer(s.buf[:n]); err != nil {
		return key, false
	}
	return sha256.Sum256(s.buf[:n]), true
}

// appendMessage appends a message and its length before it; 0 for one that says nothing, which takes empty bytes. ok is false
// if it does not encode.
func appendMessage(b []byte, v encoded, empty int) (_ []byte, ok bool) {
	n := v.Size()
	if n == empty {
		return append(b, 0), true
	}
	b = binary.AppendUvarint(b, uint64(n))
	at := len(b)
	b = append(b, make([]byte, n)...)
	_, err := v.MarshalToSizedBuffer(b[at:])
	return b, err == nil
}

var emptyMeta, emptySpec, emptyStatus = (&metav1.ObjectMeta{}).Size(), (&corev1.PodSpec{}).Size(), (&corev1.PodStatus{}).Size()

// pack gives what the view holds of a pod that is slim already, and lets the pod itself, which must be the caller's alone still, be the first
// that it is unpacked to. One that does not fit is held as it is.
func (s *shares) pack(pod *corev1.Pod) any {
	if !packs(pod) {
		return pod
	}
	p := &packed{node: unique.Make(pod.Spec.NodeName), volumes: len(pod.Spec.Volumes) > 0,
		nameLen: uint8(len(pod.Name)), uidLen: uint8(len(pod.UID)), versionLen: uint8(len(pod.ResourceVersion))}
	meta, spec, status, own := split(pod)
	since := epoch(pod)
	var ok [6]bool

	s.mu.Lock()
	defer s.mu.Unlock()
	b := append(append(append(make([]byte, 0, 512), pod.Name...), pod.UID...), pod.ResourceVersion...)
	b = appendTime(binary.AppendUvarint(b, uint64(pod.Generation)), pod.CreationTimestamp.Time, 0)
	if pod.DeletionTimestamp == nil {
		b = append(b, 0)
	} else {
		b = appendTime(append(b, 1), pod.DeletionTimestamp.Time, since)
	}
	b, ok[0] = appendMessage(b, &own.ObjectMeta, emptyMeta)
	b, ok[1] = appendMessage(b, &own.Spec, emptySpec)
	b, ok[2] = appendMessage(b, &own.Status, emptyStatus)
	eachTime(&status, func(t *metav1.Time) {
		b = appendTime(b, t.Time, since)
		*t = metav1.Time{}
	})
	var keys [3][sha256.Size]byte
	keys[0], ok[3] = s.key(&meta)
	keys[1], ok[4] = s.key(&spec)
	keys[2], ok[5] = s.key(&status)
	if ok != [6]bool{true, true, true, true, true, true} {
		return pod
	}
	p.own = string(b)
	p.meta, p.spec, p.status = s.metas.of(keys[0], &meta), s.specs.of(keys[1], &spec), s.states.of(keys[2], &status)
	p.adopt(pod)
	return p
}

// adopt makes a pod that is equal to this one share what it can, and be what is given for it. Nobody else has p yet.
func (p *packed) adopt(pod *corev1.Pod) {
	pod.Namespace, pod.GenerateName, pod.Labels, pod.Annotations = p.meta.Namespace, p.meta.GenerateName, p.meta.Labels, p.meta.Annotations
	pod.OwnerReferences, pod.Finalizers = p.meta.OwnerReferences, p.meta.Finalizers
	hostname, volumes := pod.Spec.Hostname, pod.Spec.Volumes
	pod.Spec = *p.spec
	pod.Spec.Hostname, pod.Spec.Volumes = hostname, volumes
	p.named(pod)
	p.cached = weak.Make(pod)
}

// maxShared is how many kinds of nodes each generation knows.
const maxShared = 512

// generations are values by what they are encoded to. When the young ones are too many they become the old ones, and what is
// still in use then comes over.
type generations[T any] struct{ young, old map[string]*T }

// of gives the first value that had this key, which becomes v's if there was none.
func (g *generations[T]) of(key []byte, v *T) *T {
	if known := g.young[string(key)]; known != nil {
		return known
	}
	if known := g.old[string(key)]; known != nil {
		v = known
	}
	if g.young == nil || len(g.young) >= maxShared {
		g.young, g.old = map[string]*T{}, g.young
	}
	g.young[string(key)] = v
	return v
}

// shareNode replaces what many nodes have alike: machines of a type have the same room (900 bytes), and run the same system. The
// node must be the caller's alone still.
func (s *shares) shareNode(n *corev1.Node) {
	kind := corev1.Node{}
	kind.Annotations, kind.Spec.Taints, kind.Status.Allocatable = n.Annotations, n.Spec.Taints, n.Status.Allocatable
	if key, err := kind.Marshal(); err == nil {
		s.mu.Lock()
		known := s.nodes.of(key, &kind)
		s.mu.Unlock()
		n.Annotations, n.Spec.Taints, n.Status.Allocatable = known.Annotations, known.Spec.Taints, known.Status.Allocatable
	}
	labels := make(map[string]string, len(n.Labels)) // one of its own: it has the host's name
	for k, v := range n.Labels {
		labels[same(k)] = same(v)
	}
	n.Labels = labels
}

func same[T ~string](v T) T {
	if v == "" {
		return ""
	}
	return unique.Make(v).Value()
}
