package controller

import (
	"errors"
	"fmt"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// NewFactory returns the shared view over client: one decoded copy of each kind
// that somebody asked for, without managed fields, which no controller reads
// and which are often half of an object. Of pods, it has no more than what
// decides where they run and how they are: not how their containers are
// started, nor the volumes that any node can make (see slim). So no controller may
// update a pod from the view; what it changes it patches. Pods are held
// packed, see there: who reads the same one twice may get two that are equal, so nobody compares pointers, and who keeps many for long keeps
// of them what it needs (1.3 KB each). Of nodes, it lacks what only their agents and users read (see slimNode), of Leases all but their names and renewal. The factory is not started; it serves one leadership.
func NewFactory(client kubernetes.Interface) informers.SharedInformerFactory {
	return viewFactory{informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform((&shares{}).strip))}
}

func (s *shares) strip(obj any) (any, error) {
	if _, done := obj.(*packed); done { // a streamed first list comes here twice
		return obj, nil
	}
	if acc, err := meta.Accessor(obj); err == nil && acc.GetManagedFields() != nil {
		acc.SetManagedFields(nil)
	}
	switch o := obj.(type) {
	case *corev1.Pod:
		slim(o)
		return s.pack(o), nil
	case *corev1.Node:
		slimNode(o)
		s.shareNode(o)
	case *coordinationv1.Lease:
		*o = coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Namespace: same(o.Namespace), Name: o.Name, ResourceVersion: o.ResourceVersion},
			Spec:       coordinationv1.LeaseSpec{RenewTime: o.Spec.RenewTime},
		}
	}
	return obj, nil
}

// slimNode drops of a node what neither placement nor a controller reads: half
// of it, which adds up to 10 MB with 5,000.
func slimNode(n *corev1.Node) {
	st := &n.Status
	st.Capacity, st.Addresses, st.VolumesInUse, st.VolumesAttached, st.Config, st.RuntimeHandlers, st.Features = nil, nil, nil, nil, nil, nil, nil
	st.NodeInfo, st.DaemonEndpoints = corev1.NodeSystemInfo{}, corev1.NodeDaemonEndpoints{}
	for i := range st.Conditions {
		c := &st.Conditions[i]
		c.Type, c.Status, c.Reason, c.Message = same(c.Type), same(c.Status), same(c.Reason), same(c.Message)
	}
}

// AsSeen makes of a pod from the API what the view would hold of it. The pod must be the caller's alone.
func AsSeen(pod *corev1.Pod) *corev1.Pod {
	slim(pod)
	return pod
}

// slim drops of a pod what the node's agent alone reads: a third to a half of
// it, which adds up to 15 MB in a cluster of 10,000.
func slim(pod *corev1.Pod) {
	spec := &pod.Spec
	for _, list := range [][]corev1.Container{spec.InitContainers, spec.Containers} {
		for i := range list {
			c := &list[i]
			c.Command, c.Args, c.Env, c.EnvFrom, c.VolumeMounts = nil, nil, nil, nil, nil
			c.LivenessProbe, c.ReadinessProbe, c.StartupProbe, c.Lifecycle, c.SecurityContext = nil, nil, nil, nil, nil
			c.WorkingDir, c.TerminationMessagePath = "", ""
		}
	}
	spec.DNSConfig, spec.HostAliases, spec.SecurityContext, spec.ImagePullSecrets = nil, nil, nil, nil
	var tied []corev1.Volume
	for _, v := range spec.Volumes {
		if v.Projected == nil && v.ConfigMap == nil && v.Secret == nil && v.DownwardAPI == nil && v.EmptyDir == nil && v.HostPath == nil && v.Image == nil {
			tied = append(tied, v)
		}
	}
	spec.Volumes = tied
	for _, list := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for i := range list {
			c := &list[i]
			c.ImageID, c.ContainerID, c.VolumeMounts, c.User = "", "", nil, nil
			for _, t := range []*corev1.ContainerStateTerminated{c.State.Terminated, c.LastTerminationState.Terminated} {
				if t != nil {
					t.ContainerID = ""
				}
			}
		}
	}
}

