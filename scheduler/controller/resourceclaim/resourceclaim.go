// Package resourceclaim looks after the claims of dynamic resources: it makes
// those that pods ask for by a template and names them in the pod's status,
// reserves claims for pods that were bound without, takes the reservations of
// pods that have ended off and with the last one the allocation, and deletes
// claims whose pod will not need them.
//
// Inputs: Pods with claims, ResourceClaims, ResourceClaimTemplates. Outputs:
// creates and deletes ResourceClaims; status and finalizers of ResourceClaims;
// status.resourceClaimStatuses of Pods; events on Pods.
//
// What is to be done is decided by plan.go, which is pure. Claims are only
// written by compare-and-swap, so that nothing is taken away from a pod that
// came meanwhile; a pod that the view does not know is asked for in the store
// before its reservation goes.
package resourceclaim

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	resourceapi "k8s.io/api/resource/v1"
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
	name    = "resourceclaim"
	workers = 10
	// Prefixes of keys: what is looked at.
	ofPod   = "pod:"
	ofClaim = "claim:"
	// Indexes of pods by the claims and templates that they name, and of claims
	// by the pod that they were made for.
	byClaim    = "skein/resourceclaim"
	byTemplate = "skein/resourceclaimtemplate"
	byPod      = "skein/pod"
)

type claims struct {
	controller.Deps
	board     *Board
	queue     *controller.Queue[string]
	watches   []controller.Watch
	pods      corelisters.PodLister
	podIndex  cache.Indexer
	lister    resourcelisters.ResourceClaimLister
	index     cache.Indexer
	templates resourcelisters.ResourceClaimTemplateLister
	events    record.EventRecorder
	ledger    *controller.Ledger // of claims, by key
	named     *controller.Ledger // of pods, by key
	initErr   error
}

// New returns the controller; what it does is counted on board, which may be nil.
func New(deps controller.Deps, board *Board) controller.Controller {
	deps = deps.WithDefaults()
	pods, api := deps.Factory.Core().V1().Pods(), deps.Factory.Resource().V1()
	podInf, claimInf := pods.Informer(), api.ResourceClaims().Informer()
	c := &claims{
		Deps: deps, board: board, queue: controller.NewQueue[string](name, deps.Clock),
		pods: pods.Lister(), podIndex: podInf.GetIndexer(),
		lister: api.ResourceClaims().Lister(), index: claimInf.GetIndexer(), templates: api.ResourceClaimTemplates().Lister(),
		events: deps.Recorder("resource_claim"),
		ledger: controller.NewLedger(claimInf.GetIndexer()), named: controller.NewLedger(podInf.GetIndexer()),
	}
	c.watches = []controller.Watch{
		controller.On(claimInf, c.claimChanged),
		controller.On(api.ResourceClaimTemplates().Informer(), c.templateChanged),
		controller.On(podInf, c.podChanged),
	}
	c.initErr = podInf.AddIndexers(cache.Indexers{byClaim: claimsOfPod, byTemplate: templatesOfPod})
	if c.initErr == nil {
		c.initErr = claimInf.AddIndexers(cache.Indexers{byPod: podOfClaim})
	}
	return c
}

func claimsOfPod(obj any) (keys []string, _ error) {
	if pod, ok := obj.(*corev1.Pod); ok {
		for _, claim := range namedClaims(pod) {
			keys = append(keys, pod.Namespace+"/"+claim)
		}
	}
	return keys, nil
}

func templatesOfPod(obj any) (keys []string, _ error) {
	if pod, ok := obj.(*corev1.Pod); ok {
		for i := range pod.Spec.ResourceClaims {
			if t := pod.Spec.ResourceClaims[i].ResourceClaimTemplateName; t != nil {
				keys = append(keys, pod.Namespace+"/"+*t)
			}
		}
	}
	return keys, nil
}

func podOfClaim(obj any) ([]string, error) {
	if claim, ok := obj.(*resourceapi.ResourceClaim); ok {
		if uid := ownerOf(claim); uid != "" {
			return []string{string(uid)}, nil
		}
	}
	return nil, nil
}

