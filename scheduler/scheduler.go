// Package scheduler is the part of the control plane that only the cluster's
// leader runs: it places pods on nodes and runs the controllers.
//
// # Contract
//
// The daemon calls Run when this node leads the system shard and its fence is
// applied, and ends it by its context as soon as it does not. Run holds no
// state that outlives it: all truth is in the API. What it writes carries the
// leader's term (the client in Config adds it), so that a deposed leader's
// late writes are refused; nothing here checks leadership itself.
//
// # Order
//
// Pods are planned one after the other by priority, each on a snapshot that
// contains the decisions before it (a pod counts on its node from the moment
// of the decision). Many decisions are carried out at once, in no order. A
// decision that the API refuses is undone and its pod planned again after a
// back-off. One state is seen by placement and all controllers: the factory's.
package scheduler

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/node"
	"skein.io/skein/scheduler/controller/resourceclaim"
)

// NewController makes one controller of a leadership.
type NewController func(controller.Deps, Config) controller.Controller

// Run places pods and runs the controllers until ctx ends, and returns when
// all its goroutines have ended: nil if ctx ended it, else what stopped a
// controller (then everything else has been stopped, too).
func Run(ctx context.Context, cfg Config) error {
	if err := cfg.Validate(); err != nil {
		return err
	}
	cfg.setDefaults()
	recorder := cfg.Recorder
	if recorder == nil {
		binder := &counted{Binder: cfg.Binder}
		cfg.Binder = binder
		events := controller.NewEvents(controller.EventsConfig{Client: cfg.Client, Create: cfg.Events, Yield: binder.busy, Clock: cfg.Clock, Logger: cfg.Logger})
		defer events.Stop()
		// At once, not when the last part has ended: it may wait for an answer.
		defer context.AfterFunc(ctx, events.Stop)()
		recorder = func(component string) record.EventRecorder { return events.Recorder(component) }
	}
	deps := controller.Deps{
		Client: cfg.Client, Metadata: cfg.Metadata, Dynamic: cfg.Dynamic,
		Factory: cfg.Factory, Health: cfg.Health, Recorder: recorder,
		Clock: cfg.Clock, Logger: cfg.Logger, RootCA: cfg.RootCA,
	}
	if cfg.Quota != nil {
		deps.Quota = cfg.Quota(cfg.Factory)
	}
	// Everything asks the factory for the kinds that it reads before it starts.
	parts := []controller.Controller{newLoop(cfg, deps)}
	for _, create := range cfg.Controllers {
		parts = append(parts, create(deps, cfg))
	}

	ctx, cancel := context.WithCancel(ctx)
	defer cfg.Factory.Shutdown() // waits for the view's goroutines, after ...
	defer cancel()               // ... they are told to end
	cfg.Factory.Start(ctx.Done())

	var wg sync.WaitGroup
	errs := make([]error, len(parts))
	for i, part := range parts {
		wg.Go(func() {
			if err := part.Run(ctx); err != nil {
				errs[i] = fmt.Errorf("%s: %w", part.Name(), err)
				cancel() // a control plane with a part missing must not look alive
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// newResourceClaim makes the resource claim controller.
func newResourceClaim(deps controller.Deps, cfg Config) controller.Controller {
	return resourceclaim.New(deps, cfg.Claims)
}

// newNode makes the node lifecycle controller.
func newNode(deps controller.Deps, cfg Config) controller.Controller {
	return node.New(deps, cfg.PodCIDR, cfg.Node)
}
