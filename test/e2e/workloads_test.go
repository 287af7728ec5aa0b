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
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
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
	t.Run("quota", w.quota)
	t.Run("disruption budget", func(t *testing.T) {
		w.apply(t, "n2", `apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: log}
spec: {minAvailable: 4, selector: {matchLabels: {app: log}}}
`)
		eventually(t, 10*time.Second, "one of five may be evicted", func() error {
			b := get(k.PolicyV1().PodDisruptionBudgets("default").Get(background, "log", metav1.GetOptions{}))(t)
			if b.Status.DisruptionsAllowed != 1 || b.Status.CurrentHealthy != 5 {
				return fmt.Errorf("status %+v", b.Status)
			}
			return nil
		})
		pods, _ := w.awaitPods(t, "n1", "app=log", 5, 10*time.Second)
		evict := func(i int) error {
			return k.PolicyV1().Evictions("default").Evict(background, &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: pods[i].Name}})
		}
		must(t, evict(0))
		if err := evict(1); !apierrors.IsTooManyRequests(err) {
			t.Errorf("a second eviction at once: %v, want 429", err)
		}
		w.do(t, "n2", "delete", "pdb/log")
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

// quota shows that a quota limits a namespace, and lets go of what has gone.
func (w *world) quota(t *testing.T) {
	k := w.on("n3")
	w.apply(t, "n2", `apiVersion: v1
kind: Namespace
metadata: {name: small}
---
apiVersion: v1
kind: ResourceQuota
metadata: {name: q, namespace: small}
spec: {hard: {pods: "1", requests.cpu: 100m, count/configmaps: "3"}}
`)
	used := func(want map[corev1.ResourceName]string) func() error {
		return func() error {
			q := get(k.CoreV1().ResourceQuotas("small").Get(background, "q", metav1.GetOptions{}))(t)
			for r, n := range want {
				if got, ok := q.Status.Used[r]; !ok || got.String() != n {
					return fmt.Errorf("%s: %s used, want %s", r, got.String(), n)
				}
			}
			return nil
		}
	}
	eventually(t, 20*time.Second, "the usage is known", used(map[corev1.ResourceName]string{"pods": "0", "requests.cpu": "0", "count/configmaps": "1"})) // kube-root-ca.crt
	pod := func(name string) *corev1.Pod {
		return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.PodSpec{TerminationGracePeriodSeconds: new(int64), Containers: []corev1.Container{{Name: "c", Image: "skein.local/web:1",
			ImagePullPolicy: corev1.PullIfNotPresent, Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m")}}}}}}
	}
	_, err := k.CoreV1().Pods("small").Create(background, pod("one"), metav1.CreateOptions{})
	must(t, err)
	if _, err := k.CoreV1().Pods("small").Create(background, pod("two"), metav1.CreateOptions{}); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "exceeded quota: q") {
		t.Errorf("a second pod: %v", err)
	}
	for i := range 2 {
		_, err := k.CoreV1().ConfigMaps("small").Create(background, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("c", i)}}, metav1.CreateOptions{})
		must(t, err)
	}
	eventually(t, 5*time.Second, "usage rises", used(map[corev1.ResourceName]string{"pods": "1", "requests.cpu": "10m", "count/configmaps": "3"}))
	must(t, k.CoreV1().Pods("small").Delete(background, "one", metav1.DeleteOptions{}))
	must(t, k.CoreV1().ConfigMaps("small").Delete(background, "c0", metav1.DeleteOptions{}))
	eventually(t, 20*time.Second, "usage falls", used(map[corev1.ResourceName]string{"pods": "0", "requests.cpu": "0", "count/configmaps": "2"}))
	must(t, k.CoreV1().Namespaces().Delete(background, "small", metav1.DeleteOptions{}))
}