// namedClaims are the claims that exist for the pod as far as it knows.
func namedClaims(pod *corev1.Pod) (names []string) {
	for i := range pod.Spec.ResourceClaims {
		if name, _, err := resourceclaim.Name(pod, &pod.Spec.ResourceClaims[i]); err == nil && name != nil {
			names = append(names, *name)
		}
	}
	if s := pod.Status.ExtendedResourceClaimStatus; s != nil {
		names = append(names, s.ResourceClaimName)
	}
	return names
}

func (c *claims) Name() string { return name }

func (c *claims) Run(ctx context.Context) error {
	if c.initErr != nil {
		return fmt.Errorf("indexes of pods and claims: %w", c.initErr)
	}
	defer c.board.follow(c)()
	return controller.Run(ctx, controller.Work[string]{
		Queue: c.queue, Workers: workers, Watches: c.watches, Sync: c.sync, Logger: c.Logger,
	})
}

func (c *claims) podChanged(old, cur *corev1.Pod) {
	pod := cur
	if pod == nil {
		pod = old
	}
	if len(pod.Spec.ResourceClaims) == 0 && pod.Status.ExtendedResourceClaimStatus == nil {
		return
	}
	if cur == nil || done(cur) {
		for _, claim := range namedClaims(pod) {
			c.queue.Add(ofClaim + pod.Namespace + "/" + claim)
		}
	}
	if cur == nil {
		c.ledger.Forget(ofPod + controller.Key(old))
		c.named.Forget(ofPod + controller.Key(old))
		return
	}
	if old == nil || old.Spec.NodeName != cur.Spec.NodeName || !resourceclaim.PodStatusEqual(old.Status.ResourceClaimStatuses, cur.Status.ResourceClaimStatuses) {
		c.queue.Add(ofPod + controller.Key(cur))
	}
}

func (c *claims) claimChanged(old, cur *resourceapi.ResourceClaim) {
	claim := cur
	if claim == nil {
		claim = old
	} else {
		c.queue.Add(ofClaim + controller.Key(cur))
	}
	// A pod may have to get its claim again, or a reservation in it.
	if cur == nil || (old == nil || old.Status.Allocation == nil) && cur.Status.Allocation != nil {
		c.wakePods(byClaim, controller.Key(claim))
	}
}

func (c *claims) templateChanged(_, cur *resourceapi.ResourceClaimTemplate) {
	if cur != nil {
		c.wakePods(byTemplate, controller.Key(cur))
	}
}

func (c *claims) wakePods(index, key string) {
	pods, err := controller.ByIndex[*corev1.Pod](c.podIndex, index, key)
	if err != nil {
		return // New made sure of the index
	}
	for _, pod := range pods {
		c.queue.Add(ofPod + controller.Key(pod))
	}
}

func (c *claims) sync(ctx context.Context, key string) error {
	now := c.Clock.Now()
	if c.ledger.Pending(key, now)+c.named.Pending(key, now) > 0 {
		return fmt.Errorf("%s: %w", key, controller.ErrStaleView)
	}
	kind, object, _ := strings.Cut(key, ":")
	ns, objectName, err := cache.SplitMetaNamespaceKey(object)
	if err != nil {
		return err
	}
	if kind+":" == ofPod {
		return c.syncPod(ctx, key, ns, objectName)
	}
	return c.syncClaim(ctx, key, ns, objectName)
}

func (c *claims) get(ns, claim string) *resourceapi.ResourceClaim {
	obj, err := c.lister.ResourceClaims(ns).Get(claim)
	if err != nil {
		return nil // a lister of a cache has no other errors
	}
	return obj
}

