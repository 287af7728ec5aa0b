// Package cluster is a laboratory for clusters on one machine: nodes in network, mount and UTS namespaces of their own, on
// one or two Ethernet segments, each with a state directory and a cgroup subtree, with which a daemon can be started, killed,
// stopped, cut off and started again. The demo, the multi-node tests and the benchmarks stand on it.
//
// Nothing is left behind. What a laboratory is going to make is written down first, in a registry file; every name in it is
// derived from the laboratory's own, and Sweep removes what belongs to laboratories whose owner has died, by these names and
// by process ids with start times, never by the name of a program. Mounts of a node live in its mount namespace and vanish with
// its last process. Several laboratories may exist at once: they share no namespace, so also no address.
//
// It needs root, and ip, nft, unshare and nsenter. Methods may be called from several goroutines; operations of one
// laboratory are done one after the other, except for what runs inside nodes.
package cluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
)

// Config of a laboratory.
type Config struct {
	// Name is part of all names: at most 8 lower-case letters and digits. Default: random.
	Name string
	// Dir is the parent of the nodes' directories. Default: skein-lab/<Name> in the directory for temporary files. It is made, and
	// removed with the laboratory.
	Dir string
	// Segments is the number of Ethernet segments, 1 (default) or 2 with a router between them.
	Segments int
	// Subnet of all nodes, a /16; segment s has the /24 with third byte s, its router address 1. Default: 10.99.0.0/16.
	Subnet netip.Prefix
	// HostLink connects the first segment to the network namespace of the caller, as address 254. Default: not.
	HostLink bool
	// Persistent lets it live on when the calling process has ended, until somebody calls Open and Close. Default: Sweep removes it then.
	Persistent bool
}

var validName = regexp.MustCompile(`^[a-z0-9]{1,8}$`)

func defaultParent() string { return filepath.Join(os.TempDir(), "skein-lab") }

func (c *Config) setDefaults() {
	if c.Name == "" {
		var b [3]byte
		_, _ = rand.Read(b[:]) // never fails
		c.Name = hex.EncodeToString(b[:])
	}
	if c.Dir == "" {
		c.Dir = filepath.Join(defaultParent(), c.Name)
	}
	if c.Segments == 0 {
		c.Segments = 1
	}
	if !c.Subnet.IsValid() {
		c.Subnet = netip.MustParsePrefix("10.99.0.0/16")
	}
}

// Validate reports all faults at once.
func (c Config) Validate() error {
	var errs []error
	if !validName.MatchString(c.Name) {
		errs = append(errs, fmt.Errorf("name %q must be 1 to 8 lower-case letters or digits", c.Name))
	}
	if !filepath.IsAbs(c.Dir) || filepath.Clean(c.Dir) != c.Dir || c.Dir == "/" {
		errs = append(errs, fmt.Errorf("directory %q must be an absolute, clean path", c.Dir))
	}
	if c.Segments != 1 && c.Segments != 2 {
		errs = append(errs, fmt.Errorf("%d segments: 1 or 2 are possible", c.Segments))
	}
	if !c.Subnet.Addr().Is4() || c.Subnet.Bits() != 16 || c.Subnet.Masked() != c.Subnet {
		errs = append(errs, fmt.Errorf("subnet %s must be an IPv4 /16", c.Subnet))
	}
	return errors.Join(errs...)
}

// Cluster is a laboratory.
type Cluster struct {
	mu sync.Mutex // serialises operations, also on disk and in the kernel; guards all below
	st state
	// children are processes that this one started and must reap, by pid; the channel closes when that is done.
	children map[int]<-chan struct{}
	release  func() // gives the laboratory back; nil: it was opened to look only
}

