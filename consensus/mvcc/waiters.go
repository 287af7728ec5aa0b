package mvcc

import (
	"errors"
	"math"
	"sync"
)

var (
	// ErrFenced is the result of a request that acts for a leader of the cluster
	// that has been replaced. The request changed nothing and never will.
	ErrFenced = errors.New("mvcc: fenced: a newer leader of the cluster has taken over")
	// ErrSuperseded is the result of a request that was proposed under a leader
	// of the shard that has been replaced before the request was applied. It
	// changed nothing and never will; proposing it again is safe.
	ErrSuperseded = errors.New("mvcc: superseded by a new leader of the shard")
	// ErrLost is the result of a request whose outcome this replica cannot know,
	// because a snapshot took the place of the entries that would tell.
	ErrLost = errors.New("mvcc: outcome unknown, a snapshot replaced the log")
	// ErrHeld is the result of a request that met a hold. It changed nothing and
	// never will; proposing it again after the hold is safe.
	ErrHeld = errors.New("mvcc: the shard is held for a backup")
	// ErrNotHeld is the result of a release whose hold was not in force any more.
	ErrNotHeld = errors.New("mvcc: the hold has ended before")
	// ErrNotProposed is the result of a request that has not got into the log and never
	// will; proposing it again is safe.
	ErrNotProposed = errors.New("mvcc: not proposed")
	// ErrClosed is returned when the replica has been stopped.
	ErrClosed = errors.New("mvcc: replica stopped")
)

// Result of a request, handed to its proposer on this replica.
type Result struct {
	Resp any // *pb.PutResponse, *pb.TxnResponse, ...
	Err  error
	// Compacted, of a compaction, is closed when the space has been freed.
	Compacted <-chan struct{}
}

// waiterShards spreads the lock of the table; proposers and the apply goroutine
// meet on it for every request.
const waiterShards = 32

// Waiters hands results to the local proposers by request ID, so that no
// response is ever marshalled. The zero value is not usable.
type Waiters struct {
	shards [waiterShards]struct {
		mu sync.Mutex // guards m
		m  map[uint64]waiter
		_  [40]byte // keeps the locks of two shards on two cache lines
	}
}

type waiter struct {
	epoch uint64
	c     chan Result
}

// NewWaiters returns an empty table.
func NewWaiters() *Waiters {
	w := &Waiters{}
	for i := range w.shards {
		w.shards[i].m = map[uint64]waiter{}
	}
	return w
}

// Register announces a request before it is proposed in epoch. The channel gets
// at most one result and is never closed.
func (w *Waiters) Register(id, epoch uint64) <-chan Result {
	c := make(chan Result, 1)
	s := &w.shards[id%waiterShards]
	s.mu.Lock()
	s.m[id] = waiter{epoch: epoch, c: c}
	s.mu.Unlock()
	return c
}

// Forget drops a request that its proposer does not wait for any more.
func (w *Waiters) Forget(id uint64) {
	s := &w.shards[id%waiterShards]
	s.mu.Lock()
	delete(s.m, id)
	s.mu.Unlock()
}

// Refuse completes a request with ErrNotProposed.
func (w *Waiters) Refuse(id uint64) { w.complete(id, Result{Err: ErrNotProposed}) }

func (w *Waiters) complete(id uint64, r Result) {
	s := &w.shards[id%waiterShards]
	s.mu.Lock()
	p, ok := s.m[id]
	delete(s.m, id)
	s.mu.Unlock()
	if ok {
		p.c <- r
	}
}

// failBelow completes every waiter of an epoch below the given one.
func (w *Waiters) failBelow(epoch uint64, err error) {
	for i := range w.shards {
		s := &w.shards[i]
		s.mu.Lock()
		for id, p := range s.m {
			if p.epoch < epoch {
				delete(s.m, id)
				p.c <- Result{Err: err}
			}
		}
		s.mu.Unlock()
	}
}

// Abandon completes all waiters with err, when no result can come any more.
func (w *Waiters) Abandon(err error) { w.failBelow(math.MaxUint64, err) }
