// Package identity is who a Skein node is: the cluster's certificate authority, the node's key and certificate, the key that
// encrypts gossip, the join token, and the TLS configurations that follow from them.
//
// Contract: nothing here talks to a network or keeps a goroutine; all functions may be called from several goroutines at once
// as long as no caller changes an [Identity] or [Authority] that it has handed out. Time and randomness are arguments. What is
// on disk is either a whole identity or none ([Save] swaps directories, [Load] checks every file against the others), so a
// crash at any moment leaves something that the next start can use. Only replicas hold an [Authority]; every node holds an
// [Identity].
//
// Every part of Skein that speaks to a peer uses this package's TLS configurations; it imports nothing of Skein.
package identity
