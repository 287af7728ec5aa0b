package host

import (
	"errors"
	"fmt"
	"math"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"sync/atomic"
	"time"
)

// Pace says how often Go's collector runs in a process. Each time it marks all that is in
// use, and that is most of what it costs: so under load it runs the less often the more
// memory may still be used. Without load, memory counts more than processor time. The zero
// value of a field means its default, which suits a process that runs a Host and nothing
// else.
type Pace struct {
	// Percent is what GOGC is without load. Default 50.
	Percent int
	// StartPercent is in force while the process starts. Default: Percent.
	StartPercent int
	// StartFor is how long it starts. Its garbage does not count as load: between it lies
	// what stays, and the pages that they share never become free. A burst ends it. Default 20 s.
	StartFor time.Duration
	// BusyRate of allocation, in bytes a second, is from where on a process counts as busy.
	// An idle node is far below. Default 4 MiB.
	BusyRate uint64
	// BusyHeap is how large the heap may become under load, in bytes, so long as that leaves
	// LeastRoom to MostRoom bytes to be allocated between two collections. Defaults 40 MiB,
	// 24 MiB, 24 MiB.
	BusyHeap, LeastRoom, MostRoom uint64
	// More, if set, is asked how many bytes more may be allocated between two collections
	// while BurstRate bytes a second are: a process in which much is in use for good would
	// else do little but mark that. Defaults none, 96 MiB.
	More      func() uint64
	BurstRate uint64
	// Crowd, if set, tells that much is read at once that nobody waits for: then there is
	// LeastRoom. Default: never.
	Crowd func() bool
	// BurstPercent of what is in use may be allocated between two collections, but no more
	// than BurstMost bytes, for BurstFor after each call of Burst, if that is more than the
	// above. What is garbage when it begins does not count, but for the bound. Defaults 100,
	// 64 MiB, 2 s.
	BurstPercent int
	BurstMost    uint64
	BurstFor     time.Duration
	// CalmAfter is for how long there must be no collection for the load to be over: then
	// memory is given back. Default 5 s.
	CalmAfter time.Duration
}

func (p *Pace) setDefaults() {
	if p.Percent == 0 {
		p.Percent = 50
	}
	if p.StartPercent == 0 {
		p.StartPercent = p.Percent
	}
	if p.BurstPercent == 0 {
		p.BurstPercent = 100
	}
	for f, v := range map[*uint64]uint64{&p.BurstMost: 64 << 20, &p.BusyRate: 4 << 20, &p.BurstRate: 96 << 20, &p.BusyHeap: 40 << 20, &p.LeastRoom: 24 << 20, &p.MostRoom: 24 << 20} {
		if *f == 0 {
			*f = v
		}
	}
	for f, v := range map[*time.Duration]time.Duration{&p.StartFor: 20 * time.Second, &p.BurstFor: 2 * time.Second, &p.CalmAfter: 5 * time.Second} {
		if *f == 0 {
			*f = v
		}
	}
}

// Validate reports everything that is wrong with the settings.
func (p Pace) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("pace: "+format, args...)) }
	if p.Percent < 1 || p.StartPercent < 1 {
		bad("Percent %d, StartPercent %d: both have to be positive", p.Percent, p.StartPercent)
	}
	if p.BusyRate == 0 {
		bad("BusyRate is 0")
	}
	if p.LeastRoom == 0 || p.LeastRoom > p.MostRoom {
		bad("LeastRoom %d: it has to be positive, and no more than MostRoom (%d)", p.LeastRoom, p.MostRoom)
	}
	if p.BusyHeap < p.LeastRoom {
		bad("BusyHeap %d is less than LeastRoom (%d)", p.BusyHeap, p.LeastRoom)
	}
	if p.StartFor < 0 || p.CalmAfter <= 0 {
		bad("StartFor %v, CalmAfter %v: the former must not be negative, the latter has to be positive", p.StartFor, p.CalmAfter)
	}
	if p.BurstPercent < 0 || p.BurstFor < 0 {
		bad("BurstPercent %d, BurstFor %v: neither may be negative", p.BurstPercent, p.BurstFor)
	}
	return errors.Join(errs...)
}

