package podnet

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// NetConf is the plugin's part of a CNI configuration.
type NetConf struct {
	types.PluginConf
	PodCIDR string `json:"podCIDR"`          // this node's range
	DataDir string `json:"dataDir"`          // where the addresses are kept
	MTU     int    `json:"mtu,omitempty"`    // bytes; 0 = 1500
	NodeIP  string `json:"nodeIP,omitempty"` // source address of the node's own traffic to its pods
}

// Conflist renders the CNI configuration that makes a runtime call this plugin (the executable pluginType). A network name
// of its own for each node keeps several nodes on one machine apart in libcni's cache.
func Conflist(network, pluginType, dataDir string, podCIDR netip.Prefix, nodeIP netip.Addr, mtu int) ([]byte, error) {
	type plugin struct {
		Type    string `json:"type"`
		PodCIDR string `json:"podCIDR"`
		DataDir string `json:"dataDir"`
		MTU     int    `json:"mtu,omitempty"`
		NodeIP  string `json:"nodeIP,omitempty"`
		// hostPorts are entries of the Service tables, made by the node; so the runtime need not look for another plugin
		Capabilities map[string]bool `json:"capabilities"`
	}
	return json.MarshalIndent(map[string]any{
		"cniVersion": "1.0.0", "name": network,
		"plugins": []plugin{{pluginType, podCIDR.Masked().String(), dataDir, mtu, nodeIP.String(), map[string]bool{"portMappings": true}}},
	}, "", "  ")
}

// CNI runs this process as a CNI plugin: the command from the environment, the configuration from standard input, the
// result to standard output. It returns the exit code.
func CNI() int {
	runtime.LockOSThread()
	e := skel.PluginMainFuncsWithError(skel.CNIFuncs{Add: cmdAdd, Del: cmdDel, Check: cmdCheck, GC: cmdGC, Status: cmdStatus},
		version.PluginSupports("0.3.1", "0.4.0", "1.0.0", "1.1.0"), "Skein pod network")
	if e == nil {
		return 0
	}
	if err := e.Print(); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	return 1
}

func parseConf(b []byte) (NetConf, netip.Prefix, error) {
	var c NetConf
	if err := json.Unmarshal(b, &c); err != nil {
		return c, netip.Prefix{}, types.NewError(types.ErrDecodingFailure, "podnet: configuration", err.Error())
	}
	r, err := netip.ParsePrefix(c.PodCIDR)
	if err == nil && (!r.Addr().Is4() || r.Bits() > 29) {
		err = errors.New("not an IPv4 range of /29 or larger")
	}
	if err != nil {
		return c, r, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("podnet: podCIDR %q", c.PodCIDR), err.Error())
	}
	if c.DataDir == "" {
		return c, r, types.NewError(types.ErrInvalidNetworkConfig, "podnet: no dataDir", "")
	}
	if c.MTU == 0 {
		c.MTU = 1500
	}
	if c.MTU < 576 || c.MTU > 65535 { // RFC 791: every host takes 576
		return c, r, types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf("podnet: mtu %d is not between 576 and 65535", c.MTU), "")
	}
	return c, r.Masked(), nil
}

func cmdAdd(args *skel.CmdArgs) error {
	c, r, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	a, owner := addresses{c.DataDir}, args.ContainerID+"/"+args.IfName
	ip, err := a.allocate(r, owner, podUID(args.Args))
	if err != nil {
		return err
	}
	mac, err := plug(args, ip, c)
	if err != nil {
		return errors.Join(err, removeLink(HostLink(args.ContainerID, args.IfName)), a.release(owner))
	}
	zero := 0
	res := &current.Result{
		CNIVersion: current.ImplementedSpecVersion,
		Interfaces: []*current.Interface{{Name: args.IfName, Mac: mac.String(), Mtu: c.MTU, Sandbox: args.Netns}},
		IPs:        []*current.IPConfig{{Interface: &zero, Address: *host(ip), Gateway: Gateway.AsSlice()}},
		Routes:     []*types.Route{{Dst: net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, GW: Gateway.AsSlice()}},
	}
	return types.PrintResult(res, c.CNIVersion)
}

