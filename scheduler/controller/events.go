package controller

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/record"
	recordutil "k8s.io/client-go/tools/record/util"
	"k8s.io/client-go/tools/reference"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/clock"
)

// EventCreator creates events.
type EventCreator interface {
	// Create creates each event or says why not, with the errors of the API. It
	// calls done for each as soon as that is known, several at a time, and returns
	// after the last. The events stay the caller's.
	Create(ctx context.Context, all []*corev1.Event, done func(i int, err error))
}

// EventsConfig is what Events are made of.
type EventsConfig struct {
	// Client patches events that repeat. Required.
	Client kubernetes.Interface
	// Create creates the others. Nil: by requests of Client.
	Create EventCreator
	// Queue is how many events may wait to be written; those beyond are dropped
	// and counted. Default 4096.
	Queue int
	// Batch is how many are written at once, at most. Default 256: the store takes
	// as many in one entry of its log.
	Batch int
	// Linger is how long the first event of a batch waits for others. Default 20 ms.
	Linger time.Duration
	// Yield is asked whether there are writes under way that matter more: events
	// wait meanwhile, but none longer than Patience, nor when the queue is half full.
	// Nil: never. Patience defaults to 1 s.
	Yield    func() bool
	Patience time.Duration
	// Clock is the time; nil means the real one.
	Clock clock.WithTicker
	// Logger gets what an operator should know; nil discards.
	Logger *slog.Logger
}

func (c *EventsConfig) setDefaults() {
	c.Queue = cmp.Or(c.Queue, 4096)
	c.Batch = cmp.Or(c.Batch, 256)
	c.Linger = cmp.Or(c.Linger, 20*time.Millisecond)
	c.Patience = cmp.Or(c.Patience, time.Second)
	if c.Create == nil {
		c.Create = eventRequests{c.Client}
	}
	if c.Clock == nil {
		c.Clock = clock.RealClock{}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
}

// Tries of a batch that got no answer, and the pauses between them, each
// double the one before. Upstream's are 12 tries, 10 s apart: with a store
// that is away for longer, new events are worth more than old ones.
const (
	eventTries      = 5
	eventRetryFirst = time.Second
)

// sayDropped is how often, at most, the log tells of dropped events.
const sayDropped = time.Minute

// Events writes the events of all controllers to the API, with upstream's
// aggregation, and its limits per source and object (a burst of 25, then one
// in 5 minutes). Who records one never waits: events go to a bounded queue,
// and from there many at a time to the API, in the order in which they were
// recorded as far as they are about the same. They are best effort as
// upstream's: one is lost if the queue is full, which is counted, if the API
// refuses it or does not answer for long, or when Stop ends the writing.
type Events struct {
	cfg        EventsConfig
	queue      chan *corev1.Event
	correlator *record.EventCorrelator
	dropped    atomic.Uint64

	cancel context.CancelFunc
	done   chan struct{} // closed when the writer has ended

	// The writer's alone.
	said   uint64 // of dropped, in the log
	saidAt time.Time
}

// NewEvents starts writing events until Stop.
func NewEvents(cfg EventsConfig) *Events {
	cfg.setDefaults()
	ctx, cancel := context.WithCancel(context.Background())
	e := &Events{
		cfg: cfg, queue: make(chan *corev1.Event, cfg.Queue),
		correlator: record.NewEventCorrelatorWithOptions(record.CorrelatorOptions{Clock: cfg.Clock}),
		cancel:     cancel, done: make(chan struct{}),
	}
	go func() {
		defer close(e.done)
		e.run(ctx)
	}()
	return e
}

// Recorder returns the recorder for the events of component, such as
// "replicaset-controller", which kubectl shows as their source.
func (e *Events) Recorder(component string) record.EventRecorder {
	return recorder{e, corev1.EventSource{Component: component}}
}

// Dropped is how many events were lost because the queue was full, or because
// the API gave no answer for long.
func (e *Events) Dropped() uint64 { return e.dropped.Load() }

// Stop ends the writing; events that wait are dropped.
func (e *Events) Stop() {
	e.cancel()
	<-e.done
}

// recorder is a record.EventRecorder of one component.
type recorder struct {
	to     *Events
	source corev1.EventSource
}

func (r recorder) Event(object runtime.Object, kind, reason, message string) {
	r.record(object, nil, kind, reason, message)
}

func (r recorder) Eventf(object runtime.Object, kind, reason, format string, args ...any) {
	r.record(object, nil, kind, reason, fmt.Sprintf(format, args...))
}

func (r recorder) AnnotatedEventf(object runtime.Object, annotations map[string]string, kind, reason, format string, args ...any) {
	r.record(object, annotations, kind, reason, fmt.Sprintf(format, args...))
}

// record queues an event as upstream's recorder makes it.
func (r recorder) record(object runtime.Object, annotations map[string]string, kind, reason, message string) {
	about, err := reference.GetReference(scheme.Scheme, object)
	if err != nil {
		r.to.cfg.Logger.Error("an event about nothing that can be named", "reason", reason, "message", message, "err", err)
		return
	}
	now := metav1.NewTime(r.to.cfg.Clock.Now())
	event := &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{
			Name:      recordutil.GenerateEventName(about.Name, now.UnixNano()),
			Namespace: cmp.Or(about.Namespace, metav1.NamespaceDefault), Annotations: annotations,
		},
		InvolvedObject: *about, Reason: reason, Message: message, Type: kind,
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
		Source: r.source, ReportingController: r.source.Component,
	}
	select {
	case r.to.queue <- event:
	default:
		r.to.dropped.Add(1)
	}
}

