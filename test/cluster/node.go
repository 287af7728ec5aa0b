package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"skein.io/skein/node/cri/cgroup"
)

// Node is one machine of a laboratory.
type Node struct {
	c *Cluster
	// Name, Index, Segment and IP of it never change; the rest is guarded by c.mu.
	st *nodeState
}

// ErrOff is returned for what needs a node that is switched on.
var ErrOff = errors.New("the node is off")

// with runs f with the laboratory to itself.
func (n *Node) with(f func(*nodeState) error) error {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	if n.c.release == nil {
		return errView
	}
	if err := f(n.st); err != nil {
		return fmt.Errorf("node %s: %w", n.st.Name, err)
	}
	return nil
}

// Name of the node, also its host name.
func (n *Node) Name() string { return n.st.Name }

// IP is its address, on interface eth0.
func (n *Node) IP() netip.Addr { return n.st.IP }

// Segment is the Ethernet segment, from 1, that it is on.
func (n *Node) Segment() int { return n.st.Segment }

// Dir holds StateDir and LogFile, and lives as long as the laboratory.
func (n *Node) Dir() string { return n.c.st.dir(n.st) }

// StateDir is for the daemon's state; it survives Kill.
func (n *Node) StateDir() string { return filepath.Join(n.Dir(), "state") }

// LogFile gets what the daemon writes to standard output and error, over all its lives.
func (n *Node) LogFile() string { return filepath.Join(n.Dir(), "daemon.log") }

// Cgroup is the root of the node's cgroups, in every hierarchy.
func (n *Node) Cgroup() string { return n.c.st.group(n.st) }

// Netns is the name of its network namespace (ip -n NAME). Do not use "ip netns exec", which hides the cgroups: use Command.
func (n *Node) Netns() string { return n.c.st.netns(n.st) }

// Env is what each process in the node gets: the daemon's settings for this node, so that the command lines are the same on all.
func (n *Node) Env() []string {
	return []string{"SKEIN_NAME=" + n.st.Name, "SKEIN_STATE_DIR=" + n.StateDir(), "SKEIN_ADDRESS=" + n.IP().String(),
		"SKEIN_CGROUP_ROOT=" + n.Cgroup(), "SKEIN_UPLINK=eth0"}
}

// On tells whether the node is switched on, Running whether its daemon runs.
func (n *Node) On() bool {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	return n.st.Holder.alive()
}

// Running tells whether the daemon runs.
func (n *Node) Running() bool { return n.Pid() != 0 }

// Holder is the pid of the process that keeps the node's namespaces; 0 = the node is off. It outlives the daemon.
func (n *Node) Holder() int {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	if h := n.st.Holder; h.alive() {
		return h.Pid
	}
	return 0
}

// Pid of the daemon; 0 = it does not run.
func (n *Node) Pid() int {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	if d := n.st.Daemon; d.alive() {
		return d.Pid
	}
	return 0
}

// enter is the shell program that moves itself into cgroups and becomes the command behind "--". First the cgroups, of
// every hierarchy, as the node's mount namespace may show others.
const enter = `while [ "$1" != -- ]; do echo 0 > "$1" || exit 97; shift; done; shift; exec "$@"`

// enterCgroup gives the command line that runs argv in the child named leaf of the node's cgroup.
func (n *Node) enterCgroup(leaf string, argv ...string) ([]string, error) {
	hs, err := cgroup.Hierarchies()
	if err != nil {
		return nil, err
	}
	line := []string{"/bin/sh", "-c", enter, "lab"}
	for _, h := range hs {
		line = append(line, filepath.Join(h.Mount, n.c.st.group(n.st), leaf, "cgroup.procs"))
	}
	return append(append(line, "--"), argv...), nil
}

// Children of a node's cgroup, which itself must stay without processes (cgroup v2).
const (
	daemonLeaf = "daemon"
	labLeaf    = "lab" // the holder of the namespaces, and what tests run
)

// memDirs are those directories of a node in memory whose place cannot be configured (results of CNI plugins) or may have to be short
// (sockets); they must not be shared between nodes.
var memDirs = []string{"/var/lib/cni", "/run/skein"}

// holder becomes the process that keeps the node's namespaces.
const holder = `name=$1; mem=$2; shift 2
mount -t tmpfs -o mode=755 lab "$mem" || exit
for d; do mkdir -p "$mem$d" && mount --bind "$mem$d" "$d" || exit; done
if [ -d /etc/skein ]; then mount -t tmpfs lab /etc/skein || exit; fi # this machine's own settings are not the node's
echo "$name" > /proc/sys/kernel/hostname && echo ready && exec sleep infinity < /dev/null > /dev/null 2>&1`

