package e2e

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// podsYAML is one pod for each thing that pods can do. "IMAGE" stands for the image with a shell.
const podsYAML = `apiVersion: v1
kind: ConfigMap
metadata: {name: conf}
data: {colour: red, word: first}
---
apiVersion: v1
kind: Secret
metadata: {name: secret}
stringData: {key: sesame}
---
apiVersion: v1
kind: Pod
metadata: {name: probes, labels: {app: probes}}
spec:
  containers:
  - IMAGE
    name: exec
    command: [sh, -c, "sleep 1; touch /tmp/up; sleep 1000"]
    startupProbe: {exec: {command: [cat, /tmp/up]}, periodSeconds: 1}
  - IMAGE
    name: tcp
    args: [serve-tcp, ":9001"]
    readinessProbe: {tcpSocket: {port: 9001}, periodSeconds: 1}
  - IMAGE
    name: grpc
    args: [serve-grpc, ":9002"]
    readinessProbe: {grpc: {port: 9002}, periodSeconds: 1}
  - IMAGE
    name: http
    args: [web, ":9003"]
    readinessProbe: {httpGet: {path: /healthz, port: 9003}, periodSeconds: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: sick, labels: {app: sick}}
spec:
  containers:
  - IMAGE
    name: c
    args: [web]
    livenessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1, failureThreshold: 2}
---
apiVersion: v1
kind: Pod
metadata: {name: unready, labels: {app: unready}}
spec:
  containers:
  - IMAGE
    name: c
    args: [serve-grpc, ":9002", "2"]
    readinessProbe: {grpc: {port: 9002}, periodSeconds: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: inits}
spec:
  restartPolicy: Never
  volumes: [{name: v, emptyDir: {}}]
  initContainers:
  - IMAGE
    name: one
    command: [sh, -c, "echo one > /v/f"]
    volumeMounts: [{name: v, mountPath: /v}]
  - IMAGE
    name: two
    command: [sh, -c, "echo two >> /v/f"]
    volumeMounts: [{name: v, mountPath: /v}]
  containers:
  - IMAGE
    name: c
    command: [sh, -c, "cat /v/f; echo three"]
    volumeMounts: [{name: v, mountPath: /v}]
---
apiVersion: v1
kind: Pod
metadata: {name: badinit}
spec:
  restartPolicy: Never
  initContainers:
  - IMAGE
    name: one
    args: [crash, "9"]
  containers:
  - IMAGE
    name: c
    args: [sleep]
---
apiVersion: v1
kind: Pod
metadata: {name: onfailure}
spec:
  restartPolicy: OnFailure
  volumes: [{name: v, emptyDir: {}}]
  containers:
  - IMAGE
    name: c
    command: [sh, -c, "if [ -e /v/f ]; then echo second time; else touch /v/f; exit 1; fi"]
    volumeMounts: [{name: v, mountPath: /v}]
---
apiVersion: v1
kind: Pod
metadata: {name: volumes, labels: {app: volumes, tier: a}, annotations: {note: before}}
spec:
  volumes:
  - {name: empty, emptyDir: {medium: Memory, sizeLimit: 1Mi}}
  - {name: host, hostPath: {path: HOSTDIR, type: Directory}}
  - {name: conf, configMap: {name: conf, items: [{key: word, path: sub/word}]}}
  - {name: secret, secret: {secretName: secret, defaultMode: 0400}}
  - {name: down, downwardAPI: {items: [{path: note, fieldRef: {fieldPath: "metadata.annotations['note']"}}, {path: mem, resourceFieldRef: {containerName: c, resource: limits.memory, divisor: 1Mi}}]}}
  - name: all
    projected:
      sources:
      - configMap: {name: conf}
      - secret: {name: secret}
      - serviceAccountToken: {path: token, audience: vault, expirationSeconds: 3600}
      - downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}
  containers:
  - IMAGE
    name: c
    args: [sleep]
    resources: {limits: {memory: 64Mi, cpu: 200m}}
    volumeMounts:
    - {name: empty, mountPath: /empty}
    - {name: host, mountPath: /host}
    - {name: conf, mountPath: /conf}
    - {name: secret, mountPath: /secret, readOnly: true}
    - {name: down, mountPath: /down}
    - {name: all, mountPath: /all}
    env:
    - {name: WORD, valueFrom: {configMapKeyRef: {name: conf, key: word}}}
    - {name: KEY, valueFrom: {secretKeyRef: {name: secret, key: key}}}
    - {name: NONE, valueFrom: {secretKeyRef: {name: secret, key: none, optional: true}}}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}
    - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu, divisor: 1m}}}
    - {name: BOTH, value: "$(WORD)-$(KEY)"}
    envFrom: [{prefix: CONF_, configMapRef: {name: conf}}]
---
apiVersion: v1
kind: Pod
metadata: {name: hungry}
spec:
  restartPolicy: Never
  containers:
  - IMAGE
    name: c
    args: [oom]
    resources: {limits: {memory: 32Mi}}
---
apiVersion: v1
kind: Pod
metadata: {name: polite, labels: {app: polite}}
spec:
  terminationGracePeriodSeconds: 30
  volumes: [{name: host, hostPath: {path: HOSTDIR, type: Directory}}]
  containers:
  - IMAGE
    name: c
    command: [sh, -c, "trap 'sleep 1; echo ended > /host/polite; exit 0' TERM; while true; do sleep 0.1; done"]
    volumeMounts: [{name: host, mountPath: /host}]
---
apiVersion: v1
kind: Pod
metadata: {name: stubborn, labels: {app: stubborn}}
spec:
  terminationGracePeriodSeconds: 2
  containers:
  - IMAGE
    name: c
    args: [stubborn]
---
apiVersion: v1
kind: Pod
metadata: {name: huge}
spec:
  containers:
  - IMAGE
    name: c
    args: [sleep]
    resources: {requests: {cpu: "1000"}}
---
apiVersion: v1
kind: Pod
metadata: {name: nowhere}
spec:
  nodeSelector: {planet: mars}
  containers:
  - IMAGE
    name: c
    args: [sleep]
`

