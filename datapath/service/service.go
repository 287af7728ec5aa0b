// Package service turns the Services that a node should offer into entries of the kernel's tables, and into the steps
// from the entries that are there to those that should be.
//
// Everything here is a pure function of its arguments: no clocks, no kernel, no files. Callers: node (translates
// Kubernetes objects into Service values), datapath/loader (applies the steps). Ordering: the steps of Diff, applied one
// after the other, never show a client a front end without back ends if it has some before and after.
package service

import (
	"fmt"
	"net/netip"
	"time"
)

// Proto is an IP protocol number.
type Proto uint8

// The protocols that can be balanced (IANA protocol numbers).
const (
	TCP Proto = 6
	UDP Proto = 17
)

func (p Proto) String() string {
	switch p {
	case TCP:
		return "TCP"
	case UDP:
		return "UDP"
	}
	return fmt.Sprintf("protocol %d", uint8(p))
}

// Service is one port of one Kubernetes Service: addresses that clients use, and who answers. A pod's hostPort is a Service
// on the pod's node with that NodePort and the pod as the only back end (or, with a hostIP, one external front end).
type Service struct {
	Name          string        // unique, for messages and for a stable order: namespace/name:port
	Proto         Proto         // TCP or UDP
	Frontends     []Frontend    // ClusterIP, external and load balancer addresses
	NodePort      uint16        // also answer at this port of each of the node's addresses and of 127.0.0.1; 0 = no
	Backends      []Backend     // who answers; order has no meaning
	Affinity      time.Duration // one client stays with one back end while it connects at least this often; 0 = off
	InternalLocal bool          // clients of internal front ends get back ends of their own node only
	ExternalLocal bool          // clients of NodePort and external front ends likewise (and keep their source address)
}

// Frontend is one address of a Service.
type Frontend struct {
	Addr     netip.AddrPort
	External bool // packets that arrive at the node's devices are answered too, not only local clients' connects
}

// Backend is one endpoint.
type Backend struct {
	Addr        netip.AddrPort
	Node        string // where it runs; "" = unknown or outside the cluster
	Terminating bool   // still serving, but about to end: used only while no other back end is left
}

// Node is this node as the translation needs it.
type Node struct {
	Name  string
	Addrs []netip.Addr // where NodePorts answer
}
