package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"sync"
	"time"

	authv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"skein.io/skein/node/agent/cgroup"
	"skein.io/skein/node/agent/lifecycle"
	"skein.io/skein/node/agent/probe"
	"skein.io/skein/node/desired"
	"skein.io/skein/node/volume"
)

const (
	// relistPeriod is how often the runtime is listed although it sends events, which may be lost.
	relistPeriod = 10 * time.Second
	// relistBroken applies while the event stream is down.
	relistBroken = time.Second
	// parallelStarts bounds how many pods start containers at once, so that a node that reboots with many pods stays
	// responsive. Image pulls do not count.
	parallelStarts = 8
)

// Agent runs pods.
type Agent struct {
	cfg     Config
	volumes *volume.Manager
	cgroups podCgroups
	prober  *probe.Prober
	writer  *statusWriter
	starts  chan struct{}
	started time.Time
	grants  grants

	// mu guards workers and eventsUp.
	mu      sync.Mutex
	workers map[types.UID]*worker
	// eventsUp: the runtime's event stream is connected.
	eventsUp bool
	wg       sync.WaitGroup
}

// podCgroups makes and removes the cgroups of pods; *cgroup.Pods does.
type podCgroups interface {
	Path(uid string) string
	Ensure(uid string, l cgroup.Limits) error
	MemoryUsage(uid string) (int64, error)
	Remove(uid string) error
	List() ([]string, error)
}

// New makes an Agent.
func New(cfg Config) (*Agent, error) {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, workers: map[types.UID]*worker{}, starts: make(chan struct{}, parallelStarts), grants: newGrants(),
		cgroups: cgroup.Pods{Parent: filepath.Join(cfg.CgroupRoot, "pods")}}
	var err error
	a.volumes, err = volume.New(volume.Config{Dir: filepath.Join(cfg.StateDir, "pods"), Source: cfg.Desired, Tokens: cfg.Desired, Logger: cfg.Logger,
		RequestToken: func(ctx context.Context, ns, sa string, req *authv1.TokenRequest) (*authv1.TokenRequest, error) {
			return cfg.Client.CoreV1().ServiceAccounts(ns).CreateToken(ctx, sa, req, metav1.CreateOptions{})
		}})
	if err != nil {
		return nil, err
	}
	a.prober = probe.New(probe.Config{Exec: cfg.Runtime.ExecSync, Event: a.containerEvent, Notify: func(p *corev1.Pod) { a.kick(p.UID) }, Logger: cfg.Logger})
	a.writer = newStatusWriter(a)
	return a, nil
}

// Run runs pods until ctx ends. Containers go on running then. It returns when all its goroutines have ended.
func (a *Agent) Run(ctx context.Context) error {
	for _, d := range []string{"pods", "logs/pods"} {
		if err := os.MkdirAll(filepath.Join(a.cfg.StateDir, d), 0o755); err != nil {
			return fmt.Errorf("agent: %w", err)
		}
	}
	a.started = time.Now()
	defer a.prober.Wait()
	defer a.wg.Wait()
	a.wg.Go(func() { a.writer.run(ctx) })
	a.wg.Go(func() { a.watchRuntime(ctx) })
	a.wg.Go(func() { a.collect(ctx) })
	a.wg.Go(func() { a.reportNode(ctx) })
	a.loop(ctx)
	return nil
}

// loop starts and updates workers until ctx ends.
func (a *Agent) loop(ctx context.Context) {
	podChanges, cancel := a.cfg.Desired.Subscribe(desired.Pods, desired.Nodes)
	defer cancel()
	refChanges, cancel := a.cfg.Desired.Subscribe(desired.ConfigMaps, desired.Secrets, desired.Claims, desired.Volumes)
	defer cancel()
	seen := map[string]string{} // container or sandbox -> state, as of the last list
	relist := time.NewTimer(0)
	defer relist.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-podChanges:
			a.sync(ctx)
		case <-refChanges:
			a.each(func(w *worker) { w.refresh() })
		case <-relist.C:
			next := relistPeriod
			if err := a.relist(ctx, seen); err != nil {
				a.cfg.Logger.Warn("container runtime not listed, tried again", "err", err)
				next = relistBroken
			} else {
				a.sync(ctx)
			}
			a.mu.Lock()
			if !a.eventsUp {
				next = relistBroken
			}
			a.mu.Unlock()
			relist.Reset(next)
		}
	}
}

func (a *Agent) each(f func(*worker)) {
	a.mu.Lock()
	ws := make([]*worker, 0, len(a.workers))
	for _, w := range a.workers {
		ws = append(ws, w)
	}
	a.mu.Unlock()
	for _, w := range ws {
		f(w)
	}
}

func (a *Agent) worker(uid types.UID) *worker {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.workers[uid]
}

func (a *Agent) kick(uid types.UID) {
	if w := a.worker(uid); w != nil {
		w.kick()
	}
}

