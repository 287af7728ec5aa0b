package daemon

import (
	"context"
	"path/filepath"
	"runtime/debug"
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
	// 300 KB a second, so it collects about three times a minute, for 50 ms.
	gcPercent = 15
	// gcShare of the CPU that a node uses may go to the collector. A pod's creation allocates some 300 KB in a millisecond, a list of 500 a few MB in five, and
	// marking 60 MB takes 60 ms.
	gcShare = 7
	// heapMost is how large the heap may become under load, so long as that leaves leastRoom to mostRoom to be allocated between two collections, and no more than
	// one part of the machine's memory in roomPart.
	heapMost  = 168 << 20
	leastRoom = 48 << 20
	mostRoom  = 128 << 20
	roomPart  = 32
	// burstOf pods bound at once have waited, as when nodes come: that is soon done, and marking would be a third of what it costs. Pods that are just created
	// come a few at a time; what stays of them lies scattered among the garbage of as much as there is room for, and those pages never become free.
	burstOf = 64
	// A node with a large store (largeStore bytes) allocates five times what stays of it while it starts; without startRoom a third of that would be collecting. It leaves
	// 4 MB more that are in use in part, because what stays lies scattered among what does not; with a small store, where a start is short anyway, they count.
	startRoom  = 40 << 20
	largeStore = 8 << 20
	// started is how long after it is ready a node has started, and startMost how long after its process began, whether it is ready or not.
	started   = 3 * time.Second
	startMost = 20 * time.Second
	// crowdRoom is the room while at least crowd first lists of watches are streamed, when memory counts more than processor time: clients that all come back, after
	// a change of the leader or a restart, wait for each other anyway.
	crowd     = 8
	crowdRoom = 32 << 20
	// calmAfter a load its memory is given back.
	calmAfter = 10 * time.Second
	// trimAfter is when what only start-up used can be given back.
	trimAfter = 10 * time.Second
	// trimEvery is how often what was read of files is given back. That takes about a millisecond, and as long again to come back.
	trimEvery = time.Minute
)

// starting tells that this process has not started yet: it has one heap.
var starting atomic.Bool

// tuneRuntime sets the collector, unless the operator did, and calms the runtime's monitor thread.
func tuneRuntime(stateDir string) error {
	starting.Store(true)
	time.AfterFunc(startMost, func() { starting.Store(false) })
	first := uint64(0)
	if storeSize(stateDir) >= largeStore {
		first = startRoom
	}
	part := uint64(mostRoom)
	var i unix.Sysinfo_t
	if unix.Sysinfo(&i) == nil {
		part = uint64(i.Totalram) * uint64(i.Unit) / roomPart
	}
	return host.Tune(host.Pace{Percent: gcPercent, Share: gcShare, CalmAfter: calmAfter, Most: func(live uint64) uint64 {
		switch {
		case starting.Load():
			return first
		case fanout.Walking() >= crowd:
			return min(part, crowdRoom)
		}
		return min(part, underLoad(live))
	}})
}

// underLoad is how many bytes may be allocated between two collections, with so many in use.
func underLoad(live uint64) uint64 {
	return min(mostRoom, max(leastRoom, heapMost-min(live, heapMost)))
}

// hurried is a Binder that says when there is a burst of bindings.
type hurried struct{ scheduler.Binder }

// Bind implements scheduler.Binder.
func (h hurried) Bind(ctx context.Context, all []*corev1.Binding, done func(i int, err error)) {
	if len(all) >= burstOf {
		host.Burst()
	}
	h.Binder.Bind(ctx, all, done)
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
	if pause(ctx, started) {
		starting.Store(false)
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
