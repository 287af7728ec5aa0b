package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	ktesting "k8s.io/client-go/testing"

	"skein.io/skein/node/agent/cgroup"
	"skein.io/skein/node/agent/fakecri"
	"skein.io/skein/node/desired"
)

type fakeCgroups struct {
	mu   sync.Mutex
	pods map[string]cgroup.Limits
	used int64
}

func (f *fakeCgroups) MemoryUsage(string) (int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.used, nil
}

func (f *fakeCgroups) Path(uid string) string { return "/x/pods/" + uid }
func (f *fakeCgroups) Ensure(uid string, l cgroup.Limits) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.pods[uid] = l
	return nil
}
func (f *fakeCgroups) Remove(uid string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.pods, uid)
	return nil
}
func (f *fakeCgroups) List() ([]string, error) { return nil, nil }

// fakeRecorder keeps events as text.
type fakeRecorder struct {
	noRecorder
	mu  sync.Mutex
	all []string
}

func (r *fakeRecorder) Event(o runtime.Object, kind, reason, message string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if ref := o.(*corev1.ObjectReference); ref.Kind == "Pod" {
		r.all = append(r.all, fmt.Sprintf("%s %s", reason, message))
	}
}

func (r *fakeRecorder) has(want string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.ContainsFunc(r.all, func(s string) bool { return strings.Contains(s, want) })
}

// world is an agent in virtual time between a fake API and a fake runtime.
type world struct {
	t       *testing.T
	api     *fake.Clientset
	apiDown sync.Map // "yes" -> error
	rt      *fakecri.Runtime
	rec     *fakeRecorder
	cg      *fakeCgroups
	dir     string
	store   *desired.Store
	agent   *Agent
	stop    func()
	start   time.Time
}

// inBubble runs f with a started agent in a bubble of virtual time.
func inBubble(t *testing.T, f func(w *world)) {
	t.Helper()
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, api: fake.NewClientset(), rt: fakecri.New("img"), rec: &fakeRecorder{}, cg: &fakeCgroups{pods: map[string]cgroup.Limits{}}, dir: dir, start: time.Now()}
		w.api.PrependReactor("*", "*", func(ktesting.Action) (bool, runtime.Object, error) {
			if err, ok := w.apiDown.Load("yes"); ok {
				return true, nil, err.(error)
			}
			return false, nil, nil
		})
		// As the API's registry: with grace 0 a pod goes at once, and the wrong UID is a conflict.
		w.api.PrependReactor("delete", "pods", func(a ktesting.Action) (bool, runtime.Object, error) {
			d := a.(ktesting.DeleteActionImpl)
			o, err := w.api.Tracker().Get(a.GetResource(), a.GetNamespace(), d.GetName())
			if err != nil {
				return true, nil, err
			}
			if p := d.GetDeleteOptions().Preconditions; p != nil && *p.UID != o.(*corev1.Pod).UID {
				return true, nil, apierrors.NewConflict(schema.GroupResource{Resource: "pods"}, d.GetName(), errors.New("another UID"))
			}
			return false, nil, nil
		})
		w.up()
		f(w)
		w.stop()
		time.Sleep(time.Hour) // goroutines of libraries that end with a tick
	})
}

// up starts desired and agent.
func (w *world) up() {
	w.t.Helper()
	var err error
	if w.store, err = desired.Open(filepath.Join(w.dir, "d.db"), nil, nil); err != nil {
		w.t.Fatal(err)
	}
	w.agent, err = New(Config{NodeName: "n1", NodeIPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Client: w.api, Desired: w.store, Runtime: w.rt,
		Images: &fakecri.Images{R: w.rt}, StateDir: w.dir, Recorder: w.rec, ResolvConf: "/nonexistent"})
	if err != nil {
		w.t.Fatal(err)
	}
	w.agent.cgroups = w.cg
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = w.store.Run(ctx, w.api, "n1") })
	wg.Go(func() { _ = w.agent.Run(ctx) })
	var once sync.Once
	w.stop = func() {
		once.Do(func() {
			cancel()
			wg.Wait()
			if err := w.store.Close(); err != nil {
				w.t.Error(err)
			}
		})
	}
}

// sleep lets virtual time pass and everything settle.
func (w *world) sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func simplePod(name string) *corev1.Pod {
	grace := int64(30)
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("uid-" + name), CreationTimestamp: metav1.Now()},
		Spec: corev1.PodSpec{NodeName: "n1", RestartPolicy: corev1.RestartPolicyAlways, TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{Name: "c", Image: "img", ImagePullPolicy: corev1.PullIfNotPresent}}}}
}

