package volumeprotection

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/component-helpers/storage/ephemeral"

	"skein.io/skein/scheduler/controller"
)

// page is how many pods are read from the store at a time.
const page = 500

// claims works on a namespace at a time: when many claims go at once, as with
// a namespace, its pods are read once for all of them.
type claims struct {
	controller.Deps
	queue    *controller.Queue[string] // of namespaces
	claimInf cache.SharedIndexInformer
	podInf   cache.SharedIndexInformer
	lister   corelisters.PersistentVolumeClaimLister
	broken   error
}

// NewClaims returns the controller that protects claims.
func NewClaims(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	core := deps.Factory.Core().V1()
	c := &claims{
		Deps: deps, queue: controller.NewQueue[string]("claimprotection", deps.Clock),
		claimInf: core.PersistentVolumeClaims().Informer(), podInf: core.Pods().Informer(), lister: core.PersistentVolumeClaims().Lister(),
	}
	c.broken = controller.EnsureIndexes(c.podInf, controller.IndexClaim)
	return c
}

func (c *claims) Name() string { return "claimprotection" }

func (c *claims) Run(ctx context.Context) error {
	if c.broken != nil {
		return c.broken
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: 4,
		Watches: []controller.Watch{
			controller.On(c.claimInf, func(_, cur *corev1.PersistentVolumeClaim) {
				if cur != nil && concerned(cur, claimFinalizer) {
					c.queue.Add(cur.Namespace)
				}
			}),
			controller.On(c.podInf, c.podChanged),
		},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

// podChanged looks after the claims of a pod that needs them no longer.
func (c *claims) podChanged(old, cur *corev1.Pod) {
	if old != nil && (cur == nil || cur.UID != old.UID) {
		c.freed(old)
	}
	if cur != nil && (controller.PodTerminal(cur) || shutDown(cur)) {
		c.freed(cur)
	}
}

func (c *claims) freed(pod *corev1.Pod) {
	for _, name := range controller.PodClaims(pod) {
		if claim, err := c.lister.PersistentVolumeClaims(pod.Namespace).Get(name); err == nil && claim.DeletionTimestamp != nil && concerned(claim, claimFinalizer) {
			c.queue.Add(pod.Namespace)
			return
		}
	}
}

func (c *claims) sync(ctx context.Context, namespace string) error {
	all, err := c.lister.PersistentVolumeClaims(namespace).List(labels.Everything())
	if err != nil {
		return err
	}
	var errs []error
	var unused []*corev1.PersistentVolumeClaim
	for _, claim := range all {
		switch {
		case !concerned(claim, claimFinalizer):
		case claim.DeletionTimestamp == nil:
			errs = append(errs, c.write(ctx, claim, true))
		case !c.seenInUse(claim):
			unused = append(unused, claim)
		}
	}
	if len(unused) > 0 {
		free, err := c.notInUse(ctx, namespace, unused)
		errs = append(errs, err)
		for _, claim := range free {
			errs = append(errs, c.write(ctx, claim, false))
		}
	}
	return errors.Join(errs...)
}

// seenInUse says that the view shows a pod that uses the claim.
func (c *claims) seenInUse(claim *corev1.PersistentVolumeClaim) bool {
	pods, err := controller.ByIndex[*corev1.Pod](c.podInf.GetIndexer(), controller.IndexClaim, controller.Key(claim))
	if err != nil {
		return false // the store will be asked
	}
	for _, pod := range pods {
		if uses(pod, claim) {
			return true
		}
	}
	return false
}

// notInUse returns those of the claims that no pod in the store uses.
func (c *claims) notInUse(ctx context.Context, namespace string, candidates []*corev1.PersistentVolumeClaim) ([]*corev1.PersistentVolumeClaim, error) {
	used := map[*corev1.PersistentVolumeClaim]bool{}
	for next := ""; ; {
		list, err := c.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{Limit: page, Continue: next})
		if err != nil {
			return nil, fmt.Errorf("pods of namespace %s, for the claims that are being deleted: %w", namespace, err)
		}
		for i := range list.Items {
			for _, claim := range candidates {
				if uses(&list.Items[i], claim) {
					used[claim] = true
				}
			}
		}
		if next = list.Continue; next == "" {
			break
		}
	}
	var free []*corev1.PersistentVolumeClaim
	for _, claim := range candidates {
		if !used[claim] {
			free = append(free, claim)
		}
	}
	return free, nil
}

// uses says that the pod has a node and uses the claim there. One without a
// node does not count: a node does not start a pod with a claim that goes.
func uses(pod *corev1.Pod, claim *corev1.PersistentVolumeClaim) bool {
	if pod.Spec.NodeName == "" {
		return false
	}
	for i := range pod.Spec.Volumes {
		switch v := &pod.Spec.Volumes[i]; {
		case v.PersistentVolumeClaim != nil:
			if v.PersistentVolumeClaim.ClaimName == claim.Name {
				return true
			}
		case v.Ephemeral != nil:
			// The pod may wait for its claim to go: once its node is done with it, it does not count.
			if !shutDown(pod) && ephemeral.VolumeClaimName(pod, v) == claim.Name && ephemeral.VolumeIsForPod(pod, claim) == nil {
				return true
			}
		}
	}
	return false
}

// shutDown says that the node is done with the pod, or that it was deleted by force.
func shutDown(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp != nil && pod.DeletionGracePeriodSeconds != nil && *pod.DeletionGracePeriodSeconds == 0
}

func (c *claims) write(ctx context.Context, claim *corev1.PersistentVolumeClaim, on bool) error {
	clone := claim.DeepCopy()
	set(clone, claimFinalizer, on)
	_, err := c.Client.CoreV1().PersistentVolumeClaims(claim.Namespace).Update(ctx, clone, metav1.UpdateOptions{})
	return settled(err, "claim", controller.Key(claim))
}
