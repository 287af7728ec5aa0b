package scheduler

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/tools/record"
)

func TestWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var inspector Inspector
		if _, err := inspector.Why("default", "x"); !errors.Is(err, ErrNotLeading) {
			t.Errorf("before anything runs: %v", err)
		}
		gated := func(p *v1.Pod) { p.Spec.SchedulingGates = []v1.PodSchedulingGate{{Name: "example.com/quota"}} }
		client := newClient(nil, testNode("n1", "4"), testNode("n2", "2"))
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() {
			ended <- Run(ctx, Config{
				Client: client, Health: newHealth(), PodCIDR: prefix("10.244.0.0/16"), Inspector: &inspector, Controllers: []NewController{}, Seed: 1,
				Recorder: func(string) record.EventRecorder { return record.NewFakeRecorder(1000) },
			})
		}()
		create(t, client, testPod("small", "1"))
		settle(time.Second)
		create(t, client, testPod("big", "3500m"), testPod("gated", "1", gated),
			testPod("foreign", "1", func(p *v1.Pod) { p.Spec.SchedulerName = "another" }),
			testPod("done", "1", func(p *v1.Pod) { p.Spec.NodeName, p.Status.Phase = "n1", v1.PodSucceeded }))
		settle(time.Minute)
		for name, want := range map[string]string{
			"small":   "n1|Of the 2 nodes that can take it (2 in all) n1 scores best.",
			"big":     "|None of 2 nodes can take it. The least that would help, on n1: 500m more of cpu free, or a request of at most 3.",
			"gated":   "|It is held back by its scheduling gates (example.com/quota): it is placed when whoever set them has removed them.",
			"foreign": `|It waits for a scheduler of the name "another"; here that may be one of default-scheduler.`,
			"done":    "n1|It has ended (Succeeded), so it holds nothing on any node.",
		} {
			w, err := inspector.Why("default", name)
			if got := w.Node + "|" + strings.Join(w.Summary, " "); err != nil || got != want {
				t.Errorf("%s: %v\n     %s\nwant %s", name, err, got, want)
			}
		}
		w, err := inspector.Why("default", "big")
		if err != nil || !strings.HasPrefix(w.Message, "0/2 nodes are available: 2 Insufficient cpu.") || len(w.Nodes) != 2 || w.Nodes[0].Node != "n1" {
			t.Errorf("%+v, %v", w, err)
		}
		// Asking changes nothing: what runs still holds its place.
		if w, err = inspector.Why("default", "small"); err != nil || w.Nodes[0].Total == 0 {
			t.Errorf("%+v, %v", w, err)
		}
		if again, err := inspector.Why("default", "big"); err != nil || again.Summary[1] != "The least that would help, on n1: 500m more of cpu free, or a request of at most 3." {
			t.Errorf("%+v, %v", again, err)
		}
		if _, err := inspector.Why("default", "none"); !apierrors.IsNotFound(err) {
			t.Errorf("a pod that is not: %v", err)
		}
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if _, err := inspector.Why("default", "small"); !errors.Is(err, ErrNotLeading) {
			t.Errorf("after the leadership: %v", err)
		}
	})
}
