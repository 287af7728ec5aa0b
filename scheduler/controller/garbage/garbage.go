// Package garbage deletes objects whose owners are gone, and carries out the
// three ways of deleting an owner: in the background (dependents follow), in
// the foreground (dependents go first) and orphaning (dependents stay).
//
// Inputs: discovery; the metadata of every object of every kind that can be
// deleted, Events excepted. Outputs: deletes objects; takes owner references
// and the finalizers foregroundDeletion and orphan off objects; events
// OwnerRefInvalidNamespace.
//
// Memory: the watches feed a graph (type graph) that keeps no objects, only
// which exist and who owns whom; kinds that the shared view holds anyway are
// read from there. So what the graph says is a hint to look, never a reason to
// delete: before each deletion the object and its owners are read from the API
// itself, and the deletion holds only for the state that was read.
//
// Ordering: a kind that cannot be listed holds up the removal of finalizers for
// patience, not longer. Failures come back with the queue's back-off.
package garbage

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/metadata"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/retry"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/utils/lru"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "garbage"
	workers = 8
	// parallel bounds the requests of one orphaning that are under way at once.
	parallel = 16
	// absentSize bounds how many owners are remembered to be gone: the many
	// dependents of one are looked at together. Upstream's size.
	absentSize = 500
)

// errUnseen says that an owner exists that no watch has shown yet, so that
// nothing would tell of its end.
var errUnseen = errors.New("an owner exists that is not watched yet")

type collector struct {
	controller.Deps
	queue   *controller.Queue[id]
	graph   *graph
	watches *watches
	shared  map[schema.GroupVersionResource]cache.SharedIndexInformer
	absent  *lru.Cache // of absentKey, and of id for objects that were seen to go
	events  record.EventRecorder
	initErr error
}

// absentKey is an owner as a dependent in a namespace calls it.
type absentKey struct {
	id       id
	ns, kind string
	name     string
}

// New returns the garbage collector. Deps.Metadata is required.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	c := &collector{
		Deps:   deps,
		queue:  controller.NewQueue[id](name, deps.Clock),
		graph:  newGraph(),
		shared: map[schema.GroupVersionResource]cache.SharedIndexInformer{},
		absent: lru.New(absentSize),
		events: deps.Recorder("garbage-collector-controller"),
	}
	c.watches = newWatches(c)
	for _, gvr := range sharedKinds {
		inf, err := deps.Factory.ForResource(gvr)
		if err != nil {
			c.initErr = errors.Join(c.initErr, fmt.Errorf("controller %s: %w", name, err))
			continue
		}
		c.shared[gvr] = inf.Informer()
	}
	return c
}

func (c *collector) Name() string { return name }

func (c *collector) Run(ctx context.Context) error {
	if c.Metadata == nil {
		return fmt.Errorf("controller %s: Deps.Metadata is required", name)
	}
	if c.initErr != nil {
		return c.initErr
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { c.watches.follow(ctx) })
	return controller.Run(ctx, controller.Work[id]{
		Queue:   c.queue,
		Workers: workers,
		Ready:   []cache.InformerSynced{c.watches.ready},
		Sync:    c.sync,
		Logger:  c.Logger,
	})
}

func (c *collector) wake(ids []id) {
	for _, x := range ids {
		c.queue.Add(x)
	}
}

func (c *collector) gone(o metav1.Object) {
	look := c.graph.gone(o.GetUID())
	if len(look) > 0 {
		c.absent.Add(idOf(o.GetUID()), nil)
	}
	c.wake(look)
}

func (c *collector) sync(ctx context.Context, x id) error {
	s, ok := c.graph.look(x)
	switch {
	case !ok:
		return nil
	case s.state&orphan != 0:
		return c.orphan(ctx, s)
	case s.state&foreground != 0:
		return c.foreground(ctx, s)
	case s.state&deleting != 0 || !s.owned:
		return nil
	}
	return c.collect(ctx, s)
}

// foreground lets an object go when no dependent blocks it any more, and sees
// to it that those that do are deleted.
func (c *collector) foreground(ctx context.Context, s sight) error {
	blocked := false
	for _, d := range s.dependents {
		if d.blocks {
			blocked = true
			if d.state&foreground == 0 {
				c.queue.Add(d.id)
			}
		}
	}
	if blocked {
		return nil
	}
	return c.removeFinalizer(ctx, s.object, metav1.FinalizerDeleteDependents)
}

// orphan takes the object off its dependents, then lets it go.
func (c *collector) orphan(ctx context.Context, s sight) error {
	owner, err := c.read(ctx, s.object)
	if owner == nil || err != nil {
		return err
	}
	errs := make([]error, len(s.dependents))
	workqueue.ParallelizeUntil(ctx, min(parallel, len(errs)), len(errs), func(i int) {
		errs[i] = c.letGo(ctx, s.dependents[i].object, owner.UID)
	})
	if err := errors.Join(append(errs, ctx.Err())...); err != nil {
		return fmt.Errorf("orphan the dependents of %s: %w", s.object, err)
	}
	return c.removeFinalizer(ctx, s.object, metav1.FinalizerOrphanDependents)
}