// boot switches the node on: new namespaces, the same disk. The caller has the lock.
func (n *Node) boot(ctx context.Context) error {
	s, st := &n.c.st, n.st
	group := s.group(st)
	if err := cgroup.Make(group+"/"+daemonLeaf, group+"/"+labLeaf); err != nil {
		return err
	}
	mem := filepath.Join(s.dir(st), "mem")
	for _, d := range append([]string{filepath.Join(s.dir(st), "state"), mem}, memDirs...) {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	if err := n.c.plug(ctx, st); err != nil {
		return err
	}
	line, err := n.enterCgroup(labLeaf, append([]string{"nsenter", "--net=" + netnsPath(s.netns(st)),
		"unshare", "--mount", "--uts", "--propagation", "slave", "/bin/sh", "-c", holder, "holder", st.Name, mem}, memDirs...)...)
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Stdout, cmd.Stderr = w, w
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return err
	}
	n.c.reap(cmd)
	// "ready", or the first line of what went wrong.
	if first, err := bufio.NewReader(r).ReadString('\n'); err != nil || first != "ready\n" {
		return fmt.Errorf("make namespaces: %q: %w", strings.TrimSpace(first), errors.Join(err, cmd.Process.Kill()))
	}
	id, err := identify(cmd.Process.Pid)
	if err != nil {
		return err
	}
	st.Holder = &id
	return s.save()
}

// reap waits for a child, so that it does not stay as a zombie.
func (c *Cluster) reap(cmd *exec.Cmd) {
	done := make(chan struct{})
	c.children[cmd.Process.Pid] = done
	go func() { // ends with the process; Close waits for it
		defer close(done)
		_ = cmd.Wait()
	}()
}

// command gives a command in the namespaces and the cgroup leaf of the node.
func (n *Node) command(ctx context.Context, leaf string, argv ...string) (*exec.Cmd, error) {
	st := n.st
	if !st.Holder.alive() {
		return nil, ErrOff
	}
	if len(argv) == 0 {
		return nil, errors.New("no command")
	}
	dir, err := os.Getwd() // entering a mount namespace changes to its root
	if err != nil {
		return nil, err
	}
	pid := strconv.Itoa(st.Holder.Pid)
	line, err := n.enterCgroup(leaf, append([]string{"nsenter", "--net=/proc/" + pid + "/ns/net", "--uts=/proc/" + pid + "/ns/uts",
		"--mount=/proc/" + pid + "/ns/mnt", "/bin/sh", "-c", `cd "$1" 2>/dev/null; shift; exec "$@"`, "lab", dir}, argv...)...)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	// A node's settings are its own, not those of whoever makes it.
	mine := slices.DeleteFunc(os.Environ(), func(kv string) bool { return strings.HasPrefix(kv, "SKEIN_") })
	cmd.Env = append(mine, n.Env()...)
	return cmd, nil
}

// Command prepares a command that runs inside the node, as if typed there: its network, mounts, host name and cgroup, so Services
// work for it. The caller starts it and waits for it.
func (n *Node) Command(ctx context.Context, argv ...string) (*exec.Cmd, error) {
	n.c.mu.Lock()
	defer n.c.mu.Unlock()
	cmd, err := n.command(ctx, labLeaf, argv...)
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", n.st.Name, err)
	}
	return cmd, nil
}

// Exec runs a command inside the node and gives what it wrote to standard output. The error has its standard error.
func (n *Node) Exec(ctx context.Context, argv ...string) (string, error) {
	cmd, err := n.Command(ctx, argv...)
	if err != nil {
		return "", err
	}
	var out, msg strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &msg
	if err := cmd.Run(); err != nil {
		return out.String(), fmt.Errorf("node %s: %s: %w: %s", n.st.Name, strings.Join(argv, " "), err, strings.TrimSpace(msg.String()))
	}
	return out.String(), nil
}

// Start runs the daemon, switching the node on if it is off. Without a command it is the one of the last time. env is added to Env.
func (n *Node) Start(ctx context.Context, env []string, argv ...string) error {
	return n.with(func(st *nodeState) error {
		if st.Daemon.alive() {
			return fmt.Errorf("the daemon runs already, as process %d", st.Daemon.Pid)
		}
		if len(argv) > 0 {
			st.Argv, st.Env = slices.Clone(argv), slices.Clone(env)
		}
		if len(st.Argv) == 0 {
			return errors.New("no command to start, and none from an earlier start")
		}
		if !st.Holder.alive() {
			if err := n.boot(ctx); err != nil {
				return err
			}
		}
		log, err := os.OpenFile(n.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return err
		}
		defer log.Close()
		fmt.Fprintf(log, "--- lab: start at %s: %s\n", time.Now().Format(time.RFC3339Nano), strings.Join(st.Argv, " "))
		cmd, err := n.command(context.WithoutCancel(ctx), daemonLeaf, st.Argv...)
		if err != nil {
			return err
		}
		cmd.Env = append(cmd.Env, st.Env...)
		cmd.Stdout, cmd.Stderr = log, log
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		cmd.Cancel = nil
		if err := cmd.Start(); err != nil {
			return err
		}
		n.c.reap(cmd)
		id, err := identify(cmd.Process.Pid)
		if err != nil {
			return fmt.Errorf("the daemon ended at once, see %s", n.LogFile())
		}
		st.Daemon = &id
		return n.c.st.save()
	})
}

