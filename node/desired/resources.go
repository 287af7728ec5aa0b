package desired

import (
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// Resources are the requests and limits of a pod's containers, init containers included, and those of the pod as a whole. They
// are never changed once made: With makes another.
type Resources struct {
	// Pod is what the pod has as a whole (spec.resources); nil: nothing.
	Pod *corev1.ResourceRequirements
	// Containers by name.
	Containers map[string]corev1.ResourceRequirements
}

// ResourcesOf is what a pod's spec asks for.
func ResourcesOf(p *corev1.Pod) *Resources {
	r := &Resources{Pod: p.Spec.Resources.DeepCopy(), Containers: make(map[string]corev1.ResourceRequirements, len(p.Spec.Containers)+len(p.Spec.InitContainers))}
	eachContainer(p, func(c *corev1.Container) { r.Containers[c.Name] = *c.Resources.DeepCopy() })
	return r
}

func eachContainer(p *corev1.Pod, f func(c *corev1.Container)) {
	for i := range p.Spec.InitContainers {
		f(&p.Spec.InitContainers[i])
	}
	for i := range p.Spec.Containers {
		f(&p.Spec.Containers[i])
	}
}

// resizable are the resources that a running pod can be given more or less of.
var resizable = [...]corev1.ResourceName{corev1.ResourceCPU, corev1.ResourceMemory}

// SameAmounts says whether two containers have the same of everything that can be resized.
func SameAmounts(a, b *corev1.ResourceRequirements) bool {
	for _, n := range resizable {
		if !SameAmount(a, b, n) {
			return false
		}
	}
	return true
}

// SameAmount says whether request and limit of one resource are the same; nil has nothing. None and zero are the same.
func SameAmount(a, b *corev1.ResourceRequirements, n corev1.ResourceName) bool {
	var none corev1.ResourceRequirements
	if a == nil {
		a = &none
	}
	if b == nil {
		b = &none
	}
	ar, br, al, bl := a.Requests[n], b.Requests[n], a.Limits[n], b.Limits[n]
	return ar.Cmp(br) == 0 && al.Cmp(bl) == 0
}

// Match says whether the pod's spec asks for just this.
func (r *Resources) Match(p *corev1.Pod) bool {
	same := SameAmounts(r.Pod, p.Spec.Resources)
	eachContainer(p, func(c *corev1.Container) {
		if have, ok := r.Containers[c.Name]; ok && !SameAmounts(&have, &c.Resources) {
			same = false
		}
	})
	return same
}

// Apply returns the pod with these resources instead of those of its spec: the pod itself where they are the same.
func (r *Resources) Apply(p *corev1.Pod) *corev1.Pod {
	if r == nil || r.Match(p) {
		return p
	}
	p = p.DeepCopy()
	p.Spec.Resources = r.Pod.DeepCopy()
	eachContainer(p, func(c *corev1.Container) {
		if have, ok := r.Containers[c.Name]; ok {
			c.Resources = *have.DeepCopy()
		}
	})
	return p
}

// With returns r with other resources for one container; r may be nil.
func (r *Resources) With(container string, has corev1.ResourceRequirements) *Resources {
	next := &Resources{Containers: map[string]corev1.ResourceRequirements{}}
	if r != nil {
		next.Pod = r.Pod
		maps.Copy(next.Containers, r.Containers)
	}
	next.Containers[container] = *has.DeepCopy()
	return next
}

// marshal encodes resources as the part of a PodSpec that they are.
func (r *Resources) marshal() ([]byte, error) {
	spec := corev1.PodSpec{Resources: r.Pod}
	for _, n := range slices.Sorted(maps.Keys(r.Containers)) {
		spec.Containers = append(spec.Containers, corev1.Container{Name: n, Resources: r.Containers[n]})
	}
	return spec.Marshal()
}

func (r *Resources) unmarshal(b []byte) error {
	var spec corev1.PodSpec
	if err := spec.Unmarshal(b); err != nil {
		return corrupt("resources", err)
	}
	r.Pod, r.Containers = spec.Resources, make(map[string]corev1.ResourceRequirements, len(spec.Containers))
	for i := range spec.Containers {
		r.Containers[spec.Containers[i].Name] = spec.Containers[i].Resources
	}
	return nil
}
