// Package agent runs the pods of this node: it reads what should run from node/desired, asks the container runtime over CRI,
// and reports statuses and events to the API.
//
// Each pod has one worker, a goroutine that repeats: observe the runtime, let lifecycle.Step decide, carry out the actions.
// Workers share nothing but the runtime and the clients. Run owns all goroutines and returns when they have ended; the
// containers go on, and the next Run adopts them by their labels.
//
// Ordering: a pod's status is recorded in desired before it is sent; a pod is deleted from the API only after its last
// status was accepted and everything of it is gone from the node.
package agent
