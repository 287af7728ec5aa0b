// Package node looks after the life of nodes: it gives each its pod network,
// tells the cluster when one is lost, moves the pods of a lost one away, and
// removes those of one that has left.
//
// Inputs: the failure detector's verdicts, Nodes, Pods, Leases of
// kube-node-lease (for nodes that the failure detector does not know).
//
// Outputs: on Nodes spec.podCIDR(s), the taints of
// node.kubernetes.io/{not-ready,unreachable,unschedulable,network-unavailable,
// memory-pressure,disk-pressure,pid-pressure}, the conditions Ready,
// MemoryPressure, DiskPressure and PIDPressure of lost nodes (a live node
// writes its own); on Pods the condition Ready of those on lost nodes,
// deletions by NoExecute taints, forced deletions of pods whose node has left.
//
// It does what upstream's node-lifecycle, taint-eviction and node-ipam
// controllers do, with the same texts. Two things differ:
// gossip and not leases says which nodes are lost, so that it is known in
// seconds; and the brake on evictions is read from the verdicts of all nodes
// before the first eviction, so that a partition which takes much of a zone
// away within the pods' toleration evicts nothing (see Pace). What the brake
// does is shown by a Board.
//
// A node that the failure detector does not know, made by hand or run by
// another kubelet, is judged by its Lease and its own heartbeats with upstream's
// graces, and nothing but that; it is never deleted for not being known.
//
// A pod tolerates the loss of its node for as long as its own toleration of
// the unreachable taint says. Pods that say nothing get theirs by the API's
// DefaultTolerationSeconds admission; the cluster's default grace is set there
// (see UnreachableToleration) and nowhere else.
package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	coordlisters "k8s.io/client-go/listers/coordination/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/utils/clock"

	"skein.io/skein/scheduler/controller"
)

// UnreachableToleration is how long, by default, pods stay bound to a lost
// node. The API's DefaultTolerationSeconds admission must be set to it
// (upstream's flag --default-unreachable-toleration-seconds, 300 there).
const UnreachableToleration = 10 * time.Second

// Controller is the node lifecycle controller.
type Controller struct {
	set    Settings
	client kubernetes.Interface
	health controller.Health
	clock  clock.WithTicker
	log    *slog.Logger
	events record.EventRecorder // about nodes and their pods
	taint  record.EventRecorder // about evictions by taint

	nodes  cache.SharedIndexInformer
	pods   cache.SharedIndexInformer
	leases cache.SharedIndexInformer
	lister corelisters.NodeLister
	lease  coordlisters.LeaseLister
	queue  *controller.Queue[string] // names of nodes
	wake   chan struct{}             // the picture below is out of date; capacity 1
	cidrs  *allocator

	mu       sync.Mutex // guards all below
	dirty    map[string]bool
	verdicts map[string]controller.NodeHealth // as of the last look at all nodes
	judged   map[string]judgement
	census   map[string]ZoneCount
	gone     map[string]bool // nodes without an object that have left the cluster
	beats    map[string]beat // of nodes that the failure detector does not know
	brake    brake
	tainted  map[string]*taintRecord
	said     map[string]time.Time // when a lost node and its pods were last said to be so
}

// New makes the controller. podCIDR is divided among the nodes.
func New(deps controller.Deps, podCIDR netip.Prefix, set Settings) *Controller {
	deps = deps.WithDefaults()
	set.setDefaults()
	core := deps.Factory.Core().V1()
	leases := deps.Factory.Coordination().V1().Leases()
	c := &Controller{
		set: set, client: deps.Client, health: deps.Health, clock: deps.Clock,
		log:    deps.Logger,
		events: deps.Recorder("node-controller"), taint: deps.Recorder("taint-eviction-controller"),
		nodes: core.Nodes().Informer(), pods: core.Pods().Informer(), leases: leases.Informer(),
		lister: core.Nodes().Lister(), lease: leases.Lister(),
		queue:   controller.NewQueue[string]("node", deps.Clock),
		wake:    make(chan struct{}, 1),
		cidrs:   newAllocator(podCIDR),
		dirty:   map[string]bool{},
		judged:  map[string]judgement{},
		census:  map[string]ZoneCount{},
		beats:   map[string]beat{},
		brake:   newBrake(set),
		tainted: map[string]*taintRecord{},
		said:    map[string]time.Time{},
	}
	if err := controller.EnsureIndexes(c.pods, controller.IndexNode); err != nil {
		panic("node: " + err.Error()) // the view was started before its controllers were made
	}
	return c
}

