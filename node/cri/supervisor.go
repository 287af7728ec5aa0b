package cri

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"skein.io/skein/node/cri/lockfile"
)

// Containerd supervises one containerd process. New makes it; Run works until its context ends, and leaves containerd running;
// Shutdown, which may be called once Run has returned, ends containerd too. All other methods may be called at any time.
type Containerd struct {
	cfg  Config
	p    paths
	conf []byte

	mu sync.Mutex // guards all below
	st State
	// changed is closed and replaced at each change of st.
	changed chan struct{}
	// cur is the last process that Run worked with, until it ended.
	cur *process
}

// State of the supervised process.
type State struct {
	// Pid of containerd; 0 = it does not run now.
	Pid int
	// Ready tells that it answers CRI calls and has the pause image.
	Ready bool
	// Adopted tells that an earlier daemon had started it.
	Adopted bool
	// Since is when Pid was started or adopted.
	Since time.Time
	// Restarts counts the deaths that this supervisor saw.
	Restarts int
	// Err is why it last ended or could not start; nil once it is ready again.
	Err error
}

// New prepares directories, cgroups and the configuration file, and starts nothing. Its errors say what to install or change.
func New(cfg Config) (*Containerd, error) {
	if err := errors.Join(cfg.setDefaults(), cfg.Validate()); err != nil {
		return nil, fmt.Errorf("container runtime: %w", err)
	}
	c := &Containerd{cfg: cfg, p: cfg.paths(), changed: make(chan struct{})}
	for _, d := range []string{c.p.dir, c.p.exits, c.p.bin, c.p.shimSockets, filepath.Dir(c.p.address), c.cfg.CNIDir} {
		if err := os.MkdirAll(d, 0o711); err != nil { // containers of other users must be able to pass through
			return nil, fmt.Errorf("container runtime: %w", err)
		}
	}
	for _, name := range []string{HelperName, shimName} {
		if err := symlink(cfg.Helper, filepath.Join(c.p.bin, name)); err != nil {
			return nil, fmt.Errorf("container runtime: %w", err)
		}
	}
	if err := NewCgroups(cfg.CgroupRoot).Make(); err != nil {
		return nil, fmt.Errorf("container runtime: %w", err)
	}
	var err error
	if c.conf, err = cfg.renderConfig(oomScoreAllowed()); err != nil {
		return nil, err
	}
	return c, nil
}

// Endpoint is the CRI endpoint for Dial.
func (c *Containerd) Endpoint() string { return "unix://" + c.p.address }

// ExitDir is where the shims keep exit records, for Dial.
func (c *Containerd) ExitDir() string { return c.p.exits }

// CNIDir is where WriteCNI must put the network's configuration.
func (c *Containerd) CNIDir() string { return c.cfg.CNIDir }

// LogFile is containerd's own log.
func (c *Containerd) LogFile() string { return c.p.log }

// State tells how containerd is; the channel closes when that changed.
func (c *Containerd) State() (State, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.st, c.changed
}

func (c *Containerd) update(f func(*State)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(&c.st)
	close(c.changed)
	c.changed = make(chan struct{})
}

// WaitReady waits until containerd answers CRI calls and has the pause image, or ctx ends; then the error says what went wrong.
func (c *Containerd) WaitReady(ctx context.Context) error {
	for {
		st, changed := c.State()
		if st.Ready {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return fmt.Errorf("containerd is not ready, see %s: %w", c.p.log, errors.Join(ctx.Err(), st.Err))
		}
	}
}

// healthyAfter is how long a containerd must have lived for the next start to follow at once.
const healthyAfter = 5 * time.Second

// firstRestart is the wait after a containerd that did not live that long; it doubles up to Config.RestartMax.
const firstRestart = 50 * time.Millisecond