func (w *world) create(p *corev1.Pod) {
	w.t.Helper()
	if _, err := w.api.CoreV1().Pods(p.Namespace).Create(w.t.Context(), p, metav1.CreateOptions{}); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) pod(name string) *corev1.Pod {
	w.t.Helper()
	p, err := w.api.CoreV1().Pods("default").Get(w.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		return nil
	}
	return p
}

// delete begins a graceful deletion, as the API's registry does.
func (w *world) delete(name string, grace int64) {
	w.t.Helper()
	p := w.pod(name)
	now := metav1.Now()
	if p.DeletionTimestamp == nil {
		p.DeletionTimestamp = &now
	}
	p.DeletionGracePeriodSeconds = &grace
	if err := w.api.Tracker().Update(schema.GroupVersionResource{Version: "v1", Resource: "pods"}, p, "default"); err != nil {
		w.t.Fatal(err)
	}
}

// calls returns those calls of the runtime that begin with one of the verbs.
func (w *world) calls(verbs ...string) string {
	var out []string
	for _, c := range w.rt.Calls() {
		for _, v := range verbs {
			if strings.HasPrefix(c, v) {
				out = append(out, c)
			}
		}
	}
	return strings.Join(out, ", ")
}

func (w *world) container(name string) corev1.ContainerStatus {
	w.t.Helper()
	p := w.pod(name)
	if p == nil || len(p.Status.ContainerStatuses) == 0 {
		return corev1.ContainerStatus{}
	}
	return p.Status.ContainerStatuses[0]
}

func TestPodLife(t *testing.T) {
	inBubble(t, func(w *world) {
		w.sleep(time.Second)
		p := simplePod("a")
		p.Spec.Containers[0].Resources.Limits = corev1.ResourceList{corev1.ResourceMemory: *quantity("64Mi"), corev1.ResourceCPU: *quantity("250m")}
		p.Spec.Containers[0].Resources.Requests = p.Spec.Containers[0].Resources.Limits
		w.create(p)
		w.sleep(time.Second)
		if s := w.container("a"); !s.Ready || s.State.Running == nil {
			t.Fatalf("not ready: %+v", w.pod("a").Status)
		}
		if l := w.cg.pods["uid-a"]; l != (cgroup.Limits{MilliCPURequest: 250, MilliCPULimit: 250, MemoryLimit: 64 << 20}) {
			t.Errorf("limits of the pod: %+v", l)
		}
		r := w.rt.Config("c").Linux.Resources
		if r.MemoryLimitInBytes != 64<<20 || r.CpuQuota != 25000 || r.CpuPeriod != 100000 || r.CpuShares != 256 || r.OomScoreAdj < 0 {
			t.Errorf("resources: %v", r)
		}
		w.delete("a", 30)
		w.sleep(time.Second)
		if w.pod("a") != nil {
			t.Errorf("still there: %+v", w.pod("a").Status)
		}
		w.sleep(20 * time.Second)
		if got := w.calls("run", "create", "start", "stop", "remove"); got != "run sandbox a, create c 0, start c, stop c 30, stop sandbox a, remove sandbox a" {
			t.Errorf("calls: %s", got)
		}
		if len(w.cg.pods) != 0 || len(w.store.Records()) != 0 {
			t.Errorf("left: cgroups %v, records %v", w.cg.pods, w.store.Records())
		}
		for _, e := range []string{"Pulled", "Created", "Started", "Killing Stopping container c"} {
			if !w.rec.has(e) {
				t.Errorf("no event %q in %v", e, w.rec.all)
			}
		}
	})
}

func TestCrashLoop(t *testing.T) {
	inBubble(t, func(w *world) {
		w.rt.Programs["c"] = fakecri.Program{Run: time.Second, ExitCode: 1}
		w.sleep(time.Second)
		w.create(simplePod("a"))
		var restarts []string
		last := int32(-1)
		began := time.Now()
		for time.Since(began) < 12*time.Minute {
			w.sleep(500 * time.Millisecond)
			if s := w.container("a"); s.RestartCount != last {
				last = s.RestartCount
				restarts = append(restarts, fmt.Sprint(int(time.Since(began).Seconds())))
			}
		}
		// It runs for 1 s each time: restarts at 1, 1+1+10, +1+20, +1+40, +1+80, +1+160, +1+300.
		if got, want := strings.Join(restarts, " "), "0 1 12 33 74 155 316 617"; got != want {
			t.Errorf("restarted at seconds %s, want %s", got, want)
		}
		if s := w.container("a"); s.State.Waiting == nil || s.State.Waiting.Reason != "CrashLoopBackOff" || !strings.Contains(s.State.Waiting.Message, "back-off 5m0s") || s.LastTerminationState.Terminated.ExitCode != 1 {
			t.Errorf("%+v", s)
		}
		if !w.rec.has("BackOff Back-off restarting failed container c in pod a_default(uid-a)") {
			t.Errorf("events: %v", w.rec.all)
		}
		// A restarted daemon goes on with the back-off.
		n := len(w.rt.Calls())
		w.stop()
		w.up()
		w.sleep(100 * time.Second)
		if got := w.rt.Calls()[n:]; slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, "start") }) {
			t.Errorf("the restarted daemon forgot the back-off: %v", got)
		}
	})
}

