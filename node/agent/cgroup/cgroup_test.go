package cgroup

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func TestFiles(t *testing.T) {
	cpu := hierarchy{controllers: map[string]bool{"cpu": true, "cpuacct": true}}
	mem := hierarchy{controllers: map[string]bool{"memory": true}}
	two := hierarchy{v2: true}
	for _, c := range []struct {
		h    hierarchy
		l    Limits
		want string
	}{
		{cpu, Limits{}, "cpu.shares=2"},
		{cpu, Limits{MilliCPURequest: 500, MilliCPULimit: 1500}, "cpu.cfs_period_us=100000 cpu.cfs_quota_us=150000 cpu.shares=512"},
		{mem, Limits{}, ""},
		{mem, Limits{MemoryLimit: 1 << 20}, "memory.limit_in_bytes=1048576"},
		{two, Limits{MilliCPURequest: 1000, MemoryLimit: 4096}, "cpu.max=max 100000 cpu.weight=39 memory.max=4096"},
		{two, Limits{MilliCPULimit: 250}, "cpu.max=25000 100000 cpu.weight=1 memory.max=max"},
		{hierarchy{controllers: map[string]bool{"pids": true}}, Limits{MemoryLimit: 1}, ""},
	} {
		got := files(c.h, c.l)
		var out []string
		for _, k := range []string{"cpu.cfs_period_us", "cpu.cfs_quota_us", "cpu.max", "cpu.shares", "cpu.weight", "memory.limit_in_bytes", "memory.max"} {
			if v, ok := got[k]; ok {
				out = append(out, k+"="+v)
			}
		}
		if s := strings.Join(out, " "); s != c.want {
			t.Errorf("%+v: %q, want %q", c.l, s, c.want)
		}
	}
}

// TestReal makes a pod's cgroups in the kernel, with a process in them, and removes them.
func TestReal(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	p := Pods{Parent: "/skein-cgroup-test-" + strconv.Itoa(os.Getpid()) + "/pods"}
	hs, err := p.hierarchies()
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() {
		for _, h := range hs {
			if err := removeTree(filepath.Join(h.dir, filepath.Dir(p.Parent))); err != nil {
				t.Error(err)
			}
		}
	})
	for range 2 {
		if err := p.Ensure("u1", Limits{MilliCPURequest: 100, MilliCPULimit: 200, MemoryLimit: 64 << 20}); err != nil {
			t.Fatal(err)
		}
	}
	found := false
	for _, h := range hs {
		for _, f := range []string{"memory.limit_in_bytes", "memory.max"} {
			b, err := os.ReadFile(filepath.Join(h.dir, p.Path("u1"), f))
			if err == nil && strings.TrimSpace(string(b)) == strconv.Itoa(64<<20) {
				found = true
			}
		}
	}
	if !found {
		t.Error("no hierarchy has the memory limit")
	}
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for _, h := range hs {
		child := filepath.Join(h.dir, p.Path("u1"), "container")
		if err := prepare(h, p.Path("u1")+"/container"); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(child, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if names, err := p.List(); err != nil || len(names) != 1 || names[0] != "u1" {
		t.Errorf("list: %v %v", names, err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	if err := p.Remove("u1"); err != nil {
		t.Error(err)
	}
	var ee *exec.ExitError
	if err := <-done; !errors.As(err, &ee) || ee.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("the process ended with %v", err)
	}
	for _, h := range hs {
		if _, err := os.Stat(filepath.Join(h.dir, p.Path("u1"))); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("left: %s", filepath.Join(h.dir, p.Path("u1")))
		}
	}
	if err := p.Remove("u1"); err != nil {
		t.Errorf("again: %v", err)
	}
	for _, bad := range []string{"", "..", "a/b", "."} {
		if p.Remove(bad) == nil {
			t.Errorf("%q accepted", bad)
		}
	}
}
