package e2e

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
)

const (
	pendingPods = 1000
	handMade    = 12 // nodes with room for 1,320 pods
	// bindLimit is how long no pod may be bound after the death of the leader. Where others use the machine so much that the elections alone
	// take more than half of it, what comes after them may take as long as they did.
	bindLimit = 2 * time.Second
)

// bindings are what a watch shows of pods, by uid: where they are, and when that was first seen.
type bindings struct {
	mu    sync.Mutex // guards all
	node  map[types.UID]string
	times []time.Time
	moved []string
}

func (b *bindings) see(p *corev1.Pod) {
	b.mu.Lock()
	defer b.mu.Unlock()
	was := b.node[p.UID]
	switch {
	case p.Spec.NodeName == "" || was == p.Spec.NodeName:
	case was != "":
		b.moved = append(b.moved, fmt.Sprintf("%s was on %s and is on %s", p.Name, was, p.Spec.NodeName))
	default:
		b.node[p.UID] = p.Spec.NodeName
		b.times = append(b.times, time.Now())
	}
}

func (b *bindings) bound() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.node)
}

// watch shows the pods with a label as a node sees them until the test ends.
func (w *world) watchBindings(t *testing.T, node, selector string) *bindings {
	t.Helper()
	w.mu.Lock()
	cfg := w.configFor(node, w.lab.DialContext)
	w.mu.Unlock()
	cfg.Timeout = 0
	k := get(kubernetes.NewForConfig(cfg))(t)
	ctx, cancel := context.WithCancel(background)
	b := &bindings{node: map[types.UID]string{}}
	var done sync.WaitGroup
	done.Go(func() {
		for ctx.Err() == nil {
			yes := true
			wt, err := k.CoreV1().Pods("default").Watch(ctx, metav1.ListOptions{LabelSelector: selector, SendInitialEvents: &yes,
				AllowWatchBookmarks: true, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan})
			if err != nil {
				select {
				case <-ctx.Done():
				case <-time.After(20 * time.Millisecond):
				}
				continue
			}
			for ev := range wt.ResultChan() {
				if p, ok := ev.Object.(*corev1.Pod); ok && len(p.UID) > 0 {
					b.see(p)
				}
			}
		}
	})
	t.Cleanup(func() { cancel(); done.Wait() })
	return b
}

func waiting(i int) *corev1.Pod {
	none := int64(0)
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("waiting-%04d", i), Namespace: "default", Labels: map[string]string{"failover": "yes"}},
		Spec: corev1.PodSpec{NodeSelector: map[string]string{"failover": "yes"}, TerminationGracePeriodSeconds: &none,
			Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
			Containers: []corev1.Container{{Name: "c", Image: "skein.local/web:1",
				Resources: corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("10m")}}}}}}
}

func byHand(i int) *corev1.Node {
	amount := corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("64"), corev1.ResourceMemory: resource.MustParse("64Gi"), corev1.ResourcePods: resource.MustParse("110")}
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("by-hand-%02d", i), Labels: map[string]string{"failover": "yes"}},
		Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: "failover", Effect: corev1.TaintEffectNoSchedule}}}, // nobody else is to go there
		Status: corev1.NodeStatus{Capacity: amount, Allocatable: amount,
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue, Reason: "Test", LastHeartbeatTime: metav1.Now()}}}}
}

// failover kills the leader's daemon while 1,000 pods wait for a node, some of them just getting one, and a rolling update is under way.
// The next leader goes on: no pod is lost, none is bound twice or beyond what a node holds, and the update ends.
func (w *world) failover(t *testing.T) {
	leader := get(w.leader("n1"))(t)
	var through string
	for _, v := range get(w.voters("n1"))(t) {
		if v != leader {
			through = v
		}
	}
	k := w.on(through)
	defer w.clearFailover(t, through)
	inParallel(t, pendingPods, func(i int) error {
		_, err := k.CoreV1().Pods("default").Create(background, waiting(i), metav1.CreateOptions{})
		return err
	})
	eventually(t, 60*time.Second, "all pods are refused", func() error {
		l, err := k.CoreV1().Pods("default").List(background, metav1.ListOptions{LabelSelector: "failover"})
		if err != nil {
			return err
		}
		told := 0
		for _, p := range l.Items {
			if slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
				return c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse
			}) {
				told++
			}
		}
		if told != pendingPods {
			return fmt.Errorf("%d of %d", told, pendingPods)
		}
		return nil
	})
	seen := w.watchBindings(t, through, "failover")
	_, err := k.AppsV1().Deployments("default").Patch(background, "web", types.StrategicMergePatchType,
		[]byte(`{"spec":{"template":{"metadata":{"annotations":{"release":"failover"}}}}}`), metav1.PatchOptions{})
	must(t, err)
	eventually(t, 30*time.Second, "the rolling update has begun", func() error {
		d, err := k.AppsV1().Deployments("default").Get(background, "web", metav1.GetOptions{})
		if err == nil && d.Status.UpdatedReplicas == 0 {
			err = fmt.Errorf("%+v", d.Status)
		}
		return err
	})
	inParallel(t, handMade, func(i int) error {
		_, err := k.CoreV1().Nodes().Create(background, byHand(i), metav1.CreateOptions{})
		return err
	})
	eventually(t, 30*time.Second, "some pods are bound", func() error {
		if n := seen.bound(); n < 20 {
			return fmt.Errorf("%d", n)
		}
		return nil
	})
	must(t, w.node(leader).KillDaemon(background))
	died := time.Now()
	w.hangUp(leader)
	eventually(t, 60*time.Second, "all pods are bound", func() error {
		if n := seen.bound(); n < pendingPods {
			return fmt.Errorf("%d of %d", n, pendingPods)
		}
		return nil
	})
	w.checkBindings(t, k, seen, died, w.elected(t, through, died))
	eventually(t, 90*time.Second, "the rolling update ends", func() error {
		d, err := k.AppsV1().Deployments("default").Get(background, "web", metav1.GetOptions{})
		if err == nil && (d.Status.ObservedGeneration < d.Generation || d.Status.UpdatedReplicas != 6 || d.Status.Replicas != 6 || d.Status.AvailableReplicas != 6) {
			err = fmt.Errorf("%+v", d.Status)
		}
		return err
	})
	t.Logf("%s is Ready again after %s", leader, w.powerOn(t, leader, through))
}

