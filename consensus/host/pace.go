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
// use, and that is most of what it costs: so it runs the less often the more of the
// processor it would take, and that the process measures itself. Without load, memory
// counts more than processor time. The zero value of a field means its default, which
// suits a process that runs a Host and nothing else.
type Pace struct {
	// Percent of what is in use may be allocated between two collections in any case: what
	// GOGC is without load. Default 50.
	Percent int
	// Share is how many percent of the processor time that the rest of the process uses
	// collecting may take: so much is allocated between two collections, within the bounds of
	// Percent and Most. While a process does little there is processor time to spare: see
	// spare. Default 1.
	Share int
	// BurstFor is how long a call of Burst counts. Default 2 s.
	BurstFor time.Duration
	// Most is how many bytes may be allocated between two collections at most, unless
	// Percent allows more, with so many bytes in use. It is asked after each. Default 24 MiB,
	// always.
	Most func(live uint64) uint64
	// CalmAfter is for how long there must be no collection that leaves at least half of the
	// most room that there was, for the load to be over: then memory is given back. Default 5 s.
	CalmAfter time.Duration
}

// spare is how many processors a process may have besides what it uses: Share of them the
// collector may take in any case.
const spare = 2.0

func (p *Pace) setDefaults() {
	if p.Percent == 0 {
		p.Percent = 50
	}
	if p.Share == 0 {
		p.Share = 1
	}
	if p.Most == nil {
		p.Most = func(uint64) uint64 { return 24 << 20 }
	}
	for f, v := range map[*time.Duration]time.Duration{&p.BurstFor: 2 * time.Second, &p.CalmAfter: 5 * time.Second} {
		if *f == 0 {
			*f = v
		}
	}
}

// Validate reports everything that is wrong with the settings.
func (p Pace) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf("pace: "+format, args...)) }
	if p.Percent < 1 {
		bad("Percent %d: it has to be positive", p.Percent)
	}
	if p.Share < 1 {
		bad("Share %d: it has to be positive", p.Share)
	}
	if p.Most == nil {
		bad("Most is not set")
	}
	if p.BurstFor < 0 || p.CalmAfter <= 0 {
		bad("BurstFor %v, CalmAfter %v: the former must not be negative, the latter has to be positive", p.BurstFor, p.CalmAfter)
	}
	return errors.Join(errs...)
}

// account is what the runtime has counted when the collector has run.
type account struct {
	at   time.Time
	live uint64 // bytes in use then
	// Since the process began, bytes allocated, processor time used by the rest and by the collector, and collections.
	allocated       uint64
	used, collector time.Duration
	collections     uint64
}

// costs are measured.
type costs struct {
	mark      float64 // processor nanoseconds of a collection for each byte in use
	allocated float64 // bytes for each processor nanosecond that the rest of the process used since the last collection
	rate      float64 // bytes for each nanosecond since then
}

// of is what two accounts tell. A process that waits for the processor counts that as used,
// so a collection seems to take rather too much than too little.
func (c costs) of(was, is account) costs {
	if took, n := float64(is.collector-was.collector), float64(is.collections-was.collections); took > 0 && n > 0 && is.live > 0 {
		switch mark := took / n / float64(is.live); {
		case c.mark == 0:
			c.mark = mark
		case mark < c.mark:
			c.mark += (mark - c.mark) / 2
		default:
			c.mark += (mark - c.mark) / 8
		}
	}
	allocated := float64(is.allocated - was.allocated)
	c.allocated, c.rate = allocated/max(float64(is.used-was.used), 1), allocated/max(float64(is.at.Sub(was.at)), 1)
	return c
}

