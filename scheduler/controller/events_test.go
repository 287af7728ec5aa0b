package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
)

// creator is an EventCreator that notes the batches and may refuse.
type creator struct {
	mu      sync.Mutex // guards the rest
	batches [][]*corev1.Event
	refuse  func(*corev1.Event) error
	client  *fake.Clientset
}

func (c *creator) Create(ctx context.Context, all []*corev1.Event, done func(int, error)) {
	c.mu.Lock()
	c.batches = append(c.batches, slices.Clone(all))
	refuse := c.refuse
	c.mu.Unlock()
	for i, event := range all {
		var err error
		if refuse != nil {
			err = refuse(event)
		}
		if err == nil {
			_, err = c.client.CoreV1().Events(event.Namespace).Create(ctx, event, metav1.CreateOptions{})
		}
		done(i, err)
	}
}

func (c *creator) tries() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.batches)
}

func (c *creator) stored(t *testing.T) map[string]int32 {
	t.Helper()
	list, err := c.client.CoreV1().Events("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int32{}
	for _, event := range list.Items {
		out[event.InvolvedObject.Name+" "+event.Reason] += event.Count
	}
	return out
}

func eventful(t *testing.T, edit func(*EventsConfig), test func(*testing.T, *Events, *creator)) {
	synctest.Test(t, func(t *testing.T) {
		c := &creator{client: fake.NewClientset()}
		cfg := EventsConfig{Client: c.client, Create: c}
		if edit != nil {
			edit(&cfg)
		}
		e := NewEvents(cfg)
		defer e.Stop()
		test(t, e, c)
	})
}

func aPod(name string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: "uid-" + "x"}}
}

func TestManyEventsAreOneWrite(t *testing.T) {
	eventful(t, nil, func(t *testing.T, e *Events, c *creator) {
		r := e.Recorder("default-scheduler")
		for i := range 200 {
			r.Eventf(aPod(fmt.Sprint("p", i)), corev1.EventTypeNormal, "Scheduled", "to node %d", i)
		}
		time.Sleep(time.Second)
		if n := c.tries(); n != 1 {
			t.Errorf("200 events in %d writes", n)
		}
		list, err := c.client.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(list.Items) != 200 {
			t.Fatalf("%d events, %v", len(list.Items), err)
		}
		one := list.Items[0]
		if one.Source.Component != "default-scheduler" || one.ReportingController != "default-scheduler" || one.Count != 1 || one.InvolvedObject.Kind != "Pod" ||
			one.Type != corev1.EventTypeNormal || one.FirstTimestamp.IsZero() || !one.FirstTimestamp.Equal(&one.LastTimestamp) {
			t.Errorf("not as upstream writes it: %+v", one)
		}
	})
}

