package placement

import (
	"fmt"
	"sort"
	"strings"

	v1 "k8s.io/api/core/v1"
)

// Filter names a rule that can refuse a node, as upstream's plugins are named.
type Filter string

// The filters, in the order in which they are asked; a node is refused by the
// first that does.
const (
	NodeUnschedulable Filter = "NodeUnschedulable"
	NodeName          Filter = "NodeName"
	TaintToleration   Filter = "TaintToleration"
	NodeAffinity      Filter = "NodeAffinity"
	NodePorts         Filter = "NodePorts"
	NodeResourcesFit  Filter = "NodeResourcesFit"
	PodTopologySpread Filter = "PodTopologySpread"
	InterPodAffinity  Filter = "InterPodAffinity"
	DynamicResources  Filter = "DynamicResources"

	NodeDeclaredFeatures Filter = "NodeDeclaredFeatures"
)

// Filters lists all of them in that order.
func Filters() []Filter {
	return []Filter{
		NodeUnschedulable, NodeName, TaintToleration, NodeAffinity, NodePorts, NodeResourcesFit,
		VolumeRestrictions, NodeVolumeLimits, VolumeBinding, VolumeZone,
		PodTopologySpread, InterPodAffinity, DynamicResources, NodeDeclaredFeatures,
	}
}

// Reasons as upstream's plugins word them.
const (
	reasonUnschedulable    = "node(s) were unschedulable"
	reasonNodeName         = "node(s) didn't match the requested node name"
	reasonTaint            = "node(s) had untolerated taint(s)"
	reasonOtherNode        = "node(s) didn't satisfy plugin(s) [NodeAffinity]"
	reasonNodeAffinity     = "node(s) didn't match Pod's node affinity/selector"
	reasonAddedAffinity    = "node(s) didn't match scheduler-enforced node affinity"
	reasonAffinityConflict = "pod affinity terms conflict"
	reasonPorts            = "node(s) didn't have free ports for the requested pod ports"
	insufficient           = "Insufficient "
	reasonCPU              = insufficient + string(v1.ResourceCPU)
	reasonMemory           = insufficient + string(v1.ResourceMemory)
	reasonStorage          = insufficient + string(v1.ResourceEphemeralStorage)
	reasonTooManyPods      = "Too many pods"
	reasonSpread           = "node(s) didn't match pod topology spread constraints"
	reasonSpreadLabel      = reasonSpread + " (missing required label)"
	reasonPodAffinity      = "node(s) didn't match pod affinity rules"
	reasonPodAntiAffinity  = "node(s) didn't match pod anti-affinity rules"
	reasonExistingAnti     = "node(s) didn't satisfy existing pods anti-affinity rules"
	reasonFeatures         = "node(s) didn't match Pod's required features"
	reasonClaimElsewhere   = "resourceclaim not available on the node"
	reasonNoDevices        = "cannot allocate all claims"
	reasonStaleSpecial     = "cannot schedule extended resource claim"
	reasonNothingToRelease = "no new claims to deallocate"
	reasonDeallocated      = "deallocation of ResourceClaim completed"
	reasonSpecialDeleted   = "deletion of ResourceClaim completed"
	reasonStillNot         = "still not schedulable"
	reasonPreemptNoHelp    = "Preemption is not helpful for scheduling"
	reasonPreemptNoVictims = "No preemption victims found for incoming pod"
	reasonPreemptNever     = "not eligible due to preemptionPolicy=Never."
	reasonPreemptWaiting   = "not eligible due to a terminating pod on the nominated node."
)

// NoNodes is the explanation when there is no node at all.
const NoNodes = "no nodes available to schedule pods"

// Refusal says why no node could take a pod.
type Refusal struct {
	Nodes   int             // nodes looked at
	Reasons map[string]int  // reason -> number of nodes that gave it; a node may give several
	Filters map[Filter]bool // the filters that refused at least one node: what a change must touch to help
	// Whole, if set, is why the pod cannot run on any node whatever the nodes
	// look like; Reasons is empty then.
	Whole string
	// Release is what was done about claims of the pod that are in its way, in
	// upstream's words.
	Release string
	// Preemption is why evicting other pods does not help either; "" if it
	// was not looked into.
	Preemption string
	// EvictionUnderWay says that pods evicted earlier to make room for this one
	// have not ended yet; its nomination to their node stands.
	EvictionUnderWay bool
}

// Error is the message that upstream's scheduler writes, for example
//
//	0/3 nodes are available: 1 node(s) had untolerated taint(s), 2 Insufficient cpu.
//
// The counted reasons are sorted as text.
func (r *Refusal) Error() string {
	if r.Nodes == 0 && r.Whole == "" {
		return NoNodes
	}
	msg := fmt.Sprintf("0/%d nodes are available:", r.Nodes)
	if r.Whole != "" {
		msg += " " + r.Whole + "."
	} else if text := histogram(r.Reasons); text != "" {
		msg += " " + text + "."
	}
	var tried []string
	if r.Release != "" {
		tried = append(tried, r.Release)
	}
	if r.Preemption != "" {
		tried = append(tried, "preemption: "+r.Preemption)
	}
	if len(tried) > 0 {
		msg += " " + strings.Join(tried, ", ")
	}
	return msg
}

func histogram(reasons map[string]int) string {
	lines := make([]string, 0, len(reasons))
	for reason, n := range reasons {
		lines = append(lines, fmt.Sprintf("%d %s", n, reason))
	}
	sort.Strings(lines)
	return strings.Join(lines, ", ")
}
