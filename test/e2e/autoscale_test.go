package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	metricsv1beta1 "k8s.io/metrics/pkg/apis/metrics/v1beta1"
)

// busyYAML works most of the time, and is to be scaled by one of autoscalersYAML so that it does not; the other one has no target.
const busyYAML = `apiVersion: apps/v1
kind: Deployment
metadata: {name: busy}
spec:
  selector: {matchLabels: {app: busy}}
  template:
    metadata: {labels: {app: busy}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: c
        image: skein.local/tools:1
        imagePullPolicy: IfNotPresent
        command: [sh, -c, "while true; do i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 0.1; done"]
        resources: {requests: {cpu: 50m, memory: 8Mi}, limits: {cpu: 300m}}
`

const autoscalersYAML = `apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: busy}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: busy}
  maxReplicas: 2
  metrics: [{type: Resource, resource: {name: cpu, target: {type: Utilization, averageUtilization: 40}}}]
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: astray}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: nobody}
  maxReplicas: 2
`

// What pods and nodes use is measured where they run, served by every node without an add-on, and what autoscalers act on.
func (w *world) autoscale(t *testing.T) {
	w.apply(t, "n1", busyYAML)
	defer w.do(t, "n1", "delete", "deploy/busy", "hpa/busy", "hpa/astray", "--wait=false")
	pods, _ := w.awaitPods(t, "n1", "app=busy", 1, time.Minute)
	w.compareWithCgroup(t, &pods[0])
	w.apply(t, "n1", autoscalersYAML)

	// n5 holds no replica.
	eventually(t, 20*time.Second, "top", func() error {
		out, err := w.cli("n5", "top", "nodes")
		if err != nil {
			return err
		}
		for _, n := range []string{"n1", "n2", "n3", "n4", "n5"} {
			if !regexp.MustCompile(n + ` +\d+m +\d+% +\d+Mi +\d+%`).MatchString(out) {
				return fmt.Errorf("nothing of %s:\n%s", n, out)
			}
		}
		return nil
	})
	if out := w.do(t, "n5", "top", "pods", "-l", "app=busy", "--containers"); !regexp.MustCompile(`busy-\S+ +c +\d+m +\d+Mi`).MatchString(out) {
		t.Errorf("top pods:\n%s", out)
	}

	eventually(t, time.Minute, "the busy Deployment is scaled up", func() error {
		ctx, cancel := timeout(3 * time.Second)
		defer cancel()
		d, err := w.on("n2").AppsV1().Deployments("default").Get(ctx, "busy", metav1.GetOptions{})
		if err == nil && *d.Spec.Replicas != 2 {
			err = fmt.Errorf("%d replicas", *d.Spec.Replicas)
		}
		return err
	})
	w.awaitPods(t, "n1", "app=busy", 2, 30*time.Second)
	eventually(t, 30*time.Second, "the autoscalers say what they do", func() error {
		return errors.Join(w.autoscalerSays("busy", "AbleToScale=True", "ScalingActive=True ValidMetricFound"),
			w.autoscalerSays("astray", `AbleToScale=False FailedGetScale the HPA controller was unable to get the target's current scale: deployments.apps "nobody" not found`))
	})
	if out := w.do(t, "n1", "describe", "hpa", "busy"); !strings.Contains(out, "New size: 2; reason: cpu resource utilization (percentage of request) above target") {
		t.Errorf("describe:\n%s", out)
	}
}

// autoscalerSays checks the conditions of an autoscaler.
func (w *world) autoscalerSays(name string, want ...string) error {
	ctx, cancel := timeout(3 * time.Second)
	defer cancel()
	hpa, err := w.on("n1").AutoscalingV2().HorizontalPodAutoscalers("default").Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	var says []string
	for _, c := range hpa.Status.Conditions {
		says = append(says, fmt.Sprintf("%s=%s %s %s", c.Type, c.Status, c.Reason, c.Message))
	}
	all := strings.Join(says, "\n")
	for _, x := range want {
		if !strings.Contains(all, x) {
			return fmt.Errorf("%s does not say %s:\n%s", name, x, all)
		}
	}
	if name == "busy" && (len(hpa.Status.CurrentMetrics) != 1 || hpa.Status.CurrentMetrics[0].Type != autoscalingv2.ResourceMetricSourceType) {
		return fmt.Errorf("metrics %+v", hpa.Status.CurrentMetrics)
	}
	return nil
}

