// Package lifecycle decides what is to be done next for a pod and what its status is, from its spec, what the container
// runtime shows, and what is remembered of it. It is pure: the same input gives the same plan, time is an argument, nothing
// is done here. The rules are kubelet's (pkg/kubelet: kuberuntime computePodActions, kubelet_pods getPhase,
// status/generate), written anew as one function, Step.
//
// One call gives one step: the actions are those that may be carried out now, in their order. Afterwards the caller observes
// again and calls Step again, until no action is left; then it waits for an event or for Plan.Wake.
package lifecycle