// Names of the indexes that controllers share.
const (
	// IndexController finds objects by the uid of their controller, and those
	// without one by OrphanKey of their namespace.
	IndexController = "skein/controller"
	// IndexNode finds pods by the name of the node that they are bound to; ""
	// finds those that are not bound.
	IndexNode = "skein/node"
	// IndexEnded finds, under KeyEnded, the pods that have succeeded or failed.
	IndexEnded = "skein/ended"
	// KeyEnded is the only key of IndexEnded.
	KeyEnded = "ended"
)

// OrphanKey is the key in IndexController of a namespace's objects that have no controller.
func OrphanKey(namespace string) string { return "orphan/" + namespace }

// EnsureIndexes adds the named shared indexes to informer where they are
// missing. Only New of a controller may call it, one at a time.
func EnsureIndexes(informer cache.SharedIndexInformer, names ...string) error {
	have := informer.GetIndexer().GetIndexers()
	add := cache.Indexers{}
	for _, name := range names {
		if _, ok := have[name]; ok {
			continue
		}
		switch name {
		case IndexController:
			add[name] = indexByController
		case IndexNode:
			add[name] = indexByNode
		case IndexEnded:
			add[name] = indexEnded
		case IndexClaim:
			add[name] = indexByClaim
		default:
			return fmt.Errorf("controller: no index of the name %q", name)
		}
	}
	if len(add) == 0 {
		return nil
	}
	if pods, ok := informer.(*podInformer); ok {
		informer = pods.SharedIndexInformer // these look at what it holds
	}
	if err := informer.AddIndexers(add); err != nil {
		return fmt.Errorf("controller: add indexes to the shared view: %w", err)
	}
	return nil
}

func indexByController(obj any) ([]string, error) {
	acc, err := meta.Accessor(obj)
	if err != nil {
		return nil, err
	}
	if ref := metav1.GetControllerOfNoCopy(acc); ref != nil {
		return []string{string(ref.UID)}, nil
	}
	return []string{OrphanKey(acc.GetNamespace())}, nil
}

func indexByNode(obj any) ([]string, error) {
	switch o := obj.(type) {
	case *packed:
		return []string{o.node.Value()}, nil
	case *corev1.Pod:
		return []string{o.Spec.NodeName}, nil
	}
	return nil, errors.New("controller: the index by node is for pods only")
}

func indexEnded(obj any) ([]string, error) {
	var phase corev1.PodPhase
	switch o := obj.(type) {
	case *packed:
		phase = o.status.Phase
	case *corev1.Pod:
		phase = o.Status.Phase
	}
	if ended(phase) {
		return []string{KeyEnded}, nil
	}
	return nil, nil
}

// ByIndex returns what index has under any of keys.
func ByIndex[T any](indexer cache.Indexer, index string, keys ...string) ([]T, error) {
	var out []T
	for _, key := range keys {
		objs, err := indexer.ByIndex(index, key)
		if err != nil {
			return nil, fmt.Errorf("controller: look up %s=%s in the shared view: %w", index, key, err)
		}
		for _, obj := range objs {
			if t, ok := obj.(T); ok {
				out = append(out, t)
			}
		}
	}
	return out, nil
}

// Controlled returns the objects that the owner with that uid controls and the
// namespace's objects that nobody controls: all that PlanClaims needs to see.
func Controlled[T any](indexer cache.Indexer, namespace string, owner types.UID) ([]T, error) {
	return ByIndex[T](indexer, IndexController, string(owner), OrphanKey(namespace))
}

// Key is the queue key of a namespaced object: namespace/name.
func Key(obj metav1.Object) string { return cache.MetaObjectToName(obj).String() }
