// Package queue orders the pods that wait for a node.
//
// # Contract
//
// A pod is in one of these places: active (to be tried as soon as possible),
// backing off (to be tried when its back-off ends), waiting (no node could
// take it; an event that may help, or a long time, brings it back), gated
// (its specification forbids scheduling) or in flight (popped, its outcome
// not reported yet). Every popped pod must be reported by exactly one of
// Done, Unschedulable and Failed; until then it is not popped again.
//
// Ordering: active pods come by priority, then by the time at which they
// became active, then by arrival. So that a stream of important pods starves
// nobody, each fairEvery-th pod popped is the one that has been active longest,
// if that is longer than Config.Patience.
//
// An event wakes the waiting pods that named its kind, and of those only the
// ones that the caller, who knows what happened where, does not rule out.
//
// An event that comes while a pod is in flight is not lost: if it may help,
// the pod backs off instead of waiting.
//
// The queue is pure: time is an argument, and it must not go backwards. It is
// not safe for concurrent use; the scheduler, its only caller, guards it. It
// holds one entry for each pod without a node that exists, and nothing else.
// Each operation costs the logarithm of their number; Move costs one look at
// each waiting pod that named the event.
package queue

import (
	"cmp"
	"container/heap"
	"errors"
	"fmt"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	corev1helpers "k8s.io/component-helpers/scheduling/corev1"
)

// Event is a set of kinds of change in the cluster.
type Event uint32

// The kinds of change that can make a refused pod schedulable.
const (
	NodeAdded       Event = 1 << iota // a node is new
	NodeRemoved                       // a node is gone (a spread domain may be, too)
	NodeAllocatable                   // a node offers more of something
	NodeLabels                        // a node's labels changed
	NodeTaints                        // a node's taints, or whether it is cordoned, changed
	Topology                          // what domains there are, and which nodes count in them, changed
	NodeReturned                      // the failure detector sees a lost node again
	PodPlaced                         // a pod was bound
	PodGone                           // a bound pod has ended, or was not bound after all: there is room on its node
	PeerGone                          // the same, for those who kept away from it, or from its kind
	PodShrunk                         // a bound pod requests less
	PodLabels                         // a bound pod's labels changed
	PodEnding                         // a bound pod began to end: it is not spread from any more, though its node is as full as before
	NamespaceLabels                   // a namespace's labels changed
	Services                          // what pods are spread by changed
	PodClaims                         // a volume claim of the pod is new or changed
	Volumes                           // a volume is new, free, or somewhere else
	StorageClasses                    // a storage class is new, or allows other places
	CSI                               // a driver, its room on a node or its capacity, changed
	ResourceClaims                    // a claim of devices is new, changed or gave some back
	DeviceClasses                     // a class of devices is new or changed
	DeviceSlices                      // devices are new or changed
	Any             Event = 1<<iota - 1
	eventKinds            = iota - 1
)

// Config bounds the queue's waiting times.
type Config struct {
	// FirstBackoff is how long a pod backs off after its first failed attempt;
	// each further failure doubles it. Default 1 s, as upstream.
	FirstBackoff time.Duration
	// LongestBackoff is where doubling stops. Default 10 s, as upstream.
	LongestBackoff time.Duration
	// LongestWait is how long a waiting pod is left alone if no event comes.
	// Default 5 min, as upstream.
	LongestWait time.Duration
	// Patience is how long an active pod waits for more important ones before it
	// gets its turn among them. Default 10 s.
	Patience time.Duration
}

// DefaultConfig returns the documented defaults.
func DefaultConfig() Config {
	return Config{FirstBackoff: time.Second, LongestBackoff: 10 * time.Second, LongestWait: 5 * time.Minute, Patience: 10 * time.Second}
}

func (c *Config) setDefaults() {
	d := DefaultConfig()
	c.FirstBackoff = cmp.Or(c.FirstBackoff, d.FirstBackoff)
	c.LongestBackoff = cmp.Or(c.LongestBackoff, d.LongestBackoff)
	c.LongestWait = cmp.Or(c.LongestWait, d.LongestWait)
	c.Patience = cmp.Or(c.Patience, d.Patience)
}

