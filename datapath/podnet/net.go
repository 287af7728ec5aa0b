package podnet

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// OverlayDevice is the VXLAN device's name.
	OverlayDevice = "skein.vxlan"
	// OverlayOverhead is what VXLAN adds to a packet, in bytes: outer IPv4 20, UDP 8, VXLAN 8, inner Ethernet 14 (RFC 7348).
	OverlayOverhead = 50
	// routeProtocol marks our routes (rtnetlink's rtm_protocol; 83 is unassigned in /etc/iproute2/rt_protos).
	routeProtocol = 83
)

// Config configures a Net.
type Config struct {
	NodeIP      netip.Addr   // this node's address, IPv4
	PodCIDR     netip.Prefix // this node's pods
	ClusterCIDR netip.Prefix // all pods; addresses in it that no node has are refused at once. The zero value: none are
	DNS         netip.Addr   // address added to lo for the node's DNS; the zero value: none
	VNI         int          // VXLAN network identifier, default 83
	Port        int          // VXLAN's UDP port, default 4789 (IANA)
	Logger      *slog.Logger // nil = discard
}

func (c *Config) setDefaults() {
	c.VNI = cmp.Or(c.VNI, 83)
	c.Port = cmp.Or(c.Port, 4789)
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Validate reports everything that is wrong with c.
func (c Config) Validate() error {
	var errs []error
	if !c.NodeIP.Is4() {
		errs = append(errs, fmt.Errorf("podnet: node address %s is not IPv4", c.NodeIP))
	}
	if !c.PodCIDR.IsValid() || !c.PodCIDR.Addr().Is4() || c.PodCIDR.Bits() > 29 {
		errs = append(errs, fmt.Errorf("podnet: pod CIDR %s is not an IPv4 range of /29 or larger", c.PodCIDR))
	}
	if c.ClusterCIDR.IsValid() && (!c.ClusterCIDR.Addr().Is4() || !c.ClusterCIDR.Overlaps(c.PodCIDR)) {
		errs = append(errs, fmt.Errorf("podnet: pod CIDR %s is not in the cluster's %s", c.PodCIDR, c.ClusterCIDR))
	}
	if c.VNI < 1 || c.VNI >= 1<<24 {
		errs = append(errs, fmt.Errorf("podnet: VXLAN identifier %d is not between 1 and %d", c.VNI, 1<<24-1))
	}
	if c.Port < 1 || c.Port > 65535 {
		errs = append(errs, fmt.Errorf("podnet: VXLAN port %d is not between 1 and 65535", c.Port))
	}
	return errors.Join(errs...)
}

// Peer is another node.
type Peer struct {
	Node    string
	IP      netip.Addr
	PodCIDR netip.Prefix
}

// State tells what Apply made, for the device programs (datapath/loader.Network).
type State struct {
	Uplink  string       // device that the node's address is on
	MTU     int          // of the uplink, for pods; packets into the overlay learn the smaller one by path MTU discovery
	Direct  []netip.Addr // peers with a straight route: they can reach our pods' own addresses
	Overlay netip.Addr   // our address on OverlayDevice, if that exists
	Faults  error        // peers that cannot be right and were left out, with the reasons; nil = none
}

// Net keeps the routes of one node. Use New.
type Net struct {
	cfg    Config
	uplink netlink.Link
	local  []netip.Prefix // networks on the uplink
	faults error          // of the last Apply
}

// New finds the device that has the node's address.
func New(cfg Config) (*Net, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	n := &Net{cfg: cfg}
	return n, n.findUplink()
}

func (n *Net) findUplink() error {
	addrs, err := netlink.AddrList(nil, unix.AF_INET)
	if err != nil {
		return fmt.Errorf("podnet: list addresses: %w", err)
	}
	byLink := map[int][]netip.Prefix{}
	index := 0
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP.To4())
		bits, _ := a.Mask.Size()
		if !ok {
			continue
		}
		byLink[a.LinkIndex] = append(byLink[a.LinkIndex], netip.PrefixFrom(ip, bits).Masked())
		if ip == n.cfg.NodeIP {
			index = a.LinkIndex
		}
	}
	if index == 0 {
		return fmt.Errorf("podnet: no network device has the node's address %s", n.cfg.NodeIP)
	}
	if n.uplink, err = netlink.LinkByIndex(index); err != nil {
		return fmt.Errorf("podnet: device of %s: %w", n.cfg.NodeIP, err)
	}
	n.local = byLink[index]
	return nil
}

