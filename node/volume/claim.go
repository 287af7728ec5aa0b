package volume

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/component-helpers/storage/ephemeral"
	volumehelpers "k8s.io/component-helpers/storage/volume"
)

// mountTimeout bounds one call of mount(8): a server that does not answer must not hold the pod's worker for ever.
const mountTimeout = 2 * time.Minute

// claimName is the claim that a volume stands for, "" for none.
func claimName(pod *corev1.Pod, v *corev1.Volume) string {
	switch {
	case v.PersistentVolumeClaim != nil:
		return v.PersistentVolumeClaim.ClaimName
	case v.Ephemeral != nil:
		return ephemeral.VolumeClaimName(pod, v)
	}
	return ""
}

// persistent returns the persistent volume behind a pod's volume; nil if it stands for no claim.
func (m *Manager) persistent(pod *corev1.Pod, v *corev1.Volume) (*corev1.PersistentVolume, error) {
	name := claimName(pod, v)
	if name == "" {
		return nil, nil
	}
	wrap := func(err error) error {
		return fmt.Errorf("error processing PVC %s/%s: %w", pod.Namespace, name, err)
	}
	claim, err := m.cfg.Source.Claim(pod.Namespace, name)
	if err != nil {
		return nil, wrap(err)
	}
	if v.Ephemeral != nil {
		if err := ephemeral.VolumeIsForPod(pod, claim); err != nil {
			return nil, wrap(err)
		}
	}
	switch {
	case claim.DeletionTimestamp != nil && !m.given(pod, v):
		return nil, wrap(errors.New("PVC is being deleted"))
	case claim.Status.Phase != corev1.ClaimBound || claim.Spec.VolumeName == "":
		return nil, wrap(errors.New("PVC is not bound"))
	}
	pv, err := m.cfg.Source.Volume(claim.Spec.VolumeName)
	if err != nil {
		return nil, wrap(err)
	}
	if ref := pv.Spec.ClaimRef; ref == nil || ref.UID != claim.UID {
		return nil, wrap(fmt.Errorf("PV %s is bound to another claim", pv.Name))
	}
	return pv, nil
}

// givenPath notes that a pod has got its claim: a pod that runs keeps it, also when the claim is being deleted and the daemon
// starts anew; a pod that comes then does not get it.
func (m *Manager) givenPath(pod *corev1.Pod, v *corev1.Volume) string {
	return filepath.Join(m.PodDir(pod.UID), "claims", v.Name)
}

func (m *Manager) given(pod *corev1.Pod, v *corev1.Volume) bool {
	_, err := os.Stat(m.givenPath(pod, v))
	return err == nil
}

// setupClaim makes a persistent volume ready for a pod.
func (m *Manager) setupClaim(ctx context.Context, pod *corev1.Pod, facts PodFacts, v *corev1.Volume, pv *corev1.PersistentVolume) error {
	if err := m.setupPersistent(ctx, pod, facts, v, pv); err != nil {
		return err
	}
	return os.MkdirAll(m.givenPath(pod, v), 0o750)
}

func (m *Manager) setupPersistent(ctx context.Context, pod *corev1.Pod, facts PodFacts, v *corev1.Volume, pv *corev1.PersistentVolume) error {
	if err := volumehelpers.CheckNodeAffinity(pv, facts.NodeLabels); err != nil {
		return fmt.Errorf("storage node affinity check failed for volume %q: %w", pv.Name, err)
	}
	if mode := pv.Spec.VolumeMode; mode != nil && *mode == corev1.PersistentVolumeBlock {
		return fmt.Errorf("PersistentVolume %s is a raw block volume, which this node does not support", pv.Name)
	}
	switch {
	case pv.Spec.HostPath != nil:
		return checkHostPath(pv.Spec.HostPath)
	case pv.Spec.Local != nil:
		return m.setupLocal(pod, v, pv.Spec.Local.Path)
	case pv.Spec.NFS != nil:
		n := pv.Spec.NFS
		return m.mountNFS(ctx, pod, v, n.Server, n.Path, n.ReadOnly, pv.Spec.MountOptions)
	}
	return fmt.Errorf("PersistentVolume %s is of a kind this node does not support (supported: hostPath, local, nfs)", pv.Name)
}

// setupLocal checks a directory of the node, and gives it to the pod's group once.
func (m *Manager) setupLocal(pod *corev1.Pod, v *corev1.Volume, dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("local volume: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("local volume %s is not a directory (this node makes no file systems on devices)", dir)
	}
	gid := fsGroup(pod)
	if gid == nil || readOnlyClaim(v) {
		return nil
	}
	m.mu.Lock()
	done := m.state(pod.UID).owned[v.Name]
	m.mu.Unlock()
	if done {
		return nil
	}
	if policy := pod.Spec.SecurityContext.FSGroupChangePolicy; policy == nil || *policy != corev1.FSGroupChangeOnRootMismatch || !ownedBy(dir, *gid) {
		if err := setGroup(dir, *gid, false); err != nil {
			return fmt.Errorf("give %s to group %d: %w", dir, *gid, err)
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state(pod.UID).owned[v.Name] = true
	return nil
}

// readOnlyClaim says that the pod wants the claim read-only.
func readOnlyClaim(v *corev1.Volume) bool {
	return v.PersistentVolumeClaim != nil && v.PersistentVolumeClaim.ReadOnly
}

// ReadOnly says that every mount of a pod's volume is read-only, whatever the container asks for.
func (m *Manager) ReadOnly(pod *corev1.Pod, name string) bool {
	v := volumeByName(pod, name)
	if v == nil {
		return false
	}
	if v.NFS != nil {
		return v.NFS.ReadOnly
	}
	if readOnlyClaim(v) {
		return true
	}
	pv, err := m.persistent(pod, v)
	return err == nil && pv != nil && pv.Spec.NFS != nil && pv.Spec.NFS.ReadOnly
}

// claimPath is where a persistent volume lies on the node.
func (m *Manager) claimPath(pod *corev1.Pod, v *corev1.Volume, pv *corev1.PersistentVolume) (string, error) {
	switch {
	case pv.Spec.HostPath != nil:
		return pv.Spec.HostPath.Path, nil
	case pv.Spec.Local != nil:
		return pv.Spec.Local.Path, nil
	case pv.Spec.NFS != nil:
		return m.nfsPath(pod, v), nil
	}
	return "", fmt.Errorf("volume %q: PersistentVolume %s is of a kind this node does not support", v.Name, pv.Name)
}

func (m *Manager) nfsPath(pod *corev1.Pod, v *corev1.Volume) string {
	return filepath.Join(m.PodDir(pod.UID), "volumes", "kubernetes.io~nfs", v.Name)
}

// mountNFS mounts an export unless it is mounted. The node needs mount.nfs, as with kubelet.
func (m *Manager) mountNFS(ctx context.Context, pod *corev1.Pod, v *corev1.Volume, server, export string, readOnly bool, options []string) error {
	dir := m.nfsPath(pod, v)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	if ok, err := mounted(dir); err != nil || ok {
		return err
	}
	if readOnly {
		options = append([]string{"ro"}, options...)
	}
	if strings.Contains(server, ":") {
		server = "[" + strings.Trim(server, "[]") + "]"
	}
	args := []string{"-t", "nfs"}
	if len(options) > 0 {
		args = append(args, "-o", strings.Join(options, ","))
	}
	ctx, cancel := context.WithTimeout(ctx, mountTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, "mount", append(args, server+":"+export, dir)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mount %s:%s: %w: %s", server, export, err, strings.TrimSpace(string(out)))
	}
	return nil
}
