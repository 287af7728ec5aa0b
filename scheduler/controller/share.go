package controller

import (
	"sync"
	"unique"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// shares lets the pods of the view have one copy of what is equal in many of them: pods of a template differ in names and a few
// fields. A pod then takes 1.3 KB instead of 3.2 (BenchmarkViewPod), which is 19 MB in a cluster of 10,000. Nobody may change objects from
// the view in any case.
type shares struct {
	mu sync.Mutex // guards the rest; held for a look-up
	// specs and metas are by what they are encoded to. Of each there are two generations: when the young one is
	// full it becomes the old one, and what is still in use then comes over.
	specs generations[corev1.PodSpec]
	metas generations[metav1.ObjectMeta]
	nodes generations[corev1.Node]
}

// maxShared is how many templates each generation knows. A pod that is like no other costs an encoded copy
// until it is forgotten.
const maxShared = 512

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

// share replaces parts of a pod by equal ones that others have. The pod must be the caller's alone still.
func (s *shares) share(pod *corev1.Pod) {
	pod.Namespace, pod.Spec.NodeName = same(pod.Namespace), same(pod.Spec.NodeName)
	s.shareSpec(pod)
	s.shareMeta(pod)
	st := &pod.Status
	st.Phase, st.QOSClass, st.HostIP = same(st.Phase), same(st.QOSClass), same(st.HostIP)
	for i := range st.Conditions {
		c := &st.Conditions[i]
		c.Type, c.Status, c.Reason = same(c.Type), same(c.Status), same(c.Reason)
	}
}

func same[T ~string](v T) T {
	if v == "" {
		return ""
	}
	return unique.Make(v).Value()
}

// shareSpec shares all but what differs from pod to pod of a template.
func (s *shares) shareSpec(pod *corev1.Pod) {
	own := pod.Spec
	template := own
	template.NodeName, template.Hostname, template.Volumes = "", "", nil
	key, err := template.Marshal()
	if err != nil {
		return // it stays as it is
	}
	s.mu.Lock()
	pod.Spec = *s.specs.of(key, &template)
	s.mu.Unlock()
	pod.Spec.NodeName, pod.Spec.Hostname, pod.Spec.Volumes = own.NodeName, own.Hostname, own.Volumes
}

func (s *shares) shareMeta(pod *corev1.Pod) {
	own := &pod.ObjectMeta
	template := metav1.ObjectMeta{}
	template.GenerateName, template.Labels, template.Annotations = own.GenerateName, own.Labels, own.Annotations
	template.OwnerReferences, template.Finalizers = own.OwnerReferences, own.Finalizers
	key, err := template.Marshal()
	if err != nil {
		return
	}
	s.mu.Lock()
	known := s.metas.of(key, &template)
	s.mu.Unlock()
	own.GenerateName, own.Labels, own.Annotations = known.GenerateName, known.Labels, known.Annotations
	own.OwnerReferences, own.Finalizers = known.OwnerReferences, known.Finalizers
}