// New makes a laboratory without nodes.
func New(ctx context.Context, cfg Config) (*Cluster, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("lab: namespaces and cgroups need root (try sudo)")
	}
	if err := needTools(); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	c := &Cluster{children: map[int]<-chan struct{}{}, st: state{
		Version: stateVersion, Name: cfg.Name, Dir: cfg.Dir, Segments: cfg.Segments, Subnet: cfg.Subnet, HostLink: cfg.HostLink,
	}}
	if !cfg.Persistent {
		self, err := identify(os.Getpid())
		if err != nil {
			return nil, fmt.Errorf("lab: %w", err)
		}
		c.st.Owner = &self
	}
	if _, err := os.Lstat(cfg.Dir); err == nil {
		return nil, fmt.Errorf("lab %s: its directory %s is there already, and Close would remove it: remove it first, or name another", cfg.Name, cfg.Dir)
	}
	release, err := lockRun(cfg.Name)
	if err != nil {
		return nil, err
	}
	c.release = release
	if err := c.st.create(); err != nil {
		release()
		return nil, err
	}
	if err := errors.Join(os.MkdirAll(cfg.Dir, 0o755), c.makeFabric(ctx)); err != nil {
		return nil, errors.Join(fmt.Errorf("lab %s: %w", cfg.Name, err), c.Close(context.WithoutCancel(ctx)))
	}
	return c, nil
}

// Open takes up a persistent laboratory; ErrBusy while another process works on it.
func Open(name string) (*Cluster, error) {
	if !validName.MatchString(name) {
		return nil, fmt.Errorf("lab name %q must be 1 to 8 lower-case letters or digits", name)
	}
	release, err := lockRun(name)
	if err != nil {
		return nil, err
	}
	st, err := loadState(name)
	if err != nil {
		release()
		return nil, err
	}
	return &Cluster{children: map[int]<-chan struct{}{}, st: st, release: release}, nil
}

// View takes up any laboratory to look at it and to run commands in its nodes; what would change it fails.
func View(name string) (*Cluster, error) {
	if !validName.MatchString(name) {
		return nil, fmt.Errorf("lab name %q must be 1 to 8 lower-case letters or digits", name)
	}
	st, err := loadState(name)
	if err != nil {
		return nil, err
	}
	return &Cluster{children: map[int]<-chan struct{}{}, st: st}, nil
}

// errView is returned by operations on what View gave.
var errView = errors.New("the lab was opened to look only")

// Name of the laboratory.
func (c *Cluster) Name() string { return c.st.Name }

// Dir is the parent of the nodes' directories, and a place for files of the test.
func (c *Cluster) Dir() string { return c.st.Dir }

// Release ends the work on a persistent laboratory, which goes on.
func (c *Cluster) Release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.release != nil {
		c.release()
		c.release = nil
	}
}

// Close kills all nodes and removes everything. A second call does nothing.
func (c *Cluster) Close(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.release == nil {
		return nil
	}
	err := c.st.remove(ctx)
	for pid, done := range c.children {
		select {
		case <-done:
			delete(c.children, pid)
		case <-ctx.Done():
			err = errors.Join(err, fmt.Errorf("process %d did not end: %w", pid, ctx.Err()))
		}
	}
	c.release()
	c.release = nil
	if err != nil {
		return fmt.Errorf("lab %s: %w", c.st.Name, err)
	}
	return nil
}

// Node gives a node by its name; nil = none.
func (c *Cluster) Node(name string) *Node {
	c.mu.Lock()
	defer c.mu.Unlock()
	if st := c.st.node(name); st != nil {
		return &Node{c, st}
	}
	return nil
}

// Nodes gives all nodes, in the order in which they were added.
func (c *Cluster) Nodes() []*Node {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*Node
	for _, n := range c.st.Nodes {
		out = append(out, &Node{c, n})
	}
	return out
}

var validNode = regexp.MustCompile(`^[a-z0-9]{1,12}$`)

// maxNodes is how many addresses a segment has for nodes.
const maxNodes = 200

