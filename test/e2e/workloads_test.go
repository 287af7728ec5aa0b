package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// workloadsYAML has one of each kind of workload that is no Deployment.
const workloadsYAML = `apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db}
spec:
  serviceName: db
  replicas: 3
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: c, image: "skein.local/web:1", imagePullPolicy: IfNotPresent, env: [{name: POD_NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}]}
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {clusterIP: None, selector: {app: db}, ports: [{port: 8080}]}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: log}
spec:
  selector: {matchLabels: {app: log}}
  updateStrategy: {rollingUpdate: {maxUnavailable: 2}}
  template:
    metadata: {labels: {app: log}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: c, image: "skein.local/web:1", imagePullPolicy: IfNotPresent}]
---
apiVersion: batch/v1
kind: Job
metadata: {name: sum}
spec:
  completions: 5
  parallelism: 2
  completionMode: Indexed
  template:
    spec:
      restartPolicy: Never
      containers: [{name: c, image: "skein.local/tools:1", imagePullPolicy: IfNotPresent, command: [sh, -c, "echo index $JOB_COMPLETION_INDEX"]}]
---
apiVersion: batch/v1
kind: Job
metadata: {name: broken}
spec:
  backoffLimit: 0
  template:
    spec:
      restartPolicy: Never
      containers: [{name: c, image: "skein.local/tools:1", imagePullPolicy: IfNotPresent, command: [sh, -c, "exit 3"]}]
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: tick}
spec:
  schedule: "* * * * *"
  timeZone: Europe/Berlin
  jobTemplate:
    spec:
      template:
        spec:
          restartPolicy: OnFailure
          containers: [{name: c, image: "skein.local/tools:1", imagePullPolicy: IfNotPresent, command: [sh, -c, date]}]
`

// workloads shows StatefulSets, DaemonSets, Jobs and CronJobs at work, with kubectl's own rollout verbs.
func (w *world) workloads(t *testing.T) {
	w.apply(t, "n2", workloadsYAML)
	k := w.on("n1")
	w.awaitPods(t, "n1", "app=db", 3, 30*time.Second)
	w.awaitPods(t, "n1", "app=log", 5, 30*time.Second)

	t.Run("StatefulSet", func(t *testing.T) {
		out, err := w.cli("n2", "exec", "db-0", "--", "/app", "get", "http://db-2.db:8080/")
		if err != nil || !strings.Contains(out, "pod=db-2") {
			t.Errorf("db-2.db from a pod: %q, %v", out, err)
		}
		w.do(t, "n3", "rollout", "restart", "statefulset/db", "daemonset/log")
		w.do(t, "n3", "rollout", "status", "statefulset/db", "--timeout=60s")
		w.do(t, "n3", "rollout", "undo", "statefulset/db")
		w.do(t, "n3", "rollout", "status", "statefulset/db", "--timeout=60s")
		w.do(t, "n3", "scale", "statefulset/db", "--replicas=1")
		eventually(t, 20*time.Second, "one pod is left, the first", func() error {
			pods := get(k.CoreV1().Pods("default").List(background, metav1.ListOptions{LabelSelector: "app=db"}))(t)
			if len(pods.Items) != 1 || pods.Items[0].Name != "db-0" {
				return fmt.Errorf("%d pods", len(pods.Items))
			}
			return nil
		})
	})
	t.Run("DaemonSet", func(t *testing.T) {
		w.do(t, "n3", "rollout", "status", "daemonset/log", "--timeout=60s")
		pods, _ := w.awaitPods(t, "n1", "app=log", 5, 30*time.Second)
		on := map[string]bool{}
		for _, p := range pods {
			on[p.Spec.NodeName] = true
		}
		if len(on) != 5 {
			t.Errorf("pods on %v, want one on each of 5 nodes", on)
		}
	})
	t.Run("Job", func(t *testing.T) {
		job := func(name string) *batchv1.Job {
			return get(k.BatchV1().Jobs("default").Get(background, name, metav1.GetOptions{}))(t)
		}
		ended := func(j *batchv1.Job) (string, error) {
			for _, c := range j.Status.Conditions {
				if c.Status == corev1.ConditionTrue && (c.Type == batchv1.JobComplete || c.Type == batchv1.JobFailed) {
					return string(c.Type) + " " + c.Reason, nil
				}
			}
			return "", errors.New("it has not ended")
		}
		for name, want := range map[string]string{"sum": "Complete CompletionsReached", "broken": "Failed BackoffLimitExceeded"} {
			eventually(t, 40*time.Second, "Job "+name+" ends", func() error { return errOf(ended(job(name))) })
			if how, _ := ended(job(name)); how != want {
				t.Errorf("%s: %s, want %s", name, how, want)
			}
		}
		if s := job("sum").Status; s.Succeeded != 5 || s.Failed != 0 || s.CompletedIndexes != "0-4" {
			t.Errorf("status %+v", s)
		}
		if s := job("broken").Status; s.Succeeded != 0 || s.Failed != 1 {
			t.Errorf("status %+v", s)
		}
		pods := get(k.CoreV1().Pods("default").List(background, metav1.ListOptions{LabelSelector: "batch.kubernetes.io/job-name=sum"}))(t)
		var said []string
		for _, p := range pods.Items {
			said = append(said, strings.TrimSpace(w.do(t, "n2", "logs", p.Name)))
		}
		slices.Sort(said)
		if got := strings.Join(said, ", "); got != "index 0, index 1, index 2, index 3, index 4" {
			t.Errorf("the pods said %q", got)
		}
	})
	t.Run("CronJob", func(t *testing.T) {
		eventually(t, 75*time.Second, "a Job is started at the full minute, and succeeds", func() error {
			c := get(k.BatchV1().CronJobs("default").Get(background, "tick", metav1.GetOptions{}))(t)
			if c.Status.LastSuccessfulTime == nil {
				return fmt.Errorf("status %+v", c.Status)
			}
			return nil
		})
	})
	w.do(t, "n2", "delete", "statefulset/db", "daemonset/log", "job/sum", "job/broken", "cronjob/tick", "service/db")
	eventually(t, 30*time.Second, "all pods go with their owners", func() error {
		pods := get(k.CoreV1().Pods("default").List(background, metav1.ListOptions{}))(t)
		for _, p := range pods.Items {
			if !strings.HasPrefix(p.Name, "web-") {
				return fmt.Errorf("pod %s is there", p.Name)
			}
		}
		return nil
	})
}
