package scheduler

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

// placing runs placement alone against the client until the test ends.
func placing(t *testing.T, client *fake.Clientset, health *fakeHealth, edit ...func(*Config)) *record.FakeRecorder {
	t.Helper()
	rec := record.NewFakeRecorder(10000)
	cfg := Config{
		Client: client, Factory: controller.NewFactory(client), Health: health, Seed: 1,
		Recorder: func(string) record.EventRecorder { return rec },
	}
	for _, fn := range edit {
		fn(&cfg)
	}
	cfg.setDefaults()
	l := newLoop(cfg, controller.Deps{Client: cfg.Client, Factory: cfg.Factory, Recorder: cfg.Recorder})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	cfg.Factory.Start(ctx.Done())
	go func() { done <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("placement ended with %v", err)
		}
		cfg.Factory.Shutdown()
	})
	return rec
}

func settle(d time.Duration) {
	time.Sleep(d) // virtual
	synctest.Wait()
}

func TestPlacesPendingPodsAndSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "4"), testNode("b", "4"), testPod("early", "1"))
		rec := placing(t, client, newHealth())
		settle(time.Second)
		create(t, client, testPod("late", "1"), testPod("foreign", "1", func(p *v1.Pod) { p.Spec.SchedulerName = "other" }))
		settle(time.Second)
		early, late := get(t, client, "early").Spec.NodeName, get(t, client, "late").Spec.NodeName
		if early == "" || late == "" || early == late {
			t.Errorf("early on %q, late on %q: want both placed, on different nodes", early, late)
		}
		if n := get(t, client, "foreign").Spec.NodeName; n != "" {
			t.Errorf("a pod of another scheduler was placed on %q", n)
		}
		want := "Normal Scheduled Successfully assigned default/early to " + early
		if events := controllertest.Events(rec); len(events) != 2 || events[0] != want {
			t.Errorf("events %q, want %q first", events, want)
		}
	})
}

func TestRefusedPodIsExplainedOnceAndWokenByWhatHelps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "1"), testNode("b", "8", func(n *v1.Node) { n.Spec.Unschedulable = true }))
		rec := placing(t, client, newHealth())
		create(t, client, testPod("big", "2"))
		settle(time.Second)
		cond := podCondition(get(t, client, "big"), v1.PodScheduled)
		want := "0/2 nodes are available: 1 Insufficient cpu, 1 node(s) were unschedulable. no new claims to deallocate, preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling."
		if cond == nil || cond.Status != v1.ConditionFalse || cond.Reason != v1.PodReasonUnschedulable || cond.Message != want {
			t.Fatalf("condition %+v, want message %q", cond, want)
		}
		if events := controllertest.Events(rec); len(events) != 1 || events[0] != "Warning FailedScheduling "+want {
			t.Errorf("events %q", events)
		}
		writes := len(client.Actions())
		settle(12 * time.Minute) // two more attempts, for want of events
		if n := len(client.Actions()) - writes; n != 0 {
			t.Errorf("%d requests while nothing changed: %v", n, client.Actions()[writes:])
		}
		n := testNode("b", "8")
		if _, err := client.CoreV1().Nodes().Update(t.Context(), n, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(50 * time.Millisecond)
		if n := get(t, client, "big").Spec.NodeName; n != "b" {
			t.Errorf("after the node was uncordoned the pod is on %q", n)
		}
	})
}

func TestLostNodeIsAvoidedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		health := newHealth()
		health.set("a", NodeHealth{State: Alive})
		client := newClient(nil, testNode("a", "8"))
		placing(t, client, health)
		settle(time.Second)
		health.set("a", NodeHealth{State: Dead, Since: time.Now()})
		settle(time.Millisecond)
		create(t, client, testPod("p", "1"))
		settle(time.Minute)
		if n := get(t, client, "p").Spec.NodeName; n != "" {
			t.Fatalf("placed on %q, which is dead", n)
		}
		health.set("a", NodeHealth{State: Alive})
		settle(10 * time.Millisecond)
		if n := get(t, client, "p").Spec.NodeName; n != "a" {
			t.Errorf("not placed when the node came back")
		}
	})
}

func TestRefusedBindingIsUndoneAndTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var refusals atomic.Int64
		client := newClient(func(pod, node string) error {
			if refusals.Add(1) <= 3 {
				return apierrors.NewTooManyRequestsError("etcdserver: too many requests")
			}
			return nil
		}, testNode("a", "1"))
		placing(t, client, newHealth())
		start := time.Now()
		create(t, client, testPod("p", "1"))
		settle(6 * time.Second)
		if get(t, client, "p").Spec.NodeName != "" {
			t.Fatalf("bound after %v, before three back-offs (1+2+4 s) were over", time.Since(start))
		}
		settle(2 * time.Second)
		if get(t, client, "p").Spec.NodeName != "a" {
			t.Errorf("not bound after its back-offs: its own refused binding may hold the room")
		}
	})
}

func TestGatedPodWaitsForItsGates(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "8"))
		placing(t, client, newHealth())
		create(t, client, testPod("p", "1", func(p *v1.Pod) { p.Spec.SchedulingGates = []v1.PodSchedulingGate{{Name: "example.com/g"}} }))
		settle(10 * time.Minute)
		p := get(t, client, "p")
		if p.Spec.NodeName != "" || podCondition(p, v1.PodScheduled) != nil {
			t.Fatalf("a gated pod was touched: %+v", p)
		}
		p.Spec.SchedulingGates = nil
		if _, err := client.CoreV1().Pods("default").Update(t.Context(), p, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		settle(10 * time.Millisecond)
		if get(t, client, "p").Spec.NodeName != "a" {
			t.Error("not placed when its gate was removed")
		}
	})
}

// Never over capacity, every pod bound, although many bindings are refused.
func TestManyPodsUnderRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n atomic.Int64
		objs := []runtime.Object{}
		for i := range 10 {
			objs = append(objs, testNode(fmt.Sprintf("n%d", i), "10"))
		}
		client := newClient(func(string, string) error {
			if n.Add(1)%7 == 0 {
				return apierrors.NewTooManyRequestsError("try again")
			}
			return nil
		}, objs...)
		placing(t, client, newHealth())
		for i := range 100 {
			create(t, client, testPod(fmt.Sprintf("p%d", i), "1"))
		}
		settle(time.Minute)
		list, err := client.CoreV1().Pods("default").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		per := map[string]int{}
		for _, p := range list.Items {
			per[p.Spec.NodeName]++
		}
		if per[""] != 0 || len(per) != 10 {
			t.Errorf("pods by node: %v", per)
		}
		for node, pods := range per {
			if pods != 10 {
				t.Errorf("%s has %d pods, its cpu is for 10", node, pods)
			}
		}
	})
}

func TestPreemptsLowerPriority(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		low := testPod("low", "3", func(p *v1.Pod) { p.Spec.NodeName = "a" })
		client := newClient(nil, testNode("a", "4"), low)
		rec := placing(t, client, newHealth())
		settle(time.Second)
		high := int32(1000)
		create(t, client, testPod("high", "2", func(p *v1.Pod) { p.Spec.Priority = &high }))
		settle(5 * time.Second)
		p := get(t, client, "high")
		if p.Spec.NodeName != "a" {
			t.Fatalf("not placed: %+v", p.Status)
		}
		if _, err := client.CoreV1().Pods("default").Get(t.Context(), "low", metav1.GetOptions{}); err == nil {
			t.Error("the pod of lower priority is still there")
		}
		if events := strings.Join(controllertest.Events(rec), "\n"); !strings.Contains(events, "Preempted by pod pod-high on node a") {
			t.Errorf("events: %s", events)
		}
	})
}

// While its victims end, nobody of lower priority may take the room of a pod.
func TestRoomMadeByPreemptionIsKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "4"), testPod("low", "3", func(p *v1.Pod) { p.Spec.NodeName = "a" }))
		endSlowly(client)
		placing(t, client, newHealth())
		settle(time.Second)
		high := int32(1000)
		create(t, client, testPod("high", "4", func(p *v1.Pod) { p.Spec.Priority = &high }))
		settle(time.Second)
		create(t, client, testPod("thief", "1"))
		settle(20 * time.Second)
		if n := get(t, client, "high").Status.NominatedNodeName; n != "a" {
			t.Errorf("nominated to %q", n)
		}
		if n := get(t, client, "thief").Spec.NodeName; n != "" {
			t.Errorf("a pod of lower priority took the room on %q", n)
		}
		if err := client.Tracker().Delete(v1.SchemeGroupVersion.WithResource("pods"), "default", "low"); err != nil {
			t.Fatal(err)
		}
		settle(time.Second)
		if n := get(t, client, "high").Spec.NodeName; n != "a" {
			t.Errorf("not placed when its victim had ended: %+v", get(t, client, "high").Status)
		}
	})
}

