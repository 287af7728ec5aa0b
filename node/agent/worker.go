package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apiequality "k8s.io/apimachinery/pkg/api/equality"
	"k8s.io/apimachinery/pkg/types"

	"skein.io/skein/node/agent/lifecycle"
	"skein.io/skein/node/agent/probe"
	"skein.io/skein/node/desired"
)

const (
	// observeRetry is the pause after the runtime did not answer.
	observeRetry = time.Second
	// actionRetry is the pause after a failed action (kubelet's back-off between two syncs of a pod).
	actionRetry = 10 * time.Second
	// maxSteps bounds the steps of a pod without a pause: reaching it is a bug, which must not burn a CPU.
	maxSteps = 100
)

// worker runs one pod. Its goroutine is run; update, refresh and kick may be called by others.
type worker struct {
	a    *Agent
	uid  types.UID
	wake chan struct{}
	// verdict is why the node refuses the pod; nil: it does not.
	verdict *lifecycle.Verdict

	// mu guards what follows.
	mu      sync.Mutex
	pod     *corev1.Pod
	gone    bool
	version int // of pod and gone, counted by update
	// stop cancels the actions that are under way, kills tells of which sort they are, grace is that of a kill.
	stop  context.CancelFunc
	kills bool
	grace int64
	// stale: volumes are to be brought up to date.
	stale bool

	// Only the worker's goroutine uses what follows.
	observed    lifecycle.Observed
	cache       map[string]lifecycle.Container
	waits       map[string]lifecycle.Wait
	sandboxWait *lifecycle.Wait
	resizeWait  *lifecycle.Wait
	again       map[string]bool // containers that were stopped only to be started again
	pulls       map[string]*pull
	hooked      map[string]bool      // containers whose preStop hook ran
	killSince   map[string]time.Time // container -> when its termination began
	volumesAt   time.Time            // when volumes are to be looked at again
	probed      map[string]bool
	told        map[string]time.Time // event -> until when it is not repeated
	finished    bool
	noted       *desired.Resources // what of the grant is in the record
}

func newWorker(a *Agent, p *corev1.Pod, gone bool, verdict *lifecycle.Verdict) *worker {
	return &worker{a: a, uid: p.UID, pod: p, gone: gone, verdict: verdict, wake: make(chan struct{}, 1), cache: map[string]lifecycle.Container{},
		waits: map[string]lifecycle.Wait{}, again: map[string]bool{}, pulls: map[string]*pull{}, hooked: map[string]bool{}, killSince: map[string]time.Time{},
		probed: map[string]bool{}, told: map[string]time.Time{}, stale: true}
}

func (w *worker) kick() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// update hands the worker the newest version of its pod. Actions that it makes pointless are interrupted.
func (w *worker) update(p *corev1.Pod, gone bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if p == nil {
		p = w.pod
	}
	if p == w.pod && gone == w.gone {
		return
	}
	// The downward API shows these in files.
	w.stale = w.stale || !maps.Equal(p.Labels, w.pod.Labels) || !maps.Equal(p.Annotations, w.pod.Annotations)
	ends := gone && !w.gone || p.DeletionTimestamp != nil && w.pod.DeletionTimestamp == nil
	w.pod, w.gone = p, gone
	w.version++
	if w.stop != nil && (ends || w.kills && lifecycle.GraceSeconds(p) < w.grace) {
		w.stop()
	}
	w.kick()
}

// refresh tells the worker that a ConfigMap or Secret changed.
func (w *worker) refresh() {
	w.mu.Lock()
	w.stale = true
	w.mu.Unlock()
	w.kick()
}

func (w *worker) current() (pod *corev1.Pod, gone bool, version int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pod, w.gone, w.version
}

// run is the life of the worker; it ends with ctx or when the pod is gone from the API and from the node.
func (w *worker) run(ctx context.Context) {
	defer w.stopProbes()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for steps := 0; ; steps++ {
		next, over := w.step(ctx)
		if over || ctx.Err() != nil {
			return
		}
		if next == 0 && steps < maxSteps {
			continue
		}
		if next == 0 {
			pod, _, _ := w.current()
			w.a.cfg.Logger.Error("pod does not settle", "pod", lifecycle.PodDesc(pod), "steps", steps)
			next = actionRetry
		}
		steps = 0
		if next > 0 {
			timer.Reset(next)
		} else {
			timer.Stop()
		}
		select {
		case <-ctx.Done():
			return
		case <-w.wake:
		case <-timer.C:
		}
	}
}

