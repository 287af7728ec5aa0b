package desired

import (
	"context"
	"sync"
)

// followers are goroutines that each look after one thing, for as long as it is wanted. One goroutine owns them.
type followers[K comparable] struct {
	wg      sync.WaitGroup
	running map[K]context.CancelFunc
}

// keep ends those that are not wanted any more.
func (f *followers[K]) keep(wanted func(K) bool) {
	for k, stop := range f.running {
		if !wanted(k) {
			stop()
			delete(f.running, k)
		}
	}
}

// start begins to look after k with run, unless that is done already.
func (f *followers[K]) start(ctx context.Context, k K, run func(context.Context)) {
	if f.running[k] != nil {
		return
	}
	if f.running == nil {
		f.running = map[K]context.CancelFunc{}
	}
	ctx, f.running[k] = context.WithCancel(ctx)
	f.wg.Go(func() { run(ctx) })
}

// end ends all and waits for them.
func (f *followers[K]) end() {
	f.keep(func(K) bool { return false })
	f.wg.Wait()
}
