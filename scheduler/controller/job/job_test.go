package job

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"skein.io/skein/scheduler/controller"
	"skein.io/skein/scheduler/controller/controllertest"
)

// run lets the controller work; end decides how a pod ends.
func run(t *testing.T, client *fake.Clientset, rounds int, end func(*corev1.Pod) corev1.PodPhase) {
	t.Helper()
	for range rounds {
		time.Sleep(5 * time.Second)
		synctest.Wait()
		pods, err := client.CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for i := range pods.Items {
			p := &pods.Items[i]
			if controller.PodTerminal(p) {
				continue
			}
			p.Status.Phase = end(p)
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "c", State: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{FinishedAt: metav1.Now()}}}}
			if _, err := client.CoreV1().Pods("ns").UpdateStatus(t.Context(), p, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		synctest.Wait()
	}
}

func succeed(*corev1.Pod) corev1.PodPhase { return corev1.PodSucceeded }
func fail(*corev1.Pod) corev1.PodPhase    { return corev1.PodFailed }

func get(t *testing.T, client *fake.Clientset) *batchv1.Job {
	t.Helper()
	j, err := client.BatchV1().Jobs("ns").Get(t.Context(), "sum", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return j
}

func TestLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(newJob(3, 7, indexedJob, func(j *batchv1.Job) { j.Spec.TTLSecondsAfterFinished = new(int32(3600)) }))
		rec := controllertest.Start(t, client, nil, New)
		run(t, client, 10, succeed)
		j := get(t, client)
		if s := j.Status; s.Succeeded != 7 || s.Failed != 0 || s.CompletedIndexes != "0-6" || s.CompletionTime == nil || s.StartTime == nil || s.Active != 0 || *s.Ready != 0 || *s.Terminating != 0 || !finished(j) {
			t.Fatalf("status %+v", s)
		}
		pods, err := client.CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(pods.Items) != 7 {
			t.Fatalf("%d pods, %v", len(pods.Items), err)
		}
		for _, p := range pods.Items {
			i := p.Annotations[batchv1.JobCompletionIndexAnnotation]
			if len(p.Finalizers) != 0 || p.Spec.Hostname != "sum-"+i || p.Labels[batchv1.JobCompletionIndexAnnotation] != i || p.Spec.Containers[0].Env[0].Name != "JOB_COMPLETION_INDEX" || !strings.HasPrefix(p.Name, "sum-"+i+"-") {
				t.Errorf("pod %+v", p)
			}
		}
		if e := strings.Join(controllertest.Events(rec), "\n"); !strings.Contains(e, "Normal Completed Job completed") || strings.Count(e, "SuccessfulCreate") != 7 {
			t.Errorf("events\n%s", e)
		}
		before := len(client.Actions())
		time.Sleep(50 * time.Minute)
		synctest.Wait()
		if n := len(client.Actions()) - before; n != 0 {
			t.Errorf("%d requests while it rests", n)
		}
		time.Sleep(15 * time.Minute)
		synctest.Wait()
		if n := controllertest.Writes(client, "delete", "jobs"); n != 1 {
			t.Errorf("deleted %d times after its time to live", n)
		}
	})
}

func TestFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(newJob(1, 1, limit(3)))
		rec := controllertest.Start(t, client, nil, New)
		start := time.Now()
		for !finished(get(t, client)) && time.Since(start) < time.Hour {
			run(t, client, 1, fail)
		}
		j := get(t, client)
		if s := j.Status; s.Failed != 4 || find(s.Conditions, batchv1.JobFailed) == nil || find(s.Conditions, batchv1.JobFailed).Reason != "BackoffLimitExceeded" || s.CompletionTime != nil {
			t.Errorf("status %+v", s)
		}
		if d := time.Since(start); d < 70*time.Second || d > 2*time.Minute {
			t.Errorf("failed after %v, want the back-offs of 10, 20 and 40 s", d)
		}
		if e := strings.Join(controllertest.Events(rec), "\n"); !strings.Contains(e, "Warning BackoffLimitExceeded Job has reached the specified backoff limit") {
			t.Errorf("events\n%s", e)
		}
	})
}

func TestSuspendAndResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(newJob(2, 4))
		controllertest.Start(t, client, nil, New)
		set := func(v bool) {
			j := get(t, client)
			j.Spec.Suspend = &v
			if _, err := client.BatchV1().Jobs("ns").Update(t.Context(), j, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(3 * time.Second)
			synctest.Wait()
		}
		time.Sleep(time.Second)
		set(true)
		if s := get(t, client).Status; s.Active != 0 || s.StartTime != nil || find(s.Conditions, batchv1.JobSuspended) == nil {
			t.Errorf("suspended: %+v", s)
		}
		set(false)
		run(t, client, 6, succeed)
		if s := get(t, client).Status; s.Succeeded != 4 || find(s.Conditions, batchv1.JobSuspended) != nil || find(s.Conditions, batchv1.JobComplete) == nil {
			t.Errorf("resumed: %+v", s)
		}
	})
}

// Pods whose Job is gone are let go.
func TestOrphans(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := controllertest.NewClient(newJob(2, 2))
		controllertest.Start(t, client, nil, New)
		time.Sleep(time.Second)
		synctest.Wait()
		if err := client.BatchV1().Jobs("ns").Delete(t.Context(), "sum", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		pods, err := client.CoreV1().Pods("ns").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(pods.Items) != 2 {
			t.Fatalf("%d pods, %v", len(pods.Items), err)
		}
		for _, p := range pods.Items {
			if tracked(&p) {
				t.Errorf("pod %s is still held", p.Name)
			}
		}
	})
}
