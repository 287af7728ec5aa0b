package scheduler

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/record"
	corev1helpers "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/utils/clock"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/placement"
	"skein.io/skein/scheduler/queue"
)

// loop places pods.
type loop struct {
	cfg    Config
	client kubernetes.Interface
	clock  clock.WithTicker
	log    *slog.Logger
	view   view

	profiles map[string]placedAs // by the schedulerName of the pods
	wake     chan struct{}       // something may be ready to be tried; capacity 1
	jobs     chan job            // what is to be written; its workers bound it

	mu       sync.Mutex // guards all below
	snapshot *placement.Snapshot
	queue    *queue.Queue
	assumed  map[types.UID]assumption
	// evictions are those that the view does not show yet.
	evictions evictions
	volumes   volumeWork
	devices   deviceView
	rnd       *rand.Rand
	// turns counts what may make void what was decided before: a node that went,
	// or takes less or others, a claim that goes.
	turns uint64
}

// assumption is a decision that the view does not show yet.
type assumption struct {
	pod  *v1.Pod
	node string
}

// placedAs is how the pods of one schedulerName are placed, and who tells of
// it: events and conditions are written under that name, as by upstream.
type placedAs struct {
	profile *placement.Profile
	events  record.EventRecorder
}

func profilesOf(profiles []*placement.Profile, recorder func(component string) record.EventRecorder) map[string]placedAs {
	out := map[string]placedAs{}
	for _, p := range profiles {
		out[p.Name] = placedAs{profile: p, events: recorder(p.Name)}
	}
	return out
}

// events returns the recorder for what happens to a pod that is placed.
func (l *loop) events(pod *v1.Pod) record.EventRecorder {
	return l.profiles[pod.Spec.SchedulerName].events
}

func newLoop(cfg Config, deps controller.Deps) *loop {
	deps = deps.WithDefaults()
	return &loop{
		cfg: cfg, client: deps.Client, clock: deps.Clock,
		log:  deps.Logger.With("part", "placement"),
		view: newView(deps.Factory),

		profiles: profilesOf(cfg.Profiles, deps.Recorder),
		wake:     make(chan struct{}, 1),
		jobs:     make(chan job, cfg.BindWorkers),

		snapshot:  placement.NewSnapshot(),
		queue:     queue.New(cfg.Queue),
		assumed:   map[types.UID]assumption{},
		evictions: evictions{},
		volumes:   newVolumeWork(deps.Factory),
		devices:   newDeviceView(deps.Factory),
		rnd:       rand.New(rand.NewPCG(cfg.Seed, 0)),
	}
}

// Name is the part's name in errors.
func (l *loop) Name() string { return "placement" }

// Run places pods until ctx ends.
func (l *loop) Run(ctx context.Context) error {
	health, stopHealth := l.cfg.Health.Subscribe()
	defer stopHealth()
	l.applyHealth()
	stopWatching, err := l.watch(ctx)
	if err != nil {
		return err
	}
	defer stopWatching()
	if ctx.Err() != nil {
		return nil
	}

	if i := l.cfg.Inspector; i != nil {
		i.loop.Store(l)
		defer i.loop.Store(nil)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	for range l.cfg.BindWorkers {
		wg.Go(func() {
			for j := range l.jobs {
				if ctx.Err() == nil {
					j.do(ctx, l)
				}
			}
		})
	}
	wg.Go(func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-health:
				l.applyHealth()
			}
		}
	})
	defer close(l.jobs)
	for ctx.Err() == nil {
		jobs, next, timed := l.plan()
		for _, j := range jobs {
			select {
			case l.jobs <- j:
			case <-ctx.Done():
				return nil
			}
		}
		if len(jobs) == 0 {
			l.sleep(ctx, next, timed)
		}
	}
	return nil
}

// sleep waits for an event, or until the time at which the queue has more.
func (l *loop) sleep(ctx context.Context, next time.Time, timed bool) {
	var due <-chan time.Time
	if timed {
		timer := l.clock.NewTimer(next.Sub(l.clock.Now()))
		defer timer.Stop()
		due = timer.C()
	}
	select {
	case <-ctx.Done():
	case <-l.wake:
	case <-due:
	}
}

