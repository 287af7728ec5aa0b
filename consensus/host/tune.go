package host

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"strconv"
	"sync"
	"time"
)

const (
	// monitorSlack is how much longer than it asks for the monitor of Go's runtime may
	// sleep, in nanoseconds; Linux's default is 50 us. The monitor asks for 20 us again
	// and again while anything runs, and each waking costs more than what it does: with a
	// slack of 500 us a write costs a tenth less CPU, a linearizable read a sixth. What
	// waits for it, a goroutine behind another one's long system call when no processor
	// is idle, waits so much longer at most.
	monitorSlack = 500_000
	// busyRate of allocation, in bytes a second, is from where on a process counts as
	// busy. An idle node is far below.
	busyRate = 4 << 20
	maxGC    = 400 // percent
	// calmAfter is for how long there must be no collection for the load to be over.
	calmAfter = 5 * time.Second
	// startFor is how long a process starts. Its garbage does not count as load: between
	// it lies what stays, and the pages that they share never become free.
	startFor = 20 * time.Second
)

// Tune fits Go's runtime to a process that runs a Host: its monitor thread wakes up
// less often, and under load the collector does: once for so many bytes that are
// allocated (busyAlloc), or less often. That is also how much more memory it takes
// under load; it goes back when the load ends. gcPercent is what GOGC would be without
// load; 0 leaves the collector as it is. To be called once, early.
func Tune(gcPercent int, busyAlloc uint64) error {
	if gcPercent > 0 {
		debug.SetGCPercent(gcPercent)
		pacing.Do((&gcPacer{base: gcPercent, now: gcPercent, busyAlloc: busyAlloc, started: time.Now(), at: time.Now()}).arm)
	}
	return calmMonitor()
}

// calmMonitor finds the monitor thread: the runtime starts it first, and the kernel
// lists threads as they were started. If it were another one, that one's timers would
// be a little late.
func calmMonitor() error {
	d, err := os.Open("/proc/self/task")
	if err != nil {
		return fmt.Errorf("host: %w", err)
	}
	defer d.Close()
	names, err := d.Readdirnames(2)
	if err != nil || len(names) < 2 {
		return fmt.Errorf("host: threads of this process: %v, %w", names, err)
	}
	if err := os.WriteFile("/proc/"+names[1]+"/timerslack_ns", []byte(strconv.Itoa(monitorSlack)), 0); err != nil {
		return fmt.Errorf("host: %w", err) // it needs CAP_SYS_NICE
	}
	return nil
}

// pacing is begun once: the collector is the process's.
var pacing sync.Once

// gcPacer looks at the heap after each collection.
type gcPacer struct {
	mu        sync.Mutex // guards the rest
	base, now int        // percent
	busyAlloc uint64
	started   time.Time
	calm      *time.Timer // nil: the process has not been busy yet
	at        time.Time
	allocated uint64
}

// arm asks for a call after the next collection.
func (p *gcPacer) arm() {
	// A finalizer that runs means that there was a collection.
	runtime.SetFinalizer(&struct{ _ [16]byte }{}, func(any) {
		s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/heap/allocs:bytes"}}
		metrics.Read(s)
		p.mu.Lock()
		if next := p.next(time.Now(), s[0].Value.Uint64(), s[1].Value.Uint64()); next != p.now {
			p.now = next
			debug.SetGCPercent(next)
		}
		p.relaxLater()
		p.mu.Unlock()
		p.arm()
	})
}

// relaxLater has memory given back when there was no collection for a while: with a
// percentage for load, the next would be minutes away. The caller has the lock.
func (p *gcPacer) relaxLater() {
	switch {
	case p.now == p.base: // what it had in use before is still to be given back
	case p.calm == nil:
		p.calm = time.AfterFunc(calmAfter, p.relax)
	default:
		p.calm.Reset(calmAfter)
	}
}

func (p *gcPacer) relax() {
	p.mu.Lock()
	p.now = p.base
	debug.SetGCPercent(p.base)
	p.mu.Unlock()
	debug.FreeOSMemory()
}

// next is the percentage from now on, when so many bytes of the heap are live and so
// many have been allocated in all. Small changes are not worth stopping the world.
func (p *gcPacer) next(now time.Time, live, allocated uint64) int {
	rate := float64(allocated-p.allocated) / max(now.Sub(p.at).Seconds(), 1e-3)
	p.at, p.allocated = now, allocated
	if rate < busyRate || now.Sub(p.started) < startFor {
		return p.base
	}
	want := max(p.base, min(maxGC, int(p.busyAlloc*100/max(live, 1))))
	if d := want - p.now; p.now > p.base && d < p.now/4 && -d < p.now/4 {
		return p.now
	}
	return want
}