func TestGrace(t *testing.T) {
	for _, c := range []struct {
		name       string
		prog       fakecri.Program
		preStop    *corev1.LifecycleHandler
		grace      int64
		force      time.Duration // when the grace is cut to 1 s
		gone, stop string        // seconds until gone; how the container was stopped
	}{
		{name: "prompt", prog: fakecri.Program{Term: 2 * time.Second}, grace: 30, gone: "2", stop: "stop c 30"},
		{name: "deaf", prog: fakecri.Program{Term: -1}, grace: 30, gone: "30", stop: "stop c 30"},
		{name: "slow hook", prog: fakecri.Program{Term: -1}, preStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 12}}, grace: 30, gone: "30", stop: "stop c 18"},
		{name: "hook longer than the grace", prog: fakecri.Program{Term: -1}, preStop: &corev1.LifecycleHandler{Sleep: &corev1.SleepAction{Seconds: 99}}, grace: 10, gone: "12", stop: "stop c 2"},
		{name: "cut short", prog: fakecri.Program{Term: -1}, grace: 600, force: 5 * time.Second, gone: "7", stop: "stop c 600, stop c 2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			inBubble(t, func(w *world) {
				w.rt.Programs["c"] = c.prog
				w.sleep(time.Second)
				p := simplePod("a")
				if c.preStop != nil {
					p.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PreStop: c.preStop}
				}
				w.create(p)
				w.sleep(5 * time.Second)
				began := time.Now()
				w.delete("a", c.grace)
				if c.force > 0 {
					w.sleep(c.force)
					w.delete("a", 1)
				}
				for w.pod("a") != nil && time.Since(began) < time.Hour {
					w.sleep(100 * time.Millisecond)
				}
				if got := fmt.Sprint(int(time.Since(began).Seconds())); got != c.gone {
					t.Errorf("gone after %s s, want %s", got, c.gone)
				}
				if got := w.calls("stop c"); got != c.stop {
					t.Errorf("calls %q, want %q", got, c.stop)
				}
			})
		})
	}
}

func TestImagePullBackoff(t *testing.T) {
	inBubble(t, func(w *world) {
		w.rt.Pull = func(context.Context, string) error { return errors.New("no such registry") }
		w.sleep(time.Second)
		p := simplePod("a")
		p.Spec.Containers[0].Image = "far"
		w.create(p)
		began := time.Now()
		pulls := func() int { return strings.Count(w.calls("pull"), "pull") }
		var times []string
		seen := map[string]bool{}
		for n := 0; time.Since(began) < 10*time.Minute; w.sleep(500 * time.Millisecond) {
			if k := pulls(); k != n {
				n = k
				times = append(times, fmt.Sprint(int(time.Since(began).Seconds())))
			}
			if s := w.container("a").State.Waiting; s != nil {
				seen[s.Reason] = true
			}
		}
		if got, want := strings.Join(times, " "), "0 10 30 70 150 310"; got != want {
			t.Errorf("pulled at seconds %s, want %s", got, want)
		}
		if !seen["ErrImagePull"] || !seen["ImagePullBackOff"] {
			t.Errorf("reasons seen: %v", seen)
		}
		w.delete("a", 30)
		w.sleep(time.Second)
		if w.pod("a") != nil {
			t.Error("a pod that never ran is not gone")
		}
	})
}

func TestDeletedWhilePulling(t *testing.T) {
	inBubble(t, func(w *world) {
		w.rt.Pull = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		w.sleep(time.Second)
		p := simplePod("a")
		p.Spec.Containers[0].Image = "huge"
		w.create(p)
		w.sleep(time.Minute)
		w.delete("a", 30)
		w.sleep(time.Second)
		if w.pod("a") != nil {
			t.Error("a pull that takes for ever holds up the deletion")
		}
	})
}

