package host

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// reads makes many linearizable reads share a round of messages to the voters, as
// etcd does: while one is under way, who comes waits for the next one, which is begun
// when it ends. Before a round begins, all others that can run may run, and join it. A
// lone reader pays nothing for either.
type reads struct {
	mu       sync.Mutex // guards the rest
	underWay bool
	open     *readRound // is about to be begun, nil if none is
	next     *readRound // waits for the end of the one that is under way, nil if none does
}

// readRound is one round. Who waits for it began to wait before it was begun, so its
// answer holds for all of them.
type readRound struct {
	begin chan struct{} // closed when it is open, to be begun by who runs it
	done  chan struct{} // closed when err is set
	err   error
}

// join enters the next round. Who gets mine runs it, once begin is closed, and calls
// end; the others wait for its done.
func (q *reads) join() (round *readRound, mine bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.next != nil {
		return q.next, false
	}
	if q.open != nil {
		return q.open, false
	}
	round = &readRound{begin: make(chan struct{}), done: make(chan struct{})}
	if q.underWay {
		q.next = round
	} else {
		q.underWay = true
		q.open = round
		close(round.begin)
	}
	return round, true
}

// begin lets nobody join the open round any more.
func (q *reads) begin() {
	q.mu.Lock()
	q.open = nil
	q.mu.Unlock()
}

// end gives the round's answer to all who wait for it, and begins the next one.
func (q *reads) end(round *readRound, err error) {
	round.err = err
	q.mu.Lock()
	if q.open == round {
		q.open = nil
	}
	if q.next == round { // it was never begun
		q.next = nil
	} else if q.next != nil {
		close(q.next.begin)
		q.open, q.next = q.next, nil
	} else {
		q.underWay = false
	}
	q.mu.Unlock()
	close(round.done)
}

// errAgain: whoever ran the round has gone away.
var errAgain = errors.New("host: the read has to be repeated")

// ReadIndex implements etcdapi.Replica: when it returns nil, the local state
// holds everything that was acknowledged before the call. A read that is lost
// with a dying leader is asked again as soon as there is a new one.
func (r *replica) ReadIndex(ctx context.Context) error {
	late := r.h.late.begin(time.Now())
	for {
		if err := r.unreachable(); err != nil && !isPatient(ctx) {
			return err // also when it was cut off while this read waited
		}
		changed := r.wait()
		err := r.readTogether(ctx, late, changed)
		switch {
		case err == nil:
			if !r.caughtUp.Load() {
				r.caughtUp.Store(true)
			}
			return nil
		case errors.Is(err, errAgain):
		case !errors.Is(err, errRetry):
			return err
		default:
			if err := r.pause(ctx, late, changed); err != nil {
				return err
			}
		}
	}
}

// readTogether takes part in one round.
func (r *replica) readTogether(ctx context.Context, late, changed <-chan struct{}) error {
	round, mine := r.reads.join()
	wait := round.begin
	if !mine {
		wait = round.done
	}
	var stopped error
	select {
	case <-wait:
	case <-ctx.Done():
		stopped = ctxError(ctx)
	case <-late:
		stopped = rpctypes.ErrGRPCTimeout
	case <-r.ctx.Done():
		stopped = rpctypes.ErrGRPCStopped
	}
	switch {
	case !mine && stopped == nil:
		return round.err
	case !mine:
		return stopped
	case stopped != nil:
		r.reads.end(round, errAgain)
		return stopped
	}
	runtime.Gosched() // who can join now, does
	r.reads.begin()
	err, own := r.readIndexOnce(ctx, late, changed)
	shared := err
	if own {
		shared = errAgain // the others may have more time
	}
	r.reads.end(round, shared)
	return err
}

// readIndexOnce runs a round. own tells that it is this reader who has no more time.
func (r *replica) readIndexOnce(ctx context.Context, late, changed <-chan struct{}) (err error, own bool) {
	rs, err := r.h.nh.ReadIndex(uint64(r.shard.ID), max(r.ElectionTimeout(), r.h.cfg.RTT))
	if err != nil {
		return requestError(err), false
	}
	select {
	case v := <-rs.AppliedC():
		defer rs.Release()
		switch {
		case v.Completed():
			return nil, false
		case v.Terminated():
			return rpctypes.ErrGRPCStopped, false
		default: // dropped, timed out: reads may always be repeated
			return errRetry, false
		}
	case <-changed:
		return errRetry, false
	case <-ctx.Done():
		return ctxError(ctx), true
	case <-late:
		return rpctypes.ErrGRPCTimeout, true
	case <-r.ctx.Done():
		return rpctypes.ErrGRPCStopped, false
	}
}