// Validate reports all faults of the configuration at once.
func (c Config) Validate() error {
	c.setDefaults()
	var errs []error
	if c.FirstBackoff < 0 {
		errs = append(errs, fmt.Errorf("queue: FirstBackoff is negative: %v", c.FirstBackoff))
	}
	if c.LongestBackoff < c.FirstBackoff {
		errs = append(errs, fmt.Errorf("queue: LongestBackoff %v is below FirstBackoff %v", c.LongestBackoff, c.FirstBackoff))
	}
	if c.LongestWait < c.LongestBackoff {
		errs = append(errs, fmt.Errorf("queue: LongestWait %v is below LongestBackoff %v", c.LongestWait, c.LongestBackoff))
	}
	if c.Patience < 0 {
		errs = append(errs, fmt.Errorf("queue: Patience is negative: %v", c.Patience))
	}
	return errors.Join(errs...)
}

// fairEvery is how many pods are popped for each that goes before more
// important ones because it has waited for long.
const fairEvery = 8

type place int

const (
	active place = iota
	backoff
	backoffAfterError
	waiting
	gated
	inFlight
)

type entry struct {
	pod      *v1.Pod
	priority int32
	arrival  uint64    // breaks ties
	since    time.Time // when it became active (order), or when it began to wait
	until    time.Time // end of the back-off
	attempts int
	place    place
	index    int    // in its heap
	turn     int    // in the heap of turns; while active
	wake     Event  // what may help; while waiting
	popped   uint64 // see Queue.moves; while in flight
	changed  bool   // a new version of the pod may help; while in flight
}

// Queue is the set of pods that wait for a node.
type Queue struct {
	cfg     Config
	entries map[types.UID]*entry
	arrival uint64

	active entryHeap
	turns  entryHeap // the active ones by how long they have been
	pops   int       // since one went out of turn
	// Pods that no node could take may be tried before their back-off ends when
	// nothing else is to be done; pods whose attempt failed by an error not.
	backoff, backoffErr entryHeap
	waits               entryHeap // the waiting ones by how long they have been
	// The waiting ones by what wakes them: there are few combinations.
	waiting  map[Event]map[*entry]bool
	inFlight int
	// moves counts events; last says for each kind which was its last.
	moves uint64
	last  [eventKinds]uint64
}

// New returns an empty queue; cfg must be valid.
func New(cfg Config) *Queue {
	cfg.setDefaults()
	byEnd := func(a, b *entry) bool {
		return cmp.Or(a.until.Compare(b.until), cmp.Compare(a.arrival, b.arrival)) < 0
	}
	bySince := func(a, b *entry) bool {
		return cmp.Or(a.since.Compare(b.since), cmp.Compare(a.arrival, b.arrival)) < 0
	}
	return &Queue{
		cfg:     cfg,
		entries: map[types.UID]*entry{},
		active: entryHeap{less: func(a, b *entry) bool {
			return cmp.Or(cmp.Compare(b.priority, a.priority), a.since.Compare(b.since), cmp.Compare(a.arrival, b.arrival)) < 0
		}},
		turns:      entryHeap{less: bySince, at: func(e *entry) *int { return &e.turn }},
		backoff:    entryHeap{less: byEnd},
		backoffErr: entryHeap{less: byEnd},
		waits:      entryHeap{less: bySince},
		waiting:    map[Event]map[*entry]bool{},
	}
}

// Add takes in a pod, or takes note of its new version. helps says that the
// change between the versions may make it schedulable (it is ignored for a
// new pod).
func (q *Queue) Add(pod *v1.Pod, helps bool, now time.Time) {
	e := q.entries[pod.UID]
	if e == nil {
		q.arrival++
		e = &entry{pod: pod, priority: corev1helpers.PodPriority(pod), arrival: q.arrival}
		q.entries[pod.UID] = e
		if len(pod.Spec.SchedulingGates) > 0 {
			e.place = gated
			return
		}
		q.activate(e, now)
		return
	}
	e.pod = pod // its priority is immutable
	switch {
	case e.place == gated && len(pod.Spec.SchedulingGates) == 0:
		q.activate(e, now)
	case e.place == waiting && helps:
		q.revive(e, now)
	case e.place == inFlight && helps:
		e.changed = true
	}
}

