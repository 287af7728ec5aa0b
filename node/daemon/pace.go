package daemon

import (
	goruntime "runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"time"
)

// pacer sets how often the collector runs. Each time it marks all that is in use, some 40 MB in a node with an API and half as much again for 10,000 pods, and
// that is most of what it costs; so under load it runs the less often the more memory may still be used. Without load, memory counts more than processor time.
type pacer struct {
	mu        sync.Mutex // guards the rest
	now       int        // percent
	start     int        // percent while the node starts
	started   time.Time
	calm      *time.Timer // nil: the process has not been busy yet
	at        time.Time
	allocated uint64
}

const (
	// busyRate of allocation, in bytes a second, is from where on a node counts as busy. An idle one is far below.
	busyRate = 4 << 20
	// busyHeap is how large the heap may become under load, in bytes, so long as that leaves at least leastRoom and at most mostRoom to be allocated
	// between two collections. A pod's creation allocates some 300 KB, a list of 500 a few MB.
	busyHeap  = 144 << 20
	leastRoom = 32 << 20
	mostRoom  = 96 << 20
	// calmAfter is for how long there must be no collection for the load to be over.
	calmAfter = 10 * time.Second
	// startFor is how long a node starts. Its garbage does not count as load: between it lies what stays, and the pages that they share
	// never become free.
	startFor = 20 * time.Second
)

// arm asks for a call after the next collection.
func (p *pacer) arm() {
	// A finalizer that runs means that there was a collection.
	goruntime.SetFinalizer(&struct{ _ [16]byte }{}, func(any) {
		s := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/heap/allocs:bytes"}}
		metrics.Read(s)
		p.mu.Lock()
		p.set(p.next(time.Now(), s[0].Value.Uint64(), s[1].Value.Uint64()))
		switch {
		case p.now == gcPercent: // what it had in use before is still to be given back
		case p.calm == nil:
			p.calm = time.AfterFunc(calmAfter, p.relax)
		default:
			p.calm.Reset(calmAfter)
		}
		p.mu.Unlock()
		p.arm()
	})
}

// set changes the percentage. The caller has the lock.
func (p *pacer) set(percent int) {
	if percent != p.now {
		p.now = percent
		debug.SetGCPercent(percent)
	}
}

// relax has memory given back when there was no collection for a while: with a percentage for load, the next would be minutes away.
func (p *pacer) relax() {
	p.mu.Lock()
	p.set(gcPercent)
	p.mu.Unlock()
	debug.FreeOSMemory()
}

// next is the percentage from now on, when so many bytes of the heap are live and so many have been allocated in all. Small changes are
// not worth stopping the world.
func (p *pacer) next(now time.Time, live, allocated uint64) int {
	rate := float64(allocated-p.allocated) / max(now.Sub(p.at).Seconds(), 1e-3)
	p.at, p.allocated = now, allocated
	switch {
	case now.Sub(p.started) < startFor:
		return p.start
	case rate < busyRate:
		return gcPercent
	}
	room := min(mostRoom, max(leastRoom, busyHeap-min(live, busyHeap)))
	want := max(gcPercent, int(room*100/max(live, 1)))
	if d := want - p.now; p.now > gcPercent && d < p.now/4 && -d < p.now/4 {
		return p.now
	}
	return want
}
