package probe

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	"skein.io/skein/node/agent/lifecycle"
)

// Kind of a probe.
type Kind int

// Kinds of probes.
const (
	Startup Kind = iota
	Liveness
	Readiness
)

func (k Kind) String() string { return [...]string{"Startup", "Liveness", "Readiness"}[k] }

// brokenRetries is how often a check that could not be done is repeated at once (kubelet's maxProbeRetries).
const brokenRetries = 3

// Config of a Prober.
type Config struct {
	// Exec runs commands in containers. Required.
	Exec Exec
	// Event reports a failed check; may be nil.
	Event func(pod *corev1.Pod, container, eventType, reason, message string)
	// Notify is called after a result of a pod's container changed. Required.
	Notify func(pod *corev1.Pod)
	// Logger; default: discard.
	Logger *slog.Logger
}

// Target is a running container.
type Target struct {
	Pod         *corev1.Pod
	Container   *corev1.Container
	ContainerID string
	PodIP       string
	StartedAt   time.Time
	// Seed is what is assumed until the first results: for a container that is adopted, what was known of it.
	Seed lifecycle.Probes
}

// Prober runs the probes of all containers of a node.
type Prober struct {
	cfg    Config
	client *http.Client
	// mu guards running.
	mu      sync.Mutex
	running map[string]*container
	wg      sync.WaitGroup
}

type container struct {
	t      Target
	cancel context.CancelFunc
	// mu guards results and startDone.
	mu        sync.Mutex
	results   lifecycle.Probes
	startDone chan struct{} // closed once the startup probe succeeded
	isStarted bool
}

// New makes a Prober.
func New(cfg Config) *Prober {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Event == nil {
		cfg.Event = func(*corev1.Pod, string, string, string, string) {}
	}
	return &Prober{cfg: cfg, client: newClient(), running: map[string]*container{}}
}

// Results returns what is known of a container, false when it is not probed.
func (p *Prober) Results(id string) (lifecycle.Probes, bool) {
	p.mu.Lock()
	c := p.running[id]
	p.mu.Unlock()
	if c == nil {
		return lifecycle.Probes{}, false
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.results, true
}

// HasProbes says whether a container is to be probed at all.
func HasProbes(c *corev1.Container) bool {
	return c.StartupProbe != nil || c.LivenessProbe != nil || c.ReadinessProbe != nil
}

// Start begins to probe a container; it does nothing when it already is. The probes end with ctx or Stop.
func (p *Prober) Start(ctx context.Context, t Target) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.running[t.ContainerID] != nil {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	c := &container{t: t, cancel: cancel, results: t.Seed, startDone: make(chan struct{})}
	p.running[t.ContainerID] = c
	if t.Container.StartupProbe == nil || t.Seed.Startup == lifecycle.Success {
		c.isStarted = true
		close(c.startDone)
	} else {
		p.wg.Go(func() { p.loop(ctx, c, Startup, t.Container.StartupProbe) })
	}
	if s := t.Container.LivenessProbe; s != nil {
		p.wg.Go(func() { p.loop(ctx, c, Liveness, s) })
	}
	if s := t.Container.ReadinessProbe; s != nil {
		p.wg.Go(func() { p.loop(ctx, c, Readiness, s) })
	}
}

// Stop ends the probes of a container. It does not wait for a check that is under way, whose result no longer counts.
func (p *Prober) Stop(id string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c := p.running[id]; c != nil {
		c.cancel()
		delete(p.running, id)
	}
}

// Wait waits until all probes have ended, those that were stopped and, after the end of their context, all others. Nothing
// may be started meanwhile.
func (p *Prober) Wait() { p.wg.Wait() }

// StopLiveness ends nothing but makes a failing liveness or startup probe harmless: it is called when the pod terminates.
// Readiness goes on, so that a pod that still serves while it terminates is reported rightly.
func (p *Prober) StopLiveness(id string) {
	p.mu.Lock()
	c := p.running[id]
	p.mu.Unlock()
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.results.Liveness = lifecycle.Success
}

// loop is one probe of one container.
func (p *Prober) loop(ctx context.Context, c *container, kind Kind, spec *corev1.Probe) {
	period := time.Duration(max(spec.PeriodSeconds, 1)) * time.Second
	if kind != Startup {
		select {
		case <-ctx.Done():
			return
		case <-c.startDone:
		}
	}
	wait := time.Until(c.t.StartedAt.Add(time.Duration(spec.InitialDelaySeconds) * time.Second))
	if c.t.Seed != (lifecycle.Probes{}) && wait <= 0 {
		wait = rand.N(period) // adopted containers are not all probed in the same moment
	}
	timer := time.NewTimer(max(wait, 0))
	defer timer.Stop()
	var last lifecycle.Result
	run := int32(0)
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		timer.Reset(period)
		result, ok := p.once(ctx, c, kind, spec)
		if !ok || ctx.Err() != nil {
			continue
		}
		if result != last {
			last, run = result, 0
		}
		run++
		if result == lifecycle.Failure && run < spec.FailureThreshold || result == lifecycle.Success && run < spec.SuccessThreshold {
			continue
		}
		p.set(c, kind, result)
		if kind == Startup || kind == Liveness && result == lifecycle.Failure {
			return // decided: either it has started, or it will be restarted as another container
		}
	}
}

// once does one check; false: its result does not count.
func (p *Prober) once(ctx context.Context, c *container, kind Kind, spec *corev1.Probe) (lifecycle.Result, bool) {
	var out Outcome
	var msg string
	for i := 0; i < brokenRetries; i++ {
		if out, msg = p.check(ctx, c.t, spec); out != Broken || ctx.Err() != nil {
			break
		}
	}
	if ctx.Err() != nil {
		return 0, false
	}
	switch out {
	case OK:
		return lifecycle.Success, true
	case Warning:
		p.cfg.Event(c.t.Pod, c.t.Container.Name, corev1.EventTypeWarning, "ProbeWarning", kind.String()+" probe warning: "+msg)
		return lifecycle.Success, true
	case Failed:
		p.cfg.Event(c.t.Pod, c.t.Container.Name, corev1.EventTypeWarning, "Unhealthy", kind.String()+" probe failed: "+msg)
		return lifecycle.Failure, true
	}
	p.cfg.Event(c.t.Pod, c.t.Container.Name, corev1.EventTypeWarning, "Unhealthy", kind.String()+" probe errored and resulted in unknown state: "+msg)
	return 0, false
}

func (p *Prober) set(c *container, kind Kind, r lifecycle.Result) {
	c.mu.Lock()
	old := c.results
	switch kind {
	case Startup:
		c.results.Startup = r
		if r == lifecycle.Success && !c.isStarted {
			c.isStarted = true
			close(c.startDone)
		}
	case Liveness:
		c.results.Liveness = r
	case Readiness:
		c.results.Readiness = r
	}
	changed := c.results != old
	c.mu.Unlock()
	if changed {
		p.cfg.Notify(c.t.Pod)
	}
}
