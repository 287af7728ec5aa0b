// Package cgroup prepares, enters, kills and removes cgroups by path, in every hierarchy of the machine at once: the one of
// cgroup v2, all of v1, or both where they are mixed ("hybrid", where v2 has no controllers, but does have cgroup.kill, and is
// what eBPF programs attach to).
//
// A path is written as it is seen below the hierarchies' mount points, "/skein/node-1". All calls are idempotent
// and safe to run at once for different paths. Nothing here finds a process by its name.
package cgroup

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Hierarchy is one mounted tree of cgroups.
type Hierarchy struct {
	// Mount is the directory where it is mounted.
	Mount string
	// V2 tells the unified hierarchy from those of cgroup v1.
	V2 bool
	// Cpuset is set for the v1 hierarchy of that controller, whose new groups are empty and must be filled.
	Cpuset bool
}

// Hierarchies lists what is mounted in this process's mount namespace.
func Hierarchies() ([]Hierarchy, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroup hierarchies: %w", err)
	}
	defer f.Close()
	hs, err := parseMountinfo(f)
	if err != nil {
		return nil, err
	}
	if len(hs) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted: mount one (mount -t cgroup2 cgroup2 /sys/fs/cgroup), or boot with an init that does")
	}
	return hs, nil
}

// parseMountinfo reads the format of proc(5), /proc/[pid]/mountinfo.
func parseMountinfo(r io.Reader) ([]Hierarchy, error) {
	var hs []Hierarchy
	seen := map[string]bool{} // file system (device) of a hierarchy, which may be mounted more than once
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		head, tail, ok := strings.Cut(sc.Text(), " - ")
		h, t := strings.Fields(head), strings.Fields(tail)
		if !ok || len(h) < 6 || len(t) < 3 || h[3] != "/" {
			continue
		}
		if t[0] != "cgroup" && t[0] != "cgroup2" || seen[h[2]] {
			continue
		}
		seen[h[2]] = true
		hy := Hierarchy{Mount: unescape(h[4]), V2: t[0] == "cgroup2"}
		for _, o := range strings.Split(t[2], ",") {
			hy.Cpuset = hy.Cpuset || !hy.V2 && o == "cpuset"
		}
		hs = append(hs, hy)
	}
	if err := sc.Err(); err != nil {
		return nil, fmt.Errorf("read mountinfo: %w", err)
	}
	return hs, nil
}

// unescape undoes the octal escapes of mountinfo ("\040" is a space).
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// Unified gives the directory of p in the v2 hierarchy: where eBPF programs attach.
func Unified(p string) (string, error) {
	if err := Check(p); err != nil {
		return "", err
	}
	hs, err := Hierarchies()
	if err != nil {
		return "", err
	}
	for _, h := range hs {
		if h.V2 {
			return filepath.Join(h.Mount, p), nil
		}
	}
	return "", errors.New("no cgroup v2 hierarchy is mounted, and eBPF Services need one: boot with systemd.unified_cgroup_hierarchy=1")
}

// Check tells whether p can be used as a path here.
func Check(p string) error {
	if !path.IsAbs(p) || path.Clean(p) != p || p == "/" {
		return fmt.Errorf("cgroup path %q must be absolute, clean and not the root, like /skein", p)
	}
	return nil
}

// controllers that a node hands down to pods, where v2 has them.
var controllers = []string{"cpuset", "cpu", "io", "memory", "hugetlb", "pids"}

// Make creates each path with all its parents, in every hierarchy. In v1 it fills the cpusets; in v2 it hands every controller down
// to the paths' parents (not to the paths themselves: those may hold processes, and v2 allows only one of the two).
func Make(paths ...string) error {
	hs, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, p := range paths {
		if err := Check(p); err != nil {
			return err
		}
		for _, h := range hs {
			err := h.make(p)
			for try := 0; errors.Is(err, fs.ErrNotExist) && try < 10; try++ {
				err = h.make(p) // another one removed the empty parent in between
			}
			if err != nil {
				return fmt.Errorf("make cgroup %s: %w", p, err)
			}
		}
	}
	return nil
}

func (h Hierarchy) make(p string) error {
	dir := h.Mount
	for _, part := range strings.Split(p[1:], "/") {
		if h.V2 {
			h.delegate(dir)
		}
		parent := dir
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if h.Cpuset {
			if err := fillCpuset(parent, dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// delegate hands controllers down from dir. One at a time and without an error: which ones there are differs between machines, and a
// missing one shows where it is needed (the container runtime names it).
func (h Hierarchy) delegate(dir string) {
	have, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	down, _ := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	for _, c := range controllers {
		if contains(have, c) && !contains(down, c) {
			_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
		}
	}
}

func contains(list []byte, word string) bool {
	for _, w := range strings.Fields(string(list)) {
		if w == word {
			return true
		}
	}
	return false
}

// fillCpuset copies what is still empty from the parent; a process cannot enter an empty cpuset.
func fillCpuset(parent, dir string) error {
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		have, err := os.ReadFile(filepath.Join(dir, f))
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(have)) != "" {
			continue
		}
		v, err := os.ReadFile(filepath.Join(parent, f))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, f), v, 0); err != nil {
			return fmt.Errorf("%s of %s: %w", f, dir, err)
		}
	}
	return nil
}

