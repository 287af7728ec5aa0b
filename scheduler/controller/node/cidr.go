package node

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
)

// Sizes of one node's pod network, in bits of prefix: 254 or very many pods.
const (
	nodeBits4 = 24
	nodeBits6 = 64
)

// errNoCIDR is returned when every pod network is taken.
var errNoCIDR = errors.New("no free pod network")

// allocator divides the cluster's pod range into networks, one a node. It
// gives none twice. It is safe for concurrent use.
type allocator struct {
	all   netip.Prefix
	bits  int
	total int

	mu    sync.Mutex
	taken map[netip.Prefix]string   // network -> node
	held  map[string][]netip.Prefix // node -> networks
	odd   map[netip.Prefix]bool     // those taken that are of another size: somebody set them by hand
	next  int                       // where the search starts, so that a freed network rests before it is used again
}

func newAllocator(all netip.Prefix) *allocator {
	a := &allocator{all: all.Masked(), bits: nodeBits4, taken: map[netip.Prefix]string{}, held: map[string][]netip.Prefix{}, odd: map[netip.Prefix]bool{}}
	if all.Addr().Is6() {
		a.bits = nodeBits6
	}
	a.bits = max(a.bits, all.Bits())
	// More than 2^20 nodes are beyond any plan; the bound keeps shifts sane.
	a.total = 1 << min(a.bits-all.Bits(), 20)
	return a
}

// network returns the i-th.
func (a *allocator) network(i int) netip.Prefix {
	raw := a.all.Addr().AsSlice()
	for bit := 0; bit < 20; bit++ {
		if i>>bit&1 == 1 {
			pos := a.bits - 1 - bit
			raw[pos/8] |= 1 << (7 - pos%8)
		}
	}
	addr, _ := netip.AddrFromSlice(raw) // of the same length, so it cannot fail
	return netip.PrefixFrom(addr, a.bits)
}

// take notes networks that a node has. It returns the nodes that have one of
// them as well.
func (a *allocator) take(node string, networks []netip.Prefix) (clashes []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range networks {
		if other, used := a.taken[p]; used && other != node {
			clashes = append(clashes, other)
			continue
		}
		a.hold(node, p)
	}
	return clashes
}

func (a *allocator) hold(node string, p netip.Prefix) {
	a.taken[p] = node
	if p.Bits() != a.bits {
		a.odd[p] = true
	}
	if have := a.held[node]; !slices.Contains(have, p) {
		a.held[node] = append(have, p)
	}
}

// allocate returns a network for a node: the one that was given to it before,
// if that was not seen to be written yet.
func (a *allocator) allocate(node string) (netip.Prefix, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if have := a.held[node]; len(have) > 0 {
		return have[0], nil
	}
	for k := range a.total {
		i := (a.next + k) % a.total
		if p := a.network(i); !a.overlaps(p) {
			a.next = (i + 1) % a.total
			a.hold(node, p)
			return p, nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("%w: all %d of %s are taken", errNoCIDR, a.total, a.all)
}

func (a *allocator) overlaps(p netip.Prefix) bool {
	if _, used := a.taken[p]; used {
		return true
	}
	for q := range a.odd {
		if q.Overlaps(p) {
			return true
		}
	}
	return false
}

// release gives back what a node had.
func (a *allocator) release(node string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, p := range a.held[node] {
		delete(a.taken, p)
		delete(a.odd, p)
	}
	delete(a.held, node)
}

// podCIDRs returns the pod networks that a node object names; those that do
// not parse, which validation excludes, are left out.
func podCIDRs(n *corev1.Node) []netip.Prefix {
	texts := n.Spec.PodCIDRs
	if len(texts) == 0 && n.Spec.PodCIDR != "" {
		texts = []string{n.Spec.PodCIDR}
	}
	var out []netip.Prefix
	for _, text := range texts {
		if p, err := netip.ParsePrefix(text); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// ensureCIDR gives the node a pod network if it has none, and returns the node
// as it is then.
func (c *Controller) ensureCIDR(ctx context.Context, n *corev1.Node) (*corev1.Node, error) {
	if have := podCIDRs(n); len(have) > 0 {
		for _, clash := range c.cidrs.take(n.Name, have) {
			c.log.Warn("two nodes have one pod network", "node", n.Name, "other", clash)
		}
		return n, nil
	}
	p, err := c.cidrs.allocate(n.Name)
	if err != nil {
		c.events.Eventf(nodeRef(n), corev1.EventTypeWarning, "CIDRNotAvailable", "Node %s status is now: CIDRNotAvailable (%v)", n.Name, err)
		return n, fmt.Errorf("give node %s a pod network: %w", n.Name, err)
	}
	patched, err := c.patchNode(ctx, n.Name, "", map[string]any{
		"metadata": map[string]any{"uid": n.UID},
		"spec":     map[string]any{"podCIDR": p.String(), "podCIDRs": []string{p.String()}},
	})
	if err != nil {
		return n, fmt.Errorf("give node %s the pod network %s: %w", n.Name, p, err)
	}
	c.log.Info("pod network given", "node", n.Name, "podCIDR", p)
	// Upstream says so at every start of its controller; this happens once in the life of a node.
	c.events.Eventf(nodeRef(n), corev1.EventTypeNormal, "RegisteredNode", "Node %s event: Registered Node %s in Controller", n.Name, n.Name)
	return patched, nil
}
