package persistentvolume

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	"k8s.io/apimachinery/pkg/labels"
	volumehelpers "k8s.io/component-helpers/storage/volume"

	"skein.io/skein/scheduler/controller"
)

// bestMatch returns the volume for a claim that names none: one that names the
// claim, else the smallest of those with the fewest access modes. Nil if there
// is none; delay says that only one that names the claim will do.
func (b *binder) bestMatch(claim *corev1.PersistentVolumeClaim, delay bool) (*corev1.PersistentVolume, error) {
	indexer := b.volumeInf.GetIndexer()
	ofClass, err := controller.ByIndex[*corev1.PersistentVolume](indexer, indexVolumeClass, volumehelpers.GetPersistentVolumeClaimClass(claim))
	if err != nil {
		return nil, err
	}
	naming, err := controller.ByIndex[*corev1.PersistentVolume](indexer, indexVolumeClaim, controller.Key(claim))
	if err != nil {
		return nil, err
	}
	seen := map[string]bool{}
	var candidates []*corev1.PersistentVolume
	for _, v := range slices.Concat(naming, ofClass) {
		if seen[v.Name] {
			continue
		}
		seen[v.Name] = true
		if v = b.wroteVolumes.latest(v.Name, v, true); volumehelpers.CheckAccessModes(claim, v) {
			candidates = append(candidates, v)
		}
	}
	return match(claim, candidates, delay)
}

// match chooses among volumes that have the claim's access modes.
func match(claim *corev1.PersistentVolumeClaim, candidates []*corev1.PersistentVolume, delay bool) (*corev1.PersistentVolume, error) {
	slices.SortFunc(candidates, func(a, b *corev1.PersistentVolume) int { return strings.Compare(a.Name, b.Name) })
	// With delay, only one that names the claim is found; it goes before all.
	if given, err := volumehelpers.FindMatchingVolume(claim, candidates, nil, nil, true, true); given != nil || delay || err != nil {
		return given, err
	}
	byModes := map[int][]*corev1.PersistentVolume{}
	for _, v := range candidates {
		modes := slices.Clone(v.Spec.AccessModes)
		slices.Sort(modes)
		n := len(slices.Compact(modes))
		byModes[n] = append(byModes[n], v)
	}
	for n := range 5 { // there are four modes
		if best, err := volumehelpers.FindMatchingVolume(claim, byModes[n], nil, nil, false, true); best != nil || err != nil {
			return best, err
		}
	}
	return nil, nil
}

// satisfies says why a volume cannot be bound to the claim that names it.
func satisfies(volume *corev1.PersistentVolume, claim *corev1.PersistentVolumeClaim) error {
	asked, has := claim.Spec.Resources.Requests[corev1.ResourceStorage], volume.Spec.Capacity[corev1.ResourceStorage]
	switch {
	case volume.DeletionTimestamp != nil:
		return fmt.Errorf("the volume is marked for deletion %q", volume.Name)
	case has.Value() < asked.Value():
		return errors.New("requested PV is too small")
	case volumehelpers.GetPersistentVolumeClass(volume) != volumehelpers.GetPersistentVolumeClaimClass(claim):
		return errors.New("storageClassName does not match")
	case deref(claim.Spec.VolumeAttributesClassName) != deref(volume.Spec.VolumeAttributesClassName):
		return errors.New("volumeAttributesClassName does not match")
	case volumehelpers.CheckVolumeModeMismatches(&claim.Spec, &volume.Spec):
		return errors.New("incompatible volumeMode")
	case !volumehelpers.CheckAccessModes(claim, volume):
		return errors.New("incompatible accessMode")
	}
	return nil
}

func deref(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}

// Annotations by which a class says that it is the default one.
const (
	annDefault     = "storageclass.kubernetes.io/is-default-class"
	annDefaultBeta = "storageclass.beta.kubernetes.io/is-default-class"
)

func isDefault(class *storagev1.StorageClass) bool {
	return class.Annotations[annDefault] == "true" || class.Annotations[annDefaultBeta] == "true"
}

// defaultClass is the default class: of several, the newest. Nil if there is none.
func (b *binder) defaultClass() (*storagev1.StorageClass, error) {
	all, err := b.classLister.List(labels.Everything())
	if err != nil {
		return nil, err
	}
	var best *storagev1.StorageClass
	for _, class := range all {
		if isDefault(class) && (best == nil || newer(class, best)) {
			best = class
		}
	}
	return best, nil
}

func newer(a, b *storagev1.StorageClass) bool {
	if a.CreationTimestamp.Equal(&b.CreationTimestamp) {
		return a.Name < b.Name
	}
	return b.CreationTimestamp.Before(&a.CreationTimestamp)
}
