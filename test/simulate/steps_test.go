package simulate

import (
	"net/http"
	"os"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// TestLeaderChangesAtEveryStep deposes the leader after its first write, in another history after its second, and so on to the last of a
// roll-out of a Deployment and a StatefulSet and a Job, once with the answer to that write and once without. Nothing is lost or doubled.
func TestLeaderChangesAtEveryStep(t *testing.T) {
	stride := uint64(7) // coprime to what comes in pairs
	if os.Getenv("SKEIN_LONG") != "" {
		stride = 1
	}
	histories := 0
	for step := uint64(1); ; step += stride {
		if !deposedAt(t, step, histories%2 == 0) {
			break
		}
		histories++
	}
	t.Logf("%d histories", histories)
	if histories < 10 {
		t.Errorf("only %d steps", histories)
	}
}

// deposedAt plays one history; false if it had fewer steps.
func deposedAt(t *testing.T, step uint64, answered bool) (reached bool) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(step, nil)
		w.jobLength = 3 * time.Second
		defer w.stop()
		for _, n := range []string{"n1", "n2", "n3"} {
			w.agents.add(n, "z", "4", "8Gi")
		}
		hit, done := make(chan struct{}), make(chan struct{})
		var writes atomic.Uint64
		w.afterWrite = func(*http.Request) error {
			if writes.Add(1) != step {
				return nil
			}
			close(hit)
			<-done
			if !answered {
				return errSimulated
			}
			return nil
		}
		w.make(deployment("default", "web", 4, intstr.FromInt32(1), intstr.FromInt32(1), false))
		w.make(service("default", "web"))
		w.make(statefulSet("default", "db", 3, appsv1.OrderedReadyPodManagement))
		w.make(job("default", "work", 4, 2, true, 0))
		w.elect(0)
		time.AfterFunc(30*time.Second, func() {
			edit(w, "default", "web", func(d *appsv1.Deployment) { d.Spec.Template.Annotations = map[string]string{"v": "2"} })
			edit(w, "default", "db", func(s *appsv1.StatefulSet) { s.Spec.Template.Annotations = map[string]string{"v": "2"} })
		})
		select {
		case <-hit:
			reached = true
			w.elect(0)
			close(done)
		case <-time.After(5 * time.Minute):
		}
		time.Sleep(3 * time.Minute)
		for _, l := range append(w.unfinished(), w.inv.found()...) {
			t.Errorf("leader deposed after write %d (answered %v): %s", step, answered, l)
		}
	})
	return reached
}
