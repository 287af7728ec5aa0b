package desired

import (
	"errors"
	"path/filepath"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
)

func claiming(p *corev1.Pod, claim string) *corev1.Pod {
	p.Spec.Volumes = append(p.Spec.Volumes, corev1.Volume{Name: claim, VolumeSource: corev1.VolumeSource{PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim}}})
	return p
}

func boundPair(claim, volume string, uid types.UID) (*corev1.PersistentVolumeClaim, *corev1.PersistentVolume) {
	return &corev1.PersistentVolumeClaim{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: claim, UID: uid, ResourceVersion: "1"},
			Spec: corev1.PersistentVolumeClaimSpec{VolumeName: volume}, Status: corev1.PersistentVolumeClaimStatus{Phase: corev1.ClaimBound}},
		&corev1.PersistentVolume{ObjectMeta: metav1.ObjectMeta{Name: volume, ResourceVersion: "1"}, Spec: corev1.PersistentVolumeSpec{ClaimRef: &corev1.ObjectReference{UID: uid}}}
}

func TestClaimsOfPodsAreKnownAfterAReboot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "desired.db")
	claim, volume := boundPair("c", "pv", "u1")
	pending := claim.DeepCopy()
	pending.Spec.VolumeName, pending.Status.Phase = "", corev1.ClaimPending
	c := fake.NewClientset(claiming(pod("a"), "c"), claiming(pod("b"), "none"), pending)
	s := mustOpen(t, path)
	if _, err := s.Claim("default", "c"); !errors.Is(err, ErrUnknown) {
		t.Errorf("before anything was heard: %v", err)
	}
	stop := run(t, s, c)
	await(t, s, "a claim that is not bound, and one that does not exist", func() bool {
		got, err := s.Claim("default", "c")
		_, missing := s.Claim("default", "none")
		return err == nil && got.Status.Phase == corev1.ClaimPending && apierrors.IsNotFound(missing)
	})
	// The binder gets on.
	if _, err := c.CoreV1().PersistentVolumes().Create(t.Context(), volume, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	claim.ResourceVersion = "2"
	if _, err := c.CoreV1().PersistentVolumeClaims("default").Update(t.Context(), claim, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	await(t, s, "the bound claim with its volume", func() bool {
		got, err := s.Claim("default", "c")
		if err != nil || got.Spec.VolumeName != "pv" {
			return false
		}
		if _, err := s.Volume("pv"); err != nil {
			t.Errorf("a bound claim without its volume: %v", err)
		}
		return true
	})
	stop()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	down := unreachable()
	s = mustOpen(t, path)
	stop = run(t, s, down)
	if _, err := s.Claim("default", "c"); err != nil {
		t.Errorf("after a reboot without the API: %v", err)
	}
	if _, err := s.Volume("pv"); err != nil {
		t.Errorf("after a reboot without the API: %v", err)
	}
	stop()

	// Another pod of that name comes with another claim of that name: what was known is not for it.
	claim2, volume2 := boundPair("c", "pv2", "u2")
	fresh := claiming(pod("a"), "c")
	c2 := fake.NewClientset(claiming(pod("a"), "c"), claim2, volume2)
	stop = run(t, s, c2)
	await(t, s, "the claim as it is now", func() bool {
		got, err := s.Claim("default", "c")
		return err == nil && got.UID == "u2"
	})
	fresh.UID, fresh.ResourceVersion = "uid-again", "7"
	claim3, volume3 := boundPair("c", "pv3", "u3")
	claim3.ResourceVersion = "3"
	if _, err := c2.CoreV1().PersistentVolumes().Create(t.Context(), volume3, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c2.CoreV1().PersistentVolumeClaims("default").Update(t.Context(), claim3, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := c2.CoreV1().Pods("default").Update(t.Context(), fresh, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	await(t, s, "the claim of the new pod", func() bool {
		got, err := s.Claim("default", "c")
		return err == nil && got.UID == "u3"
	})
	if err := c2.CoreV1().Pods("default").Delete(t.Context(), "a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	await(t, s, "nothing that no pod needs", func() bool {
		_, e1 := s.Claim("default", "c")
		_, e2 := s.Volume("pv3")
		return errors.Is(e1, ErrUnknown) && errors.Is(e2, ErrUnknown)
	})
	stop()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}