// elected returns how long after the death of the leader a node knew others of the shards that bindings need, as its log tells.
func (w *world) elected(t *testing.T, node string, died time.Time) (took time.Duration) {
	t.Helper()
	log := string(get(os.ReadFile(w.node(node).LogFile()))(t))
	seen := map[string]bool{}
	for _, line := range strings.Split(log, "\n") {
		m := leaderChanged.FindStringSubmatch(line)
		if m == nil || seen[m[2]] {
			continue
		}
		at, err := time.Parse(time.RFC3339Nano, m[1])
		if after := at.Sub(died); err == nil && after > 0 {
			seen[m[2]] = true // a later one is another election
			took = max(took, after)
		}
	}
	return took
}

var leaderChanged = regexp.MustCompile(`^time=(\S+) .*msg="leader changed" .*shard=(system|pods) .*leader=[1-9]`)

func (w *world) checkBindings(t *testing.T, k *kubernetes.Clientset, seen *bindings, died time.Time, elected time.Duration) {
	t.Helper()
	seen.mu.Lock()
	defer seen.mu.Unlock()
	// What the old leader bound may be seen a moment after its death; to elect another takes longer.
	const moment = 200 * time.Millisecond
	before, next := 0, time.Duration(0)
	for _, at := range seen.times {
		if after := at.Sub(died); after < moment {
			before++
		} else if next == 0 || after < next {
			next = after
		}
	}
	limit := max(bindLimit, 2*elected)
	t.Logf("%d pods were bound when the leader died; others were elected within %s, and the next pod was bound %s after that death", before, elected, next)
	switch {
	case before == len(seen.times):
		t.Error("all pods were bound before the leader died: this shows nothing")
	case next > limit:
		t.Errorf("the next binding took more than %s", limit)
	}
	for _, m := range seen.moved {
		t.Errorf("bound twice: %s", m)
	}
	l := get(k.CoreV1().Pods("default").List(background, metav1.ListOptions{LabelSelector: "failover"}))(t)
	per := map[string]int{}
	for _, p := range l.Items {
		if seen.node[p.UID] != p.Spec.NodeName {
			t.Errorf("%s is on %q, and was seen on %q", p.Name, p.Spec.NodeName, seen.node[p.UID])
		}
		per[p.Spec.NodeName]++
	}
	if len(l.Items) != pendingPods {
		t.Errorf("%d pods, want %d", len(l.Items), pendingPods)
	}
	for node, n := range per {
		if n > 110 {
			t.Errorf("%d pods on %s, which has room for 110", n, node)
		}
	}
}

func (w *world) clearFailover(t *testing.T, through string) {
	k := w.on(through)
	none := int64(0)
	eventually(t, 60*time.Second, "the pods and nodes are gone", func() error {
		err := k.CoreV1().Pods("default").DeleteCollection(background, metav1.DeleteOptions{GracePeriodSeconds: &none}, metav1.ListOptions{LabelSelector: "failover"})
		if err == nil {
			err = k.CoreV1().Nodes().DeleteCollection(background, metav1.DeleteOptions{}, metav1.ListOptions{LabelSelector: "failover"})
		}
		if err != nil {
			return err
		}
		pods, err := k.CoreV1().Pods("default").List(background, metav1.ListOptions{LabelSelector: "failover"})
		if err == nil && len(pods.Items) > 0 {
			err = fmt.Errorf("%d pods are left", len(pods.Items))
		}
		return err
	})
}

// inParallel makes n objects, some at once. A busy machine may elect a leader meanwhile, so each is tried for a while.
func inParallel(t *testing.T, n int, create func(i int) error) {
	t.Helper()
	next := make(chan int)
	errs := make(chan error, n)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range next {
				err := create(i)
				for began := time.Now(); err != nil && !apierrors.IsAlreadyExists(err) && time.Since(began) < 30*time.Second; err = create(i) {
					time.Sleep(100 * time.Millisecond)
				}
				if err != nil && !apierrors.IsAlreadyExists(err) {
					errs <- err
				}
			}
		})
	}
	for i := range n {
		next <- i
	}
	close(next)
	wg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
}