// podUID takes the pod's UID out of CNI_ARGS, in which runtimes for Kubernetes pass it; empty = none.
func podUID(args string) string {
	for _, kv := range strings.Split(args, ";") {
		if k, v, _ := strings.Cut(kv, "="); k == "K8S_POD_UID" {
			return v
		}
	}
	return ""
}

// plug makes the link between the pod's namespace and this one, with its address and routes. The peer is created directly
// in the pod's namespace: no move, no rename.
func plug(args *skel.CmdArgs, ip netip.Addr, c NetConf) (net.HardwareAddr, error) {
	name := HostLink(args.ContainerID, args.IfName)
	if err := removeLink(name); err != nil { // an ADD that was cut off
		return nil, err
	}
	pod, err := netns.GetFromPath(args.Netns)
	if err != nil {
		return nil, fmt.Errorf("podnet: network namespace %s: %w", args.Netns, err)
	}
	defer pod.Close()
	mac := podMAC(args.ContainerID, args.IfName)
	v := netlink.NewVeth(netlink.LinkAttrs{Name: name, MTU: c.MTU, HardwareAddr: hostMAC})
	v.PeerName, v.PeerNamespace, v.PeerMTU, v.PeerHardwareAddr = args.IfName, netlink.NsFd(int(pod)), uint32(c.MTU), mac
	if err := netlink.LinkAdd(v); err != nil {
		return nil, fmt.Errorf("podnet: make link %s: %w", name, err)
	}
	h, err := netlink.NewHandleAt(pod, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("podnet: network namespace %s: %w", args.Netns, err)
	}
	defer h.Close()
	if err := podSide(h, args.IfName, ip); err != nil {
		return nil, fmt.Errorf("podnet: pod's end of %s: %w", name, err)
	}
	if err := hostSide(name, ip, mac, c.NodeIP); err != nil {
		return nil, fmt.Errorf("podnet: node's end of %s: %w", name, err)
	}
	return mac, waitUp(h, args.IfName)
}

// waitUp waits until the pod's end carries packets. The end that was started first gets its queue only when the kernel's
// link watcher comes round, which on a busy machine is after the pod's first packets, and those would be lost: a second's
// delay for TCP and many for DNS. A link that is not up in time is no fault: the packets would come through later.
func waitUp(h *netlink.Handle, ifName string) error {
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); time.Sleep(500 * time.Microsecond) {
		l, err := h.LinkByName(ifName)
		if err != nil {
			return fmt.Errorf("podnet: %s in the pod: %w", ifName, err)
		}
		if l.Attrs().OperState == netlink.OperUp {
			return nil
		}
	}
	return nil
}

func podSide(h *netlink.Handle, ifName string, ip netip.Addr) error {
	l, err := h.LinkByName(ifName)
	if err != nil {
		return err
	}
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	i := l.Attrs().Index
	gw := net.IP(Gateway.AsSlice())
	for _, step := range []func() error{
		func() error { return h.LinkSetUp(lo) },
		func() error { return h.LinkSetUp(l) },
		func() error { return h.AddrAdd(l, &netlink.Addr{IPNet: host(ip)}) },
		func() error {
			return h.NeighSet(&netlink.Neigh{LinkIndex: i, State: netlink.NUD_PERMANENT, IP: gw, HardwareAddr: hostMAC})
		},
		func() error {
			return h.RouteReplace(&netlink.Route{LinkIndex: i, Scope: netlink.SCOPE_LINK, Dst: host(Gateway)})
		},
		func() error { return h.RouteReplace(&netlink.Route{LinkIndex: i, Gw: gw, Dst: ipNet(everything)}) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

var everything = netip.PrefixFrom(netip.IPv4Unspecified(), 0)

func hostSide(name string, ip netip.Addr, mac net.HardwareAddr, nodeIP string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	// A pod may only send from its own address. (Effective while conf.all.rp_filter is not 2; Net.Setup sees to that.)
	if err := sysctl("net/ipv4/conf/"+name+"/rp_filter", "1"); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return err
	}
	i := l.Attrs().Index
	if err := netlink.NeighSet(&netlink.Neigh{LinkIndex: i, State: netlink.NUD_PERMANENT, IP: ip.AsSlice(), HardwareAddr: mac}); err != nil {
		return err
	}
	route := &netlink.Route{LinkIndex: i, Scope: netlink.SCOPE_LINK, Dst: host(ip)}
	if src, err := netip.ParseAddr(nodeIP); err == nil {
		route.Src = src.AsSlice()
	}
	return netlink.RouteReplace(route)
}

// removeLink removes a link by name; none is fine.
func removeLink(name string) error {
	l, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil
	}
	if err == nil {
		err = netlink.LinkDel(l)
	}
	if err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("podnet: remove link %s: %w", name, err)
	}
	return nil
}