// step observes, decides and acts once. It returns how long to wait (0: not at all; negative: for an event) and whether the
// worker is to end.
func (w *worker) step(ctx context.Context) (time.Duration, bool) {
	pod, gone, version := w.current()
	octx, cancel := context.WithTimeout(ctx, 30*time.Second)
	observed, err := w.a.observe(octx, w.uid, w.cache)
	cancel()
	if err != nil {
		if ctx.Err() == nil {
			w.a.cfg.Logger.Warn("pod not observed, tried again", "pod", lifecycle.PodDesc(pod), "err", err)
		}
		return observeRetry, false
	}
	w.observed = observed
	w.releaseWaits()
	rec := w.a.cfg.Desired.Record(w.uid)
	if rec == nil {
		rec = &desired.Record{UID: w.uid, Namespace: pod.Namespace, Name: pod.Name}
	}
	pod, pending := w.granted(pod, gone, &rec)
	w.startProbes(ctx, pod, rec)
	in := lifecycle.Input{Pod: pod, Gone: gone, Observed: observed, Old: rec.Status, Containers: rec.Containers, Probes: w.probeResults(), Waits: w.waits,
		SandboxWait: w.sandboxWait, Actuated: rec.Actuated, Pending: pending, Again: w.again, ResizeWait: w.resizeWait, Fail: w.verdict, HostIPs: w.a.cfg.hostIPs(), Now: time.Now()}
	plan := lifecycle.Step(in)
	w.publish(pod, rec, &plan)
	for _, e := range plan.Events {
		w.a.event(pod, e)
	}
	w.backoffEvents(pod, &plan)
	if plan.Done {
		return w.finish(ctx, pod, gone)
	}
	if len(plan.Actions) > 0 {
		return w.act(ctx, pod, version, &plan), false
	}
	return w.idle(ctx, pod, &plan), false
}

// idle refreshes volumes where needed and says how long to sleep.
func (w *worker) idle(ctx context.Context, pod *corev1.Pod, plan *lifecycle.Plan) time.Duration {
	now := time.Now()
	w.mu.Lock()
	stale := w.stale
	w.mu.Unlock()
	if !plan.Terminating && len(w.observed.Sandboxes) > 0 && (stale || !w.volumesAt.IsZero() && !now.Before(w.volumesAt)) {
		if err := w.setupVolumes(ctx, pod); err != nil {
			w.volumesAt = now.Add(actionRetry)
		}
	}
	wake := plan.Wake
	if !w.volumesAt.IsZero() && !plan.Terminating && (wake.IsZero() || w.volumesAt.Before(wake)) {
		wake = w.volumesAt
	}
	if wake.IsZero() {
		return -1
	}
	return max(time.Until(wake), time.Millisecond)
}

// publish records the decided status and has it sent when it differs from the API's.
func (w *worker) publish(pod *corev1.Pod, rec *desired.Record, plan *lifecycle.Plan) {
	next := *rec
	next.Status = &plan.Status
	next.Containers = plan.Containers
	next.Admitted = w.verdict == nil
	if plan.Terminating && next.Pod == nil {
		next.Pod = pod
	}
	if next.Admitted != rec.Admitted || next.Allocated != w.noted || next.Pod != rec.Pod || !maps.Equal(next.Containers, rec.Containers) ||
		!apiequality.Semantic.DeepEqual(rec.Status, next.Status) {
		w.a.cfg.Desired.PutRecord(&next)
		w.noted = next.Allocated
	}
	w.a.writer.enqueue(w.uid)
}

