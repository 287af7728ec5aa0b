// Package cgroup makes and removes the cgroups of pods, one directory per pod below a root, in every hierarchy: pure v1,
// hybrid (v1 controllers and an unused v2 tree) or pure v2. The container runtime puts each container into a child of its
// pod's cgroup but neither sets the pod's limits nor removes it.
//
// All functions are idempotent and may be called from any goroutine, for one pod from one at a time.
package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Mount is where the hierarchies are mounted by every current distribution.
const Mount = "/sys/fs/cgroup"

// CPUPeriod is the period of CPU quotas, in microseconds.
const CPUPeriod = 100000

// Limits of a pod. Zero values are not set.
type Limits struct {
	// MilliCPURequest decides the share under contention.
	MilliCPURequest int64
	// MilliCPULimit is the quota; zero: none.
	MilliCPULimit int64
	// MemoryLimit in bytes; zero: none.
	MemoryLimit int64
}

// Larger is what holds both a and b: a cgroup that goes from a to b has it in between, while its children change. No limit is the
// largest one.
func Larger(a, b Limits) Limits {
	limit := func(x, y int64) int64 {
		if x == 0 || y == 0 {
			return 0
		}
		return max(x, y)
	}
	return Limits{max(a.MilliCPURequest, b.MilliCPURequest), limit(a.MilliCPULimit, b.MilliCPULimit), limit(a.MemoryLimit, b.MemoryLimit)}
}

// Pods are the pod cgroups of a node.
type Pods struct {
	// Mount of the hierarchies; default Mount.
	Mount string
	// Parent is the path within each hierarchy, such as /skein/pods.
	Parent string
}

func (p Pods) mount() string {
	if p.Mount == "" {
		return Mount
	}
	return p.Mount
}

// Path is a pod's cgroup, as the runtime is told.
func (p Pods) Path(uid string) string { return filepath.Join(p.Parent, uid) }

// hierarchy is one mounted tree.
type hierarchy struct {
	dir         string
	v2          bool
	controllers map[string]bool
}