// syncPod makes what the pod's templates ask for and tells it.
func (c *claims) syncPod(ctx context.Context, key, ns, podName string) error {
	pod, err := c.pods.Pods(ns).Get(podName)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if pod.DeletionTimestamp != nil || controller.PodTerminal(pod) {
		return nil
	}
	owned, err := controller.ByIndex[*resourceapi.ResourceClaim](c.index, byPod, string(pod.UID))
	if err != nil {
		return err
	}
	plan, err := planPod(pod, func(name string) *resourceapi.ResourceClaim { return c.get(ns, name) }, owned)
	if err != nil {
		return fmt.Errorf("claims of pod %s/%s: %w", ns, podName, err)
	}
	failed := c.create(ctx, key, pod, &plan)
	if len(plan.names) > 0 {
		if err := c.tell(ctx, key, pod, plan.names); err != nil {
			return err
		}
	}
	for _, claim := range plan.reserve {
		if err := c.reserve(ctx, key, pod, claim); err != nil {
			return err
		}
	}
	return failed
}

// create makes the claims of a plan and adds their names to it. The first
// failure ends it: the pod needs them all.
func (c *claims) create(ctx context.Context, key string, pod *corev1.Pod, plan *podPlan) error {
	for i := range plan.create {
		podClaim := &plan.create[i]
		claim, err := c.createOne(ctx, pod, podClaim)
		if err != nil {
			if !apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
				c.events.Eventf(pod, corev1.EventTypeWarning, "FailedResourceClaimCreation", "PodResourceClaim %s: %v", podClaim.Name, err)
			}
			return fmt.Errorf("pod %s/%s, PodResourceClaim %s: %w", pod.Namespace, pod.Name, podClaim.Name, err)
		}
		c.ledger.Wrote(key, claim, c.Clock.Now())
		if plan.names == nil {
			plan.names = map[string]string{}
		}
		plan.names[podClaim.Name] = claim.Name
	}
	return nil
}

func (c *claims) createOne(ctx context.Context, pod *corev1.Pod, podClaim *corev1.PodResourceClaim) (*resourceapi.ResourceClaim, error) {
	template, err := c.templates.ResourceClaimTemplates(pod.Namespace).Get(*podClaim.ResourceClaimTemplateName)
	if err != nil {
		return nil, fmt.Errorf("resource claim template %q: %w", *podClaim.ResourceClaimTemplateName, err)
	}
	want, api := newClaim(pod, podClaim.Name, template), c.Client.ResourceV1().ResourceClaims(pod.Namespace)
	claim, err := api.Create(ctx, want, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		claim, err = api.Get(ctx, want.Name, metav1.GetOptions{})
		switch {
		case err != nil:
			return nil, fmt.Errorf("get ResourceClaim %s, which exists: %w", want.Name, err)
		case resourceclaim.IsForPod(pod, claim, false) == nil && claim.Annotations[resourceapi.PodResourceClaimAnnotation] == podClaim.Name && claim.DeletionTimestamp == nil:
			return claim, nil // made before, without an answer
		}
		want.GenerateName, want.Name = want.Name+"-", "" // somebody else's, or it goes
		claim, err = api.Create(ctx, want, metav1.CreateOptions{})
	}
	c.board.created(want, err == nil)
	if err != nil {
		return nil, fmt.Errorf("create ResourceClaim: %w", err)
	}
	return claim, nil
}

// tell writes the names of claims into the pod's status.
func (c *claims) tell(ctx context.Context, key string, pod *corev1.Pod, names map[string]string) error {
	var patch struct {
		Metadata struct {
			UID types.UID `json:"uid"`
		} `json:"metadata"`
		Status struct {
			Claims []corev1.PodResourceClaimStatus `json:"resourceClaimStatuses"`
		} `json:"status"`
	}
	patch.Metadata.UID = pod.UID
	patch.Status.Claims = statuses(pod, names)
	data, err := json.Marshal(patch)
	if err != nil {
		panic("resourceclaim: a status patch does not encode: " + err.Error())
	}
	written, err := c.Client.CoreV1().Pods(pod.Namespace).Patch(ctx, pod.Name, types.StrategicMergePatchType, data, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("update pod %s/%s ResourceClaimStatuses: %w", pod.Namespace, pod.Name, err)
	}
	c.named.Wrote(key, written, c.Clock.Now())
	return nil
}

