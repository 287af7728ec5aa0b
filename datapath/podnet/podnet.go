// Package podnet makes the pod network of a node: the link of each pod (as a CNI plugin, run by the helper executable),
// its address, and the routes to the pods of other nodes, straight where they share a network and through VXLAN otherwise.
//
// Contract: CNI keeps to the CNI specification 1.1 (ADD cleans up after itself, DEL succeeds when everything is gone).
// Net.Apply takes all peers and changes only what differs, entry by entry; what it made it finds again by its route
// protocol and device name, so it needs no memory and may be called after any crash. Everything happens in the network
// namespace of the calling thread. Callers: cmd's helper (CNI), node (the rest). Address files may be used by many
// processes at once; a Net by one goroutine.
package podnet

import (
	"crypto/sha256"
	"encoding/hex"
	"net"
	"net/netip"
)

// Gateway is the address that pods send everything to. It exists nowhere: their neighbour entry is fixed.
var Gateway = netip.AddrFrom4([4]byte{169, 254, 1, 1})

// hostMAC is the node's end of every pod link. Fixed, and set by us, so that no device manager gives it another one.
var hostMAC = net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}

// HostLink is the name of the node's end of the link of a sandbox's interface.
func HostLink(containerID, ifName string) string {
	sum := sha256.Sum256([]byte(containerID + "/" + ifName))
	return "sk" + hex.EncodeToString(sum[:6]) // 14 characters; the kernel allows 15
}

// podMAC is stable for a sandbox, locally administered and unicast.
func podMAC(containerID, ifName string) net.HardwareAddr {
	sum := sha256.Sum256([]byte(containerID + "/" + ifName))
	mac := net.HardwareAddr(sum[6:12])
	mac[0] = mac[0]&0xfc | 2
	return mac
}

// NodeAddr is the first host address of a pod range. Pods never get it: the node uses it as its own on the overlay.
func NodeAddr(podCIDR netip.Prefix) netip.Addr {
	return podCIDR.Masked().Addr().Next()
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func host(a netip.Addr) *net.IPNet {
	return ipNet(netip.PrefixFrom(a, a.BitLen()))
}
