package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"skein.io/skein/node/cri/cgroup"
	"skein.io/skein/test/cluster"
)

// idle is what one node's two processes take while nothing happens.
type idle struct {
	Daemon     process `json:"daemon"`
	Containerd process `json:"containerd"`
}

// process has sizes in MB (10^6 bytes) and the CPU time that it took in percent of one CPU.
type process struct {
	RSS  float64 `json:"rssMB"`
	Anon float64 `json:"anonMB"`
	CPU  float64 `json:"cpuPercent"`
}

func (p process) String() string { return fmt.Sprintf("%.0f MB (%.0f), %.1f %%", p.RSS, p.Anon, p.CPU) }

// clockTick is the unit of CPU times in /proc: USER_HZ, 100 on every architecture that Go runs on.
const clockTick = 10 * time.Millisecond

// cpuTime is what a process has used, in user and kernel mode: fields 14 and 15 of /proc/PID/stat, proc(5).
func cpuTime(pid int) (time.Duration, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseCPU(string(b))
}

func parseCPU(stat string) (time.Duration, error) {
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:]) // from field 3 on
	if len(f) < 13 {
		return 0, fmt.Errorf("unexpected process status %q", stat)
	}
	user, err1 := strconv.ParseInt(f[11], 10, 64)
	system, err2 := strconv.ParseInt(f[12], 10, 64)
	return time.Duration(user+system) * clockTick, errors.Join(err1, err2)
}

// memory is the resident memory of a process, whole and anonymous, in MB.
func memory(pid int) (rss, anon float64, err error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(b)) {
		key, v, _ := strings.Cut(line, ":")
		kb, _, _ := strings.Cut(strings.TrimSpace(v), " ")
		n, _ := strconv.ParseFloat(kb, 64)
		switch key {
		case "VmRSS":
			rss = n * 1024 / 1e6
		case "RssAnon":
			anon = n * 1024 / 1e6
		}
	}
	return rss, anon, nil
}

// pidsOf finds a node's daemon and its containerd.
func pidsOf(n *cluster.Node) (daemon, containerd int, err error) {
	if daemon = n.Pid(); daemon == 0 {
		return 0, 0, fmt.Errorf("the daemon of %s does not run", n.Name())
	}
	pids, err := cgroup.Pids(n.Cgroup() + "/containerd")
	if err != nil {
		return 0, 0, err
	}
	for _, p := range pids {
		if argv := cmdline(filepath.Join("/proc", strconv.Itoa(p))); len(argv) > 1 && argv[1] == "containerd" {
			return daemon, p, nil
		}
	}
	return 0, 0, fmt.Errorf("node %s has no containerd among %d processes", n.Name(), len(pids))
}

// measureIdle looks at all nodes over a time. It first lets the work of earlier steps end, but not for ever: it waits until no
// daemon takes more than calm percent of a CPU over a second.
func measureIdle(ctx context.Context, nodes []*cluster.Node, over time.Duration) (map[string]idle, error) {
	const calm, patience = 5.0, 15
	var all map[string]idle
	for range patience {
		var err error
		if all, err = measure(ctx, nodes, time.Second); err != nil {
			return nil, err
		}
		busy := false
		for _, i := range all {
			busy = busy || i.Daemon.CPU > calm || i.Containerd.CPU > calm
		}
		if !busy {
			break
		}
	}
	return measure(ctx, nodes, over)
}

// measure takes CPU times at the begin and at the end of a window, and memory at its end.
func measure(ctx context.Context, nodes []*cluster.Node, over time.Duration) (map[string]idle, error) {
	type span struct {
		pid  int
		from time.Duration
		into func(*idle, process)
	}
	began := time.Now()
	spans := map[string][]span{}
	for _, n := range nodes {
		d, c, err := pidsOf(n)
		if err != nil {
			return nil, err
		}
		for _, s := range []span{
			{pid: d, into: func(i *idle, p process) { i.Daemon = p }},
			{pid: c, into: func(i *idle, p process) { i.Containerd = p }},
		} {
			if s.from, err = cpuTime(s.pid); err != nil {
				return nil, err
			}
			spans[n.Name()] = append(spans[n.Name()], s)
		}
	}
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(over):
	}
	out := map[string]idle{}
	for name, ss := range spans {
		var i idle
		for _, s := range ss {
			till, err := cpuTime(s.pid)
			if err != nil {
				return nil, err
			}
			p := process{CPU: 100 * float64(till-s.from) / float64(time.Since(began))}
			if p.RSS, p.Anon, err = memory(s.pid); err != nil {
				return nil, err
			}
			s.into(&i, p)
		}
		out[name] = i
	}
	return out, nil
}