// pods shows what pods can do: each of podsYAML does something else.
func (w *world) pods(t *testing.T) {
	dir := w.lab.Dir() + "/shared"
	must(t, os.MkdirAll(dir, 0o777))
	must(t, os.WriteFile(dir+"/hello", []byte("from the host"), 0o644))
	yaml := strings.NewReplacer("IMAGE", "image: skein.local/tools:1\n    imagePullPolicy: IfNotPresent", "HOSTDIR", dir).Replace(podsYAML)
	w.apply(t, "n3", yaml)
	pod := func(name string) (*corev1.Pod, error) {
		ctx, cancel := timeout(3 * time.Second)
		defer cancel()
		return w.on("n2").CoreV1().Pods("default").Get(ctx, name, metav1.GetOptions{})
	}
	// await waits until a pod is as wanted.
	await := func(t *testing.T, name, what string, within time.Duration, ok func(*corev1.Pod) bool) *corev1.Pod {
		t.Helper()
		var last *corev1.Pod
		eventually(t, within, name+" "+what, func() error {
			p, err := pod(name)
			if err == nil && !ok(p) {
				err = fmt.Errorf("phase %s, init %+v, containers %+v", p.Status.Phase, p.Status.InitContainerStatuses, p.Status.ContainerStatuses)
			}
			last = p
			return err
		})
		return last
	}
	in := func(t *testing.T, name string, args ...string) string {
		t.Helper()
		return w.do(t, "n1", append([]string{"exec", name, "-c", "c", "--"}, args...)...)
	}
	phase := func(want corev1.PodPhase) func(*corev1.Pod) bool {
		return func(p *corev1.Pod) bool { return p.Status.Phase == want }
	}
	terminated := func(p *corev1.Pod) *corev1.ContainerStateTerminated {
		if len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].State.Terminated != nil {
			return p.Status.ContainerStatuses[0].State.Terminated
		}
		return &corev1.ContainerStateTerminated{}
	}
	for _, s := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"probes", func(t *testing.T) {
			await(t, "probes", "is Ready with all four probes", 30*time.Second, podReady)
			if p, err := pod("unready"); err != nil || podReady(p) {
				t.Errorf("a pod is Ready whose probe says NOT_SERVING: %v", err)
			}
			await(t, "sick", "runs", 20*time.Second, podReady)
			in(t, "sick", "/app", "get", "http://127.0.0.1:8080/healthz")
			_, _ = w.cli("n1", "exec", "sick", "--", "/app", "get", "http://127.0.0.1:8080/healthz?set=fail") // which answers 500
			p := await(t, "sick", "is restarted by its liveness probe", 30*time.Second, func(p *corev1.Pod) bool {
				return len(p.Status.ContainerStatuses) == 1 && p.Status.ContainerStatuses[0].RestartCount == 1 && podReady(p)
			})
			if p.Status.ContainerStatuses[0].LastTerminationState.Terminated == nil {
				t.Errorf("nothing is known of the first life: %+v", p.Status.ContainerStatuses[0])
			}
		}},
		{"init containers", func(t *testing.T) {
			await(t, "inits", "has succeeded", 30*time.Second, phase(corev1.PodSucceeded))
			if out := w.do(t, "n4", "logs", "inits"); out != "one\ntwo\nthree\n" {
				t.Errorf("order: %q", out)
			}
			p := await(t, "badinit", "has failed", 30*time.Second, phase(corev1.PodFailed))
			if s := p.Status.InitContainerStatuses[0].State.Terminated; s == nil || s.ExitCode != 9 {
				t.Errorf("init container: %+v", p.Status.InitContainerStatuses)
			}
		}},
		{"restart on failure", func(t *testing.T) {
			p := await(t, "onfailure", "has succeeded", 60*time.Second, phase(corev1.PodSucceeded))
			if n := p.Status.ContainerStatuses[0].RestartCount; n != 1 {
				t.Errorf("%d restarts, want 1", n)
			}
		}},
		{"volumes and environment", func(t *testing.T) {
			p := await(t, "volumes", "runs", 30*time.Second, podReady)
			env := in(t, "volumes", "env")
			for _, want := range []string{"WORD=first", "KEY=sesame", "NODE=" + p.Spec.NodeName, "IP=" + p.Status.PodIP, "CPU=200", "BOTH=first-sesame",
				"CONF_colour=red", "KUBERNETES_SERVICE_HOST=10.96.0.1"} {
				if !strings.Contains("\n"+env, "\n"+want+"\n") {
					t.Errorf("no %s in\n%s", want, env)
				}
			}
			if strings.Contains(env, "NONE=") {
				t.Error("an optional key that is not there is set")
			}
			for file, want := range map[string]string{"/conf/sub/word": "first", "/secret/key": "sesame", "/down/note": "before", "/down/mem": "64",
				"/host/hello": "from the host", "/all/colour": "red", "/all/key": "sesame"} {
				if got := in(t, "volumes", "cat", file); got != want {
					t.Errorf("%s holds %q, want %q", file, got, want)
				}
			}
			if got := in(t, "volumes", "cat", "/all/token"); strings.Count(got, ".") != 2 {
				t.Errorf("the token is %q", got)
			}
			if got := in(t, "volumes", "stat", "-L", "-c", "%a", "/secret/key"); strings.TrimSpace(got) != "400" {
				t.Errorf("mode of the secret: %s", got)
			}
			if out := in(t, "volumes", "sh", "-c", "echo x > /empty/x && cat /empty/x && grep ' /empty ' /proc/mounts"); !regexp.MustCompile(`x\n\S+ /empty tmpfs `).MatchString(out) {
				t.Errorf("emptyDir in memory: %q", out)
			}
			if out, err := w.cli("n1", "exec", "volumes", "-c", "c", "--", "sh", "-c", "echo y > /secret/y"); err == nil {
				t.Errorf("a read-only volume was written: %s", out)
			}
			// Changes reach the running pod.
			w.apply(t, "n5", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: conf}\ndata: {colour: blue, word: second}\n")
			_, err := w.on("n5").CoreV1().Pods("default").Patch(background, "volumes", "application/merge-patch+json", []byte(`{"metadata":{"annotations":{"note":"after"}}}`), metav1.PatchOptions{})
			must(t, err)
			took := eventually(t, 90*time.Second, "the volumes follow", func() error {
				out, err := w.cli("n1", "exec", "volumes", "-c", "c", "--", "cat", "/conf/sub/word", "/all/colour", "/down/note")
				if err == nil && out != "secondblueafter" {
					err = fmt.Errorf("%q", out)
				}
				return err
			})
			t.Logf("volumes followed after %s", took)
		}},
		{"out of memory", func(t *testing.T) {
			p := await(t, "hungry", "has failed", 30*time.Second, phase(corev1.PodFailed))
			if s := terminated(p); s.Reason != "OOMKilled" || s.ExitCode != 137 {
				t.Errorf("it ended as %+v", s)
			}
		}},
		{"termination", func(t *testing.T) {
			await(t, "polite", "runs", 30*time.Second, podReady)
			await(t, "stubborn", "runs", 30*time.Second, podReady)
			began := time.Now()
			w.do(t, "n1", "delete", "pod", "polite", "--timeout=20s")
			took := time.Since(began)
			if b, err := os.ReadFile(dir + "/polite"); err != nil || string(b) != "ended\n" || took > 15*time.Second {
				t.Errorf("it did not end in peace: %q, %v, after %s", b, err, took)
			}
			began = time.Now()
			w.do(t, "n1", "delete", "pod", "stubborn", "--timeout=30s")
			if took := time.Since(began); took < 1800*time.Millisecond || took > 15*time.Second {
				t.Errorf("a pod that ignores SIGTERM and has 2 s was gone after %s", took)
			}
		}},
		{"scheduling refused", func(t *testing.T) {
			for name, want := range map[string]string{
				"huge":    "0/5 nodes are available: 5 Insufficient cpu.",
				"nowhere": "0/5 nodes are available: 5 node(s) didn't match Pod's node affinity/selector.",
			} {
				eventually(t, 20*time.Second, "the reason is told", func() error {
					out, err := w.cli("n2", "describe", "pod", name)
					if err == nil && (!strings.Contains(out, want) || !strings.Contains(out, "FailedScheduling")) {
						err = fmt.Errorf("no %q in\n%s", want, out)
					}
					return err
				})
			}
		}},
		{"RBAC", func(t *testing.T) {
			refused(t, errOf(w.cli("n2", "get", "secrets", "--as=system:serviceaccount:default:default")), "Forbidden", "cannot list resource \"secrets\"")
		}},
	} {
		t.Run(s.name, s.run)
	}
	w.do(t, "n1", "delete", "pods", "-l", "app!=web", "--grace-period=1", "--timeout=30s")
	w.do(t, "n1", "delete", "cm/conf", "secret/secret")
}
