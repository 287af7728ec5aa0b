package replicaset

import (
	"context"
	"fmt"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	appslisters "k8s.io/client-go/listers/apps/v1"
	"k8s.io/client-go/tools/cache"

	"skein.io/skein/scheduler/controller"
)

// source is where sets come from and where their status goes.
type source struct {
	name, component string
	kind            schema.GroupVersionKind
	rsInf           cache.SharedIndexInformer
	own             []cache.SharedIndexInformer // those that the controller has to run itself
	sets            appslisters.ReplicaSetLister
	// fresh reads the set from the store itself.
	fresh     func(context.Context, *appsv1.ReplicaSet) (metav1.Object, error)
	putStatus func(context.Context, *appsv1.ReplicaSet) error
	// countsTerminating says that the kind's status has a place for pods that end.
	countsTerminating bool
}

// reference is what events about a set refer to.
func (s source) reference(rs *appsv1.ReplicaSet) *corev1.ObjectReference {
	return &corev1.ObjectReference{APIVersion: s.kind.GroupVersion().String(), Kind: s.kind.Kind, Namespace: rs.Namespace, Name: rs.Name, UID: rs.UID, ResourceVersion: rs.ResourceVersion}
}

func replicaSetSource(deps controller.Deps) source {
	sets := deps.Factory.Apps().V1().ReplicaSets()
	return source{
		name: "replicaset", component: "replicaset-controller", kind: appsv1.SchemeGroupVersion.WithKind("ReplicaSet"),
		rsInf: sets.Informer(), sets: sets.Lister(), countsTerminating: true,
		fresh: func(ctx context.Context, rs *appsv1.ReplicaSet) (metav1.Object, error) {
			return deps.Client.AppsV1().ReplicaSets(rs.Namespace).Get(ctx, rs.Name, metav1.GetOptions{})
		},
		putStatus: func(ctx context.Context, rs *appsv1.ReplicaSet) error {
			_, err := deps.Client.AppsV1().ReplicaSets(rs.Namespace).UpdateStatus(ctx, rs, metav1.UpdateOptions{})
			return err
		},
	}
}

// replicationSource shows ReplicationControllers as ReplicaSets, in a view of its
// own: the shared one holds them as they are.
func replicationSource(deps controller.Deps) source {
	client := deps.Client.CoreV1().ReplicationControllers
	inf := cache.NewSharedIndexInformer(cache.ToListWatcherWithWatchListSemantics(&cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			return client(metav1.NamespaceAll).List(ctx, o)
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			return client(metav1.NamespaceAll).Watch(ctx, o)
		},
	}, deps.Client), &corev1.ReplicationController{}, 0, cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc})
	// It fails only on a view that has been started.
	if err := inf.SetTransform(func(obj any) (any, error) {
		rc, ok := obj.(*corev1.ReplicationController)
		if !ok {
			return obj, nil // transformed before
		}
		return asSet(rc), nil
	}); err != nil {
		panic(fmt.Sprintf("replicaset: transform of a new view: %v", err))
	}
	return source{
		name: "replicationcontroller", component: "replication-controller", kind: corev1.SchemeGroupVersion.WithKind("ReplicationController"),
		rsInf: inf, own: []cache.SharedIndexInformer{inf}, sets: appslisters.NewReplicaSetLister(inf.GetIndexer()),
		fresh: func(ctx context.Context, rs *appsv1.ReplicaSet) (metav1.Object, error) {
			return client(rs.Namespace).Get(ctx, rs.Name, metav1.GetOptions{})
		},
		putStatus: func(ctx context.Context, rs *appsv1.ReplicaSet) error {
			rc := &corev1.ReplicationController{ObjectMeta: rs.ObjectMeta, Status: statusOf(rs.Status)}
			rc.Spec = corev1.ReplicationControllerSpec{Replicas: rs.Spec.Replicas, MinReadySeconds: rs.Spec.MinReadySeconds,
				Selector: rs.Spec.Selector.MatchLabels, Template: &rs.Spec.Template}
			_, err := client(rs.Namespace).UpdateStatus(ctx, rc, metav1.UpdateOptions{})
			return err
		},
	}
}

// asSet is the ReplicationController as a ReplicaSet.
func asSet(rc *corev1.ReplicationController) *appsv1.ReplicaSet {
	rs := &appsv1.ReplicaSet{ObjectMeta: rc.ObjectMeta}
	rs.ManagedFields = nil
	rs.Spec = appsv1.ReplicaSetSpec{Replicas: rc.Spec.Replicas, MinReadySeconds: rc.Spec.MinReadySeconds,
		Selector: &metav1.LabelSelector{MatchLabels: rc.Spec.Selector}}
	if rc.Spec.Template != nil {
		rs.Spec.Template = *rc.Spec.Template
	}
	s := rc.Status
	rs.Status = appsv1.ReplicaSetStatus{Replicas: s.Replicas, FullyLabeledReplicas: s.FullyLabeledReplicas, ReadyReplicas: s.ReadyReplicas,
		AvailableReplicas: s.AvailableReplicas, ObservedGeneration: s.ObservedGeneration}
	for _, c := range s.Conditions {
		rs.Status.Conditions = append(rs.Status.Conditions, appsv1.ReplicaSetCondition{Type: appsv1.ReplicaSetConditionType(c.Type), Status: c.Status,
			LastTransitionTime: c.LastTransitionTime, Reason: c.Reason, Message: c.Message})
	}
	return rs
}

// statusOf is the set's status as a ReplicationController's, which does not know
// of terminating pods.
func statusOf(s appsv1.ReplicaSetStatus) corev1.ReplicationControllerStatus {
	out := corev1.ReplicationControllerStatus{Replicas: s.Replicas, FullyLabeledReplicas: s.FullyLabeledReplicas, ReadyReplicas: s.ReadyReplicas,
		AvailableReplicas: s.AvailableReplicas, ObservedGeneration: s.ObservedGeneration}
	for _, c := range s.Conditions {
		out.Conditions = append(out.Conditions, corev1.ReplicationControllerCondition{Type: corev1.ReplicationControllerConditionType(c.Type), Status: c.Status,
			LastTransitionTime: c.LastTransitionTime, Reason: c.Reason, Message: c.Message})
	}
	return out
}
