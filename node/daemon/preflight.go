package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/go-logr/logr"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"skein.io/skein/consensus/shard"
	"skein.io/skein/datapath/loader"
	"skein.io/skein/node/cri"
)

// preflight checks what the machine must offer, before anything is written. It reports everything that is missing at once.
func preflight(ctx context.Context, cfg Config) error {
	if os.Geteuid() != 0 {
		return errors.New("a Skein node needs root: it runs containers, loads eBPF and makes network links (try: sudo skein ...)")
	}
	// First: to somebody who starts a node twice, four busy ports would say less.
	if err := stateFree(cfg.StateDir); err != nil {
		return err
	}
	var errs []error
	if _, err := loader.Cgroup2Mount(); err != nil {
		errs = append(errs, fmt.Errorf("eBPF Services need a cgroup v2 hierarchy: %w", err))
	}
	if cfg.CRIEndpoint == "" {
		if _, err := os.Stat(cfg.Helper); err != nil {
			errs = append(errs, fmt.Errorf("the helper executable is missing: %w (it is installed beside skein)", err))
		}
		if _, err := cri.FindRunc(); err != nil {
			errs = append(errs, err)
		}
	} else if !enrolled(cfg.StateDir) { // later the runtime may start after the node
		if _, err := cri.Inspect(ctx, cfg.CRIEndpoint); err != nil {
			errs = append(errs, err)
		}
	}
	if free, err := freeSpace(cfg.StateDir); err != nil {
		errs = append(errs, err)
	} else {
		errs = append(errs, checkSpace(cfg.StateDir, free, spaceToStart, "a node does not start"))
	}
	if !hasAddress(cfg.Address) {
		errs = append(errs, fmt.Errorf("%s is not an address of this machine: choose one of those that 'ip -brief address' shows with --address", cfg.Address))
	} else {
		errs = append(errs, portsFree(cfg.Address, cfg.EtcdPort))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("this machine cannot run a node:\n%w", err)
	}
	return nil
}

func hasAddress(a netip.Addr) bool {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return true // the listeners will say what is wrong
	}
	for _, x := range all {
		if p, err := netip.ParsePrefix(x.String()); err == nil && p.Addr() == a {
			return true
		}
	}
	return false
}

// portsFree says which of the node's ports another program holds.
func portsFree(a netip.Addr, etcd int) error {
	type port struct {
		network string
		addr    netip.AddrPort
		what    string
	}
	loopback := loopbackAddr
	ports := []port{
		{"tcp", netip.AddrPortFrom(a, apiPort), "API"}, {"tcp", netip.AddrPortFrom(loopback, apiPort), "API"},
		{"tcp", netip.AddrPortFrom(a, gossipPort), "gossip"}, {"udp", netip.AddrPortFrom(a, gossipPort), "gossip"},
		{"tcp", netip.AddrPortFrom(a, raftPort), "Raft"}, {"tcp", netip.AddrPortFrom(a, agentPort), "agent"},
		{"tcp", dnsAddr, "DNS"}, {"udp", dnsAddr, "DNS"},
	}
	for i, s := range shard.Default().Shards() {
		if etcd > 0 {
			p := uint16(etcd + i)
			ports = append(ports, port{"tcp", netip.AddrPortFrom(a, p), "etcd of shard " + s.Name}, port{"tcp", netip.AddrPortFrom(loopback, p), "etcd of shard " + s.Name})
		}
	}
	var errs []error
	for _, p := range ports {
		err := portFree(p.network, p.addr)
		if errors.Is(err, syscall.EADDRINUSE) {
			do := "stop it"
			if p.addr == dnsAddr {
				do = "let it listen on its own addresses only, not on all"
			}
			err = fmt.Errorf("%s port %d (%s) of %s is taken by another program: %s ('ss -lnp -A %s sport = :%d' names it)",
				p.network, p.addr.Port(), p.what, p.addr.Addr(), do, p.network, p.addr.Port())
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// portFree tries to listen. The address may be one that the node has yet to add to an interface.
func portFree(network string, a netip.AddrPort) error {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		var serr error
		err := c.Control(func(fd uintptr) { serr = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1) })
		return errors.Join(err, serr)
	}}
	if network == "udp" {
		l, err := lc.ListenPacket(context.Background(), network, a.String())
		if err != nil {
			return err
		}
		return l.Close()
	}
	l, err := lc.Listen(context.Background(), network, a.String())
	if err != nil {
		return err
	}
	return l.Close()
}

// errBusy says that another daemon uses the state directory.
var errBusy = errors.New("another skein uses this state directory")

// stateFree tells whether no daemon uses the state directory, without making anything.
func stateFree(dir string) error {
	if _, err := os.Stat(filepath.Join(dir, "lock")); err != nil {
		return nil // never used; what is wrong with the directory itself, lockState will say
	}
	unlock, err := lockState(dir)
	if err != nil {
		return err
	}
	unlock()
	return nil
}

// lockState makes sure that one daemon at a time uses the state directory.
func lockState(dir string) (unlock func(), err error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		pid, _ := os.ReadFile(path)
		f.Close()
		return nil, fmt.Errorf("%s: %w (process %s)", dir, errBusy, strings.TrimSpace(string(pid)))
	}
	if err := errors.Join(f.Truncate(0), writeAt(f, fmt.Sprintln(os.Getpid()))); err != nil {
		f.Close()
		return nil, fmt.Errorf("state directory: %w", diskFull(err))
	}
	return func() { f.Close() }, nil
}

// AwaitEnd waits until no daemon uses the state directory any more, or ctx ends.
func AwaitEnd(ctx context.Context, stateDir string) error {
	for {
		f, err := os.Open(filepath.Join(stateDir, "lock"))
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
		f.Close()
		if err == nil {
			return nil
		}
		if !pause(ctx, 50*time.Millisecond) {
			return ctx.Err()
		}
	}
}

// discardState removes a state directory in which nothing but the lock was made: a node that could not be enrolled leaves
// nothing behind.
func discardState(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "lock" {
		return
	}
	_ = os.Remove(filepath.Join(dir, "lock"))
	_ = os.Remove(dir) // only when it is empty; a mount point stays
}

func writeAt(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

// diskFull says what to do about a full disk.
func diskFull(err error) error {
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return fmt.Errorf("the disk is full; free some space and start the node again: %w", err)
	}
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, syscall.EROFS) {
		return fmt.Errorf("the state directory cannot be written: %w", err)
	}
	return err
}

// bridgeLogs sends what upstream's libraries log through klog to our log, one level quieter than they call it.
func bridgeLogs(l *slog.Logger) {
	klog.SetLoggerWithOptions(logr.FromSlogHandler(quieter{l.Handler()}), klog.ContextualLogger(true))
}

// quieter lowers informational records to debug: upstream's chatter is not the operator's.
type quieter struct{ slog.Handler }

func (q quieter) Enabled(ctx context.Context, l slog.Level) bool {
	if l < slog.LevelWarn {
		l -= 4
	}
	return q.Handler.Enabled(ctx, l)
}

func (q quieter) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelWarn {
		r.Level -= 4
	}
	return q.Handler.Handle(ctx, r)
}

func (q quieter) WithAttrs(a []slog.Attr) slog.Handler { return quieter{q.Handler.WithAttrs(a)} }
func (q quieter) WithGroup(s string) slog.Handler      { return quieter{q.Handler.WithGroup(s)} }
