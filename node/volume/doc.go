// Package volume makes a pod's volumes on the node and takes them away again: emptyDir, hostPath, configMap, secret,
// downwardAPI and projected (with ServiceAccount tokens), nfs, claims whose volumes are hostPath, local (a directory) or nfs, and
// subPaths of all of them.
//
// Contract: Setup is idempotent; called again it mounts what is missing and brings live content up to date, each volume
// atomically: a reader sees all old files or all new ones. Teardown removes everything of a pod, also what an earlier
// process made; it never follows a mount, so data that was mounted in stays.
//
// Setup, Mount and Teardown for one pod must not run at the same time (the pod's worker calls them); for different pods
// they may.
package volume
