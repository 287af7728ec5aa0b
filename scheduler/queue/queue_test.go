package queue

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

var t0 = time.Unix(1000, 0)

func at(seconds float64) time.Time { return t0.Add(time.Duration(seconds * float64(time.Second))) }

func mk(name string, priority int32) *v1.Pod {
	return &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID(name)}, Spec: v1.PodSpec{Priority: &priority}}
}

func popNames(q *Queue, n int, now time.Time) (out []string) {
	for _, p := range q.Pop(n, now) {
		out = append(out, p.Pod.Name)
	}
	return out
}

func expect(t *testing.T, what string, got []string, want ...string) {
	t.Helper()
	if len(got) != len(want) || len(want) > 0 && !reflect.DeepEqual(got, want) {
		t.Errorf("%s: popped %v, want %v", what, got, want)
	}
}

func TestPriorityThenArrival(t *testing.T) {
	q := New(Config{})
	q.Add(mk("low", 0), false, at(0))
	q.Add(mk("high", 9), false, at(1))
	q.Add(mk("low2", 0), false, at(1))
	q.Add(mk("high2", 9), false, at(1))
	expect(t, "two", popNames(q, 2, at(1)), "high", "high2")
	expect(t, "rest", popNames(q, 9, at(1)), "low", "low2")
	expect(t, "in flight", popNames(q, 9, at(100)))
}

func TestErrorsBackOffFromOneToTenSeconds(t *testing.T) {
	q := New(Config{})
	q.Add(mk("p", 0), false, at(0))
	now := t0
	for i, want := range []float64{1, 2, 4, 8, 10, 10, 10} {
		expect(t, fmt.Sprint("attempt ", i), popNames(q, 1, now), "p")
		q.Failed("p", now)
		next, ok := q.Next(now)
		if got := next.Sub(now).Seconds(); !ok || got != want {
			t.Fatalf("after failure %d: next in %v s (%v), want %v", i+1, got, ok, want)
		}
		expect(t, "too early", popNames(q, 1, next.Add(-time.Millisecond)))
		now = next
	}
}

func TestWaitingPodIsWokenOnlyByWhatHelps(t *testing.T) {
	q := New(Config{})
	q.Add(mk("p", 0), false, at(0))
	q.Pop(1, at(0))
	q.Unschedulable("p", NodeAdded|PodGone, at(0))
	if n := q.Move(NodeLabels|PodPlaced, nil, at(2)); n != 0 {
		t.Errorf("%d pods woken by what cannot help", n)
	}
	expect(t, "asleep", popNames(q, 1, at(2)))
	if n := q.Move(PodGone, func(*v1.Pod) bool { return false }, at(2)); n != 0 {
		t.Errorf("%d pods woken against the caller's advice", n)
	}
	if n := q.Move(PodGone, nil, at(3)); n != 1 {
		t.Errorf("%d pods woken", n)
	}
	expect(t, "awake", popNames(q, 1, at(3)), "p")
}

func TestIdleQueueDoesNotSitOutABackOffOfRefusal(t *testing.T) {
	q := New(Config{})
	q.Add(mk("p", 0), false, at(0))
	q.Pop(1, at(0))
	q.Unschedulable("p", NodeAdded, at(0))
	q.Move(NodeAdded, nil, at(0.1))
	q.Add(mk("fresh", 0), false, at(0.1))
	// What is active goes first; then, with nothing better to do, the pod that
	// still backs off.
	expect(t, "both", popNames(q, 2, at(0.1)), "fresh", "p")
}

