// Package members decides which nodes hold replicas of a shard and which of
// those vote, and carries it out.
//
// Plan is pure: from the membership, what is known about the nodes, and a policy
// it derives the voters that the shard should have (the goal), and the one next
// step towards them. Manager gathers the input, executes the step and plans
// again; every step is decided on a membership that Raft refuses if another
// change came between, so two Managers cannot mix their steps.
//
// The rules:
//   - One voter with one or two nodes, three with three to six, five from seven on
//     (so that two spares are left), by the number of nodes that may vote; a dead
//     one counts until it has left. It stays at three if five could not be spread
//     so that the loss of a zone is survived which three survive. Fewer, never an
//     even number, if fewer are alive and more losses are survived that way.
//   - Voters are spread over zones; nodes with the label value "never" hold no
//     replica, those with "prefer" come first. Between equals, what is stays.
//   - Up to two spares hold a copy without a vote, ready to replace a voter, in
//     zones of their own if possible.
//   - A voter that has been dead for the stabilisation time is removed and a
//     spare that has caught up takes its place. Without one it is kept, since it
//     may return, unless the cluster survives more losses without it.
//   - A voter with a slow disk (its own verdict, host.Disk, and another's disk at
//     least four times as fast) makes room for a node in an equal zone, and does
//     not lead. If all are slow nothing is changed.
//   - A new replica starts without a vote and is promoted when it has caught up,
//     and two at a time if that is what keeps the number of voters odd. Raft here
//     cannot take a vote away in place: a demoted voter is removed and added again.
//   - Who is to go, by leaving or by its label, is kept while nobody has a complete
//     copy to take its place; the reason is given (Refused, Blocked).
//   - No step may leave fewer living voters than a majority.
//
// All shards live on the same nodes: the system shard decides, the others follow.
// A node becomes a voter of the system shard last and ceases to be one first, so
// that whoever may lead the cluster holds a replica of every shard that works. A
// shard that cannot be looked at does not hold up the others.
//
// Replica IDs are never used twice. The ID of a new replica is the membership's
// ConfigChangeID plus one. That is the log index of the last change; Raft accepts
// an addition only if it was decided on the newest one, and the addition's own
// index becomes the next. So the IDs of accepted additions grow strictly, above
// the founder's 1, with nothing to remember or to synchronise.
//
// Only the daemon uses this package: Manager.Run on the cluster's leader,
// Manager.Leave on any node with a replica.
package members
