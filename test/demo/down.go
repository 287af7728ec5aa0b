package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"skein.io/skein/test/cluster"
)

// downLimit bounds the removal of everything.
const downLimit = time.Minute

func (*downCmd) Run(ctx context.Context) error {
	began := time.Now()
	there, err := tearDown(ctx)
	if err != nil {
		return err
	}
	if !there {
		fmt.Println("no demo is up, and nothing of one is left")
		return nil
	}
	fmt.Printf("the demo is down after %.1f s: no process, namespace, mount, cgroup, network device or file of it is left\n", time.Since(began).Seconds())
	return nil
}

// tearDown removes an earlier demo, if there is one, and looks whether anything is left.
func tearDown(ctx context.Context) (there bool, err error) {
	if os.Geteuid() != 0 {
		return false, errors.New("root is needed for namespaces and cgroups (try sudo)")
	}
	ctx, cancel := context.WithTimeout(ctx, downLimit)
	defer cancel()
	lab, err := cluster.Open(labName)
	switch {
	case errors.Is(err, cluster.ErrBusy):
		return true, errors.New("another demo is under way: wait for it, or end it with Ctrl-C, first")
	case err == nil:
		there = true
		if err := lab.Close(ctx); err != nil {
			return true, err
		}
	case !errors.Is(err, cluster.ErrNoLab):
		return false, err
	}
	if left := leftovers(); len(left) > 0 {
		return there, fmt.Errorf("%d things of an earlier demo are left, remove them by hand:\n  %s", len(left), strings.Join(left, "\n  "))
	}
	return there, nil
}

// leftovers looks everywhere where a demo leaves traces while it is up. It knows the names that package cluster gives, and looks
// at processes by their cgroups and command lines.
func leftovers() (left []string) {
	add := func(kind, what string) { left = append(left, kind+" "+what) }
	for kind, patterns := range map[string][]string{
		"network namespace": {"/run/netns/sk-" + labName + "-*"},
		"cgroup":            {"/sys/fs/cgroup/skein/" + labName, "/sys/fs/cgroup/*/skein/" + labName},
		"file":              {labDir, "/run/skein-lab/" + labName + ".*"},
	} {
		for _, p := range patterns {
			found, _ := filepath.Glob(p) // fails for bad patterns only
			for _, f := range found {
				add(kind, f)
			}
		}
	}
	if _, err := net.InterfaceByName("sklab" + labName); err == nil {
		add("network device", "sklab"+labName)
	}
	procs, _ := filepath.Glob("/proc/[0-9]*")
	self := filepath.Join("/proc", fmt.Sprint(os.Getpid()))
	for _, p := range procs {
		if p == self || ended(p) {
			continue
		}
		if b, _ := os.ReadFile(p + "/cgroup"); strings.Contains(string(b), ":/skein/"+labName+"/") {
			add("process", filepath.Base(p)+" (in the demo's cgroup)")
		} else if argv := cmdline(p); strings.HasPrefix(filepath.Base(argv[0]), "skein") && strings.Contains(strings.Join(argv, " "), labDir+"/") {
			add("process", filepath.Base(p)+" ("+strings.Join(argv, " ")+")")
		}
		// A mount namespace is a copy: what one process has mounted, its own namespace alone may still have.
		if b, _ := os.ReadFile(p + "/mountinfo"); strings.Contains(string(b), " "+labDir+"/") {
			add("mount", "below "+labDir+" in the namespace of process "+filepath.Base(p))
		}
	}
	return left
}

// cmdline is the command line of the process of a directory in /proc; never empty.
func cmdline(proc string) []string {
	b, _ := os.ReadFile(proc + "/cmdline") // it may have ended
	return strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
}

// ended tells whether a process only waits to be reaped (proc(5), /proc/PID/stat, third field): what outlived its parent is left
// to process 1, which takes its time.
func ended(proc string) bool {
	b, err := os.ReadFile(proc + "/stat")
	rest := strings.TrimSpace(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	return err != nil || strings.HasPrefix(rest, "Z") || strings.HasPrefix(rest, "X")
}