// next is the percentage from now on, in a process of an age that allocates so many bytes a
// second, has so many in use, has had the percentage now, and may be in a burst. Small
// changes are not worth stopping the world.
func (p Pace) next(now int, age time.Duration, rate float64, live uint64, burst bool) int {
	switch {
	case age < p.StartFor && !burst:
		return p.StartPercent
	case rate < float64(p.BusyRate) && !burst:
		return p.Percent
	}
	room := min(p.MostRoom, max(p.LeastRoom, p.BusyHeap-min(live, p.BusyHeap)))
	if p.More != nil && rate >= float64(p.BurstRate) {
		room += p.More()
	}
	if p.Crowd != nil && p.Crowd() {
		room = p.LeastRoom
	}
	if burst {
		room = max(room, min(live*uint64(p.BurstPercent)/100, p.BurstMost))
	}
	want := max(p.Percent, int(min(room*100/max(live, 1), math.MaxInt32)))
	if d := want - now; now > p.Percent && d < now/4 && -d < now/4 {
		return now
	}
	return want
}

// pacing is begun once: the collector is the process's.
var pacing sync.Once

// pacer looks at the heap after each collection.
type pacer struct {
	Pace
	started time.Time

	mu        sync.Mutex  // guards the rest
	now       int         // percent
	calm      *time.Timer // nil: the process has not been busy yet
	at        time.Time
	allocated uint64
	burst     time.Time // when it is over
}

// paced is what looks after the collector; nil: nobody.
var paced atomic.Pointer[pacer]

// Burst says that this process has much to do that a user waits for, and that its
// collector should not stand in the way (Pace.BurstPercent): whoever knows says so again
// and again meanwhile. It costs next to nothing.
func Burst() {
	if p := paced.Load(); p != nil {
		p.hurry(time.Now(), func() (live, used uint64) {
			return heap("/memory/classes/heap/objects:bytes")
		})
	}
}

// run begins to pace the collector, for the life of the process.
func (p Pace) run() {
	now := time.Now()
	debug.SetGCPercent(p.StartPercent)
	pacer := &pacer{Pace: p, started: now, now: p.StartPercent, at: now}
	pacer.arm()
	paced.Store(pacer)
}

// heap is how many bytes were in use when the collector had run, and another figure that the
// runtime keeps.
func heap(other string) (live, n uint64) {
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: other}}
	metrics.Read(s)
	return s[0].Value.Uint64(), s[1].Value.Uint64()
}

// arm asks for a call after the next collection.
func (p *pacer) arm() {
	// A finalizer that runs means that there was a collection.
	runtime.SetFinalizer(&struct{ _ [16]byte }{}, func(any) {
		live, allocated := heap("/gc/heap/allocs:bytes")
		p.collected(time.Now(), live, allocated)
		p.arm()
	})
}

// collected is told that so many bytes were in use when the collector had run, and how many
// have been allocated in all.
func (p *pacer) collected(at time.Time, live, allocated uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	rate := float64(allocated-p.allocated) / max(at.Sub(p.at).Seconds(), 1e-3)
	p.at, p.allocated = at, allocated
	p.set(p.next(p.now, at.Sub(p.started), rate, live, at.Before(p.burst)))
	if p.now != p.Percent { // else what it had in use before is still to be given back
		p.later()
	}
}

// hurry begins a burst at once, or has it last longer. The collection before it was one of
// a calm process, and the next may be near: what is garbage already takes no room from it.
func (p *pacer) hurry(at time.Time, look func() (live, used uint64)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	goesOn := at.Before(p.burst)
	if p.burst = at.Add(p.BurstFor); goesOn {
		return
	}
	live, used := look()
	want := p.next(p.now, at.Sub(p.started), 0, live, true)
	room := min(live*uint64(want)/100+used-min(live, used), p.BurstMost)
	if want = max(want, int(min(room*100/max(live, 1), math.MaxInt32))); want > p.now {
		p.set(want)
		p.later()
	}
}

// later has memory given back when there is no collection for a while. The caller has the
// lock.
func (p *pacer) later() {
	if p.calm == nil {
		p.calm = time.AfterFunc(p.CalmAfter, p.relax)
		return
	}
	p.calm.Reset(p.CalmAfter)
}

// set changes the percentage. The caller has the lock.
func (p *pacer) set(percent int) {
	if percent != p.now {
		p.now = percent
		debug.SetGCPercent(percent)
	}
}

// relax has memory given back when there was no collection for a while: with a percentage
// for load, the next would be minutes away.
func (p *pacer) relax() {
	p.mu.Lock()
	p.set(p.Percent)
	p.mu.Unlock()
	debug.FreeOSMemory()
}
