package volume

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Config of a Manager.
type Config struct {
	// Dir holds one directory per pod, named by its UID. Required.
	Dir string
	// Source of ConfigMaps, Secrets and claims. Required.
	Source Source
	// Tokens keeps ServiceAccount tokens. Required.
	Tokens TokenStore
	// RequestToken asks the API for a token. Required.
	RequestToken func(ctx context.Context, namespace, serviceAccount string, req *authv1.TokenRequest) (*authv1.TokenRequest, error)
	// Now is the clock; default time.Now.
	Now func() time.Time
	// Logger; default: discard.
	Logger *slog.Logger
}

func (c *Config) setDefaults() {
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate reports all faults at once.
func (c *Config) Validate() error {
	var errs []error
	if !filepath.IsAbs(c.Dir) {
		errs = append(errs, fmt.Errorf("volume: Dir %q must be an absolute path", c.Dir))
	}
	if c.Source == nil {
		errs = append(errs, errors.New("volume: Source is missing"))
	}
	if c.Tokens == nil {
		errs = append(errs, errors.New("volume: Tokens is missing"))
	}
	if c.RequestToken == nil {
		errs = append(errs, errors.New("volume: RequestToken is missing"))
	}
	return errors.Join(errs...)
}

// Manager makes and removes volumes.
type Manager struct {
	cfg Config
	// mu guards pods.
	mu   sync.Mutex
	pods map[types.UID]*podState
}

// podState is what is remembered of a pod between calls.
type podState struct {
	wake  time.Time            // when Setup is to be called again
	retry map[string]time.Time // token key -> not before
	owned map[string]bool      // local volumes that belong to the pod's group already
}

// New makes a Manager.
func New(cfg Config) (*Manager, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	return &Manager{cfg: cfg, pods: map[types.UID]*podState{}}, nil
}

func (m *Manager) state(uid types.UID) *podState {
	st := m.pods[uid]
	if st == nil {
		st = &podState{retry: map[string]time.Time{}, owned: map[string]bool{}}
		m.pods[uid] = st
	}
	return st
}

func (m *Manager) wakeAt(uid types.UID, t time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if st := m.state(uid); st.wake.IsZero() || t.Before(st.wake) {
		st.wake = t
	}
}

func (m *Manager) retryAfter(uid types.UID, key string) time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state(uid).retry[key]
}

func (m *Manager) setRetry(uid types.UID, key string, t time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state(uid).retry[key] = t
}

// PodDir is the directory of a pod.
func (m *Manager) PodDir(uid types.UID) string { return filepath.Join(m.cfg.Dir, string(uid)) }

// Error is a failure to make one volume.
type Error struct {
	Volume string
	Err    error
}

func (e *Error) Error() string {
	return fmt.Sprintf("MountVolume.SetUp failed for volume %q : %v", e.Volume, e.Err)
}

func (e *Error) Unwrap() error { return e.Err }

