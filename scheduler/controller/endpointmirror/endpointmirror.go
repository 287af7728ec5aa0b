// Package endpointmirror writes EndpointSlices for Endpoints that somebody made
// by hand for a Service without a selector: what reads EndpointSlices (Skein's
// own datapath and DNS do) finds them there.
//
// Inputs: Services, Endpoints, EndpointSlices. Outputs: creates, updates and
// deletes the EndpointSlices that carry its name in
// endpointslice.kubernetes.io/managed-by; events on the Endpoints.
//
// What they hold is decided by plan.go, which is pure. It never decides on
// slices that the view shows older than this controller wrote them.
package endpointmirror

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "endpointmirror"
	workers = 2
	// managedBy marks the slices of this controller; upstream's name, so that a
	// cluster that moves here keeps its slices.
	managedBy = "endpointslicemirroring-controller.k8s.io"
	// leaderAnnotation marks Endpoints that old leader elections use as a lock
	// (client-go's resourcelock.LeaderElectionRecordAnnotationKey).
	leaderAnnotation = "control-plane.alpha.kubernetes.io/leader"
)

type mirror struct {
	controller.Deps
	queue     *controller.Queue[string]
	watches   []controller.Watch
	services  corelisters.ServiceLister
	endpoints corelisters.EndpointsLister
	slices    discoverylisters.EndpointSliceLister
	ledger    *controller.Ledger // of slices, by key of their Endpoints
	events    record.EventRecorder
}

// New returns the controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	core, disc := deps.Factory.Core().V1(), deps.Factory.Discovery().V1().EndpointSlices()
	c := &mirror{
		Deps: deps, queue: controller.NewQueue[string](name, deps.Clock),
		services: core.Services().Lister(), endpoints: core.Endpoints().Lister(), slices: disc.Lister(),
		ledger: controller.NewLedger(disc.Informer().GetIndexer()),
		events: deps.Recorder("endpoint-slice-mirroring-controller"),
	}
	c.watches = []controller.Watch{
		controller.On(core.Services().Informer(), c.serviceChanged),
		controller.On(core.Endpoints().Informer(), c.endpointsChanged),
		controller.On(disc.Informer(), c.sliceChanged),
	}
	return c
}

func (c *mirror) Name() string { return name }

func (c *mirror) Run(ctx context.Context) error {
	return controller.Run(ctx, controller.Work[string]{Queue: c.queue, Workers: workers, Watches: c.watches, Sync: c.sync, Logger: c.Logger})
}

// serviceChanged looks at Services that have, or had, no selector.
func (c *mirror) serviceChanged(old, cur *corev1.Service) {
	switch {
	case old != nil && cur != nil && (old.Spec.Selector == nil) == (cur.Spec.Selector == nil):
	case cur != nil:
		if old != nil || cur.Spec.Selector == nil {
			c.queue.Add(controller.Key(cur))
		}
	case old.Spec.Selector == nil:
		c.queue.Add(controller.Key(old))
	}
}

// endpointsChanged looks at what is not written by the Endpoints controller,
// which other slices stand for.
func (c *mirror) endpointsChanged(old, cur *corev1.Endpoints) {
	if cur == nil {
		cur = old
	}
	if !mirrored(cur) && (old == nil || !mirrored(old)) {
		return
	}
	if service, err := c.services.Services(cur.Namespace).Get(cur.Name); err == nil && service.Spec.Selector != nil {
		return // when that changes the Service wakes us
	}
	c.queue.Add(controller.Key(cur))
}

// sliceChanged looks at slices that are, or were, ours.
func (c *mirror) sliceChanged(old, cur *discoveryv1.EndpointSlice) {
	for _, s := range []*discoveryv1.EndpointSlice{old, cur} {
		if s != nil && s.Labels[discoveryv1.LabelManagedBy] == managedBy && s.Labels[discoveryv1.LabelServiceName] != "" {
			c.queue.Add(s.Namespace + "/" + s.Labels[discoveryv1.LabelServiceName])
		}
	}
}

