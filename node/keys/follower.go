package keys

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"skein.io/skein/consensus/keyring"
)

// ErrNoRecord says that the store has no record of keys yet: the leader of a cluster of an earlier version is about to make it.
var ErrNoRecord = errors.New("the store has no record of the cluster's keys yet")

// FollowerConfig is what a Follower needs.
type FollowerConfig struct {
	Holder *keyring.Holder
	// Read gives the record, linearizably; nil when there is none.
	Read func(ctx context.Context) (*Record, error)
	// Fetch gets a key from another replica.
	Fetch func(ctx context.Context, id string) error
	// Compacted tells whether this node's own copy of a shard has forgotten what was before the revision; true as well when this node
	// has no copy.
	Compacted func(ctx context.Context, shard string, revision int64) (bool, error)
	// Changed gets a value after the record may have changed.
	Changed <-chan struct{}
	// Retry is the pause after what could not be done; default 5 s.
	Retry time.Duration
	// Logger; nil discards.
	Logger *slog.Logger
}

// Follower makes the ring of a replica follow the record in the store.
type Follower struct{ cfg FollowerConfig }

// NewFollower returns a Follower; it does nothing by itself.
func NewFollower(cfg FollowerConfig) *Follower {
	if cfg.Retry == 0 {
		cfg.Retry = 5 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Follower{cfg}
}

// Sync reads the record and follows it. After a return without error the ring has the primary key of a moment after the call, and seals
// with it: so it is called before a replica serves. more tells that retired keys are still needed.
func (f *Follower) Sync(ctx context.Context) (more bool, err error) {
	r, err := f.cfg.Read(ctx)
	if err != nil {
		return false, err
	}
	if r == nil {
		return false, ErrNoRecord
	}
	ring, _ := f.cfg.Holder.Ring()
	if !ring.Has(r.Primary) {
		if err := f.cfg.Fetch(ctx, r.Primary); err != nil {
			return false, fmt.Errorf("this node lacks the key %s with which the cluster seals: %w", r.Primary, err)
		}
	}
	if _, err := f.cfg.Holder.Update(func(k keyring.Ring) (keyring.Ring, error) { return k.Use(r.Primary) }); err != nil {
		return false, err
	}
	for _, x := range r.Retired {
		waits, err := f.drop(ctx, x, r.Primary)
		if err != nil {
			return true, err
		}
		more = more || waits
	}
	return more, nil
}

// drop takes a retired key off the ring, if nothing that this node still has needs it.
func (f *Follower) drop(ctx context.Context, x Retired, primary string) (waits bool, err error) {
	if ring, _ := f.cfg.Holder.Ring(); !ring.Has(x.Key) || x.Key == primary {
		return false, nil
	}
	for shard, revision := range x.Revisions {
		if ok, err := f.cfg.Compacted(ctx, shard, revision); err != nil || !ok {
			return true, err
		}
	}
	if _, err := f.cfg.Holder.Update(func(k keyring.Ring) (keyring.Ring, error) { return k.Drop(x.Key) }); err != nil {
		return true, err
	}
	f.cfg.Logger.Info("a retired key has been destroyed here", "key", x.Key)
	return false, nil
}

// Run follows until ctx ends.
func (f *Follower) Run(ctx context.Context) {
	said := ""
	for ctx.Err() == nil {
		more, err := f.Sync(ctx)
		if err != nil && ctx.Err() == nil && err.Error() != said {
			said = err.Error()
			f.cfg.Logger.Warn("the key ring cannot follow the cluster's", "err", err)
		} else if err == nil {
			said = ""
		}
		pause := idleLook
		if more || err != nil {
			pause = f.cfg.Retry
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-f.cfg.Changed:
		case <-t.C:
		}
		t.Stop()
	}
}
