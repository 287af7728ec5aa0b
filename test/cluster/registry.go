package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"skein.io/skein/node/cri/cgroup"
)

// registryDir is where laboratories are written down; it is empty after a boot, as they are gone then.
const registryDir = "/run/skein-lab"

const stateVersion = 1

// state is what the registry file holds. All names of things in the kernel follow from Name and the nodes' names.
type state struct {
	Version  int          `json:"version"`
	Name     string       `json:"name"`
	Owner    *procID      `json:"owner,omitempty"` // nil: persistent
	Dir      string       `json:"dir"`
	Segments int          `json:"segments"`
	Subnet   netip.Prefix `json:"subnet"`
	HostLink bool         `json:"hostLink,omitempty"`
	Nodes    []*nodeState `json:"nodes,omitempty"`
	Cuts     [][2]string  `json:"cuts,omitempty"`
	Mutes    [][2]string  `json:"mutes,omitempty"` // what the first sends the second is dropped
}

type nodeState struct {
	Name     string     `json:"name"`
	Index    int        `json:"index"`
	Segment  int        `json:"segment"`
	IP       netip.Addr `json:"ip"`
	Holder   *procID    `json:"holder,omitempty"` // holds the namespaces; nil: the node is off
	Daemon   *procID    `json:"daemon,omitempty"`
	Argv     []string   `json:"argv,omitempty"`
	Env      []string   `json:"env,omitempty"`
	LinkDown bool       `json:"linkDown,omitempty"`
}

// procID is a process for ever: a pid is used again, together with its start time it is not.
type procID struct {
	Pid   int    `json:"pid"`
	Start string `json:"start"` // in clock ticks since boot: field 22 of /proc/[pid]/stat, proc(5)
}

func identify(pid int) (procID, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return procID{}, fmt.Errorf("process %d: %w", pid, err)
	}
	// The command in parentheses may hold anything; the third field follows the last one.
	f := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	if len(f) < 20 {
		return procID{}, fmt.Errorf("process %d: unexpected %q", pid, b)
	}
	if f[0] == "Z" || f[0] == "X" {
		return procID{}, fmt.Errorf("process %d has ended: %w", pid, fs.ErrNotExist)
	}
	return procID{pid, f[19]}, nil
}

func (p *procID) alive() bool {
	if p == nil {
		return false
	}
	now, err := identify(p.Pid)
	return err == nil && now == *p
}

// signal reaches this process or nobody.
func (p *procID) signal(sig unix.Signal) error {
	fd, err := unix.PidfdOpen(p.Pid, 0)
	if err != nil {
		return fmt.Errorf("process %d: %w", p.Pid, err)
	}
	defer unix.Close(fd)
	if !p.alive() {
		return fmt.Errorf("process %d: %w", p.Pid, unix.ESRCH)
	}
	if err := unix.PidfdSendSignal(fd, sig, nil, 0); err != nil {
		return fmt.Errorf("signal process %d: %w", p.Pid, err)
	}
	return nil
}

func (s *state) node(name string) *nodeState {
	for _, n := range s.Nodes {
		if n.Name == name {
			return n
		}
	}
	return nil
}

func statePath(name string) string { return filepath.Join(registryDir, name+".json") }

// withRegistry runs f while nobody else takes, makes or removes laboratories. The lock is the directory itself, so that
// nothing stays when the last laboratory has gone.
func withRegistry(f func() error) error {
	for {
		if err := os.MkdirAll(registryDir, 0o755); err != nil {
			return fmt.Errorf("lab registry: %w", err)
		}
		d, err := os.Open(registryDir)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed in between
		}
		if err != nil {
			return fmt.Errorf("lab registry: %w", err)
		}
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX)
		if errors.Is(err, unix.EINTR) {
			d.Close()
			continue
		}
		if err != nil {
			d.Close()
			return fmt.Errorf("lab registry: lock: %w", err)
		}
		have, err1 := d.Stat()
		now, err2 := os.Stat(registryDir)
		if err1 != nil || err2 != nil || !os.SameFile(have, now) {
			d.Close()
			continue // it was removed while this waited
		}
		err = f()
		d.Close()
		return err
	}
}

func lockPath(name string) string { return filepath.Join(registryDir, name+".lock") }

// ErrBusy is returned for a laboratory that another process works on.
var ErrBusy = errors.New("another process works on it")

// lockRun takes a laboratory for this process, and gives how to give it back.
func lockRun(name string) (release func(), err error) {
	err = withRegistry(func() error {
		f, err := os.OpenFile(lockPath(name), os.O_CREATE|os.O_RDWR, 0o600)
		if err != nil {
			return err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			f.Close()
			if errors.Is(err, unix.EWOULDBLOCK) {
				return ErrBusy
			}
			return err
		}
		release = func() {
			_ = withRegistry(func() error {
				if _, err := os.Stat(statePath(name)); errors.Is(err, fs.ErrNotExist) {
					_ = os.Remove(lockPath(name)) // nobody can have it open: that needs the registry
				}
				f.Close()
				leaveNothing()
				return nil
			})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("lab %s: %w", name, err)
	}
	return release, nil
}

// leaveNothing removes what all laboratories share when there is none any more. It must be called with the registry locked.
func leaveNothing() {
	if names, err := List(); err != nil || len(names) > 0 {
		return
	}
	for _, d := range append(slices.Clone(memDirs), registryDir) {
		_ = os.Remove(d) // if it is empty
	}
	if hs, err := cgroup.Hierarchies(); err == nil {
		for _, h := range hs {
			_ = unix.Rmdir(filepath.Join(h.Mount, "skein"))
		}
	}
}

// create writes the file of a new laboratory; there must be none of that name.
func (s *state) create() error {
	return withRegistry(func() error {
		f, err := os.OpenFile(statePath(s.Name), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("lab %s is there already: take it down first, or choose another name", s.Name)
		}
		if err != nil {
			return fmt.Errorf("lab %s: %w", s.Name, err)
		}
		f.Close()
		return s.save()
	})
}

func (s *state) save() error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("lab %s: %w", s.Name, err)
	}
	tmp := statePath(s.Name) + ".new"
	if err := os.WriteFile(tmp, b, 0o600); err != nil {
		return fmt.Errorf("lab %s: %w", s.Name, err)
	}
	if err := os.Rename(tmp, statePath(s.Name)); err != nil {
		return fmt.Errorf("lab %s: %w", s.Name, err)
	}
	return nil
}