// compareWithCgroup checks the first measurement on a node, for which two samples are taken while it is waited for, against the counters of the container's
// cgroup, read before and after: what was used within the window is part of what was used between, and the rest must fit into the rest of the time.
func (w *world) compareWithCgroup(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	_, id, _ := strings.Cut(pod.Status.ContainerStatuses[0].ContainerID, "://")
	read := cgroupOf(t, string(pod.UID), id)
	time.Sleep(time.Second) // until it has run for long enough to have a rate
	before, began := read.cpu(t), time.Now()
	ctx, cancel := timeout(20 * time.Second)
	defer cancel()
	raw := get(w.on("n3").CoreV1().RESTClient().Get().AbsPath("/apis/metrics.k8s.io/v1beta1/namespaces", pod.Namespace, "pods", pod.Name).SetHeader("Accept", "application/json").DoRaw(ctx))(t)
	used, passed := read.cpu(t)-before, time.Since(began)
	var p metricsv1beta1.PodMetrics
	must(t, json.Unmarshal(raw, &p))
	memory, now := p.Containers[0].Usage.Memory().Value(), read.memory(t)
	if memory <= 0 || memory > 2*now+(1<<20) || now > 2*memory+(1<<20) {
		t.Errorf("%d bytes of memory, its cgroup has %d", memory, now)
	}
	within := time.Duration(p.Containers[0].Usage.Cpu().AsApproximateFloat64() * float64(p.Window.Duration))
	const blur = 30 * time.Millisecond // of what counters and clocks resolve
	rest := time.Duration(runtime.NumCPU()) * (passed - p.Window.Duration)
	t.Logf("measured %s of CPU within %s; the cgroup %s within %s; %d and %d bytes of memory", within, p.Window.Duration, used, passed, memory, now)
	if p.Window.Duration > passed || within <= 0 || within > used+blur || used > within+rest+blur {
		t.Errorf("that cannot be")
	}
}

// counters is where the counters of a container are.
type counters struct{ cpuDir, memoryDir string }

// cgroupOf finds them, in whichever hierarchies this machine has.
func cgroupOf(t *testing.T, pod, container string) counters {
	t.Helper()
	var c counters
	must(t, filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() || d.Name() != container || filepath.Base(filepath.Dir(path)) != pod {
			return nil // what goes meanwhile is of others
		}
		for _, f := range []string{"cpuacct.usage", "cpu.stat"} {
			if b, err := os.ReadFile(filepath.Join(path, f)); err == nil && (f == "cpuacct.usage" || strings.Contains(string(b), "usage_usec")) && !strings.HasSuffix(c.cpuDir, "cpuacct.usage") {
				c.cpuDir = filepath.Join(path, f)
			}
		}
		for _, f := range []string{"memory.current", "memory.usage_in_bytes"} {
			if exists(filepath.Join(path, f)) {
				c.memoryDir = filepath.Join(path, f)
			}
		}
		return nil
	}))
	if c.cpuDir == "" || c.memoryDir == "" {
		t.Fatalf("no counters of container %s: %+v", container, c)
	}
	return c
}

func (c counters) cpu(t *testing.T) time.Duration {
	t.Helper()
	b := string(get(os.ReadFile(c.cpuDir))(t))
	unit := time.Nanosecond
	if _, rest, ok := strings.Cut(b, "usage_usec "); ok {
		b, _, _ = strings.Cut(rest, "\n")
		unit = time.Microsecond
	}
	return time.Duration(get(strconv.ParseInt(strings.TrimSpace(b), 10, 64))(t)) * unit
}

func (c counters) memory(t *testing.T) int64 {
	t.Helper()
	return get(strconv.ParseInt(strings.TrimSpace(string(get(os.ReadFile(c.memoryDir))(t))), 10, 64))(t)
}
