package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"

	"golang.org/x/time/rate"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/clock"
)

// Back-off of a key whose sync fails, and the bound on all retries of one
// controller together. The first delay and the shared bucket are those of
// upstream's default controller rate limiter; the longest delay is shorter
// than its 1000 s, so that a cluster that healed does not wait a quarter of an
// hour, and long enough that a key that can never succeed costs almost nothing.
//
// A view that lags (ErrStaleView, a conflict) passes by itself within
// milliseconds: it has a back-off of its own, up to staleLongest, so that a key
// with a lasting fault besides does not wait minutes for that.
const (
	RetryFirst    = 5 * time.Millisecond
	RetryLongest  = 5 * time.Minute
	staleLongest  = time.Second
	retriesPerSec = 10
	retryBurst    = 100
)

// Queue is a set of keys to work on: a key that is added twice before it is
// worked on is worked on once, and a key that is added while it is worked on is
// worked on once more afterwards. So its size is bounded by the number of
// objects that exist. It is safe for concurrent use.
type Queue[K comparable] struct {
	name string
	// wq makes the queue itself at its first use: it has goroutines, which a
	// controller that never runs must not leave behind.
	wq    func() workqueue.TypedRateLimitingInterface[K]
	stale workqueue.TypedRateLimiter[K]
}

// NewQueue returns an empty queue; name is its controller's.
func NewQueue[K comparable](name string, clk clock.WithTicker) *Queue[K] {
	if clk == nil {
		clk = clock.RealClock{}
	}
	limiter := workqueue.NewTypedMaxOfRateLimiter[K](
		workqueue.NewTypedItemExponentialFailureRateLimiter[K](RetryFirst, RetryLongest),
		&workqueue.TypedBucketRateLimiter[K]{Limiter: rate.NewLimiter(rate.Limit(retriesPerSec), retryBurst)},
	)
	return &Queue[K]{
		name: name,
		wq: sync.OnceValue(func() workqueue.TypedRateLimitingInterface[K] {
			return workqueue.NewTypedRateLimitingQueueWithConfig(limiter, workqueue.TypedRateLimitingQueueConfig[K]{Clock: clk})
		}),
		stale: workqueue.NewTypedItemExponentialFailureRateLimiter[K](RetryFirst, staleLongest),
	}
}

// Add asks for key to be worked on as soon as a worker is free.
func (q *Queue[K]) Add(key K) { q.wq().Add(key) }

// AddAfter asks for key to be worked on after d. If it is already waiting, the
// earlier of the two times counts.
func (q *Queue[K]) AddAfter(key K, d time.Duration) { q.wq().AddAfter(key, d) }

// Len is the number of keys that wait to be worked on, those delayed not counted.
func (q *Queue[K]) Len() int { return q.wq().Len() }

// Retries is how often in a row the sync of key has failed.
func (q *Queue[K]) Retries(key K) int { return q.wq().NumRequeues(key) }

// Stop ends a queue that keys were added to and that Run never ran; Run does it
// by itself.
func (q *Queue[K]) Stop() { q.wq().ShutDown() }

// Watch is a kind of the view and who is told about its changes.
type Watch struct {
	Informer cache.SharedIndexInformer
	Handler  cache.ResourceEventHandler
}

// On makes the Watch that calls changed for every change of an object of type
// T: with old nil for an object that is new to the view, with cur nil for one
// that is gone.
func On[T comparable](informer cache.SharedIndexInformer, changed func(old, cur T)) Watch {
	var none T
	return Watch{Informer: informer, Handler: cache.ResourceEventHandlerFuncs{
		AddFunc: func(obj any) {
			if cur, ok := obj.(T); ok {
				changed(none, cur)
			}
		},
		UpdateFunc: func(o, n any) {
			old, ok1 := o.(T)
			cur, ok2 := n.(T)
			if ok1 && ok2 {
				changed(old, cur)
			}
		},
		DeleteFunc: func(obj any) {
			// A deletion that fell into a gap of the watch comes with the last
			// state that was seen.
			if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
				obj = gone.Obj
			}
			if old, ok := obj.(T); ok {
				changed(old, none)
			}
		},
	}}
}