// Run keeps containerd running until ctx ends: adopts one that runs, starts one otherwise, at once again when it dies. It
// returns nil, or an error when this can never work (the lock or the configuration file cannot be used).
func (c *Containerd) Run(ctx context.Context) error {
	var wait time.Duration
	for {
		proc, err := c.obtain(ctx)
		if err == nil {
			err = c.supervise(ctx, proc)
		}
		if ctx.Err() != nil {
			return nil
		}
		var fatal *fatalError
		if errors.As(err, &fatal) {
			return fatal.err
		}
		lived := time.Duration(0)
		if proc != nil {
			lived = time.Since(proc.since)
		}
		if wait = nextWait(wait, lived, c.cfg.RestartMax); wait > 0 {
			c.cfg.Logger.Warn("containerd fails, trying again", "wait", wait, "error", err, "log", c.p.log)
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(wait):
			}
		}
	}
}

// nextWait decides how long to wait before the next start, from the last wait and how long the last process lived.
func nextWait(last, lived, most time.Duration) time.Duration {
	switch {
	case lived >= healthyAfter:
		return 0
	case last == 0:
		return min(firstRestart, most)
	default:
		return min(2*last, most)
	}
}

type fatalError struct{ err error }

func (e *fatalError) Error() string { return e.err.Error() }

// process is a running containerd. fd refers to it and to no later process with its pid.
type process struct {
	pid     int
	fd      *os.File
	since   time.Time
	adopted bool
	// reaped is closed when this process, its parent, has waited for it; nil for an adopted one.
	reaped <-chan struct{}
}