// Setup prepares the namespace: forwarding, no redirects, source checks that allow replies through another device, and the
// address for DNS.
func (n *Net) Setup() error {
	up := n.uplink.Attrs().Name
	for _, s := range [][2]string{
		{"net/ipv4/ip_forward", "1"},
		// We send packets out where they came in (NodePort to another node); telling the client to go straight would break it.
		{"net/ipv4/conf/all/send_redirects", "0"},
		{"net/ipv4/conf/" + up + "/send_redirects", "0"},
	} {
		if err := sysctl(s[0], s[1]); err != nil {
			return err
		}
	}
	// The strictest of "all" and the device counts. Overlay and direct routes make ways asymmetric, so the uplink must not be
	// strict; pods' links are, each by itself.
	if err := sysctl("net/ipv4/conf/all/rp_filter", "0"); err != nil {
		return err
	}
	if err := atMostLoose("net/ipv4/conf/" + up + "/rp_filter"); err != nil {
		return err
	}
	if !n.cfg.DNS.IsValid() {
		return nil
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("podnet: lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("podnet: lo: %w", err)
	}
	// Scope host: the kernel must never choose it as a source address by itself.
	if err := netlink.AddrReplace(lo, &netlink.Addr{IPNet: host(n.cfg.DNS), Scope: unix.RT_SCOPE_HOST}); err != nil {
		return fmt.Errorf("podnet: add %s to lo: %w", n.cfg.DNS, err)
	}
	return nil
}

func sysctl(name, value string) error {
	path := filepath.Join("/proc/sys", name)
	if b, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(b)) == value {
		return nil
	}
	if err := os.WriteFile(path, []byte(value), 0); err != nil {
		return fmt.Errorf("podnet: set %s to %s: %w", strings.ReplaceAll(name, "/", "."), value, err)
	}
	return nil
}

func atMostLoose(name string) error {
	b, err := os.ReadFile(filepath.Join("/proc/sys", name))
	if err != nil {
		return fmt.Errorf("podnet: %w", err)
	}
	if strings.TrimSpace(string(b)) != "1" {
		return nil
	}
	return sysctl(name, "2")
}

// Apply makes the routes lead to exactly these peers. Peers that cannot be right (overlapping ranges) hinder no others and are
// no error, for trying again would not help: they are logged once and told in State.Faults.
func (n *Net) Apply(peers []Peer) (State, error) {
	if err := n.findUplink(); err != nil { // addresses may have changed
		return State{}, err
	}
	ways, faults := plan(n.cfg, n.local, peers)
	if faults != nil && (n.faults == nil || n.faults.Error() != faults.Error()) {
		n.cfg.Logger.Warn("nodes without a route to their pods", "why", faults)
	}
	n.faults = faults
	st := stateOf(n.cfg, ways)
	st.Uplink, st.MTU, st.Faults = n.uplink.Attrs().Name, n.uplink.Attrs().MTU, faults
	var errs []error
	tunnels := slices.DeleteFunc(slices.Clone(ways), func(w way) bool { return !w.overlay })
	var vx netlink.Link
	if len(tunnels) > 0 {
		var err error
		if vx, err = n.ensureOverlay(st.Overlay); err != nil {
			return st, err
		}
		errs = append(errs, addNeighbours(vx, tunnels))
	}
	errs = append(errs, n.syncRoutes(ways, vx))
	if vx != nil {
		errs = append(errs, dropNeighbours(vx, tunnels))
	} else {
		errs = append(errs, removeLink(OverlayDevice))
	}
	return st, errors.Join(errs...)
}

func stateOf(cfg Config, ways []way) (st State) {
	for _, w := range ways {
		switch {
		case w.overlay:
			st.Overlay = NodeAddr(cfg.PodCIDR)
		case w.peer.IsValid():
			st.Direct = append(st.Direct, w.peer)
		}
	}
	return st
}

// way is how a range is reached: straight, through the overlay, or (no peer) not at all.
type way struct {
	dst     netip.Prefix
	peer    netip.Addr
	overlay bool
}

