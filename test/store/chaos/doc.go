// Package chaos tortures the store and judges what its clients saw: real
// processes (test/store/cmd/skein-store), each in a network namespace and on a
// disk of its own, under traffic, while a schedule of faults from a seed runs.
// `make chaos-store` runs every scenario; a slice of them is in `make test`.
//
// The faults are real where the kernel allows it: SIGKILL, SIGSTOP, packets that
// are dropped between namespaces (also in one direction), a file system that
// forgets what was not synchronised, is full, slow or fails (package disk), a
// wall clock that jumps for one process (package clock). The judge is package
// history. With -broken the process under test breaks a promise, which has to
// be found.
//
// What a run does is decided by its seed, which is printed with the command that
// runs it again; what happens depends on the machine's timing as well. Nothing
// is left behind by a run, nor by one that was killed: see package cluster;
// disks are mounted in the nodes' mount namespaces only.
//
// # The bugs of etcd's robustness tests
//
// etcd's tests/robustness/README.md lists the bugs that its tests found or would
// have found. For each there is a case here that would find its like:
//
//	issue  what it was                                   case                  found as
//	13766  revisions differ after a crash under load     crash, power, power-5 diverged, log-conflict
//	14370  a single node acknowledges, then loses        single                lost-write, log-gap
//	14571  enabling auth makes replicas differ           no auth here; replicas are compared in every run: diverged
//	14685  revisions differ after a crash in defrag      space                 diverged, log-conflict
//	15220  progress is announced before the events       all roaming watches   watch-progress
//	15271  a watch goes back after a partition           network, behind       watch-duplicate, time-travel
//	17247  a watch event twice, by caching a transaction all (transactions)    watch-duplicate
//	17529  a slow watch loses events                     starved               watch-gap
//	17780  revisions go back after a crash in compaction space                 time-travel, log-conflict
//	18089  compaction drops a deletion of a watch        space, TestCompaction watch-gap
//	18667  a transaction reads what is compacted         space, TestCompaction wrong-result, diverged
//	19179  a deletion at the compacted revision          space, TestCompaction watch-gap
//	20221  a watch of the future shows the past          behind                watch-duplicate, watch-progress
package chaos