// sync compares the pods that should be here with the workers.
func (a *Agent) sync(ctx context.Context) {
	pods := a.cfg.Desired.Pods()
	sort.SliceStable(pods, func(i, j int) bool { return pods[i].CreationTimestamp.Before(&pods[j].CreationTimestamp) })
	want := make(map[types.UID]bool, len(pods))
	for _, p := range pods {
		want[p.UID] = true
		if w := a.worker(p.UID); w != nil {
			w.update(p, false)
			continue
		}
		if verdict, ok := a.admit(p, pods); ok {
			a.startWorker(ctx, p, false, verdict)
		}
	}
	a.each(func(w *worker) {
		if !want[w.uid] {
			w.update(nil, true)
		}
	})
	// Records of pods that are gone and were being terminated when the daemon died.
	for _, r := range a.cfg.Desired.Records() {
		if !want[r.UID] && a.worker(r.UID) == nil && a.cfg.Desired.Synced(desired.Pods) {
			a.startWorker(ctx, orphan(r, r.UID, r.Namespace, r.Name), true, nil)
		}
	}
}

// orphan is the pod of something that runs here and that the API does not know.
func orphan(r *desired.Record, uid types.UID, ns, name string) *corev1.Pod {
	if r != nil && r.Pod != nil {
		return r.Pod
	}
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{UID: uid, Namespace: ns, Name: name}}
}

func (a *Agent) startWorker(ctx context.Context, p *corev1.Pod, gone bool, verdict *lifecycle.Verdict) {
	w := newWorker(a, p, gone, verdict)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.workers[p.UID] != nil {
		return
	}
	a.workers[p.UID] = w
	a.wg.Go(func() {
		w.run(ctx)
		a.mu.Lock()
		delete(a.workers, w.uid)
		a.mu.Unlock()
		a.release(w.uid)
	})
}

// relist compares the runtime's state with that of the last list, wakes the workers of pods that changed, and starts workers
// for pods of ours that the API does not have. Nothing is done about those before the API has listed the pods.
func (a *Agent) relist(ctx context.Context, seen map[string]string) error {
	lctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	sandboxes, err := a.cfg.Runtime.ListPodSandbox(lctx, nil)
	if err != nil {
		return fmt.Errorf("list sandboxes: %w", err)
	}
	containers, err := a.cfg.Runtime.ListContainers(lctx, nil)
	if err != nil {
		return fmt.Errorf("list containers: %w", err)
	}
	fresh := map[string]string{}
	changed := map[types.UID]bool{}
	note := func(id, state string, uid types.UID) {
		fresh[id] = state
		if seen[id] != state {
			changed[uid] = true
		}
		delete(seen, id)
	}
	for _, c := range containers {
		note(c.Id, c.State.String(), types.UID(c.Labels[labelPodUID]))
	}
	for _, s := range sandboxes {
		uid := types.UID(s.Labels[labelPodUID])
		note(s.Id, s.State.String(), uid)
		a.orphaned(ctx, s, uid)
	}
	if len(seen) > 0 { // something vanished: whose it was is not known, so all look again
		a.each(func(w *worker) { w.kick() })
	}
	clear(seen)
	for k, v := range fresh {
		seen[k] = v
	}
	for uid := range changed {
		a.kick(uid)
	}
	return nil
}

func (a *Agent) orphaned(ctx context.Context, s *runtimeapi.PodSandbox, uid types.UID) {
	if uid == "" || a.worker(uid) != nil || !a.cfg.Desired.Synced(desired.Pods) {
		return
	}
	if p := a.cfg.Desired.Pod(s.Metadata.Namespace, s.Metadata.Name); p != nil && p.UID == uid {
		return // sync starts it
	}
	a.cfg.Logger.Info("pod runs here but the API does not have it: it is stopped", "pod", s.Metadata.Namespace+"/"+s.Metadata.Name, "uid", uid)
	p := orphan(a.cfg.Desired.Record(uid), uid, s.Metadata.Namespace, s.Metadata.Name)
	a.startWorker(ctx, p, true, nil)
}

// watchRuntime wakes workers on the runtime's events. While the stream is down relist does it alone.
func (a *Agent) watchRuntime(ctx context.Context) {
	for ctx.Err() == nil {
		events := make(chan *runtimeapi.ContainerEventResponse, 256)
		done := make(chan error, 1)
		sctx, cancel := context.WithCancel(ctx)
		a.wg.Go(func() {
			done <- a.cfg.Runtime.GetContainerEvents(sctx, events, func(runtimeapi.RuntimeService_GetContainerEventsClient) { a.setEventsUp(true) })
		})
		err := a.forward(ctx, events, done)
		cancel()
		a.setEventsUp(false)
		if ctx.Err() != nil {
			return
		}
		a.cfg.Logger.Debug("event stream of the container runtime ended, opened again", "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(relistBroken):
		}
	}
}

func (a *Agent) setEventsUp(up bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.eventsUp = up
}

func (a *Agent) forward(ctx context.Context, events <-chan *runtimeapi.ContainerEventResponse, done <-chan error) error {
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-done:
			return err
		case e, ok := <-events:
			if !ok {
				return errors.New("the event channel was closed")
			}
			if uid := e.GetPodSandboxStatus().GetMetadata().GetUid(); uid != "" {
				a.kick(types.UID(uid))
			}
		}
	}
}
