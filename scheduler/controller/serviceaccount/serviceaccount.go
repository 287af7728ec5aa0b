// Package serviceaccount gives each namespace what pods in it cannot do
// without: the ServiceAccount "default", and the ConfigMap "kube-root-ca.crt"
// with the certificate by which they know the API.
//
// Inputs: Namespaces; ServiceAccounts and ConfigMaps of those two names.
// Outputs: creates the ServiceAccount; creates and corrects the ConfigMap.
//
// A namespace that is ending gets nothing any more.
package serviceaccount

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	coreinformers "k8s.io/client-go/informers/core/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"skein.io/skein/scheduler/controller"
)

const (
	name    = "serviceaccount"
	workers = 4
	account = "default"
	// rootCA is the ConfigMap's name, caKey its only key. Upstream's, which the
	// token volume of every pod refers to.
	rootCA = "kube-root-ca.crt"
	caKey  = "ca.crt"

	annDescription = "kubernetes.io/description"
	description    = "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints such as the internal service IP or kubernetes.default.svc. " +
		"No other usage is guaranteed across distributions of Kubernetes clusters."
)

type accounts struct {
	controller.Deps
	queue *controller.Queue[string] // of namespaces
	nsInf cache.SharedIndexInformer
	ns    corelisters.NamespaceLister
	// The cluster may hold large ConfigMaps and many ServiceAccounts; these see
	// only the one of each namespace.
	saInf cache.SharedIndexInformer
	cmInf cache.SharedIndexInformer
}

// New returns the controller. Deps.RootCA is required.
func New(deps controller.Deps) controller.Controller {
	deps = deps.WithDefaults()
	only := func(name string) func(*metav1.ListOptions) {
		return func(o *metav1.ListOptions) {
			o.FieldSelector = fields.OneTermEqualSelector("metadata.name", name).String()
		}
	}
	byNS := cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}
	return &accounts{
		Deps:  deps,
		queue: controller.NewQueue[string](name, deps.Clock),
		nsInf: deps.Factory.Core().V1().Namespaces().Informer(),
		ns:    deps.Factory.Core().V1().Namespaces().Lister(),
		saInf: coreinformers.NewFilteredServiceAccountInformer(deps.Client, metav1.NamespaceAll, 0, byNS, only(account)),
		cmInf: coreinformers.NewFilteredConfigMapInformer(deps.Client, metav1.NamespaceAll, 0, byNS, only(rootCA)),
	}
}

func (c *accounts) Name() string { return name }

func (c *accounts) Run(ctx context.Context) error {
	if len(c.RootCA) == 0 {
		return errors.New("controller serviceaccount: Deps.RootCA is required")
	}
	return controller.Run(ctx, controller.Work[string]{
		Queue:   c.queue,
		Workers: workers,
		Own:     []cache.SharedIndexInformer{c.saInf, c.cmInf},
		Watches: []controller.Watch{
			controller.On(c.nsInf, func(_, cur *corev1.Namespace) {
				if cur != nil {
					c.queue.Add(cur.Name)
				}
			}),
			controller.On(c.saInf, func(old, cur *corev1.ServiceAccount) {
				if cur == nil {
					c.queue.Add(old.Namespace)
				}
			}),
			controller.On(c.cmInf, func(old, cur *corev1.ConfigMap) {
				if cur == nil {
					cur = old
				}
				c.queue.Add(cur.Namespace)
			}),
		},
		Sync:   c.sync,
		Logger: c.Logger,
	})
}

func (c *accounts) sync(ctx context.Context, nsName string) error {
	ns, err := c.ns.Get(nsName)
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if ns.DeletionTimestamp != nil || ns.Status.Phase == corev1.NamespaceTerminating {
		return nil
	}
	return errors.Join(c.ensureAccount(ctx, nsName), c.ensureRootCA(ctx, nsName))
}

func (c *accounts) ensureAccount(ctx context.Context, ns string) error {
	if _, held, err := c.saInf.GetIndexer().GetByKey(ns + "/" + account); held || err != nil {
		return err
	}
	_, err := c.Client.CoreV1().ServiceAccounts(ns).Create(ctx,
		&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: account}}, metav1.CreateOptions{})
	return settled(err, "create ServiceAccount", ns, account)
}

func (c *accounts) ensureRootCA(ctx context.Context, ns string) error {
	obj, held, err := c.cmInf.GetIndexer().GetByKey(ns + "/" + rootCA)
	if err != nil {
		return err
	}
	var have *corev1.ConfigMap
	if held {
		have = obj.(*corev1.ConfigMap)
	}
	want := corrected(have, ns, c.RootCA)
	switch {
	case want == nil:
		return nil
	case have == nil:
		_, err = c.Client.CoreV1().ConfigMaps(ns).Create(ctx, want, metav1.CreateOptions{})
		return settled(err, "create ConfigMap", ns, rootCA)
	}
	_, err = c.Client.CoreV1().ConfigMaps(ns).Update(ctx, want, metav1.UpdateOptions{})
	return settled(err, "update ConfigMap", ns, rootCA)
}

// corrected returns the ConfigMap to write, nil if have (which may be nil) is right.
func corrected(have *corev1.ConfigMap, ns string, ca []byte) *corev1.ConfigMap {
	want := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: rootCA}}
	if have != nil {
		if len(have.Data) == 1 && have.Data[caKey] == string(ca) && len(have.BinaryData) == 0 && have.Annotations[annDescription] != "" {
			return nil
		}
		want = have.DeepCopy()
	}
	want.Data, want.BinaryData = map[string]string{caKey: string(ca)}, nil
	metav1.SetMetaDataAnnotation(&want.ObjectMeta, annDescription, description)
	return want
}

// settled drops errors that say that somebody else did it, or that the
// namespace is gone.
func settled(err error, what, ns, name string) error {
	if err == nil || apierrors.IsAlreadyExists(err) || apierrors.IsNotFound(err) || apierrors.HasStatusCause(err, corev1.NamespaceTerminatingCause) {
		return nil
	}
	return fmt.Errorf("%s %s/%s: %w", what, ns, name, err)
}
