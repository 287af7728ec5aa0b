package agent

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"skein.io/skein/node/agent/cgroup"
	"skein.io/skein/node/agent/fakecri"
)

func cpuMemory(cpu, memory string) corev1.ResourceRequirements {
	l := corev1.ResourceList{corev1.ResourceCPU: *quantity(cpu), corev1.ResourceMemory: *quantity(memory)}
	return corev1.ResourceRequirements{Requests: l, Limits: l}
}

func TestResizes(t *testing.T) {
	// Name, CPU it has, CPU it asks for ("": nothing else), priority; the node has 4.
	type p struct {
		name, has, wants string
		priority         int32
		guaranteed       bool
	}
	for _, c := range []struct {
		name string
		pods []p // those that ask do so in this order
		want string
	}{
		{"fits", []p{{name: "a", has: "1", wants: "3"}}, "a:ok"},
		{"all of it", []p{{name: "a", has: "1", wants: "4"}}, "a:ok"},
		{"too big for the node", []p{{name: "a", has: "1", wants: "5"}}, "a:Infeasible"},
		{"no room", []p{{name: "a", has: "1", wants: "3"}, {name: "b", has: "2"}}, "a:Deferred"},
		{"first come", []p{{name: "b", has: "1", wants: "2"}, {name: "a", has: "1", wants: "3"}}, "a:Deferred b:ok"},
		{"more important", []p{{name: "b", has: "1", wants: "2"}, {name: "a", has: "1", wants: "3", priority: 7}}, "a:ok b:Deferred"},
		{"better class", []p{{name: "b", has: "1", wants: "2"}, {name: "a", has: "1", wants: "3", guaranteed: true}}, "a:ok b:Deferred"},
		{"who shrinks makes room", []p{{name: "a", has: "1", wants: "3"}, {name: "b", has: "3", wants: "1"}}, "a:ok b:ok"},
		{"one that does not fit holds up no other", []p{{name: "a", has: "1", wants: "4", priority: 7}, {name: "b", has: "1", wants: "2"}}, "a:Deferred b:ok"},
		{"who shrinks needs no room", []p{{name: "a", has: "3", wants: "2"}, {name: "b", has: "3"}}, "a:ok"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var asking, running []*corev1.Pod
			for _, x := range c.pods {
				has := simplePod(x.name)
				has.Spec.Containers[0].Resources = cpuMemory(x.has, "1Mi")
				running = append(running, has)
				if x.wants == "" {
					continue
				}
				wants := has.DeepCopy()
				wants.Spec.Containers[0].Resources = cpuMemory(x.wants, "1Mi")
				wants.Spec.Priority = &x.priority
				if x.guaranteed {
					wants.Status.QOSClass = corev1.PodQOSGuaranteed
				}
				asking = append(asking, wants)
			}
			got := Resizes(asking, running, corev1.ResourceList{corev1.ResourceCPU: *quantity("4"), corev1.ResourceMemory: *quantity("1Gi"), corev1.ResourcePods: *quantity("9")})
			var out []string
			for _, uid := range slices.Sorted(maps.Keys(got)) {
				s := "ok"
				if v := got[uid]; v != nil {
					s = v.Reason
				}
				out = append(out, strings.TrimPrefix(string(uid), "uid-")+":"+s)
			}
			if s := strings.Join(out, " "); s != c.want {
				t.Errorf("%s, want %s", s, c.want)
			}
		})
	}
}

// setResources changes the spec as the API's resize does.
func (w *world) setResources(name string, r corev1.ResourceRequirements) {
	w.t.Helper()
	p := w.pod(name)
	p.Spec.Containers[0].Resources = r
	p.Generation++
	if err := w.api.Tracker().Update(schema.GroupVersionResource{Version: "v1", Resource: "pods"}, p, "default"); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) resizeState(name string) string {
	p := w.pod(name)
	var out []string
	for _, c := range p.Status.Conditions {
		if c.Type == corev1.PodResizePending || c.Type == corev1.PodResizeInProgress {
			out = append(out, string(c.Type)+" "+c.Reason)
		}
	}
	s := w.container(name)
	return fmt.Sprintf("allocated %v, has %v, restarts %d, %v, observed %v", s.AllocatedResources.Cpu(), s.Resources.Limits.Cpu(), s.RestartCount, out,
		p.Status.ObservedGeneration == p.Generation)
}

func (w *world) expect(name, want string) {
	w.t.Helper()
	if got := w.resizeState(name); got != want {
		w.t.Errorf("pod %s: %s; want %s", name, got, want)
	}
}

