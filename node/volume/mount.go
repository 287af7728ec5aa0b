package volume

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/types"
)

func mounted(dir string) (bool, error) {
	ok, err := mountinfo.Mounted(dir)
	if err != nil {
		return false, fmt.Errorf("look for a mount at %s: %w", dir, err)
	}
	return ok, nil
}

func ensureTmpfs(dir string, size int64) error {
	_, err := mountTmpfs(dir, size)
	return err
}

// mountTmpfs mounts a tmpfs of at most size bytes (0: no limit of ours) unless one is there. It reports whether it did.
func mountTmpfs(dir string, size int64) (bool, error) {
	if ok, err := mounted(dir); err != nil || ok {
		return false, err
	}
	opts := "noswap"
	if size > 0 {
		opts += ",size=" + strconv.FormatInt(size, 10)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV
	err := unix.Mount("tmpfs", dir, "tmpfs", flags, opts)
	if errors.Is(err, unix.EINVAL) { // noswap came with Linux 6.4
		err = unix.Mount("tmpfs", dir, "tmpfs", flags, strings.TrimPrefix(strings.TrimPrefix(opts, "noswap"), ","))
	}
	if err != nil {
		return false, fmt.Errorf("mount tmpfs at %s: %w", dir, err)
	}
	return true, nil
}

// mountsBelow lists mount points at or below dir, deepest first.
func mountsBelow(dir string) ([]string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, fmt.Errorf("list mounts below %s: %w", dir, err)
	}
	out := make([]string, len(infos))
	for i, in := range infos {
		out[i] = in.Mountpoint
	}
	sort.Slice(out, func(i, j int) bool { return len(out[i]) > len(out[j]) })
	return out, nil
}

// unmountBelow takes away every mount at or below dir. A busy one is detached: the kernel frees it with its last user.
func unmountBelow(dir string) error {
	points, err := mountsBelow(dir)
	if err != nil {
		return err
	}
	for _, p := range points {
		if err := unix.Unmount(p, unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) {
			if err := unix.Unmount(p, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
				return fmt.Errorf("unmount %s: %w", p, err)
			}
		}
	}
	if points, err = mountsBelow(dir); err != nil {
		return err
	}
	if len(points) > 0 {
		return fmt.Errorf("still mounted: %s", strings.Join(points, ", "))
	}
	return nil
}

// RemoveAll removes what the manager of a directory made for all pods. Nothing is deleted through a mount: what a pod saw of the host stays.
func RemoveAll(dir string) error {
	if err := unmountBelow(dir); err != nil {
		return fmt.Errorf("volumes of all pods: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("volumes of all pods: %w", err)
	}
	return nil
}

// Teardown removes everything of a pod: mounts, files, tokens. It may be called again after a failure.
func (m *Manager) Teardown(uid types.UID) error {
	if uid == "" || strings.ContainsAny(string(uid), "/") || uid == ".." || uid == "." {
		return fmt.Errorf("volumes of pod %q: not a UID", uid)
	}
	dir := m.PodDir(uid)
	if err := unmountBelow(dir); err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("volumes of pod %s: %w", uid, err)
	}
	m.cfg.Tokens.DeleteTokens(uid)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.pods, uid)
	return nil
}

// Pods lists the pods that have a directory, for finding orphans after a crash.
func (m *Manager) Pods() ([]types.UID, error) {
	entries, err := os.ReadDir(m.cfg.Dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list pod directories: %w", err)
	}
	out := make([]types.UID, 0, len(entries))
	for _, e := range entries {
		if e.IsDir() {
			out = append(out, types.UID(filepath.Base(e.Name())))
		}
	}
	return out, nil
}
