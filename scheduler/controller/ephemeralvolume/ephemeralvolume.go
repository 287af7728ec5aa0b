// Package ephemeralvolume makes the claims of volumes that live as long as
// their pod (spec.volumes[].ephemeral).
//
// Inputs: Pods, PersistentVolumeClaims.
// Outputs: creates claims owned by their pods, whose deletion the garbage
// collector does; writes events of pods.
//
// A claim of the right name that is not the pod's is never used: the pod waits,
// and an event says why.
package ephemeralvolume

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/component-helpers/storage/ephemeral"

	"skein.io/skein/scheduler/controller"
)

const (
	name = "ephemeralvolume"
	// component and reasonFailed are upstream's.
	component    = "ephemeral_volume"
	reasonFailed = "FailedBinding"
	workers      = 4
)

type volumes struct {
	controller.Deps
	queue    *controller.Queue[string] // of pods
	events   record.EventRecorder
	podInf   cache.SharedIndexInformer
	claimInf cache.SharedIndexInformer
	pods     corelisters.PodLister
	claims   corelisters.PersistentVolumeClaimLister
	broken   error
}

// New returns the controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	core := deps.Factory.Core().V1()
	c := &volumes{
		Deps: deps, queue: controller.NewQueue[string](name, deps.Clock), events: deps.Recorder(component),
		podInf: core.Pods().Informer(), claimInf: core.PersistentVolumeClaims().Informer(),
		pods: core.Pods().Lister(), claims: core.PersistentVolumeClaims().Lister(),
	}
	c.broken = controller.EnsureIndexes(c.podInf, controller.IndexClaim)
	return c
}

func (c *volumes) Name() string { return name }

func (c *volumes) Run(ctx context.Context) error {
	if c.broken != nil {
		return c.broken
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: workers,
		Watches: []controller.Watch{
			controller.On(c.podInf, func(old, cur *corev1.Pod) {
				// The volumes of a pod never change.
				if cur != nil && (old == nil || old.UID != cur.UID) {
					c.wake(cur)
				}
			}),
			controller.On(c.claimInf, func(old, cur *corev1.PersistentVolumeClaim) {
				if cur == nil {
					c.claimGone(old)
				}
			}),
		},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

func (c *volumes) wake(pod *corev1.Pod) {
	for i := range pod.Spec.Volumes {
		if pod.Spec.Volumes[i].Ephemeral != nil && pod.DeletionTimestamp == nil {
			c.queue.Add(controller.Key(pod))
			return
		}
	}
}

// claimGone wakes the pods whose claim it was, or whose name it took.
func (c *volumes) claimGone(claim *corev1.PersistentVolumeClaim) {
	pods, err := controller.ByIndex[*corev1.Pod](c.podInf.GetIndexer(), controller.IndexClaim, controller.Key(claim))
	if err != nil {
		return
	}
	for _, pod := range pods {
		c.wake(pod)
	}
}

func (c *volumes) sync(ctx context.Context, key string) error {
	namespace, podName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	pod, err := c.pods.Pods(namespace).Get(podName)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if pod.DeletionTimestamp != nil || controller.PodTerminal(pod) {
		return nil
	}
	var errs []error
	for i := range pod.Spec.Volumes {
		if v := &pod.Spec.Volumes[i]; v.Ephemeral != nil {
			errs = append(errs, c.ensure(ctx, pod, v))
		}
	}
	return errors.Join(errs...)
}

// ensure makes the claim of a volume unless it is there.
func (c *volumes) ensure(ctx context.Context, pod *corev1.Pod, v *corev1.Volume) error {
	claimName := ephemeral.VolumeClaimName(pod, v)
	fail := func(err error) {
		c.events.Eventf(pod, corev1.EventTypeWarning, reasonFailed, "ephemeral volume %s: %v", v.Name, err)
	}
	claim, err := c.claims.PersistentVolumeClaims(pod.Namespace).Get(claimName)
	if err != nil && !apierrors.IsNotFound(err) {
		return err
	}
	if err == nil {
		if err := ephemeral.VolumeIsForPod(pod, claim); err != nil {
			fail(err)
			// Nothing changes until that claim goes, which wakes the pod.
		}
		return nil
	}
	template := v.Ephemeral.VolumeClaimTemplate
	if template == nil {
		return nil // the API lets no such pod in
	}
	_, err = c.Client.CoreV1().PersistentVolumeClaims(pod.Namespace).Create(ctx, &corev1.PersistentVolumeClaim{
		ObjectMeta: metav1.ObjectMeta{
			Name: claimName, Labels: template.Labels, Annotations: template.Annotations,
			OwnerReferences: []metav1.OwnerReference{*metav1.NewControllerRef(pod, corev1.SchemeGroupVersion.WithKind("Pod"))},
		},
		Spec: template.Spec,
	}, metav1.CreateOptions{})
	switch {
	case err == nil, apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause):
		return nil
	case apierrors.IsAlreadyExists(err):
		return fmt.Errorf("claim %s/%s: %w", pod.Namespace, claimName, controller.ErrStaleView)
	}
	fail(fmt.Errorf("create PVC %s: %w", claimName, err))
	return fmt.Errorf("create claim %s/%s of pod %s: %w", pod.Namespace, claimName, pod.Name, err)
}
