package namespace

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/discovery"
)

// page bounds how many objects' metadata are held at once.
const page = 500

var podsGVR = corev1.SchemeGroupVersion.WithResource("pods")

// sweep is what one pass over a namespace found.
type sweep struct {
	discoveryErr error      // not all kinds are known
	parseErr     error      // a group version could not be read
	deleteErrs   []error    // what could not be listed or deleted
	left         []leftover // what is still there
}

// leftover is what is left of one kind.
type leftover struct {
	resource   schema.GroupVersionResource
	count      int
	finalizers map[string]int // how many objects each holds
}

func (s sweep) total() (n int) {
	for _, l := range s.left {
		n += l.count
	}
	return n
}

func (s sweep) err() error {
	return errors.Join(append([]error{s.discoveryErr, s.parseErr}, s.deleteErrs...)...)
}

// clean says that nothing is left, for certain.
func (s sweep) clean() bool { return s.err() == nil && len(s.left) == 0 }

// sweep asks for the deletion of everything in ns and counts what is left;
// as long as there are pods, of them only.
func (c *namespaces) sweep(ctx context.Context, ns *corev1.Namespace) sweep {
	var s sweep
	s.empty(c.emptyOut(ctx, podsGVR, ns.Name, true))
	if len(s.left) > 0 || len(s.deleteErrs) > 0 {
		return s
	}
	lists, err := discovery.ServerPreferredNamespacedResources(c.Client.Discovery())
	// A part of the kinds is better than nothing: those are emptied already.
	s.discoveryErr = err
	var resources []metav1.APIResource
	for _, l := range lists {
		gv, err := schema.ParseGroupVersion(l.GroupVersion)
		if err != nil {
			s.parseErr = errors.Join(s.parseErr, err)
			continue
		}
		for _, r := range l.APIResources {
			r.Group, r.Version = gv.Group, gv.Version
			if slices.Contains(r.Verbs, "delete") && slices.Contains(r.Verbs, "list") && !strings.Contains(r.Name, "/") {
				resources = append(resources, r)
			}
		}
	}
	if len(resources) == 0 && s.discoveryErr == nil {
		s.discoveryErr = errors.New("the API offers no namespaced kinds")
	}
	for _, r := range resources {
		gvr := schema.GroupVersionResource{Group: r.Group, Version: r.Version, Resource: r.Name}
		if gvr != podsGVR && ctx.Err() == nil {
			s.empty(c.emptyOut(ctx, gvr, ns.Name, slices.Contains(r.Verbs, "deletecollection")))
		}
	}
	return s
}

func (s *sweep) empty(l leftover, err error) {
	if err != nil {
		s.deleteErrs = append(s.deleteErrs, err)
	}
	if l.count > 0 {
		s.left = append(s.left, l)
	}
}

// emptyOut deletes all objects of one kind that are not being deleted already,
// and returns what is left after that.
func (c *namespaces) emptyOut(ctx context.Context, gvr schema.GroupVersionResource, ns string, collection bool) (leftover, error) {
	l, untouched, err := c.count(ctx, gvr, ns)
	if err != nil || untouched == 0 {
		return l, err
	}
	api := c.Metadata.Resource(gvr).Namespace(ns)
	// In the background: nothing of this namespace may stay for its owner's sake.
	opts := metav1.DeleteOptions{PropagationPolicy: new(metav1.DeletePropagationBackground)}
	if collection {
		err = api.DeleteCollection(ctx, opts, metav1.ListOptions{})
		if apierrors.IsMethodNotSupported(err) || apierrors.IsNotFound(err) {
			collection = false
		} else if err != nil {
			return l, fmt.Errorf("delete all %s: %w", gvr.GroupResource(), err)
		}
	}
	if !collection {
		if err := c.deleteEach(ctx, gvr, ns, opts); err != nil {
			return l, err
		}
	}
	l, _, err = c.count(ctx, gvr, ns)
	return l, err
}

func (c *namespaces) deleteEach(ctx context.Context, gvr schema.GroupVersionResource, ns string, opts metav1.DeleteOptions) error {
	return c.each(ctx, gvr, ns, func(o *metav1.PartialObjectMetadata) error {
		err := c.Metadata.Resource(gvr).Namespace(ns).Delete(ctx, o.Name, opts)
		if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsMethodNotSupported(err) {
			return fmt.Errorf("delete %s %s: %w", gvr.GroupResource(), o.Name, err)
		}
		return nil
	})
}

// count returns what there is of one kind, and how many of that are not being deleted.
func (c *namespaces) count(ctx context.Context, gvr schema.GroupVersionResource, ns string) (leftover, int, error) {
	l := leftover{resource: gvr, finalizers: map[string]int{}}
	untouched := 0
	err := c.each(ctx, gvr, ns, func(o *metav1.PartialObjectMetadata) error {
		l.count++
		if o.DeletionTimestamp == nil {
			untouched++
		}
		for _, f := range o.Finalizers {
			l.finalizers[f]++
		}
		return nil
	})
	return l, untouched, err
}

// each calls f for every object of one kind, page by page. A kind that the API
// does not serve (any more) has none.
func (c *namespaces) each(ctx context.Context, gvr schema.GroupVersionResource, ns string, f func(*metav1.PartialObjectMetadata) error) error {
	opts := metav1.ListOptions{Limit: page}
	for {
		l, err := c.Metadata.Resource(gvr).Namespace(ns).List(ctx, opts)
		if apierrors.IsMethodNotSupported(err) || apierrors.IsNotFound(err) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("list %s: %w", gvr.GroupResource(), err)
		}
		for i := range l.Items {
			if err := f(&l.Items[i]); err != nil {
				return err
			}
		}
		if opts.Continue = l.Continue; opts.Continue == "" {
			return nil
		}
	}
}
