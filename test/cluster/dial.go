package cluster

import (
	"context"
	"fmt"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// dialTimeout bounds one connection attempt whose context has no sooner end: a machine without power does not even refuse.
const dialTimeout = 3 * time.Second

// DialContext connects to an address from outside of all nodes: from the router, as a client on the same Ethernet would. It reaches a
// node that Cut or Partition separates from other nodes, but not one whose link is down.
func (c *Cluster) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return dialIn(ctx, netnsPath(c.st.fabric()), network, address)
}

// DialContext connects to an address from inside the node's network, but not from its cgroup: Services do not work for it (use Command).
func (n *Node) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	return dialIn(ctx, netnsPath(n.Netns()), network, address)
}

// dialIn makes a socket in another network namespace; a socket stays in the namespace it was made in. The address must be numeric.
func dialIn(ctx context.Context, path, network, address string) (net.Conn, error) {
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	go func() { // ends with the dial
		// The thread is not unlocked: if it cannot be trusted to be back home, it must die with this goroutine. Threads are cheap here.
		runtime.LockOSThread()
		ns, err := os.Open(path)
		if err != nil {
			done <- result{nil, err}
			return
		}
		defer ns.Close()
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- result{nil, fmt.Errorf("enter %s: %w", path, err)}
			return
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, network, address)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}
