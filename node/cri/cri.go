// Package cri is the door to the container runtime: it runs containerd, of which it is the only user, or talks to another
// runtime that the operator configured, through CRI v1.
//
// Containerd is a child process (the daemon's own executable, see package containerd below this one) with an own
// session, cgroup and log file. It outlives the daemon: after a crash, an upgrade or a restart of the daemon the
// next one adopts it, and containers never notice. It is restarted at once when it dies itself, and replaced when it was started
// by another version of the program or with another configuration; running containers do not notice that either, as each
// pod's shim (the executable skein-helper) is a process of its own.
//
// Dial gives the two CRI services as upstream's interfaces. They add one guarantee that CRI does not make: the exit
// code of a container is right, whatever died while it ended (see package exits). The agent gets these; no other
// package of Skein calls the runtime.
package cri

import (
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"skein.io/skein/node/cri/cgroup"
)

// HelperName is the executable beside the daemon that is both the runc shim and the CNI plugin.
const HelperName = "skein-helper"

// shimName is what containerd looks for in its PATH to run, and to find again after a restart, the shim of runtime type
// io.containerd.runc.v2. (A configured runtime_path is not enough: containerd stores that with the sandbox only, and
// after a restart takes the other containers of a pod for dead, with an exit code of 255.)
const shimName = "containerd-shim-runc-v2"

// Config of the containerd that Skein runs itself.
type Config struct {
	// Dir holds everything of containerd: images, state, sockets, log. It is made, with mode 0711. Required, absolute.
	Dir string
	// CgroupRoot is the node's cgroup (see NewCgroups). Required, as "/skein".
	CgroupRoot string
	// Program is run as "<Program> containerd ...". Default: the executable of this process.
	Program string
	// Helper is the path of skein-helper. Default: HelperName beside Program.
	Helper string
	// Runc is the path of runc. Default: the first one found in PATH and the usual directories for system programs.
	Runc string
	// CNIDir is where CNI configurations are read from. Default: Dir/cni.
	CNIDir string
	// Registries that need more than https at their own name. Default: none.
	Registries Registries
	// LogLevel of containerd: trace, debug, info, warn, error. Default: warn.
	LogLevel string
	// LogMaxBytes is the size at which containerd's log is moved away (one old file is kept). Default: 16 MiB.
	LogMaxBytes int64
	// RestartMax is the longest wait before containerd is started again when it fails at once, repeatedly. Default: 5 s.
	RestartMax time.Duration
	// StopTimeout is how long containerd may take to end before it is killed. Default: 10 s.
	StopTimeout time.Duration
	// Logger gets starts, deaths and adoptions. Default: none.
	Logger *slog.Logger
}

