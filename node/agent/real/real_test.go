package real

import (
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"skein.io/skein/node/agent/cgroup"
)

func pemCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// get asks a pod's web server.
func get(t *testing.T, p *corev1.Pod, path string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.Status.PodIP+":8080"+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(b)
}

// log reads a container's log as text.
func (c *realCluster) log(p *corev1.Pod, container string, attempt int) string {
	name := filepath.Join(c.dir, "state/logs/pods", fmt.Sprintf("%s_%s_%s", p.Namespace, p.Name, p.UID), container, fmt.Sprintf("%d.log", attempt))
	b, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	var out strings.Builder
	for _, l := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		if f := strings.SplitN(l, " ", 4); len(f) == 4 {
			out.WriteString(f[3] + "\n")
		}
	}
	return out.String()
}

func (c *realCluster) events(t *testing.T, name string) (out []string) {
	t.Helper()
	ev, err := c.admin.CoreV1().Events("default").List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + name})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range ev.Items {
		out = append(out, e.Type+" "+e.Reason+" "+e.Message)
	}
	return out
}

// event waits for an event of a pod.
func (c *realCluster) event(t *testing.T, name, want string) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		evs := c.events(t, name)
		if slices.ContainsFunc(evs, func(e string) bool { return strings.Contains(e, want) }) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("no event %q of pod %s; there are:\n%s", want, name, strings.Join(evs, "\n"))
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// nothingLeft checks that nothing of a pod is on the node.
func (c *realCluster) nothingLeft(t *testing.T, p *corev1.Pod) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		var left []string
		for _, d := range []string{"pods/" + string(p.UID), fmt.Sprintf("logs/pods/%s_%s_%s", p.Namespace, p.Name, p.UID)} {
			if _, err := os.Stat(filepath.Join(c.dir, "state", d)); err == nil {
				left = append(left, d)
			}
		}
		uids, err := (cgroup.Pods{Parent: c.cgroups + "/pods"}).List()
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(uids, string(p.UID)) {
			left = append(left, "cgroup")
		}
		mounts, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(mounts), string(p.UID)) {
			left = append(left, "mounts")
		}
		if r := c.desired.Record(p.UID); r != nil {
			left = append(left, "record")
		}
		boxes, err := c.rt.ListPodSandbox(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range boxes {
			if b.Metadata.Uid == string(p.UID) {
				left = append(left, "sandbox")
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("left of pod %s: %v", p.Name, left)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func status(p *corev1.Pod, name string) corev1.ContainerStatus {
	for _, l := range [][]corev1.ContainerStatus{p.Status.ContainerStatuses, p.Status.InitContainerStatuses, p.Status.EphemeralContainerStatuses} {
		for _, s := range l {
			if s.Name == name {
				return s
			}
		}
	}
	return corev1.ContainerStatus{}
}

func isReady(ready bool) func(*corev1.Pod) bool {
	return func(p *corev1.Pod) bool { return status(p, "c").Ready == ready && ready == isPodReady(p) }
}

func isPodReady(p *corev1.Pod) bool { return ready(p) }

func inPhase(ph corev1.PodPhase) func(*corev1.Pod) bool {
	return func(p *corev1.Pod) bool { return p.Status.Phase == ph }
}

// TestReal runs pods in real containers against a real API.
func TestReal(t *testing.T) {
	c := newRealCluster(t)
	t.Run("pods", func(t *testing.T) {
		for name, f := range map[string]func(*testing.T, *realCluster){"life": testLife, "crash": testCrash, "never": testNever, "init": testInit,
			"probes": testProbes, "volumes": testVolumes, "termination": testTermination, "images": testImages, "oom": testOOM,
			"deadline": testDeadline, "reject": testReject, "security": testSecurity, "force": testForce, "resize": testResize, "image volume": testImageVolume} {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				cc := *c
				cc.t = t
				f(t, &cc)
			})
		}
	})
	t.Run("idle", func(t *testing.T) { testIdle(t, c) })
	t.Run("restart", func(t *testing.T) { testRestart(t, c) })
	t.Run("kill", func(t *testing.T) { testKill(t, c) })
	t.Run("cut off", func(t *testing.T) { testCutOff(t, c) })
}

func testLife(t *testing.T, c *realCluster) {
	began := time.Now()
	p := c.run(appPod("life"))
	p = c.wait("life", "Ready", ready)
	t.Logf("Ready after %v", time.Since(began).Round(time.Millisecond))
	if p.Status.HostIP != nodeAddress || p.Status.PodIP == "" || p.Status.StartTime == nil || p.Status.QOSClass != corev1.PodQOSBestEffort {
		t.Errorf("status: %+v", p.Status)
	}
	s := status(p, "c")
	if s.Started == nil || !*s.Started || !strings.HasPrefix(s.ContainerID, "containerd://") || s.ImageID == "" || s.Image != appImage {
		t.Errorf("container status: %+v", s)
	}
	if code, body := get(t, p, "/"); code != 200 {
		t.Errorf("web: %d %s", code, body)
	}
	for _, e := range []string{"Normal Pulled", "Normal Created", "Normal Started"} {
		c.event(t, "life", e)
	}
	began = time.Now()
	c.delete("life", 5)
	c.gone("life")
	t.Logf("gone after %v", time.Since(began).Round(time.Millisecond))
	c.event(t, "life", "Normal Killing Stopping container c")
	c.nothingLeft(t, p)
}

func testCrash(t *testing.T, c *realCluster) {
	p := appPod("crash", "crash", "3")
	p.Spec.Containers[0].TerminationMessagePolicy = corev1.TerminationMessageFallbackToLogsOnError
	c.run(p)
	got := c.wait("crash", "CrashLoopBackOff", func(p *corev1.Pod) bool {
		w := status(p, "c").State.Waiting
		return w != nil && w.Reason == "CrashLoopBackOff"
	})
	s := status(got, "c")
	if l := s.LastTerminationState.Terminated; l == nil || l.ExitCode != 3 || l.Reason != "Error" || !strings.Contains(l.Message, "crash: exit 3") || l.ContainerID == "" {
		t.Errorf("last state: %+v", l)
	}
	if got.Status.Phase != corev1.PodRunning || s.RestartCount != 1 || !strings.Contains(s.State.Waiting.Message, "back-off 10s restarting failed container=c pod=crash_default(") {
		t.Errorf("%s", statusText(got))
	}
	c.event(t, "crash", "Warning BackOff Back-off restarting failed container c in pod crash_default(")
	got = c.wait("crash", "the second restart", func(p *corev1.Pod) bool { return status(p, "c").RestartCount == 2 })
	c.delete("crash", 1)
	c.gone("crash")
	c.nothingLeft(t, got)
}

func testNever(t *testing.T, c *realCluster) {
	for name, code := range map[string]int32{"never-ok": 0, "never-bad": 7} {
		p := appPod(name, "crash", fmt.Sprint(code))
		p.Spec.RestartPolicy = corev1.RestartPolicyNever
		c.run(p)
	}
	ok := c.wait("never-ok", "Succeeded", inPhase(corev1.PodSucceeded))
	bad := c.wait("never-bad", "Failed", inPhase(corev1.PodFailed))
	if s := status(ok, "c").State.Terminated; s == nil || s.Reason != "Completed" || s.FinishedAt.IsZero() {
		t.Errorf("%s", statusText(ok))
	}
	if s := status(bad, "c").State.Terminated; s == nil || s.Reason != "Error" || s.ExitCode != 7 {
		t.Errorf("%s", statusText(bad))
	}
	if log := c.log(bad, "c", 0); !strings.Contains(log, "crash: exit 7") {
		t.Errorf("the log of an ended pod is gone: %q", log)
	}
}

func testInit(t *testing.T, c *realCluster) {
	p := appPod("init")
	always := corev1.ContainerRestartPolicyAlways
	vol := []corev1.VolumeMount{{Name: "v", MountPath: "/v"}}
	p.Spec.Volumes = []corev1.Volume{{Name: "v", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
	p.Spec.InitContainers = []corev1.Container{
		{Name: "one", Image: appImage, Args: []string{"write", "/v/f", "from init"}, VolumeMounts: vol},
		{Name: "side", Image: appImage, Args: []string{"web", ":8081"}, RestartPolicy: &always,
			StartupProbe: &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(8081)}}}},
		{Name: "two", Image: appImage, Args: []string{"get", "http://127.0.0.1:8081/"}},
	}
	p.Spec.Containers[0].VolumeMounts = vol
	c.run(p)
	got := c.wait("init", "Ready", ready)
	if _, body := get(t, got, "/file?path=/v/f"); !strings.Contains(body, "from init") {
		t.Errorf("file of the init container: %q", body)
	}
	if s := status(got, "two").State.Terminated; s == nil || s.ExitCode != 0 || status(got, "side").State.Running == nil {
		t.Errorf("%s", statusText(got))
	}
	bad := appPod("init-bad")
	bad.Spec.RestartPolicy = corev1.RestartPolicyNever
	bad.Spec.InitContainers = []corev1.Container{{Name: "one", Image: appImage, Args: []string{"crash", "4"}}}
	c.run(bad)
	got = c.wait("init-bad", "Failed", inPhase(corev1.PodFailed))
	if status(got, "c").State.Running != nil || status(got, "c").State.Terminated != nil {
		t.Errorf("the container ran after a failed init container: %s", statusText(got))
	}
	job := appPod("side-job", "crash", "0")
	job.Spec.RestartPolicy = corev1.RestartPolicyNever
	job.Spec.InitContainers = []corev1.Container{{Name: "side", Image: appImage, Args: []string{"sleep"}, RestartPolicy: &always}}
	c.run(job)
	c.wait("side-job", "Succeeded although a sidecar ran", inPhase(corev1.PodSucceeded))
}

