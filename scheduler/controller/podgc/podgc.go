// Package podgc removes pods that nobody else will remove: those bound to nodes
// that do not exist, those that end on nodes which are out of service, those
// that end and were never bound, and the oldest of too many that have ended.
//
// Inputs: Pods, Nodes. Outputs: sets the phase of such pods to Failed, with the
// condition DisruptionTarget where their node is gone, and deletes them without
// grace.
//
// Such a deletion says that the pod does not run. That a node does not exist is
// believed only after quarantine, and after asking the API itself. A node that
// is merely unreachable is not this controller's matter.
package podgc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "podgc"
	workers = 2
	// quarantine is how long a node must be missing. Upstream's.
	quarantine = 40 * time.Second
	// threshold is how many ended pods are kept. Upstream's default.
	threshold = 12500
	// endedDelay gathers the ends of pods, so that many are counted once.
	endedDelay = 20 * time.Second
	parallel   = 16
)

// key is what to look at: a node's pods, a pod without a node, or ended pods.
type key struct {
	node    string
	ns, pod string
	ended   bool
}

type collector struct {
	controller.Deps
	queue   *controller.Queue[key]
	podInf  cache.SharedIndexInformer
	nodeInf cache.SharedIndexInformer
	pods    corelisters.PodLister
	nodes   corelisters.NodeLister
	keep    int
	initErr error

	mu sync.Mutex
	// missing is since when a node that pods are bound to is missing. Guarded by mu.
	missing map[string]time.Time
}

// New returns the collector of pods.
func New(deps controller.Deps) controller.Controller { return newCollector(deps, threshold) }

func newCollector(deps controller.Deps, keep int) *collector {
	deps = deps.WithDefaults()
	core := deps.Factory.Core().V1()
	c := &collector{
		Deps:    deps,
		queue:   controller.NewQueue[key](name, deps.Clock),
		podInf:  core.Pods().Informer(),
		nodeInf: core.Nodes().Informer(),
		pods:    core.Pods().Lister(),
		nodes:   core.Nodes().Lister(),
		keep:    keep,
		missing: map[string]time.Time{},
	}
	c.initErr = controller.EnsureIndexes(c.podInf, controller.IndexNode, controller.IndexEnded)
	return c
}

func (c *collector) Name() string { return name }