// act carries out the actions. A failed one ends the round, and so does a newer version of the pod; the next step decides anew.
func (w *worker) act(ctx context.Context, pod *corev1.Pod, version int, plan *lifecycle.Plan) time.Duration {
	for _, action := range plan.Actions {
		actx, cancel := context.WithCancel(ctx)
		w.mu.Lock()
		if w.version != version { // changed meanwhile: decide again
			w.mu.Unlock()
			cancel()
			return 0
		}
		w.stop, w.kills, w.grace = cancel, action.Kind == lifecycle.Kill, action.Grace
		w.mu.Unlock()
		err := w.do(actx, pod, action)
		w.mu.Lock()
		w.stop = nil
		w.mu.Unlock()
		interrupted := actx.Err() != nil && ctx.Err() == nil
		cancel()
		if err == nil || interrupted {
			if interrupted {
				return 0
			}
			continue
		}
		if ctx.Err() != nil {
			return 0
		}
		// Failed starts are told by events and the status; only failed stops are worth the node's own log each time.
		level := slog.LevelDebug
		if action.Kind == lifecycle.Kill || action.Kind == lifecycle.StopSandbox {
			level = slog.LevelWarn
		}
		w.a.cfg.Logger.Log(ctx, level, "action failed, tried again", "pod", lifecycle.PodDesc(pod), "action", action.String(), "err", err)
		if level == slog.LevelWarn {
			w.eventf(pod, "", corev1.EventTypeWarning, "FailedKillPod", "error killing pod: %v", err)
			return observeRetry
		}
	}
	return 0
}

func (w *worker) do(ctx context.Context, pod *corev1.Pod, action lifecycle.Action) error {
	switch action.Kind {
	case lifecycle.Kill:
		return w.kill(ctx, pod, action)
	case lifecycle.StopSandbox:
		if err := w.a.cfg.Runtime.StopPodSandbox(ctx, action.SandboxID); err != nil && !isNotFound(err) {
			return fmt.Errorf("stop sandbox %s: %w", action.SandboxID, err)
		}
		return nil
	case lifecycle.CreateSandbox:
		err := w.createSandbox(ctx, pod, uint32(action.Attempt))
		w.sandboxWait, w.resizeWait = nil, nil
		for name, wait := range w.waits {
			if err == nil && (wait.Reason == reasonCreateError || wait.Reason == reasonRunError) {
				delete(w.waits, name) // the former sandbox may have been the reason
			}
		}
		if err != nil && ctx.Err() == nil {
			w.sandboxWait = &lifecycle.Wait{Until: time.Now().Add(actionRetry)}
			var unknown *waitError
			if errors.As(err, &unknown) {
				w.sandboxWait.Until = time.Now().Add(unknown.after)
			}
		}
		return err
	case lifecycle.Start:
		return w.startContainer(ctx, pod, action)
	case lifecycle.Resize:
		return w.resize(ctx, pod, action)
	}
	return nil
}

// waitError asks for another pause than actionRetry.
type waitError struct {
	after time.Duration
	err   error
}

func (e *waitError) Error() string { return e.err.Error() }
func (e *waitError) Unwrap() error { return e.err }

// releaseWaits forgets why containers waited once they run, lets those try again that wait for a ConfigMap or Secret when one
// changed, and forgets what was noted of containers that are gone.
func (w *worker) releaseWaits() {
	exists := make(map[string]bool, len(w.observed.Containers))
	for i := range w.observed.Containers {
		exists[w.observed.Containers[i].ID] = true
	}
	maps.DeleteFunc(w.hooked, func(id string, _ bool) bool { return !exists[id] })
	maps.DeleteFunc(w.again, func(id string, _ bool) bool { return !exists[id] })
	maps.DeleteFunc(w.killSince, func(id string, _ time.Time) bool { return !exists[id] })
	for i := range w.observed.Containers {
		if c := &w.observed.Containers[i]; c.State == lifecycle.Running {
			delete(w.waits, c.Name)
		}
	}
	w.mu.Lock()
	stale := w.stale
	w.mu.Unlock()
	if !stale {
		return
	}
	for name, wait := range w.waits {
		if wait.Reason == reasonConfigError {
			wait.Until = time.Time{}
			w.waits[name] = wait
		}
	}
	w.sandboxWait = nil
}

