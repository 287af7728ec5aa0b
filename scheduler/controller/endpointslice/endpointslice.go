// Package endpointslice writes the EndpointSlices of all Services that have a
// selector, from the pods that it matches: which are ready, serving and
// terminating, where they are, and under which ports.
//
// Inputs: Services, Pods, Nodes (zones for hints; an endpoint on a node that
// does not exist is left out), EndpointSlices. Outputs: creates, updates and
// deletes the EndpointSlices that carry its name in
// endpointslice.kubernetes.io/managed-by; events on the Service.
//
// The comparison of wanted and existing slices is upstream's own library
// (k8s.io/endpointslice): its packing of endpoints into slices with few writes
// is what clients of the API know. This package decides when it runs: never on
// slices that the view shows older than this controller wrote them.
package endpointslice

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/labels"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	endpointslicelib "k8s.io/endpointslice"
	"k8s.io/endpointslice/topologycache"
	"k8s.io/endpointslice/util"
	"k8s.io/klog/v2"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "endpointslice"
	workers = 4
	// managedBy marks the slices of this controller; upstream's name, so that a
	// cluster that moves here keeps its slices.
	managedBy = "endpointslice-controller.k8s.io"
	// perSlice is upstream's default for endpoints in one slice.
	perSlice = 100
	// zonesSettle is how long a change of the zones waits for others before the
	// Services whose hints no longer fit are looked for.
	zonesSettle = 200 * time.Millisecond
	// zonesKey is the key under which that is done: no Service has it.
	zonesKey = ""
)

type sliceController struct {
	controller.Deps
	queue    *controller.Queue[string]
	watches  []controller.Watch
	services corelisters.ServiceLister
	pods     corelisters.PodLister
	nodes    corelisters.NodeLister
	slices   discoverylisters.EndpointSliceLister
	rec      *endpointslicelib.Reconciler
	tracker  *util.EndpointSliceTracker
	triggers *util.TriggerTimeTracker
	topology *topologycache.TopologyCache
	events   record.EventRecorder
	podInf   cache.SharedIndexInformer
	initErr  error

	mu    sync.Mutex  // held while the topology is brought up to date
	stale atomic.Bool // the topology is older than the nodes
}

// New returns the EndpointSlice controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	core := deps.Factory.Core().V1()
	disc := deps.Factory.Discovery().V1().EndpointSlices()
	c := &sliceController{
		Deps:     deps,
		queue:    controller.NewQueue[string](name, deps.Clock),
		services: core.Services().Lister(),
		pods:     core.Pods().Lister(),
		nodes:    core.Nodes().Lister(),
		slices:   disc.Lister(),
		tracker:  util.NewEndpointSliceTracker(),
		triggers: util.NewTriggerTimeTracker(),
		topology: topologycache.NewTopologyCache(),
		events:   deps.Recorder("endpoint-slice-controller"),
		podInf:   core.Pods().Informer(),
	}
	c.rec = endpointslicelib.NewReconciler(deps.Client, c.nodes, perSlice, c.tracker, c.topology, c.events, managedBy,
		endpointslicelib.WithPreferSameTrafficDistributionEnabled(true))
	c.watches = []controller.Watch{
		controller.On(core.Services().Informer(), c.serviceChanged),
		controller.On(core.Pods().Informer(), c.podChanged),
		controller.On(core.Nodes().Informer(), c.nodeChanged),
		controller.On(disc.Informer(), c.sliceChanged),
	}
	c.initErr = controller.EnsureIndexes(c.podInf, controller.IndexNode)
	return c
}

func (c *sliceController) Name() string { return name }

func (c *sliceController) Run(ctx context.Context) error {
	if c.initErr != nil {
		return c.initErr
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: workers,
		Watches: c.watches,
		Sync:    c.sync,
		Logger:  c.Logger,
	})
}

func (c *sliceController) serviceChanged(old, cur *corev1.Service) {
	if cur == nil {
		cur = old
	}
	c.queue.Add(controller.Key(cur))
}

// podChanged wakes the Services that match the pod as it was or as it is, if
// anything changed that an endpoint shows.
func (c *sliceController) podChanged(old, cur *corev1.Pod) {
	// The library tells a missing pod by an untyped nil.
	var o, n any
	if old != nil {
		o = old
	}
	if cur != nil {
		n = cur
	}
	key := util.GetPodUpdateProjectionKey(o, n)
	if key == nil {
		return
	}
	c.wakeServices(key)
}

func (c *sliceController) wakeServices(key *util.PodProjectionKey) {
	services, err := util.GetServicesToUpdate(c.services, key)
	if err != nil {
		c.Logger.Error("find the Services of a pod", "controller", name, "err", err)
		return
	}
	for service := range services {
		c.queue.Add(service)
	}
}