func (c *Config) setDefaults() error {
	var errs []error
	if c.Program == "" {
		exe, err := os.Executable()
		if err != nil {
			errs = append(errs, fmt.Errorf("find the path of this program: %w", err))
		}
		c.Program = exe
	}
	if c.Helper == "" {
		c.Helper = filepath.Join(filepath.Dir(c.Program), HelperName)
	}
	if c.Runc == "" {
		var err error
		if c.Runc, err = findRunc(); err != nil {
			errs = append(errs, err)
		}
	}
	if c.CNIDir == "" {
		c.CNIDir = filepath.Join(c.Dir, "cni")
	}
	if c.LogLevel == "" {
		c.LogLevel = "warn"
	}
	if c.LogMaxBytes == 0 {
		c.LogMaxBytes = 16 << 20
	}
	if c.RestartMax == 0 {
		c.RestartMax = 5 * time.Second
	}
	if c.StopTimeout == 0 {
		c.StopTimeout = 10 * time.Second
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return errors.Join(errs...)
}

// Validate reports all faults of the configuration at once.
func (c Config) Validate() error {
	var errs []error
	for _, p := range []struct{ name, path string }{{"state directory of containerd", c.Dir}, {"CNI directory", c.CNIDir}} {
		if !filepath.IsAbs(p.path) || strings.ContainsAny(p.path, "\"\\\n") {
			errs = append(errs, fmt.Errorf("%s %q must be an absolute path without quotes", p.name, p.path))
		}
	}
	if err := executable(c.Program); err != nil {
		errs = append(errs, fmt.Errorf("program to run containerd: %w", err))
	}
	if err := executable(c.Helper); err != nil {
		errs = append(errs, fmt.Errorf("%w: %s must lie beside the skein program; install both", err, HelperName))
	}
	if err := executable(c.Runc); c.Runc != "" && err != nil {
		errs = append(errs, fmt.Errorf("runc: %w", err))
	}
	if err := cgroup.Check(c.CgroupRoot); err != nil {
		errs = append(errs, err)
	}
	if err := c.Registries.Validate(); err != nil {
		errs = append(errs, err)
	}
	switch c.LogLevel {
	case "trace", "debug", "info", "warn", "error":
	default:
		errs = append(errs, fmt.Errorf("log level %q of containerd is none of trace, debug, info, warn, error", c.LogLevel))
	}
	if c.LogMaxBytes < 4096 || c.RestartMax < 0 || c.StopTimeout < 0 {
		errs = append(errs, fmt.Errorf("log size %d (at least 4096), restart wait %v or stop timeout %v is out of range", c.LogMaxBytes, c.RestartMax, c.StopTimeout))
	}
	return errors.Join(errs...)
}

func executable(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.IsDir() || st.Mode()&0o111 == 0 {
		return fmt.Errorf("%s is not an executable file", path)
	}
	return nil
}

// ErrNoRunc is wrapped by the error for a machine without runc.
var ErrNoRunc = errors.New("runc is not installed")

func findRunc() (string, error) {
	if p, err := exec.LookPath("runc"); err == nil {
		return filepath.Abs(p)
	}
	dirs := []string{"/usr/sbin", "/usr/bin", "/sbin", "/usr/local/sbin", "/usr/local/bin"}
	for _, d := range dirs {
		if p := filepath.Join(d, "runc"); executable(p) == nil {
			return p, nil
		}
	}
	return "", fmt.Errorf("%w: it is neither in PATH nor in %s; install it (apt-get install runc) and start skein again",
		ErrNoRunc, strings.Join(dirs, ", "))
}

// paths are the files of one containerd, all derived from Config.
type paths struct {
	dir, config, lock, log, address, shimSockets, exits, bin string
	short                                                    string // for sockets, if dir is too long for them
}

// Limits of what must become the address of a unix socket (108 bytes with the final zero), and of containerd's shim
// manager, which appends a hash to its directory (core/runtime/v2/shim_manager.go, maxSocketDirLen).
const (
	maxAddress  = 107 - len(".ttrpc")
	maxShimDir  = 42
	shortRunDir = "/run/skein"
)

func (c Config) paths() paths {
	p := paths{
		dir:         c.Dir,
		config:      filepath.Join(c.Dir, "config.toml"),
		lock:        filepath.Join(c.Dir, "containerd.lock"),
		log:         filepath.Join(c.Dir, "containerd.log"),
		exits:       filepath.Join(c.Dir, "exits"),
		bin:         filepath.Join(c.Dir, "bin"),
		address:     filepath.Join(c.Dir, "c.sock"),
		shimSockets: filepath.Join(c.Dir, "s"),
	}
	// A long state directory gets a short one for its sockets, always the same for the same directory.
	h := fnv.New64a()
	h.Write([]byte(c.Dir))
	p.short = filepath.Join(shortRunDir, fmt.Sprintf("%016x", h.Sum64()))
	if len(p.address) > maxAddress {
		p.address = filepath.Join(p.short, "c.sock")
	}
	if len(p.shimSockets) > maxShimDir {
		p.shimSockets = filepath.Join(p.short, "s")
	}
	return p
}

// Cgroups are the children of a node's cgroup.
type Cgroups struct {
	// Root of the node; eBPF programs attach to it.
	Root string
	// Daemon holds the daemon itself, Containerd its child, Shims one process per pod.
	Daemon, Containerd, Shims string
	// Pods is the parent of the cgroups of all pods; the agent makes and removes those.
	Pods string
}

// NewCgroups names the children of root. Make makes them.
func NewCgroups(root string) Cgroups {
	return Cgroups{Root: root, Daemon: root + "/daemon", Containerd: root + "/containerd", Shims: root + "/shims", Pods: root + "/pods"}
}

// Make creates the groups where they are missing, in every hierarchy, with what v1 and v2 need.
func (c Cgroups) Make() error { return cgroup.Make(c.Daemon, c.Containerd, c.Shims, c.Pods) }