func (c *claims) reserve(ctx context.Context, key string, pod *corev1.Pod, claim *resourceapi.ResourceClaim) error {
	claim = claim.DeepCopy()
	claim.Status.ReservedFor = append(claim.Status.ReservedFor, resourceapi.ResourceClaimConsumerReference{Resource: "pods", Name: pod.Name, UID: pod.UID})
	written, err := c.Client.ResourceV1().ResourceClaims(claim.Namespace).UpdateStatus(ctx, claim, metav1.UpdateOptions{})
	if err != nil {
		return fmt.Errorf("reserve claim %s/%s: %w", claim.Namespace, claim.Name, err)
	}
	c.ledger.Wrote(key, written, c.Clock.Now())
	return nil
}

// syncClaim takes off a claim what nobody uses any more.
func (c *claims) syncClaim(ctx context.Context, key, ns, claimName string) error {
	claim := c.get(ns, claimName)
	if claim == nil {
		c.ledger.Forget(key)
		return nil
	}
	over := map[types.UID]bool{}
	for _, ref := range claim.Status.ReservedFor {
		if ref.APIGroup != "" || ref.Resource != "pods" {
			continue
		}
		pod, err := c.pod(ctx, ns, ref)
		if err != nil {
			return err
		}
		over[ref.UID] = pod == nil || pod.UID != ref.UID || done(pod)
	}
	var owner *corev1.Pod
	if podName := ownerName(claim); podName != "" {
		// One that the view does not know may only be new; if it is gone the claim
		// goes with it anyway.
		if pod, err := c.pods.Pods(ns).Get(podName); err == nil {
			owner = pod
		}
	}
	return c.carryOut(ctx, key, claim, planClaim(claim, func(ref resourceapi.ResourceClaimConsumerReference) bool { return over[ref.UID] }, owner))
}

// pod returns a consumer, nil if there is none of that name.
func (c *claims) pod(ctx context.Context, ns string, ref resourceapi.ResourceClaimConsumerReference) (*corev1.Pod, error) {
	pod, err := c.pods.Pods(ns).Get(ref.Name)
	if apierrors.IsNotFound(err) {
		pod, err = c.Client.CoreV1().Pods(ns).Get(ctx, ref.Name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil, nil
		}
	}
	if err != nil {
		return nil, fmt.Errorf("consumer pod %s/%s: %w", ns, ref.Name, err)
	}
	return pod, nil
}

func (c *claims) carryOut(ctx context.Context, key string, claim *resourceapi.ResourceClaim, plan claimPlan) error {
	api, full := c.Client.ResourceV1().ResourceClaims(claim.Namespace), claim.Namespace+"/"+claim.Name
	if len(plan.drop) > 0 || plan.deallocate {
		claim = claim.DeepCopy()
		claim.Status.ReservedFor = slices.DeleteFunc(claim.Status.ReservedFor, func(ref resourceapi.ResourceClaimConsumerReference) bool { return slices.Contains(plan.drop, ref) })
		if plan.deallocate {
			claim.Status.Allocation, claim.Status.Devices = nil, nil
		}
		written, err := api.UpdateStatus(ctx, claim, metav1.UpdateOptions{})
		if err != nil {
			return ignoreGone(fmt.Errorf("take consumers off claim %s: %w", full, err))
		}
		claim = written
		c.ledger.Wrote(key, claim, c.Clock.Now())
	}
	if plan.unlock && claim.Status.Allocation == nil {
		if at := slices.Index(claim.Finalizers, resourceapi.Finalizer); at >= 0 {
			claim = claim.DeepCopy()
			claim.Finalizers = slices.Delete(claim.Finalizers, at, at+1)
			written, err := api.Update(ctx, claim, metav1.UpdateOptions{})
			if err != nil {
				return ignoreGone(fmt.Errorf("take the finalizer off claim %s: %w", full, err))
			}
			claim = written
			c.ledger.Wrote(key, claim, c.Clock.Now())
		}
	}
	if !plan.remove || claim.DeletionTimestamp != nil {
		return nil
	}
	uid := claim.UID
	if err := api.Delete(ctx, claim.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &uid}}); err != nil {
		return ignoreGone(fmt.Errorf("delete unused generated claim %s: %w", full, err))
	}
	c.ledger.Deleted(key, claim, c.Clock.Now())
	return nil
}

func ignoreGone(err error) error {
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