func TestEventInFlightIsNotLost(t *testing.T) {
	for _, tc := range []struct {
		ev    Event
		woken bool
	}{{NodeAdded, true}, {NodeLabels, false}} {
		q := New(Config{})
		q.Add(mk("p", 0), false, at(0))
		q.Pop(1, at(0))
		q.Move(tc.ev, nil, at(0))
		q.Unschedulable("p", NodeAdded, at(0))
		if got := len(popNames(q, 1, at(1.5))) == 1; got != tc.woken {
			t.Errorf("event %b: woken %v, want %v", tc.ev, got, tc.woken)
		}
	}
	// A new version of the pod itself counts as well.
	q := New(Config{})
	q.Add(mk("p", 0), false, at(0))
	q.Pop(1, at(0))
	q.Add(mk("p", 0), true, at(0))
	q.Unschedulable("p", NodeAdded, at(0))
	expect(t, "changed in flight", popNames(q, 1, at(2)), "p")
}

func TestWaitingEndsAfterFiveMinutes(t *testing.T) {
	q := New(Config{})
	q.Add(mk("p", 0), false, at(0))
	q.Pop(1, at(0))
	q.Unschedulable("p", NodeAdded, at(0))
	if next, ok := q.Next(at(1)); !ok || next != at(300) {
		t.Errorf("next %v %v", next, ok)
	}
	expect(t, "before", popNames(q, 1, at(299)))
	expect(t, "after", popNames(q, 1, at(300)), "p")
}

func TestGates(t *testing.T) {
	q := New(Config{})
	gated := mk("p", 0)
	gated.Spec.SchedulingGates = []v1.PodSchedulingGate{{Name: "g"}}
	q.Add(gated, false, at(0))
	q.Move(Any, nil, at(1))
	expect(t, "gated", popNames(q, 1, at(1000)))
	if _, ok := q.Next(at(1000)); ok {
		t.Error("a gated pod has a time")
	}
	if l := q.Lengths(); l != (Lengths{Gated: 1}) {
		t.Errorf("%+v", l)
	}
	q.Add(mk("p", 0), false, at(1001))
	expect(t, "open", popNames(q, 1, at(1001)), "p")
}

func TestRemovedInFlight(t *testing.T) {
	q := New(Config{})
	q.Add(mk("p", 0), false, at(0))
	q.Pop(1, at(0))
	q.Remove("p")
	q.Unschedulable("p", Any, at(0))
	q.Failed("p", at(0))
	q.Done("p")
	if l := q.Lengths(); l != (Lengths{}) {
		t.Errorf("%+v after its pod is gone", l)
	}
	expect(t, "nothing", popNames(q, 1, at(1000)))
}

func TestConfigFaults(t *testing.T) {
	if err := (Config{}).Validate(); err != nil {
		t.Errorf("defaults: %v", err)
	}
	if err := (Config{FirstBackoff: time.Minute, LongestWait: time.Second}).Validate(); err == nil {
		t.Error("no fault found")
	}
}

// Under any history a pod is in one place, is popped once at a time, and,
// unless gated, comes up again.
func TestNoPodIsLostOrDoubled(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	q := New(Config{})
	now := t0
	exists, flying := map[types.UID]bool{}, map[types.UID]bool{}
	for range 20000 {
		now = now.Add(time.Duration(r.IntN(2000)) * time.Millisecond)
		uid := types.UID(fmt.Sprint("p", r.IntN(30)))
		switch r.IntN(7) {
		case 0:
			p := mk(string(uid), int32(r.IntN(3)))
			q.Add(p, r.IntN(2) == 0, now)
			exists[uid] = true
		case 1:
			q.Remove(uid)
			delete(exists, uid)
			delete(flying, uid)
		case 2:
			q.Move(Event(1<<r.IntN(12)), nil, now)
		case 3, 4:
			for _, p := range q.Pop(1+r.IntN(5), now) {
				if flying[p.Pod.UID] || !exists[p.Pod.UID] {
					t.Fatalf("%s popped: in flight %v, exists %v", p.Pod.UID, flying[p.Pod.UID], exists[p.Pod.UID])
				}
				flying[p.Pod.UID] = true
			}
		default:
			if !flying[uid] {
				continue
			}
			delete(flying, uid)
			switch r.IntN(3) {
			case 0:
				q.Done(uid)
				delete(exists, uid)
			case 1:
				q.Failed(uid, now)
			default:
				q.Unschedulable(uid, Event(1<<r.IntN(12)), now)
			}
		}
		l := q.Lengths()
		if l.Active+l.Backoff+l.Waiting+l.InFlight+l.Gated != len(exists) || l.InFlight != len(flying) {
			t.Fatalf("%+v for %d pods, %d in flight", l, len(exists), len(flying))
		}
	}
	for uid := range flying {
		q.Done(uid)
		delete(exists, uid)
	}
	if got := len(q.Pop(1000, now.Add(time.Hour))); got != len(exists) {
		t.Errorf("%d of %d pods came up again", got, len(exists))
	}
}

