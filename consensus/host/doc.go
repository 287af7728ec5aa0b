// Package host runs this node's replicas: one dragonboat NodeHost, one Machine
// (package mvcc) a shard, the mutual-TLS transport between nodes, leadership, and
// the in-process clients.
//
// Only the daemon makes a Host. All methods may be called from any goroutine.
// The order of calls:
//
//	first node of a cluster   New, Bootstrap
//	a node that joins         New; it holds nothing until the leader orders
//	                          StartReplica
//	after a restart           New alone: the replicas on disk start by themselves
//	removed from a shard      OnRemoved is called once the replica has stopped;
//	                          Removed.Clear deletes what is left of it
//
// Ordering: a write is visible to every read of the same replica when its call
// returns, and to linearizable reads of all replicas. Lead's function starts
// after the fence of its term is applied to every shard, and its context ends as
// soon as this node learns that it leads no more; requests that carry the term
// (WithTerm) are refused by the store from the moment on at which a successor's
// fence is applied.
//
// Nothing here compares the clocks of two nodes.
package host
