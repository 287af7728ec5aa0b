package kinds

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metainternalversion "k8s.io/apimachinery/pkg/apis/meta/internalversion"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	genericapirequest "k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/rest"
	api "k8s.io/kubernetes/pkg/apis/core"
	"k8s.io/kubernetes/pkg/apis/networking"
	"k8s.io/kubernetes/pkg/registry/core/service/ipallocator"
	ipaddressrest "k8s.io/kubernetes/pkg/registry/networking/ipaddress/storage"
)

// ipAddresses refuses to delete the address of a Service that has it. Upstream's repair, which every replica runs, deletes an
// address when its own view holds no such Service: one whose view comes back after a long cut may hear of an address a moment
// before it hears of its Service, and what it gave free somebody else could get. And upstream's update of a Service gives an
// address free before the Service that has it no more is written; such a deletion is tried once more a moment later, and what
// is still left then is found by the repair.
type ipAddresses struct {
	*ipaddressrest.REST
	services rest.Getter

	again chan struct{}      // bounds wg
	life  context.Context    // of what wg waits for
	end   context.CancelFunc // of life
	wg    sync.WaitGroup
}

const (
	// releaseAgain is how much later a refused deletion is tried again, releases how many wait for that at most.
	releaseAgain = time.Second
	releases     = 64
)

// guardAddresses puts the storage of IPAddresses behind that check.
func guardAddresses(core, networks *Group) error {
	services, ok := core.VersionedResourcesStorageMap["v1"]["services"].(rest.Getter)
	all := networks.VersionedResourcesStorageMap["v1"]
	addresses, known := all["ipaddresses"].(*ipaddressrest.REST)
	if !ok || !known {
		return fmt.Errorf("storages of services and ipaddresses are a %T and a %T, which this version of Skein does not know",
			core.VersionedResourcesStorageMap["v1"]["services"], all["ipaddresses"])
	}
	guard := &ipAddresses{REST: addresses, services: services, again: make(chan struct{}, releases)}
	guard.life, guard.end = context.WithCancel(context.Background())
	all["ipaddresses"] = guard
	return nil
}

// free is an error while the Service that an address is for has it.
func (r *ipAddresses) free(ctx context.Context, obj runtime.Object) error {
	ip, ok := obj.(*networking.IPAddress)
	if !ok || ip.Spec.ParentRef == nil || ip.Spec.ParentRef.Group != "" || ip.Spec.ParentRef.Resource != "services" {
		return nil
	}
	p := ip.Spec.ParentRef
	o, err := r.services.Get(genericapirequest.WithNamespace(ctx, p.Namespace), p.Name, &metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("Service %s/%s, which has the address %s: %w", p.Namespace, p.Name, ip.Name, err)
	}
	if s, ok := o.(*api.Service); ok && slices.Contains(s.Spec.ClusterIPs, ip.Name) {
		r.later(ctx, ip)
		return apierrors.NewConflict(networking.Resource("ipaddresses"), ip.Name, fmt.Errorf("Service %s/%s has this address", p.Namespace, p.Name))
	}
	return nil
}

// later deletes an address if its Service does not have it any more then.
func (r *ipAddresses) later(ctx context.Context, ip *networking.IPAddress) {
	if ctx.Value(secondTry{}) != nil || ip.Labels[networkingv1.LabelManagedBy] != ipallocator.ControllerName {
		return
	}
	select {
	case r.again <- struct{}{}:
	default:
		return // the repair comes by
	}
	ctx = context.WithValue(context.WithoutCancel(ctx), secondTry{}, true)
	r.wg.Go(func() {
		defer func() { <-r.again }()
		ctx, cancel := context.WithTimeout(ctx, 5*releaseAgain)
		defer cancel()
		defer context.AfterFunc(r.life, cancel)()
		select {
		case <-time.After(releaseAgain):
		case <-ctx.Done():
			return // the server ends: the repair of another one finds it
		}
		_, _, _ = r.Delete(ctx, ip.Name, nil, &metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &ip.UID}})
	})
}

type secondTry struct{}

// Destroy implements rest.Storage.
func (r *ipAddresses) Destroy() {
	r.end()
	r.wg.Wait()
	r.REST.Destroy()
}

func (r *ipAddresses) validate(next rest.ValidateObjectFunc) rest.ValidateObjectFunc {
	return func(ctx context.Context, obj runtime.Object) error {
		if next != nil {
			if err := next(ctx, obj); err != nil {
				return err
			}
		}
		return r.free(ctx, obj)
	}
}

// Delete implements rest.GracefulDeleter.
func (r *ipAddresses) Delete(ctx context.Context, name string, v rest.ValidateObjectFunc, o *metav1.DeleteOptions) (runtime.Object, bool, error) {
	return r.REST.Delete(ctx, name, r.validate(v), o)
}

// DeleteCollection implements rest.CollectionDeleter.
func (r *ipAddresses) DeleteCollection(ctx context.Context, v rest.ValidateObjectFunc, o *metav1.DeleteOptions, l *metainternalversion.ListOptions) (runtime.Object, error) {
	return r.REST.DeleteCollection(ctx, r.validate(v), o, l)
}