func TestResizePod(t *testing.T) {
	inBubble(t, func(w *world) {
		w.sleep(time.Second)
		p := simplePod("a")
		p.Spec.Containers[0].Resources = cpuMemory("100m", "64Mi")
		w.create(p)
		w.sleep(time.Second)
		w.setResources("a", cpuMemory("200m", "32Mi"))
		w.sleep(time.Second)
		w.expect("a", "allocated 200m, has 200m, restarts 0, [], observed true")
		if got := w.calls("update"); got != "update c 204 20000 33554432" {
			t.Errorf("calls: %s", got)
		}
		if l := w.cg.pods["uid-a"]; l != (cgroup.Limits{MilliCPURequest: 200, MilliCPULimit: 200, MemoryLimit: 32 << 20}) {
			t.Errorf("limits of the pod: %+v", l)
		}
		// Nothing is done twice, nor by the next daemon.
		w.stop()
		w.up()
		w.sleep(30 * time.Second)
		if got := w.calls("update", "create"); got != "create c 0, update c 204 20000 33554432" {
			t.Errorf("calls after a restart: %s", got)
		}
		// Less memory than is used is not set, and nothing else either, until less is used.
		w.rt.SetMemory("c", 20<<20)
		w.setResources("a", cpuMemory("300m", "16Mi"))
		w.sleep(5 * time.Second)
		w.expect("a", "allocated 300m, has 200m, restarts 0, [PodResizeInProgress Error], observed true")
		if !w.rec.has(`ResizeError Pod resize error: cannot decrease memory limits: attempting to set container "c" memory limit (16777216) below current usage (20971520)`) {
			t.Errorf("events: %v", w.rec.all)
		}
		w.rt.SetMemory("c", 10<<20)
		w.sleep(15 * time.Second)
		w.expect("a", "allocated 300m, has 300m, restarts 0, [], observed true")
		for _, e := range []string{"ResizeStarted", "ResizeCompleted"} {
			if !w.rec.has(e) {
				t.Errorf("no event %s in %v", e, w.rec.all)
			}
		}
	})
}

func TestResizeRestarts(t *testing.T) {
	inBubble(t, func(w *world) {
		w.rt.Programs["c"] = fakecri.Program{Term: time.Second} // and ends with code 0
		w.sleep(time.Second)
		p := simplePod("a")
		p.Spec.RestartPolicy = corev1.RestartPolicyOnFailure
		p.Spec.Containers[0].Resources = cpuMemory("100m", "64Mi")
		p.Spec.Containers[0].ResizePolicy = []corev1.ContainerResizePolicy{{ResourceName: corev1.ResourceCPU, RestartPolicy: corev1.RestartContainer}}
		w.create(p)
		w.sleep(time.Second)
		for i, cpu := range []string{"200m", "300m", "100m"} {
			w.setResources("a", cpuMemory(cpu, "64Mi"))
			w.sleep(3 * time.Second) // no back-off
			w.expect("a", fmt.Sprintf("allocated %s, has %s, restarts %d, [], observed true", cpu, cpu, i+1))
		}
		if got := w.calls("update", "start"); got != "start c, start c, start c, start c" {
			t.Errorf("calls: %s", got)
		}
		if !w.rec.has("Killing Container c resize requires restart") {
			t.Errorf("events: %v", w.rec.all)
		}
	})
}

// TestResizeWaits: a pod that does not get what it asks for goes on with what it has, over a restart of the daemon, and gets it
// when another pod has gone.
func TestResizeWaits(t *testing.T) {
	inBubble(t, func(w *world) {
		node := w.agent.allocatable()
		cores := node.Cpu().MilliValue()
		m := func(milli int64) corev1.ResourceRequirements { return cpuMemory(fmt.Sprintf("%dm", milli), "1Mi") }
		w.sleep(time.Second)
		for _, n := range []string{"a", "b"} {
			p := simplePod(n)
			p.Spec.Containers[0].Name = n
			p.Spec.Containers[0].Resources = m(cores / 4)
			w.create(p)
		}
		w.sleep(2 * time.Second)
		state := func(milli int64, condition string) string {
			l := m(milli).Limits
			return fmt.Sprintf("allocated %v, has %v, restarts 0, [%s], observed true", l.Cpu(), l.Cpu(), condition)
		}
		w.setResources("a", m(2*cores))
		w.sleep(time.Second)
		w.expect("a", state(cores/4, "PodResizePending Infeasible"))
		w.setResources("a", m(cores))
		w.sleep(time.Second)
		w.expect("a", state(cores/4, "PodResizePending Deferred"))
		w.stop()
		w.up()
		w.sleep(20 * time.Second)
		w.expect("a", state(cores/4, "PodResizePending Deferred"))
		// What was not granted does not count when another pod comes.
		c := simplePod("c")
		c.Spec.Containers[0].Resources = m(cores / 4)
		w.create(c)
		w.sleep(2 * time.Second)
		if s := w.container("c"); s.State.Running == nil {
			t.Errorf("pod c: %+v", w.pod("c").Status)
		}
		w.delete("b", 1)
		w.delete("c", 1)
		w.sleep(5 * time.Second)
		w.expect("a", state(cores, ""))
		if got := w.calls("update"); !strings.HasPrefix(got, "update a ") || strings.Contains(got, ",") {
			t.Errorf("calls: %s", got)
		}
		for _, e := range []string{"ResizeInfeasible", "ResizeDeferred", "ResizeStarted", "ResizeCompleted"} {
			if !w.rec.has(e) {
				t.Errorf("no event %s in %v", e, w.rec.all)
			}
		}
	})
}