// A stream of important pods, more than can be tried, starves nobody: the
// oldest pod gets its turn among them.
func TestPatienceEndsStarvation(t *testing.T) {
	q := New(Config{})
	q.Add(mk("humble", 0), false, at(0))
	important := 0
	for second := 1; second <= 60; second++ {
		for range 20 {
			important++
			q.Add(mk(fmt.Sprint("vip", important), 9), false, at(float64(second)))
		}
		for _, name := range popNames(q, 10, at(float64(second))) {
			if name == "humble" {
				if second <= 10 {
					t.Errorf("out of turn after %d s already", second)
				}
				return
			}
			q.Done(types.UID(name))
		}
	}
	t.Error("starved for a minute")
}

// Without anybody who has waited for long, priority alone decides.
func TestPriorityIsStrictWhileNobodyWaitsForLong(t *testing.T) {
	q := New(Config{})
	q.Add(mk("humble", 0), false, at(0))
	for i := range 3 * fairEvery {
		q.Add(mk(fmt.Sprintf("vip%02d", i), 9), false, at(1))
	}
	names := popNames(q, 3*fairEvery+1, at(9))
	if names[len(names)-1] != "humble" {
		t.Errorf("popped %v", names)
	}
}

// An event looks only at the pods that named it: with thousands that wait for
// other things it stays cheap.
func TestMoveAsksOnlyThoseConcerned(t *testing.T) {
	q := New(Config{})
	for i := range 1000 {
		q.Add(mk(fmt.Sprint("p", i), 0), false, at(0))
	}
	for i, p := range q.Pop(1000, at(0)) {
		wake := PodGone
		if i%100 == 0 {
			wake = PeerGone | Topology
		}
		q.Unschedulable(p.Pod.UID, wake, at(0))
	}
	asked := 0
	if n := q.Move(Topology, func(*v1.Pod) bool { asked++; return asked%2 == 0 }, at(2)); n != 5 || asked != 10 {
		t.Errorf("%d asked, %d woken; want 10 and 5", asked, n)
	}
	if l := q.Lengths(); l != (Lengths{Active: 5, Waiting: 995}) {
		t.Errorf("%+v", l)
	}
	// What is left wakes at last by itself, all at once, and nothing is kept of it.
	if got := len(q.Pop(2000, at(301))); got != 1000 {
		t.Errorf("%d pods after five minutes", got)
	}
	if len(q.waiting) != 0 || q.waits.Len() != 0 {
		t.Errorf("%d groups and %d pods are left", len(q.waiting), q.waits.Len())
	}
}

// The cost of an attempt does not grow with the pods that wait.
func BenchmarkWithWaiting(b *testing.B) {
	for _, waiting := range []int{100, 100_000} {
		b.Run(fmt.Sprint(waiting), func(b *testing.B) {
			q := New(Config{})
			for i := range waiting {
				q.Add(mk(fmt.Sprint("w", i), 0), false, t0)
			}
			for _, p := range q.Pop(waiting, t0) {
				q.Unschedulable(p.Pod.UID, NodeAdded, t0)
			}
			pod := mk("p", 0)
			for b.Loop() {
				q.Add(pod, false, t0)
				q.Pop(1, t0)
				q.Move(PodPlaced, nil, t0)
				q.Next(t0)
				q.Done("p")
			}
		})
	}
}