// An event that repeats is one object that counts, also within one batch, and after a limit it is not written at all.
func TestEventsThatRepeat(t *testing.T) {
	eventful(t, nil, func(t *testing.T, e *Events, c *creator) {
		r := e.Recorder("default-scheduler")
		say := func(n int) {
			for range n {
				r.Event(aPod("p"), corev1.EventTypeWarning, "FailedScheduling", "no room")
			}
			time.Sleep(time.Second)
		}
		say(2)
		if got := c.stored(t)["p FailedScheduling"]; got != 2 || c.tries() != 1 {
			t.Errorf("two at once: count %d in %d creations", got, c.tries())
		}
		say(1)
		say(3)
		if got := c.stored(t)["p FailedScheduling"]; got != 6 {
			t.Errorf("count %d, want 6", got)
		}
		if n := c.tries(); n != 1 {
			t.Errorf("%d batches of creations: what is there is patched", n)
		}
		say(100)
		if got := c.stored(t)["p FailedScheduling"]; got != 25 {
			t.Errorf("count %d, want upstream's burst of 25", got)
		}
		// It has expired: it is created anew.
		list, err := c.client.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(list.Items) != 1 {
			t.Fatalf("%d events, %v", len(list.Items), err)
		}
		if err := c.client.CoreV1().Events("default").Delete(t.Context(), list.Items[0].Name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(6 * time.Minute)
		say(1)
		if got := c.stored(t)["p FailedScheduling"]; got < 26 {
			t.Errorf("after the event expired: count %d", got)
		}
	})
}

// More than the queue holds is dropped and counted; nobody waits.
func TestEventsAreBounded(t *testing.T) {
	eventful(t, func(c *EventsConfig) { c.Queue, c.Batch = 50, 10 }, func(t *testing.T, e *Events, c *creator) {
		r := e.Recorder("x")
		for i := range 80 {
			r.Event(aPod(fmt.Sprint("p", i)), corev1.EventTypeNormal, "R", "m")
		}
		time.Sleep(time.Second)
		if got := len(c.stored(t)); uint64(got)+e.Dropped() != 80 || got < 50 {
			t.Errorf("%d written, %d dropped of 80", got, e.Dropped())
		}
		if e.Dropped() == 0 {
			t.Error("nothing was dropped: this test shows nothing")
		}
	})
}

// What gets no answer is tried again, what is refused is not, and in the end there are other events.
func TestEventsWithoutAnAnswer(t *testing.T) {
	eventful(t, nil, func(t *testing.T, e *Events, c *creator) {
		r := e.Recorder("x")
		c.refuse = func(event *corev1.Event) error {
			switch {
			case event.Reason == "Bad":
				return apierrors.NewInvalid(schema.GroupKind{Kind: "Event"}, event.Name, nil)
			case c.tries() < 3:
				return errors.New("no leader")
			}
			return nil
		}
		r.Event(aPod("p"), corev1.EventTypeNormal, "Good", "m")
		time.Sleep(time.Nanosecond) // part of the name
		r.Event(aPod("p"), corev1.EventTypeNormal, "Bad", "m")
		time.Sleep(time.Minute)
		if got := c.stored(t); got["p Good"] != 1 || got["p Bad"] != 0 || c.tries() != 3 {
			t.Errorf("after %d tries: %v", c.tries(), got)
		}
		c.mu.Lock()
		c.batches, c.refuse = nil, func(*corev1.Event) error { return errors.New("no leader") }
		c.mu.Unlock()
		r.Event(aPod("p"), corev1.EventTypeNormal, "Lost", "m")
		time.Sleep(time.Minute)
		if c.tries() != eventTries || e.Dropped() != 1 {
			t.Errorf("%d tries, %d dropped", c.tries(), e.Dropped())
		}
	})
}

// Events wait for what matters more: not for ever, and not so many of them that one would be lost.
func TestEventsYield(t *testing.T) {
	var busy atomic.Bool
	edit := func(c *EventsConfig) { c.Yield, c.Queue = busy.Load, 10 }
	eventful(t, edit, func(t *testing.T, e *Events, c *creator) {
		busy.Store(true)
		r := e.Recorder("test")
		r.Event(aPod("a"), corev1.EventTypeNormal, "One", "m")
		time.Sleep(900 * time.Millisecond)
		if n := c.tries(); n != 0 {
			t.Errorf("%d batches while there is more important work", n)
		}
		time.Sleep(200 * time.Millisecond)
		if n := c.tries(); n != 1 {
			t.Errorf("%d batches after a second, want 1", n)
		}
		r.Event(aPod("a"), corev1.EventTypeNormal, "Two", "m")
		time.Sleep(100 * time.Millisecond)
		busy.Store(false)
		time.Sleep(100 * time.Millisecond)
		if n := c.tries(); n != 2 {
			t.Errorf("%d batches when the work is done, want 2", n)
		}
		busy.Store(true)
		for i := range 6 {
			r.Event(aPod("a"), corev1.EventTypeNormal, fmt.Sprint("Many", i), "m")
		}
		time.Sleep(100 * time.Millisecond)
		if n := c.tries(); n != 3 {
			t.Errorf("%d batches when half the queue is full, want 3", n)
		}
		if n := e.Dropped(); n != 0 {
			t.Errorf("%d dropped", n)
		}
	})
}
