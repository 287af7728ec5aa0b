package daemon

import (
	"context"
	"path/filepath"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"skein.io/skein/consensus/host"
	"skein.io/skein/node/api/store/fanout"
	"skein.io/skein/scheduler"
)

const (
	// gcPercent trades a little CPU for memory: an idle node has CPU to spare, and an edge node little memory. An idle leader allocates some
	// 300 KB a second, so it collects about once in half a minute, for 50 ms.
	gcPercent = 25
	// startPercent is in force while a node with a large store (largeStore bytes) starts, which allocates five times what stays of it: with gcPercent a third of
	// that would be collecting. It leaves 4 MB more that are in use in part; with a small store, where a start is short anyway, they count.
	startPercent = 100
	largeStore   = 8 << 20
	// busyHeap, leastRoom and mostRoom rule under load (host.Pace). The collector marks some 40 MB in a node with an API, and half as much again for
	// 10,000 pods. A pod's creation allocates some 300 KB, a list of 500 a few MB.
	busyHeap  = 144 << 20
	leastRoom = 32 << 20
	mostRoom  = 96 << 20
	// roomPerNode is how much more may be allocated between two collections in a burst, for each node of the cluster: a leader has some 20 KB in use
	// for each and its pods, and with thousands of them would do little else than mark that.
	roomPerNode = 16 << 10
	// burstPercent of what is in use may be allocated between two collections while a leader binds at least burstOf pods a second: marking is
	// half of what a binding costs without. burstMost bounds it, and so does the machine: one part of its memory in burstPart.
	burstPercent = 200
	burstMost    = 256 << 20
	burstPart    = 32
	burstOf      = 32
	// crowd is how many first lists of watches are streamed at once when memory counts more than processor time: clients that all come back, after a
	// change of the leader or a restart, wait for each other anyway.
	crowd = 8
	// calmAfter a load its memory is given back.
	calmAfter = 10 * time.Second
	// trimAfter is when start-up is over and what only it used can be given back.
	trimAfter = 10 * time.Second
	// trimEvery is how often what was read of files is given back. That takes about a millisecond, and as long again to come back.
	trimEvery = time.Minute
)

// clusterSize is how many nodes there are, as far as this process knows: the collector is the process's.
var clusterSize atomic.Uint64

// tuneRuntime sets the collector, unless the operator did, and calms the runtime's monitor thread.
func tuneRuntime(stateDir string) error {
	start := gcPercent
	if storeSize(stateDir) >= largeStore {
		start = startPercent
	}
	return host.Tune(host.Pace{Percent: gcPercent, StartPercent: start, BusyHeap: busyHeap, LeastRoom: leastRoom, MostRoom: mostRoom, CalmAfter: calmAfter,
		BurstPercent: burstPercent, BurstMost: burstRoom(),
		More:  func() uint64 { return clusterSize.Load() * roomPerNode },
		Crowd: func() bool { return fanout.Walking() >= crowd }})
}

// burstRoom is what may be allocated between two collections in a burst, in bytes.
func burstRoom() uint64 {
	var i unix.Sysinfo_t
	if unix.Sysinfo(&i) != nil {
		return leastRoom
	}
	return max(leastRoom, min(burstMost, uint64(i.Totalram)*uint64(i.Unit)/burstPart))
}

// hurried is a Binder that says when there is a burst of bindings.
type hurried struct {
	scheduler.Binder

	mu    sync.Mutex // guards the rest
	since time.Time
	n     int // pods since then
}

// Bind implements scheduler.Binder.
func (h *hurried) Bind(ctx context.Context, all []*corev1.Binding, done func(i int, err error)) {
	if h.many(time.Now(), len(all)) {
		host.Burst()
	}
	h.Binder.Bind(ctx, all, done)
}

// many counts pods, and tells whether there are many a second.
func (h *hurried) many(now time.Time, n int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if now.Sub(h.since) > time.Second {
		h.since, h.n = now, 0
	}
	h.n += n
	return h.n >= burstOf
}

// storeSize is how much of the disk the files take that replicas on this node keep the store in, in bytes. They have holes.
func storeSize(stateDir string) (n int64) {
	files, _ := filepath.Glob(filepath.Join(stateDir, "raft", "shard-*", "db.*")) // the pattern is good
	for _, f := range files {
		var i unix.Stat_t
		if unix.Stat(f, &i) == nil {
			n += i.Blocks * 512 // stat's unit, whatever the file system's
		}
	}
	return n
}

// trimMemory gives back what starting used: some time after the node became ready, and after it began to lead; and now and then what
// was read of files.
func (n *node) trimMemory(ctx context.Context) error {
	if n.awaitReady(ctx) != nil {
		return nil
	}
	for pause(ctx, trimAfter) {
		debug.FreeOSMemory()
		n.logIf("give memory back", host.TrimMapped())
		for again := false; !again && ctx.Err() == nil; {
			select {
			case <-ctx.Done():
			case <-n.leads:
				again = true
			case <-time.After(trimEvery):
				n.logIf("give memory back", host.TrimMapped())
			}
		}
	}
	return nil
}
