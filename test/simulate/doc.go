// Package simulate runs the real scheduler and all real controllers (scheduler.Run) against a simulated cluster: machines that die, nodes
// that are cut off, leaders that are deposed between any two writes, and users who roll out, scale, drain, delete and start storms of Jobs.
// Time is virtual (testing/synctest), so that hours take seconds.
//
// # What is real and what is not
//
// Real is everything below skein.io/skein/scheduler, client-go with its informers and its encoding included. Simulated are the API (package
// store: revisions, conflicts, generations, finalizers, graceful deletion, evictions by budget, watches that lag, end and expire, the fence by
// terms), the agents with the processes that they run, and the failure detector. Requests take time; while the API is flaky some are lost
// before they are carried out, and some after.
//
// # Replay
//
// One number, the seed, decides what happens: which faults, to whom, when, how long each request takes, which pods fail. A failure names its
// seed: SKEIN_SEED=N repeats the same faults at the same virtual times. Only the order of goroutines that become ready at one virtual instant
// is Go's own.
//
// Tests only.
package simulate
