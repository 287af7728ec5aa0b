// Package loader brings Skein's kernel programs and their tables into the kernel and keeps them as the node wants them.
//
// Contract: Open attaches everything, ApplyServices and ApplyNetwork take the whole desired state and change only what
// differs, Close leaves all of it working (programs, links and tables are pinned in the node's own bpf file system),
// Detach removes it. Each call is idempotent, so after an error the caller simply calls again. A Loader is not safe for
// concurrent use: one goroutine of the node owns it. Callers: node, and cmd through it. Open must run in the network
// namespace of the node.
//
// Ordering: new tables are filled before programs that use them are attached; see service.Diff for the order inside.
package loader

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"

	"skein.io/skein/datapath/service"
)

// Config configures a Loader.
type Config struct {
	Dir          string       // directory of the pins; a bpf file system is mounted there if it is none yet
	CgroupPath   string       // whose processes see Services: a directory of cgroup v2, see Cgroup2Mount
	Uplink       string       // device that the node's own address is on; "" = no NodePorts from outside, no masquerade
	Node         service.Node // this node's name (which back ends are local) and the addresses that NodePorts answer at
	SNATPorts    [2]uint16    // first and last source port for rewritten flows; default 61000-65535 (above Linux' own range)
	MaxFrontends int          // entries; default 32768
	MaxBackends  int          // entries; default 131072
	MaxFlows     int          // entries per direction, least recently used go first; default 32768 (3.3 MB each)
	Logger       *slog.Logger // nil = discard
}

func (c *Config) setDefaults() {
	if c.SNATPorts == [2]uint16{} {
		c.SNATPorts = [2]uint16{61000, 65535}
	}
	for p, d := range map[*int]int{&c.MaxFrontends: 32768, &c.MaxBackends: 131072, &c.MaxFlows: 32768} {
		if *p == 0 {
			*p = d
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, a ...any) { errs = append(errs, fmt.Errorf("datapath: "+format, a...)) }
	if c.Dir == "" {
		bad("no directory for the pins")
	}
	if c.CgroupPath == "" {
		bad("no cgroup path")
	}
	if c.Node.Name == "" {
		bad("no node name")
	}
	for _, a := range c.Node.Addrs {
		if !a.Is4() {
			bad("node address %s is not IPv4", a)
		}
	}
	if c.Uplink != "" && len(c.Node.Addrs) == 0 {
		bad("uplink %s, but no node address", c.Uplink)
	}
	if c.SNATPorts[0] == 0 || c.SNATPorts[0] > c.SNATPorts[1] {
		bad("source ports %d-%d are no range", c.SNATPorts[0], c.SNATPorts[1])
	}
	for name, n := range map[string]int{"MaxFrontends": c.MaxFrontends, "MaxBackends": c.MaxBackends, "MaxFlows": c.MaxFlows} {
		if n < 1 || n > 1<<24 {
			bad("%s is %d, not between 1 and %d", name, n, 1<<24)
		}
	}
	return errors.Join(errs...)
}

// Network is what the device programs need to know about the pod network.
type Network struct {
	PodCIDR      netip.Prefix   // this node's pods; the zero value switches masquerading off
	NoMasquerade []netip.Prefix // destinations that see the pods' own addresses: the cluster's pods, nodes with direct routes
	Devices      []Device       // besides Config.Uplink, e.g. the overlay's
}

// Device is a device where flows may enter and leave the node.
type Device struct {
	Name string
	Addr netip.Addr // source address of flows that are rewritten when they leave here
}