// collect deletes the object if all its owners are gone.
func (c *collector) collect(ctx context.Context, s sight) error {
	latest, err := c.read(ctx, s.object)
	if latest == nil || err != nil || latest.DeletionTimestamp != nil {
		return err
	}
	o, unseen, err := c.classify(ctx, s.object, latest)
	if err != nil {
		return fmt.Errorf("owners of %s: %w", s.object, err)
	}
	a := decide(o, s.hasDeps, s.cycle, latest.Finalizers)
	if len(a.drop) > 0 {
		if err := c.editOwners(ctx, s.object, latest, without(a.drop...)); err != nil {
			return err
		}
	}
	if a.unblock {
		if err := c.editOwners(ctx, s.object, latest, unblocked); err != nil {
			return err
		}
		// That changed the object; the deletion must hold for what it is now.
		if latest, err = c.read(ctx, s.object); latest == nil || err != nil {
			return err
		}
	}
	if a.remove != nil {
		c.Logger.Debug("delete an object whose owners are gone", "controller", name, "object", s.object.String(), "propagation", *a.remove)
		return c.remove(ctx, s.object, latest, *a.remove)
	}
	if unseen {
		return fmt.Errorf("%s: %w", s.object, errUnseen)
	}
	return nil
}

// classify asks the API for the object's owners. unseen says that a living
// owner is not in the graph, though its kind is watched.
func (c *collector) classify(ctx context.Context, x object, latest *metav1.PartialObjectMetadata) (o owners, unseen bool, err error) {
	for _, ref := range latest.OwnerReferences {
		owner, err := c.owner(ctx, x, ref)
		switch {
		case errors.Is(err, errWrongScope):
			// Cannot come right by itself; whether it has other owners does not matter.
			c.invalid(x, latest, ref)
			return owners{}, false, nil
		case err != nil:
			return owners{}, false, err
		case owner == nil:
			o.dangling = append(o.dangling, ref.UID)
			if ns, namespaced, live := c.graph.where(idOf(ref.UID)); live && namespaced && ns != x.ns {
				c.invalid(x, latest, ref)
			}
			continue
		case stateOf(owner)&foreground != 0:
			o.waiting = append(o.waiting, ref.UID)
		default:
			o.solid = append(o.solid, ref.UID)
		}
		if _, _, live := c.graph.where(idOf(ref.UID)); !live && !ignored[c.resource(ref)] {
			unseen = true
		}
	}
	return o, unseen, nil
}

func (c *collector) resource(ref metav1.OwnerReference) schema.GroupResource {
	k, _ := c.watches.mapped(schema.FromAPIVersionAndKind(ref.APIVersion, ref.Kind))
	return k.gvr.GroupResource()
}

func (c *collector) invalid(x object, latest *metav1.PartialObjectMetadata, ref metav1.OwnerReference) {
	c.events.Eventf(&corev1.ObjectReference{
		APIVersion: x.kind.gvk.GroupVersion().String(), Kind: x.kind.gvk.Kind, Namespace: x.ns, Name: x.name, UID: latest.UID,
	}, corev1.EventTypeWarning, "OwnerRefInvalidNamespace", "ownerRef [%s/%s, namespace: %s, name: %s, uid: %s] does not exist in namespace %q",
		ref.APIVersion, ref.Kind, x.ns, ref.Name, ref.UID, x.ns)
}

var errWrongScope = errors.New("an object without a namespace cannot have an owner in one")

// owner reads an owner from the API; nil if it does not exist.
func (c *collector) owner(ctx context.Context, x object, ref metav1.OwnerReference) (*metav1.PartialObjectMetadata, error) {
	oid := idOf(ref.UID)
	if _, ok := c.absent.Get(oid); ok {
		return nil, nil
	}
	gvk := schema.FromAPIVersionAndKind(ref.APIVersion, ref.Kind)
	k, ok := c.watches.mapped(gvk)
	if !ok {
		return nil, fmt.Errorf("the API does not offer the kind %s of owner %s", gvk, ref.Name)
	}
	ns := x.ns
	switch {
	case !k.namespaced:
		ns = ""
	case ns == "":
		return nil, errWrongScope
	}
	key := absentKey{oid, ns, gvk.GroupKind().String(), ref.Name}
	if _, ok := c.absent.Get(key); ok {
		return nil, nil
	}
	got, err := c.api(k.gvr, ns).Get(ctx, ref.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err), err == nil && got.UID != ref.UID:
		c.absent.Add(key, nil) // an uid is never used again
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("read owner %s %s: %w", k.gvr.GroupResource(), ref.Name, err)
	}
	return got, nil
}