func testProbes(t *testing.T, c *realCluster) {
	p := appPod("probes")
	http := func(path string) corev1.ProbeHandler {
		return corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: intstr.FromString("web")}}
	}
	p.Spec.Containers[0].Ports = []corev1.ContainerPort{{Name: "web", ContainerPort: 8080}}
	p.Spec.Containers[0].StartupProbe = &corev1.Probe{PeriodSeconds: 1, FailureThreshold: 30, ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(8080)}}}
	p.Spec.Containers[0].LivenessProbe = &corev1.Probe{PeriodSeconds: 1, FailureThreshold: 4, ProbeHandler: http("/healthz")}
	p.Spec.Containers[0].ReadinessProbe = &corev1.Probe{PeriodSeconds: 1, FailureThreshold: 1, ProbeHandler: http("/healthz")}
	c.run(p)
	got := c.wait("probes", "Ready", ready)
	get(t, got, "/healthz?set=fail")
	c.wait("probes", "not Ready", isReady(false))
	c.event(t, "probes", "Warning Unhealthy Readiness probe failed: HTTP probe failed with statuscode: 500")
	c.wait("probes", "a restart, and Ready again", func(p *corev1.Pod) bool { return status(p, "c").RestartCount == 1 && ready(p) })
	c.event(t, "probes", "Normal Killing Container c failed liveness probe, will be restarted")

	exec := func(cmd ...string) corev1.ProbeHandler {
		return corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: cmd}}
	}
	e := appPod("probe-exec")
	e.Spec.Containers[0].ReadinessProbe = &corev1.Probe{PeriodSeconds: 1, ProbeHandler: exec("/app", "crash", "1")}
	c.run(e)
	c.event(t, "probe-exec", "Warning Unhealthy Readiness probe failed: crash: exit 1")
	if got := c.wait("probe-exec", "running", func(p *corev1.Pod) bool { return status(p, "c").State.Running != nil }); ready(got) {
		t.Errorf("Ready although its probe fails: %s", statusText(got))
	}
	e = appPod("probe-ok")
	e.Spec.Containers[0].ReadinessProbe = &corev1.Probe{PeriodSeconds: 1, ProbeHandler: exec("/app", "crash", "0")}
	e.Spec.Containers[0].LivenessProbe = &corev1.Probe{PeriodSeconds: 1, TimeoutSeconds: 1, FailureThreshold: 1, InitialDelaySeconds: 3, ProbeHandler: exec("/app", "sleep")}
	c.run(e)
	c.wait("probe-ok", "Ready", ready)
	c.event(t, "probe-ok", `Warning Unhealthy Liveness probe failed: command timed out: "/app sleep" timed out after 1s`)

	g := appPod("probe-grpc", "serve-grpc", ":9000")
	g.Spec.Containers[0].ReadinessProbe = &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 9000}}}
	c.run(g)
	c.wait("probe-grpc", "Ready", ready)
}

