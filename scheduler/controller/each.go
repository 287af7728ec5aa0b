package controller

import (
	"context"
	"errors"

	"k8s.io/client-go/util/workqueue"
)

// parallel bounds the requests of one Each that are under way at once.
const parallel = 16

// Each does fn for all items, in batches that double as long as all of one
// succeed (upstream's slow start): where every request is refused, a large owner
// must not ask a thousand times. It returns the items for which fn succeeded.
func Each[T any](ctx context.Context, items []T, fn func(T) error) (done []T, err error) {
	for batch := 1; len(items) > 0 && err == nil; batch *= 2 {
		now := items[:min(batch, len(items))]
		errs := make([]error, len(now))
		workqueue.ParallelizeUntil(ctx, min(len(now), parallel), len(now), func(i int) { errs[i] = fn(now[i]) })
		for i := range now {
			if errs[i] == nil {
				done = append(done, now[i])
			}
		}
		if err = errors.Join(errs...); err == nil {
			err = ctx.Err()
		}
		items = items[len(now):]
	}
	return done, err
}
