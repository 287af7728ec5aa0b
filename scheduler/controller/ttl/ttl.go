// Package ttl tells each node how long it may go by a Secret or a ConfigMap that it has read before it reads it again: the more nodes, the
// longer. Agents that watch what they use (Skein's does) need it not, others do.
//
// Inputs: Nodes, of which it reads the number and the annotation. Outputs: the annotation node.alpha.kubernetes.io/ttl of Nodes, in seconds.
package ttl

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "ttl"
	workers = 4
)

// step is a size of clusters. They overlap, so that one more node and one less does not change all.
type step struct{ from, to, seconds int }

// steps are upstream's.
var steps = []step{{0, 100, 0}, {90, 500, 15}, {450, 1000, 30}, {900, 2000, 60}, {1800, math.MaxInt, 300}}

// climb gives the step of a cluster with so many nodes that was at step at.
func climb(steps []step, at, nodes int) int {
	for nodes > steps[at].to {
		at++
	}
	for nodes < steps[at].from {
		at--
	}
	return at
}

type ttls struct {
	controller.Deps
	steps  []step
	queue  *controller.Queue[string]
	inf    cache.SharedIndexInformer
	lister corelisters.NodeLister

	mu sync.Mutex
	at int // guarded by mu
}

// New returns the controller.
func New(deps controller.Deps) controller.Controller { return newWith(deps, steps) }

func newWith(deps controller.Deps, steps []step) controller.Controller {
	deps = deps.WithDefaults()
	nodes := deps.Factory.Core().V1().Nodes()
	return &ttls{Deps: deps, steps: steps, queue: controller.NewQueue[string](name, deps.Clock), inf: nodes.Informer(), lister: nodes.Lister()}
}

func (c *ttls) Name() string { return name }

func (c *ttls) Run(ctx context.Context) error {
	return controller.Run(ctx, controller.Work[string]{
		Queue: c.queue, Workers: workers, Sync: c.sync, Logger: c.Logger,
		Watches: []controller.Watch{controller.On(c.inf, c.changed)},
	})
}

func (c *ttls) changed(old, cur *corev1.Node) {
	switch {
	case old == nil, cur == nil:
		if c.resized() {
			return // and all are looked at
		}
	case old.Annotations[corev1.ObjectTTLAnnotationKey] == cur.Annotations[corev1.ObjectTTLAnnotationKey]:
		return
	}
	if cur != nil {
		c.queue.Add(cur.Name)
	}
}

// resized looks at how many nodes there are, and wakes all if that makes another step.
func (c *ttls) resized() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	at := climb(c.steps, c.at, len(c.inf.GetIndexer().ListKeys()))
	if at == c.at {
		return false
	}
	c.at = at
	all, err := c.lister.List(labels.Everything())
	if err != nil {
		return false // a lister of a cache has no errors
	}
	for _, n := range all {
		c.queue.Add(n.Name)
	}
	return true
}

func (c *ttls) sync(ctx context.Context, nodeName string) error {
	n, err := c.lister.Get(nodeName)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	c.mu.Lock()
	want := strconv.Itoa(c.steps[c.at].seconds)
	c.mu.Unlock()
	if n.Annotations[corev1.ObjectTTLAnnotationKey] == want {
		return nil
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{corev1.ObjectTTLAnnotationKey: want}}})
	if err != nil {
		return err
	}
	_, err = c.Client.CoreV1().Nodes().Patch(ctx, nodeName, types.MergePatchType, patch, metav1.PatchOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("annotate node %s: %w", nodeName, err)
	}
	return nil
}
