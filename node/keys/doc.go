// Package keys rotates the keys with which the cluster seals its secrets, and keeps every replica's key ring in step.
//
// The rings (consensus/keyring) are files of the nodes that hold a replica; the store has only a record of ids: which key is the primary
// one, and how far a rotation is. [Next] is pure: from the record, what the members answered and what is stored it derives the one next
// step with its reason. [Manager] observes, carries the step out and looks again; only the cluster's leader runs it. [Follower] runs on
// every replica and makes its ring follow the record.
//
// The order of a rotation is what makes it safe to kill any process at any moment:
//
//  1. The new key is on disk on the leader, then its id is in the record, then it is on disk on every replica.
//  2. Then it becomes the primary one (one write of the record): from now on each replica seals with it as soon as it hears so. A
//     replica reads the record, linearizably, before it begins to serve.
//  3. The cluster's own keys and all stored values are sealed anew, in the background. What a leader did is in the values themselves.
//  4. When every replica has said that it seals with the new key, and requests of before have ended, all values are counted at one
//     revision. If none needs the old key, that revision is recorded; each replica drops the old key once its own copy of the store
//     has forgotten what was before it, since watches and lists of the past need the key until then.
//
// A replica that lacks a key asks the others. No step compares clocks; times in the record are for people.
package keys
