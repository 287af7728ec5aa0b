package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/consensus/shard"
)

const (
	fencePause = 25 * time.Millisecond
	// fenceAfter is how long a deposed leader goes on: one that has not noticed.
	fenceAfter = 10 * time.Second
)

// fenceKeys are under the prefixes of the shards of shard.Default.
var fenceKeys = map[string]string{
	"system": "/chaos/fence/leader", "pods": "/registry/pods/chaos/fence/leader", "events": "/registry/events/chaos/fence/leader",
}

// fenceWriter acts for the leader of the cluster: it writes "fence.TERM.NODE.N" to
// each shard, with that term, and does not stop when it is deposed but when it is
// refused. So the terms in each shard's log must never go down.
type fenceWriter struct {
	h      *host.Host
	cancel context.CancelFunc
	wg     sync.WaitGroup

	written, refused, deposed atomic.Int64
}

func startFenceWriter(h *host.Host) *fenceWriter {
	ctx, cancel := context.WithCancel(context.Background())
	f := &fenceWriter{h: h, cancel: cancel}
	f.wg.Go(func() {
		_ = h.Lead(ctx, "system", func(reign context.Context, term uint64) { // ends with ctx or the host
			for _, s := range h.Shards().Shards() {
				if fenceKeys[s.Name] != "" {
					f.wg.Go(func() { f.write(ctx, reign, s, term) })
				}
			}
			<-reign.Done()
		})
	})
	return f
}

func (f *fenceWriter) write(ctx, reign context.Context, s shard.Shard, term uint64) {
	var until time.Time
	for n := 0; ctx.Err() == nil; n++ {
		if reign.Err() != nil {
			if until.IsZero() {
				until = time.Now().Add(fenceAfter)
				f.deposed.Add(1)
			}
			if time.Now().After(until) {
				return
			}
		}
		if c, ok := f.h.Client(s.Name); ok {
			wctx, cancel := context.WithTimeout(host.WithTerm(ctx, term), 2*time.Second)
			_, err := c.Put(wctx, fenceKeys[s.Name], fmt.Sprintf("fence.%d.%s.%d", term, f.h.NodeHostID(), n))
			cancel()
			switch {
			case err == nil:
				f.written.Add(1)
			case errors.Is(err, mvcc.ErrFenced):
				f.refused.Add(1)
				return
			}
		}
		select {
		case <-time.After(fencePause):
		case <-ctx.Done():
		}
	}
}

func (f *fenceWriter) counts() map[string]int64 {
	if f == nil {
		return nil
	}
	return map[string]int64{"written": f.written.Load(), "refused": f.refused.Load(), "deposed": f.deposed.Load()}
}

func (f *fenceWriter) close() {
	f.cancel()
	f.wg.Wait()
}