// Signal sends a signal to the daemon alone: SIGTERM asks it to stop, SIGKILL is a crash, SIGSTOP and SIGCONT a hang.
func (n *Node) Signal(sig syscall.Signal) error {
	return n.with(func(st *nodeState) error {
		if !st.Daemon.alive() {
			return errors.New("the daemon does not run")
		}
		return st.Daemon.signal(sig)
	})
}

// KillDaemon kills the daemon alone, as a crash, and waits until it is gone; containerd and pods stay.
func (n *Node) KillDaemon(ctx context.Context) error {
	if err := n.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	return n.Wait(ctx)
}

// Stop asks the daemon to end and waits for it.
func (n *Node) Stop(ctx context.Context) error {
	if err := n.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	return n.Wait(ctx)
}

// Wait returns when the daemon does not run.
func (n *Node) Wait(ctx context.Context) error {
	n.c.mu.Lock()
	d := n.st.Daemon
	n.c.mu.Unlock()
	for wait := time.Millisecond; d.alive(); wait = min(2*wait, 20*time.Millisecond) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("node %s: the daemon, process %d, still runs: %w", n.st.Name, d.Pid, ctx.Err())
		case <-time.After(wait):
		}
	}
	return nil
}

// Kill is a power cut: every process of the node dies at once, pods too, and its namespaces, mounts and memory vanish. The disk
// (Dir) stays. Start switches it on again.
func (n *Node) Kill(ctx context.Context) error {
	return n.with(func(st *nodeState) error {
		s := &n.c.st
		there, err := cgroup.Exists(s.group(st))
		if err != nil {
			return err
		}
		if there {
			_ = setFrozen(s.group(st), false) // a frozen v1 task would not die
			if err := cgroup.Kill(ctx, s.group(st)); err != nil {
				return err
			}
			if err := cgroup.Remove(ctx, s.group(st)); err != nil {
				return err
			}
		}
		if err := deleteNetns(ctx, s.netns(st)); err != nil {
			return err
		}
		st.Holder, st.Daemon = nil, nil
		return s.save()
	})
}

// Wipe loses the disk of a node that is off.
func (n *Node) Wipe() error {
	return n.with(func(st *nodeState) error {
		if st.Holder.alive() {
			return errors.New("it is on: kill it first")
		}
		return os.RemoveAll(filepath.Join(n.c.st.dir(st), "state"))
	})
}

// Freeze stops every process of the node, pods too, as a virtual machine that is not given the CPU; it returns when all stand still.
func (n *Node) Freeze() error {
	return n.with(func(st *nodeState) error {
		if err := setFrozen(n.c.st.group(st), true); err != nil {
			return err
		}
		for end := time.Now().Add(10 * time.Second); !frozen(n.c.st.group(st)); time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				return errors.New("not all processes could be stopped within 10 s")
			}
		}
		return nil
	})
}

// Thaw ends Freeze.
func (n *Node) Thaw() error {
	return n.with(func(st *nodeState) error { return setFrozen(n.c.st.group(st), false) })
}

func setFrozen(group string, frozen bool) error {
	dir, err := cgroup.Unified(group)
	if err != nil {
		return err
	}
	v := "0"
	if frozen {
		v = "1"
	}
	return os.WriteFile(filepath.Join(dir, "cgroup.freeze"), []byte(v), 0)
}

// Link takes the node's cable out or puts it back.
func (n *Node) Link(ctx context.Context, up bool) error {
	return n.with(func(st *nodeState) error {
		if st.LinkDown == !up {
			return nil
		}
		st.LinkDown = !up
		if err := n.c.st.save(); err != nil {
			return err
		}
		if !st.Holder.alive() {
			return nil // boot does it
		}
		return batch(ctx, n.c.st.fabric(), fmt.Sprintf("link set %s %s", n.c.st.port(st), upDown(up)))
	})
}

func frozen(group string) bool {
	dir, err := cgroup.Unified(group)
	if err != nil {
		return false
	}
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	return err == nil && strings.Contains(string(b), "frozen 1")
}
