package testnet

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Request is what a Probe does: Op is one of
//
//	ask    open a TCP or connected UDP socket, send Msg, give the answer. Network is one of package net, or tcp6mapped,
//	       udp6mapped: an IPv6 socket connected to ::ffff:a.b.c.d
//	sendto N unconnected UDP messages from one socket
//	open   like ask, but keep the connection as ID
//	again  send Msg on the connection ID
//	count  N times connect and close, one after the other
type Request struct {
	Op, Network, Addr, Msg, ID, Local string
	N                                 int
	NoCheck                           bool          // sendto: UDP without checksums
	Timeout                           time.Duration // default 2 s
}

// Reply is its result.
type Reply struct {
	Text   []string // answers
	Remote []string // who the socket says it talks to, or who the answers came from
	Err    string
	Errno  syscall.Errno
	Took   time.Duration
}

// Probe is a process in a namespace and a cgroup that makes connections for a test.
type Probe struct {
	t   testing.TB
	in  io.Writer
	out *bufio.Reader
}

// NewProbe starts a probe in ns; cgroup may be "".
func NewProbe(ns *NS, cgroup string) *Probe {
	ns.t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), probeMode+"=1", "GODEBUG=multipathtcp=0")
	cmd.Stderr = os.Stderr
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		ns.t.Fatal(err)
	}
	if err := ns.Start(cmd, cgroup); err != nil {
		ns.t.Fatal(err)
	}
	ns.t.Cleanup(func() {
		in.Close()
		_ = cmd.Wait()
	})
	return &Probe{ns.t, in, bufio.NewReader(out)}
}

// Do carries out one request; connection errors are in the reply.
func (p *Probe) Do(r Request) Reply {
	p.t.Helper()
	b, err := json.Marshal(r)
	if err != nil {
		p.t.Fatal(err)
	}
	if _, err := fmt.Fprintf(p.in, "%s\n", b); err != nil {
		p.t.Fatal("probe: ", err)
	}
	line, err := p.out.ReadBytes('\n')
	if err != nil {
		p.t.Fatal("probe: ", err)
	}
	var out Reply
	if err := json.Unmarshal(line, &out); err != nil {
		p.t.Fatal("probe: ", err)
	}
	return out
}

// Ask is Do with op ask; any error fails the test.
func (p *Probe) Ask(network, addr string) Reply {
	p.t.Helper()
	r := p.Do(Request{Op: "ask", Network: network, Addr: addr, Msg: "hello"})
	if r.Err != "" {
		p.t.Fatalf("%s %s: %s", network, addr, r.Err)
	}
	return r
}

func probe() int {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 1<<20)
	conns := map[string]net.Conn{}
	for in.Scan() {
		var r Request
		if err := json.Unmarshal(in.Bytes(), &r); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		if r.Timeout == 0 {
			r.Timeout = 2 * time.Second
		}
		var out Reply
		start := time.Now()
		err := carryOut(r, conns, &out)
		out.Took = time.Since(start)
		if err != nil {
			out.Err = err.Error()
			errors.As(err, &out.Errno)
		}
		b, _ := json.Marshal(out)
		fmt.Printf("%s\n", b)
	}
	return 0
}

func carryOut(r Request, conns map[string]net.Conn, out *Reply) error {
	dial := func() (net.Conn, error) {
		d := net.Dialer{Timeout: r.Timeout}
		if r.Local != "" {
			var err error
			if strings.HasPrefix(r.Network, "tcp") {
				d.LocalAddr, err = net.ResolveTCPAddr(r.Network, r.Local)
			} else {
				d.LocalAddr, err = net.ResolveUDPAddr(r.Network, r.Local)
			}
			if err != nil {
				return nil, err
			}
		}
		if strings.HasSuffix(r.Network, "6mapped") {
			return dialMapped(strings.HasPrefix(r.Network, "tcp"), r.Addr)
		}
		return d.Dial(r.Network, r.Addr)
	}
	talk := func(c net.Conn) error {
		_ = c.SetDeadline(time.Now().Add(r.Timeout))
		if _, err := c.Write([]byte(r.Msg)); err != nil {
			return err
		}
		buf := make([]byte, 64<<10)
		n, err := c.Read(buf)
		if err != nil {
			return err
		}
		out.Text = append(out.Text, strings.TrimSpace(string(buf[:n])))
		out.Remote = append(out.Remote, c.RemoteAddr().String())
		return nil
	}
	switch r.Op {
	case "ask":
		c, err := dial()
		if err != nil {
			return err
		}
		defer c.Close()
		return talk(c)
	case "open":
		c, err := dial()
		if err != nil {
			return err
		}
		conns[r.ID] = c
		return talk(c)
	case "again":
		return talk(conns[r.ID])
	case "sendto":
		return sendTo(r, out)
	case "count":
		for range r.N {
			c, err := dial()
			if err != nil {
				return err
			}
			_ = c.(*net.TCPConn).SetLinger(0)
			c.Close()
		}
		return nil
	}
	return fmt.Errorf("no such op %q", r.Op)
}

// dialMapped does what dual-stack programs (C, Java) do and package net avoids.
func dialMapped(tcp bool, addr string) (net.Conn, error) {
	a, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	kind := unix.SOCK_DGRAM
	if tcp {
		kind = unix.SOCK_STREAM
	}
	fd, err := unix.Socket(unix.AF_INET6, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), "mapped")
	defer f.Close()
	if err := unix.Connect(fd, &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}); err != nil {
		return nil, err
	}
	return net.FileConn(f)
}

func sendTo(r Request, out *Reply) error {
	addr, err := net.ResolveUDPAddr("udp", r.Addr)
	if err != nil {
		return err
	}
	u, err := net.ListenPacket(r.Network, r.Local)
	if err != nil {
		return err
	}
	defer u.Close()
	if r.NoCheck {
		rc, err := u.(*net.UDPConn).SyscallConn()
		if err != nil {
			return err
		}
		if err := rc.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_NO_CHECK, 1) }); err != nil {
			return err
		}
	}
	buf := make([]byte, 64<<10)
	for range max(1, r.N) {
		_ = u.SetDeadline(time.Now().Add(r.Timeout))
		if _, err := u.WriteTo([]byte(r.Msg), addr); err != nil {
			return err
		}
		n, from, err := u.ReadFrom(buf)
		if err != nil {
			return err
		}
		out.Text = append(out.Text, string(buf[:n]))
		out.Remote = append(out.Remote, from.String())
	}
	return nil
}
