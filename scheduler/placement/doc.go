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
// What a node alone answers to pods of one specification is remembered until
// the node changes (see class), and where pods are that others care for is
// counted as pods come and go (see counter and termGroup), so that this pass
// is over arrays. No decision depends on what is remembered. Objects handed in
// are kept by reference and never written to.
//
// A rule that looks at one node and its pods alone belongs to tryAlone or
// absoluteScores, and every change of what it reads must touch the node; all
// other rules belong to tryTogether and score.
//
// # Rules
//
// The filters, their order, their reasons' texts, the scores, their
// normalisation and their weights are those of kube-scheduler v1.36
// (pkg/scheduler/apis/config/v1/default_plugins.go and
// pkg/scheduler/framework/plugins). A [Profile] says which are asked and how;
// the default one is upstream's: NodeUnschedulable, NodeName,
// TaintToleration (3), NodeAffinity (2), NodePorts, NodeResourcesFit (1),
// PodTopologySpread (2), InterPodAffinity (2),
// NodeResourcesBalancedAllocation (1), ImageLocality (1) and
// NodeDeclaredFeatures, with the weight of the score in brackets. The module
// test/oracle runs upstream's plugins beside this package and lists in
// accepted.md where they differ, and why.
//
// A pod with volume claims is also asked VolumeRestrictions, NodeVolumeLimits,
// VolumeBinding and VolumeZone, over the claims, volumes, classes and CSI
// objects in the snapshot. Volumes of cloud providers are not translated to
// CSI, and one that is still attached and wanted again counts once (upstream
// counts it twice).
//
// A pod with resource claims, or with extended resources that a DeviceClass
// backs, is also asked DynamicResources (2): upstream's own allocator
// (k8s.io/dynamic-resource-allocation/structured) looks for devices on each
// node, and a hundred nodes that can take the pod are enough. The search for one
// pod ends after two seconds - the only look at a clock here - where upstream
// allows ten for each node; and an expression that fails is a reason to wait for
// another claim, class or slice, not an error.
//
// Only the scheduler package calls this package.
package placement
