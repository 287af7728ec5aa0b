package cri

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

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
	if cfg.Registries.own() {
		if err := cfg.Registries.write(cfg.registryDir()); err != nil {
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