// cmdDel also succeeds when the namespace, the link or the address is gone: runtimes call it twice, and after crashes.
func cmdDel(args *skel.CmdArgs) error {
	c, _, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	if err := removeLink(HostLink(args.ContainerID, args.IfName)); err != nil {
		return err
	}
	return addresses{c.DataDir}.release(args.ContainerID + "/" + args.IfName)
}

func cmdCheck(args *skel.CmdArgs) error {
	c, _, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	have, err := addresses{c.DataDir}.owners()
	if err != nil {
		return err
	}
	for ip, o := range have {
		if o == args.ContainerID+"/"+args.IfName {
			return checkLink(args, ip)
		}
	}
	return fmt.Errorf("podnet: sandbox %s has no address", args.ContainerID)
}

func checkLink(args *skel.CmdArgs, ip netip.Addr) error {
	name := HostLink(args.ContainerID, args.IfName)
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("podnet: link %s: %w", name, err)
	}
	routes, err := netlink.RouteListFiltered(unix.AF_INET, &netlink.Route{Dst: host(ip), LinkIndex: l.Attrs().Index}, netlink.RT_FILTER_DST|netlink.RT_FILTER_OIF)
	if err != nil || len(routes) == 0 {
		return fmt.Errorf("podnet: no route to %s through %s (%w)", ip, name, err)
	}
	pod, err := netns.GetFromPath(args.Netns)
	if err != nil {
		return fmt.Errorf("podnet: network namespace %s: %w", args.Netns, err)
	}
	defer pod.Close()
	h, err := netlink.NewHandleAt(pod, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("podnet: network namespace %s: %w", args.Netns, err)
	}
	defer h.Close()
	pl, err := h.LinkByName(args.IfName)
	if err != nil {
		return fmt.Errorf("podnet: %s in the pod: %w", args.IfName, err)
	}
	addrs, err := h.AddrList(pl, unix.AF_INET)
	if err != nil {
		return fmt.Errorf("podnet: %s in the pod: %w", args.IfName, err)
	}
	for _, a := range addrs {
		if a.IP.Equal(ip.AsSlice()) {
			return nil
		}
	}
	return fmt.Errorf("podnet: %s in the pod lacks the address %s", args.IfName, ip)
}

func cmdGC(args *skel.CmdArgs) error {
	c, _, err := parseConf(args.StdinData)
	if err != nil {
		return err
	}
	var live []string
	for _, v := range c.ValidAttachments {
		live = append(live, v.ContainerID)
	}
	// Runtimes must not ADD while they GC (CNI specification), so that now is late enough.
	_, err = GC(c.DataDir, live, time.Now())
	return err
}

// notReady is the specification's code for "cannot serve ADD now".
const notReady = 50

func cmdStatus(args *skel.CmdArgs) error {
	c, r, err := parseConf(args.StdinData)
	if err != nil {
		return types.NewError(notReady, err.Error(), "")
	}
	have, err := addresses{c.DataDir}.owners()
	if err == nil {
		if _, ok := next(r, netip.Addr{}, func(k netip.Addr) bool { _, used := have[k]; return used }); !ok {
			err = ErrNoAddress
		}
	}
	if err != nil {
		return types.NewError(notReady, err.Error(), "")
	}
	return nil
}
