package usage

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

var epoch = time.Unix(1700000000, 0)

func pod(name string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{"app": name}}}
}

func at(s float64) time.Time { return epoch.Add(time.Duration(s * float64(time.Second))) }

func TestRates(t *testing.T) {
	second := uint64(time.Second)
	base := Sample{At: at(0), CPU: 100 * second, Memory: 1 << 30, Containers: map[string]Container{
		"a1": {PodUID: "uid-a", Name: "web", Started: at(-100), At: at(0), CPU: 10 * second, Memory: 1 << 20},
		"a2": {PodUID: "uid-a", Name: "side", Started: at(-100), At: at(0.5), CPU: second},
		"b1": {PodUID: "uid-b", Name: "web", Started: at(-50), At: at(0), CPU: 7 * second}, // made anew since
		"x1": {PodUID: "uid-x", Name: "web", At: at(0), CPU: second},                       // gone since
	}}
	now := Sample{At: at(10), CPU: 115 * second, Memory: 2 << 30, Containers: map[string]Container{
		"a1": {PodUID: "uid-a", Name: "web", Started: at(-100), At: at(10), CPU: 15 * second, Memory: 3 << 20},
		"a2": {PodUID: "uid-a", Name: "side", Started: at(-100), At: at(10), CPU: second},
		"b2": {PodUID: "uid-b", Name: "web", Started: at(6), At: at(10), CPU: second},
		"c1": {PodUID: "uid-c", Name: "web", Started: at(9.8), At: at(10), CPU: second}, // too young
		"u1": {PodUID: "unknown", Name: "web", Started: at(0), At: at(10), CPU: second}, // of no pod of this node
	}}
	r := Rates("n1", base, now, []*corev1.Pod{pod("c"), pod("b"), pod("a"), pod("pending")})
	if got := r.Node.Usage.Cpu().MilliValue(); r.Node.Name != "n1" || got != 1500 || r.Node.Usage.Memory().Value() != 2<<30 || r.Node.Window.Duration != 10*time.Second {
		t.Errorf("node: %+v", r.Node)
	}
	if len(r.Pods) != 2 || r.Pods[0].Name != "a" || r.Pods[1].Name != "b" {
		t.Fatalf("pods: %+v", r.Pods)
	}
	a, b := r.Pods[0], r.Pods[1]
	if len(a.Containers) != 2 || a.Containers[0].Name != "side" || a.Containers[0].Usage.Cpu().MilliValue() != 0 || a.Containers[1].Usage.Cpu().MilliValue() != 500 ||
		a.Containers[1].Usage.Memory().Value() != 3<<20 || a.Window.Duration != 10*time.Second || a.Labels["app"] != "a" {
		t.Errorf("a: %+v", a)
	}
	if b.Containers[0].Usage.Cpu().MilliValue() != 250 || b.Window.Duration != 4*time.Second {
		t.Errorf("a container that began within the window: %+v", b)
	}
}

// A counter that went back (the container was started anew under its id) counts from the start.
func TestRateOfResetCounter(t *testing.T) {
	base := Sample{At: at(0), Containers: map[string]Container{"a": {PodUID: "uid-a", Name: "c", Started: at(-9), At: at(0), CPU: 9e9}}}
	now := Sample{At: at(10), Containers: map[string]Container{"a": {PodUID: "uid-a", Name: "c", Started: at(5), At: at(10), CPU: 1e9}}}
	if r := Rates("n", base, now, []*corev1.Pod{pod("a")}); len(r.Pods) != 1 || r.Pods[0].Containers[0].Usage.Cpu().MilliValue() != 200 {
		t.Errorf("%+v", r.Pods)
	}
}

func TestSampler(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		taken := 0
		s := NewSampler(func(context.Context) (Sample, error) {
			taken++
			return Sample{At: time.Now()}, nil
		})
		window := func() time.Duration {
			t.Helper()
			base, now, err := s.Window(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return now.At.Sub(base.At)
		}
		began := time.Now()
		if w := window(); w != shortest || taken != 2 || time.Since(began) != shortest {
			t.Errorf("the first: window %s, %d samples, after %s", w, taken, time.Since(began))
		}
		// Many who ask at once share one sample.
		time.Sleep(4 * time.Second)
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if w := window(); w != 5*time.Second {
					t.Errorf("window %s", w)
				}
			})
		}
		wg.Wait()
		if taken != 3 {
			t.Errorf("%d samples", taken)
		}
		// Regularly.
		for range 50 {
			time.Sleep(15 * time.Second)
			if w := window(); w < wanted || w > 25*time.Second {
				t.Errorf("window %s", w)
			}
		}
		// Often: the window does not shrink, and the samples are bounded.
		for range 500 {
			time.Sleep(Shared)
			if w := window(); w < wanted || w > 25*time.Second {
				t.Errorf("window %s", w)
			}
		}
		if len(s.samples) > maxKept+1 {
			t.Errorf("%d samples are kept", len(s.samples))
		}
		// After a long rest it is as at first.
		before := taken
		time.Sleep(time.Hour)
		if w := window(); w != shortest || taken != before+2 {
			t.Errorf("after an hour: window %s, %d samples", w, taken-before)
		}
	})
}

func TestSamplerFails(t *testing.T) {
	broken := errors.New("no runtime")
	s := NewSampler(func(context.Context) (Sample, error) { return Sample{}, broken })
	if _, _, err := s.Window(t.Context()); !errors.Is(err, broken) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s = NewSampler(func(context.Context) (Sample, error) { return Sample{At: time.Now()}, nil })
	if _, _, err := s.Window(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
