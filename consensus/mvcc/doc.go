// Package mvcc is the replicated state machine of a shard: etcd's own MVCC
// store (bbolt backend, watchable KV, lessor, transactions) behind dragonboat's
// IOnDiskStateMachine.
//
// What it guarantees:
//   - Apply is deterministic: which commands change the state, and how, depends
//     on the log alone. Bad input is refused with a result, never with an error.
//   - The index of the last applied entry is in the same bbolt transaction as
//     that entry's data, so an entry is applied exactly once also over a crash.
//   - Two fences guard the log. Leader(term) opens the epoch of a new leader of
//     this shard: a command that was proposed in an older epoch is refused from
//     then on (ErrSuperseded), so that its proposer may propose it again without
//     the danger of applying it twice. Fence(term) is the cluster's: a command
//     that acts for an older leader of the cluster is refused (ErrFenced).
//   - Hold(id) makes the shard refuse requests (ErrHeld), without changing
//     anything, until Release(id) or the next epoch. A Release that succeeds proves
//     that the state has not changed since the Hold.
//   - Results reach the local proposer through Waiters, in apply order, after the
//     change is visible to readers.
//   - A snapshot replaces the store while watches stay open; they miss nothing.
//
// Package host drives a Machine (Update and the snapshot methods are called by
// dragonboat, one at a time); packages host and etcdapi read from it, from any
// goroutine.
package mvcc