// obtain gives the running containerd, if it is as it should be, or starts one.
func (c *Containerd) obtain(ctx context.Context) (*process, error) {
	pr, err := c.find()
	if err != nil {
		return nil, &fatalError{err}
	}
	if pr != nil {
		why := c.outdated(pr)
		if why == "" {
			c.cfg.Logger.Info("adopted the running containerd", "pid", pr.pid)
			return pr, nil
		}
		c.cfg.Logger.Info("replacing the running containerd", "pid", pr.pid, "reason", why)
		err := pr.end(ctx, c.cfg.StopTimeout)
		pr.fd.Close()
		if err != nil {
			return nil, err
		}
	}
	return c.start()
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

// symlink makes path point to target, atomically.
func symlink(target, path string) error {
	if have, err := os.Readlink(path); err == nil && have == target {
		return nil
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// supervise waits for the end of pr or of ctx, makes it ready, and keeps its log small.
func (c *Containerd) supervise(ctx context.Context, pr *process) error {
	c.mu.Lock()
	c.cur = pr
	c.mu.Unlock()
	c.update(func(s *State) { s.Pid, s.Ready, s.Adopted, s.Since = pr.pid, false, pr.adopted, pr.since })
	var wg sync.WaitGroup
	defer wg.Wait()
	sctx, cancel := context.WithCancel(ctx)
	defer cancel()
	wg.Go(func() { c.makeReady(sctx) })
	wg.Go(func() { c.watchLog(sctx) })
	if err := pr.wait(ctx); err != nil {
		return nil // ctx ended; containerd stays
	}
	if pr.reaped != nil {
		<-pr.reaped
	}
	pr.fd.Close()
	c.mu.Lock()
	c.cur = nil
	c.mu.Unlock()
	err := fmt.Errorf("containerd (process %d) ended: %s", pr.pid, lastLine(c.p.log))
	c.update(func(s *State) { s.Pid, s.Ready, s.Err, s.Restarts = 0, false, err, s.Restarts+1 })
	c.cfg.Logger.Warn("containerd ended", "pid", pr.pid, "after", time.Since(pr.since).Round(time.Millisecond), "last", lastLine(c.p.log))
	return err
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

// Shutdown ends containerd. Containers go on: stop and remove the pods before. Call it after Run has returned.
func (c *Containerd) Shutdown(ctx context.Context) error {
	c.mu.Lock()
	pr := c.cur // it may be so new that it has no lock yet
	c.cur = nil
	c.mu.Unlock()
	if pr == nil {
		var err error
		if pr, err = c.find(); err != nil || pr == nil {
			return err
		}
	}
	defer pr.fd.Close()
	if err := pr.end(ctx, c.cfg.StopTimeout); err != nil {
		return err
	}
	if pr.reaped != nil {
		<-pr.reaped
	}
	c.update(func(s *State) { s.Pid, s.Ready = 0, false })
	return nil
}

// startTime is how long it is no error that containerd does not answer: it takes 0.1 s, and some more with many pods.
const startTime = 2 * time.Second

// Purge removes everything of containerd from the disk, images too. Containerd and all pods must have ended: see Shutdown.
func (c *Containerd) Purge() error {
	if pid, err := lockfile.Holder(c.p.lock); err != nil || pid != 0 {
		return errors.Join(err, fmt.Errorf("containerd (process %d) still runs", pid))
	}
	if err := unmountBelow(c.p.dir); err != nil {
		return fmt.Errorf("purge containerd: %w", err)
	}
	var errs []error
	for _, d := range []string{c.p.dir, c.p.short} {
		errs = append(errs, os.RemoveAll(d))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("purge containerd: %w", err)
	}
	return nil
}

// unmountBelow detaches what is mounted below dir in this mount namespace, last mounted first.
func unmountBelow(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	lines := strings.Split(string(b), "\n")
	var errs []error
	for i := len(lines) - 1; i >= 0; i-- {
		if f := strings.Fields(lines[i]); len(f) > 4 && strings.HasPrefix(f[4], dir+"/") {
			if err := unix.Unmount(f[4], unix.MNT_DETACH); err != nil {
				errs = append(errs, fmt.Errorf("unmount %s: %w", f[4], err))
			}
		}
	}
	return errors.Join(errs...)
}

// makeReady waits until containerd serves CRI, then imports what must be there.
func (c *Containerd) makeReady(ctx context.Context) {
	began := time.Now()
	for wait := 2 * time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		err := probe(ctx, c.p.address)
		if err == nil {
			if err = c.importPause(ctx); err == nil {
				break
			}
		}
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > startTime {
			c.update(func(s *State) { s.Err = err })
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
	c.update(func(s *State) { s.Ready, s.Err = true, nil })
	st, _ := c.State()
	c.cfg.Logger.Info("containerd is ready", "pid", st.Pid, "after", time.Since(st.Since).Round(time.Millisecond))
}

// watchLog moves the log away while containerd writes to it: it has the file open for appending, so it goes on with an empty one.
func (c *Containerd) watchLog(ctx context.Context) {
	t := time.NewTicker(time.Minute)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			if err := c.rotateLog(); err != nil {
				c.cfg.Logger.Warn("log of containerd", "error", err)
			}
		}
	}
}

func (c *Containerd) rotateLog() error {
	st, err := os.Stat(c.p.log)
	if errors.Is(err, fs.ErrNotExist) || err == nil && st.Size() <= c.cfg.LogMaxBytes {
		return nil
	}
	if err != nil {
		return err
	}
	src, err := os.OpenFile(c.p.log, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer src.Close()
	// The end of it only, should it have grown far beyond the limit meanwhile.
	if _, err := src.Seek(max(0, st.Size()-c.cfg.LogMaxBytes), io.SeekStart); err != nil {
		return err
	}
	dst, err := os.OpenFile(c.p.log+".1", os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, io.LimitReader(src, c.cfg.LogMaxBytes))
	return errors.Join(err, dst.Close(), src.Truncate(0))
}

// lastLine gives the end of a log, for the error that refers to it.
func lastLine(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	const most = 2048
	if st, err := f.Stat(); err == nil {
		_, _ = f.Seek(max(0, st.Size()-most), io.SeekStart)
	}
	b, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	last := string(lines[len(lines)-1])
	if last == "" {
		return "it wrote nothing to its log"
	}
	return last
}

// writeFile replaces a file atomically.
func writeFile(path string, b []byte, mode os.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(mode), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