// Enter moves process pid (0 = the caller), with all its threads, into p in every hierarchy. p must exist.
func Enter(p string, pid int) error {
	if err := Check(p); err != nil {
		return err
	}
	hs, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, h := range hs {
		if err := os.WriteFile(filepath.Join(h.Mount, p, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("enter cgroup %s: %w", p, err)
		}
	}
	return nil
}

// Exists tells whether p is there in any hierarchy.
func Exists(p string) (bool, error) {
	if err := Check(p); err != nil {
		return false, err
	}
	hs, err := Hierarchies()
	if err != nil {
		return false, err
	}
	for _, h := range hs {
		if _, err := os.Stat(filepath.Join(h.Mount, p)); err == nil {
			return true, nil
		}
	}
	return false, nil
}

// Pids lists the processes in p and below it, each once.
func Pids(p string) ([]int, error) {
	if err := Check(p); err != nil {
		return nil, err
	}
	hs, err := Hierarchies()
	if err != nil {
		return nil, err
	}
	seen := map[int]bool{}
	var pids []int
	for _, h := range hs {
		walk(filepath.Join(h.Mount, p), func(dir string) {
			b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil {
				return // gone meanwhile
			}
			for _, f := range strings.Fields(string(b)) {
				if n, err := strconv.Atoi(f); err == nil && n > 0 && !seen[n] {
					seen[n] = true
					pids = append(pids, n)
				}
			}
		})
	}
	return pids, nil
}

// walk calls f for every directory below dir, deepest first, and dir itself last.
func walk(dir string, f func(string)) {
	es, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range es {
		if e.IsDir() {
			walk(filepath.Join(dir, e.Name()), f)
		}
	}
	f(dir)
}

// Kill ends every process in p and below it with SIGKILL, and returns when none is left. Where there is v2 the kernel
// does it to the whole tree at once (cgroup.kill, Linux 5.14).
func Kill(ctx context.Context, p string) error {
	if err := Check(p); err != nil {
		return err
	}
	hs, err := Hierarchies()
	if err != nil {
		return err
	}
	for _, h := range hs {
		if h.V2 {
			_ = os.WriteFile(filepath.Join(h.Mount, p, "cgroup.kill"), []byte("1"), 0)
		}
	}
	self := os.Getpid()
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		pids, err := Pids(p)
		if err != nil {
			return err
		}
		left := 0
		for _, pid := range pids {
			if pid == self {
				return fmt.Errorf("kill cgroup %s: the caller is in it", p)
			}
			if zombie(pid) {
				continue // dead already; its parent may be anyone
			}
			left++
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("kill cgroup %s: %d processes left: %w", p, left, ctx.Err())
		case <-time.After(wait):
		}
	}
}

// zombie tells whether pid has ended and only waits for its parent (proc(5), /proc/[pid]/stat, third field).
func zombie(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	_, rest, _ := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " ")
	return strings.HasPrefix(rest, "Z") || strings.HasPrefix(rest, "X")
}

// Remove removes p and all below it. It must hold no process; a group that empties only now is waited for until ctx ends.
func Remove(ctx context.Context, p string) error {
	if err := Check(p); err != nil {
		return err
	}
	hs, err := Hierarchies()
	if err != nil {
		return err
	}
	var (
		wg   sync.WaitGroup
		errs = make([]error, len(hs))
	)
	for i, h := range hs { // at once: a v1 hierarchy may take milliseconds for a directory
		wg.Go(func() { errs[i] = remove(ctx, filepath.Join(h.Mount, p)) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove cgroup %s: %w", p, err)
	}
	return nil
}

func remove(ctx context.Context, dir string) error {
	for wait := time.Millisecond; ; wait = min(2*wait, 50*time.Millisecond) {
		var last error
		walk(dir, func(d string) {
			if err := unix.Rmdir(d); err != nil && !errors.Is(err, unix.ENOENT) {
				last = &fs.PathError{Op: "rmdir", Path: d, Err: err}
			}
		})
		if last == nil {
			return nil
		}
		if !errors.Is(last, unix.EBUSY) {
			return last
		}
		select {
		case <-ctx.Done():
			return errors.Join(last, ctx.Err())
		case <-time.After(wait):
		}
	}
}
