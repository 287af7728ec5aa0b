// Package testnet gives datapath's tests namespaces, links and cgroups of their own, and processes inside them.
//
// Main runs the tests in a mount and a network namespace of their own, so that nothing but empty cgroups can be left
// behind, and those are swept by the next run. Needs root. Only tests import it.
package testnet

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	inside    = "SKEIN_TESTNET_INSIDE"
	probeMode = "SKEIN_TESTNET_PROBE"
	cgPrefix  = "skein-dp-test-"
)

// Main replaces m.Run in TestMain. extra are other modes of the test executable, chosen by an environment variable.
func Main(m *testing.M, extra map[string]func() int) {
	if os.Getenv(probeMode) != "" {
		os.Exit(probe())
	}
	for env, f := range extra {
		if os.Getenv(env) != "" {
			os.Exit(f())
		}
	}
	fuzzing := strings.Contains(strings.Join(os.Args, " "), "-test.fuzz")
	if os.Getenv(inside) != "" || os.Geteuid() != 0 || fuzzing {
		if os.Getenv(inside) != "" {
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				fmt.Fprintln(os.Stderr, "testnet: private mounts:", err)
				os.Exit(1)
			}
		}
		code := m.Run()
		sweep(os.Getpid())
		os.Exit(code)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inside+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread() // Pdeathsig follows the thread
	if err := cmd.Run(); err != nil {
		if ee := (*exec.ExitError)(nil); errors.As(err, &ee) {
			os.Exit(max(1, ee.ExitCode()))
		}
		fmt.Fprintln(os.Stderr, "testnet:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// Need skips a test that cannot work for want of root.
func Need(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for namespaces and eBPF")
	}
}

// NS is a network namespace.
type NS struct {
	Name string
	t    testing.TB
	fd   netns.NsHandle
}

// New makes an empty network namespace with lo up. It is gone when the test ends.
func New(t testing.TB, name string) *NS {
	t.Helper()
	ns := &NS{Name: name, t: t}
	ns.run(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		var err error
		if ns.fd, err = netns.Get(); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	t.Cleanup(func() { ns.fd.Close() })
	return ns
}

// Path names the namespace for other processes while this one lives.
func (ns *NS) Path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(ns.fd)) }

// run calls f on a thread of its own, which ends with it.
func (ns *NS) run(f func() error) {
	ns.t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread is thrown away
		done <- f()
	}()
	if err := <-done; err != nil {
		ns.t.Fatalf("in namespace %s: %v", ns.Name, err)
	}
}

// Do runs f in the namespace; an error fails the test. Sockets made in f stay in the namespace.
func (ns *NS) Do(f func() error) {
	ns.t.Helper()
	ns.run(func() error {
		if err := netns.Set(ns.fd); err != nil {
			return err
		}
		return f()
	})
}

// Try is Do, but gives f's error back.
func (ns *NS) Try(f func() error) (err error) {
	ns.t.Helper()
	ns.Do(func() error { err = f(); return nil })
	return err
}

// Link connects two namespaces with a veth pair; prefixes may be empty.
func Link(a *NS, aName string, aAddr string, b *NS, bName string, bAddr string) {
	a.t.Helper()
	a.Do(func() error {
		v := netlink.NewVeth(netlink.LinkAttrs{Name: aName})
		v.PeerName, v.PeerNamespace = bName, netlink.NsFd(int(b.fd))
		return netlink.LinkAdd(v)
	})
	a.up(aName, aAddr)
	b.up(bName, bAddr)
	a.waitUp(aName)
	b.waitUp(bName)
}

// waitUp waits until a device carries packets; its first ones would be lost before.
func (ns *NS) waitUp(name string) {
	ns.t.Helper()
	ns.Do(func() error {
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
			l, err := netlink.LinkByName(name)
			if err != nil || l.Attrs().OperState == netlink.OperUp {
				return err
			}
		}
		return fmt.Errorf("%s does not come up", name)
	})
}

func (ns *NS) up(name, addr string) {
	ns.t.Helper()
	ns.Do(func() error {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if addr != "" {
			a, err := netlink.ParseAddr(addr)
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(l, a); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(l)
	})
}

// NoOffload makes every device of the namespace compute checksums and segments itself. Virtual links otherwise pass packets on
// with their checksums undone, and a wrong one would never be noticed.
func (ns *NS) NoOffload() {
	ns.t.Helper()
	ns.Do(func() error {
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, l := range links {
			if l.Type() != "veth" {
				continue
			}
			v := struct{ cmd, data uint32 }{unix.ETHTOOL_STXCSUM, 0}
			req := struct {
				name [unix.IFNAMSIZ]byte
				data unsafe.Pointer
				pad  [16]byte
			}{data: unsafe.Pointer(&v)}
			copy(req.name[:], l.Attrs().Name)
			if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&req))); e != 0 {
				return fmt.Errorf("checksum offload of %s: %w", l.Attrs().Name, e)
			}
		}
		return nil
	})
}