func testVolumes(t *testing.T, c *realCluster) {
	core := c.admin.CoreV1()
	cm := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "conf"}, Data: map[string]string{"a": "one", "b": "two"}}
	if _, err := core.ConfigMaps("default").Create(t.Context(), cm, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := core.Secrets("default").Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "sec"}, StringData: map[string]string{"pw": "hush"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	mode, group, yes := int32(0o400), int64(4242), true
	host := filepath.Join(c.dir, "host")
	create := corev1.HostPathDirectoryOrCreate
	p := appPod("vols")
	p.Labels = map[string]string{"app": "vols"}
	p.Spec.SecurityContext = &corev1.PodSecurityContext{FSGroup: &group}
	p.Spec.Volumes = []corev1.Volume{
		{Name: "cm", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "conf"}}}},
		{Name: "sec", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "sec", Items: []corev1.KeyToPath{{Key: "pw", Path: "deep/pass", Mode: &mode}}}}},
		{Name: "opt", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{LocalObjectReference: corev1.LocalObjectReference{Name: "nope"}, Optional: &yes}}},
		{Name: "mem", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{Medium: corev1.StorageMediumMemory, SizeLimit: resource.NewQuantity(1<<20, resource.BinarySI)}}},
		{Name: "host", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: host, Type: &create}}},
		{Name: "down", VolumeSource: corev1.VolumeSource{DownwardAPI: &corev1.DownwardAPIVolumeSource{Items: []corev1.DownwardAPIVolumeFile{
			{Path: "labels", FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.labels"}}}}}},
	}
	ct := &p.Spec.Containers[0]
	ct.VolumeMounts = []corev1.VolumeMount{{Name: "cm", MountPath: "/cm"}, {Name: "sec", MountPath: "/sec", ReadOnly: true}, {Name: "opt", MountPath: "/opt"},
		{Name: "mem", MountPath: "/mem"}, {Name: "host", MountPath: "/host"}, {Name: "down", MountPath: "/down"}, {Name: "cm", MountPath: "/single", SubPath: "a"},
		{Name: "mem", MountPath: "/sub", SubPathExpr: "of-$(NAME)"}}
	ct.Env = []corev1.EnvVar{
		{Name: "NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "metadata.name"}}},
		{Name: "POD_IP", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "status.podIP"}}},
		{Name: "PW", ValueFrom: &corev1.EnvVarSource{SecretKeyRef: &corev1.SecretKeySelector{LocalObjectReference: corev1.LocalObjectReference{Name: "sec"}, Key: "pw"}}},
		{Name: "BOTH", Value: "$(NAME)-$(PW)-$$(PW)-$(NONE)"},
		{Name: "CPU", ValueFrom: &corev1.EnvVarSource{ResourceFieldRef: &corev1.ResourceFieldSelector{Resource: "limits.cpu"}}},
	}
	ct.EnvFrom = []corev1.EnvFromSource{{Prefix: "CM_", ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "conf"}}}}
	c.run(p)
	got := c.wait("vols", "Ready", ready)
	file := func(path, want string) {
		t.Helper()
		if code, body := get(t, got, "/file?path="+path); code != 200 || !strings.Contains(body, want) {
			t.Errorf("%s: %d %q, want %q", path, code, body, want)
		}
	}
	file("/cm/a", "one")
	file("/sec/deep/pass", "hush")
	file("/down/labels", `app="vols"`)
	file("/single", "one")
	file("/etc/hosts", got.Status.PodIP+"\tvols")
	file("/etc/resolv.conf", "search default.svc.cluster.local svc.cluster.local cluster.local")
	file("/var/run/secrets/kubernetes.io/serviceaccount/token", "ey")
	file("/var/run/secrets/kubernetes.io/serviceaccount/ca.crt", "CA")
	file("/var/run/secrets/kubernetes.io/serviceaccount/namespace", "default")
	_, env := get(t, got, "/env")
	for _, want := range []string{"NAME=vols", "POD_IP=" + got.Status.PodIP, "BOTH=vols-hush-$(PW)-$(NONE)", "CM_a=one", "CPU=2", "KUBERNETES_SERVICE_HOST=10.96.0.1", "KUBERNETES_PORT_443_TCP=tcp://10.96.0.1:443"} {
		if !strings.Contains(env, want) {
			t.Errorf("environment lacks %s:\n%s", want, env)
		}
	}
	dir := filepath.Join(c.dir, "state/pods", string(got.UID), "volumes")
	if info, err := os.Stat(filepath.Join(dir, "kubernetes.io~secret/sec/deep/pass")); err != nil || info.Mode().Perm() != 0o440 {
		t.Errorf("mode of a secret with fsGroup: %v %v", info, err)
	}
	// A change arrives by itself, in one step; what a subPath shows stays.
	cm.Data = map[string]string{"a": "changed", "c": "three"}
	if _, err := core.ConfigMaps("default").Update(t.Context(), cm, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(patience)
	for {
		if _, body := get(t, got, "/file?path=/cm/a"); strings.Contains(body, "changed") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the changed ConfigMap did not arrive")
		}
		time.Sleep(20 * time.Millisecond)
	}
	file("/cm/c", "three")
	file("/single", "one")
	if code, _ := get(t, got, "/file?path=/cm/b"); code == 200 {
		t.Error("a removed key is still there")
	}
	c.delete("vols", 1)
	c.gone("vols")
	c.nothingLeft(t, got)
	if _, err := os.Stat(host); err != nil {
		t.Errorf("the host's directory went with the pod: %v", err)
	}

	late := appPod("late")
	late.Spec.Containers[0].EnvFrom = []corev1.EnvFromSource{{ConfigMapRef: &corev1.ConfigMapEnvSource{LocalObjectReference: corev1.LocalObjectReference{Name: "late"}}}}
	c.run(late)
	c.wait("late", "CreateContainerConfigError", func(p *corev1.Pod) bool {
		w := status(p, "c").State.Waiting
		return w != nil && w.Reason == "CreateContainerConfigError" && strings.Contains(w.Message, `configmaps "late" not found`)
	})
	if _, err := core.ConfigMaps("default").Create(t.Context(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "late"}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.wait("late", "Ready", ready)

	miss := appPod("miss")
	miss.Spec.Volumes = []corev1.Volume{{Name: "m", VolumeSource: corev1.VolumeSource{Secret: &corev1.SecretVolumeSource{SecretName: "miss"}}}}
	c.run(miss)
	c.event(t, "miss", `Warning FailedMount MountVolume.SetUp failed for volume "m" : secrets "miss" not found`)
	c.delete("miss", 0)
}

func testTermination(t *testing.T, c *realCluster) {
	p := appPod("stubborn", "stubborn")
	c.run(p)
	c.wait("stubborn", "Ready", ready)
	began := time.Now()
	c.delete("stubborn", 3)
	got := c.wait("stubborn", "a deletion time", func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil })
	c.gone("stubborn")
	if took := time.Since(began); took < 2500*time.Millisecond || took > 15*time.Second {
		t.Errorf("a pod that ignores SIGTERM was gone after %v of a grace of 3 s", took)
	}
	c.nothingLeft(t, got)

	h := appPod("hooks")
	host := filepath.Join(c.dir, "hooks")
	create := corev1.HostPathDirectoryOrCreate
	h.Spec.Volumes = []corev1.Volume{{Name: "h", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: host, Type: &create}}}}
	h.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "h", MountPath: "/h"}}
	h.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{
		PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"/app", "write", "/h/start", "x"}}},
		PreStop:   &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"/app", "write", "/h/stop", "x"}}}}
	c.run(h)
	c.wait("hooks", "Ready", ready)
	if _, err := os.Stat(filepath.Join(host, "start")); err != nil {
		t.Errorf("postStart: %v", err)
	}
	c.delete("hooks", 10)
	c.gone("hooks")
	if _, err := os.Stat(filepath.Join(host, "stop")); err != nil {
		t.Errorf("preStop: %v", err)
	}
	bad := appPod("hook-bad")
	bad.Spec.Containers[0].Lifecycle = &corev1.Lifecycle{PostStart: &corev1.LifecycleHandler{Exec: &corev1.ExecAction{Command: []string{"/nothing"}}}}
	c.run(bad)
	c.event(t, "hook-bad", "Warning FailedPostStartHook PostStartHook failed")
	c.delete("hook-bad", 1)
	c.gone("hook-bad")
}

