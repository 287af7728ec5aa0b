// Package raftlog keeps the logs of all Raft groups of a node on disk: it is
// dragonboat's ILogDB as one append-only log in segments.
//
// Why not the library's own (Pebble, tan): all groups share one file here, so that
// whatever the engine saves at once costs one write and one fdatasync, and a change
// of the commit index alone, which follows every write and which Raft does not need
// on disk, costs none. Segments are allocated before they are used and used again
// afterwards, so an fdatasync has no metadata to write. There is no memtable, no
// compaction and no block cache.
//
// Guarantees:
//   - When SaveRaftState, SaveSnapshots, SaveBootstrapInfo, RemoveNodeData or
//     ImportSnapshot return nil, what they were given survives a loss of power, but
//     for a change of the commit index alone: that is written with the next record,
//     and after a crash learned from the leader again.
//   - One call is one record: after a crash all of it is there, or nothing.
//   - A record that was being written when the power went is cut off at the next
//     Open. Damage to what had been durable is told from it, and refused
//     (ErrCorrupt): Raft must not run on a log that has forgotten.
//   - After a failed write or sync the log accepts nothing any more (ErrBroken):
//     what the kernel has kept of it is unknown.
//
// Package host hands a Factory to dragonboat, which makes the only DB of a
// directory. SaveRaftState is called by dragonboat's one step worker; all methods
// may be called from any goroutine.
//
// On disk: files NUMBER.seg, used in turn. A segment is a header and records; its
// first record is a checkpoint, that is all state but the entries, so segments whose
// entries are not needed any more can go, oldest first. Entries that are needed for
// long, of a quiet group, are moved to the end when they would keep too much.
package raftlog
