// Package history judges what clients of a store have seen while it was
// tortured. It is pure: histories go in, violations come out.
//
// The judge knows nothing but etcd's contract. From watches it rebuilds the log:
// which events each revision holds. Then every answer that any client got is
// compared with a reference model that executes the same request on the state
// that the log gives for that revision. So a history passes only if one order
// of all writes explains every read, transaction, watch and lease, and if that
// order agrees with real time. Porcupine, which knows nothing of revisions,
// judges the same operations a second time (Linearizable).
//
// Requests without an answer may have been executed once or not at all; values
// are unique, so it shows when one was executed twice.
package history

import (
	"fmt"
	"math"
	"sync"
	"time"
)

// Never is the Return of an operation that got no answer.
const Never = time.Duration(math.MaxInt64)

// KV is a key as clients see it.
type KV struct {
	Key, Value           string
	Create, Mod, Version int64
	Lease                int64
}

// Event of a revision. A deletion has only KV.Key and KV.Mod. Prev is what
// was there before, if the watch asked for it.
type Event struct {
	Delete bool
	KV     KV
	Prev   *KV
}

// StepKind is what a Step does.
type StepKind int

// The kinds of steps.
const (
	Range StepKind = iota
	Put
	Delete
)

// Step is a read or a write, alone or within a transaction.
type Step struct {
	Kind StepKind
	// Key, and the End of a range that does not include it; "" is one key alone,
	// "\x00" all from Key on.
	Key, End string
	Value    string
	Lease    int64
	// Rev to read at; 0 is the newest.
	Rev int64
	// PrevKV asks a write for what was there before.
	PrevKV bool
}

// StepResult answers a Step: what was read, or was there before; for a deletion
// also how many keys it hit.
type StepResult struct {
	KVs     []KV
	Deleted int64
}

// CmpTarget is what a Cmp compares.
type CmpTarget int

// The targets.
const (
	ModRevision CmpTarget = iota
	CreateRevision
	Version
	Value
)

// Cmp is a condition of a transaction: target equals Number (Text for Value).
type Cmp struct {
	Key    string
	Target CmpTarget
	Number int64
	Text   string
}

// Form is how an operation is sent.
type Form int

// The forms. Single steps are sent as such.
const (
	Single Form = iota
	Txn
)

// Op is one request and what came of it.
type Op struct {
	Client int
	Node   string
	// Life counts the processes that ran on Node.
	Life  int
	Shard string

	Form         Form
	If           []Cmp
	Then, Else   []Step // Single: Then has one step
	Serializable bool

	// Call and Return since the start of the run, on one monotonic clock.
	Call, Return time.Duration
	// Outcome of it; Err says more.
	Outcome   Outcome
	Err       string
	Rev       int64 // of the answer's header
	Succeeded bool
	Results   []StepResult
}

// Outcome of an operation.
type Outcome int

const (
	// Unknown: no answer, or an error that leaves open whether it was executed.
	Unknown Outcome = iota
	// Done: answered.
	Done
	// Refused: answered with an error that says it was not executed.
	Refused
	// Compacted: refused because a revision is compacted.
	Compacted
)

// writes tells whether it could change anything.
func (o *Op) writes() bool {
	for _, s := range append(o.Then[:len(o.Then):len(o.Then)], o.Else...) {
		if s.Kind != Range {
			return true
		}
	}
	return false
}

func (o *Op) String() string {
	s := fmt.Sprintf("client %d at %s/%d shard %s [%v, %v]", o.Client, o.Node, o.Life, o.Shard, o.Call, o.Return)
	if o.Form == Txn {
		s += fmt.Sprintf(" txn if %v then %v else %v", o.If, o.Then, o.Else)
	} else {
		s += fmt.Sprintf(" %v serializable=%v", o.Then, o.Serializable)
	}
	return s + fmt.Sprintf(" -> %d (%s) rev %d %v %v", o.Outcome, o.Err, o.Rev, o.Succeeded, o.Results)
}

// WatchMessage is a response on a stream of watches, as it arrived.
type WatchMessage struct {
	At              time.Duration
	Rev             int64 // of the header
	Created         bool
	Canceled        bool
	CompactRevision int64
	Reason          string
	Fragment        bool
	// All: a notification of progress for the whole stream.
	All    bool
	Events []Event
}

// Watch is one watch from its creation to the end of its stream.
type Watch struct {
	Node  string
	Life  int
	Shard string

	Key, End     string
	Start        int64 // revision, 0: now
	NoPut, NoDel bool
	// Whole: it covers every key of the shard that the history is about.
	Whole          bool
	PrevKV         bool
	Fragment       bool
	Progress       bool
	Opened, Closed time.Duration
	Messages       []WatchMessage
}