// sliceChanged wakes the Service of a slice that somebody else changed.
func (c *sliceController) sliceChanged(old, cur *discoveryv1.EndpointSlice) {
	switch {
	case cur == nil:
		if c.rec.ManagedByController(old) && c.tracker.Has(old) && !c.tracker.HandleDeletion(old) {
			c.wakeServiceOf(old)
		}
	case old != nil && old.Labels[discoveryv1.LabelServiceName] != cur.Labels[discoveryv1.LabelServiceName]:
		c.wakeServiceOf(old)
		c.wakeServiceOf(cur)
	case old != nil && c.rec.ManagedByChanged(old, cur),
		c.rec.ManagedByController(cur) && c.tracker.ShouldSync(cur):
		c.wakeServiceOf(cur)
	}
}

func (c *sliceController) wakeServiceOf(s *discoveryv1.EndpointSlice) {
	if key, err := endpointslicelib.ServiceControllerKey(s); err == nil {
		c.queue.Add(key)
	}
}

// nodeChanged wakes Services whose hints no longer fit the zones, and those
// with endpoints on a node that came: they were left out so far.
func (c *sliceController) nodeChanged(old, cur *corev1.Node) {
	if old != nil && cur != nil && nodeReady(old) == nodeReady(cur) && old.Labels[corev1.LabelTopologyZone] == cur.Labels[corev1.LabelTopologyZone] {
		return
	}
	// The topology is worked out from all nodes: once for many changes.
	c.stale.Store(true)
	c.queue.AddAfter(zonesKey, zonesSettle)
	if old != nil || cur == nil {
		return
	}
	pods, err := controller.ByIndex[*corev1.Pod](c.podInf.GetIndexer(), controller.IndexNode, cur.Name)
	if err != nil {
		return // New made sure of the index
	}
	for _, pod := range pods {
		c.wakeServices(util.GetPodUpdateProjectionKey(nil, pod))
	}
}

// refresh brings the topology up to date with the nodes.
func (c *sliceController) refresh() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.stale.Swap(false) {
		return nil
	}
	nodes, err := c.nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	c.topology.SetNodes(klog.Logger{}, nodes)
	return nil
}

func nodeReady(n *corev1.Node) bool {
	for _, cond := range n.Status.Conditions {
		if cond.Type == corev1.NodeReady {
			return cond.Status == corev1.ConditionTrue
		}
	}
	return false
}

func (c *sliceController) sync(_ context.Context, key string) error {
	if err := c.refresh(); err != nil {
		return err
	}
	if key == zonesKey {
		for _, key := range c.topology.GetOverloadedServices() {
			c.queue.Add(key)
		}
		return nil
	}
	ns, svcName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	service, err := c.services.Services(ns).Get(svcName)
	if apierrors.IsNotFound(err) {
		// The slices go with their owner; here only what is remembered of them.
		c.triggers.DeleteService(ns, svcName)
		c.rec.DeleteService(ns, svcName)
		c.tracker.DeleteService(ns, svcName)
		return nil
	}
	if err != nil {
		return err
	}
	if service.Spec.Type == corev1.ServiceTypeExternalName || len(service.Spec.Selector) == 0 {
		return nil // has none, or somebody else writes them
	}
	pods, err := c.pods.Pods(ns).List(labels.SelectorFromSet(service.Spec.Selector))
	if err != nil {
		return err
	}
	existing, err := c.existing(service)
	if err != nil {
		return err
	}
	if c.tracker.StaleSlices(service, existing) {
		return fmt.Errorf("EndpointSlices of Service %s: %w", key, controller.ErrStaleView)
	}
	triggered := c.triggers.ComputeEndpointLastChangeTriggerTime(ns, service, pods)
	// The errors name pod, node and Service; a log in between would only repeat them.
	if err := joined(c.rec.Reconcile(klog.Logger{}, service, pods, existing, triggered)); err != nil {
		if !apierrors.IsConflict(err) && !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
			c.events.Eventf(service, corev1.EventTypeWarning, "FailedToUpdateEndpointSlices",
				"Error updating Endpoint Slices for Service %s/%s: %v", ns, svcName, err)
		}
		return fmt.Errorf("EndpointSlices of Service %s: %w", key, err)
	}
	return nil
}

// existing returns the slices of this controller for service that are not
// about to go.
func (c *sliceController) existing(service *corev1.Service) ([]*discoveryv1.EndpointSlice, error) {
	all, err := c.slices.EndpointSlices(service.Namespace).List(labels.SelectorFromSet(labels.Set{
		discoveryv1.LabelServiceName: service.Name,
		discoveryv1.LabelManagedBy:   managedBy,
	}))
	if err != nil {
		return nil, err
	}
	kept := all[:0]
	for _, s := range all {
		if s.DeletionTimestamp == nil {
			kept = append(kept, s)
		}
	}
	return kept, nil
}

// joined makes the library's aggregate of errors one that errors.As sees into.
func joined(err error) error {
	if agg, ok := err.(utilerrors.Aggregate); ok {
		return errors.Join(utilerrors.Flatten(agg).Errors()...)
	}
	return err
}
