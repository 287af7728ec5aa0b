package daemon

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"skein.io/skein/node/cri"
)

// runtime is the container runtime: the embedded containerd, or a foreign one.
type runtime struct {
	n     *node
	child *cri.Containerd // nil with a foreign runtime

	mu      sync.Mutex   // guards foreign
	foreign *cri.Foreign // what the foreign runtime said about itself; nil before it answered
}

func (n *node) newRuntime() (*runtime, error) {
	r := &runtime{n: n}
	if n.cfg.CRIEndpoint != "" {
		return r, cri.NewCgroups(n.cfg.CgroupRoot).Make()
	}
	c, err := cri.New(cri.Config{
		Dir: cri.DirIn(n.cfg.StateDir), CgroupRoot: n.cfg.CgroupRoot, Helper: n.cfg.Helper, Registries: n.cfg.Registries, Logger: n.log.With("part", "runtime"),
	})
	if err != nil {
		return nil, diskFull(err)
	}
	r.child = c
	return r, nil
}

// Run keeps containerd running, or looks after a foreign runtime.
func (r *runtime) Run(ctx context.Context) error {
	if r.child == nil {
		return r.watchForeign(ctx)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.child.Run(ctx) })
	g.Go(func() error {
		for {
			st, changed := r.child.State()
			switch {
			case st.Ready:
				r.n.parts.set("runtime", nil, fmt.Sprintf("containerd, process %d, restarted %d times", st.Pid, st.Restarts))
			case st.Err != nil:
				r.n.parts.set("runtime", st.Err, "")
			default:
				r.n.parts.set("runtime", nil, "starting")
			}
			select {
			case <-ctx.Done():
				return nil
			case <-changed:
			}
		}
	})
	return g.Wait()
}

// dial connects to the runtime once it answers.
func (r *runtime) dial(ctx context.Context) (*cri.Runtime, error) {
	if r.child == nil {
		if err := r.awaitForeign(ctx); err != nil {
			return nil, err
		}
		return cri.Dial(ctx, cri.DialConfig{Endpoint: r.n.cfg.CRIEndpoint, Logger: r.n.log})
	}
	for {
		wctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		err := r.child.WaitReady(wctx)
		cancel()
		if err == nil {
			return cri.Dial(ctx, cri.DialConfig{Endpoint: r.child.Endpoint(), ExitDir: r.child.ExitDir(), Logger: r.n.log})
		}
		if ctx.Err() != nil {
			return nil, err
		}
		r.n.log.Warn("the container runtime is not ready yet", "err", err)
		r.n.reportNoRuntime(ctx, err)
	}
}

// deviceOf finds the interface that has an address.
func deviceOf(a netip.Addr) (string, error) {
	ifs, err := net.Interfaces()
	if err != nil {
		return "", fmt.Errorf("network interfaces: %w", err)
	}
	for _, i := range ifs {
		addrs, err := i.Addrs()
		if err != nil {
			continue
		}
		for _, x := range addrs {
			if p, err := netip.ParsePrefix(x.String()); err == nil && p.Addr() == a {
				return i.Name, nil
			}
		}
	}
	return "", fmt.Errorf("no network interface of this machine has the address %s", a)
}
