package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// history is what upstream keeps: a watch or a paged list may go on from a revision of at least
// this age.
const history = 5 * time.Minute

// Compact drops superseded revisions of all stores behind f that are older than history, until ctx
// ends. One caller in the cluster is enough. A store that nobody writes to is left alone. Requests
// carry the context's values. report gets what failed; it is tried again after history.
func (f *Factory) Compact(ctx context.Context, report func(error)) {
	states := map[opened]compaction{}
	tick := time.NewTicker(history)
	defer tick.Stop()
	for {
		for _, o := range f.stores() {
			next, err := states[o].advance(ctx, o, o.key)
			if err != nil && ctx.Err() == nil {
				report(fmt.Errorf("compact the store of %s: %w", o.key, err))
			}
			states[o] = next
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// stores gives each client once.
func (f *Factory) stores() []opened {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.opened)
}

// compaction is what is known of one store.
type compaction struct {
	seen int64 // the store's revision at the last look
	done int64 // compacted up to here
}

// due gives the revision to compact, or zero.
func (c compaction) due() int64 {
	if c.seen > c.done {
		return c.seen
	}
	return 0
}

// advance compacts to what was seen last time, and looks again, at key.
func (c compaction) advance(ctx context.Context, store clientv3.KV, key string) (compaction, error) {
	if rev := c.due(); rev != 0 {
		if _, err := store.Compact(ctx, rev); err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
			return c, fmt.Errorf("to revision %d: %w", rev, err)
		}
		c.done = rev
	}
	// Any answer carries the revision.
	r, err := store.Get(ctx, key, clientv3.WithCountOnly())
	if err != nil {
		return c, fmt.Errorf("look at its revision: %w", err)
	}
	c.seen = r.Header.Revision
	return c, nil
}
