package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/consensus/shard"
)

const (
	// holdLimit is when a leader ends a hold that nobody has released: the node
	// that made it has died or lost its way.
	holdLimit = 2 * time.Second
	// cutTimeout bounds one attempt to hold all shards; writers wait no longer for
	// it. cutAttempts of them are made, cutPause apart and growing.
	cutTimeout  = time.Second
	cutAttempts = 8
	cutPause    = 100 * time.Millisecond
)

// ShardImage is one shard's part of a Cut.
type ShardImage struct {
	Shard shard.Shard
	*mvcc.Image
	done <-chan struct{} // of the replica
}

// WriteTo implements io.WriterTo, once. It ends early with the replica.
func (i ShardImage) WriteTo(w io.Writer) (int64, error) { return i.Write(w, i.done) }

// Cut is the state of all shards at one moment of the cluster: every write whose
// answer somebody had before a write that is in it is in it too, also when the
// two are in different shards. Close it.
type Cut struct {
	// Images by shard ID.
	Images []ShardImage
	// Held is how long writers had to wait at most.
	Held time.Duration
	// Attempts is how many holds were needed.
	Attempts int
}

// Close releases the images. Idempotent.
func (c *Cut) Close() error {
	var err error
	for _, i := range c.Images {
		err = errors.Join(err, i.Close())
	}
	return err
}

// Cut makes a cut from this node's replicas, of which it must have one of every
// shard (ErrNoReplica), and close it before the Host, which waits for that.
//
// Every shard is held, its image is pinned, and it is released. A write that was
// acknowledged after a shard's hold was so after all holds, because no shard is
// released earlier; what follows from it is therefore in no shard's image. A
// release that succeeds proves that the hold was in force all the time; if one
// does not, because a leader changed, the cut is worth nothing and made again.
func (h *Host) Cut(ctx context.Context) (*Cut, error) {
	var rs []*replica
	for _, s := range h.cfg.Shards.Shards() {
		r, err := h.byName(s.Name)
		if err != nil {
			return nil, fmt.Errorf("backup: %w", err)
		}
		rs = append(rs, r)
	}
	var err error
	for n := range cutAttempts {
		if n > 0 {
			pause := time.Duration(n) * cutPause
			select {
			case <-ctx.Done():
				return nil, fmt.Errorf("backup: %w", errors.Join(err, ctx.Err()))
			case <-time.After(pause/2 + rand.N(pause)): // two backups at once must not meet again
			}
		}
		// Caught up first, so that the hold has nothing to wait for.
		if err = h.eachReplica(rs, func(_ int, r *replica) error { return r.ReadIndex(ctx) }); err != nil {
			continue
		}
		var c *Cut
		if c, err = h.cutOnce(ctx, rs); err == nil {
			c.Attempts = n + 1
			return c, nil
		}
		h.log.Info("the cut of the shards failed and is tried again", "attempt", n+1, "error", err)
	}
	return nil, fmt.Errorf("backup: the shards could not be held together in %d attempts: %w", cutAttempts, err)
}

func (h *Host) eachReplica(rs []*replica, f func(int, *replica) error) error {
	errs := make([]error, len(rs))
	var wg sync.WaitGroup
	for i, r := range rs {
		wg.Go(func() {
			if err := f(i, r); err != nil {
				errs[i] = fmt.Errorf("shard %s: %w", r.shard.Name, err)
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (h *Host) cutOnce(ctx context.Context, rs []*replica) (*Cut, error) {
	ctx, cancel := context.WithTimeout(ctx, cutTimeout)
	defer cancel()
	id := h.ids.Next()
	c := &Cut{Images: make([]ShardImage, len(rs))}
	began := time.Now()
	err := h.eachReplica(rs, func(_ int, r *replica) error { return r.holdCommand(ctx, mvcc.KindHold, id) })
	if err == nil {
		err = h.eachReplica(rs, func(i int, r *replica) error {
			if h.beforePin != nil {
				h.beforePin(r.shard.Name)
			}
			image, err := r.machine.Pin()
			c.Images[i] = ShardImage{r.shard, image, r.ctx.Done()}
			return err
		})
	}
	// Also after a failure, and for longer than ctx: a hold may still be on its way.
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cutTimeout)
	defer cancel()
	released := h.eachReplica(rs, func(_ int, r *replica) error { return r.holdCommand(rctx, mvcc.KindRelease, id) })
	c.Held = time.Since(began)
	if err == nil {
		err = released
	}
	if err != nil {
		for _, i := range c.Images {
			if i.Image != nil {
				err = errors.Join(err, i.Close())
			}
		}
		return nil, err
	}
	return c, nil
}

// holdCommand puts a hold or its release into the log and returns its result.
func (r *replica) holdCommand(ctx context.Context, kind mvcc.Kind, id uint64) error {
	for {
		changed := r.wait()
		c := mvcc.Command{Kind: kind, Epoch: r.machine.LeaderTerm(), Hold: id,
			Request: &pb.InternalRaftRequest{Header: &pb.RequestHeader{ID: r.h.ids.Next()}}}
		res, err := r.proposeOnce(ctx, nil, c)
		switch {
		case err == nil && kind == mvcc.KindHold && errors.Is(res.Err, mvcc.ErrSuperseded): // not applied: again
		case err == nil:
			return res.Err
		case !errors.Is(err, errRetry):
			return err
		default:
			if err := r.pause(ctx, nil, changed); err != nil {
				return err
			}
		}
	}
}

// holdLoop ends holds that outlast holdLimit while this replica leads.
func (r *replica) holdLoop() {
	var seen uint64
	var since time.Time
	for {
		changed := r.wait()
		id := r.machine.Hold()
		if id != seen {
			seen, since = id, time.Now()
		}
		var expired <-chan time.Time
		if id != 0 {
			expired = time.After(max(holdLimit-time.Since(since), retryPause))
		}
		select {
		case <-r.ctx.Done():
			return
		case <-changed:
		case <-expired:
			if !r.Leads() || r.machine.Hold() != id {
				continue
			}
			ctx, cancel := context.WithTimeout(r.ctx, commandTimeout)
			err := r.holdCommand(ctx, mvcc.KindRelease, id)
			cancel()
			r.log.Warn("ended a hold that was not released", "hold", id, "after", time.Since(since).Round(time.Millisecond), "error", err)
		}
	}
}
