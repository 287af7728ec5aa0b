package controller

import (
	"errors"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/storage/ephemeral"
)

// IndexClaim finds pods by the claims that they use, each by namespace/name.
const IndexClaim = "skein/claim"

// PodClaims returns the names of the claims that a pod uses, those that are made
// for it included.
func PodClaims(pod *corev1.Pod) (names []string) {
	for i := range pod.Spec.Volumes {
		switch v := &pod.Spec.Volumes[i]; {
		case v.PersistentVolumeClaim != nil:
			names = append(names, v.PersistentVolumeClaim.ClaimName)
		case v.Ephemeral != nil:
			names = append(names, ephemeral.VolumeClaimName(pod, v))
		}
	}
	return names
}

func indexByClaim(obj any) ([]string, error) {
	if p, ok := obj.(*packed); ok && !p.volumes {
		return nil, nil
	}
	pod, ok := unpacked(obj).(*corev1.Pod)
	if !ok {
		return nil, errors.New("controller: the index by claim is for pods only")
	}
	names := PodClaims(pod)
	for i := range names {
		names[i] = pod.Namespace + "/" + names[i]
	}
	return names, nil
}
