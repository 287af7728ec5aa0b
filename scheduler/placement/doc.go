// Package placement decides which node a pod should run on.
//
// It is pure: a [Snapshot] of the cluster and a [Request] go in, a [Decision]
// with its explanation comes out. Nothing here does I/O, reads a clock or
// starts a goroutine; randomness for tie-breaking is an argument.
//
// # Contract
//
// A Snapshot is owned by one caller at a time: none of its methods may run
// concurrently with another. Its sums (requested resources, used ports,
// image spread, pods counted per selector) are kept incrementally, so that a
// change costs what it touches and a decision costs one pass over the nodes.
// Objects handed in are kept by reference and never written to.
//
// # Rules
//
// The filters, their order, their reasons' texts, the scores, their
// normalisation and their weights are those of the default profile of
// kube-scheduler v1.36 (pkg/scheduler/apis/config/v1/default_plugins.go and
// pkg/scheduler/framework/plugins): NodeUnschedulable, NodeName,
// TaintToleration (3), NodeAffinity (2), NodePorts, NodeResourcesFit (1),
// PodTopologySpread (2), InterPodAffinity (2),
// NodeResourcesBalancedAllocation (1) and ImageLocality (1), with the weight
// of the score in brackets. The deliberate differences:
//
//   - every node is scored; upstream samples large clusters;
//   - a node that the failure detector declared lost is refused as if its
//     unreachable taint had already been written;
//   - a request stated by the pod as a whole counts in the least-allocated
//     score of the pod to be placed, too (1.36 forgets it there and nowhere else);
//   - pods nominated to a node hold resources and ports there, but do not take
//     part in affinity and spreading yet.
//
// Volumes and dynamic resources are not looked at.
//
// Only the scheduler package calls this package.
package placement