// mirrored reports whether such Endpoints are mirrored if their Service has no selector.
func mirrored(e *corev1.Endpoints) bool {
	_, lock := e.Annotations[leaderAnnotation]
	return e.Labels[discoveryv1.LabelSkipMirror] != "true" && !lock
}

func (c *mirror) sync(ctx context.Context, key string) error {
	ns, objName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	if c.ledger.Pending(key, c.Clock.Now()) > 0 {
		return fmt.Errorf("EndpointSlices of Endpoints %s: %w", key, controller.ErrStaleView)
	}
	have, err := c.slices.EndpointSlices(ns).List(labels.SelectorFromSet(labels.Set{
		discoveryv1.LabelServiceName: objName, discoveryv1.LabelManagedBy: managedBy,
	}))
	if err != nil {
		return err
	}
	endpoints, err := c.source(ns, objName)
	if err != nil {
		return err
	}
	if endpoints == nil {
		return c.write(ctx, key, changes{remove: have})
	}
	groups, invalid, tooMany := wanted(endpoints)
	todo := plan(endpoints, groups, have)
	if endpoints.DeletionTimestamp != nil {
		todo.create = nil
	}
	if len(todo.create)+len(todo.update) > 0 {
		c.complain(endpoints, invalid, tooMany)
	}
	return c.write(ctx, key, todo)
}

// source returns the Endpoints of that name, nil if they are not to be mirrored.
func (c *mirror) source(ns, objName string) (*corev1.Endpoints, error) {
	endpoints, err := c.endpoints.Endpoints(ns).Get(objName)
	if apierrors.IsNotFound(err) || err == nil && !mirrored(endpoints) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	service, err := c.services.Services(ns).Get(objName)
	if apierrors.IsNotFound(err) || err == nil && service.Spec.Selector != nil {
		return nil, nil
	}
	return endpoints, err
}

func (c *mirror) complain(e *corev1.Endpoints, invalid, tooMany int) {
	if invalid > 0 {
		c.events.Eventf(e, corev1.EventTypeWarning, "InvalidIPAddress", "Skipped %d invalid IP addresses when mirroring to EndpointSlices", invalid)
	}
	if tooMany > 0 {
		c.events.Eventf(e, corev1.EventTypeWarning, "TooManyAddressesToMirror",
			"A max of %d addresses can be mirrored to EndpointSlices per Endpoints subset. %d addresses were skipped", perSubset, invalid+tooMany)
	}
}

func (c *mirror) write(ctx context.Context, key string, todo changes) error {
	var errs []error
	failed := func(what string, s *discoveryv1.EndpointSlice, err error) {
		errs = append(errs, fmt.Errorf("%s EndpointSlice %s for Endpoints %s: %w", what, s.Name, key, err))
	}
	for _, s := range todo.create {
		made, err := c.Client.DiscoveryV1().EndpointSlices(s.Namespace).Create(ctx, s, metav1.CreateOptions{})
		switch {
		case apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		case err != nil:
			failed("create", s, err)
		default:
			c.ledger.Wrote(key, made, c.Clock.Now())
		}
	}
	for _, s := range todo.update {
		written, err := c.Client.DiscoveryV1().EndpointSlices(s.Namespace).Update(ctx, s, metav1.UpdateOptions{})
		if err != nil {
			failed("update", s, err)
			continue
		}
		c.ledger.Wrote(key, written, c.Clock.Now())
	}
	for _, s := range todo.remove {
		err := c.Client.DiscoveryV1().EndpointSlices(s.Namespace).Delete(ctx, s.Name, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(s.UID))})
		if err != nil && !apierrors.IsNotFound(err) {
			failed("delete", s, err)
			continue
		}
		c.ledger.Deleted(key, s, c.Clock.Now())
	}
	return errors.Join(errs...)
}
