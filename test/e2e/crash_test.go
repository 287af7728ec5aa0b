package e2e

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"skein.io/skein/node/cri/cgroup"
)

// processes gives the ids of a node's processes whose executable has a name.
func (w *world) processes(t testing.TB, node, comm string) (pids []int) {
	t.Helper()
	root := get(cgroup.Unified(w.node(node).Cgroup()))(t)
	_ = filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return nil
		}
		b, _ := os.ReadFile(path) // a cgroup may go at any time
		for _, f := range strings.Fields(string(b)) {
			if c, err := os.ReadFile("/proc/" + f + "/comm"); err == nil && strings.TrimSpace(string(c)) == comm {
				if pid, err := strconv.Atoi(f); err == nil {
					pids = append(pids, pid)
				}
			}
		}
		return nil
	})
	slices.Sort(pids)
	return pids
}

var containerdPid = regexp.MustCompile(`containerd, process (\d+)`)

func (w *world) containerd(t testing.TB, node string) int {
	t.Helper()
	ctx, cancel := timeout(5 * time.Second)
	defer cancel()
	for _, p := range get(w.control(node).Status(ctx))(t).Parts {
		if m := containerdPid.FindStringSubmatch(p.Message); m != nil {
			return get(strconv.Atoi(m[1]))(t)
		}
	}
	t.Fatalf("node %s names no containerd", node)
	return 0
}

// crash kills the daemon, containerd and both on a node with running pods: they go on, are adopted, and how a container ended meanwhile is known.
func (w *world) crash(t *testing.T) {
	w.spread(t)
	const node = "n2"
	w.apply(t, "n1", strings.ReplaceAll(`apiVersion: v1
kind: Pod
metadata: {name: echo, labels: {app: echo}}
spec:
  nodeName: NODE
  containers: [{name: c, image: skein.local/web:1, imagePullPolicy: IfNotPresent, args: [serve-tcp, ":9000"]}]
---
apiVersion: v1
kind: Service
metadata: {name: echo}
spec: {clusterIP: 10.96.7.9, selector: {app: echo}, ports: [{port: 9000}]}
`, "NODE", node))
	w.awaitPods(t, "n1", "app=echo", 1, 30*time.Second)
	eventually(t, 10*time.Second, "the echo Service answers", func() error {
		_, err := w.runIn(background, node, "", "sh", "-c", "exec 3<>/dev/tcp/10.96.7.9/9000")
		if err != nil {
			_, err = w.runIn(background, node, "", "bash", "-c", "exec 3<>/dev/tcp/10.96.7.9/9000")
		}
		return err
	})
	// One connection through the ClusterIP, open all the time.
	hold := get(w.node(node).Command(background, os.Args[0], "10.96.7.9:9000"))(t)
	hold.Env = append(hold.Env, roleEnv+"=hold")
	answers := get(hold.StdoutPipe())(t)
	must(t, hold.Start())
	lines := make(chan string, 1<<16)
	go func() { // ends with the process, which is killed below
		defer close(lines)
		for sc := bufio.NewScanner(answers); sc.Scan(); {
			lines <- sc.Text()
		}
	}()
	defer func() {
		_ = hold.Process.Kill()
		_ = hold.Wait()
	}()
	stillOpen := func(t *testing.T) {
		t.Helper()
		for len(lines) > 0 {
			<-lines
		}
		select {
		case l, ok := <-lines:
			if !ok {
				t.Fatal("the open connection ended")
			}
			_ = l
		case <-time.After(5 * time.Second):
			t.Fatal("the open connection is silent")
		}
	}
	stillOpen(t)

	for _, c := range []struct {
		name               string
		daemon, containerd bool
	}{{"daemon", true, false}, {"containerd", false, true}, {"both", true, true}} {
		t.Run(c.name, func(t *testing.T) {
			pod := "ends-" + c.name
			w.apply(t, "n1", fmt.Sprintf(`apiVersion: v1
kind: Pod
metadata: {name: %s, labels: {app: %[1]s}}
spec:
  nodeName: %s
  restartPolicy: Never
  containers: [{name: c, image: skein.local/web:1, imagePullPolicy: IfNotPresent, args: [crash, "7", 4s]}]
`, pod, node))
			w.awaitPods(t, "n1", "app="+pod, 1, 20*time.Second)
			running := time.Now()
			pods := append(get(w.podsReady("n1", "app=web", 6))(t), get(w.podsReady("n1", "app=echo", 1))(t)...)
			pids := w.processes(t, node, "app")
			probers := w.probeAll(t, webURL, node, "n1")
			child := w.containerd(t, node)
			if c.daemon {
				must(t, w.node(node).KillDaemon(background))
				w.hangUp(node)
			}
			if c.containerd {
				must(t, syscall.Kill(child, syscall.SIGKILL))
			}
			if c.daemon { // it stays away until the container has ended by itself
				eventually(t, 15*time.Second, "the container ends", func() error {
					if n := len(w.processes(t, node, "app")); n >= len(pids) {
						return fmt.Errorf("%d processes", n)
					}
					return nil
				})
				t.Logf("the container ended %s after it was Running, with nobody there", time.Since(running))
				stillOpen(t)
				must(t, w.node(node).Start(background, nil))
			}
			var end corev1.Pod
			eventually(t, 40*time.Second, "the end of the container is known", func() error {
				ctx, cancel := timeout(3 * time.Second)
				defer cancel()
				p, err := w.on("n1").CoreV1().Pods("default").Get(ctx, pod, metav1.GetOptions{})
				if err != nil {
					return err
				}
				if len(p.Status.ContainerStatuses) != 1 || p.Status.ContainerStatuses[0].State.Terminated == nil {
					return fmt.Errorf("status %+v", p.Status.ContainerStatuses)
				}
				end = *p
				return nil
			})
			if s := end.Status.ContainerStatuses[0].State.Terminated; s.ExitCode != 7 || end.Status.Phase != corev1.PodFailed {
				t.Errorf("the container ended with code %d (%s), phase %s; want 7, Failed", s.ExitCode, s.Reason, end.Status.Phase)
			}
			w.awaitReady(t, node, "n1", 30*time.Second)
			stillOpen(t)
			w.awaitPods(t, "n1", "app=web", 6, 20*time.Second)
			same(t, pods, append(get(w.podsReady("n1", "app=web", 6))(t), get(w.podsReady("n1", "app=echo", 1))(t)...))
			now := w.processes(t, node, "app")
			for _, p := range now {
				if !slices.Contains(pids, p) {
					t.Errorf("process %d is new; before there were %v, now %v", p, pids, now)
				}
			}
			if len(now) != len(pids)-1 {
				t.Errorf("processes %v became %v", pids, now)
			}
			for n, p := range probers {
				if bad := failed(p.stop()); len(bad) > 0 {
					t.Errorf("from %s %d of %d requests failed: %+v", n, len(bad), len(p.all()), bad[0])
				}
			}
			// The restarted daemon rules its pods: one that is deleted goes.
			must(t, w.on("n1").CoreV1().Pods("default").Delete(background, pod, metav1.DeleteOptions{}))
			eventually(t, 20*time.Second, "the ended pod goes", func() error { return w.noPod("n1", pod) })
		})
	}
	must(t, w.on("n1").CoreV1().Pods("default").Delete(background, "echo", metav1.DeleteOptions{}))
	must(t, w.on("n1").CoreV1().Services("default").Delete(background, "echo", metav1.DeleteOptions{}))
}