// plan decides the ways, sorted by destination. Peers that cannot be right are left out and named in the error.
func plan(cfg Config, local []netip.Prefix, peers []Peer) ([]way, error) {
	var errs []error
	ways := []way{{dst: cfg.PodCIDR.Masked()}}
	if cfg.ClusterCIDR.IsValid() && cfg.ClusterCIDR.Masked() != cfg.PodCIDR.Masked() {
		ways = append(ways, way{dst: cfg.ClusterCIDR.Masked()})
	}
	peers = slices.Clone(peers)
	slices.SortFunc(peers, func(a, b Peer) int { return cmp.Compare(a.Node, b.Node) })
	taken := newRanges(peers)
	taken.add(cfg.PodCIDR, "this node")
	for _, p := range peers {
		bad := ""
		switch {
		case !p.IP.Is4() || !p.PodCIDR.IsValid() || !p.PodCIDR.Addr().Is4():
			bad = "it has no IPv4 address or range"
		case p.IP == cfg.NodeIP:
			bad = "it has this node's address"
		}
		if bad == "" {
			if r, node, clash := taken.overlap(p.PodCIDR); clash {
				bad = fmt.Sprintf("its range overlaps with %s of %s", r, node)
			}
		}
		if bad != "" {
			errs = append(errs, fmt.Errorf("podnet: no route to node %s (%s, pods %s): %s", p.Node, p.IP, p.PodCIDR, bad))
			continue
		}
		taken.add(p.PodCIDR, p.Node)
		direct := slices.ContainsFunc(local, func(l netip.Prefix) bool { return l.Contains(p.IP) })
		ways = append(ways, way{dst: p.PodCIDR.Masked(), peer: p.IP, overlay: !direct})
	}
	slices.SortFunc(ways, func(a, b way) int {
		return cmp.Or(a.dst.Addr().Compare(b.dst.Addr()), cmp.Compare(a.dst.Bits(), b.dst.Bits()))
	})
	return ways, errors.Join(errs...)
}

// route is a way in the kernel's terms.
func (n *Net) route(w way, vx netlink.Link) netlink.Route {
	r := netlink.Route{Dst: ipNet(w.dst), Protocol: routeProtocol, Table: unix.RT_TABLE_MAIN}
	switch {
	case !w.peer.IsValid():
		r.Type = unix.RTN_UNREACHABLE // pods' own /32 routes are more exact; what is left has no pod
	case w.overlay:
		r.Type, r.LinkIndex, r.Flags = unix.RTN_UNICAST, vx.Attrs().Index, int(netlink.FLAG_ONLINK)
		r.Gw, r.Src = NodeAddr(w.dst).AsSlice(), NodeAddr(n.cfg.PodCIDR).AsSlice()
	default:
		r.Type, r.LinkIndex = unix.RTN_UNICAST, n.uplink.Attrs().Index
		r.Gw, r.Src = w.peer.AsSlice(), n.cfg.NodeIP.AsSlice()
	}
	return r
}

func (n *Net) syncRoutes(ways []way, vx netlink.Link) error {
	have, err := netlink.RouteListFiltered(unix.AF_INET, &netlink.Route{Protocol: routeProtocol, Table: unix.RT_TABLE_MAIN},
		netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
	if err != nil {
		return fmt.Errorf("podnet: list routes: %w", err)
	}
	old := map[string]netlink.Route{}
	for _, r := range have {
		if r.Dst != nil {
			old[r.Dst.String()] = r
		}
	}
	var errs []error
	for _, w := range ways {
		r := n.route(w, vx)
		o, ok := old[r.Dst.String()]
		delete(old, r.Dst.String())
		if ok && o.Type == r.Type && (r.Type == unix.RTN_UNREACHABLE || o.LinkIndex == r.LinkIndex && o.Gw.Equal(r.Gw) && o.Src.Equal(r.Src)) {
			continue
		}
		if err := netlink.RouteReplace(&r); err != nil {
			errs = append(errs, fmt.Errorf("podnet: route to %s through %s: %w", w.dst, w.peer, err))
		}
	}
	for _, r := range old {
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("podnet: delete route to %s: %w", r.Dst, err))
		}
	}
	return errors.Join(errs...)
}

// overlayMAC is a node's address on the overlay, from its IP: nobody has to be asked.
func overlayMAC(ip netip.Addr) net.HardwareAddr {
	b := ip.As4()
	return net.HardwareAddr{0x02, 0x53, b[0], b[1], b[2], b[3]}
}

