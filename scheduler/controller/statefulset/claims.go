package statefulset

import (
	"maps"
	"slices"
	"strconv"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

var podKind = corev1.SchemeGroupVersion.WithKind("Pod")

func claimName(set *appsv1.StatefulSet, template string, at int) string {
	return template + "-" + set.Name + "-" + strconv.Itoa(at)
}

// ensureClaims creates the claims of an ordinal that are missing.
func (p *planner) ensureClaims(at int) {
	for i := range p.set.Spec.VolumeClaimTemplates {
		t := &p.set.Spec.VolumeClaimTemplates[i]
		if p.claims[claimName(p.set, t.Name, at)] != nil {
			continue
		}
		c := t.DeepCopy()
		c.Namespace, c.Name = p.set.Namespace, claimName(p.set, t.Name, at)
		c.Labels = maps.Clone(c.Labels)
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		maps.Copy(c.Labels, p.set.Spec.Selector.MatchLabels)
		c.OwnerReferences = owners(c, p.set, nil, at)
		p.out.claims = append(p.out.claims, c)
	}
}

// stale says that a claim of an ordinal without a pod still belongs to a pod
// that is gone, and so is about to go as well: a new pod has to wait for that.
func (p *planner) stale(at int) bool {
	if retention(p.set).WhenScaled == appsv1.RetainPersistentVolumeClaimRetentionPolicyType {
		return false
	}
	for i := range p.set.Spec.VolumeClaimTemplates {
		c := p.claims[claimName(p.set, p.set.Spec.VolumeClaimTemplates[i].Name, at)]
		if c != nil && slices.ContainsFunc(c.OwnerReferences, func(r metav1.OwnerReference) bool { return refersTo(r, podKind, podName(p.set, at)) }) {
			return true
		}
	}
	return false
}

// ownClaims brings the owners of an ordinal's claims in line with the retention
// policy: the garbage collector deletes a claim with its owners.
func (p *planner) ownClaims(at int, pod *corev1.Pod) {
	for i := range p.set.Spec.VolumeClaimTemplates {
		c := p.claims[claimName(p.set, p.set.Spec.VolumeClaimTemplates[i].Name, at)]
		if c == nil {
			continue
		}
		if want := owners(c, p.set, pod, at); !equality.Semantic.DeepEqual(c.OwnerReferences, want) {
			upd := c.DeepCopy()
			upd.OwnerReferences = want
			p.out.own = append(p.out.own, upd)
		}
	}
}

// owners is what the claim's owner references should be. Those to others stay;
// one of another controller means that the claim is not for the set to manage,
// and one to an earlier set or pod of the same name that it is about to go. pod
// is nil, or has no UID, before it is created.
func owners(c *corev1.PersistentVolumeClaim, set *appsv1.StatefulSet, pod *corev1.Pod, at int) []metav1.OwnerReference {
	policy := retention(set)
	if policy == retainAll && !slices.ContainsFunc(c.OwnerReferences, func(r metav1.OwnerReference) bool {
		return r.UID == set.UID || pod != nil && pod.UID != "" && r.UID == pod.UID
	}) {
		return c.OwnerReferences
	}
	var others []metav1.OwnerReference
	foreign := false
	for _, r := range c.OwnerReferences {
		switch {
		case r.UID == set.UID, pod != nil && pod.UID != "" && r.UID == pod.UID:
			continue
		case refersTo(r, kind, set.Name), refersTo(r, podKind, podName(set, at)):
			return c.OwnerReferences // of an earlier life: not touched
		}
		foreign = foreign || r.Controller != nil && *r.Controller
		others = append(others, r)
	}
	if foreign {
		return others
	}
	scaledDown := !inRange(set, at)
	switch {
	case policy.WhenScaled == appsv1.DeletePersistentVolumeClaimRetentionPolicyType && scaledDown:
		if pod != nil && pod.UID != "" {
			return append(others, *metav1.NewControllerRef(pod, podKind))
		}
	case policy.WhenDeleted == appsv1.DeletePersistentVolumeClaimRetentionPolicyType:
		return append(others, *metav1.NewControllerRef(set, kind))
	}
	return others
}

var retainAll = appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy{
	WhenDeleted: appsv1.RetainPersistentVolumeClaimRetentionPolicyType,
	WhenScaled:  appsv1.RetainPersistentVolumeClaimRetentionPolicyType,
}

func retention(set *appsv1.StatefulSet) appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy {
	if p := set.Spec.PersistentVolumeClaimRetentionPolicy; p != nil {
		return *p
	}
	return retainAll
}

func refersTo(r metav1.OwnerReference, gvk schema.GroupVersionKind, name string) bool {
	return r.APIVersion == gvk.GroupVersion().String() && r.Kind == gvk.Kind && r.Name == name
}

// mountClaims puts the ordinal's claims into the pod's volumes, in place of
// volumes of the same name.
func mountClaims(set *appsv1.StatefulSet, pod *corev1.Pod, at int) {
	var volumes []corev1.Volume
	claimed := map[string]bool{}
	for i := range set.Spec.VolumeClaimTemplates {
		name := set.Spec.VolumeClaimTemplates[i].Name
		claimed[name] = true
		volumes = append(volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
			PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claimName(set, name, at)}}})
	}
	for _, v := range pod.Spec.Volumes {
		if !claimed[v.Name] {
			volumes = append(volumes, v)
		}
	}
	pod.Spec.Volumes = volumes
}