func (p Pods) hierarchies() ([]hierarchy, error) {
	var st unix.Statfs_t
	root := p.mount()
	if err := unix.Statfs(root, &st); err != nil {
		return nil, fmt.Errorf("cgroups at %s: %w", root, err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return []hierarchy{{dir: root, v2: true}}, nil
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, fmt.Errorf("cgroups at %s: %w", root, err)
	}
	var out []hierarchy
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		if !e.IsDir() || unix.Statfs(dir, &st) != nil { // links such as cpu -> cpu,cpuacct are not visited twice
			continue
		}
		switch st.Type {
		case unix.CGROUP2_SUPER_MAGIC:
			out = append(out, hierarchy{dir: dir, v2: true})
		case unix.CGROUP_SUPER_MAGIC:
			h := hierarchy{dir: dir, controllers: map[string]bool{}}
			for _, c := range strings.Split(e.Name(), ",") {
				h.controllers[c] = true
			}
			out = append(out, h)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("cgroups at %s: no hierarchy is mounted", root)
	}
	return out, nil
}

// Ensure makes a pod's cgroup in every hierarchy and sets its limits.
func (p Pods) Ensure(uid string, l Limits) error {
	hs, err := p.hierarchies()
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range hs {
		dir := filepath.Join(h.dir, p.Path(uid))
		if err := prepare(h, p.Path(uid)); err != nil {
			errs = append(errs, fmt.Errorf("make cgroup %s: %w", dir, err))
			continue
		}
		for file, value := range files(h, l) {
			if _, err := os.Stat(filepath.Join(dir, file)); errors.Is(err, fs.ErrNotExist) && h.v2 {
				continue // a v2 tree without this controller: another hierarchy has it
			}
			if err := write(dir, file, value); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// files are the settings of a pod in one hierarchy.
func files(h hierarchy, l Limits) map[string]string {
	out := map[string]string{}
	if h.v2 {
		out["cpu.weight"] = strconv.FormatInt(weight(shares(l.MilliCPURequest)), 10)
		out["cpu.max"] = "max " + strconv.Itoa(CPUPeriod)
		if l.MilliCPULimit > 0 {
			out["cpu.max"] = fmt.Sprintf("%d %d", l.MilliCPULimit*CPUPeriod/1000, CPUPeriod)
		}
		out["memory.max"] = "max"
		if l.MemoryLimit > 0 {
			out["memory.max"] = strconv.FormatInt(l.MemoryLimit, 10)
		}
		return out
	}
	if h.controllers["cpu"] {
		out["cpu.shares"] = strconv.FormatInt(shares(l.MilliCPURequest), 10)
		if l.MilliCPULimit > 0 {
			out["cpu.cfs_period_us"] = strconv.Itoa(CPUPeriod)
			out["cpu.cfs_quota_us"] = strconv.FormatInt(l.MilliCPULimit*CPUPeriod/1000, 10)
		}
	}
	if h.controllers["memory"] && l.MemoryLimit > 0 {
		out["memory.limit_in_bytes"] = strconv.FormatInt(l.MemoryLimit, 10)
	}
	return out
}

// shares turns milli-CPUs into v1 shares: 1024 for one CPU, at least 2.
func shares(milli int64) int64 { return min(max(milli*1024/1000, 2), 262144) }

// weight turns v1 shares (2 to 262144) into a v2 weight (1 to 10000).
func weight(shares int64) int64 { return 1 + (shares-2)*9999/262142 }

func write(dir, file, value string) error {
	if err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0o644); err != nil {
		return fmt.Errorf("set %s of cgroup %s to %s: %w", file, dir, value, err)
	}
	return nil
}

// prepare makes a cgroup and what is above it, top down, and hands on what children need: v2 controllers must be enabled in
// each parent, a v1 cpuset starts empty.
func prepare(h hierarchy, path string) error {
	dir := h.dir
	for _, part := range strings.Split(strings.Trim(path, "/"), "/") {
		if h.v2 {
			enable(dir)
		}
		parent := dir
		dir = filepath.Join(dir, part)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if h.controllers["cpuset"] {
			for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
				if err := inherit(parent, dir, f); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func inherit(parent, dir, file string) error {
	have, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil || strings.TrimSpace(string(have)) != "" {
		return err
	}
	v, err := os.ReadFile(filepath.Join(parent, file))
	if err != nil {
		return err
	}
	return write(dir, file, string(v))
}

// enable hands all controllers that a v2 cgroup has on to its children. Where that is refused (a process lives in it),
// limits of those controllers cannot be set, which Ensure reports.
func enable(dir string) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, c := range strings.Fields(string(b)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0o644)
	}
}

// MemoryUsage is how much memory a pod's cgroup is charged with, in bytes, page cache included.
func (p Pods) MemoryUsage(uid string) (int64, error) {
	hs, err := p.hierarchies()
	if err != nil {
		return 0, err
	}
	for _, h := range hs {
		file := "memory.current"
		if !h.v2 {
			file = "memory.usage_in_bytes"
		}
		b, err := os.ReadFile(filepath.Join(h.dir, p.Path(uid), file))
		if errors.Is(err, fs.ErrNotExist) {
			continue // another hierarchy has the controller
		}
		if err != nil {
			return 0, fmt.Errorf("memory usage of pod %s: %w", uid, err)
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("memory usage of pod %s: %s: %w", uid, file, err)
		}
		return n, nil
	}
	return 0, fmt.Errorf("memory usage of pod %s: no hierarchy counts it", uid)
}

// List returns the pods that have a cgroup in any hierarchy, sorted.
func (p Pods) List() ([]string, error) {
	hs, err := p.hierarchies()
	if err != nil {
		return nil, err
	}
	set := map[string]bool{}
	for _, h := range hs {
		entries, err := os.ReadDir(filepath.Join(h.dir, p.Parent))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list pod cgroups: %w", err)
		}
		for _, e := range entries {
			if e.IsDir() {
				set[e.Name()] = true
			}
		}
	}
	out := make([]string, 0, len(set))
	for n := range set {
		out = append(out, n)
	}
	sort.Strings(out)
	return out, nil
}

// removeTries and removePause bound the wait for processes that are being reaped.
const (
	removeTries = 20
	removePause = 50 * time.Millisecond
)

// Remove kills what is left in a pod's cgroup and removes it in every hierarchy.
func (p Pods) Remove(uid string) error {
	if uid == "" || strings.Contains(uid, "/") || strings.HasPrefix(uid, ".") {
		return fmt.Errorf("remove cgroup of pod %q: not a UID", uid)
	}
	hs, err := p.hierarchies()
	if err != nil {
		return err
	}
	var errs []error
	for try := range removeTries {
		errs = errs[:0]
		for _, h := range hs {
			if err := removeTree(filepath.Join(h.dir, p.Path(uid))); err != nil {
				errs = append(errs, fmt.Errorf("remove cgroup of pod %s: %w", uid, err))
			}
		}
		if len(errs) == 0 {
			return nil
		}
		for _, h := range hs {
			killTree(filepath.Join(h.dir, p.Path(uid)))
		}
		if try < removeTries-1 {
			time.Sleep(removePause)
		}
	}
	return errors.Join(errs...)
}

func removeTree(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "rmdir", Path: dir, Err: err}
	}
	return nil
}

// killTree kills every process in a cgroup and below.
func killTree(dir string) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() != "cgroup.procs" {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		for _, f := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(f); err == nil && pid > 1 {
				_ = unix.Kill(pid, unix.SIGKILL)
			}
		}
		return nil
	})
}