// reboot restarts a whole machine whose cable is out: its pods run again from what the disk holds.
func (w *world) reboot(t *testing.T) {
	const node = "n5"
	w.apply(t, "n1", strings.ReplaceAll(`apiVersion: v1
kind: ConfigMap
metadata: {name: edge}
data: {greeting: hello from the disk}
---
apiVersion: v1
kind: Secret
metadata: {name: edge}
stringData: {word: sesame}
---
apiVersion: v1
kind: Pod
metadata: {name: edge, labels: {app: edge}}
spec:
  nodeName: NODE
  tolerations: [{operator: Exists}]
  volumes: [{name: v, configMap: {name: edge}}]
  containers:
  - name: c
    image: skein.local/web:1
    imagePullPolicy: IfNotPresent
    volumeMounts: [{name: v, mountPath: /edge}]
    env: [{name: WORD, valueFrom: {secretKeyRef: {name: edge, key: word}}}]
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: edge-svc}
spec: {clusterIP: 10.96.7.8, selector: {app: edge}, ports: [{port: 80, targetPort: 8080}]}
`, "NODE", node))
	w.awaitPods(t, "n1", "app=edge", 1, 30*time.Second)
	const url = "http://10.96.7.8"
	eventually(t, 10*time.Second, "the Service answers", func() error { return errOf(w.fetch(node, url)) })
	// For longer than desired.FlushInterval: what it heard in its last tenth of a second, a node may forget.
	for _, p := range w.probeAll(t, url, node) {
		p.stop()
	}

	must(t, w.node(node).Link(background, false))
	w.powerOff(t, node)
	must(t, w.node(node).Start(background, nil))
	booted := time.Now()
	wants := func(path, want string) {
		t.Helper()
		eventually(t, 40*time.Second, "the cut-off node answers "+path, func() error {
			body, err := w.fetch(node, url+path)
			if err == nil && !strings.Contains(body, want) {
				err = fmt.Errorf("answer %q", body)
			}
			return err
		})
	}
	wants("/", "pod=")
	t.Logf("its Service answers from its own pod %s after the boot, with no API", time.Since(booted))
	wants("/file?path=/edge/greeting", "hello from the disk")
	wants("/env", "WORD=sesame")
	wants("/dns?name=edge-svc.default.svc.cluster.local", "10.96.7.8")
	wants("/dns?name=edge-svc", "10.96.7.8")
	wants("/get?url=http://edge-svc/env", "WORD=sesame")
	if _, err := w.cli(node, "get", "pods", "--max-age=0s"); err == nil {
		t.Error("the API answered: the node was not cut off, so the test shows nothing")
	}
	eventually(t, 20*time.Second, node+" is NotReady", func() error { return w.nodeReady(node, "n1", false) })
	must(t, w.node(node).Link(background, true))
	w.hangUp(node)
	t.Logf("%s is Ready %s after its cable is back", node, w.awaitReady(t, node, "n1", 30*time.Second))
	w.do(t, "n1", "delete", "pod/edge", "service/edge-svc", "configmap/edge", "secret/edge", "--ignore-not-found", "--wait=false")
	eventually(t, 20*time.Second, "the pod goes", func() error { return w.noPod("n1", "edge") })
}

// noPod checks that there is no such pod in the namespace default.
func (w *world) noPod(asks, pod string) error {
	ctx, cancel := timeout(3 * time.Second)
	defer cancel()
	l, err := w.on(asks).CoreV1().Pods("default").List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + pod})
	if err == nil && len(l.Items) > 0 {
		err = fmt.Errorf("pod %s is still there: %s, deleted at %v", pod, l.Items[0].Status.Phase, l.Items[0].DeletionTimestamp)
	}
	return err
}
