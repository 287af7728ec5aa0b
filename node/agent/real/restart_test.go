package real

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// testIdle checks that nothing is written while nothing happens.
func testIdle(t *testing.T, c *realCluster) {
	for _, n := range []string{"crash", "nopull", "noimage", "nonroot", "miss", "late", "probes", "probe-exec", "probe-ok"} { // those that are never at rest
		zero := int64(0)
		_ = c.admin.CoreV1().Pods("default").Delete(t.Context(), n, metav1.DeleteOptions{GracePeriodSeconds: &zero})
	}
	snapshot := func() string {
		pods, err := c.admin.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		node, err := c.admin.CoreV1().Nodes().Get(t.Context(), "n1", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		ev, err := c.admin.CoreV1().Events("").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		s := fmt.Sprintf("node %s, %d events; ", node.ResourceVersion, len(ev.Items))
		for _, p := range pods.Items {
			s += p.Name + " " + p.ResourceVersion + "; "
		}
		return s
	}
	time.Sleep(3 * time.Second) // what is under way comes to rest
	before := snapshot()
	time.Sleep(12 * time.Second) // more than one period of every loop
	if after := snapshot(); after != before {
		t.Errorf("an idle node wrote:\n%s\n%s", before, after)
	}
}

// testRestart stops the agent, lets things happen, and starts it again.
func testRestart(t *testing.T, c *realCluster) {
	c.t = t
	probe := &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(8080)}}}
	keep := appPod("keep")
	keep.Spec.Containers[0].ReadinessProbe = probe
	c.run(keep)
	job := appPod("job", "crash", "5", "4s")
	job.Spec.RestartPolicy = corev1.RestartPolicyNever
	c.run(job)
	c.run(appPod("removed"))
	before := c.wait("keep", "Ready", ready)
	c.wait("job", "running", func(p *corev1.Pod) bool { return status(p, "c").State.Running != nil })
	removed := c.wait("removed", "Ready", ready)
	c.stop()
	zero := int64(0)
	if err := c.admin.CoreV1().Pods("default").Delete(t.Context(), "removed", metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
		t.Fatal(err)
	}
	if code, _ := get(t, before, "/"); code != 200 {
		t.Error("the pod stopped with the agent")
	}
	time.Sleep(5 * time.Second) // the job ends meanwhile
	unready := 0
	w, err := c.admin.CoreV1().Pods("default").Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=keep"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	c.startAgent()
	got := c.wait("job", "Failed", inPhase(corev1.PodFailed))
	if s := status(got, "c").State.Terminated; s == nil || s.ExitCode != 5 {
		t.Errorf("exit code: %s", statusText(got))
	}
	c.nothingLeft(t, removed)
	time.Sleep(3 * time.Second)
	after := c.wait("keep", "Ready", ready)
	if a, b := status(before, "c"), status(after, "c"); a.ContainerID != b.ContainerID || b.RestartCount != 0 {
		t.Errorf("not adopted: %+v, was %+v", b, a)
	}
	for len(w.ResultChan()) > 0 {
		if p, ok := (<-w.ResultChan()).Object.(*corev1.Pod); ok && !ready(p) {
			unready++
		}
	}
	if unready > 0 {
		t.Errorf("the adopted pod was reported as not ready %d times", unready)
	}
}

// testCutOff restarts the agent and kills a sandbox without any API.
func testCutOff(t *testing.T, c *realCluster) {
	c.t = t
	before := c.wait("keep", "Ready", ready)
	c.stop()
	good := c.node.Host
	c.node.Host = "https://127.0.0.1:1"
	c.startAgent()
	boxes, err := c.rt.ListPodSandbox(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range boxes {
		if b.Metadata.Uid == string(before.UID) {
			if err := c.rt.StopPodSandbox(t.Context(), b.Id); err != nil {
				t.Fatal(err)
			}
		}
	}
	deadline := time.Now().Add(patience)
	for {
		r := c.desired.Record(before.UID)
		if s := r.Status; s != nil && len(s.ContainerStatuses) == 1 && s.ContainerStatuses[0].Ready && s.ContainerStatuses[0].RestartCount > 0 {
			p := before.DeepCopy()
			p.Status = *s
			if code, body := get(t, p, "/file?path=/var/run/secrets/kubernetes.io/serviceaccount/token"); code != 200 || !strings.HasPrefix(body, "ey") {
				t.Errorf("token after a restart without API: %d %q", code, body)
			}
			break
		}
		if time.Now().After(deadline) {
			b, _ := json.Marshal(r.Status)
			t.Fatalf("the pod was not restarted without an API: %s", b)
		}
		time.Sleep(50 * time.Millisecond)
	}
	c.stop()
	c.node.Host = good
	c.startAgent()
	c.wait("keep", "its restart told", func(p *corev1.Pod) bool { return status(p, "c").RestartCount > 0 && ready(p) })
}

// testKill kills the agent's process again and again while pods start, and lets another one finish: each pod runs once.
func testKill(t *testing.T, c *realCluster) {
	c.t = t
	c.stop()
	const n = 8
	for i := range n {
		c.run(appPod(fmt.Sprintf("kill%d", i)))
	}
	for i := range 6 {
		p := c.agentProcess()
		time.Sleep(time.Duration(150+100*i) * time.Millisecond)
		if err := p.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = p.Wait()
	}
	c.startAgent()
	uids := map[string]string{}
	for i := range n {
		p := c.wait(fmt.Sprintf("kill%d", i), "Ready", ready)
		uids[string(p.UID)] = p.Name
	}
	cs, err := c.rt.ListContainers(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	live := map[string]int{}
	for _, k := range cs {
		if name := uids[k.Labels["io.kubernetes.pod.uid"]]; name != "" && k.State == runtimeapi.ContainerState_CONTAINER_RUNNING {
			live[name]++
		}
	}
	boxes, err := c.rt.ListPodSandbox(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range boxes {
		if name := uids[b.Metadata.Uid]; name != "" && b.State == runtimeapi.PodSandboxState_SANDBOX_READY {
			live[name] += 100
		}
	}
	for _, name := range uids {
		if live[name] != 101 {
			t.Errorf("pod %s has %d ready sandboxes and %d running containers", name, live[name]/100, live[name]%100)
		}
	}
	for uid, name := range uids {
		c.delete(name, 1)
		c.gone(name)
		c.nothingLeft(t, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID(uid)}})
	}
}
