package api

import (
	"context"
	"net/http"
	"sync/atomic"
	"time"

	"golang.org/x/sync/singleflight"
	genericapiserver "k8s.io/apiserver/pkg/server"
	"k8s.io/apiserver/pkg/server/healthz"
	"k8s.io/kubernetes/pkg/probe"
	"k8s.io/kubernetes/pkg/registry/core/componentstatus"
)

const (
	// probeTimeout is how long the store may take to answer a probe; upstream's.
	probeTimeout = 2 * time.Second
	// probeAge is how long an answer is taken for the present state: probes come from anybody.
	probeAge = time.Second
)

// storeProbe asks every shard for a key that does not exist, through its quorum.
type storeProbe struct {
	ask   func(context.Context) error
	group singleflight.Group
	last  atomic.Pointer[probeResult]
}

type probeResult struct {
	at  time.Time
	err error
}

func (p *storeProbe) check() error {
	if r := p.last.Load(); r != nil && time.Since(r.at) < probeAge {
		return r.err
	}
	_, err, _ := p.group.Do("", func() (any, error) {
		ctx, cancel := context.WithTimeout(context.Background(), probeTimeout)
		defer cancel()
		err := p.ask(ctx)
		p.last.Store(&probeResult{time.Now(), err})
		return nil, err
	})
	return err
}

// addHealth adds the checks that upstream has for etcd, under their usual names.
func (b *build) addHealth(c *genericapiserver.Config) {
	b.probe = &storeProbe{ask: func(ctx context.Context) error { return b.stores.Check(ctx) }} // the stores are made later
	check := func(*http.Request) error { return b.probe.check() }
	c.AddHealthChecks(healthz.NamedGroupedCheck("etcd", "etcd", check))
	c.AddReadyzChecks(healthz.NamedGroupedCheck("etcd-readiness", "etcd-readiness", check))
}

// components are what "kubectl get componentstatuses" shows.
func (b *build) components() map[string]componentstatus.Server {
	return map[string]componentstatus.Server{
		"etcd-0": component(b.probe.check),
	}
}

type component func() error

// DoServerCheck implements componentstatus.Server.
func (c component) DoServerCheck() (probe.Result, string, error) {
	if err := c(); err != nil {
		return probe.Failure, "", err
	}
	return probe.Success, "ok", nil
}
