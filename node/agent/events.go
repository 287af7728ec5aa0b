package agent

import (
	"fmt"
	"maps"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/node/agent/lifecycle"
)

// noRecorder records nothing.
type noRecorder struct{}

var _ record.EventRecorder = noRecorder{}

func (noRecorder) Event(runtime.Object, string, string, string)          {}
func (noRecorder) Eventf(runtime.Object, string, string, string, ...any) {}
func (noRecorder) AnnotatedEventf(runtime.Object, map[string]string, string, string, string, ...any) {
}

// podRef names a pod, or one of its containers, as the object of an event.
func podRef(pod *corev1.Pod, container string) *corev1.ObjectReference {
	r := &corev1.ObjectReference{Kind: "Pod", APIVersion: "v1", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, ResourceVersion: pod.ResourceVersion}
	for list, names := range map[string]func(string) bool{
		"spec.containers":          func(n string) bool { return hasContainer(pod.Spec.Containers, n) },
		"spec.initContainers":      func(n string) bool { return hasContainer(pod.Spec.InitContainers, n) },
		"spec.ephemeralContainers": func(n string) bool { return hasEphemeral(pod, n) },
	} {
		if container != "" && names(container) {
			r.FieldPath = fmt.Sprintf("%s{%s}", list, container)
		}
	}
	return r
}

func hasContainer(cs []corev1.Container, name string) bool {
	for i := range cs {
		if cs[i].Name == name {
			return true
		}
	}
	return false
}

func hasEphemeral(pod *corev1.Pod, name string) bool {
	for i := range pod.Spec.EphemeralContainers {
		if pod.Spec.EphemeralContainers[i].Name == name {
			return true
		}
	}
	return false
}

func (a *Agent) event(pod *corev1.Pod, e lifecycle.Event) {
	a.containerEvent(pod, e.Container, e.Type, e.Reason, e.Message)
}

func (a *Agent) containerEvent(pod *corev1.Pod, container, eventType, reason, message string) {
	a.cfg.Recorder.Event(podRef(pod, container), eventType, reason, strings.ToValidUTF8(message, "�"))
}

func (w *worker) eventf(pod *corev1.Pod, container, eventType, reason, format string, args ...any) {
	w.a.containerEvent(pod, container, eventType, reason, fmt.Sprintf(format, args...))
}

// eventEvery bounds how often one message is repeated for a pod that does not get on.
const eventEvery = time.Minute

// once says whether something may be told now, and holds it back for a time afterwards. What is no longer held back is
// forgotten.
func (w *worker) once(key string, hold time.Duration) bool {
	now := time.Now()
	maps.DeleteFunc(w.told, func(_ string, until time.Time) bool { return !now.Before(until) })
	if _, ok := w.told[key]; ok {
		return false
	}
	w.told[key] = now.Add(hold)
	return true
}

// eventOnce records an event unless the same one was recorded within eventEvery.
func (w *worker) eventOnce(pod *corev1.Pod, container, eventType, reason, message string) {
	if w.once(container+"\x00"+reason+"\x00"+message, eventEvery) {
		w.a.containerEvent(pod, container, eventType, reason, message)
	}
}

// backoffEvents tells once per back-off that a container is held back.
func (w *worker) backoffEvents(pod *corev1.Pod, plan *lifecycle.Plan) {
	for _, list := range [][]corev1.ContainerStatus{plan.Status.InitContainerStatuses, plan.Status.ContainerStatuses} {
		for i := range list {
			s := &list[i]
			if s.State.Waiting == nil || s.State.Waiting.Reason != "CrashLoopBackOff" {
				continue
			}
			if w.once(s.Name+"\x00backoff\x00"+strconv.Itoa(int(s.RestartCount)), 2*lifecycle.BackoffMax) {
				w.eventf(pod, s.Name, corev1.EventTypeWarning, "BackOff", "Back-off restarting failed container %s in pod %s", s.Name, lifecycle.PodDesc(pod))
			}
		}
	}
}