func (c *collector) Run(ctx context.Context) error {
	if c.initErr != nil {
		return c.initErr
	}
	return controller.Run(ctx, controller.Work[key]{
		Queue:   c.queue,
		Workers: workers,
		Watches: []controller.Watch{
			controller.On(c.nodeInf, c.nodeChanged),
			controller.On(c.podInf, c.podChanged),
		},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

func (c *collector) nodeChanged(old, cur *corev1.Node) {
	if cur == nil {
		c.queue.Add(key{node: old.Name})
		return
	}
	if old == nil {
		c.forget(cur.Name)
	}
	if outOfService(cur) {
		c.queue.Add(key{node: cur.Name})
	}
}

func (c *collector) podChanged(_, cur *corev1.Pod) {
	if cur == nil {
		return
	}
	if controller.PodTerminal(cur) {
		c.queue.AddAfter(key{ended: true}, endedDelay)
	}
	if cur.Spec.NodeName == "" {
		if cur.DeletionTimestamp != nil {
			c.queue.Add(key{ns: cur.Namespace, pod: cur.Name})
		}
		return
	}
	node, err := c.nodes.Get(cur.Spec.NodeName)
	if apierrors.IsNotFound(err) || err == nil && cur.DeletionTimestamp != nil && outOfService(node) {
		c.queue.Add(key{node: cur.Spec.NodeName})
	}
}

func (c *collector) sync(ctx context.Context, k key) error {
	switch {
	case k.ended:
		ended, err := controller.ByIndex[*corev1.Pod](c.podInf.GetIndexer(), controller.IndexEnded, controller.KeyEnded)
		if err != nil {
			return err
		}
		return c.removeAll(ctx, surplus(ended, c.keep), nil)
	case k.node != "":
		return c.syncNode(ctx, k)
	}
	pod, err := c.pods.Pods(k.ns).Get(k.pod)
	if apierrors.IsNotFound(err) || err == nil && (pod.Spec.NodeName != "" || pod.DeletionTimestamp == nil) {
		return nil
	}
	if err != nil {
		return err
	}
	return c.remove(ctx, pod, nil)
}

func (c *collector) syncNode(ctx context.Context, k key) error {
	pods, err := controller.ByIndex[*corev1.Pod](c.podInf.GetIndexer(), controller.IndexNode, k.node)
	if err != nil {
		return err
	}
	node, err := c.nodes.Get(k.node)
	if err == nil {
		return c.removeAll(ctx, ending(node, pods), nil)
	}
	if !apierrors.IsNotFound(err) {
		return err
	}
	if len(pods) == 0 {
		c.forget(k.node)
		return nil
	}
	if wait := c.quarantined(k.node); wait > 0 {
		c.queue.AddAfter(k, wait)
		return nil
	}
	_, err = c.Client.CoreV1().Nodes().Get(ctx, k.node, metav1.GetOptions{})
	switch {
	case err == nil:
		c.queue.AddAfter(k, quarantine) // the view will show it
		return nil
	case !apierrors.IsNotFound(err):
		return fmt.Errorf("read node %s: %w", k.node, err)
	}
	c.Logger.Info("remove the pods of a node that does not exist", "controller", name, "node", k.node, "pods", len(pods))
	if err := c.removeAll(ctx, pods, &corev1.PodCondition{
		Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue,
		Reason: "DeletionByPodGC", Message: "PodGC: node no longer exists",
	}); err != nil {
		return err
	}
	c.forget(k.node)
	return nil
}

func (c *collector) forget(node string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.missing, node)
}

// quarantined is how much longer a missing node must be missing.
func (c *collector) quarantined(node string) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := c.Clock.Now()
	since, ok := c.missing[node]
	if !ok {
		since = now
		c.missing[node] = now
	}
	return quarantine - now.Sub(since)
}

func (c *collector) removeAll(ctx context.Context, pods []*corev1.Pod, why *corev1.PodCondition) error {
	errs := make([]error, len(pods))
	workqueue.ParallelizeUntil(ctx, min(parallel, len(pods)), len(pods), func(i int) { errs[i] = c.remove(ctx, pods[i], why) })
	return errors.Join(append(errs, ctx.Err())...)
}

// remove marks the pod as failed, because nobody else will, and deletes it at once.
func (c *collector) remove(ctx context.Context, pod *corev1.Pod, why *corev1.PodCondition) error {
	api := c.Client.CoreV1().Pods(pod.Namespace)
	if !controller.PodTerminal(pod) {
		patch, err := failed(pod, why, c.Clock.Now())
		if err == nil {
			_, err = api.Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
		}
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("mark pod %s/%s as failed: %w", pod.Namespace, pod.Name, err)
		}
	}
	err := api.Delete(ctx, pod.Name, metav1.DeleteOptions{
		GracePeriodSeconds: new(int64), Preconditions: metav1.NewUIDPreconditions(string(pod.UID)),
	})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete pod %s/%s: %w", pod.Namespace, pod.Name, err)
	}
	return nil
}

// failed returns the patch of the status of a pod that failed; the uid in it
// makes the API refuse it for another pod of that name.
func failed(pod *corev1.Pod, why *corev1.PodCondition, now time.Time) ([]byte, error) {
	status := map[string]any{"phase": corev1.PodFailed}
	if why != nil {
		c := *why
		c.LastTransitionTime = metav1.NewTime(now)
		status["conditions"] = []corev1.PodCondition{c}
	}
	return json.Marshal(map[string]any{"metadata": map[string]any{"uid": pod.UID}, "status": status})
}