func testForce(t *testing.T, c *realCluster) {
	c.run(appPod("force", "stubborn"))
	p := c.wait("force", "Ready", ready)
	c.delete("force", 100)
	c.wait("force", "a deletion time", func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil })
	began := time.Now()
	c.delete("force", 0) // at once: out of the API, then from the node without the long grace
	c.gone("force")
	c.nothingLeft(t, p)
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("a forced deletion took %v", took)
	}
}

func testImages(t *testing.T, c *realCluster) {
	p := appPod("noimage")
	p.Spec.Containers[0].Image = "skein.local/none:1"
	c.run(p)
	c.wait("noimage", "ErrImageNeverPull", func(p *corev1.Pod) bool {
		w := status(p, "c").State.Waiting
		return w != nil && w.Reason == "ErrImageNeverPull" && p.Status.Phase == corev1.PodPending
	})
	q := appPod("nopull")
	q.Spec.Containers[0].Image = "127.0.0.1:1/none:1"
	q.Spec.Containers[0].ImagePullPolicy = corev1.PullIfNotPresent
	c.run(q)
	for _, reason := range []string{"ErrImagePull", "ImagePullBackOff"} {
		c.wait("nopull", reason, func(p *corev1.Pod) bool {
			w := status(p, "c").State.Waiting
			return w != nil && w.Reason == reason
		})
	}
	c.event(t, "nopull", `Normal BackOff Back-off pulling image "127.0.0.1:1/none:1"`)
	c.event(t, "nopull", `Warning Failed Error: ErrImagePull`)
}

