package simulate

import (
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"

	"skein.io/skein/scheduler/controller"
)

// Whoever asks for a million pods by mistake, without a quota, gets what there is room for and a bounded number that wait, and is told so;
// what others do goes on at its pace meanwhile; and nothing is left of it when it is scaled to nothing.
func TestAMillionReplicas(t *testing.T) {
	cases := map[string]struct {
		make  func(*world)
		empty func(*world)
		says  func(*world) string // how its status says what holds it back
	}{
		"Deployment": {
			func(w *world) {
				d := deployment("default", "million", 1000000, kOne, kOne, false)
				d.Spec.Template.Spec.NodeSelector = map[string]string{"pool": "large"}
				w.make(d)
			},
			func(w *world) {
				edit(w, "default", "million", func(d *appsv1.Deployment) { d.Spec.Replicas = ptr(int32(0)) })
			},
			func(w *world) string {
				e, err := w.s.get(w.s.kinds[ownerGVR["Deployment"]], key{"default", "million"})
				if err != nil {
					return err.Error()
				}
				for _, c := range e.obj.(*appsv1.Deployment).Status.Conditions {
					if c.Type == appsv1.DeploymentReplicaFailure {
						return c.Reason + ": " + c.Message
					}
				}
				return ""
			},
		},
		"StatefulSet": {
			func(w *world) {
				s := statefulSet("default", "million", 1000000, appsv1.ParallelPodManagement)
				s.Spec.Template.Spec.NodeSelector = map[string]string{"pool": "large"}
				w.make(s)
			},
			func(w *world) {
				edit(w, "default", "million", func(d *appsv1.StatefulSet) { d.Spec.Replicas = ptr(int32(0)) })
			},
			nil,
		},
		"Job": {
			func(w *world) {
				j := job("default", "million", 1000000, 1000000, true, 0)
				j.Spec.Template.Spec.NodeSelector = map[string]string{"pool": "large"}
				j.Spec.Template.Spec.RestartPolicy = corev1.RestartPolicyNever
				w.make(j)
			},
			func(w *world) {
				edit(w, "default", "million", func(j *batchv1.Job) { j.Spec.Parallelism = ptr(int32(0)) })
			},
			nil,
		},
	}
	for name, c := range cases {
		if name != "Deployment" && os.Getenv("SKEIN_LONG") == "" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				w := newWorld(1, logs())
				w.jobLength = 24 * time.Hour
				defer w.stop()
				for _, n := range []string{"n1", "n2", "n3"} {
					w.agents.add(n, "z", "16", "64Gi")
				}
				edit(w, "", "n1", func(n *corev1.Node) { n.Labels["pool"] = "large" })
				w.make(deployment("default", "web", 10, kOne, kOne, false))
				w.elect(0)
				time.Sleep(time.Minute)
				if left := w.unfinished(); len(left) > 0 {
					t.Fatal(strings.Join(left, "\n"))
				}
				most := 0
				w.s.mu.Lock()
				w.s.onCommit = append(w.s.onCommit, func(cm commit) {
					if cm.kind.gvr == podsGVR && cm.old == nil {
						waiting := 0
						if n := len(w.s.tables[podsGVR].objs); n > most && n%100 == 0 { // counting them is not for free
							for _, e := range w.s.tables[podsGVR].objs {
								if live(e.obj.(*corev1.Pod)) && e.obj.(*corev1.Pod).Spec.NodeName == "" {
									waiting++
								}
							}
							most = max(most, waiting)
						}
					}
				})
				w.s.mu.Unlock()
				c.make(w)
				// Others roll out and grow while it fills up.
				slowest := time.Duration(0)
				for i := range 4 {
					start := time.Now()
					edit(w, "default", "web", func(d *appsv1.Deployment) {
						d.Spec.Template.Annotations = map[string]string{"round": time.Now().String()}
						d.Spec.Replicas = ptr(int32(10 + 2*i))
					})
					for !w.rolledOut("default", "web") && time.Since(start) < 5*time.Minute {
						time.Sleep(time.Second)
					}
					slowest = max(slowest, time.Since(start))
				}
				if slowest > time.Minute {
					t.Errorf("a roll-out of ten pods beside it took %v", slowest)
				}
				time.Sleep(5 * time.Minute)
				if most > controller.MaxWaiting || most < controller.MaxWaiting/2 {
					t.Errorf("%d pods waited for a node, %d may", most, controller.MaxWaiting)
				}
				if c.says != nil {
					if got := c.says(w); !strings.Contains(got, "TooManyWaiting") || !strings.Contains(got, "of 1000000") {
						t.Errorf("its status says %q", got)
					}
				}
				before := w.s.total()
				time.Sleep(10 * time.Minute)
				idle := w.s.total() - before // each waiting pod is looked at every five minutes, and says so in an event
				if idle > 2*controller.MaxWaiting {
					t.Errorf("%d writes in ten minutes in which nothing happens", idle)
				}
				t.Logf("%d pods waited at most, the slowest roll-out beside it took %v, %d writes, then %d in ten minutes", most, slowest, before, idle)
				c.empty(w)
				for end := time.Now().Add(15 * time.Minute); time.Now().Before(end) && w.podsOf("million") > 0; {
					time.Sleep(time.Second)
				}
				if n := w.podsOf("million"); n > 0 {
					t.Errorf("%d pods are left", n)
				}
				for _, v := range w.inv.found() {
					t.Error(v)
				}
			})
		})
	}
}

// podsOf counts the pods of an app that have not ended.
func (w *world) podsOf(app string) (n int) {
	for _, p := range all[*corev1.Pod](w) {
		if p.Labels["app"] == app && !podEnded(p) {
			n++
		}
	}
	return n
}

func (w *world) rolledOut(ns, name string) bool {
	e, err := w.s.get(w.s.kinds[ownerGVR["Deployment"]], key{ns, name})
	if err != nil {
		return false
	}
	d := e.obj.(*appsv1.Deployment)
	n, s := *d.Spec.Replicas, d.Status
	return s.ObservedGeneration == d.Generation && s.Replicas == n && s.UpdatedReplicas == n && s.AvailableReplicas == n
}
