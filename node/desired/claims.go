package desired

import (
	"context"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/component-helpers/storage/ephemeral"
)

// Pauses between two looks at a claim that is not bound yet, or that the API did not tell about. Placement binds a pod only
// after its claims, so that the first look is mostly the last.
const (
	claimRetryFirst   = 200 * time.Millisecond
	claimRetryLongest = 10 * time.Second
)

// ClaimNames returns the claims that a pod uses, those that are made for it included.
func ClaimNames(p *corev1.Pod) (names []string) {
	for i := range p.Spec.Volumes {
		switch v := &p.Spec.Volumes[i]; {
		case v.PersistentVolumeClaim != nil:
			names = append(names, v.PersistentVolumeClaim.ClaimName)
		case v.Ephemeral != nil:
			names = append(names, ephemeral.VolumeClaimName(p, v))
		}
	}
	return names
}

// Claim returns a claim that a pod of this node uses; errors as of ConfigMap.
func (s *Store) Claim(namespace, name string) (*corev1.PersistentVolumeClaim, error) {
	return lookup[*corev1.PersistentVolumeClaim](s.claims, namespace, name)
}

// Volume returns the volume of a claim that a pod of this node uses; errors as of ConfigMap.
func (s *Store) Volume(name string) (*corev1.PersistentVolume, error) {
	return lookup[*corev1.PersistentVolume](s.volumes, "", name)
}

// claimUse is a claim as one pod uses it. A new pod has its claims read anew: they may have been deleted and made again.
type claimUse struct {
	key string // namespace/name
	pod types.UID
}

// followClaims reads the claims of this node's pods and their volumes until they are bound. Nodes may get them one by one, not
// watch them (the Node authorizer), and what a node needs of a bound claim does not change.
func (s *Store) followClaims(ctx context.Context, client kubernetes.Interface) {
	changes, cancel := s.Subscribe(Pods)
	defer cancel()
	var readers followers[claimUse]
	defer readers.end()
	for first := true; ; first = false {
		want := map[claimUse]func(context.Context){}
		for _, p := range s.Pods() {
			for _, name := range ClaimNames(p) {
				want[claimUse{p.Namespace + "/" + name, p.UID}] = func(ctx context.Context) { s.readClaim(ctx, client, p.Namespace, name) }
			}
		}
		kept := map[string]bool{}
		readers.keep(func(use claimUse) bool {
			if want[use] == nil {
				return false
			}
			kept[use.key] = true
			return true
		})
		s.forgetClaims(want, kept, first)
		for use, read := range want {
			readers.start(ctx, use, read)
		}
		select {
		case <-ctx.Done():
			return
		case <-changes:
		}
	}
}

// forgetClaims drops claims that no pod uses any more, or only new pods, and volumes without such a claim. At first the store
// is as the last run left it, and what is wanted of it stays: the API may be out of reach.
func (s *Store) forgetClaims(want map[claimUse]func(context.Context), kept map[string]bool, first bool) {
	if first {
		for use := range want {
			kept[use.key] = true
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	used := map[string]bool{}
	for k, o := range s.claims.items {
		if !kept[k] {
			delete(s.claims.items, k)
			s.changed(Claims, k)
		} else if c, ok := o.(*corev1.PersistentVolumeClaim); ok && c != nil {
			used[c.Spec.VolumeName] = true
		}
	}
	for k := range s.volumes.items {
		if !used[k] {
			delete(s.volumes.items, k)
			s.changed(Volumes, k)
		}
	}
}

// readClaim reads a claim and its volume until they belong together, or ctx ends.
func (s *Store) readClaim(ctx context.Context, client kubernetes.Interface, namespace, name string) {
	pause := claimRetryFirst
	for !s.readClaimOnce(ctx, client, namespace, name) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, claimRetryLongest)
	}
}

func (s *Store) readClaimOnce(ctx context.Context, client kubernetes.Interface, namespace, name string) (done bool) {
	key := namespace + "/" + name
	claim, err := client.CoreV1().PersistentVolumeClaims(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		if apierrors.IsNotFound(err) && ctx.Err() == nil {
			_ = single{s.claims, key}.Replace(nil, "") // an empty list is never refused
		}
		return false
	}
	if claim.Spec.VolumeName == "" || claim.Status.Phase != corev1.ClaimBound {
		s.keepClaim(ctx, claim, nil)
		return false
	}
	volume, err := client.CoreV1().PersistentVolumes().Get(ctx, claim.Spec.VolumeName, metav1.GetOptions{})
	if err != nil {
		s.log.Debug("volume of a claim not read, tried again", "claim", key, "volume", claim.Spec.VolumeName, "err", err)
		return false
	}
	s.keepClaim(ctx, claim, volume)
	return volume.Spec.ClaimRef != nil && volume.Spec.ClaimRef.UID == claim.UID
}

// keepClaim stores a claim and its volume (nil: not bound) together, so that nobody sees one without the other.
func (s *Store) keepClaim(ctx context.Context, claim *corev1.PersistentVolumeClaim, volume *corev1.PersistentVolume) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ctx.Err() != nil {
		return // nobody wants it any more
	}
	if volume != nil {
		volume.SetManagedFields(nil)
		s.volumes.put(volume)
	}
	claim.SetManagedFields(nil)
	s.claims.put(claim)
}
