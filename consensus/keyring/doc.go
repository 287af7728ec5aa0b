// Package keyring holds the keys with which a cluster seals its secrets before they reach the store: the cluster's own keys
// (CA, ServiceAccount) and the data keys of the API's encrypted resources.
//
// A [Ring] is a value: a set of AES-256 keys, each named by a hash of itself, one of which - the primary - seals; all of them
// open. Its methods return changed copies and never change the receiver, so that every decision about keys (what is added,
// made primary, dropped) is pure. [Holder] keeps the ring of one node: in memory and in one private file that is replaced
// durably before anybody sees the change.
//
// Contract: only nodes that hold a replica of the store have a ring. It travels between them over mutual TLS and in backup
// files, never through the store, the log or gossip. Nothing here prints or logs a key; errors name keys by their ids. The daemon
// uses Holder and decides when a ring is given, taken and destroyed; node/api seals data keys with it; backups carry it.
// Ring is safe for concurrent use as any value that nobody changes, Holder through its own lock.
package keyring
