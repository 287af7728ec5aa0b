package api

import (
	"context"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// An event made without a request is what one made by a request is, but for the record of who manages its fields; and what a request is
// refused, it is as well.
func TestEventsAreTheAPI(t *testing.T) {
	ctx := t.Context()
	client := admin(t)
	namespace := namespace(t, client)
	decorated := 0
	events, err := cluster.servers[0].Events("test", func(ctx context.Context) context.Context { decorated++; return ctx })
	if err != nil {
		t.Fatal(err)
	}
	now, observed := metav1.Now().Rfc3339Copy(), metav1.NowMicro()
	event := func(name string, edit func(*corev1.Event)) *corev1.Event {
		e := &corev1.Event{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Annotations: map[string]string{"a": "b"}},
			InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: namespace, Name: "p", UID: "u"},
			Reason:         "Scheduled", Message: "m", Type: corev1.EventTypeNormal, Count: 1, FirstTimestamp: now, LastTimestamp: now,
			Source: corev1.EventSource{Component: "default-scheduler"}, ReportingController: "default-scheduler"}
		if edit != nil {
			edit(e)
		}
		return e
	}
	edits := map[string]func(*corev1.Event){
		"plain":       nil,
		"elsewhere":   func(e *corev1.Event) { e.InvolvedObject.Namespace = "another" },
		"no-such":     func(e *corev1.Event) { e.Namespace, e.InvolvedObject.Namespace = "there-is-none", "there-is-none" },
		"Bad_Name":    nil,
		"with-serial": func(e *corev1.Event) { e.Series = &corev1.EventSeries{Count: 2, LastObservedTime: observed} },
	}
	for name, edit := range edits {
		own, theirs := event("direct-"+name, edit), event("request-"+name, edit)
		var got error
		before := own.DeepCopy()
		events.Create(ctx, []*corev1.Event{own}, func(_ int, err error) { got = err })
		if !equality.Semantic.DeepEqual(own, before) {
			t.Errorf("%s: the event was changed: %+v", name, own)
		}
		_, want := client.CoreV1().Events(theirs.Namespace).Create(ctx, theirs, metav1.CreateOptions{})
		if (got == nil) != (want == nil) || apierrors.ReasonForError(got) != apierrors.ReasonForError(want) {
			t.Errorf("%s: %v; by a request: %v", name, got, want)
		}
		if want != nil {
			continue
		}
		a, err1 := client.CoreV1().Events(namespace).Get(ctx, own.Name, metav1.GetOptions{})
		b, err2 := client.CoreV1().Events(namespace).Get(ctx, theirs.Name, metav1.GetOptions{})
		if err1 != nil || err2 != nil {
			t.Fatal(err1, err2)
		}
		if a.UID == "" || a.CreationTimestamp.IsZero() {
			t.Errorf("%s: no identity: %+v", name, a.ObjectMeta)
		}
		for _, e := range []*corev1.Event{a, b} {
			e.ObjectMeta = metav1.ObjectMeta{Annotations: e.Annotations, Labels: e.Labels}
		}
		if !equality.Semantic.DeepEqual(a, b) {
			t.Errorf("%s: %+v\nby a request: %+v", name, a, b)
		}
	}
	again := error(nil)
	events.Create(ctx, []*corev1.Event{event("direct-plain", nil)}, func(_ int, err error) { again = err })
	if !apierrors.IsAlreadyExists(again) {
		t.Errorf("made twice: %v", again)
	}
	if decorated == 0 {
		t.Error("the leader's term would not reach the store")
	}
}
