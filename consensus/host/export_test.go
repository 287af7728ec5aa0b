package host

import (
	"context"

	"skein.io/skein/consensus/mvcc"
)

// Hold holds a shard as Cut does, and forgets it.
func (h *Host) Hold(ctx context.Context, shardName string) error {
	r, err := h.byName(shardName)
	if err != nil {
		return err
	}
	return r.holdCommand(ctx, mvcc.KindHold, h.ids.Next())
}

// BeforePin is called before a shard's image is pinned. Set it before a Cut.
func (h *Host) BeforePin(f func(shardName string)) { h.beforePin = f }
