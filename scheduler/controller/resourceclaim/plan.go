package resourceclaim

import (
	"errors"
	"fmt"
	"hash/fnv"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/rand"
	"k8s.io/dynamic-resource-allocation/resourceclaim"

	"skein.io/skein/scheduler/controller"
)

// done reports whether none of the pod's containers runs or ever will.
func done(pod *corev1.Pod) bool {
	return controller.PodTerminal(pod) || pod.DeletionTimestamp != nil && pod.Spec.NodeName == ""
}

// claimPlan is what is to be done about one claim, in this order.
type claimPlan struct {
	// drop are the consumers to be taken off.
	drop []resourceapi.ResourceClaimConsumerReference
	// deallocate says that the allocation goes, too.
	deallocate bool
	// unlock says that our finalizer goes.
	unlock bool
	// remove says that the claim was made for a pod that will not need it.
	remove bool
}

// planClaim decides for one claim. over says that a consumer does not use it
// any more; owner is the pod that it was made for, as far as that is known.
func planClaim(claim *resourceapi.ResourceClaim, over func(resourceapi.ResourceClaimConsumerReference) bool, owner *corev1.Pod) (p claimPlan) {
	for _, ref := range claim.Status.ReservedFor {
		// Consumers of other kinds are not ours to judge.
		if ref.APIGroup == "" && ref.Resource == "pods" && over(ref) {
			p.drop = append(p.drop, ref)
		}
	}
	if len(p.drop) < len(claim.Status.ReservedFor) {
		return p
	}
	ours := slices.Contains(claim.Finalizers, resourceapi.Finalizer)
	allocated := claim.Status.Allocation != nil
	switch {
	case len(p.drop) > 0:
		// It goes with its last user, so that the next one may be placed anywhere.
		// A claim that nobody has used yet keeps its allocation: not all drivers
		// write allocation and consumer at once.
		p.deallocate = ours && allocated
		p.unlock = ours
	case ours && claim.DeletionTimestamp != nil:
		p.deallocate, p.unlock = allocated, true
	}
	if uid := ownerOf(claim); uid != "" && owner != nil {
		p.remove = owner.UID != uid || done(owner)
	}
	return p
}

// ownerOf is the pod that the claim was made for; "" if it was made by hand.
func ownerOf(claim *resourceapi.ResourceClaim) types.UID {
	if ref := metav1.GetControllerOfNoCopy(claim); ref != nil && ref.APIVersion == "v1" && ref.Kind == "Pod" {
		return ref.UID
	}
	return ""
}

func ownerName(claim *resourceapi.ResourceClaim) string {
	if ownerOf(claim) == "" {
		return ""
	}
	return metav1.GetControllerOfNoCopy(claim).Name
}

// podPlan is what a pod needs.
type podPlan struct {
	// create are the pod's names of claims to be made from templates.
	create []corev1.PodResourceClaim
	// names are the claims, by the pod's name for them, that its status should
	// name beside those that are to be created.
	names map[string]string
	// reserve are claims to be reserved for the pod, which was bound by somebody
	// who did not do that.
	reserve []*resourceapi.ResourceClaim
}

// planPod decides for a pod that is not being deleted. get returns a claim of
// its namespace, or nil; owned are the claims that were made for it.
func planPod(pod *corev1.Pod, get func(name string) *resourceapi.ResourceClaim, owned []*resourceapi.ResourceClaim) (p podPlan, err error) {
	for i := range pod.Spec.ResourceClaims {
		podClaim := &pod.Spec.ResourceClaims[i]
		name, mine, err := resourceclaim.Name(pod, podClaim)
		switch {
		case errors.Is(err, resourceclaim.ErrClaimNotFound):
			p.make(podClaim, owned)
			continue
		case err != nil:
			return podPlan{}, err
		case name == nil:
			continue // it needs none
		}
		claim := get(*name)
		if claim == nil || mine && resourceclaim.IsForPod(pod, claim, false) != nil {
			// Deleted by somebody; only what was made for the pod is made again.
			p.make(podClaim, owned)
			continue
		}
		if pod.Spec.NodeName != "" && claim.Status.Allocation != nil && !resourceclaim.IsReservedForPod(pod, claim, false) {
			p.reserve = append(p.reserve, claim)
		}
	}
	return p, nil
}

// make uses the claim that was made for the pod before, if its status does not
// say so yet, or asks for one.
func (p *podPlan) make(podClaim *corev1.PodResourceClaim, owned []*resourceapi.ResourceClaim) {
	if podClaim.ResourceClaimTemplateName == nil {
		return
	}
	for _, claim := range owned {
		if claim.Annotations[resourceapi.PodResourceClaimAnnotation] == podClaim.Name {
			if p.names == nil {
				p.names = map[string]string{}
			}
			p.names[podClaim.Name] = claim.Name
			return
		}
	}
	p.create = append(p.create, *podClaim)
}

// newClaim is a claim for one pod, made from a template. Its name is
// <pod>-<name>-..., both shortened in proportion where it is too long. It ends
// in a hash of what it is for, where upstream has random characters: a creation
// of which nobody knows whether it happened is made again, and would leave a
// second claim, which nobody uses and the pod keeps.
func newClaim(pod *corev1.Pod, podClaim string, template *resourceapi.ResourceClaimTemplate) *resourceapi.ResourceClaim {
	const longest = 57 // leaves room for the hyphen and five random characters of 63
	base := pod.Name + "-" + podClaim + "-"
	if n := len(base); n > longest {
		base = pod.Name[:len(pod.Name)*longest/n] + "-" + podClaim[:len(podClaim)*longest/n]
	}
	yes := true
	annotations := maps.Clone(template.Spec.ObjectMeta.Annotations)
	if annotations == nil {
		annotations = map[string]string{}
	}
	annotations[resourceapi.PodResourceClaimAnnotation] = podClaim
	return &resourceapi.ResourceClaim{
		ObjectMeta: metav1.ObjectMeta{
			Name: base + suffix(pod.UID, podClaim), Labels: template.Spec.ObjectMeta.Labels, Annotations: annotations,
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID, Controller: &yes}},
		},
		Spec: template.Spec.Spec,
	}
}

// suffix is five characters for a claim of a pod.
func suffix(uid types.UID, podClaim string) string {
	h := fnv.New64a()
	h.Write([]byte(podClaim + "/" + string(uid)))
	return rand.SafeEncodeString(fmt.Sprintf("%05d", h.Sum64()%1e5))
}

// statuses is the pod's list of claims with names put in.
func statuses(pod *corev1.Pod, names map[string]string) []corev1.PodResourceClaimStatus {
	out := slices.Clone(pod.Status.ResourceClaimStatuses)
	for i := range pod.Spec.ResourceClaims {
		podClaim := pod.Spec.ResourceClaims[i].Name
		name, ok := names[podClaim]
		if !ok {
			continue
		}
		if at := slices.IndexFunc(out, func(s corev1.PodResourceClaimStatus) bool { return s.Name == podClaim }); at >= 0 {
			out[at].ResourceClaimName = &name
		} else {
			out = append(out, corev1.PodResourceClaimStatus{Name: podClaim, ResourceClaimName: &name})
		}
	}
	return out
}
