package fanout

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// askEvery is how often a watch that catches up asks whether it has: the answer comes only when it has.
const askEvery = 20 * time.Millisecond

// streams numbers the streams of those who catch up: the store tells progress to whole streams.
var streams atomic.Int64

// subscribe brings a watcher that knows everything up to a revision to the hub. When the hub's history does not reach back to it, the
// store is watched for this one watcher until it does.
func (w *watcher) subscribe(h *hub, after int64) error {
	ok, alive := h.subscribe(w, after)
	if ok {
		return nil
	}
	if !alive {
		return errEnded
	}
	if err := w.f.cfg.Walks.take(w.ctx); err != nil {
		return err
	}
	defer w.f.cfg.Walks.give()
	return w.catchUp(h, after)
}

func (w *watcher) catchUp(h *hub, after int64) error {
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(clientv3.WithRequireLeader(w.ctx), "skein-catch-up", fmt.Sprint(streams.Add(1))))
	defer cancel()
	opts := []clientv3.OpOption{clientv3.WithRev(after + 1), clientv3.WithPrevKV()}
	if w.key[len(w.key)-1] == '/' {
		opts = append(opts, clientv3.WithPrefix())
	}
	changes := w.f.cfg.Client.Watch(ctx, w.key, opts...)
	ask := time.NewTicker(askEvery)
	defer ask.Stop()
	for {
		select {
		case r, open := <-changes:
			switch {
			case !open:
				return errEnded
			case r.CompactRevision != 0:
				return rpctypes.ErrCompacted
			case r.Err() != nil:
				return r.Err()
			case r.IsProgressNotify():
				after = max(after, r.Header.Revision)
			}
			for _, e := range r.Events {
				ev, err := newEvent(e)
				if errors.Is(err, errNoPrevious) { // it has been compacted since the watch began
					return rpctypes.ErrCompacted
				}
				if err != nil {
					return err
				}
				w.after = 0 // not subscribed yet: tell everything
				if err := w.tell(ev); err != nil {
					return err
				}
				after = ev.rev
			}
			ok, alive := h.subscribe(w, after)
			if !alive {
				return errEnded
			}
			if ok {
				return nil
			}
		case <-ask.C:
			_ = w.f.cfg.Client.RequestProgress(ctx) // asked again soon
		case <-w.ctx.Done():
			return w.ctx.Err()
		}
	}
}
