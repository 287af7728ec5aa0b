// Package desired is the node's own, persisted copy of the cluster state that concerns it: its pods, the Services,
// EndpointSlices and Nodes of the cluster, the ConfigMaps and Secrets that its pods refer to, their claims with the volumes of
// these, the ServiceAccount tokens of its pods, and the agent's records about them. Everything on the node (agent, DNS, datapath) acts from this copy and never
// asks the API, so that a node which reboots while it is cut off does what it did before.
//
// Contract: only a successful answer of the API changes the copy. An unreachable API, a failed list or a broken watch
// leaves it as it is. A list that succeeds is the truth: what it lacks is removed.
//
// Ordering: a getter sees a change before the subscribers of its kind are notified. Notifications carry no data and are
// coalesced; a subscriber reads the getters again. Changes reach the disk in order, a short time later (FlushInterval);
// after a crash the file holds some earlier consistent state, which the next list corrects.
//
// How old the copy is: Saw notes when it was known to be the truth, Watched says whether it follows the API.
//
// All methods may be called from any goroutine. Objects that getters return are shared and must not be modified.
package desired
