package controller

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	typedcorev1 "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/tools/record"
)

// Events writes the events of all controllers to the API, with upstream's
// aggregation, and its limits per source and object (a burst of 25, then one
// in 5 minutes). Events are best effort: one that cannot be written is dropped.
type Events struct{ broadcaster record.EventBroadcaster }

// NewEvents starts writing events through client until Stop.
func NewEvents(client kubernetes.Interface) *Events {
	b := record.NewBroadcaster()
	b.StartRecordingToSink(&typedcorev1.EventSinkImpl{Interface: client.CoreV1().Events("")})
	return &Events{broadcaster: b}
}

// Recorder returns the recorder for the events of component, such as
// "replicaset-controller", which kubectl shows as their source.
func (e *Events) Recorder(component string) record.EventRecorder {
	return e.broadcaster.NewRecorder(scheme.Scheme, corev1.EventSource{Component: component})
}

// Stop ends the writing; events that wait are dropped.
func (e *Events) Stop() { e.broadcaster.Shutdown() }