// nudge ends a sleep.
func (l *loop) nudge() {
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// plan decides for the pods that are to be tried now, and returns what is to
// be written. If that is nothing, it says when to look again.
func (l *loop) plan() (jobs []job, next time.Time, timed bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.clock.Now()
	jobs, next, timed = l.settledVolumes(now)
	jobs, next, timed = l.settledDevices(now, jobs, next, timed)
	popped := l.queue.Pop(l.cfg.Batch, now)
	for _, p := range popped {
		jobs = append(jobs, l.decide(p.Pod, now))
	}
	jobs = l.together(jobs)
	if len(popped) == 0 {
		if at, ok := l.queue.Next(now); ok && (!timed || at.Before(next)) {
			next, timed = at, true
		}
	}
	return jobs, next, timed
}

// decide plans one popped pod and notes the decision as if it were carried
// out. l.mu is held.
func (l *loop) decide(pod *v1.Pod, now time.Time) job {
	req := placement.Request{Pod: pod, Profile: l.profiles[pod.Spec.SchedulerName].profile, Peers: l.view.peers(pod), Budgets: l.view.budgets(pod), Now: now,
		Evicting: l.evictions.underWay(pod.UID, l.snapshot)}
	decision, err := l.snapshot.Place(req, l.rnd)
	switch {
	case err != nil:
		l.queue.Failed(pod.UID, now)
		return failure{pod: pod, reason: v1.PodReasonSchedulerError, message: err.Error()}
	case decision.Node != "":
		bindings, err := l.reserveVolumes(req, decision.Node)
		if err != nil {
			l.queue.Failed(pod.UID, now)
			return failure{pod: pod, reason: v1.PodReasonSchedulerError, message: err.Error()}
		}
		kept := l.snapshot.NominatedTo(pod)
		l.snapshot.Unnominate(pod.UID)
		delete(l.evictions, pod.UID)
		l.snapshot.SetPod(pod, decision.Node)
		if kept != "" && kept != decision.Node {
			l.moveAt(queue.PodGone, kept) // nothing is kept for it there any more
		}
		l.assumed[pod.UID] = assumption{pod: pod, node: decision.Node}
		l.reserveDevices(pod, decision)
		if bindings != nil {
			return volumeBinding{pod: pod, bindings: bindings, turns: l.turns}
		}
		return binding{pod: pod, node: decision.Node, version: pod.ResourceVersion, turns: l.turns}
	}
	l.queue.Unschedulable(pod.UID, wakers(decision.Refusal), now)
	var displaced []*v1.Pod
	switch {
	case decision.Preempt != nil:
		displaced = l.displace(pod, decision.Preempt)
		l.snapshot.Nominate(pod, decision.Preempt.Node)
		l.evictions.chose(pod, decision.Preempt)
	case !decision.Refusal.EvictionUnderWay:
		l.snapshot.Unnominate(pod.UID)
	}
	return failure{
		pod: pod, reason: v1.PodReasonUnschedulable, message: decision.Refusal.Error(),
		preempt: decision.Preempt, keepNomination: decision.Refusal.EvictionUnderWay,
		release: decision.Release, displaced: displaced,
	}
}

// displace gives up what is kept for less important pods on the node that pod
// gets by evictions: they may not fit there any more. They look for another one
// when their status says so, rather than when those have ended. l.mu is held.
func (l *loop) displace(pod *v1.Pod, p *placement.Preemption) []*v1.Pod {
	ending := func(victim *v1.Pod) bool { return victim.DeletionTimestamp != nil }
	if !slices.ContainsFunc(p.Victims, func(v *v1.Pod) bool { return !ending(v) }) {
		return nil // nothing new is evicted: that was done when the first was
	}
	below := l.snapshot.NominatedBelow(p.Node, corev1helpers.PodPriority(pod))
	for _, low := range below {
		l.snapshot.Unnominate(low.UID)
		delete(l.evictions, low.UID)
	}
	return below
}

// bound notes that a decision was carried out. The pod stays assumed until
// the view shows it.
func (l *loop) bound(pod *v1.Pod) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.queue.Done(pod.UID)
}

// undo takes a decision back that the API refused; gone says that there is no
// such pod (any more). It reports whether the pod will be tried again.
func (l *loop) undo(pod *v1.Pod, gone bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.clock.Now()
	if _, ok := l.assumed[pod.UID]; !ok {
		// The view has shown meanwhile that the pod is bound, or deleted.
		l.queue.Done(pod.UID)
		return false
	}
	delete(l.assumed, pod.UID)
	l.releaseVolumes(pod.UID)
	l.releaseDevices(pod.UID)
	node := l.snapshot.PodNode(pod.UID)
	l.snapshot.RemovePod(pod.UID)
	l.moveAt(queue.PodGone, node)
	l.movePeers(queue.PeerGone, pod)
	if gone {
		l.queue.Done(pod.UID)
	} else {
		l.queue.Failed(pod.UID, now)
	}
	l.nudge()
	return !gone
}

// applyHealth refuses the nodes that the failure detector holds for dead,
// before anybody has written a taint.
func (l *loop) applyHealth() {
	lost := map[string]bool{}
	for name, v := range l.cfg.Health.Verdicts() {
		if v.State == Dead || v.State == Left {
			lost[name] = true
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.turns++
	if len(l.snapshot.SetLost(lost)) > 0 {
		l.move(queue.NodeReturned)
	}
}

// move tells the queue what happened. l.mu is held.
func (l *loop) move(ev queue.Event) {
	if ev != 0 {
		l.queue.Move(ev, nil, l.clock.Now())
		l.nudge()
	}
}