// Setup makes all volumes of a pod or brings them up to date. It returns when it is to be called again for a token that
// will expire (zero: no such time). The error joins an *Error for each volume that failed; the others are made.
func (m *Manager) Setup(ctx context.Context, pod *corev1.Pod, facts PodFacts) (time.Time, error) {
	m.mu.Lock()
	m.state(pod.UID).wake = time.Time{}
	m.mu.Unlock()
	var errs []error
	if err := os.MkdirAll(filepath.Join(m.PodDir(pod.UID), "volumes"), 0o750); err != nil {
		return time.Time{}, fmt.Errorf("make directories of pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	for i := range pod.Spec.Volumes {
		v := &pod.Spec.Volumes[i]
		if err := m.setup(ctx, pod, facts, v); err != nil {
			errs = append(errs, &Error{v.Name, err})
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state(pod.UID).wake, errors.Join(errs...)
}

func (m *Manager) setup(ctx context.Context, pod *corev1.Pod, facts PodFacts, v *corev1.Volume) error {
	switch {
	case v.EmptyDir != nil:
		return m.emptyDir(pod, v)
	case v.HostPath != nil:
		return checkHostPath(v.HostPath)
	case v.Image != nil:
		return nil // mounted by the container runtime, container by container
	case v.NFS != nil:
		return m.mountNFS(ctx, pod, v, v.NFS.Server, v.NFS.Path, v.NFS.ReadOnly, nil)
	}
	if pv, err := m.persistent(pod, v); err != nil {
		return err
	} else if pv != nil {
		return m.setupClaim(ctx, pod, facts, v, pv)
	}
	payload, ok, err := m.payload(ctx, pod, facts, v)
	if err != nil {
		return err
	}
	if !ok {
		return errors.New("this node does not support volumes of this kind (supported: emptyDir, hostPath, configMap, secret, downwardAPI, projected, image, nfs, and claims of hostPath, local and nfs volumes)")
	}
	dir, _ := m.path(pod, v)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// Secrets, tokens and pod metadata never touch a disk.
	if v.ConfigMap == nil {
		if err := ensureTmpfs(dir, 0); err != nil {
			return err
		}
	}
	if err := os.Chmod(dir, 0o777|os.ModeSticky); err != nil {
		return err
	}
	gid := fsGroup(pod)
	_, err = writeAtomically(dir, payload, func(fresh string) error {
		if gid == nil {
			return nil
		}
		return setGroup(fresh, *gid, true)
	}, m.cfg.Now())
	return err
}

// path is where a volume lies on the node.
func (m *Manager) path(pod *corev1.Pod, v *corev1.Volume) (string, error) {
	if pv, err := m.persistent(pod, v); err != nil {
		return "", err
	} else if pv != nil {
		return m.claimPath(pod, v, pv)
	}
	plugin := ""
	switch {
	case v.HostPath != nil:
		return v.HostPath.Path, nil
	case v.NFS != nil:
		return m.nfsPath(pod, v), nil
	case v.EmptyDir != nil:
		plugin = "empty-dir"
	case v.ConfigMap != nil:
		plugin = "configmap"
	case v.Secret != nil:
		plugin = "secret"
	case v.DownwardAPI != nil:
		plugin = "downward-api"
	case v.Projected != nil:
		plugin = "projected"
	default:
		return "", fmt.Errorf("volume %q is of a kind this node does not support", v.Name)
	}
	return filepath.Join(m.PodDir(pod.UID), "volumes", "kubernetes.io~"+plugin, v.Name), nil
}

func (m *Manager) emptyDir(pod *corev1.Pod, v *corev1.Volume) error {
	dir, err := m.path(pod, v)
	if err != nil {
		return err
	}
	switch v.EmptyDir.Medium {
	case corev1.StorageMediumDefault, corev1.StorageMediumMemory:
	default:
		return fmt.Errorf("emptyDir medium %q is not supported by this node", v.EmptyDir.Medium)
	}
	gid := fsGroup(pod)
	if v.EmptyDir.Medium == corev1.StorageMediumMemory {
		if err := os.MkdirAll(dir, 0o777); err != nil {
			return err
		}
		if fresh, err := mountTmpfs(dir, emptyDirSize(pod, v.EmptyDir)); err != nil || !fresh {
			return err
		}
		return open(dir, gid)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		return err // made before: what the pod did to its modes stays
	}
	// Made under another name first, so that a crash leaves no directory with the wrong mode. No volume name has a dot.
	fresh := dir + ".new"
	if err := os.MkdirAll(fresh, 0o777); err != nil {
		return err
	}
	if err := open(fresh, gid); err != nil {
		return err
	}
	return os.Rename(fresh, dir)
}

// open lets every user of a pod use an empty directory.
func open(dir string, gid *int64) error {
	if err := os.Chmod(dir, 0o777); err != nil {
		return err
	}
	if gid != nil {
		return setGroup(dir, *gid, false)
	}
	return nil
}

// emptyDirSize is the size in bytes of a memory volume: its limit, but not more than the pod's memory limit when every
// container has one; 0 is the kernel's default (half of the memory).
func emptyDirSize(pod *corev1.Pod, e *corev1.EmptyDirVolumeSource) int64 {
	var sum int64
	for i := range pod.Spec.Containers {
		l := pod.Spec.Containers[i].Resources.Limits.Memory()
		if l.IsZero() {
			sum = 0
			break
		}
		sum += l.Value()
	}
	if e.SizeLimit != nil && e.SizeLimit.Value() > 0 && (sum == 0 || e.SizeLimit.Value() < sum) {
		return e.SizeLimit.Value()
	}
	return sum
}