// room is how many bytes may be allocated until the next collection, with so many in use:
// as many as are allocated while the process uses what a collection takes, divided by Share.
// That is much in a process that allocates little, but in little time. So as long as
// Percent costs no more than Share of the spare processors, it stays at that; from there
// on room grows with the square of the rate, until it is what the above says.
func (p Pace) room(c costs, live uint64, burst bool) uint64 {
	floor, most := live*uint64(p.Percent)/100, p.Most(live)
	if burst {
		return max(floor, most)
	}
	shares := c.mark * float64(live) * 100 / float64(p.Share) // nanoseconds in which Share of one processor marks all
	idle := c.rate * shares / spare
	idle *= idle / max(float64(floor), 1)
	return max(floor, uint64(min(c.allocated*shares, idle, float64(most))))
}

// percent is what GOGC has to be for that.
func percent(room, live uint64) int {
	return int(min(room*100/max(live, 1), math.MaxInt32))
}

// pacing is begun once: the collector is the process's.
var pacing sync.Once

// pacer looks at the heap after each collection.
type pacer struct {
	Pace

	mu    sync.Mutex // guards the rest
	now   int        // percent
	costs costs
	last  account
	burst time.Time   // when it is over
	most  uint64      // room since memory was given back, while it was more than Percent
	calm  *time.Timer // nil: there was no load yet
}

// paced is what looks after the collector; nil: nobody.
var paced atomic.Pointer[pacer]

// Burst says that this process has much to do that a user waits for and that is soon done,
// so that its collector should not stand in the way: for Pace.BurstFor, Pace.Most may be
// allocated between two collections, whatever they take. Whoever knows says so again and
// again meanwhile. It costs next to nothing.
func Burst() {
	if p := paced.Load(); p != nil {
		p.hurry(time.Now(), takeAccount)
	}
}

// run begins to pace the collector, for the life of the process.
func (p Pace) run() {
	debug.SetGCPercent(p.Percent)
	pacer := &pacer{Pace: p, now: p.Percent, last: takeAccount()}
	pacer.arm()
	paced.Store(pacer)
}

// takeAccount asks the runtime, which counts processor time only when it collects.
func takeAccount() account {
	s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/heap/allocs:bytes"}, {Name: "/cpu/classes/user:cpu-seconds"}, {Name: "/cpu/classes/gc/total:cpu-seconds"}, {Name: "/gc/cycles/total:gc-cycles"}}
	metrics.Read(s)
	seconds := func(i int) time.Duration { return time.Duration(s[i].Value.Float64() * float64(time.Second)) }
	return account{at: time.Now(), live: s[0].Value.Uint64(), allocated: s[1].Value.Uint64(), used: seconds(2), collector: seconds(3), collections: s[4].Value.Uint64()}
}

// arm asks for a call after the next collection.
func (p *pacer) arm() {
	// A finalizer that runs means that there was a collection.
	runtime.SetFinalizer(&struct{ _ [16]byte }{}, func(any) {
		p.collected(takeAccount())
		p.arm()
	})
}

// collected is told what the runtime has counted when the collector has run.
func (p *pacer) collected(is account) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.costs, p.last = p.costs.of(p.last, is), is
	p.leave(p.room(p.costs, is.live, is.at.Before(p.burst)), is.live)
}

// hurry begins a burst at once, or has it last longer: the collection before it was one of
// a calm process, and the next may be near.
func (p *pacer) hurry(at time.Time, look func() account) {
	p.mu.Lock()
	defer p.mu.Unlock()
	goesOn := at.Before(p.burst)
	if p.burst = at.Add(p.BurstFor); goesOn {
		return
	}
	if live := look().live; percent(p.room(p.costs, live, true), live) > p.now {
		p.leave(p.room(p.costs, live, true), live)
	}
}

// leave sets the room, and has memory given back later, unless this is less than what was
// in use before, which is still to be given back. The caller has the lock.
func (p *pacer) leave(room, live uint64) {
	p.set(max(p.Percent, percent(room, live)))
	if p.now == p.Percent || room < p.most/2 {
		return
	}
	p.most = max(p.most, room)
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

// relax has memory given back when a load is over: with its percentage, the next collection
// may be minutes away.
func (p *pacer) relax() {
	p.mu.Lock()
	p.most = 0
	p.set(p.Percent)
	p.mu.Unlock()
	debug.FreeOSMemory()
}
