// Package devicetaint deletes pods whose devices have got a taint of effect
// NoExecute that their claims do not tolerate, or not for as long.
//
// Inputs: Pods with claims, ResourceClaims, ResourceSlices. Outputs: the
// condition DisruptionTarget of Pods and their deletion; events on Pods.
//
// When a pod has to go is decided by plan.go, which is pure. Taints by
// DeviceTaintRules are not looked at: that feature is off by default in 1.36.
package devicetaint

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	corelisters "k8s.io/client-go/listers/core/v1"
	resourcelisters "k8s.io/client-go/listers/resource/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/dynamic-resource-allocation/resourceclaim"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "devicetaint"
	workers = 4
	// byPool finds slices, and claims that are allocated, by driver/pool.
	byPool = "skein/devicepool"
	reason = "DeviceTaintManagerEviction"
)

type taints struct {
	controller.Deps
	queue      *controller.Queue[string]
	watches    []controller.Watch
	pods       corelisters.PodLister
	claims     resourcelisters.ResourceClaimLister
	claimIndex cache.Indexer
	sliceIndex cache.Indexer
	ledger     *controller.Ledger // of pods, by key
	events     record.EventRecorder
	initErr    error

	mu  sync.Mutex
	due map[types.UID]bool // pods that will have to go; guarded by mu
}

// New returns the controller.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	pods, api := deps.Factory.Core().V1().Pods(), deps.Factory.Resource().V1()
	claimInf, sliceInf := api.ResourceClaims().Informer(), api.ResourceSlices().Informer()
	c := &taints{
		Deps: deps, queue: controller.NewQueue[string](name, deps.Clock),
		pods: pods.Lister(), claims: api.ResourceClaims().Lister(),
		claimIndex: claimInf.GetIndexer(), sliceIndex: sliceInf.GetIndexer(),
		ledger: controller.NewLedger(pods.Informer().GetIndexer()),
		events: deps.Recorder("device-taint-eviction-controller"),
		due:    map[types.UID]bool{},
	}
	c.watches = []controller.Watch{
		controller.On(sliceInf, c.sliceChanged),
		controller.On(claimInf, c.claimChanged),
		controller.On(pods.Informer(), c.podChanged),
	}
	c.initErr = claimInf.AddIndexers(cache.Indexers{byPool: poolsOfClaim})
	if c.initErr == nil {
		c.initErr = sliceInf.AddIndexers(cache.Indexers{byPool: poolOfSlice})
	}
	return c
}

func poolsOfClaim(obj any) (keys []string, _ error) {
	claim, ok := obj.(*resourceapi.ResourceClaim)
	if !ok || claim.Status.Allocation == nil {
		return nil, nil
	}
	for _, r := range claim.Status.Allocation.Devices.Results {
		keys = append(keys, r.Driver+"/"+r.Pool)
	}
	return keys, nil
}

func poolOfSlice(obj any) ([]string, error) {
	if s, ok := obj.(*resourceapi.ResourceSlice); ok {
		return []string{poolKey(s)}, nil
	}
	return nil, nil
}

func poolKey(s *resourceapi.ResourceSlice) string { return s.Spec.Driver + "/" + s.Spec.Pool.Name }

func (c *taints) Name() string { return name }

func (c *taints) Run(ctx context.Context) error {
	if c.initErr != nil {
		return fmt.Errorf("indexes of claims and slices: %w", c.initErr)
	}
	return controller.Run(ctx, controller.Work[string]{Queue: c.queue, Workers: workers, Watches: c.watches, Sync: c.sync, Logger: c.Logger})
}

// sliceChanged wakes the pods that use devices of a pool in which taints that
// drive pods off came, changed or went.
func (c *taints) sliceChanged(old, cur *resourceapi.ResourceSlice) {
	if (old == nil || !evicting(old)) && (cur == nil || !evicting(cur)) || old != nil && cur != nil && equality.Semantic.DeepEqual(old.Spec, cur.Spec) {
		return
	}
	if cur == nil {
		cur = old
	}
	claims, err := controller.ByIndex[*resourceapi.ResourceClaim](c.claimIndex, byPool, poolKey(cur))
	if err != nil {
		return // New made sure of the index
	}
	for _, claim := range claims {
		c.wakeUsers(claim)
	}
}