// AddNode makes a node on segment 1 or 2 (0 = 1) and boots it: its namespaces are there, nothing runs in it.
func (c *Cluster) AddNode(ctx context.Context, name string, segment int) (*Node, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if segment == 0 {
		segment = 1
	}
	switch {
	case c.release == nil:
		return nil, errView
	case !validNode.MatchString(name):
		return nil, fmt.Errorf("node name %q must be 1 to 12 lower-case letters or digits", name)
	case c.st.node(name) != nil:
		return nil, fmt.Errorf("lab %s has a node %s already", c.st.Name, name)
	case segment < 1 || segment > c.st.Segments:
		return nil, fmt.Errorf("lab %s has no segment %d", c.st.Name, segment)
	case len(c.st.Nodes) >= maxNodes:
		return nil, fmt.Errorf("lab %s is full: %d nodes", c.st.Name, maxNodes)
	}
	index := 1
	for _, n := range c.st.Nodes {
		index = max(index, n.Index+1)
	}
	ip := c.st.Subnet.Addr().As4()
	ip[2], ip[3] = byte(segment), byte(10+index)
	n := &Node{c, &nodeState{Name: name, Index: index, Segment: segment, IP: netip.AddrFrom4(ip)}}
	c.st.Nodes = append(c.st.Nodes, n.st)
	if err := c.st.save(); err != nil {
		return nil, err
	}
	if err := n.boot(ctx); err != nil {
		return nil, fmt.Errorf("node %s: %w", name, err)
	}
	return n, nil
}

// Cut drops every packet between nodes a and b, in both directions; each still reaches others.
func (c *Cluster) Cut(ctx context.Context, a, b string) error {
	return c.recut(ctx, func(cuts [][2]string) ([][2]string, error) { return c.st.cut(cuts, a, b) })
}

// Mute drops every packet that node from sends to node to; what comes the other way arrives. Heal ends it.
func (c *Cluster) Mute(ctx context.Context, from, to string) error {
	return c.recut(ctx, func(cuts [][2]string) ([][2]string, error) {
		if _, err := c.st.cut(nil, from, to); err != nil {
			return nil, err
		}
		if p := [2]string{from, to}; !slices.Contains(c.st.Mutes, p) {
			c.st.Mutes = append(c.st.Mutes, p)
		}
		return cuts, nil
	})
}

// Partition cuts every pair of nodes that are in different groups. A node in no group is not affected.
func (c *Cluster) Partition(ctx context.Context, groups ...[]string) error {
	return c.recut(ctx, func(cuts [][2]string) (_ [][2]string, err error) {
		for i, g := range groups {
			for _, other := range groups[i+1:] {
				for _, a := range g {
					for _, b := range other {
						if cuts, err = c.st.cut(cuts, a, b); err != nil {
							return nil, err
						}
					}
				}
			}
		}
		return cuts, nil
	})
}

// Heal ends all cuts and puts all links back up.
func (c *Cluster) Heal(ctx context.Context) error {
	var errs []error
	for _, n := range c.Nodes() {
		errs = append(errs, n.Link(ctx, true))
	}
	errs = append(errs, c.recut(ctx, func([][2]string) ([][2]string, error) {
		c.st.Mutes = nil
		return nil, nil
	}))
	return errors.Join(errs...)
}

func (c *Cluster) recut(ctx context.Context, f func([][2]string) ([][2]string, error)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.release == nil {
		return errView
	}
	cuts, err := f(slices.Clone(c.st.Cuts))
	if err != nil {
		return fmt.Errorf("lab %s: %w", c.st.Name, err)
	}
	c.st.Cuts = cuts
	if err := c.st.save(); err != nil {
		return err
	}
	return c.applyCuts(ctx)
}

// cut adds a pair, in one order, once.
func (s *state) cut(cuts [][2]string, a, b string) ([][2]string, error) {
	for _, n := range []string{a, b} {
		if s.node(n) == nil {
			return nil, fmt.Errorf("no node %q", n)
		}
	}
	if a == b {
		return nil, fmt.Errorf("node %s cannot be cut from itself", a)
	}
	p := [2]string{min(a, b), max(a, b)}
	if slices.Contains(cuts, p) {
		return cuts, nil
	}
	return append(cuts, p), nil
}