// run writes until ctx ends.
func (e *Events) run(ctx context.Context) {
	for {
		var batch []*corev1.Event
		select {
		case <-ctx.Done():
			return
		case first := <-e.queue:
			e.yield(ctx, first)
			batch = e.collect(ctx, first)
		}
		e.write(ctx, e.correlate(batch))
		if n, now := e.dropped.Load(), e.cfg.Clock.Now(); n != e.said && now.Sub(e.saidAt) >= sayDropped {
			e.cfg.Logger.Warn("events were dropped: more came than could be written", "since the last word", n-e.said, "in all", n)
			e.said, e.saidAt = n, now
		}
	}
}

// yieldTick is how often it is asked whether what matters more is done.
const yieldTick = 10 * time.Millisecond

// yield waits while there is something that matters more than an event.
func (e *Events) yield(ctx context.Context, first *corev1.Event) {
	if e.cfg.Yield == nil {
		return
	}
	end := first.LastTimestamp.Add(e.cfg.Patience)
	for e.cfg.Yield() && len(e.queue) < cap(e.queue)/2 && e.cfg.Clock.Now().Before(end) {
		timer := e.cfg.Clock.NewTimer(yieldTick)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C():
		}
	}
}

// collect gathers what else comes within a moment of the first event.
func (e *Events) collect(ctx context.Context, first *corev1.Event) []*corev1.Event {
	batch := []*corev1.Event{first}
	timer := e.cfg.Clock.NewTimer(e.cfg.Linger)
	defer timer.Stop()
	for len(batch) < e.cfg.Batch {
		select {
		case <-ctx.Done():
			return batch
		case more := <-e.queue:
			batch = append(batch, more)
		case <-timer.C():
			return batch
		}
	}
	return batch
}

// writing is an event to be created, or the patch of one that is there.
type writing struct {
	event *corev1.Event
	patch []byte // nil: create it
}

