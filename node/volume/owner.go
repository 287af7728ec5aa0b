package volume

import (
	"errors"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// Permission bits that fsGroup adds, as kubelet's SetVolumeOwnership does.
const (
	groupWrite = 0o660
	groupRead  = 0o440
	groupEnter = 0o110
)

// setGroup gives a tree to a group: readable, or writable too, directories entered and inherited by it.
func setGroup(root string, gid int64, readOnly bool) error {
	return filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			return err
		}
		if err := os.Lchown(p, -1, int(gid)); err != nil {
			return err
		}
		if info.Mode()&os.ModeSymlink != 0 {
			return nil
		}
		return os.Chmod(p, groupMode(info.Mode(), readOnly))
	})
}

// ownedBy says that a directory belongs to a group as setGroup leaves it.
func ownedBy(dir string, gid int64) bool {
	var st unix.Stat_t
	return unix.Stat(dir, &st) == nil && int64(st.Gid) == gid && st.Mode&(groupWrite|groupEnter|unix.S_ISGID) == groupWrite|groupEnter|unix.S_ISGID
}

// groupMode is the mode of a file or directory that a group owns.
func groupMode(mode os.FileMode, readOnly bool) os.FileMode {
	add := os.FileMode(groupWrite)
	if readOnly {
		add = groupRead
	}
	if mode.IsDir() {
		add |= groupEnter | os.ModeSetgid
	}
	return mode | add
}

// fsGroup returns the pod's fsGroup, nil when it has none.
func fsGroup(pod *corev1.Pod) *int64 {
	if pod.Spec.SecurityContext == nil {
		return nil
	}
	return pod.Spec.SecurityContext.FSGroup
}

// commonUser returns the user that all containers of a pod run as, nil when they differ or the spec does not tell. Tokens
// belong to it, so that they need not be readable by everyone.
func commonUser(pod *corev1.Pod) *int64 {
	var user *int64
	all := append(append([]corev1.Container(nil), pod.Spec.InitContainers...), pod.Spec.Containers...)
	for i := range all {
		var u *int64
		if sc := pod.Spec.SecurityContext; sc != nil {
			u = sc.RunAsUser
		}
		if sc := all[i].SecurityContext; sc != nil && sc.RunAsUser != nil {
			u = sc.RunAsUser
		}
		if u == nil || user != nil && *user != *u {
			return nil
		}
		user = u
	}
	return user
}