// Retry says that a pod, if it waits, should be tried again after what is left
// of its back-off; if it is in flight and fails, it backs off instead of waiting.
func (q *Queue) Retry(uid types.UID, now time.Time) {
	if e := q.entries[uid]; e != nil {
		q.Add(e.pod, true, now)
	}
}

// Has reports whether the pod is in any place.
func (q *Queue) Has(uid types.UID) bool { return q.entries[uid] != nil }

// Remove forgets a pod, in whatever place; unknown UIDs are ignored.
func (q *Queue) Remove(uid types.UID) {
	if e := q.entries[uid]; e != nil {
		q.leave(e)
		delete(q.entries, uid)
	}
}

// Popped is a pod to be tried.
type Popped struct {
	Pod      *v1.Pod
	Attempts int // this one included
}

// Pop takes up to n pods that are to be tried now.
func (q *Queue) Pop(n int, now time.Time) []Popped {
	q.tick(now)
	var out []Popped
	for len(out) < n {
		e := q.next(now)
		if e == nil {
			break
		}
		q.leave(e)
		e.place, e.popped, e.changed = inFlight, q.moves, false
		e.attempts++
		q.inFlight++
		out = append(out, Popped{Pod: e.pod, Attempts: e.attempts})
	}
	return out
}

func (q *Queue) next(now time.Time) *entry {
	e := q.active.first()
	if e == nil {
		return q.backoff.first()
	}
	if q.pops++; q.pops >= fairEvery {
		q.pops = 0
		if oldest := q.turns.first(); now.Sub(oldest.since) > q.cfg.Patience {
			return oldest
		}
	}
	return e
}

// Done reports that a popped pod needs no node any more.
func (q *Queue) Done(uid types.UID) { q.Remove(uid) }

// Unschedulable reports that no node could take a popped pod, and which
// events may change that.
func (q *Queue) Unschedulable(uid types.UID, wake Event, now time.Time) {
	e := q.landing(uid)
	if e == nil {
		return
	}
	e.wake = wake
	e.until = now.Add(q.backoffOf(e))
	if e.changed || q.missed(e, wake) {
		e.place = backoff
		heap.Push(&q.backoff, e)
		return
	}
	e.place, e.since = waiting, now
	heap.Push(&q.waits, e)
	if q.waiting[wake] == nil {
		q.waiting[wake] = map[*entry]bool{}
	}
	q.waiting[wake][e] = true
}

// missed reports whether one of the events happened while the pod was in
// flight.
func (q *Queue) missed(e *entry, events Event) bool {
	for kind := range q.last {
		if events&(1<<kind) != 0 && q.last[kind] > e.popped {
			return true
		}
	}
	return false
}

// Failed reports that the attempt of a popped pod failed for a reason that is
// not the pod's: it is tried again after its back-off.
func (q *Queue) Failed(uid types.UID, now time.Time) {
	e := q.landing(uid)
	if e == nil {
		return
	}
	e.until = now.Add(q.backoffOf(e))
	e.place = backoffAfterError
	heap.Push(&q.backoffErr, e)
}

// landing takes a pod out of flight; nil if it was removed meanwhile.
func (q *Queue) landing(uid types.UID) *entry {
	e := q.entries[uid]
	if e == nil || e.place != inFlight {
		return nil
	}
	q.leave(e)
	if len(e.pod.Spec.SchedulingGates) > 0 {
		e.place = gated
		return nil
	}
	return e
}

// Move says that something happened in the cluster. Waiting pods that it may
// help (and for which may, if not nil, agrees) are tried again after what is
// left of their back-off. It returns how many those are.
func (q *Queue) Move(ev Event, may func(*v1.Pod) bool, now time.Time) int {
	q.moves++
	for kind := range q.last {
		if ev&(1<<kind) != 0 {
			q.last[kind] = q.moves
		}
	}
	moved := 0
	for wake, pods := range q.waiting {
		if wake&ev == 0 {
			continue
		}
		for e := range pods {
			if may == nil || may(e.pod) {
				q.revive(e, now)
				moved++
			}
		}
	}
	return moved
}