func TestAPIDown(t *testing.T) {
	inBubble(t, func(w *world) {
		w.sleep(time.Second)
		w.create(simplePod("a"))
		w.sleep(time.Second)
		w.apiDown.Store("yes", errors.New("connection refused"))
		w.rt.Exit("c", 3)
		w.sleep(time.Minute)
		if got := w.calls("create"); got != "create c 0, create c 1" {
			t.Errorf("not restarted without the API: %s", got)
		}
		w.stop()
		w.rt.Reboot()
		w.up() // a reboot while cut off
		w.sleep(time.Minute)
		if got := w.calls("run", "create"); got != "run sandbox a, create c 0, create c 1, run sandbox a, create c 2" {
			t.Errorf("not started again after a reboot without the API: %s", got)
		}
		w.apiDown.Delete("yes")
		w.sleep(time.Minute)
		if s := w.container("a"); s.RestartCount != 2 || !s.Ready || s.LastTerminationState.Terminated == nil {
			t.Errorf("told afterwards: %+v", s)
		}
	})
}

func TestRuntimeDown(t *testing.T) {
	inBubble(t, func(w *world) {
		w.sleep(time.Second)
		w.create(simplePod("a"))
		w.sleep(time.Second)
		before := w.container("a")
		w.rt.SetDown(errors.New("connection refused"))
		w.sleep(30 * time.Second)
		n, err := w.api.CoreV1().Nodes().Get(t.Context(), "n1", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type == corev1.NodeReady })
		if c := n.Status.Conditions[i]; c.Status != corev1.ConditionFalse || !strings.Contains(c.Message, "container runtime is down") {
			t.Errorf("Ready: %+v", c)
		}
		w.rt.SetDown(nil)
		w.sleep(30 * time.Second)
		if s := w.container("a"); s.ContainerID != before.ContainerID || !s.Ready {
			t.Errorf("%+v", s)
		}
	})
}

func TestLivenessAndReadiness(t *testing.T) {
	inBubble(t, func(w *world) {
		var mu sync.Mutex
		code := 0
		w.rt.Programs["c"] = fakecri.Program{Exec: func([]string) (string, int, time.Duration) {
			mu.Lock()
			defer mu.Unlock()
			return "out", code, 0
		}}
		w.sleep(time.Second)
		p := simplePod("a")
		exec := corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: []string{"ok"}}}
		p.Spec.Containers[0].ReadinessProbe = &corev1.Probe{PeriodSeconds: 2, SuccessThreshold: 1, FailureThreshold: 1, InitialDelaySeconds: 5, ProbeHandler: exec}
		p.Spec.Containers[0].LivenessProbe = &corev1.Probe{PeriodSeconds: 10, SuccessThreshold: 1, FailureThreshold: 3, ProbeHandler: exec}
		w.create(p)
		w.sleep(4 * time.Second)
		if w.container("a").Ready {
			t.Error("ready before the initial delay")
		}
		w.sleep(2 * time.Second)
		if !w.container("a").Ready {
			t.Error("not ready after the first success")
		}
		mu.Lock()
		code = 1
		mu.Unlock()
		w.sleep(3 * time.Second)
		if w.container("a").Ready {
			t.Error("ready although the probe fails")
		}
		if got := w.calls("stop"); got != "" {
			t.Errorf("stopped too early: %s", got)
		}
		w.sleep(30 * time.Second)
		if got := w.calls("stop", "create"); got != "create c 0, stop c 30, create c 1" {
			t.Errorf("calls: %s", got)
		}
		if !w.rec.has("Killing Container c failed liveness probe, will be restarted") || !w.rec.has("Unhealthy Liveness probe failed: out") {
			t.Errorf("events: %v", w.rec.all)
		}
	})
}

func TestSidecarsStopLast(t *testing.T) {
	inBubble(t, func(w *world) {
		w.rt.Programs["c"] = fakecri.Program{Term: 5 * time.Second}
		always := corev1.ContainerRestartPolicyAlways
		w.sleep(time.Second)
		p := simplePod("a")
		p.Spec.InitContainers = []corev1.Container{{Name: "s1", Image: "img", RestartPolicy: &always}, {Name: "i", Image: "img"}, {Name: "s2", Image: "img", RestartPolicy: &always}}
		w.rt.Programs["i"] = fakecri.Program{Run: time.Second}
		w.create(p)
		w.sleep(5 * time.Second)
		w.delete("a", 30)
		w.sleep(10 * time.Second)
		if got, want := w.calls("create", "stop"), "create s1 0, create i 0, create s2 0, create c 0, stop c 30, stop s2 25, stop s1 25, stop sandbox a"; got != want {
			t.Errorf("calls %s, want %s", got, want)
		}
	})
}