func testOOM(t *testing.T, c *realCluster) {
	p := appPod("oom", "oom")
	p.Spec.RestartPolicy = corev1.RestartPolicyNever
	p.Spec.Containers[0].Resources = corev1.ResourceRequirements{Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("32Mi"), corev1.ResourceCPU: resource.MustParse("500m")}}
	c.run(p)
	got := c.wait("oom", "Failed", inPhase(corev1.PodFailed))
	if s := status(got, "c").State.Terminated; s == nil || s.Reason != "OOMKilled" || s.ExitCode != 137 {
		t.Errorf("%s", statusText(got))
	}
}

func testDeadline(t *testing.T, c *realCluster) {
	p := appPod("deadline")
	d := int64(2)
	p.Spec.ActiveDeadlineSeconds = &d
	c.run(p)
	got := c.wait("deadline", "Failed", inPhase(corev1.PodFailed))
	if got.Status.Reason != "DeadlineExceeded" {
		t.Errorf("%s", statusText(got))
	}
}

func testReject(t *testing.T, c *realCluster) {
	p := appPod("reject")
	p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("64")}
	c.run(p)
	got := c.wait("reject", "Failed", inPhase(corev1.PodFailed))
	if got.Status.Reason != "OutOfcpu" || !strings.Contains(got.Status.Message, "cpu, requested: 64000, used:") {
		t.Errorf("%s", statusText(got))
	}
	q := appPod("reject-selector")
	q.Spec.NodeSelector = map[string]string{"disk": "fast"}
	c.run(q)
	if got = c.wait("reject-selector", "Failed", inPhase(corev1.PodFailed)); got.Status.Reason != "NodeAffinity" {
		t.Errorf("%s", statusText(got))
	}
}

