// Package endpoints writes the legacy Endpoints of Services with a selector,
// for clients that have not moved to EndpointSlices (kubectl get endpoints
// among them). Nothing of Skein itself reads them.
//
// Inputs: Services, Pods, Endpoints. Outputs: creates, updates and deletes the
// Endpoints of the Service's name.
//
// What they hold is decided by plan.go, which is pure. Updates are
// compare-and-swap against the view, so that a late one is refused.
package endpoints

import (
	"context"
	"fmt"
	"maps"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/endpointslice/util"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "endpoints"
	workers = 2
	// managedBy and its value are upstream's: other tools skip what carries them.
	managedBy = "endpoints.kubernetes.io/managed-by"
	manager   = "endpoint-controller"
)

type endpoints struct {
	controller.Deps
	queue    *controller.Queue[string]
	watches  []controller.Watch
	services corelisters.ServiceLister
	pods     corelisters.PodLister
	lister   corelisters.EndpointsLister
	triggers *util.TriggerTimeTracker
	events   record.EventRecorder
}

// New returns the Endpoints controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	core := deps.Factory.Core().V1()
	c := &endpoints{
		Deps:     deps,
		queue:    controller.NewQueue[string](name, deps.Clock),
		services: core.Services().Lister(),
		pods:     core.Pods().Lister(),
		lister:   core.Endpoints().Lister(),
		triggers: util.NewTriggerTimeTracker(),
		events:   deps.Recorder("endpoint-controller"),
	}
	c.watches = []controller.Watch{
		controller.On(core.Services().Informer(), c.serviceChanged),
		controller.On(core.Pods().Informer(), c.podChanged),
		controller.On(core.Endpoints().Informer(), c.endpointsChanged),
	}
	return c
}

func (c *endpoints) Name() string { return name }

func (c *endpoints) Run(ctx context.Context) error {
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: workers,
		Watches: c.watches,
		Sync:    c.sync,
		Logger:  c.Logger,
	})
}

func (c *endpoints) serviceChanged(old, cur *corev1.Service) {
	if cur == nil {
		cur = old
	}
	c.queue.Add(controller.Key(cur))
}

func (c *endpoints) podChanged(old, cur *corev1.Pod) {
	// The library tells a missing pod by an untyped nil.
	var o, n any
	if old != nil {
		o = old
	}
	if cur != nil {
		n = cur
	}
	services, err := util.GetServicesToUpdate(c.services, util.GetPodUpdateProjectionKey(o, n))
	if err != nil {
		c.Logger.Error("find the Services of a pod", "controller", name, "err", err)
		return
	}
	for service := range services {
		c.queue.Add(service)
	}
}

// endpointsChanged looks at what is there at the start, in case its Service is
// gone, and at what somebody deleted or changed.
func (c *endpoints) endpointsChanged(old, cur *corev1.Endpoints) {
	if cur == nil {
		cur = old
	}
	c.queue.Add(controller.Key(cur))
}

func (c *endpoints) sync(ctx context.Context, key string) error {
	ns, svcName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	service, err := c.services.Services(ns).Get(svcName)
	if apierrors.IsNotFound(err) {
		c.triggers.DeleteService(ns, svcName)
		return c.remove(ctx, ns, svcName)
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
	have, err := c.lister.Endpoints(ns).Get(svcName)
	if apierrors.IsNotFound(err) {
		have = nil
	} else if err != nil {
		return err
	}
	triggered := c.triggers.ComputeEndpointLastChangeTriggerTime(ns, service, pods)
	return c.write(ctx, have, wanted(service, pods, have, triggered))
}

// remove deletes the Endpoints of a Service that is gone, if this controller made them.
func (c *endpoints) remove(ctx context.Context, ns, svcName string) error {
	have, err := c.lister.Endpoints(ns).Get(svcName)
	if apierrors.IsNotFound(err) || err == nil && have.Labels[managedBy] != manager {
		return nil
	}
	if err == nil {
		err = c.Client.CoreV1().Endpoints(ns).Delete(ctx, svcName, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(have.UID))})
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete Endpoints %s/%s, whose Service is gone: %w", ns, svcName, err)
	}
	return nil
}

func (c *endpoints) write(ctx context.Context, have, want *corev1.Endpoints) error {
	if have != nil && same(have, want) {
		return nil
	}
	api := c.Client.CoreV1().Endpoints(want.Namespace)
	var err error
	if have == nil {
		_, err = api.Create(ctx, want, metav1.CreateOptions{})
		if apierrors.IsAlreadyExists(err) {
			return fmt.Errorf("create Endpoints %s/%s: %w", want.Namespace, want.Name, controller.ErrStaleView)
		}
	} else {
		_, err = api.Update(ctx, want, metav1.UpdateOptions{})
	}
	if err != nil && !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		reason, words := "FailedToUpdateEndpoint", "Failed to update endpoint %s/%s: %v"
		if have == nil {
			reason, words = "FailedToCreateEndpoint", "Failed to create endpoint for service %s/%s: %v"
		}
		c.events.Eventf(want, corev1.EventTypeWarning, reason, words, want.Namespace, want.Name, err)
		return fmt.Errorf("write Endpoints %s/%s: %w", want.Namespace, want.Name, err)
	}
	return nil
}

// same compares what this controller writes; when a change was triggered is not
// a change.
func same(have, want *corev1.Endpoints) bool {
	trigger := corev1.EndpointsLastChangeTriggerTime
	a, b := maps.Clone(have.Annotations), maps.Clone(want.Annotations)
	delete(a, trigger)
	delete(b, trigger)
	return equality.Semantic.DeepEqual(have.Subsets, want.Subsets) && equality.Semantic.DeepEqual(have.Labels, want.Labels) && equality.Semantic.DeepEqual(a, b)
}

// wanted is the Endpoints object to write in place of have, which may be nil.
func wanted(service *corev1.Service, pods []*corev1.Pod, have *corev1.Endpoints, triggered time.Time) *corev1.Endpoints {
	want := &corev1.Endpoints{ObjectMeta: metav1.ObjectMeta{Namespace: service.Namespace, Name: service.Name}}
	if have != nil {
		want = have.DeepCopy()
	}
	want.Labels = maps.Clone(service.Labels)
	if want.Labels == nil {
		want.Labels = map[string]string{}
	}
	want.Labels[managedBy] = manager
	delete(want.Labels, corev1.IsHeadlessService)
	if service.Spec.ClusterIP == corev1.ClusterIPNone || service.Spec.ClusterIP == "" {
		want.Labels[corev1.IsHeadlessService] = ""
	}
	if want.Annotations == nil {
		want.Annotations = map[string]string{}
	}
	delete(want.Annotations, corev1.EndpointsLastChangeTriggerTime)
	if !triggered.IsZero() {
		want.Annotations[corev1.EndpointsLastChangeTriggerTime] = triggered.UTC().Format(time.RFC3339Nano)
	}
	delete(want.Annotations, corev1.EndpointsOverCapacity)
	subsets, truncated := truncate(pack(reach(service, pods)))
	want.Subsets = subsets
	if truncated {
		want.Annotations[corev1.EndpointsOverCapacity] = "truncated"
	}
	return want
}