// startProbes keeps the probes in step with the running containers.
func (w *worker) startProbes(ctx context.Context, pod *corev1.Pod, rec *desired.Record) {
	alive := map[string]bool{}
	old := rec.Status
	if old == nil {
		old = &pod.Status
	}
	for i := range w.observed.Containers {
		c := &w.observed.Containers[i]
		spec := containerSpec(pod, c.Name)
		if c.State != lifecycle.Running || spec == nil || !probe.HasProbes(spec) {
			continue
		}
		alive[c.ID] = true
		if pod.DeletionTimestamp != nil {
			w.a.prober.StopLiveness(c.ID)
		}
		if w.probed[c.ID] {
			continue
		}
		w.probed[c.ID] = true
		w.a.prober.Start(ctx, probe.Target{Pod: pod, Container: spec, ContainerID: c.ID, PodIP: w.podIP(pod), StartedAt: c.StartedAt, Seed: seed(old, c)})
	}
	for id := range w.probed {
		if !alive[id] {
			w.a.prober.Stop(id)
			delete(w.probed, id)
		}
	}
}

// seed is what is known of an adopted container: it is not made unready by the restart of the daemon.
func seed(old *corev1.PodStatus, c *lifecycle.Container) lifecycle.Probes {
	var p lifecycle.Probes
	for _, list := range [][]corev1.ContainerStatus{old.ContainerStatuses, old.InitContainerStatuses} {
		for i := range list {
			if s := &list[i]; s.ContainerID == lifecycle.ContainerID(c.ID) {
				if s.Started != nil && *s.Started {
					p.Startup = lifecycle.Success
				}
				if s.Ready {
					p.Readiness = lifecycle.Success
				}
			}
		}
	}
	return p
}

func (w *worker) probeResults() map[string]lifecycle.Probes {
	out := make(map[string]lifecycle.Probes, len(w.probed))
	for id := range w.probed {
		out[id], _ = w.a.prober.Results(id)
	}
	return out
}

func (w *worker) stopProbes() {
	for id := range w.probed {
		w.a.prober.Stop(id)
	}
}

func (w *worker) podIP(pod *corev1.Pod) string {
	if pod.Spec.HostNetwork {
		return w.a.cfg.NodeIPs[0].String()
	}
	if len(w.observed.Sandboxes) > 0 && len(w.observed.Sandboxes[0].IPs) > 0 {
		return w.observed.Sandboxes[0].IPs[0]
	}
	return ""
}

// finish releases what the ended pod holds. A pod that the API still has stays with its dead containers, for their logs.
func (w *worker) finish(ctx context.Context, pod *corev1.Pod, gone bool) (time.Duration, bool) {
	if !w.finished {
		w.stopProbes()
		clear(w.probed)
		if err := w.release(); err != nil {
			w.a.cfg.Logger.Warn("pod not cleaned up, tried again", "pod", lifecycle.PodDesc(pod), "err", err)
			return actionRetry, false
		}
		w.finished = true
		w.a.release(w.uid)
	}
	if !gone {
		if pod.DeletionTimestamp != nil {
			w.a.writer.finished(w.uid)
		}
		return -1, false
	}
	if err := w.remove(ctx, pod); err != nil {
		w.a.cfg.Logger.Warn("pod not removed from the runtime, tried again", "pod", lifecycle.PodDesc(pod), "err", err)
		return actionRetry, false
	}
	w.a.cfg.Desired.DeleteTokens(w.uid)
	w.a.cfg.Desired.DeleteRecord(w.uid)
	w.a.writer.forget(w.uid)
	return -1, true
}

// release takes away volumes and cgroups.
func (w *worker) release() error {
	return errors.Join(w.a.volumes.Teardown(w.uid), w.a.cgroups.Remove(string(w.uid)))
}

// containerSpec finds a container of any sort by name.
func containerSpec(pod *corev1.Pod, name string) *corev1.Container {
	for i := range pod.Spec.Containers {
		if pod.Spec.Containers[i].Name == name {
			return &pod.Spec.Containers[i]
		}
	}
	for i := range pod.Spec.InitContainers {
		if pod.Spec.InitContainers[i].Name == name {
			return &pod.Spec.InitContainers[i]
		}
	}
	for i := range pod.Spec.EphemeralContainers {
		if pod.Spec.EphemeralContainers[i].Name == name {
			c := corev1.Container(pod.Spec.EphemeralContainers[i].EphemeralContainerCommon)
			return &c
		}
	}
	return nil
}