// Work is what Run needs to run a controller's loop.
type Work[K comparable] struct {
	Queue *Queue[K]
	// Workers is how many keys are worked on at once; less than 1 means 1.
	Workers int
	// Watches are told about changes from before the first Sync until Run returns.
	Watches []Watch
	// Own are informers that are this controller's alone: Run runs them and waits
	// for them. What others may need as well belongs into the shared view.
	Own []cache.SharedIndexInformer
	// Ready holds further conditions to wait for before the first Sync.
	Ready []cache.InformerSynced
	// Sync brings the world towards what key's object asks for. An error makes
	// the key come back after a back-off.
	Sync func(ctx context.Context, key K) error
	// Background are further goroutines of the controller; they are started when
	// the view is complete and end with ctx.
	Background []func(ctx context.Context)
	Logger     *slog.Logger
}

// Run waits until the view is complete, then works on the queue until ctx ends,
// and returns nil when all its goroutines have ended. A queue runs once.
func Run[K comparable](ctx context.Context, w Work[K]) error {
	log := w.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	log = log.With("controller", w.Queue.name)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer w.Queue.wq().ShutDown()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	for _, informer := range w.Own {
		wg.Go(func() { informer.RunWithContext(ctx) })
	}
	synced := append([]cache.InformerSynced(nil), w.Ready...)
	for _, watch := range w.Watches {
		reg, err := watch.Informer.AddEventHandler(watch.Handler)
		if err != nil {
			return fmt.Errorf("controller %s: watch the shared view: %w", w.Queue.name, err)
		}
		// An error here means that the informer has stopped, with its handlers.
		defer func() { _ = watch.Informer.RemoveEventHandler(reg) }()
		synced = append(synced, reg.HasSynced)
	}
	if !waitFor(ctx, synced) {
		return nil
	}
	for _, fn := range w.Background {
		wg.Go(func() { fn(ctx) })
	}
	for range max(w.Workers, 1) {
		wg.Go(func() {
			for w.Queue.next(ctx, log, w.Sync) {
			}
		})
	}
	<-ctx.Done()
	return nil
}

// waitFor polls until all conditions hold; false if ctx ended first.
func waitFor(ctx context.Context, conds []cache.InformerSynced) bool {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for _, cond := range conds {
		for !cond() {
			select {
			case <-ctx.Done():
				return false
			case <-tick.C:
			}
		}
	}
	return ctx.Err() == nil
}

// next works on one key; false when the queue is shut down.
func (q *Queue[K]) next(ctx context.Context, log *slog.Logger, sync func(context.Context, K) error) bool {
	key, shutdown := q.wq().Get()
	if shutdown {
		return false
	}
	defer q.wq().Done(key)
	if ctx.Err() != nil {
		return false
	}
	err := guarded(ctx, key, sync)
	switch {
	case err == nil:
		q.wq().Forget(key)
		q.stale.Forget(key)
	case ctx.Err() != nil:
		return false
	case errors.Is(err, ErrStaleView) || apierrors.IsConflict(err):
		q.wq().AddAfter(key, q.stale.When(key))
		log.Debug("the view lags behind, will be tried again", "key", key, "err", err)
	default:
		q.wq().AddRateLimited(key)
		q.stale.Forget(key)
		log.Warn("sync failed, will be tried again", "key", key, "failures", q.wq().NumRequeues(key), "err", err)
	}
	return true
}

// guarded turns a panic of sync into an error: one object that trips over a
// bug must not take down the node's other duties. The back-off bounds its cost.
func guarded[K comparable](ctx context.Context, key K, sync func(context.Context, K) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("bug: panic while working on %v: %v\n%s", key, p, debug.Stack())
		}
	}()
	return sync(ctx, key)
}