// Name is the controller's name.
func (c *Controller) Name() string { return "node" }

// seedRetry is the wait after the pod networks could not be read.
const seedRetry = 200 * time.Millisecond

// Run works until ctx ends.
func (c *Controller) Run(ctx context.Context) error {
	// A consistent read: what the leader before this one gave away must be
	// known before anything is given away. One that fails is no reason to begin
	// the whole leadership anew.
	for err := c.seedCIDRs(ctx); err != nil; err = c.seedCIDRs(ctx) {
		if ctx.Err() == nil {
			c.log.Warn("cannot begin yet", "controller", c.Name(), "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-c.clock.After(seedRetry):
		}
	}
	defer c.set.Board.follow(c)()
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: c.set.Workers,
		Watches: []controller.Watch{
			controller.On(c.nodes, c.nodeChanged),
			controller.On(c.pods, c.podChanged),
		},
		Ready:      []cache.InformerSynced{c.leases.HasSynced},
		Sync:       c.sync,
		Background: []func(context.Context){c.follow},
		Logger:     c.log,
	})
}

func nameOf(old, cur *corev1.Node) string {
	if cur != nil {
		return cur.Name
	}
	return old.Name
}

func (c *Controller) nodeChanged(old, cur *corev1.Node) {
	c.touch(nameOf(old, cur))
	if cur == nil {
		c.events.Eventf(nodeRef(old), corev1.EventTypeNormal, "RemovingNode", "Node %s event: Removing Node %s from Controller", old.Name, old.Name)
	}
}

// touch asks for a node to be judged anew and then worked on.
func (c *Controller) touch(name string) {
	c.mu.Lock()
	c.dirty[name] = true
	c.mu.Unlock()
	c.nudge()
}

func (c *Controller) nudge() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// podChanged wakes the pod's node if it needs care: most pods are on healthy
// nodes, and nothing is to be done for them.
func (c *Controller) podChanged(old, cur *corev1.Pod) {
	pod := cur
	if pod == nil {
		pod = old
	}
	name := pod.Spec.NodeName
	if name == "" {
		return
	}
	c.mu.Lock()
	j, known := c.judged[name]
	care := !known || j.needsCare()
	c.mu.Unlock()
	if care {
		c.queue.Add(name)
	}
}

// sync does for one node all that is due.
func (c *Controller) sync(ctx context.Context, name string) error {
	n, err := c.lister.Get(name)
	if apierrors.IsNotFound(err) {
		return c.collectLeft(ctx, name)
	} else if err != nil {
		return err
	}
	c.mu.Lock()
	j, known := c.judged[name]
	c.mu.Unlock()
	if !known {
		c.touch(name) // it is newer than the last look at all nodes
		return nil
	}
	if n.DeletionTimestamp != nil {
		return nil
	}
	// The loss of a node comes first; a missing pod network must not hold it up.
	var errs []error
	n, err = c.sayLost(ctx, n, j)
	errs = append(errs, err)
	n, err = c.ensureCIDR(ctx, n)
	errs = append(errs, err)
	if err := c.syncTaints(ctx, n, j); err != nil {
		errs = append(errs, fmt.Errorf("taint node %s: %w", name, err))
	}
	return errors.Join(append(errs, c.syncPods(ctx, n, j))...)
}