// News of a pod from before its binding must not make it planned once more.
func TestLateNewsOfABoundPod(t *testing.T) {
	client := newClient(nil)
	cfg := Config{Client: client, Health: newHealth(), Recorder: func(string) record.EventRecorder { return record.NewFakeRecorder(10) }}
	cfg.setDefaults()
	l := newLoop(cfg, controller.Deps{Client: cfg.Client, Factory: cfg.Factory, Recorder: cfg.Recorder})
	l.nodeChanged(nil, testNode("a", "4"))
	pod := testPod("p", "1")
	l.podChanged(nil, pod)
	if jobs, _, _ := l.plan(); len(jobs) != 1 {
		t.Fatalf("%d jobs", len(jobs))
	}
	late := pod.DeepCopy()
	late.Labels = map[string]string{"new": "label"}
	l.podChanged(pod, late) // while the binding is under way
	l.bound(pod)
	l.podChanged(late, late.DeepCopy()) // after it
	if jobs, _, _ := l.plan(); len(jobs) != 0 {
		t.Errorf("planned again: %+v", jobs)
	}
	now := metav1.Now()
	gone := testPod("q", "1")
	l.podChanged(nil, gone)
	l.plan()
	deleting := gone.DeepCopy()
	deleting.DeletionTimestamp = &now
	l.podChanged(gone, deleting)
	l.undo(gone, false) // refused because it is being deleted
	if n := l.queue.Lengths(); n.Backoff+n.Active+n.Waiting+n.InFlight != 0 {
		t.Errorf("a pod that is being deleted is tried again: %+v", n)
	}
	if l.snapshot.PodNode(gone.UID) != "" {
		t.Error("the refused decision still holds its room")
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("a", "4"))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- Run(ctx, Config{
				Client: client, Health: newHealth(), PodCIDR: prefix("10.244.0.0/16"),
				Controllers: []NewController{newNode},
				Recorder:    func(string) record.EventRecorder { return record.NewFakeRecorder(1000) },
			})
		}()
		settle(time.Second)
		create(t, client, testPod("p", "1"))
		settle(time.Second)
		if get(t, client, "p").Spec.NodeName != "a" {
			t.Error("Run placed nothing")
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestConfigReportsAllFaults(t *testing.T) {
	err := Run(t.Context(), Config{BindWorkers: -1})
	for _, want := range []string{"Client", "Health", "Metadata", "PodCIDR", "BindWorkers"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not mention %s", err, want)
		}
	}
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

// A binding whose answer is lost may have been carried out: its room is not given away before that is known.
func TestLostAnswerOfABindingKeepsItsRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := newClient(nil, testNode("n1", "1"))
		pods := schema.GroupVersionResource{Version: "v1", Resource: "pods"}
		lost, tries := 2, 0
		client.PrependReactor("create", "pods", func(a clienttesting.Action) (bool, runtime.Object, error) {
			if a.GetSubresource() != "binding" {
				return false, nil, nil
			}
			b := a.(clienttesting.CreateAction).GetObject().(*v1.Binding)
			if b.Name != "a" {
				t.Errorf("%s was to be bound as well", b.Name)
				return false, nil, nil
			}
			if tries++; tries > lost {
				return false, nil, nil // refused: it is bound already
			}
			if tries == 2 { // this one reached the API
				obj, err := client.Tracker().Get(pods, "default", "a")
				if err != nil {
					t.Error(err)
				}
				pod := obj.(*v1.Pod).DeepCopy()
				pod.Spec.NodeName = b.Target.Name
				if err := client.Tracker().Update(pods, pod, "default"); err != nil {
					t.Error(err)
				}
			}
			return true, nil, errors.New("the connection was lost")
		})
		placing(t, client, newHealth())
		create(t, client, testPod("a", "800m"))
		time.Sleep(time.Millisecond)
		create(t, client, testPod("b", "800m"))
		time.Sleep(time.Minute)
		synctest.Wait()
		if got := get(t, client, "a").Spec.NodeName; got != "n1" {
			t.Errorf("a is on %q", got)
		}
		if got := get(t, client, "b").Spec.NodeName; got != "" {
			t.Errorf("b is on %q, beside a", got)
		}
		if tries < 2 {
			t.Errorf("%d tries", tries)
		}
	})
}
