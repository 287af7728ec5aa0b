package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// verbs uses skein's kubectl verbs, against whatever node.
func (w *world) verbs(t *testing.T) {
	has := func(t *testing.T, out string, words ...string) {
		t.Helper()
		for _, x := range words {
			if !strings.Contains(out, x) {
				t.Errorf("no %q in\n%s", x, out)
			}
		}
	}
	t.Run("get", func(t *testing.T) {
		has(t, w.do(t, "n4", "get", "nodes", "-o", "wide"), "INTERNAL-IP", "CONTAINER-RUNTIME", w.node("n5").IP().String(), "containerd://", "v1.36.3+skein")
		has(t, w.do(t, "n2", "get", "pods", "-o", "wide", "-l", "app=web"), "NODE", "10.244.", "1/1", "Running")
		has(t, w.do(t, "n3", "get", "deploy,svc", "-n", "default"), "deployment.apps/web", "6/6", "service/web", "80:30080/TCP")
		has(t, w.do(t, "n1", "get", "svc", "web", "-o", "yaml"), "clusterIP: 10.96.7.7", "kind: Service")
		has(t, w.do(t, "n1", "get", "deploy", "-o", "name"), "deployment.apps/web")
		eventually(t, 20*time.Second, "six pods as JSON, as soon as those have gone that were ending", func() error {
			var p corev1.PodList
			if err := json.Unmarshal([]byte(w.do(t, "n5", "get", "pods", "-l", "app=web", "-o", "json")), &p); err != nil || len(p.Items) != 6 {
				return fmt.Errorf("%v, %d pods", err, len(p.Items))
			}
			return nil
		})
		refused(t, errOf(w.cli("n1", "get", "pod", "nothing")), "NotFound", "nothing")
		refused(t, errOf(w.cli("n1", "get", "unicorns")), "unicorns")
	})
	t.Run("describe", func(t *testing.T) {
		has(t, w.do(t, "n2", "describe", "deployment", "web"), "StrategyType:", "RollingUpdate", "6 available", "ScalingReplicaSet")
		has(t, w.do(t, "n2", "describe", "node", "n4"), "PodCIDR:", "Allocatable:", "MemoryPressure", "Allocated resources")
		has(t, w.do(t, "n2", "describe", "pods", "-l", "app=web"), "Readiness:", "http-get", "Scheduled", "Started")
		has(t, w.do(t, "n2", "describe", "svc", "web"), "Endpoints:", "10.96.7.7", "30080")
	})
	t.Run("apply files", func(t *testing.T) {
		dir := t.TempDir()
		must(t, os.Chmod(dir, 0o755))
		for i := range 3 {
			must(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.yaml", i)), fmt.Appendf(nil, "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: dir-%d}\ndata: {k: v}\n", i), 0o644))
		}
		has(t, w.do(t, "n1", "apply", "-f", dir), "configmap/dir-0 created", "configmap/dir-2 created")
		has(t, w.do(t, "n4", "apply", "-f", filepath.Join(dir, "1.yaml")), "configmap/dir-1 unchanged")
		w.apply(t, "n4", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: dir-1}\ndata: {k: w}\n")
		has(t, w.do(t, "n2", "get", "cm", "dir-1", "-o", "jsonpath={.data.k}"), "w")
		has(t, w.do(t, "n2", "delete", "-f", dir), `"dir-0" deleted`, `"dir-2" deleted`)
	})
	t.Run("bad manifests", func(t *testing.T) {
		bad := func(yaml string, words ...string) {
			t.Helper()
			t.Log(refused(t, errOf(w.cliIn("n2", yaml, "apply", "-f", "-")), words...))
		}
		bad("a: b: c: [", "yaml")
		bad("apiVersion: v1\nkind: Unicorn\nmetadata: {name: x}\n", "Unicorn")
		bad("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\ndatum: {k: v}\n", "unknown field", "datum")
		bad("apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: x}\nspec: {replicas: many}\n", "replicas")
		bad("apiVersion: v1\nkind: Pod\nmetadata: {name: X_Y}\nspec: {containers: []}\n", "metadata.name", "spec.containers")
		refused(t, errOf(w.cli("n2", "apply", "-f", "/nothing/here.yaml")), "/nothing/here.yaml")
		w.do(t, "n2", "get", "cm") // and nothing of it is there
		if out, err := w.cli("n2", "get", "cm", "x"); err == nil {
			t.Errorf("half a manifest was applied: %s", out)
		}
	})
	t.Run("logs and exec", func(t *testing.T) {
		w.apply(t, "n1", `apiVersion: v1
kind: Pod
metadata: {name: talks, labels: {app: talks}}
spec:
  nodeName: n5
  containers:
  - {name: lines, image: skein.local/tools:1, imagePullPolicy: IfNotPresent, args: [print, "100000", 100ms]}
  - {name: box, image: skein.local/tools:1, imagePullPolicy: IfNotPresent, args: [sleep]}
---
apiVersion: v1
kind: Pod
metadata: {name: crashes}
spec:
  nodeName: n4
  containers: [{name: c, image: skein.local/web:1, imagePullPolicy: IfNotPresent, args: [crash, "3", 500ms]}]
`)
		w.awaitPods(t, "n1", "app=talks", 1, 30*time.Second)
		eventually(t, 10*time.Second, "lines in the log", func() error {
			if out, err := w.cli("n1", "logs", "talks", "-c", "lines", "--tail=2"); err != nil || strings.Count(out, "\n") != 2 {
				return fmt.Errorf("%q, %v", out, err)
			}
			return nil
		})
		ctx, cancel := timeout(20 * time.Second)
		defer cancel()
		follow := get(w.node("n2").Command(ctx, skein(), "logs", "talks", "-c", "lines", "-f", "--since=1s"))(t)
		out := get(follow.StdoutPipe())(t)
		must(t, follow.Start())
		seen := 0
		for sc := bufio.NewScanner(out); seen < 20 && sc.Scan(); {
			seen++
		}
		_ = follow.Process.Kill()
		_ = follow.Wait()
		if seen < 20 {
			t.Errorf("logs -f ended after %d lines", seen)
		}
		if out, err := w.cliIn("n3", "through the pipe", "exec", "-i", "talks", "-c", "box", "--", "sh", "-c", "cat; echo; hostname"); err != nil || out != "through the pipe\ntalks\n" {
			t.Errorf("exec: %q, %v", out, err)
		}
		err := errOf(w.cli("n3", "exec", "talks", "-c", "box", "--", "sh", "-c", "echo to stderr >&2; exit 42"))
		refused(t, err, "to stderr", "exit code 42")
		refused(t, errOf(w.cli("n1", "logs", "talks", "-c", "nobody")), "nobody")
		eventually(t, 60*time.Second, "CrashLoopBackOff", func() error {
			out, err := w.cli("n1", "get", "pod", "crashes")
			if err == nil && !strings.Contains(out, "CrashLoopBackOff") {
				err = fmt.Errorf("%s", out)
			}
			return err
		})
		has(t, w.do(t, "n1", "logs", "crashes", "--previous"), "crash: exit 3")
		has(t, w.do(t, "n1", "describe", "pod", "crashes"), "Exit Code:    3", "BackOff", "Back-off restarting failed container")
		w.do(t, "n1", "delete", "pod", "talks", "crashes", "--grace-period=1")
		eventually(t, 20*time.Second, "the pods go", func() error { return w.noPod("n1", "talks") })
	})
	t.Run("cordon and drain", func(t *testing.T) {
		const node = "n5"
		w.do(t, "n1", "cordon", node)
		has(t, w.do(t, "n2", "get", "node", node), "SchedulingDisabled")
		p := w.probe(t, "n1", webURL, 10*time.Millisecond)
		out := w.do(t, "n3", "drain", node, "--timeout=60s", "--ignore-daemonsets", "--delete-emptydir-data", "--force")
		has(t, out, "evicting pod default/web-", "drained")
		pods, took := w.awaitPods(t, "n1", "app=web", 6, 60*time.Second)
		t.Logf("6 pods Ready %s after the drain", took)
		for _, x := range pods {
			if x.Spec.NodeName == node {
				t.Errorf("pod %s is on the drained node", x.Name)
			}
		}
		if bad := failed(p.stop()); len(bad) > 0 {
			t.Errorf("%d of %d requests failed during the drain: %+v", len(bad), len(p.all()), bad[0])
		}
		w.do(t, "n1", "uncordon", node)
		w.do(t, "n1", "rollout", "restart", "deployment/web")
		w.do(t, "n1", "rollout", "status", "deployment/web", "--timeout=60s")
		eventually(t, 30*time.Second, "the node is used again", func() error {
			l, err := w.on("n1").CoreV1().Pods("default").List(background, metav1.ListOptions{LabelSelector: "app=web", FieldSelector: "spec.nodeName=" + node})
			if err == nil && len(l.Items) == 0 {
				err = fmt.Errorf("no pod there")
			}
			return err
		})
	})
	t.Run("namespace and owner", func(t *testing.T) {
		// A namespace with things in it goes, and takes them along; an owner's death is its children's.
		w.apply(t, "n1", `apiVersion: v1
kind: Namespace
metadata: {name: gone}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: a, namespace: gone}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: d, namespace: gone}
spec:
  replicas: 2
  selector: {matchLabels: {app: d}}
  template:
    metadata: {labels: {app: d}}
    spec: {containers: [{name: c, image: "skein.local/web:1", imagePullPolicy: IfNotPresent}]}
`)
		w.do(t, "n1", "rollout", "status", "deployment/d", "-n", "gone", "--timeout=30s")
		w.do(t, "n1", "delete", "deployment", "d", "-n", "gone")
		eventually(t, 30*time.Second, "ReplicaSet and pods go with their owner", func() error {
			out, err := w.cli("n2", "get", "rs,pods", "-n", "gone", "-o", "name")
			if err == nil && strings.TrimSpace(out) != "" {
				err = fmt.Errorf("%s", out)
			}
			return err
		})
		w.do(t, "n1", "delete", "namespace", "gone", "--timeout=30s")
		refused(t, errOf(w.cli("n2", "get", "namespace", "gone")), "NotFound")
	})
}