// Next returns when Pop will have something to give without any event; false
// if never.
func (q *Queue) Next(now time.Time) (time.Time, bool) {
	if q.active.Len()+q.backoff.Len() > 0 {
		return now, true
	}
	var at time.Time
	earlier := func(t time.Time) {
		if at.IsZero() || t.Before(at) {
			at = t
		}
	}
	if e := q.backoffErr.first(); e != nil {
		earlier(e.until)
	}
	if e := q.waits.first(); e != nil {
		earlier(e.since.Add(q.cfg.LongestWait))
	}
	return at, !at.IsZero()
}

// Lengths are the numbers of pods by place.
type Lengths struct{ Active, Backoff, Waiting, Gated, InFlight int }

// Lengths counts the pods.
func (q *Queue) Lengths() Lengths {
	l := Lengths{Active: q.active.Len(), Backoff: q.backoff.Len() + q.backoffErr.Len(), Waiting: q.waits.Len(), InFlight: q.inFlight}
	l.Gated = len(q.entries) - l.Active - l.Backoff - l.Waiting - l.InFlight
	return l
}

// tick makes pods active whose back-off, or longest wait, is over.
func (q *Queue) tick(now time.Time) {
	for _, h := range []*entryHeap{&q.backoff, &q.backoffErr} {
		for e := h.first(); e != nil && !e.until.After(now); e = h.first() {
			q.leave(e)
			q.activate(e, now)
		}
	}
	for e := q.waits.first(); e != nil && !e.since.Add(q.cfg.LongestWait).After(now); e = q.waits.first() {
		q.revive(e, now)
	}
}

func (q *Queue) activate(e *entry, now time.Time) {
	e.place, e.since = active, now
	heap.Push(&q.active, e)
	heap.Push(&q.turns, e)
}

// revive ends the waiting of a pod.
func (q *Queue) revive(e *entry, now time.Time) {
	q.leave(e)
	if !e.until.After(now) {
		q.activate(e, now)
		return
	}
	e.place = backoff
	heap.Push(&q.backoff, e)
}

// leave takes an entry out of the collection of its place.
func (q *Queue) leave(e *entry) {
	switch e.place {
	case active:
		heap.Remove(&q.active, e.index)
		heap.Remove(&q.turns, e.turn)
	case backoff:
		heap.Remove(&q.backoff, e.index)
	case backoffAfterError:
		heap.Remove(&q.backoffErr, e.index)
	case waiting:
		heap.Remove(&q.waits, e.index)
		if delete(q.waiting[e.wake], e); len(q.waiting[e.wake]) == 0 {
			delete(q.waiting, e.wake)
		}
	case inFlight:
		q.inFlight--
	}
}

func (q *Queue) backoffOf(e *entry) time.Duration {
	d := q.cfg.FirstBackoff
	for range e.attempts - 1 {
		if d >= q.cfg.LongestBackoff/2 {
			return q.cfg.LongestBackoff
		}
		d *= 2
	}
	return d
}

// entryHeap is a container/heap that keeps each entry's index.
type entryHeap struct {
	items []*entry
	less  func(a, b *entry) bool
	at    func(*entry) *int // where an entry keeps its index; nil: in index
}

func (h *entryHeap) put(i int, e *entry) {
	h.items[i] = e
	if h.at != nil {
		*h.at(e) = i
		return
	}
	e.index = i
}

func (h *entryHeap) first() *entry {
	if len(h.items) == 0 {
		return nil
	}
	return h.items[0]
}

func (h *entryHeap) Len() int           { return len(h.items) }
func (h *entryHeap) Less(i, j int) bool { return h.less(h.items[i], h.items[j]) }
func (h *entryHeap) Swap(i, j int) {
	a, b := h.items[i], h.items[j]
	h.put(i, b)
	h.put(j, a)
}
func (h *entryHeap) Push(x any) {
	h.items = append(h.items, nil)
	h.put(len(h.items)-1, x.(*entry))
}
func (h *entryHeap) Pop() any {
	last := len(h.items) - 1
	e := h.items[last]
	h.items[last] = nil
	h.items = h.items[:last]
	return e
}