func testSecurity(t *testing.T, c *realCluster) {
	yes, user := true, int64(1234)
	no := false
	p := appPod("nonroot")
	p.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsNonRoot: &yes}
	c.run(p)
	c.wait("nonroot", "CreateContainerConfigError", func(p *corev1.Pod) bool {
		w := status(p, "c").State.Waiting
		return w != nil && w.Reason == "CreateContainerConfigError" && strings.Contains(w.Message, "container has runAsNonRoot and image will run as root")
	})
	q := appPod("secure")
	q.Spec.Hostname, q.Spec.Subdomain = "hal", "space"
	q.Spec.SecurityContext = &corev1.PodSecurityContext{RunAsUser: &user, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault}}
	q.Spec.Containers[0].SecurityContext = &corev1.SecurityContext{ReadOnlyRootFilesystem: &yes, AllowPrivilegeEscalation: &no, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}}}
	c.run(q)
	got := c.wait("secure", "Ready", ready)
	_, st := get(t, got, "/file?path=/proc/self/status")
	for _, want := range []string{"Uid:\t1234", "CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
		if !strings.Contains(st, want) {
			t.Errorf("no %q in:\n%s", want, st)
		}
	}
	if _, h := get(t, got, "/file?path=/etc/hosts"); !strings.Contains(h, "\thal.space.default.svc.cluster.local\thal") {
		t.Errorf("hosts: %s", h)
	}
	_, cg := get(t, got, "/file?path=/proc/self/cgroup")
	if !strings.Contains(cg, "/pods/"+string(got.UID)) {
		t.Logf("cgroup namespace hides the path: %s", cg)
	}
	n := appPod("hostnet", "web", nodeAddress+":18080")
	n.Spec.HostNetwork = true
	c.run(n)
	if got := c.wait("hostnet", "Ready", ready); got.Status.PodIP != nodeAddress {
		t.Errorf("IP of a pod in the node's network: %q", got.Status.PodIP)
	}
}