func (w *Watch) String() string {
	return fmt.Sprintf("watch of %q..%q from %d at %s/%d shard %s [%v, %v] (noput=%v nodelete=%v prevkv=%v fragment=%v)",
		w.Key, w.End, w.Start, w.Node, w.Life, w.Shard, w.Opened, w.Closed, w.NoPut, w.NoDel, w.PrevKV, w.Fragment)
}

// Lease is what a client knows of a lease that it granted.
type Lease struct {
	Shard string
	ID    int64
	// TTL that was granted.
	TTL time.Duration
	// Renewed has when each acknowledged grant or renewal was asked for.
	Renewed []time.Duration
	// Attempted is when a renewal was asked for last, answered or not.
	Attempted time.Duration
	// Revoked is when the client asked for its end; 0: never.
	Revoked time.Duration
}

// Compaction that was asked for.
type Compaction struct {
	Shard        string
	Rev          int64
	Call, Return time.Duration // Return: Never if unanswered
	Done         bool
}

// History of a run. Methods that add to it may be called from any goroutine.
type History struct {
	start time.Time

	mu          sync.Mutex // guards all below while the run lasts
	Ops         []*Op
	Watches     []*Watch
	Leases      []*Lease
	Compactions []*Compaction
	// Background has the keys that others than the clients of the history write.
	Background map[string]bool
}

// New history that begins now.
func New() *History { return &History{start: time.Now(), Background: map[string]bool{}} }

// Now is the time since the start.
func (h *History) Now() time.Duration { return time.Since(h.start) }

// AddOp adds a finished operation.
func (h *History) AddOp(o *Op) {
	h.mu.Lock()
	h.Ops = append(h.Ops, o)
	h.mu.Unlock()
}

// AddWatch adds a watch that has ended.
func (h *History) AddWatch(w *Watch) {
	h.mu.Lock()
	h.Watches = append(h.Watches, w)
	h.mu.Unlock()
}

// AddLease adds a lease; its fields may be changed until the judgement, by one goroutine.
func (h *History) AddLease(l *Lease) {
	h.mu.Lock()
	h.Leases = append(h.Leases, l)
	h.mu.Unlock()
}

// AddCompaction adds a compaction before it is asked for; the caller completes it.
func (h *History) AddCompaction(c *Compaction) {
	h.mu.Lock()
	h.Compactions = append(h.Compactions, c)
	h.mu.Unlock()
}

// Class of a violation.
type Class string

// The classes.
const (
	LogConflict   Class = "log-conflict"    // two watches disagree about a revision
	LogGap        Class = "log-gap"         // a revision that nobody can explain
	LostWrite     Class = "lost-write"      // acknowledged, and not there
	WrongResult   Class = "wrong-result"    // an answer differs from the model's
	Unexplained   Class = "unexplained"     // a revision that no request explains
	DoubleApply   Class = "double-apply"    // a request executed twice
	StaleRead     Class = "stale-read"      // a linearizable answer from the past
	TimeTravel    Class = "time-travel"     // a replica's revision went back, or an answer from the future
	WatchGap      Class = "watch-gap"       // an event is missing
	WatchDouble   Class = "watch-duplicate" // an event came twice or too early in the order
	WatchWrong    Class = "watch-wrong"     // an event is not the log's
	WatchSplit    Class = "watch-split"     // the events of a revision came in parts
	WatchProgress Class = "watch-progress"  // a notification promised what was not so
	WatchEnd      Class = "watch-end"       // cancelled for no reason
	LeaseEarly    Class = "lease-early"     // keys gone before the time
	LeaseLate     Class = "lease-late"      // keys outlive the lease by far
	LeaseTorn     Class = "lease-torn"      // keys of a lease did not go together
	NotLinear     Class = "not-linearizable"
	Diverged      Class = "diverged" // replicas differ
	Fence         Class = "fence"    // a deposed leader's write was applied
)

// Violation of the contract.
type Violation struct {
	Class Class
	Text  string
}

func (v Violation) String() string { return string(v.Class) + ": " + v.Text }

// maxViolations of one class are reported.
const maxViolations = 5

// report collects violations.
type report struct {
	all   []Violation
	count map[Class]int
}

func (r *report) add(c Class, format string, args ...any) {
	if r.count == nil {
		r.count = map[Class]int{}
	}
	if r.count[c]++; r.count[c] <= maxViolations {
		r.all = append(r.all, Violation{c, fmt.Sprintf(format, args...)})
	}
}
