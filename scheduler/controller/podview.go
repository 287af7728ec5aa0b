package controller

import (
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/informers/core"
	coreinformers "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
)

// viewFactory is client-go's factory, but for pods: its informer holds them packed, and gives them to readers as they were.
type viewFactory struct {
	informers.SharedInformerFactory
}

type viewCore struct {
	core.Interface
	f viewFactory
}

type viewCoreV1 struct {
	coreinformers.Interface
	f viewFactory
}

func (f viewFactory) Core() core.Interface                { return viewCore{f.SharedInformerFactory.Core(), f} }
func (c viewCore) V1() coreinformers.Interface            { return viewCoreV1{c.Interface.V1(), c.f} }
func (c viewCoreV1) Pods() coreinformers.PodInformer      { return c.f }
func (f viewFactory) Lister() corelisters.PodLister       { return podLister{f.pods().held} }
func (f viewFactory) Informer() cache.SharedIndexInformer { return f.pods() }

// ForResource makes sure that pods are ours here, too: the factory keeps the first informer of a kind.
func (f viewFactory) ForResource(r schema.GroupVersionResource) (informers.GenericInformer, error) {
	if r == corev1.SchemeGroupVersion.WithResource("pods") {
		f.pods()
	}
	return f.SharedInformerFactory.ForResource(r)
}

func (f viewFactory) pods() *podInformer {
	return f.InformerFor(&corev1.Pod{}, func(client kubernetes.Interface, resync time.Duration) cache.SharedIndexInformer {
		inner := coreinformers.NewPodInformer(client, corev1.NamespaceAll, resync, cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
		return &podInformer{inner, podIndexer{inner.GetIndexer()}}
	}).(*podInformer)
}

// podInformer unpacks what leaves the informer of pods.
type podInformer struct {
	cache.SharedIndexInformer
	held podIndexer
}

func (i *podInformer) GetStore() cache.Store     { return i.held }
func (i *podInformer) GetIndexer() cache.Indexer { return i.held }

func (i *podInformer) AddIndexers(add cache.Indexers) error {
	return i.SharedIndexInformer.AddIndexers(unpackedFirst(add))
}

func (i *podInformer) AddEventHandler(h cache.ResourceEventHandler) (cache.ResourceEventHandlerRegistration, error) {
	return i.SharedIndexInformer.AddEventHandler(podHandler{h})
}

func (i *podInformer) AddEventHandlerWithResyncPeriod(h cache.ResourceEventHandler, resync time.Duration) (cache.ResourceEventHandlerRegistration, error) {
	return i.SharedIndexInformer.AddEventHandlerWithResyncPeriod(podHandler{h}, resync)
}

func (i *podInformer) AddEventHandlerWithOptions(h cache.ResourceEventHandler, o cache.HandlerOptions) (cache.ResourceEventHandlerRegistration, error) {
	return i.SharedIndexInformer.AddEventHandlerWithOptions(podHandler{h}, o)
}

// podHandler gives pods to a handler.
type podHandler struct{ cache.ResourceEventHandler }

func (h podHandler) OnAdd(obj any, initial bool) {
	h.ResourceEventHandler.OnAdd(unpacked(obj), initial)
}
func (h podHandler) OnUpdate(old, cur any) {
	h.ResourceEventHandler.OnUpdate(unpacked(old), unpacked(cur))
}

func (h podHandler) OnDelete(obj any) {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = cache.DeletedFinalStateUnknown{Key: gone.Key, Obj: unpacked(gone.Obj)}
	}
	h.ResourceEventHandler.OnDelete(unpacked(obj))
}

// podIndexer gives pods to who looks them up.
type podIndexer struct{ cache.Indexer }

func allUnpacked(objs []any) []any {
	for i := range objs { // the list is the caller's
		objs[i] = unpacked(objs[i])
	}
	return objs
}

func (x podIndexer) List() []any { return allUnpacked(x.Indexer.List()) }

func (x podIndexer) Get(obj any) (item any, exists bool, err error) {
	item, exists, err = x.Indexer.Get(obj)
	return unpacked(item), exists, err
}

func (x podIndexer) GetByKey(key string) (item any, exists bool, err error) {
	item, exists, err = x.Indexer.GetByKey(key)
	return unpacked(item), exists, err
}

func (x podIndexer) Index(index string, obj any) ([]any, error) {
	objs, err := x.Indexer.Index(index, obj)
	return allUnpacked(objs), err
}

func (x podIndexer) ByIndex(index, value string) ([]any, error) {
	objs, err := x.Indexer.ByIndex(index, value)
	return allUnpacked(objs), err
}

func (x podIndexer) AddIndexers(add cache.Indexers) error {
	return x.Indexer.AddIndexers(unpackedFirst(add))
}

// unpackedFirst makes indexes of pods such of what is held.
func unpackedFirst(add cache.Indexers) cache.Indexers {
	out := make(cache.Indexers, len(add))
	for name, index := range add {
		out[name] = func(obj any) ([]string, error) { return index(unpacked(obj)) }
	}
	return out
}

// podLister lists pods: it unpacks only those that are selected.
type podLister struct{ held podIndexer }

type podNamespaceLister struct {
	podLister
	namespace string
}

func (l podLister) Pods(namespace string) corelisters.PodNamespaceLister {
	return podNamespaceLister{l, namespace}
}

func (l podLister) List(selector labels.Selector) ([]*corev1.Pod, error) {
	return selected(l.held.Indexer.List(), selector), nil
}

func (l podNamespaceLister) List(selector labels.Selector) ([]*corev1.Pod, error) {
	if l.namespace == corev1.NamespaceAll {
		return l.podLister.List(selector)
	}
	objs, err := l.held.Indexer.ByIndex(cache.NamespaceIndex, l.namespace)
	return selected(objs, selector), err
}

func selected(objs []any, selector labels.Selector) (out []*corev1.Pod) {
	for _, obj := range objs {
		switch o := obj.(type) {
		case *packed:
			if selector.Matches(labels.Set(o.meta.Labels)) {
				out = append(out, o.unpack())
			}
		case *corev1.Pod:
			if selector.Matches(labels.Set(o.Labels)) {
				out = append(out, o)
			}
		}
	}
	return out
}

func (l podNamespaceLister) Get(name string) (*corev1.Pod, error) {
	obj, exists, err := l.held.GetByKey(l.namespace + "/" + name)
	if err != nil {
		return nil, err
	}
	pod, ok := obj.(*corev1.Pod)
	if !exists || !ok {
		return nil, apierrors.NewNotFound(corev1.Resource("pods"), name)
	}
	return pod, nil
}
