package daemon

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/metadata"

	"skein.io/skein/consensus/host"
	"skein.io/skein/gossip/health"
	"skein.io/skein/node/api"
	"skein.io/skein/scheduler"
	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/horizontalpodautoscaler"
)

// lead runs what only the leader of the cluster does, whenever this node is it.
func (n *node) lead(ctx context.Context) error {
	return n.host.Lead(ctx, systemShard, func(ctx context.Context, term uint64) {
		n.log.Info("this node leads", "term", term)
		defer n.log.Info("this node leads no more", "term", term)
		for ctx.Err() == nil {
			if err := n.reign(ctx, term); err != nil && ctx.Err() == nil {
				n.parts.set("leader", err, "")
				n.log.Error("a part of the control plane ended; it is started again", "err", err)
				pause(ctx, time.Second)
			}
		}
		n.parts.set("leader", nil, "another node leads")
	})
}

// reign runs the control plane in one term until ctx ends or a part of it fails.
func (n *node) reign(ctx context.Context, term uint64) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return n.runMembers(ctx, term) })
	g.Go(func() error { return n.runKeys(ctx, term) })
	g.Go(func() error { return n.watchForgotten(ctx) })
	g.Go(func() error {
		srv, keys, err := n.awaitAPI(ctx)
		if err != nil {
			return nil // the reign ended first
		}
		n.parts.set("leader", nil, fmt.Sprintf("this node leads in term %d", term))
		select {
		case n.leads <- struct{}{}:
		default: // it is known already
		}
		// Every write of the control plane acts for this term: a store that has seen a later leader refuses it.
		decorate := func(ctx context.Context) context.Context { return host.WithTerm(ctx, term) }
		g.Go(func() error { return srv.RunLeaderHooks(ctx, decorate) })
		cfg := srv.Loopback("skein-scheduler", decorate)
		client, err := kubernetes.NewForConfig(cfg)
		if err != nil {
			return err
		}
		meta, err := metadata.NewForConfig(cfg)
		if err != nil {
			return err
		}
		tokens, err := n.tokens()
		if err != nil {
			return err
		}
		g.Go(func() error { return n.clearLeft(ctx, client, tokens) })
		g.Go(func() error { return n.runBackups(ctx, client) })
		sc := scheduler.DefaultConfig()
		sc.Client, sc.Metadata, sc.Health = client, meta, verdicts{n}
		binder, err := srv.Binder("skein-scheduler", decorate)
		if err != nil {
			return err
		}
		sc.Binder = hurried{binder}
		if sc.Events, err = srv.Events("skein-scheduler", decorate); err != nil {
			return err
		}
		sc.PodCIDR, sc.RootCA = n.id.Cluster.PodCIDR, keys.authority.CertPEM()
		sc.Quota = func(f informers.SharedInformerFactory) controller.Quota { return api.NewQuotaUsage(f, client, meta) }
		sc.Node.Board, sc.Claims = &n.zones, &n.claims
		if file := n.cfg.scheduling; file != nil {
			sc.Profiles, sc.Queue.FirstBackoff, sc.Queue.LongestBackoff = file.Profiles, file.FirstBackoff, file.LongestBackoff
		}
		sc.Autoscaling, sc.Inspector = horizontalpodautoscaler.NewWorld(cfg), &n.inspector
		sc.Logger = n.log.With("part", "scheduler")
		return scheduler.Run(ctx, sc)
	})
	return g.Wait()
}

// awaitAPI waits until this node serves the API.
func (n *node) awaitAPI(ctx context.Context) (*api.Server, clusterKeys, error) {
	for {
		s, k, changed := n.api.get()
		if s != nil {
			return s, k, nil
		}
		select {
		case <-ctx.Done():
			return nil, k, ctx.Err()
		case <-changed:
		}
	}
}

// verdicts shows gossip's view to the scheduler in its own terms.
type verdicts struct{ n *node }

func (v verdicts) Verdicts() map[string]scheduler.NodeHealth {
	out := map[string]scheduler.NodeHealth{}
	for _, m := range v.n.gossip.Members() {
		h := scheduler.NodeHealth{Since: m.Since}
		switch m.Verdict {
		case health.Alive:
			h.State = scheduler.Alive
		case health.Suspect:
			h.State = scheduler.Suspect
		case health.Dead:
			h.State = scheduler.Dead
		case health.Left:
			h.State = scheduler.Left
		}
		out[m.Name] = h
	}
	for name, since := range v.n.forgotten.get() {
		if _, known := out[name]; !known {
			out[name] = scheduler.NodeHealth{State: scheduler.Left, Since: since}
		}
	}
	return out
}

func (v verdicts) Subscribe() (<-chan struct{}, func()) {
	gossip, end := v.n.gossip.Subscribe()
	both, stop, done := make(chan struct{}, 1), make(chan struct{}), make(chan struct{})
	go func() { // ends with the subscription
		defer close(done)
		for forgotten := v.n.forgotten.wait(); ; {
			select {
			case <-stop:
				return
			case <-gossip:
			case <-forgotten:
				forgotten = v.n.forgotten.wait()
			}
			select {
			case both <- struct{}{}:
			default:
			}
		}
	}()
	return both, sync.OnceFunc(func() { close(stop); <-done; end() })
}
