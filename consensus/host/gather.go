package host

import (
	"context"
	"runtime"
	"sync"

	"github.com/lni/dragonboat/v4"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"skein.io/skein/consensus/mvcc"
)

const (
	// A gathered batch has at most so many commands, and bytes beyond the first one's.
	batchCommands = 256
	batchBytes    = 1 << 20
)

// gather puts the commands of requests that are made at the same time into one entry
// of the log. The first one to come lets all others run that can run now, and then
// proposes what they have left; nobody waits for anything but the processor. So the
// batches grow with the load, and a lone request is as fast as without.
type gather struct {
	mu       sync.Mutex // guards the rest
	open     bool       // somebody is about to propose
	ids      []uint64   // of the requests
	commands [][]byte
	bytes    int
}

// join adds a command to the batch that is about to be proposed. Who gets first has
// to call take; who gets alone proposes by itself, as there is no room.
func (g *gather) join(id uint64, command []byte) (first, alone bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.open && (len(g.ids) >= batchCommands || g.bytes+len(command) > batchBytes) {
		return false, true
	}
	first, g.open = !g.open, true
	g.ids, g.commands = append(g.ids, id), append(g.commands, command)
	g.bytes += len(command)
	return first, false
}

// take closes the batch and returns its entry, and its requests without the taker's.
func (g *gather) take() (others []uint64, entry []byte) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.ids) > 1 {
		others = append(others, g.ids[1:]...)
	}
	entry = mvcc.Batch(g.commands)
	clear(g.commands)
	g.open, g.ids, g.commands, g.bytes = false, g.ids[:0], g.commands[:0], 0
	return others, entry
}

// submit sends a command on its way, perhaps with others. Its result comes through
// the machine's waiters: mvcc.ErrNotProposed if it is not in the log and never will
// be. Who gets a proposal has to watch over it: see watch.
func (r *replica) submit(id uint64, command []byte) (*proposal, error) {
	first, alone := false, true
	if r.mayBatch.Load() {
		first, alone = r.gather.join(id, command)
	}
	var others []uint64
	switch {
	case first:
		runtime.Gosched()
		others, command = r.gather.take()
	case !alone:
		return nil, nil
	}
	rs, err := r.h.nh.Propose(r.session, command, r.h.cfg.RequestTimeout)
	if err != nil {
		r.refuse(others)
		return nil, requestError(err)
	}
	return &proposal{r: r, rs: rs, others: others}, nil
}

func (r *replica) refuse(ids []uint64) {
	for _, id := range ids {
		r.machine.Waiters().Refuse(id)
	}
}

// proposal is an entry on its way. Those whose commands are in it learn from the
// machine that it was applied; that it was not even appended, only who watches.
type proposal struct {
	r      *replica
	rs     *dragonboat.RequestState
	others []uint64 // requests in it but the watcher's
}

// done is nil for no proposal.
func (p *proposal) done() chan dragonboat.RequestResult {
	if p == nil {
		return nil
	}
	return p.rs.AppliedC()
}

// ended takes what done has delivered. It returns an error unless the entry was
// applied; errRetry if it never will be.
func (p *proposal) ended(v dragonboat.RequestResult) error {
	defer p.rs.Release()
	switch {
	case v.Completed():
		return nil
	case v.Dropped():
		p.r.refuse(p.others)
		return errRetry
	case v.Terminated():
		return rpctypes.ErrGRPCStopped
	case v.Timeout():
		return rpctypes.ErrGRPCTimeout
	}
	return errUnknownResult
}

// leave is for a watcher that goes before its proposal has ended: somebody has to
// watch for the others. The library ends every proposal after its timeout.
func (p *proposal) leave(ctx context.Context) {
	if p == nil || len(p.others) == 0 {
		return
	}
	p.r.h.mu.RLock()
	defer p.r.h.mu.RUnlock()
	if p.r.h.closed { // nobody waits for goroutines any more, and the requests end by themselves
		return
	}
	p.r.h.wg.Go(func() {
		select {
		case v := <-p.rs.AppliedC():
			_ = p.ended(v)
		case <-ctx.Done():
		}
	})
}