// TestUnknownPods checks that a pod which the API does not have is stopped, but not before the API was heard.
func TestUnknownPods(t *testing.T) {
	inBubble(t, func(w *world) {
		w.sleep(time.Second)
		w.create(simplePod("a"))
		w.sleep(time.Second)
		w.stop()
		// Everything the node knew is lost.
		w.dir = w.t.TempDir()
		w.apiDown.Store("yes", errors.New("connection refused"))
		w.up()
		w.sleep(5 * time.Minute)
		if got := w.calls("stop"); got != "" {
			t.Errorf("stopped without hearing the API: %s", got)
		}
		if err := w.api.Tracker().Delete(schema.GroupVersionResource{Version: "v1", Resource: "pods"}, "default", "a"); err != nil {
			t.Fatal(err)
		}
		w.apiDown.Delete("yes")
		w.sleep(time.Minute)
		if got := w.calls("stop", "remove"); got != "stop c 30, stop sandbox a, remove sandbox a" {
			t.Errorf("calls: %s", got)
		}
	})
}

func TestSameNameAnotherUID(t *testing.T) {
	inBubble(t, func(w *world) {
		w.rt.Programs["c"] = fakecri.Program{Term: -1}
		w.sleep(time.Second)
		w.create(simplePod("a"))
		w.sleep(time.Second)
		pods := schema.GroupVersionResource{Version: "v1", Resource: "pods"}
		if err := w.api.Tracker().Delete(pods, "default", "a"); err != nil { // by force
			t.Fatal(err)
		}
		p := simplePod("a")
		p.UID = "uid-second"
		w.create(p)
		w.sleep(time.Minute)
		if got := w.pod("a"); got == nil || got.UID != "uid-second" || !got.Status.ContainerStatuses[0].Ready {
			t.Errorf("the second pod: %+v", got)
		}
		if got := w.calls("remove sandbox"); got != "remove sandbox a" {
			t.Errorf("the first one is not gone: %s", got)
		}
	})
}

func TestConfigMapComesLater(t *testing.T) {
	inBubble(t, func(w *world) {
		w.sleep(time.Second)
		p := simplePod("a")
		p.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "m"}}}}
		w.create(p)
		w.sleep(25 * time.Second)
		if s := w.container("a").State.Waiting; s == nil || s.Reason != "CreateContainerConfigError" {
			t.Fatalf("%+v", w.pod("a").Status)
		}
		if _, err := w.api.CoreV1().ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "m"}, Data: map[string]string{"K": "v"}}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		w.sleep(500 * time.Millisecond)
		if s := w.container("a"); !s.Ready {
			t.Errorf("not started when its ConfigMap came: %+v", s)
		}
		if env := w.rt.Config("c").Envs; len(env) != 1 || env[0].Key != "K" || string(env[0].Value) != "v" {
			t.Errorf("environment: %v", env)
		}
	})
}

// A pod does not run without the devices that it claims.
func TestNoDevices(t *testing.T) {
	inBubble(t, func(w *world) {
		w.sleep(time.Second)
		p := simplePod("a")
		claim := "gpu-1"
		p.Spec.ResourceClaims = []corev1.PodResourceClaim{{Name: "gpu", ResourceClaimName: &claim}}
		w.create(p)
		w.sleep(time.Hour)
		if s := w.pod("a").Status; s.Phase != corev1.PodPending || len(s.ContainerStatuses) == 1 && s.ContainerStatuses[0].State.Waiting == nil {
			t.Errorf("%+v", s)
		}
		if !w.rec.has("FailedPrepareDynamicResources") || !w.rec.has("claims of the pod: gpu") {
			t.Errorf("events: %v", w.rec.all)
		}
		if n := len(w.rec.all); n > 65 { // at most one a minute, and those of the start
			t.Errorf("%d events in an hour", n)
		}
	})
}

func TestStartFails(t *testing.T) {
	inBubble(t, func(w *world) {
		w.rt.Programs["c"] = fakecri.Program{StartErr: errors.New("exec: no such file")}
		w.sleep(time.Second)
		w.create(simplePod("a"))
		w.sleep(5 * time.Second)
		s := w.container("a")
		if s.State.Waiting == nil || s.State.Waiting.Reason != "RunContainerError" && s.State.Waiting.Reason != "CrashLoopBackOff" || s.RestartCount != 1 {
			t.Errorf("%+v", s)
		}
		if s.LastTerminationState.Terminated == nil || s.LastTerminationState.Terminated.Reason != "StartError" || s.LastTerminationState.Terminated.ExitCode != 128 {
			t.Errorf("last: %+v", s.LastTerminationState)
		}
	})
}