// syncTaints brings the taints that this controller manages to what they
// should be, asking the brake before pods are driven off.
func (c *Controller) syncTaints(ctx context.Context, n *corev1.Node, j judgement) error {
	now := c.clock.Now()
	evict := false
	if j.evicts() {
		c.mu.Lock()
		granted := c.brake.has(n.Name)
		var wait time.Duration
		evict, wait = c.brake.allow(j.zone, n.Name, now)
		c.mu.Unlock()
		if evict && !granted {
			c.set.Board.evicted(j.zone)
		}
		if wait > 0 {
			c.queue.AddAfter(n.Name, wait)
		}
	} else {
		c.mu.Lock()
		c.brake.forget(n.Name)
		c.mu.Unlock()
	}
	taints, changed := desiredTaints(n, j, evict, now)
	if !changed {
		return nil
	}
	_, err := c.patchNode(ctx, n.Name, "", map[string]any{
		// The list is replaced as a whole, so nobody's change in between may be lost.
		"metadata": map[string]any{"resourceVersion": n.ResourceVersion},
		"spec":     map[string]any{"taints": taints},
	})
	return err
}

// contradictEvery is how often, at most, a node that is lost from here but
// still writes its status by another way is contradicted.
const contradictEvery = 5 * time.Second

// sayLost writes what is known of a lost node into its conditions and those
// of its pods. It returns the node as it is then.
func (c *Controller) sayLost(ctx context.Context, n *corev1.Node, j judgement) (*corev1.Node, error) {
	now := c.clock.Now()
	c.mu.Lock()
	said, before := c.said[n.Name]
	if j.fate == live {
		delete(c.said, n.Name)
	}
	c.mu.Unlock()
	if j.fate == live {
		return n, nil
	}
	if wait := said.Add(contradictEvery).Sub(now); before && wait > 0 {
		c.queue.AddAfter(n.Name, wait)
		return n, nil
	}
	if conditions := lostConditions(n, j, now); len(conditions) > 0 {
		patched, err := c.patchNode(ctx, n.Name, "status", map[string]any{
			"status": map[string]any{"conditions": conditions},
		})
		if err != nil {
			return n, fmt.Errorf("say that node %s is lost: %w", n.Name, err)
		}
		n = patched
		c.events.Eventf(nodeRef(n), corev1.EventTypeNormal, "NodeNotReady", "Node %s status is now: NodeNotReady", n.Name)
	}
	pods, err := c.podsOn(n.Name)
	errs := []error{err}
	for _, pod := range pods {
		errs = append(errs, c.markNotReady(ctx, pod))
	}
	if err := errors.Join(errs...); err != nil {
		return n, err
	}
	c.mu.Lock()
	c.said[n.Name] = now
	c.mu.Unlock()
	return n, nil
}

// nodeRef is what events about a node refer to.
func nodeRef(n *corev1.Node) *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: n.Name, UID: n.UID}
}

// patchNode sends a strategic merge patch, of the subresource if one is named.
func (c *Controller) patchNode(ctx context.Context, name, subresource string, patch map[string]any) (*corev1.Node, error) {
	var sub []string
	if subresource != "" {
		sub = []string{subresource}
	}
	return c.client.CoreV1().Nodes().Patch(ctx, name, types.StrategicMergePatchType, mustJSON(patch), metav1.PatchOptions{}, sub...)
}

// mustJSON encodes values whose types always encode.
func mustJSON(v any) []byte {
	b, err := json.Marshal(v)
	if err != nil {
		panic("node: encode a patch: " + err.Error())
	}
	return b
}

func (c *Controller) podsOn(name string) ([]*corev1.Pod, error) {
	return controller.ByIndex[*corev1.Pod](c.pods.GetIndexer(), controller.IndexNode, name)
}

func (c *Controller) seedCIDRs(ctx context.Context) error {
	list, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return fmt.Errorf("node: read which pod networks are taken: %w", err)
	}
	for i := range list.Items {
		for _, clash := range c.cidrs.take(list.Items[i].Name, podCIDRs(&list.Items[i])) {
			c.log.Warn("two nodes have one pod network", "node", list.Items[i].Name, "other", clash)
		}
	}
	return nil
}