// ensureOverlay makes the VXLAN device, or makes it anew if it has other settings.
func (n *Net) ensureOverlay(addr netip.Addr) (netlink.Link, error) {
	up := n.uplink.Attrs()
	want := &netlink.Vxlan{
		LinkAttrs: netlink.LinkAttrs{Name: OverlayDevice, MTU: up.MTU - OverlayOverhead, HardwareAddr: overlayMAC(n.cfg.NodeIP)},
		VxlanId:   n.cfg.VNI, VtepDevIndex: up.Index, SrcAddr: n.cfg.NodeIP.AsSlice(), Port: n.cfg.Port, Learning: false,
	}
	l, err := netlink.LinkByName(OverlayDevice)
	if err == nil {
		h, ok := l.(*netlink.Vxlan)
		if !ok || h.VxlanId != want.VxlanId || h.VtepDevIndex != want.VtepDevIndex || !h.SrcAddr.Equal(want.SrcAddr) || h.Port != want.Port ||
			h.Attrs().HardwareAddr.String() != want.HardwareAddr.String() {
			if err := removeLink(OverlayDevice); err != nil {
				return nil, err
			}
			err = netlink.LinkNotFoundError{}
		}
	}
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		if err := netlink.LinkAdd(want); err != nil {
			return nil, fmt.Errorf("podnet: make %s: %w", OverlayDevice, err)
		}
		l, err = netlink.LinkByName(OverlayDevice)
	}
	if err != nil {
		return nil, fmt.Errorf("podnet: %s: %w", OverlayDevice, err)
	}
	if l.Attrs().MTU != want.MTU {
		if err := netlink.LinkSetMTU(l, want.MTU); err != nil {
			return nil, fmt.Errorf("podnet: MTU of %s: %w", OverlayDevice, err)
		}
	}
	if err := replaceAddr(l, addr); err != nil {
		return nil, err
	}
	if err := atMostLoose("net/ipv4/conf/" + OverlayDevice + "/rp_filter"); err != nil {
		return nil, err
	}
	if err := netlink.LinkSetUp(l); err != nil {
		return nil, fmt.Errorf("podnet: start %s: %w", OverlayDevice, err)
	}
	return l, nil
}

func replaceAddr(l netlink.Link, addr netip.Addr) error {
	have, err := netlink.AddrList(l, unix.AF_INET)
	if err != nil {
		return fmt.Errorf("podnet: addresses of %s: %w", OverlayDevice, err)
	}
	for _, a := range have {
		if !a.IP.Equal(addr.AsSlice()) {
			if err := netlink.AddrDel(l, &a); err != nil {
				return fmt.Errorf("podnet: remove %s from %s: %w", a.IP, OverlayDevice, err)
			}
		}
	}
	if err := netlink.AddrReplace(l, &netlink.Addr{IPNet: host(addr)}); err != nil {
		return fmt.Errorf("podnet: add %s to %s: %w", addr, OverlayDevice, err)
	}
	return nil
}

// addNeighbours tells the device, for each peer, which MAC its overlay address has and which node that MAC is behind.
func addNeighbours(vx netlink.Link, tunnels []way) error {
	have, err := permanent(vx)
	if err != nil {
		return err
	}
	known := map[string]bool{}
	for _, e := range have {
		known[neighKey(e)] = true
	}
	var errs []error
	for _, w := range tunnels {
		for _, e := range neighbours(vx, w) {
			if known[neighKey(e)] {
				continue
			}
			if err := netlink.NeighSet(&e); err != nil {
				errs = append(errs, fmt.Errorf("podnet: neighbour %s behind %s: %w", e.HardwareAddr, w.peer, err))
			}
		}
	}
	return errors.Join(errs...)
}

func neighKey(e netlink.Neigh) string {
	return fmt.Sprint(e.Family, e.IP, e.HardwareAddr)
}

// permanent lists the entries of the device that somebody set.
func permanent(vx netlink.Link) (out []netlink.Neigh, err error) {
	for _, family := range []int{unix.AF_BRIDGE, unix.AF_INET} {
		have, err := netlink.NeighList(vx.Attrs().Index, family)
		if err != nil {
			return nil, fmt.Errorf("podnet: neighbours of %s: %w", OverlayDevice, err)
		}
		for _, e := range have {
			if e.State&netlink.NUD_PERMANENT != 0 {
				e.Family = family
				out = append(out, e)
			}
		}
	}
	return out, nil
}

func neighbours(vx netlink.Link, w way) []netlink.Neigh {
	i, mac := vx.Attrs().Index, overlayMAC(w.peer)
	return []netlink.Neigh{
		{LinkIndex: i, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF, IP: w.peer.AsSlice(), HardwareAddr: mac},
		{LinkIndex: i, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: NodeAddr(w.dst).AsSlice(), HardwareAddr: mac},
	}
}

func dropNeighbours(vx netlink.Link, tunnels []way) error {
	keep := map[string]bool{}
	for _, w := range tunnels {
		for _, e := range neighbours(vx, w) {
			keep[neighKey(e)] = true
		}
	}
	have, err := permanent(vx)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range have {
		if keep[neighKey(e)] {
			continue
		}
		if err := netlink.NeighDel(&e); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("podnet: delete neighbour %s: %w", e.IP, err))
		}
	}
	return errors.Join(errs...)
}
