package daemon

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

// TestBreaker holds a part and lets it go on; a part that ends by itself ends run.
func TestBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var running, starts atomic.Int32
		die := make(chan error)
		part := func(ctx context.Context) error {
			running.Add(1)
			starts.Add(1)
			defer running.Add(-1)
			select {
			case <-ctx.Done():
				return ctx.Err()
			case err := <-die:
				return err
			}
		}
		b := newBreaker()
		ended := make(chan error, 1)
		go func() { ended <- b.run(t.Context(), part) }()
		goOn, err := b.hold(t.Context())
		if err != nil || running.Load() != 0 || starts.Load() != 1 {
			t.Fatalf("held: %v, %d running, %d starts", err, running.Load(), starts.Load())
		}
		goOn()
		goOn()
		synctest.Wait()
		if running.Load() != 1 || starts.Load() != 2 {
			t.Fatalf("let go: %d running, %d starts", running.Load(), starts.Load())
		}
		sick := errors.New("sick")
		die <- sick
		if err := <-ended; !errors.Is(err, sick) {
			t.Errorf("run gave %v, want %v", err, sick)
		}
		// Nobody is there to be held any more.
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := b.hold(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("hold of an ended part gave %v", err)
		}
	})
}
