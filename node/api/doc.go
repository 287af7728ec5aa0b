// Package api is the Kubernetes API of a node that holds a replica of the store: k8s.io/apiserver as
// the engine, upstream's contract packages as the only truth about kinds, and an assembly of our own
// that leaves out what costs memory (see the packages below this one). It is the only part of
// Skein that imports k8s.io/kubernetes.
//
// Any number of servers may run in one cluster at once, over replicas of one store; all that they
// write by themselves is written so that two of them do not harm each other. A server writes nothing
// when nothing changes. What only one of them may do runs in RunLeaderHooks.
//
// New builds a server, Run runs it, Ready tells when it may be used, Handler is what the TLS front
// calls, and Loopback gives clients inside this process, which skip the network but nothing else:
// authentication, authorization, priority and fairness, admission and validation all apply. All
// methods are safe for concurrent use. A stopped server cannot be run again; make a new one.
//
// # Linking
//
// The version is set by the linker, and parts of upstream parse it when they start:
//
//	-X k8s.io/component-base/version.gitVersion=v1.36.3+skein
//	-X k8s.io/component-base/version.gitMajor=1
//	-X k8s.io/component-base/version.gitMinor=36
//	-X k8s.io/component-base/version.gitCommit=...
//	-X k8s.io/component-base/version.gitTreeState=clean
//	-X k8s.io/component-base/version.buildDate=...
//
// and the same four git... variables of k8s.io/client-go/pkg/version. Without them the server
// takes upstream's hard-coded 1.36. Build with the tag grpcnotrace, else golang.org/x/net/trace links
// html/template and with it reflection that keeps the linker from dropping dead methods.
//
// # Memory
//
// Set GOMEMLIMIT (128 MiB is enough for a small cluster) so that start-up garbage does not set the
// size of the heap, and once the server is ready return what start-up used: debug.FreeOSMemory, and
// madvise(MADV_DONTNEED) over the read-only mappings of the executable, of which initialization
// touched much that is never read again.
package api
