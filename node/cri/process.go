package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"skein.io/skein/node/cri/lockfile"
)

// process is a running containerd. fd refers to it and to no later process with its pid.
type process struct {
	pid     int
	fd      *os.File
	since   time.Time
	adopted bool
	// reaped is closed when this process, its parent, has waited for it; nil for an adopted one.
	reaped <-chan struct{}
}

// find looks for a running containerd by its lock; nil = there is none.
func (c *Containerd) find() (*process, error) {
	pid, err := lockfile.Holder(c.p.lock)
	if err != nil || pid == 0 {
		return nil, err
	}
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("pidfd of process %d: %w", pid, err)
	}
	// The pid may have been used again since the lock was read. If it still has the lock, it had it all the time.
	if again, err := lockfile.Holder(c.p.lock); err != nil || again != pid {
		unix.Close(fd)
		return nil, err
	}
	return &process{pid: pid, fd: os.NewFile(uintptr(fd), "pidfd"), since: time.Now(), adopted: true}, nil
}

// outdated tells why a running containerd must be replaced; "" = it is as one that would be started now.
func (c *Containerd) outdated(pr *process) string {
	have, err := os.ReadFile(c.p.config)
	if err != nil || !bytes.Equal(have, c.conf) {
		return "the configuration changed"
	}
	want, err := os.Stat(c.cfg.Program)
	if err != nil {
		return ""
	}
	// Follows the link to the file that runs, also when its name is taken by another one now.
	if runs, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pr.pid)); err == nil && !os.SameFile(want, runs) {
		return "the program changed"
	}
	return ""
}

// start runs a new containerd.
func (c *Containerd) start() (*process, error) {
	if have, err := os.ReadFile(c.p.config); err != nil || !bytes.Equal(have, c.conf) { // a full disk must not keep it down
		if err := writeFile(c.p.config, c.conf, 0o600); err != nil {
			return nil, &fatalError{fmt.Errorf("containerd configuration: %w", err)}
		}
	}
	if err := c.rotateLog(); err != nil {
		return nil, &fatalError{fmt.Errorf("log of containerd: %w", err)}
	}
	log, err := os.OpenFile(c.p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, &fatalError{fmt.Errorf("log of containerd: %w", err)}
	}
	defer log.Close()
	fd := -1
	cmd := exec.Command(c.cfg.Program, "containerd", "-config", c.p.config, "-lock", c.p.lock,
		"-cgroup", NewCgroups(c.cfg.CgroupRoot).Containerd)
	cmd.Stdout, cmd.Stderr, cmd.Dir, cmd.Env = log, log, "/", childEnv(os.Environ(), c.p.bin)
	// An own session: no signal of the daemon's terminal or process group reaches it. No parent-death signal: it stays.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, PidFD: &fd}
	since := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start containerd: %w", err)
	}
	reaped := make(chan struct{})
	go func() { // ends with the process; its owner is supervise, which waits for it before it takes the process for dead
		defer close(reaped)
		_ = cmd.Wait() // how it ended is in its log, and cmd.ProcessState is not needed
	}()
	pr := &process{pid: cmd.Process.Pid, since: since, reaped: reaped}
	if fd < 0 {
		return nil, &fatalError{errors.New("this kernel has no pidfd: Skein needs Linux 5.15 or later")}
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("pidfd of containerd: %w", err)
	}
	pr.fd = os.NewFile(uintptr(fd), "pidfd")
	c.cfg.Logger.Info("started containerd", "pid", pr.pid)
	return pr, nil
}

// childEnv drops what is meant for the daemon alone, and puts bin in front of the PATH.
func childEnv(env []string, bin string) []string {
	var out []string
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, e := range env {
		switch name, v, _ := strings.Cut(e, "="); name {
		case "PATH":
			if v != "" {
				path = v
			}
		case "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES", "INVOCATION_ID", "JOURNAL_STREAM":
		case "GOMEMLIMIT", "GOGC", "GOMAXPROCS": // limits of the daemon's own
		default:
			out = append(out, e)
		}
	}
	return append(out, "PATH="+bin+":"+path)
}

// wait returns nil when the process has ended, or the error of ctx.
func (pr *process) wait(ctx context.Context) error {
	rc, err := pr.fd.SyscallConn()
	if err != nil {
		return fmt.Errorf("pidfd: %w", err)
	}
	_ = pr.fd.SetReadDeadline(time.Time{}) // an earlier wait may have left its own
	stop := context.AfterFunc(ctx, func() { _ = pr.fd.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	err = rc.Read(func(fd uintptr) bool {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
		return err == nil && n > 0
	})
	if err != nil {
		return errors.Join(ctx.Err(), err)
	}
	return nil
}

// end asks the process to stop, kills it after timeout, and waits until it is gone.
func (pr *process) end(ctx context.Context, timeout time.Duration) error {
	rc, err := pr.fd.SyscallConn()
	if err != nil {
		return fmt.Errorf("pidfd: %w", err)
	}
	for _, sig := range []unix.Signal{unix.SIGTERM, unix.SIGKILL} {
		var serr error
		err := rc.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
		if err = errors.Join(err, serr); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("signal containerd: %w", err)
		}
		wctx, cancel := context.WithTimeout(ctx, timeout)
		err = pr.wait(wctx)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("stop containerd: %w", ctx.Err())
		}
	}
	return fmt.Errorf("containerd (process %d) does not end, not even killed", pr.pid)
}