// rollout changes the program under requests, takes it back, and changes the number of its pods: no request fails.
func (w *world) rollout(t *testing.T) {
	probers := w.probeAll(t, webURL, "n1", "n4")
	release := func(n string) {
		t.Helper()
		eventually(t, 20*time.Second, "release "+n+" answers", func() error {
			for range 10 {
				if body, err := w.fetch("n2", webURL+"env"); err != nil || !strings.Contains(body, "RELEASE="+n+"\n") {
					return fmt.Errorf("%v, %d bytes", err, len(body))
				}
			}
			return nil
		})
	}
	release("1")
	w.apply(t, "n3", strings.ReplaceAll(webYAML, `name: RELEASE, value: "1"`, `name: RELEASE, value: "2"`))
	w.do(t, "n3", "rollout", "status", "deployment/web", "--timeout=90s")
	release("2")
	w.do(t, "n2", "rollout", "undo", "deployment/web")
	w.do(t, "n2", "rollout", "status", "deployment/web", "--timeout=90s")
	release("1")
	if out := w.do(t, "n2", "rollout", "history", "deployment/web"); strings.Count(out, "\n") < 4 {
		t.Errorf("history:\n%s", out)
	}
	w.do(t, "n1", "scale", "deployment/web", "--replicas=2")
	w.awaitPods(t, "n1", "app=web", 2, 60*time.Second)
	w.do(t, "n1", "scale", "deployment/web", "--replicas=6")
	w.awaitPods(t, "n1", "app=web", 6, 60*time.Second)
	for n, p := range probers {
		shots := p.stop()
		t.Logf("%d requests from %s", len(shots), n)
		if bad := failed(shots); len(bad) > 0 {
			t.Errorf("from %s %d of %d requests failed: %+v", n, len(bad), len(shots), bad[0])
		}
	}
}