// correlate counts, aggregates and filters events as upstream does. What is
// about the same event becomes one writing.
func (e *Events) correlate(batch []*corev1.Event) []writing {
	out := make([]writing, 0, len(batch))
	at := make(map[types.NamespacedName]int, len(batch))
	for _, event := range batch {
		result, err := e.correlator.EventCorrelate(event)
		if err != nil {
			e.cfg.Logger.Error("an event cannot be counted", "event", event.Name, "err", err)
		}
		if result.Skip {
			continue
		}
		w := writing{event: result.Event}
		repeats := w.event.Count > 1
		if repeats {
			w.patch = result.Patch
		}
		key := types.NamespacedName{Namespace: w.event.Namespace, Name: w.event.Name}
		if i, dup := at[key]; dup && repeats {
			// A patch holds all that ever changes, so the last one is enough; and what
			// is not there yet is created as it is by now.
			if out[i].patch == nil {
				w.patch = nil
			}
			out[i] = w
			continue
		}
		at[key] = len(out)
		out = append(out, w)
	}
	return out
}

// write writes a batch, again if the API gives no answer.
func (e *Events) write(ctx context.Context, batch []writing) {
	for try, wait := 1, eventRetryFirst; len(batch) > 0 && ctx.Err() == nil; try, wait = try+1, 2*wait {
		var err error
		if batch, err = e.once(ctx, batch); len(batch) == 0 || ctx.Err() != nil {
			return
		}
		if try == eventTries {
			e.dropped.Add(uint64(len(batch)))
			e.cfg.Logger.Warn("events cannot be written and are dropped", "events", len(batch), "tries", try, "err", err)
			return
		}
		timer := e.cfg.Clock.NewTimer(wait)
		select {
		case <-ctx.Done():
		case <-timer.C():
		}
		timer.Stop()
	}
}

// once writes a batch and returns what got no answer, with one of the errors.
func (e *Events) once(ctx context.Context, batch []writing) (again []writing, last error) {
	var mu sync.Mutex // guards again, last and the patches' part of create
	var create, patches []writing
	for _, w := range batch {
		if w.patch == nil {
			create = append(create, w)
		} else {
			patches = append(patches, w)
		}
	}
	failed := func(w writing, err error) {
		if err == nil || refusedForGood(err) {
			return // upstream drops those, too: what is wrong with an event stays wrong
		}
		mu.Lock()
		defer mu.Unlock()
		again, last = append(again, w), err
	}
	workqueue.ParallelizeUntil(ctx, min(parallel, len(patches)), len(patches), func(i int) {
		w := patches[i]
		_, err := e.cfg.Client.CoreV1().Events(w.event.Namespace).Patch(ctx, w.event.Name, types.StrategicMergePatchType, w.patch, metav1.PatchOptions{})
		if !apierrors.IsNotFound(err) {
			failed(w, err)
			return
		}
		w.patch = nil // it has expired
		mu.Lock()
		defer mu.Unlock()
		create = append(create, w)
	})
	events := make([]*corev1.Event, len(create))
	for i, w := range create {
		w.event.ResourceVersion = ""
		events[i] = w.event
	}
	if len(events) > 0 {
		e.cfg.Create.Create(ctx, events, func(i int, err error) { failed(create[i], err) })
	}
	return again, last
}

// refusedForGood says that the API will refuse the same again.
func refusedForGood(err error) bool {
	var status apierrors.APIStatus
	return errors.As(err, &status) && status.Status().Code/100 == 4 && !apierrors.IsTooManyRequests(err) && !apierrors.IsTimeout(err)
}

// eventRequests is an EventCreator that makes a request for each event.
type eventRequests struct{ client kubernetes.Interface }

func (r eventRequests) Create(ctx context.Context, all []*corev1.Event, done func(i int, err error)) {
	// Each is told about, also when ctx ends.
	workqueue.ParallelizeUntil(context.WithoutCancel(ctx), min(parallel, len(all)), len(all), func(i int) {
		_, err := r.client.CoreV1().Events(all[i].Namespace).Create(ctx, all[i], metav1.CreateOptions{})
		done(i, err)
	})
}