// ErrNoLab is returned for a laboratory that does not exist.
var ErrNoLab = errors.New("there is no such lab")

func loadState(name string) (state, error) {
	b, err := os.ReadFile(statePath(name))
	if errors.Is(err, fs.ErrNotExist) {
		return state{}, fmt.Errorf("lab %s: %w", name, ErrNoLab)
	}
	if err != nil {
		return state{}, fmt.Errorf("lab %s: %w", name, err)
	}
	return decodeState(name, b)
}

// decodeState refuses what could make remove reach beyond a laboratory.
func decodeState(name string, b []byte) (state, error) {
	var s state
	if err := json.Unmarshal(b, &s); err != nil {
		return s, fmt.Errorf("lab %s: registry file: %w", name, err)
	}
	cfg := Config{Name: s.Name, Dir: s.Dir, Segments: s.Segments, Subnet: s.Subnet}
	if s.Version != stateVersion || s.Name != name {
		return s, fmt.Errorf("lab %s: registry file of version %d for lab %q", name, s.Version, s.Name)
	}
	if err := cfg.Validate(); err != nil {
		return s, fmt.Errorf("lab %s: registry file: %w", name, err)
	}
	for _, n := range s.Nodes {
		if n == nil || !validNode.MatchString(n.Name) || n.Segment < 1 || n.Segment > s.Segments || !n.IP.Is4() {
			return s, fmt.Errorf("lab %s: registry file: bad node %+v", name, n)
		}
	}
	return s, nil
}

// Names in the kernel.
func (s *state) cgroup() string            { return "/skein/" + s.Name }
func (s *state) fabric() string            { return "sk-" + s.Name + "-fab" }
func (s *state) netns(n *nodeState) string { return "sk-" + s.Name + "-" + n.Name }
func (s *state) dir(n *nodeState) string   { return filepath.Join(s.Dir, n.Name) }
func (s *state) group(n *nodeState) string { return s.cgroup() + "/" + n.Name }
func (s *state) port(n *nodeState) string  { return fmt.Sprintf("p%d", n.Index) }
func (s *state) router(seg int) netip.Addr { return s.addr(seg, 1) }
func (s *state) hostAddr() netip.Addr      { return s.addr(1, 254) }
func (s *state) hostLink() string          { return "sklab" + s.Name }
func netnsPath(name string) string         { return "/run/netns/" + name }
func (s *state) addr(seg, i int) netip.Addr {
	a := s.Subnet.Addr().As4()
	a[2], a[3] = byte(seg), byte(i)
	return netip.AddrFrom4(a)
}

// remove undoes everything that a laboratory may have made, whatever is there of it.
func (s *state) remove(ctx context.Context) error {
	var errs []error
	there, err := cgroup.Exists(s.cgroup())
	errs = append(errs, err)
	if there {
		errs = append(errs, cgroup.Kill(ctx, s.cgroup()), cgroup.Remove(ctx, s.cgroup()))
	}
	for _, n := range s.Nodes {
		errs = append(errs, deleteNetns(ctx, s.netns(n)))
	}
	// The kernel would remove this one together with its other end, but only some time after the namespace has gone.
	if _, err := net.InterfaceByName(s.hostLink()); err == nil {
		errs = append(errs, run(ctx, "", "ip", "link", "del", s.hostLink()))
	}
	errs = append(errs, deleteNetns(ctx, s.fabric()))
	// Should a process have mounted something outside of its node's mount namespace.
	errs = append(errs, unmountBelow(s.Dir), os.RemoveAll(s.Dir))
	if parent := filepath.Dir(s.Dir); parent == defaultParent() {
		_ = os.Remove(parent) // if it is empty
	}
	if err := errors.Join(errs...); err != nil {
		return err // the file stays, for the next Sweep
	}
	if err := os.Remove(statePath(s.Name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

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

// Sweep removes the laboratories whose owner has died without closing them. Call it before New.
func Sweep(ctx context.Context) error {
	names, err := List()
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		errs = append(errs, sweep(ctx, name))
	}
	return errors.Join(errs...)
}

func sweep(ctx context.Context, name string) error {
	release, err := lockRun(name)
	if errors.Is(err, ErrBusy) {
		return nil
	}
	if err != nil {
		return err
	}
	defer release()
	s, err := loadState(name)
	if errors.Is(err, ErrNoLab) {
		return nil
	}
	if err != nil {
		return err
	}
	if s.Owner == nil || s.Owner.alive() {
		return nil
	}
	if err := s.remove(ctx); err != nil {
		return fmt.Errorf("sweep lab %s: %w", name, err)
	}
	return nil
}

// List gives the names of all laboratories.
func List() ([]string, error) {
	files, err := filepath.Glob(filepath.Join(registryDir, "*.json"))
	if err != nil {
		return nil, fmt.Errorf("labs: %w", err)
	}
	var names []string
	for _, f := range files {
		if n := strings.TrimSuffix(filepath.Base(f), ".json"); validName.MatchString(n) {
			names = append(names, n)
		}
	}
	return names, nil
}