func (c *collector) api(gvr schema.GroupVersionResource, ns string) metadata.ResourceInterface {
	if ns == "" {
		return c.Metadata.Resource(gvr)
	}
	return c.Metadata.Resource(gvr).Namespace(ns)
}

// String names the object for people.
func (o object) String() string {
	if o.ns == "" {
		return o.kind.gvr.GroupResource().String() + " " + o.name
	}
	return o.kind.gvr.GroupResource().String() + " " + o.ns + "/" + o.name
}

// read returns the object from the API; nil if it is gone, or another has its name.
func (c *collector) read(ctx context.Context, o object) (*metav1.PartialObjectMetadata, error) {
	got, err := c.api(o.kind.gvr, o.ns).Get(ctx, o.name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, nil // the watch will tell
	case err != nil:
		return nil, fmt.Errorf("read %s: %w", o, err)
	case idOf(got.UID) != o.id:
		return nil, nil
	}
	return got, nil
}

// remove deletes the object as it was read. If it changed since, but its owners
// did not, it is deleted all the same: one that changes all the time (a pod's
// status) must not escape.
func (c *collector) remove(ctx context.Context, o object, latest *metav1.PartialObjectMetadata, how metav1.DeletionPropagation) error {
	api := c.api(o.kind.gvr, o.ns)
	opts := metav1.DeleteOptions{PropagationPolicy: &how, Preconditions: &metav1.Preconditions{UID: &latest.UID, ResourceVersion: &latest.ResourceVersion}}
	err := api.Delete(ctx, o.name, opts)
	if apierrors.IsConflict(err) {
		now, readErr := c.read(ctx, o)
		if now == nil || readErr != nil {
			return readErr
		}
		if equality.Semantic.DeepEqual(now.OwnerReferences, latest.OwnerReferences) {
			opts.Preconditions.ResourceVersion = nil
			err = api.Delete(ctx, o.name, opts)
		}
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("delete %s, whose owners are gone: %w", o, err)
	}
	return nil
}

// letGo takes an owner off a dependent.
func (c *collector) letGo(ctx context.Context, o object, owner types.UID) error {
	// A few tries here: a conflict must not make all its siblings be read again.
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		latest, err := c.read(ctx, o)
		if latest == nil || err != nil {
			return err
		}
		return c.editOwners(ctx, o, latest, without(owner))
	})
}

func without(drop ...types.UID) func([]metav1.OwnerReference) []metav1.OwnerReference {
	return func(refs []metav1.OwnerReference) []metav1.OwnerReference {
		return slices.DeleteFunc(refs, func(r metav1.OwnerReference) bool { return slices.Contains(drop, r.UID) })
	}
}

// unblocked lets no owner wait for the object.
func unblocked(refs []metav1.OwnerReference) []metav1.OwnerReference {
	for i := range refs {
		refs[i].BlockOwnerDeletion = nil
	}
	return refs
}

// editOwners changes the owner references of an object as it was read. A merge
// patch works for every kind, custom ones included.
func (c *collector) editOwners(ctx context.Context, o object, latest *metav1.PartialObjectMetadata, edit func([]metav1.OwnerReference) []metav1.OwnerReference) error {
	refs := edit(slices.Clone(latest.OwnerReferences))
	if equality.Semantic.DeepEqual(refs, latest.OwnerReferences) {
		return nil
	}
	return c.patch(ctx, o, latest, map[string]any{"ownerReferences": refs})
}

func (c *collector) removeFinalizer(ctx context.Context, o object, finalizer string) error {
	if !c.watches.ready() {
		return fmt.Errorf("remove finalizer %s of %s: not all kinds are listed yet: %w", finalizer, o, controller.ErrStaleView)
	}
	latest, err := c.read(ctx, o)
	if latest == nil || err != nil || !slices.Contains(latest.Finalizers, finalizer) {
		return err
	}
	rest := slices.DeleteFunc(slices.Clone(latest.Finalizers), func(f string) bool { return f == finalizer })
	return c.patch(ctx, o, latest, map[string]any{"finalizers": rest})
}

// patch changes metadata of the object as it was read.
func (c *collector) patch(ctx context.Context, o object, latest *metav1.PartialObjectMetadata, fields map[string]any) error {
	fields["uid"], fields["resourceVersion"] = latest.UID, latest.ResourceVersion
	body, err := json.Marshal(map[string]any{"metadata": fields})
	if err != nil {
		return fmt.Errorf("encode a patch of %s: %w", o, err)
	}
	_, err = c.api(o.kind.gvr, o.ns).Patch(ctx, o.name, types.MergePatchType, body, metav1.PatchOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("patch metadata of %s: %w", o, err)
	}
	return nil
}
