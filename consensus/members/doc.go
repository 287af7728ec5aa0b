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
//   - One, three or five voters: the largest odd number up to the policy's that
//     the nodes fill. Two nodes have one voter and one spare, never two voters.
//   - Voters are spread over zones; nodes with the label value "never" hold no
//     replica, those with "prefer" come first. Between equals, what is stays.
//   - Up to two spares hold a copy without a vote, ready to replace a voter.
//   - A voter that has been dead for the stabilisation time is removed and a
//     spare that has caught up takes its place. Without one it is kept, since it
//     may return, unless the cluster survives more losses without it.
//   - A new replica starts without a vote and is promoted when it has caught up,
//     and two at a time if that is what keeps the number of voters odd.
//   - No step may leave fewer living voters than a majority.
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