// Bridge makes a bridge of the named devices.
func (ns *NS) Bridge(name string, ports ...string) {
	ns.t.Helper()
	ns.Do(func() error {
		if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name}}); err != nil {
			return err
		}
		br, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		for _, p := range ports {
			l, err := netlink.LinkByName(p)
			if err != nil {
				return err
			}
			if err := netlink.LinkSetMaster(l, br); err != nil {
				return err
			}
		}
		return netlink.LinkSetUp(br)
	})
}

// Route adds a route through a gateway ("" = default).
func (ns *NS) Route(dst, via string) {
	ns.t.Helper()
	ns.Do(func() error {
		_, n, err := net.ParseCIDR(dst)
		if err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{Dst: n, Gw: net.ParseIP(via)})
	})
}

// Sysctl sets a parameter of the namespace.
func (ns *NS) Sysctl(name, value string) {
	ns.t.Helper()
	ns.Do(func() error { return os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0) })
}

// Start starts a program in the namespace and, unless it is "", the cgroup.
func (ns *NS) Start(cmd *exec.Cmd, cgroup string) error {
	if cgroup != "" {
		d, err := os.Open(cgroup)
		if err != nil {
			return err
		}
		defer d.Close()
		cmd.SysProcAttr = &unix.SysProcAttr{UseCgroupFD: true, CgroupFD: int(d.Fd())}
	}
	return ns.Try(cmd.Start)
}

var cgNumber struct {
	sync.Mutex // guards n
	n          int
}

// Cgroup makes a cgroup below mount (of cgroup v2) that is removed with the test.
func Cgroup(t testing.TB, mount string) string {
	t.Helper()
	sweepDead(mount)
	cgNumber.Lock()
	cgNumber.n++
	dir := filepath.Join(mount, cgPrefix+strconv.Itoa(os.Getpid()), strconv.Itoa(cgNumber.n))
	cgNumber.Unlock()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	root := filepath.Dir(dir)
	roots.Store(root, true)
	t.Cleanup(func() { _ = unix.Rmdir(dir) })
	return dir
}

var roots sync.Map

func sweep(int) {
	roots.Range(func(k, _ any) bool { _ = unix.Rmdir(k.(string)); return true })
}

// sweepDead removes the empty cgroups of runs that were killed.
func sweepDead(mount string) {
	dirs, _ := filepath.Glob(filepath.Join(mount, cgPrefix+"*"))
	for _, d := range dirs {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(d), cgPrefix))
		if err != nil || unix.Kill(pid, 0) == nil {
			continue
		}
		subs, _ := filepath.Glob(filepath.Join(d, "*", "cgroup.procs"))
		for _, s := range subs {
			_ = unix.Rmdir(filepath.Dir(s))
		}
		_ = unix.Rmdir(d)
	}
}

// Serve starts a TCP and a UDP server at addr in ns. Each answers every message with "name from <who asked>: message".
func Serve(ns *NS, addr netip.AddrPort, name string) {
	ns.t.Helper()
	answer := func(from net.Addr, msg []byte) []byte {
		return fmt.Appendf(nil, "%s from %s: %s", name, from, bytes.TrimSpace(msg))
	}
	var l net.Listener
	var u net.PacketConn
	ns.Do(func() (err error) {
		if l, err = net.Listen("tcp4", addr.String()); err == nil {
			u, err = net.ListenPacket("udp4", addr.String())
		}
		return err
	})
	var wg sync.WaitGroup
	var mu sync.Mutex // guards conns
	conns := map[net.Conn]bool{}
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			mu.Lock()
			conns[c] = true
			mu.Unlock()
			wg.Go(func() {
				defer c.Close()
				buf := make([]byte, 64<<10)
				for {
					n, err := c.Read(buf)
					if err != nil {
						return
					}
					if _, err := c.Write(append(answer(c.RemoteAddr(), buf[:n]), '\n')); err != nil {
						return
					}
				}
			})
		}
	})
	wg.Go(func() {
		buf := make([]byte, 64<<10)
		for {
			n, from, err := u.ReadFrom(buf)
			if err != nil {
				return
			}
			_, _ = u.WriteTo(answer(from, buf[:n]), from)
		}
	})
	ns.t.Cleanup(func() {
		l.Close()
		u.Close()
		mu.Lock()
		for c := range conns {
			c.Close()
		}
		mu.Unlock()
		wg.Wait()
	})
}