func (c *taints) claimChanged(old, cur *resourceapi.ResourceClaim) {
	if old != nil && cur != nil && equality.Semantic.DeepEqual(old.Status.Allocation, cur.Status.Allocation) && equality.Semantic.DeepEqual(old.Status.ReservedFor, cur.Status.ReservedFor) {
		return
	}
	for _, claim := range []*resourceapi.ResourceClaim{old, cur} {
		if claim != nil {
			c.wakeUsers(claim)
		}
	}
}

func (c *taints) wakeUsers(claim *resourceapi.ResourceClaim) {
	for _, ref := range claim.Status.ReservedFor {
		if ref.APIGroup == "" && ref.Resource == "pods" {
			c.queue.Add(claim.Namespace + "/" + ref.Name)
		}
	}
}

func (c *taints) podChanged(old, cur *corev1.Pod) {
	if cur == nil {
		c.setDue(old.UID, false)
		c.ledger.Forget(controller.Key(old))
		return
	}
	if len(cur.Spec.ResourceClaims) > 0 && (old == nil || old.Spec.NodeName != cur.Spec.NodeName ||
		!resourceclaim.PodStatusEqual(old.Status.ResourceClaimStatuses, cur.Status.ResourceClaimStatuses)) {
		c.queue.Add(controller.Key(cur))
	}
}

// setDue notes whether a pod will have to go, and returns what was noted before.
func (c *taints) setDue(uid types.UID, due bool) (was bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	was = c.due[uid]
	if due {
		c.due[uid] = true
	} else {
		delete(c.due, uid)
	}
	return was
}

func (c *taints) sync(ctx context.Context, key string) error {
	ns, podName, err := cache.SplitMetaNamespaceKey(key)
	if err != nil {
		return err
	}
	pod, err := c.pods.Pods(ns).Get(podName)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if !controller.PodActive(pod) {
		c.setDue(pod.UID, false)
		return nil
	}
	if c.ledger.Pending(key, c.Clock.Now()) > 0 {
		return fmt.Errorf("pod %s: %w", key, controller.ErrStaleView)
	}
	at, evict := evictAt(pod, func(name string) *resourceapi.ResourceClaim {
		claim, err := c.claims.ResourceClaims(ns).Get(name)
		if err != nil {
			return nil // a lister of a cache has no other errors than that there is none
		}
		return claim
	}, c.device)
	if !evict {
		if c.setDue(pod.UID, false) {
			c.events.Event(pod, corev1.EventTypeNormal, reason, "Cancelling deletion")
		}
		return nil
	}
	if wait := at.Sub(c.Clock.Now()); wait > 0 {
		c.setDue(pod.UID, true)
		c.queue.AddAfter(key, wait)
		return nil
	}
	return c.evict(ctx, key, pod)
}

func (c *taints) device(r *resourceapi.DeviceRequestAllocationResult) *resourceapi.Device {
	slices, err := controller.ByIndex[*resourceapi.ResourceSlice](c.sliceIndex, byPool, r.Driver+"/"+r.Pool)
	if err != nil {
		return nil // New made sure of the index
	}
	return find(slices, r.Device)
}

// evict says in the pod why it goes, then deletes it.
func (c *taints) evict(ctx context.Context, key string, pod *corev1.Pod) error {
	c.events.Event(pod, corev1.EventTypeNormal, reason, "Marking for deletion")
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": pod.UID},
		"status": map[string]any{"conditions": []corev1.PodCondition{{
			Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue, Reason: "DeletionByDeviceTaintManager",
			Message:            "Device Taint manager: deleting due to NoExecute taint",
			ObservedGeneration: pod.Generation, LastTransitionTime: metav1.NewTime(c.Clock.Now().Truncate(time.Second)),
		}}},
	})
	if err != nil {
		panic("devicetaint: a patch does not encode: " + err.Error())
	}
	api := c.Client.CoreV1().Pods(pod.Namespace)
	if _, err = api.Patch(ctx, pod.Name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status"); err == nil {
		err = api.Delete(ctx, pod.Name, metav1.DeleteOptions{Preconditions: metav1.NewUIDPreconditions(string(pod.UID))})
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("evict pod %s: %w", key, err)
	}
	c.setDue(pod.UID, false)
	c.ledger.Deleted(key, pod, c.Clock.Now())
	return nil
}
