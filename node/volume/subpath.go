package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// HostPath returns the path on the node that a container's mount shows. A subPath (already expanded) is resolved inside
// the volume by the kernel (openat2, RESOLVE_BENEATH), so that a link planted by the pod cannot lead out of it, and pinned
// by a bind mount, so that it cannot be exchanged before the runtime mounts it. index is the mount's place in the container.
func (m *Manager) HostPath(pod *corev1.Pod, container string, index int, mount *corev1.VolumeMount, subPath string) (string, error) {
	v := volumeByName(pod, mount.Name)
	if v == nil {
		return "", fmt.Errorf("container %s: no volume is named %q", container, mount.Name)
	}
	base, err := m.path(pod, v)
	if err != nil {
		return "", err
	}
	if subPath == "" {
		if untypedHostPath(m, pod, v) {
			// An untyped path that does not exist becomes a directory, as by kubelet.
			if _, err := os.Stat(base); errors.Is(err, os.ErrNotExist) {
				err = os.MkdirAll(base, 0o755)
				return base, err
			}
		}
		return base, nil
	}
	if filepath.IsAbs(subPath) || hasDotDot(subPath) {
		return "", fmt.Errorf("subPath %q must be relative and must not contain '..'", subPath)
	}
	target := filepath.Join(m.PodDir(pod.UID), "volume-subpaths", mount.Name, container, strconv.Itoa(index))
	if err := bindBeneath(base, filepath.Clean(subPath), target); err != nil {
		return "", fmt.Errorf("subPath %q of volume %q: %w", subPath, mount.Name, err)
	}
	return target, nil
}

// untypedHostPath says that the volume is a path of the host whose type nobody has checked.
func untypedHostPath(m *Manager, pod *corev1.Pod, v *corev1.Volume) bool {
	h := v.HostPath
	if pv, err := m.persistent(pod, v); err == nil && pv != nil {
		h = pv.Spec.HostPath
	}
	return h != nil && (h.Type == nil || *h.Type == corev1.HostPathUnset)
}

func hasDotDot(p string) bool {
	for _, part := range strings.Split(p, "/") {
		if part == ".." {
			return true
		}
	}
	return false
}

func volumeByName(pod *corev1.Pod, name string) *corev1.Volume {
	for i := range pod.Spec.Volumes {
		if pod.Spec.Volumes[i].Name == name {
			return &pod.Spec.Volumes[i]
		}
	}
	return nil
}

func openBeneath(root int, p string) (int, error) {
	return unix.Openat2(root, p, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS})
}

// makeBeneath opens a path inside root and makes the directories that are missing, with the mode of root.
func makeBeneath(root int, p string, mode uint32) (int, error) {
	fd, err := openBeneath(root, p)
	if !errors.Is(err, unix.ENOENT) {
		return fd, err
	}
	parts := strings.Split(p, "/")
	for i := range parts {
		fd, err := openBeneath(root, strings.Join(parts[:i+1], "/"))
		if err == nil {
			_ = unix.Close(fd)
			continue
		}
		if !errors.Is(err, unix.ENOENT) {
			return -1, err
		}
		parent := root
		if i > 0 {
			if parent, err = openBeneath(root, strings.Join(parts[:i], "/")); err != nil {
				return -1, err
			}
		}
		err = unix.Mkdirat(parent, parts[i], mode)
		if err == nil {
			err = unix.Fchmodat(parent, parts[i], mode, 0) // past the umask
		}
		if i > 0 {
			_ = unix.Close(parent)
		}
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return -1, err
		}
	}
	return openBeneath(root, p)
}

func bindBeneath(base, sub, target string) error {
	root, err := unix.Open(base, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", base, err)
	}
	defer unix.Close(root)
	var st unix.Stat_t
	if err := unix.Fstat(root, &st); err != nil {
		return err
	}
	fd, err := makeBeneath(root, sub, st.Mode&0o7777)
	if errors.Is(err, unix.EXDEV) || errors.Is(err, unix.ELOOP) {
		return fmt.Errorf("it leads out of the volume: %w", err)
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	// A former container's bind may show an older object of this path.
	if ok, err := mounted(target); err == nil && ok {
		if err := unmountBelow(target); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(target); err != nil {
		return err
	}
	if err := placeholder(target, st.Mode&unix.S_IFMT == unix.S_IFDIR); err != nil {
		return err
	}
	if err := unix.Mount("/proc/self/fd/"+strconv.Itoa(fd), target, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind to %s: %w", target, err)
	}
	return nil
}

func placeholder(target string, dir bool) error {
	if dir {
		return os.MkdirAll(target, 0o750)
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o750); err != nil {
		return err
	}
	return os.WriteFile(target, nil, 0o640)
}
